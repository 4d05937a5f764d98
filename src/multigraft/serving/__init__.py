"""A thousand adapters on one base: a catalogue, three places for their values, and rows by name.

    catalogue  ──> disk ──> memory of the CPU ──> slots beside the layers
    (names)       (bytes)   (bytes)               (a number)

Each place keeps what was used last and lets the rest go; the catalogue forgets nothing.
"""

from multigraft.serving.library import AdapterLibrary, Counts
from multigraft.serving.shelf import Disk, Shelf

__all__ = ["AdapterLibrary", "Counts", "Disk", "Shelf"]
