"""T11, T24: loading takes file and config together, and says what does not fit.

PEFT 0.21.2: `load_adapter(d, "default")` over an adapter of alpha 8 keeps alpha 8 where the file
says 64, and reports "All keys matched successfully"; missing and unexpected keys pass in silence.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from multigraft import CheckpointError, LoraConfig, MultigraftWarning, PeftModel, get_peft_model
from tests.weaknesses import nets

KINDS = ["up", "conv", "embed"]
CONFIG = LoraConfig(r=2, lora_alpha=4, target_modules=KINDS, modules_to_save=["head"])
PREFIX = "base_model.model."


def saved(path: Path, config: LoraConfig = CONFIG, adapter: str = "default") -> PeftModel:
    model = get_peft_model(nets.net(), config, adapter_name=adapter)
    nets.train_by_hand(model, adapter, seed=3)
    model.save_pretrained(path)
    return model


def edit(path: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    """Rewrite a checkpoint's tensors."""
    file = path / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})


OTHERS = {
    "alpha": LoraConfig(r=2, lora_alpha=64, target_modules=KINDS, modules_to_save=["head"]),
    "rslora": LoraConfig(r=2, use_rslora=True, target_modules=KINDS, modules_to_save=["head"]),
    "alpha pattern": LoraConfig(
        r=2, alpha_pattern={"up": 33}, target_modules=KINDS, modules_to_save=["head"]
    ),
    "dropout": LoraConfig(r=2, lora_dropout=0.4, target_modules=KINDS, modules_to_save=["head"]),
    "rank": LoraConfig(r=5, lora_alpha=7, target_modules=KINDS, modules_to_save=["head"]),
    "rank pattern": LoraConfig(
        r=2, rank_pattern={"conv": 3}, target_modules=KINDS, modules_to_save=["head"]
    ),
    "targets": LoraConfig(r=2, target_modules=["down", "head"]),
    "bias": LoraConfig(r=2, target_modules=KINDS, bias="all"),
}
others = pytest.mark.parametrize("which", list(OTHERS))


@others
@pytest.mark.parametrize("active", [True, False])
def test_t11_loading_over_an_adapter_adopts_the_files_config(
    which: str, active: bool, tmp_path: Path
) -> None:
    trained = saved(tmp_path, OTHERS[which])
    model = get_peft_model(nets.net(), CONFIG)
    model.add_adapter("other", LoraConfig(r=2, target_modules=["up"]))
    nets.train_by_hand(model, "default", "other")
    model.set_adapter("default" if active else "other")
    model.load_adapter(tmp_path, "default")
    assert model.active_adapters == ["default" if active else "other"]
    model.set_adapter("default")
    torch.testing.assert_close(model(nets.ids()), trained(nets.ids()))
    mine, theirs = model.peft_config["default"].to_dict(), OTHERS[which].to_dict()
    for key in ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "lora_dropout", "use_rslora"):
        assert mine[key] == theirs[key], key
    for layer in trained.roster.layers["default"]:
        own = nets.layer(model, layer.path)
        for view in ("r", "lora_alpha", "lora_dropout", "scaling"):
            ours, files = dict(getattr(own, view)), dict(getattr(layer, view))
            assert ours.get("default") == files.get("default"), view


@others
def test_t11_loading_over_leaves_the_other_adapter_as_it_was(which: str, tmp_path: Path) -> None:
    saved(tmp_path, OTHERS[which])
    model = get_peft_model(nets.net(), LoraConfig(r=2, target_modules=KINDS), adapter_name="o")
    model.add_adapter("default", CONFIG)
    nets.train_by_hand(model, "default", "o")
    before = {id(p): p.detach().clone() for _, p in nets.own_parameters(model, "o")}
    output = model(nets.ids())
    model.load_adapter(tmp_path, "default")
    assert nets.same_bits(model(nets.ids()), output)
    after = dict.fromkeys(id(p) for _, p in nets.own_parameters(model, "o"))
    assert list(after) == list(before)
    nets.never_nested(model)


@others
@pytest.mark.parametrize("trains", [True, False])
def test_t11_loading_over_keeps_whether_it_trains(which: str, trains: bool, tmp_path: Path) -> None:
    saved(tmp_path, OTHERS[which])
    model = get_peft_model(nets.net(), CONFIG)
    model.base_model.set_requires_grad("default", trains)
    model.load_adapter(tmp_path, "default")
    assert {p.requires_grad for _, p in nets.own_parameters(model, "default")} == {trains}


