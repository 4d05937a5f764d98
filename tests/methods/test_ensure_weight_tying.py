"""`ensure_weight_tying`: modules that share an embedding's weight share what an adapter does to it.

Where PEFT 0.21.2 differs: the head's factors are parameters of their own over the embedding's
memory, each with a part of the gradient, and merging adds the update to the one weight twice.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import multigraft
from multigraft import LoraConfig, MultigraftWarning, PeftModel, TargetError, get_peft_model
from tests import oracle
from tests.laws import fingerprint
from tests.oracle import (
    Pair,
    bert_classifier,
    build,
    graft_pair,
    inputs,
    output,
    peft_state,
    quiet,
    random_state,
    train_step,
)

EMBEDDING, HEAD = "base_model.model.model.embed_tokens.", "base_model.model.lm_head."
TIES = {
    "embedding": {"target_modules": ["embed_tokens"]},
    "head": {"target_modules": ["lm_head"]},
    "both": {"target_modules": ["embed_tokens", "lm_head", "q_proj"]},
    "saved embedding": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "saved head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
}


def llama() -> nn.Module:
    return oracle.llama(tie_word_embeddings=True)


def tied(**options: Any) -> Pair:
    """Both libraries' models with the same values, which are tied."""
    options = {"r": 2, "ensure_weight_tying": True, "task_type": "CAUSAL_LM", **options}
    pair = graft_pair(llama, options, fill=False)
    state = random_state(peft_state(pair.theirs))
    if f"{HEAD}lora_A.weight" in state:
        state[f"{HEAD}lora_A.weight"] = state[f"{EMBEDDING}lora_embedding_B"].T.contiguous()
        state[f"{HEAD}lora_B.weight"] = state[f"{EMBEDDING}lora_embedding_A"].T.contiguous()
    elif f"{HEAD}weight" in state:
        state[f"{HEAD}weight"] = state[f"{EMBEDDING}weight"]
    with quiet():
        peft.set_peft_model_state_dict(pair.theirs, state)
    multigraft.set_peft_model_state_dict(pair.ours, state)
    return pair


def ours(**options: Any) -> PeftModel:
    options = {"r": 2, "ensure_weight_tying": True, **options}
    model = get_peft_model(build(llama), LoraConfig(init_lora_weights=False, **options))
    return model.eval()


@pytest.mark.parametrize("options", TIES.values(), ids=TIES)
def test_outputs_and_files_are_pefts(options: dict[str, Any], tmp_path: Path):
    pair = tied(**options)
    expected = pair.assert_equal()
    pair.ours.save_pretrained(tmp_path / "ours")
    with quiet():
        pair.theirs.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
        theirs = peft.PeftModel.from_pretrained(build(llama), tmp_path / "ours").eval()
    loaded = PeftModel.from_pretrained(build(llama), tmp_path / "theirs").eval()
    torch.testing.assert_close(output(theirs, pair.batch), expected)
    torch.testing.assert_close(output(loaded, pair.batch), expected)


@pytest.mark.parametrize("options", TIES.values(), ids=TIES)
def test_merging_computes_what_the_adapter_computes_and_keeps_the_tie(options: dict[str, Any]):
    model = ours(**options)
    fill(model)
    before, graph = output(model, inputs(model)), fingerprint(model)
    model.merge_adapter()
    torch.testing.assert_close(output(model, inputs(model)), before, atol=1e-5, rtol=1e-5)
    model.unmerge_adapter()
    assert fingerprint(model) == graph
    base = model.merge_and_unload()
    torch.testing.assert_close(output(base, inputs(base)), before, atol=1e-5, rtol=1e-5)
    assert base.lm_head.weight is base.model.embed_tokens.weight


def test_peft_merges_the_update_twice():
    pair = tied(target_modules=["embed_tokens"])
    before = output(pair.theirs, pair.batch)
    with quiet():
        merged = pair.theirs.merge_and_unload()
    assert (output(merged, pair.batch) - before).abs().max() > 1


def test_the_embeddings_factors_get_the_gradient_of_both_uses():
    pair = tied(target_modules=["embed_tokens"])
    train_step(pair)
    mine, theirs = oracle.gradients(pair.ours), oracle.gradients(pair.theirs)
    for own, other in (("A", "B"), ("B", "A")):
        name = f"{EMBEDDING}lora_embedding_{own}.default"
        summed = theirs[name] + theirs[f"{HEAD}lora_{other}.default.weight"].T
        torch.testing.assert_close(mine[name], summed, atol=1e-4, rtol=1e-4)
    assert len(mine) == 2


