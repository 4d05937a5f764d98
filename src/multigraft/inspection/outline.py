"""A structure as an outline: nodes that a terminal, or anything else, can draw as a tree."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from multigraft.inspection.structure import SiteAdapter, SiteGroup, Structure


@dataclass(frozen=True)
class Node:
    """One line of an outline: what it names, what is said of it, and what lies under it."""

    label: str
    note: str = ""
    children: tuple[Node, ...] = ()


def outline(structure: Structure) -> Node:
    """The base at the root, a node for each group of sites, their adapters as siblings below."""
    adapters, sites = len(structure.adapters), len(structure.sites)
    state = "one base" if structure.base_trainable else "one frozen base"
    trainable = f" ({structure.base_trainable:,} trainable)" if structure.base_trainable else ""
    note = (
        f"{state} of {structure.base_parameters:,} parameters{trainable}, "
        f"{adapters} adapter{'' if adapters == 1 else 's'} at "
        f"{sites} site{'' if sites == 1 else 's'}"
    )
    groups = [_group(group) for group in structure.groups]
    if structure.contexts:
        before = tuple(_adapter(adapter) for adapter in structure.contexts)
        groups.insert(0, Node("context", "what the model is given", before))
    return Node(structure.base, note, tuple(groups))


def render(node: Node) -> str:
    """The outline as plain text, drawn with box characters."""
    return "\n".join(_lines(node, "", ""))


def _group(group: SiteGroup) -> Node:
    size = "×".join(map(str, group.shape))
    stored = "" if group.storage == "dense" else f", {group.storage}"
    times = f", {len(group.sites)} of them" if len(group.sites) > 1 else ""
    return Node(
        group.pattern,
        f"{'NESTED ' if group.is_nested else ''}{group.kind} {size}{stored}{times}",
        tuple(map(_adapter, group.adapters)) + tuple(map(_group, group.inside)),
    )


def _adapter(adapter: SiteAdapter) -> Node:
    facts = [adapter.method]
    if adapter.rank:
        facts.append(f"rank {adapter.rank}")
    facts.append(f"scaling {adapter.scaling:g}")
    facts.append("active" if adapter.is_active else "inactive")
    facts += ["merged"] if adapter.is_merged else []
    facts.append("trainable" if adapter.is_trainable else "frozen")
    facts.append(f"{adapter.parameters:,} parameters")
    return Node(adapter.name, ", ".join(facts))


def _lines(node: Node, first: str, rest: str) -> Iterator[str]:
    yield f"{first}{node.label}{'  ' + node.note if node.note else ''}"
    for number, child in enumerate(node.children, start=1):
        is_last = number == len(node.children)
        yield from _lines(
            child, rest + ("└── " if is_last else "├── "), rest + ("    " if is_last else "│   ")
        )
