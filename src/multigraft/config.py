"""Adapter configs: validated dataclasses; `multigraft.config_files` has their files.

The shared fields stand here once; a method's own file adds the few that it needs. A config is the
user's: the library copies it and never changes it. Keys of a file that this version does not know
are kept in `extra`, named in a warning and written back.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from functools import lru_cache
from typing import Any, ClassVar

from multigraft.config_files import ConfigFiles
from multigraft.errors import ConfigError, did_you_mean
from multigraft.fields import (
    check_indices,
    check_regex,
    is_unset,
    name_list,
)
from multigraft.reading import CONFIG_NAME
from multigraft.registry import Registry


class PeftType(str, Enum):
    """Names of methods in files, as PEFT spells them; registered methods of one's own join them."""

    LORA = "LORA"
    ADALORA = "ADALORA"
    ADAPTION_PROMPT = "ADAPTION_PROMPT"
    HIRA = "HIRA"
    IA3 = "IA3"
    LN_TUNING = "LN_TUNING"
    LOHA = "LOHA"
    LOKR = "LOKR"
    OFT = "OFT"
    P_TUNING = "P_TUNING"
    PREFIX_TUNING = "PREFIX_TUNING"
    PROMPT_TUNING = "PROMPT_TUNING"
    TRAINABLE_TOKENS = "TRAINABLE_TOKENS"
    VERA = "VERA"
    __str__ = str.__str__

    @classmethod
    def _missing_(cls, value: object) -> PeftType | None:
        if not isinstance(value, str) or value not in CONFIGS:
            return None
        member = str.__new__(cls, value)
        member._name_ = member._value_ = value
        return member


class TaskType(str, Enum):
    """What the model is for; it chooses the task class and the default saved head."""

    SEQ_CLS = "SEQ_CLS"
    SEQ_2_SEQ_LM = "SEQ_2_SEQ_LM"
    CAUSAL_LM = "CAUSAL_LM"
    TOKEN_CLS = "TOKEN_CLS"
    QUESTION_ANS = "QUESTION_ANS"
    FEATURE_EXTRACTION = "FEATURE_EXTRACTION"
    __str__ = str.__str__


CONFIGS: Registry[type[PeftConfig]] = Registry("peft_type")
"""Config classes by ``peft_type``, filled by the methods' files."""


@dataclass
class PeftConfig(ConfigFiles):
    """What every adapter has, whatever its method.

    Args:
        task_type: what the model is for, a `TaskType` or its name.
        peft_type: the method; set by the subclass.
        auto_mapping: class and library of a base model without a task type (as PEFT writes it).
        peft_version: version of the file format that a loaded config was written with.
        base_model_name_or_path: the base that the adapter belongs to.
        revision: revision of the base model on the hub.
        inference_mode: whether a new adapter of this config starts frozen.

    Raises:
        ConfigError: a value is outside what its field allows.
    """

    task_type: str | TaskType | None = None
    peft_type: str | PeftType | None = None
    auto_mapping: dict[str, Any] | None = None
    peft_version: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = False

    _unbuilt: ClassVar[Mapping[str, Any]] = {}
    """Fields of PEFT's config that are not built, with the only value that is accepted."""

    def __post_init__(self) -> None:
        self.extra: dict[str, Any] = {}
        if self.peft_type is not None:
            try:
                self.peft_type = PeftType(self.peft_type)
            except ValueError:
                known = ", ".join(CONFIGS)
                raise ConfigError(
                    f"{type(self).__name__}: `peft_type` (={self.peft_type!r}) is no method of "
                    f"PEFT's files. Built are: {known}.{did_you_mean(str(self.peft_type), CONFIGS)}"
                ) from None
        if self.task_type is not None and self.task_type not in set(TaskType):
            known = ", ".join(t.value for t in TaskType)
            raise ConfigError(f"`task_type` (={self.task_type!r}) must be one of {known}, or None.")
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            is_switch = item.type == "bool" and value is not None
            if is_switch and not isinstance(value, bool):
                raise ConfigError(
                    f"{type(self).__name__}: `{item.name}` (={value!r}) must be True or False."
                )
        for name, neutral in self._unbuilt.items():
            value = getattr(self, name)
            if not is_unset(value, neutral):
                raise ConfigError(
                    f"{type(self).__name__}: `{name}` (={value!r}) is an option of PEFT that "
                    f"Multigraft does not have yet. Leave it at {neutral!r}, or use PEFT for it."
                )

    @property
    def is_prompt_learning(self) -> bool:
        """Whether the method changes the context rather than a weight."""
        return False

    @property
    def is_adaption_prompt(self) -> bool:
        """Whether the method adds to what attention gives."""
        return False

    def copy(self) -> PeftConfig:
        """A deep copy; the model keeps one, so that later edits of the original change nothing."""
        return copy.deepcopy(self)


