"""T28: an adapter costs its own sites, however many others there are. Counted, not timed.

PEFT 0.21.2: on 3,500 linear layers the first adapter takes 2.9 s, the second 5.5 s, the fourth
8.3 s: every addition scans all modules times all existing prefixes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from multigraft import (
    AdaptedLayer,
    LoraConfig,
    PeftModel,
    get_peft_model,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from multigraft import get_peft_model_state_dict as state_of
from multigraft.containers import AdapterDict
from multigraft.facade import LayerFacade
from multigraft.graft import Graft
from multigraft.methods.lora import LoRA
from tests.weaknesses import nets

ALL = LoraConfig(r=2, target_modules="all-linear")
ONE = LoraConfig(r=2, target_modules=["blocks.0.up"])
FEW, MANY = 2, 24


@contextmanager
def counted(patch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """Count what the library does: modules walked, layers planned, grafts read, tensors made."""
    counts: Counter[str] = Counter()

    def count(owner: type, name: str, as_generator: bool = False) -> None:
        original: Any = vars(owner)[name]
        function = original.fget if isinstance(original, property) else original

        def counting(*args: Any, **kwargs: Any) -> Any:
            counts[f"{owner.__name__}.{name}"] += 1
            return function(*args, **kwargs)

        def yielding(*args: Any, **kwargs: Any) -> Any:
            for item in function(*args, **kwargs):
                counts[f"{owner.__name__}.{name}"] += 1
                yield item

        wrapped = yielding if as_generator else counting
        patch.setattr(owner, name, property(wrapped) if isinstance(original, property) else wrapped)

    with patch.context() as patch:
        count(nn.Module, "named_modules", as_generator=True)
        count(AdaptedLayer, "plan_for")
        count(AdaptedLayer, "add")
        count(AdaptedLayer, "remove")
        count(AdapterDict, "__getitem__")
        count(LayerFacade, "merged_adapters")
        count(Graft, "params")
        count(Graft, "parameters", as_generator=True)
        count(LoRA, "tensors")
        count(LoRA, "__init__")
        yield counts


def grown(adapters: int) -> PeftModel:
    model = get_peft_model(nets.net(), ALL, adapter_name="n0")
    for index in range(1, adapters):
        model.add_adapter(f"n{index}", ALL)
    return model


def add(model: PeftModel, folder: Path) -> None:
    model.add_adapter("new", ALL)


def add_to_one_layer(model: PeftModel, folder: Path) -> None:
    model.add_adapter("new", ONE)


def load(model: PeftModel, folder: Path) -> None:
    model.load_adapter(folder, "new")


def load_over(model: PeftModel, folder: Path) -> None:
    model.load_adapter(folder, "n0")


def extract(model: PeftModel, folder: Path) -> None:
    state_of(model, adapter_name="n0")


def save(model: PeftModel, folder: Path) -> None:
    model.save_pretrained(folder / "out", selected_adapters=["n0"])


def inject(model: PeftModel, folder: Path) -> None:
    inject_adapter_in_model(ALL, model.get_base_model(), "new")


def overwrite(model: PeftModel, folder: Path) -> None:
    set_peft_model_state_dict(model, state_of(model, adapter_name="n1"), adapter_name="n0")


def activate(model: PeftModel, folder: Path) -> None:
    model.set_adapter("n1")


def merge(model: PeftModel, folder: Path) -> None:
    model.merge_adapter(["n1"])


def merge_and_unmerge(model: PeftModel, folder: Path) -> None:
    model.merge_adapter(["n1"])
    model.unmerge_adapter()


def disable(model: PeftModel, folder: Path) -> None:
    with model.disable_adapter():
        model(nets.ids())


def delete(model: PeftModel, folder: Path) -> None:
    model.delete_adapter("n1")


def route(model: PeftModel, folder: Path) -> None:
    model(nets.ids(2), adapter_names=["n0", "n1"])


def run(model: PeftModel, folder: Path) -> None:
    model(nets.ids())


STEPS: list[Callable[[PeftModel, Path], None]] = [
    add,
    add_to_one_layer,
    load,
    load_over,
    inject,
    extract,
    overwrite,
    save,
    activate,
    merge,
    merge_and_unmerge,
    disable,
    delete,
    route,
    run,
]


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.__name__)
def test_t28_a_step_on_one_adapter_does_the_same_work_among_few_and_among_many(
    step: Callable[[PeftModel, Path], None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    get_peft_model(nets.net(), ALL).save_pretrained(tmp_path)
    few, many = grown(FEW), grown(MANY)
    with counted(monkeypatch) as among_few:
        step(few, tmp_path)
    with counted(monkeypatch) as among_many:
        step(many, tmp_path)
    assert among_few == among_many
    if step is not run:
        assert sum(among_few.values()) > 0


def test_t28_an_adapter_of_one_layer_touches_one_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    model = grown(MANY)
    with counted(monkeypatch) as counts:
        model.add_adapter("new", ONE)
    assert counts["AdaptedLayer.add"] == 1
    assert counts["LoRA.__init__"] == 1
    assert counts["AdaptedLayer.plan_for"] <= 1


def test_t28_the_survey_sees_as_many_modules_among_many_adapters(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from multigraft import prepare, survey

    seen: list[int] = []
    original = survey.survey

    def counting(model: nn.Module) -> list[survey.Spot]:
        spots = original(model)
        seen.append(len(spots))
        return spots

    monkeypatch.setattr(prepare, "survey", counting)
    grown(MANY)
    assert seen == [len(list(nets.net().modules())) - 1] * MANY


def test_t28_a_forward_plans_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = grown(3)
    with counted(monkeypatch) as counts:
        for _ in range(3):
            model(nets.ids())
    assert counts["AdaptedLayer.plan_for"] == 0
    assert counts["Module.named_modules"] == 0
