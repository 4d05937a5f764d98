"""Files, both ways, with the real PEFT: every layer kind and every option of LoRA."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

import multigraft
from multigraft import AdapterNameError, CheckpointError, MultigraftWarning
from tests import oracle
from tests.oracle import KINDS, Net, Pair, Stack, build, graft_pair, output, quiet

Case = tuple[Callable[[], nn.Module], dict[str, Any]]

CASES: dict[str, Case] = {
    **{f"layer kind {k}": (Net, {"target_modules": [k], "r": 4}) for k in KINDS},
    "alpha": (Net, {"target_modules": KINDS, "r": 2, "lora_alpha": 5}),
    "dropout in evaluation": (Net, {"target_modules": KINDS, "r": 2, "lora_dropout": 0.5}),
    "rslora": (Net, {"target_modules": KINDS, "r": 2, "use_rslora": True}),
    "no init": (Net, {"target_modules": KINDS, "r": 2, "init_lora_weights": False}),
    "gaussian init": (Net, {"target_modules": KINDS, "r": 2, "init_lora_weights": "gaussian"}),
    "lora_bias": (Net, {"target_modules": KINDS[1:], "lora_bias": True, "r": 2}),
    "dora": (Net, {"target_modules": [k for k in KINDS if k != "conv2"], "use_dora": True, "r": 2}),
    "bias lora_only": (Net, {"target_modules": KINDS, "r": 2, "bias": "lora_only"}),
    "bias all": (Net, {"target_modules": KINDS, "r": 2, "bias": "all"}),
    "bias all beside saved modules": (
        Net,
        {"target_modules": ["lin0"], "bias": "all", "modules_to_save": ["head", "norm"]},
    ),
    "bias all on transformers": (oracle.gpt2, {"target_modules": "all-linear", "bias": "all"}),
    "fan_in_fan_out on Conv1D": (oracle.gpt2, {"fan_in_fan_out": True}),
    "fan_in_fan_out on Linear": (Net, {"target_modules": ["lin0"], "fan_in_fan_out": True}),
    "modules_to_save": (
        Net,
        {"target_modules": ["lin0"], "modules_to_save": ["head", "conv1", "norm"]},
    ),
    "modules_to_save many": (Stack, {"target_modules": ["q_proj"], "modules_to_save": ["norm"]}),
    "modules_to_save container": (
        oracle.bert_classifier,
        {"target_modules": ["query"], "modules_to_save": ["pooler"]},
    ),
    "modules_to_save embeddings": (
        oracle.llama,
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    ),
    "patterns": (
        Stack,
        {
            "target_modules": ["q_proj", "my_q_proj"],
            "r": 2,
            "rank_pattern": {"layers.1.q_proj": 4, "my_q_proj": 3},
            "alpha_pattern": {r"layers\.[02]\.my_q_proj": 7},
        },
    ),
    "patterns of every kind": (
        Net,
        {
            "target_modules": KINDS,
            "r": 2,
            "rank_pattern": {"lin0": 3, "conv2": 4, "conv[13]": 5, "emb": 6},
            "alpha_pattern": {"turned": 3, "emb|conv.": 9},
            "use_rslora": True,
        },
    ),
    "layers_to_transform": (oracle.llama, {"layers_to_transform": [1]}),
    "layers_pattern": (
        Stack,
        {"target_modules": ["q_proj"], "layers_to_transform": 1, "layers_pattern": "layers"},
    ),
    "layers_pattern list": (
        Stack,
        {
            "target_modules": ["q_proj"],
            "layers_to_transform": [0, 2],
            "layers_pattern": ["h", "layers"],
        },
    ),
    "exclude list": (
        Stack,
        {"target_modules": ["q_proj"], "exclude_modules": ["layers.1.q_proj"]},
    ),
    "exclude regex": (
        Stack,
        {"target_modules": "all-linear", "exclude_modules": r"layers\.1\..*"},
    ),
    "regex": (Stack, {"target_modules": r"layers\.\d\.q_proj"}),
    "CAUSAL_LM all-linear": (
        oracle.llama,
        {"task_type": "CAUSAL_LM", "target_modules": "all-linear"},
    ),
    "CAUSAL_LM defaults": (oracle.llama, {"task_type": "CAUSAL_LM"}),
    "CAUSAL_LM scaled embedding": (
        oracle.gemma,
        {"task_type": "CAUSAL_LM", "target_modules": ["embed_tokens", "q_proj"]},
    ),
    "SEQ_CLS classifier": (oracle.bert_classifier, {"task_type": "SEQ_CLS"}),
    "SEQ_CLS score": (
        oracle.llama_classifier,
        {"task_type": "SEQ_CLS", "target_modules": "all-linear"},
    ),
    "SEQ_CLS pre_classifier": (
        oracle.distilbert_classifier,
        {"task_type": "SEQ_CLS", "target_modules": ["q_lin"]},
    ),
    "SEQ_CLS bias all": (oracle.bert_classifier, {"task_type": "SEQ_CLS", "bias": "all"}),
    "TOKEN_CLS": (oracle.bert_tagger, {"task_type": "TOKEN_CLS"}),
    "QUESTION_ANS": (oracle.bert_reader, {"task_type": "QUESTION_ANS"}),
    "FEATURE_EXTRACTION": (oracle.bert_encoder, {"task_type": "FEATURE_EXTRACTION"}),
    "SEQ_2_SEQ_LM": (oracle.t5, {"task_type": "SEQ_2_SEQ_LM"}),
}


@pytest.fixture(scope="module", params=CASES.values(), ids=CASES)
def saved(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Case, Pair, Path, Path]:
    """A case, its pair, and the two directories that the libraries saved it in."""
    maker, config = request.param
    pair = graft_pair(maker, config)
    folder = tmp_path_factory.mktemp("saved")
    ours, theirs = folder / "ours", folder / "theirs"
    with quiet():
        pair.theirs.save_pretrained(theirs)
    pair.ours.save_pretrained(ours)
    return request.param, pair, ours, theirs


def tensors(directory: Path) -> dict[str, Tensor]:
    with safe_open(directory / "adapter_model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def is_redundant(key: str) -> bool:
    """What PEFT writes beyond an adapter's own tensors: copies of the base's, and doubles.

    - under ``bias="all"``, the biases of saved modules a second and third time;
    - the whole matrix of an adapted embedding (ours with ``save_embedding_layers=True``).
    """
    return (
        ".original_module." in key
        or ".modules_to_save." in key
        or key.endswith("embed_tokens.base_layer.weight")
    )


def test_both_write_the_same_tensors(saved: tuple[Case, Pair, Path, Path]) -> None:
    _, _, ours, theirs = saved
    expected = {k: v for k, v in tensors(theirs).items() if not is_redundant(k)}
    written = tensors(ours)
    assert sorted(written) == sorted(expected)
    for key, value in written.items():
        assert value.dtype == expected[key].dtype, key
        assert torch.equal(value, expected[key]), key


def test_both_write_the_same_config(saved: tuple[Case, Pair, Path, Path]) -> None:
    (_, options), _, ours, theirs = saved
    written, expected = (
        json.loads((d / "adapter_config.json").read_text()) for d in (ours, theirs)
    )
    for config in (written, expected):
        for field in ("modules_to_save", "target_modules"):  # sets in PEFT: no order
            if isinstance(config[field], list):
                config[field].sort()
    if "pre_classifier" in (written["modules_to_save"] or []):
        # PEFT means it by `classifier`, the end of its name; names are whole here.
        written["modules_to_save"].remove("pre_classifier")
    if options.get("target_modules") == "all-linear":
        # PEFT lists full paths (before exclusion), we the shortest names that mean the same;
        # that they do is what the loading tests show.
        written.pop("target_modules"), expected.pop("target_modules")
    assert written == expected


def test_peft_loads_what_we_save(saved: tuple[Case, Pair, Path, Path]) -> None:
    (maker, _), pair, ours, _ = saved
    with quiet():
        loaded = peft.PeftModel.from_pretrained(build(maker), ours).eval()
    torch.testing.assert_close(output(loaded, pair.batch), output(pair.ours, pair.batch))
    assert oracle.peft_sites(loaded) == oracle.our_sites(pair.ours)


def test_we_load_what_peft_saves(
    saved: tuple[Case, Pair, Path, Path], recwarn: pytest.WarningsRecorder
) -> None:
    (maker, _), pair, _, theirs = saved
    base = build(maker)
    recwarn.clear()
    loaded = multigraft.PeftModel.from_pretrained(base, theirs).eval()
    assert [w for w in recwarn if issubclass(w.category, MultigraftWarning)] == []
    torch.testing.assert_close(output(loaded, pair.batch), output(pair.theirs, pair.batch))
    assert oracle.our_sites(loaded) == oracle.peft_sites(pair.theirs)


def test_every_case_changes_the_output(saved: tuple[Case, Pair, Path, Path]) -> None:
    (maker, _), pair, _, _ = saved
    difference = output(pair.ours, pair.batch) - output(build(maker), pair.batch)
    assert difference.abs().max() > 1e-4


def test_modules_that_peft_saves_by_the_end_of_their_name_are_loaded(tmp_path: Path) -> None:
    options = {"target_modules": ["q_proj"], "modules_to_save": ["norm"]}
    with quiet():
        theirs = peft.get_peft_model(build(oracle.llama), oracle.peft_config(options)).eval()
        state = oracle.random_state(oracle.peft_state(theirs))
        peft.set_peft_model_state_dict(theirs, state)
        theirs.save_pretrained(tmp_path)
    assert any(key.endswith("input_layernorm.weight") for key in tensors(tmp_path))
    ours = multigraft.PeftModel.from_pretrained(build(oracle.llama), tmp_path).eval()
    batch = oracle.inputs(ours)
    torch.testing.assert_close(output(ours, batch), output(theirs, batch))
    ours.save_pretrained(tmp_path / "again")
    again = multigraft.PeftModel.from_pretrained(build(oracle.llama), tmp_path / "again").eval()
    assert torch.equal(output(again, batch), output(ours, batch))


def test_biases_alone_make_no_saved_module(tmp_path: Path) -> None:
    # Our file: all biases, and a saved module whose name others end with.
    options = {"target_modules": ["q_lin"], "modules_to_save": ["lin"], "bias": "all"}
    ours = multigraft.get_peft_model(build(Ends), oracle.our_config(options)).eval()
    ours.save_pretrained(tmp_path)
    loaded = multigraft.PeftModel.from_pretrained(build(Ends), tmp_path)
    assert set(tensors(tmp_path)) == set(multigraft.get_peft_model_state_dict(loaded))
    assert loaded.peft_config["default"].modules_to_save == ["lin"]


class Ends(nn.Module):
    """Names that end alike."""

    def __init__(self) -> None:
        super().__init__()
        self.q_lin, self.k_lin, self.lin = (nn.Linear(4, 4) for _ in range(3))


def two_adapters() -> Pair:
    pair = graft_pair(Net, {"target_modules": ["lin0"], "modules_to_save": ["head"], "r": 2})
    oracle.add_to_both(pair, "second", {"target_modules": ["emb", "turned"], "r": 3}, seed=5)
    return pair


def test_several_adapters_go_into_the_folders_that_peft_uses(tmp_path: Path) -> None:
    pair = two_adapters()
    with quiet():
        pair.theirs.save_pretrained(tmp_path / "theirs")
    pair.ours.save_pretrained(tmp_path / "ours")
    listing = lambda d: sorted(str(p.relative_to(d)) for p in d.rglob("*") if p.is_file())  # noqa: E731
    assert listing(tmp_path / "ours") == listing(tmp_path / "theirs")
    for folder in ("", "second"):
        ours, theirs = (tensors(tmp_path / who / folder) for who in ("ours", "theirs"))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize("writer", ["ours", "theirs"])
def test_a_second_adapter_loads_from_its_subfolder(tmp_path: Path, writer: str) -> None:
    pair = two_adapters()
    with quiet():
        getattr(pair, writer).save_pretrained(tmp_path)
    with quiet():
        theirs = peft.PeftModel.from_pretrained(build(Net), tmp_path)
        theirs.load_adapter(tmp_path / "second", "second")
        theirs.set_adapter("second")
    ours = multigraft.PeftModel.from_pretrained(build(Net), tmp_path)
    ours.load_adapter(tmp_path, "second", subfolder="second")
    ours.set_adapter("second")
    pair.ours.set_adapter("second")
    expected = output(pair.ours, pair.batch)
    torch.testing.assert_close(output(ours.eval(), pair.batch), expected)
    torch.testing.assert_close(output(theirs.eval(), pair.batch), expected)


def test_selected_adapters_are_the_only_ones_written(tmp_path: Path) -> None:
    pair = two_adapters()
    pair.ours.save_pretrained(tmp_path, selected_adapters=["second"])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["README.md", "second"]
    loaded = multigraft.PeftModel.from_pretrained(build(Net), tmp_path, "second").eval()
    pair.ours.set_adapter("second")
    torch.testing.assert_close(output(loaded, pair.batch), output(pair.ours, pair.batch))


def test_an_unknown_selected_adapter_writes_nothing(tmp_path: Path) -> None:
    pair = two_adapters()
    with pytest.raises(AdapterNameError, match="secnod"):
        pair.ours.save_pretrained(tmp_path / "out", selected_adapters=["default", "secnod"])
    assert not (tmp_path / "out").exists()


def test_embedding_matrices_are_saved_on_request_as_peft_does(tmp_path: Path) -> None:
    pair = graft_pair(oracle.llama, {"target_modules": ["embed_tokens", "q_proj"]})
    with quiet():
        pair.theirs.save_pretrained(tmp_path / "theirs", save_embedding_layers=True)
    pair.ours.save_pretrained(tmp_path / "ours", save_embedding_layers=True)
    ours, theirs = tensors(tmp_path / "ours"), tensors(tmp_path / "theirs")
    # PEFT adds the tied or untied output head as well; an adapter has no part in it.
    theirs.pop("base_model.model.lm_head.weight", None)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_a_gathered_state_dict_gives_the_values(tmp_path: Path) -> None:
    pair = graft_pair(Net, {"target_modules": ["lin0"], "modules_to_save": ["head"]})
    gathered = {k: torch.full_like(v, 2.0) for k, v in pair.ours.state_dict().items()}
    pair.ours.save_pretrained(tmp_path, state_dict=gathered)
    assert all(bool((value == 2.0).all()) for value in tensors(tmp_path).values())


def test_key_mapping_renames_the_keys_of_a_file(tmp_path: Path) -> None:
    pair = graft_pair(oracle.llama, {"target_modules": ["q_proj"]})
    state = {
        key.replace(".model.layers.", ".old.blocks."): value
        for key, value in oracle.peft_state(pair.theirs).items()
    }
    from safetensors.torch import save_file

    pair.ours.save_pretrained(tmp_path)
    save_file(state, tmp_path / "adapter_model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"old\.blocks"):
        multigraft.PeftModel.from_pretrained(build(oracle.llama), tmp_path)
    mapping = {r"old\.blocks\.": "model.layers."}
    loaded = multigraft.PeftModel.from_pretrained(
        build(oracle.llama), tmp_path, key_mapping=mapping
    ).eval()
    with quiet():
        theirs = peft.PeftModel.from_pretrained(build(oracle.llama), tmp_path, key_mapping=mapping)
    expected = output(pair.ours, pair.batch)
    torch.testing.assert_close(output(loaded, pair.batch), expected)
    torch.testing.assert_close(output(theirs.eval(), pair.batch), expected)


def test_a_config_given_by_hand_wins_over_the_files(tmp_path: Path) -> None:
    pair = graft_pair(Net, {"target_modules": ["lin0"], "r": 4, "lora_alpha": 4})
    pair.ours.save_pretrained(tmp_path)
    options = {"target_modules": ["lin0"], "r": 4, "lora_alpha": 12}
    ours = multigraft.PeftModel.from_pretrained(
        build(Net), tmp_path, config=oracle.our_config(options)
    ).eval()
    with quiet():
        theirs = peft.PeftModel.from_pretrained(
            build(Net), tmp_path, config=oracle.peft_config(options)
        ).eval()
    assert ours.base_model.layers()[0].scaling == {"default": 3.0}
    torch.testing.assert_close(output(ours, pair.batch), output(theirs, pair.batch))


def test_a_hub_name_is_fetched_file_by_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = graft_pair(Net, {"target_modules": ["lin0"]})
    pair.ours.save_pretrained(tmp_path / "deep")
    asked = []

    def download(repo: str, filename: str, subfolder: str | None = None, **options: Any) -> str:
        asked.append((repo, subfolder, filename, options))
        return str(tmp_path / (subfolder or "") / filename)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    loaded = multigraft.PeftModel.from_pretrained(
        build(Net), "someone/adapter", subfolder="deep", revision="v2", token="t"
    ).eval()
    torch.testing.assert_close(output(loaded, pair.batch), output(pair.ours, pair.batch))
    told = {"library_name": "multigraft", "library_version": multigraft.__version__}
    options = {"revision": "v2", "token": "t", **told}
    assert asked == [
        ("someone/adapter", "deep", "adapter_config.json", options),
        ("someone/adapter", "deep", "adapter_model.safetensors", options),
    ]


def test_a_hub_failure_names_the_repository_and_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*_: Any, **__: Any) -> str:
        raise OSError("no route to host")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    with pytest.raises(CheckpointError, match=r"someone/adapter.*adapter_config.*no route to host"):
        multigraft.PeftModel.from_pretrained(build(Net), "someone/adapter")


def test_half_precision_tensors_keep_their_dtype_on_disk(tmp_path: Path) -> None:
    pair = graft_pair(Net, {"target_modules": KINDS, "modules_to_save": ["head"]})
    pair.ours.to(torch.bfloat16), pair.theirs.to(torch.bfloat16)
    with quiet():
        pair.theirs.save_pretrained(tmp_path / "theirs")
    pair.ours.save_pretrained(tmp_path / "ours")
    ours, theirs = tensors(tmp_path / "ours"), tensors(tmp_path / "theirs")
    assert {k: v.dtype for k, v in ours.items()} == {k: v.dtype for k, v in theirs.items()}
    assert {v.dtype for v in ours.values()} == {torch.bfloat16}
