"""Combining files gives what combining on a loaded model gives; the base is needed by few."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import multigraft as mg
from multigraft import cli
from multigraft.combine import RULES
from multigraft.combine.files import combine_files
from multigraft.errors import CheckpointError, ConfigError, StateError, UnsupportedError
from multigraft.train import load_base
from tests.merging.models import logits, write_adapter, write_gpt2, write_llama

pytest.importorskip("transformers")

TARGETS = ["q_proj", "down_proj", "embed_tokens"]
WEIGHTS = [0.7, -0.4]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("base"))


def pair_of(folder: Path, base: Path, *configs: Any) -> list[Path]:
    first, *rest = configs
    second = rest[0] if rest else first
    return [
        write_adapter(folder / name, base, config, seed=seed)
        for seed, (name, config) in enumerate([("one", first), ("two", second)], start=1)
    ]


def on_a_model(base: Path, places: list[Path], *args: Any, **options: Any) -> Any:
    """The model with the combination active, made by the usual call."""
    model = mg.PeftModel.from_pretrained(load_base(base), places[0], "one")
    model.load_adapter(places[1], "two")
    torch.manual_seed(0)
    model.add_weighted_adapter(["one", "two"], WEIGHTS, "both", *args, **options)
    model.set_adapter("both", inference_mode=True)
    return model.eval()


def require_same(base: Path, folder: Path, wanted: Any) -> None:
    found = mg.PeftModel.from_pretrained(load_base(base), folder).eval()
    assert torch.equal(logits(found), logits(wanted))
    assert not torch.allclose(logits(found), logits(load_base(base)))


@pytest.mark.parametrize("rule", sorted(name for name in RULES if "dare" not in name))
def test_every_rule_needs_no_base_and_gives_the_same(rule: str, base: Path, tmp_path: Path):
    config = mg.LoraConfig(target_modules=TARGETS, r=4, lora_alpha=6, use_rslora=True)
    places = pair_of(tmp_path, base, config)
    more = {"density": 0.5} if RULES[rule].sparsify else {}
    made = combine_files(places, tmp_path / "out", weights=WEIGHTS, method=rule, **more)
    assert (made.base, made.adapters, made.sites) == (None, ["one", "two"], 5)
    require_same(base, tmp_path / "out", on_a_model(base, places, rule, **more))


@pytest.mark.parametrize("rule", sorted(name for name in RULES if "dare" in name))
def test_what_dare_leaves_out_goes_by_the_seed(rule: str, base: Path, tmp_path: Path):
    config = mg.LoraConfig(target_modules=TARGETS, r=4)
    places = pair_of(tmp_path, base, config)
    state = torch.get_rng_state()
    for name, seed in {"a": 1, "b": 1, "c": 2}.items():
        combine_files(places, tmp_path / name, method=rule, density=0.5, seed=seed)
    assert torch.equal(torch.get_rng_state(), state)
    a, b, c = (load_file(tmp_path / n / "adapter_model.safetensors") for n in "abc")
    assert all(torch.equal(value, b[key]) for key, value in a.items())
    assert not all(torch.equal(value, c[key]) for key, value in a.items())
    whole = combine_files(places, tmp_path / "whole", method=rule, density=1.0, weights=WEIGHTS)
    require_same(base, Path(whole.folder), on_a_model(base, places, rule, density=1.0))


FURTHER: dict[str, list[Any]] = {
    "other targets and ranks": [
        mg.LoraConfig(
            target_modules=["q_proj"], r=4, rank_pattern={"layers.1.self_attn.q_proj": 2}
        ),
        mg.LoraConfig(target_modules=["v_proj", "q_proj"], r=3),
    ],
    "an output bias": [mg.LoraConfig(target_modules=["q_proj"], r=4, lora_bias=True)],
    "some layers each": [
        mg.LoraConfig(target_modules=["q_proj"], r=4, layers_to_transform=[0]),
        mg.LoraConfig(target_modules=["q_proj", "v_proj"], r=4, layers_to_transform=[1]),
    ],
    "expressions": [
        mg.LoraConfig(target_modules=r".*layers\.0\..*q_proj", r=4),
        mg.LoraConfig(target_modules=r".*1.*v_proj", r=4),
    ],
}


@pytest.mark.parametrize("case", FURTHER)
def test_what_pairs_may_have_besides_needs_no_base(case: str, base: Path, tmp_path: Path):
    places = pair_of(tmp_path, base, *FURTHER[case])
    combine_files(places, tmp_path / "out", weights=WEIGHTS, method="cat")
    require_same(base, tmp_path / "out", on_a_model(base, places, "cat"))


def test_ia3_adds_up_without_the_base(base: Path, tmp_path: Path):
    config = mg.IA3Config(target_modules=["v_proj", "down_proj"], feedforward_modules=["down_proj"])
    other = mg.IA3Config(target_modules=["v_proj"], feedforward_modules=[])
    places = pair_of(tmp_path, base, config, other)
    made = combine_files(places, tmp_path / "out", weights=WEIGHTS)
    assert made.ranks is None and made.sites == 4
    require_same(base, tmp_path / "out", on_a_model(base, places))


NEEDY = {
    "dora": (mg.LoraConfig(target_modules=["q_proj"], r=4, use_dora=True), "variant `dora`"),
    "pissa": (
        mg.LoraConfig(target_modules=["q_proj"], r=4, init_lora_weights="pissa"),
        "began with a part",
    ),
    "saved": (
        mg.LoraConfig(target_modules=["q_proj"], r=4, modules_to_save=["lm_head"]),
        r"saved modules \(lm_head\)",
    ),
    "tokens": (
        mg.LoraConfig(target_modules=["q_proj"], r=4, trainable_token_indices=[5, 7]),
        "trained tokens",
    ),
    "parameters": (
        mg.LoraConfig(target_modules=[], target_parameters=["q_proj.weight"], r=4),
        "stand in the base alone",
    ),
}


@pytest.mark.parametrize("kind", NEEDY)
def test_what_is_relative_to_the_base_needs_it_and_reads_it(kind: str, base: Path, tmp_path: Path):
    config, says = NEEDY[kind]
    places = pair_of(tmp_path, base, config)
    with pytest.raises(CheckpointError, match=f"{says}.*Give it with --base"):
        combine_files(places, tmp_path / "out", weights=WEIGHTS, method="cat")
    assert not (tmp_path / "out").exists()
    made = combine_files(places, tmp_path / "out", weights=WEIGHTS, method="cat", base=base)
    assert made.base == str(base)
    require_same(base, tmp_path / "out", on_a_model(base, places, "cat"))


def test_transposed_layers_stay_so_in_the_config(tmp_path: Path):
    base = write_gpt2(tmp_path / "base")
    config = mg.LoraConfig(target_modules=["c_attn"], r=4, fan_in_fan_out=True)
    places = pair_of(tmp_path, base, config)
    combine_files(places, tmp_path / "out", weights=WEIGHTS)
    assert mg.PeftConfig.from_pretrained(tmp_path / "out").fan_in_fan_out is True
    require_same(base, tmp_path / "out", on_a_model(base, places))


def test_config_dtype_and_default_weights(base: Path, tmp_path: Path):
    half = write_llama(tmp_path / "half", dtype="bfloat16")
    config = mg.LoraConfig(target_modules=["q_proj"], r=4, task_type="CAUSAL_LM")
    places = pair_of(tmp_path, half, config)
    for place in places:  # as training in bfloat16 throughout would leave them
        path = place / "adapter_model.safetensors"
        from safetensors.torch import save_file

        save_file({k: v.bfloat16() for k, v in load_file(path).items()}, path)
    made = combine_files(places, tmp_path / "out")
    assert made.weights == [0.5, 0.5]
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors").values()
    assert {tensor.dtype for tensor in tensors} == {torch.bfloat16}
    saved = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert saved["base_model_name_or_path"] == str(half) and saved["task_type"] == "CAUSAL_LM"


def test_adapters_of_bases_of_other_sizes_are_refused(base: Path, tmp_path: Path):
    wide = write_llama(tmp_path / "wide", hidden_size=32)
    config = mg.LoraConfig(target_modules=["q_proj"], r=4)
    places = [
        write_adapter(tmp_path / "one", base, config),
        write_adapter(tmp_path / "two", wide, config),
    ]
    with (
        pytest.warns(mg.MultigraftWarning, match="different bases"),
        pytest.raises(CheckpointError, match=r"is \(32, 32\) \(in, out\) there, and \(16, 16\)"),
    ):
        combine_files(places, tmp_path / "out")


def test_mistakes_change_nothing(base: Path, tmp_path: Path):
    places = pair_of(tmp_path, base, mg.LoraConfig(target_modules=["q_proj"], r=4))
    with pytest.raises(ConfigError, match="one number for each of the 2"):
        combine_files(places, tmp_path / "out", weights=[1])
    with pytest.raises(UnsupportedError, match="Nearest: `ties`"):
        combine_files(places, tmp_path / "out", method="tie")
    with pytest.raises(ConfigError, match="needs `density`"):
        combine_files(places, tmp_path / "out", method="ties")
    assert not (tmp_path / "out").exists()
    with pytest.raises(StateError, match="--overwrite"):
        combine_files(places, places[0])


def test_the_command(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    config = mg.LoraConfig(target_modules=TARGETS, r=4)
    places = [str(place) for place in pair_of(tmp_path, base, config)]

    def run(*words: str, code: int = 0) -> tuple[str, str]:
        with pytest.raises(SystemExit) as end:
            cli.main(["combine", *places, *words])
        shown = capsys.readouterr()
        assert end.value.code == code, shown.err
        return shown.out, shown.err

    out, _ = run("-o", str(tmp_path / "a"), "--weights", "0.7,-0.4", "--rank", "2")
    assert "0.7 x one + -0.4 x two, by svd" in out and "rank      2, at 5 layers" in out
    words = ["--method", "ties", "--density", "0.5", "--json"]
    found = json.loads(run("-o", str(tmp_path / "b"), *words)[0])
    assert found["weights"] == [0.5, 0.5] and found["ranks"] == [4, 4]
    shares = run("-o", str(tmp_path / "c"), "--rank", "0.5", "--json")[0]
    assert json.loads(shares)["error"] > 0
    for mistake in (["--weights", "a,b"], ["--rank", "x"], ["--weights", "1"], ["--method", "x"]):
        _, err = run("-o", str(tmp_path / "d"), *mistake, code=2)
        assert "Traceback" not in err
    assert "Example" in run("--help")[0]
