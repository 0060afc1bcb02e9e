"""The page: what is in the file, and how it behaves in a real browser.

The tests in a browser need Playwright (`pip install 'point_jax[browser]'`) and an installed
Chromium or Chrome; `POINT_JAX_BROWSER` names another executable. Without them they are skipped.
"""

import base64
import gzip
import io
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from point_jax.visual.classes import KeyEntry
from point_jax.visual.codes import CosineCodes, cosine_codes
from point_jax.visual.page import PageCloud, PageMatch, write_page
from point_jax.visual.similarity import RAMP, cosine_similarity, heat, heat_scale

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
RED, GREEN, BLUE = (220, 30, 30), (30, 170, 30), (30, 60, 230)


def plate(n: int = 40) -> tuple[np.ndarray, np.ndarray]:
    """A horizontal plate of n x n points, 2 m a side, x < 1 red and the rest green."""
    x, y = np.meshgrid(np.linspace(0, 2, n), np.linspace(0, 2, n), indexing="ij")
    coord = np.stack([x.ravel(), y.ravel(), np.zeros(n * n)], axis=1).astype(np.float32)
    color = np.where(coord[:, :1] < 1, np.uint8([RED]), np.uint8([GREEN]))
    return coord, color


def features_of(coord: np.ndarray) -> np.ndarray:
    """(n, 24) features that turn along x: distance along x alone decides how similar they are."""
    angle = coord[:, :1] * np.linspace(0.2, 1.5, 12)
    return np.concatenate([np.cos(angle), np.sin(angle)], axis=1)


def head_of(page: Path) -> dict[str, Any]:
    found = re.search(r'<script id="head"[^>]*>(.*?)</script>', page.read_text(), re.S)
    assert found
    return json.loads(found[1])


def array_of(page: Path, section: dict[str, Any]) -> np.ndarray:
    found = re.search(r'<script id="data"[^>]*>(.*?)</script>', page.read_text(), re.S)
    assert found
    data = gzip.decompress(base64.b64decode(found[1]))
    return np.frombuffer(data, section["type"], section["length"], section["at"])


