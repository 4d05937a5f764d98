"""Merging from disk to disk gives what merging in memory gives, to the bit, for every method."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch

import multigraft as mg
from multigraft.errors import (
    CheckpointError,
    MergeError,
    StateError,
    UnsupportedError,
)
from multigraft.merging import merge_files
from multigraft.merging.mapped import INDEX
from multigraft.train import load_base
from tests.merging.models import (
    logits,
    merged_in_memory,
    require_same,
    write_adapter,
    write_gpt2,
    write_llama,
)

pytest.importorskip("transformers")

LINEAR = ["q_proj", "down_proj"]
METHODS = {
    "lora": mg.LoraConfig(target_modules="all-linear", r=4),
    "dora": mg.LoraConfig(target_modules=LINEAR, r=4, use_dora=True),
    "pissa": mg.LoraConfig(target_modules=LINEAR, r=4, init_lora_weights="pissa"),
    "embeddings": mg.LoraConfig(target_modules=["embed_tokens", "q_proj"], r=4),
    "saved head": mg.LoraConfig(target_modules=LINEAR, r=4, modules_to_save=["lm_head"]),
    "tokens": mg.LoraConfig(target_modules=LINEAR, r=4, trainable_token_indices=[5, 7]),
    "parameters": mg.LoraConfig(target_modules=[], target_parameters=["q_proj.weight"], r=4),
    "ia3": mg.IA3Config(target_modules=LINEAR, feedforward_modules=["down_proj"]),
    "oft": mg.OFTConfig(target_modules=LINEAR, oft_block_size=8),
    "loha": mg.LoHaConfig(target_modules=LINEAR, r=2),
    "lokr": mg.LoKrConfig(target_modules=LINEAR, r=2),
    "vera": mg.VeraConfig(target_modules=["q_proj", "o_proj"], r=4),
    "hira": mg.HiraConfig(target_modules=LINEAR, r=4),
    "adalora": mg.AdaLoraConfig(target_modules=LINEAR, init_r=4, total_step=9),
    "norms": mg.LNTuningConfig(target_modules=["input_layernorm"]),
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bases")
    return {
        "untied": write_llama(root / "untied"),
        "tied": write_llama(root / "tied", tied=True),
        "bfloat16": write_llama(root / "bfloat16", dtype="bfloat16"),
        "shards": write_llama(root / "shards", shard="6KB"),
        "gpt2": write_gpt2(root / "gpt2"),
    }


@pytest.mark.parametrize("method", METHODS)
def test_every_method_gives_the_bits_of_merging_in_memory(
    method: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    base = bases["untied"]
    adapter = write_adapter(tmp_path / "a", base, METHODS[method])
    done = merge_files([adapter], tmp_path / "out", base=base)
    require_same(tmp_path / "out", merged_in_memory(base, adapter))
    assert done.verdict is not None and done.verdict.is_good and done.verdict.is_telling
    assert done.different == done.tensors and done.untied == []


@pytest.mark.parametrize("kind", ["bfloat16", "shards", "tied"])
def test_dtypes_shards_and_ties_stay_what_they_are(
    kind: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    base = bases[kind]
    adapter = write_adapter(tmp_path / "a", base, METHODS["lora"])
    merge_files([adapter], tmp_path / "out", base=base)
    require_same(tmp_path / "out", merged_in_memory(base, adapter))
    names = {path.name for path in base.glob("*.safetensors*")}
    assert {path.name for path in (tmp_path / "out").glob("*.safetensors*")} == names
    assert len(names) > 3 or kind != "shards"
    if INDEX in names:
        maps = [json.loads((f / INDEX).read_text())["weight_map"] for f in (base, tmp_path / "out")]
        assert maps[0] == maps[1]
    assert load_base(tmp_path / "out").dtype == load_base(base).dtype


def test_transposed_layers_and_files_that_lack_the_prefix(
    bases: dict[str, Path], tmp_path: Path
) -> None:
    from transformers import GPT2Model

    bare = tmp_path / "bare"
    GPT2Model.from_pretrained(bases["gpt2"]).save_pretrained(bare)
    config = json.loads((bare / "config.json").read_text())
    (bare / "config.json").write_text(json.dumps({**config, "architectures": ["GPT2LMHeadModel"]}))
    spec = mg.LoraConfig(target_modules=["c_attn"], r=4, fan_in_fan_out=True)
    for base in (bases["gpt2"], bare):
        adapter = write_adapter(tmp_path / f"a-{base.name}", base, spec)
        out = tmp_path / f"out-{base.name}"
        merge_files([adapter], out, base=base)
        require_same(out, merged_in_memory(base, adapter))


def test_several_adapters_are_merged_together(bases: dict[str, Path], tmp_path: Path) -> None:
    base = bases["untied"]
    places = [
        write_adapter(tmp_path / name, base, METHODS[name], seed=seed)
        for seed, name in enumerate(["lora", "dora", "embeddings"])
    ]
    done = merge_files(places, tmp_path / "out", base=base)
    require_same(tmp_path / "out", merged_in_memory(base, *places))
    assert done.adapters == ["lora", "dora", "embeddings"]


@pytest.mark.parametrize("method", ["saved head", "embeddings"])
def test_a_tied_weight_that_only_one_of_two_changes_is_untied(
    method: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    base = bases["tied"]
    adapter = write_adapter(tmp_path / "a", base, METHODS[method])
    done = merge_files([adapter], tmp_path / "out", base=base)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wanted = merged_in_memory(base, adapter)
    require_same(tmp_path / "out", wanted)
    assert done.untied == ["lm_head.weight"]
    assert load_base(tmp_path / "out").config.tie_word_embeddings is False
    assert torch.equal(logits(load_base(tmp_path / "out")), logits(wanted))


def test_an_adapter_of_both_tied_modules_keeps_the_tie(
    bases: dict[str, Path], tmp_path: Path
) -> None:
    base = bases["tied"]
    spec = mg.LoraConfig(target_modules=["embed_tokens", "lm_head"], r=4, ensure_weight_tying=True)
    adapter = write_adapter(tmp_path / "a", base, spec)
    assert merge_files([adapter], tmp_path / "out", base=base).untied == []
    require_same(tmp_path / "out", merged_in_memory(base, adapter))


def test_prompts_of_ones_own_are_compared(base_dir: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "a", base_dir, METHODS["lora"])
    done = merge_files([adapter], tmp_path / "out", prompts=["Input: 3\nOutput:", "Hello"])
    assert done.verdict is not None and done.verdict.places < 32
    assert done.base == str(base_dir)  # the one that the adapter names
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"config.json", "tokenizer.json", "tokenizer_config.json", "README.md"} <= files


def test_the_adapters_tokeniser_goes_before_the_bases(base_dir: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "a", base_dir, METHODS["lora"])
    settings = json.loads((base_dir / "tokenizer_config.json").read_text())
    (adapter / "tokenizer_config.json").write_text(json.dumps({**settings, "own": 1}))
    (adapter / "tokenizer.json").write_bytes((base_dir / "tokenizer.json").read_bytes())
    merge_files([adapter], tmp_path / "out", check="off")
    assert json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())["own"] == 1


def test_a_merge_that_would_be_wrong_is_found_out(
    bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Values that are written are damaged on the way."""
    from multigraft.merging.output import Output

    put = Output.put

    def damaged(self: Output, key: str, value: torch.Tensor) -> None:
        put(self, key, value * 1.5 if "layers.1.mlp.down_proj" in key else value)

    monkeypatch.setattr(Output, "put", damaged)
    adapter = write_adapter(tmp_path / "a", bases["untied"], METHODS["lora"])
    with pytest.raises(MergeError, match="away from the adapters'"):
        merge_files([adapter], tmp_path / "out", base=bases["untied"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]


def test_an_adapter_that_changes_nothing_is_told(bases: dict[str, Path], tmp_path: Path) -> None:
    model = mg.get_peft_model(load_base(bases["untied"]), METHODS["lora"])
    model.save_pretrained(tmp_path / "a")
    with pytest.raises(MergeError, match="would change none of the base's 14 tensors"):
        merge_files([tmp_path / "a"], tmp_path / "out", base=bases["untied"])
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_merged_is_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    base = bases["untied"]
    prompts = mg.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    adapter = write_adapter(tmp_path / "p", base, prompts)
    with pytest.raises(UnsupportedError, match="no weight, so there is nothing to merge"):
        merge_files([adapter], tmp_path / "out", base=base)
    deep = mg.LoraConfig(target_modules=["q_proj"], layer_replication=[[0, 2], [1, 2]])
    adapter = write_adapter(tmp_path / "deep", base, deep)
    with pytest.raises(UnsupportedError, match="deeper than the base"):
        merge_files([adapter], tmp_path / "out", base=base)
    assert not (tmp_path / "out").exists()


def test_a_head_that_the_base_lacks_is_refused_with_the_remedy(
    bases: dict[str, Path], tmp_path: Path
) -> None:
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(bases["untied"], num_labels=3)
    config = mg.LoraConfig(target_modules=["q_proj"], r=4, task_type="SEQ_CLS")
    mg.get_peft_model(model, config).save_pretrained(tmp_path / "a")
    with pytest.raises(UnsupportedError, match=r"`score` \(for SEQ_CLS\).*merge_and_unload"):
        merge_files([tmp_path / "a"], tmp_path / "out", base=bases["untied"])


def test_a_quantised_base_is_refused_with_the_remedy(
    bases: dict[str, Path], tmp_path: Path
) -> None:
    adapter = write_adapter(tmp_path / "a", bases["untied"], METHODS["lora"])
    base = write_llama(tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedError, match=r"quantised \(bitsandbytes\).*--base"):
        merge_files([adapter], tmp_path / "out", base=base)


def test_a_base_without_some_of_its_weights_is_refused(
    bases: dict[str, Path], tmp_path: Path
) -> None:
    import shutil

    adapter = write_adapter(tmp_path / "a", bases["shards"], METHODS["lora"])
    base = shutil.copytree(bases["shards"], tmp_path / "base")
    next(base.glob("model-00002-*.safetensors")).unlink()
    with pytest.raises(CheckpointError, match="there is no model-00002"):
        merge_files([adapter], tmp_path / "out", base=base)
    shutil.rmtree(base)
    with pytest.raises(CheckpointError, match="no such directory"):
        merge_files([adapter], tmp_path / "out", base=base)


def test_what_is_there_is_replaced_only_when_told_to(
    bases: dict[str, Path], tmp_path: Path
) -> None:
    base, out = bases["untied"], tmp_path / "out"
    adapter = write_adapter(tmp_path / "a", base, METHODS["lora"])
    out.mkdir()
    (out / "old").write_text("")
    with pytest.raises(StateError, match="--overwrite"):
        merge_files([adapter], out, base=base)
    merge_files([adapter], out, base=base, overwrite=True)
    assert not (out / "old").exists()
    require_same(out, merged_in_memory(base, adapter))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "out"]


def test_a_full_disk_is_told_before_anything_is_written(
    bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr("shutil.disk_usage", lambda place: usage)
    adapter = write_adapter(tmp_path / "a", bases["untied"], METHODS["lora"])
    with pytest.raises(CheckpointError, match=r"0\.00 GB are free on that disk"):
        merge_files([adapter], tmp_path / "out", base=bases["untied"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]
