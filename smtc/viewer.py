"""A segmented video as one HTML page that needs nothing else: no network, no files beside it."""

import base64
import html
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import cv2
import numpy as np
from numpy.typing import NDArray

from smtc.errors import UserError
from smtc.visualize import object_palette

Pixels = NDArray[np.uint8]
Add = Callable[[Pixels, Pixels, Mapping[int, float]], None]

LIMIT = 300
"""The most frames of a page; of a longer video every 2nd, 4th, … is kept."""
WIDTH = 640
"""The most pixels of a frame's width."""
JPEG_QUALITY = 85


@dataclass(frozen=True)
class _Frame:
    number: int
    image: bytes
    """JPEG."""
    mask: bytes
    """Grey PNG, a value an id."""
    scores: dict[int, float]


@contextmanager
def open_viewer(
    path: str | Path,
    title: str,
    *,
    fps: float,
    limit: int = LIMIT,
    kind: str = "object",
    first: int = 1,
) -> Iterator[Add]:
    """A function that adds a frame (RGB uint8 `[h,w,3]`, all of one size), its mask (ids uint8
    `[h,w]`, 0 is background) and the scores of its ids to a page that plays them.

    At most `limit` small compressed frames are held. On the page id 1 is called `kind` and `first`.
    It appears, whole, when the block ends well. Raises `UserError` for no frames and where it
    cannot be written.
    """
    collected = _Collected(limit)
    yield collected.add
    if not collected.frames:
        raise UserError(f"There are no frames to show in {path}.")
    path = Path(path)
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("w", encoding="utf-8") as file:
            names = {id: f"{kind} {id + first - 1}" for id in sorted(collected.ids)}
            _write_page(file, title, fps, collected, names)
        partial.replace(path)
    except OSError as error:
        raise UserError(
            f"{path} cannot be written ({error.strerror or error}); choose another place."
        ) from error
    finally:
        partial.unlink(missing_ok=True)


class _Collected:
    """Every frame whose number is a multiple of `stride`, the least power of two with which there
    are not more than `limit`.
    """

    def __init__(self, limit: int) -> None:
        if limit < 1:
            raise ValueError(f"limit: expected at least 1, got {limit}")
        self.limit = limit
        self.stride = 1
        self.total = 0
        self.size = (0, 0)
        """Width and height of the frames as they are kept."""
        self.ids: set[int] = set()
        """Of the frames that are kept, and of some that were."""
        self.frames: list[_Frame] = []

    def add(self, frame: Pixels, mask: Pixels, scores: Mapping[int, float]) -> None:
        if frame.shape[:2] != mask.shape:
            raise ValueError(f"mask: expected {list(frame.shape[:2])}, got {list(mask.shape)}")
        number, self.total = self.total, self.total + 1
        if number % self.stride:
            return
        height, width = mask.shape
        if width > WIDTH:
            size = WIDTH, max(1, round(height * WIDTH / width))
            frame = np.asarray(cv2.resize(frame, size, interpolation=cv2.INTER_AREA), np.uint8)
            mask = np.asarray(cv2.resize(mask, size, interpolation=cv2.INTER_NEAREST), np.uint8)
        self.size = mask.shape[1], mask.shape[0]
        image = _encode(".jpg", frame[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])
        self.frames.append(_Frame(number, image, _encode(".png", mask, []), dict(scores)))
        self.ids |= set(np.unique(mask).tolist()) - {0}
        if len(self.frames) > self.limit:
            self.stride *= 2
            self.frames = [kept for kept in self.frames if kept.number % self.stride == 0]


def _encode(kind: str, image: Pixels, options: list[int]) -> bytes:
    done, data = cv2.imencode(kind, np.ascontiguousarray(image), options)
    assert done
    return data.tobytes()


def _write_page(
    file: IO[str], title: str, fps: float, collected: _Collected, names: Mapping[int, str]
) -> None:
    head, tail = _PAGE.split("@DATA@")
    head = head.replace("@TITLE@", html.escape(title))
    settings = {
        "fps": fps,
        "stride": collected.stride,
        "total": collected.total,
        "size": collected.size,
        "ids": list(names),
        "names": names,
        "palette": object_palette().tolist(),
    }
    file.write(head + json.dumps(settings)[:-1] + ', "frames": [\n')
    for index, frame in enumerate(collected.frames):
        file.write((",\n" if index else "") + json.dumps(_entry(frame)))
    file.write("\n]}" + tail)