@others
def test_t11_unloading_after_loading_over_gives_the_bits_back(which: str, tmp_path: Path) -> None:
    saved(tmp_path, OTHERS[which])
    model = get_peft_model(nets.net(), CONFIG)
    model.load_adapter(tmp_path, "default")
    nets.assert_bits(model.unload(), nets.base_bits(nets.net()))


UP = f"{PREFIX}blocks.0.up.lora_A.weight"
HEAD = f"{PREFIX}head.weight"
CONV = f"{PREFIX}conv.lora_B.weight"
EMBED = f"{PREFIX}embed.lora_embedding_A"
Change = Callable[[dict[str, Tensor]], object]
DAMAGE: dict[str, tuple[Change, str, str]] = {
    "missing lora": (lambda t: t.pop(UP), "missing from the file", UP),
    "missing embedding": (lambda t: t.pop(EMBED), "missing from the file", EMBED),
    "missing saved module": (lambda t: t.pop(HEAD), "missing from the file", HEAD),
    "unexpected": (lambda t: t.update(x=torch.zeros(2)), "not part of this adapter", "x"),
    "misshapen lora": (lambda t: t.update({CONV: torch.zeros(8, 3, 1)}), "(8, 3, 1)", CONV),
    "misshapen module": (lambda t: t.update({HEAD: torch.zeros(6, 9)}), "(6, 9)", HEAD),
    "nan": (lambda t: t[UP].fill_(float("nan")), "NaN or infinity in", UP),
    "one infinity": (lambda t: t[HEAD][0].fill_(float("inf")), "NaN or infinity in", HEAD),
}
damage = pytest.mark.parametrize("which", list(DAMAGE))


@damage
@pytest.mark.parametrize("how", ["from_pretrained", "load_adapter", "load over"])
def test_t24_a_checkpoint_that_does_not_fit_is_refused_and_named(
    which: str, how: str, tmp_path: Path
) -> None:
    change, words, key = DAMAGE[which]
    saved(tmp_path)
    edit(tmp_path, lambda t: change(t))
    plain = nets.net()
    model = get_peft_model(nets.net(), CONFIG)
    nets.train_by_hand(model, "default")
    before, plain_before = nets.known(model), nets.known(plain)
    with pytest.raises(CheckpointError) as caught:
        if how == "from_pretrained":
            PeftModel.from_pretrained(plain, tmp_path)
        else:
            model.load_adapter(tmp_path, "default" if how == "load over" else "new")
    message = str(caught.value)
    assert words in message
    assert key in message
    assert "strict=False" in message
    nets.assert_as_before(model, before)
    nets.assert_as_before(plain, plain_before)


@damage
@pytest.mark.parametrize("over", [True, False])
def test_t24_what_fits_is_loaded_when_the_user_says_so(
    which: str, over: bool, tmp_path: Path
) -> None:
    saved(tmp_path)
    edit(tmp_path, lambda t: DAMAGE[which][0](t))
    model = get_peft_model(nets.net(), CONFIG)
    name = "default" if over else "new"
    shapes = "misshapen" in which
    report = model.load_adapter(tmp_path, name, strict=False, ignore_mismatched_sizes=shapes)
    lists = {
        "missing": report.missing_keys,
        "unexpected": report.unexpected_keys,
        "misshapen": [key for key, *_ in report.mismatched_keys],
        "nan": report.nonfinite_keys,
        "one": report.nonfinite_keys,
    }
    found = lists[which.split()[0]]
    assert len(found) == 1
    assert found[0].endswith(DAMAGE[which][2])
    whole = load_file(tmp_path / "adapter_model.safetensors")
    down = nets.layer(model, "blocks.1.up").lora_A[name].weight
    assert nets.same_bits(down, whole[f"{PREFIX}blocks.1.up.lora_A.weight"])


def test_t24_a_mismatched_shape_is_refused_even_when_not_strict(tmp_path: Path) -> None:
    saved(tmp_path)
    edit(tmp_path, lambda t: t.update({CONV: torch.zeros(8, 3, 1)}))
    with pytest.raises(CheckpointError, match=r"\(8, 3, 1\) instead of \(8, 2, 1\)"):
        PeftModel.from_pretrained(nets.net(), tmp_path, strict=False)


