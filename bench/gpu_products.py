"""The narrow products of a training step on one GPU: time, and bytes per second that they reach.

    python bench/gpu_products.py           # the products
    python bench/gpu_products.py --tiles   # tiles of the kernels that regenerate a dropout's mask

Each row is one product of `adapted_linears` at 8192 tokens of bfloat16, for one adapter and for
eight in equal shares, beside the base layer's own product with and without an accumulation.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from _report import Report

TOKENS, RANK = 8192, 16
SHAPES = {
    "q, o": (4096, 4096),
    "k, v": (4096, 1024),
    "gate, up": (4096, 14336),
    "down": (14336, 4096),
}


def microseconds(run: Callable[[], Any], repeats: int = 20) -> list[float]:
    """Durations of single runs; the cache is flushed before each."""
    flush = torch.empty(2**28, dtype=torch.int8, device="cuda")
    for _ in range(3):
        run()
    found = []
    for _ in range(repeats):
        flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        found.append(start.elapsed_time(end) * 1e3)
    return found


def products(in_: int, out: int, adapters: int) -> dict[str, tuple[Callable[[], Any], int]]:
    """Each product, and the elements that it has to move."""
    draw = lambda *shape: torch.randn(*shape, dtype=torch.bfloat16, device="cuda")  # noqa: E731
    each = TOKENS // adapters
    x, dy = draw(adapters, each, in_), draw(adapters, each, out)
    A, B = draw(adapters, RANK, in_), draw(adapters, out, RANK)
    s = draw(adapters, each, RANK)
    W = draw(out, in_)
    flat, dflat, y, dx = (
        x.view(-1, in_),
        dy.view(-1, out),
        dy.clone().view(-1, out),
        x.clone().view(-1, in_),
    )
    if adapters == 1:
        x, dy, A, B, s = x[0], dy[0], A[0], B[0], s[0]
    mm = torch.mm if adapters == 1 else torch.bmm
    accumulate = torch.Tensor.addmm_ if adapters == 1 else torch.Tensor.baddbmm_
    y3, dx3 = y.view(*dy.shape), dx.view(*x.shape)
    N = TOKENS
    return {
        "base y = x Wᵀ": (lambda: torch.mm(flat, W.T), N * (in_ + out) + in_ * out),
        "base y += x Wᵀ": (lambda: y.addmm_(flat, W.T), N * (in_ + 2 * out) + in_ * out),
        "base dX += dY W": (lambda: dx.addmm_(dflat, W), N * (2 * in_ + out) + in_ * out),
        "s = x Aᵀ": (lambda: mm(x, A.mT), N * in_),
        "y = s Bᵀ": (lambda: mm(s, B.mT), N * out),
        "y += s Bᵀ": (lambda: accumulate(y3, s, B.mT), 2 * N * out),
        "dX += dS A": (lambda: accumulate(dx3, s, A), 2 * N * in_),
        "base dX = dY W": (lambda: torch.mm(dflat, W), N * (in_ + out) + in_ * out),
        "dS = dY B": (lambda: mm(dy, B), N * out),
        "dX = dS A": (lambda: mm(s, A), N * in_),
        "dA = dSᵀ x": (lambda: mm(s.mT, x), N * in_),
        "dB = dYᵀ s": (lambda: mm(dy.mT, s), N * out),
    }


TILES = {
    "SHRINK": [(32, 128, 4, 4), (16, 256, 4, 4), (32, 256, 4, 3), (64, 128, 4, 3), (64, 64, 4, 4),
               (128, 64, 8, 3)],
    "FACTOR": [(64, 64, 4, 3), (64, 128, 4, 3), (32, 128, 4, 4), (128, 64, 4, 3), (32, 256, 8, 3),
               (128, 128, 8, 2)],
    "INPUT": [(64, 128, 4, 2), (32, 256, 4, 2), (64, 256, 8, 2), (128, 128, 8, 2), (16, 256, 4, 2),
              (32, 128, 4, 2)],
}  # fmt: skip


def tiles() -> dict[str, tuple[int, int, int, int]]:
    """The fastest tile of each kernel over a model's shapes."""
    from multigraft.kernels import _triton_regenerated as kernels

    seed = torch.ones(1, dtype=torch.int32, device="cuda")
    draw = lambda *shape: torch.randn(*shape, dtype=torch.bfloat16, device="cuda")  # noqa: E731
    # q with k and v; o; gate with up; down
    shapes = [(4096, 3 * RANK), (4096, RANK), (4096, 2 * RANK), (14336, RANK)]
    inputs = [(draw(TOKENS, w), draw(r, w), draw(TOKENS, r)) for w, r in shapes]
    best = {}
    for name, candidates in TILES.items():
        sums = {}
        for tile in candidates:
            setattr(kernels, name, kernels.Tile(*tile))
            total = 0.0
            for x, A, ds in inputs:
                call = {
                    "SHRINK": lambda x=x, A=A: kernels.shrink(x, A, seed, 2**28, 1.1),
                    "FACTOR": lambda x=x, ds=ds: kernels.factor_gradient(ds, x, seed, 2**28, 1.1),
                    "INPUT": lambda A=A, ds=ds: kernels.input_gradient(ds, A, seed, 2**28, 1.1),
                }[name]
                total += sorted(microseconds(call, 8))[4]
            sums[tile] = total
            print(f"{name} {tile} {total:8.1f} us", flush=True)
        best[name] = min(sums, key=lambda tile: sums[tile])
        setattr(kernels, name, kernels.Tile(*best[name]))
    print("best:", best)
    return best


def main() -> None:
    """One row for each shape, number of adapters and product."""
    if "--tiles" in sys.argv:
        tiles()
        return
    report = Report("gpu_products", __doc__)
    for adapters in (1, 8):
        for name, (in_, out) in SHAPES.items():
            for product, (run, elements) in products(in_, out, adapters).items():
                found = microseconds(run)
                us = sorted(found)[len(found) // 2]
                rate = round(2 * elements / us / 1e6, 2)
                report.row(layer=name, adapters=adapters, product=product, us=found, TBps=rate)
                print(
                    f"{name:10} {adapters} {product:18} {us:8.1f} us {rate:6.2f} TB/s", flush=True
                )
    report.note(f"Device: {torch.cuda.get_device_name()}.")
    report.write()


if __name__ == "__main__":
    main()
