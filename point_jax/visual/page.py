"""One HTML file that shows point clouds: it turns, zooms and picks points without a network.

Everything is inside the file: a small WebGL 2 renderer (the files of `web/`), and all arrays as
one gzip in base64. A content security policy in the page forbids it to load anything.
"""

import base64
import gzip
import html
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from point_jax.visual.classes import KeyEntry, share_text
from point_jax.visual.codes import CosineCodes
from point_jax.visual.layout import places_in_rows, thin
from point_jax.visual.pack import Blob, nearest_shown, pack_color, pack_coord
from point_jax.visual.render import best_azimuth
from point_jax.visual.similarity import RAMP, SHARES_ABOVE

LIMIT = 500_000  # points of a page; more make it slow to open and to turn
SIMILARITY = "similarity"
SCRIPTS = ("unpack.js", "camera.js", "draw.js", "colors.js", "overlay.js", "page.js")
ELEVATION = 42.0  # degrees, of the first view
CUT = 0.88  # share of a room's height shown at first: without its ceiling
ROOM = 1.5  # metres; flatter clouds are shown whole
STRAY = 0.002  # share of the points at each end of an axis that the first view need not hold


@dataclass(frozen=True)
class PageCloud:
    """A cloud of a page.

    Attributes:
        name: what the page calls it.
        coord: (n, 3) metres, z up, finite, n >= 1.
        colorings: name -> (n, 3), uint8 in 0-255 or float in [0, 1].
        normal: (n, 3) unit, facing free space; surfaces seen from behind can then be hidden.
        label: (n,) class of each point, -1 for none.
        owner: (n,) row of the page's similarity codes that each point has; None: point i has row i.
        caption: lines drawn above the cloud where there are several; the name by default.
        origin: (3,) metres, added to the coordinates that the page tells.
    """

    name: str
    coord: ArrayLike
    colorings: Mapping[str, ArrayLike]
    normal: ArrayLike | None = None
    label: ArrayLike | None = None
    owner: ArrayLike | None = None
    caption: str = ""
    origin: ArrayLike = (0.0, 0.0, 0.0)


@dataclass(frozen=True)
class PageMatch:
    """Matches between the two clouds of a page.

    Attributes:
        target: for both clouds: (n,) the point of the other cloud that each point is matched to.
        score: for both clouds: (n,) its cosine.
        mutual: for both clouds: (n,) bool.
        lines: (k, 2) points of the first and second cloud to be joined by lines.
        line_colors: (k, 3) uint8.
        known: (n,) bool, points of the first cloud with a true counterpart; None: truth unknown.
        correct: (n,) bool, those that are matched rightly; needed with `known`.
        within: metres within which a match is right.
    """

    target: tuple[NDArray[np.integer], NDArray[np.integer]]
    score: tuple[NDArray[np.floating], NDArray[np.floating]]
    mutual: tuple[NDArray[np.bool_], NDArray[np.bool_]]
    lines: ArrayLike = ()
    line_colors: ArrayLike = ()
    known: NDArray[np.bool_] | None = None
    correct: NDArray[np.bool_] | None = None
    within: float = 0.0


