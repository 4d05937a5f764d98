"""``multigraft inspect`` and ``multigraft verify``: what is on disk, put together and looked at."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from multigraft import LoraConfig, cli, get_peft_model
from multigraft.train import load_base


@pytest.fixture
def run(capsys):
    def call(*arguments: object) -> tuple[object, str, str]:
        capsys.readouterr()  # what making the files has shown
        with pytest.raises(SystemExit) as end:
            cli.main([*map(str, arguments)])
        shown = capsys.readouterr()
        return end.value.code, shown.out, shown.err

    return call


@pytest.fixture
def adapters(base_dir, tmp_path) -> list[Path]:
    model = get_peft_model(
        load_base(base_dir, dtype="float32"),
        LoraConfig(r=2, target_modules=["q_proj"]),
        adapter_name="first",
    )
    model.add_adapter("second", LoraConfig(r=3, target_modules=["q_proj", "v_proj"]))
    torch.manual_seed(0)
    for name in ("first", "second"):
        for parameter in model.roster.parameters(name):
            torch.nn.init.normal_(parameter, std=0.01)
    model.save_pretrained(tmp_path)
    return [tmp_path / "first", tmp_path / "second"]


def test_adapters_are_shown_side_by_side_on_the_base_that_they_name(run, adapters):
    code, out, err = run("inspect", *adapters)
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert (code, err) == (0, "")
    assert "2 adapters at 4 sites" in lines[0]
    assert lines[3].startswith("model.layers.{0..1}.self_attn.q_proj ×2 Linear 16×16")
    assert lines[4].startswith("├── first LORA 2")
    assert lines[5].startswith("└── second LORA 3")


def test_a_folder_of_several_adapters_means_all_of_them(run, adapters):
    _, out, _ = run("inspect", adapters[0].parent, "--json")
    assert json.loads(out)["adapters"] == ["first", "second"]


def test_a_base_alone_has_no_sites(run, base_dir):
    code, out, _ = run("inspect", base_dir)
    assert code == 0
    assert "0 adapters at 0 sites" in out


def test_a_sound_adapter_verifies(run, adapters):
    code, out, err = run("verify", *adapters)
    assert (code, out, err) == (0, "no violations, no notes\n", "")


def test_a_broken_law_ends_with_one(run, adapters, base_dir, tmp_path):
    path = base_dir / "model.safetensors"
    broken = tmp_path / "broken"
    broken.mkdir()
    held = load_file(path)
    held["model.layers.0.self_attn.q_proj.weight"][0, 0] = float("nan")
    save_file(held, broken / "model.safetensors", {"format": "pt"})
    (broken / "config.json").write_text((base_dir / "config.json").read_text())
    code, out, _ = run("verify", adapters[0], "--base", broken, "--json")
    found = json.loads(out)
    assert code == 1
    assert not found["is_clean"]
    assert {each["law"] for each in found["violations"]} == {"non-finite values"}


@pytest.mark.parametrize("verb", ["inspect", "verify"])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{tmp}/nowhere"], "holds no adapter_config.json"),
        (["{base}", "--base", "{base}"], "are both base models"),
        (["{adapter}", "--base", "{tmp}/nowhere"], "there is no such directory"),
        (["{adapter}", "{orphan}"], "the adapters name several"),
        (["{orphan}"], "the adapters name none"),
    ],
)
def test_a_mistake_is_one_line(run, adapters, base_dir, tmp_path, verb, arguments, message):
    orphan = tmp_path / "orphan"
    orphan.mkdir()
    for path in adapters[0].iterdir():
        (orphan / path.name).write_bytes(path.read_bytes())
    config = json.loads((orphan / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = None
    (orphan / "adapter_config.json").write_text(json.dumps(config))
    places = {"tmp": tmp_path, "base": base_dir, "adapter": adapters[0], "orphan": orphan}
    code, out, err = run(verb, *(each.format(**places) for each in arguments))
    assert (code, out) == (2, "")
    assert err.startswith("multigraft: ")
    assert message in err
    assert len(err.splitlines()) == 1


def test_a_warning_is_one_line_too(run, adapters, base_dir):
    path = adapters[0] / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"future_field": 1}))
    code, _, err = run("inspect", adapters[0], "--base", base_dir)
    assert code == 0
    assert err.startswith("multigraft: warning: adapter_config.json was written by version ")
    assert len(err.splitlines()) == 1
