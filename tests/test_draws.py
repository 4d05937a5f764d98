"""An adapter drops in company what it drops alone: its gradients are the same to rounding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import multigraft
from multigraft import PeftModel, RoutingError, UnsupportedError, draws
from multigraft.draws import Draw, per_adapter
from tests.company import EVERY, Own, adapted, alone, check, llama, lora, together

PARTS = st.builds(
    lambda rank, p, rows, width, alpha: Own(lora(rank, p, lora_alpha=alpha), rows, width),
    st.integers(1, 3),
    st.sampled_from([0.0, 0.1, 0.5]),
    st.integers(1, 3),
    st.integers(2, 6),
    st.sampled_from([2, 5]),
)


@settings(max_examples=15)
@given(st.one_of([st.lists(PARTS, min_size=n, max_size=n) for n in (1, 3, 8)]))
def test_gradients_in_company_are_those_alone(owns: list[Own]) -> None:
    check(llama([own.config for own in owns]), owns)


@pytest.mark.parametrize("rate", [0.25, 0.0])
def test_rows_of_equal_number_run_in_one_node_for_all_layers_of_one_input(
    rate: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    owns = [Own(lora(1), 2, 5), Own(lora(3), 2, 3), Own(lora(2, rate), 2, 4)]
    model, seen = llama([own.config for own in owns]), []
    from multigraft import kernels

    real = kernels.adapted_linears

    def watch(x: Tensor, parts: Any, *more: Any) -> Any:
        seen.append(len(parts))
        return real(x, parts, *more)

    monkeypatch.setattr(kernels, "adapted_linears", watch)
    together(model, owns)
    assert seen == [3, 1, 2, 1] * 2
    check(model, owns)


def options(kind: str) -> Any:
    few = ["q_proj", "down_proj"]
    return {
        "DoRA": lora(use_dora=True),
        "rsLoRA": lora(use_rslora=True),
        "lora_bias": lora(lora_bias=True),
        "KaSA": lora(kasa_config=multigraft.KasaConfig()),
        "VeLoRA": lora(velora_config=multigraft.VeloraConfig()),
        "MonteCLoRA": lora(monteclora_config=multigraft.MontecloraConfig()),
        "QALoRA": lora(use_qalora=True, qalora_group_size=4),
        "HiRA": multigraft.HiraConfig(r=2, target_modules=EVERY, hira_dropout=0.5),
        "LoHa": multigraft.LoHaConfig(
            r=2, target_modules=EVERY, rank_dropout=0.5, module_dropout=0.3
        ),
        "LoKr": multigraft.LoKrConfig(r=2, target_modules=EVERY, rank_dropout=0.5),
        "VeRA": multigraft.VeraConfig(r=2, target_modules=few, vera_dropout=0.5),
        "AdaLoRA": multigraft.AdaLoraConfig(
            init_r=3, target_r=2, total_step=9, target_modules=EVERY, lora_dropout=0.5
        ),
        "OFT": multigraft.OFTConfig(
            oft_block_size=4, target_modules=few, module_dropout=0.6, use_cayley_neumann=False
        ),
        "saved module": lora(modules_to_save=["lm_head"]),
    }[kind]


@pytest.mark.parametrize(
    "kind",
    [
        *("DoRA", "rsLoRA", "lora_bias", "KaSA", "VeLoRA", "MonteCLoRA", "QALoRA", "HiRA", "LoHa"),
        *("LoKr", "VeRA", "AdaLoRA", "OFT", "saved module"),
    ],
)
def test_every_method_draws_in_company_what_it_draws_alone(kind: str) -> None:
    owns = [Own(lora(), 2, 6), Own(options(kind), 3, 4), Own(lora(1, 0.1), 1, 5)]
    check(llama([own.config for own in owns]), owns)


@pytest.mark.parametrize("kind", ["LoRA", "DoRA", "OFT"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints_run_again_with_the_same_draws(kind: str, reentrant: bool) -> None:
    config = lora(p=0.25) if kind == "LoRA" else options(kind)
    owns = [Own(lora(), 2, 6), Own(config, 3, 4)]
    model = llama([own.config for own in owns])
    plain = together(model, owns)
    model.get_base_model().gradient_checkpointing_enable(
        gradient_checkpointing_kwargs={"use_reentrant": reentrant}
    )
    model.get_base_model().enable_input_require_grads()
    torch.manual_seed(7)  # what is drawn besides has nothing to do with it
    for one, other in zip(plain, together(model, owns), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)
    check(model, owns)


def test_a_mask_that_is_computed_again_is_the_one_that_is_stored(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    owns = [Own(lora(), 2, 6), Own(lora(3, 0.25), 2, 4)]
    model = llama([own.config for own in owns])
    mixed = together(model, owns)
    from multigraft import kernels

    monkeypatch.setattr(kernels, "can_regenerate", lambda x, rank: True)
    for index, own in enumerate(owns):
        torch.testing.assert_close(alone(model, index, own), mixed[index], rtol=1e-9, atol=1e-12)


def test_a_base_layer_that_is_called_changes_no_draw() -> None:
    owns = [Own(lora(), 2, 6), Own(lora(3, 0.25), 2, 4)]
    model = llama([own.config for own in owns])
    plain = together(model, owns)
    for layer in model.roster.layers["a0"]:
        layer.base_layer.register_forward_hook(lambda *_: None)
    for index, own in enumerate(owns):
        torch.testing.assert_close(alone(model, index, own), plain[index], rtol=1e-9, atol=1e-12)
    check(model, owns)


def test_one_adapter_that_is_named_for_each_row_is_one_that_is_active() -> None:
    own = Own(lora(), 3, 4)
    model = llama([own.config])
    torch.testing.assert_close(alone(model, 0, own), alone(model, 0, own, routed=True))


class Odd(nn.Module):
    """Rows that are flattened, a layer that runs twice, and one that reads what all rows share."""

    def __init__(self) -> None:
        super().__init__()
        self.flat, self.twice, self.shared = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        """``(rows, tokens, 4)`` to the same; tokens see their own alone."""
        y = self.flat(x.flatten(0, 1)).view(x.shape)
        y = self.twice(self.twice(y).tanh()).tanh()
        one = torch.arange(8.0, dtype=x.dtype).view(1, 2, 4)
        return y + self.shared(one).tanh().sum(1, keepdim=True) + self.twice(y[:, :1])


def test_rows_are_known_flattened_shared_and_in_layers_that_run_again() -> None:
    config = lora(target_modules=["flat", "twice", "shared"])
    model = adapted(Odd(), [config, config])
    sizes = {"a0": (3, 5), "a1": (2, 2)}
    x = torch.randn(5, 5, 4, dtype=torch.float64)
    given = {name: Draw(seed, *size) for seed, (name, size) in enumerate(sizes.items())}
    with per_adapter(given):
        y = model(x, adapter_names=["a0"] * 3 + ["a1"] * 2)
    for start, (name, (rows, width)) in zip((0, 3), sizes.items(), strict=True):
        model.set_adapter(name)
        with per_adapter({name: given[name]}):
            own = model(x[start : start + rows, :width])
        torch.testing.assert_close(y[start : start + rows, :width], own)


def kept_by(model: PeftModel, x: Tensor, *calls: Draw) -> list[Tensor]:
    """What of a linear layer's input one adapter lets through, call by call."""
    found = []
    with torch.no_grad():
        for given in calls:
            with per_adapter({"a0": given}):
                found.append(model(x) != 0)
    return found


