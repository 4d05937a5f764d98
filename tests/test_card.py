"""Model cards are written once, and changed without losing what they say."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub

from multigraft import LoraConfig
from multigraft.card import new_card, update_card

CONFIG = LoraConfig(base_model_name_or_path="me/base")


def test_a_fresh_card_names_base_and_method(tmp_path: Path):
    update_card(tmp_path, CONFIG)
    card = huggingface_hub.ModelCard.load(tmp_path / "README.md")
    assert card.data.base_model == "me/base"
    assert card.data.tags == ["lora", "multigraft"]
    assert str(card.data.library_name) == "peft"
    assert (tmp_path / "README.md").read_text() == new_card(CONFIG)


def test_a_changed_card_keeps_its_text_and_other_fields(tmp_path: Path):
    text = "---\nlibrary_name: transformers\nlicense: mit\ntags: [poems]\n---\n\n# Mine\n\nWords.\n"
    (tmp_path / "README.md").write_text(text)
    update_card(tmp_path, CONFIG)
    card = huggingface_hub.ModelCard.load(tmp_path / "README.md")
    assert card.data.license == "mit"
    assert card.data.library_name == "peft"
    assert card.data.tags == ["poems", "lora", "multigraft"]
    assert card.text.strip() == "# Mine\n\nWords."


def test_changing_it_twice_is_changing_it_once(tmp_path: Path):
    (tmp_path / "README.md").write_text("# Mine\n")
    update_card(tmp_path, CONFIG)
    once = (tmp_path / "README.md").read_text()
    update_card(tmp_path, CONFIG)
    assert (tmp_path / "README.md").read_text() == once
