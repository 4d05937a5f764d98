"""``python -m multigraft`` is the command line."""

from multigraft.cli import main

if __name__ == "__main__":
    main()
