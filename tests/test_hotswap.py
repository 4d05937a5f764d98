"""Hot-swapping: by values alone, into a compiled model, all of it or nothing."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.utils import hotswap as pefts
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

import multigraft
from multigraft import (
    CheckpointError,
    ConfigError,
    LoraConfig,
    MultigraftWarning,
    PeftModel,
    StateError,
    UnsupportedError,
    get_peft_model,
)
from multigraft.hotswap import (
    check_hotswap_configs_compatible,
    hotswap_adapter,
    hotswap_adapter_from_state_dict,
    prepare_model_for_compiled_hotswap,
)
from tests.laws import fingerprint
from tests.oracle import KINDS, Net, build, inputs, llama, output, quiet, random_state

ADAPTERS: dict[str, dict[str, Any]] = {
    "first": {"r": 2, "lora_alpha": 4},
    "larger": {"r": 5, "lora_alpha": 3, "use_rslora": True},
    "mixed": {"r": 8, "rank_pattern": {"q_proj": 3}, "alpha_pattern": {"down_proj": 2}},
    "elsewhere": {"r": 4, "target_modules": ["q_proj"]},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of `ADAPTERS`, with values of their own."""
    root = tmp_path_factory.mktemp("adapters")
    for seed, (name, options) in enumerate(ADAPTERS.items()):
        options = {"target_modules": ["q_proj", "down_proj"], **options}
        model = get_peft_model(build(llama), LoraConfig(**options))
        filled(model, seed).save_pretrained(root / name)
    return root


def filled(model: PeftModel, seed: int = 0) -> PeftModel:
    state = random_state(multigraft.get_peft_model_state_dict(model), seed)
    multigraft.set_peft_model_state_dict(model, state)
    return model.eval()


def loaded(source: Path) -> PeftModel:
    return PeftModel.from_pretrained(build(llama), source).eval()


def expected(source: Path) -> Tensor:
    model = loaded(source)
    return output(model, inputs(model))


@torch.no_grad()
def test_mixed_ranks_and_scales_go_into_a_compiled_model_without_a_recompilation(folder: Path):
    model = loaded(folder / "first")
    prepare_model_for_compiled_hotswap(model, target_rank=8)
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    batch = inputs(model)
    for name in ("first", "larger", "mixed", "elsewhere", "first", "mixed"):
        hotswap_adapter(compiled, folder / name, "default")
        torch.testing.assert_close(output(compiled, batch), expected(folder / name))
    assert counter.frame_count == 1


@torch.no_grad()
def test_without_slots_another_scale_recompiles(folder: Path):
    model = loaded(folder / "first")
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter)
    output(compiled, inputs(model))
    before = counter.frame_count
    hotswap_adapter(compiled, folder / "larger", "default")
    torch.testing.assert_close(output(compiled, inputs(model)), expected(folder / "larger"))
    assert counter.frame_count > before


def test_outputs_are_pefts(folder: Path):
    ours = loaded(folder / "first")
    with quiet():
        theirs = peft.PeftModel.from_pretrained(build(llama), folder / "first").eval()
    prepare_model_for_compiled_hotswap(ours, target_rank=8)
    pefts.prepare_model_for_compiled_hotswap(theirs, target_rank=8)
    batch = inputs(ours)
    for name in ("elsewhere", "first"):  # it refuses another `use_rslora`, or patterns
        hotswap_adapter(ours, folder / name, "default")
        with quiet():
            pefts.hotswap_adapter(theirs, folder / name, "default", torch_device="cpu")
        torch.testing.assert_close(output(ours, batch), output(theirs, batch))


