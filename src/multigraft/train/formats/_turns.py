"""Turns of a conversation, under the names and roles that data sets give them."""

from __future__ import annotations

from typing import Any

from multigraft.errors import did_you_mean
from multigraft.train.records import Refusal

ROLES = ("system", "user", "assistant", "tool")
ALIASES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bard": "assistant",
    "bing": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "observation": "tool",
    "function_response": "tool",
    "function_call": "assistant",
}


def turns(value: Any, key: str) -> tuple[dict[str, str], ...]:
    """Turns as ``role`` and ``content``, of a list whose turns may say ``from`` and ``value``.

    Args:
        key: where the list stood, for messages.

    Raises:
        Refusal: a turn has no text or an unknown role, or there is nothing to learn.
    """
    if not isinstance(value, list) or not value:
        raise Refusal(f"`{key}` is not a list of turns", "Give a list of {role, content} objects")
    found = tuple(_turn(turn, f"turn {n} of `{key}`") for n, turn in enumerate(value, start=1))
    if not any(turn["role"] == "assistant" and turn["content"].strip() for turn in found):
        raise Refusal("no assistant turn with text, so there is nothing to learn", "Drop the line")
    return found


def _turn(turn: Any, where: str) -> dict[str, str]:
    fields = turn if isinstance(turn, dict) else {}
    name = "value" if "value" in fields and "content" not in fields else "content"
    text = _text(fields.get(name))
    if text is None:
        why = f"{where} has no text in `{name}`"
        raise Refusal(why, 'Write {"role": …, "content": "…"}; only text can be trained on')
    given = fields.get("role", fields.get("from"))
    role = ALIASES.get(given, given) if isinstance(given, str) else given
    if role not in ROLES:
        hint = did_you_mean(str(given), (*ROLES, *ALIASES)).rstrip(".")
        remedy = f"Roles are {', '.join(ROLES)}.{hint}".rstrip(".")
        raise Refusal(f"{where} has the `role` {given!r}", remedy)
    return {"role": str(role), "content": text}


def _text(content: Any) -> str | None:
    """A string as it stands, the texts of a list of text parts joined, None for anything else."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not content:
        return None
    parts = [
        part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None
        for part in content
    ]
    return "".join(map(str, parts)) if all(isinstance(part, str) for part in parts) else None
