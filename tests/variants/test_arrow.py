"""Arrow and GenKnowSub against PEFT; and where PEFT changes the experts for good."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor

import multigraft
from multigraft import (
    ArrowConfig,
    ConfigError,
    LoraConfig,
    PeftModel,
    StateError,
    TargetError,
    UnsupportedError,
    create_arrow_model,
)
from multigraft.variants.arrow import prototype
from tests.methods.against_peft import near
from tests.oracle import quiet
from tests.variants.invoked import IDS, base

TARGETS = ["q_proj", "v_proj", "down_proj"]


def save_adapters(folder: Path, seeds: Sequence[int], **options: Any) -> list[str]:
    """Filled adapters on disk, one for each seed."""
    paths = []
    for seed in seeds:
        chosen = {"r": 4, "lora_alpha": 4 + seed, "target_modules": TARGETS} | options
        model = multigraft.get_peft_model(base(), LoraConfig(task_type="CAUSAL_LM", **chosen))
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in model.roster.parameters("default"):
                parameter.normal_(std=0.3)
        paths.append(str(folder / f"expert{seed}"))
        model.save_pretrained(paths[-1])
    return paths


def both(folder: Path, general: bool = False, **options: Any) -> tuple[PeftModel, Any]:
    """The same router over the same files in both libraries."""
    tasks = save_adapters(folder, [0, 1, 2, 3])
    more = save_adapters(folder, [4, 5]) if general else None
    options = {"top_k": 2, "rng_seed": 3, "use_gks": general} | options
    with quiet():
        theirs = peft.create_arrow_model(base(), tasks, peft.ArrowConfig(**options), more)
    ours = create_arrow_model(base(), tasks, ArrowConfig(**options), more)
    return ours.eval(), theirs.eval()


def expert_bits(model: PeftModel) -> dict[str, Tensor]:
    return {
        f"{name} {key}": value.clone()
        for name in model.peft_config
        for key, value in multigraft.get_peft_model_state_dict(model, adapter_name=name).items()
    }


@pytest.mark.parametrize(
    "options",
    [{}, {"top_k": 1}, {"top_k": 4}, {"router_temperature": 0.2}, {"general": True}],
    ids=str,
)
def test_outputs_agree(options: dict[str, Any], tmp_path: Path) -> None:
    ours, theirs = both(tmp_path, **options)
    with torch.no_grad():
        near(ours(IDS).logits, theirs(IDS).logits)
        assert (ours(IDS).logits - base()(IDS).logits).abs().max() > 0.1
        options = {"max_new_tokens": 4, "do_sample": False}
        assert torch.equal(ours.generate(IDS, **options), theirs.generate(input_ids=IDS, **options))


def test_the_experts_stay_as_they_are(tmp_path: Path) -> None:
    """PEFT subtracts the general adapters from the experts' own tensors, and saves them so."""
    ours, _ = both(tmp_path, general=True)
    before = expert_bits(ours)
    first = ours(IDS).logits
    assert torch.equal(ours(IDS).logits, first)
    after = expert_bits(ours)
    assert all(torch.equal(value, before[key]) for key, value in after.items())
    alone = PeftModel.from_pretrained(base(), tmp_path / "expert1").eval()
    ours.set_adapter("task_1")
    near(ours(IDS).logits, alone(IDS).logits)


def test_without_a_seed_the_prototype_is_the_singular_vector() -> None:
    torch.manual_seed(0)
    A, B = torch.randn(4, 9, dtype=torch.float64), torch.randn(7, 4, dtype=torch.float64)
    expected = torch.linalg.svd(B @ A).Vh[0]
    found = prototype(A, B, None)
    near(found * (found @ expected).sign(), expected)
    iterated = prototype(A, B, 5)
    assert abs(iterated @ expected) > 0.99
    assert torch.equal(prototype(A, B, 5), iterated)


def test_each_token_goes_to_its_top_experts_alone(tmp_path: Path) -> None:
    tasks = save_adapters(tmp_path, [0, 1, 2])
    arrow = ArrowConfig(top_k=2, router_temperature=0.5)
    model = create_arrow_model(base(), tasks, arrow).double().eval()
    layer = model.get_base_model().get_submodule("model.layers.0.self_attn.q_proj")
    x = torch.randn(2, 3, 16, dtype=torch.float64)
    expected = layer.base_layer(x).clone()
    for row in range(2):
        for place in range(3):
            token, scores, updates = x[row, place], [], []
            for name in ("task_0", "task_1", "task_2"):
                A, B = layer.lora_A[name].weight, layer.lora_B[name].weight
                scores.append((torch.linalg.svd(B @ A).Vh[0] @ token).abs())
                updates.append(layer.scaling[name] * (B @ (A @ token)))
            top = sorted(range(3), key=lambda i: -scores[i])[:2]
            weights = torch.softmax(torch.stack([scores[i] for i in top]) / 0.5, 0)
            expected[row, place] += sum(w * updates[i] for w, i in zip(weights, top, strict=True))
    near(layer(x), expected)


