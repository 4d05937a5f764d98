"""The principal directions of inputs that come batch by batch.

Of the rows so far only their count, mean, scatter and leading directions are kept. The next batch
X' (n', in) is decomposed together with those, and with one row for the shift of the mean:

    [ diag(S) V ;  X' - mean(X') ;  sqrt(n n' / (n + n')) (mean - mean(X')) ]  =  U S V

Paper: Ross et al. 2008, "Incremental learning for robust visual tracking", section 2.1.
Departs: the decomposition is the random one of Halko et al., with a fixed seed, as in PEFT.
"""

from __future__ import annotations

import torch
from torch import Tensor

SEED = 42
ITERATIONS = 4


class Directions:
    """The leading principal directions of all rows seen so far.

    Args:
        count: how many are kept, at most the rows' length.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self.seen = 0
        self.scatter = 0.0
        self.mean = torch.empty(0)
        self.components = torch.empty(0)
        self.values = torch.empty(0)

    @property
    def ratios(self) -> Tensor:
        """What share of the rows' variance each direction explains, ``(count,)``."""
        return self.values.square() / self.scatter

    def update(self, rows: Tensor) -> Tensor:
        """Take in a batch, ``(n, in)`` with at least `count` rows.

        Returns:
            The cosine of each direction with what it was before, ``(count,)``; zeros at first.
        """
        before, n = self.components, len(rows)
        mean = rows.mean(0, dtype=torch.float64)
        centred = (rows - mean).float()
        stacked = centred
        self.scatter += float(centred.double().square().sum())
        if self.seen:
            shift = self.mean - mean
            weight = self.seen * n / (self.seen + n)
            self.scatter += weight * float(shift.square().sum())
            leading = self.values[:, None] * before
            # In float64 from here on, as PEFT's are, since the mean is.
            stacked = torch.vstack([leading, centred, weight**0.5 * shift[None]])
        _, values, components = _decompose(stacked, 2 * self.count)
        self.components, self.values = components[: self.count], values[: self.count]
        self.mean = (self.mean * self.seen + mean * n) / (self.seen + n) if self.seen else mean
        self.seen += n
        if before.shape != self.components.shape:
            return torch.zeros(self.count)
        return torch.nn.functional.cosine_similarity(self.components, before).cpu()


def _decompose(X: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """U, S and Vᵀ of the leading ``rank``, each row of Vᵀ with its largest entry positive."""
    devices = [X.device] if X.is_cuda else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(SEED)
        U, S, V = torch.svd_lowrank(X, q=min(rank, *X.shape), niter=ITERATIONS)
    largest = V.abs().argmax(0)
    signs = V[largest, torch.arange(V.shape[1], device=V.device)].sign()
    return U * signs, S, (V * signs).T
