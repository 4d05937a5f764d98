"""``multigraft targets``: a dry run from the shell, and one line for each mistake."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest

from multigraft import cli

LARGE = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}
"""The shape of a Llama of 70 billion parameters."""


@pytest.fixture
def large(tmp_path):
    pytest.importorskip("transformers")
    (tmp_path / "config.json").write_text(json.dumps(LARGE))
    return str(tmp_path)


@pytest.fixture
def run(capsys):
    def call(*arguments: str) -> tuple[object, str, str]:
        with pytest.raises(SystemExit) as end:
            cli.main(["targets", *arguments])
        shown = capsys.readouterr()
        return end.value.code, shown.out, shown.err

    return call


def test_it_shows_sites_reasons_and_sizes(run, base_dir):
    code, out, _ = run(str(base_dir), "-t", "q_proj,down_proj", "--layers", "1", "-r", "2")
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert code == 0
    assert lines[0].startswith("LORA on LlamaForCausalLM")
    assert "✓ model.layers.1.self_attn.q_proj Linear 16×16 2 64 its path matches `q_proj`" in lines
    assert any("leaves its layer out" in line for line in lines)


def test_options_make_the_config(run, base_dir):
    code, out, _ = run(
        *(str(base_dir), "--target", "all-linear", "--exclude", "mlp.*|.*_proj", "--json"),
        *("--rank-pattern", "q_proj=4", "--save-module", "lm_head", "--set", "use_dora=true"),
    )
    plan = json.loads(out)
    assert code == 1
    assert "no module is left" in plan["problems"][0]
    code, out, _ = run(
        *(str(base_dir), "--target", "all-linear", "--exclude", "k_proj", "--exclude", "up_proj"),
        *("--rank-pattern", "q_proj=4", "--save-module", "lm_head", "--json", "--method", "LoRA"),
    )
    parts = {m["path"]: m["parts"] for m in json.loads(out)["modules"]}
    assert code == 0
    assert parts["model.layers.0.self_attn.q_proj"][0]["rank"] == 4
    assert parts["model.layers.0.self_attn.k_proj"] == parts["model.layers.0.mlp.up_proj"] == []
    assert parts["lm_head"][0]["method"] == "SAVED_MODULE"


def test_what_cannot_be_attached_ends_with_one(run, base_dir):
    code, out, err = run(str(base_dir), "--target", "q_prj")
    assert (code, err) == (1, "")
    assert "problem: `target_modules`: no module is called `q_prj`. Nearest: `q_proj`" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "lorra"], "Nearest: `LORA`"),
        (["--set", "rnk=3"], "there is no field `rnk`"),
        (["--method", "ia3", "--rank", "3"], "IA3Config: there is no field `rank`"),
        (["--rank", "0"], "must be an integer of at least 1"),
        (["--layers", "3-x"], "as in 0-3,7"),
        (["--set", "use_dora"], "is not of the form name=value"),
        (["-t", "a.*", "-t", "b"], "an expression stands alone"),
        (["--config", "nowhere", "--rank", "3"], "stands in place of the options"),
    ],
)
def test_a_mistake_is_one_message_and_no_traceback(run, base_dir, arguments, message):
    code, out, err = run(str(base_dir), *arguments)
    assert (code, out) == (2, "")
    assert message in " ".join(err.replace("│", " ").split())
    assert "Traceback" not in err


def test_a_model_that_is_not_there_is_one_line(run):
    code, _, err = run("./nowhere")
    assert code == 2
    assert err == "multigraft: ./nowhere: there is no such directory to read a config from.\n"


def test_an_adapters_own_config_can_be_asked_about(run, base_dir, tmp_path):
    import multigraft

    multigraft.LoraConfig(r=3, target_modules=["v_proj"]).save_pretrained(tmp_path)
    code, out, _ = run(str(base_dir), "--config", str(tmp_path))
    assert code == 0
    assert "✓  model.layers.{0..1}.self_attn.v_proj" in out


def test_seventy_billion_parameters_take_little_memory(large):
    # The child's own: what the system counts for children begins at this process's size.
    call = f"main(['targets', {large!r}, '-t', 'all-linear'])"
    code = (
        f"from multigraft.cli import main\ntry:\n    {call}\n"
        "finally:\n    print(open('/proc/self/status').read())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.startswith(
        "LORA on LlamaForCausalLM (70,553,706,496 parameters): 560 modules, 103,546,880 trainable"
    )
    (peak,) = re.findall(r"VmHWM:\s+(\d+) kB", done.stdout)
    assert int(peak) < 2**20