def test_more_experts_wanted_than_there_are_means_all(tmp_path: Path) -> None:
    """PEFT fails in the first forward."""
    tasks = save_adapters(tmp_path, [0, 1])
    default, all_ = (create_arrow_model(base(), tasks, ArrowConfig(top_k=k)).eval() for k in (3, 2))
    assert torch.equal(default(IDS).logits, all_(IDS).logits)


def test_an_experts_new_values_are_routed_anew(tmp_path: Path) -> None:
    tasks = save_adapters(tmp_path, [0, 1, 2])
    model = create_arrow_model(base(), tasks[:2], ArrowConfig()).eval()
    with torch.no_grad():
        before = model(IDS).logits
        model.load_adapter(tasks[2], "task_1")
        model.set_adapter("arrow_router")
        found = model(IDS).logits
        expected = (
            create_arrow_model(base(), [tasks[0], tasks[2]], ArrowConfig()).eval()(IDS).logits
        )
    assert not torch.allclose(found, before)
    near(found, expected)


def test_experts_are_those_that_the_config_names(tmp_path: Path) -> None:
    """PEFT takes every adapter that is added later for one, whatever it is for."""
    tasks = save_adapters(tmp_path, [0, 1, 2])
    model = create_arrow_model(base(), tasks[:2], ArrowConfig()).eval()
    with torch.no_grad():
        before = model(IDS).logits
        model.load_adapter(tasks[2], "bystander")
        assert torch.equal(model(IDS).logits, before)
        router = model.peft_config["arrow_router"]
        router.arrow_config.task_adapter_names.append("bystander")  # type: ignore[attr-defined]
        near(model(IDS).logits, create_arrow_model(base(), tasks, ArrowConfig()).eval()(IDS).logits)
        model.delete_adapter("bystander")
        near(model(IDS).logits, before)
        for name in ("task_0", "task_1"):
            model.delete_adapter(name)
        with pytest.raises(StateError, match="none of the router's experts"):
            model(IDS)


def test_gradients_reach_experts_that_are_thawed(tmp_path: Path) -> None:
    tasks = save_adapters(tmp_path, [0, 1, 2])
    model = create_arrow_model(base(), tasks, ArrowConfig(rng_seed=1))
    with quiet():
        theirs = peft.create_arrow_model(base(), tasks, peft.ArrowConfig(rng_seed=1))
    assert not [n for n, p in model.named_parameters() if p.requires_grad]
    model.set_requires_grad("task_1")
    for name, parameter in theirs.named_parameters():
        parameter.requires_grad_("task_1" in name)
    for each in (model, theirs):
        each(IDS, labels=IDS).loss.backward()
    expected = dict(theirs.named_parameters())
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert len(found) == 2 * 3 * 2
    for name, grad in found.items():
        near(grad, expected[name].grad, name)


def test_a_mixed_batch_may_route_some_rows(tmp_path: Path) -> None:
    model = create_arrow_model(base(), save_adapters(tmp_path, [0, 1]), ArrowConfig()).eval()
    names = ["arrow_router", "task_0", "__base__", "arrow_router", "task_1"]
    with torch.no_grad():
        found = model(IDS, adapter_names=names).logits
        for row, name in enumerate(names):
            if name != "__base__":
                model.set_adapter(name)
                near(found[row], model(IDS).logits[row], name)


def test_a_saved_router_finds_its_experts_again(tmp_path: Path) -> None:
    """PEFT's own files of a router lose the names, and cannot be loaded by it."""
    tasks, general = save_adapters(tmp_path, [0, 1]), save_adapters(tmp_path, [4])
    model = create_arrow_model(base(), tasks, ArrowConfig(use_gks=True), general).eval()
    model.save_pretrained(tmp_path / "all")
    again = PeftModel.from_pretrained(base(), tmp_path / "all" / "task_0", "task_0")
    for name in ("task_1", "gks_0", "arrow_router"):
        again.load_adapter(tmp_path / "all" / name, name)
    again.set_adapter("arrow_router")
    assert torch.equal(again.eval()(IDS).logits, model(IDS).logits)


def test_peft_s_files_of_a_router_load(tmp_path: Path) -> None:
    ours, theirs = both(tmp_path, general=True)
    with quiet():
        theirs.save_pretrained(tmp_path / "theirs")  # before a forward has changed the experts
    again = PeftModel.from_pretrained(base(), tmp_path / "theirs" / "task_0", "task_0")
    for name in theirs.peft_config:
        if name != "task_0":
            again.load_adapter(tmp_path / "theirs" / name, name)
    again.set_adapter("arrow_router")
    near(again.eval()(IDS).logits, ours(IDS).logits)


