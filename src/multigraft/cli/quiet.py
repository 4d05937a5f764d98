"""Other libraries' chatter, kept off the screen: it would break the progress display."""

from __future__ import annotations

import logging
import os
import sys

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
