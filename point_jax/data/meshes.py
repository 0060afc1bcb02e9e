"""Points on the surfaces of meshes, with their colours and normals."""

from pathlib import Path
from typing import Any

import numpy as np

from point_jax.data.arrays import Arrays, ReadOptions
from point_jax.data.checks import UNITS, SceneError

SUFFIXES = (".obj", ".glb", ".gltf", ".stl", ".off")
MOST = 20_000_000  # points: one gigabyte of arrays
WHITE = (255, 255, 255)  # of parts without a colour where others have one, as in glTF


def read_mesh(path: Path, options: ReadOptions) -> Arrays:
    """Samples the surface of a mesh evenly by area.

    Every triangle of every object counts, at its place in the file's scene graph. Colours are the
    texture's (bilinear, times the material's base colour), else the vertices' (interpolated), the
    faces', or the material's; normals are the triangles', by their winding.

    Args:
        path: OBJ, GLB, glTF, STL, OFF, or PLY with faces.
        options: density or count, seed, units (for the density).

    Raises:
        SceneError: no surface, or more than `MOST` points.
    """
    import trimesh

    scene = trimesh.load_scene(str(path), process=False)
    parts = [p for p in scene.dump() if isinstance(p, trimesh.Trimesh) and len(p.faces)]
    if not parts:
        raise SceneError(f"{path}: no triangles to sample; a mesh needs faces")
    corners = [np.asarray(part.vertices[part.faces], np.float64) for part in parts]
    crosses = [np.cross(c[:, 1] - c[:, 0], c[:, 2] - c[:, 0]) for c in corners]
    areas = [np.linalg.norm(cross, axis=1) / 2 for cross in crosses]
    total = float(sum(area.sum() for area in areas))
    if not 0 < total < np.inf:
        raise SceneError(f"{path}: the triangles have an area of {total}, nothing to sample")
    square = total * UNITS[options.units or "m"] ** 2
    count = options.count or round(square * options.density)
    if not 2 <= count <= MOST:
        raise SceneError(
            f"{path}: {count} points on {square:.4g} m² of surface at {options.density:g} a m², "
            f"expected 2 to {MOST}; check units, or choose density or count "
            f"(--density, --count)"
        )
    # Every part gets its share; rounding the cumulated shares keeps the sum.
    ends = np.rint(np.cumsum([area.sum() for area in areas]) / total * count).astype(np.int64)
    shares = np.diff(ends, prepend=0)
    coord, color, normal = [], [], []
    for index, (part, share) in enumerate(zip(parts, shares, strict=True)):
        key = np.random.default_rng((options.seed, index))
        sampled: Any = trimesh.sample.sample_surface(
            part, int(share), face_weight=areas[index], return_barycentric=True, seed=key
        )
        _, face, weights = sampled
        coord.append(np.einsum("nk,nkc->nc", weights, corners[index][face]))
        cross = crosses[index][face]
        normal.append(cross / np.maximum(2 * areas[index][face], 1e-300)[:, None])
        color.append(_color(part, face, weights))
    notes = (f"{count} points sampled on {square:.4g} m² of surface",)
    return Arrays(np.concatenate(coord), _join(color, shares), np.concatenate(normal), notes=notes)


def _join(colors: list[np.ndarray | None], shares: np.ndarray) -> np.ndarray | None:
    if all(color is None for color in colors):
        return None
    filled = [
        np.broadcast_to(np.array(WHITE, np.uint8), (share, 3)) if color is None else color
        for color, share in zip(colors, shares, strict=True)
    ]
    return np.concatenate(filled)


def _color(part: Any, face: np.ndarray, weights: np.ndarray) -> np.ndarray | None:
    """Colours (n, 3) uint8 at points inside faces (n,), given barycentric weights (n, 3)."""
    from trimesh.visual.color import to_rgba, uv_to_interpolated_color

    visual, corners = part.visual, part.faces[face]

    def interpolated(values: np.ndarray) -> np.ndarray:
        return np.einsum("nk,nkc->nc", weights, np.asarray(values, np.float64)[corners])

    if visual.kind == "vertex":
        return np.rint(interpolated(visual.vertex_colors[:, :3])).astype(np.uint8)
    if visual.kind == "face":
        return visual.face_colors[face][:, :3]
    if visual.kind != "texture":
        return None
    material = visual.material
    physical = hasattr(material, "baseColorTexture")
    image = material.baseColorTexture if physical else getattr(material, "image", None)
    base = np.asarray(material.main_color, np.float64)[:3] / 255
    if image is not None and visual.uv is not None:
        color = uv_to_interpolated_color(interpolated(visual.uv), image)[:, :3]
        # Without a factor `main_color` is a default grey; an MTL's is no factor of its texture.
        factor = base if physical and material.baseColorFactor is not None else np.ones(3)
    elif "color" in getattr(visual, "vertex_attributes", {}):  # glTF with a plain material
        rgb = to_rgba(visual.vertex_attributes["color"])[:, :3]
        color, factor = np.rint(interpolated(rgb)).astype(np.uint8), base
    else:
        color, factor = np.full((len(face), 3), 255, np.uint8), base
    if not physical:  # an MTL's diffuse colour is a display colour
        return np.rint(color * factor).astype(np.uint8)
    return color if (factor == 1).all() else _darken(color, factor)


def _darken(color: np.ndarray, factor: np.ndarray) -> np.ndarray:
    """Display colours uint8 times a factor of light, as glTF defines its base colour."""
    from trimesh.visual.color import linear_to_srgb, srgb_to_linear

    light = srgb_to_linear(color.astype(np.float64) / 255) * factor
    return np.rint(np.clip(linear_to_srgb(light), 0, 1) * 255).astype(np.uint8)
