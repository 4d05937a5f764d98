"""Base models and tokenisers from a directory or the hub, and the first adapter on them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from multigraft.auto import get_peft_model
from multigraft.config import CONFIG_NAME, PeftConfig
from multigraft.errors import (
    CheckpointError,
    ConfigError,
    MissingExtraError,
    MultigraftError,
    did_you_mean,
)
from multigraft.model import PeftModel
from multigraft.reading import read_config
from multigraft.train.heads import fresh_in
from multigraft.train.quantised import load_options
from multigraft.train.seeding import seeded

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
DEVICES = ("auto", "cpu", "cuda", "mps", "xpu")


def pick_device(name: str = "auto") -> torch.device:
    """The device of that name; ``"auto"`` is the first GPU, or else the CPU.

    Raises:
        ConfigError: there is no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.partition(":")[0] not in DEVICES:
        raise ConfigError(f"`device` (={name!r}) must be one of {', '.join(DEVICES)}, or cuda:N.")
    device = torch.device(name)
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"`device` (={name!r}) is not to be had here: {error}") from error
    return device


def pick_dtype(name: str, device: torch.device) -> torch.dtype | str:
    """The dtype of that name; ``"auto"`` is the checkpoint's own, and float32 on the CPU.

    Raises:
        ConfigError: there is no such name.
    """
    if name == "auto":
        return torch.float32 if device.type == "cpu" else "auto"
    if name not in DTYPES:
        known = ", ".join(("auto", *DTYPES))
        raise ConfigError(
            f"`dtype` (={name!r}) must be one of {known}.{did_you_mean(name, DTYPES)}"
        )
    return DTYPES[name]


def load_model(
    source: str | os.PathLike[str],
    *,
    dtype: str = "auto",
    device: str = "auto",
    quantize: str | None = None,
) -> nn.Module:
    """A causal language model in evaluation mode.

    Args:
        source: a directory, or an id on the hub.
        dtype: ``"auto"``, ``"float32"``, ``"bfloat16"`` or ``"float16"``.
        device: ``"auto"``, ``"cpu"``, ``"cuda"``, …
        quantize: ``"nf4"``, ``"fp4"`` or ``"int8"``, for its linear layers except the head.

    Raises:
        CheckpointError: there is no such model, or it cannot be read.
        ConfigError: the dtype, the device or the format is not to be had.
        MissingExtraError: a package that this needs is not installed.
    """
    model, missing = load_as(
        "AutoModelForCausalLM", source, dtype=dtype, device=device, quantize=quantize
    )
    refuse_random(source, missing)
    return model


def load_as(
    auto: str,
    source: str | os.PathLike[str],
    *,
    dtype: str = "auto",
    device: str = "auto",
    quantize: str | None = None,
    dense: Sequence[str] = (),
    **settings: Any,
) -> tuple[nn.Module, list[str]]:
    """A model of any kind, in evaluation mode, and the weights that its checkpoint lacks.

    Those are made anew, and the same each time.

    Args:
        auto: the class of transformers that loads the kind.
        dense: names of modules that ``quantize`` leaves alone; the usual ones where there are none.
        settings: for `from_pretrained`: what of the model's config is to be otherwise, above all.

    Raises:
        CheckpointError, ConfigError, MissingExtraError: as for `load_model`.
    """
    place = pick_device(device)
    kind = pick_dtype(dtype, place)
    transformers = _transformers()
    load = getattr(transformers, auto).from_pretrained
    options: dict[str, Any] = {}
    if quantize is not None:
        options = load_options(quantize, place, kind, transformers, dense)
    options |= {"dtype": kind, "output_loading_info": True, **settings}
    with seeded(0, place):
        model, found = fetch(source, "model", load, **options)
    if quantize is None:
        model.to(place)
    model.eval()
    mismatched = [key for key, *_ in found.get("mismatched_keys") or ()]
    return model, sorted({*(found.get("missing_keys") or ()), *mismatched})


def load_tokenizer(source: str | os.PathLike[str]) -> Any:
    """The tokeniser beside a model.

    Raises:
        CheckpointError: there is none, or it cannot be read.
    """
    return fetch(source, "tokeniser", _transformers().AutoTokenizer.from_pretrained)


def attach(
    model: nn.Module,
    config: PeftConfig,
    adapter: str,
    seed: int = 0,
    *,
    task_type: str | None = None,
) -> PeftModel:
    """Graft a new adapter whose initial values follow from ``seed`` alone.

    Args:
        model: a base model, or a `PeftModel`, beside whose adapters the new one goes.
        task_type: of the task that it is for; heads that the task trains become the adapter's own.

    Raises:
        AdapterNameError, TargetError: as for `get_peft_model`; the model is as it was.
    """
    if task_type is not None:
        config = replace(config, task_type=task_type, **fresh_in(model, config))
    with seeded(seed, next(model.parameters()).device):
        if isinstance(model, PeftModel):
            model.add_adapter(adapter, config)
            return model
        return get_peft_model(model, config, adapter_name=adapter)


def pad_token(tokenizer: Any) -> int:
    """A token id for padding, which is masked everywhere: any will do where there is none."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    return 0


def fetch(source: str | os.PathLike[str], what: str, load: Any, **options: Any) -> Any:
    """What ``load`` makes of a directory or an id on the hub.

    Raises:
        CheckpointError: it lies nowhere, is an adapter, or cannot be read.
    """
    name = os.fspath(source)
    looks_local = name.startswith((".", "/", "~")) or name.count("/") > 1 or os.path.isabs(name)
    if looks_local and not Path(name).expanduser().is_dir():
        raise CheckpointError(f"{name}: there is no such directory to read a {what} from.")
    folder = Path(name).expanduser()
    if (folder / CONFIG_NAME).is_file():
        raise CheckpointError(
            f"{name} holds an adapter, not a base model. Give the base that it was trained on"
            f"{_base_named_in(folder / CONFIG_NAME)}."
        )
    try:
        return load(str(folder) if folder.exists() else name, **options)
    except Exception as error:  # whatever the loaders of any architecture trip over
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        where = "" if folder.exists() else ", which is no local directory"
        raise CheckpointError(
            f"{name}: no {what} could be read from there{where} ({first.rstrip('.')}). Give a "
            "directory that save_pretrained() wrote, or the id of a model of this kind on the hub."
        ) from error


def refuse_random(source: str | os.PathLike[str], missing: Sequence[str]) -> None:
    """Fail when the checkpoint lacks weights, which would stay at random values.

    Raises:
        CheckpointError: it does.
    """
    if missing:
        raise CheckpointError(
            f"{os.fspath(source)} lacks {len(missing)} of the model's weights ({missing[0]}, …), "
            "which would be random. Is it a model of the kind that is wanted, and complete?"
        )


def _base_named_in(config: Path) -> str:
    try:
        base = read_config(config).get("base_model_name_or_path")
    except MultigraftError:
        return ""
    return f": {base}" if base else ""


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise MissingExtraError(
            "fine-tuning needs transformers: pip install 'multigraft[train]'"
        ) from error
    return transformers
