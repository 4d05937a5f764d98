"""Geometries: one file a kind of layer. The import list is explicit and sorted."""

from multigraft.bases import conv, embedding, linear
from multigraft.bases.contract import GEOMETRIES, Geometry, geometry_of

__all__ = ["GEOMETRIES", "Geometry", "conv", "embedding", "geometry_of", "linear"]