@pytest.fixture
def through() -> PeftModel:
    """A layer whose adapter gives what it sees."""

    class One(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(40, 40, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            """(rows, tokens, 40) to the same."""
            return self.layer(x)

    model = adapted(One(), [lora(40, 0.5, lora_alpha=40, target_modules=["layer"])])
    with torch.no_grad():
        model.get_base_model().layer.base_layer.weight.zero_()
        for parameter in model.roster.parameters("a0"):
            parameter.copy_(torch.eye(40))
    return model


def test_so_many_are_dropped_and_rows_seeds_and_calls_differ(through: PeftModel) -> None:
    x = torch.ones(3, 50, 40, dtype=torch.float64)
    first, again, other = kept_by(through, x, Draw(1, 3), Draw(1, 3), Draw(2, 3))
    assert torch.equal(first, again)
    with torch.no_grad(), per_adapter({"a0": Draw(1, 3)}):
        twice = [through(x) != 0, through(x) != 0]
    assert torch.equal(twice[0], first)
    for one, two in [(first, other), (first, twice[1]), (first[0], first[1]), (first[0], first[2])]:
        assert abs((one == two).double().mean() - 0.5) < 0.05
    assert abs(first.double().mean() - 0.5) < 0.05


def test_layers_of_one_input_may_drop_at_rates_of_their_own() -> None:
    owns = [Own(lora(), 2, 6), Own(lora(3, 0.25), 2, 4)]
    model = llama([own.config for own in owns])
    plain = together(model, owns)
    for layer in model.roster.layers["a1"]:
        if layer.path.endswith(("k_proj", "up_proj")):
            layer.grafts["a1"][0].method.dropout = 0.75
    check(model, owns)
    assert not torch.equal(together(model, owns)[1][0], plain[1][0])


def test_torchs_generator_is_left_as_it_was(through: PeftModel) -> None:
    model = adapted(through.unload(), [lora(2, 0.5, target_modules=["layer"], use_dora=True)])
    x, before = torch.ones(3, 2, 40, dtype=torch.float64), torch.get_rng_state()
    for each in (through, model):
        kept_by(each, x, Draw(1, 3))
    assert torch.equal(torch.get_rng_state(), before)
    with torch.no_grad():
        model(x)
    assert not torch.equal(torch.get_rng_state(), before)


def test_a_mixed_batch_block_keeps_nothing_from_without_a_block_of_draws() -> None:
    model = llama([lora(), lora()])
    ids = torch.ones(2, 3, dtype=torch.long)
    with torch.no_grad(), model.mixed_batch(["a0", "a1"]):
        for _ in range(2):
            found = []
            for _ in range(2):
                with per_adapter({"a0": Draw(1, 1), "a1": Draw(2, 1)}):
                    found.append(model(input_ids=ids).logits)
            assert torch.equal(*found)
            assert not torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)


def test_evaluation_draws_nothing_and_needs_no_draw(through: PeftModel) -> None:
    x = torch.ones(3, 2, 40, dtype=torch.float64)
    with per_adapter({}):
        assert (through.eval()(x) == 1).all()
        with pytest.raises(RoutingError, match="adapter `a0` acts in this block and has no draw"):
            through.train()(x)


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (Draw(1, 2), r"a0` has 3 rows of the batch and a draw of 2.*Draw\(seed, rows=3\)"),
        (Draw(1, 3, 9), r"`width` \(=9\) that does not suit a batch of 2 tokens"),
        (Draw(1, 3, 1), r"`width` \(=1\) that does not suit a batch of 2 tokens"),
    ],
)
def test_draws_that_are_not_those_of_the_call_are_refused(
    through: PeftModel, draw: Draw, message: str
) -> None:
    x = torch.ones(3, 2, 40, dtype=torch.float64)
    with per_adapter({"a0": draw}), pytest.raises(RoutingError, match=message):
        through(x)
    assert draws.block() is None


