"""Behaviour, side by side with the real PEFT: outputs, gradients, merges, states, training.

In float64, where differences of order vanish and differences of meaning do not. What stays are the
float32 steps that transformers' norms and softmaxes take whatever the model's dtype: a value that
falls on the other side of a float32 rounding in one library shows as about 1e-6 of the output.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from multigraft import UnsupportedError
from tests import oracle
from tests.oracle import (
    ARCHITECTURES,
    KINDS,
    Net,
    Pair,
    add_to_both,
    assert_same_gradients,
    build,
    gradients,
    graft_pair,
    output,
    quiet,
    train_step,
)

Maker = Callable[[], nn.Module]
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {"target_modules": "all-linear"},
    "rslora": {"target_modules": "all-linear", "use_rslora": True, "r": 3, "lora_alpha": 5},
    "lora_bias": {"target_modules": "all-linear", "lora_bias": True, "r": 2},
    "biases": {"target_modules": "all-linear", "bias": "lora_only", "r": 2},
}
PAIRS: dict[str, tuple[Maker, dict[str, Any]]] = {
    f"{name}, {what}": (maker, options)
    for name, maker in ARCHITECTURES.items()
    for what, options in OPTIONS.items()
} | {
    "net, every kind": (Net, {"target_modules": KINDS, "r": 4}),
    "net, all biases": (Net, {"target_modules": KINDS, "r": 4, "bias": "all"}),
    "net, saved": (Net, {"target_modules": ["lin0"], "modules_to_save": ["head", "conv1"]}),
    # Not tied: merging into a shared embedding, PEFT changes the head as well.
    "gemma, embedding": (
        lambda: oracle.gemma(tie_word_embeddings=False),
        {"target_modules": ["embed_tokens", "v_proj"]},
    ),
}
# B's bias needs one of the base to be merged into, and a dense A has no grouped kernel.
WITHOUT_MERGED_FORM = {
    "net, every kind",
    "net, all biases",
    *(f"{name}, lora_bias" for name in ("net", "llama", "gemma", "t5")),
}
MERGEABLE = {what: pair for what, pair in PAIRS.items() if what not in WITHOUT_MERGED_FORM}


def over(pairs: dict[str, tuple[Maker, dict[str, Any]]]) -> Any:
    return pytest.mark.parametrize(("maker", "options"), pairs.values(), ids=pairs)


def exact_pair(maker: Maker, options: dict[str, Any]) -> Pair:
    return graft_pair(maker, options, dtype=torch.float64)


@over(PAIRS)
def test_outputs_are_equal(maker: Maker, options: dict[str, Any]) -> None:
    exact_pair(maker, options).assert_equal(atol=1e-5)


@over(PAIRS)
def test_gradients_are_equal(maker: Maker, options: dict[str, Any]) -> None:
    pair = exact_pair(maker, options)
    train_step(pair)
    assert_same_gradients(pair)


@over(MERGEABLE)
def test_merged_models_are_equal(maker: Maker, options: dict[str, Any]) -> None:
    pair = exact_pair(maker, options)
    with quiet():
        theirs = pair.theirs.merge_and_unload().state_dict()
    ours = pair.ours.merge_and_unload().state_dict()
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], atol=1e-9, rtol=1e-9, msg=name)


@over({what: PAIRS[what] for what in sorted(WITHOUT_MERGED_FORM)})
def test_what_has_no_merged_form_is_refused_by_both(maker: Maker, options: dict[str, Any]) -> None:
    pair = exact_pair(maker, options)
    before = output(pair.ours, pair.batch)
    with pytest.raises(UnsupportedError, match=r"has a bias|groups"):
        pair.ours.merge_and_unload()
    assert torch.equal(output(pair.ours, pair.batch), before)
    with quiet(), pytest.raises((RuntimeError, NotImplementedError)):
        pair.theirs.merge_and_unload()


@over(PAIRS)
def test_counts_of_parameters_are_equal(maker: Maker, options: dict[str, Any]) -> None:
    pair = graft_pair(maker, options, fill=False)
    trainable, total = pair.ours.get_nb_trainable_parameters()
    copies = sum(p.numel() for n, p in pair.ours.named_parameters() if ".bias_copy_" in n)
    # PEFT has no copies of biases: it trains the base's own.
    assert (trainable, total - copies) == pair.theirs.get_nb_trainable_parameters()


# -- several adapters ---------------------------------------------------------------------------


def three_adapters(maker: Maker = oracle.llama) -> Pair:
    task = "SEQ_2_SEQ_LM" if maker is oracle.t5 else "CAUSAL_LM"
    pair = exact_pair(maker, {"target_modules": "all-linear", "r": 2, "task_type": task})
    one = {"llama": ["q_proj"], "t5": ["wi", "q"]}[maker.__name__]
    add_to_both(pair, "b", {"target_modules": one, "r": 3, "task_type": task}, seed=1)
    add_to_both(pair, "c", {"target_modules": "all-linear", "r": 2, "use_rslora": True}, seed=2)
    return pair


NAMES = ["b", "__base__", "c", "default", "c"]


@pytest.mark.parametrize("maker", [oracle.llama, oracle.t5])
def test_mixed_batches_are_equal(maker: Maker) -> None:
    pair = three_adapters(maker)
    pair.batch = oracle.inputs(pair.ours, rows=5)
    whole = pair.assert_equal(atol=1e-5, adapter_names=NAMES)
    pair.ours.set_adapter("b")
    torch.testing.assert_close(whole[:1], pair.outputs()[0][:1], atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"num_beams": 2, "use_cache": False}])
@pytest.mark.parametrize("names", [NAMES, ["c"]], ids=["five rows", "one row"])
@pytest.mark.parametrize("maker", [oracle.llama, oracle.t5])
def test_mixed_batches_generate_the_same_tokens(
    maker: Maker, names: list[str], options: dict[str, Any]
) -> None:
    pair = three_adapters(maker)
    ids = oracle.inputs(pair.ours, rows=len(names))["input_ids"]
    call = {"input_ids": ids, "max_new_tokens": 4, "do_sample": False, "min_new_tokens": 4}
    ours, theirs = (
        m.generate(**call, **options, adapter_names=names) for m in (pair.ours, pair.theirs)
    )
    assert torch.equal(ours, theirs)
    base = pair.ours.generate(**call, **options, adapter_names=["__base__"] * len(names))
    assert not torch.equal(ours, base)


@pytest.mark.parametrize("maker", [oracle.llama, oracle.t5])
def test_every_returned_sequence_uses_the_adapter_of_its_row(maker: Maker) -> None:
    # PEFT has no answer here: it repeats names for beams and not for returned sequences.
    pair = three_adapters(maker)
    ids = oracle.inputs(pair.ours, rows=5)["input_ids"]
    call = {"max_new_tokens": 4, "min_new_tokens": 4, "num_beams": 2, "num_return_sequences": 2}
    mixed = pair.ours.generate(input_ids=ids, **call, adapter_names=NAMES)
    for row, name in enumerate(NAMES):
        alone = pair.ours.generate(input_ids=ids[row, None], **call, adapter_names=[name])
        assert torch.equal(mixed[2 * row : 2 * row + 2], alone), name


def test_active_adapters_are_equal_through_a_lifetime() -> None:
    pair = three_adapters()
    for model in (pair.ours, pair.theirs):
        model.set_adapter("b")
    steps: list[Callable[[Any], object]] = [
        lambda m: m.set_adapter("c"),
        lambda m: m.base_model.set_adapter(["default", "c"]),
        lambda m: m.merge_adapter(),
        lambda m: m.unmerge_adapter(),
        lambda m: m.delete_adapter("default"),
        lambda m: m.set_adapter("b"),
        lambda m: m.delete_adapter("b"),
    ]
    for step in steps:
        with quiet():
            step(pair.ours), step(pair.theirs)
        assert pair.ours.active_adapters == pair.theirs.active_adapters
        assert set(pair.ours.peft_config) == set(pair.theirs.peft_config)
        pair.assert_equal(atol=1e-5)


def test_two_active_adapters_train_with_equal_gradients() -> None:
    pair = three_adapters()
    for model in (pair.ours, pair.theirs):
        model.base_model.set_adapter(["default", "c"])
    train_step(pair)
    assert_same_gradients(pair)
    assert {n for n in gradients(pair.ours) if ".b." in n} == set()


def test_disabling_gives_both_the_base_output() -> None:
    pair = three_adapters()
    base = output(build(oracle.llama).double(), pair.batch)
    with pair.ours.disable_adapter(), pair.theirs.disable_adapter():
        ours, theirs = pair.outputs()
    assert torch.equal(ours, base)
    assert torch.equal(theirs, base)


# -- status -------------------------------------------------------------------------------------


def renamed(name: str) -> str:
    return f"model.{name}"  # PEFT's names begin at its tuner, ours at the base model


@pytest.mark.parametrize("state", ["fresh", "switched", "both", "merged", "disabled"])
def test_statuses_are_equal(state: str) -> None:
    pair = graft_pair(oracle.llama, {"target_modules": ["q_proj", "embed_tokens"], "r": 2})
    add_to_both(pair, "b", {"target_modules": ["q_proj", "down_proj"], "r": 3})
    for model in (pair.ours, pair.theirs):
        if state != "fresh":
            model.set_adapter("b")
        if state == "both":
            model.base_model.set_adapter(["default", "b"])
        if state == "merged":
            model.merge_adapter()
        if state == "disabled":
            model.base_model.disable_adapter_layers()
    assert status_of(pair.ours, state) == status_of(pair.theirs, state)
    ours, theirs = pair.ours.get_layer_status(), pair.theirs.get_layer_status()
    assert [renamed(s.name) for s in ours] == [s.name for s in theirs]
    for one, other in zip(ours, theirs, strict=True):
        mine, its = dataclasses.asdict(one), dataclasses.asdict(other)
        assert mine.keys() == its.keys()
        # PEFT lists active adapters that a layer lacks, and names its own class per layer;
        # disabling there also freezes.
        its["active_adapters"] = [n for n in its["active_adapters"] if n in mine["devices"]]
        assert its.pop("module_type").endswith(mine.pop("module_type"))
        mine.pop("name"), its.pop("name")
        if state == "disabled":
            mine.pop("requires_grad"), its.pop("requires_grad")
        assert mine == its


def status_of(model: Any, state: str) -> dict[str, Any]:
    fields = dataclasses.asdict(model.get_model_status())
    fields.pop("adapter_model_type")  # LoraModel there, one tuner for all methods here
    if state == "disabled":
        fields.pop("requires_grad"), fields.pop("trainable_params")
    if state == "merged":
        fields.pop("merged_adapters")
    return fields
