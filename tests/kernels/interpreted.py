"""Runs the Triton kernels on a CPU and compares them with the plain operators.

To be run with TRITON_INTERPRET=1, which Triton reads when a kernel is defined.
"""

from __future__ import annotations

import torch

from multigraft.kernels import _triton_regenerated as kernels
from multigraft.kernels import regenerated

P = 0.25


def main() -> None:
    """Prints a line for each product that is equal; outputs begin as NaN, so gaps would show."""
    torch.use_deterministic_algorithms(True)  # fills what is not written with NaN
    limit, scale = round(P * 2**32), 1 / (1 - P)
    for tokens, width, rank in [(1, 1, 1), (33, 130, 3), (70, 64, 16), (200, 100, 17)]:
        torch.manual_seed(tokens)
        rows = {1: 1, 33: 3, 70: 70, 200: 1}[tokens]
        seed = torch.randint(-(2**31), 2**31, (rows,), dtype=torch.int32)
        x, A, ds = torch.randn(tokens, width), torch.randn(rank, width), torch.randn(tokens, rank)
        turned = torch.randn(width, tokens).T if tokens > 1 else x
        for found, wanted in [
            (
                kernels.shrink(turned, A, seed, limit, scale),
                regenerated.dropped_shrink(turned, A, seed, P),
            ),
            (
                kernels.factor_gradient(ds, x, seed, limit, scale),
                regenerated.dropped_factor_gradient(ds, x, seed, P),
            ),
            (
                kernels.input_gradient(ds, A, seed, limit, scale),
                regenerated.dropped_input_gradient(ds, A, seed, P),
            ),
        ]:
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
            print("equal", tokens, width, rank)


if __name__ == "__main__":
    main()
