"""Geometries: one file a kind of layer. The import list is explicit and sorted."""

from multigraft.bases import attention, conv, embedding, experts, linear, megatron
from multigraft.bases.contract import GEOMETRIES, HOSTS, READERS, Geometry, Part, geometry_of
from multigraft.bases.experts import parameter_geometry
from multigraft.bases.megatron import serve_megatron

__all__ = [
    "GEOMETRIES",
    "HOSTS",
    "READERS",
    "Geometry",
    "Part",
    "attention",
    "conv",
    "embedding",
    "experts",
    "geometry_of",
    "linear",
    "megatron",
    "parameter_geometry",
    "serve_megatron",
]
