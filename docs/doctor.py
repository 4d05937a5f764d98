"""Print docs/doctor.md: what `multigraft doctor` says of files that are made and bent here.

python docs/doctor.py            # print it
python docs/doctor.py --write    # write docs/doctor.md
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

PAGE = Path(__file__).with_name("doctor.md")

MAKE = """\
import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from multigraft import LoraConfig, get_peft_model


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)


torch.manual_seed(0)
config = LoraConfig(r=4, target_modules=["up", "down"], init_lora_weights=False)
get_peft_model(Net(), config).save_pretrained("my-adapter")
"""

BEND = """\
weights = Path("my-adapter/adapter_model.safetensors")
tensors = load_file(weights)
named = {key.replace(".weight", ".default.weight"): value for key, value in tensors.items()}
save_file(named, weights)                                 # names as they are in memory

settings = Path("my-adapter/adapter_config.json")
values = json.loads(settings.read_text())
values["r"] = "4"                                         # a number in quotes
settings.write_text(json.dumps(values))
"""

NEST = """\
import peft
from peft.tuners.lora.layer import Linear

outer = peft.LoraConfig(r=4, target_modules=["up"], init_lora_weights=False)
inner = peft.LoraConfig(r=2, target_modules=["down"], init_lora_weights=False)
model = peft.get_peft_model(Net(), outer)
model.add_adapter("second", inner)
up = model.base_model.model.up
for matrices in (up.lora_A, up.lora_B):                   # as "all-linear" once did
    matrices["default"] = Linear(matrices["default"], "second", inner, r=2, lora_alpha=8)
model.save_pretrained("nested")
state = {key: value for key, value in model.state_dict().items() if ".up.lora_" in key}
save_file(state, "nested/adapter_model.safetensors")
print(*state, sep="\\n")
"""

TEXT = """# Examining an adapter's files

Printed by `python docs/doctor.py --write`; a test holds the page to what is printed.
`multigraft doctor ADAPTER` reads an adapter's two files (a directory, a single file of tensors, or
an id on the hub), says what is wrong with them, and exits with 0 if nothing is, with 1 if something
is, with 2 after a mistake. `--json` gives the same as data, and so does `multigraft.doctor(...)` in
Python. The base is never loaded: `--base MODEL` reads its `config.json`, builds it without memory,
and compares names and shapes just as loading would.

{make}

{bend}

{found}

## Mending

`--fix` rewrites what is safe to rewrite: names of tensors, `peft_type` where the tensors tell it,
numbers and truth values in quotes, a whole model's own tensors beside the adapter's, a pickle
(with `--allow-pickle`) as safetensors, one adapter of several (with `--adapter NAME`). What could
be meant in two ways is left: a rank that is not the config's, a misspelt key, a missing tensor.
The new files appear together or not at all. The old ones stay beside them as `.bak`; with
`--output DIR` they stay as they are.

{fixed}

## A nest

A model in which one adapter was put onto another one's matrices is saved with names that nothing
can load. `--un-nest` writes the same function as a plain adapter where there is one:

- A pair on a matrix of the adapter is folded into it: A + s b a is as large as A.
- A pair below a wrapper's base layer moves up; two on one layer are stacked, with the sum of their
  ranks.
- A pair in a trained copy (`modules_to_save`) is folded into the copy.

The scale s stands in the inner adapter's config, which is looked for beside the files and can be
named with `--nested DIR`. Where an inner adapter has DoRA's magnitudes, a bias that a matrix cannot
take, or another method, there is no plain pair that is equal: that is said, and nothing is written.
So it is for a file that holds the inner adapter alone.

In PEFT, what is inside acts only while both adapters are active. The mended adapter is equal to
that. `--drop-nested` gives the outer adapter as it was when active alone. Outputs are equal to
rounding, in evaluation: dropout inside the nest has no counterpart.

{nest}

{nested}

{mended}

## What is checked

- **missing file**, **unreadable file**, **pickle**: below.
- **method**, **values of the config**, **unknown keys** (with the nearest name), **version**
  (note).
- **another tool**: names of kohya's scripts (A1111, LyCORIS), diffusers, AdapterHub, MLX, torchtune
  and NeMo, with the way to get files that load here.
- **nested adapters**, **names of tensors**, **tensors of the base**.
- **pairs**, **ranks**, **targets**, **magnitudes and biases**: the tensors against the config.
- **non-finite values**, **dtypes**, **dead adapters** (note).
- **base model**: with `--base`, all names and shapes, and what the config means there.

## Hostile files

The doctor and `PeftModel.from_pretrained` read files through the same code. It refuses, with the
value, what is required and the remedy, and in bounded time and memory:

- pickles, unless allowed (`--allow-pickle`, `allow_pickle=True`; then with `weights_only=True`);
- safetensors whose header lies: longer than the file or than {header} MiB, more than {tensors}
  tensors, places that overlap, leave gaps or lie beyond the file, sizes that contradict shapes,
  unknown dtypes, more than {dimensions} dimensions, names twice;
- names like paths to other folders, and names that are not printable;
- configs of more than {config} MiB, of more than {depth} levels, with a key twice, or with values
  of other types than their fields;
- expressions whose matching could take for ever, such as `(a+)+b` or `.*.*.*.*x`;
- symbolic links out of the adapter's folder (the hub's cache may link to its own blobs), and what
  is no regular file;
- notes of an interrupted save that name files outside the folder.
"""


def example(code: str, scope: dict) -> str:
    """The code, and below it what it prints, if anything."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exec(code, scope)
    shown = f"\n\n```\n{out.getvalue().rstrip()}\n```" if out.getvalue() else ""
    return f"```python\n{code}```{shown}"


def command(line: str) -> str:
    """A command, and below it what it prints and its exit code."""
    from multigraft import cli

    out = io.StringIO()
    code: object = 0
    with contextlib.redirect_stdout(out):
        try:
            cli.main(shlex.split(line)[1:])
        except SystemExit as end:
            code = end.code
    return f"```\n$ {line}\n{out.getvalue().rstrip()}\n$ echo $?\n{code}\n```"


def page() -> str:
    """The whole page."""
    from multigraft import reading

    before, scope = Path.cwd(), {"__name__": "example"}
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            parts = {
                "make": example(MAKE, scope),
                "bend": example(BEND, scope),
                "found": command("multigraft doctor my-adapter"),
                "fixed": command("multigraft doctor my-adapter --fix"),
                "nest": example(NEST, scope),
                "nested": command("multigraft doctor nested"),
                "mended": command("multigraft doctor nested --un-nest"),
            }
        finally:
            os.chdir(before)
    return TEXT.format(
        **parts,
        header=reading.HEADER_BYTES >> 20,
        config=reading.CONFIG_BYTES >> 20,
        tensors=f"{reading.TENSORS:,}",
        dimensions=reading.DIMENSIONS,
        depth=reading.CONFIG_DEPTH,
    )


if __name__ == "__main__":
    if "--write" in sys.argv[1:]:
        PAGE.write_text(page(), encoding="utf-8")
    else:
        sys.stdout.write(page())
