import json
import os
import queue
import re
import shutil
import signal
import subprocess
import threading
from collections.abc import Iterable, Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from smtc.errors import UserError
from smtc.viewer import LIMIT, Pixels, open_viewer
from smtc.visualize import object_palette


def write_viewer(
    path: Path,
    title: str,
    frames: Iterable[Pixels],
    masks: Iterable[Pixels],
    *,
    fps: float,
    scores: Iterable[Mapping[int, float]],
    limit: int = LIMIT,
) -> Path:
    """A page of frames, masks and scores that run in parallel."""
    with open_viewer(path, title, fps=fps, limit=limit) as add:
        for frame, mask, found in zip(frames, masks, scores, strict=True):
            add(frame, mask, found)
    return path


BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")

HELPERS = """
const drawn = (number) => new Promise((done) => {
  const look = () => canvas.dataset.frame === String(number) ? done() : setTimeout(look, 5);
  look();
});
const key = (name, target = document.body, more = {}) => target.dispatchEvent(
  new KeyboardEvent("keydown", { key: name, bubbles: true, cancelable: true, ...more }));
const at = (x, y) => [...context.getImageData(x, y, 1, 1).data].slice(0, 3);
const slide = (input, value) => { input.value = value; input.dispatchEvent(new Event("input")); };
const hover = (x, y) => {
  const box = canvas.getBoundingClientRect(), scale = box.width / canvas.width;
  canvas.dispatchEvent(new PointerEvent("pointermove",
    { clientX: box.left + (x + 0.5) * scale, clientY: box.top + (y + 0.5) * scale }));
};
const boxes = () => [...document.querySelectorAll("#objects input")];
const said = (id) => document.getElementById(id).textContent;
const result = {};
"""


def colour_of(number: int) -> list[int]:
    """Says which frame it is."""
    return [20 * number + 20, 20 * number + 20, 100]


def plain(number: int, size: tuple[int, int] = (48, 64)) -> Pixels:
    """A frame of one colour."""
    return np.full((*size, 3), colour_of(number), np.uint8)


def boxes_of(number: int, size: tuple[int, int] = (48, 64)) -> Pixels:
    """Object 2 stays on the left; object 200 is on the right of even frames."""
    mask = np.zeros(size, np.uint8)
    mask[8:40, 4:20] = 2
    if number % 2 == 0:
        mask[8:40, 40:60] = 200
    return mask


def film(count: int, **size: Any) -> tuple[Iterator[Pixels], Iterator[Pixels], list[Any]]:
    frames = (plain(number % 10, **size) for number in range(count))
    masks = (boxes_of(number, **size) for number in range(count))
    scores = [
        {2: 0.5 + number / 100} | ({200: 0.25} if number % 2 == 0 else {})
        for number in range(count)
    ]
    return frames, masks, scores


def write(path: Path, count: int, **options: Any) -> Path:
    frames, masks, scores = film(count, **options.pop("film", {}))
    return write_viewer(path, "A film", frames, masks, scores=scores, fps=10, **options)


def data_of(page: Path) -> dict[str, Any]:
    found = re.search(
        r'<script id="data" type="application/json">(.*?)</script>', page.read_text(), re.DOTALL
    )
    assert found
    return dict(json.loads(found[1]))


