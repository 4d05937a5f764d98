"""Any number of adapters through a few slots: each row gets its own, and memory stays flat."""

from __future__ import annotations

import gc
import resource
import shutil
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from multigraft import (
    AdapterNameError,
    CheckpointError,
    ConfigError,
    LoraConfig,
    PeftModel,
    RoutingError,
    get_peft_model,
)
from multigraft.serving import AdapterLibrary, Disk, Shelf
from multigraft.serving.shelf import Source

WIDTH = 8


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up = nn.Linear(WIDTH, 16)
        self.down = nn.Linear(16, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x)))


def write(
    folder: Path, seed: int, rank: int = 2, targets: tuple[str, ...] = ("up", "down")
) -> None:
    """An adapter's files, as `save_pretrained` leaves them."""
    config = LoraConfig(r=rank, lora_alpha=rank + seed % 3, target_modules=list(targets))
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    torch.manual_seed(seed)
    sizes = {"up": (WIDTH, 16), "down": (16, WIDTH)}
    tensors = {}
    for name in targets:
        wide, out = sizes[name]
        tensors[f"base_model.model.{name}.lora_A.weight"] = torch.randn(rank, wide)
        tensors[f"base_model.model.{name}.lora_B.weight"] = torch.randn(out, rank)
    save_file(tensors, folder / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("adapters")
    for n in range(12):
        write(root / f"a{n}", n, rank=1 + n % 4, targets=("up", "down") if n % 3 else ("up",))
    return root


@pytest.fixture
def library(folder) -> AdapterLibrary:
    found = AdapterLibrary(Net(), slots=3, rank=4)
    found.add_folder(folder)
    found.model.eval()
    return found


X = torch.randn(6, 5, WIDTH, generator=torch.Generator().manual_seed(1))


def alone(folder: Path, name: str, x: Tensor) -> Tensor:
    model: nn.Module = Net()
    if name != "__base__":
        model = PeftModel.from_pretrained(model, folder / name)
    with torch.no_grad():
        return model.eval()(x)


def served(library: AdapterLibrary, names: list[str]) -> Tensor:
    with torch.no_grad(), library.serving(names) as rows:
        return library.model(X[: len(names)], adapter_names=rows)


def test_each_row_gets_its_adapter_however_often_slots_change(library, folder):
    for first in range(12):
        names = [f"a{(first + n) % 12}" for n in (0, 5, 0, 7)] + ["__base__"]
        found = served(library, names)
        for row, name in enumerate(names):
            assert torch.allclose(found[row], alone(folder, name, X[row : row + 1])[0], atol=1e-5)
    assert library.counts.asked == 36
    assert library.counts.swapped + library.counts.found == 36
    assert library.counts.read == 12


def test_the_least_recently_used_makes_room(library):
    served(library, ["a0", "a1", "a2"])
    served(library, ["a0"])
    served(library, ["a3"])
    assert library.in_slots == ["a2", "a0", "a3"]


def test_what_a_batch_uses_is_never_put_out(library, folder):
    with library.serving(["a0"]) as rows:
        served(library, ["a1", "a2"])
        served(library, ["a3", "a4"])
        with torch.no_grad():
            found = library.model(X[:1], adapter_names=rows)
        assert torch.allclose(found, alone(folder, "a0", X[:1]), atol=1e-5)
        with pytest.raises(RoutingError, match="4 would be in use at once; there are 3 slots"):
            served(library, ["a5", "a6", "a7"])
    served(library, ["a5", "a6", "a7"])


def test_a_batch_of_more_adapters_than_slots_is_refused(library):
    with pytest.raises(RoutingError, match=r"names 4 adapters.*there are 3 slots. Split the batch"):
        served(library, ["a0", "a1", "a2", "a3"])
    assert library.in_slots == []


def test_an_unknown_name_is_told_with_the_nearest(library):
    with pytest.raises(AdapterNameError, match=r"no adapter called `a111`.* Nearest: `a11`"):
        served(library, ["a111"])


def test_a_name_that_is_known_is_not_taken_again(library, folder):
    with pytest.raises(AdapterNameError, match="`a3` is known already"):
        library.add("a3", folder / "a3")
    with pytest.raises(AdapterNameError, match="is known already"):
        library.add_folder(folder)


def test_a_removed_adapter_leaves_its_slot(library, folder):
    served(library, ["a0", "a1", "a2"])
    library.remove("a1")
    served(library, ["a3"])
    assert library.in_slots == ["a0", "a2", "a3"]
    with pytest.raises(AdapterNameError):
        served(library, ["a1"])
    with library.serving(["a0"]), pytest.raises(RoutingError, match="in use"):
        library.remove("a0")


@pytest.mark.parametrize("fault", ["rank", "damaged", "missing"])
def test_an_adapter_that_does_not_fit_changes_nothing(library, folder, tmp_path, fault):
    write(tmp_path / "bad", 1, rank=9 if fault == "rank" else 2)
    weights = tmp_path / "bad" / "adapter_model.safetensors"
    if fault == "damaged":
        weights.write_bytes(b"damaged")
    if fault == "missing":
        shutil.rmtree(tmp_path / "bad")
    library.add("bad", tmp_path / "bad")
    served(library, ["a0", "a1", "a2"])
    with pytest.raises(CheckpointError):
        served(library, ["a0", "bad"])
    for names in (["a0", "a1", "a2"], ["a3", "a4", "a5"]):
        found = served(library, names)
        for row, name in enumerate(names):
            assert torch.allclose(found[row], alone(folder, name, X[row : row + 1])[0], atol=1e-5)


def test_memory_keeps_what_was_used_last(folder):
    one = Shelf(1 << 30).get("a", Source(str(folder / "a2"))).nbytes
    library = AdapterLibrary(Net(), slots=1, rank=4, memory=2 * one)
    library.add_folder(folder)
    for name in ("a1", "a2", "a1", "a2", "a4", "a1"):
        served(library, [name])
        assert library.in_memory <= 2 * one
    assert 3 <= library.counts.read < 6


def test_copies_on_disk_are_used_and_make_room(folder, tmp_path):
    slow = shutil.copytree(folder, tmp_path / "slow")
    library = AdapterLibrary(Net(), slots=1, rank=4, memory=1, disk=tmp_path / "disk")
    library.add_folder(slow)
    served(library, ["a1"])
    shutil.rmtree(slow / "a1")
    served(library, ["a2"])
    assert torch.allclose(served(library, ["a1"]), alone(folder, "a1", X[:1]), atol=1e-5)
    size = Disk(tmp_path / "disk", 1 << 30).nbytes()
    assert size > 0
    small = Disk(tmp_path / "disk", size)
    small.path(Source(str(slow / "a3")))
    assert small.nbytes() <= size


def test_threads_share_the_slots(library, folder):
    expected = {f"a{n}": alone(folder, f"a{n}", X[:1]) for n in range(12)}
    wrong: list[str] = []
    forward = threading.Lock()  # one model serves one call at a time

    def work(start: int) -> None:
        for n in range(12):
            name = f"a{(start + n) % 12}"
            with library.serving([name]) as rows, forward, torch.no_grad():
                if not torch.allclose(
                    library.model(X[:1], adapter_names=rows), expected[name], atol=1e-5
                ):
                    wrong.append(name)

    threads = [threading.Thread(target=work, args=(5 * n,)) for n in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_it_stands_beside_adapters_of_the_model_itself(folder):
    model = get_peft_model(Net(), LoraConfig(r=2, target_modules=["up"], init_lora_weights=False))
    model.eval()
    with torch.no_grad():
        before = model(X)
    library = AdapterLibrary(model, slots=2, rank=4)
    library.add_folder(folder)
    served(library, ["a1"])
    with torch.no_grad():
        assert torch.equal(model(X), before)
    assert model.active_adapters == ["default"]


@pytest.mark.parametrize(
    "options", [{"slots": 0}, {"rank": 0}, {"memory": 0}, {"slots": 1.5}, {"slots": True}]
)
def test_numbers_that_make_no_sense_are_refused(options):
    with pytest.raises(ConfigError, match="must be a"):
        AdapterLibrary(Net(), **options)


@pytest.mark.slow
def test_an_hour_of_swaps_over_a_thousand_adapters_leaves_memory_flat(tmp_path):
    for n in range(1000):
        write(tmp_path / f"a{n}", n, rank=1 + n % 4)
    library = AdapterLibrary(Net(), slots=4, rank=4, memory=20_000)
    assert len(library.add_folder(tmp_path)) == 1000
    library.model.eval()
    # One every two seconds, after as many as fill the places.
    order = torch.randint(1000, (2200,), generator=torch.Generator().manual_seed(0)).tolist()

    def swap(numbers: list[int]) -> None:
        for n in numbers:
            served(library, [f"a{n}"])

    swap(order[:400])
    gc.collect()
    tensors = sum(isinstance(found, Tensor) for found in gc.get_objects())
    before = memory()
    swap(order[400:])
    gc.collect()
    assert library.counts.swapped > 2100
    assert memory() - before < 8 << 20
    assert sum(isinstance(found, Tensor) for found in gc.get_objects()) <= tensors + 16
    assert library.in_memory <= 20_000
    found = served(library, ["a7"])
    assert torch.allclose(found, alone(tmp_path, "a7", X[:1]), atol=1e-5)


def memory() -> int:
    """Bytes that this process holds now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()
