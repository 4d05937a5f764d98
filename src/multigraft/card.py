"""The model card beside an adapter's files: what the hub shows, and what readers look up there.

Its head is metadata, whose names are the hub's: the base model, what it was trained on, what was
measured. A fresh one is written here; changing one that is there needs huggingface_hub to read it.
"""

from __future__ import annotations

import json
import math
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from multigraft.atomic import write_files, write_utf8
from multigraft.config import PeftConfig, TaskType
from multigraft.errors import MissingExtraError

CARD_NAME = "README.md"
PIPELINES: dict[str, str] = {
    TaskType.CAUSAL_LM: "text-generation",
    TaskType.FEATURE_EXTRACTION: "feature-extraction",
    TaskType.QUESTION_ANS: "question-answering",
    TaskType.SEQ_CLS: "text-classification",
    TaskType.TOKEN_CLS: "token-classification",
}
"""The hub's names of what a task's models are for; encoder-decoders may be for anything."""
_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
_PLAIN = re.compile(r"[A-Za-z][\w./+-]*(:[\w./+-]+)*")
_WORDS = frozenset({"true", "false", "null", "yes", "no", "on", "off", "y", "n"})


@dataclass(frozen=True)
class Facts:
    """What an adapter's files do not tell.

    Args:
        datasets: what it was trained on: names on the hub.
        metrics: what was measured, by name; values that are not finite are left out.
        evaluated_on: on what; the first of `datasets` by default.
        language, license: as the hub writes them.
        tags: further ones.
        training: lines of the card's section on training, by name.
    """

    datasets: Sequence[str] = ()
    metrics: Mapping[str, float] = field(default_factory=dict)
    evaluated_on: str | None = None
    language: str | Sequence[str] | None = None
    license: str | None = None
    tags: Sequence[str] = ()
    training: Mapping[str, Any] = field(default_factory=dict)

    def measured(self) -> dict[str, float]:
        """The metrics that are numbers."""
        return {name: float(v) for name, v in self.metrics.items() if math.isfinite(v)}

    def where(self) -> str:
        """What the metrics are of."""
        return self.evaluated_on or next(iter(self.datasets), "held-out data")


def new_card(config: PeftConfig, facts: Facts | None = None) -> str:
    """The text of a fresh model card."""
    facts = facts or Facts()
    values = metadata(config, facts)
    results = _results(config, facts)
    if results:
        values["model-index"] = [{"name": values["tags"][0], "results": results}]
    head = "\n".join(_yaml(dict(sorted(values.items()))))
    base = config.base_model_name_or_path
    named = f"`{base}`" if base else "an unnamed base"
    text = [f"# {config.peft_type} adapter", ""]
    text += [f"An adapter for {named}, saved by Multigraft in PEFT's format.", ""]
    text += _section("Results", facts.measured(), f"Measured on {facts.where()}.")
    text += _section("Training", facts.training)
    return "\n".join(["---", head, "---", "", *text])


def update_card(
    directory: str | os.PathLike[str], config: PeftConfig, facts: Facts | None = None
) -> None:
    """Let a directory's card say what adapter lies there; its text and other metadata stay.

    Raises:
        MissingExtraError: there is a card, and huggingface_hub, which reads it, is not installed.
    """
    path, facts = Path(directory) / CARD_NAME, facts or Facts()
    text = _updated(path, config, facts) if path.is_file() else new_card(config, facts)
    write_files({path: partial(write_utf8, text=text)})


def tag_card(directory: str | os.PathLike[str], tags: Sequence[str]) -> None:
    """Add tags to a directory's card, or to a fresh one of nothing else."""
    path = Path(directory) / CARD_NAME
    if not path.is_file():
        text = "\n".join(["---", *_yaml({"library_name": "peft", "tags": list(tags)}), "---", ""])
    else:
        card = _read(path)
        card.data.tags = _both(card.data.tags, tags)
        text = str(card)
    write_files({path: partial(write_utf8, text=text)})


