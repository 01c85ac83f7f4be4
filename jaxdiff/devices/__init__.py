"""Devices and processes, as training and sampling share them: meshes, placement, rows, one run."""

from jaxdiff.devices import distributed
from jaxdiff.devices.map_rows import map_rows, shared_place
from jaxdiff.devices.placement import make_mesh, place, place_batch

__all__ = ["distributed", "make_mesh", "map_rows", "place", "place_batch", "shared_place"]
