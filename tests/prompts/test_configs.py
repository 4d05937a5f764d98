"""Options of context adapters: what is refused, what is filled, how prompts begin."""

from __future__ import annotations

import dataclasses

import peft
import pytest
import tokenizers
import torch
import transformers

import multigraft
from multigraft import (
    AdaptionPromptConfig,
    ConfigError,
    MultigraftWarning,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    StateError,
    TargetError,
    UnsupportedError,
)
from tests import oracle
from tests.laws import fingerprint
from tests.prompts import pairs

KINDS = [PromptTuningConfig, PromptEncoderConfig, PrefixTuningConfig, AdaptionPromptConfig]


@pytest.mark.parametrize("kind", KINDS)
def test_the_fields_are_pefts(kind):
    own, theirs = (
        {
            f.name: getattr(f, "default", None)
            for f in dataclasses.fields(c)
            if f.name != "peft_type"
        }
        for c in (kind, getattr(peft, kind.__name__))
    )
    assert own == theirs


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (PromptTuningConfig, {}, r"`num_virtual_tokens` \(=None\) must be an integer of at least"),
        (PromptTuningConfig, {"num_virtual_tokens": 0}, r"`num_virtual_tokens` \(=0\)"),
        (PromptTuningConfig, {"num_virtual_tokens": True}, r"`num_virtual_tokens` \(=True\)"),
        (PrefixTuningConfig, {"num_virtual_tokens": 2, "token_dim": -1}, r"`token_dim` \(=-1\)"),
        (
            PromptTuningConfig,
            {"num_virtual_tokens": 2, "prompt_tuning_init": "TXT"},
            "must be one of 'TEXT', 'SAMPLE_VOCAB', 'RANDOM'. Nearest: `TEXT`",
        ),
        (
            PromptTuningConfig,
            {"num_virtual_tokens": 2, "prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "a"},
            r"needs `tokenizer_name_or_path` \(=None\)",
        ),
        (
            PromptTuningConfig,
            {"num_virtual_tokens": 2, "prompt_tuning_init": "TEXT", "tokenizer_name_or_path": "t"},
            r"needs `prompt_tuning_init_text` \(=None\)",
        ),
        (
            PromptTuningConfig,
            {"num_virtual_tokens": 2, "tokenizer_kwargs": {"use_fast": True}},
            '`tokenizer_kwargs` .* goes with prompt_tuning_init="TEXT" alone',
        ),
        (
            PromptEncoderConfig,
            {"num_virtual_tokens": 2, "encoder_reparameterization_type": "GRU"},
            "`encoder_reparameterization_type`",
        ),
        (PromptEncoderConfig, {"num_virtual_tokens": 2, "encoder_dropout": 1.0}, "encoder_dropout"),
        (PromptEncoderConfig, {"num_virtual_tokens": 2, "encoder_hidden_size": 0}, "hidden_size"),
        (PromptEncoderConfig, {"num_virtual_tokens": 2, "encoder_num_layers": 0}, "num_layers"),
        (PrefixTuningConfig, {"num_virtual_tokens": 2, "init_weights": "one"}, "`init_weights`"),
        (PrefixTuningConfig, {"num_virtual_tokens": 2, "encoder_hidden_size": 1.5}, "hidden_size"),
        (AdaptionPromptConfig, {"adapter_layers": 1}, r"`adapter_len` \(=None\)"),
        (AdaptionPromptConfig, {"adapter_len": 1}, r"`adapter_layers` \(=None\)"),
    ],
)
def test_options_that_mean_nothing_are_refused(kind, options, message):
    with pytest.raises(ConfigError, match=message):
        kind(**options)


def test_layers_of_an_mlp_are_not_counted():
    with pytest.warns(MultigraftWarning, match="no effect with the MLP"):
        PromptEncoderConfig(num_virtual_tokens=2, encoder_num_layers=3)


def test_a_prompt_of_another_width_is_refused():
    config = PromptTuningConfig(num_virtual_tokens=2, token_dim=8)
    with pytest.raises(ConfigError, match=r"`token_dim` \(=8\) must be 16"):
        multigraft.get_peft_model(oracle.build(oracle.llama), config)


def test_a_prompt_is_as_wide_as_the_embedding_even_where_the_layers_are_wider():
    config = transformers.OPTConfig(
        vocab_size=40, hidden_size=16, word_embed_proj_dim=8, num_hidden_layers=1,
        num_attention_heads=2, ffn_dim=32, max_position_embeddings=32,
    )  # fmt: skip
    base = oracle.build(lambda: transformers.OPTForCausalLM(config))
    adapted = multigraft.get_peft_model(base, oracle.our_config(pairs.METHODS["prompt"])).eval()
    assert adapted.active_peft_config.token_dim == 8
    assert oracle.output(adapted, oracle.inputs(adapted)).shape == (3, oracle.TOKENS + 3, 40)


