"""The package keeps to its structure; and each check of that fails on a tree that doesn't."""

from __future__ import annotations

import importlib
import types
from pathlib import Path

import pytest

from tests import structure_checks as checks

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src" / "multigraft"
HEAVY = {
    *("transformers", "accelerate", "huggingface_hub", "datasets", "peft"),
    *("triton", "bitsandbytes", "torchao", "scipy", "sklearn", "pandas", "matplotlib"),
    *("typer", "click", "rich", "pydantic", "yaml", "jinja2"),
}


@pytest.fixture(scope="module")
def tree() -> checks.Tree:
    return checks.Tree(SOURCE)


def none(offences) -> None:
    offences = list(offences)
    assert not offences, "\n" + "\n".join(offences)


def test_all_is_exact_and_sorted(tree):
    none(checks.wrong_public_names(tree, importlib.import_module("multigraft")))


def test_layers_import_one_way(tree):
    none(checks.wrong_layer_imports(tree))


def test_cli_imports_the_public_api_only(tree):
    none(checks.wrong_cli_imports(tree))


def test_nothing_imports_peft(tree):
    none(checks.imports_of(tree, "peft"))


@pytest.mark.parametrize("folder", ["src/multigraft", "tests", "bench"])
def test_no_file_is_over_the_ceiling(folder):
    none(checks.overlong_files(ROOT / folder))


def test_few_functions_are_over_the_ceiling(tree):
    none(checks.overlong_functions(tree))


def test_import_loads_no_optional_package():
    baseline = "import torch, safetensors.torch"
    assert checks.heavy_imports("multigraft", HEAVY, baseline) == []


def test_no_tracked_file_names_a_path_of_one_machine():
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout, so there is no list of tracked files")
    none(checks.machine_paths(ROOT, checks.tracked_files(ROOT)))


# Each check fails on a tree that breaks its law, and is content with one that keeps it.


@pytest.fixture
def make(tmp_path):
    """Writes a package `pkg` from {path: source} and reads it back as a tree."""

    def write(**files: str) -> checks.Tree:
        for name, source in {"__init__": "__all__ = []", **files}.items():
            path = tmp_path / "pkg" / f"{name}.py"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(source)
        return checks.Tree(tmp_path / "pkg")

    return write


KEPT = {
    "methods/__init__": "from pkg.methods import lora\nfrom . import lora",
    "methods/lora": "import torch\nfrom pkg.errors import E\nfrom .contract import C\n"
    "from ..bases.contract import G\nfrom .. import kernels\nfrom pkg import config, site\n"
    "from pkg.variants import variant_for",
    "methods/contract": "from pkg.defaults import TARGETS\nfrom pkg.site import Site",
    "methods/ia3": "from pkg.methods.contract import Method\nfrom pkg.methods._shapes import f",
    "methods/_shapes": "",
    "variants/__init__": "from pkg.variants import dora",
    "variants/dora": "from pkg.methods.contract import Method\nfrom .contract import Variant",
    "variants/contract": "from pkg.registry import Registry",
    "bases/__init__": "",
    "bases/contract": "from pkg.registry import Registry",
    "kernels/__init__": "from .reference import f",
    "kernels/reference": "import torch",
    "config": "from pkg.registry import Registry\nfrom pkg.config_files import F",
    "config_files": "def f():\n    from pkg.checkpoint import locate",
    "checkpoint": "",
    "defaults": "import torch\nfrom pkg.errors import E",
    "errors": "",
    "site": "from pkg.bases import Geometry",
    "registry": "from pkg.errors import E",
    "layer": "from pkg.methods import lora",
    "cli/__init__": "from . import run",
    "cli/run": "import pkg\nfrom pkg import Public, __version__\nfrom pkg.train import fit\n"
    "import pkg.inspection\npkg.Public\npkg.inspection",
    "__init__": '__all__ = ["Public"]',
}


def test_a_tree_that_keeps_the_laws_has_no_offence(make):
    tree = make(**KEPT)
    none(checks.wrong_layer_imports(tree))
    none(checks.wrong_cli_imports(tree))
    none(checks.imports_of(tree, "peft"))
    none(checks.overlong_functions(tree))
    none(checks.overlong_files(tree.root))


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("methods/lora", "from pkg.layer import AdaptedLayer"),
        ("methods/lora", "from ..layer import AdaptedLayer"),
        ("methods/lora", "from .. import layer"),
        ("methods/lora", "import pkg.layer"),
        ("methods/lora", "def f():\n    from pkg import layer"),
        ("methods/lora", "import importlib\nimportlib.import_module('pkg.layer')"),
        ("methods/lora", "from pkg import Public"),
        ("methods/lora", "from pkg.wrap import attach"),
        ("methods/lora", "from pkg import model"),
        ("methods/lora", "from .ia3 import IA3"),
        ("methods/lora", "from pkg.methods import ia3"),
        ("methods/lora", "import pkg.methods.ia3"),
        ("methods/lora", "from .. import methods\nmethods.ia3.IA3"),
        ("methods/lora", "from pkg.variants.dora import DoRA"),
        ("methods/lora", "from ..bases.linear import Linear"),
        ("methods/ia3", "from pkg.variants import variant_for"),
        ("methods/contract", "from . import ia3"),
        ("variants/dora", "from pkg.methods.lora import LoRA"),
        ("variants/dora", "from pkg.methods import lora"),
        ("variants/dora", "from ..layer import AdaptedLayer"),
        ("defaults", "from pkg.methods.contract import Method"),
        ("config", "from pkg.model import PeftModel"),
        ("site", "from pkg.layer import AdaptedLayer"),
        ("bases/__init__", "from pkg.methods.lora import LoRA"),
        ("initialisations/pissa", "from pkg.model import PeftModel"),
        ("storage/dense", "from pkg.checkpoint import save"),
        ("kernels/reference", "from pkg.errors import E"),
        ("kernels/__init__", "from ..methods import contract"),
    ],
)
def test_an_import_against_the_direction_is_found(make, file, line):
    others = {"bases/linear": "", "model": "", "wrap": ""}
    offences = list(checks.wrong_layer_imports(make(**{**KEPT, **others, file: line})))
    assert len(offences) == 1
    assert "must not import" in offences[0]


