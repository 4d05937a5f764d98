"""The model card of the demo base, filled in by `train_base.py` with what the run measured."""

# ruff: noqa: E501 (the rows of a Markdown table cannot be wrapped)

from __future__ import annotations

import argparse
from collections.abc import Mapping

CARD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
---

# The Multigraft demo base

A Llama-architecture language model of {parameters:,} parameters ({bytes:,} bytes of bfloat16
weights), trained from scratch by this project so that `multigraft quickstart` works offline.
It is a demonstration: it continues Python-like text and generated tables, and it is the frozen
base on which three small adapters each learn one text transformation. It knows nothing else.

| | |
|---|---|
| architecture | {args.layers} layers, hidden {args.hidden}, feed-forward {args.feed_forward}, {args.heads} heads over {args.key_value_heads} key/value heads, untied, {args.vocabulary} tokens |
| training command | `{command}` |
| seed | {args.seed} |
| steps | {args.steps:,} of {args.batch} sequences of {args.length} tokens, AdamW, peak learning rate {args.learning_rate} |
| trained on | {hardware}, {minutes:.1f} minutes in all, PyTorch {torch}, the standard library of Python {python} |
| loss on held-out standard-library text | **{heldout:.3f}** nats per token ({bits:.3f} bits per character) |
| loss on new generated text | {new_skills:.3f} nats per token |

## Data

- The sources ({sizes[source]:,} tokens) and docstrings and help topics ({sizes[prose]:,} tokens) of
  the Python standard library, less its tests and codec tables. One file in ten is held out.
- Generated tables ({sizes[skills]:,} tokens) of dates, numbers, invented people and identifiers in
  several notations, made by `demo/base_skills.py`.

The held-out cases of the demo tasks (`multigraft.demo.tasks`) occur in neither: generated text
draws training subjects only, and library lines that mention a held-out subject were dropped.
The prompt frame of the tasks occurs nowhere, so unadapted the model does not perform them.

## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer
from multigraft.demo import model_path

tokenizer = AutoTokenizer.from_pretrained(model_path())
model = AutoModelForCausalLM.from_pretrained(model_path(), dtype="float32")
```

The standard library's text is under the Python Software Foundation License.
"""


def card(
    args: argparse.Namespace,
    facts: Mapping[str, object],
    sizes: Mapping[str, int],
    losses: Mapping[str, float],
) -> str:
    """The card of one run: its options, what it ran on, and what was measured."""
    nats = losses["heldout"] * sizes["heldout"]
    bits = nats / 0.6931471805599453 / facts["heldout_characters"]
    return CARD.format(
        args=args, sizes=sizes, bits=bits, heldout=losses["heldout"],
        new_skills=losses["new skills"], **facts,
    )  # fmt: skip
