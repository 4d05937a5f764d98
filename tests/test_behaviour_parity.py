"""Behaviour, side by side with the real PEFT: outputs, gradients, merges, targets, states."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import multigraft
from multigraft import AdaptedLayer, TargetError
from tests import oracle
from tests.oracle import ARCHITECTURES, Net, Pair, add_to_both, build, graft_pair, output, quiet

KINDS = ["emb", "lin0", "turned", "conv1", "conv2", "conv3", "lin1"]
OPTIONS: dict[str, dict[str, Any]] = {
    "defaults of every architecture": {"target_modules": "all-linear"},
    "rslora": {"target_modules": "all-linear", "use_rslora": True, "r": 3, "lora_alpha": 5},
    "biased": {"target_modules": "all-linear", "lora_bias": True, "r": 2},
    "biases": {"target_modules": "all-linear", "bias": "lora_only", "r": 2},
}
PAIRS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    f"{name}, {what}": (maker, options)
    for name, maker in ARCHITECTURES.items()
    for what, options in OPTIONS.items()
} | {
    "net, every kind": (Net, {"target_modules": KINDS, "r": 4}),
    "net, all biases": (Net, {"target_modules": KINDS, "r": 4, "bias": "all"}),
    "net, saved": (Net, {"target_modules": ["lin0"], "modules_to_save": ["head", "conv1"]}),
    "gemma, embedding": (oracle.gemma, {"target_modules": ["embed_tokens", "v_proj"]}),
}
every_pair = pytest.mark.parametrize(("maker", "options"), PAIRS.values(), ids=PAIRS)


def gradients(model: Any) -> dict[str, Tensor]:
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def train_step(pair: Pair) -> None:
    for model in (pair.ours, pair.theirs):
        model.zero_grad()
        output(model, pair.batch).float().square().mean().backward()


def assert_same_gradients(pair: Pair, atol: float = 1e-6, rtol: float = 1e-4) -> None:
    ours, theirs = gradients(pair.ours), gradients(pair.theirs)
    assert ours.keys() == theirs.keys()
    assert any(bool(g.abs().max() > 0) for g in ours.values())
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], atol=atol, rtol=rtol, msg=name)


@every_pair
def test_outputs_are_equal(maker: Callable[[], nn.Module], options: dict[str, Any]) -> None:
    pair = graft_pair(maker, options)
    pair.assert_equal(atol=2e-6)


@every_pair
def test_gradients_are_equal(maker: Callable[[], nn.Module], options: dict[str, Any]) -> None:
    pair = graft_pair(maker, options)
    train_step(pair)
    if options.get("bias", "none") == "none":
        assert_same_gradients(pair)
        return
    # PEFT trains the base's own biases; ours are the adapter's copies, with the same gradients.
    ours, theirs = gradients(pair.ours), gradients(pair.theirs)
    copies = {
        n.replace(".bias_copy_bias.default", ".base_layer.bias"): g
        for n, g in ours.items()
        if ".bias_copy_" in n
    }
    plain = {n for n in theirs if n.endswith("bias") and "lora_" not in n}
    assert {n.replace(".base_layer", "") for n in copies} == {
        n.replace(".base_layer", "") for n in plain
    }
    renamed = {n.replace(".base_layer", ""): g for n, g in copies.items()}
    for name in plain:
        own = renamed[name.replace(".base_layer", "")]
        torch.testing.assert_close(own, theirs[name], atol=1e-6, rtol=1e-4, msg=name)


@every_pair
def test_merged_models_are_equal(maker: Callable[[], nn.Module], options: dict[str, Any]) -> None:
    if "net, every kind" and options.get("target_modules") == KINDS:
        # A grouped convolution has no merged form for a dense A (PEFT fails on it as well).
        options = options | {"target_modules": [k for k in KINDS if k != "conv2"]}
    if options.get("lora_bias") and maker is not oracle.gpt2:
        # Not every linear layer of these has a bias to merge into: both libraries refuse.
        return
    pair = graft_pair(maker, options)
    with quiet():
        theirs = pair.theirs.merge_and_unload().state_dict()
    ours = pair.ours.merge_and_unload().state_dict()
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], atol=1e-6, rtol=1e-5, msg=name)


@every_pair
def test_counts_of_parameters_are_equal(
    maker: Callable[[], nn.Module], options: dict[str, Any]
) -> None:
    pair = graft_pair(maker, options, fill=False)
    trainable, total = pair.ours.get_nb_trainable_parameters()
    copies = sum(
        p.numel() for n, p in pair.ours.named_parameters() if ".bias_copy_" in n
    )  # PEFT has no copies, and trains the base's own
    assert (trainable, total - copies) == pair.theirs.get_nb_trainable_parameters()


@pytest.mark.parametrize("task", [None, "CAUSAL_LM"])
def test_parameter_names_in_memory_are_equal(task: str | None) -> None:
    options = {"target_modules": ["embed_tokens", "q_proj"], "modules_to_save": ["norm"]}
    pair = graft_pair(oracle.llama, options | {"task_type": task}, fill=False)
    names = [{n for n, _ in m.named_parameters()} for m in (pair.ours, pair.theirs)]
    # A module that is saved has its base copy under our wrapper's usual name.
    names[0] = {n.replace(".norm.base_layer.", ".norm.original_module.") for n in names[0]}
    assert names[0] == names[1]
    trainable = [
        {n for n, p in m.named_parameters() if p.requires_grad} for m in (pair.ours, pair.theirs)
    ]
    assert trainable[0] == trainable[1]


# -- targets ------------------------------------------------------------------------------------


def targets(maker: Callable[[], nn.Module], options: dict[str, Any]) -> tuple[Any, Any]:
    """The base paths that each library adapts, or None where it refuses."""
    found: list[Any] = []
    with quiet():
        try:
            ours = multigraft.get_peft_model(build(maker), oracle.our_config(options))
            found.append(oracle.our_sites(ours))
        except TargetError:
            found.append(None)
        try:
            theirs = peft.get_peft_model(build(maker), oracle.peft_config(options))
            found.append(oracle.peft_sites(theirs))
        except (ValueError, TypeError):
            found.append(None)
    return found[0], found[1]


def leaf_names(maker: Callable[[], nn.Module]) -> list[str]:
    return sorted({n.rpartition(".")[2] for n, _ in build(maker).named_modules() if n} - {"0", "1"})


def paths(maker: Callable[[], nn.Module]) -> list[str]:
    return [n for n, m in build(maker).named_modules() if isinstance(m, nn.Linear)]


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_target_sets_are_equal_for_any_names(data: st.DataObject) -> None:
    maker = data.draw(st.sampled_from([oracle.llama, oracle.bert_classifier, oracle.t5]))
    leaves = st.sampled_from(leaf_names(maker))
    exact = st.sampled_from(paths(maker))
    options: dict[str, Any] = {"task_type": data.draw(st.sampled_from([None, "SEQ_CLS"]))}
    layered = data.draw(st.booleans()) and maker is not oracle.t5
    names = st.lists(leaves if layered else leaves | exact, min_size=1, max_size=3, unique=True)
    options["target_modules"] = data.draw(st.just("all-linear") | st.none() | names)
    if data.draw(st.booleans()):
        options["exclude_modules"] = data.draw(st.lists(leaves, min_size=1, max_size=2))
    if layered and options["target_modules"] != "all-linear":
        options["layers_to_transform"] = data.draw(st.sampled_from([0, [1], [0, 1]]))
    ours, theirs = targets(maker, options)
    assert ours == theirs


@pytest.mark.parametrize("maker", ARCHITECTURES.values(), ids=ARCHITECTURES)
@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": "all-linear"},
        {"target_modules": "ALL-LINEAR"},
        {"target_modules": r".*(query|q_proj|c_attn|lin\d|SelfAttention\.q)"},
        {"target_modules": "all-linear", "exclude_modules": r".*(0|lin0).*"},
        {"target_modules": "all-linear", "task_type": "SEQ_CLS"},
        {"target_modules": None},
        {"target_modules": ["nothing_of_that_name"]},
        {"target_modules": ["norm", "LayerNorm", "ln_1", "layer_norm", "input_layernorm"]},
    ],
    ids=str,
)
def test_target_sets_are_equal(maker: Callable[[], nn.Module], options: dict[str, Any]) -> None:
    ours, theirs = targets(maker, options)
    assert ours == theirs


# -- several adapters ---------------------------------------------------------------------------


def three_adapters(maker: Callable[[], nn.Module] = oracle.llama) -> Pair:
    task = "SEQ_2_SEQ_LM" if maker is oracle.t5 else "CAUSAL_LM"
    pair = graft_pair(maker, {"target_modules": "all-linear", "r": 2, "task_type": task})
    one = {"llama": ["q_proj"], "t5": ["wi", "q"]}[maker.__name__]
    add_to_both(pair, "b", {"target_modules": one, "r": 3, "task_type": task}, seed=1)
    add_to_both(pair, "c", {"target_modules": "all-linear", "r": 2, "use_rslora": True}, seed=2)
    return pair


NAMES = ["b", "__base__", "c", "default", "c"]


@pytest.mark.parametrize("maker", [oracle.llama, oracle.t5])
def test_mixed_batches_are_equal(maker: Callable[[], nn.Module]) -> None:
    pair = three_adapters(maker)
    pair.batch = oracle.inputs(pair.ours, rows=5)
    whole = pair.assert_equal(adapter_names=NAMES)
    pair.ours.set_adapter("b")
    torch.testing.assert_close(whole[:1], pair.outputs()[0][:1])


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"num_beams": 2, "use_cache": False}])
@pytest.mark.parametrize("maker", [oracle.llama, oracle.t5])
def test_mixed_batches_generate_the_same_tokens(
    maker: Callable[[], nn.Module], options: dict[str, Any]
) -> None:
    pair = three_adapters(maker)
    ids = oracle.inputs(pair.ours, rows=5)["input_ids"]
    call = {"input_ids": ids, "max_new_tokens": 4, "do_sample": False, "min_new_tokens": 4}
    ours, theirs = (
        m.generate(**call, **options, adapter_names=NAMES) for m in (pair.ours, pair.theirs)
    )
    assert torch.equal(ours, theirs)
    base = pair.ours.generate(**call, **options, adapter_names=["__base__"] * 5)
    assert not torch.equal(ours, base)


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
    base = output(build(oracle.llama), pair.batch)
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


# -- precision and training ---------------------------------------------------------------------


@pytest.mark.parametrize("autocast_adapter", [True, False])
def test_half_precision_bases_agree_within_rounding(autocast_adapter: bool) -> None:
    options = {"target_modules": "all-linear", "r": 4}
    models = []
    for library, config in (
        (multigraft, oracle.our_config(options)),
        (peft, oracle.peft_config(options)),
    ):
        base = build(oracle.llama).to(torch.bfloat16)
        model = library.get_peft_model(base, config, autocast_adapter_dtype=autocast_adapter)
        models.append(model.eval())
    pair = Pair(*models, oracle.inputs(models[0]))
    oracle.same_weights(pair)
    dtypes = [{p.dtype for n, p in m.named_parameters() if "lora_" in n} for m in models]
    assert dtypes[0] == dtypes[1] == {torch.float32 if autocast_adapter else torch.bfloat16}
    ours, theirs = pair.outputs()
    assert ours.dtype == theirs.dtype == torch.bfloat16
    scale = theirs.float().abs().max()
    assert (ours.float() - theirs.float()).abs().max() < 0.05 * scale


def test_autocast_agrees_within_rounding() -> None:
    pair = graft_pair(Net, {"target_modules": KINDS, "r": 4})
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = pair.outputs()
    assert ours.dtype == theirs.dtype == torch.bfloat16
    exact = pair.outputs()[0]
    assert (ours.float() - theirs.float()).abs().max() < 0.05 * exact.abs().max()
    assert (ours.float() - exact).abs().max() < 0.05 * exact.abs().max()


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant: bool) -> None:
    pair = graft_pair(oracle.llama, {"target_modules": "all-linear", "r": 2})
    train_step(pair)
    plain = gradients(pair.ours)
    for model in (pair.ours, pair.theirs):
        model.train()
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    train_step(pair)
    assert_same_gradients(pair)
    for name, value in gradients(pair.ours).items():
        torch.testing.assert_close(value, plain[name], atol=1e-6, rtol=1e-4)


def test_a_base_that_checkpoints_gets_gradients_without_further_ado() -> None:
    base = build(oracle.llama)
    base.gradient_checkpointing_enable({"use_reentrant": True})
    ours = multigraft.get_peft_model(base, oracle.our_config({"target_modules": ["q_proj"]}))
    ours.train()
    output(ours, oracle.inputs(ours)).square().mean().backward()
    assert len(gradients(ours)) == 4


def test_dropout_with_the_same_seed_gives_the_same_numbers() -> None:
    pair = graft_pair(oracle.llama, {"target_modules": "all-linear", "lora_dropout": 0.4})
    add_to_both(pair, "b", {"target_modules": "all-linear", "lora_dropout": 0.2})
    results = []
    for model in (pair.ours, pair.theirs):
        model.base_model.set_adapter(["default", "b"])
        model.train()
        torch.manual_seed(11)
        results.append(output(model, pair.batch))
    torch.testing.assert_close(*results, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(results[0], output(pair.ours.eval(), pair.batch), atol=1e-3)


def test_an_epoch_of_training_ends_at_the_same_weights() -> None:
    pair = graft_pair(oracle.llama, {"target_modules": "all-linear", "r": 2})
    for model in (pair.ours, pair.theirs):
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(trained, lr=0.5)
        for _ in range(5):
            optimizer.zero_grad()
            output(model, pair.batch).square().mean().backward()
            optimizer.step()
    ours = multigraft.get_peft_model_state_dict(pair.ours)
    theirs = oracle.peft_state(pair.theirs)
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], atol=1e-5, rtol=1e-4)


def test_a_scaled_embedding_scales_the_update_too() -> None:
    pair = graft_pair(oracle.gemma, {"target_modules": ["embed_tokens"], "r": 3})
    (layer,) = (m for m in pair.ours.modules() if isinstance(m, AdaptedLayer))
    assert float(layer.base_layer.embed_scale) == 4.0
    ids = pair.batch["input_ids"]
    state = multigraft.get_peft_model_state_dict(pair.ours)
    A, B = (next(v for k, v in state.items() if k.endswith(end)) for end in ("_A", "_B"))
    update = (B @ A).T[ids] * layer.scaling["default"] * 4.0
    torch.testing.assert_close(layer(ids), layer.base_layer(ids) + update)
    pair.assert_equal()
