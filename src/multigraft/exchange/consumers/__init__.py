"""Programs that read adapters, one module each."""

from multigraft.exchange.consumers import gguf, ollama, sglang, vllm

__all__ = ["gguf", "ollama", "sglang", "vllm"]
