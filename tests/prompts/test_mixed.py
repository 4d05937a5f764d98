"""Context adapters and weight adapters on one model, in every combination."""

from __future__ import annotations

import peft
import pytest
import torch
import transformers

import multigraft
from multigraft import LoraConfig, RoutingError, StateError, UnsupportedError
from tests import oracle
from tests.laws import fingerprint
from tests.prompts import pairs

ALL = ["prompt", "p_tuning", "prefix", "adaption"]


def mixed(method: str, model: str = "llama"):
    """A model with a context adapter "c" and a LoRA "l", and a batch."""
    base = oracle.build(pairs.MODELS[model][0])
    torch.manual_seed(5)
    config = oracle.our_config(pairs.options(method, model))
    adapted = multigraft.get_peft_model(base, config, "c")
    task = pairs.MODELS[model][1]
    adapted.add_adapter("l", LoraConfig(task_type=task, init_lora_weights=False))
    return pairs.opened(adapted.eval()), oracle.inputs(adapted)


def with_active(adapted, names, batch):
    adapted.set_adapter(names)
    return oracle.output(adapted, batch)


@pytest.mark.parametrize("names", [["c", "l"], ["l", "c"]])
def test_virtual_tokens_go_through_the_adapted_weights(names):
    adapted, batch = mixed("prompt")
    both = with_active(adapted, names, batch)
    prompt = adapted.get_prompt(len(batch["input_ids"]))
    embedded = torch.cat((prompt, adapted.word_embeddings(batch["input_ids"])), dim=1)
    adapted.set_adapter("l")
    torch.testing.assert_close(both, adapted(inputs_embeds=embedded).logits)


def test_a_prefix_stands_before_the_adapted_keys():
    adapted, batch = mixed("prefix")
    both = with_active(adapted, ["c", "l"], batch)
    table = adapted.prompt_encoder["c"].embedding.weight.detach()
    parts = table.view(3, 4, 1, 8).permute(1, 2, 0, 3).unsqueeze(1).expand(4, 3, 1, 3, 8)
    cache = transformers.DynamicCache([(parts[0], parts[1]), (parts[2], parts[3])])
    adapted.set_adapter("l")
    by_hand = adapted(**batch, past_key_values=cache).logits
    torch.testing.assert_close(both, by_hand)


@pytest.mark.parametrize("method", ALL)
@pytest.mark.parametrize("model", ["llama", "gpt2"])
def test_either_alone_is_as_without_the_other(method, model):
    adapted, batch = mixed(method, model)
    both = with_active(adapted, ["c", "l"], batch)
    context, weights = (with_active(adapted, name, batch) for name in ("c", "l"))
    assert torch.equal(context, oracle.output(pairs.ours(method, model), batch))
    for alone in (context, weights):
        assert alone.shape != both.shape or not torch.allclose(alone, both, atol=1e-4)
    assert torch.equal(with_active(adapted, ["c", "l"], batch), both)
    with adapted.disable_adapter():
        base = oracle.output(adapted, batch)
    assert torch.equal(base, oracle.output(oracle.build(pairs.MODELS[model][0]), batch))


@pytest.mark.parametrize("method", ALL)
def test_only_active_adapters_are_trained(method):
    adapted, batch = mixed(method)
    owners = {"c": "prompt_encoder.c.", "l": ".l."}
    for names in (["c"], ["l"], ["c", "l"]):
        adapted.set_adapter(names)
        adapted(**batch, labels=batch["input_ids"]).loss.backward()
        for name, owner in owners.items():
            own = [p for n, p in adapted.named_parameters() if owner in n]
            assert own
            assert all((p.grad is not None) == (name in names) for p in own)
        adapted.zero_grad(set_to_none=True)
    frozen = [p for n, p in adapted.named_parameters() if not any(o in n for o in owners.values())]
    assert not any(p.requires_grad or p.grad is not None for p in frozen)


@pytest.mark.parametrize("method", ALL)
def test_deleting_one_leaves_the_other_as_it_was(method):
    for gone, stays in (("c", "l"), ("l", "c")):
        adapted, batch = mixed(method)
        expected = with_active(adapted, stays, batch)
        adapted.set_adapter(["c", "l"])
        adapted.delete_adapter(gone)
        assert adapted.active_adapters == [stays]
        assert torch.equal(oracle.output(adapted, batch), expected)
        assert hasattr(adapted, "prompt_encoder") == (stays == "c")


@pytest.mark.parametrize("method", ALL)
def test_both_are_saved_and_come_back(method, tmp_path):
    adapted, batch = mixed(method)
    both = with_active(adapted, ["c", "l"], batch)
    adapted.save_pretrained(tmp_path)
    base = oracle.build(oracle.llama)
    read = multigraft.PeftModel.from_pretrained(base, tmp_path / "c", "c")
    read.load_adapter(tmp_path / "l", "l")
    assert torch.equal(with_active(read.eval(), ["c", "l"], batch), both)
    for name in ("c", "l"):
        with oracle.quiet():
            other = peft.PeftModel.from_pretrained(oracle.build(oracle.llama), tmp_path / name)
        torch.testing.assert_close(
            oracle.output(other.eval(), batch), with_active(adapted, name, batch)
        )


