"""Which parts of the package may know which, read off the syntax trees: imports inside of functions
and those for type checkers count too."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = {"pointformer": ROOT / "pointformer", "pointformer.kernels": ROOT / "kernels",
           "pointformer.models": ROOT / "models"}  # fmt: skip
CORE = {
    "pointformer", "pointformer._checks", "pointformer._dispatch", "pointformer._files",
    "pointformer.annotations", "pointformer.clusters", "pointformer.geometry", "pointformer.graph",
    "pointformer.nn", "pointformer.ops", "pointformer.reference", "pointformer.tokens",
}  # fmt: skip
LIGHT = "pointformer"  # its `__getattr__` fetches what `import pointformer` is not to load


def part_of(module):
    """Core, reference, kernels, models or product."""
    head = ".".join(module.split(".")[:2])
    if head in ("pointformer.kernels", "pointformer.models", "pointformer.reference"):
        return head.removeprefix("pointformer.")
    return "core" if head in CORE else "product"


def modules():
    found = {}
    for package, folder in FOLDERS.items():
        for path in folder.rglob("*.py"):
            parts = [package, *path.relative_to(folder).with_suffix("").parts]
            found[".".join(parts).removesuffix(".__init__")] = path
    return found


MODULES = modules()


def imports_of(path):
    """(module, whether it is imported in a function) of all that a file imports of the package."""
    tree = ast.parse(path.read_text())
    lazy = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for node in ast.walk(function)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            whole = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in MODULES else node.module for name in whole]
        else:
            continue
        for name in names:
            if name.split(".")[0] == "pointformer":
                yield name, id(node) in lazy


IMPORTS = {module: set(imports_of(path)) for module, path in MODULES.items()}


def test_the_files_are_found():
    parts = [part_of(module) for module in MODULES]
    assert {part: parts.count(part) > 3 for part in parts} == dict.fromkeys(
        ("core", "reference", "kernels", "models", "product"), True
    )
    assert ("pointformer.models.heads", False) in IMPORTS["pointformer.models.model"]
    assert ("pointformer.tasks", True) in IMPORTS["pointformer.cli.evaluate"]
    missing = {name for names in IMPORTS.values() for name, _ in names} - MODULES.keys()
    assert not missing


@pytest.mark.parametrize(
    ("part", "unknown"),
    [
        ("core", {"models", "product"}),
        ("reference", {"kernels", "models", "product"}),
        ("kernels", {"core", "reference", "models", "product"}),
        ("models", {"reference", "kernels", "product"}),
    ],
)
def test_imports_go_one_way(part, unknown):
    wrong = [
        (module, name)
        for module, names in IMPORTS.items()
        if part_of(module) == part and module != LIGHT
        for name, _ in names
        if part_of(name) in unknown
    ]
    assert not wrong


def test_the_package_fetches_only_what_is_asked_for():
    assert {name for name, _ in IMPORTS[LIGHT] if part_of(name) != "core"} == {
        "pointformer.segmentation.segment",
    }


def test_data_are_leaves():
    """Data know no models, and annotations know nothing of the package."""
    assert not IMPORTS["pointformer.annotations"]
    for module, names in IMPORTS.items():
        if module.startswith(("pointformer.data", "pointformer.metrics")):
            known = {".".join(name.split(".")[:2]) for name, _ in names}
            assert known <= CORE | {"pointformer.data", "pointformer.metrics"}, module


def reached(module, known):
    """All that is loaded with a module, without what functions import."""
    todo, seen = [module], set()
    while todo:
        for name, lazy in known[todo.pop()]:
            if not lazy and name not in seen and name != LIGHT:
                seen.add(name)
                todo.append(name)
    return seen


def test_nothing_is_imported_late_to_dodge_a_circle():
    circles = [
        (module, name)
        for module, names in IMPORTS.items()
        for name, lazy in names
        if lazy and module != LIGHT and module in reached(name, IMPORTS)
    ]
    assert not circles
