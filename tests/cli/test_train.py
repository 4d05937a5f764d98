"""`multigraft train`, as a user runs it: what comes out, and one line for each mistake."""

from __future__ import annotations

import shutil
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from multigraft import PeftConfig, PeftModel
from multigraft.cli import main
from multigraft.train import Progress, load_model
from tests.tiny_base import chat_rows, pair_rows, write_base, write_lines

BAD = {"prompt": "p", "completon": "c"}


@pytest.fixture
def run(base_dir, tmp_path, capsys):
    """Runs `multigraft train` in-process; keywords are options, None leaves one out."""

    def call(*flags: str, code: int = 0, rows=None, **options: object) -> tuple[str, str]:
        given = {
            "model": base_dir,
            "data": write_lines(tmp_path / "data.jsonl", pair_rows() if rows is None else rows),
            "output": tmp_path / "out",
            "steps": 2,
            **options,
        }
        words = [
            word
            for name, value in given.items()
            if value is not None
            for word in (f"--{name.replace('_', '-')}", str(value))
        ]
        with pytest.raises(SystemExit) as end:
            main(["train", *words, *flags])
        out, err = capsys.readouterr()
        assert end.value.code == code, err
        return out, err

    return call


@pytest.fixture
def out(tmp_path) -> Path:
    return tmp_path / "out"


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(2, 12)[None]).logits


@pytest.mark.parametrize("rows", [pair_rows(), chat_rows()], ids=["pairs", "chats"])
def test_the_saved_adapter_loads_with_either_library(run, base_dir, out, rows):
    peft = pytest.importorskip("peft")
    run(rows=rows, lr=1e-2, steps=4)
    ours, theirs = (
        logits(klass.from_pretrained(load_model(base_dir), out))
        for klass in (PeftModel, peft.PeftModel)
    )
    assert torch.allclose(ours, theirs, atol=1e-5)
    assert not torch.allclose(ours, logits(load_model(base_dir)), atol=1e-3)


def test_it_says_what_it_does_and_where_the_adapter_is(run, out, base_dir):
    text, _ = run(eval_data=out.parent / "data.jsonl")
    assert "12 examples, 2 steps of 8" in text
    assert "default: step 2/2  loss " in text
    for label in ("loss ", "held-out loss", "exact match", "time ", f"saved in     {out}"):
        assert label in text
    assert f"PeftModel.from_pretrained(base, '{out}')" in text


def test_the_lines_that_it_prints_at_the_end_load_the_adapter(run):
    text, _ = run()
    names: dict[str, object] = {}
    exec(text.partition("Load it")[2], names)
    assert isinstance(names["model"], PeftModel)


def test_quiet_prints_nothing(run, out):
    assert run("--quiet") == ("", "")
    assert (out / "adapter_model.safetensors").is_file()


def test_the_same_seed_gives_the_same_bytes(run, tmp_path):
    saved = []
    for number, seed in enumerate((3, 3, 4)):
        output = tmp_path / f"run{number}"
        run("-q", output=output, seed=seed, dropout=0.1)
        saved.append((output / "adapter_model.safetensors").read_bytes())
    assert saved[0] == saved[1]
    assert saved[0] != saved[2]


def test_options_reach_the_config(run, out):
    run(
        rank=3,
        alpha=5,
        dropout=0.25,
        target_modules="self_attn.q_proj, up_proj",
        name="v1.0",
    )
    config = PeftConfig.from_pretrained(out / "v1.0")
    assert (config.r, config.lora_alpha, config.lora_dropout) == (3, 5, 0.25)
    assert config.target_modules == ["self_attn.q_proj", "up_proj"]
    assert not (out / "adapter_config.json").exists()


def test_alpha_is_twice_the_rank_unless_said(run, out):
    run(rank=3)
    assert PeftConfig.from_pretrained(out).lora_alpha == 6


def test_a_regular_expression_can_name_the_targets(run, out):
    run(target_modules=r".*layers\.0\.mlp\.(up|down)_proj")
    tensors = load_file(out / "adapter_model.safetensors")
    assert {key.split(".lora_")[0].partition("layers.")[2] for key in tensors} == {
        "0.mlp.up_proj",
        "0.mlp.down_proj",
    }


def test_epochs_count_passes_over_the_data(run):
    text, _ = run(steps=None, epochs=2, batch_size=4)
    assert "6 steps of 4" in text


def test_an_adapter_that_is_there_stays_unless_told(run, out):
    run("-q")
    kept = (out / "adapter_model.safetensors").read_bytes()
    _, err = run(code=2, seed=1)
    assert err.startswith(f"multigraft: {out} holds an adapter already. ")
    assert "--overwrite" in err
    assert (out / "adapter_model.safetensors").read_bytes() == kept
    run("-q", "--overwrite", seed=1)
    assert (out / "adapter_model.safetensors").read_bytes() != kept


def test_bad_lines_are_listed_with_file_and_number(run, out):
    _, err = run(code=2, rows=[*pair_rows(), BAD, "not json"])
    first, *rest = err.splitlines()
    assert first == "multigraft: 2 of 14 lines cannot be used:"
    data = out.parent / "data.jsonl"
    assert rest[0].startswith(f"{data}:13: `completion` is missing.")
    assert rest[1].startswith(f"{data}:14: not valid JSON")
    assert len(rest) == 2


