"""Model cards are written once, and changed without losing what they say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import yaml

from multigraft import LoraConfig
from multigraft.card import Facts, metadata, new_card, tag_card, update_card

CONFIG = LoraConfig(base_model_name_or_path="me/base", task_type="CAUSAL_LM")
TAGS = ["lora", "multigraft", "base_model:adapter:me/base"]
FACTS = Facts(
    datasets=["me/verses", "a folder: of mine"],
    metrics={"loss": 1e-05, "accuracy": 0.5, "diverged": float("nan")},
    language="de",
    license="apache-2.0",
    tags=["yes", "1.0", "two words: here"],
    training={"steps": 10},
)


def card(folder: Path) -> huggingface_hub.ModelCard:
    return huggingface_hub.ModelCard.load(folder / "README.md")


def test_a_fresh_card_names_base_and_method(tmp_path: Path):
    update_card(tmp_path, CONFIG)
    assert card(tmp_path).data.base_model == "me/base"
    assert card(tmp_path).data.tags == TAGS
    assert card(tmp_path).data.pipeline_tag == "text-generation"
    assert str(card(tmp_path).data.library_name) == "peft"
    assert (tmp_path / "README.md").read_text() == new_card(CONFIG)


@pytest.mark.parametrize("is_there", [False, True], ids=["fresh", "changed"])
def test_a_card_says_what_it_was_trained_on_and_what_was_measured(tmp_path: Path, is_there: bool):
    if is_there:
        (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n# Mine\n")
    update_card(tmp_path, CONFIG, FACTS)
    data = card(tmp_path).data
    assert data.datasets == ["me/verses"]
    assert data.metrics == ["loss", "accuracy"]
    assert (data.language, data.license) == ("de", "apache-2.0")
    assert data.tags == [*TAGS, "yes", "1.0", "two words: here"]
    found = {r.metric_type: r.metric_value for r in data.eval_results}
    assert found == {"loss": 1e-05, "accuracy": 0.5}
    assert {(r.task_type, r.dataset_type) for r in data.eval_results} == {
        ("text-generation", "me/verses")
    }


def test_a_fresh_head_is_what_the_hubs_library_writes(tmp_path: Path):
    """Parsed alike, key by key; nothing is taken for a number or a truth value."""
    (result,) = yaml.safe_load(new_card(CONFIG, FACTS).split("---")[1])["model-index"]
    values: dict[str, Any] = metadata(CONFIG, FACTS)
    results = [
        huggingface_hub.EvalResult(
            task_type="text-generation",
            dataset_type="me/verses",
            dataset_name="me/verses",
            metric_type=name,
            metric_name=name,
            metric_value=value,
        )
        for name, value in FACTS.measured().items()
    ]
    theirs = huggingface_hub.ModelCardData(
        model_name=result["name"], eval_results=results, **values
    )
    ours = yaml.safe_load(new_card(CONFIG, FACTS).split("---")[1])
    assert ours == yaml.safe_load(theirs.to_yaml())


@pytest.mark.parametrize("name", ["/data/base", "C:\\models\\base", "a: b", 'say "x"', "./base"])
def test_a_base_that_is_no_name_of_the_hub_is_told_in_the_text_alone(name: str):
    text = new_card(LoraConfig(base_model_name_or_path=name))
    head = yaml.safe_load(text.split("---")[1])
    assert "base_model" not in head
    assert head["tags"] == ["lora", "multigraft"]
    assert f"An adapter for `{name}`" in text


def test_a_base_in_a_directory_is_no_name_of_the_hub(tmp_path: Path, monkeypatch):
    (tmp_path / "base").mkdir()
    monkeypatch.chdir(tmp_path)
    assert "base_model" not in metadata(LoraConfig(base_model_name_or_path="base"), Facts())


def test_a_changed_card_keeps_its_text_and_other_fields(tmp_path: Path):
    text = (
        "---\nlibrary_name: transformers\nlicense: mit\npipeline_tag: translation\n"
        "tags: [poems]\n---\n\n# Mine\n\nWords.\n"
    )
    (tmp_path / "README.md").write_text(text)
    update_card(tmp_path, CONFIG)
    data = card(tmp_path).data
    assert data.license == "mit"
    assert data.library_name == "peft"
    assert data.pipeline_tag == "translation"
    assert data.tags == ["poems", *TAGS]
    assert card(tmp_path).text.strip() == "# Mine\n\nWords."


def test_changing_it_twice_is_changing_it_once(tmp_path: Path):
    (tmp_path / "README.md").write_text("# Mine\n")
    update_card(tmp_path, CONFIG, FACTS)
    once = (tmp_path / "README.md").read_text()
    update_card(tmp_path, CONFIG, FACTS)
    assert (tmp_path / "README.md").read_text() == once


def test_tags_go_onto_a_card_or_make_one(tmp_path: Path):
    tag_card(tmp_path, ["verse"])
    assert card(tmp_path).data.tags == ["verse"]
    tag_card(tmp_path, ["verse", "prose"])
    assert card(tmp_path).data.tags == ["verse", "prose"]
