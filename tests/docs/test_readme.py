"""The README: its Python runs as written, its picture is true, its links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import multigraft

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(p for p in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("demo/*.md")))
README = (ROOT / "README.md").read_text(encoding="utf-8")


def python_blocks() -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


def test_the_python_runs_as_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (block,) = python_blocks()
    names: dict[str, object] = {}
    exec(compile(block, "README.md", "exec"), names)
    model = names["model"]
    for adapter in ("dates", "records"):
        assert (tmp_path / "my-adapters" / adapter / "adapter_model.safetensors").is_file()
    assert not [m for m in model.modules() if isinstance(m, multigraft.AdaptedLayer)]
    fresh = type(names["base"]).from_pretrained(names["model_path"](), dtype="float32").state_dict()
    assert all(torch.equal(t, fresh[key]) for key, t in names["base"].state_dict().items())


def test_the_python_is_about_as_short_as_is_said():
    (block,) = python_blocks()
    statements = [
        line for line in block.splitlines() if line and not line.startswith(("from", " "))
    ]
    assert len(statements) <= 12


def beside_a_saved_head(library, target: object):
    from tests.oracle import llama

    options = {"task_type": "CAUSAL_LM", "target_modules": "all-linear"}
    model = library.get_peft_model(
        llama(), library.LoraConfig(modules_to_save=["lm_head"], **options)
    )
    model.add_adapter("b", library.LoraConfig(**{**options, "target_modules": target}))
    return model


@pytest.mark.filterwarnings("ignore")
def test_the_nest_in_the_picture_is_what_peft_builds(tmp_path):
    peft = pytest.importorskip("peft")
    model = beside_a_saved_head(peft, "all-linear")
    head = model.get_base_model().lm_head
    for nested in (head.original_module, head.modules_to_save["default"]):
        assert type(nested) is peft.tuners.lora.Linear
        assert list(nested.lora_A) == ["b"]
    with pytest.raises(KeyError):
        model.save_pretrained(tmp_path, selected_adapters=["default"])


def test_side_by_side_is_what_we_build(tmp_path):
    model = beside_a_saved_head(multigraft, ["lm_head"])
    head = model.get_base_model().lm_head
    assert type(head) is multigraft.AdaptedLayer
    assert type(head.base_layer) is type(head.modules_to_save["default"]) is torch.nn.Linear
    assert list(head.modules_to_save) == ["default"]
    assert list(head.lora_A) == list(head.lora_B) == ["b"]
    model.save_pretrained(tmp_path)


def test_all_linear_leaves_the_head_alone():
    head = beside_a_saved_head(multigraft, "all-linear").get_base_model().lm_head
    assert list(head.grafts) == ["default"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_to_files_lead_to_files(page):
    text = page.read_text(encoding="utf-8")
    prose = re.sub(r"^```.*?^```|`[^`\n]*`", "", text, flags=re.DOTALL | re.MULTILINE)
    targets = re.findall(r"\]\(([^)#\s]+)", prose)
    local = [
        target for target in targets if "://" not in target and not target.startswith("mailto")
    ]
    missing = [target for target in local if not (page.parent / target).exists()]
    assert not missing
