"""What the doctor can put right: new tensors and a new config, and what was done, in words."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from multigraft.config import PeftConfig
from multigraft.diagnosis.checks.config import as_meant, method_meant
from multigraft.diagnosis.checks.shapes import LOOKUPS, is_whole_model, strangers
from multigraft.diagnosis.findings import counted
from multigraft.diagnosis.names import LORA, nested, parsed, standards
from multigraft.diagnosis.nest import Plain, bare, scale_of, un_nested
from multigraft.diagnosis.patient import Patient
from multigraft.errors import ConfigError, UnsupportedError
from multigraft.keys import full_key
from multigraft.methods.lora import LoraConfig
from multigraft.reading import CONFIG_NAME, PICKLE_ENDINGS, read_config
from multigraft.variants import variant_for


@dataclass
class Treatment:
    """An adapter's files as they will be.

    Args:
        values: of the config.
        tensors: by their names in the file.
        done: what was changed, in order.
    """

    values: dict[str, Any] | None
    tensors: dict[str, Tensor] | None
    done: list[str] = field(default_factory=list)


def fixed(patient: Patient, treatment: Treatment) -> None:
    """Change what is safe: names, numbers in quotes, the method's name, what is no adapter's."""
    values, tensors = treatment.values, treatment.tensors
    kind = method_meant(patient)
    if values is not None and kind is not None and values.get("peft_type") != kind:
        values["peft_type"] = kind
        treatment.done.append(f'{CONFIG_NAME}: "peft_type" is "{kind}"')
    if values is not None and isinstance(patient.config, ConfigError):
        meant = as_meant(values)
        values |= meant
        said = [f"{CONFIG_NAME}: `{k}` is {json.dumps(v)} without quotes" for k, v in meant.items()]
        treatment.done += said
    if tensors is None or patient.is_foreign:
        return
    path = patient.weights_path
    if path is not None and path.suffix in PICKLE_ENDINGS:
        treatment.done.append(f"{path.name}: written as safetensors")
    extra = set(strangers(patient))
    if is_whole_model(patient, extra):
        treatment.done.append(
            f"left out {counted(len(extra), 'tensor')} of the base, `{min(extra)}` first"
        )
        tensors = {name: t for name, t in tensors.items() if name not in extra}
    treatment.tensors = tensors
    renamed(treatment)


def renamed(treatment: Treatment) -> None:
    """Give tensors the names that PEFT's files have, unless two would have the same."""
    tensors = treatment.tensors or {}
    names = standards(tensors)
    changed = [old for old, new in names.items() if old != new]
    if changed and len(set(names.values())) == len(names):
        first = changed[0]
        treatment.tensors = {names[name]: tensor for name, tensor in tensors.items()}
        treatment.done.append(
            f"renamed {counted(len(changed), 'tensor')}, `{first}` to `{names[first]}` first"
        )


def made_plain(patient: Patient, treatment: Treatment, within: Sequence[Path], drop: bool) -> None:
    """Un-nest, and say what the result is equal to.

    Args:
        within: folders of the adapters inside, whose configs give their scales.
        drop: leave out what is inside, rather than fold it in.

    Raises:
        UnsupportedError: no plain adapter is the same function.
    """
    tensors, config = treatment.tensors or {}, patient.config
    by_design = patient.is_by_design
    sites = {bare(parsed(name).site) for name in tensors if nested(name, by_design)}
    owners = {parsed(n).adapter for n in tensors} - {""}
    if not sites:
        return
    if len(owners) > 1:
        raise UnsupportedError(
            f"the file holds tensors of several adapters, {_listed(sorted(owners))}, and one of "
            "them is made plain. Name it: --adapter NAME."
        )
    if not isinstance(config, LoraConfig):
        why = config if isinstance(config, ConfigError) else f"its method is {config.peft_type}"
        raise UnsupportedError(
            f"{patient.where}: a nest is mended for LoRA alone, and {why}. Mend the config first."
        )
    if len(config.rank_pattern) * len(sites) > LOOKUPS:
        raise UnsupportedError(
            f"{patient.where}: `rank_pattern` has {len(config.rank_pattern):,} patterns for "
            f"{len(sites):,} sites, which are too many to compare. Write fewer."
        )
    taken = {n: t for n, t in tensors.items() if _is_of(n, sites)}
    inner = _Configs(patient, config, within)
    plain = un_nested(taken, config, inner.scale, drop=drop)
    treatment.tensors = {n: t for n, t in tensors.items() if n not in taken}
    treatment.tensors |= {full_key(key): tensor for key, tensor in plain.tensors.items()}
    if plain.patterns and treatment.values is not None:
        _set_patterns(treatment.values, plain)
    treatment.done += _account(plain, config, inner, len(sites), drop)
    renamed(treatment)


