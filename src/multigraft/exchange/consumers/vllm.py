"""vLLM: PEFT's folder, of which `r`, `lora_alpha`, `use_rslora` and the pairs are read.

Ranks and alphas per layer are dropped there without a word, so they are folded here.
"""

from __future__ import annotations

from pathlib import Path

from multigraft.errors import UnsupportedError
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

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What ``--max-lora-rank`` may be; without it, 16."""
USUAL_RANK = 16


class VLLM(Consumer):
    """vLLM's rules."""

    name = "vllm"
    title = "vLLM"

    def prepare(self, adapter: Adapter, target: Path, options: Options, outcome: Outcome) -> Files:
        check_matrices(adapter, self.title)
        rank = max(pair.rank for pair in adapter.pairs.values())
        if rank > RANKS[-1]:
            raise UnsupportedError(
                f"{adapter.source}: rank {rank} is above {RANKS[-1]}, the largest that vLLM takes. "
                f"Lower it (compress_adapter), or merge. {MERGE_FIRST}"
            )
        if rank > USUAL_RANK:
            allowed = next(r for r in RANKS if r >= rank)
            outcome.notes.append(
                f"start vLLM with --max-lora-rank {allowed}; without it, 16 is its largest"
            )
        names = sorted({site.rpartition(".")[2] for site in adapter.pairs})
        outer = [s for s in adapter.pairs if s.rpartition(".")[2] in ("embed_tokens", "lm_head")]
        if outer:
            outcome.notes.append(
                f"`{outer[0]}` is adapted, which vLLM serves for some architectures only, and "
                "refuses for the others"
            )
        values = {} if adapter.values.get("target_modules") else {"target_modules": names}
        return served(adapter, target, options, outcome, **values)


CONSUMERS.register(VLLM.name, VLLM())
