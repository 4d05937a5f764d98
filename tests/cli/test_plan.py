"""``multigraft plan``: what a step takes, from the shell."""

from __future__ import annotations

import json

import pytest

from multigraft import LoraConfig, cli


@pytest.fixture
def run(capsys):
    pytest.importorskip("transformers")

    def call(*arguments: str) -> tuple[object, str, str]:
        with pytest.raises(SystemExit) as end:
            cli.main(["plan", *arguments])
        shown = capsys.readouterr()
        return end.value.code, shown.out, shown.err

    return call


def test_it_shows_parts_peak_and_largest_batch(run, base_dir):
    code, out, _ = run(str(base_dir), "-r", "4", "--max-length", "64", "--memory", "2GiB")
    assert code == 0
    assert out.startswith("LORA on LlamaForCausalLM")
    assert "8 rows of 64 tokens, adamw" in out
    for part in ("base weights", "optimiser state", "activations", "fits into 2.00 GiB"):
        assert part in out
    assert "largest batch that fits:" in out


def test_a_step_that_does_not_fit_exits_with_1_and_says_what_would_help(run, base_dir):
    small = ("--max-length", "128", "--memory", "4MiB", "--device", "cpu")
    code, out, _ = run(str(base_dir), *small)
    assert code == 1
    assert "does not fit into 4.00 MiB" in out
    assert "what would help:" in out
    assert "`gradient_checkpointing: true` saves" in out


def test_json_has_every_number(run, base_dir):
    small = ("--max-length", "128", "--memory", "4MiB", "--device", "cpu")
    code, out, _ = run(str(base_dir), *small, "--json")
    found = json.loads(out)
    assert code == 1
    assert found["total"] == sum(found["parts"].values()) + found["allowance"]
    assert found["memory"] == 4 << 20
    assert found["fits"] is False
    assert {"batch_size", "gradient_checkpointing"} <= {
        name for remedy in found["remedies"] for name in remedy["change"]
    }


def test_adapters_of_directories_learn_side_by_side(run, base_dir, tmp_path):
    for name in ("dates", "units"):
        LoraConfig(r=2, target_modules=["q_proj"]).save_pretrained(tmp_path / name)
    configs = ("--config", str(tmp_path / "dates"), "--config", str(tmp_path / "units"))
    code, out, _ = run(str(base_dir), *configs, "--max-length", "32")
    assert code == 0
    assert out.startswith("2 adapters on LlamaForCausalLM")
    assert "8 rows each of 32 tokens" in out


def test_options_and_configs_exclude_each_other(run, base_dir, tmp_path):
    code, _, err = run(str(base_dir), "--config", str(tmp_path), "--rank", "4")
    assert code == 2
    assert "stands in place of the options" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("--max-length", "64", "--quantize", "nf5"),
            "multigraft: `quantize` (='nf5') must be one of nf4, fp4, int8.",
        ),
        (("--memory", "much"), "multigraft: `memory` (='much') must be a number above 0"),
        (("--max-length", "64", "-t", "q_prj"), "no module is called `q_prj`"),
        (("--max-length", "4096"), "is more than the model takes (128)"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(run, base_dir, arguments, message):
    code, out, err = run(str(base_dir), *arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert "Traceback" not in err
    assert len(err.splitlines()) == 1


def test_help_shows_an_example(run):
    code, out, _ = run("--help")
    assert code == 0
    assert "multigraft plan Qwen/Qwen3-0.6B" in " ".join(out.split())
