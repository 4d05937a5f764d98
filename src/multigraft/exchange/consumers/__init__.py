"""Programs that read adapters, one module each."""

from multigraft.exchange.consumers import sglang, vllm

__all__ = ["sglang", "vllm"]
