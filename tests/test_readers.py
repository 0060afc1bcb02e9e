"""Cloud files of every kind: what is read is what was written, and bad files say what is wrong."""

import builtins
import re
import signal
import struct
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import laspy
import numpy as np
import pytest
import trimesh
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from plyfile import PlyData, PlyElement
from pypcd4 import Encoding, PointCloud

from point_jax.data.arrays import ReadOptions, to_uint8
from point_jax.data.readers import FORMATS, Frame, Scan, find_clouds, read_cloud
from point_jax.data.scenes import (
    UP,
    Scene,
    SceneError,
    load_scene,
    validate,
    write_dataset_json,
    write_scene,
)
from point_jax.visual.files import write_ply

COUNT = 60
RNG = np.random.default_rng(0)
COORD = RNG.uniform(-2, 3, (COUNT, 3)).astype(np.float32)
COLOR = RNG.integers(0, 256, (COUNT, 3)).astype(np.uint8)
NORMAL = RNG.normal(size=(COUNT, 3))
NORMAL = (NORMAL / np.linalg.norm(NORMAL, axis=1, keepdims=True)).astype(np.float32)
UTM = np.array([500_123.0, 4_500_456.0, 12.0])
BOX = (2.0, 3.0, 1.0)


def ply(path: Path, color_type="u1", coord=COORD, color=COLOR, faces=None, **layout) -> Path:
    fields = [(a, coord.dtype.str) for a in "xyz"]
    fields += [(a, color_type) for a in ("red", "green", "blue")]
    fields += [(a, "f4") for a in ("nx", "ny", "nz")]
    table = np.zeros(len(coord), fields)
    for (name, _), column in zip(fields, [*coord.T, *color.T, *NORMAL.T], strict=True):
        table[name] = column
    elements = [PlyElement.describe(table, "vertex")]
    if faces is not None:
        triangles = np.array([(face,) for face in faces], [("vertex_indices", "i4", (3,))])
        elements.append(PlyElement.describe(triangles, "face"))
    PlyData(elements, **layout).write(str(path))
    return path


def pcd(path: Path, encoding=Encoding.BINARY) -> Path:
    # PCL writes the packed colour of ascii files as a whole number.
    packed = PointCloud.encode_rgb(COLOR)
    kind = np.float32
    if encoding == Encoding.ASCII:
        packed, kind = packed.view(np.uint32), np.uint32
    names = ("x", "y", "z", "rgb", "normal_x", "normal_y", "normal_z")
    kinds = [np.float32] * 3 + [kind] + [np.float32] * 3
    PointCloud.from_points([*COORD.T, packed, *NORMAL.T], names, kinds).save(path, encoding)
    return path


def las(path: Path, color=COLOR.astype(np.uint16) * 257, offset=UTM) -> Path:
    header = laspy.LasHeader(point_format=3, version="1.2")
    header.scales, header.offsets = [1e-4] * 3, np.floor(offset)
    for name in ("nx", "ny", "nz"):
        header.add_extra_dim(laspy.ExtraBytesParams(name, np.float32))
    data = laspy.LasData(header)
    data.x, data.y, data.z = (COORD + offset).T
    data.red, data.green, data.blue = color.T
    data.nx, data.ny, data.nz = NORMAL.T
    data.write(str(path))
    return path


def npz(path: Path, **arrays) -> Path:
    np.savez(path, **(dict(coord=COORD, color=COLOR, normal=NORMAL) | arrays))
    return path


def text(path: Path, separator=" ", head="") -> Path:
    rows = (separator.join(map(str, [*c, *k, *n])) for c, k, n in zip(
        COORD.tolist(), COLOR.tolist(), NORMAL.tolist(), strict=True))  # fmt: skip
    path.write_text(head + "\n".join(rows) + "\n")
    return path


def box(path: Path, **visual) -> Path:
    mesh = trimesh.creation.box(BOX)
    if visual:
        mesh.visual = trimesh.visual.ColorVisuals(mesh, **visual)
    mesh.export(path)
    return path


