"""Print docs/seeing.md: dry runs, differences and reports, on models and adapters made here.

python docs/seeing.py            # print it
python docs/seeing.py --write    # write docs/seeing.md
"""

from __future__ import annotations

import contextlib
import io
import os
import shlex
import sys
import tempfile
import warnings
from pathlib import Path

PAGE = Path(__file__).with_name("seeing.md")

PLAN = """\
from multigraft import LoraConfig, targets
from multigraft.demo import model_path
from multigraft.train import load_skeleton

base = load_skeleton(model_path())  # modules and shapes, no weights
config = LoraConfig(
    r=8,
    target_modules=["q_proj", "v_proj", "down_proj"],
    exclude_modules=["3.mlp.down_proj"],
    rank_pattern={"v_proj": 4},
    modules_to_save=["lm_head"],
)
print(targets(base, config))
"""

TYPO = "multigraft targets base --target q_prj,v_proj"

ADAPTERS = """\
import torch

from multigraft import LoraConfig, get_peft_model
from multigraft.train import load_base

model = get_peft_model(load_base("base"), LoraConfig(r=2, target_modules=["q_proj"]))
with torch.no_grad():
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.fill_(1 / 64)
model.save_pretrained("one")
with torch.no_grad():
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            parameter.mul_(4)
        if "lora_B" in name:
            parameter.div_(4)
        if "layers.3" in name and "lora_B" in name:
            parameter.mul_(2)
model.save_pretrained("two")
"""

DIFF = "multigraft diff one two"
INSPECT = "multigraft inspect one two --base base"
VERIFY = "multigraft verify one --base base"
REPORT = "multigraft report one two --base base -o report.html"

TEXT = """# Seeing what a config means, how adapters differ, and where they act

Printed by `python docs/seeing.py --write`; a test holds the page to what is printed. In the
examples `base` is a directory with a base model, here the small one of `multigraft.demo`; an id on
the hub does as well. [inspecting.md](inspecting.md) is about models in memory.

## Before training: a dry run

{plan}

Every module gets the reason for what is decided on it: the name or expression that matches, the
exception that leaves it out, the layer that was not chosen, a kind that the method cannot adapt, or
the copy that `modules_to_save` trains in its place. The decisions are those of attaching, by the
same code, and so are the counts. Nothing is attached, and only `config.json` is read: a Llama of 70
billion parameters takes 4 seconds and 0.4 GB. The object has the same as data (`chosen`, `modules`,
`problems`, `parameters`, `to_dict()`).

On the command line, a name that means nothing is shown beside what it may have meant, and the exit
code is 1:

{typo}

`--exclude`, `--layers 0-3,7`, `--rank`, `--rank-pattern down_proj=4`, `--save-module`,
`--parameter` and `--method` stand for the config's fields, `--set FIELD=VALUE` for any other, and
`--config DIR` takes an adapter's own. `--json` prints every module.

## Two adapters beside each other

{adapters}

{diff}

`diff` compares the configs, the tensors bit by bit, and what they change, ΔW at each site: here all
eight tensors differ, and yet at three of four sites both adapters do the same. A line that stands
for several shows the largest of their distances, the smallest cosine, and norms over all of them;
`--json` has each by itself. The distances are computed from the factors. Methods whose change
depends on the base's weights (DoRA, IA3, LoHa, …) are compared with `--base`. The exit code is that
of `diff`: 0 when both are the same to the bit, 1 when they differ, 2 after a mistake. In Python:
`multigraft.diff("one", "two")`.

## Adapters on disk, side by side

{inspect}

{verify}

`inspect` reads the base's config alone; `verify` loads its weights, and exits with 1 when a law is
broken. Without `--base`, both take the base that the adapters name.

## A page to look at

{report}

One HTML file that fetches nothing and needs no other file. On it are

- a **heat map** of ‖ΔW‖ by layer and module, beside ‖W‖ where the base is given;
- the **singular values** of ΔW over all sites and at each, and the effective rank: how many
  directions are in use, exp of the entropy of the singular values;
- the **similarity** of each two adapters: how far the directions that they write to and read from
  overlap, what chance would give, and the cosine of their changes;
- **intruder dimensions** (arXiv:2410.21228), with a base: strong directions of W + ΔW that are like
  none of W's. They need the singular vectors of the whole weight, so weights whose smaller side is
  over 1,024 are left out unless `--intruder-limit` is higher;
- the **size and rank** of each kind of module, and how much of the rank is in use;
- the **loss in training**, from `train_log.jsonl` beside the adapter, which `multigraft train`
  writes step by step, or from the `trainer_state.json` of transformers' `Trainer`.

Everything that a chart shows is in a table as well. Heat maps have one stop of the Tab key each,
the arrow keys move within, Enter goes to the site's row; columns sort. Light or dark follows the
system. Names in the page come from files, so they are escaped, and the page's own policy lets no
script run but the one in it. Spectra and overlaps are computed from the factors; changes that have
none, and whose smaller side is over 2,048, have a norm alone.

In Python, `multigraft.report.collect` gives the same figures as data, and `write_report` the page.
"""


def python(code: str, scope: dict) -> str:
    """The code, and below it what it prints."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exec(code, scope)
    shown = out.getvalue().rstrip()
    return f"```python\n{code}```" + (f"\n\n```\n{shown}\n```" if shown else "")


def shell(command: str) -> str:
    """A command, and below it what it prints."""
    from multigraft import cli

    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        cli.main(shlex.split(command)[1:])
    shown = "\n".join(line.rstrip() for line in out.getvalue().splitlines())
    return f"```\n$ {command}\n{shown}\n```"


def page() -> str:
    """The whole page."""
    from multigraft.demo import model_path

    scope: dict = {"__name__": "example"}
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            Path("base").symlink_to(model_path())
            return TEXT.format(
                plan=python(PLAN, scope),
                typo=shell(TYPO),
                adapters=python(ADAPTERS, scope),
                diff=shell(DIFF),
                inspect=shell(INSPECT),
                verify=shell(VERIFY),
                report=shell(REPORT),
            )
        finally:
            os.chdir(before)


if __name__ == "__main__":
    if "--write" in sys.argv[1:]:
        PAGE.write_text(page(), encoding="utf-8")
    else:
        sys.stdout.write(page())
