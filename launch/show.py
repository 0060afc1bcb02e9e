"""Shows what the features of point clouds know: as a picture, coloured PLY files and a page.

    python -m launch.show pca --checkpoint=DIR --input=scan.ply --output=DIR
    python -m launch.show similarity --checkpoint=DIR --input=scan.ply --at=1.2,0.4,0.8 --output=DIR
    python -m launch.show match --checkpoint=DIR --input=a.ply --input=b.ply --output=DIR
    python -m launch.show retrieve --checkpoint=DIR --input=scans --query=scans/office --output=DIR

For all:
  --input=PATH       a cloud or a folder of clouds; again for more
  --output=DIR       gets NAME.png, NAME.ply (one a cloud) and NAME.html, NAME being the command
  --checkpoint=DIR   a converted checkpoint or a run's folder. Without it the inputs are NPZ files
                     with coord and features, as launch.infer writes them
  --up_cast=2        levels that the coarsest features are carried up and joined
  --units, --up      of files that do not say: m, cm or mm; z, y, ...
  --wo_color, --wo_normal   leave colours or normals out
  --classes=FILE     names of the class ids: a dataset.json, or text with a name a line; not needed
                     for scene folders whose dataset.json has them
  --limit=500000     points of a page; more are thinned, and the page says so

pca:
  --brightness=1.2   factor before clipping, as the Sonata release
  --saturate=0       share of points at each end that may be clipped
similarity:
  --at=INDEX|X,Y,Z   point of the first cloud, by its number or the nearest to a place (metres, as
                     the page tells them); again for more. A second cloud is compared, too
match:
  --truth=same|FILE  both clouds lie in one frame, or a 4 x 4 matrix (text) takes the first to the
                     second: tells how many matches are right
  --within=METRES    what right means; by default 1.5 times the spacing of the features
  --lines=60         mutual matches drawn
retrieve:
  --query=PATH       the scene to find others like; with --objects PATH:INSTANCE
  --objects          find objects: instances of the clouds
  --count=5          how many
"""

import importlib.util
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from launch import command
from launch.show_inputs import Options, for_the_user, load_clouds, parse, place_of
from point_jax.training.config import ConfigError
from point_jax.visual.clouds import FeatureCloud
from point_jax.visual.codes import cosine_codes
from point_jax.visual.files import write_ply
from point_jax.visual.marks import row_of, side_by_side_view, view
from point_jax.visual.matching import Accuracy, match_features, matching_accuracy, sparse_matches
from point_jax.visual.page import SIMILARITY, PageCloud, PageMatch, write_page
from point_jax.visual.pca import fit_pca_colors
from point_jax.visual.pictures import stack
from point_jax.visual.render import without_ceiling
from point_jax.visual.retrieval import (
    Item,
    descriptors,
    nearest_items,
    objects_of,
    precision,
    scenes_of,
)
from point_jax.visual.similarity import cosine_similarity, heat, heat_colors, heat_scale

GREY = 184
RIGHT, WRONG, UNKNOWN = (0, 114, 178), (213, 94, 0), (150, 150, 150)  # Okabe and Ito's


def show_pca(options: Options, clouds: list[FeatureCloud]) -> None:
    """PCA colours, one PCA for all clouds, so that a colour means the same in each."""
    colors = pca_of(clouds, options)
    rows = []
    for cloud, color in zip(clouds, colors, strict=True):
        seen = view(cloud.coord, cloud.normal)
        panels = [("colours", seen.paint(given_color(cloud))), ("PCA", seen.paint(color))]
        rows.append(row_of(panels, label=cloud.name))
        write_ply(options.file("ply", cloud.name, clouds), place_of(cloud), color, cloud.normal)
    stack(rows).save(options.file("png"))
    write_page(
        options.file("html"),
        [page_cloud(c, {"PCA": color}) for c, color in zip(clouds, colors, strict=True)],
        title="PCA of the features",
        note=described(clouds),
        coloring="PCA",
        classes=options.classes,
        similarity=cosine_codes([cloud.features for cloud in clouds]),
        limit=options.limit,
    )