WRITERS = {
    "binary.ply": lambda p: ply(p, byte_order="<"),
    "big_endian.ply": lambda p: ply(p, byte_order=">"),
    "ascii.ply": lambda p: ply(p, text=True),
    "binary.pcd": pcd,
    "ascii.pcd": lambda p: pcd(p, Encoding.ASCII),
    "compressed.pcd": lambda p: pcd(p, Encoding.BINARY_COMPRESSED),
    "cloud.las": lambda p: las(p, offset=np.zeros(3)),
    "cloud.laz": lambda p: las(p, offset=np.zeros(3)),
    "cloud.npz": npz,
    "cloud.xyz": text,
    "cloud.csv": lambda p: text(p, ",", "X,Y,Z,R,G,B,Nx,Ny,Nz\n"),
    "excel.csv": lambda p: text(p, ";", "\ufeffx;y;z;red;green;blue;nx;ny;nz\n"),
    "tabs.asc": lambda p: text(p, "\t", "//X Y Z R G B Nx Ny Nz\n\n"),
    "cloud.pts": lambda p: text(p, " ", f"{COUNT}\n"),
}
MESHES = ("box.ply", "box.obj", "box.glb", "box.gltf", "box.stl", "box.off")


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_gives_the_same_scene(tmp_path, name):
    scan = read_cloud(WRITERS[name](tmp_path / name))
    digits = 1e-4 if "la" in name else 1e-6 if name == "ascii.pcd" else 0
    assert isinstance(scan, Scan) and scan.name == Path(name).stem
    np.testing.assert_allclose(scan.coord, COORD, rtol=0, atol=digits)
    np.testing.assert_array_equal(scan.color, COLOR)
    np.testing.assert_allclose(scan.normal, NORMAL, rtol=0, atol=1e-6)
    assert validate(scan) is scan and scan.rows is None and not scan.notes
    np.testing.assert_array_equal(scan.frame.to_file(scan.coord), scan.coord)


def test_a_scene_folder_is_read_as_training_reads_it(tmp_path):
    scene = Scene("a", COORD, COLOR, NORMAL, np.arange(COUNT, dtype=np.int32) % 5 - 1)
    write_scene(tmp_path / "train" / "a", scene, compact=True)
    write_dataset_json(tmp_path, "mm", "z", ["train"])
    scan = read_cloud(tmp_path / "train" / "a")
    wanted = load_scene(tmp_path / "train" / "a", "mm", "z")
    for array in ("coord", "color", "normal", "segment"):
        np.testing.assert_array_equal(getattr(scan, array), getattr(wanted, array), array)
    assert scan.name == "a" and scan.instance is None and scan.frame.units == "mm"
    with pytest.raises(SceneError, match="units='m' is asked for.*says 'mm'"):
        read_cloud(tmp_path / "train" / "a", ReadOptions(units="m"))
    (tmp_path / "dataset.json").unlink()
    write_scene(tmp_path / "train" / "b", scene)
    np.testing.assert_array_equal(read_cloud(tmp_path / "train" / "b").coord, COORD)


# --- Units, axes, places far away ---


@pytest.mark.parametrize("up", UP)
def test_units_and_axes_are_undone_by_the_frame(tmp_path, up):
    there = (COORD.astype(np.float64) * 1000) @ UP[up]
    scan = read_cloud(npz(tmp_path / "a.npz", coord=there, normal=NORMAL @ UP[up].astype("f4")),
                      ReadOptions(units="mm", up=up))  # fmt: skip
    np.testing.assert_allclose(scan.coord, COORD, atol=1e-6)
    np.testing.assert_allclose(scan.normal, NORMAL, atol=1e-6)
    back = scan.frame.to_file(scan.coord)
    assert back.dtype == np.float32
    np.testing.assert_allclose(back, there, atol=1e-3)


@pytest.mark.parametrize("up", ["z", "y"])
def test_utm_coordinates_keep_their_precision(tmp_path, up):
    there = COORD.astype(np.float64) + UTM
    path = npz(tmp_path / "a.npz", coord=there)
    scan = read_cloud(path, ReadOptions(up=up))
    assert scan.coord.dtype == np.float32 and np.abs(scan.coord).max() < 20
    back = scan.frame.to_file(scan.coord)
    assert back.dtype == np.float64
    np.testing.assert_allclose(back, there, rtol=0, atol=1e-6)
    assert (scan.frame.offset == np.rint(scan.frame.offset)).all() and scan.frame.offset[2] == 0
    np.testing.assert_allclose(scan.frame.to_scene(there), scan.coord, atol=1e-6)
    assert any("computed relative to" in note for note in scan.notes)


