"""Files that are almost right, thousands of ways: errors of ours come out, or a model, in time."""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load as safetensors_load
from safetensors.torch import save as safetensors_save

from multigraft import MultigraftError, PeftConfig, PeftModel, get_peft_model
from multigraft.config import CONFIGS
from multigraft.reading import read_config, read_header, read_tensors
from tests.bad_input.loading import CONFIG, PREFIX, SETTINGS, WEIGHTS
from tests.weaknesses import nets

SECONDS = 5.0
"""Each example takes milliseconds; the limit is for the ones that would take for ever."""
OPTIONS: dict[str, dict[str, Any]] = {
    "ADALORA": {"target_modules": ["up"], "total_step": 10},
    "ADAPTION_PROMPT": {"adapter_len": 2, "adapter_layers": 1},
    "IA3": {"target_modules": ["up"], "feedforward_modules": []},
    "LN_TUNING": {"target_modules": ["norm"]},
    "P_TUNING": {"num_virtual_tokens": 2},
    "PREFIX_TUNING": {"num_virtual_tokens": 2},
    "PROMPT_TUNING": {"num_virtual_tokens": 2},
    "TRAINABLE_TOKENS": {"target_modules": ["embed"], "token_indices": [1, 2]},
}
ON_SITES = sorted(n for n in CONFIGS if not CONFIGS[n](**OPTIONS.get(n, {})).is_prompt_learning)
ON_SITES.remove("ADAPTION_PROMPT")

WORDS = ["", "(", ".*", "up", "head", "embed", "conv", "all-linear", "none", "all", "true", "LORA"]
NUMBERS = [-1, 0, 1, 2, 3, 10**9, 10**18, 10**30, 10**400, float("nan"), float("inf"), 1e308]
NAMES = [
    *(
        "embed.weight",
        "head.weight",
        "up.lora_A.weight",
        "x",
        "blocks.0.experts.3.w1.lora_A.weight",
    ),
    *("embed.base_layer.weight", "head.modules_to_save.weight", "blocks.0.up.lora_B.bias"),
]
scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.sampled_from(NUMBERS),
    st.text(max_size=8),
    st.sampled_from(WORDS),
)
values = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.sampled_from(WORDS) | st.text(max_size=6), inner, max_size=3),
    ),
    max_leaves=6,
)


@contextmanager
def only_ours() -> Iterator[None]:
    """Fail for errors that are not ours, and for what takes too long."""
    start = time.perf_counter()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except MultigraftError as error:
        assert str(error)
    assert time.perf_counter() - start < SECONDS


@cache
def files(method: str = "") -> tuple[bytes, bytes]:
    """A good config and good weights, as bytes; of `CONFIG` by default."""
    options = {"target_modules": ["up"]} | OPTIONS.get(method, {})
    config = CONFIGS[method](**options) if method else CONFIG
    with TemporaryDirectory() as folder:
        get_peft_model(nets.net(), config).save_pretrained(folder)
        return Path(folder, SETTINGS).read_bytes(), Path(folder, WEIGHTS).read_bytes()


@st.composite
def bent(draw: st.DrawFn, good: dict[str, Any]) -> dict[str, Any]:
    """A config with one or two values replaced, added or taken away."""
    result = dict(good)
    for _ in range(draw(st.integers(1, 2))):
        key = draw(st.sampled_from(sorted(good)) | st.text(max_size=5))
        if draw(st.integers(0, 4)):
            result[key] = draw(values)
        else:
            result.pop(key, None)
    return result


@st.composite
def damaged(draw: st.DrawFn, good: bytes, end: int | None = None) -> bytes:
    """Bytes with some of them replaced, put in, taken out, or cut off; before ``end``."""
    data = bytearray(good)
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.integers(0, max(0, min(len(data), end or len(data)) - 1)))
        piece = draw(st.binary(max_size=4) | st.sampled_from([b"[", b"}", b'"', b"-", b"9" * 30]))
        length = draw(st.sampled_from([0, 0, 1, len(piece), len(data)]))
        data[place : place + length] = piece
    return bytes(data)


