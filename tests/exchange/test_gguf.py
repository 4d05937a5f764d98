"""GGUF files and Modelfiles: names, layout, scale and chat as llama.cpp and Ollama read them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from multigraft import ConfigError, UnsupportedError
from multigraft.exchange import export
from tests.exchange.adapters import SIZES, changes, write

gguf = pytest.importorskip("gguf")

CONFIG = {
    "model_type": "llama",
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_hidden_layers": 2,
    "tie_word_embeddings": False,
}
NAMES = {
    "model.layers.0.self_attn.q_proj": "blk.0.attn_q",
    "model.layers.0.self_attn.v_proj": "blk.0.attn_v",
    "model.layers.1.self_attn.q_proj": "blk.1.attn_q",
    "model.layers.1.mlp.down_proj": "blk.1.ffn_down",
}


def base(folder: Path, **values) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG | values))
    return folder


def adapter(tmp_path: Path, on: dict | None = None, **config) -> Path:
    folder = base(tmp_path / "base", **(on or {}))
    return write(tmp_path / "a", base_model_name_or_path=str(folder), **config)


def read(path: Path):
    reader = gguf.GGUFReader(str(path))
    keys = {name: field.contents() for name, field in reader.fields.items()}
    return keys, {t.name: torch.from_numpy(t.data.copy()) for t in reader.tensors}


def permuted(W: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of q or k as llama.cpp has them, row by row: i of the first half, i of the second."""
    size = W.shape[0] // heads
    rows = [
        h * size + half * size // 2 + i
        for h in range(heads)
        for i in range(size // 2)
        for half in (0, 1)
    ]
    return W[rows]


@pytest.mark.parametrize("config", [{}, {"rank_pattern": {"v_proj": 2}, "use_rslora": True}])
def test_llama_cpp_adds_what_the_adapter_adds(config, tmp_path):
    folder = adapter(tmp_path, **config)
    export(folder, "gguf", tmp_path / "b")
    keys, tensors = read(tmp_path / "b" / "adapter.gguf")
    assert keys["general.type"] == "adapter" and keys["adapter.type"] == "lora"
    assert keys["general.architecture"] == "llama"
    assert len(tensors) == 2 * len(SIZES)
    for path, wanted in changes(folder).items():
        A, B = (tensors[f"{NAMES[path]}.weight.lora_{x}"].double() for x in "ab")
        got = keys["adapter.lora.alpha"] / B.shape[1] * B @ A
        wanted = permuted(wanted, 2) if path.endswith("q_proj") else wanted
        torch.testing.assert_close(got, wanted, rtol=0, atol=2e-6)


def test_names_are_those_of_the_packages_own_map():
    from multigraft.exchange.llamacpp import ARCHITECTURES, OUTER

    numbers = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}
    for architecture in ARCHITECTURES.values():
        known = gguf.get_tensor_name_map(numbers[architecture.name], 2)
        for inner, name in architecture.layers.items():
            assert known.get_name(f"model.layers.1.{inner}") == f"blk.1.{name}"
        for path, name in OUTER.items():
            assert known.get_name(path) in (name, None)


def test_an_architecture_without_permutation_keeps_rows(tmp_path):
    folder = adapter(tmp_path, on={"model_type": "qwen2"})
    export(folder, "gguf", tmp_path / "b")
    _, tensors = read(tmp_path / "b" / "adapter.gguf")
    from tests.exchange.adapters import tensors_in

    own = tensors_in(folder)["base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"]
    assert torch.equal(tensors["blk.0.attn_q.weight.lora_b"], own)


@pytest.mark.parametrize("kind", ["mamba", None])
def test_another_architecture_is_refused(kind, tmp_path):
    with pytest.raises(UnsupportedError, match="written are"):
        export(adapter(tmp_path, on={"model_type": kind}), "gguf", tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_without_a_base_it_is_asked_for(tmp_path):
    with pytest.raises(ConfigError, match="--base"):
        export(write(tmp_path / "a"), "gguf", tmp_path / "b")


def test_a_head_that_is_the_embedding_is_refused(tmp_path):
    stray = {
        "base_model.model.lm_head.lora_A.weight": torch.ones(4, 16),
        "base_model.model.lm_head.lora_B.weight": torch.ones(32, 4),
    }
    folder = adapter(tmp_path, on={"tie_word_embeddings": True}, extra=stray)
    with pytest.raises(UnsupportedError, match=r"`lm_head`[\s\S]*drop its pair"):
        export(folder, "gguf", tmp_path / "b")


def test_a_layer_that_llama_cpp_does_not_adapt_is_refused(tmp_path):
    stray = {
        "base_model.model.model.rotary.lora_A.weight": torch.ones(4, 16),
        "base_model.model.model.rotary.lora_B.weight": torch.ones(32, 4),
    }
    with pytest.raises(UnsupportedError, match=r"`model.rotary` is no layer"):
        export(adapter(tmp_path, extra=stray), "gguf", tmp_path / "b")


def test_an_embeddings_matrix_stands_transposed(tmp_path):
    A, B = torch.randn(4, 32), torch.randn(16, 4)
    begin = "base_model.model.model.embed_tokens.lora_embedding_"
    export(adapter(tmp_path, extra={f"{begin}A": A, f"{begin}B": B}), "gguf", tmp_path / "b")
    _, tensors = read(tmp_path / "b" / "adapter.gguf")
    assert torch.equal(tensors["token_embd.weight.lora_a"], A.T)
    assert torch.equal(tensors["token_embd.weight.lora_b"], B)


def test_ollama_gets_a_modelfile_with_the_base_the_adapter_and_the_end(tmp_path):
    folder = adapter(tmp_path)
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": {"content": "<|im_end|>"}, "chat_template": "{{ 1 }}"})
    )
    outcome = export(folder, "ollama", tmp_path / "b")
    lines = (tmp_path / "b" / "Modelfile").read_text().splitlines()
    assert lines == [
        f"FROM {tmp_path / 'base'}",
        "ADAPTER ./adapter.gguf",
        'PARAMETER stop "<|im_end|>"',
    ]
    assert (tmp_path / "b" / "chat_template.jinja").read_text() == "{{ 1 }}"
    assert any("add a TEMPLATE" in note for note in outcome.notes)
    keys, _ = read(tmp_path / "b" / "adapter.gguf")
    assert keys["tokenizer.chat_template"] == "{{ 1 }}"


def test_a_token_that_would_end_the_line_is_refused(tmp_path):
    folder = adapter(tmp_path)
    settings = {"eos_token": '"\nFROM elsewhere'}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(UnsupportedError, match="cannot stand in a Modelfile"):
        export(folder, "ollama", tmp_path / "b")