@pytest.mark.parametrize("suffix", [".las", ".laz"])
def test_las_keeps_a_place_on_the_map(tmp_path, suffix):
    scan = read_cloud(las(tmp_path / f"a{suffix}"))
    there = scan.frame.to_file(scan.coord)
    np.testing.assert_allclose(there, COORD.astype(np.float64) + UTM, rtol=0, atol=1e-4)


def test_coordinates_that_were_rounded_by_the_file_are_refused(tmp_path):
    path = npz(tmp_path / "a.npz", coord=(COORD + UTM).astype(np.float32))
    with pytest.raises(SceneError, match=r"a.npz: .*stored in 32 bits.*rounds them to 0\.5 m"):
        read_cloud(path)


@settings(max_examples=30, deadline=None)
@given(st.floats(-1e7, 1e7), st.sampled_from(["m", "cm", "mm"]), st.sampled_from(list(UP)))
def test_a_frame_goes_there_and_back(shift, units, up):
    frame = Frame(np.rint(np.array([shift, -shift, 0])), units, up)
    back = frame.to_scene(frame.to_file(COORD))
    # the largest float32 rounding of a file without an offset
    np.testing.assert_allclose(back, COORD, atol=1e-5)


# --- Colours ---

SCALED = {
    "uint8": (COLOR, COLOR),
    "shares": ((COLOR / 255).astype(np.float32), COLOR),
    "shares in double": (COLOR / 255, COLOR),
    "whole floats": (COLOR.astype(np.float32), COLOR),
    "int64": (COLOR.astype(np.int64), COLOR),
    "16 bits, x 257": (COLOR.astype(np.uint16) * 257, COLOR),
    "16 bits, x 256": (COLOR.astype(np.uint16) * 256, COLOR),
    "8 of 16 bits": (COLOR.astype(np.uint16), COLOR),
    "pure": (np.eye(3, dtype=np.float32), np.eye(3, dtype=np.uint8) * 255),
    "black": (np.zeros((3, 3), np.int32), np.zeros((3, 3), np.uint8)),
}


@pytest.mark.parametrize("case", SCALED)
def test_colours_become_bytes_by_their_dtype(case):
    given, wanted = SCALED[case]
    color, note = to_uint8(given, Path("f"))
    assert color.dtype == np.uint8
    np.testing.assert_array_equal(color, wanted)
    assert bool(note) == (case == "8 of 16 bits")


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (COLOR / 2, "not whole numbers.*color_range"),
        (np.eye(3, dtype=np.int32), "none is above 1.*color_range"),
        (np.full((2, 3), 256), "from 256 to 256, expected 0 to 255.*color_range"),
        (np.full((2, 3), -1.0), "from -1 to -1"),
        (np.array([[0, np.nan, 1]]), "NaN or infinite"),
        (np.array([[0, np.inf, 1]]), "NaN or infinite"),
        (COLOR[:, :2], r"shape \(60, 2\)"),
        (COLOR > 3, "dtype bool"),
    ],
)
def test_colours_that_the_rule_does_not_decide_are_refused(given, says):
    with pytest.raises(SceneError, match=says):
        to_uint8(given, Path("f"))


def test_a_given_range_overrides_the_rule():
    ones = np.eye(3, dtype=np.int32)
    np.testing.assert_array_equal(to_uint8(ones, Path("f"), 1)[0], ones * 255)
    np.testing.assert_array_equal(to_uint8(ones, Path("f"), 255)[0], ones)
    dark = np.full((2, 3), 255, np.uint16)
    assert (to_uint8(dark, Path("f"), 65535)[0] == 0).all()
    quarters = np.minimum(COLOR + 0.25, 255)
    np.testing.assert_array_equal(to_uint8(quarters, Path("f"), 255)[0], COLOR)