def test_rows_of_several_adapters_are_refused() -> None:
    model = llama([lora(), lora()])
    ids = torch.ones(2, 3, dtype=torch.long)
    with per_adapter({"a0": Draw(1, 2), "a1": Draw(2, 2)}):
        with pytest.raises(RoutingError, match="can be one adapter's alone"):
            model(ids, adapter_names=[["a0", "a1"], "a0"])
        model.base_model.set_adapter(["a0", "a1"])
        with pytest.raises(RoutingError, match="can be one adapter's alone"):
            model(ids)
        with pytest.raises(RoutingError, match="can be one adapter's alone"):
            model.get_base_model()(ids)
        model(ids, adapter_names=["__base__", "__base__"])


def test_a_step_that_is_compiled_is_refused(through: PeftModel) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(through, backend="eager", fullgraph=True)
    x = torch.ones(3, 2, 40, dtype=torch.float64)
    with per_adapter({"a0": Draw(1, 3)}), pytest.raises(Exception, match="Run this model eagerly"):
        compiled(x)
    assert issubclass(UnsupportedError, ValueError)
    compiled(x)


def test_experts_of_one_parameter_draw_in_company_what_they_draw_alone() -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    shape = MixtralConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=3,
        experts_implementation="eager",
    )
    config = lora(target_modules=["q_proj"], target_parameters=["experts.gate_up_proj"])
    owns = [Own(config, 2, 6), Own(config, 1, 4)]
    check(adapted(MixtralForCausalLM(shape), [config, config]), owns)