def browse(page: Path, script: str) -> dict[str, Any]:
    """Open the page in a browser, run a script in it and return the `result` that it filled."""
    assert BROWSER is not None
    ending = """} catch (error) { result.error = String(error); }
        fetch("/result", { method: "POST", body: JSON.stringify(result) }); })();"""
    code = f"<script>{HELPERS}(async () => {{ try {{ {script}\n{ending}</script></body>"
    # What the page may not do, and its driver must: tell this process.
    allowed = "default-src 'none'; connect-src 'self';"
    text = page.read_text().replace("default-src 'none';", allowed).replace("</body>", code)
    told: queue.Queue[bytes] = queue.Queue()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/" else 404)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(text.encode() if self.path == "/" else b"")

        def do_POST(self) -> None:
            told.put(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"]
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        command += [f"--user-data-dir={page.parent / 'profile'}"]
        browser = subprocess.Popen(
            [*command, f"http://127.0.0.1:{server.server_port}/"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            result = dict(json.loads(told.get(timeout=60)))
        finally:
            os.killpg(browser.pid, signal.SIGKILL)
            browser.wait()
            server.shutdown()
    assert "error" not in result, result
    return result


def close(pixel: list[int], wanted: Any, by: int = 3) -> bool:
    return bool(np.abs(np.subtract(pixel, wanted)).max() <= by)


@needs_browser
def test_the_browser_draws_frames_under_their_masks(tmp_path: Path) -> None:
    told = browse(
        write(tmp_path / "film.html", 3),
        """
        await drawn(0);
        result.plain = at(30, 20);
        result.half = at(10, 20);
        result.edges = [at(4, 20), at(19, 20), at(10, 8), at(10, 39)];
        result.other = at(50, 20);
        result.size = [canvas.width, canvas.height];
        slide(opacity, 100);
        result.full = [at(10, 20), at(50, 20)];
        slide(opacity, 0);
        result.none = [at(10, 20), at(4, 20)];
        """,
    )
    colours = object_palette().astype(int)
    assert told["size"] == [64, 48]
    assert close(told["plain"], colour_of(0))
    assert close(told["half"], (colours[2] + colour_of(0)) / 2)
    assert close(told["other"], (colours[200] + colour_of(0)) / 2)
    assert told["edges"] == [colours[2].tolist()] * 4
    assert told["full"] == [colours[2].tolist(), colours[200].tolist()]
    assert all(close(pixel, colour_of(0)) for pixel in told["none"])


@needs_browser
def test_keys_the_slider_and_play_choose_the_frame(tmp_path: Path) -> None:
    told = browse(
        write(tmp_path / "film.html", 4),
        """
        const look = () => [at(30, 20)[0], Number(slider.value), said("place")];
        await drawn(0);
        key("ArrowRight"); await drawn(1); result.right = look();
        key("ArrowRight", opacity); result.ignored = wanted;
        key("End"); await drawn(3); result.end = look();
        key("ArrowRight"); await drawn(3); result.beyond = wanted;
        key("ArrowLeft"); await drawn(2); result.left = look();
        key("Home"); await drawn(0); result.home = look();
        slide(slider, 2); await drawn(2); result.slid = look();
        key("ArrowLeft", document.body, { ctrlKey: true }); result.control = wanted;
        result.hurried = [];
        new MutationObserver(() => result.hurried.push(canvas.dataset.frame)).observe(
          canvas, { attributes: true });
        slide(slider, 0); slide(slider, 3); await drawn(3); slide(slider, 2); await drawn(2);
        result.button = [said("play")];
        key(" "); result.button.push(said("play"));
        key(" ", find("play")); result.button.push(said("play"));
        key(" "); result.button.push(said("play"));
        key("End"); await drawn(3);
        find("play").click();
        await drawn(0); await drawn(3);
        await new Promise((done) => setTimeout(done, 300));
        result.ended = [said("play"), wanted];
        """,
    )
    assert close(told["right"][:1], [40]) and told["right"][1:] == [1, "1 of 0 … 3"]
    assert told["ignored"] == 1
    assert close(told["end"][:1], [80]) and told["end"][1:] == [3, "3 of 0 … 3"]
    assert told["beyond"] == 3
    assert close(told["left"][:1], [60]) and close(told["home"][:1], [20])
    assert told["slid"][1:] == [2, "2 of 0 … 3"] and close(told["slid"][:1], [60])
    assert told["control"] == 2
    assert told["hurried"][:2] == ["3", "2"]  # never the one that was left at once
    # The button itself takes the space bar as a click.
    assert told["button"] == ["Play", "Pause", "Pause", "Play"]
    assert told["ended"] == ["Play", 3]


@needs_browser
def test_objects_can_be_hidden_and_pointed_at(tmp_path: Path) -> None:
    told = browse(
        write(tmp_path / "film.html", 2),
        """
        await drawn(0);
        result.list = [...document.querySelectorAll("#objects label")].map((l) => l.textContent);
        result.swatch = document.querySelector(".swatch").style.background;
        hover(10, 20); result.left = said("under");
        hover(50, 20); result.right = said("under");
        result.marked = document.querySelector("#objects .under").textContent;
        hover(30, 20); result.between = said("under");
        const corners = [[4, 8], [19, 39], [40, 39], [59, 8], [3, 8], [4, 40], [60, 8]];
        result.corners = corners.map(([x, y]) => { hover(x, y); return under; });
        slide(opacity, 100);
        boxes()[0].click();
        result.hidden = [at(10, 20), at(50, 20)];
        key("ArrowRight"); await drawn(1);
        result.later = [at(10, 20), said("objects")];
        boxes()[0].click();
        result.back = at(10, 20);
        """,
    )
    colours = object_palette().tolist()
    assert told["list"] == ["object 20.50", "object 2000.25"]
    assert told["swatch"] == "rgb({}, {}, {})".format(*colours[2])
    assert told["left"] == "object 2, score 0.50"
    assert told["right"] == "object 200, score 0.25"
    assert told["marked"] == "object 2000.25"
    assert told["between"] == ""
    assert told["corners"] == [2, 2, 200, 200, 0, 0, 0]
    assert close(told["hidden"][0], colour_of(0)) and told["hidden"][1] == colours[200]
    assert close(told["later"][0], colour_of(1))
    assert told["later"][1] == "object 20.51object 200–"
    assert told["back"] == colours[2]


@needs_browser
def test_a_title_is_text_and_a_long_film_says_what_it_leaves_out(tmp_path: Path) -> None:
    title = '</script><b id="bold">&amp; "quoted"'
    frames, masks, scores = film(9)
    page = write_viewer(tmp_path / "film.html", title, frames, masks, scores=scores, fps=1, limit=4)
    told = browse(
        page,
        """
        key("End"); await drawn(8);
        result.grey = at(30, 20)[0];
        result.titles = [document.title, document.querySelector("h1").textContent];
        result.bold = document.getElementById("bold");
        result.note = said("note");
        const delays = [], real = window.setTimeout;
        window.setTimeout = (next, delay) => { delays.push(delay); return real(next, 0); };
        key(" ");
        while (said("play") === "Pause") await new Promise((done) => real(done, 5));
        result.longest = Math.max(...delays);
        """,
    )
    assert told["titles"] == [title, title] and told["bold"] is None
    assert told["note"].startswith("Every 4th of 9 frames. ")
    assert close([told["grey"]], [180])
    # As long as the four frames that each one stands for.
    assert 1000 < told["longest"] <= 4000


@pytest.mark.parametrize(
    ("count", "limit", "numbers"),
    [
        (1, 1, [0]),
        (4, 4, [0, 1, 2, 3]),
        (5, 4, [0, 2, 4]),
        (8, 4, [0, 2, 4, 6]),
        (9, 4, [0, 4, 8]),
        (17, 4, [0, 8, 16]),
        (3, 1, [0]),
    ],
)
def test_frames_are_sampled_evenly(
    tmp_path: Path, count: int, limit: int, numbers: list[int]
) -> None:
    data = data_of(write(tmp_path / "film.html", count, limit=limit))
    assert [frame["number"] for frame in data["frames"]] == numbers
    assert [frame["scores"]["2"] for frame in data["frames"]] == [0.5 + n / 100 for n in numbers]
    assert (data["total"], data["fps"], data["ids"]) == (count, 10, [2, 200])
    assert data["stride"] == (numbers[1] if len(numbers) > 1 else data["stride"])


def test_wide_frames_are_made_smaller_and_narrow_ones_kept(tmp_path: Path) -> None:
    wide = data_of(write(tmp_path / "wide.html", 1, film={"size": (481, 1283)}))
    assert wide["size"] == [640, 240]
    assert wide["ids"] == [2, 200]  # and no mixtures of them
    narrow = data_of(write(tmp_path / "narrow.html", 1, film={"size": (900, 600)}))
    assert narrow["size"] == [600, 900]


def test_only_compressed_frames_are_held(tmp_path: Path) -> None:
    """Of an endless film no more than `limit` frames are kept at any time."""
    with open_viewer(tmp_path / "film.html", "x", fps=10, limit=5) as add:
        held = add.__self__  # type: ignore[attr-defined]
        most = 0
        for number in range(200):
            add(plain(number % 10), boxes_of(number), {})
            most = max(most, len(held.frames))
    assert most == 5


def test_the_page_needs_no_network(tmp_path: Path) -> None:
    text = write(tmp_path / "film.html", 2).read_text()
    assert "default-src 'none'" in text
    assert not re.findall(r"https?:|src=|href=|@import|url\(", text)


def test_nothing_half_written_stays(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no frames to show in .*film\.html"):
        write(tmp_path / "film.html", 0)

    def broken() -> Iterator[Pixels]:
        yield plain(0)
        raise UserError("frame 1 is damaged")

    with pytest.raises(UserError, match="damaged"):
        write_viewer(tmp_path / "film.html", "x", broken(), film(2)[1], scores=[{}] * 2, fps=10)
    with pytest.raises(UserError, match=r"absent.*film\.html cannot be written \(No such file"):
        write(tmp_path / "absent" / "film.html", 1)
    (tmp_path / "taken.html").mkdir()
    with pytest.raises(UserError, match=r"taken\.html cannot be written"):
        write(tmp_path / "taken.html", 1)
    assert [path.name for path in tmp_path.iterdir()] == ["taken.html"]


def test_a_full_disk_is_told_and_an_earlier_page_kept(mounted: Any) -> None:
    page = mounted("size=64k") / "film.html"
    before = write(page, 1).read_bytes()
    noise = (np.random.default_rng(n).integers(0, 256, (200, 300, 3), np.uint8) for n in range(9))
    masks = (np.zeros((200, 300), np.uint8) for _ in range(9))
    with pytest.raises(UserError, match="No space left on device"):
        write_viewer(page, "x", noise, masks, scores=[{}] * 9, fps=10)
    assert page.read_bytes() == before
    assert [path.name for path in page.parent.iterdir()] == ["film.html"]


def test_what_does_not_fit_together_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"mask: expected \[48, 64\], got \[48, 65\]"):
        write_viewer(
            tmp_path / "a.html", "x", [plain(0)], [np.zeros((48, 65), np.uint8)], scores=[{}], fps=1
        )
    with pytest.raises(ValueError, match="limit: expected at least 1"):
        write(tmp_path / "a.html", 1, limit=0)