class TestFile:
    def write(self, path: Path, **changes: Any) -> Path:
        coord, color = plate()
        arguments = {"title": "A plate"} | changes
        return write_page(
            path / "page.html", [PageCloud("plate", coord, {"own": color})], **arguments
        )

    def test_is_the_same_for_the_same_input(self, tmp_path: Path):
        first = self.write(tmp_path / "a").read_bytes()
        assert first == self.write(tmp_path / "b").read_bytes()
        assert first != self.write(tmp_path / "c", note="other").read_bytes()

    def test_names_no_other_file_and_forbids_to_load_any(self, tmp_path: Path):
        text = self.write(tmp_path).read_text()
        without_data = re.sub(r'<script id="data".*?</script>', "", text, flags=re.S)
        assert not re.search(
            r"https?:|//\w+\.\w|@import|url\(|\bsrc=|<link|\bfetch\(", without_data
        )
        assert "default-src 'none'" in text

    def test_keeps_texts_from_becoming_markup(self, tmp_path: Path):
        coord, color = plate(3)
        bad = "</script><img src=x onerror=alert(1)><!-- & \" '"
        page = write_page(
            tmp_path / "a.html", [PageCloud(bad, coord, {bad: color})], title=bad, classes=[bad]
        )
        assert "<img" not in page.read_text()
        assert head_of(page)["title"] == bad and head_of(page)["clouds"][0]["name"] == bad

    def test_holds_coordinates_to_within_what_it_states(self, tmp_path: Path):
        rng = np.random.default_rng(0)
        coord = rng.uniform(-7, 9, (500, 3)).astype(np.float32)
        page = write_page(
            tmp_path / "a.html", [PageCloud("a", coord, {"c": np.ones((500, 3))})], title="a"
        )
        cloud = head_of(page)["clouds"][0]
        planes = array_of(page, cloud["arrays"]["coord"]).reshape(3, 2, 500).astype(np.uint16)
        grid = np.cumsum(planes[:, 0] | planes[:, 1] << 8, axis=1, dtype=np.uint16).T
        back = grid * np.array(cloud["step"]) + np.array(cloud["low"])
        stated = float(re.search(r"up to ([\d.]+) mm", head_of(page)["facts"])[1]) / 1000  # type: ignore[index]
        assert 0.5 * stated < np.abs(back - coord).max() < stated + 1e-6

    def test_says_how_it_was_thinned(self, tmp_path: Path):
        assert "All 1,600 points are on this page." in head_of(self.write(tmp_path))["facts"]
        head = head_of(self.write(tmp_path, limit=300, picked=(0, 1599)))
        count = head["clouds"][0]["count"]
        assert 200 < count <= 301 and head["clouds"][0]["total"] == 1600
        assert f"Thinned: {count} of 1,600 points are on this page" in head["facts"]
        assert re.search(r"first in each cube of [\d.]+ cm", head["facts"])

    @pytest.mark.parametrize(
        ("cloud", "message"),
        [
            (PageCloud("a", np.zeros((0, 3)), {"c": np.zeros((0, 3))}), "n >= 1"),
            (PageCloud("a", np.full((2, 3), np.nan), {"c": np.zeros((2, 3))}), "NaN"),
            (PageCloud("a", np.zeros((2, 3)), {}), "at least one colouring"),
            (PageCloud("a", np.zeros((2, 3)), {"c": np.zeros((3, 3))}), "'c' has 3 rows for 2"),
            (PageCloud("a", np.zeros((2, 3)), {"c": np.zeros((2, 4))}), r"one colour \(3,\)"),
            (PageCloud("a", np.zeros((2, 3)), {"c": np.zeros((2, 3))}, label=[1]), "'label' has 1"),
        ],
    )
    def test_refuses_what_it_cannot_show(self, tmp_path: Path, cloud: PageCloud, message: str):
        with pytest.raises(ValueError, match=message):
            write_page(tmp_path / "a.html", [cloud], title="a")
        assert not (tmp_path / "a.html").exists()

    def test_refuses_parts_that_do_not_fit(self, tmp_path: Path):
        coord, color = plate(3)
        cloud = PageCloud("a", coord, {"c": color})
        nothing = np.zeros(9, np.int64)
        match = PageMatch((nothing, nothing), (nothing, nothing), (nothing > 0, nothing > 0))
        for clouds, more, message in [
            ([], {}, "at least one cloud"),
            ([cloud], {"match": match}, "two clouds, got 1"),
            ([cloud], {"coloring": "PCA"}, "no colouring 'PCA'"),
        ]:
            with pytest.raises(ValueError, match=message):
                write_page(tmp_path / "a.html", clouds, title="a", **more)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip(
        "playwright.sync_api", reason="needs Playwright: pip install 'point_jax[browser]'"
    )
    executable = os.environ.get("POINT_JAX_BROWSER") or next(
        filter(None, map(shutil.which, BROWSERS)), None
    )
    if executable is None:
        pytest.skip(f"needs a browser: none of {', '.join(BROWSERS)} is installed")
    flags = ["--use-gl=angle", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"]
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        flags.append("--no-sandbox")  # Chromium's sandbox does not start as root
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=executable, args=flags)
        yield chromium
        chromium.close()


class Opened:
    """A page in the browser, with what a person could do to it, and what went wrong meanwhile."""

    def __init__(self, browser: Any, file: Path, **context: Any):
        size = {"width": 900, "height": 600}
        self.context = browser.new_context(viewport=size, **context)
        self.page = self.context.new_page()
        self.requests: list[str] = []
        self.faults: list[str] = []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("console", lambda message: self.faults.append(message.text))
        self.page.on("pageerror", lambda error: self.faults.append(str(error)))
        self.page.goto(file.as_uri())
        self.page.wait_for_selector('html[data-ready="yes"]', timeout=30_000)

    def image(self, marks: bool = False) -> np.ndarray:
        """(h, w, 3) the picture once it rests, without the marks on it unless they are wanted."""
        self.page.evaluate('document.getElementById("points").dataset.samples = ""')
        self.page.evaluate("pointPage.setColoring(pointPage.state.coloring)")  # draws anew
        self.page.wait_for_selector('#points[data-samples="2"]', timeout=30_000)
        visibility = "document.getElementById('overlay').style.visibility"
        self.page.evaluate(f"{visibility} = '{'visible' if marks else 'hidden'}'")
        shot = self.page.locator("#stage").screenshot()
        return np.asarray(Image.open(io.BytesIO(shot)).convert("RGB")).astype(int)

    def where(self, number: int, cloud: int = 0) -> tuple[float, float]:
        x, y, _ = self.page.evaluate(f"pointPage.where({cloud}, {number})")
        return x, y

    def click(self, number: int, cloud: int = 0) -> None:
        x, y = self.where(number, cloud)
        self.page.mouse.click(x, y)

    def drag(self, dx: float, dy: float, button: str = "left") -> None:
        self.page.mouse.move(300, 500)
        self.page.mouse.down(button=button)
        self.page.mouse.move(300 + dx / 2, 500 + dy / 2)
        self.page.mouse.move(300 + dx, 500 + dy)
        self.page.mouse.up(button=button)

    def picked(self) -> dict[str, str]:
        names = self.page.locator("#picked dt").all_text_contents()
        return dict(zip(names, self.page.locator("#picked dd").all_text_contents(), strict=True))

    def camera(self) -> dict[str, Any]:
        text = (
            "(({azimuth, elevation, distance, target}) => ({azimuth, elevation, distance, target}))"
        )
        return self.page.evaluate(f"{text}(pointPage.camera)")


