"""Space-filling curves."""

import pytest
import torch

from helpers.strategies import full_lattice
from pointformer.geometry import hilbert_code, morton_code, peano_code, snake_code
from pointformer.geometry.curves import curve_code
from pointformer.kernels.clustering import fused_curve_code


def walk_of(code, cells):
    return cells[torch.argsort(code)]


@pytest.mark.parametrize("extent", [(16, 16), (8, 8, 8), (2, 2), (4, 4, 4), (1, 1)])
def test_hilbert_is_a_walk_through_neighbors(extent):
    cells = full_lattice(extent).long()
    code = hilbert_code(cells)
    assert sorted(code.tolist()) == list(range(len(cells)))
    walk = walk_of(code, cells)
    assert walk[0].eq(0).all()
    assert walk.diff(dim=0).abs().sum(1).eq(1).all()


@pytest.mark.parametrize("extent", [(27, 27), (9, 9, 9), (3, 3), (3, 3, 3), (1, 1)])
def test_peano_is_a_walk_through_neighbors(extent):
    cells = full_lattice(extent).long()
    code = peano_code(cells)
    assert sorted(code.tolist()) == list(range(len(cells)))
    walk = walk_of(code, cells)
    assert walk[0].eq(0).all()
    assert walk.diff(dim=0).abs().sum(1).eq(1).all()
    assert walk[-1].eq(cells.amax(0)).all()


def test_peano_runs_along_x_first():
    walk = walk_of(peano_code(full_lattice((3, 3)).long()), full_lattice((3, 3)))
    assert walk.tolist() == [[0, 0], [1, 0], [2, 0], [2, 1], [1, 1], [0, 1], [0, 2], [1, 2], [2, 2]]


@pytest.mark.parametrize(("dimensions", "digits"), [(2, 19), (3, 13)])
def test_peano_does_not_depend_on_the_number_of_digits(dimensions, digits):
    cells = torch.randint(0, 32, (200, dimensions), generator=torch.Generator().manual_seed(1))
    for bits in (6, 7, 12):
        assert torch.equal(peano_code(cells, bits), peano_code(cells))
    last = torch.full((1, dimensions), 3**digits - 1)  # every digit is the last one of its curve
    assert peano_code(last, 31).tolist() == [3 ** (digits * dimensions) - 1]


@pytest.mark.parametrize("extent", [(5, 4), (1, 7), (3, 4, 5), (2, 1, 3), (4, 3, 1)])
def test_snake_is_a_walk_through_neighbors(extent):
    cells = full_lattice(extent).long()
    code = snake_code(cells, torch.tensor(extent))
    assert sorted(code.tolist()) == list(range(len(cells)))
    assert walk_of(code, cells).diff(dim=0).abs().sum(1).eq(1).all()


def test_snake_runs_along_x_first():
    cells = full_lattice((3, 2)).long()
    assert snake_code(cells, torch.tensor([3, 2])).tolist() == [0, 1, 2, 5, 4, 3]


def test_morton_interleaves_bits():
    cells = torch.tensor([[0b101, 0b011]])
    assert morton_code(cells).tolist() == [0b011011]
    cells = torch.tensor([[0b10, 0b01, 0b11]])
    assert morton_code(cells).tolist() == [0b101110]
    largest = 2**21 - 1
    assert morton_code(torch.tensor([[largest] * 3])).tolist() == [2**63 - 1]


@pytest.mark.parametrize("dimensions", [2, 3])
def test_hilbert_does_not_depend_on_the_number_of_bits(dimensions):
    cells = torch.randint(0, 32, (200, dimensions), generator=torch.Generator().manual_seed(1))
    codes = [hilbert_code(cells, bits) for bits in (5, 6, 7, 12, 21)]
    for code in codes[1:]:
        assert torch.equal(code, codes[0])


@pytest.mark.parametrize("dimensions", [2, 3])
@pytest.mark.parametrize("curve", ["hilbert", "morton", "peano", "snake"])
def test_fused_codes_equal_torch(curve, dimensions):
    generator = torch.Generator().manual_seed(2)
    shape = torch.randint(1, 2**20, (5000, dimensions), generator=generator)
    cells = (torch.rand(5000, dimensions, generator=generator) * shape).long()
    cells = cells.minimum(shape - 1)
    expected = curve_code(curve, cells, shape, 20)
    assert torch.equal(fused_curve_code(curve, cells, shape, 20, "cpu"), expected)
    torch.library.opcheck(fused_curve_code, (curve, cells[:50], shape[:50], 20, "cpu"))


def test_wrong_cells_are_named():
    with pytest.raises(ValueError, match=r"cells: expected int64 .* got a float32 tensor"):
        hilbert_code(torch.zeros(3, 2))


@pytest.mark.parametrize("dimensions", [2, 3])
@pytest.mark.parametrize("bits", [3, 5, 8, 20])
def test_peano_has_digits_for_all_cells_of_so_many_bits(bits, dimensions):
    last = min(2**bits, 3 ** (39 // dimensions)) - 1
    cells = torch.tensor([[last] * dimensions, [last, *[0] * (dimensions - 1)]])
    assert torch.equal(peano_code(cells, bits), peano_code(cells))
    found = fused_curve_code("peano", cells, cells[:1] + 1, bits, "cpu")
    assert torch.equal(found, peano_code(cells))
