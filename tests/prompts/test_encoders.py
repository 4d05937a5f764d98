"""The modules that hold prompts, made by hand beside PEFT's; and what a decoder reads."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
import transformers
from torch import nn

import multigraft
from multigraft import ConfigError

SIZES = {"num_virtual_tokens": 3, "token_dim": 4, "num_transformer_submodules": 1}
LAYERS = {**SIZES, "num_layers": 2, "num_attention_heads": 2, "encoder_hidden_size": 5}
WORDS = nn.Embedding(7, 4)
CASES = {
    "prefix": ("PrefixEncoder", "PrefixTuningConfig", LAYERS),
    "zero prefix": ("PrefixEncoder", "PrefixTuningConfig", {**LAYERS, "init_weights": "zero"}),
    "projected": ("PrefixEncoder", "PrefixTuningConfig", {**LAYERS, "prefix_projection": True}),
    "projected, zero": (
        "PrefixEncoder",
        "PrefixTuningConfig",
        {**LAYERS, "prefix_projection": True, "init_weights": "zero"},
    ),
    "mlp": ("PromptEncoder", "PromptEncoderConfig", {**SIZES, "encoder_hidden_size": 5}),
    "lstm": (
        "PromptEncoder",
        "PromptEncoderConfig",
        {**SIZES, "encoder_hidden_size": 5, "encoder_reparameterization_type": "LSTM"},
    ),
    "random": ("PromptEmbedding", "PromptTuningConfig", SIZES),
    "sampled": (
        "PromptEmbedding",
        "PromptTuningConfig",
        {**SIZES, "prompt_tuning_init": "SAMPLE_VOCAB"},
    ),
}


def made(package: Any, case: str) -> Any:
    name, config, options = CASES[case]
    torch.manual_seed(0)
    words = (WORDS,) if name == "PromptEmbedding" else ()
    return getattr(package, name)(getattr(package, config)(**options), *words)


@pytest.mark.parametrize("case", CASES)
def test_it_holds_and_gives_what_pefts_does(case: str) -> None:
    ours, theirs = made(multigraft, case), made(peft, case)
    mine = ours.state_dict()
    assert mine.keys() == theirs.state_dict().keys()
    assert all(torch.equal(mine[name], value) for name, value in theirs.state_dict().items())
    tokens = torch.tensor([[0, 1, 2], [2, 1, 0]])
    torch.testing.assert_close(ours(tokens), theirs(tokens))


@pytest.mark.parametrize("name", ["token_dim", "input_size", "output_size", "hidden_size"])
def test_a_prompts_encoder_tells_its_sizes_as_pefts_does(name: str) -> None:
    assert getattr(made(multigraft, "mlp"), name) == getattr(made(peft, "mlp"), name)
    assert made(multigraft, "mlp").total_virtual_tokens == 3


@pytest.mark.parametrize(
    ("case", "name"),
    [("prefix", "num_layers"), ("projected", "encoder_hidden_size"), ("random", "token_dim")],
)
def test_a_size_that_is_not_given_is_asked_for(case: str, name: str) -> None:
    kind, config, options = CASES[case]
    words = (WORDS,) if kind == "PromptEmbedding" else ()
    given = {**options, name: None}
    with pytest.raises(ConfigError, match=rf"`{name}` \(=None\) must be a size"):
        getattr(multigraft, kind)(getattr(multigraft, config)(**given), *words)


def base() -> Any:
    sizes = {"vocab_size": 7, "n_embd": 4, "n_layer": 2, "n_head": 2, "n_positions": 16}
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).eval()


@pytest.mark.parametrize("package", [peft, multigraft], ids=["peft", "multigraft"])
@pytest.mark.parametrize(
    ("config", "name"),
    [
        ("PrefixTuningConfig", "PrefixEncoder"),
        ("PromptEncoderConfig", "PromptEncoder"),
        ("PromptTuningConfig", "PromptEmbedding"),
    ],
)
def test_an_adapters_own_module_is_of_the_class(package: Any, config: str, name: str) -> None:
    options = getattr(package, config)(task_type="CAUSAL_LM", num_virtual_tokens=2)
    module = package.get_peft_model(base(), options).prompt_encoder["default"]
    names = ("PrefixEncoder", "PromptEncoder", "PromptEmbedding")
    assert [n for n in names if isinstance(module, getattr(package, n))] == [name]


def test_a_prefix_takes_a_table_of_its_shape_and_no_other() -> None:
    for package in (peft, multigraft):
        encoder = made(package, "prefix")
        table = torch.randn(3, 16)
        encoder.load_prompt_embeddings(table)
        assert torch.equal(encoder(torch.arange(3)), table)
        with pytest.raises(ValueError, match="shape"):
            encoder.load_prompt_embeddings(table[:2])
        with pytest.raises(ValueError, match="prefix_projection"):
            made(package, "projected").load_prompt_embeddings(table)


def test_a_decoder_reads_each_tokens_predecessor_as_in_peft() -> None:
    from peft.utils import shift_tokens_right

    labels = torch.tensor([[5, 6, -100, 2], [-100, 3, 4, 1]])
    before = labels.clone()
    found = multigraft.shift_tokens_right(labels, 0, 1)
    assert torch.equal(found, shift_tokens_right(labels, 0, 1))
    assert torch.equal(labels, before)
    with pytest.raises(ValueError, match="pad_token_id"):
        multigraft.shift_tokens_right(labels, None, 1)


def test_adaption_prompts_have_a_class() -> None:
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2}
    config = transformers.LlamaConfig(vocab_size=9, num_hidden_layers=2, **sizes)
    ids, outputs = torch.tensor([[1, 2, 3]]), []
    for package in (peft, multigraft):
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(config).eval()
        options = package.AdaptionPromptConfig(
            adapter_len=2, adapter_layers=1, target_modules="self_attn"
        )
        tuner = package.AdaptionPromptModel(model, {"default": options}, "default")
        trained = [p for p in tuner.parameters() if p.requires_grad]
        assert sorted(p.numel() for p in trained) == [1, 16]
        for parameter in trained:
            nn.init.constant_(parameter, 0.5)
        outputs.append(tuner(ids).logits)
    torch.testing.assert_close(outputs[0], outputs[1])
    wrapped = multigraft.get_peft_model(transformers.LlamaForCausalLM(config), options)
    assert isinstance(wrapped.base_model, multigraft.AdaptionPromptModel)
    assert not isinstance(wrapped.base_model, multigraft.LoraModel)


def test_task_ids_are_refused() -> None:
    options = multigraft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    model = multigraft.get_peft_model(base(), options)
    assert model.get_prompt(3, max_cache_len=9).shape == (3, 2, 4)
    with pytest.raises(multigraft.UnsupportedError, match="multitask prompt tuning"):
        model.get_prompt(1, task_ids=torch.tensor([0]))
