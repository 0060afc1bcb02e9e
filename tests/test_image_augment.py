"""Image augmentation moves the places of points as it moves what is seen there."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from point_jax.data.color import ColorSpec
from point_jax.data.image_augment import ImageSpec, augment_images, blur

STILL = ColorSpec(0.0, 0.0, 0.0, 0.0, translation=0.0)
HEIGHT, WIDTH, IMAGES = 72, 104, 6
KEYS = jax.random.split(jax.random.key(3), 4)
BLOBS = np.random.default_rng(0).uniform([22, 34], [HEIGHT - 22, WIDTH - 34], (IMAGES, 2))


def blobs(places, sigma=2.5) -> np.ndarray:
    """Black images (I, H, W, 3) with one bright blob each, at (row, column)."""
    row, column = np.mgrid[:HEIGHT, :WIDTH] + 0.5
    parts = [np.exp(-((row - r) ** 2 + (column - c) ** 2) / (2 * sigma**2)) for r, c in places]
    return np.repeat(np.rint(255 * np.stack(parts))[..., None], 3, -1).astype(np.uint8)


def own(places) -> np.ndarray:
    """Places (P, I, 2) of as many points as images, each seen by its own image alone."""
    pixels = np.full((len(places), len(places), 2), -1, np.float32)
    pixels[range(len(places)), range(len(places))] = places
    return pixels


def centroid(image) -> np.ndarray:
    """Row and column of the centre of brightness."""
    weight = np.asarray(image, np.float64).sum(-1)
    row, column = np.mgrid[: weight.shape[0], : weight.shape[1]] + 0.5
    return np.array([(weight * row).sum(), (weight * column).sum()]) / weight.sum()


def augment(spec, key=KEYS[0], images=None, pixels=None, count=IMAGES):
    images = blobs(BLOBS) if images is None else images
    pixels = own(BLOBS) if pixels is None else pixels
    made = jax.jit(augment_images, static_argnums=4)(images, pixels, count, key, spec)
    return tuple(map(np.asarray, made))


@pytest.mark.parametrize(
    "spec",
    [
        pytest.param(ImageSpec(5, 8, 14, color=STILL), id="default"),
        pytest.param(ImageSpec(10, 7, 7, (0.8, 0.9), (0.6, 1.8), 0.5, STILL), id="smaller"),
        pytest.param(ImageSpec(12, 12, 16, (0.8, 1.0), (0.8, 1.3), 0.5, STILL), id="larger"),
        pytest.param(ImageSpec.plain(6, 6, 12), id="plain"),
    ],
)
def test_what_is_seen_at_a_point_stays_at_its_place(spec):
    followed, mirrored = 0, 0
    for key in KEYS:
        images, places = augment(spec, key)
        assert images.shape == (IMAGES, spec.height * spec.stride, spec.width * spec.stride, 3)
        assert images.min() >= 0 and images.max() <= 1
        for image in range(IMAGES):
            place = places[image, image] * spec.stride
            margin = 10 * spec.stride * spec.height / HEIGHT + 6  # of a whole blob
            whole = (place > margin) & (place < np.array(images.shape[1:3]) - margin)
            if whole.all():
                followed += 1
                assert np.abs(centroid(images[image]) - place).max() < 0.05
                mirrored += (place[1] > images.shape[2] / 2) != (BLOBS[image, 1] > WIDTH / 2)
    assert followed > IMAGES
    assert mirrored > 2 or spec.flip == 0


def test_a_place_is_kept_exactly_where_the_crop_shows_it():
    spec = ImageSpec(4, 6, 10, (0.3, 0.6), (0.5, 2.0), 0.5, STILL, blur_probability=0.0)
    row, column = np.mgrid[1:HEIGHT:6, 1:WIDTH:6].reshape(2, -1) + 0.5
    pixels = np.repeat(np.stack([row, column], 1)[:, None], IMAGES, 1).astype(np.float32)
    # Red grows with the row, green with the column: colours say where a pixel was.
    ramp = np.zeros((IMAGES, HEIGHT, WIDTH, 3), np.uint8)
    ramp[..., 0] = (np.arange(HEIGHT) * 2)[:, None]
    ramp[..., 1] = np.arange(WIDTH) * 2
    images, places = augment(spec, images=ramp, pixels=pixels)
    for image in range(IMAGES):
        inside = places[:, image, 0] >= 0
        assert (places[~inside, image] == -1).all()
        shown = images[image, ..., :2].reshape(-1, 2) * 255 / 2 + 0.5
        low, high = shown.min(0), shown.max(0)  # of the crop, to half a pixel of the result
        step = (high - low) / (np.array([40, 60]) - 1)
        where = pixels[:, image]
        well_in = ((where > low + step) & (where < high - step)).all(1)
        well_out = ((where < low - 2 * step) | (where > high + 2 * step)).any(1)
        assert inside[well_in].all() and not inside[well_out].any()
        assert 20 < inside.sum() < len(inside) - 20
        u, v = (places[well_in, image] * 10).astype(int).T
        there = images[image, u, v, :2] * 255 / 2 + 0.5
        assert np.abs(there - where[well_in]).max() < 1.5 * step.max()


def test_more_images_points_or_padding_change_nothing():
    spec = ImageSpec(5, 8, 7, flip=0.5)
    images, places = augment(spec)
    fewer = augment(spec, count=4)
    np.testing.assert_array_equal(fewer[0][:4], images[:4])
    np.testing.assert_array_equal(fewer[1][:, :4], places[:, :4])
    assert not fewer[0][4:].any() and (fewer[1][:, 4:] == -1).all()
    shorter = augment(spec, images=blobs(BLOBS)[:3], pixels=own(BLOBS)[:2, :3], count=3)
    np.testing.assert_array_equal(shorter[0], images[:3])
    np.testing.assert_array_equal(shorter[1], places[:2, :3])
    none = augment(spec, count=0)
    assert not none[0].any() and (none[1] == -1).all()
    assert not np.array_equal(augment(spec, KEYS[1])[1], places)


def test_a_plain_image_is_the_host_image():
    spec = ImageSpec.plain(9, 13, 8)
    images, places = augment(spec)
    np.testing.assert_allclose(images * 255, blobs(BLOBS), atol=0.01)
    np.testing.assert_allclose(places * 8, np.where(own(BLOBS) < 0, -8, own(BLOBS)), atol=1e-4)
    square, places = augment(ImageSpec.plain(9, 9, 8))
    np.testing.assert_allclose(square * 255, blobs(BLOBS)[:, :, 16:88], atol=0.01)
    assert (places[..., 1].max() * 8) < 72


def test_every_image_has_its_own_colours():
    grey = np.full((IMAGES, HEIGHT, WIDTH, 3), 100, np.uint8)
    images, _ = augment(ImageSpec(3, 4, 7), images=grey)
    colors = images[:, 10, 10]
    np.testing.assert_allclose(
        images, np.broadcast_to(colors[:, None, None], images.shape), atol=1e-5
    )
    assert len(np.unique(colors.round(4), axis=0)) > 3
    assert np.abs(colors * 255 - 100).max() < 0.05 * 255 + 0.01


def test_a_blur_is_a_gaussian():
    image = np.zeros((21, 25, 3), np.float32)
    image[10, 12] = 1
    blurred = np.asarray(blur(jnp.asarray(image), 1.2))[..., 0]
    row, column = np.mgrid[-4:5, -4:5]
    expected = np.exp(-(row**2 + column**2) / (2 * 1.2**2))
    np.testing.assert_allclose(blurred[6:15, 8:17], expected / expected.sum(), atol=1e-6)
    np.testing.assert_allclose(blur(jnp.ones((5, 2, 3)), 2.0), 1.0, atol=1e-6)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"height": 0}, "height is 0"),
        ({"area": (0.0, 1.0)}, r"area is \(0.0, 1.0\)"),
        ({"aspect": (1.2, 1.0)}, r"aspect is \(1.2, 1.0\)"),
        ({"flip": 1.5}, "flip is 1.5"),
        ({"blur": (0.0, 1.0)}, r"blur is \(0.0, 1.0\)"),
    ],
)
def test_what_cannot_be_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        ImageSpec(**{"height": 4, "width": 4} | wrong)
