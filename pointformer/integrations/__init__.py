"""Token sets as other libraries have them."""

from pointformer.integrations.dask import map_tiles
from pointformer.integrations.nested import from_nested, to_nested
from pointformer.integrations.pointcept import from_pointcept, to_pointcept
from pointformer.integrations.pyg import from_pyg, to_pyg

__all__ = [
    "from_nested",
    "from_pointcept",
    "from_pyg",
    "map_tiles",
    "to_nested",
    "to_pointcept",
    "to_pyg",
]