@settings(max_examples=50, deadline=None)
@given(st.sampled_from([np.uint8, np.uint16, np.int32, np.float32, np.float64]), st.randoms())
def test_colours_are_bytes_or_an_error(kind, random):
    values = [random.choice([0, 1, 0.5, 255, 256, 65535, -1, 1e9]) for _ in range(6)]
    with np.errstate(all="ignore"):
        array = np.array(values).reshape(2, 3).astype(kind)
    try:
        color, _ = to_uint8(array, Path("f"))
    except SceneError:
        return
    assert color.dtype == np.uint8 and ((array > 0) | (color == 0)).all()


def test_las_of_8_bits_in_wide_fields_is_noted(tmp_path):
    scan = read_cloud(las(tmp_path / "a.las", color=COLOR.astype(np.uint16)))
    np.testing.assert_array_equal(scan.color, COLOR)
    assert any("16-bit numbers up to 25" in note for note in scan.notes)


def test_colours_and_normals_can_be_left_out_unread(tmp_path):
    path = npz(tmp_path / "a.npz", color=COLOR + 0.5, normal=3 * NORMAL)
    scan = read_cloud(path, ReadOptions(color=False, normal=False))
    assert scan.color is None and scan.normal is None
    with pytest.raises(SceneError, match="not of unit length.*--wo_normal"):
        read_cloud(path, ReadOptions(color=False))


# --- Text ---


def test_columns_of_text_can_be_named(tmp_path):
    path = tmp_path / "a.txt"
    rows = [[*c, 7, *n] for c, n in zip(COORD.tolist(), NORMAL.tolist(), strict=True)]
    path.write_text("\n".join(" ".join(map(str, row)) for row in rows))
    scan = read_cloud(path, ReadOptions(columns="x y z intensity nx ny nz"))
    np.testing.assert_array_equal(scan.coord, COORD)
    assert scan.color is None and scan.normal is not None
    with pytest.raises(SceneError, match="7 columns without a header.*--columns"):
        read_cloud(path)
    with pytest.raises(SceneError, match=r"columns names 3 columns \(x y z\), but line 1 has 7"):
        read_cloud(path, ReadOptions(columns="x,y,z"))


def test_normals_are_not_taken_for_colours(tmp_path):
    rows = np.concatenate([COORD, NORMAL], 1)
    np.savetxt(tmp_path / "a.txt", rows)
    np.savetxt(tmp_path / "a.xyzn", rows)
    with pytest.raises(SceneError, match="negative.*are they normals.*nx ny nz"):
        read_cloud(tmp_path / "a.txt")
    np.testing.assert_allclose(read_cloud(tmp_path / "a.xyzn").normal, NORMAL, atol=1e-6)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "the file is empty"),
        ("# nothing\n\n", "no lines of numbers"),
        ("some words\n1 2 3\n", "line 1 is not numbers: 'some words'"),
        ("1 2 3\n4 5\n", "not a whole text file"),
        ("1 2 3\nfoo bar baz\n", "not a whole text file"),
        ("a b c\n1 2 3", "line 1 is not numbers"),
        ("x y z r\n1 2 3\n4 5 6", "header names 4 columns"),
        ("0 0 0 0 1 0\n1 1 1 1 0 0", "none is above 1"),
        ("0 0 0 0 1 900000\n1 1 1 1 0 0", "colours up to 900000"),
        ("1 2 3", "1 points"),
        ("1,5 2,5 3,5\n1,5 2,5 3,5\n", "columns|whole"),
        ("1 2 nan\n3 4 5\n6 7 8", "1 of 3 points have NaN.*row 0.*--drop_invalid"),
    ],
)
def test_bad_text_says_what_is_wrong(tmp_path, content, says):
    path = tmp_path / "a.txt"
    path.write_text(content)
    with pytest.raises(SceneError, match=rf"a\.txt: .*{says}"):
        read_cloud(path)


# --- Meshes ---


