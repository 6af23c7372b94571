"""PLY, by plyfile."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np

from pointformer.data.points.columns import AXES, as_table, column_named, with_axes

_NARROWER = {"bool": np.uint8, "int64": np.int32, "float16": np.float32}


def _plyfile() -> Any:
    try:
        import plyfile
    except ImportError as error:
        raise ImportError(
            f"PLY files need {error.name}: pip install 'pointformer[points]'"
        ) from None
    return plyfile


def _content(path: Path) -> Any:
    plyfile = _plyfile()
    try:
        return plyfile.PlyData.read(path)
    except OSError:
        raise
    except Exception as error:  # of plyfile and NumPy; text in its header may be no ASCII
        raise ValueError(f"cannot be read as PLY, it may be cut off: {error}") from None


def read(path: Path) -> dict[str, np.ndarray]:
    content = _content(path)
    if "vertex" not in content:
        elements = ", ".join(element.name for element in content.elements)
        raise ValueError(f"has no element vertex, only {elements or 'nothing'}")
    rows = content["vertex"].data
    names = [name for name in rows.dtype.names or () if rows.dtype[name].kind != "O"]  # lists
    columns = with_axes({name: np.asarray(rows[name]) for name in names})
    if not set(AXES) <= set(columns):
        raise ValueError(f"has no coordinates x, y and z, only {', '.join(names[:12])}")
    return columns


def objection(name: str, suffix: str) -> str:
    plain = name.isascii() and name.split() == [name] and name.isprintable()
    return "" if plain else "names in PLY files are single words in ASCII"


def write(path: Path, columns: dict[str, np.ndarray]) -> None:
    plyfile = _plyfile()
    fitting = {}
    for name, values in columns.items():
        narrower = values.astype(_NARROWER.get(values.dtype.name, values.dtype))
        if not np.array_equal(narrower, values, equal_nan=values.dtype.kind == "f"):
            raise ValueError(f"field {name} has numbers that {narrower.dtype} does not hold")
        fitting[name] = narrower
    element = plyfile.PlyElement.describe(as_table(fitting), "vertex")
    plyfile.PlyData([element], byte_order="<").write(str(path))


def write_classes(path: Path, source: Path, codes: np.ndarray) -> None:
    content = _content(source)
    vertex = content["vertex"]
    if len(codes) != vertex.count:
        raise ValueError(f"classes: expected those of {vertex.count} points, got {len(codes)}")
    old = vertex.data
    kinds = {name: old.dtype[name] for name in old.dtype.names}
    classes = column_named("classification", kinds) or "classification"
    kinds[classes] = np.dtype(np.uint8)
    rows = np.empty(len(old), [*kinds.items()])
    for name in kinds:
        rows[name] = codes if name == classes else old[name]
    plyfile = _plyfile()
    lists = [p for p in vertex.properties if isinstance(p, plyfile.PlyListProperty)]
    element = plyfile.PlyElement.describe(
        rows,
        "vertex",
        len_types={p.name: p.len_dtype for p in lists},
        val_types={p.name: p.val_dtype for p in lists},
        comments=vertex.comments,
    )
    every = [p for part in content.elements for p in part.properties]
    if not content.text and any(isinstance(p, plyfile.PlyListProperty) for p in every):
        # Of elements with lists plyfile writes the others in the machine's order, whatever it says.
        content.byte_order = {"little": "<", "big": ">"}[sys.byteorder]
    content.elements = [element if e.name == "vertex" else e for e in content.elements]
    content.write(str(path))
