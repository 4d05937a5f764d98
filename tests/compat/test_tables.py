"""What the alias offers: PEFT has all of it, and other packages find what they import."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import peft
import pytest

import multigraft
from multigraft.compat.tables import HOMES, MODULES, RENAMED, VERSION, home_of

PACKAGES = ("transformers", "accelerate", "trl", "diffusers", "sentence_transformers")


def names_in(module: str) -> list[str]:
    return [name for name in MODULES[module].split() if name != "*"]


def test_the_version_is_that_of_the_oracle() -> None:
    assert peft.__version__ == VERSION


@pytest.mark.parametrize("module", MODULES)
def test_a_module_is_one_of_pefts_and_has_these_names(module: str) -> None:
    theirs = [import_module(module)]
    if module.startswith("peft.tuners.") and module.rpartition(".")[2] != "tuners_utils":
        # A method's modules share its names here, wherever PEFT has them.
        package = ".".join(module.split(".")[:3])
        inside = [f"{package}.{part}" for part in ("config", "layer", "model")]
        theirs += [import_module(package)]
        theirs += [import_module(each) for each in inside if find_spec(each) is not None]
    assert [n for n in names_in(module) if not any(hasattr(m, n) for m in theirs)] == []


@pytest.mark.parametrize("module", MODULES)
def test_each_name_leads_somewhere(module: str) -> None:
    for name in names_in(module):
        home, there = home_of(name)
        assert hasattr(import_module(home), there), f"{module}.{name}"


def test_no_name_has_two_homes() -> None:
    names = [name for names in HOMES.values() for name in names] + list(RENAMED)
    assert len(names) == len(set(names))
    assert not set(names) & set(multigraft.__all__)


def imports_of_peft(package: str) -> Iterator[tuple[str, str]]:
    """(module, name) of everything that an installed package imports from PEFT."""
    spec = find_spec(package)
    assert spec is not None and spec.origin is not None
    for path in Path(spec.origin).parent.rglob("*.py"):
        source = path.read_text(encoding="utf-8", errors="ignore")
        if "from peft" not in source:
            continue
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "peft":
                yield from ((str(node.module), alias.name) for alias in node.names)


@pytest.mark.parametrize("package", PACKAGES)
def test_all_that_a_package_imports_from_peft_is_here(package: str) -> None:
    pytest.importorskip(package)
    wanted = set(imports_of_peft(package))
    public = set(multigraft.__all__)
    here = {(m, n) for m in MODULES for n in {*names_in(m), *(public if m == "peft" else ())}}
    assert wanted, f"{package} imports nothing from PEFT: the search is broken"
    assert wanted - here == set()
