"""A config's file and what PEFT's users do with it, beside PEFT."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest

import multigraft
from multigraft import ConfigError, LoraConfig, MultigraftWarning, OFTConfig, PeftConfig
from multigraft.errors import SourceError
from tests.hub_stand_in import StandIn, running, turn_to


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    with running() as hub:
        turn_to(hub, tmp_path / "cache", monkeypatch)
        yield hub


def test_the_class_is_that_of_the_peft_type_and_else_that_of_the_call_as_in_peft() -> None:
    for package in (peft, multigraft):
        named = package.PeftConfig.from_peft_type(peft_type="IA3", target_modules=["q"])
        assert type(named) is package.IA3Config
        assert type(package.LoraConfig.from_peft_type(r=3)) is package.LoraConfig
        assert package.LoraConfig.from_peft_type(r=3).r == 3


@pytest.mark.parametrize("package", [peft, multigraft])
def test_values_of_a_later_version_are_warned_of_as_in_peft(package: Any) -> None:
    with pytest.warns(UserWarning, match="of_the_future"):
        config = package.PeftConfig.from_peft_type(
            peft_type="LORA", task_type=None, r=3, of_the_future=1
        )
    assert config.r == 3


def test_a_files_values_are_read_as_peft_reads_them(tmp_path: Path) -> None:
    peft.LoraConfig(r=3, target_modules=["q", "v"]).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    assert PeftConfig.from_json_file(path) == peft.PeftConfig.from_json_file(path)
    values = json.loads(path.read_text()) | {"runtime_config": {"ephemeral_gpu_offload": True}}
    path.write_text(json.dumps(values))
    with pytest.warns(MultigraftWarning, match="`runtime_config`"):
        assert "runtime_config" not in PeftConfig.from_json_file(path)
    with pytest.warns(MultigraftWarning, match="`runtime_config`"):
        config = PeftConfig.from_pretrained(tmp_path)
    assert isinstance(config, LoraConfig)
    assert not config.runtime_config.ephemeral_gpu_offload


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("[1]")
    with pytest.raises(ConfigError, match="must hold a JSON object"):
        PeftConfig.from_json_file(tmp_path / "adapter_config.json")


def test_a_subclass_checks_what_its_files_hold(tmp_path: Path) -> None:
    OFTConfig(target_modules=["q"], use_cayley_neumann=True).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    values = json.loads(path.read_text())
    assert isinstance(PeftConfig.from_pretrained(tmp_path), OFTConfig)
    path.write_text(json.dumps(values | {"peft_version": "0.17.1"}))
    for package in (peft, multigraft):
        with pytest.warns(UserWarning, match=r"0\.18"):
            package.OFTConfig.from_pretrained(str(tmp_path))
    values.pop("oft_block_size")
    path.write_text(json.dumps(values))
    for package in (peft, multigraft):
        with pytest.raises(ValueError, match=r"0\.13"):
            package.OFTConfig.from_pretrained(str(tmp_path))


def test_the_files_mapping_can_be_given_as_in_peft(tmp_path: Path) -> None:
    mapping = {"base_model_class": "Linear", "parent_library": "torch.nn"}
    for package in (peft, multigraft):
        config = package.LoraConfig(r=3)
        config.save_pretrained(str(tmp_path), auto_mapping_dict=mapping)
        assert config.auto_mapping is None
        assert package.PeftConfig.from_pretrained(str(tmp_path)).auto_mapping == mapping


def test_configs_tell_of_adaption_prompts() -> None:
    assert not LoraConfig().is_adaption_prompt
    assert multigraft.AdaptionPromptConfig(adapter_len=2, adapter_layers=1).is_adaption_prompt


def test_a_config_is_pushed_and_comes_back(hub: StandIn) -> None:
    config = LoraConfig(r=3, target_modules=["q"])
    done = config.push_to_hub("poems", token=hub.token, private=True, tags=["verse"])
    assert done.startswith(f"{hub.url}/me/poems/commit/")
    assert hub.repositories["me/poems"].is_private
    assert hub.repositories["me/poems"].messages[-1] == "Upload config"
    files = hub.files("me/poems")
    assert json.loads(files["adapter_config.json"])["r"] == 3
    assert b"- verse" in files["README.md"]
    found = PeftConfig.from_pretrained("me/poems", token=hub.token)
    assert found.to_dict() == config.to_dict() | {"inference_mode": True, "peft_version": "0.21.2"}


def test_a_push_without_leave_says_how_to_get_it(hub: StandIn) -> None:
    with pytest.raises(SourceError, match=r"`poems` cannot be pushed to: .*hf auth login"):
        LoraConfig(r=3).push_to_hub("poems", token="hf_wrong")
    assert hub.repositories == {}
