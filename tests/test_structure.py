"""The parts lean on one another only as the map in CONTRIBUTING.md says."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PROJECT = ("point_jax", "launch", "configs", "data_prep")

# Part of point_jax -> prefixes of the modules that it may import besides its own,
# `limits`, `lock` and `storage`.
LEANS_ON = {
    "geometry": (),
    "ops": ("geometry",),
    "models": ("ops", "geometry"),
    "data": ("geometry",),
    "objectives": ("models", "ops", "geometry", "data"),
    "training": ("objectives.interface",),
    "features": ("interop", "models", "ops", "geometry", "data", "training.checkpoint"),
    "visual": (),
    "evaluation": (
        *("objectives", "training", "features", "interop"),
        *("models", "ops", "geometry", "data"),
    ),
    "measure": ("objectives", "models", "ops", "geometry", "data", "features", "training"),
    "interop": ("models", "ops", "geometry", "training.checkpoint")
    + ("objectives.settings", "objectives.sonata_spec"),
}


def project_imports(file: Path) -> Iterator[str]:
    """Dotted names of the project's own modules that a file imports, wherever it does so."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from (name for name in names if name.split(".")[0] in PROJECT)


def test_every_part_is_on_the_map():
    parts = {folder.parent.name for folder in (ROOT / "point_jax").glob("*/__init__.py")}
    assert parts == set(LEANS_ON)


@pytest.mark.parametrize("part", LEANS_ON)
def test_parts_lean_as_the_map_says(part: str):
    allowed = tuple(
        f"point_jax.{name}." for name in (part, "limits", "lock", "storage", *LEANS_ON[part])
    )
    for file in (ROOT / "point_jax" / part).rglob("*.py"):
        for name in project_imports(file):
            assert f"{name}.".startswith(allowed), f"{file.relative_to(ROOT)} imports {name}"