def test_every_kind_of_layer_can_be_swapped(tmp_path: Path):
    for rank, seed in ((2, 0), (6, 1)):
        model = get_peft_model(build(Net), LoraConfig(target_modules=KINDS, r=rank, lora_alpha=3))
        filled(model, seed).save_pretrained(tmp_path / str(rank))
    model = PeftModel.from_pretrained(build(Net), tmp_path / "2").eval()
    small = output(model, inputs(model))
    prepare_model_for_compiled_hotswap(model, target_rank=8)
    torch.testing.assert_close(output(model, inputs(model)), small)
    hotswap_adapter(model, tmp_path / "6", "default")
    other = PeftModel.from_pretrained(build(Net), tmp_path / "6").eval()
    torch.testing.assert_close(output(model, inputs(model)), output(other, inputs(model)))


def test_stacks_of_experts_can_be_swapped(tmp_path: Path):
    from tests.bases.nets import Stacked, seeded

    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    options = {"target_modules": [], "target_parameters": ["experts.up", "experts.down"]}
    for rank in (1, 3):
        model = get_peft_model(seeded(Stacked), LoraConfig(r=rank, **options))
        filled(model, rank).save_pretrained(tmp_path / str(rank))
    model = PeftModel.from_pretrained(seeded(Stacked), tmp_path / "1")
    prepare_model_for_compiled_hotswap(model, target_rank=4)
    hotswap_adapter(model, tmp_path / "3", "default")
    other = PeftModel.from_pretrained(seeded(Stacked), tmp_path / "3")
    torch.testing.assert_close(model(x), other(x))


def test_no_tensor_is_made_anew(folder: Path):
    model = loaded(folder / "first")
    prepare_model_for_compiled_hotswap(model, target_rank=8)
    before = [(n, p.data_ptr()) for n, p in (*model.named_parameters(), *model.named_buffers())]
    hotswap_adapter(model, folder / "mixed", "default")
    after = [(n, p.data_ptr()) for n, p in (*model.named_parameters(), *model.named_buffers())]
    assert after == before


def test_what_is_saved_is_what_was_swapped_in(folder: Path, tmp_path: Path):
    model = loaded(folder / "first")
    prepare_model_for_compiled_hotswap(model, target_rank=8)
    for name in ("larger", "elsewhere"):
        hotswap_adapter(model, folder / name, "default")
        model.save_pretrained(tmp_path / name)
        own, theirs = tmp_path / name, folder / name
        file = "adapter_model.safetensors"
        assert (own / file).read_bytes() == (theirs / file).read_bytes()
        assert torch.equal(expected(own), expected(theirs))


def test_a_slot_merges_and_unmerges_as_it_acts(folder: Path):
    model = loaded(folder / "first")
    prepare_model_for_compiled_hotswap(model, target_rank=8)
    hotswap_adapter(model, folder / "larger", "default")
    before, bits = expected(folder / "larger"), fingerprint(model).bits
    model.merge_adapter()
    torch.testing.assert_close(output(model, inputs(model)), before, atol=1e-5, rtol=1e-5)
    model.unmerge_adapter()
    assert fingerprint(model).bits == bits


def test_rows_of_a_batch_use_slots(folder: Path):
    model = loaded(folder / "first")
    model.load_adapter(folder / "mixed", "other")
    prepare_model_for_compiled_hotswap(model, target_rank=8)
    hotswap_adapter(model, folder / "larger", "other")
    model.eval()
    y = output(model, inputs(model), adapter_names=["default", "other", "__base__"])
    torch.testing.assert_close(y[0], expected(folder / "first")[0])
    torch.testing.assert_close(y[1], expected(folder / "larger")[1])


def test_a_slots_scale_can_be_read_and_set(folder: Path):
    model = loaded(folder / "first")
    prepare_model_for_compiled_hotswap(model, target_rank=8)
    layer = model.get_base_model().model.layers[0].mlp.down_proj
    assert layer.scaling["default"] == 2.0
    x = torch.randn(3, 32)
    whole, base = layer(x), layer.base_layer(x)
    layer.scaling["default"] = 1.0
    torch.testing.assert_close(layer(x) - base, (whole - base) / 2, atol=1e-6, rtol=1e-5)
    layer.set_scale("default", 1)
    torch.testing.assert_close(layer(x), whole)


