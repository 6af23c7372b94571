"""LAS and LAZ, by laspy."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from pointformer.data.points.columns import AXES, resolution_of

_CHUNK = 2_000_000  # points at once
_INDEX = "copc"  # records of cloud-optimized files with places of points within the file
_WKT, _GEO_KEYS = 2112, 34735  # records with the coordinate system
_MODEL_TYPE, _LINEAR_UNIT = 1024, 3076  # keys of GeoTIFF
_GEOGRAPHIC, _FEET = 2, range(9002, 9006)
_OWN = (  # what laspy has under such names instead of a dimension
    *("X", "Y", "Z", "points", "header", "point_format", "scales", "offsets"),
    *("bit_fields", "classification_flags"),
)
_LONGEST = 32  # name of an extra dimension, in bytes
_EXTRA = {"bool": np.dtype(np.uint8), "float16": np.dtype(np.float32)}  # dtypes that LAS has not


def _laspy() -> Any:
    try:
        import laspy
        import lazrs  # noqa: F401  (what laspy decompresses with)
    except ImportError as error:
        raise ImportError(
            f"LAS files need {error.name}: pip install 'pointformer[points]'"
        ) from None
    return laspy


def _unreadable(path: Path, error: Exception) -> ValueError:
    return ValueError(f"cannot be read as LAS or LAZ, it may be cut off: {error}")


def read(path: Path) -> dict[str, np.ndarray]:
    (columns,) = iterate(path, None)
    return columns


def iterate(path: Path, size: int | None) -> Iterator[dict[str, np.ndarray]]:
    """The columns of `size` points after the other, of all at once if `None`."""
    laspy = _laspy()
    found = 0
    try:
        with laspy.open(path) as reader:
            expected = reader.header.point_count
            for points in reader.chunk_iterator(size) if size and expected else [reader.read()]:
                found += len(points)
                columns = {axis: np.asarray(getattr(points, axis)) for axis in AXES}
                for name in reader.header.point_format.dimension_names:
                    if name not in ("X", "Y", "Z"):
                        columns[name] = np.asarray(points[name])
                yield columns
    except OSError:
        raise
    except Exception as error:  # of laspy, lazrs (a class of its own) and NumPy
        raise _unreadable(path, error) from None
    if found != expected:
        raise ValueError(f"is cut off: {found} of {expected} points are there")


def objection(name: str, suffix: str) -> str:
    if name in _OWN:
        return f"LAS files call something else {name}"
    longer = len(name.encode()) > _LONGEST
    return f"names in LAS files have at most {_LONGEST} bytes" if longer else ""


def write(path: Path, columns: dict[str, np.ndarray]) -> None:
    laspy = _laspy()
    world = np.stack([columns.pop(axis) for axis in AXES if axis in columns], 1)
    header = laspy.LasHeader(version="1.4", point_format=7 if "red" in columns else 6)
    scale = resolution_of(world)
    header.scales = np.full(3, scale)
    round_ = 1e4 * scale
    header.offsets = np.floor(world.min(0) / round_) * round_ if len(world) else np.zeros(3)
    header.generating_software = "pointformer"
    known = set(header.point_format.dimension_names)
    dtypes = {
        name: _EXTRA.get(rows.dtype.name, rows.dtype)
        for name, rows in columns.items()
        if name not in known
    }
    header.add_extra_dims([laspy.ExtraBytesParams(*named) for named in dtypes.items()])
    cloud = laspy.LasData(header)
    cloud.points = laspy.ScaleAwarePointRecord.zeros(len(world), header=header)
    for axis, values in zip(AXES, world.T, strict=True):
        setattr(cloud, axis, values)
    for name, values in columns.items():
        cloud[name] = values
        if not np.array_equal(np.asarray(cloud[name]), values, equal_nan=values.dtype.kind == "f"):
            raise ValueError(f"field {name} does not fit the dimension {name} of LAS files")
    cloud.write(path)


def coordinate_unit(path: Path) -> str:
    laspy = _laspy()
    try:
        with laspy.open(path) as reader:
            records = [*reader.header.vlrs, *(reader.evlrs or ())]
    except OSError:
        raise
    except Exception as error:
        raise _unreadable(path, error) from None
    for record in records:
        text = getattr(record, "string", "")
        if record.record_id == _WKT and isinstance(text, str) and text:
            return _unit_of_text(text)
    for record in records:
        if record.record_id == _GEO_KEYS:
            keys = {key.id: key.value_offset for key in getattr(record, "geo_keys", ())}
            if keys.get(_MODEL_TYPE) == _GEOGRAPHIC:
                return "degrees"
            return "feet" if keys.get(_LINEAR_UNIT) in _FEET else ""
    return ""


def _unit_of_text(text: str) -> str:
    """Of a coordinate system in OGC's well-known text, of the part for the ground."""
    ground = re.split(r"\b(?:VERT_CS|VERTCRS|VERTICALCRS|VCRS)\b", text, flags=re.IGNORECASE)[0]
    if not re.search(r"\b(?:PROJCS|PROJCRS|PROJECTEDCRS|LOCAL_CS|ENGCRS)\b", ground, re.IGNORECASE):
        geographic = r"\b(?:GEOGCS|GEOGCRS|GEOGRAPHICCRS)\b"
        return "degrees" if re.search(geographic, ground, re.IGNORECASE) else ""
    units = re.findall(r"UNIT\s*\[\s*\"([^\"]*)\"\s*,\s*([0-9.eE+-]+)", ground, re.IGNORECASE)
    feet = any(abs(float(size) - 0.3048) < 1e-5 for _, size in units)
    return "feet" if feet else ""


def class_limit(path: Path) -> int:
    laspy = _laspy()
    try:
        with laspy.open(path) as reader:
            return 255 if reader.header.point_format.id >= 6 else 31
    except OSError:
        raise
    except Exception as error:
        raise _unreadable(path, error) from None


def write_classes(path: Path, source: Path, codes: np.ndarray) -> None:
    laspy = _laspy()
    try:
        with laspy.open(source) as reader:
            header = reader.header
            if len(codes) != header.point_count:
                raise ValueError(
                    f"classes: expected those of {header.point_count} points, got {len(codes)}"
                )
            for record in [record for record in header.vlrs if record.user_id == _INDEX]:
                header.vlrs.remove(record)
            compressed = path.suffix.lower() == ".laz"
            with laspy.open(path, "w", header=header, do_compress=compressed) as writer:
                start = 0
                for points in reader.chunk_iterator(_CHUNK):
                    points.classification = codes[start : start + len(points)]
                    writer.write_points(points)
                    start += len(points)
                if start != len(codes):
                    raise ValueError(f"is cut off: {start} of {len(codes)} points are there")
                if header.version.minor >= 4 and reader.evlrs:
                    kept = [record for record in reader.evlrs if record.user_id != _INDEX]
                    writer.write_evlrs(type(reader.evlrs)(kept))
    except (OSError, TypeError, ValueError):
        raise
    except Exception as error:
        raise _unreadable(source, error) from None
