"""Prefixes that begin as what a model kept of tokens, beside PEFT."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

import multigraft
from multigraft import ConfigError, UnsupportedError

BOTH = pytest.mark.parametrize("package", [peft, multigraft], ids=["peft", "multigraft"])
IDS = torch.tensor([[3, 4, 5, 6]])
SYSTEM = "{% for m in messages %}w1 {{ m['content'] }}{% endfor %}"


def base() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 4}
    config = transformers.LlamaConfig(
        vocab_size=9, num_hidden_layers=2, num_key_value_heads=2, **sizes
    )
    return transformers.LlamaForCausalLM(config).eval()


def prefixed(package: Any, **options: Any) -> Any:
    config = package.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, **options)
    return package.get_peft_model(base(), config).eval()


def tokenizer(template: str | None = None) -> Any:
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(9)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    found = transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0")
    found.chat_template = template
    return found


def test_a_cache_is_a_table_as_in_peft() -> None:
    cache = base()(IDS, use_cache=True).past_key_values
    pairs = [(layer.keys, layer.values) for layer in cache.layers]
    theirs = peft.prompt_embeddings_from_past_key_values(pairs, num_virtual_tokens=3)
    for given in (cache, pairs, tuple(pairs)):
        ours = multigraft.prompt_embeddings_from_past_key_values(given, num_virtual_tokens=3)
        assert torch.equal(ours, theirs)


@BOTH
def test_a_prefix_from_a_cache_is_as_if_its_tokens_stood_before(package: Any) -> None:
    model = prefixed(package)
    cache = base()(IDS, use_cache=True).past_key_values
    table = package.initialize_kv_prefix_from_past_key_values(model, past_key_values=cache)
    assert torch.equal(model.get_prompt_embedding_to_save("default"), table)
    expected = base()(torch.cat([IDS[:, :3], IDS[:, :2]], dim=1)).logits[:, 3:]
    found = model(input_ids=IDS[:, :2]).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@BOTH
@pytest.mark.parametrize("template", [None, SYSTEM])
@pytest.mark.parametrize("limit", [None, 3])
def test_a_prefix_from_a_text_is_what_the_base_keeps_of_it(
    package: Any, template: str | None, limit: int | None
) -> None:
    model = prefixed(package)
    words = tokenizer(template)
    table = package.initialize_kv_prefix_from_text(
        model, words, text="w3 w4 w5 w6", max_length=limit
    )
    ids = torch.tensor([[1, 3, 4]]) if template else IDS[:, :3]
    cache = base()(ids, use_cache=True).past_key_values
    expected = multigraft.prompt_embeddings_from_past_key_values(cache, num_virtual_tokens=3)
    torch.testing.assert_close(table, expected)


@BOTH
def test_what_cannot_begin_so_is_refused(package: Any) -> None:
    cache = base()(IDS, use_cache=True).past_key_values
    begin = package.initialize_kv_prefix_from_past_key_values
    with pytest.raises(ValueError, match="prefix_projection"):
        begin(prefixed(package, prefix_projection=True), past_key_values=cache)
    lora = package.LoraConfig(r=2, target_modules=["q_proj"])
    with pytest.raises(ValueError, match="PREFIX_TUNING"):
        begin(package.get_peft_model(base(), lora), past_key_values=cache)
    table = package.prompt_embeddings_from_past_key_values
    pairs = [(layer.keys, layer.values) for layer in cache.layers]
    for wrong in (
        [],
        [(k.repeat(2, 1, 1, 1), v) for k, v in pairs],
        [(k[0], v[0]) for k, v in pairs],
    ):
        with pytest.raises(ValueError):
            table(wrong, num_virtual_tokens=2)
    with pytest.raises(ValueError, match="5"):
        table(pairs, num_virtual_tokens=5)


def test_refusals_name_what_was_given() -> None:
    model = prefixed(multigraft)
    with pytest.raises(ConfigError, match=r"`num_virtual_tokens` \(=9\) are more than the 4"):
        multigraft.initialize_kv_prefix_from_past_key_values(
            model,
            past_key_values=base()(IDS, use_cache=True).past_key_values,
            num_virtual_tokens=9,
        )
    with pytest.raises(ConfigError, match=r"`past_key_values` \(=int\)"):
        multigraft.prompt_embeddings_from_past_key_values(3, num_virtual_tokens=1)
    model.add_adapter("lora", multigraft.LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(UnsupportedError, match="`lora`"):
        multigraft.initialize_kv_prefix_from_text(
            model, tokenizer(), text="w1", adapter_name="lora"
        )
