"""Ctrl-C, with a word about what was saved."""

from __future__ import annotations

EXIT_CODE = 130
"""What a shell calls the end by Ctrl-C."""


class Interrupted(Exception):
    """The user pressed Ctrl-C; the message says what is where."""
