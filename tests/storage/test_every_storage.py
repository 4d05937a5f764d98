"""What holds for every storage, and for an adapted model whichever its storage is."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from multigraft import LoraConfig, MultigraftWarning, PeftModel, UnsupportedError, get_peft_model
from multigraft.storage import storage_of
from tests.laws import bits_of, fingerprint
from tests.storage.cases import CASES, EXACT, LOSSY, REFUSED

WRITABLE = [*EXACT, *LOSSY]
HOOKED = [name for name in CASES if name.endswith("-hook")]
"""torch itself cannot copy these."""


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "merged into quantised", MultigraftWarning)
        yield


def bits(layer: nn.Module) -> list[bytes]:
    return [bits_of(t) for t in (*layer.parameters(), *layer.buffers())]


def values(shape: torch.Size, seed: int = 5) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.3


def distance(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


def net(name: str) -> nn.Sequential:
    case = CASES[name]
    return nn.Sequential(case.make(64, 128, seed=1), nn.Tanh(), case.make(128, 64, seed=2)).eval()


def batch(name: str) -> Tensor:
    return torch.randn(3, 64, generator=torch.Generator().manual_seed(3)).to(CASES[name].dtype)


def adapted(name: str) -> PeftModel:
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["0", "2"], init_lora_weights=False)
    torch.manual_seed(0)
    return get_peft_model(net(name), config)


# -- the storage itself ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_what_is_read_is_what_the_forward_uses(name):
    case = CASES[name]
    layer = case.make(64, 32).eval()
    x = batch(name)
    read = storage_of(layer).read(layer)
    expected = nn.functional.linear(x.float(), read.float(), layer.bias.float())
    # 8-bit layers round the input too; 4-bit ones compute in bfloat16 on some CPUs.
    assert distance(layer(x), expected) < (0.02 if case.dtype is torch.float32 else 0.01)


@pytest.mark.parametrize("name", WRITABLE)
def test_what_is_written_is_read_up_to_the_rounding_that_is_stated(name):
    case, layer = CASES[name], CASES[name].make(64, 32)
    storage = storage_of(layer)
    wanted = values(storage.read(layer).shape)
    storage.write(layer, wanted)
    assert distance(storage.read(layer), wanted) <= case.error


@pytest.mark.parametrize("name", WRITABLE)
def test_a_write_is_seen_by_the_forward(name):
    layer = CASES[name].make(64, 32).eval()
    x = batch(name)
    layer(x)
    storage = storage_of(layer)
    storage.write(layer, values(storage.read(layer).shape))
    expected = nn.functional.linear(x.float(), storage.read(layer).float(), layer.bias.float())
    assert distance(layer(x), expected) < 0.02


@pytest.mark.parametrize("name", WRITABLE)
def test_what_was_kept_gives_the_very_bits_back_to_the_same_objects(name):
    layer = CASES[name].make(64, 32)
    storage, before = storage_of(layer), fingerprint(layer)
    kept, read = storage.keep(layer), storage.read(layer).clone()
    storage.write(layer, values(read.shape))
    assert torch.equal(storage.read_kept(layer, kept), read)
    assert not torch.equal(storage.read(layer), read)
    for _ in range(2):  # what was kept stays good
        storage.give_back(layer, kept)
        assert fingerprint(layer) == before
        storage.write(layer, values(read.shape, seed=6))


@pytest.mark.parametrize("name", LOSSY)
def test_lossy_storages_say_so_and_lose(name):
    layer = CASES[name].make(64, 32)
    storage = storage_of(layer)
    wanted = values(storage.read(layer).shape)
    storage.write(layer, wanted)
    assert not storage.is_exact
    assert distance(storage.read(layer), wanted) > 1e-4


@pytest.mark.parametrize("name", EXACT)
def test_exact_storages_say_so(name):
    assert storage_of(CASES[name].make(64, 32)).is_exact


@pytest.mark.parametrize("name", [n for n in WRITABLE if n not in HOOKED])
def test_two_equal_layers_stay_apart(name):
    layer = CASES[name].make(64, 32)
    twin = copy.deepcopy(layer)
    before = bits(twin)
    storage_of(layer).write(layer, values(storage_of(layer).read(layer).shape))
    assert bits(twin) == before != bits(layer)


@pytest.mark.parametrize("name", REFUSED)
def test_a_refusal_says_what_and_what_to_do(name):
    layer = CASES[name].make(64, 32)
    before = bits(layer)
    reason = storage_of(layer).refusal(layer)
    assert reason is not None
    assert "torch.nn.utils" in reason
    assert "keep the adapter" in reason
    assert bits(layer) == before


# -- an adapted model -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_every_adapter_parameter_gets_its_gradient_and_no_base_parameter_does(name):
    model = adapted(name).train()
    model(batch(name)).float().square().mean().backward()
    for path, parameter in model.named_parameters():
        has = parameter.grad is not None and bool(parameter.grad.abs().sum() > 0)
        assert has == (".lora_" in path), path


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_the_dense_layers_that_are_read(name):
    model, x = adapted(name).train(), batch(name)
    model(x).float().square().mean().backward()
    dense = adapted("float32").train()
    ours, theirs = model.get_base_model(), dense.get_base_model()
    with torch.no_grad():
        for mine, its in ((ours[0], theirs[0]), (ours[2], theirs[2])):
            its.base_layer.weight.copy_(storage_of(mine.base_layer).read(mine.base_layer))
            its.base_layer.bias.copy_(mine.base_layer.bias)
            for group in ("lora_A", "lora_B"):
                its_weight = getattr(its, group)["default"].weight
                its_weight.copy_(getattr(mine, group)["default"].weight)
    dense(x.float()).square().mean().backward()
    wanted = dict(dense.named_parameters())
    for path, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert distance(parameter.grad, wanted[path].grad) < 0.02, path


@pytest.mark.parametrize("name", CASES)
def test_a_half_precision_or_packed_base_gets_float32_adapters(name):
    wanted = torch.float64 if CASES[name].dtype is torch.float64 else torch.float32
    found = {p.dtype for p in adapted(name).parameters() if p.requires_grad}
    assert found == {wanted}


@pytest.mark.parametrize("name", WRITABLE)
def test_merging_gives_the_outputs_of_the_adapters_within_the_rounding(name):
    case, model, x = CASES[name], adapted(name), batch(name)
    with torch.no_grad():
        apart = model(x)
        model.merge_adapter()
        merged = model(x)
    # Two layers' rounding errors, and the activations' in half precision and in 8 bits.
    bound = 2.5 * case.error + {torch.float16: 2e-3, torch.bfloat16: 1e-2}.get(case.dtype, 1e-5)
    assert distance(merged, apart) < max(bound, 0.02 if case.lossy else 0.0)


@pytest.mark.parametrize("name", WRITABLE)
def test_unmerging_gives_the_bits_and_outputs_back(name):
    model, x = adapted(name), batch(name)
    with torch.no_grad():
        apart = model(x)
        before = fingerprint(model.get_base_model())
        model.merge_adapter()
        model(x)
        assert fingerprint(model.get_base_model()).bits != before.bits
        model.unmerge_adapter()
        assert fingerprint(model.get_base_model()) == before
        assert torch.equal(model(x), apart)


@pytest.mark.parametrize("name", WRITABLE)
def test_deleting_a_merged_adapter_gives_the_base_back(name):
    base, x = net(name), batch(name)
    with torch.no_grad():
        plain = base(x)
        before = fingerprint(base)
        model = get_peft_model(base, LoraConfig(target_modules=["0", "2"]), adapter_name="a")
        model.add_adapter("b", LoraConfig(target_modules=["0"], init_lora_weights=False))
        model.set_adapter(["a", "b"])
        model.merge_adapter()
        model(x)
        model.delete_adapter("b")
        model.delete_adapter("a")
        assert fingerprint(base) == before
        assert torch.equal(base(x), plain)


@pytest.mark.parametrize("name", CASES)
def test_unload_gives_the_same_layers_and_bits(name):
    base, x = net(name), batch(name)
    with torch.no_grad():
        plain = base(x)
        before = fingerprint(base)
        model = get_peft_model(base, LoraConfig(target_modules=["0", "2"]))
        model(x)
        assert model.unload() is base
        assert fingerprint(base) == before
        assert torch.equal(base(x), plain)


@pytest.mark.parametrize("name", REFUSED)
def test_merging_what_cannot_be_written_is_refused_and_changes_nothing(name):
    model, x = adapted(name), batch(name)
    with torch.no_grad():
        apart = model(x)
        before = fingerprint(model)
        with pytest.raises(UnsupportedError, match="0: cannot merge: `weight` of "):
            model.merge_adapter()
        assert fingerprint(model) == before
        assert torch.equal(model(x), apart)


@pytest.mark.parametrize("name", LOSSY)
def test_merging_by_subtraction_is_refused_where_it_would_round_twice(name):
    model = adapted(name)
    before = fingerprint(model)
    with pytest.raises(UnsupportedError, match="keep_original=False: `weight` is quantised"):
        model.merge_adapter(keep_original=False)
    assert fingerprint(model) == before


@pytest.mark.parametrize("name", [n for n in CASES if n not in HOOKED])
def test_a_copy_of_an_adapted_model_is_independent(name):
    model, x = adapted(name), batch(name)
    with torch.no_grad():
        apart = model(x)
        twin = copy.deepcopy(model)
        assert torch.equal(twin(x), apart)
        if CASES[name].merges:
            model.merge_adapter()
            assert torch.equal(twin(x), apart)
            model.unmerge_adapter()
            twin.merge_adapter()
            twin.unmerge_adapter()
            assert torch.equal(twin(x), apart)
        assert torch.equal(model(x), apart)


@pytest.mark.parametrize("name", CASES)
def test_moving_the_model_keeps_its_outputs(name):
    model, x = adapted(name), batch(name)
    with torch.no_grad():
        apart = model(x)
        assert torch.equal(model.to("cpu")(x), apart)
        if CASES[name].merges:
            model.merge_adapter()
            merged = model(x)
            model.to("cpu")
            assert torch.equal(model(x), merged)
            model.unmerge_adapter()
            assert torch.equal(model(x), apart)


@pytest.mark.parametrize("name", CASES)
def test_an_adapter_saved_on_one_base_gives_equal_outputs_on_a_fresh_one(name, tmp_path):
    model, x = adapted(name), batch(name)
    model.save_pretrained(tmp_path)
    fresh = PeftModel.from_pretrained(net(name), tmp_path)
    with torch.no_grad():
        assert torch.equal(model(x), fresh(x))
