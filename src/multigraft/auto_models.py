"""`AutoPeftModel` and its siblings: an adapter's files say which base to load beneath it."""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from torch import nn

from multigraft import tasks
from multigraft.auto import class_for
from multigraft.base_notes import settings_in
from multigraft.checkpoint import locate
from multigraft.config import PeftConfig
from multigraft.errors import ConfigError, MissingExtraError, SourceError, UnsupportedError
from multigraft.loading import HUB_OPTIONS, read_config
from multigraft.model import PeftModel

ALLOWED = ("transformers", "diffusers", "sentence_transformers", "torch")
"""Packages that a file may name as the base's; importing any other one runs code of its choice."""
OF_THE_ADAPTER = ("subfolder", "key_mapping", "autocast_adapter_dtype", "allow_pickle")


class AutoPeftModel:
    """Loads a base that has no task, by the class that the adapter's config names, and the adapter.

    The siblings below load a base of their task.
    """

    _peft_class: ClassVar[type[PeftModel]] = PeftModel
    _base_class: ClassVar[str | None] = None

    def __init__(self, *_: Any, **__: Any) -> None:
        raise UnsupportedError(
            f"{type(self).__name__} is made by {type(self).__name__}.from_pretrained(...) only."
        )

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        revision: str | None = None,
        import_allowlist: Sequence[str] | None = None,
        **kwargs: Any,
    ) -> PeftModel:
        """The base that an adapter's config names, with the adapter on it.

        Args:
            config: used instead of the file's config.
            revision: of the adapter; the base's stands in the config.
            import_allowlist: packages that the base's class may come from.
            kwargs: for the base's ``from_pretrained``; where the files are, for both.

        Raises:
            ConfigError: the config names no base, or is of another task than this class.
            UnsupportedError: the base's class is of a package that is not allowed.
        """
        found, where = read_config(
            pretrained_model_name_or_path, adapter_name, {**kwargs, "revision": revision}
        )
        config = config or found
        kind = cls._class_of_base(config, ALLOWED if import_allowlist is None else import_allowlist)
        if not config.base_model_name_or_path:
            raise ConfigError(
                f"{pretrained_model_name_or_path}: the config names no base model "
                "(`base_model_name_or_path`). Load it and use PeftModel.from_pretrained()."
            )
        options = settings_in(pretrained_model_name_or_path)
        options |= {k: v for k, v in kwargs.items() if k not in OF_THE_ADAPTER}
        base = kind.from_pretrained(
            config.base_model_name_or_path, revision=config.revision, **options
        )
        _fit_vocabulary(base, pretrained_model_name_or_path, where)
        own = {k: v for k, v in where.items() if k in (*HUB_OPTIONS, *OF_THE_ADAPTER)}
        return cls._peft_class.from_pretrained(
            base,
            pretrained_model_name_or_path,
            adapter_name=adapter_name,
            is_trainable=is_trainable,
            config=config,
            **own,
        )

    @classmethod
    def _class_of_base(cls, config: PeftConfig, allowed: Sequence[str]) -> Any:
        wanted = class_for(config)
        if config.task_type is not None and wanted is not cls._peft_class:
            raise ConfigError(
                f"{cls.__name__} is not for `task_type` (={str(config.task_type)!r}). Use "
                f"Auto{wanted.__name__}."
            )
        library, name = "transformers", cls._base_class
        if config.task_type is None:
            mapping = config.auto_mapping or {}
            library, name = mapping.get("parent_library", ""), mapping.get("base_model_class")
        if not (library and name):
            raise ConfigError(
                "the config has neither `task_type` nor `auto_mapping`, so the base's class is not "
                "known. Load it yourself, and use PeftModel.from_pretrained()."
            )
        if library.partition(".")[0] not in allowed and library not in allowed:
            raise UnsupportedError(
                f"the config wants to import `{library}`, which is not among {list(allowed)}. If "
                f"you trust it, pass import_allowlist=[{library!r}]."
            )
        try:
            return getattr(importlib.import_module(library), name)
        except ImportError as error:
            raise MissingExtraError(f"the base's class {name} needs {library}.") from error


def _fit_vocabulary(
    base: nn.Module, source: str | os.PathLike[str], where: Mapping[str, Any]
) -> None:
    """Make room for the tokens of a tokeniser that lies beside the adapter."""
    options = {k: v for k, v in where.items() if k in HUB_OPTIONS and v is not None}
    try:
        folder = locate(source, "tokenizer_config.json", **options).parent
    except SourceError:
        return
    from transformers import AutoTokenizer

    if not Path(source).is_dir():  # its other files are fetched by whoever knows their names
        places = ("revision", "token", "cache_dir", "local_files_only")
        named = {k: v for k, v in options.items() if k in places}
        size = len(AutoTokenizer.from_pretrained(str(source), **named))
    else:
        size = len(AutoTokenizer.from_pretrained(folder))
    words = getattr(base, "get_input_embeddings", lambda: None)()
    if words is not None and size > words.weight.shape[0]:
        base.resize_token_embeddings(size)  # type: ignore[operator]


class AutoPeftModelForCausalLM(AutoPeftModel):
    """For causal language models."""

    _peft_class = tasks.PeftModelForCausalLM
    _base_class = "AutoModelForCausalLM"


class AutoPeftModelForFeatureExtraction(AutoPeftModel):
    """For embedding models."""

    _peft_class = tasks.PeftModelForFeatureExtraction
    _base_class = "AutoModel"


class AutoPeftModelForQuestionAnswering(AutoPeftModel):
    """For extractive question answering."""

    _peft_class = tasks.PeftModelForQuestionAnswering
    _base_class = "AutoModelForQuestionAnswering"


class AutoPeftModelForSeq2SeqLM(AutoPeftModel):
    """For encoder-decoder language models."""

    _peft_class = tasks.PeftModelForSeq2SeqLM
    _base_class = "AutoModelForSeq2SeqLM"


class AutoPeftModelForSequenceClassification(AutoPeftModel):
    """For sequence classifiers."""

    _peft_class = tasks.PeftModelForSequenceClassification
    _base_class = "AutoModelForSequenceClassification"


class AutoPeftModelForTokenClassification(AutoPeftModel):
    """For token classifiers."""

    _peft_class = tasks.PeftModelForTokenClassification
    _base_class = "AutoModelForTokenClassification"
