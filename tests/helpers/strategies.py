"""Hypothesis strategies of token positions: ragged, duplicated, degenerate, in 2-D and 3-D."""

from dataclasses import dataclass

import numpy as np
import torch
from hypothesis import strategies as st


@dataclass
class Tokens:
    """Positions of a packed batch, as the public functions take them."""

    positions: torch.Tensor
    sizes: tuple[int, ...]
    extent: tuple[tuple[float, ...], ...]

    @property
    def dimensions(self):
        return self.positions.shape[1]

    def samples(self):
        """The samples one by one."""
        parts = self.positions.split(self.sizes)
        return [
            Tokens(part.clone(), (size,), (extent,))
            for part, size, extent in zip(parts, self.sizes, self.extent, strict=True)
        ]


def cloud(rng, kind, size, dimensions):
    """Positions (size, D) and extent of one sample."""
    extent = rng.integers(1, 40, dimensions).astype(float)
    if kind == "row":
        extent[:] = 1.0
        extent[rng.integers(dimensions)] = 4096.0
    if kind in ("lattice", "row"):
        return np.floor(rng.random((size, dimensions)) * extent), extent
    if kind == "equal":
        return np.tile(rng.random(dimensions) * extent, (size, 1)), extent
    if kind == "duplicates":
        few = rng.random((1 + size // 5, dimensions)) * extent
        return few[rng.integers(0, len(few), size)], extent
    if kind == "blob":
        return extent * (0.5 + 0.02 * rng.random((size, dimensions))), extent
    if kind == "stray":
        positions = rng.random((size, dimensions)) * extent
        positions[: size // 20 + 1] *= 10.0 ** rng.integers(2, 15)
        return positions, extent
    if kind == "blobs":
        middles = rng.random((3, dimensions)) * 1e4
        return middles[rng.integers(0, 3, size)] + rng.normal(size=(size, dimensions)), extent
    if kind == "nested":  # a third of the points in each part of a tenth of the size
        scale = 10.0 ** -rng.geometric(0.3, (size, 1)).clip(max=30)
        return rng.normal(size=(size, dimensions)) * scale, extent
    if kind == "sheet":  # of points in space, a hilly one; in the plane a wave
        positions = rng.random((size, dimensions)) * extent
        positions[:, -1] = np.sin(positions[:, :-1].sum(1))
        return positions, extent
    if kind == "line":  # askew
        direction = rng.normal(size=dimensions)
        return rng.random((size, 1)) * direction * 50 + rng.normal(size=dimensions), extent
    if kind == "map":  # meters of a projection, where float32's steps are half a meter
        corner = np.array([771_234.0, 6_277_553.0, 120.0])[:dimensions]
        return corner + rng.random((size, dimensions)) * extent, extent
    if kind == "flat":
        extent[rng.integers(dimensions)] = 0.0
    return rng.random((size, dimensions)) * extent, extent


KINDS = ("uniform", "lattice", "row", "equal", "duplicates", "blob", "flat")
# Their extents hold no more than a part of the points.
UNEVEN = ("stray", "blobs", "nested", "sheet", "line", "map")


@st.composite
def tokens(draw, kinds=KINDS, max_size=80, max_samples=4, dimensions=(2, 3)):
    """`Tokens` of 0 to `max_samples` samples, each of any kind and 0 to `max_size` tokens."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    axes = draw(st.sampled_from(dimensions))
    size = st.integers(0, max_size)
    shapes = draw(st.lists(st.tuples(st.sampled_from(kinds), size), max_size=max_samples))
    parts = [cloud(rng, kind, size, axes) for kind, size in shapes]
    positions = np.concatenate([np.zeros((0, axes)), *(part for part, _ in parts)])
    return Tokens(
        torch.from_numpy(positions).float(),
        tuple(size for _, size in shapes),
        tuple(tuple(extent.tolist()) for _, extent in parts),
    )


def full_lattice(extent):
    """Every cell of a lattice in raster order, axis 0 fastest: (cells, D) float32."""
    axes = [torch.arange(side, dtype=torch.float32) for side in reversed(extent)]
    mesh = torch.meshgrid(*axes, indexing="ij")
    return torch.stack([axis.flatten() for axis in reversed(mesh)], 1)


def scattered(kind, count, dimensions):
    """(count, D) positions of even density ("even"), with points far away ("1e6", "1e12": one;
    "strays": one in a hundred), or in five dense "blobs".
    """
    g = torch.Generator().manual_seed(0)
    positions = torch.rand(count, dimensions, generator=g) * 100
    if kind == "strays":
        positions[torch.randperm(count, generator=g)[: count // 100]] *= 1e6
    elif kind == "blobs":
        centers = torch.rand(5, dimensions, generator=g) * 1e4
        noise = torch.randn(count, dimensions, generator=g) * 0.02
        positions = centers[torch.arange(count) % 5] + noise
    elif kind != "even":
        positions[count // 2] = float(kind)
    return positions
