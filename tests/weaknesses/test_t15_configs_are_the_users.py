"""T15, T18: a config is the user's: copied, never changed; and it means what it says.

PEFT 0.21.2: one `LoraConfig("all-linear")` used for model 1 becomes a list of its names, so that
model 2 is adapted in part; `["q_proj", "v_porj"]` adapts q alone; `modules_to_save=["head"]` also
fine-tunes `overhead`.
"""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from multigraft import (
    LoraConfig,
    MultigraftWarning,
    PeftModel,
    TargetError,
    get_peft_model,
    inject_adapter_in_model,
)
from tests.weaknesses import nets

CONFIGS = {
    "all-linear": LoraConfig(r=2, target_modules="all-linear"),
    "all-linear, layers": LoraConfig(r=2, target_modules="all-linear", layers_to_transform=[1]),
    "set": LoraConfig(r=2, target_modules={"up", "conv"}, modules_to_save={"head"}),
    "regex": LoraConfig(r=2, target_modules=r"blocks\.\d+\.up", rank_pattern={"up": 3}),
    "seq_cls": LoraConfig(r=2, task_type="SEQ_CLS", target_modules=["up"]),
    "patterns": LoraConfig(r=2, target_modules=["up"], alpha_pattern={"blocks.0.up": 3}),
}


def other_model() -> nn.Module:
    torch.manual_seed(1)
    model = nets.net()
    model.extra = nn.Linear(4, 4)
    model.score = nn.Linear(4, 4)
    return model


@pytest.mark.parametrize("which", list(CONFIGS))
@pytest.mark.parametrize("how", ["get_peft_model", "add_adapter", "inject", "save", "merge"])
def test_t15_no_operation_changes_the_users_config(which: str, how: str, tmp_path: Path) -> None:
    config = copy.deepcopy(CONFIGS[which])
    fields = copy.deepcopy(vars(config))
    if how == "inject":
        inject_adapter_in_model(config, other_model())
    elif how == "add_adapter":
        model = get_peft_model(other_model(), LoraConfig(target_modules=["down"]))
        model.add_adapter("b", config)
    else:
        model = get_peft_model(other_model(), config, revision="main")
        if how == "save":
            model.save_pretrained(tmp_path)
            model.load_adapter(tmp_path, "default")
        if how == "merge":
            model.merge_and_unload()
    assert vars(config) == fields


def test_t15_one_all_linear_config_serves_two_models() -> None:
    config = LoraConfig(r=2, target_modules="all-linear")
    first = get_peft_model(nets.net(), config)
    second = get_peft_model(other_model(), config)
    assert [x.path for x in second.roster.layers["default"]] == [
        *[x.path for x in first.roster.layers["default"]],
        "extra",
        "score",
    ]


def test_t15_editing_a_config_later_changes_no_adapter_and_no_file(tmp_path: Path) -> None:
    config = LoraConfig(r=2, lora_alpha=4, target_modules=["up"], rank_pattern={"blocks.0.up": 3})
    model = get_peft_model(nets.net(), config, adapter_name="a")
    model.add_adapter("b", config)
    assert model.peft_config["a"] is not model.peft_config["b"]
    config.lora_alpha = 999
    config.target_modules.append("down")
    config.rank_pattern["blocks.0.up"] = 7
    model.save_pretrained(tmp_path)
    fresh = PeftModel.from_pretrained(nets.net(), tmp_path / "a")
    saved = fresh.peft_config["default"]
    assert (saved.lora_alpha, saved.target_modules) == (4, ["up"])
    assert saved.rank_pattern == {"blocks.0.up": 3}


def test_t15_editing_one_adapters_copy_changes_no_other() -> None:
    config = LoraConfig(r=2, target_modules=["up"])
    model = get_peft_model(nets.net(), config, adapter_name="a")
    model.add_adapter("b", config)
    model.peft_config["a"].target_modules.append("x")
    assert model.peft_config["b"].target_modules == config.target_modules == ["up"]