@pytest.mark.parametrize(
    "line",
    [
        "from pkg.layer import AdaptedLayer",
        "from pkg import layer",
        "from .. import layer",
        "from pkg import Hidden",
        "from pkg.train import _private",
        "import pkg.layer",
        "import pkg as p\np.layer.AdaptedLayer",
    ],
)
def test_a_private_import_of_the_cli_is_found(make, line):
    assert len(list(checks.wrong_cli_imports(make(**{**KEPT, "cli/run": line})))) == 1


@pytest.mark.parametrize(
    ("init", "offence"),
    [
        ('__all__ = ["b", "a"]', "`a` stands after `b`"),
        ('__all__ = ["a", "a", "b"]', "`a` stands after `a`"),
        ('__all__ = ["a", "b", "c"]', "`c` does not resolve"),
        ('from .errors import E\n__all__ = ["a", "b"]', "`E` is public but not listed"),
        ('def f(): pass\n__all__ = ["a", "b"]', "`f` is public but not listed"),
        ('LIMIT = 3\n__all__ = ["a", "b"]', "`LIMIT` is public but not listed"),
    ],
)
def test_a_wrong_all_is_found(make, init, offence):
    package = types.SimpleNamespace(a=1, b=2)
    offences = list(checks.wrong_public_names(make(__init__=init, errors=""), package))
    assert len(offences) == 1
    assert offence in offences[0]


def test_an_exact_all_passes(make):
    init = 'import os\nfrom . import errors\nfrom .errors import E as _E\n__all__ = ["a", "b"]'
    package = types.SimpleNamespace(a=1, b=2)
    none(checks.wrong_public_names(make(__init__=init, errors=""), package))


@pytest.mark.parametrize(
    "line", ["import peft", "from peft.tuners import lora", "__import__('peft')"]
)
def test_an_import_of_peft_is_found(make, line):
    tree = make(**{"compat/alias": f"def f():\n    {line}"})
    assert list(checks.imports_of(tree, "peft")) == ["pkg/compat/alias.py:2: imports `peft`"]


def test_a_package_named_like_peft_is_not_peft(make):
    none(checks.imports_of(make(a="import peft_models\nfrom . import peft"), "peft"))


def test_a_file_over_the_ceiling_is_found(make):
    tree = make(long="x = 1\n" * 401, short="x = 1\n" * 400)
    assert list(checks.overlong_files(tree.root)) == ["pkg/long.py: 401 lines, the ceiling is 400"]


def test_functions_over_the_ceiling_are_found_once_they_are_too_many(make):
    long = "def long():\n" + "    x = 1\n" * 50
    fits = "".join(f"def f{i}():\n" + "    x = 1\n" * 49 for i in range(33))
    none(checks.overlong_functions(make(few=long + fits)))
    offences = list(checks.overlong_functions(make(few=long + fits, many=long)))
    assert offences[0] == "2 of 35 functions are over 50 lines"
    assert offences[1:] == [f"  pkg/{name}.py:1: long, 51 lines" for name in ("few", "many")]


def test_a_heavy_import_is_found(make, tmp_path):
    make(__init__="import pkg.sub", sub="import heavy.part")
    (tmp_path / "heavy").mkdir()
    (tmp_path / "heavy" / "part.py").write_text("")
    banned = {"heavy", "other"}
    assert checks.heavy_imports("pkg", banned, path=str(tmp_path)) == ["heavy"]
    assert checks.heavy_imports("pkg", banned, "import heavy.part", str(tmp_path)) == []


def test_a_package_that_fails_to_import_is_no_pass(make, tmp_path):
    make(__init__="import absent_package")
    with pytest.raises(ImportError, match="absent_package"):
        checks.heavy_imports("pkg", {"heavy"}, path=str(tmp_path))


@pytest.mark.parametrize("folder", ["work", "root", "home/ada", "Users/ada"])
def test_a_path_of_one_machine_is_found(tmp_path, folder):
    path = f"/{folder}/models/base"
    (tmp_path / "a.md").write_text(f"one\nload '{path}'\n")
    assert list(checks.machine_paths(tmp_path, ["a.md"])) == [f"a.md:2: /{folder}/m…"]


@pytest.mark.parametrize(
    "text", ["https://host.example/{}/x", "src/{}/x", "/tmp/{}/x", "/{}", "~/{}/x"]
)
def test_an_address_or_a_relative_path_is_no_path_of_a_machine(tmp_path, text):
    (tmp_path / "a.md").write_text(text.format("root"))
    none(checks.machine_paths(tmp_path, ["a.md"]))


def test_binary_files_are_not_searched(tmp_path):
    path = "/" + "root/x"
    (tmp_path / "a.bin").write_bytes(b"\0" + path.encode())
    none(checks.machine_paths(tmp_path, ["a.bin"]))
