"""Public names: what `import multigraft` makes at once, and what waits until it is asked for."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import multigraft

LATER = multigraft._LATER


def fresh(code: str) -> list[str]:
    """What a new process prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert not done.returncode, done.stderr
    return done.stdout.split()


def test_what_waits_is_what_type_checkers_are_told() -> None:
    tree = ast.parse(Path(multigraft.__file__).read_text(encoding="utf-8"))
    told = next(node for node in tree.body if isinstance(node, ast.If))
    assert isinstance(told.test, ast.Name) and told.test.id == "TYPE_CHECKING"
    imports = [node for node in told.body if isinstance(node, ast.ImportFrom)]
    seen = {node.module: sorted(alias.name for alias in node.names) for node in imports}
    assert seen == {f"multigraft.{module}": sorted(names) for module, names in LATER.items()}


def test_importing_the_package_leaves_what_waits_alone() -> None:
    loaded = set(fresh("import sys, multigraft; print(*sys.modules)"))
    assert "multigraft.model" in loaded
    assert [module for module in LATER if f"multigraft.{module}" in loaded] == []


def test_a_star_import_and_dir_know_every_name() -> None:
    code = "from multigraft import *\nimport multigraft\nprint(*dir(multigraft), '--', *dir())"
    names = fresh(code)
    at = names.index("--")
    assert set(multigraft.__all__) <= set(names[:at])
    assert set(multigraft.__all__) <= set(names[at:])


def test_a_name_that_waited_is_the_same_object_ever_after() -> None:
    assert multigraft.LoraModel is multigraft.LoraModel
    assert "LoraModel" in vars(multigraft)


def test_an_unknown_name_is_no_attribute() -> None:
    with pytest.raises(AttributeError, match="no attribute `LoraModle`"):
        multigraft.LoraModle  # noqa: B018
    with pytest.raises(ImportError, match="LoraModle"):
        from multigraft import LoraModle  # noqa: F401
