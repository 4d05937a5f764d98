"""The pages on tasks: their Python and their commands run as written, and do what the text says."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import multigraft
from multigraft.demo import model_path
from tests import oracle
from tests.docs import page

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def somewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of its own for each page, with the demo's base as `MODEL`."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "MODEL").symlink_to(model_path(), target_is_directory=True)
    torch.manual_seed(0)
    yield tmp_path


def is_base(model: nn.Module) -> bool:
    """Whether the model has the demo's very bits, and nothing of ours."""
    fresh = type(model).from_pretrained(model_path(), dtype="float32").state_dict()  # type: ignore[attr-defined]
    own = model.state_dict()
    return own.keys() == fresh.keys() and all(torch.equal(own[key], fresh[key]) for key in own)


def test_prompts(somewhere: Path) -> None:
    names = page.run("prompts.md", base=oracle.llama())
    for adapter in ("ask", "style"):
        assert (somewhere / "out" / adapter / "adapter_model.safetensors").is_file()
    assert names["model"].active_adapters == ["style"]


@pytest.mark.slow
def test_quick_start(somewhere: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = page.run("quick-start.md")
    printed = capsys.readouterr().out
    assert names["loss"] < 1
    assert "dates: " in printed and "capitals: " in printed
    for adapter in ("capitals", "dates"):
        assert (somewhere / "my-adapters" / adapter / "adapter_model.safetensors").is_file()
    assert set(names["loaded"].peft_config) == {"dates", "capitals"}
    assert is_base(names["base"])


@pytest.mark.slow
def test_text_generation(somewhere: Path) -> None:
    names = page.run("text-generation.md")
    assert (somewhere / "dates" / "adapter_model.safetensors").is_file()
    config = json.loads((somewhere / "dates" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "MODEL"
    assert (somewhere / "merged" / "model.safetensors").is_file()
    assert not [m for m in names["merged"].modules() if isinstance(m, multigraft.AdaptedLayer)]


def test_classification(somewhere: Path) -> None:
    names = page.run("classification.md")
    head = somewhere / "classifiers" / "mood" / "adapter_config.json"
    assert "score" in json.loads(head.read_text())["modules_to_save"]
    assert names["loss"] < 0.5
    # Rows of one batch are of two classifiers with heads of their own.
    assert names["logits"].shape == (4, 2)
    assert type(names["model"]) is multigraft.PeftModelForTokenClassification


def test_classifiers_in_one_batch_have_each_its_own_head() -> None:
    names: dict[str, object] = {}
    for block in page.python("classification.md")[:3]:
        exec(compile(block, "classification.md", "exec"), names)
    model, batch, mixed = names["model"], names["batch"], names["logits"]
    with torch.no_grad():
        for row, name in enumerate(["mood", "topic"]):
            model.set_adapter(name)  # type: ignore[attr-defined]
            alone = model(**batch).logits  # type: ignore[operator,arg-type]
            torch.testing.assert_close(mixed[row], alone[row])  # type: ignore[index]


def test_embeddings() -> None:
    names = page.run("embeddings.md")
    assert names["losses"][-1] < 0.5 * names["losses"][0]
    trained = [n for n, p in names["model"].named_parameters() if p.grad is not None]
    assert any("trainable_tokens" in name for name in trained)
    with torch.no_grad():
        lengths = names["rows"].norm(dim=-1)
    torch.testing.assert_close(lengths, torch.ones(6))


class Denoiser(nn.Module):
    """An attention and a convolution under diffusers' names."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(4, 16, 3, padding=1)
        self.to_q, self.to_k, self.to_v = (nn.Linear(16, 16) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(16, 16), nn.Dropout(0.0)])
        self.conv_out = nn.Conv2d(16, 4, 3, padding=1)

    def forward(self, x: Tensor, amount: Tensor) -> Tensor:
        """``(batch, 4, height, width)`` and ``(batch,)`` to the like of the first."""
        h = self.conv_in(x) + amount[:, None, None, None]
        flat = h.flatten(2).mT
        q, k, v = self.to_q(flat), self.to_k(flat), self.to_v(flat)
        mixed = self.to_out[0](nn.functional.scaled_dot_product_attention(q, k, v))
        return self.conv_out(h + mixed.mT.reshape(h.shape))


def test_vision(somewhere: Path) -> None:
    names = page.run("vision.md", unet=Denoiser())
    assert names["loss"] < 10
    assert set(names["model"].active_adapters) == {"style", "light"}
    assert [layer.scaling["light"] for layer in names["model"].base_model.layers()] == [1.0] * 5
    assert (somewhere / "pytorch_lora_weights.safetensors").is_file()
    assert (somewhere / "style.safetensors").is_file()


def test_quantised(somewhere: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("bitsandbytes")
    names = page.run("quantised.md")
    kinds = {type(m).__name__ for m in names["base"].modules()}
    assert "Linear4bit" in kinds
    assert names["worst"].error > 0
    assert names["worst"].where in capsys.readouterr().out
    assert not [m for m in names["merged"].modules() if isinstance(m, multigraft.AdaptedLayer)]
