"""Mixed batches whose rows name several adapters: each row is what they give together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import multigraft
from multigraft import (
    IA3Config,
    LoHaConfig,
    LoraConfig,
    OFTConfig,
    PeftModel,
    RoutingError,
    StateError,
    get_peft_model,
)
from tests.oracle import TOKENS, VOCABULARY, Net, build, inputs, llama, output, random_state
from tests.subject import Subject

COMPANY = [["a", "b"], "b", "__base__", ["c", "a"], "a", ["a", "b", "c"]]
Maker = Callable[..., Any]
METHODS: dict[str, dict[str, Any]] = {
    "LoRA": {"a": LoraConfig(r=2), "b": LoraConfig(r=3, lora_alpha=5), "c": LoraConfig(r=1)},
    "DoRA": {"a": LoraConfig(r=2), "b": LoraConfig(use_dora=True), "c": LoraConfig(r=1)},
    "IA3": {"a": LoraConfig(r=2), "b": IA3Config(feedforward_modules=[]), "c": LoHaConfig(r=2)},
    "OFT": {"a": OFTConfig(oft_block_size=4), "b": LoraConfig(), "c": LoraConfig(r=1)},
}


def adapted(configs: dict[str, Any], maker: Maker = llama, targets: Any = None) -> PeftModel:
    """All three adapters on the model, with values of their own; ``b`` at fewer modules."""
    model = None
    for seed, (name, config) in enumerate(configs.items()):
        config = config.copy()
        config.target_modules = targets or (["v_proj"] if name == "b" else ["v_proj", "down_proj"])
        if model is None:
            model = get_peft_model(build(maker), config, name)
        else:
            model.add_adapter(name, config)
        state = random_state(multigraft.get_peft_model_state_dict(model, adapter_name=name), seed)
        multigraft.set_peft_model_state_dict(model, state, name)
    assert model is not None
    return model.eval()


def batch_of(model: PeftModel) -> dict[str, Tensor]:
    source = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCABULARY, (len(COMPANY), TOKENS), generator=source)
    return {next(iter(inputs(model))): ids}


def row_by_row(model: PeftModel, batch: dict[str, Tensor], names: list[Any]) -> Tensor:
    """The truth: each row by itself, with its adapters in the base's own weights."""
    rows = []
    for index, entry in enumerate(names):
        own = {key: value[index : index + 1] for key, value in batch.items()}
        if entry == "__base__":
            with model.disable_adapter():
                rows.append(output(model, own))
        else:
            model.set_adapter(entry)
            model.merge_adapter()
            rows.append(output(model, own))
            model.unmerge_adapter()
    return torch.cat(rows)


@pytest.mark.parametrize("configs", METHODS.values(), ids=METHODS)
@torch.no_grad()
def test_each_row_is_what_its_adapters_give_together(configs: dict[str, Any]):
    model = adapted(configs)
    batch = batch_of(model)
    truth = row_by_row(model, batch, COMPANY)
    mixed = output(model, batch, adapter_names=COMPANY)
    torch.testing.assert_close(mixed, truth, atol=1e-5, rtol=1e-4)
    fewer = row_by_row(model, batch, ["a", "__base__", "b", "c", "__base__", ["a", "c"]])
    assert all((truth - fewer).abs().amax((1, 2)) > 1e-3)  # each adapter of a row counts


@torch.no_grad()
def test_convolutions_and_embeddings_too():
    targets = ["emb", "conv1", "lin0", "lin1"]  # a grouped update has no merged form
    model = adapted({n: LoraConfig(r=2) for n in "abc"}, Net, targets)
    batch = batch_of(model)
    truth = row_by_row(model, batch, COMPANY)
    mixed = output(model, batch, adapter_names=COMPANY)
    torch.testing.assert_close(mixed, truth, atol=1e-5, rtol=1e-4)


def test_gradients_reach_each_adapter_of_a_row():
    model = adapted(METHODS["LoRA"])
    batch = batch_of(model)
    model.base_model.set_requires_grad(["a", "b", "c"])
    params = {n: p for n, p in model.named_parameters() if p.requires_grad}

    def grads(y: Tensor) -> dict[str, Tensor]:
        return dict(
            zip(params, torch.autograd.grad(y.square().sum(), [*params.values()]), strict=True)
        )

    mixed = grads(output(model, batch, adapter_names=COMPANY))
    rows = []
    for index, entry in enumerate(COMPANY):
        own = {key: value[index : index + 1] for key, value in batch.items()}
        rows.append(output(model, own, adapter_names=[entry]))
    alone = grads(torch.cat(rows))
    for name in params:
        torch.testing.assert_close(mixed[name], alone[name], atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_generation_and_blocks_of_calls_take_them_too():
    model = adapted(METHODS["LoRA"])
    ids = batch_of(model)["input_ids"][:2]
    names = [["a", "b"], "c"]
    options = {"max_new_tokens": 4, "do_sample": False}
    mixed = model.generate(input_ids=ids, adapter_names=names, **options)
    for row, entry in enumerate(names):
        model.set_adapter(entry)
        assert torch.equal(model.generate(input_ids=ids[row : row + 1], **options)[0], mixed[row])
    with model.mixed_batch(names):
        first, second = model(input_ids=ids).logits, model(input_ids=ids).logits
    assert torch.equal(first, second)
    torch.testing.assert_close(first, model(input_ids=ids, adapter_names=names).logits)


@pytest.mark.parametrize("entry", [[], ["a", 1], ["__base__", "a"], {"a"}, ["a", ["b"]]], ids=str)
def test_an_entry_that_is_no_company_is_refused(entry: Any):
    model = adapted(METHODS["LoRA"])
    batch = batch_of(model)
    with pytest.raises(RoutingError, match="a list of names that act together"):
        output(model, batch, adapter_names=[*COMPANY[:-1], entry])


def test_an_unknown_adapter_among_several_is_refused_with_the_nearest():
    model = adapted({"first": LoraConfig(), "second": LoraConfig()})
    batch = {"input_ids": batch_of(model)["input_ids"][:1]}
    with pytest.raises(RoutingError, match="Nearest: `second`"):
        output(model, batch, adapter_names=[["first", "secnod"]])


def test_adapters_that_cannot_act_together_are_refused_in_one_row_and_served_in_two():
    subject = Subject()
    model = get_peft_model(subject.base, subject.config(["up"], modules_to_save=["head"]), "a")
    model.add_adapter("b", subject.config(["up"], modules_to_save=["head"]))
    assert model(subject.ids, adapter_names=["a", "b"]).shape == (2, 4, 5)
    with pytest.raises(StateError, match="each hold a trained copy"):
        model(subject.ids, adapter_names=[["a", "b"], "a"])


def test_a_module_that_was_replaced_is_added_to():
    subject = Subject()
    model = get_peft_model(subject.base, subject.config(["up"], modules_to_save=["head"]), "a")
    model.add_adapter("b", subject.config(["head"]))
    with torch.no_grad():
        nn.init.normal_(subject.base.head.grafts["a"][0].stand_in.weight)
    truth = []
    for names in (["a", "b"], ["b"]):
        model.set_adapter(names)
        truth.append(model(subject.ids))
    y = model(subject.ids, adapter_names=[["a", "b"], "b"])
    torch.testing.assert_close(y, torch.stack([truth[0][0], truth[1][1]]))
