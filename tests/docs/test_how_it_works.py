"""The pages on how it works: their Python runs, their code is the examples', their limits hold."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import multigraft
from multigraft import LoraConfig, MergeError, TargetError, UnsupportedError, get_peft_model
from multigraft.bases import GEOMETRIES
from multigraft.config import CONFIGS
from multigraft.methods import METHODS
from multigraft.storage import STORAGES
from tests.docs import page

EXAMPLES = page.DOCS.parent / "examples"
PAGE_OF = {"lora_xs": "adding-a-method.md", "conv_transpose": "adding-a-layer.md"}

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def examples(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The folder of the examples on the path; what they register is gone afterwards."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    tables = [(table, dict(table.items())) for table in (METHODS, CONFIGS, GEOMETRIES, STORAGES)]
    yield
    for table, before in tables:
        for key in [key for key, _ in table.items() if key not in before]:
            table.unregister(key)  # type: ignore[attr-defined]
    for name in ("lora_xs", "conv_transpose", "row_int8"):
        sys.modules.pop(name, None)


def test_structure(capsys: pytest.CaptureFixture[str]) -> None:
    names = page.run("structure.md")
    assert len(page.python("structure.md")) == 5
    assert "no module is called `3`" in capsys.readouterr().out
    assert names["alone"].shape == (4, 8)


@pytest.mark.parametrize("name", PAGE_OF)
def test_the_code_on_the_page_is_the_example(name: str) -> None:
    source = (EXAMPLES / f"{name}.py").read_text(encoding="utf-8")
    assert page.python(PAGE_OF[name])[0] == source, f"copy examples/{name}.py into {PAGE_OF[name]}"


@pytest.mark.usefixtures("examples")
def test_adding_a_method(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    found: dict[str, object] = {"base": base}
    for block in page.python("adding-a-method.md")[1:]:
        exec(compile(block, "adding-a-method.md", "exec"), found)
    config = (tmp_path / "adapters" / "tiny" / "adapter_config.json").read_text()
    assert '"LORA_XS"' in config
    assert list(found["again"].peft_config) == ["tiny"]  # type: ignore[attr-defined]


@pytest.mark.usefixtures("examples")
def test_adding_a_layer(capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    found: dict[str, object] = {"nn": nn}
    for block in page.python("adding-a-layer.md")[1:]:
        exec(compile(block, "adding-a-layer.md", "exec"), found)
    assert type(found["merged"][0]) is nn.ConvTranspose2d  # type: ignore[index]
    assert "row_int8" in capsys.readouterr().out


def test_the_pages_say_how_long_an_example_is() -> None:
    text = (page.DOCS / "adding-a-layer.md").read_text(encoding="utf-8")
    lines = len((EXAMPLES / "row_int8.py").read_text(encoding="utf-8").splitlines())
    assert f"a whole one, of {lines} lines" in text


# What docs/limits.md says is not there. A test that fails here is good news: mend the page.


def test_methods_that_are_called_absent_are_absent() -> None:
    text = (page.DOCS / "limits.md").read_text(encoding="utf-8")
    named = [word for word in page.CODE.findall(text) if word.endswith("Config")]
    assert len(named) == 6
    assert [name for name in named if hasattr(multigraft, name)] == []
    with pytest.raises(UnsupportedError):
        multigraft.get_peft_config({"peft_type": "BOFT"})


@pytest.mark.parametrize("layer", [nn.LSTM(4, 4), nn.GRU(4, 4), nn.ConvTranspose1d(4, 4, 3)])
def test_layers_that_are_called_unknown_are_refused(layer: nn.Module) -> None:
    model = nn.ModuleDict({"layer": layer, "other": nn.Linear(4, 4)})
    with pytest.raises(TargetError, match="LORA cannot adapt layer"):
        get_peft_model(model, LoraConfig(target_modules=["layer"]))


def test_grouped_convolutions_run_and_are_not_merged() -> None:
    model = get_peft_model(
        nn.Sequential(nn.Conv1d(4, 4, 3, groups=2)), LoraConfig(r=2, target_modules=["0"])
    )
    assert model(torch.randn(1, 4, 5)).shape == (1, 4, 3)
    with pytest.raises(UnsupportedError, match="cannot be merged"):
        model.merge_adapter()


def test_layers_with_a_forward_of_their_own_are_adapted_and_not_merged() -> None:
    class Half(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) / 2

    model = get_peft_model(nn.Sequential(Half(4, 4)), LoraConfig(r=2, target_modules=["0"]))
    assert model(torch.randn(1, 4)).shape == (1, 4)
    with pytest.raises((UnsupportedError, MergeError), match="overrides `forward`"):
        model.merge_adapter()


@pytest.mark.parametrize("package", ["gptqmodel", "awq", "hqq", "eetq", "aqlm"])
def test_storages_that_are_called_unknown_are_unknown(package: str) -> None:
    known = [str(key) for key, _ in STORAGES.items()]
    assert known and not [key for key in known if key.startswith(f"{package}.")]


def test_the_figures_are_those_of_the_results() -> None:
    spec = importlib.util.spec_from_file_location("performance", page.DOCS / "performance.py")
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    sys.modules["performance"] = script  # where its dataclass looks for its annotations
    spec.loader.exec_module(script)
    written = (page.DOCS / "performance.md").read_text(encoding="utf-8").splitlines()
    printed = script.page().splitlines()
    stale = "run: python docs/performance.py --write"
    assert len(written) == len(printed), stale
    for old, new in zip(written, printed, strict=True):
        assert page.NUMBER.sub("", old) == page.NUMBER.sub("", new), stale
        if old.startswith("| "):  # new runs of the same scripts give figures like these
            pairs = zip(page.numbers(old), page.numbers(new), strict=True)
            assert all(abs(a - b) <= 0.25 * max(a, b) for a, b in pairs), stale