def test_a_pair_of_its_own_scale_counts_the_same_at_the_head():
    options = {"rank_pattern": {"embed_tokens": 3}, "alpha_pattern": {"embed_tokens": 12}}
    model = ours(target_modules=["embed_tokens"], **options)
    head = model.get_base_model().lm_head
    assert (head.r, head.scaling["default"]) == ({"default": 3}, 4.0)


def test_a_trained_copy_trains_one_weight_and_the_heads_own_bias():
    def reader() -> nn.Module:
        return oracle.transformers.BertForMaskedLM(oracle.bert_config())

    base = build(reader)
    config = {"target_modules": ["query"], "modules_to_save": ["word_embeddings"]}
    model = get_peft_model(base, LoraConfig(ensure_weight_tying=True, **config)).eval()
    fill(model)
    copies = {n: p for n, p in model.named_parameters() if "modules_to_save" in n}
    assert sorted(n.rpartition(".")[2] for n in copies) == ["bias", "weight"]
    before = output(model, inputs(base))
    merged = model.merge_and_unload()
    torch.testing.assert_close(output(merged, inputs(base)), before, atol=1e-5, rtol=1e-5)


def test_values_are_written_into_both_uses_even_when_they_are_taken_over():
    model = ours(target_modules=["q_proj"], modules_to_save=["embed_tokens"])
    state = multigraft.get_peft_model_state_dict(model)
    fresh = random_state(state)
    fresh[f"{HEAD}weight"] = fresh[f"{EMBEDDING}weight"]
    multigraft.set_peft_model_state_dict(model, fresh, low_cpu_mem_usage=True)
    copies = [p for n, p in model.named_parameters(remove_duplicate=False) if "to_save" in n]
    assert copies[0] is copies[1] and torch.equal(copies[0], fresh[f"{HEAD}weight"])


def test_a_gathered_state_dict_gives_both_uses():
    model = ours(target_modules=["embed_tokens"])
    gathered = {key: torch.full_like(t, 2.0) for key, t in model.state_dict().items()}
    state = multigraft.get_peft_model_state_dict(model, state_dict=gathered)
    assert len(state) == 4 and all(bool((t == 2.0).all()) for t in state.values())


def test_rows_of_a_batch_have_tied_adapters_of_their_own():
    model = ours(target_modules=["embed_tokens"])
    fill(model)
    batch = inputs(model)
    with model.disable_adapter():
        base = output(model, batch)
    own = output(model, batch)
    mixed = output(model, batch, adapter_names=["default", "__base__", "default"])
    torch.testing.assert_close(mixed, torch.stack([own[0], base[1], own[2]]))


@pytest.mark.parametrize("rule", ["cat", "svd"])
def test_tied_pairs_combine_and_stay_tied(rule: str):
    model = ours(target_modules=["embed_tokens", "q_proj"])
    second = LoraConfig(target_modules=["embed_tokens", "q_proj"], r=3, ensure_weight_tying=True)
    model.add_adapter("b", second)
    model.base_model.set_adapter(["default", "b"])
    fill(model)
    both = output(model.eval(), inputs(model))
    model.add_weighted_adapter(["default", "b"], [1.0, 1.0], "sum", rule, svd_rank=5)
    model.set_adapter("sum")
    torch.testing.assert_close(output(model, inputs(model)), both, atol=1e-4, rtol=1e-4)
    assert {f"{HEAD}lora_A.weight", f"{EMBEDDING}lora_embedding_B"} < {
        *multigraft.get_peft_model_state_dict(model, adapter_name="sum")
    }


@pytest.mark.parametrize("maker", [llama, bert_classifier])
def test_nothing_to_tie_is_said(maker):
    with pytest.warns(MultigraftWarning, match="nothing to tie"):
        get_peft_model(
            build(maker), LoraConfig(target_modules="all-linear", ensure_weight_tying=True)
        )


@pytest.mark.parametrize("option", [{"use_dora": True}, {"lora_bias": True}])
def test_more_than_a_plain_pair_is_refused(option: dict[str, bool]):
    base = build(llama)
    before = fingerprint(base)
    with pytest.raises(TargetError, match=r"leave one out|cannot be had on an embedding"):
        get_peft_model(
            base, LoraConfig(target_modules=["embed_tokens"], ensure_weight_tying=True, **option)
        )
    assert fingerprint(base) == before


def fill(model: PeftModel) -> Tensor:
    """Random values, small enough to be merged in float32 without loss."""
    source = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=source) * 0.1)
    return output(model, inputs(model))
