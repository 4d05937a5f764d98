"""Print docs/names.md: which of PEFT's public names Multigraft has.

python docs/names.py            # print it
python docs/names.py --write    # write docs/names.md
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path

import peft
from torch import nn

import multigraft

PAGE = Path(__file__).with_name("names.md")
HEAD = """# PEFT's names

Printed by `python docs/names.py --write`; a test holds the page to what is there. Compared with
PEFT {version}. What behaves differently under one of these names is in
[coming-from-peft.md](coming-from-peft.md).
"""


def members(kind: type) -> set[str]:
    """Public names of a class that are not those of every module."""
    return {name for name in dir(kind) if not name.startswith("_")} - set(dir(nn.Module))


def listed(names: Iterable[str]) -> str:
    """Names as a line of code spans, or a word where there are none."""
    return ", ".join(f"`{name}`" for name in sorted(names)) or "none"


def tuner_members(library: str) -> set[str]:
    """Public names of what hangs at `PeftModel.base_model` for a LoRA."""
    module = peft if library == "peft" else multigraft
    config = module.LoraConfig(target_modules=["0"])
    model = module.get_peft_model(nn.Sequential(nn.Linear(2, 2)), config)
    return members(type(model.base_model))


def _config_of(tuner: str) -> str:
    return f"{tuner.removesuffix('Model')}Config"


def page() -> str:
    """The whole page."""
    theirs, ours = set(peft.__all__), set(multigraft.__all__)
    configs = {name for name in theirs if name.endswith("Config")}
    absent = theirs - ours
    tuners = {name for name in absent if name.endswith("Model") and _config_of(name) in configs}
    model = members(peft.PeftModel), members(multigraft.PeftModel)
    tuner = tuner_members("peft"), tuner_members("multigraft")
    rows = [
        ("## Here", ""),
        ("Configs", theirs & ours & configs),
        ("Other names of the package", (theirs & ours) - configs),
        ("Of `PeftModel`", model[0] & (model[1] | tuner[1])),
        ("Of `PeftModel.base_model`", tuner[0] & tuner[1]),
        ("## Not here", ""),
        ("Configs, and so methods and options", absent & configs),
        (
            "Classes of methods (`LoraModel`, …): `PeftModel.base_model` is one class for all",
            tuners,
        ),
        ("Other names of the package", absent - configs - tuners),
        ("Of `PeftModel`", model[0] - model[1] - tuner[1]),
        ("Of `PeftModel.base_model`", tuner[0] - tuner[1]),
        ("## Only here", ""),
        ("Names of the package", ours - theirs - {"__version__"}),
    ]
    lines = [HEAD.format(version=peft.__version__)]
    for title, names in rows:
        lines.append(f"{title}\n" if title.startswith("#") else f"- {title}: {listed(names)}.")
    return "\n".join(lines).replace(".\n## ", ".\n\n## ") + "\n"


if __name__ == "__main__":
    if "--write" in sys.argv[1:]:
        PAGE.write_text(page(), encoding="utf-8")
    else:
        print(page())
