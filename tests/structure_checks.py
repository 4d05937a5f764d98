"""The laws of structure, as functions over a source tree; each yields one line per offence.

`tests/test_structure.py` runs them on the package and, to show that each can fail, on small broken
trees.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cached_property
from itertools import pairwise
from pathlib import Path

LAYERS = ("methods", "variants", "initialisations", "bases", "storage", "kernels")
FACES = ("contract", "registry")  # what a layer shows to its own files and to the other layers
OWNERS = {"variants": "methods.lora", "initialisations": "methods.lora"}
"""Layers that one file alone may import: variants and initialisations are LoRA's sub-registries, so
LoRA asks them who acts, and they know methods through their contract only."""
FOUNDATIONS = {
    "errors": (),
    "registry": ("errors",),
    "defaults": ("errors",),
    "fields": ("errors", "expressions"),
    "expressions": (),
    "draws": ("errors", "kernels"),
    "config": ("errors", "registry", "fields", "reading", "config_files"),
    "config_files": (
        *("errors", "fields", "reading", "hub"),
        *("config", "atomic", "checkpoint", "card"),
    ),
    "reading": ("errors",),
    "site": ("bases", "storage"),
    "whole": ("errors", "registry"),
}
"""What every layer may import, and all that each of these may import itself: none reaches the
wrapper or the model. `defaults` is a table of names by architecture, data and one look-up, which a
method's contract points at; `config_files` opens files only in the functions that read or write
them, and only there imports what does."""
CLI_MODULES = (
    *("demo", "train", "errors", "exchange", "inspection", "report", "combine", "generation"),
    *("merging", "planning"),
)
FILE_CEILING = 400
FUNCTION_CEILING = 50
OVERLONG_SHARE = 0.03


class Module:
    """One parsed source file and its dotted name."""

    def __init__(self, path: Path, name: str):
        self.path = path
        self.name = name
        self.is_package = path.name == "__init__.py"

    @cached_property
    def source(self) -> str:
        return self.path.read_text(encoding="utf-8")

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.source, str(self.path))

    def absolute(self, level: int, module: str | None) -> str:
        """The dotted name that a `from ...module import` in this file means."""
        if level == 0:
            return module or ""
        parts = self.name.split(".")
        parts = parts[: len(parts) - level + self.is_package]
        return ".".join([*parts, module] if module else parts)


class Tree:
    """A package's source files by dotted name, and what each one imports."""

    def __init__(self, root: Path):
        self.root = root
        self.package = root.name
        self.modules: dict[str, Module] = {}
        for path in sorted(root.rglob("*.py")):
            parts = path.relative_to(root.parent).with_suffix("").parts
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            self.modules[name] = Module(path, name)

    def imports(self, module: Module) -> Iterator[tuple[int, str]]:
        """Every import at any depth, under TYPE_CHECKING too: (line, dotted target).

        `from a import b` means the module `a.b` where there is one, and otherwise the name `b` of
        `a`, which is written `a:b`.
        """
        for node in ast.walk(module.tree):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    yield node.lineno, alias.name
            elif isinstance(node, ast.ImportFrom):
                source = module.absolute(node.level, node.module)
                for alias in node.names:
                    inner = f"{source}.{alias.name}"
                    yield node.lineno, inner if inner in self.modules else f"{source}:{alias.name}"
            elif isinstance(node, ast.Call) and (name := _imported_by_call(node)):
                yield node.lineno, name

    def own_imports(self, module: Module) -> Iterator[tuple[int, str, str]]:
        """Imports from this package: (line, module less the package's name, name in it or "")."""
        for line, target in self.imports(module):
            source, _, name = target.partition(":")
            if source == self.package or source.startswith(self.package + "."):
                yield line, source[len(self.package) + 1 :], name

    def where(self, module: Module, line: int) -> str:
        return f"{module.path.relative_to(self.root.parent)}:{line}"


