"""OFT against PEFT: a block-diagonal rotation of what the layer sees."""

from __future__ import annotations

import copy
from typing import ClassVar

import torch
from torch import nn

from multigraft import OFTConfig, get_peft_model
from tests.methods.against_peft import LAYERS, ROWS, Case, One, StartsLikePeft, near
from tests.oracle import quiet

BLOCK = {"oft_block_size": 4}
FOUR = {"oft_block_size": 3}  # four blocks, whose root float32, in which PEFT takes it, holds


class TestOFT(StartsLikePeft):
    kind = "OFTConfig"
    cases: ClassVar = {
        "linear": Case("linear", BLOCK),
        "no bias": Case("linear wide", {"oft_block_size": 3}),
        "by number of blocks": Case("linear", {"r": 2, "oft_block_size": 0}),
        **{
            f"{terms} terms": Case("linear", BLOCK | {"num_cayley_neumann_terms": terms})
            for terms in (2, 3, 4, 6)
        },
        "exact Cayley": Case("linear", BLOCK | {"use_cayley_neumann": False}),
        "one block for all": Case("linear", BLOCK | {"block_share": True}),
        "coft": Case("linear", FOUR | {"coft": True, "eps": 2**-7}),
        "coft shared": Case("linear", FOUR | {"coft": True, "eps": 2**-7, "block_share": True}),
        "embedding": Case("embedding", {"oft_block_size": 2}),
        "random start": Case("linear", BLOCK | {"init_weights": False}),
    }


def test_a_convolution_computes_what_its_merged_weight_computes() -> None:
    """PEFT's forward does not: it rotates unfolded inputs and folds them, summing overlaps."""
    options = {"target_modules": ["layer"], "oft_block_size": 4, "use_cayley_neumann": False}
    layer = nn.Conv2d(
        4, 8, 2, stride=1
    )  # PEFT counts blocks of a kernel that is not square wrongly
    case = Case(lambda: One(copy.deepcopy(layer), (ROWS, 4, 4, 4)), options)
    suite = TestOFT()
    ours, theirs = suite.both(case)
    x = case.model().batch()
    before = ours(x)
    assert not torch.allclose(theirs(x), before)
    own = ours.merge_and_unload()
    with quiet():
        other = theirs.merge_and_unload()
    near(own(x), before)
    near(own.layer.weight, other.layer.weight)


def test_constrained_blocks_are_moved_into_the_ball_by_training_and_not_by_evaluation() -> None:
    config = OFTConfig(target_modules=["layer"], oft_block_size=3, coft=True, eps=0.01)
    model = get_peft_model(LAYERS["linear"](), config)
    q = model.get_parameter("base_model.model.layer.oft_R.default.weight")
    with torch.no_grad():
        q.fill_(1.0)
        model(torch.ones(1, 12))
    assert (q == 1.0).all()
    model(torch.ones(1, 12))
    radius = 0.01 / 4**0.5 / 2**0.5  # four blocks; each entry counts twice in a skew block
    torch.testing.assert_close(q.norm(dim=1), torch.full((4,), radius))


def test_dropped_blocks_are_identities_in_training_alone() -> None:
    """PEFT has the option and never applies it."""
    config = OFTConfig(
        target_modules=["layer"], oft_block_size=3, module_dropout=0.5, init_weights=False
    )
    base = LAYERS["linear"]()
    model = get_peft_model(base, config)
    rotation, seen = base.layer.grafts["default"][0], torch.ones(1, 12)
    whole = rotation.method.input(rotation.params, seen).unflatten(-1, (4, 3))
    model.eval()
    turned = rotation.method.input(rotation.params, seen).unflatten(-1, (4, 3))
    assert ((whole == 1).all(-1).sum(), (turned == 1).all(-1).sum()) == (2, 0)
    before = model(seen)
    merged = model.train().merge_and_unload()
    torch.testing.assert_close(merged(seen), before)
