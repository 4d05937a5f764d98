"""The numbers: finite, of the dtypes that adapters have, and not all zero."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import torch
from torch import Tensor

from multigraft.diagnosis.checks.contract import check
from multigraft.diagnosis.checks.shapes import PAIRS
from multigraft.diagnosis.findings import Finding
from multigraft.diagnosis.names import is_group, parsed
from multigraft.diagnosis.patient import Patient
from multigraft.finite import is_finite


@check("non-finite values")
def non_finite(patient: Patient) -> Iterator[Finding]:
    """NaN or infinity."""
    for name, tensor in (patient.tensors or {}).items():
        if tensor.is_floating_point() and tensor.numel() and not is_finite(tensor):
            yield Finding(
                "non-finite values",
                name,
                "holds NaN or infinity, so everything that it takes part in does.",
                "Take an earlier checkpoint: the training diverged, or the file is damaged.",
            )


@check("dtypes")
def dtypes(patient: Patient) -> Iterator[Finding]:
    """Integers where an adapter has fractions, and several dtypes side by side."""
    kinds: Counter[torch.dtype] = Counter()
    for name, tensor in (patient.tensors or {}).items():
        found = parsed(name)
        if not found.group or not is_group(found.group) or found.group == "modules_to_save":
            continue
        kinds[tensor.dtype] += 1
        if not tensor.is_floating_point() and found.group.startswith("lora_"):
            yield Finding(
                "dtypes",
                name,
                f"is of {_short(tensor.dtype)}, which no adapter's matrix is.",
                "Save it again from the model: the file was quantised or converted.",
            )
    floats = {kind: count for kind, count in kinds.items() if kind.is_floating_point}
    if len(floats) > 1:
        listed = ", ".join(f"{count:,} of {_short(kind)}" for kind, count in floats.items())
        yield Finding(
            "dtypes",
            patient.weights_path.name if patient.weights_path else patient.source,
            f"holds tensors of several dtypes: {listed}.",
            "Nothing, if that is meant: they are converted when they are loaded.",
            is_note=True,
        )


@check("dead adapters")
def dead(patient: Patient) -> Iterator[Finding]:
    """Sites at which an adapter adds nothing, since A or B is zero."""
    is_zero: dict[str, bool] = {}
    for site, tensors in patient.sites.items():
        found = [tensors[key] for pair in PAIRS.items() for key in pair if key in tensors]
        if found:
            is_zero[site] = any(_is_zero(t) for t in found)
    zeros = [site for site, zero in is_zero.items() if zero]
    if zeros and len(zeros) == len(is_zero):
        yield Finding(
            "dead adapters",
            patient.weights_path.name if patient.weights_path else patient.source,
            "adds nothing at any site: every pair has a matrix of zeros.",
            "It was saved before training, or training never reached it.",
            is_note=True,
        )
        return
    for site in zeros:
        yield Finding(
            "dead adapters",
            site,
            "has a matrix of zeros, so the adapter adds nothing there, while it does elsewhere.",
            "See whether the forward runs this layer, and whether its tensors were trainable.",
            is_note=True,
        )


def _is_zero(tensor: Tensor) -> bool:
    wide = tensor.float() if tensor.dtype.itemsize == 1 else tensor
    return tensor.numel() > 0 and not bool(wide.any())


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
