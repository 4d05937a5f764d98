"""HTML by small pieces: whatever is not markup already is escaped, so a name can't become any."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable

_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""What no page may hold, and what would turn the direction of the text around a name."""


class Html(str):
    """Text that is markup."""

    __slots__ = ()


Child = str | int | float | None | Iterable["Child"]


def tag(element: str, /, *children: Child, **attributes: str | int | float | bool | None) -> Html:
    """An element.

    Args:
        children: markup as it is; everything else escaped; None is left out.
        attributes: ``class_`` is ``class``, ``aria_label`` is ``aria-label``; True stands alone,
            None and False are left out.
    """
    given = "".join(_attribute(key, value) for key, value in attributes.items())
    if element in _VOID and not children:
        return Html(f"<{element}{given}/>")  # in SVG an element ends here by its slash alone
    return Html(f"<{element}{given}>{join(children)}</{element}>")


def join(children: Iterable[Child]) -> Html:
    """Children one behind the other."""
    return Html("".join(_text(child) for child in children))


def name(text: str) -> Html:
    """A name that somebody chose, whose direction of writing stays within it."""
    return tag("bdi", text)


def clean(text: str) -> str:
    """The text without characters that no page may hold."""
    return _CONTROL.sub("\ufffd", text)


_VOID = frozenset({"meta", "link", "line", "rect", "circle", "path", "polyline"})


def _text(child: Child) -> str:
    if child is None:
        return ""
    if isinstance(child, Html):
        return str(child)
    if isinstance(child, (str, int, float)):
        return html.escape(clean(str(child)))
    return join(child)


def _attribute(key: str, value: str | int | float | bool | None) -> str:
    key = key.rstrip("_").replace("_", "-")
    if value is None or value is False:
        return ""
    return f" {key}" if value is True else f' {key}="{html.escape(clean(str(value)))}"'
