"""SGLang: PEFT's folder with `r`, `lora_alpha` and a list of `target_modules`.

Neither rsLoRA nor patterns enter its scale. An ``added_tokens.json`` beside the adapter counts as
an enlarged vocabulary there, so it stays behind; the tokeniser's own file has those tokens.
"""

from __future__ import annotations

from pathlib import Path

from multigraft.errors import UnsupportedError, listed
from multigraft.exchange.consumers._served import check_matrices, served
from multigraft.exchange.contract import (
    CONSUMERS,
    MERGE_FIRST,
    Adapter,
    Consumer,
    Files,
    Options,
    Outcome,
)


class SGLang(Consumer):
    """SGLang's rules."""

    name = "sglang"
    title = "SGLang"

    def prepare(self, adapter: Adapter, target: Path, options: Options, outcome: Outcome) -> Files:
        check_matrices(adapter, self.title)
        lookups = [site for site, pair in adapter.pairs.items() if pair.is_lookup]
        if lookups:
            raise UnsupportedError(
                f"{adapter.source}: {listed(lookups, 4)} is an embedding, which not every version "
                f"of SGLang adapts. {MERGE_FIRST}"
            )
        names = sorted({site.rpartition(".")[2] for site in adapter.pairs})
        if adapter.values.get("target_modules") != names:
            outcome.done.append("named the layers' last parts in `target_modules`")
        return served(adapter, target, options, outcome, target_modules=names)


CONSUMERS.register(SGLang.name, SGLang())