def _imported_by_call(node: ast.Call) -> str:
    """The literal name that `import_module("…")` or `__import__("…")` is given, else ""."""
    function = node.func
    called = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
    if called not in ("import_module", "__import__") or not node.args:
        return ""
    return str(getattr(node.args[0], "value", ""))


def public_names(tree: Tree) -> list[str]:
    """The literal `__all__` of the package."""
    for node in tree.modules[tree.package].tree.body:
        if isinstance(node, ast.Assign) and _is_name(node.targets[0], "__all__"):
            return list(ast.literal_eval(node.value))
        if isinstance(node, ast.AnnAssign) and _is_name(node.target, "__all__") and node.value:
            return list(ast.literal_eval(node.value))
    raise LookupError(f"{tree.package}/__init__.py has no literal `__all__`")


def _is_name(node: ast.expr, name: str) -> bool:
    return isinstance(node, ast.Name) and node.id == name


def _bound_names(tree: Tree) -> Iterator[str]:
    """Names that the package's __init__ takes from its own modules or defines itself."""
    init = tree.modules[tree.package]
    for node in ast.walk(init.tree):
        if isinstance(node, ast.ImportFrom):
            source = init.absolute(node.level, node.module)
            if source.split(".")[0] == tree.package:
                yield from (
                    alias.asname or alias.name
                    for alias in node.names
                    if f"{source}.{alias.name}" not in tree.modules
                )
    for node in init.tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, ast.Assign):
            yield from (t.id for t in node.targets if isinstance(t, ast.Name))
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield node.target.id


def wrong_public_names(tree: Tree, package: object) -> Iterator[str]:
    """`__all__` is sorted, without repeats; every name resolves; no public name is missing."""
    names = public_names(tree)
    for before, after in pairwise(names):
        if before >= after:
            yield f"__all__: `{after}` stands after `{before}`; sort plainly, each name once"
    for name in names:
        if not hasattr(package, name):
            yield f"__all__: `{name}` does not resolve"
    for name in sorted(set(_bound_names(tree)) - set(names)):
        if not name.startswith("_"):
            yield f"__all__: `{name}` is public but not listed; list it or underline it"


def wrong_layer_imports(tree: Tree) -> Iterator[str]:
    """Imports point one way: a layer sees the foundations and the layers' faces.

    So no method imports another one, the wrapper or the model. A file also sees its own layer's
    underlined helpers, and the layer's `__init__` all its files: it lists them.
    """
    for module in tree.modules.values():
        layer = module.name.partition(".")[2].partition(".")[0]
        if layer not in (*LAYERS, *FOUNDATIONS):
            continue
        for line, target, name in tree.own_imports(module):
            if layer in FOUNDATIONS:
                allowed = target in FOUNDATIONS[layer]
            else:
                allowed = _layer_may_import(module, layer, target)
            if not allowed:
                seen = f"{target or tree.package}{':' + name if name else ''}"
                yield f"{tree.where(module, line)}: `{layer}` must not import `{seen}`"


def _layer_may_import(module: Module, layer: str, target: str) -> bool:
    if layer == "kernels":
        return target.split(".")[0] == "kernels"
    if target in FOUNDATIONS:
        return True
    head, _, rest = target.partition(".")
    if head == layer:
        # Its own `__init__` lists all its files, so going through it is a way to the others.
        return module.is_package or rest in FACES or rest.split(".")[-1].startswith("_")
    if OWNERS.get(head, "") not in ("", module.name.partition(".")[2]):
        return False
    return head in LAYERS and rest in ("", *FACES)


def wrong_cli_imports(tree: Tree) -> Iterator[str]:
    """The CLI sees the public names, a few public modules and its own files."""
    public = set(public_names(tree))
    for module in tree.modules.values():
        if module.name.split(".")[1:2] != ["cli"]:
            continue
        for line, target, name in tree.own_imports(module):
            if not _cli_may_import(target, name, public):
                seen = f"{target or tree.package}{':' + name if name else ''}"
                yield f"{tree.where(module, line)}: the CLI must not import `{seen}`"
        for line, name in _attributes_of(module, tree.package):
            if name not in public | set(CLI_MODULES) and not name.startswith("__"):
                yield f"{tree.where(module, line)}: the CLI must not use `{tree.package}.{name}`"


