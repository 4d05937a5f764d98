"""Print docs/parity.md: every option of PEFT's LoRA with the tests that prove it.

python docs/parity.py            # print it
python docs/parity.py --write    # write docs/parity.md

What there is, is asked of the installed PEFT; which tests prove it, of `parity_rows`. A test holds
the page to both, and every named test to be there.
"""

from __future__ import annotations

import ast
import dataclasses
import re
import sys
from functools import cache
from pathlib import Path
from typing import Any

import peft
import peft.tuners.lora.config as configs
import peft.tuners.lora.layer as layers
import peft.tuners.lora.tp_layer as tp_layer

sys.path.insert(0, str(Path(__file__).parent))

import parity_rows as rows

PAGE = Path(__file__).with_name("parity.md")
TESTS = Path(__file__).resolve().parents[1] / "tests"
HEAD = """# LoRA: every option of PEFT, and the tests that prove it

Printed by `python docs/parity.py --write`. The options are those of the installed PEFT {version}; a
test fails when one has no row, a row has no test, or a test is not there. Paths are below `tests/`;
a class stands for the suite that it inherits: outputs, gradients, merged weights, files both ways
and initial values, each beside PEFT.
"""


def options() -> dict[str, set[str]]:
    """What PEFT has, by the titles of the page's tables that can be asked of it."""
    found = {"Fields of `LoraConfig`": _fields(peft.LoraConfig)}
    literal = str(peft.LoraConfig.__annotations__["init_lora_weights"])
    # "lora_ga" is read as well, though the type does not say so.
    starts = {*re.findall(r"'([^']+)'", literal), "True", "False", "lora_ga"}
    found["Values of `init_lora_weights`"] = starts
    for name in rows.OPTIONS:
        found[f"Fields of `{name}`"] = _fields(getattr(configs, name))
    plain = {
        name
        for module in (layers, tp_layer)
        for name, kind in vars(module).items()
        if isinstance(kind, type)
        and issubclass(kind, layers.LoraLayer)
        and kind.__module__ == module.__name__
        and not name.startswith("_")
    }
    found["Kinds of layers"] = plain - {"LoraLayer"}
    return found


def tables() -> dict[str, dict[str, rows.Tests]]:
    """The page's tables: title to option to tests."""
    return {
        "Fields of `LoraConfig`": rows.FIELDS,
        "Values of `init_lora_weights`": rows.STARTS,
        **{f"Fields of `{name}`": table for name, table in rows.OPTIONS.items()},
        "Kinds of layers": rows.LAYERS,
        "Values of `combination_type`": rows.RULES,
        "What is done with adapters": rows.FEATURES,
    }


def inner_configs() -> set[str]:
    """Names of the configs that a `LoraConfig` may hold."""
    return {
        name
        for name, kind in vars(configs).items()
        if isinstance(kind, type)
        and dataclasses.is_dataclass(kind)
        and name not in ("LoraConfig", "PeftConfig")
    }


def is_there(test: str) -> bool:
    """Whether a test of this name exists."""
    path, *names = test.split("::")
    return (TESTS / path).is_file() and names[-1] in _names(path)


@cache
def _names(path: str) -> frozenset[str]:
    tree = ast.parse((TESTS / path).read_text(encoding="utf-8"))
    kinds = (ast.FunctionDef, ast.ClassDef)
    return frozenset(node.name for node in ast.walk(tree) if isinstance(node, kinds))


def _fields(config: Any) -> set[str]:
    return {field.name for field in dataclasses.fields(config)}


def page() -> str:
    """The whole page."""
    lines = [HEAD.format(version=peft.__version__)]
    for title, table in tables().items():
        lines += [f"## {title}\n", "| option | proved by |", "| --- | --- |"]
        for option in sorted(table, key=str.lower):
            tests = "<br>".join(f"`{test}`" for test in table[option])
            lines.append(f"| `{option}` | {tests} |")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    if "--write" in sys.argv[1:]:
        PAGE.write_text(page(), encoding="utf-8")
    else:
        print(page())