class Heads(nn.Module):
    """Names of which one ends like another."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(8, 8)
        self.v_proj = nn.Linear(8, 8)
        self.my_q_proj = nn.Linear(8, 8)
        self.overhead = nn.Linear(8, 8)
        self.head = nn.Linear(8, 8)
        self.layers = nn.ModuleList([nn.ModuleDict({"fc": nn.Linear(8, 8)}) for _ in range(3)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.overhead(self.q_proj(x) + self.v_proj(x) + self.my_q_proj(x))
        for block in self.layers:
            x = block["fc"](x)
        return self.head(x)


def paths(**fields: object) -> list[str]:
    model = get_peft_model(Heads(), LoraConfig(r=2, **fields))  # type: ignore[arg-type]
    return [x.path for x in model.roster.layers["default"]]


TYPOS = [
    ({"target_modules": ["q_proj", "v_porj"]}, "`target_modules`", "`v_porj`", "`v_proj`"),
    ({"target_modules": ["qproj"]}, "`target_modules`", "`qproj`", "`q_proj`"),
    ({"target_modules": ["layers.1.fx"]}, "`target_modules`", "`layers.1.fx`", "`layers.1.fc`"),
    (
        {"target_modules": ["fc"], "modules_to_save": ["haed"]},
        "`modules_to_save`",
        "`haed`",
        "`head`",
    ),
    (
        {"target_modules": ["fc"], "modules_to_save": ["head", "overhed"]},
        "`modules_to_save`",
        "`overhed`",
        "`overhead`",
    ),
    (
        {"target_modules": "all-linear", "exclude_modules": ["haed"]},
        "`exclude_modules`",
        "`haed`",
        "`head`",
    ),
    (
        {"target_modules": ["q_proj"], "rank_pattern": {"q_porj": 3}},
        "`rank_pattern`",
        "`q_porj`",
        "`q_proj`",
    ),
    (
        {"target_modules": ["q_proj"], "alpha_pattern": {"v_proj": 3}},
        "`alpha_pattern`",
        "`v_proj`",
        "`q_proj`",
    ),
]


@pytest.mark.parametrize(("fields", "field", "given", "nearest"), TYPOS)
def test_t18_a_name_that_means_nothing_is_an_error_with_the_nearest_real_ones(
    fields: dict[str, object], field: str, given: str, nearest: str
) -> None:
    model = Heads()
    before = nets.known(model)
    with pytest.raises(TargetError) as caught:
        get_peft_model(model, LoraConfig(r=2, **fields))  # type: ignore[arg-type]
    message = str(caught.value)
    assert message.startswith(field)
    assert given in message
    assert nearest in message.partition("Nearest:")[2]
    nets.assert_as_before(model, before)


def test_t18_a_file_with_one_dead_name_loads_with_a_warning(tmp_path: Path) -> None:
    model = get_peft_model(Heads(), LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    model.peft_config["default"].target_modules.append("k_porj")
    model.save_pretrained(tmp_path)
    with pytest.warns(MultigraftWarning, match="`target_modules`: no module is called `k_porj`"):
        fresh = PeftModel.from_pretrained(Heads(), tmp_path)
    assert [x.path for x in fresh.roster.layers["default"]] == ["q_proj", "v_proj"]


def test_t18_names_match_whole_path_components() -> None:
    assert paths(target_modules=["q_proj"]) == ["q_proj"]
    assert paths(target_modules=["fc"]) == [f"layers.{i}.fc" for i in range(3)]
    assert paths(target_modules=["1.fc"]) == ["layers.1.fc"]
    assert paths(target_modules=["fc"], modules_to_save=["head"]) == [
        *[f"layers.{i}.fc" for i in range(3)],
        "head",
    ]


def test_t18_saving_a_head_leaves_the_overhead_to_all_linear() -> None:
    config = LoraConfig(r=2, target_modules="all-linear", modules_to_save=["head"])
    model = get_peft_model(Heads(), config)
    assert set(vars(nets.layer(model, "overhead"))["grafts"]) == {"default"}
    kinds = {x.path: x.grafts["default"][0].method.kind for x in model.roster.layers["default"]}
    assert kinds["head"] == "replace"
    assert kinds["overhead"] == "additive"


def test_t18_all_linear_in_a_list_means_all_linear() -> None:
    assert paths(target_modules=["all-linear"]) == paths(target_modules="all-linear")


@pytest.mark.parametrize("both", [["all-linear", "head"], ["head", "all-linear"]])
def test_t18_all_linear_beside_other_names_is_refused(both: list[str]) -> None:
    with pytest.raises(ValueError, match='"all-linear" stands alone'):
        LoraConfig(target_modules=both)


@pytest.mark.parametrize("field", ["target_modules", "exclude_modules"])
def test_t18_a_name_where_an_expression_is_meant_is_explained(field: str) -> None:
    fields = {"target_modules": "all-linear", field: "fc"}
    with pytest.raises(TargetError, match=rf"`{field}` \(='fc'\).*{field}=\['fc'\]"):
        paths(**fields)


def test_t18_a_full_path_that_the_layer_indices_leave_out_is_refused() -> None:
    with pytest.raises(TargetError, match=r"names layers\.2\.fc in full.*Drop one of the two"):
        paths(target_modules=["layers.2.fc", "fc"], layers_to_transform=[0, 1])
    assert paths(target_modules=["fc"], layers_to_transform=[2]) == ["layers.2.fc"]


def test_t18_layer_indices_that_no_layer_has_are_refused() -> None:
    with pytest.raises(TargetError, match=r"`layers_to_transform`.*\[7\]"):
        paths(target_modules=["fc"], layers_to_transform=[0, 7])


def test_t18_excluding_everything_is_refused_with_what_was_given() -> None:
    with pytest.raises(TargetError, match=r"no module is left.*'q_proj'.*'q_proj'"):
        paths(target_modules=["q_proj"], exclude_modules=["q_proj"])


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"target_modules": "all-linear", "exclude_modules": ["sub.lin"]}, ["lin"]),
        ({"target_modules": "all-linear", "modules_to_save": ["sub.lin"]}, ["lin", "sub.lin"]),
    ],
)
def test_t18_what_all_linear_meant_means_the_same_after_a_reload(
    fields: dict[str, object], expected: list[str], tmp_path: Path
) -> None:
    def twin() -> nn.Module:
        model = nn.Module()
        model.lin = nn.Linear(4, 4)
        model.sub = nn.Module()
        model.sub.lin = nn.Linear(4, 4)
        return model

    model = get_peft_model(twin(), LoraConfig(r=2, **fields))  # type: ignore[arg-type]
    assert [x.path for x in model.roster.layers["default"]] == expected
    model.save_pretrained(tmp_path)
    fresh = PeftModel.from_pretrained(twin(), tmp_path)
    assert [x.path for x in fresh.roster.layers["default"]] == expected


def test_t18_all_linear_but_the_head_means_the_same_after_a_reload(tmp_path: Path) -> None:
    def twin() -> nn.Module:
        model = nn.Module()
        model.lin = nn.Linear(4, 4)
        model.sub = nn.Module()
        model.sub.lin = nn.Linear(4, 4)
        model.get_output_embeddings = lambda: model.sub.lin
        return model

    model = get_peft_model(twin(), LoraConfig(r=2, target_modules="all-linear"))
    assert [x.path for x in model.roster.layers["default"]] == ["lin"]
    model.save_pretrained(tmp_path)
    fresh = PeftModel.from_pretrained(twin(), tmp_path)
    assert [x.path for x in fresh.roster.layers["default"]] == ["lin"]