def write_page(
    path: str | Path,
    clouds: Sequence[PageCloud],
    *,
    title: str,
    note: str = "",
    mode: str = "pca",
    coloring: str = "",
    classes: Sequence[str] | None = None,
    keys: Mapping[str, Sequence[KeyEntry]] | None = None,
    similarity: CosineCodes | None = None,
    match: PageMatch | None = None,
    picked: tuple[int, int] | None = None,
    columns: int | None = None,
    hide_backs: bool = True,
    limit: int = LIMIT,
) -> Path:
    """Writes a page.

    Args:
        path: file to write; its folder is made.
        clouds: what to show, side by side where there are several.
        title: heading.
        note: text below it; lines are kept.
        mode: "similarity": a picked point always recolours the page; "match": the two clouds have
            `match`; anything else just shows the clouds.
        coloring: name of the one to show first; by default the first of the first cloud.
        classes: names of the labels.
        keys: colouring -> what its colours mean, listed while it is shown.
        similarity: codes of the clouds' features. With them the page can colour by the similarity
            to a picked point.
        match: matches between the two clouds.
        picked: (cloud, point) picked when the page opens.
        columns: clouds in a row; see `places_in_rows`.
        hide_backs: at first hide surfaces seen from behind, of clouds with normals.
        limit: points of all clouds together. More are thinned to the first point in each cube of
            one size, the smallest that meets the limit, and the page says so. Points with lines,
            and the picked one, always stay.

    Returns:
        The path.

    Raises:
        ValueError: an array has a wrong shape, or the parts do not fit together.
    """
    if not clouds:
        raise ValueError("a page needs at least one cloud, got none")
    if match is not None and len(clouds) != 2:
        raise ValueError(f"a page of matches has two clouds, got {len(clouds)}")
    coords = [_checked(cloud) for cloud in clouds]
    needed: list[list[int]] = [[] for _ in clouds]
    if picked is not None:
        needed[picked[0]].append(picked[1])
    if match is not None:
        ends = np.asarray(match.lines, np.int64).reshape(-1, 2)
        needed[0] += ends[:, 0].tolist()
        needed[1] += ends[:, 1].tolist()
    kept, cell = thin(coords, limit, needed)
    shown = [coord[k] for coord, k in zip(coords, kept, strict=True)]
    azimuth = best_azimuth(shown[0], _rows(clouds[0].normal, kept[0]), ELEVATION)
    boxes = [np.quantile(coord, [STRAY, 1 - STRAY], axis=0).astype(float) for coord in shown]
    blob, heads = Blob(), []
    for i, shift in enumerate(places_in_rows(boxes, azimuth, columns)):
        heads.append(pack_coord(shown[i], boxes[i], shift, blob))
        heads[i] |= _pack_cloud(clouds[i], coords[i], kept[i], heads[i], blob)
        if similarity is not None:
            owner = kept[i] if clouds[i].owner is None else np.asarray(clouds[i].owner)[kept[i]]
            used, owner = np.unique(owner, return_inverse=True)
            heads[i]["arrays"]["codes"] = blob.add(similarity.codes[i][used])
            heads[i]["arrays"]["owner"] = blob.add(owner.astype(np.uint32))
    names = list(dict.fromkeys(name for cloud in clouds for name in cloud.colorings))
    names += [SIMILARITY] if similarity is not None else []
    if (coloring or names[0]) not in names:
        raise ValueError(f"no colouring {coloring!r}; there are {names}")
    tall = all(box[1, 2] - box[0, 2] > ROOM for box in boxes)
    corners = [corner for head in heads for corner in _corners(head)]
    head = {
        "title": title,
        "note": note,
        "mode": mode,
        "classes": None if classes is None else list(classes),
        "keys": {
            name: [[entry.name, entry.color, share_text(entry.share)] for entry in key]
            for name, key in (keys or {}).items()
        },
        "clouds": heads,
        "colorings": names,
        "coloring": coloring or names[0],
        "codes": None if similarity is None else _codes(similarity),
        "ramp": RAMP,
        "shares": SHARES_ABOVE,
        "lines": None if match is None else _pack_match(match, coords, kept, heads, blob),
        "within": match.within if match is not None and match.known is not None else None,
        "picked": picked and [picked[0], int(np.searchsorted(kept[picked[0]], picked[1]))],
        "radius": max(float(np.linalg.norm(corners, axis=1).max()), 0.05),
        "view": {
            "azimuth": float(np.deg2rad(azimuth)),
            "elevation": float(np.deg2rad(ELEVATION)),
            "cut": CUT if tall else 1.0,
            "backs": hide_backs and any(cloud.normal is not None for cloud in clouds),
        },
        "facts": _facts(heads, cell, limit),
    }
    out = Path(path)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(_fill(title, head, bytes(blob.data)), encoding="utf-8")
    return out


def _checked(cloud: PageCloud) -> NDArray[np.float32]:
    coord = np.asarray(cloud.coord, np.float32)
    if coord.ndim != 2 or coord.shape[1] != 3 or len(coord) == 0:
        raise ValueError(f"{cloud.name}: coord must be (n, 3) with n >= 1, got {coord.shape}")
    if not np.isfinite(coord).all():
        raise ValueError(f"{cloud.name}: coord has values that are NaN or infinite")
    if not cloud.colorings:
        raise ValueError(f"{cloud.name}: at least one colouring is needed")
    for name, array in {**cloud.colorings, "normal": cloud.normal, "label": cloud.label}.items():
        if array is not None and len(np.asarray(array)) != len(coord):
            raise ValueError(
                f"{cloud.name}: {name!r} has {len(np.asarray(array))} rows for {len(coord)} points"
            )
    return coord


def _rows(array: ArrayLike | None, kept: NDArray[np.int64]) -> NDArray | None:
    return None if array is None else np.asarray(array)[kept]