def show_similarity(options: Options, clouds: list[FeatureCloud]) -> None:
    """Heat maps of the cosine similarity to points of the first cloud."""
    first = clouds[0]
    with for_the_user():
        picks = [first.point_at(index, place) for index, place in options.points(first)]
    if not picks:
        picks = [first.point_at(None, np.median(first.coord, axis=0))]
        print(f"no --at: took point {picks[0]}, nearest to the middle of {first.name}")
    queries = first.features[first.owner[picks]]
    cosines = [cosine_similarity(cloud.features, queries) for cloud in clouds]
    views = [view(cloud.coord, cloud.normal) for cloud in clouds]
    heats, rows = {}, []
    for number, point in enumerate(picks):
        each = [rows_of[number][c.owner] for rows_of, c in zip(cosines, clouds, strict=True)]
        scale = heat_scale(np.concatenate(each))
        name = f"similarity to point {point}"
        heats[name] = [heat_colors(heat(values, scale)) for values in each]
        panels = [(f"colours of {first.name}", views[0].paint(given_color(first), rings=[point]))]
        for i, (cloud, seen) in enumerate(zip(clouds, views, strict=True)):
            rings = [point] if i == 0 else [int(each[i].argmax())]
            panels.append((cloud.name, seen.paint(heats[name][i], rings=rings)))
            path = options.file("ply", cloud.name, clouds, str(point) if len(picks) > 1 else "")
            write_ply(path, place_of(cloud), heats[name][i], cloud.normal)
        at = ", ".join(f"{value:.2f}" for value in first.coord[point] + first.origin)
        median, tenth, top = scale[1:4]
        rows.append(
            row_of(
                panels,
                label=f"Cosine similarity to point {point} ({at} m)",
                note=f"cosines: median {median:.2f}, top 10 % above {tenth:.2f}, top 2 % above "
                f"{top:.2f}",
            )
        )
        for cloud, values in list(zip(clouds, each, strict=True))[1:]:
            best = int(values.argmax())
            print(f"most similar in {cloud.name}: point {best}, cosine {values[best]:.3f}")
    stack(rows).save(options.file("png"))
    pca = pca_of(clouds, options)
    write_page(
        options.file("html"),
        [page_cloud(cloud, {"PCA": color}) for cloud, color in zip(clouds, pca, strict=True)],
        title="Cosine similarity",
        note=described(clouds),
        mode=SIMILARITY,
        coloring=SIMILARITY,
        classes=options.classes,
        similarity=cosine_codes([cloud.features for cloud in clouds]),
        picked=(0, picks[0]),
        limit=options.limit,
    )


def show_match(options: Options, clouds: list[FeatureCloud]) -> None:
    """Dense matches from the first cloud to the second, and a few drawn as lines."""
    if len(clouds) != 2:
        raise ConfigError(f"match takes two clouds, got {len(clouds)}: give --input twice")
    one, two = clouds
    with for_the_user():
        found = match_features(one.features, two.features)
    # Points of one feature cannot be told apart: each is matched to the middle of its match.
    target = two.middle[found.target][one.owner], one.middle[found.back][two.owner]
    mutual = found.mutual[one.owner], (found.target[found.back] == np.arange(len(two.features)))
    truth = accuracy_of(options, one, two, found.target)
    below = without_ceiling(one.place) & without_ceiling(two.place)[found.target]
    chosen = sparse_matches(one.place, found.score, found.mutual & below, options.lines)
    lines = np.stack([one.middle[chosen], two.middle[found.target[chosen]]], axis=1)
    place_colors = colors_of_place(two.coord)
    carried = place_colors[target[0]]
    line_colors = carried[lines[:, 0]] if truth is None else verdict(truth)[chosen]
    said = [
        f"{found.mutual.mean():.0%} of the {len(one.features):,} features of {one.name} have a "
        f"mutual match."
    ]
    if truth is not None:
        said.append(
            f"{truth.share():.0%} of those with a true counterpart are matched to within "
            f"{truth.within:.2f} m; of the mutual ones {truth.share(found.mutual):.0%}."
        )
        said.append("Lines: blue right, orange wrong, grey without a counterpart.")
    print("\n".join(said[:2]))
    seen = side_by_side_view([one.coord, two.coord], [one.normal, two.normal], size=(1280, 620))
    ends = lines + [0, len(one.coord)]
    dense = np.concatenate([carried, place_colors])
    given = np.concatenate([given_color(one), given_color(two)])
    names = f"{one.name} and {two.name}"
    stack(
        [
            row_of(
                [("mutual matches", seen.paint(given, lines=ends, line_colors=line_colors))],
                label=names,
                note=" ".join(said[1:] or said),
            ),
            row_of([("dense matches: each point has its match's colour", seen.paint(dense))]),
        ]
    ).save(options.file("png"))
    write_ply(
        options.file("ply"),
        seen.coord.astype(np.float32),
        given,
        edges=ends,
        edge_color=np.asarray(line_colors, np.uint8),
    )
    extra = [{"colours of the matches": carried}, {"colours of the matches": place_colors}]
    if truth is not None:
        extra[0]["right and wrong"] = verdict(truth)[one.owner]
    write_page(
        options.file("html"),
        [page_cloud(cloud, more) for cloud, more in zip(clouds, extra, strict=True)],
        title=f"Matches of {names}",
        note="\n".join(said),
        mode="match",
        classes=options.classes,
        similarity=cosine_codes([cloud.features for cloud in clouds]),
        match=PageMatch(
            target,
            (found.score[one.owner], found.back_score[two.owner]),
            (mutual[0], mutual[1][two.owner]),
            lines,
            line_colors,
            None if truth is None else truth.known[one.owner],
            None if truth is None else truth.correct[one.owner],
            0.0 if truth is None else round(truth.within, 3),
        ),
        limit=options.limit,
    )


