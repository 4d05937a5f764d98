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


def test_many_gpus_have_a_line_each_with_estimates_called_so(run, base_dir):
    code, out, _ = run(str(base_dir), "--max-length", "64", "--gpus", "1,8", "--strategy", "ddp")
    lines = out.splitlines()
    assert code == 0
    assert "memory of each" in lines[0] and "(estimate)" in lines[0]
    assert [line.split()[0] for line in lines[1:3]] == ["1", "8"]
    assert "Seconds are estimates" in out
    code, out, _ = run(str(base_dir), "--max-length", "64", "--gpus", "1,8", "--json")
    assert [row["strategy"] for row in json.loads(out)] == ["fsdp", "fsdp"]


def test_gpus_are_numbers(run, base_dir):
    code, _, err = run(str(base_dir), "--gpus", "many")
    assert code == 2
    assert "GPUs are counted" in err


@pytest.fixture
def run_file(base_dir, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(
        f"model: {base_dir}\noutput: {tmp_path / 'out'}\ndata: nowhere.jsonl\nmax_length: 64\n"
        "batch_size: 4\nadapters:\n  - {name: a, rank: 4}\n"
        "  - {name: b, rank: 8, batch_size: 2, optimizer: sgd}\n"
    )
    return str(path)


def test_a_runs_file_is_planned_with_every_adapter_of_it(run, run_file):
    code, out, _ = run(run_file, "--json", "--memory", "8GiB")
    found = json.loads(out)
    assert code == 0
    assert found["adapters"] == {"a": "LORA", "b": "LORA"}
    assert found["batch_size"] == {"a": 4, "b": 2}
    assert (found["max_length"], found["optimizer"]) == (64, "adamw")


def test_flags_win_over_a_runs_file(run, run_file):
    _, out, _ = run(run_file, "--json", "--batch-size", "3", "--gradient-checkpointing")
    found = json.loads(out)
    assert found["batch_size"] == 3
    assert found["gradient_checkpointing"] is True


def test_the_gpus_of_a_run_share_the_rows_of_its_batches(run, run_file):
    _, out, _ = run(run_file, "--json", "--gpus", "1,2", "--batch-size", "4")
    one, two = json.loads(out)
    assert (one["strategy"], one["tokens"], two["tokens"]) == ("ddp", 512, 512)
    assert two["flops"] == one["flops"] / 2


def test_a_runs_file_says_what_its_adapters_are(run, run_file):
    code, _, err = run(run_file, "--rank", "4")
    assert code == 2
    assert "a run's file says what its adapters are" in err
