"""The config by itself."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from typing import Any

from multigraft.config import CONFIGS
from multigraft.diagnosis.checks.contract import check
from multigraft.diagnosis.findings import Finding
from multigraft.diagnosis.patient import Patient
from multigraft.errors import ConfigError, close_to
from multigraft.fields import FORMAT_VERSION, is_newer
from multigraft.reading import shown

HINTS = {
    r"lora_(A|B|embedding_A|embedding_B)": "LORA",
    r"ia3_l": "IA3",
    r"hada_w1_a": "LOHA",
    r"lokr_w1(_a)?": "LOKR",
    r"oft_[rR]": "OFT",
    r"vera_lambda_b": "VERA",
    r"hira_A": "HIRA",
    r"ln_tuning_layers": "LN_TUNING",
}
"""The method that a tensor's group tells, where one alone has it (AdaLoRA's ``lora_E`` apart)."""


@check("method")
def method(patient: Patient) -> Iterator[Finding]:
    """A config that does not say which method it is of, or one that is not built."""
    if patient.values is None:
        return
    kind, guess = patient.values.get("peft_type"), method_meant(patient)
    if kind is None:
        yield Finding(
            "method",
            patient.where,
            "has no `peft_type`, so it does not say which method it is of.",
            f'Add "peft_type": "{guess}", which its tensors tell.'
            if guess
            else "Add the method's name, such as LORA.",
            is_fixable=guess is not None,
        )
    elif str(kind) not in CONFIGS:
        near = close_to(str(kind), CONFIGS)
        yield Finding(
            "method",
            patient.where,
            f"`peft_type` is {shown(str(kind))}, which is not built here.",
            f"Write {near[0]}, if that is meant." if near else f"Built are {', '.join(CONFIGS)}.",
            is_fixable=guess is not None,
        )


@check("values of the config")
def config_values(patient: Patient) -> Iterator[Finding]:
    """A config that cannot mean anything."""
    if patient.values is None or str(patient.values.get("peft_type")) not in CONFIGS:
        return
    if isinstance(patient.config, ConfigError):
        mended = as_meant(patient.values)
        yield Finding(
            "values of the config",
            patient.where,
            str(patient.config),
            "Write it without quotes." if mended else "Correct the value.",
            is_fixable=bool(mended),
        )


@check("unknown keys")
def unknown_keys(patient: Patient) -> Iterator[Finding]:
    """Keys that the method's config does not have, and that have no effect."""
    values = patient.values or {}
    kind = str(values.get("peft_type") or method_meant(patient))
    if kind not in CONFIGS:
        return
    known = {f.name for f in dataclasses.fields(CONFIGS[kind])}
    for key in values:
        if key in known:
            continue
        near = [name for name in close_to(key[:100], known - set(values)) if _is_typo(key, name)]
        yield Finding(
            "unknown keys",
            f"{patient.where}: {shown(key)}",
            f"is no option of {kind} and has no effect"
            + (f"; the nearest is `{near[0]}`, which is not set." if near else "."),
            f"If `{near[0]}` is meant, rename it, and see that outputs are what they were."
            if near
            else "Remove it, or compare outputs with the tool that wrote it.",
            is_note=not near,
        )


@check("version")
def version(patient: Patient) -> Iterator[Finding]:
    """A file of a newer format than the one that is known here."""
    written = (patient.values or {}).get("peft_version")
    if is_newer(written):
        yield Finding(
            "version",
            patient.where,
            f"was written by version {shown(str(written))}; known here is {FORMAT_VERSION}.",
            "Compare outputs with what wrote it.",
            is_note=True,
        )


def method_meant(patient: Patient) -> str | None:
    """The method that the config names in whatever case; or that the tensors' names tell."""
    kind = (patient.values or {}).get("peft_type")
    if kind is not None:
        return str(kind).upper() if str(kind).upper() in CONFIGS else None
    groups = {found.group for found in patient.names.values()}
    if "lora_E" in groups:
        return "ADALORA"
    told = {kind for group in groups for p, kind in HINTS.items() if re.fullmatch(p, group)}
    return told.pop() if len(told) == 1 else None


def as_meant(values: dict[str, Any]) -> dict[str, Any]:
    """What stands in quotes, and is a number or a truth value for a field that has such."""
    kind = str(values.get("peft_type"))
    fields = dataclasses.fields(CONFIGS[kind]) if kind in CONFIGS else ()
    kinds = {f.name: str(f.type) for f in fields}
    meant: dict[str, Any] = {}
    for key, value in values.items():
        kind = kinds.get(key, "str")
        if not isinstance(value, str) or "str" in kind:
            continue
        if kind.startswith("bool") and value.lower() in ("true", "false"):
            meant[key] = value.lower() == "true"
        elif kind.startswith(("int", "float")) and re.fullmatch(NUMBER, value):
            meant[key] = float(value) if "." in value or kind.startswith("float") else int(value)
    return meant


NUMBER = r"[0-9]{1,9}(\.[0-9]{1,9})?"


def _is_typo(key: str, name: str) -> bool:
    """Whether a key is so much like a name that it can hardly be another option."""
    return bool(close_to(key.lower(), [name])) and abs(len(key) - len(name)) <= 2