def _cli_may_import(target: str, name: str, public: set[str]) -> bool:
    if not target:
        return not name or name in public or name.startswith("__")
    head, *rest = target.split(".")
    if head == "cli":
        return True
    return head in CLI_MODULES and not any(part.startswith("_") for part in [*rest, name])


def _attributes_of(module: Module, package: str) -> Iterator[tuple[int, str]]:
    """Attributes read from `package` where the file has `import package [as x]`."""
    aliases = {
        alias.asname or alias.name
        for node in ast.walk(module.tree)
        if isinstance(node, ast.Import)
        for alias in node.names
        if alias.name == package
    }
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Attribute) and getattr(node.value, "id", None) in aliases:
            yield node.lineno, node.attr


def imports_of(tree: Tree, banned: str) -> Iterator[str]:
    """Places that import the top-level package `banned`."""
    for module in tree.modules.values():
        for line, target in tree.imports(module):
            if re.split(r"[.:]", target)[0] == banned:
                yield f"{tree.where(module, line)}: imports `{banned}`"


def overlong_files(root: Path, ceiling: int = FILE_CEILING) -> Iterator[str]:
    """Python files under `root` of more than `ceiling` lines."""
    for path in sorted(root.rglob("*.py")):
        lines = len(path.read_text(encoding="utf-8").splitlines())
        if lines > ceiling:
            yield f"{path.relative_to(root.parent)}: {lines} lines, the ceiling is {ceiling}"


def overlong_functions(
    tree: Tree, ceiling: int = FUNCTION_CEILING, share: float = OVERLONG_SHARE
) -> Iterator[str]:
    """Functions over `ceiling` lines, once they are `share` or more of all functions."""
    functions = [
        (module, node, (node.end_lineno or node.lineno) - node.lineno + 1)
        for module in tree.modules.values()
        for node in ast.walk(module.tree)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    ]
    over = [(module, node, lines) for module, node, lines in functions if lines > ceiling]
    if over and len(over) >= share * len(functions):
        yield f"{len(over)} of {len(functions)} functions are over {ceiling} lines"
        for module, node, lines in sorted(over, key=lambda item: -item[2]):
            yield f"  {tree.where(module, node.lineno)}: {node.name}, {lines} lines"


def heavy_imports(package: str, banned: set[str], baseline: str = "", path: str = "") -> list[str]:
    """Those of `banned` that `import package` loads in a fresh process, beyond `baseline`'s."""
    code = (
        "import sys\n"
        f"{baseline}\n"
        "before = set(sys.modules)\n"
        f"import {package}\n"
        "print(*sorted({name.split('.')[0] for name in set(sys.modules) - before}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=path or None, check=False
    )
    if done.returncode:
        raise ImportError(f"`import {package}` failed:\n{done.stderr}")
    return sorted(banned & set(done.stdout.split()))


# An alternation, so that this file holds no such path itself. What has a word or a slash before it
# is part of a relative path or an address, and nobody's machine.
MACHINE_PATH = re.compile(rb"(?<![\w.~/-])/(?:work|root|home/\w+|Users/\w+)/[\w.-]")


def machine_paths(root: Path, files: list[str]) -> Iterator[str]:
    """Lines of `files` under `root` that hold an absolute path of somebody's machine."""
    for name in files:
        path = root / name
        if not path.is_file() or b"\0" in (data := path.read_bytes()):
            continue
        for number, line in enumerate(data.splitlines(), start=1):
            if found := MACHINE_PATH.search(line):
                yield f"{name}:{number}: {found.group().decode()}…"


def tracked_files(root: Path) -> list[str]:
    """Paths that git tracks under `root`."""
    done = subprocess.run(
        ["git", "ls-files", "-z"], cwd=root, capture_output=True, text=True, check=True
    )
    return [name for name in done.stdout.split("\0") if name]
