"""A base model with adapters and its tokeniser: those who can be asked."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from multigraft.errors import (
    AdapterNameError,
    CheckpointError,
    MultigraftWarning,
    RoutingError,
    did_you_mean,
)
from multigraft.inspection import AdapterFiles, assemble
from multigraft.model import PeftModel
from multigraft.routing import BASE as BASE
from multigraft.train import load_model, load_tokenizer
from multigraft.train.tasks import Task
from multigraft.vocabulary import fit_vocabulary

Pathlike = str | os.PathLike[str]
TOKENIZER = "tokenizer_config.json"


@dataclass(eq=False)
class Ensemble:
    """Adapters side by side on one base.

    Args:
        model: with all of them.
        tokenizer: the base's.
        base: where the base came from.
        own: tokenisers of adapters that have one beside them, by name.
    """

    model: PeftModel
    tokenizer: Any
    base: str = ""
    own: dict[str, Any] = field(default_factory=dict)

    @property
    def adapters(self) -> list[str]:
        """Names of the adapters, in the order in which they were given."""
        return list(self.model.peft_config)

    def tokenizer_of(self, speaker: str) -> Any:
        """The tokeniser, with its chat template, that a speaker was trained with."""
        return self.own.get(speaker, self.tokenizer)

    @property
    def common_tokenizer(self) -> Any:
        """The one tokeniser for all: the adapters', where they have the same; else the base's."""
        found = list(self.own.values())
        templates = {getattr(each, "chat_template", None) for each in found}
        if not found or len(found) < len(self.adapters) or len(templates) > 1:
            return self.tokenizer
        return found[0]

    @cached_property
    def device(self) -> torch.device:
        """Where the base's first parameter is."""
        return next(self.model.parameters()).device

    @property
    def longest(self) -> int | None:
        """How many tokens the model has positions for, where its config says so."""
        config: Any = self.model.config
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        found = getattr(text, "max_position_embeddings", None)
        return found if isinstance(found, int) and found > 0 else None

    def require(self, speakers: Sequence[str]) -> list[str]:
        """These names, each once, ``base`` for the base.

        Raises:
            AdapterNameError: there is no such adapter.
        """
        found = []
        for name in speakers:
            known = [*self.adapters, BASE]
            if name == "base" and name not in known:
                name = BASE
            if name not in known:
                there = ", ".join(f"`{shown(each)}`" for each in known)
                raise AdapterNameError(
                    f"no adapter is called `{name}`.{did_you_mean(name, known)} There are: {there}."
                )
            found.append(name)
        return list(dict.fromkeys(found))

    def companies(self, speakers: Sequence[str]) -> list[list[str]]:
        """The speakers, those together whose rows can share a batch."""
        together = [name for name in speakers if self._can_share(name)]
        return [*([together] if together else []), *([n] for n in speakers if n not in together)]

    @contextmanager
    def alone(self, speaker: str) -> Iterator[None]:
        """Let one speaker decide whole batches, for the length of the block."""
        if speaker == BASE:
            with self.model.disable_adapter():
                yield
            return
        self.model.set_adapter(speaker, inference_mode=True)
        yield

    def _can_share(self, speaker: str) -> bool:
        if speaker == BASE:
            return True
        try:
            self.model.roster.check_batchable(speaker)
        except RoutingError:
            return False
        return True


def shown(speaker: str) -> str:
    """What a speaker is called where people read it."""
    return "base" if speaker == BASE else speaker


def load_ensemble(
    adapters: Sequence[Pathlike],
    *,
    base: Pathlike | None = None,
    dtype: str = "auto",
    device: str = "auto",
    quantize: str | None = None,
    allow_pickle: bool = False,
    task: Task | None = None,
) -> Ensemble:
    """A model, by default a causal language model, with these adapters beside each other.

    Args:
        adapters: directories, or ids on the hub; a directory of several means all of them.
        base: the base model; by default the one that the adapters name.
        dtype, device, quantize: as for `load_model`.
        task: loads a base of another kind; it is settled.

    Raises:
        CheckpointError: no base is given or named, or files are damaged or do not fit.
        ConfigError: the dtype, the device or the format is not to be had.
    """
    if not adapters and base is None:
        raise CheckpointError("neither a base model nor an adapter was named. Give one of them.")
    sources: list[str] = []

    def load(source: str) -> nn.Module:
        sources.append(source)
        load_as = load_model if task is None else task.load
        return load_as(source, dtype=dtype, device=device, quantize=quantize)

    own: dict[str, Any] = {}

    def prepare(model: nn.Module, named: Mapping[str, AdapterFiles]) -> None:
        fit_vocabulary(model, named.values())
        own.update({n: t for n, files in named.items() if (t := _own_tokenizer(files.folder))})

    model = assemble(list(adapters), load, base=base, allow_pickle=allow_pickle, prepare=prepare)
    handle = model if isinstance(model, PeftModel) else PeftModel(model, None)
    return Ensemble(handle.eval(), load_tokenizer(sources[0]), sources[0], own)


def _own_tokenizer(folder: Path) -> Any:
    """The tokeniser beside an adapter; None where there is none, or none that can be read."""
    if not (folder / TOKENIZER).is_file():
        return None
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(folder))
    except Exception as error:  # whatever a tokeniser's files trip over
        warnings.warn(
            f"{folder}: the tokeniser beside the adapter cannot be read ({error}); the base's is "
            "used.",
            MultigraftWarning,
            stacklevel=2,
        )
        return None
