"""The files against a base model that is built from its config alone, as loading would compare."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor, nn

from multigraft.checkpoint import LoadReport, compare
from multigraft.config import PeftConfig
from multigraft.diagnosis.checks.contract import check
from multigraft.diagnosis.findings import Finding
from multigraft.diagnosis.names import HELD
from multigraft.diagnosis.patient import Patient, as_meta
from multigraft.errors import ConfigError, MultigraftError
from multigraft.keys import full_key, strip_prefix
from multigraft.loading import name_what_was_saved
from multigraft.per_expert import PerExpert
from multigraft.prepare import own_copy, prepare
from multigraft.reading import shown

COPIED = (*HELD, "modules_to_save")
"""Words in the names of tensors that stand in a file beside the adapter's own."""


@check("base model")
def base_model(patient: Patient) -> Iterator[Finding]:
    """Sites, names and shapes that the config means on the base, against those of the file."""
    base, config = patient.base, patient.config
    if base is None or isinstance(config, ConfigError) or patient.is_foreign:
        return
    yield from _another_base(patient, base, config)
    tensors = as_meta({strip_prefix(n): t for n, t in patient.standard.items()})
    config = own_copy(config)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            per_expert = PerExpert(base, config, tensors)
            name_what_was_saved(config, per_expert.rest, base)
            prepared = prepare(base, "doctor", config, lenient=True)
            tensors = per_expert.tensors(prepared.main_sites)
        except MultigraftError as error:
            yield Finding(
                "base model",
                patient.where,
                f"means nothing on {type(base).__name__}: {error}",
                "Name the base that the adapter was trained on, or correct the config.",
            )
            return
    for each in dict.fromkeys(str(warning.message) for warning in caught):
        remedy = "See that it is meant."
        yield Finding("base model", patient.where, each, remedy, is_note=True)
    if patient.tensors is not None and patient.is_plain:
        expected = prepared.expected()
        words = _embeddings(base)
        copies = {k: t for k, t in tensors.items() if k not in expected and _is_copy(k, words)}
        rest = {k: t for k, t in tensors.items() if k not in copies}
        report, _ = compare(expected, rest, prepared.optional())
        yield from _disagreements(report, base)
        yield from _copies(copies, base)


def _another_base(patient: Patient, base: nn.Module, config: PeftConfig) -> Iterator[Finding]:
    theirs, own = config.base_model_name_or_path, getattr(base, "name_or_path", None)
    if theirs and own and Path(theirs).name != Path(str(own)).name:
        yield Finding(
            "base model",
            f"{patient.where}: base_model_name_or_path",
            f"names {shown(theirs)}, and the base is `{own}`: shapes may agree and outputs be "
            "meaningless.",
            "Nothing, if they are the same model.",
            is_note=True,
        )


def _disagreements(report: LoadReport, base: nn.Module) -> Iterator[Finding]:
    for key in report.missing_keys:
        yield Finding(
            "base model",
            key,
            "is meant by the config and missing from the file.",
            "Copy or save the file again; or narrow the config's targets to what was trained.",
        )
    for key in report.unexpected_keys:
        yield Finding(
            "base model",
            key,
            f"is in the file, and no part of this adapter on {type(base).__name__}.",
            "Widen the config's targets to it, if it was trained; or name the right base.",
        )
    for key, found, needed in report.mismatched_keys:
        yield Finding(
            "base model",
            key,
            f"has the shape {found}, and the base needs {needed}.",
            _shape_remedy(base, found, needed),
        )


def _shape_remedy(base: nn.Module, found: tuple[int, ...], needed: tuple[int, ...]) -> str:
    words = getattr(getattr(base, "config", None), "vocab_size", None)
    pairs = list(zip(found, needed, strict=False))
    differ = [(a, b) for a, b in pairs if a != b]
    if len(found) == len(needed) and len(differ) == 1 and differ[0][1] == words:
        return (
            "The vocabulary was extended in training: call "
            f"base.resize_token_embeddings({differ[0][0]}) before loading."
        )
    return "Name the base that the adapter was trained on, or correct the config's rank."


def _is_copy(key: str, words: set[str]) -> bool:
    """Whether it is a copy of the base's own tensor, as is saved with embeddings."""
    held = [part for part in key.split(".") if part in COPIED]
    return key in words or (bool(held) and "lora_" not in key)


def _embeddings(base: nn.Module) -> set[str]:
    """Keys of the input's and the output's embedding, which an adapter may bring along."""
    asked = (getattr(base, f"get_{which}_embeddings", None) for which in ("input", "output"))
    modules = {id(ask()) for ask in asked if callable(ask)}
    return {f"{path}.weight" for path, module in base.named_modules() if id(module) in modules}


def _copies(tensors: dict[str, Tensor], base: nn.Module) -> Iterator[Finding]:
    own = dict(base.named_parameters(remove_duplicate=False))
    for key, tensor in tensors.items():
        original = own.get(".".join(part for part in key.split(".") if part not in COPIED))
        if original is None or original.shape != tensor.shape:
            needed = "none there" if original is None else f"{tuple(original.shape)} there"
            shape = () if original is None else tuple(original.shape)
            yield Finding(
                "base model",
                full_key(key),
                f"is a tensor of the base's own, {tuple(tensor.shape)}; the base has {needed}.",
                _shape_remedy(base, tuple(tensor.shape), shape),
            )
