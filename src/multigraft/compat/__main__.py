"""``python -m multigraft.compat SCRIPT [arguments]``; also ``-m MODULE`` and ``-c CODE``."""

from __future__ import annotations

import sys

from multigraft.compat.launch import main

if __name__ == "__main__":
    main(sys.argv[1:])