@pytest.mark.parametrize("name", MESHES)
def test_meshes_are_sampled_evenly_with_normals(tmp_path, name):
    # the height is along the file's z; glTF's up is y unless told otherwise
    scan = read_cloud(box(tmp_path / name), ReadOptions(up="z", density=500))
    area = 2 * (2 * 3 + 3 * 1 + 1 * 2)
    assert len(scan.coord) == 500 * area and scan.color is None
    side = np.abs(scan.normal).argmax(1)
    np.testing.assert_allclose(np.abs(scan.normal).max(1), 1, atol=1e-6)
    outside = np.take_along_axis(scan.coord * np.sign(scan.normal), side[:, None], 1)[:, 0]
    np.testing.assert_allclose(outside, np.array(BOX)[side] / 2, atol=1e-6)
    share = np.bincount(side, minlength=3) / len(side)
    np.testing.assert_allclose(share, np.array([3, 2, 6]) / 11, atol=0.02)
    again = read_cloud(tmp_path / name, ReadOptions(up="z", density=500))
    other = read_cloud(tmp_path / name, ReadOptions(up="z", density=500, seed=1))
    np.testing.assert_array_equal(again.coord, scan.coord)
    assert (other.coord != scan.coord).any()


def test_gltf_is_y_up_and_obj_is_z_up(tmp_path):
    few = ReadOptions(count=500)
    tall = {".glb": [2, 1, 3], ".gltf": [2, 1, 3], ".obj": [2, 3, 1]}
    for suffix, extent in tall.items():
        scan = read_cloud(box(tmp_path / f"a{suffix}"), few)
        np.testing.assert_allclose(np.ptp(scan.coord, axis=0), extent, atol=1e-6)
        inside = scan.frame.to_file(scan.coord)
        np.testing.assert_allclose(np.ptp(inside, axis=0), BOX, atol=1e-6)


def test_density_counts_metres(tmp_path):
    scan = read_cloud(box(tmp_path / "a.stl"), ReadOptions(units="cm", density=1e6, any_size=True))
    assert len(scan.coord) == 22 * 100  # 22 square centimetres
    assert len(read_cloud(tmp_path / "a.stl", ReadOptions(count=321)).coord) == 321
    with pytest.raises(SceneError, match="expected 2 to 20000000; check units"):
        read_cloud(tmp_path / "a.stl", ReadOptions(density=1e9))
    with pytest.raises(SceneError, match="0 points on"):
        read_cloud(tmp_path / "a.stl", ReadOptions(units="mm"))


@pytest.mark.parametrize("name", ["a.ply", "a.glb", "a.obj"])
def test_vertex_colours_are_interpolated(tmp_path, name):
    corners = trimesh.creation.box(BOX).vertices
    color = np.rint((corners / np.array(BOX) + 0.5) * 200).astype(np.uint8)
    path = box(tmp_path / name, vertex_colors=color)
    scan = read_cloud(path, ReadOptions(up="z", count=2000))
    np.testing.assert_allclose(scan.color, (scan.coord / np.array(BOX) + 0.5) * 200, atol=0.51)


def test_face_colours_stay_on_their_faces(tmp_path):
    mesh = trimesh.creation.box(BOX)
    color = np.uint8(np.abs(mesh.face_normals) * [50, 100, 150]) + np.uint8(20)
    path = box(tmp_path / "a.ply", face_colors=color)
    scan = read_cloud(path, ReadOptions(count=500))
    np.testing.assert_array_equal(scan.color, np.abs(scan.normal) * [50, 100, 150] + 20)


@pytest.mark.parametrize("name", ["a.obj", "a.glb"])
def test_textures_colour_the_points(tmp_path, name):
    ramp = np.zeros((256, 256, 3), np.uint8)
    ramp[..., 0], ramp[..., 1] = np.arange(256), np.arange(255, -1, -1)[:, None]
    square = np.array([[0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 0.0]])
    material = trimesh.visual.material.PBRMaterial(baseColorTexture=Image.fromarray(ramp))
    if name == "a.obj":
        material = material.to_simple()
    visual = trimesh.visual.TextureVisuals(uv=square[:, :2], material=material)
    mesh = trimesh.Trimesh(square, [[0, 1, 2], [0, 2, 3]], visual=visual, process=False)
    mesh.export(tmp_path / name)
    scan = read_cloud(tmp_path / name, ReadOptions(up="z", count=1000))
    wanted = np.stack([scan.coord[:, 0] * 255, scan.coord[:, 1] * 255, np.zeros(1000)], 1)
    # an OBJ's texture is saved as JPEG or PNG by trimesh
    assert np.abs(scan.color - wanted).mean() < 2 and np.abs(scan.color - wanted).max() < 12


