"""Print docs/api-parity.md: every public name of PEFT, and what Multigraft has under it.

python docs/api_parity.py            # print it
python docs/api_parity.py --write    # write docs/api-parity.md

Both packages are inspected; why something is not here is told by `api_parity_reasons`. A test holds
the page to both, and every absence and every difference to a reason.
"""

from __future__ import annotations

import dataclasses
import inspect
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
from torch import nn

import multigraft
import multigraft.tuner

sys.path.insert(0, str(Path(__file__).parent))

import api_parity_reasons as reasons

PAGE = Path(__file__).with_name("api-parity.md")
NO_METHOD = "its method is not built"
HEAD = """# Every public name of PEFT

Printed by `python docs/api_parity.py --write`; a test holds the page to what both packages have.
Compared with PEFT {version}: names, members, parameters, their order and their defaults. Fields of
methods' configs stand in another order, so give them by name. What a signature here has in addition
is optional and not listed. What behaves differently is in
[coming-from-peft.md](coming-from-peft.md).

{here} of {total} names are here; {methods} of the others are of methods that are not built.
"""
ONLY_HERE = """
## Only here

Names of `multigraft` that PEFT does not have:
"""


def absent() -> dict[str, str]:
    """PEFT's names that are not here, with the reason; an empty one is a fault."""
    found = {}
    for name in sorted(set(peft.__all__) - set(multigraft.__all__)):
        found[name] = NO_METHOD if _is_of_no_method(name) else reasons.NAMES.get(name, "")
    return found


def differences(name: str) -> dict[str, str]:
    """What of a name's signature and members is not as in PEFT, with the reason."""
    theirs, ours = getattr(peft, name), getattr(multigraft, name)
    found = [f"{name}({part})" for part in _signature(theirs, ours)]
    if isinstance(theirs, type):
        found += _members(theirs, ours)
    return {part: reasons.PARTS.get(part, "") for part in found}


def _is_of_no_method(name: str) -> bool:
    stem = name.removesuffix("Model").removesuffix("Config")
    return stem != name and f"{stem}Config" not in multigraft.__all__


def _members(theirs: type, ours: type) -> Iterator[str]:
    members = set(multigraft.PeftConfig.__dataclass_fields__) if _is_config(ours) else set()
    served = set(dir(ours)) | members | {f.name for f in _fields(ours)}
    if issubclass(ours, multigraft.PeftModel):
        served |= set(dir(multigraft.tuner.Tuner))  # the handle answers for its tuner
    for part in sorted(set(dir(theirs)) - set(dir(nn.Module))):
        if part.startswith("_") or _is_enum(theirs):
            continue
        if part not in served:
            yield part
            continue
        if isinstance(getattr(theirs, part, None), type):
            continue  # a class is only asked whether a layer is of it
        yield from (
            f"{part}({each})"
            for each in _signature(getattr(theirs, part, None), getattr(ours, part, None))
        )


def _signature(theirs: Any, ours: Any) -> Iterator[str]:
    """The parameters of PEFT's that ours lacks, or has with another default."""
    if not (callable(theirs) and callable(ours)) or _is_enum(theirs):
        return
    own = _parameters(ours)
    in_order = _positional(theirs)
    is_made_by_name = isinstance(ours, type) and _is_config(ours)
    is_there = set(in_order) <= set(own)  # else what is not there says so below
    if is_there and not is_made_by_name and in_order != _positional(ours)[: len(in_order)]:
        yield "in another order"
    for name, parameter in _parameters(theirs).items():
        if parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
            continue
        if name not in own:
            yield name
        elif parameter.default is parameter.empty:
            continue  # a default where PEFT has none is an addition
        elif _shown(parameter.default) != _shown(own[name].default) and name != "peft_type":
            yield f"{name}={_shown(parameter.default)}"


def _parameters(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    try:
        return dict(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return {}


def _positional(function: Callable[..., Any]) -> list[str]:
    """Names of the parameters that can be given by place, in order."""
    by_place = inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD
    return [name for name, each in _parameters(function).items() if each.kind in by_place]


def _shown(default: Any) -> str:
    """A default as it can be compared: of whichever package, and made anew or not."""
    if callable(default):
        return getattr(default, "__name__", type(default).__name__)
    return str(getattr(default, "value", default))


def _fields(kind: type) -> tuple[Any, ...]:
    return dataclasses.fields(kind) if dataclasses.is_dataclass(kind) else ()


def _is_config(kind: type) -> bool:
    return issubclass(kind, multigraft.PeftConfig)


def _is_enum(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, str)


def page() -> str:
    """The whole page."""
    missing, names = absent(), sorted(set(peft.__all__))
    methods = sum(reason == NO_METHOD for reason in missing.values())
    here = len(names) - len(missing)
    head = HEAD.format(version=peft.__version__, here=here, total=len(names), methods=methods)
    lines = [head, "| name | here | what is not as in PEFT |", "| --- | --- | --- |"]
    for name in names:
        if name in missing:
            lines.append(f"| `{name}` | no | {missing[name]} |")
            continue
        parts = [f"`{part}`: {reason}" for part, reason in differences(name).items()]
        lines.append(f"| `{name}` | yes | {'<br>'.join(parts)} |")
    ours = sorted(set(multigraft.__all__) - set(names) - {"__version__"})
    listed = ", ".join(f"`{name}`" for name in ours)
    return "\n".join([*lines, ONLY_HERE, f"{listed}."]) + "\n"


if __name__ == "__main__":
    if "--write" in sys.argv[1:]:
        PAGE.write_text(page(), encoding="utf-8")
    else:
        print(page())