def _pack_cloud(
    cloud: PageCloud,
    coord: NDArray[np.float32],
    kept: NDArray[np.int64],
    head: dict[str, Any],
    blob: Blob,
) -> dict[str, Any]:
    """Everything of a cloud beside its coordinates; `head` is what these gave."""
    arrays = head["arrays"]
    if len(kept) < len(coord):
        arrays["index"] = blob.add(np.diff(kept, prepend=0).astype(np.uint32))
    if cloud.normal is not None:
        normal = np.clip(np.rint(np.asarray(cloud.normal)[kept] * 127), -127, 127)
        arrays["normal"] = blob.add(normal.astype(np.int8))
    if cloud.label is not None:
        arrays["label"] = blob.add(np.asarray(cloud.label)[kept].astype(np.int32))
    return {
        "name": cloud.name,
        "caption": cloud.caption or cloud.name,
        "total": len(coord),
        "low": (np.asarray(head["low"]) + np.asarray(cloud.origin, np.float64)).tolist(),
        "colorings": {
            name: pack_color(color, kept, blob) for name, color in cloud.colorings.items()
        },
    }


def _pack_match(
    match: PageMatch,
    coords: Sequence[NDArray],
    kept: Sequence[NDArray[np.int64]],
    heads: Sequence[dict[str, Any]],
    blob: Blob,
) -> dict[str, Any]:
    for here, there in ((0, 1), (1, 0)):
        k, arrays = kept[here], heads[here]["arrays"]
        target = np.asarray(match.target[here], np.int64)[k]
        state = np.asarray(match.mutual[here])[k].astype(np.uint8)  # bit 0; 1: known; 2: correct
        if here == 0 and match.known is not None and match.correct is not None:
            state |= (match.known[k].astype(np.uint8) << 1) | (match.correct[k] << 2).astype("u1")
        arrays["match"] = blob.add(nearest_shown(target, coords[there], kept[there]))
        arrays["match_number"] = blob.add(target.astype(np.int32))
        score = np.rint(np.asarray(match.score[here])[k] * 32767).astype(np.int16)
        arrays["match_score"] = blob.add(score)
        arrays["match_state"] = blob.add(state)
    ends = np.asarray(match.lines, np.int64).reshape(-1, 2)
    pairs = [np.searchsorted(k, side).tolist() for k, side in zip(kept, ends.T, strict=True)]
    return {
        "pairs": list(zip(*pairs, strict=True)),
        "colors": np.asarray(match.line_colors, np.int64).reshape(-1, 3).tolist(),
    }


def _codes(codes: CosineCodes) -> dict[str, Any]:
    width = len(codes.scale)
    return {
        "width": width,
        "offset": codes.offset.tolist(),
        "scale": codes.scale.tolist(),
        "note": (
            f"Cosines computed in the page from {width} bytes a feature: 95 % of those sampled are "
            f"off by less than {_figure(codes.error)}, all by less than {_figure(codes.worst)}."
        ),
    }


def _figure(value: float) -> str:
    """One significant digit, rounded up: a bound stays a bound."""
    if value <= 1e-6:
        return "0.000001"
    digit = 10.0 ** np.floor(np.log10(value))
    return f"{np.ceil(value / digit - 1e-9) * digit:.6f}".rstrip("0")


def _corners(head: dict[str, Any]) -> NDArray[np.float64]:
    """(2, 3) lowest and highest place of a cloud on the page, without strays."""
    inside = np.asarray(head["inside"])
    return inside * np.asarray(head["step"]) + np.asarray(head["place"])


def _facts(heads: Sequence[dict[str, Any]], cell: float, limit: int) -> str:
    count, total = (sum(head[key] for head in heads) for key in ("count", "total"))
    rounding = 1000 * max(max(head["step"]) for head in heads) / 2
    points = f"All {total:,} points are on this page."
    if count < total:
        points = (
            f"Thinned: {count:,} of {total:,} points are on this page, the first in each cube of "
            f"{100 * cell:.2g} cm, because a page holds about {limit:,}."
        )
    return f"{points} Coordinates are rounded by up to {_figure(rounding)} mm."


def _fill(title: str, head: dict[str, Any], data: bytes) -> str:
    """The template with its placeholders filled; the same input gives the same bytes."""
    web = resources.files("point_jax.visual") / "web"
    text = json.dumps(head, ensure_ascii=False, allow_nan=False).replace("<", "\\u003c")
    packed = gzip.compress(data, compresslevel=6, mtime=0)
    filling = {
        "title": html.escape(title),
        "style": (web / "style.css").read_text(encoding="utf-8"),
        "script": "\n".join((web / name).read_text(encoding="utf-8") for name in SCRIPTS),
        "head": text,
        "data": base64.b64encode(packed).decode(),
    }
    pieces = (web / "page.html").read_text(encoding="utf-8").split("{{")
    out = [pieces[0]]
    for piece in pieces[1:]:
        name, rest = piece.split("}}", 1)
        out += [filling[name], rest]
    return "".join(out)