def test_parts_stand_where_the_scene_graph_puts_them(tmp_path):
    scene = trimesh.Scene()
    mesh = trimesh.creation.box((1, 1, 1))
    mesh.visual = trimesh.visual.TextureVisuals(
        material=trimesh.visual.material.PBRMaterial(baseColorFactor=[1.0, 0.0, 0.0, 1.0])
    )
    scene.add_geometry(mesh, node_name="a")
    plain = trimesh.creation.box((1, 1, 1))
    scene.add_geometry(
        plain, node_name="b", transform=trimesh.transformations.translation_matrix([5, 0, 0])
    )
    scene.export(tmp_path / "a.glb")
    scan = read_cloud(tmp_path / "a.glb", ReadOptions(up="z", count=2000))
    far = scan.coord[:, 0] > 2
    assert far.sum() == 1000 and scan.coord[:, 0].max() == pytest.approx(5.5, abs=1e-5)
    assert (scan.color[~far] == [255, 0, 0]).all() and (scan.color[far] == 255).all()


def test_the_vertices_of_a_ply_mesh_can_be_the_points(tmp_path):
    faces = [[i, i + 1, i + 2] for i in range(COUNT - 2)]
    path = ply(tmp_path / "a.ply", faces=faces)
    assert len(read_cloud(path, ReadOptions(count=99)).coord) == 99
    scan = read_cloud(path, ReadOptions(mesh="vertices"))
    np.testing.assert_array_equal(scan.coord, COORD)
    np.testing.assert_array_equal(scan.color, COLOR)
    np.testing.assert_array_equal(scan.normal, NORMAL)
    with pytest.raises(SceneError, match="from PLY only"):
        read_cloud(box(tmp_path / "a.obj"), ReadOptions(mesh="vertices"))


# --- What is wrong ---


def test_missing_points_are_left_out_on_request(tmp_path):
    coord = COORD.copy()
    coord[3:5] = np.nan
    path = npz(tmp_path / "a.npz", coord=coord)
    with pytest.raises(SceneError, match="2 of 60 points have NaN.*row 3"):
        read_cloud(path)
    scan = read_cloud(path, ReadOptions(drop_invalid=True))
    np.testing.assert_array_equal(scan.coord, COORD[scan.rows])
    np.testing.assert_array_equal(scan.color, COLOR[scan.rows])
    assert len(scan.rows) == COUNT - 2 and "2 of 60 points" in scan.notes[0]


@pytest.mark.parametrize(
    ("arrays", "says"),
    [
        (dict(coord=COORD[:, :2]), r"coordinates of shape \(60, 2\)"),
        (dict(coord=COORD[:1], color=COLOR[:1], normal=NORMAL[:1]), "1 points"),
        (dict(coord=np.zeros_like(COORD)), "all 60 points are the same"),
        (dict(coord=COORD * 1000), "units='mm'.*--any_size"),
        (dict(color=COLOR[:5]), r"color has shape \(5, 3\), but there are 60 points"),
        (dict(normal=NORMAL * np.nan), "NaN"),
        (dict(segment=np.full(COUNT, -7)), "ids from -7"),
        (dict(coord=np.array(["a"] * 3)), "coord holds <U1"),
        (dict(coord=np.array([None] * 3)), "not a whole npz file"),
        (dict(coord=np.empty((0, 3)), color=COLOR[:0], normal=NORMAL[:0]), "0 points"),
    ],
)
def test_bad_arrays_say_what_is_wrong(tmp_path, arrays, says):
    with pytest.raises(SceneError, match=rf"a\.npz: .*{says}"):
        read_cloud(npz(tmp_path / "a.npz", **arrays))


def test_any_size_is_accepted_on_request(tmp_path):
    scan = read_cloud(npz(tmp_path / "a.npz", coord=COORD * 1000), ReadOptions(any_size=True))
    np.testing.assert_allclose(scan.frame.to_file(scan.coord), COORD * 1000, atol=1e-3)
    path = npz(tmp_path / "b.npz", coord=np.zeros_like(COORD))
    with pytest.raises(SceneError, match="all 60 points are the same") as caught:
        read_cloud(path, ReadOptions(any_size=True))
    assert "--any_size" not in str(caught.value)


