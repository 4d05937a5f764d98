"""Names of adapters that are taken, absent or unusable: refused by every operation that takes one.

Which names are allowed, and what becomes of them in files, is `tests/weaknesses` (T26).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from multigraft import (
    AdapterNameError,
    LoraConfig,
    MultigraftError,
    PeftModel,
    RoutingError,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from tests.weaknesses import nets

CONFIG = LoraConfig(r=2, target_modules=["up", "head"])
Operation = Callable[[PeftModel, Any, Path], object]


def model_of(*names: str) -> PeftModel:
    """A model with these adapters, trained; the first is active."""
    first, *others = names
    model = get_peft_model(nets.net(), CONFIG, adapter_name=first)
    for name in others:
        model.add_adapter(name, CONFIG)
    nets.train_by_hand(model, *names)
    return model


ADDING: dict[str, Operation] = {
    "get_peft_model": lambda m, name, _: get_peft_model(m, CONFIG, adapter_name=name),
    "get_peft_model on the base": lambda m, name, _: get_peft_model(
        m.get_base_model(), CONFIG, adapter_name=name
    ),
    "add_adapter": lambda m, name, _: m.add_adapter(name, CONFIG),
    "add_adapter on meta": lambda m, name, _: m.add_adapter(name, CONFIG, low_cpu_mem_usage=True),
    "inject": lambda m, name, _: inject_adapter_in_model(CONFIG, m, adapter_name=name),
    "inject into the base": lambda m, name, _: inject_adapter_in_model(
        CONFIG, m.get_base_model(), adapter_name=name
    ),
}
LOADING: dict[str, Operation] = {
    "load_adapter": lambda m, name, folder: m.load_adapter(folder, name),
    "from_pretrained": lambda m, name, folder: PeftModel.from_pretrained(m, folder, name),
}
NAMING: dict[str, Operation] = {
    "set_adapter": lambda m, name, _: m.set_adapter(name),
    "set_adapter of several": lambda m, name, _: m.set_adapter(["german", name]),
    "set_adapter on the base model": lambda m, name, _: m.base_model.set_adapter(name),
    "set_requires_grad": lambda m, name, _: m.base_model.set_requires_grad(name, False),
    "delete_adapter": lambda m, name, _: m.delete_adapter(name),
    "merge_adapter": lambda m, name, _: m.merge_adapter(["german", name]),
    "merge_adapter of one": lambda m, name, _: m.merge_adapter(name),
    "unmerge_adapter": lambda m, name, _: m.unmerge_adapter([name]),
    "merge_and_unload": lambda m, name, _: m.merge_and_unload(adapter_names=["german", name]),
    "save_pretrained": lambda m, name, folder: m.save_pretrained(
        folder / "out", selected_adapters=["german", name]
    ),
    "get_peft_model_state_dict": lambda m, name, _: get_peft_model_state_dict(m, adapter_name=name),
    "set_peft_model_state_dict": lambda m, name, _: set_peft_model_state_dict(
        m, {}, adapter_name=name
    ),
}
ROUTING: dict[str, Operation] = {
    "forward": lambda m, name, _: m(nets.ids(2), adapter_names=["german", name]),
}


def refused(model: PeftModel, error: type[MultigraftError], operation: Callable[[], object]) -> str:
    """The message of a refusal that changed nothing."""
    facts = nets.known(model)
    with pytest.raises(error) as caught:
        operation()
    nets.assert_as_before(model, facts)
    return str(caught.value)


@pytest.mark.parametrize("how", ADDING)
@pytest.mark.parametrize("name", ["german", "french"])
def test_a_name_that_exists_is_refused_with_the_way_out(
    how: str, name: str, tmp_path: Path
) -> None:
    model = model_of("german", "french")
    message = refused(model, AdapterNameError, lambda: ADDING[how](model, name, tmp_path))
    assert f"adapter `{name}` exists on this model" in message
    assert f"Choose another name, or call delete_adapter('{name}') first" in message


def test_a_name_is_free_again_after_deletion() -> None:
    model = model_of("german", "french")
    model.delete_adapter("german")
    model.add_adapter("german", LoraConfig(r=3, target_modules=["down"]))
    assert model.peft_config["german"].r == 3  # type: ignore[attr-defined]


UNUSABLE: list[tuple[Any, str]] = [
    ("a/b", "must not contain ['/']: it names a folder. Use `a-b`"),
    ("../up", "must not contain ['/']: it names a folder. Use `..-up`"),
    ("/etc", "Use `-etc`"),
    ("a\\b:c", "Use `a-b-c`"),
    ("..", "must hold a letter or a digit: it names a folder"),
    (".", "must hold a letter or a digit: it names a folder"),
    ("", "must hold a letter or a digit: it names a folder"),
    ("\t", "must hold a letter or a digit: it names a folder"),
    ("__base__", "stands for the rows without an adapter"),
    ("x" * 201, "must be at most 200 bytes long"),
    ("\u00e4" * 101, "must be at most 200 bytes long"),
    ("README.md", "is that of a file which stands beside adapters' folders"),
    ("Adapter_Config.json", "is that of a file which stands beside adapters' folders"),
    (None, "(=None) must be a string"),
    (7, "(=7) must be a string"),
    (True, "(=True) must be a string"),
    (["a"], "(=['a']) must be a string"),
    (b"a", "(=b'a') must be a string"),
]


@pytest.mark.parametrize("how", [*ADDING, *LOADING])
@pytest.mark.parametrize(("name", "reason"), UNUSABLE, ids=lambda v: repr(v)[:20])
def test_a_name_that_cannot_name_a_folder_is_refused_before_anything_happens(
    name: Any, reason: str, how: str, tmp_path: Path
) -> None:
    model = model_of("german")
    model.save_pretrained(tmp_path)
    operation = (ADDING | LOADING)[how]
    message = refused(model, AdapterNameError, lambda: operation(model, name, tmp_path))
    assert reason in message
    assert [p.name for p in tmp_path.rglob("*")].count("adapter_config.json") == 1


@pytest.mark.parametrize("how", NAMING)
@pytest.mark.parametrize("merged", [False, True])
def test_an_absent_name_is_refused_with_the_nearest_and_all_there_are(
    how: str, merged: bool, tmp_path: Path
) -> None:
    model = model_of("german", "french")
    if merged:
        model.merge_adapter(["french"])
    message = refused(model, AdapterNameError, lambda: NAMING[how](model, "frnech", tmp_path))
    assert "no adapter is called `frnech`. Nearest: `french`." in message
    assert "There are: `german`, `french`." in message
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("how", ROUTING)
def test_a_row_of_an_absent_name_is_refused_with_the_nearest(how: str, tmp_path: Path) -> None:
    model = model_of("german", "french")
    message = refused(model, RoutingError, lambda: ROUTING[how](model, "frnech", tmp_path))
    assert "no adapter is called `frnech`. Nearest: `french`. There are:" in message


@pytest.mark.parametrize("how", NAMING)
@pytest.mark.parametrize("name", [None, 7, ["german"], b"german"], ids=repr)
def test_what_is_no_name_is_refused_and_shown(how: str, name: Any, tmp_path: Path) -> None:
    model = model_of("german", "french")
    means_all = name is None and how in ("merge_adapter of one",)  # None: the active ones
    means_list = name == ["german"] and how in (
        *("set_adapter", "set_adapter on the base model", "set_requires_grad"),
        "merge_adapter of one",
    )
    if means_all or means_list:
        NAMING[how](model, name, tmp_path)
        return
    message = refused(model, AdapterNameError, lambda: NAMING[how](model, name, tmp_path))
    assert str(name) in message


@pytest.mark.parametrize("how", ["delete_adapter", "get_peft_model_state_dict"])
def test_several_names_where_one_is_meant_are_refused(how: str, tmp_path: Path) -> None:
    model = model_of("german", "french")
    both = ["german", "french"]
    message = refused(model, AdapterNameError, lambda: NAMING[how](model, both, tmp_path))
    assert "adapter name (=['german', 'french']) must be one string" in message


def test_names_differ_by_case() -> None:
    model = model_of("german", "German")
    message = refused(model, AdapterNameError, lambda: model.set_adapter("GERMAN"))
    assert "There are: `german`, `German`" in message


@pytest.mark.parametrize("name", ["v1.0", "keys", "values", "1", "a.b.c", ".hidden", "x.", "-"])
def test_a_usable_name_that_looks_odd_goes_all_the_way(name: str, tmp_path: Path) -> None:
    model = model_of("german", name)
    model.set_adapter(name)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(nets.net(), tmp_path / name, adapter_name=name)
    with torch.no_grad():
        torch.testing.assert_close(again(nets.ids()), model(nets.ids()))
    model.delete_adapter(name)
    assert list(model.peft_config) == ["german"]