def metadata(config: PeftConfig, facts: Facts) -> dict[str, Any]:
    """The head's values by the hub's names, less the results."""
    base = config.base_model_name_or_path
    is_named = bool(base and _ID.fullmatch(base) and not os.path.isdir(base))
    tags = [str(config.peft_type).lower(), "multigraft"]
    values: dict[str, Any] = {
        "base_model": base if is_named else None,
        "base_model_relation": "adapter" if is_named else None,
        "datasets": [name for name in facts.datasets if _ID.fullmatch(name)],
        "language": facts.language,
        "library_name": "peft",
        "license": facts.license,
        "metrics": list(facts.measured()),
        "pipeline_tag": PIPELINES.get(str(config.task_type)),
        "tags": [*tags, *([f"base_model:adapter:{base}"] if is_named else []), *facts.tags],
    }
    return {key: value for key, value in values.items() if value}


def tags_of(base: Any) -> list[str]:
    """What a base model of transformers adds to the tags of its adapters."""
    module = sys.modules.get("transformers.modeling_utils")  # an unloaded class has no instance
    if module is None or not isinstance(base, module.PreTrainedModel):
        return []
    return ["transformers", *(getattr(base, "model_tags", None) or ())]


def _results(config: PeftConfig, facts: Facts) -> list[dict[str, Any]]:
    """What was measured, in the hub's form."""
    measured, where = facts.measured(), facts.where()
    if not measured:
        return []
    task = PIPELINES.get(str(config.task_type), "other")
    dataset = {"name": where, "type": where if _ID.fullmatch(where) else _slug(where)}
    metrics = [{"name": name, "type": _slug(name), "value": v} for name, v in measured.items()]
    return [{"task": {"type": task}, "dataset": dataset, "metrics": metrics}]


def _updated(path: Path, config: PeftConfig, facts: Facts) -> str:
    card = _read(path)
    for key, value in metadata(config, facts).items():
        is_list = isinstance(value, list)
        before = getattr(card.data, key, None)
        if key == "pipeline_tag" and before:
            continue  # its author knows
        setattr(card.data, key, _both(before, value) if is_list else value)
    if facts.measured():
        from huggingface_hub.repocard_data import model_index_to_eval_results

        index = [{"name": card.data.model_name or "adapter", "results": _results(config, facts)}]
        card.data.model_name, card.data.eval_results = model_index_to_eval_results(index)
    return str(card)


def _read(path: Path) -> Any:
    try:
        from huggingface_hub import ModelCard
    except ImportError as error:
        raise MissingExtraError(
            f"{path}: changing a model card needs huggingface_hub: pip install 'multigraft[train]'."
        ) from error
    return ModelCard(path.read_text("utf-8"), ignore_metadata_errors=True)


def _both(before: Any, more: Sequence[str]) -> list[str]:
    """Those that were there, and these, each once."""
    held = [before] if isinstance(before, str) else list(before or ())
    return list(dict.fromkeys([*held, *more]))


def _section(title: str, lines: Mapping[str, Any], below: str = "") -> list[str]:
    if not lines:
        return []
    rows = [f"- {name}: {value}" for name, value in lines.items()]
    return [f"## {title}", "", *rows, "", *([below, ""] if below else [])]


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9_.]+", "-", text.lower()).strip("-") or "unnamed"


def _yaml(value: Any) -> Iterator[str]:
    """Lines of YAML for dictionaries, lists and scalars; no reader takes a string for another."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            if isinstance(inner, Mapping):
                yield from (f"{key}:", *(f"  {line}" for line in _yaml(inner)))
            elif isinstance(inner, (list, tuple)):
                yield from (f"{key}:", *_yaml(inner))
            else:
                yield f"{key}: {_scalar(inner)}"
        return
    for inner in value:
        if isinstance(inner, Mapping):
            first, *rest = _yaml(inner)
            yield from (f"- {first}", *(f"  {line}" for line in rest))
        else:
            yield f"- {_scalar(inner)}"


def _scalar(value: Any) -> str:
    if isinstance(value, float):
        text = repr(value)
        return text.replace("e", ".0e") if "e" in text and "." not in text else text
    if isinstance(value, str) and _PLAIN.fullmatch(value) and value.lower() not in _WORDS:
        return value
    return json.dumps(value, ensure_ascii=False)
