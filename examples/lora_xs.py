"""A method of one's own in one file: LoRA-XS.

    y = W x + scaling * U R V x        R: (rank, rank), trained      scaling = alpha / rank
    V: (rank, in), U: (out, rank): the leading singular vectors of W, U times their values; frozen

Paper: Bałazy et al. 2024, arXiv:2405.17604. U and V are not saved: the base gives them again.
"""

from dataclasses import dataclass

import torch

from multigraft.config import RankedConfig
from multigraft.methods import Method, TensorSpec, method


@dataclass
class LoraXsConfig(RankedConfig):
    """`r` and `alpha` as in LoRA, with their patterns; targets and saved modules as everywhere."""

    peft_type: str = "LORA_XS"


@method("LORA_XS", config=LoraXsConfig, paper="arXiv:2405.17604")
class LoraXs(Method):
    """A small square matrix between the base weight's own leading directions."""

    prefix = "xs_"

    def __init__(self, site, config):
        super().__init__(site, config)
        self.rank = config.rank_at(site.path)
        self.scaling = config.alpha_at(site.path) / self.rank

    def tensors(self):
        in_, out = self.geometry.sizes(self.site.layer)
        return {
            "xs_R": TensorSpec((self.rank, self.rank)),
            "xs_U": TensorSpec((out, self.rank), buffer=True, saved=False),
            "xs_V": TensorSpec((self.rank, in_), buffer=True, saved=False),
        }

    def reset(self, params):
        W = self.geometry.as_matrix(self.site.layer, self.site.weight())
        U, S, V = torch.linalg.svd(W.to(torch.promote_types(W.dtype, torch.float32)), False)
        # A pair's sign is anyone's choice, and must be the same wherever the adapter is loaded.
        sign = V.gather(1, V.abs().argmax(1, keepdim=True)).sign()
        params["xs_U"].copy_((U * S * sign.T)[:, : self.rank])
        params["xs_V"].copy_((V * sign)[: self.rank])
        params["xs_R"].zero_()

    def delta(self, params, W=None):
        M = params["xs_U"] @ params["xs_R"] @ params["xs_V"] * self.scaling
        return self.geometry.from_matrix(self.site.layer, M)

    def apply(self, params, x):  # optional: never makes a matrix of the weight's size
        U, R, V = (params[name].to(x.dtype) for name in ("xs_U", "xs_R", "xs_V"))
        return ((x @ V.T) @ R.T) @ U.T * self.scaling