def test_deleting_a_slotted_adapter_gives_the_base_back(folder: Path):
    base = build(llama)
    before = fingerprint(base)
    model = PeftModel.from_pretrained(base, folder / "first")
    prepare_model_for_compiled_hotswap(model, target_rank=8)
    hotswap_adapter(model, folder / "mixed", "default")
    model.unload()
    assert fingerprint(base) == before


def test_load_adapter_swaps_too(folder: Path):
    model = loaded(folder / "first")
    model.load_adapter(folder / "larger", "default", hotswap=True)
    torch.testing.assert_close(output(model, inputs(model)), expected(folder / "larger"))
    assert model.peft_config["default"].use_rslora


def test_a_smaller_rank_then_a_larger_one_go_in_without_slots(folder: Path):
    model = loaded(folder / "larger")
    for name in ("first", "mixed", "elsewhere", "larger"):
        hotswap_adapter(model, folder / name, "default")
        torch.testing.assert_close(output(model, inputs(model)), expected(folder / name))


def test_slots_train_as_their_adapter_does(folder: Path):
    plain, slotted = loaded(folder / "first"), loaded(folder / "first")
    prepare_model_for_compiled_hotswap(slotted, target_rank=8)
    for model in (plain, slotted):
        model.base_model.set_requires_grad("default")
        output(model, inputs(model)).square().mean().backward()
    grads = {n: p.grad for n, p in plain.named_parameters() if p.grad is not None}
    own = {n: p.grad for n, p in slotted.named_parameters() if p.grad is not None}
    assert own.keys() == grads.keys() and grads
    for name, grad in grads.items():
        part = own[name][tuple(slice(size) for size in grad.shape)]
        torch.testing.assert_close(part, grad, atol=1e-6, rtol=1e-4)


REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "too large": ({"r": 9}, CheckpointError, "has rank 9 .* slot there is of rank 8"),
    "beside": ({"target_modules": ["q_proj", "v_proj"]}, CheckpointError, "has tensors where"),
    "DoRA": ({"use_dora": True}, UnsupportedError, "plain LoRA"),
    "bias of B": ({"lora_bias": True}, UnsupportedError, "plain LoRA"),
    "another method": ({"kind": "IA3Config"}, UnsupportedError, "the new adapter is IA3"),
    "a head": ({"modules_to_save": ["lm_head"]}, CheckpointError, "has tensors where"),
}


