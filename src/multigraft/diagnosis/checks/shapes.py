"""The tensors against the config, without a base: pairs, ranks, targets, and what is no part."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

from torch import Tensor

from multigraft.config import pattern_value
from multigraft.diagnosis.checks.contract import check
from multigraft.diagnosis.findings import Finding, counted
from multigraft.diagnosis.names import HELD
from multigraft.diagnosis.patient import Patient
from multigraft.errors import close_to
from multigraft.methods.lora import LoraConfig
from multigraft.reading import shown
from multigraft.targeting import matches

EMBEDDINGS = (
    *("embed_tokens", "wte", "word_embeddings", "embed_in", "shared", "embeddings", "embed"),
    *("lm_head", "embed_out", "output_layer"),
)
LOOKUPS = 5_000_000
"""Comparisons of patterns and sites; more take minutes, and come of no real file."""
MANY = 50
"""Targets without a tensor that are named."""
PAIRS = {"lora_A": "lora_B", "lora_embedding_A": "lora_embedding_B"}


@check("pairs")
def pairs(patient: Patient) -> Iterator[Finding]:
    """A without B, B without A, and pairs that cannot be multiplied."""
    for site, tensors in patient.sites.items():
        for a, b in PAIRS.items():
            A, B = tensors.get(a), tensors.get(b)
            if (A is None) != (B is None):
                there, lacks = (a, b) if B is None else (b, a)
                yield Finding(
                    "pairs",
                    site,
                    f"has `{there}` and no `{lacks}`.",
                    "The file is incomplete: copy or save it again.",
                )
            elif A is not None and B is not None and _rank(A, 0) != _rank(B, 1):
                yield Finding(
                    "pairs",
                    site,
                    f"`{a}` {tuple(A.shape)} and `{b}` {tuple(B.shape)} are of no one rank.",
                    "Tensors of two adapters were mixed: save it again.",
                )


@check("ranks")
def ranks(patient: Patient) -> Iterator[Finding]:
    """Tensors of another rank than the config means."""
    config = patient.config
    if not isinstance(config, LoraConfig) or config.target_parameters:
        return
    wrong: dict[str, tuple[int, int]] = {}
    if len(config.rank_pattern) * len(patient.sites) > LOOKUPS:
        yield Finding(
            "ranks",
            f"{patient.where}: rank_pattern",
            f"has {len(config.rank_pattern):,} patterns for {len(patient.sites):,} sites, which "
            "are too many to compare.",
            "Write fewer patterns, each for many sites.",
        )
        return
    for site, tensors in patient.sites.items():
        A = tensors.get("lora_A", tensors.get("lora_embedding_A"))
        meant = pattern_value(config.rank_pattern, site, config.r)
        if A is not None and _rank(A, 0) != meant:
            wrong[site] = _rank(A, 0), meant
    for (found, meant), count in Counter(wrong.values()).items():
        first = next(site for site, pair in wrong.items() if pair == (found, meant))
        yield Finding(
            "ranks",
            first,
            f"has rank {found} and the config means {meant}, at {counted(count, 'site')}.",
            f"If the tensors are right, set `r` (or `rank_pattern`) to {found}; `lora_alpha` "
            "decides the scaling together with it, so see that it belongs to them.",
        )


@check("targets")
def targets(patient: Patient) -> Iterator[Finding]:
    """Sites that the config does not mean, and names of the config without tensors."""
    config = patient.config
    wanted = getattr(config, "target_modules", None)
    if not wanted or wanted == "all-linear":
        return
    if not patient.sites:
        return
    meant, named = _meant(wanted, patient.sites)
    stray = [s for s in patient.sites if s not in meant and ".base_layer." not in s]
    stray = stray if _decides(config) else []
    if stray:
        yield Finding(
            "targets",
            stray[0],
            f"has tensors, and `target_modules` does not mean it; there are {len(stray):,} such.",
            f"Add {', '.join(sorted({site.rpartition('.')[2] for site in stray})[:5])} to "
            "`target_modules`, if they are this adapter's.",
        )
    excluded = getattr(config, "exclude_modules", None) or []
    lacking = [n for n in ([wanted] if isinstance(wanted, str) else wanted) if n not in named]
    for name in lacking[:MANY]:
        if matches(excluded, name):
            continue
        near = close_to(name[:100], {site.rpartition(".")[2] for site in patient.sites})
        hint = f" Nearest: `{near[0]}`." if near else ""
        yield Finding(
            "targets",
            f"{patient.where}: target_modules",
            f"{shown(name)} is a target without a tensor.{hint}",
            "Take it out, if the adapter was not trained there; else the file is incomplete.",
        )


@check("magnitudes and biases")
def options(patient: Patient) -> Iterator[Finding]:
    """DoRA's magnitudes and B's biases: all of them where the config has them, and none else."""
    config = patient.config
    if not isinstance(config, LoraConfig):
        return
    for option, key in (("use_dora", "lora_magnitude_vector"), ("lora_bias", "lora_B.bias")):
        paired = {s: t for s, t in patient.sites.items() if "lora_A" in t}
        with_it = [site for site, tensors in paired.items() if key in tensors]
        if not paired or bool(getattr(config, option)) is (len(with_it) == len(paired)):
            continue
        if with_it or getattr(config, option):
            yield Finding(
                "magnitudes and biases",
                f"{patient.where}: {option}",
                f"is {getattr(config, option)}, and {len(with_it):,} of {len(paired):,} sites "
                f"have `{key}`.",
                f"Set `{option}` to {not getattr(config, option)}, if the tensors are right."
                if len(with_it) in (0, len(paired))
                else "The file is incomplete: copy or save it again.",
            )


@check("tensors of the base")
def tensors_of_the_base(patient: Patient) -> Iterator[Finding]:
    """Whole tensors of modules that the adapter does not train."""
    names = strangers(patient)
    brought = [name for name in names if _is_embedding(name)]
    if brought and len(brought) == len(names):
        yield Finding(
            "tensors of the base",
            names[0],
            "is an embedding that goes with the adapter, as for a vocabulary that was resized.",
            "Nothing, if that is meant: loading compares it with the base's, and keeps one that "
            "differs as the adapter's own copy.",
            is_note=True,
        )
    elif names:
        yield Finding(
            "tensors of the base",
            names[0],
            f"belongs to no adapter, since the config saves no such module; there are "
            f"{len(names):,} such.",
            "Leave them out; or name their modules in `modules_to_save`, if they were trained or "
            "resized.",
            is_fixable=is_whole_model(patient, names),
        )


def strangers(patient: Patient) -> list[str]:
    """Names in the file of whole tensors that the config does not save."""
    config = patient.config
    if not isinstance(config, LoraConfig) or not patient.is_plain or config.bias != "none":
        return []
    saved = config.modules_to_save or []
    embeddings = {site for site, t in patient.sites.items() if "lora_embedding_A" in t}
    names = []
    for name, found in patient.names.items():
        module, _, leaf = found.site.rpartition(".")
        outer, _, held = module.rpartition(".")
        is_copy = leaf == "weight" and held == "base_layer" and outer in embeddings
        is_saved = _is_within(saved, module) and not set(HELD) & set(module.split("."))
        if not found.group and not is_copy and not is_saved:
            names.append(name)
    return names


def _is_embedding(name: str) -> bool:
    """Whether a tensor's name is that of an input or output embedding, as models call them."""
    parts = name.split(".")
    return len(parts) > 1 and parts[-1] == "weight" and parts[-2] in EMBEDDINGS


