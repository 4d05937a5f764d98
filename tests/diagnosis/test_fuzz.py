"""Files that are almost right: the doctor gives findings, whatever they hold."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory

from hypothesis import given, settings
from hypothesis import strategies as st

from multigraft import doctor
from tests.bad_input.test_fuzz import ON_SITES, SETTINGS, WEIGHTS, bent, damaged, files, only_ours
from tests.weaknesses import nets

WORDS = [
    *("lora_A", "lora_B", "lora_E", "lora_magnitude_vector", "modules_to_save", "weight", "bias"),
    *("base_layer", "original_module", "base_model", "model", "default", "second", "up", ""),
]


@st.composite
def misnamed(draw: st.DrawFn, weights: bytes) -> bytes:
    """Weights with words put into some names, or taken out."""
    end = 8 + int.from_bytes(weights[:8], "little")
    header = json.loads(weights[8:end])
    for _ in range(draw(st.integers(1, 4))):
        name = draw(st.sampled_from(sorted(header.keys() - {"__metadata__"})))
        parts = name.split(".")
        place = draw(st.integers(0, len(parts)))
        more = draw(st.lists(st.sampled_from(WORDS), max_size=3))
        parts[place : place + draw(st.integers(0, 2))] = more
        header[".".join(parts)] = header.pop(name)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + weights[end:]


@st.composite
def bad_files(draw: st.DrawFn) -> tuple[bytes, bytes]:
    """A config and weights, one of which is bent."""
    config, weights = files(draw(st.sampled_from(["", *ON_SITES])))
    return draw(
        st.one_of(
            bent(json.loads(config)).map(lambda values: (json.dumps(values).encode(), weights)),
            damaged(config).map(lambda data: (data, weights)),
            damaged(weights).map(lambda data: (config, data)),
            misnamed(weights).map(lambda data: (config, data)),
        )
    )


@settings(max_examples=300)
@given(bad_files(), st.booleans(), st.sampled_from([None, "default"]))
def test_any_files_are_examined_and_mended_or_left(
    both: tuple[bytes, bytes], un_nest: bool, adapter: str | None
) -> None:
    with TemporaryDirectory() as name, only_ours():
        folder = Path(name) / "adapter"
        folder.mkdir()
        (folder / SETTINGS).write_bytes(both[0])
        (folder / WEIGHTS).write_bytes(both[1])
        assert str(doctor(folder))
        options = {"fix": True, "un_nest": un_nest, "adapter_name": adapter}
        found = doctor(folder, nets.net(), output=Path(name) / "new", **options)
        assert json.dumps(found.to_dict())
        assert bool(found.done) is (Path(name) / "new").exists()
