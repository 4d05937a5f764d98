"""create_arrow_model: what it loads, from where, and what it leaves when it fails."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

import multigraft
from multigraft import ArrowConfig, ConfigError, PeftModel, UnsupportedError, create_arrow_model
from tests.laws import fingerprint
from tests.variants.invoked import IDS, base
from tests.variants.test_arrow import save_adapters


def test_adapters_get_their_names_in_order(tmp_path: Path) -> None:
    tasks, general = save_adapters(tmp_path, [0, 1]), save_adapters(tmp_path, [2])
    model = create_arrow_model(base(), tasks, ArrowConfig(use_gks=True), general)
    assert list(model.peft_config) == ["task_0", "task_1", "gks_0", "arrow_router"]
    assert model.active_adapters == ["arrow_router"]
    router: Any = model.peft_config["arrow_router"]
    assert router.arrow_config.task_adapter_names == ["task_0", "task_1"]
    assert router.arrow_config.gks_adapter_names == ["gks_0"]
    assert isinstance(model, multigraft.PeftModelForCausalLM)


def test_general_adapters_are_left_out_where_they_are_not_used(tmp_path: Path) -> None:
    tasks = save_adapters(tmp_path, [0])
    model = create_arrow_model(base(), tasks, ArrowConfig(), ["nowhere"])
    assert list(model.peft_config) == ["task_0", "arrow_router"]


def test_a_subfolder_of_a_hub_repository_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (path,) = save_adapters(tmp_path, [0])
    asked = []

    def download(repository: str, filename: str, *, subfolder: str | None = None, **_: Any) -> str:
        asked.append((repository, subfolder))
        return shutil.copy(Path(path) / filename, tmp_path / filename)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    create_arrow_model(base(), ["user/repo/deep/er"], ArrowConfig())
    assert set(asked) == {("user/repo", "deep/er")}


def test_the_router_acts_where_the_experts_do_and_nowhere_else(tmp_path: Path) -> None:
    tasks = save_adapters(tmp_path, [0, 1], layers_to_transform=[1])
    model = create_arrow_model(base(), tasks, ArrowConfig())
    sites = {
        name: [str(g.site) for _, g in model.roster.grafts(name)] for name in model.peft_config
    }
    assert sites["arrow_router"] == sites["task_0"] == sites["task_1"]
    assert all(".layers.1." in site for site in sites["task_0"])


def test_experts_that_save_modules_are_routed_by_their_pairs(tmp_path: Path) -> None:
    tasks = save_adapters(tmp_path, [0, 1], modules_to_save=["norm"])
    model = create_arrow_model(base(), tasks, ArrowConfig()).eval()
    assert (model(IDS).logits - base()(IDS).logits).abs().max() > 0.1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_modules": ["q_proj"]}, "do not act on the same layers"),
        ({"use_dora": True}, r"more than one plain pair .*\(dora\)"),
        ({"target_modules": ["embed_tokens"]}, "more than one plain pair at a linear layer"),
    ],
)
def test_experts_that_cannot_be_routed_to_leave_the_model_as_it_was(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    tasks = save_adapters(tmp_path, [0]) + save_adapters(tmp_path, [1], **options)
    model = base()
    before = fingerprint(model)
    with pytest.raises(UnsupportedError, match=message):
        create_arrow_model(model, tasks, ArrowConfig())
    assert fingerprint(model) == before
    assert not hasattr(model, "peft_config")


def test_a_failure_keeps_the_adapters_that_were_there(tmp_path: Path) -> None:
    tasks = save_adapters(tmp_path, [0, 1])
    model = PeftModel.from_pretrained(base(), tasks[0], "mine")
    with pytest.raises(multigraft.CheckpointError):
        create_arrow_model(model, [*tasks, str(tmp_path / "absent")], ArrowConfig())
    assert list(model.peft_config) == ["mine"]
    assert model.active_adapters == ["mine"]


def test_general_adapters_of_another_rank_are_refused(tmp_path: Path) -> None:
    tasks, general = save_adapters(tmp_path, [0]), save_adapters(tmp_path, [4], r=2)
    with pytest.raises(UnsupportedError, match=r"ranks differ \(\[2, 4\]\)"):
        create_arrow_model(base(), tasks, ArrowConfig(use_gks=True), general)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([], ArrowConfig()), "`task_specific_adapter_paths`"),
        (("one", ArrowConfig()), "`task_specific_adapter_paths`"),
        ((["one"], {"top_k": 2}), "`arrow_config`"),
        ((["one"], ArrowConfig(use_gks=True)), "`general_adapter_paths`"),
    ],
)
def test_arguments_that_mean_nothing_are_refused(arguments: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        create_arrow_model(base(), *arguments)
