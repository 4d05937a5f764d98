"""Print docs/inspecting.md: what `inspect` and `verify` show of a model, on models made here.

python docs/inspecting.py            # print it
python docs/inspecting.py --write    # write docs/inspecting.md
"""

from __future__ import annotations

import contextlib
import io
import sys
import warnings
from pathlib import Path

PAGE = Path(__file__).with_name("inspecting.md")

OURS = """\
import torch
from torch import nn

import multigraft
from multigraft import LoraConfig, get_peft_model


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(16, 4)


torch.manual_seed(0)
model = get_peft_model(Net(), LoraConfig(r=4, target_modules=["up", "down"]), adapter_name="first")
model.add_adapter("second", LoraConfig(r=2, target_modules=["up"], modules_to_save=["head"]))
print(multigraft.inspect(model))
"""

BROKEN = """\
block = model.get_base_model().layers[1]
block.up.base_layer.weight.requires_grad_(True)    # now training "first" moves "second" too
block.down = block.down.base_layer                 # and here "first" is gone
print(multigraft.verify(model))
"""

PEFT = """\
import peft

first = peft.LoraConfig(target_modules=["up"], modules_to_save=["head"])
theirs = peft.get_peft_model(Net(), first)
theirs.add_adapter("second", peft.LoraConfig(target_modules="all-linear"))
print(multigraft.inspect(theirs))
print()
print(multigraft.verify(theirs))
"""

TEXT = """# Inspecting a model

Printed by `python docs/inspecting.py --write`; a test holds the page to what is printed. Two
functions read a model with adapters and change nothing in it: a `PeftModel`, a model that was
adapted in place, or either of them as the real PEFT ({peft}) made it. PEFT is not imported for
that; its layers are known by the names of their types.

## What hangs where

{ours}

Each line is a site, or several that differ in an index of their path alone; below it are its
adapters. On a site's own line, dtype, device and parameters are those of the base layer. On an
adapter's line, they are the adapter's, summed over the sites. `str()` gives this text, `rich.print`
and `.show()` a table with styles where rich is installed, and the attributes of the object
(`sites`, `groups`, `nested`, `parameters_of`) give the same as data.

## Whether the laws are kept

{broken}

A violation breaks a law; a note breaks nothing and is seldom meant. `is_clean` asks for violations
alone. Both are tuples of `law`, `path`, `problem` and `remedy`.

- **nested wrappers**: an adapter inside another one's wrapper.
- **nested handles**: a model that was adapted a second time as a whole.
- **uncovered sites**: a site that the config means and the adapter is not at.
- **shared module**: one module in several places, adapted in some of them only.
- **shared weight**: one weight in several modules, with an adapter at some of them only; a note for
  our adapters, which part such weights when they are merged.
- **torn ties**: embeddings that the model's config ties and that hold two weights.
- **trainable base**: a base layer under adapters that requires gradients.
- **half merged**: an adapter that is merged at some of its sites only.
- **merged and active**: an adapter that counts twice, or is shut out by one that is merged; a note
  where it is trainable while merged.
- **non-finite values**: NaN or infinity in any parameter that is not packed (quantised).
- **device or dtype**: tensors that are not where their base layer is, that hold no values yet, or
  whose dtype fits nothing beside them.
- **dead adapters** (note): additive adapters whose change is zero; new ones are so everywhere.
- **oversized adapters** (note): a change that is larger than the weight that it changes.

`verify` reads every parameter once. It is not run by itself after adding or loading an adapter:
the walk over the model alone costs about half as much as the attachment that it would check (5 ms
beside 10 ms for the second adapter at 224 sites), and that refuses nests, wrong targets and bad
tensors already.

## A nest of PEFT's

The second adapter below was asked for with `"all-linear"`, and PEFT puts it into the trained copy
of the first one's head.

{peft_model}
"""


def example(code: str, scope: dict) -> str:
    """The code, and below it what it prints."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exec(code, scope)
    return f"```python\n{code}```\n\n```\n{out.getvalue().rstrip()}\n```"


def page() -> str:
    """The whole page."""
    import peft

    scope: dict = {"__name__": "example"}
    ours, broken, theirs = (example(code, scope) for code in (OURS, BROKEN, PEFT))
    return TEXT.format(peft=peft.__version__, ours=ours, broken=broken, peft_model=theirs)


if __name__ == "__main__":
    if "--write" in sys.argv[1:]:
        PAGE.write_text(page(), encoding="utf-8")
    else:
        sys.stdout.write(page())
