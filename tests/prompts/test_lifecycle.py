"""Context adapters live as weight adapters do: attach, copy, load, refuse, leave no trace."""

from __future__ import annotations

import copy
import io
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import multigraft
from multigraft import CheckpointError, ConfigError, StateError, UnsupportedError
from tests import oracle
from tests.laws import fingerprint
from tests.prompts import pairs

ALL = ["prompt", "p_tuning", "prefix", "projected_prefix", "adaption"]


@pytest.mark.parametrize("method", ALL)
def test_a_further_adapter_starts_inactive_and_frozen(method):
    adapted = pairs.ours("prompt", "llama")
    before = oracle.output(adapted, oracle.inputs(adapted))
    adapted.add_adapter("more", oracle.our_config(pairs.options(method, "llama")))
    assert torch.equal(oracle.output(adapted, oracle.inputs(adapted)), before)
    own = [p for n, p in adapted.named_parameters() if n.startswith("prompt_encoder.more.")]
    assert own and not any(p.requires_grad for p in own)
    status = adapted.get_model_status()
    assert status.requires_grad == {"default": True, "more": False}
    assert status.total_params == sum(p.numel() for p in adapted.parameters())


def test_every_handle_shows_the_contexts_while_there_are_any():
    base = oracle.build(oracle.llama)
    first = multigraft.get_peft_model(base, multigraft.LoraConfig(), "l")
    assert not hasattr(first, "prompt_encoder")
    second = multigraft.get_peft_model(base, oracle.our_config(pairs.METHODS["prompt"]), "c")
    assert first.prompt_encoder is second.prompt_encoder
    first.delete_adapter("c")
    assert not hasattr(second, "prompt_encoder")


