"""How ranks are distributed by what directions explain."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from multigraft.bases import geometry_of
from multigraft.calibration.incremental import Directions
from multigraft.calibration.places import Place
from multigraft.calibration.ranks import Layer, distribute
from multigraft.site import Site
from multigraft.storage import storage_of


def layer(name: str, source: str, ratios: list[float], rank: int) -> Layer:
    base = nn.Linear(4, 4)
    place = Place(name, name, base, Site(name, base, geometry_of(base), storage_of(base)), rank)
    directions = Directions(len(ratios))
    directions.values, directions.scatter = torch.tensor(ratios).sqrt(), 1.0
    return Layer(place, source, len(ratios), directions)


def test_ranks_go_where_directions_explain_most() -> None:
    layers = {
        "much": layer("much", "much", [0.5, 0.3, 0.1, 0.05], 2),
        "little": layer("little", "little", [0.2, 0.04, 0.03, 0.02], 2),
    }
    assert distribute(layers) == {"much": 3, "little": 1}


def test_a_layer_may_get_none() -> None:
    layers = {
        "all": layer("all", "all", [0.5, 0.4], 1),
        "none": layer("none", "none", [0.1, 0.1], 1),
    }
    assert distribute(layers) == {"all": 2, "none": 0}


@pytest.mark.parametrize("shared_first", [False, True])
def test_of_layers_with_one_input_the_one_that_is_studied_gets_the_odd_rank(
    shared_first: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In whichever order a sort leaves equals."""
    if shared_first:

        def argsort(self: Tensor, **_: Any) -> Tensor:
            later_first = self - 1e-6 * torch.arange(len(self)).flip(0)
            return later_first.sort(descending=True).indices

        monkeypatch.setattr(torch.Tensor, "argsort", argsort)
    layers = {
        "source": layer("source", "source", [0.5, 0.2], 2),
        "shared": layer("shared", "source", [0.5, 0.2], 1),
    }
    assert distribute(layers) == {"source": 2, "shared": 1}