def _is_of(name: str, sites: set[str]) -> bool:
    found = parsed(name)
    return found.group in (*LORA, "modules_to_save") and bare(found.site) in sites


class _Configs:
    """Configs of the adapters inside, found by their names."""

    def __init__(self, patient: Patient, own: LoraConfig, within: Sequence[Path]) -> None:
        self.own, self.within, self.folder = own, within, patient.folder
        self.found: dict[str, LoraConfig] = {}

    def scale(self, name: str, path: str, rank: int) -> float:
        """See `nest.Scale`."""
        if name not in self.found:
            self.found[name] = self._find(name)
        return scale_of(self.found[name], name, path, rank)

    def _find(self, name: str) -> LoraConfig:
        if not name and not self.within:
            return self.own  # the name was that of the file's own adapter, and both were taken off
        near = [self.folder / name, self.folder.parent / name]
        near += [self.folder.parent] if name == "default" else []
        named = [folder for folder in self.within if folder.name == name]
        folders = named or ([*self.within] if len(self.within) == 1 else near if name else [])
        path = next((f / CONFIG_NAME for f in folders if (f / CONFIG_NAME).is_file()), None)
        if path is None:
            raise UnsupportedError(
                f"the scale of `{name}`, which is nested, stands in its own config, and that is "
                f"not at hand. Name its folder: --nested DIR."
            )
        config = PeftConfig.from_dict(read_config(path))
        if not isinstance(config, LoraConfig) or variant_for(config) is not None:
            raise UnsupportedError(
                f"{path}: `{name}`, which is nested, is no plain LoRA, so it cannot be folded in."
            )
        return config


def _set_patterns(values: dict[str, Any], plain: Plain) -> None:
    for site, (rank, alpha) in plain.patterns.items():
        pattern = re.escape(site)
        values["rank_pattern"] = {pattern: rank, **(values.get("rank_pattern") or {})}
        values["alpha_pattern"] = {pattern: alpha, **(values.get("alpha_pattern") or {})}


def _account(
    plain: Plain, config: LoraConfig, inner: _Configs, sites: int, drop: bool
) -> list[str]:
    """What was done, and what it is equal to."""
    done = []
    began, alone = f"un-nested {counted(sites, 'site')}: ", "the nest with the adapter active alone"
    if plain.folded:
        names = _listed(plain.folded)
        done.append(
            f"{began}what {names} adds inside the adapter is in its own matrices now. Outputs are "
            f"those of the nest with the adapter and {names} active together; with the adapter "
            "active alone, what is inside added nothing (for that, run the doctor on the old files "
            "with --drop-nested)"
        )
    elif drop and not plain.is_empty:
        done.append(f"{began}what was inside is left out. Outputs are those of {alone}")
    elif plain.is_empty and sites > len(plain.moved):
        lacks = "the file holds nothing of what was inside"
        done.append(f"{began}{lacks}. Outputs are those of {alone}")
    if plain.moved:
        count = counted(len(plain.moved), "site")
        done.append(f"moved the pairs of {count} up from below base layers; outputs are the same")
    if plain.patterns:
        done.append(
            f"stacked the pairs of {counted(len(plain.patterns), 'site')} that had several, with "
            "the sum of their ranks (`rank_pattern`, `alpha_pattern`)"
        )
    if config.lora_dropout or any(each.lora_dropout for each in inner.found.values()):
        done.append(
            "dropout: outputs are equal in evaluation; in training, the nest dropped elements "
            "inside as well, and the plain adapter does not"
        )
    return done


def _listed(names: Sequence[str]) -> str:
    return ", ".join(f"`{name}`" if name else "an adapter without a name" for name in names)
