"""What a plan says is what a real step takes, for models of several families."""

from __future__ import annotations

import copy

import pytest
import torch

from multigraft import IA3Config, LoraConfig
from multigraft.planning import plan
from multigraft.planning.skeleton import loss
from multigraft.train import optimizer
from tests.planning import measured

transformers = pytest.importorskip("transformers")

SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 96}


def llama():
    config = transformers.LlamaConfig(**SIZES, intermediate_size=48, num_key_value_heads=2)
    return transformers.LlamaForCausalLM(config)


def gpt2():
    config = transformers.GPT2Config(
        n_embd=32, n_layer=3, n_head=4, vocab_size=96, bos_token_id=0, eos_token_id=0
    )
    return transformers.GPT2LMHeadModel(config)


def bert():
    config = transformers.BertConfig(**SIZES, intermediate_size=48)
    return transformers.BertForSequenceClassification(config)


def t5():
    config = transformers.T5Config(
        d_model=32, d_ff=48, num_layers=2, num_heads=4, d_kv=8, vocab_size=96
    )
    return transformers.T5ForConditionalGeneration(config)


def mixtral():
    config = transformers.MixtralConfig(
        **SIZES, intermediate_size=48, num_key_value_heads=2, num_local_experts=4
    )
    model = transformers.MixtralForCausalLM(config)
    model.set_experts_implementation("grouped_mm")
    return model


def gemma():
    config = transformers.Gemma3TextConfig(
        **SIZES, intermediate_size=48, num_key_value_heads=2, head_dim=8, sliding_window=8
    )
    return transformers.Gemma3ForCausalLM(config)


FAMILIES = (llama, gpt2, bert, t5, mixtral, gemma)
BLOCKS = transformers.modeling_layers.GradientCheckpointingLayer
ALL = {"default": LoraConfig(r=4, target_modules="all-linear")}


def a_step(base, adapters, rows, tokens, checkpointed):
    """A model of its own, its batch, and a function that makes a training step."""
    torch.manual_seed(0)
    model = measured.trainable(copy.deepcopy(base), adapters, checkpointed)
    batch = measured.batch_of(model, list(adapters), rows, tokens)
    trained = [p for p in model.parameters() if p.requires_grad]
    made = optimizer.make("adamw", trained, lr=1e-3, weight_decay=0.0, options={})

    def step():
        value = loss(model(**batch), batch)
        value.backward()
        del value
        made.step()
        made.zero_grad(set_to_none=True)

    return model, batch, step


@pytest.mark.parametrize("checkpointed", [False, True], ids=["all kept", "checkpointed"])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_kept_for_the_backward_pass_is_planned_to_the_byte(family, checkpointed):
    base = family()
    model, batch, _ = a_step(base, ALL, 3, 16, checkpointed)
    found = plan(
        base, ALL, batch_size=3, max_length=16, device="cpu", gradient_checkpointing=checkpointed
    )
    assert found.kept == measured.kept(model, batch, BLOCKS if checkpointed else None)


@pytest.mark.parametrize("rank", [1, 8])
@pytest.mark.parametrize(("rows", "tokens"), [(1, 8), (2, 24), (5, 7)])
@pytest.mark.parametrize("family", [llama, gpt2, bert])
def test_ranks_and_batches_of_any_size_are_planned_to_the_byte(family, rows, tokens, rank):
    base, adapters = family(), {"a": LoraConfig(r=rank, target_modules="all-linear")}
    model, batch, _ = a_step(base, adapters, rows, tokens, False)
    found = plan(base, adapters, batch_size=rows, max_length=tokens, device="cpu")
    assert found.kept == measured.kept(model, batch)


@pytest.mark.parametrize("checkpointed", [False, True], ids=["all kept", "checkpointed"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_planned_peak_is_what_the_allocator_measures(family, checkpointed):
    base = family()
    model, _, step = a_step(base, ALL, 4, 24, checkpointed)
    step()  # the optimiser's state is there from now on
    there = sum(p.nbytes for p in model.parameters()) + sum(b.nbytes for b in model.buffers())
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    found = plan(
        base, ALL, batch_size=4, max_length=24, device="cpu", gradient_checkpointing=checkpointed
    )
    real = there + 2 * trained + measured.peak(step)
    assert found.peak == pytest.approx(real, rel=0.03)


def test_adapters_that_share_a_forward_are_planned_together():
    base = llama()
    adapters = {
        "a": LoraConfig(r=2, target_modules="all-linear"),
        "b": LoraConfig(r=8, target_modules=["q_proj", "v_proj"]),
        "c": LoraConfig(r=3, target_modules=["down_proj"]),
    }
    model, batch, _ = a_step(base, adapters, 2, 16, False)
    found = plan(base, adapters, batch_size=2, max_length=16, device="cpu")
    of_rows = 64  # which row has which adapter lives as long, outside of the graph
    assert 0 <= found.kept - measured.kept(model, batch) <= of_rows
    assert found.trained == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_weights_adapters_and_the_optimisers_state_are_counted_by_the_byte():
    base = llama().to(torch.bfloat16)
    found = plan(base, ALL, batch_size=1, max_length=8, dtype="bfloat16")
    own = sum(p.nbytes for p in base.parameters())
    assert found.parameters == base.num_parameters()
    assert own <= found.parts["base weights"] < own + 1024  # and buffers, and the batch
    assert found.parts["adapters"] == 4 * found.trained  # float32 on a half-precision base
    assert found.parts["optimiser state"] == pytest.approx(8 * found.trained, rel=0.01)


def test_gradients_of_earlier_parts_of_a_step_stay():
    base = llama()
    once = plan(base, ALL, batch_size=2, max_length=16)
    parts = plan(base, ALL, batch_size=2, max_length=16, accumulate=2)
    assert once.parts["gradients"] == 0  # at the peak none is there yet
    assert parts.parts["gradients"] == 4 * parts.trained
    assert parts.kept == once.kept


def test_a_method_that_is_no_pair_is_planned_too():
    base, adapters = llama(), {"a": IA3Config(task_type="CAUSAL_LM")}
    model, batch, _ = a_step(base, adapters, 2, 16, False)
    found = plan(base, adapters, batch_size=2, max_length=16, device="cpu")
    assert found.kept == measured.kept(model, batch)


def test_the_model_that_is_planned_for_stays_as_it_is():
    base = llama()
    names, flags = list(base.state_dict()), [p.requires_grad for p in base.parameters()]
    plan(base, ALL, batch_size=1, max_length=8, quantize="nf4", gradient_checkpointing=True)
    assert list(base.state_dict()) == names
    assert [p.requires_grad for p in base.parameters()] == flags
    assert not any(p.is_meta for p in base.parameters())
    assert ALL["default"].target_modules == "all-linear"
