"""Preparing a base for training, and QLoRA from there to a reloaded adapter."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from torch import Tensor, nn

import multigraft
from multigraft import (
    LoraConfig,
    MultigraftWarning,
    PeftModel,
    StateError,
    get_peft_model,
    prepare_model_for_kbit_training,
)
from tests.laws import bits_of, fingerprint
from tests.storage.cases import CASES

SIZES = {
    "vocab_size": 40,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32,
}
LORA = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*gradient_checkpointing_enable", FutureWarning)
        warnings.filterwarnings("ignore", "merged into quantised", MultigraftWarning)
        yield


def llama(dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).to(dtype)


def quantised(kind: str = "bnb-nf4", dtype: torch.dtype = torch.float32) -> Any:
    """A Llama whose linear layers, but for the head, are quantised."""
    model = llama()
    for parent in list(model.model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                setattr(parent, name, CASES[kind].build(child))
    for parameter in model.parameters():
        if parameter.dtype is torch.float32:
            parameter.data = parameter.data.to(dtype)
    return model


def ids(seed: int = 1) -> Tensor:
    return torch.randint(40, (4, 12), generator=torch.Generator().manual_seed(seed))


def train(model: nn.Module, steps: int = 12) -> list[float]:
    model.train()
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=ids(), labels=ids()).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
    return losses


# -- preparing ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bnb-nf4", "bnb-int8"])
def test_a_quantised_base_is_prepared_as_peft_prepares_it(kind):
    ours, theirs = (quantised(kind, torch.bfloat16) for _ in range(2))
    theirs.is_loaded_in_4bit = True
    assert prepare_model_for_kbit_training(ours) is ours
    peft.prepare_model_for_kbit_training(theirs)
    flags = [(n, p.dtype, p.requires_grad) for n, p in ours.named_parameters()]
    assert flags == [(n, p.dtype, p.requires_grad) for n, p in theirs.named_parameters()]
    assert {dtype for name, dtype, _ in flags if "norm" in name} == {torch.float32}
    assert ours.is_activation_checkpointing
    assert ours.is_activation_checkpointing == theirs.is_activation_checkpointing
    embedded = ours.get_input_embeddings()(ids())
    assert embedded.requires_grad
    assert embedded.requires_grad == theirs.get_input_embeddings()(ids()).requires_grad


def test_no_flag_of_the_model_is_needed_to_see_that_it_is_quantised():
    model = quantised()
    assert not hasattr(model, "is_loaded_in_4bit")
    assert prepare_model_for_kbit_training(model).is_activation_checkpointing


def test_a_plain_base_is_frozen_and_widened_and_no_more():
    ours, theirs = llama(torch.bfloat16), llama(torch.bfloat16)
    prepare_model_for_kbit_training(ours)
    peft.prepare_model_for_kbit_training(theirs)
    flags = {(p.dtype, p.requires_grad) for p in ours.parameters()}
    assert flags == {(torch.float32, False)}
    assert flags == {(p.dtype, p.requires_grad) for p in theirs.parameters()}
    assert not ours.is_activation_checkpointing
    assert not ours.get_input_embeddings()(ids()).requires_grad


def test_packed_data_kept_in_a_half_precision_dtype_are_left_alone():
    base = nn.Sequential(
        Linear4bit(64, 64, quant_storage=torch.bfloat16).to("cpu"), nn.Linear(64, 64).bfloat16()
    )
    before = bits_of(base[0].weight)
    prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)
    assert base[0].weight.dtype is torch.bfloat16
    assert bits_of(base[0].weight) == before
    assert base[1].weight.dtype is torch.float32


def test_quantisers_that_expect_half_precision_keep_it():
    base = CASES["torchao-int8-bf16"].make(64, 64)
    net = nn.Sequential(base, nn.LayerNorm(64, dtype=torch.bfloat16))
    prepare_model_for_kbit_training(net, use_gradient_checkpointing=False)
    assert {p.dtype for p in net.parameters()} == {torch.bfloat16}
    stated = llama(torch.bfloat16)
    stated.quantization_method = "gptq"
    prepare_model_for_kbit_training(stated)
    assert {p.dtype for p in stated.parameters()} == {torch.bfloat16}
    assert stated.is_activation_checkpointing


@pytest.mark.parametrize("options", [None, {"use_reentrant": False}, {"use_reentrant": True}])
def test_checkpointing_gets_its_options_and_one_hook_lets_gradients_in(options):
    model, given = quantised(), copy.deepcopy(options)
    prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs=options)
    function = model.model.layers[0]._gradient_checkpointing_func
    assert function.keywords == (options or {"use_reentrant": True})
    get_peft_model(model, LoraConfig(**LORA))
    assert len(model.get_input_embeddings()._forward_hooks) == 1
    assert options == given


def test_gradient_checkpointing_can_be_left_out():
    model = prepare_model_for_kbit_training(quantised(), use_gradient_checkpointing=False)
    assert not model.is_activation_checkpointing


def test_a_model_that_cannot_checkpoint_says_so_and_is_prepared():
    net = nn.Sequential(CASES["bnb-nf4"].make(64, 64))
    with pytest.warns(MultigraftWarning, match=r"no gradient_checkpointing_enable\(\)"):
        prepare_model_for_kbit_training(net)
    assert not any(p.requires_grad for p in net.parameters())


def test_models_under_the_former_names_of_transformers_are_served():
    class Former(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(4, 64)
            self.layer = CASES["bnb-nf4"].make(64, 64)
            self.enabled: list[Any] = []

        def get_input_embeddings(self) -> nn.Module:
            return self.embed

        def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: Any) -> None:
            self.enabled.append(gradient_checkpointing_kwargs)

    model = prepare_model_for_kbit_training(Former())
    assert model.enabled == [{"use_reentrant": True}]
    assert model.embed(torch.tensor([1])).requires_grad


def test_a_model_with_adapters_is_refused_and_left_as_it_is():
    model = get_peft_model(quantised(), LoraConfig(**LORA))
    before = fingerprint(model)
    with pytest.raises(StateError, match="Prepare the base model first"):
        prepare_model_for_kbit_training(model)
    assert fingerprint(model) == before


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_gradients_are_those_without_checkpointing(reentrant):
    plain = get_peft_model(quantised(), LoraConfig(**LORA, init_lora_weights=False)).train()
    base = prepare_model_for_kbit_training(
        quantised(), gradient_checkpointing_kwargs={"use_reentrant": reentrant}
    )
    saving = get_peft_model(base, LoraConfig(**LORA, init_lora_weights=False)).train()
    saving.load_state_dict(plain.state_dict(), strict=False)
    for model in (plain, saving):
        model(input_ids=ids(), labels=ids()).loss.backward()
    wanted = {n: p.grad for n, p in plain.named_parameters() if p.requires_grad}
    assert len(wanted) == 28
    for name, parameter in saving.named_parameters():
        if name in wanted:
            torch.testing.assert_close(parameter.grad, wanted[name])


# -- QLoRA ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bnb-nf4", "bnb-nf4-double", "bnb-int8", "torchao-int8"])
def test_an_adapter_trained_on_a_quantised_base_gives_equal_outputs_on_a_fresh_one(kind, tmp_path):
    model = get_peft_model(
        prepare_model_for_kbit_training(quantised(kind)), LoraConfig(**LORA), adapter_name="first"
    )
    losses = train(model)
    assert losses[-1] < 0.85 * losses[0]
    model.eval().save_pretrained(tmp_path)
    fresh = PeftModel.from_pretrained(quantised(kind), tmp_path / "first", adapter_name="first")
    fresh.eval()
    with torch.no_grad():
        wanted = model(input_ids=ids(2)).logits
        assert torch.equal(fresh(input_ids=ids(2)).logits, wanted)


def test_the_files_are_read_by_peft(tmp_path: Path):
    model = get_peft_model(prepare_model_for_kbit_training(quantised()), LoraConfig(**LORA))
    train(model, steps=3)
    model.save_pretrained(tmp_path)
    base = quantised()
    base.is_loaded_in_4bit = True
    theirs = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    with torch.no_grad():
        wanted = model.eval()(input_ids=ids(2)).logits
        torch.testing.assert_close(theirs(input_ids=ids(2)).logits, wanted, rtol=1e-4, atol=1e-4)


def test_training_goes_on_after_an_evaluation():
    """On CPUs with AVX512-BF16 an evaluation packs 4-bit weights in a way without a backward."""
    model = get_peft_model(prepare_model_for_kbit_training(quantised()), LoraConfig(**LORA))
    straight = copy.deepcopy(model)
    wanted = train(straight, steps=6)
    found = train(model, steps=3)
    with torch.no_grad():
        model.eval()(input_ids=ids(2))
    optimised = train(model, steps=3)
    assert found == wanted[:3]
    assert optimised[-1] < found[-1]
    model.train().zero_grad()
    model(input_ids=ids(), labels=ids()).loss.backward()
    assert all(bool(p.grad.abs().sum() > 0) for p in model.parameters() if p.requires_grad)


def test_two_adapters_on_one_quantised_base_are_independent():
    model = get_peft_model(
        prepare_model_for_kbit_training(quantised()), LoraConfig(**LORA), adapter_name="a"
    )
    train(model)
    with torch.no_grad():
        before = model.eval()(input_ids=ids(2)).logits
    model.add_adapter("b", LoraConfig(**LORA))
    model.set_adapter("b")
    train(model)
    model.set_adapter("a")
    with torch.no_grad():
        assert torch.equal(model.eval()(input_ids=ids(2)).logits, before)


def test_unload_after_training_gives_the_bases_own_layers_and_outputs():
    base = prepare_model_for_kbit_training(quantised())
    layers = [m for m in base.modules() if isinstance(m, Linear4bit)]
    before = fingerprint(base.train())
    model = get_peft_model(base, LoraConfig(**LORA))
    train(model)
    assert model.unload() is base
    assert [m for m in base.modules() if isinstance(m, Linear4bit)] == layers
    assert fingerprint(base.train()) == before


def test_merge_and_unload_leaves_quantised_layers_that_act_like_the_adapter():
    model = get_peft_model(
        prepare_model_for_kbit_training(quantised("bnb-int8")), LoraConfig(**LORA)
    )
    train(model)
    with torch.no_grad():
        apart = model.eval()(input_ids=ids()).logits
        merged = model.merge_and_unload()
        assert any(isinstance(m, Linear8bitLt) for m in merged.modules())
        assert float((merged(input_ids=ids()).logits - apart).norm() / apart.norm()) < 0.1
    assert len(model.merge_report) == 14


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_casting_for_mixed_precision_halves_what_is_frozen_as_pefts_does(dtype: Any) -> None:
    dtypes = []
    for library in (multigraft, peft):
        base = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)).to(dtype)
        base[1].float()
        config = library.LoraConfig(target_modules=["0"], r=2)
        model = library.get_peft_model(base, config, autocast_adapter_dtype=False)
        library.cast_mixed_precision_params(model, dtype)
        dtypes.append({(p.dtype, p.requires_grad) for p in model.parameters()})
        assert model.get_base_model()[1].weight.dtype == dtype
    assert dtypes[0] == dtypes[1] == {(dtype, False), (torch.float32, True)}


def test_casting_for_mixed_precision_leaves_packed_weights() -> None:
    layer = Linear4bit(64, 64, quant_storage=torch.bfloat16).to("cpu").requires_grad_(False)
    before = layer.weight.clone()
    assert before.dtype == torch.bfloat16
    multigraft.cast_mixed_precision_params(nn.Sequential(layer), torch.float16)
    assert (layer.weight.dtype, layer.bias.dtype) == (torch.bfloat16, torch.float16)
    assert torch.equal(layer.weight.view(torch.uint8), before.view(torch.uint8))