@pytest.fixture
def open_page(browser: Any) -> Iterator[Any]:
    opened: list[Opened] = []

    def start(file: Path, **context: Any) -> Opened:
        opened.append(Opened(browser, file, **context))
        return opened[-1]

    yield start
    for one in opened:
        # Whatever a test does: nothing may be loaded, and nothing may go wrong.
        assert one.requests == [one.page.url]
        assert one.faults == []
        one.context.close()


def like(image: np.ndarray, color: tuple[int, int, int]) -> np.ndarray:
    """(h, w) bool: pixels of a hue, however shaded."""
    ratio = image / np.maximum(image.max(axis=2, keepdims=True), 1)
    near = np.abs(ratio - np.array(color) / max(color)).max(axis=2) < 0.12
    return near & (image.max(axis=2) > 60)


def middle(mask: np.ndarray) -> tuple[float, float]:
    y, x = np.nonzero(mask)
    assert len(x) > 3
    return float(x.mean()) + 0.5, float(y.mean()) + 0.5


def write_plate(folder: Path, normals: bool) -> Path:
    """A plate in red and green with a small blue post above one corner."""
    coord, color = plate()
    post = np.array([[1.9, 0.1, z] for z in np.linspace(0.5, 0.6, 4)], np.float32)
    coord = np.concatenate([coord, post])
    color = np.concatenate([color, np.tile(np.uint8([BLUE]), (4, 1))])
    normal = np.tile(np.float32([0, 0, 1]), (1604, 1)) if normals else None
    label = np.append((coord[:1600, 0] >= 1).astype(np.int32), [-1] * 4)
    return write_page(
        folder / "page.html",
        [PageCloud("plate", coord, {"own": color, "grey": color * 0 + 128}, normal, label,
                   origin=(500_000.0, 0.0, 0.0))],
        title="A plate",
        classes=["left", "right"],
        keys={"own": [KeyEntry("left half", RED, 0.5), KeyEntry("right half", GREEN, 0.5)]},
        similarity=cosine_codes([features_of(coord)]),
    )  # fmt: skip


@pytest.fixture(scope="module")
def plate_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_plate(tmp_path_factory.mktemp("plate"), normals=True)