@pytest.mark.parametrize("method", ["prompt", "prefix", "adaption"])
def test_both_generate_what_the_merged_model_generates(method):
    adapted, batch = mixed(method)
    adapted.set_adapter(["c", "l"])
    how = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    before = adapted.generate(**batch, **how)
    outputs = oracle.output(adapted, batch)
    adapted.merge_adapter(["l"])
    torch.testing.assert_close(oracle.output(adapted, batch), outputs, atol=1e-5, rtol=1e-4)
    assert torch.equal(adapted.generate(**batch, **how), before)
    adapted.unmerge_adapter()
    assert torch.equal(oracle.output(adapted, batch), outputs)


@pytest.mark.parametrize("method", ALL)
def test_merging_a_context_is_refused_with_a_reason(method):
    adapted, batch = mixed(method)
    outputs = with_active(adapted, ["c", "l"], batch)
    reason = r"adapter `c` is a .*: it changes what the model is given and no weight"
    for merge in (adapted.merge_adapter, adapted.merge_and_unload):
        with pytest.raises(UnsupportedError, match=reason):
            merge()
    assert torch.equal(oracle.output(adapted, batch), outputs)


@pytest.mark.parametrize("method", ALL)
def test_a_mixed_batch_refuses_a_context_and_serves_the_rest(method):
    adapted, batch = mixed(method)
    weights = with_active(adapted, "l", batch)
    adapted.set_adapter("c")
    context = oracle.output(adapted, batch)
    with pytest.raises(RoutingError, match=r"`c` is a .* context of a whole batch"):
        adapted(**batch, adapter_names=["c", "l", "__base__"])
    routed = oracle.output(adapted, batch, adapter_names=["__base__", "l", "l"])
    torch.testing.assert_close(routed[1:], weights[1:])
    base = oracle.output(oracle.build(oracle.llama), batch)
    torch.testing.assert_close(routed[0], base[0])
    assert torch.equal(oracle.output(adapted, batch), context)


@pytest.mark.parametrize(("one", "two"), [("prompt", "prefix"), ("prompt", "p_tuning")])
def test_two_prompts_cannot_be_active_at_once(one, two):
    adapted, batch = mixed(one)
    adapted.add_adapter("d", oracle.our_config(pairs.options(two, "llama")))
    context = with_active(adapted, "c", batch)
    with pytest.raises(StateError, match=r"`c` .* `d` .* only one can be active"):
        adapted.set_adapter(["c", "l", "d"])
    assert adapted.active_adapters == ["c"]
    assert torch.equal(oracle.output(adapted, batch), context)


def test_adaption_prompts_add_up_and_stand_beside_a_prompt():
    adapted, batch = mixed("adaption")
    config = {**pairs.options("adaption", "llama"), "adapter_layers": 1}
    adapted.add_adapter("d", oracle.our_config(config))
    pairs.opened(adapted)
    top = adapted.get_base_model().model.layers[-1].self_attn
    seen = []
    top.register_forward_hook(lambda module, args, result: seen.append(result[0]))
    for names in ("l", ["l", "d"]):
        with_active(adapted, names, batch)
    # Only the top layer differs, so both see the same input and the parts can be compared.
    part = seen[1] - seen[0]
    assert part.abs().max() > 1e-4
    adapted.add_adapter("p", oracle.our_config(pairs.options("prompt", "llama")))
    assert with_active(adapted, ["c", "d", "p", "l"], batch).shape[1] == oracle.TOKENS + 3


@pytest.mark.parametrize("method", ALL)
def test_unloading_gives_the_very_base_back(method):
    base = oracle.build(oracle.llama)
    before = fingerprint(base)
    adapted = multigraft.get_peft_model(
        base, oracle.our_config(pairs.options(method, "llama")), "c"
    )
    adapted.add_adapter("l", LoraConfig(task_type="CAUSAL_LM"))
    adapted.set_adapter(["c", "l"])
    adapted(**oracle.inputs(adapted))
    assert adapted.unload() is base
    base.eval()
    assert fingerprint(base) == before
    assert not hasattr(adapted, "prompt_encoder")


def test_task_heads_of_both_cannot_stand_in_at_once():
    adapted, batch = mixed("prompt", "llama_classifier")
    with pytest.raises(StateError, match="trained copy"):
        adapted.set_adapter(["c", "l"])
    for name in ("c", "l"):
        assert with_active(adapted, name, batch).shape == (3, 3)


def test_all_linear_finds_no_layer_of_a_prompts_network():
    config = LoraConfig(target_modules="all-linear", r=2)
    alone = multigraft.get_peft_model(oracle.build(oracle.llama), config, "l")
    beside = pairs.ours("p_tuning", "llama")
    beside.add_adapter("l", config)
    assert oracle.our_sites(beside, "l") == oracle.our_sites(alone, "l")
    assert not any("lora" in name for name, _ in beside.prompt_encoder.named_parameters())
