"""The narrow products of a training step on one GPU: time, and bytes per second that they reach.

    python bench/gpu_products.py

Each row is one product of `adapted_linears` at 8192 tokens of bfloat16, for one adapter and for
eight in equal shares, beside the base layer's own product with and without an accumulation.
"""

from __future__ import annotations

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


def main() -> None:
    """One row for each shape, number of adapters and product."""
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