def _entry(frame: _Frame) -> dict[str, Any]:
    return {
        "number": frame.number,
        "image": "data:image/jpeg;base64," + base64.b64encode(frame.image).decode(),
        "mask": "data:image/png;base64," + base64.b64encode(frame.mask).decode(),
        "scores": frame.scores,
    }


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>@TITLE@</title>
<style>
:root { color-scheme: light dark; --paper: #fafaf8; --ink: #26282e; --soft: #5c6069;
  --line: #d6d6d2; --mark: #ebebe6; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #17181c; --ink: #ececea; --soft: #a5a9b2; --line: #3a3d45; --mark: #2a2c33; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 62rem; background: var(--paper);
  color: var(--ink); font: 1rem/1.5 system-ui, sans-serif; }
h1 { margin: 0; font-size: 1.25rem; overflow-wrap: anywhere; }
p { margin: 0 0 .75rem; color: var(--soft); }
main { display: flex; flex-wrap: wrap; gap: 1.25rem; align-items: flex-start; }
#film { flex: 1 1 24rem; min-width: 0; }
canvas { display: block; width: 100%; background: #000; border-radius: 4px; }
.row { display: flex; align-items: center; gap: .75rem; margin-top: .75rem; }
.row input { flex: 1; min-width: 0; }
button { min-width: 5rem; padding: .35rem .75rem; font: inherit; color: inherit; cursor: pointer;
  background: var(--mark); border: 1px solid var(--line); border-radius: 4px; }
output { min-width: 8.5rem; color: var(--soft); font-variant-numeric: tabular-nums; }
fieldset { flex: 0 1 15rem; margin: 0; padding: .5rem .75rem; border: 1px solid var(--line);
  border-radius: 4px; max-height: 36rem; overflow: auto; }
#objects label { display: flex; align-items: center; gap: .5rem; padding: .15rem .35rem;
  border-radius: 4px; font-variant-numeric: tabular-nums; }