@pytest.mark.parametrize("queries", [2, 4])
def test_a_prefix_takes_the_shape_of_the_models_keys(queries):
    # t5's keys are wider or narrower than its layers; PEFT takes the layers' width.
    config = transformers.T5Config(
        vocab_size=40, d_model=16, d_kv=6, d_ff=32, num_layers=1, num_decoder_layers=2,
        num_heads=queries, decoder_start_token_id=0,
    )  # fmt: skip
    base = oracle.build(lambda: transformers.T5ForConditionalGeneration(config))
    options = pairs.options("prefix", "t5")
    adapted = multigraft.get_peft_model(base, oracle.our_config(options)).eval()
    own = adapted.active_peft_config
    assert (own.num_layers, own.num_attention_heads, own.token_dim) == (2, queries, 6 * queries)
    assert oracle.output(adapted, oracle.inputs(adapted)).isfinite().all()


def test_zero_keys_and_values_stay_zero_through_the_network():
    for method in ("prefix", "projected_prefix"):
        adapted = pairs.ours(method, "llama", init_weights="zero")
        other = pairs.theirs(method, "llama", init_weights="zero")
        table = multigraft.get_peft_model_state_dict(adapted)["prompt_embeddings"]
        assert not table.any()
        batch = oracle.inputs(adapted)
        torch.testing.assert_close(oracle.output(adapted, batch), oracle.output(other, batch))


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_prefix_and_gradient_checkpointing_are_refused(when):
    base = oracle.build(oracle.llama)
    config = oracle.our_config(pairs.options("prefix", "llama"))
    if when == "before":
        base.gradient_checkpointing_enable()
        before = fingerprint(base)
        with pytest.raises(StateError, match="does not work with gradient checkpointing"):
            multigraft.get_peft_model(base, config)
        assert fingerprint(base) == before
        return
    adapted = multigraft.get_peft_model(base, config)
    base.gradient_checkpointing_enable()
    batch = oracle.inputs(adapted)
    with pytest.raises(StateError, match="the prefix would get none"):
        adapted.train()(**batch)
    assert adapted.eval()(**batch).logits.isfinite().all()


def test_virtual_tokens_learn_under_gradient_checkpointing():
    gradients = []
    for checkpoints in (False, True):
        adapted = pairs.ours("prompt", "llama").train()
        if checkpoints:
            adapted.get_base_model().gradient_checkpointing_enable()
        batch = oracle.inputs(adapted)
        adapted(**batch, labels=batch["input_ids"]).loss.backward()
        gradients.append(adapted.prompt_encoder["default"].embedding.weight.grad)
    torch.testing.assert_close(*gradients)


def test_a_model_without_a_cache_takes_no_prefix():
    base = oracle.build(oracle.distilbert_classifier)
    config = oracle.our_config({**pairs.METHODS["prefix"], "task_type": "SEQ_CLS"})
    before = fingerprint(base)
    with pytest.raises(
        UnsupportedError, match=r"takes `past_key_values`, and DistilBertModel does"
    ):
        multigraft.get_peft_model(base, config)
    assert fingerprint(base) == before


@pytest.mark.parametrize(
    ("maker", "options", "error", "message"),
    [
        (oracle.llama, {"adapter_layers": 3}, TargetError, "has 2 modules called `self_attn`"),
        (oracle.llama, {"target_modules": "attn"}, TargetError, "has 0 modules called `attn`"),
        (oracle.llama, {"target_modules": "mlp"}, TargetError, r"\(LlamaMLP\): it knows Llama"),
        (oracle.t5, {}, UnsupportedError, r"`model_type` \(='t5'\); known are gpt2, llama"),
    ],
)
def test_attention_that_takes_no_adaption_prompt_is_refused(maker, options, error, message):
    base = oracle.build(maker)
    before = fingerprint(base)
    config = AdaptionPromptConfig(**{"adapter_len": 2, "adapter_layers": 1, **options})
    with pytest.raises(error, match=message):
        multigraft.get_peft_model(base, config)
    assert fingerprint(base) == before


def test_an_adaption_prompt_begins_as_nothing():
    base = oracle.build(oracle.llama)
    batch = oracle.inputs(base)
    before = oracle.output(base, batch)
    config = AdaptionPromptConfig(adapter_len=2, adapter_layers=2)
    adapted = multigraft.get_peft_model(base, config).eval()
    assert torch.equal(oracle.output(adapted, batch), before)


def test_tokens_of_the_vocabulary_begin_a_prompt():
    adapted = pairs.ours("prompt", "llama", prompt_tuning_init="SAMPLE_VOCAB")
    other = pairs.theirs("prompt", "llama", prompt_tuning_init="SAMPLE_VOCAB")
    own = adapted.prompt_encoder["default"].embedding.weight
    assert torch.equal(own, other.prompt_encoder["default"].embedding.weight)
    words = adapted.word_embeddings.weight
    assert all((words == row).all(1).any() for row in own)