def test_bad_lines_can_be_left_out(run):
    text, _ = run(on_bad_line="skip", rows=[BAD, *pair_rows()])
    assert "left out" in text
    assert "12 examples" in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data": "nope.jsonl"}, "nope.jsonl cannot be read: No such file"),
        ({"rows": []}, "data.jsonl holds no data"),
        ({"rows": [BAD]}, "data.jsonl:1: `completion` is missing"),
        ({"model": "./nope"}, "./nope: there is no such directory"),
        ({"target_modules": "q_porj"}, "no module is called `q_porj`. Nearest: `q_proj`"),
        ({"target_modules": "q_proj,v_porj"}, "no module is called `v_porj`. Nearest: `v_proj`"),
        ({"target_modules": ".*_porj"}, "the expression matches no module's whole path"),
        ({"target_modules": ".*("}, "is read as a regular expression and is not one"),
        ({"rank": 0}, "`r` (=0) must be an integer of at least 1"),
        ({"lr": -1}, "`lr` (=-1.0) must be above 0"),
        ({"schedule": "cosin"}, "Nearest: `cosine`"),
        ({"dtype": "float3"}, "Nearest: `float32`"),
        ({"device": "gpu"}, "`device` (='gpu') must be one of"),
        ({"name": "a/b"}, "must not contain"),
        ({"max_length": 3}, "fills `max_length` (=3) tokens"),
        ({"lr": 1e38}, "`lr` (=1e+38) must be above 0, up to 1e+06"),
    ],
    ids=lambda value: None if isinstance(value, str) else "-".join(map(str, *value.items())),
)
def test_a_mistake_is_one_line_and_exit_code_2(run, out, options, message):
    _, err = run(code=2, **options)
    assert err.startswith("multigraft: ")
    assert message in err
    assert err.count("\n") == 1
    assert not out.exists()


def test_a_model_without_a_chat_template_is_one_line(run, tmp_path, out):
    base = write_base(tmp_path / "base", template=False)
    _, err = run(code=2, model=base, rows=chat_rows())
    assert err.startswith(f"multigraft: {tmp_path / 'data.jsonl'}:1 (and 11 more like it): ")
    assert "no chat template" in err
    assert err.count("\n") == 1
    assert not out.exists()


def test_a_damaged_model_is_one_line(run, base_dir, tmp_path):
    base = shutil.copytree(base_dir, tmp_path / "base")
    (base / "model.safetensors").write_bytes(b"damaged")
    _, err = run(code=2, model=base)
    assert err.startswith(f"multigraft: {base}: no model could be read from there")
    assert err.count("\n") == 1


def test_an_output_that_is_a_file_is_one_line(run, tmp_path):
    (tmp_path / "file").write_text("")
    _, err = run(code=2, output=tmp_path / "file")
    assert err == f"multigraft: {tmp_path / 'file'} is a file; the output must be a directory.\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "Did you mean 'train'?"),
        (["train", "--data", "x"], "`model` is missing: give --model"),
        (["train", "--modle", "x"], "No such option: --modle"),
        (["train", "--lr", "much"], "Invalid value for '--lr'"),
    ],
)
def test_a_wrong_command_is_exit_code_2_without_a_traceback(capsys, arguments, message):
    with pytest.raises(SystemExit) as end:
        main(arguments)
    err = capsys.readouterr().err
    assert end.value.code == 2
    assert message in " ".join(err.replace("│", " ").split())
    assert "Traceback" not in err


def interrupt_at(step: int):
    """In place of the live display: Ctrl-C after a number of steps."""

    @contextmanager
    def live(console, adapters):
        def show(now) -> None:
            if isinstance(now, Progress) and now.step == step:
                raise KeyboardInterrupt

        yield show

    return live


def test_ctrl_c_saves_the_steps_that_were_made_and_says_so(run, out, base_dir, monkeypatch):
    monkeypatch.setattr("multigraft.cli.train.live", interrupt_at(2))
    _, err = run(code=130, steps=5, lr=1e-2)
    saved = out / "checkpoints" / "round-000002"
    assert err == (
        f"multigraft: interrupted; everything as it was after 2 rounds is saved in {saved}. The "
        "same command with --resume goes on from there.\n"
    )
    loaded = PeftModel.from_pretrained(load_model(base_dir), saved / "default")
    assert not torch.allclose(logits(loaded), logits(load_model(base_dir)), atol=1e-3)


def test_a_run_that_was_interrupted_ends_as_if_it_had_not_been(run, out, tmp_path, monkeypatch):
    run("-q", steps=5, output=tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr("multigraft.cli.train.live", interrupt_at(2))
        run(code=130, steps=5)
    run("-q", "--resume", steps=5)
    name = "adapter_model.safetensors"
    whole = (tmp_path / "whole" / name).read_bytes()
    assert (out / name).read_bytes() == whole
    assert not (out / "checkpoints").exists()


def test_ctrl_c_keeps_an_older_adapter(run, out, monkeypatch):
    run("-q")
    kept = (out / "adapter_model.safetensors").read_bytes()
    monkeypatch.setattr("multigraft.cli.train.live", interrupt_at(2))
    _, err = run("--overwrite", code=130, steps=5)
    assert err.startswith("multigraft: interrupted; everything as it was after 2 rounds is saved")
    assert (out / "adapter_model.safetensors").read_bytes() == kept


def test_ctrl_c_before_training_says_that_nothing_was_saved(run, out, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("multigraft.train.job.load_tokenizer", interrupted)
    _, err = run(code=130)
    assert err == "multigraft: interrupted; nothing was saved.\n"
    assert not out.exists()


def test_help_names_every_option_and_an_example(capsys):
    with pytest.raises(SystemExit) as end:
        main(["train", "--help"])
    text = capsys.readouterr().out
    assert end.value.code == 0
    for option in ("--model", "--data", "--output", "--rank", "--lr", "--seed", "--overwrite"):
        assert option in text
    assert "Example: multigraft train --model" in " ".join(text.split())
