"""The package as it is imported and laid out."""

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import pointformer
import pointformer.kernels
import pointformer.models

ROOT = Path(__file__).parents[1]


def python(code, cwd):
    return subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, check=True
    ).stdout


@pytest.mark.parametrize("cwd", [ROOT, Path("/")], ids=["checkout", "elsewhere"])
def test_top_level_folders_install_below_pointformer(cwd):
    code = (
        "import pointformer.kernels, pointformer.models; "
        "print(pointformer.kernels.__file__, pointformer.models.__file__)"
    )
    kernels, models = python(code, cwd).split()
    if "site-packages" not in kernels:
        assert Path(kernels) == ROOT / "kernels/__init__.py"
        assert Path(models) == ROOT / "models/__init__.py"


def test_import_is_light():
    code = (
        "import sys, pointformer; "
        "names = 'numba', 'triton', 'skimage', 'PIL', 'pointformer.data', 'pointformer.models'; "
        "print([name for name in names if name in sys.modules])"
    )
    assert python(code, ROOT).strip() == "[]"


@pytest.mark.parametrize("missing", ["numba", "triton"])
def test_import_and_reference_without(missing):
    """What a machine without Numba or Triton can still do."""
    code = f"""
import sys
sys.modules[{missing!r}] = None
import torch
from pointformer import TokenSet, nearest_clusters
tokens = TokenSet.from_grid(torch.rand(1, 2, 6, 6)).cluster(4, impl="reference")
n = nearest_clusters(tokens.positions, tokens.clusters, impl="reference")
print(n.cluster_index.shape[0])
"""
    assert python(code, ROOT).strip() == "36"


def test_public_names_exist_and_are_documented():
    for module in (pointformer, pointformer.models):
        for name in module.__all__:
            assert getattr(module, name).__doc__, name


def test_optional_packages_are_imported_where_they_are_used():
    """One that is missing must not keep a whole file of tests, or all of them, from being found.
    Scripts that are for such a package may need it."""
    optional = {"pycocotools", "cityscapesscripts", "faster_coco_eval", "matplotlib", "imagecodecs"}
    optional |= {"torch_cluster", "torch_scatter", "pytest_benchmark", "expecttest", "timm"}
    scripts = {*(ROOT / "bench" / "points").glob("*.py")}
    for path in {*(ROOT / "tests").rglob("*.py"), *(ROOT / "bench").rglob("*.py")} - scripts:
        for node in ast.parse(path.read_text()).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            assert not optional & {name.split(".")[0] for name in names}, (path, names)


def test_every_package_is_installed():
    """pyproject.toml lists the packages that there are, kernels and models among them."""
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = [path.parent.relative_to(ROOT) for top in ("pointformer", "kernels", "models")
               for path in (ROOT / top).rglob("__init__.py")]  # fmt: skip
    names = [".".join(folder.parts) for folder in folders]
    expected = [n if n.startswith("pointformer") else f"pointformer.{n}" for n in names]
    assert sorted(listed) == sorted(expected)
