"""Other libraries' chatter, kept off the screen: it would break the progress display."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from multigraft.errors import MultigraftWarning

TALKERS = ("bitsandbytes", "torchao", "torch.utils._pytree", "transformers", "huggingface_hub")


def hush() -> None:
    """Let only errors of other libraries through, and none of their progress bars.

    ``MULTIGRAFT_VERBOSE=1`` lets everything through.
    """
    if os.environ.get("MULTIGRAFT_VERBOSE"):
        return
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    for name in TALKERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    if "transformers" in sys.modules:  # which has read the environment by now
        from transformers.utils import logging as chatter

        chatter.disable_progress_bar()


@contextmanager
def one_line_warnings() -> Iterator[None]:
    """Show our own warnings as a line each, without the place in the code that gave them."""
    with warnings.catch_warnings():
        usual = warnings.showwarning

        def show(message: Any, category: type[Warning], *where: Any, **more: Any) -> None:
            if issubclass(category, MultigraftWarning):
                print(f"multigraft: warning: {message}", file=sys.stderr)
            else:
                usual(message, category, *where, **more)

        warnings.showwarning = show
        yield