def test_a_copied_model_routes_over_its_own_experts(tmp_path: Path) -> None:
    model = create_arrow_model(base(), save_adapters(tmp_path, [0, 1]), ArrowConfig()).eval()
    with torch.no_grad():
        expected = model(IDS).logits
        twin = copy.deepcopy(model)
        for parameter in model.roster.parameters("task_0"):
            parameter.zero_()
        near(twin(IDS).logits, expected)
        assert not torch.allclose(model(IDS).logits, expected)


def test_half_precision_follows_full(tmp_path: Path) -> None:
    tasks = save_adapters(tmp_path, [0, 1])
    with torch.no_grad():
        expected = create_arrow_model(base(), tasks, ArrowConfig()).eval()(IDS).logits
        half = create_arrow_model(base().bfloat16(), tasks, ArrowConfig()).eval()(IDS).logits
    assert half.dtype == torch.bfloat16
    assert (half - expected).norm() < 0.05 * expected.norm()


@torch.no_grad()
def test_a_compiled_router_has_one_graph(tmp_path: Path) -> None:
    model = create_arrow_model(base(), save_adapters(tmp_path, [0, 1]), ArrowConfig()).eval()
    expected = model(IDS).logits
    torch._dynamo.reset()
    near(torch.compile(model, fullgraph=True, backend="eager")(IDS).logits, expected)


def test_a_router_is_in_order(tmp_path: Path) -> None:
    model = create_arrow_model(base(), save_adapters(tmp_path, [0, 1]), ArrowConfig())
    assert not multigraft.verify(model).violations
    assert "arrow_router" in str(multigraft.inspect(model))


def test_merging_the_router_is_refused(tmp_path: Path) -> None:
    model = create_arrow_model(base(), save_adapters(tmp_path, [0]), ArrowConfig())
    with pytest.raises(UnsupportedError, match=r"\(arrow\), .*Keep it as an adapter"):
        model.merge_adapter()


def test_the_users_config_is_not_changed(tmp_path: Path) -> None:
    config = ArrowConfig()
    create_arrow_model(base(), save_adapters(tmp_path, [0]), config)
    assert config == ArrowConfig()


def test_experts_may_differ_in_rank(tmp_path: Path) -> None:
    """PEFT refuses them."""
    tasks = save_adapters(tmp_path, [0]) + save_adapters(tmp_path, [1], r=2)
    model = create_arrow_model(base(), tasks, ArrowConfig()).eval()
    assert (model(IDS).logits - base()(IDS).logits).abs().max() > 0.1


@pytest.mark.parametrize(
    "options",
    [
        {"top_k": 0},
        {"top_k": True},
        {"router_temperature": 0},
        {"router_temperature": float("nan")},
        {"use_gks": 1},
        {"rng_seed": "x"},
        {"task_adapter_names": "task_0"},
    ],
)
def test_values_outside_the_fields_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"`{next(iter(options))}`"):
        ArrowConfig(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"arrow_config": ArrowConfig()}, "names no experts in `task_adapter_names`"),
        (
            {"arrow_config": ArrowConfig(task_adapter_names=["a"], use_gks=True)},
            "`use_gks` subtracts",
        ),
        ({"target_modules": ["embed_tokens"]}, "routes what linear layers that run see"),
        ({"lora_bias": True}, "no pair of its own for `lora_bias`"),
    ],
)
def test_a_router_that_does_not_fit_is_refused(options: dict[str, Any], message: str) -> None:
    named = {"arrow_config": ArrowConfig(task_adapter_names=["a"]), "target_modules": TARGETS}
    with pytest.raises(TargetError, match=message):
        multigraft.get_peft_model(base(), LoraConfig(**(named | options)))


def test_a_router_on_conv1d_agrees_with_the_formula(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=40, n_embd=16, n_layer=1, n_head=2, n_positions=16)
    model = multigraft.get_peft_model(
        transformers.GPT2LMHeadModel(config), LoraConfig(r=2, target_modules=["c_fc"]), "a"
    )
    arrow = ArrowConfig(task_adapter_names=["a"])
    model.add_adapter("router", LoraConfig(r=2, target_modules=["c_fc"], arrow_config=arrow))
    with torch.no_grad():
        for parameter in model.roster.parameters("a"):
            parameter.normal_()
        expected = model.eval()(IDS).logits
        model.set_adapter("router")
        near(model(IDS).logits, expected)  # one expert has the whole weight