class TestInBrowser:
    def test_draws_points_where_its_camera_says_in_their_colors(self, open_page, plate_page):
        shown = open_page(plate_page)
        image = shown.image()
        red, green = like(image, RED), like(image, GREEN)
        assert red.mean() > 0.05 and green.mean() > 0.05
        for number, mask in ((20 + 5 * 40, red), (20 + 35 * 40, green), (1602, like(image, BLUE))):
            x, y = shown.where(number)
            assert mask[int(y) - 2 : int(y) + 3, int(x) - 2 : int(x) + 3].mean() > 0.7
        assert np.allclose(middle(like(image, BLUE)), shown.where(1602), atol=6)

    def test_the_key_says_what_the_shown_colors_mean(self, open_page, plate_page):
        shown = open_page(plate_page)
        key = shown.page.locator("#key")
        assert key.locator("li").all_inner_texts() == ["left half\n50 %", "right half\n50 %"]
        patch = key.locator("i").first
        assert patch.evaluate("e => getComputedStyle(e).backgroundColor") == f"rgb{RED}"
        shown.page.locator('input[value="grey"]').click()
        assert not key.is_visible()

    def test_turns_by_dragging(self, open_page, plate_page):
        shown = open_page(plate_page)
        before, was = shown.image(), shown.camera()
        place = shown.where(1602)
        shown.drag(200, -40)
        after, now = shown.image(), shown.camera()
        assert now["azimuth"] == pytest.approx(was["azimuth"] - 0.006 * 200)
        assert now["elevation"] == pytest.approx(was["elevation"] - 0.006 * 40)
        assert np.abs(after - before).max(axis=2).astype(bool).mean() > 0.1
        assert np.hypot(*np.subtract(shown.where(1602), place)) > 100
        assert np.allclose(middle(like(after, BLUE)), shown.where(1602), atol=6)
        assert shown.picked() == {}  # a drag is no click

    def test_moves_by_dragging_with_the_right_button(self, open_page, plate_page):
        shown = open_page(plate_page)
        shown.image()
        target = shown.camera()["target"]
        before = middle(like(shown.image(), RED) | like(shown.image(), GREEN))
        shown.drag(60, -30, "right")
        after = middle(like(shown.image(), RED) | like(shown.image(), GREEN))
        assert np.allclose(np.subtract(after, before), (60, -30), atol=6)
        assert shown.camera()["target"] != target

    def test_zooms_about_the_mouse(self, open_page, plate_page):
        shown = open_page(plate_page)
        x, y = shown.where(20 + 20 * 40)
        size = like(shown.image(), GREEN).sum()
        far = shown.camera()["distance"]
        shown.page.mouse.move(x, y)
        shown.page.mouse.wheel(0, 300)
        assert np.hypot(*np.subtract(shown.where(20 + 20 * 40), (x, y))) < 12
        assert like(shown.image(), GREEN).sum() < 0.75 * size
        shown.page.mouse.wheel(0, -600)
        assert shown.camera()["distance"] < 0.95 * far

    def test_touch_turns_pinches_and_picks(self, open_page, plate_page):
        shown = open_page(plate_page, has_touch=True)
        shown.image()
        client = shown.context.new_cdp_session(shown.page)

        def touch(kind: str, *points: tuple[float, float]) -> None:
            touches = [{"x": x, "y": y, "id": i} for i, (x, y) in enumerate(points)]
            client.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": touches})

        was = shown.camera()
        touch("touchStart", (200, 300))
        touch("touchMove", (240, 300))
        touch("touchMove", (280, 300))
        touch("touchEnd")
        assert shown.camera()["azimuth"] < was["azimuth"] - 0.2
        distance = shown.camera()["distance"]
        touch("touchStart", (250, 300), (350, 300))
        touch("touchMove", (200, 300), (400, 300))
        touch("touchEnd")
        assert shown.camera()["distance"] == pytest.approx(distance / 2, rel=0.1)
        assert shown.picked() == {}
        shown.page.locator("#reset").click()
        shown.image()
        shown.page.touchscreen.tap(*shown.where(1602))
        assert 1600 <= int(shown.picked()["point"]) <= 1603

    @pytest.mark.parametrize("normals", [True, False])
    def test_picks_the_clicked_point_and_tells_what_it_is(self, open_page, tmp_path, normals):
        shown = open_page(write_plate(tmp_path, normals))
        shown.image()
        coord, _ = plate()
        for number, name in ((20 + 5 * 40, "left"), (20 + 35 * 40, "right")):
            shown.click(number)
            told = shown.picked()
            assert told["point"] == str(number) and told["class"] == name
            x, y, z = map(float, told["x, y, z"].removesuffix(" m").split(", "))
            np.testing.assert_allclose((x - 500_000, y, z), coord[number], atol=1e-3)
        shown.click(1601)
        assert shown.picked()["class"] == "none"
        shown.page.mouse.click(20, 20)  # nothing there: the pick stays
        assert shown.picked()["class"] == "none"

    def test_colors_by_similarity_to_the_picked_point(self, open_page, plate_page):
        shown = open_page(plate_page)
        shown.page.get_by_label("similarity to the picked point").check()
        picked = 20 + 3 * 40
        shown.image()
        shown.click(picked)
        assert shown.picked()["point"] == str(picked)
        image, hottest, coldest = shown.image(), np.array(RAMP[-1]), np.array(RAMP[0])
        x, y = map(int, shown.where(picked))
        assert np.abs(image[y, x] - hottest).max() < 40
        x, y = map(int, shown.where(20 + 39 * 40))
        assert np.abs(image[y, x] - coldest).max() < 40
        legend = shown.page.locator("#knots li").all_text_contents()
        assert legend[-1].startswith("1.00") and legend[-1].endswith("highest")
        shown.page.get_by_label("own", exact=True).check()
        assert like(shown.image(), RED).mean() > 0.05

    def test_its_cosines_and_heat_are_those_of_the_library(self, open_page, plate_page):
        shown = open_page(plate_page)
        picked = 400
        told = shown.page.evaluate(
            f"(() => {{ const rows = cosines(pointPage.head, {{cloud: 0, point: {picked}}});"
            "const knots = scaleOf(pointPage.head, rows);"
            "return [[...rows[0]], knots, [...rows[0]].map((v) => heat(v, knots))] })()"
        )
        cosine, knots, places = map(np.array, told)
        coord = np.concatenate([plate()[0], [[1.9, 0.1, z] for z in np.linspace(0.5, 0.6, 4)]])
        features = features_of(coord.astype(np.float32))
        codes: CosineCodes = cosine_codes([features])
        exact = cosine_similarity(features, features[picked : picked + 1])[0]
        assert np.abs(cosine - exact).max() <= 1.2 * codes.worst < 0.05
        np.testing.assert_allclose(knots, heat_scale(cosine), atol=1e-6)
        np.testing.assert_allclose(places, heat(cosine, knots), atol=1e-4)

    def test_is_usable_by_keyboard(self, open_page, plate_page):
        shown = open_page(plate_page)
        keys = shown.page.keyboard
        keys.press("Tab")
        assert shown.page.evaluate("document.activeElement.id") == "points"
        was = shown.camera()
        keys.press("ArrowLeft")
        keys.press("ArrowUp")
        keys.press("+")
        now = shown.camera()
        assert now["azimuth"] != was["azimuth"] and now["elevation"] != was["elevation"]
        assert now["distance"] < was["distance"]
        keys.press("Shift+ArrowRight")
        assert shown.camera()["target"] != now["target"]
        keys.press("0")
        assert shown.camera() == was
        keys.press("Enter")
        assert shown.picked()["point"].isdigit()
        keys.press("Escape")
        assert shown.picked() == {}
        keys.press("c")
        assert shown.page.locator("#colorings input:checked").get_attribute("value") == "grey"
        size = shown.page.evaluate("pointPage.state.size")
        keys.press("]")
        assert shown.page.evaluate("pointPage.state.size") > size

    def test_picks_by_number(self, open_page, plate_page):
        shown = open_page(plate_page)
        field = shown.page.get_by_label("Number of the point")
        field.fill("1234")
        field.press("Enter")
        assert shown.picked()["point"] == "1234"
        field.fill("1604")
        field.press("Enter")
        assert shown.picked() == {"none": "points are 0 to 1603"}

    def test_larger_points_cover_more(self, open_page, plate_page):
        shown = open_page(plate_page)
        before = like(shown.image(), BLUE).sum()
        shown.page.locator("#size").fill("2")
        assert like(shown.image(), BLUE).sum() > 4 * before

    def test_follows_the_dark_theme_and_its_button(self, open_page, plate_page):
        light, dark = open_page(plate_page), open_page(plate_page, color_scheme="dark")
        assert light.image()[5, 5].min() > 230
        assert dark.image()[5, 5].max() < 40
        dark.page.locator("#theme").click()
        assert dark.image()[5, 5].min() > 230

    def test_thinned_points_keep_their_numbers(self, open_page, tmp_path):
        coord, color = plate()
        page = write_page(
            tmp_path / "a.html", [PageCloud("a", coord, {"own": color})], title="a", limit=400,
            picked=(0, 1599),
        )  # fmt: skip
        shown = open_page(page)
        assert shown.picked()["point"] == "1599"
        x, y, _ = map(float, shown.picked()["x, y, z"].removesuffix(" m").split(", "))
        assert (x, y) == (2.0, 2.0)
        assert "Thinned" in shown.page.locator("#facts").text_content()
        kept = set(
            np.cumsum(array_of(page, head_of(page)["clouds"][0]["arrays"]["index"])).tolist()
        )
        missing = next(i for i in range(1600) if i not in kept)
        field = shown.page.get_by_label("Number of the point")
        field.fill(str(missing))
        field.press("Enter")
        assert "left out" in shown.picked()["none"]

    def test_hides_ceilings_and_backs_until_asked_not_to(self, open_page, tmp_path):
        coord, color = plate()
        ceiling = coord + np.float32([0, 0, 1.6])
        up, down = np.tile([[0.0, 0, 1]], (1600, 1)), np.tile([[0.0, 0, -1]], (1600, 1))
        room = PageCloud(
            "room",
            np.concatenate([coord, ceiling]),
            {"own": np.concatenate([color, np.tile(np.uint8([BLUE]), (1600, 1))])},
            np.concatenate([up, down]),
        )
        shown = open_page(write_page(tmp_path / "a.html", [room], title="a"))
        assert like(shown.image(), BLUE).mean() < 0.001 < like(shown.image(), RED).mean()
        shown.page.locator("#cut").fill("1")
        assert like(shown.image(), BLUE).mean() < 0.001  # still seen from behind
        shown.page.locator("#backs").uncheck()
        assert like(shown.image(), BLUE).mean() > 0.01

    def test_shows_the_match_of_the_clicked_point(self, open_page, tmp_path):
        coord, color = plate()
        back = np.arange(1600)[::-1].copy()
        score = np.full(1600, 0.75)
        clouds = [
            PageCloud(name, coord, {"own": color}, label=np.arange(1600) % 3) for name in "ab"
        ]
        match = PageMatch(
            (back, back), (score, score), (back % 2 == 0, back % 2 == 0), [[0, 1599], [780, 819]],
            [RED, BLUE], known=np.ones(1600, bool), correct=np.arange(1600) < 800, within=0.1,
        )  # fmt: skip
        shown = open_page(
            write_page(tmp_path / "a.html", clouds, title="a", mode="match", match=match)
        )
        shown.image()
        with_lines = shown.image(marks=True)
        shown.page.locator("#lines").uncheck()
        drawn = np.abs(with_lines - shown.image(marks=True)).max(axis=2) > 30
        ends = [shown.where(0, 0), shown.where(1599, 1)]
        x, y = np.mean(ends, axis=0).astype(int)
        assert drawn[y - 4 : y + 5, x - 4 : x + 5].any()
        assert 200 < drawn.sum() < 0.05 * drawn.size
        for number, mutual, right in ((820, "no", "no"), (421, "yes", "yes, within 0.1 m")):
            shown.click(number)
            told = shown.picked()
            assert told["cloud"] == "a" and told["point"] == str(number)
            assert told["match"] == f"point {1599 - number} of b" and told["cosine"] == "0.750"
            assert told["mutual"] == mutual and told["right"] == right
            assert told["its class"] == f"class {(1599 - number) % 3}"
        shown.click(5, cloud=1)
        assert shown.picked()["match"] == "point 1594 of a" and "right" not in shown.picked()

    @pytest.mark.parametrize("n", [1, 2, 6])
    def test_shows_a_handful_of_points(self, open_page, tmp_path, n):
        coord = np.linspace(0, 1, 3 * n).reshape(n, 3) if n > 2 else np.ones((n, 3))
        clouds = [
            PageCloud(name, coord, {"own": np.tile(np.uint8([RED]), (n, 1))}) for name in "ab"
        ]
        shown = open_page(write_page(tmp_path / "a.html", clouds, title="a"))
        assert like(shown.image(), RED).sum() > 20
        shown.click(0)
        assert shown.picked()["cloud"] in "ab"

    def test_says_so_without_webgl(self, browser, plate_page):
        context = browser.new_context()
        context.add_init_script("HTMLCanvasElement.prototype.getContext = () => null")
        page = context.new_page()
        page.goto(plate_page.as_uri())
        page.wait_for_selector("#message:has-text('has no WebGL 2')")
        context.close()
