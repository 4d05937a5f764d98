"""Embeddings: a lookup in A, then a product with B."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

from tests.bases import geometry_laws as laws
from tests.bases.geometry_laws import geometry

IDS = torch.tensor([[0, 3, 3], [6, 1, 2]])


def build(kind: str = "plain") -> nn.Module:
    torch.manual_seed(0)
    if kind == "scaled":
        layer: nn.Module = Gemma3TextScaledWordEmbedding(7, 4, 0, embed_scale=3.0)
    else:
        layer = nn.Embedding(7, 4, padding_idx=0 if kind == "padded" else None)
    return layer.double().requires_grad_(False)


@pytest.fixture(params=["plain", "padded", "scaled"])
def layer(request: pytest.FixtureRequest) -> nn.Module:
    return build(request.param)


def test_factors_are_named_and_shaped_as_in_pefts_files(layer: nn.Module) -> None:
    assert geometry(layer).factors == ("lora_embedding_A", "lora_embedding_B")
    assert geometry(layer).factor_shapes(layer, 2) == ((2, 7), (4, 2))


def test_an_update_is_a_change_of_the_table(layer: nn.Module) -> None:
    laws.assert_update_is_a_change_of_the_weight(layer, IDS)


def test_run_is_the_forward(layer: nn.Module) -> None:
    laws.assert_runs_as_the_layer(layer, IDS)


def test_the_matrix_has_a_row_per_feature(layer: nn.Module) -> None:
    laws.assert_matrix_and_back(layer)


def test_gradients_are_the_functions_own() -> None:
    laws.assert_gradients(build(), IDS)


def test_a_scaled_embedding_scales_the_update_and_is_understood() -> None:
    scaled, plain = build("scaled"), build()
    A, B = laws.factors(plain, 2)
    update = geometry(plain).lift(plain, geometry(plain).project(plain, IDS, A), B)
    tripled = geometry(scaled).lift(scaled, geometry(scaled).project(scaled, IDS, A), B)
    torch.testing.assert_close(tripled, 3 * update)
    assert geometry(scaled).understands(scaled)


def test_the_padding_token_trains_nothing() -> None:
    layer = build("padded")
    A, B = (t.requires_grad_() for t in laws.factors(layer, 2))
    geometry(layer).lift(layer, geometry(layer).project(layer, IDS, A), B).sum().backward()
    assert A.grad is not None
    assert bool((A.grad[:, 0] == 0).all())
    assert bool((A.grad[:, 3] != 0).all())


def test_an_embedding_is_not_linear_for_all_linear(layer: nn.Module) -> None:
    assert not geometry(layer).is_linear


def test_indices_leave_the_factors_in_their_dtype() -> None:
    A = torch.zeros(2, 7, dtype=torch.bfloat16)
    assert geometry(build()).input_dtype(IDS, A) == torch.bfloat16


class Own(nn.Embedding):
    """A subclass whose forward means something else."""

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids).cumsum(1)


def test_a_subclass_with_a_forward_of_its_own_is_not_understood() -> None:
    assert not geometry(Own(2, 2)).understands(Own(2, 2))