#objects label.under { background: var(--mark); }
#objects label.absent .score { color: var(--soft); }
.swatch { width: 1rem; height: 1rem; border-radius: 3px; border: 1px solid var(--line); }
.score { margin-left: auto; }
:focus-visible { outline: 2px solid #2a7de1; outline-offset: 2px; }
</style>
</head>
<body>
<h1>@TITLE@</h1>
<p id="note"></p>
<main>
<div id="film">
<canvas id="canvas" role="img" aria-label="The frame under its masks"></canvas>
<div class="row"><button id="play" type="button">Play</button>
<label for="frame">Frame</label><input id="frame" type="range" min="0" value="0">
<output id="place" for="frame"></output></div>
<div class="row"><label for="opacity">Opacity of the masks</label>
<input id="opacity" type="range" min="0" max="100" value="50">
<output id="under" aria-live="polite"></output></div>
</div>
<fieldset><legend>Objects and scores</legend><div id="objects"></div></fieldset>
</main>
<script id="data" type="application/json">@DATA@</script>
<script>
"use strict";
const find = (id) => document.getElementById(id);
const data = JSON.parse(find("data").textContent);
const [width, height] = data.size;
const canvas = find("canvas"), slider = find("frame"), opacity = find("opacity");
canvas.width = width;
canvas.height = height;
slider.max = data.frames.length - 1;
const context = canvas.getContext("2d", { willReadFrequently: true });
const scratch = new OffscreenCanvas(width, height).getContext("2d", { willReadFrequently: true });
const shown = new Uint8Array(256).fill(1);
const rows = new Map();
let wanted = 0, playing = 0, plays = 0, pixels = null, ids = null, under = 0;

find("note").textContent = (data.stride > 1
  ? `Every ${data.stride}${data.stride === 2 ? "nd" : "th"} of ${data.total} frames. ` : "")
  + "Arrow keys: one frame; Home and End; space: play and pause.";

for (const id of data.ids) {
  const row = document.createElement("label"), box = document.createElement("input");
  const swatch = document.createElement("span"), score = document.createElement("span");
  box.type = "checkbox";
  box.checked = true;
  box.addEventListener("change", () => { shown[id] = box.checked; paint(); });
  swatch.className = "swatch";
  swatch.style.background = `rgb(${data.palette[id]})`;
  score.className = "score";
  row.append(box, swatch, data.names[id], score);
  find("objects").append(row);
  rows.set(id, { row, score });
}
if (!data.ids.length) find("objects").textContent = "none found";

async function decode(source) {
  const image = new Image();
  image.src = source;
  await image.decode();
  scratch.drawImage(image, 0, 0);
  return scratch.getImageData(0, 0, width, height).data;
}

async function show(index) {
  const number = wanted = Math.min(Math.max(index, 0), data.frames.length - 1);
  const frame = data.frames[number];
  slider.value = number;
  const decoded = [await decode(frame.image), await decode(frame.mask)];
  if (number !== wanted) return;  // another one was asked for meanwhile
  [pixels, ids] = decoded;
  ids = ids.filter((_, place) => place % 4 === 0);
  find("place").textContent = `${frame.number} of 0 … ${data.total - 1}`;
  slider.setAttribute("aria-valuetext", `frame ${frame.number}`);
  for (const [id, { row, score }] of rows) {
    const value = frame.scores[id];
    score.textContent = value === undefined ? "–" : value.toFixed(2);
    row.classList.toggle("absent", value === undefined);
  }
  point(under = 0);
  paint();
  canvas.dataset.frame = frame.number;
}

function paint() {
  const image = new ImageData(new Uint8ClampedArray(pixels), width, height), out = image.data;
  const inside = opacity.value / 100, edge = Math.min(1, 2 * inside);
  for (let y = 0, place = 0; y < height; y++) {
    for (let x = 0; x < width; x++, place++) {
      const id = ids[place];
      if (!id || !shown[id]) continue;
      const border = (x > 0 && ids[place - 1] !== id) || (x < width - 1 && ids[place + 1] !== id)
        || (y > 0 && ids[place - width] !== id) || (y < height - 1 && ids[place + width] !== id);
      const share = border ? edge : inside, colour = data.palette[id];
      for (let c = 0; c < 3; c++)
        out[4 * place + c] += share * (colour[c] - out[4 * place + c]);
    }
  }
  context.putImageData(image, 0, 0);
}

function point(id) {
  for (const [other, { row }] of rows) row.classList.toggle("under", other === id);
  const score = data.frames[wanted].scores[id];
  find("under").textContent = !id ? ""
    : data.names[id] + (score === undefined ? "" : `, score ${score.toFixed(2)}`);
}

async function play() {
  const mine = playing = playing ? 0 : ++plays;
  find("play").textContent = playing ? "Pause" : "Play";
  const last = data.frames.length - 1;
  let next = wanted === last ? 0 : wanted + 1;
  while (mine && playing === mine) {
    const began = performance.now();
    await show(next);
    const left = 1000 * data.stride / data.fps - (performance.now() - began);
    await new Promise((done) => setTimeout(done, Math.max(0, left)));
    next = wanted + 1;
    if (playing === mine && next > last) play();
  }
}

slider.addEventListener("input", () => show(Number(slider.value)));
opacity.addEventListener("input", paint);
find("play").addEventListener("click", play);
canvas.addEventListener("pointermove", (event) => {
  const box = canvas.getBoundingClientRect();
  const x = Math.floor((event.clientX - box.left) * width / box.width);
  const y = Math.floor((event.clientY - box.top) * height / box.height);
  const id = (ids && ids[y * width + x]) || 0;
  if (id !== under) point(under = id);
});
canvas.addEventListener("pointerleave", () => point(under = 0));
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.altKey || event.metaKey) return;
  const own = event.target.closest("input, button"), range = own && own.type === "range";
  if (event.key === " " ? own && !range : range) return;  // it knows what to do with this key
  const steps = { ArrowLeft: wanted - 1, ArrowRight: wanted + 1, Home: 0, End: data.frames.length };
  if (event.key === " ") play();
  else if (event.key in steps) show(steps[event.key]);
  else return;
  event.preventDefault();
});
show(0);
</script>
</body>
</html>
"""
