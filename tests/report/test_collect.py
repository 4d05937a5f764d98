"""What a report is made of, from files alone and beside a base."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from multigraft import CheckpointError, IA3Config, LoHaConfig, PeftModel, TargetError
from multigraft.report import collect, write_report
from tests.inspection.adapters import net, write


def merged_change(folder) -> dict[str, torch.Tensor]:
    """What the adapter adds to each weight, by merging it."""
    before = net().state_dict()
    after = PeftModel.from_pretrained(net(), folder).merge_and_unload().state_dict()
    changed = {k: after[k] - before[k] for k in before if not torch.equal(after[k], before[k])}
    weights = {key: delta for key, delta in changed.items() if key.endswith(".weight")}
    return {key.removesuffix(".weight"): delta for key, delta in weights.items()}


def test_norms_from_files_are_those_of_what_merging_adds(pair):
    report = collect(pair)
    assert [each.name for each in report.adapters] == ["first", "second"]
    for folder, each in zip(pair, report.adapters, strict=True):
        norms = {path: float(delta.norm()) for path, delta in merged_change(folder).items()}
        assert {path: site.norm for path, site in each.sites.items()} == pytest.approx(norms, 1e-4)


@pytest.mark.parametrize(
    "config",
    [
        LoHaConfig(r=2, target_modules=["up"]),
        IA3Config(target_modules=["up"], feedforward_modules=[]),
    ],
    ids=["loha", "ia3"],
)
def test_other_methods_have_figures_beside_their_base(tmp_path, config):
    folder = write(tmp_path / "a", config)
    (alone,) = collect([folder]).adapters
    assert alone.sites == {}
    assert alone.left == {
        "the whole adapter": f"{config.peft_type}'s change needs the base's weights"
    }
    (beside,) = collect([folder], base=net()).adapters
    for path, delta in merged_change(folder).items():
        assert beside.sites[path].norm == pytest.approx(float(delta.norm()), rel=1e-3)
    assert len(beside.sites) == 3


@pytest.mark.parametrize(
    "options",
    [
        {"use_dora": True},
        {"kasa_config": {}},
        {"use_qalora": True, "qalora_group_size": 4},
        {"lora_bias": True},
        {"init_lora_weights": "pissa"},
    ],
    ids=lambda options: next(iter(options)),
)
def test_other_forms_of_a_pair_are_right_or_left_out_and_right_beside_the_base(tmp_path, options):
    folder = write(tmp_path / "a", **options)
    norms = {path: float(delta.norm()) for path, delta in merged_change(folder).items()}
    (alone,), (beside,) = (collect([folder], base=base).adapters for base in (None, net()))
    assert {path: site.norm for path, site in beside.sites.items()} == pytest.approx(norms, 1e-4)
    assert {path: site.norm for path, site in alone.sites.items()} == pytest.approx(
        {path: norms[path] for path in alone.sites}, 1e-4
    )
    assert {path for path in norms if path not in alone.sites} <= set(alone.left)


def test_beside_a_base_norms_are_relative_and_intruders_are_sought(pair):
    base = net()
    report = collect(pair, base=base)
    for each in report.adapters:
        for path, site in each.sites.items():
            weight = base.get_submodule(path).weight
            assert site.relative == pytest.approx(
                site.norm / float(weight.detach().norm()), rel=1e-5
            )
            assert site.intruders is not None
    assert report.base == "Net"


def test_the_base_is_given_back_as_it_was(pair):
    base = net()
    before = {key: tensor.clone() for key, tensor in base.state_dict().items()}
    collect(pair, base=base)
    after = base.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], value) for key, value in before.items())


def test_no_intruders_are_sought_above_the_limit(pair):
    report = collect(pair, base=net(), intruder_limit=7)
    assert {site.intruders for each in report.adapters for site in each.sites.values()} == {None}


def test_every_number_of_the_file_is_counted_once(tmp_path):
    folder = write(tmp_path / "a", modules_to_save=["head"], bias="lora_only")
    (each,) = collect([folder]).adapters
    held = load_file(folder / "adapter_model.safetensors")
    assert each.parameters == sum(tensor.numel() for tensor in held.values())
    assert each.sites["layers.0.up"].parameters == 4 * 8 + 4 * 16 + 16
    elsewhere = each.parameters - sum(site.parameters for site in each.sites.values())
    assert elsewhere == 12 * 8


def test_saved_modules_have_a_change_beside_their_base(tmp_path):
    folder = write(tmp_path / "a", modules_to_save=["head"])
    (alone,), (beside,) = (collect([folder], base=base).adapters for base in (None, net()))
    assert "head.weight" in alone.left
    delta = merged_change(folder)["head"]
    assert beside.sites["head"].norm == pytest.approx(float(delta.norm()), rel=1e-4)


def test_a_folder_of_adapters_means_each_of_them(pair, tmp_path):
    assert len(collect([tmp_path]).adapters) == 2


def test_one_name_in_two_places_is_told_apart(tmp_path):
    folders = [write(tmp_path / part / "adapter", seed=n) for n, part in enumerate("ab")]
    assert [each.name for each in collect(folders).adapters] == ["adapter", "adapter (2)"]


def test_each_two_adapters_are_compared(tmp_path):
    folders = [write(tmp_path / name, seed=n) for n, name in enumerate("abc")]
    found = collect(folders).similarities
    assert [(each.first, each.second) for each in found] == [("a", "b"), ("a", "c"), ("b", "c")]


def test_a_pair_that_does_not_fit_its_config_is_left_out(pair):
    path = pair[0] / "adapter_model.safetensors"
    held = load_file(path)
    held["base_model.model.layers.0.up.lora_A.weight"] = torch.zeros(3, 8)
    held["base_model.model.layers.1.up.lora_B.weight"] = torch.zeros(16)
    save_file(held, path, {"format": "pt"})
    each = collect(pair[:1]).adapters[0]
    assert set(each.left) == {"layers.0.up", "layers.1.up"}
    assert len(each.sites) == 4


def test_another_librarys_method_still_has_a_size(tmp_path):
    folder = write(tmp_path / "a")
    config = folder / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"peft_type": "XLORA"}))
    (each,) = collect([folder]).adapters
    assert (each.method, each.sites) == ("XLORA", {})
    assert each.parameters == 6 * 4 * 24
    assert "XLORA" in each.left["the whole adapter"]


def test_a_failure_writes_nothing(pair, tmp_path):
    page = tmp_path / "page.html"
    with pytest.raises(TargetError):
        write_report(pair, page, base=torch.nn.Sequential(torch.nn.Linear(2, 2)))
    with pytest.raises(CheckpointError):
        write_report([tmp_path / "nowhere"], page)
    with pytest.raises(CheckpointError, match="no adapter was named"):
        write_report([], page)
    assert not page.exists()