@pytest.mark.parametrize("tokens", [2, 7])
def test_a_text_begins_a_prompt_cut_or_repeated(tokens, tmp_path):
    words = {"<unk>": 0, "be": 5, "kind": 6, "now": 7}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=model).save_pretrained(tmp_path)
    options = {
        "num_virtual_tokens": tokens,
        "prompt_tuning_init": "TEXT",
        "prompt_tuning_init_text": "be kind now",
        "tokenizer_name_or_path": str(tmp_path),
        "tokenizer_kwargs": {"trust_remote_code": True},  # which is not handed on
    }
    adapted = pairs.ours("prompt", "llama", **options)
    ids = torch.tensor([5, 6, 7, 5, 6, 7, 5][:tokens])
    own = adapted.prompt_encoder["default"].embedding.weight
    assert torch.equal(own, adapted.word_embeddings(ids))
    assert adapted.active_peft_config.tokenizer_kwargs == {"trust_remote_code": True}


def test_the_base_begins_a_prompt_whoever_adapts_its_embedding():
    base = oracle.build(oracle.llama)
    words = base.get_input_embeddings().weight.detach().clone()
    lora = multigraft.LoraConfig(target_modules=["embed_tokens"], init_lora_weights=False)
    adapted = multigraft.get_peft_model(base, lora, "l")
    options = pairs.options("prompt", "llama", prompt_tuning_init="SAMPLE_VOCAB")
    adapted.add_adapter("c", oracle.our_config(options))
    own = adapted.prompt_encoder["c"].embedding.weight
    assert all((words == row).all(1).any() for row in own)


def test_compressed_keys_take_no_prefix():
    config = transformers.DeepseekV3Config(
        vocab_size=40, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, kv_lora_rank=4, q_lora_rank=4,
        qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=4, first_k_dense_replace=1,
    )  # fmt: skip
    base = oracle.build(lambda: transformers.DeepseekV3ForCausalLM(config))
    with pytest.raises(UnsupportedError, match="compressed form"):
        multigraft.get_peft_model(base, oracle.our_config(pairs.METHODS["prefix"]))
    adapted = multigraft.get_peft_model(base, oracle.our_config(pairs.METHODS["prompt"]))
    assert oracle.output(adapted, oracle.inputs(adapted)).shape[1] == oracle.TOKENS + 3


@pytest.mark.parametrize("is_new", [True, False])
def test_a_prefix_has_as_many_heads_as_the_cache(is_new):
    config = transformers.FalconConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, num_kv_heads=2,
        multi_query=True, new_decoder_architecture=is_new,
    )  # fmt: skip
    base = oracle.build(lambda: transformers.FalconForCausalLM(config))
    adapted = multigraft.get_peft_model(base, oracle.our_config(pairs.METHODS["prefix"]))
    assert oracle.output(adapted.eval(), oracle.inputs(adapted)).isfinite().all()


def gemma(kind: str, **more):
    config = getattr(transformers, f"{kind}TextConfig")(
        vocab_size=40, vocab_size_per_layer_input=40, hidden_size=16, intermediate_size=16,
        hidden_size_per_layer_input=4, num_hidden_layers=4, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, sliding_window=4, num_kv_shared_layers=2,
        layer_types=["full_attention", "sliding_attention"] * 2, **more,
    )  # fmt: skip
    return oracle.build(lambda: getattr(transformers, f"{kind}ForCausalLM")(config))


@pytest.mark.parametrize(
    ("kind", "more", "layers"),
    [
        ("Gemma3n", {"laurel_rank": 4, "activation_sparsity_pattern": [0.0] * 4}, {0: 8, 1: 8}),
        ("Gemma4", {}, {0: 512, 1: 8}),
    ],
)
def test_layers_of_several_shapes_take_what_fits(kind, more, layers):
    outputs = []
    for library in (multigraft, peft):
        base = gemma(kind, **more)
        torch.manual_seed(5)
        config = library.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
        with oracle.quiet():
            adapted = library.get_peft_model(base, config).eval()
            outputs.append(oracle.output(adapted, oracle.inputs(adapted)))
        if library is multigraft:
            taken = adapted.prompt_encoder["default"].layers
            assert {index: size for index, (_, size) in taken.items()} == layers
    torch.testing.assert_close(*outputs)


def test_layers_that_keep_no_keys_take_no_prefix():
    config = transformers.Qwen3NextConfig(
        vocab_size=40, hidden_size=16, intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8, num_experts=2,
        num_experts_per_tok=1, moe_intermediate_size=8, shared_expert_intermediate_size=8,
        layer_types=["linear_attention", "full_attention"],
    )  # fmt: skip
    base = oracle.build(lambda: transformers.Qwen3NextForCausalLM(config))
    with pytest.raises(UnsupportedError, match=r"keep something else \(linear_attention\)"):
        multigraft.get_peft_model(base, oracle.our_config(pairs.METHODS["prefix"]))
