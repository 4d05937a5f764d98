"""Ollama: the GGUF file, and a Modelfile that names the base, the template and where answers end.

Ollama's templates are Go's, not Jinja's, and no translation is exact in general: the base's own
counts, the adapter's Jinja text stands beside it, and that is said.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from multigraft.atomic import write_utf8
from multigraft.errors import UnsupportedError
from multigraft.exchange.base import named_base
from multigraft.exchange.chat import Chat, chat_of
from multigraft.exchange.consumers.gguf import FILE, gguf_file, template_file
from multigraft.exchange.contract import CONSUMERS, Adapter, Consumer, Files, Options, Outcome

MODELFILE = "Modelfile"


class Ollama(Consumer):
    """Ollama's rules: llama.cpp's, and a Modelfile."""

    name = "ollama"
    title = "Ollama"

    def prepare(self, adapter: Adapter, target: Path, options: Options, outcome: Outcome) -> Files:
        base = named_base(adapter.values, options.base)
        chat = chat_of([adapter.source, base])
        files = gguf_file(adapter, target, options, outcome, chat)
        files |= template_file(chat, target, outcome)
        text = modelfile(base or "", chat, outcome)
        outcome.notes.append("ollama create NAME -f Modelfile, in that directory")
        return {**files, target / MODELFILE: partial(write_utf8, text=text)}


def modelfile(base: str, chat: Chat, outcome: Outcome) -> str:
    """The text of a Modelfile.

    Raises:
        UnsupportedError: a name or a token would be read as another instruction.
    """
    for text in (base, chat.eos):
        if any(mark in text for mark in ('"', "\n", "\r")):
            raise UnsupportedError(
                f"{text!r} cannot stand in a Modelfile. Rename it, or write the Modelfile by hand."
            )
    lines = [f"FROM {base}", f"ADAPTER ./{FILE}"]
    if chat.template:
        outcome.notes.append(
            "Ollama's templates are Go's, and Jinja's cannot be translated in general: the base's "
            "own is used. Compare it with chat_template.jinja, and add a TEMPLATE if they differ"
        )
    if chat.eos:
        lines.append(f'PARAMETER stop "{chat.eos}"')
        outcome.done.append(f"carried the end of an answer along, {chat.eos}")
    else:
        outcome.notes.append("no end-of-sequence token is known, so the base's own counts")
    return "\n".join([*lines, ""])


CONSUMERS.register(Ollama.name, Ollama())