def test_t24_a_wrong_prefix_everywhere_is_an_error_and_key_mapping_the_remedy(
    tmp_path: Path,
) -> None:
    trained = saved(tmp_path)

    def wrong(tensors: dict[str, Tensor]) -> None:
        items = list(tensors.items())
        tensors.clear()
        tensors.update({k.replace(PREFIX, "model.wrong."): t for k, t in items})

    edit(tmp_path, wrong)
    with pytest.raises(CheckpointError, match=r"missing from the file.* and 5 more"):
        PeftModel.from_pretrained(nets.net(), tmp_path)
    mapping = {r"^model\.wrong\.": ""}
    model = PeftModel.from_pretrained(nets.net(), tmp_path, key_mapping=mapping)
    torch.testing.assert_close(model(nets.ids()), trained(nets.ids()))


def test_t24_a_report_of_a_good_file_is_empty(tmp_path: Path) -> None:
    saved(tmp_path)
    model = get_peft_model(nets.net(), CONFIG)
    report = model.load_adapter(tmp_path, "new")
    assert not any(vars(report).values())


@pytest.mark.parametrize("compiled", ["model", "block"])
def test_t24_a_compiled_base_saves_what_an_uncompiled_one_loads(
    compiled: str, tmp_path: Path
) -> None:
    base: nn.Module = nets.net()
    if compiled == "model":
        base = torch.compile(base, backend="eager")
    else:
        base.blocks[0] = torch.compile(base.blocks[0], backend="eager")
    model = get_peft_model(base, CONFIG)
    nets.train_by_hand(model, "default")
    model.save_pretrained(tmp_path)
    keys = set(load_file(tmp_path / "adapter_model.safetensors"))
    saved(tmp_path / "plain")
    assert keys == set(load_file(tmp_path / "plain" / "adapter_model.safetensors"))
    plain = PeftModel.from_pretrained(nets.net(), tmp_path)
    again = PeftModel.from_pretrained(torch.compile(nets.net(), backend="eager"), tmp_path)
    for (_, p), (_, q) in zip(
        nets.own_parameters(plain, "default"), nets.own_parameters(again, "default"), strict=True
    ):
        assert nets.same_bits(p, q)


def test_t24_a_file_saved_from_a_compiled_base_by_peft_is_read(tmp_path: Path) -> None:
    trained = saved(tmp_path)

    def compiled(tensors: dict[str, Tensor]) -> None:
        items = list(tensors.items())
        tensors.clear()
        tensors.update({k.replace(PREFIX, f"{PREFIX}_orig_mod."): t for k, t in items})

    edit(tmp_path, compiled)
    model = PeftModel.from_pretrained(nets.net(), tmp_path)
    torch.testing.assert_close(model(nets.ids()), trained(nets.ids()))


def test_t24_loading_onto_another_base_says_so_by_name_and_by_shape(tmp_path: Path) -> None:
    base = nets.net()
    base.name_or_path = "org/small"
    model = get_peft_model(base, CONFIG)
    model.save_pretrained(tmp_path)
    other = nets.net()
    other.name_or_path = "org/large"
    with pytest.warns(MultigraftWarning, match=r"trained on `org/small`.*onto `org/large`"):
        PeftModel.from_pretrained(other, tmp_path)
    wide = nets.net()
    wide.blocks[1].up = nn.Linear(nets.WIDTH, 14)
    before = nets.known(wide)
    with pytest.raises(CheckpointError, match=r"blocks\.1\.up.*\(12, 2\) instead of \(14, 2\)"):
        PeftModel.from_pretrained(wide, tmp_path)
    nets.assert_as_before(wide, before)


def test_t11_a_given_config_wins_over_the_files(tmp_path: Path) -> None:
    saved(tmp_path)
    config = LoraConfig(r=2, lora_alpha=20, target_modules=KINDS, modules_to_save=["head"])
    model = PeftModel.from_pretrained(nets.net(), tmp_path, config=config)
    assert nets.layer(model, "conv").scaling["default"] == 10.0
    assert json.loads((tmp_path / "adapter_config.json").read_text())["lora_alpha"] == 4
