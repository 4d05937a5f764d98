"""A base model without weights, from its config alone."""

from __future__ import annotations

import json

import pytest

from multigraft import CheckpointError
from multigraft.train import load_model, load_skeleton


@pytest.fixture
def folder(tmp_path):
    pytest.importorskip("transformers")

    def write(**config: object) -> str:
        (tmp_path / "config.json").write_text(json.dumps(config))
        return str(tmp_path)

    return write


def test_it_has_the_models_modules_and_shapes_and_no_values(base_dir):
    bones = load_skeleton(base_dir)
    whole = load_model(base_dir, device="cpu")
    shapes = {name: tuple(p.shape) for name, p in whole.named_parameters()}
    assert {name: tuple(p.shape) for name, p in bones.named_parameters()} == shapes
    assert {p.device.type for p in bones.parameters()} == {"meta"}
    assert not bones.training


def test_a_class_that_the_config_names_is_built(folder):
    small = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 9}
    where = folder(
        model_type="bert",
        architectures=["BertForSequenceClassification"],
        intermediate_size=8,
        **small,
    )
    assert type(load_skeleton(where)).__name__ == "BertForSequenceClassification"


def test_without_a_class_it_is_the_architectures_usual_one(folder):
    small = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 9}
    where = folder(model_type="llama", architectures=["os.system"], intermediate_size=8, **small)
    assert type(load_skeleton(where)).__name__ == "LlamaForCausalLM"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "no-such-model"}, "no config could be read from there"),
        ({"model_type": "llama", "hidden_size": -4}, "no config could be read from there"),
        ({"model_type": "llama", "vocab_size": "ten"}, "no config could be read from there"),
        ({"model_type": "llama", "vocab_size": -8}, "its config makes no model"),
    ],
)
def test_a_config_that_makes_no_model_is_one_error(folder, config, message):
    with pytest.raises(CheckpointError, match=message):
        load_skeleton(folder(**config))


def test_an_adapters_directory_is_no_base(tmp_path):
    pytest.importorskip("transformers")
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "some/base"}')
    with pytest.raises(CheckpointError, match=r"holds an adapter, not a base model.*some/base"):
        load_skeleton(tmp_path)
