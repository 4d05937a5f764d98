"""writing.py: tensors in a file, whatever they share and however they lie."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from multigraft import writing
from multigraft.writing import write_tensors

WAYS = [
    pytest.param(
        True,
        id="addresses",
        marks=pytest.mark.skipif(
            writing.SPEC is None, reason="this safetensors takes no addresses"
        ),
    ),
    pytest.param(False, id="arrays"),
]


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    if not request.param:
        monkeypatch.setattr(writing, "SPEC", None)
    return bool(request.param)


def tensors() -> dict[str, Tensor]:
    torch.manual_seed(0)
    dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.int64)
    made = {str(dtype): torch.randn(3, 4).to(dtype) for dtype in dtypes}
    return {
        **made,
        "bool": torch.tensor([True, False]),
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 3),
        "long.name-ü": torch.nn.Parameter(torch.ones(2)),
    }


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for key, tensor in one.items():
        assert (tensor.dtype, tensor.shape) == (other[key].dtype, other[key].shape)
        left, right = (t.detach().contiguous().flatten() for t in (tensor, other[key]))
        assert torch.equal(left.view(torch.uint8), right.view(torch.uint8))


@pytest.mark.usefixtures("way")
def test_every_dtype_and_shape_comes_back(tmp_path: Path) -> None:
    write_tensors(tensors(), tmp_path / "a.safetensors")
    same(load_file(tmp_path / "a.safetensors"), tensors())


@pytest.mark.usefixtures("way")
def test_the_file_is_the_formats_own_byte_for_byte(tmp_path: Path) -> None:
    write_tensors(tensors(), tmp_path / "ours")
    save_file(tensors(), tmp_path / "theirs", {"format": "pt"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


@pytest.mark.usefixtures("way")
def test_shared_memory_and_views_are_written_as_what_they_show(tmp_path: Path) -> None:
    base = torch.arange(12.0).view(3, 4)
    state = {"a": base, "b": base, "turned": base.T, "part": base[:, 1:3], "row": base[1]}
    write_tensors(state, tmp_path / "a")
    same(load_file(tmp_path / "a"), state)


@pytest.mark.usefixtures("way")
def test_a_disk_that_refuses_is_an_error_of_the_system(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"absent|No such file"):
        write_tensors({"a": torch.ones(1)}, tmp_path / "absent" / "a.safetensors")
