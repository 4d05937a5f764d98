"""A config as ``adapter_config.json``: written, read, fetched from the hub and pushed there."""

from __future__ import annotations

import dataclasses
import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

from multigraft.errors import CheckpointError, ConfigError, MultigraftWarning
from multigraft.fields import FORMAT_VERSION, built, is_newer, plain
from multigraft.hub import Pushable
from multigraft.reading import CONFIG_NAME, read_config, shown

if TYPE_CHECKING:
    from multigraft.config import PeftConfig


class ConfigFiles(Pushable):
    """What every config does with files; mixed into `PeftConfig`."""

    if TYPE_CHECKING:
        extra: dict[str, Any]

    _not_saved: ClassVar[frozenset[str]] = frozenset()
    """Fields that no file holds."""
    _ours_only: ClassVar[frozenset[str]] = frozenset()
    """Fields that PEFT's config lacks: left out of the file while None, for its readers' sake."""
    _noun = "config"

    def to_dict(self) -> dict[str, Any]:
        """Every field that goes into the file, with plain values; unknown keys come along."""
        fields = dataclasses.fields(cast(Any, self))
        values = {f.name: getattr(self, f.name) for f in fields} | self.extra
        hidden = self._not_saved | {k for k in self._ours_only if values[k] is None}
        return {k: plain(v) for k, v in values.items() if k not in hidden}

    def to_json(self) -> str:
        """The text of ``adapter_config.json``: sorted keys, indent 2, frozen for inference."""
        saved = self.to_dict() | {"inference_mode": True, "peft_version": FORMAT_VERSION}
        return json.dumps(saved, indent=2, sort_keys=True)

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        *,
        auto_mapping_dict: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        """Write ``adapter_config.json`` into the directory, atomically.

        Args:
            auto_mapping_dict: what the file says for `auto_mapping`, rather than the config's own.

        Raises:
            CheckpointError: the directory is a file, or the disk refuses.
        """
        from multigraft.atomic import write_text

        directory = Path(save_directory)
        if directory.is_file():
            raise CheckpointError(f"`save_directory` (={str(directory)!r}) is a file.")
        directory.mkdir(parents=True, exist_ok=True)
        text = self.to_json()
        if auto_mapping_dict is not None:
            told = json.loads(text) | {"auto_mapping": auto_mapping_dict}
            text = json.dumps(told, indent=2, sort_keys=True)
        write_text(directory / CONFIG_NAME, text)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> PeftConfig:
        """The config that a file's keys describe, of the class that its ``peft_type`` names.

        Raises:
            ConfigError: ``peft_type`` is missing, or a value is not allowed.
            UnsupportedError: ``peft_type`` names a method that we do not have.
        """
        from multigraft.config import CONFIGS, PeftConfig

        if not isinstance(values, Mapping):
            raise ConfigError(f"{CONFIG_NAME} must hold an object, not {type(values).__name__}.")
        kind = values.get("peft_type")
        if kind is None:
            raise ConfigError(f"{CONFIG_NAME} has no `peft_type`; it is not an adapter's config.")
        klass = CONFIGS[str(kind)]
        if cls is not PeftConfig and not issubclass(klass, cls):
            raise ConfigError(f"`peft_type` (={kind!r}) is not what {cls.__name__} describes.")
        known = {f.name for f in dataclasses.fields(klass)}
        others = {k: v for k, v in values.items() if k not in known}
        checked = klass.check_kwargs(**{k: v for k, v in values.items() if k in known})
        return _made(klass, {**checked, **others})

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        subfolder: str | None = None,
        **kwargs: Any,
    ) -> PeftConfig:
        """Read the config of a local directory or of a hub repository.

        Args:
            kwargs: `revision`, `token` and others of `multigraft.hub.OPTIONS`.

        Raises:
            SourceError: there is none.
            ConfigError: it is damaged, or no adapter's.
        """
        from multigraft.checkpoint import locate

        path = locate(pretrained_model_name_or_path, CONFIG_NAME, subfolder=subfolder, **kwargs)
        return cls.from_dict(cls.from_json_file(path))

    @classmethod
    def from_json_file(
        cls, path_json_file: str | os.PathLike[str], **kwargs: Any
    ) -> dict[str, Any]:
        """The values that a file holds, less what counts for one run alone.

        Raises:
            ConfigError, CheckpointError: it is no JSON object, or cannot be read.
        """
        values = read_config(Path(path_json_file))
        if values.pop("runtime_config", None) is not None:
            warnings.warn(
                f"{shown(str(path_json_file))}: `runtime_config` says how an adapter is made in "
                "one run, and is ignored.",
                MultigraftWarning,
                stacklevel=2,
            )
        return values

    @classmethod
    def from_peft_type(cls, **kwargs: Any) -> PeftConfig:
        """The config of these values, of the class of their ``peft_type``, or else of this class.

        Raises:
            ConfigError: a value is not allowed.
            UnsupportedError: ``peft_type`` names a method that we do not have.
        """
        from multigraft.config import CONFIGS, PeftConfig

        kind = kwargs.get("peft_type")
        return (
            cast(PeftConfig, cls(**kwargs)) if kind is None else _made(CONFIGS[str(kind)], kwargs)
        )

    @classmethod
    def check_kwargs(cls, **kwargs: Any) -> dict[str, Any]:
        """What a file's values become before the config is made; for subclasses to override."""
        return kwargs

    def _fill(self, folder: Path, tags: list[str], saving: Mapping[str, Any]) -> None:
        from multigraft.card import tag_card

        self.save_pretrained(folder, **saving)
        if tags:
            tag_card(folder, tags)


def _made(klass: type[PeftConfig], values: Mapping[str, Any]) -> PeftConfig:
    """The config; values that are none of its fields are kept beside it, and named in a warning."""
    known = {f.name for f in dataclasses.fields(klass)}
    config = built(klass, {k: v for k, v in values.items() if k in known})
    config.extra = {k: v for k, v in values.items() if k not in known}
    version = values.get("peft_version")
    if config.extra or is_newer(version):
        names = ", ".join(shown(k) for k in sorted(config.extra)[:8])
        unknown = f": unknown keys {names} are kept but have no effect here" if names else ""
        warnings.warn(
            f"{CONFIG_NAME} was written by version {version!r}; Multigraft follows "
            f"{FORMAT_VERSION!r}{unknown}. Compare outputs with what wrote it.",
            MultigraftWarning,
            stacklevel=3,
        )
    return config
