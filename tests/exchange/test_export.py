"""Exporting to vLLM and SGLang: nothing that an adapter adds is lost, or nothing is written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from multigraft import CheckpointError, StateError, UnsupportedError
from multigraft.exchange import export
from tests.exchange.adapters import (
    SIZES,
    changes,
    changes_read_globally,
    settings_in,
    tensors_in,
    write,
)
from tests.tiny_base import write_base

SERVED = ("vllm", "sglang")
VARIED = {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"down_proj": 3}}


def assert_same_changes(before: Path, after: Path, tolerance: float) -> None:
    wanted, got = changes(before), changes_read_globally(after)
    for path in SIZES:
        torch.testing.assert_close(got[path], wanted[path], rtol=0, atol=tolerance)


@pytest.mark.parametrize("consumer", SERVED)
@pytest.mark.parametrize(
    "config", [{}, VARIED, {"use_rslora": True}, VARIED | {"use_rslora": True}]
)
def test_a_program_that_knows_one_rank_and_one_alpha_adds_the_same(consumer, config, tmp_path):
    folder = write(tmp_path / "a", **config)
    export(folder, consumer, tmp_path / "b")
    assert_same_changes(folder, tmp_path / "b", 2e-6)
    values = settings_in(tmp_path / "b")
    assert not values["use_rslora"] and not values["rank_pattern"] and not values["alpha_pattern"]


def test_without_patterns_the_tensors_keep_their_bits(tmp_path):
    folder = write(tmp_path / "a", dtype=torch.bfloat16, use_rslora=True)
    export(folder, "vllm", tmp_path / "b")
    before, after = tensors_in(folder), tensors_in(tmp_path / "b")
    assert before.keys() == after.keys()
    assert all(
        torch.equal(before[k], after[k]) and before[k].dtype == after[k].dtype for k in before
    )
    assert settings_in(tmp_path / "b")["lora_alpha"] == 16  # 8 / sqrt(4) * 4


def test_a_ratio_that_is_a_power_of_two_stays_in_half_precision_and_is_exact(tmp_path):
    folder = write(tmp_path / "a", dtype=torch.float16, alpha_pattern={"down_proj": 32})
    outcome = export(folder, "vllm", tmp_path / "b")
    assert {t.dtype for t in tensors_in(tmp_path / "b").values()} == {torch.float16}
    assert_same_changes(folder, tmp_path / "b", 0)
    assert "folded the scales of 1 of 4 layers into B, exactly" in outcome.done


def test_another_ratio_goes_into_float32_and_is_said_to_be_rounded(tmp_path):
    folder = write(tmp_path / "a", dtype=torch.bfloat16, alpha_pattern={"down_proj": 3})
    outcome = export(folder, "vllm", tmp_path / "b")
    tensors = tensors_in(tmp_path / "b")
    assert (
        tensors["base_model.model.model.layers.1.mlp.down_proj.lora_B.weight"].dtype
        == torch.float32
    )
    assert_same_changes(folder, tmp_path / "b", 1e-6)
    assert any("1 of them in float32" in each for each in outcome.done)


def test_ranks_are_padded_with_zeros(tmp_path):
    folder = write(tmp_path / "a", rank_pattern={"v_proj": 2}, alpha_pattern={"v_proj": 4})
    export(folder, "vllm", tmp_path / "b")
    after = tensors_in(tmp_path / "b")
    A = after["base_model.model.model.layers.0.self_attn.v_proj.lora_A.weight"]
    assert A.shape == (4, 16) and not A[2:].any() and A[:2].all()


def test_a_scale_of_zero_stays_zero(tmp_path):
    folder = write(tmp_path / "a", lora_alpha=0)
    export(folder, "vllm", tmp_path / "b")
    assert settings_in(tmp_path / "b")["lora_alpha"] == 4
    assert_same_changes(folder, tmp_path / "b", 0)


MORE = {
    "use_dora": True,
    "lora_bias": True,
    "bias": "lora_only",
    "modules_to_save": ["lm_head"],
    "trainable_token_indices": [1, 2],
    "init_lora_weights": "pissa",
    "alora_invocation_tokens": [5],
    "layer_replication": [[0, 2], [0, 2]],
    "a_field_of_tomorrow": 3,
}


@pytest.mark.parametrize("consumer", SERVED)
@pytest.mark.parametrize("field", MORE)
def test_what_is_more_than_pairs_is_refused_by_name_and_nothing_is_written(
    consumer, field, tmp_path
):
    folder = write(tmp_path / "a", **{field: MORE[field]})
    with pytest.raises(UnsupportedError, match=rf"{field}[\s\S]*Merge first"):
        export(folder, consumer, tmp_path / "b")
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("consumer", SERVED)
def test_another_method_is_refused(consumer, tmp_path):
    folder = write(tmp_path / "a")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LOHA", "r": 4}))
    with pytest.raises(UnsupportedError, match="LOHA"):
        export(folder, consumer, tmp_path / "b")


def test_a_tensor_that_is_no_pairs_is_refused_by_name(tmp_path):
    stray = {"base_model.model.lm_head.weight": torch.ones(4, 4)}
    folder = write(tmp_path / "a", extra=stray)
    with pytest.raises(UnsupportedError, match=r"`lm_head.weight` is no low-rank pair's"):
        export(folder, "vllm", tmp_path / "b")


def test_a_pair_without_its_half_is_refused(tmp_path):
    stray = {"base_model.model.lm_head.lora_A.weight": torch.ones(4, 4)}
    folder = write(tmp_path / "a", extra=stray)
    with pytest.raises(CheckpointError, match=r"`lm_head` lacks B"):
        export(folder, "vllm", tmp_path / "b")


def test_a_rank_that_the_config_does_not_say_is_refused(tmp_path):
    folder = write(tmp_path / "a")
    values = settings_in(folder) | {"r": 8}
    (folder / "adapter_config.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match="has rank 4, and its config says 8"):
        export(folder, "vllm", tmp_path / "b")


def test_vllm_is_told_the_rank_it_must_allow(tmp_path):
    folder = write(tmp_path / "a", r=20)
    outcome = export(folder, "vllm", tmp_path / "b")
    assert any("--max-lora-rank 32" in note for note in outcome.notes)


def test_vllm_refuses_ranks_that_no_setting_allows(tmp_path):
    folder = write(tmp_path / "a", r=513)
    with pytest.raises(UnsupportedError, match="rank 513 is above 512"):
        export(folder, "vllm", tmp_path / "b")


def test_sglang_gets_a_list_of_last_parts(tmp_path):
    folder = write(tmp_path / "a", target_modules=".*_proj")
    export(folder, "sglang", tmp_path / "b")
    assert settings_in(tmp_path / "b")["target_modules"] == ["down_proj", "q_proj", "v_proj"]


def test_exporting_onto_itself_is_refused(tmp_path):
    folder = write(tmp_path / "a")
    with pytest.raises(StateError, match="Name another"):
        export(folder, "vllm", folder)


def test_an_unknown_program_is_refused_with_those_that_are_known(tmp_path):
    with pytest.raises(UnsupportedError, match=r"`vlm` is unknown. Nearest: `vllm`"):
        export(write(tmp_path / "a"), "vlm", tmp_path / "b")


# With the base at hand.


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    pytest.importorskip("transformers")
    return write_base(tmp_path_factory.mktemp("base"))


def test_paths_that_the_base_has_pass(base, tmp_path):
    export(write(tmp_path / "a"), "vllm", tmp_path / "b", base=base)
    assert (tmp_path / "b" / "adapter_model.safetensors").is_file()


def test_a_path_that_the_base_lacks_is_refused(base, tmp_path):
    stray = {
        "base_model.model.model.layers.7.mlp.up_proj.lora_A.weight": torch.ones(4, 16),
        "base_model.model.model.layers.7.mlp.up_proj.lora_B.weight": torch.ones(24, 4),
    }
    with pytest.raises(CheckpointError, match=r"has no layer `model.layers.7.mlp.up_proj`"):
        export(write(tmp_path / "a", extra=stray), "vllm", tmp_path / "b", base=base)


def test_a_copy_of_the_bases_matrix_is_left_out_and_one_that_differs_refused(base, tmp_path):
    held = load_file(base / "model.safetensors")["model.embed_tokens.weight"]
    key = "base_model.model.model.embed_tokens.base_layer.weight"
    outcome = export(write(tmp_path / "a", extra={key: held}), "vllm", tmp_path / "b", base=base)
    assert any("which the base holds bit for bit" in each for each in outcome.done)
    assert key not in tensors_in(tmp_path / "b")
    other = write(tmp_path / "c", extra={key: held + 1})
    with pytest.raises(UnsupportedError, match="would be dropped"):
        export(other, "vllm", tmp_path / "d", base=base)


def test_the_tokeniser_goes_along(base, tmp_path):
    folder = write(tmp_path / "a")
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    (folder / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    (folder / "added_tokens.json").write_text("{}")
    outcome = export(folder, "sglang", tmp_path / "b")
    assert (tmp_path / "b" / "chat_template.jinja").read_text() == "{{ messages[0].content }}"
    assert "tokenizer_config.json" in outcome.files
    assert not (tmp_path / "b" / "added_tokens.json").exists()
    outcome = export(write(tmp_path / "c"), "vllm", tmp_path / "d", base=base)
    assert (tmp_path / "d" / "tokenizer.json").read_bytes() == (
        base / "tokenizer.json"
    ).read_bytes()


def test_what_is_exported_loads_here_and_acts_the_same(base, tmp_path):
    from multigraft import PeftModel
    from multigraft.train import load_base

    folder = write(tmp_path / "a", target_modules=sorted(SIZES), **VARIED)
    export(folder, "vllm", tmp_path / "b")
    x = torch.tensor([[1, 2, 3]])
    first = PeftModel.from_pretrained(load_base(str(base)), folder)(input_ids=x).logits
    second = PeftModel.from_pretrained(load_base(str(base)), tmp_path / "b")(input_ids=x).logits
    torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-5)
