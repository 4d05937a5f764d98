"""llama.cpp: one GGUF file, for ``--lora``."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from multigraft.atomic import write_utf8
from multigraft.exchange.base import named_base
from multigraft.exchange.chat import TEMPLATE, Chat, chat_of
from multigraft.exchange.contract import CONSUMERS, Adapter, Consumer, Files, Options, Outcome
from multigraft.exchange.formats.gguf import Made, prepared, require_package, write

FILE = "adapter.gguf"


class LlamaCpp(Consumer):
    """llama.cpp's rules."""

    name = "gguf"
    title = "llama.cpp"

    def prepare(self, adapter: Adapter, target: Path, options: Options, outcome: Outcome) -> Files:
        chat = chat_of([adapter.source, named_base(adapter.values, options.base)])
        files = gguf_file(adapter, target, options, outcome, chat)
        outcome.notes.append(f"llama-server -m BASE.gguf --lora {FILE}{_template_flag(chat)}")
        return {**files, **template_file(chat, target, outcome)}


def gguf_file(
    adapter: Adapter, target: Path, options: Options, outcome: Outcome, chat: Chat
) -> Files:
    """The adapter as a GGUF file, in float32, which holds every value."""
    require_package()
    base = named_base(adapter.values, options.base)
    done: list[str] = []
    made = prepared(adapter.pairs, base, str(adapter.source), done)
    outcome.done += done
    if adapter.values.get("use_rslora"):
        outcome.done.append("wrote rsLoRA's scale as `adapter.lora.alpha`")
    keys = {"tokenizer.chat_template": chat.template} if chat.template else {}
    return {target / FILE: partial(_write, made, keys)}


def template_file(chat: Chat, target: Path, outcome: Outcome) -> Files:
    """The chat template as a file of its own."""
    if not chat.template:
        outcome.notes.append("there is no chat template, so the base's own counts")
        return {}
    outcome.done.append("carried the chat template along")
    return {target / TEMPLATE: partial(write_utf8, text=chat.template)}


def _write(made: Made, keys: dict[str, str], path: Path) -> None:
    write(path, *made, keys)


def _template_flag(chat: Chat) -> str:
    return f" --jinja --chat-template-file {TEMPLATE}" if chat.template else ""


CONSUMERS.register(LlamaCpp.name, LlamaCpp())