def is_whole_model(patient: Patient, names: Iterable[str]) -> bool:
    """Whether these are a whole model's own tensors, with its adapted layers among them.

    Single ones may have been trained: PEFT saves embeddings that were resized.
    """
    sites = patient.sites
    paths = (patient.names[name].site.partition(".base_layer.") for name in names)
    return any(held and path in sites for path, held, _ in paths)


def _meant(wanted: str | list[str], sites: Iterable[str]) -> tuple[set[str], set[str]]:
    """The sites that targets mean, and the targets that mean any of them."""
    if isinstance(wanted, str):
        found = {site for site in sites if matches(wanted, site)}
        return found, {wanted} if found else set()
    names, meant, named = set(wanted), set(), set()
    for site in sites:
        parts = site.split(".")
        own = {end for n in range(len(parts)) if (end := ".".join(parts[n:])) in names}
        named |= own
        meant |= {site} if own else set()
    return meant, named


def _is_within(saved: list[str], module: str) -> bool:
    parts = module.split(".")
    return any(matches(saved, ".".join(parts[:n])) for n in range(1, len(parts) + 1))


def _decides(config: object) -> bool:
    """Whether `target_modules` alone says which sites there are."""
    more = ("target_parameters", "trainable_token_indices", "feedforward_modules")
    return not any(getattr(config, name, None) for name in more)


def _rank(tensor: Tensor, axis: int) -> int:
    return tensor.shape[axis] if tensor.dim() > axis else -1