@dataclass
class TargetedConfig(PeftConfig):
    """A config of a method that acts on sites: what to target, and the exceptions per site.

    Args:
        target_modules: names (suffixes of dotted paths), a regular expression that matches whole
            paths, ``"all-linear"``, or None for the architecture's usual ones.
        exclude_modules: names or a regular expression; wins over `target_modules`.
        modules_to_save: modules that this adapter trains whole copies of.
        layers_to_transform: indices of the layers to adapt; all by default.
        layers_pattern: name of the module list that holds the layers, e.g. ``"layers"``.
    """

    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None

    site_patterns: ClassVar[tuple[str, ...]] = ("rank_pattern", "alpha_pattern")
    """Fields, where there are such, that hold exceptions per site by regular expressions."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.target_modules = name_list("target_modules", self.target_modules)
        names = [self.target_modules] if isinstance(self.target_modules, str) else None
        names = [n.lower() for n in names or self.target_modules or []]  # any case, as in PEFT
        if names == ["all-linear"]:
            self.target_modules = "all-linear"
        if isinstance(self.target_modules, list) and "all-linear" in names:
            raise ConfigError(
                '`target_modules`: "all-linear" stands alone, not in a list with other names. '
                'Write target_modules="all-linear", or list the names.'
            )
        self.exclude_modules = name_list("exclude_modules", self.exclude_modules)
        saved = self.modules_to_save
        self.modules_to_save = (
            [saved] if isinstance(saved, str) else name_list("modules_to_save", saved)
        )
        check_indices(self.layers_to_transform)
        pattern = self.layers_pattern
        for expression in [pattern] if isinstance(pattern, str) else pattern or []:
            check_regex("layers_pattern", expression)
        if pattern and self.layers_to_transform is None:
            raise ConfigError(
                f"`layers_pattern` (={pattern!r}) needs indices in `layers_to_transform`."
            )
        if isinstance(self.target_modules, str) and self.target_modules != "all-linear":
            check_regex("target_modules", self.target_modules)
            if self.layers_to_transform is not None:
                raise ConfigError(
                    "`layers_to_transform` cannot be combined with a regular expression in "
                    f"`target_modules` (={self.target_modules!r}): put the indices into it."
                )
        if isinstance(self.exclude_modules, str):
            check_regex("exclude_modules", self.exclude_modules)


@dataclass
class RankedConfig(TargetedConfig):
    """A config of a low-rank method: a rank and a scaling, with exceptions per site.

    Args:
        r: rank of the update.
        alpha: the update is scaled by ``alpha / r``.
        rank_pattern, alpha_pattern: exceptions per site, regular expressions to values.
    """

    r: int = 8
    alpha: float = 8
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        where = type(self).__name__
        self.rank_pattern = check_patterns(where, "rank_pattern", self.rank_pattern)
        self.alpha_pattern = check_patterns(where, "alpha_pattern", self.alpha_pattern)
        for name, rank in [("r", self.r), *self.rank_pattern.items()]:
            is_rank = isinstance(rank, int) and not isinstance(rank, bool) and rank > 0
            require(is_rank, where, name, rank, "an integer of at least 1")
        for name, alpha in [("alpha", self.alpha), *self.alpha_pattern.items()]:
            is_alpha = isinstance(alpha, (int, float)) and math.isfinite(alpha)
            require(is_alpha, where, name, alpha, "a finite number")

    def rank_at(self, path: str) -> int:
        """The rank of the site at this base path."""
        rank: int = pattern_value(self.rank_pattern, path, self.r)
        return rank

    def alpha_at(self, path: str) -> float:
        """The alpha of the site at this base path."""
        alpha: float = pattern_value(self.alpha_pattern, path, self.alpha)
        return alpha


def pattern_value(patterns: Mapping[str, Any], path: str, default: Any) -> Any:
    """The value of the first pattern that matches the end of ``path``, or ``default``.

    A pattern is a regular expression that must match whole path components from some dot on.
    """
    key = matching_pattern(patterns, path)
    return default if key is None else patterns[key]


def matching_pattern(patterns: Mapping[str, Any], path: str) -> str | None:
    """The first key of ``patterns`` that matches ``path``, or None."""
    return next((k for k in patterns if _compiled(k).match(path)), None)


@lru_cache(1 << 16)  # a pattern for each of many experts, looked up at each of them
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(rf"(.*\.)?({pattern})$")


def check_patterns(where: str, name: str, patterns: Any) -> dict[str, Any]:
    """A copy of a dictionary from regular expressions to values; None stands for an empty one.

    Raises:
        ConfigError: it is no dictionary, or a key is no regular expression.
    """
    is_table = patterns is None or isinstance(patterns, Mapping)
    require(is_table, where, name, patterns, "a dictionary from module patterns to values")
    for pattern in patterns or {}:
        require(isinstance(pattern, str), where, name, patterns, "keyed by strings")
        check_regex(name, pattern)
    return dict(patterns or {})


def check_names(where: str, name: str, value: Any) -> list[str] | None:
    """A list of names without repeats, or None; a string is not taken for a list.

    Raises:
        ConfigError: it is something else.
    """
    require(not isinstance(value, str), where, name, value, "a list of names, or None")
    names: list[str] | None = name_list(name, value)
    return names


def check_tokens(where: str, name: str, value: Any) -> list[int]:
    """A list of token ids, each once.

    Raises:
        ConfigError: it is something else.
    """
    required = "a list of different token ids, which are integers from 0"
    require(isinstance(value, (list, tuple, set)), where, name, value, required)
    tokens = sorted(value) if isinstance(value, set) else list(value)
    are_ids = all(isinstance(t, int) and not isinstance(t, bool) and t >= 0 for t in tokens)
    require(are_ids and len(set(tokens)) == len(tokens), where, name, value, required)
    return tokens


def check_token_table(where: str, name: str, value: Any) -> list[int] | dict[str, list[int]] | None:
    """Token ids, or a dictionary from names of modules to theirs, or None; see `check_tokens`."""
    if value is None:
        return None
    if isinstance(value, Mapping):
        return {str(key): check_tokens(where, name, tokens) for key, tokens in value.items()}
    return check_tokens(where, name, value)


def require(condition: bool, where: str, name: str, value: Any, required: str) -> None:
    """Raise `ConfigError` in the house form unless ``condition`` holds."""
    if not condition:
        raise ConfigError(f"{where}: `{name}` (={value!r}) must be {required}.")


def require_probability(where: str, name: str, value: float) -> None:
    """Raise `ConfigError` unless ``value`` is a probability below 1."""
    require(0.0 <= value < 1.0, where, name, value, "at least 0 and below 1")


def check_choice(where: str, name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise `ConfigError` unless ``value`` is one of ``choices``; suggests the nearest."""
    if value not in choices:
        raise ConfigError(
            f"{where}: `{name}` (={value!r}) must be one of {', '.join(map(repr, choices))}."
            + did_you_mean(str(value), choices)
        )


__all__ = ["CONFIGS", "CONFIG_NAME", "PeftConfig", "PeftType", "TargetedConfig", "TaskType"]
