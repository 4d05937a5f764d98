"""EVA with data: directions, ranks, and PEFT beside it on the same batches."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn

import multigraft
from multigraft import (
    ConfigError,
    DataError,
    EvaConfig,
    LoraConfig,
    MultigraftWarning,
    PeftModel,
    StateError,
    TargetError,
    get_eva_state_dict,
    get_peft_model,
    initialize_lora_eva_weights,
)
from tests.calibration.test_loftq import quantised
from tests.initialisations.nets import batch, net, off, options
from tests.laws import fingerprint
from tests.oracle import quiet

LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "down_proj", "up_proj"]
QUIET = {"show_progress_bar": False}
ALL_ROWS = {"prepare_model_inputs_fn": None, "prepare_layer_inputs_fn": None}


def llama() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
    )
    return transformers.LlamaForCausalLM(config).eval()


def batches(count: int = 3) -> list[dict[str, Tensor]]:
    """Token ids with padding, and labels of which a fifth do not count."""
    source = torch.Generator().manual_seed(1)
    found = []
    for _ in range(count):
        ids = torch.randint(64, (4, 16), generator=source)
        mask = torch.ones_like(ids)
        mask[0, 12:] = 0
        is_left_out = torch.rand(4, 16, generator=source) < 0.2
        found.append(
            {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(is_left_out, -100)}
        )
    return found


def both(eva: dict[str, Any], **more: Any) -> tuple[Any, Any]:
    """The same model and config in this library and in PEFT."""
    given: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": LAYERS} | more
    given["init_lora_weights"] = "eva"
    mine = get_peft_model(llama(), LoraConfig(**copy.deepcopy(given), eva_config=EvaConfig(**eva)))
    with quiet():
        config = peft.LoraConfig(**given, eva_config=peft.EvaConfig(**eva))
        return mine.eval(), peft.get_peft_model(llama(), config).eval()


CASES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"rho": 2.0}, {}),
    ({"rho": 2.0}, {"rank_pattern": {"q_proj": 3}}),
    ({"rho": 1.0, "use_label_mask": False}, {}),
    ({"rho": 1.5, "adjust_scaling_factors": False, "tau": 0.999}, {}),
    ({"rho": 2.0}, {"use_rslora": True, "alpha_pattern": {"o_proj": 4}}),
]


@pytest.mark.parametrize(("eva", "more"), CASES)
def test_directions_ranks_and_scalings_are_pefts(eva: dict[str, Any], more: dict[str, Any]) -> None:
    mine, theirs = both(eva, **more)
    found = get_eva_state_dict(mine, batches(), **QUIET)
    with quiet():
        expected = peft.get_eva_state_dict(theirs, batches(), show_progress_bar=False)
    assert found.keys() == expected.keys()
    for name, directions in expected.items():
        torch.testing.assert_close(found[name].float(), directions.float(), atol=1e-5, rtol=0)
    initialize_lora_eva_weights(mine, eva_state_dict=found)
    with quiet():
        peft.initialize_lora_eva_weights(theirs, eva_state_dict=expected)
    config, other = mine.peft_config["default"], theirs.peft_config["default"]
    assert config.rank_pattern == other.rank_pattern
    assert config.alpha_pattern == other.alpha_pattern
    states = multigraft.get_peft_model_state_dict(mine), peft.get_peft_model_state_dict(theirs)
    assert states[0].keys() == states[1].keys()
    for key, value in states[1].items():
        torch.testing.assert_close(states[0][key], value, atol=1e-5, rtol=0)


def test_whitened_directions_are_divided_once_where_layers_share_an_input() -> None:
    """PEFT divides in place, and so once for each of q, k and v, which it studies once."""
    plain = get_eva_state_dict(both({"rho": 1.0})[0], batches(), **QUIET)
    mine, theirs = both({"rho": 1.0, "whiten": True})
    found = get_eva_state_dict(mine, batches(), **QUIET)
    with quiet():
        expected = peft.get_eva_state_dict(theirs, batches(), show_progress_bar=False)
    layer = "base_model.model.model.layers.0"
    alone, shared = f"{layer}.mlp.down_proj", f"{layer}.self_attn.q_proj"
    torch.testing.assert_close(found[alone], expected[alone], atol=1e-5, rtol=0)
    factor = found[shared].norm(dim=1) / plain[shared].norm(dim=1)
    torch.testing.assert_close(
        expected[shared].norm(dim=1) / plain[shared].norm(dim=1), factor**3, atol=1e-5, rtol=1e-3
    )


def test_a_base_and_its_adapted_model_give_the_same_directions() -> None:
    model, _ = both({"rho": 2.0})
    adapted = get_eva_state_dict(model, batches(), **QUIET)
    plain = get_eva_state_dict(llama(), batches(), model.peft_config["default"], **QUIET)
    assert {name.removeprefix("base_model.model.") for name in adapted} == plain.keys()
    for name, directions in plain.items():
        assert torch.equal(adapted[f"base_model.model.{name}"], directions)


@torch.no_grad()
def test_it_begins_at_no_change_trains_and_reloads(tmp_path: Path) -> None:
    model, _ = both({"rho": 2.0})
    expected = llama()(**batches()[0]).logits
    initialize_lora_eva_weights(model, batches(), **QUIET)
    assert torch.equal(model(**batches()[0]).logits, expected)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(llama(), tmp_path).eval()
    assert torch.equal(again(**batches()[0]).logits, model(**batches()[0]).logits)
    with quiet():
        read = peft.PeftModel.from_pretrained(llama(), str(tmp_path)).eval()
    assert off(read(**batches()[0]).logits, model(**batches()[0]).logits) < 1e-5


def test_the_model_is_otherwise_as_before() -> None:
    model, _ = both({"rho": 2.0})
    model.train()
    model.get_base_model().model.layers[0].eval()
    before = fingerprint(model)
    get_eva_state_dict(model, batches(), **QUIET)
    assert fingerprint(model) == before


def small(eva: dict[str, Any] | None = None, **more: Any) -> Any:
    return get_peft_model(net(), LoraConfig(**options("eva", eva_config=eva, **more))).eval()


def run(model: nn.Module, x: Tensor) -> Any:
    return model(x)


def rows(count: int = 3) -> list[Tensor]:
    return [batch(40, seed) for seed in range(count)]


def given(model: Any, data: Any = None, **more: Any) -> dict[str, Tensor]:
    """Directions of a model whose batches are plain tensors."""
    data = rows() if data is None else data
    return get_eva_state_dict(model, data, forward_fn=run, **ALL_ROWS, **QUIET, **more)


def test_a_layer_that_explains_nothing_more_is_left_out() -> None:
    model = small({"rho": 3.0}, r=2, target_modules=["first", "second"])
    directions = {
        "first": torch.eye(4, 16),
        "second": torch.empty(0, 12),
    }
    initialize_lora_eva_weights(model, eva_state_dict=directions)
    config = model.peft_config["default"]
    assert config.target_modules == ["first"]
    assert config.rank_pattern == {"first": 4}
    assert type(model.get_base_model().second) is nn.Linear
    assert model.get_base_model().first.scaling["default"] == 3.0


def test_adapters_made_on_the_meta_device_are_filled() -> None:
    config = LoraConfig(**options("eva"))
    model = get_peft_model(net(), config, low_cpu_mem_usage=True).eval()
    initialize_lora_eva_weights(model, rows(), forward_fn=run, **ALL_ROWS, **QUIET)
    assert not any(p.is_meta for p in model.parameters())
    assert torch.equal(model(batch()), net()(batch()))


def test_a_quantised_base_trains_on_afterwards() -> None:
    """Evaluating some quantised layers lays their weights out without a backward."""
    config = LoraConfig(r=4, target_modules=["0", "1"], init_lora_weights="eva")
    model = get_peft_model(quantised(), config).train()
    data = [torch.randn(60, 64, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    initialize_lora_eva_weights(model, data, forward_fn=run, **ALL_ROWS, **QUIET)
    model(data[0]).square().sum().backward()
    assert all(p.grad is not None for p in model.roster.parameters("default"))


def test_functions_by_layer_choose_the_rows_that_count() -> None:
    seen = []

    def half(x: Any, context: Any, name: str) -> Tensor:
        seen.append((name, type(context)))
        return x[0][:20]

    model = small()
    name = "base_model.model.first"
    found = get_eva_state_dict(
        model,
        rows(),
        forward_fn=run,
        prepare_model_inputs_fn=lambda x, config: len(x),
        prepare_layer_inputs_fn={name: half},
        **QUIET,
    )
    assert set(seen) == {(name, int)}
    everything = given(model)
    assert not torch.equal(found[name], everything[name])
    assert torch.equal(found["base_model.model.second"], everything["base_model.model.second"])


def test_ranks_beyond_the_layers_inputs_are_not_asked_for() -> None:
    found = given(small({"rho": 4.0}, r=6))
    assert all(len(directions) <= 16 for directions in found.values())
    assert sum(map(len, found.values())) == 12


def test_rows_of_every_process_are_gathered(tmp_path: Path) -> None:
    alone = given(small())
    store = f"file://{tmp_path / 'store'}"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        assert all(torch.equal(given(small())[name], V) for name, V in alone.items())
        apart = given(small(), gather_distributed_inputs=False)
    finally:
        torch.distributed.destroy_process_group()
    assert all(torch.equal(apart[name], V) for name, V in alone.items())


BAD: list[tuple[Any, dict[str, Any], type[Exception], str]] = [
    (small, {"data": []}, DataError, "`dataloader` is empty"),
    (small, {"data": [batch(3)]}, DataError, r"no batch has as many rows .* \(8\)"),
    (lambda: small(), {"data": iter(rows(1))}, DataError, "cannot be iterated over twice"),
    (net, {}, ConfigError, r"`peft_config` \(=NoneType\) must be a LoraConfig"),
    (lambda: get_peft_model(net(), LoraConfig(**options(True))), {}, ConfigError, "must be a Lora"),
]


@pytest.mark.parametrize(("make", "more", "error", "message"), BAD)
def test_data_or_configs_that_cannot_mean_anything_are_refused(
    make: Any, more: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        given(make(), **more)


def test_a_batch_that_is_no_dictionary_is_refused_with_what_to_pass() -> None:
    with pytest.raises(DataError, match="pass prepare_model_inputs_fn=None"):
        get_eva_state_dict(small(), rows(), forward_fn=run, **QUIET)


def test_a_function_for_a_layer_that_is_not_there_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"\['third'\] are no linear layers of the adapter"):
        get_eva_state_dict(
            small(), rows(), forward_fn=run, prepare_layer_inputs_fn={"third": run}, **QUIET
        )


def test_a_layer_that_does_not_run_is_named_and_keeps_its_start() -> None:
    base = nn.ModuleDict({"net": net(), "idle": nn.Linear(4, 4)})
    base.forward = lambda x: base["net"](x)  # type: ignore[method-assign]
    config = LoraConfig(r=2, target_modules=["first", "idle"], init_lora_weights="eva")
    with pytest.warns(MultigraftWarning, match="idle did not run on the data"):
        found = given(base, peft_config=config)
    assert list(found) == ["net.first"]


@pytest.mark.parametrize(
    ("directions", "message"),
    [
        ({"third": torch.eye(4, 16)}, "`third` is no linear layer of the adapter"),
        ({"first": torch.eye(4, 15)}, r"directions \(4, 15\) of `first` must be \(rank, 16\)"),
        ({"first": torch.empty(0, 16)}, "no layer gets a rank"),
    ],
)
def test_directions_that_do_not_fit_leave_the_adapter_as_it_was(
    directions: dict[str, Tensor], message: str
) -> None:
    model = small()
    before = fingerprint(model)
    with pytest.raises(TargetError, match=message):
        initialize_lora_eva_weights(model, eva_state_dict=directions)
    assert fingerprint(model) == before


def test_states_in_which_it_cannot_begin_anew_are_refused() -> None:
    with pytest.raises(StateError, match=r"`model` \(=Net\) must be a PeftModel"):
        initialize_lora_eva_weights(net(), rows())
    with pytest.raises(ConfigError, match=r"`init_lora_weights` \(=True\) .* must be \"eva\""):
        initialize_lora_eva_weights(get_peft_model(net(), LoraConfig(**options(True))), rows())
    model = small()
    with pytest.raises(ConfigError, match="give `dataloader`, or the `eva_state_dict`"):
        initialize_lora_eva_weights(model)
    model.merge_adapter()
    with pytest.raises(StateError, match="is merged; call unmerge_adapter"):
        initialize_lora_eva_weights(model, eva_state_dict={"first": torch.eye(4, 16)})


@pytest.mark.parametrize("bad", [{"rho": 0.5}, {"tau": 1.5}, {"tau": -0.1}])
def test_options_out_of_range_are_refused_in_either_library(bad: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=f"`{next(iter(bad))}`"):
        EvaConfig(**bad)
    with pytest.raises(ValueError, match=next(iter(bad))):
        peft.EvaConfig(**bad)


def test_options_without_the_initialisation_have_no_effect_and_say_so() -> None:
    with pytest.warns(MultigraftWarning, match="`eva_config` has no effect without"):
        LoraConfig(eva_config={"rho": 3.0})
