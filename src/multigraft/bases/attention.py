"""``nn.MultiheadAttention``: two matrices, neither of which runs as a layer of its own.

    in_proj_weight: (3 * embed, embed)        out_proj.weight: (embed, embed)

The attention hands both to one operator, so `out_proj` is served where its parent is: as a tensor
of the attention, which runs with the adapted one in its place. Targeting the attention means both.

Departs from W + ΔW: PEFT adds the update of a targeted attention's `out_proj` twice, in its forward
as in its merge (observed in 0.21.2), so that this is what its files mean. It counts twice here too.

`nn.TransformerEncoderLayer` reads, in evaluation, the tensors of all its layers and runs an
operator of its own; what it reads from an adapted layer is the adapted tensor.
"""

from __future__ import annotations

from typing import Any, cast

from torch import nn

from multigraft.bases._matrix import Matrix
from multigraft.bases.contract import (
    GEOMETRIES,
    HOSTS,
    READERS,
    Geometry,
    Part,
    geometry_of,
)


class Attention(Geometry):
    """A whole attention: it is nothing but its two matrices."""

    name = "attention"

    def whole_refusal(self, layer: nn.Module) -> str | None:
        attention = cast(Any, layer)
        if not attention._qkv_same_embed_dim:
            return (
                "queries, keys and values have sizes of their own here, so there is no joint "
                "matrix; name q_proj_weight, k_proj_weight and v_proj_weight in "
                "`target_parameters`, and `out_proj` in `target_modules`"
            )
        found = geometry_of(attention.out_proj)
        if found is None or not found.is_linear:
            return f"its `out_proj` is a {type(attention.out_proj).__name__}, not a linear layer"
        return None

    def parts(self, layer: nn.Module) -> tuple[Part, ...]:
        out = geometry_of(cast(Any, layer).out_proj)
        assert out is not None, "asked `whole_refusal` first"
        joint = Part("", "in_proj_weight", Matrix("in_proj_weight"))
        return joint, Part("out_proj", None, out, times=2)


GEOMETRIES.register(nn.MultiheadAttention)(Attention())
HOSTS.register(nn.MultiheadAttention)(frozenset({"out_proj"}))
READERS.register(nn.TransformerEncoderLayer)(frozenset({"linear1", "linear2"}))