@pytest.mark.parametrize("method", ALL)
@pytest.mark.parametrize("how", ["copied", "pickled"])
def test_a_copy_is_independent(method, how):
    adapted = pairs.ours(method, "llama")
    batch = oracle.inputs(adapted)
    expected = oracle.output(adapted, batch)
    if how == "copied":
        twin = copy.deepcopy(adapted)
    else:
        file = io.BytesIO()
        torch.save(adapted, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    assert torch.equal(oracle.output(twin, batch), expected)
    for parameter in twin.prompt_encoder.parameters():
        nn.init.constant_(parameter, 0.3)
    assert not torch.allclose(oracle.output(twin, batch), expected, atol=1e-4)
    twin.delete_adapter("default")
    assert torch.equal(oracle.output(twin, batch), oracle.output(_base(), batch))
    assert torch.equal(oracle.output(adapted, batch), expected)


@pytest.mark.parametrize("method", ALL)
def test_loading_over_keeps_the_parameters_that_optimisers_hold(method, tmp_path):
    adapted = pairs.ours(method, "llama")
    adapted.save_pretrained(tmp_path)
    batch = oracle.inputs(adapted)
    expected = oracle.output(adapted, batch)
    before = dict(adapted.prompt_encoder.named_parameters())
    for parameter in before.values():
        nn.init.constant_(parameter, 0.3)
    adapted.load_adapter(tmp_path, "default")
    torch.testing.assert_close(oracle.output(adapted, batch), expected)
    after = dict(adapted.prompt_encoder.named_parameters())
    if method in ("p_tuning", "projected_prefix"):  # the file holds the table, not the network
        assert list(after) == ["default.embedding.weight"]
    else:
        assert all(after[name] is before[name] for name in before)
    assert all(p.requires_grad for p in after.values())
    assert all(p.requires_grad for p in adapted.prompt_encoder.parameters())


@pytest.mark.parametrize("method", ["prompt", "prefix", "adaption"])
def test_a_loaded_adapter_can_be_trained_on(method, tmp_path):
    pairs.ours(method, "llama").save_pretrained(tmp_path)
    read = multigraft.PeftModel.from_pretrained(_base(), tmp_path, is_trainable=True)
    batch = oracle.inputs(read)
    read(**batch, labels=batch["input_ids"]).loss.backward()
    assert all(p.grad is not None for p in read.prompt_encoder.parameters())


@pytest.mark.parametrize("method", ["p_tuning", "p_tuning_lstm", "projected_prefix"])
def test_a_network_that_no_file_holds_cannot_be_trained_on(method, tmp_path):
    adapted = pairs.ours(method, "llama")
    adapted.save_pretrained(tmp_path)
    base = _base()
    before = fingerprint(base)
    with pytest.raises(StateError, match="a file holds only the table"):
        multigraft.PeftModel.from_pretrained(base, tmp_path, is_trainable=True)
    assert fingerprint(base) == before
    state = multigraft.get_peft_model_state_dict(adapted)
    with pytest.raises(StateError, match="is_trainable=False"):
        multigraft.set_peft_model_state_dict(adapted, state)


def test_dropout_is_off_in_what_is_saved():
    adapted = pairs.ours("p_tuning_lstm", "llama", encoder_num_layers=2, encoder_dropout=0.9)
    quiet = multigraft.get_peft_model_state_dict(adapted)["prompt_embeddings"]
    adapted.train()
    noisy = adapted.get_prompt(1)[0]
    saved = multigraft.get_peft_model_state_dict(adapted)["prompt_embeddings"]
    assert torch.equal(saved, quiet) and not torch.allclose(noisy, quiet)
    assert adapted.prompt_encoder["default"].training


@pytest.mark.parametrize("method", ALL)
def test_a_damaged_file_is_refused_and_leaves_no_trace(method, tmp_path):
    pairs.ours(method, "llama").save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    state = load_file(file)
    key = sorted(state)[-1]
    damaged = {
        "missing from the file": {k: v for k, v in state.items() if k != key} | {"x.y": state[key]},
        "of another shape": state | {key: torch.zeros(5, 5)},
        "NaN or infinity": state | {key: state[key] * float("nan")},
    }
    for problem, tensors in damaged.items():
        save_file(tensors, file)
        base = _base()
        before = fingerprint(base)
        with pytest.raises(CheckpointError, match=problem):
            multigraft.PeftModel.from_pretrained(base, tmp_path)
        assert fingerprint(base) == before


@pytest.mark.parametrize("method", ALL)
def test_half_precision_keeps_float32_adapters(method):
    base = oracle.build(oracle.llama).bfloat16()
    adapted = multigraft.get_peft_model(base, oracle.our_config(pairs.options(method, "llama")))
    pairs.opened(adapted)
    assert {p.dtype for p in adapted.prompt_encoder.parameters()} == {torch.float32}
    batch = oracle.inputs(adapted)
    given = adapted(**batch, labels=batch["input_ids"])
    assert given.logits.dtype == torch.bfloat16
    given.loss.backward()
    assert all(p.grad.isfinite().all() for p in adapted.prompt_encoder.parameters())


def test_a_meta_adapter_takes_its_values_later(tmp_path):
    source = pairs.ours("prompt", "llama")
    adapted = multigraft.get_peft_model(
        _base(), oracle.our_config(pairs.options("prompt", "llama")), low_cpu_mem_usage=True
    )
    assert adapted.prompt_encoder["default"].embedding.weight.is_meta
    with pytest.raises(CheckpointError, match="holds no values"):
        adapted.save_pretrained(tmp_path)
    state = multigraft.get_peft_model_state_dict(source)
    multigraft.set_peft_model_state_dict(adapted, state, low_cpu_mem_usage=True)
    batch = oracle.inputs(source)
    assert torch.equal(oracle.output(adapted.eval(), batch), oracle.output(source, batch))


def test_a_config_is_the_users_own():
    config = oracle.our_config(pairs.options("prefix", "llama"))
    adapted = multigraft.get_peft_model(_base(), config)
    assert config.token_dim is None and adapted.active_peft_config.token_dim == 8
    assert adapted.active_peft_config.is_prompt_learning


def test_what_a_model_does_not_tell_must_be_given():
    base = _base()
    base.config = {"model_type": "custom"}
    before = fingerprint(base)
    with pytest.raises(ConfigError, match=r"`num_layers` \(=None\) .* `num_hidden_layers`"):
        multigraft.get_peft_model(base, multigraft.PrefixTuningConfig(num_virtual_tokens=2))
    assert fingerprint(base) == before
    config = multigraft.PromptTuningConfig(num_virtual_tokens=2)
    adapted = multigraft.get_peft_model(base, config)  # its embedding tells all that this needs
    assert adapted.active_peft_config.token_dim == 16


def test_a_model_without_token_embeddings_is_refused():
    with pytest.raises(UnsupportedError, match="no get_input_embeddings"):
        multigraft.get_peft_model(
            nn.Linear(2, 2), multigraft.PromptTuningConfig(num_virtual_tokens=2)
        )


def test_nothing_can_be_injected_without_a_handle():
    config = multigraft.PromptTuningConfig(num_virtual_tokens=2)
    with pytest.raises(UnsupportedError, match="Use get_peft_model"):
        multigraft.inject_adapter_in_model(config, _base())


def test_questions_about_a_prompt_need_one():
    adapted = multigraft.get_peft_model(_base(), multigraft.LoraConfig())
    with pytest.raises(StateError, match="no adapter with a prompt is active"):
        adapted.get_prompt(1)
    with pytest.raises(StateError, match="changes weights"):
        adapted.get_prompt_embedding_to_save("default")


def test_the_embedding_to_save_is_what_is_saved(tmp_path):
    adapted = pairs.ours("p_tuning", "llama")
    adapted.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")["prompt_embeddings"]
    assert torch.equal(adapted.get_prompt_embedding_to_save("default"), saved)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["inference_mode"] is True


def _base():
    return oracle.build(oracle.llama)


def test_loading_over_takes_the_files_config(tmp_path):
    # The same table twice: six tokens, and three for each of two parts of a model.
    halves = pairs.ours("prompt", "llama", num_virtual_tokens=3, num_transformer_submodules=2)
    halves.save_pretrained(tmp_path)
    adapted = pairs.ours("prompt", "llama", num_virtual_tokens=6)
    batch = oracle.inputs(adapted)
    adapted.load_adapter(tmp_path, "default")
    assert adapted.active_peft_config.num_virtual_tokens == 3
    torch.testing.assert_close(oracle.output(adapted, batch), oracle.output(halves, batch))
