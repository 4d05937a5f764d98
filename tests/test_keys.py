"""Names of an adapter's tensors: on disk, in memory, and one from the other."""

from __future__ import annotations

import pytest

from multigraft import get_peft_model
from multigraft.keys import PREFIX, full_key, memory_name, saved_tensors, sites_in, strip_prefix
from tests.subject import Subject, layers


@pytest.mark.parametrize(
    ("key", "stripped"),
    [
        ("base_model.model.head.lora_A.weight", "head.lora_A.weight"),
        ("head.lora_A.weight", "head.lora_A.weight"),
        ("base_model.model._orig_mod.head.weight", "head.weight"),
        ("_fsdp_wrapped_module.a._checkpoint_wrapped_module.b", "a.b"),
        ("a.my_orig_mod.b", "a.my_orig_mod.b"),
        ("base_model.model.base_model.model.w", "base_model.model.w"),
    ],
)
def test_a_files_key_is_read_below_the_base_without_torchs_wrappers(
    key: str, stripped: str
) -> None:
    assert strip_prefix(key) == stripped


def test_a_key_below_the_base_gets_the_prefix_and_one_of_the_adapter_does_not() -> None:
    assert full_key("head.lora_A.weight") == f"{PREFIX}head.lora_A.weight"
    assert full_key("base_model.vera_A") == "base_model.vera_A"
    assert full_key("prompt_embeddings") == "prompt_embeddings"


@pytest.mark.parametrize("adapter", ["default", "v1.0", "keys"])
def test_every_saved_tensor_has_its_name_in_the_models_state_dict(adapter: str) -> None:
    subject = Subject()
    config = subject.config(["up", "emb"], modules_to_save=["conv"], bias="all", lora_bias=False)
    get_peft_model(subject.base, config, adapter)
    state = subject.base.state_dict()
    named = {
        memory_name(graft, name): graft.params[name]
        for layer in layers(subject.base)
        for _, graft, name in saved_tensors(layer, adapter)
    }
    own = {key for key in state if "base_layer" not in key} - set(subject.pristine.state_dict())
    assert set(named) == own
    assert all(named[key].data_ptr() == state[key].data_ptr() for key in named)


def test_keys_on_disk_are_pefts_and_say_nothing_of_the_adapters_name() -> None:
    subject = Subject()
    config = subject.config(["0.up", "emb"], modules_to_save=["conv"], bias="all")
    get_peft_model(subject.base, config, "mine")
    keys = [k for layer in layers(subject.base) for k, _, _ in saved_tensors(layer, "mine")]
    assert sorted(keys) == [
        "conv.bias",
        "conv.weight",
        "emb.lora_embedding_A",
        "emb.lora_embedding_B",
        "head.bias",
        "layers.0.norm.bias",
        "layers.0.up.base_layer.bias",
        "layers.0.up.lora_A.weight",
        "layers.0.up.lora_B.weight",
        "layers.1.norm.bias",
        "layers.1.up.bias",
    ]


def test_sites_are_read_from_keys_by_paths_that_the_model_has() -> None:
    known = {"head", "layers", "layers.0", "layers.0.up", "lora_A", "lora_A.up"}
    keys = [
        f"{PREFIX}layers.0.up.lora_A.weight",
        "layers.0.up.lora_B.weight",
        "lora_A.up.lora_A.weight",
        "elsewhere.lora_A.weight",
        "head.weight",
    ]
    assert sites_in(keys, "lora_", known) == ["layers.0.up", "lora_A.up"]
