"""Views of one image, and scenes with less in them."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from point_jax.data.checks import SceneError
from point_jax.data.frames import Frames
from point_jax.data.scenes import Scene
from point_jax.evaluation.modalities import thin_labels, without
from point_jax.evaluation.partial import decompose, upright_axes, view, views

seeds = st.integers(0, 2**32 - 1)


def random_camera(draw):
    """Intrinsics with skew, and a pose anywhere: (K, R, t), scene to camera."""
    rotation = np.linalg.qr(draw.normal(size=(3, 3)))[0]
    rotation *= np.sign(np.linalg.det(rotation))
    focal, center = draw.uniform(100, 900, 2), draw.uniform(-50, 600, 2)
    skew = draw.uniform(-2, 2)
    intrinsics = np.array([[focal[0], skew, center[0]], [0, focal[1], center[1]], [0, 0, 1]])
    return intrinsics, rotation, draw.normal(size=3) * 10


def look(direction, roll=0.0):
    """Rotation scene to camera of one that looks along `direction`, level but for `roll`."""
    forward = np.array(direction, float)
    forward /= np.linalg.norm(forward)
    right = np.cross(forward, [0, 0, 1])
    right = right / np.linalg.norm(right) if right.any() else np.array([1.0, 0, 0])
    down = np.cross(forward, right)
    turn = np.array([[np.cos(roll), np.sin(roll)], [-np.sin(roll), np.cos(roll)]])
    return np.stack([*(turn @ np.stack([right, down])), forward])


def example(draw, points=60, images=3):
    """A scene and frames of random cameras, each of which sees a random part of it."""
    normal = draw.normal(size=(points, 3))
    scene = Scene(
        "room",
        draw.uniform(-4, 4, (points, 3)).astype(np.float32),
        draw.integers(0, 256, (points, 3), np.uint8),
        (normal / np.linalg.norm(normal, axis=1, keepdims=True)).astype(np.float32),
        draw.integers(-1, 5, points, np.int32),
        draw.integers(-1, 9, points, np.int32),
    )
    cameras = [random_camera(draw) for _ in range(images)]
    frames = Frames(
        np.array([f"{i}.jpg" for i in range(images)]),
        np.full((images, 2), (640, 480)),
        np.stack([k @ np.column_stack([r, t]) for k, r, t in cameras]),
        draw.random((images, points)) < 0.5,
    )
    return scene, frames, cameras


@settings(deadline=None, max_examples=200)
@given(seeds, st.floats(0.01, 100))
def test_a_projection_matrix_is_taken_apart_into_what_it_was_made_of(seed, scale):
    draw = np.random.default_rng(seed)
    intrinsics, rotation, translation = random_camera(draw)
    camera = decompose(scale * intrinsics @ np.column_stack([rotation, translation]))
    np.testing.assert_allclose(camera.intrinsics, scale * intrinsics, rtol=1e-9, atol=1e-7 * scale)
    np.testing.assert_allclose(camera.rotation, rotation, atol=1e-9)
    np.testing.assert_allclose(camera.translation, translation, atol=1e-8)
    np.testing.assert_allclose(rotation @ camera.position + translation, 0, atol=1e-8)


def test_what_no_camera_projects_by_is_refused():
    intrinsics, rotation, translation = random_camera(np.random.default_rng(0))
    good = intrinsics @ np.column_stack([rotation, translation])
    decompose(good)
    flat = good.copy()
    flat[1, :3] = flat[0, :3]
    mirrored = good * [-1, 1, 1, 1]
    for bad in (-good, mirrored, flat, 0 * good, good * np.nan, good[:, :3]):
        with pytest.raises(SceneError, match=r"no camera has the projection matrix .* \[R \| t\]"):
            decompose(bad)


@settings(deadline=None, max_examples=60)
@given(seeds)
def test_a_view_is_the_points_that_the_image_sees_moved_as_one_body(seed):
    scene, frames, cameras = example(np.random.default_rng(seed))
    _, rotation, translation = cameras[1]
    rows = np.flatnonzero(frames.seen[1])
    parts = {axes: view(scene, frames, 1, axes) for axes in ("scene", "upright", "camera")}
    for part in parts.values():
        for name in ("color", "segment", "instance"):
            np.testing.assert_array_equal(getattr(part, name), getattr(scene, name)[rows])
        assert part.name == "room/1"
        assert part.coord.dtype == part.normal.dtype == np.float32
    np.testing.assert_array_equal(parts["scene"].coord, scene.coord[rows])
    np.testing.assert_array_equal(parts["scene"].normal, scene.normal[rows])
    in_camera = scene.coord[rows] @ rotation.T + translation
    np.testing.assert_allclose(parts["camera"].coord, in_camera, atol=1e-4)
    np.testing.assert_allclose(parts["camera"].normal, scene.normal[rows] @ rotation.T, atol=1e-5)
    # the third axis of the camera is the depth that the matrix itself gives
    depth = scene.coord[rows] @ frames.camera[1, 2, :3] + frames.camera[1, 2, 3]
    np.testing.assert_allclose(parts["camera"].coord[:, 2], depth, atol=1e-4)
    # upright: one rotation about the vertical, the camera at the origin
    position = -rotation.T @ translation
    np.testing.assert_allclose(
        parts["upright"].coord[:, 2], scene.coord[rows, 2] - position[2], atol=1e-4
    )
    np.testing.assert_allclose(parts["upright"].normal[:, 2], scene.normal[rows, 2], atol=1e-6)
    np.testing.assert_allclose(
        np.linalg.norm(parts["upright"].coord, axis=1),
        np.linalg.norm(in_camera, axis=1),
        rtol=1e-4,
    )
    for part in (parts["upright"], parts["camera"]):
        angle = (part.coord * part.normal).sum(1)
        want = ((scene.coord[rows] - position) * scene.normal[rows]).sum(1)
        np.testing.assert_allclose(angle, want, atol=1e-4)


@settings(deadline=None, max_examples=200)
@given(st.floats(-3, 3), st.floats(-1.3, 1.3), st.floats(-0.5, 0.5))
def test_upright_axes_are_level_and_look_where_the_camera_looks(yaw, pitch, roll):
    forward = [np.cos(yaw) * np.cos(pitch), np.sin(yaw) * np.cos(pitch), np.sin(pitch)]
    rotation = look(forward, roll)
    camera = decompose(np.column_stack([np.diag([500.0, 500, 1]) @ rotation, np.zeros(3)]))
    axes = upright_axes(camera)
    np.testing.assert_allclose(axes @ axes.T, np.eye(3), atol=1e-9)
    assert np.linalg.det(axes) > 0
    np.testing.assert_allclose(axes[2], [0, 0, 1])
    np.testing.assert_allclose(axes[1], [np.cos(yaw), np.sin(yaw), 0], atol=1e-7)
    if not roll:
        np.testing.assert_allclose(axes[0], rotation[0], atol=1e-7)


@pytest.mark.parametrize("vertical", [-1, 1])
def test_straight_down_the_upper_edge_of_the_image_is_ahead_and_straight_up_the_lower(vertical):
    rotation = look([0, 0, vertical])  # its rows: right, down, forward
    camera = decompose(np.column_stack([rotation, np.zeros(3)]))
    np.testing.assert_allclose(upright_axes(camera)[1], vertical * rotation[1], atol=1e-9)


def test_images_that_see_nearly_nothing_give_no_view():
    scene, frames, _ = example(np.random.default_rng(0))
    seen = frames.seen.copy()
    seen[1] = np.arange(seen.shape[1]) < 7
    sparse = dataclasses.replace(frames, seen=seen)
    assert [part.name for part in views(scene, sparse, fewest=8)] == ["room/0", "room/2"]
    assert len(list(views(scene, sparse, "camera", fewest=7))) == 3
    assert list(views(scene, sparse)) == []  # 60 points are too few for any


def test_frames_of_another_scene_and_unknown_axes_are_refused():
    scene, frames, _ = example(np.random.default_rng(0))
    with pytest.raises(SceneError, match="room: 60 points, but its frames are of 59"):
        view(scene, dataclasses.replace(frames, seen=frames.seen[:, 1:]), 0)
    with pytest.raises(ValueError, match="axes='world', expected 'scene'"):
        view(scene, frames, 0, "world")


def test_a_scene_without_colours_or_normals_keeps_all_else():
    scene, frames, _ = example(np.random.default_rng(0))
    for names in (("color",), ("normal",), ("color", "normal")):
        less = without(scene, *names)
        for field in dataclasses.fields(scene):
            want = None if field.name in names else getattr(scene, field.name)
            assert getattr(less, field.name) is want
    for axes in ("scene", "upright", "camera"):
        part = view(without(scene, "color", "normal"), frames, 0, axes)
        assert part.color is None and part.normal is None


@settings(deadline=None, max_examples=60)
@given(seeds, st.floats(0.001, 1), st.floats(0.001, 1), st.integers(0, 9))
def test_thin_labels_are_a_share_of_the_labels_and_a_part_of_every_larger_share(
    seed, one, other, key
):
    scene, _, _ = example(np.random.default_rng(seed))
    less, more = (thin_labels(scene, share, key) for share in sorted((one, other)))
    kept = less.segment >= 0
    labelled = scene.segment >= 0
    assert kept.sum() == max(1, round(min(one, other) * labelled.sum()))
    np.testing.assert_array_equal(less.segment[kept], scene.segment[kept])
    np.testing.assert_array_equal(less.segment[~kept], -1)
    assert (more.segment[kept] >= 0).all()
    assert less.coord is scene.coord and less.instance is scene.instance


def test_thin_labels_differ_by_seed_and_by_scene_and_are_the_same_again():
    scene, _, _ = example(np.random.default_rng(0))
    first = thin_labels(scene, 0.3, 0).segment
    np.testing.assert_array_equal(first, thin_labels(scene, 0.3, 0).segment)
    assert (first != thin_labels(scene, 0.3, 1).segment).any()
    other = dataclasses.replace(scene, name="hall")
    assert (first != thin_labels(other, 0.3, 0).segment).any()


def test_labels_that_cannot_be_thinned_say_why():
    scene, _, _ = example(np.random.default_rng(0))
    with pytest.raises(SceneError, match="room: has no labels to thin out"):
        thin_labels(dataclasses.replace(scene, segment=None), 0.5, 0)
    for share in (0, -0.1, 1.1):
        with pytest.raises(ValueError, match="share is .*, expected a number above 0 and at most"):
            thin_labels(scene, share, 0)
    nothing = dataclasses.replace(scene, segment=np.full(60, -1, np.int32))
    np.testing.assert_array_equal(thin_labels(nothing, 0.5, 0).segment, -1)
