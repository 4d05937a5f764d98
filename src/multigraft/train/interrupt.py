"""Ctrl-C, put off for the few moments in which it would leave a thing half done."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Put Ctrl-C off to the end of the block.

    Python delivers it in the main thread alone, so elsewhere there is nothing to put off.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    pressed: list[tuple[int, Any]] = []
    before = signal.signal(signal.SIGINT, lambda *now: pressed.append(now))
    try:
        yield
    finally:
        # None: a handler that was not installed from Python; it cannot be put back.
        signal.signal(signal.SIGINT, signal.default_int_handler if before is None else before)
    if pressed and callable(before):
        before(*pressed[0])
