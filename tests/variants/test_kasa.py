"""KaSA against PEFT, which changes the base for good; here the base keeps its bits."""

from __future__ import annotations

import copy
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import multigraft
from multigraft import ConfigError, KasaConfig, LoraConfig, TargetError, UnsupportedError
from tests import oracle
from tests.laws import fingerprint
from tests.methods.against_peft import filled
from tests.variants.single import AgreesInSingle, Single

KASA = {"r": 3, "lora_alpha": 6, "kasa_config": {"beta": 0.02, "gamma": 0.05}}
CLOSE = {"atol": 2e-5, "rtol": 2e-5}


class TestKasa(AgreesInSingle):
    kind = "LoraConfig"
    cases: ClassVar = {
        "linear": Single("linear", KASA),
        "no bias": Single("linear wide", KASA),
        "rsLoRA": Single("linear", KASA | {"use_rslora": True}),
        "dropout in evaluation": Single("linear", KASA | {"lora_dropout": 0.5}),
        "bias": Single("linear", KASA | {"lora_bias": True}),
    }


def net() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(9, 7), nn.Tanh(), nn.Linear(7, 8))


def adapted(base: nn.Module | None = None, fill: bool = True, **options: Any) -> Any:
    """The net with KaSA on its first layer, in float64."""
    chosen = {"r": 3, "lora_alpha": 6, "target_modules": ["0"], "kasa_config": {}} | options
    model = multigraft.get_peft_model((base or net()).double(), LoraConfig(**chosen)).double()
    if fill:
        state = multigraft.get_peft_model_state_dict(model)
        multigraft.set_peft_model_state_dict(model, filled(state, 0.4))
    return model.eval()


def truncated(W: Tensor, rank: int) -> Tensor:
    """W without its smallest singular values."""
    U, S, V = torch.linalg.svd(W, full_matrices=False)
    S[-rank:] = 0
    return (U * S) @ V


def test_a_new_adapter_is_the_base_without_its_smallest_singular_values() -> None:
    base = net().double()
    expected = copy.deepcopy(base)
    with torch.no_grad():
        expected[0].weight.copy_(truncated(base[0].weight, 3))
    x = torch.randn(5, 9, dtype=torch.float64)
    model = adapted(base, fill=False)
    torch.testing.assert_close(model(x), expected(x))


def test_the_base_keeps_its_bits_through_the_adapters_life() -> None:
    base = net().double().eval()
    before, x = fingerprint(base), torch.randn(5, 9, dtype=torch.float64)
    plain = base(x)
    model = adapted(base)
    assert not torch.allclose(model(x), plain)
    with model.disable_adapter():
        assert torch.equal(model(x), plain)
    model.merge_adapter()
    model.unmerge_adapter()
    model.unload()
    assert fingerprint(base) == before
    assert torch.equal(base(x), plain)