def show_retrieve(options: Options, clouds: list[FeatureCloud]) -> None:
    """The scenes or objects most similar to one, as a table, picture and page."""
    with for_the_user():
        items = objects_of(clouds) if options.objects else scenes_of(clouds)
        base = descriptors(clouds, items)
        query = options.query_among(items, clouds)
        if 0 < len(items) - 1 < options.count:
            print(f"there are {len(items) - 1} besides the query: showing all of them")
            options = replace(options, count=len(items) - 1)
        skip = np.arange(len(items)) == query
        nearest = nearest_items(base[query : query + 1], base, options.count, skip=skip[None])
    order = [query, *map(int, nearest.item[0])]
    scores = [1.0, *map(float, nearest.score[0])]
    names = [item_name(items[i], clouds, options.classes) for i in order]
    table = ["rank,cosine,cloud,instance,class"]
    for rank, (i, score, name) in enumerate(zip(order, scores, names, strict=True)):
        item = items[i]
        instance = "" if item.instance is None else item.instance
        segment = "" if item.segment is None else class_name(item.segment, options.classes)
        table.append(f"{rank},{score:.4f},{clouds[item.cloud].name},{instance},{segment}")
        print(f"{'query' if rank == 0 else f'{rank:5}'}  {score:.3f}  {name}")
    options.file("csv").write_text("\n".join(table) + "\n")
    note = f"The query, and the nearest {options.count} of {len(items) - 1}, by cosine."
    classes = [item.segment for item in items]
    if options.objects and any(c is not None for c in classes):
        # Whether it is luck: every object as the query, among the objects of other clouds.
        home = np.array([item.cloud for item in items])
        same = home[:, None] == home[None, :]
        if (~same).sum(axis=1).min() >= options.count:
            share = precision(nearest_items(base, base, options.count, skip=same), classes, classes)
            note += (
                f"\nWith each of the {len(items)} objects as the query, {share:.0%} of the nearest "
                f"{options.count} in other clouds are of its class."
            )
            print(note.split("\n")[1])
    parts = [
        clouds[items[i].cloud].part(items[i].points, name)
        for i, name in zip(order, names, strict=True)
    ]
    titles = [
        f"{'query' if rank == 0 else f'{rank}: cosine {score:.3f}'}\n{name}"
        for rank, (score, name) in enumerate(zip(scores, names, strict=True))
    ]
    size = (300, 260) if options.objects else (400, 320)
    panels = [
        (
            title,
            view(part.coord, part.normal, size=size, whole=options.objects).paint(
                given_color(part)
            ),
        )
        for title, part in zip(titles, parts, strict=True)
    ]
    row_of(panels).save(options.file("png"))
    laid = side_by_side_view([p.coord for p in parts], [p.normal for p in parts], size=(64, 48))
    color = np.concatenate([given_color(part) for part in parts])
    write_ply(options.file("ply"), laid.coord.astype(np.float32), color)
    pca = pca_of(parts, options)
    write_page(
        options.file("html"),
        [
            page_cloud(part, {"PCA": color}, title)
            for part, title, color in zip(parts, titles, pca, strict=True)
        ],
        title=f"Nearest to {names[0]}",
        note=note,
        mode="retrieve",
        hide_backs=not options.objects,
        classes=options.classes,
        similarity=cosine_codes([part.features for part in parts]),
        limit=options.limit,
    )