@pytest.mark.parametrize(("options", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_what_does_not_fit_changes_nothing(folder, tmp_path, options, error, message):
    options = {"target_modules": ["q_proj", "down_proj"], **options}
    kind = getattr(multigraft, options.pop("kind", "LoraConfig"))
    if kind is not LoraConfig:
        options["feedforward_modules"] = []
    filled(get_peft_model(build(llama), kind(**options))).save_pretrained(tmp_path)
    model = loaded(folder / "first")
    prepare_model_for_compiled_hotswap(model, target_rank=8)
    before, config = fingerprint(model), model.peft_config["default"].to_dict()
    with pytest.raises(error, match=message):
        hotswap_adapter(model, tmp_path, "default")
    assert fingerprint(model) == before and model.peft_config["default"].to_dict() == config


def test_values_that_are_missing_misshapen_or_not_finite_change_nothing(folder: Path):
    model = loaded(folder / "first")
    state, config = multigraft.get_peft_model_state_dict(model), model.peft_config["default"]
    state = {key: value.clone() for key, value in state.items()}
    key, before = next(iter(state)), fingerprint(model)
    wrong = {
        "lacks": {k: v for k, v in state.items() if k != key},
        "has the shape": state | {key: state[key][:1]},
        "holds NaN": state | {key: state[key] * float("nan")},
    }
    for message, given in wrong.items():
        with pytest.raises(CheckpointError, match=message):
            hotswap_adapter_from_state_dict(model, given, "default", config)
        assert fingerprint(model) == before


def test_a_merged_adapter_is_not_swapped(folder: Path):
    model = loaded(folder / "first")
    model.merge_adapter()
    with pytest.raises(StateError, match="unmerge_adapter"):
        hotswap_adapter(model, folder / "larger", "default")
    with pytest.raises(StateError, match="unmerge_adapter"):
        prepare_model_for_compiled_hotswap(model)


def test_preparing_refuses_a_rank_below_what_is_there(folder: Path):
    model = loaded(folder / "larger")
    with pytest.raises(ConfigError, match=r"`target_rank` \(=3\) is below the rank of `default`"):
        prepare_model_for_compiled_hotswap(model, target_rank=3)
    with pytest.raises(ConfigError, match=r"rank of a config \(=20\)"):
        prepare_model_for_compiled_hotswap(model, target_rank=8, config=LoraConfig(r=20))


def test_preparing_refuses_what_is_no_plain_lora():
    for options, error in (({"use_dora": True}, UnsupportedError), (None, StateError)):
        config = (
            LoraConfig(target_modules=["q_proj"], **options) if options else multigraft.IA3Config()
        )
        model = get_peft_model(build(llama), config)
        before = fingerprint(model)
        with pytest.raises(error, match=r"plain\s+LoRA|needs a LoRA adapter"):
            prepare_model_for_compiled_hotswap(model)
        assert fingerprint(model) == before


@pytest.mark.parametrize("wrap", [torch.compile, nn.Module.compile])
def test_preparing_a_compiled_model_is_refused_or_said(folder: Path, wrap: Any):
    model = loaded(folder / "first")
    compiled = wrap(model)
    compiled = model if compiled is None else compiled
    with pytest.raises(StateError, match=r"before torch\.compile"):
        prepare_model_for_compiled_hotswap(compiled)
    with pytest.warns(MultigraftWarning, match=r"before torch\.compile"):
        prepare_model_for_compiled_hotswap(compiled, check_compiled="warn")
    prepare_model_for_compiled_hotswap(compiled, check_compiled="ignore")
    with pytest.raises(ConfigError, match="check_compiled"):
        prepare_model_for_compiled_hotswap(compiled, check_compiled="maybe")  # type: ignore[arg-type]


def test_a_tied_pair_is_swapped_in_both_its_uses(tmp_path: Path):
    def tied() -> nn.Module:
        return build(lambda: llama(tie_word_embeddings=True))

    options = {"target_modules": ["embed_tokens"], "ensure_weight_tying": True}
    for rank in (2, 4):
        model = get_peft_model(tied(), LoraConfig(r=rank, lora_alpha=3, **options))
        filled(model, rank).save_pretrained(tmp_path / str(rank))
    model = PeftModel.from_pretrained(tied(), tmp_path / "2").eval()
    prepare_model_for_compiled_hotswap(model, target_rank=4)
    hotswap_adapter(model, tmp_path / "4", "default")
    other = PeftModel.from_pretrained(tied(), tmp_path / "4").eval()
    torch.testing.assert_close(output(model, inputs(model)), output(other, inputs(model)))


def test_tensors_under_names_with_the_adapters_are_swapped_in_as_well(folder: Path):
    model, other = loaded(folder / "first"), loaded(folder / "larger")
    state = multigraft.get_peft_model_state_dict(other)
    named = {re.sub(r"(lora_[AB])", r"\1.default", key): value for key, value in state.items()}
    hotswap_adapter_from_state_dict(model, named, "default", other.peft_config["default"])
    torch.testing.assert_close(output(model, inputs(model)), output(other, inputs(model)))


def test_configs_of_which_one_cannot_take_the_others_place_are_told_apart():
    lora, dora = LoraConfig(r=2), LoraConfig(r=8, use_dora=True)
    check_hotswap_configs_compatible(lora, LoraConfig(r=8, use_rslora=True))
    with pytest.raises(UnsupportedError, match="`use_dora` is False in one config and True"):
        check_hotswap_configs_compatible(lora, dora)
    with pytest.raises(UnsupportedError, match="one of the configs is IA3"):
        check_hotswap_configs_compatible(lora, multigraft.IA3Config())
