"""Folders of the package are layers: a module imports its own folder and those below it."""

import ast
from importlib.util import resolve_name
from pathlib import Path

import flash_jax

ROOT = Path(flash_jax.__file__).parent
# From top to bottom. What lies in no folder stands beside _cli, and may import anything.
LAYERS = [
    *("_cli", "_frameworks", "_api", "_sparse", "_formats", "_passes"),
    *("_masks", "_checks", "_machine", "_tiles", "_version"),
]


def layer(name):
    place = [*name.split("."), ""][1]
    return LAYERS.index(place) if place in LAYERS else 0


def imports(file, package):
    """Full names of what a file imports, inside functions too."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (x.name for x in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = resolve_name("." * node.level + (node.module or ""), package)
            yield from (f"{base}.{x.name}" for x in node.names)


def test_imports_go_down_only():
    up = []
    for file in ROOT.rglob("*.py"):
        parts = file.relative_to(ROOT.parent).with_suffix("").parts
        module, package = ".".join(parts), ".".join(parts[:-1])
        names = (x for x in imports(file, package) if x.split(".")[0] == "flash_jax")
        up += [f"{module} imports {x}" for x in names if layer(x) < layer(module)]
    assert not up, "\n".join(sorted(up))