def pca_of(clouds: Sequence[FeatureCloud], options: Options) -> list[np.ndarray]:
    """Joint PCA colours (n, 3) uint8 of the points of each cloud."""
    fitted = fit_pca_colors(
        [cloud.features for cloud in clouds],
        brightness=options.brightness,
        saturate=options.saturate,
    )
    return [np.rint(fitted(c.features) * 255).astype(np.uint8)[c.owner] for c in clouds]


def given_color(cloud: FeatureCloud) -> np.ndarray:
    """(n, 3) uint8 the cloud's own colours, grey without."""
    return np.full((len(cloud.coord), 3), GREY, np.uint8) if cloud.color is None else cloud.color


def page_cloud(
    cloud: FeatureCloud, colorings: Mapping[str, np.ndarray], caption: str = ""
) -> PageCloud:
    """A cloud for a page, its own colours first."""
    own = {} if cloud.color is None else {"colours": cloud.color}
    return PageCloud(
        cloud.name,
        cloud.coord,
        own | dict(colorings) or {"no colours": given_color(cloud)},
        cloud.normal,
        cloud.segment,
        cloud.owner,
        caption,
        cloud.origin,
    )


def described(clouds: Sequence[FeatureCloud]) -> str:
    """Points and features of clouds in words."""
    return "\n".join(
        f"{c.name}: {len(c.coord):,} points, {len(c.features):,} features of {c.features.shape[1]}"
        for c in clouds
    )


def accuracy_of(
    options: Options, one: FeatureCloud, two: FeatureCloud, target: np.ndarray
) -> Accuracy | None:
    """How many features of the first cloud are matched rightly; None if the truth is unknown."""
    if not options.truth:
        return None
    with for_the_user():
        return matching_accuracy(
            one.place,
            two.place[target],
            two.place,
            transform=options.transform(one, two),
            within=options.within or 1.5 * two.spacing,
        )


def verdict(truth: Accuracy) -> np.ndarray:
    """(m, 3) uint8: right, wrong, without a counterpart."""
    chosen = np.where(truth.known, np.where(truth.correct, 0, 1), 2)
    return np.array([RIGHT, WRONG, UNKNOWN], np.uint8)[chosen]


def colors_of_place(coord: np.ndarray) -> np.ndarray:
    """(n, 3) uint8: x, y and z as red, green and blue."""
    low, high = np.quantile(coord, [0.01, 0.99], axis=0)
    share = np.clip((coord - low) / np.maximum(high - low, 1e-6), 0, 1)
    return np.rint(40 + 205 * share).astype(np.uint8)


def class_name(segment: int, classes: Sequence[str] | None) -> str:
    """Name of a class id."""
    if segment < 0:
        return "no class"
    return classes[segment] if classes and segment < len(classes) else f"class {segment}"


def item_name(item: Item, clouds: Sequence[FeatureCloud], classes: Sequence[str] | None) -> str:
    """What a table calls a scene or object."""
    scene = clouds[item.cloud].name
    if item.instance is None:
        return scene
    kind = "object" if item.segment is None else class_name(item.segment, classes)
    return f"{kind} ({scene}:{item.instance})"


COMMANDS = {
    "pca": show_pca,
    "similarity": show_similarity,
    "match": show_match,
    "retrieve": show_retrieve,
}


def main(argv: Sequence[str]) -> int:
    """Shows what the command line says; returns the exit code."""
    options = parse(argv, tuple(COMMANDS))
    if importlib.util.find_spec("plyfile") is None:
        raise ConfigError("the PLY files need the package plyfile: pip install 'point_jax[io]'")
    command.make_folder(options.output)
    clouds, classes = load_clouds(options)
    options = replace(options, classes=options.classes or classes)
    COMMANDS[options.command](options, clouds)
    print(f"wrote {options.file('png')}, .ply and .html")
    return 0


if __name__ == "__main__":
    sys.exit(command.run(main, sys.argv, __doc__))