def test_it_stands_beside_a_plain_adapter_which_peft_refuses() -> None:
    model, x = adapted(), torch.randn(5, 9, dtype=torch.float64)
    alone = model(x)
    model.add_adapter("plain", LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
    assert torch.equal(model(x), alone)
    model.double().set_adapter("plain")
    beside = model(x)
    mixed = model(x, adapter_names=["default", "plain", "__base__", "plain", "default"])
    torch.testing.assert_close(mixed[[0, 4]], alone[[0, 4]])
    torch.testing.assert_close(mixed[[1, 3]], beside[[1, 3]])


def test_dropout_leaves_what_is_taken_out_whole() -> None:
    model = adapted(lora_dropout=0.5).train()
    x = torch.randn(5, 9, dtype=torch.float64)
    layer = model.get_base_model()[0]
    (graft,) = layer.all_grafts()
    A, B = graft.params["lora_A.weight"], graft.params["lora_B.weight"]
    values, W = graft.params["lora_diag"], layer.base_layer.weight
    torch.manual_seed(0)
    found = layer(x)
    torch.manual_seed(0)
    seen = nn.functional.dropout(x, 0.5)
    own = 2.0 * (seen @ A.T * values) @ B.T
    expected = x @ truncated(W.detach(), 3).T + layer.base_layer.bias + own
    torch.testing.assert_close(found, expected)


def test_the_loss_gets_the_regulariser_as_peft_gives_it() -> None:
    chosen = {"r": 3, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}
    config = chosen | {"kasa_config": {"beta": 0.3, "gamma": 0.2}}
    pair = oracle.graft_pair(oracle.llama, config)
    pair.batch["labels"] = pair.batch["input_ids"]
    pair.ours.train(), pair.theirs.train()
    ours, theirs = pair.ours(**pair.batch).loss, pair.theirs(**pair.batch).loss
    term = pair.theirs.base_model._get_kasa_loss()
    assert term > 1.0
    torch.testing.assert_close(ours, theirs + term, **CLOSE)
    ours.backward(), (theirs + term).backward()
    one, two = oracle.gradients(pair.ours), oracle.gradients(pair.theirs)
    assert one.keys() == two.keys()
    for name, gradient in one.items():
        torch.testing.assert_close(gradient, two[name], **CLOSE, msg=name)
    plain = pair.ours.eval()(**pair.batch).loss
    torch.testing.assert_close(plain, pair.theirs.eval()(**pair.batch).loss, **CLOSE)


@pytest.mark.parametrize(
    "layer",
    [nn.Embedding(12, 8), nn.Conv2d(4, 8, (3, 2)), nn.Conv1d(6, 8, 3)],
    ids=["embedding", "conv2d", "conv1d"],
)
def test_it_merges_to_what_it_runs_on_kinds_of_layers_that_peft_lacks(layer: nn.Module) -> None:
    model = adapted(nn.Sequential(layer))
    x = torch.randn(2, *{3: (6, 7), 4: (4, 6, 5)}.get(layer.weight.dim(), ()), dtype=torch.float64)
    x = torch.randint(12, (2, 3)) if isinstance(layer, nn.Embedding) else x
    expected = model(x)
    torch.testing.assert_close(model.merge_and_unload()(x), expected)


def test_loading_draws_no_random_numbers(tmp_path: Any) -> None:
    model = adapted().float()
    model.save_pretrained(tmp_path)
    base = net()
    state = torch.random.get_rng_state()
    again = multigraft.PeftModel.from_pretrained(base, tmp_path)
    assert torch.equal(torch.random.get_rng_state(), state)
    x = torch.randn(5, 9)
    torch.testing.assert_close(again(x), model(x), **CLOSE)


def test_files_hold_nothing_of_the_base() -> None:
    keys = {key.rsplit("0.", 1)[1] for key in multigraft.get_peft_model_state_dict(adapted())}
    assert keys == {"lora_A.weight", "lora_B.weight", "lora_diag"}


@pytest.mark.parametrize("option", ["beta", "gamma"])
@pytest.mark.parametrize("value", [-1e-3, float("inf"), "much"])
def test_weights_below_zero_are_refused(option: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"`{option}` .* must be a number of at least 0"):
        KasaConfig(**{option: value})


def test_unknown_options_are_named() -> None:
    with pytest.raises(ConfigError, match=r"`kasa_config` has no option `bata`.*beta"):
        LoraConfig(kasa_config={"bata": 1.0})
    with pytest.raises(ConfigError, match=r"`kasa_config` .* must be a KasaConfig"):
        LoraConfig(kasa_config=3)


def test_a_rank_that_leaves_nothing_of_the_weight_is_refused() -> None:
    base = net()
    before = fingerprint(base)
    with pytest.raises(TargetError, match=r"rank \(=7\) must be below 7.*lower `r`"):
        multigraft.get_peft_model(base, LoraConfig(r=7, target_modules=["0"], kasa_config={}))
    assert fingerprint(base) == before


def test_it_is_one_variant_among_others() -> None:
    with pytest.raises(UnsupportedError, match="`dora`, `kasa`"):
        LoraConfig(kasa_config={}, use_dora=True)