@st.composite
def misshapen(draw: st.DrawFn, weights: bytes) -> bytes:
    """A sound file, in which some tensors have other shapes, dtypes or names."""
    tensors = safetensors_load(weights)
    for _ in range(draw(st.integers(1, 3))):
        name = draw(st.sampled_from(sorted(tensors)))
        shape = draw(st.lists(st.integers(0, 13), max_size=4))
        dtype = draw(st.sampled_from([torch.float32, torch.float16, torch.int64, torch.bool]))
        tensor = torch.full(shape, draw(st.sampled_from([0, 1, float("inf")]))).to(dtype)
        if draw(st.booleans()):
            del tensors[name]
            stem = draw(st.sampled_from(["", PREFIX]))
            name = stem + draw(st.sampled_from(NAMES))
        tensors[name] = tensor
    return safetensors_save(tensors)


class Worded(nets.Net):
    """A `Net` that tells its embedding."""

    def get_input_embeddings(self) -> torch.nn.Module:
        return self.embed


def load(folder: Path) -> None:
    PeftModel.from_pretrained(Worded().eval(), folder, local_files_only=True)


def attempt(config: bytes, weights: bytes, action: Callable[[Path], object]) -> None:
    """The action on a folder of these two files."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        (folder / SETTINGS).write_bytes(config)
        (folder / WEIGHTS).write_bytes(weights)
        with only_ours():
            action(folder)


@pytest.mark.parametrize("method", sorted(CONFIGS))
@settings(max_examples=150)
@given(st.data())
def test_values_of_a_config_may_be_anything(method: str, data: st.DataObject) -> None:
    config = CONFIGS[method](**OPTIONS.get(method, {}))
    good = config.to_dict() | {"peft_type": method}
    with only_ours():
        found = PeftConfig.from_dict(data.draw(bent(good)))
        assert isinstance(found.to_json(), str)
        assert type(found.copy()) is type(found)


@pytest.mark.parametrize("method", ON_SITES)
@settings(max_examples=60)
@given(st.data())
def test_a_folder_with_any_config_is_loaded_or_refused(method: str, data: st.DataObject) -> None:
    config, weights = files(method)
    settings_ = data.draw(bent(json.loads(config)))
    attempt(json.dumps(settings_).encode(), weights, load)


@settings(max_examples=400)
@given(st.data())
def test_a_config_of_any_bytes_is_read_or_refused(data: st.DataObject) -> None:
    config, weights = files()
    read = lambda folder: PeftConfig.from_dict(read_config(folder / SETTINGS))  # noqa: E731
    attempt(data.draw(damaged(config)), weights, read)


@settings(max_examples=400)
@given(st.data())
def test_weights_of_any_bytes_are_read_or_refused(data: st.DataObject) -> None:
    config, weights = files()
    length = 8 + int.from_bytes(weights[:8], "little")

    def read(folder: Path) -> None:
        header = read_header(folder / WEIGHTS)
        tensors = read_tensors(folder / WEIGHTS)
        found = {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()}
        assert found == {name: (i.dtype, i.shape) for name, i in header.tensors.items()}

    attempt(config, data.draw(damaged(weights, length) | damaged(weights)), read)


@settings(max_examples=300)
@given(st.data())
def test_a_header_of_any_entries_is_read_or_refused(data: st.DataObject) -> None:
    config, weights = files()
    length = int.from_bytes(weights[:8], "little")
    header = json.loads(weights[8 : 8 + length])
    name = data.draw(st.sampled_from(sorted(header)))
    change = bent(header[name]) if data.draw(st.booleans()) else values
    header[name] = data.draw(change)
    text = json.dumps(header).encode()
    changed = len(text).to_bytes(8, "little") + text + weights[8 + length :]
    attempt(config, changed, lambda folder: read_tensors(folder / WEIGHTS))


@pytest.mark.parametrize("method", ["", *ON_SITES])
@settings(max_examples=40)
@given(st.data())
def test_a_folder_with_tensors_of_any_shape_is_loaded_or_refused(
    method: str, data: st.DataObject
) -> None:
    config, weights = files(method)
    attempt(config, data.draw(misshapen(weights)), load)


@settings(max_examples=100)
@given(st.data())
def test_a_folder_with_any_weights_is_loaded_or_refused(data: st.DataObject) -> None:
    config, weights = files()
    length = 8 + int.from_bytes(weights[:8], "little")
    attempt(config, data.draw(damaged(weights, length)), load)


@pytest.mark.parametrize("method", ["", *ON_SITES])
def test_the_good_files_that_are_bent_here_are_loaded(method: str, tmp_path: Path) -> None:
    (tmp_path / SETTINGS).write_bytes(files(method)[0])
    (tmp_path / WEIGHTS).write_bytes(files(method)[1])
    load(tmp_path)