def test_wrong_places_and_kinds_say_so(tmp_path):
    (tmp_path / "a.docx").write_text("hello")
    (tmp_path / "empty").mkdir()
    (tmp_path / "only.npz").write_bytes(npz(tmp_path / "x.npz").read_bytes())
    np.savez(tmp_path / "other.npz", points=COORD)
    for name, says in {
        "a.docx": r"not read; readable are PLY \(\.ply\)",
        "gone.ply": "no such file",
        "empty": "not a scene folder",
        "other.npz": "no array coord, only points",
    }.items():
        with pytest.raises(SceneError, match=f"{name}.*{says}"):
            read_cloud(tmp_path / name)
    for options, says in ((ReadOptions(units="feet"), "units is 'feet'"),
                          (ReadOptions(up="w"), "up is 'w'")):  # fmt: skip
        with pytest.raises(SceneError, match=says):
            read_cloud(tmp_path / "x.npz", options)
    for wrong in (dict(color_range=2), dict(mesh="no"), dict(density=-1.0), dict(count=-1)):
        with pytest.raises(ValueError, match="expected"):
            ReadOptions(**wrong)


@pytest.mark.parametrize(
    ("package", "name"),
    [("plyfile", "binary.ply"), ("pypcd4", "binary.pcd"), ("laspy", "cloud.las"),
     ("lazrs", "cloud.laz"), ("trimesh", "box.obj")],
)  # fmt: skip
def test_a_missing_package_is_named(tmp_path, monkeypatch, package, name):
    path = WRITERS.get(name, box)(tmp_path / name)
    real = builtins.__import__

    def blocked(wanted, *rest, **named):
        if wanted.split(".")[0] == package:
            raise ModuleNotFoundError(f"No module named {package!r}", name=package)
        return real(wanted, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", blocked)
    with pytest.raises(SceneError, match=rf"needs the package '{package}'.*point_jax\[io\]"):
        read_cloud(path)


# --- Damaged files ---


@contextmanager
def seconds(limit: int):
    def stop(*_):
        raise KeyboardInterrupt(f"a damaged file took more than {limit} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(limit)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@cache
def content(name: str) -> bytes:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        return WRITERS.get(name, box)(Path(folder) / name).read_bytes()


FUZZED = ["binary.ply", "ascii.ply", "binary.pcd", "ascii.pcd", "compressed.pcd", "cloud.las"]
FUZZED += ["cloud.laz", "cloud.npz", "cloud.csv", "box.ply", "box.obj", "box.glb", "box.stl"]
FUZZ = settings(  # the same examples each time: native parsers may abort, not only raise
    max_examples=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def read_damaged(path: Path, data: bytes) -> Scan | None:
    path.write_bytes(data)
    with seconds(20):
        try:
            return read_cloud(path, ReadOptions(count=500))
        except SceneError as error:
            message = str(error)
    assert str(path) in message and len(message) < 800
    return None


@pytest.mark.parametrize("name", FUZZED)
@FUZZ
@given(data=st.data())
def test_damaged_files_are_errors_that_name_them(tmp_path, name, data):
    raw = bytearray(content(name))
    # half of the damage in the header, where it does most harm
    places = st.one_of(st.integers(0, min(400, len(raw)) - 1), st.integers(0, len(raw) - 1))
    for place in data.draw(st.lists(places, min_size=1, max_size=4)):
        raw[place] = data.draw(st.integers(0, 255))
    scan = read_damaged(tmp_path / name, bytes(raw))
    if scan is not None:  # damage may hit a colour: then the rest is as good as any
        assert len(scan.coord) <= 500 and np.isfinite(scan.coord).all()


CUT = [name for name in FUZZED if name not in ("cloud.csv", "ascii.pcd", "ascii.ply", "box.obj")]


@pytest.mark.parametrize("name", CUT)
@settings(FUZZ, max_examples=25)
@given(data=st.data())
def test_files_that_are_cut_off_are_refused(tmp_path, name, data):
    raw = content(name)
    end = data.draw(st.integers(0, len(raw) - 1))
    assert read_damaged(tmp_path / name, raw[:end]) is None


@pytest.mark.parametrize("name", ["ascii.ply", "ascii.pcd"])
def test_text_that_lacks_lines_is_refused(tmp_path, name):
    lines = content(name).splitlines(keepends=True)
    assert read_damaged(tmp_path / name, b"".join(lines[:-3])) is None


def test_headers_that_promise_too_much_are_refused_at_once(tmp_path):
    header = b"ply\nformat binary_little_endian 1.0\nelement vertex 999999999999\n"
    header += b"property float x\nproperty float y\nproperty float z\nend_header\n"
    assert read_damaged(tmp_path / "a.ply", header + b"\0" * 1200) is None
    for name in ("binary.pcd", "compressed.pcd"):
        raw = re.sub(rb"(WIDTH|POINTS) 60", rb"\1 999999999999", content(name))
        assert read_damaged(tmp_path / name, raw) is None
    for name in ("cloud.las", "cloud.laz"):
        for place in (100, 107):  # the number of records, and of points
            raw = bytearray(content(name))
            raw[place : place + 4] = struct.pack("<I", 4_000_000_000)
            assert read_damaged(tmp_path / name, bytes(raw)) is None
    raw = bytearray(content("cloud.laz"))
    points = int.from_bytes(raw[96:100], "little")
    table = int.from_bytes(raw[points : points + 8], "little")
    raw[table + 4 : table + 8] = struct.pack("<I", 4_000_000_000)  # chunks
    assert read_damaged(tmp_path / "cloud.laz", bytes(raw)) is None


@settings(FUZZ, max_examples=60)
@given(junk=st.binary(max_size=200), suffix=st.sampled_from(sum(FORMATS.values(), ())))
def test_junk_under_any_name_is_refused(tmp_path, junk, suffix):
    scan = read_damaged(tmp_path / f"junk{suffix}", junk)
    assert scan is None or suffix in FORMATS["text"]


# --- Finding ---


def test_clouds_are_found_in_folders(tmp_path):
    write_scene(tmp_path / "train" / "a", Scene("a", COORD))
    npz(tmp_path / "train" / "a" / "frames.npz")
    npz(tmp_path / "b.npz")
    (tmp_path / "more").mkdir()
    text(tmp_path / "more" / "c.XYZ")
    npz(tmp_path / ".hidden.npz")
    (tmp_path / ".git").mkdir()
    npz(tmp_path / ".git" / "d.npz")
    (tmp_path / "notes.md").write_text("no cloud")
    wanted = [tmp_path / "b.npz", tmp_path / "more" / "c.XYZ", tmp_path / "train" / "a"]
    assert find_clouds(tmp_path) == wanted
    assert find_clouds(tmp_path, "*.xyz") == wanted[1:2]
    assert find_clouds(wanted[0]) == wanted[:1] and find_clouds(wanted[2]) == wanted[2:]
    with pytest.raises(SceneError, match=r"no clouds that are called \*\.las"):
        find_clouds(tmp_path, "*.las")
    with pytest.raises(SceneError, match="no such file or folder"):
        find_clouds(tmp_path / "gone")
    (tmp_path / "empty").mkdir()
    with pytest.raises(SceneError, match="empty: no clouds; readable are PLY"):
        find_clouds(tmp_path / "empty")


# --- Writing ---


@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_a_written_ply_is_read_as_it_was(tmp_path, kind):
    coord = COORD.astype(kind) + (UTM if kind == np.float64 else 0)
    path = write_ply(tmp_path / "new" / "a.ply", coord.astype(kind), COLOR / 255, NORMAL)
    scan = read_cloud(path)
    np.testing.assert_allclose(scan.frame.to_file(scan.coord), coord, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(scan.color, COLOR)
    np.testing.assert_array_equal(scan.normal, NORMAL)
    assert [f.name for f in path.parent.iterdir()] == ["a.ply"]
    with pytest.raises(ValueError, match=r"red, green, blue have shape \(5, 3\)"):
        write_ply(path, COORD, COLOR[:5])
