"""Names of tensors: whose they are, and whether PEFT's files have them so."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from multigraft.diagnosis.checks.contract import check
from multigraft.diagnosis.findings import Finding, counted
from multigraft.diagnosis.names import nested, standards
from multigraft.diagnosis.patient import Patient


@check("another tool")
def another_tool(patient: Patient) -> Iterator[Finding]:
    """Files that another tool wrote, under names of its own."""
    for tool in dict.fromkeys(patient.tools.values()):
        names = [name for name, its in patient.tools.items() if its is tool]
        yield Finding(
            "another tool",
            _file(patient),
            f"holds {counted(len(names), 'tensor')} named as by {tool.name}: `{names[0]}`.",
            tool.remedy,
        )


@check("nested adapters")
def nested_adapters(patient: Patient) -> Iterator[Finding]:
    """Tensors of a model in which adapters were put onto adapters."""
    names = [name for name in patient.tensors or () if nested(name, patient.is_by_design)]
    if names:
        yield Finding(
            "nested adapters",
            _file(patient),
            f"holds {counted(len(names), 'tensor')} of a model with adapters inside adapters, such "
            f"as `{names[0]}`.",
            "Run the doctor with --un-nest, which writes the same function as a plain adapter "
            "where there is one.",
            is_fixable=True,
        )


@check("names of tensors")
def names_of_tensors(patient: Patient) -> Iterator[Finding]:
    """Names that hold what belongs into memory: the adapter's name, prefixes, wrappers."""
    if patient.is_foreign:
        return
    adapters = {found.adapter for found in patient.names.values() if found.adapter}
    if len(adapters) > 1 or patient.others:
        listed = ", ".join(f"`{name}`" for name in sorted(adapters | set(patient.others)))
        yield Finding(
            "names of tensors",
            _file(patient),
            f"holds tensors of several adapters: {listed}. A file holds one.",
            "Keep those of one: --adapter NAME --fix.",
            is_fixable=bool(patient.others),
        )
        return
    names = standards(patient.tensors or ())
    wrong = {old: new for old, new in names.items() if old != new}
    clashes = [name for name, count in Counter(names.values()).items() if count > 1]
    if clashes:
        yield Finding(
            "names of tensors",
            clashes[0],
            f"is meant by two tensors; there are {counted(len(clashes), 'such name')}.",
            "Remove one of each two.",
        )
    elif wrong:
        first = next(iter(wrong))
        yield Finding(
            "names of tensors",
            _file(patient),
            f"holds {counted(len(wrong), 'tensor')} under names of another layout, such as "
            f"`{first}` for `{wrong[first]}`.",
            "Rename them.",
            is_fixable=True,
        )


def _file(patient: Patient) -> str:
    return patient.weights_path.name if patient.weights_path else patient.source
