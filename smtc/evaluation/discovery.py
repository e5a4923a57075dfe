"""Object discovery: what methods find without any label, against a data set's masks."""

import base64
import os
import secrets
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from smtc.errors import UserError
from smtc.evaluation.datasets import EvaluationVideo, open_dataset
from smtc.evaluation.kept_scores import KeptScores, Record, code_hash, key_of, stamps
from smtc.evaluation.manifest import build_manifest, versions
from smtc.evaluation.methods import Inference, Method, model_methods
from smtc.evaluation.metrics import border_label
from smtc.evaluation.protocols import (
    PROTOCOLS,
    Found,
    found_in,
    mean_row,
    scores_from_json,
    scores_to_json,
)
from smtc.evaluation.results import Row, Run, build_results, write_csv, write_json
from smtc.evaluation.shared_work import POLL, Tally, together
from smtc.evaluation.videos import read_frame
from smtc.folders import whole_folder
from smtc.inference import segment_frames
from smtc.model import SMTC
from smtc.progress import bar, track
from smtc.training.distributed import World
from smtc.visualize import Sample, sample_sheet, save_picture
from smtc.weights import checkpoint_hash

__all__ = [
    "Evaluation",
    "Row",
    "evaluate",
    "evaluate_discovery",
    "model_row",
    "sample_maps",
    "weights_source",
    "write_json",
]

Pixels = NDArray[np.uint8]

_SHOWN = 6
_FILES = ("results.json", "results.csv", "manifest.json", "sheet.png")


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What is scored on what."""

    methods: Sequence[Method]
    """The first is the one that is pictured."""
    dataset: str
    root: Path
    output: Path
    """Gets `results.json`, `results.csv` (a row a method, seed and video), `manifest.json` and
    `sheet.png` at once, when all is done; an earlier result there is replaced."""
    seeds: Sequence[int] = (0,)
    """Of whatever is drawn; a method that draws nothing is scored once."""
    penguin: bool = False
    """SegTrack-v2: all objects of the sequence of that name count."""

    def __post_init__(self) -> None:
        if not self.seeds or min(self.seeds) < 0:
            raise UserError("--seeds are whole numbers from 0, at least one.")
        if len(set(self.seeds)) < len(self.seeds):
            raise UserError("--seeds holds a number twice; each seed is scored once.")
        if self.penguin and self.dataset != "segtrackv2":
            raise UserError(f"--penguin is a switch of segtrackv2, not of {self.dataset}.")
        if Path(os.path.realpath(self.output)).is_relative_to(os.path.realpath(self.root)):
            raise UserError(
                f"{self.output} lies inside the data folder {self.root}; choose another --output."
            )


@dataclass(frozen=True)
class _Task:
    """A method, seed and video to score."""

    method: int
    seed: int | None
    video: int
    pictured: bool
    key: str


def evaluate_discovery(
    model: SMTC,
    dataset: str,
    root: str | Path,
    output: str | Path,
    *,
    checkpoint: str | Path | None = None,
    baselines: Sequence[str] = (),
    seeds: Sequence[int] = (0,),
    inference: Inference | None = None,
    device: torch.device | str | None = None,
) -> dict[str, Any]:
    """Score a model's semantic and instance masks on a data set, and write a folder of results.

    Args:
        model: an `SMTC`; moved to `device` when one is given.
        dataset: a name of `smtc.evaluation.datasets.DATASETS`; `root` is its folder.
        output: as in `Evaluation`, whose `evaluate` this calls; `seeds` too.
        checkpoint: where the model came from, for the manifest only.
        baselines: names of `smtc.evaluation.methods.BASELINES`, scored by the same code.

    Returns what `results.json` holds, see `build_results`. Raises `UserError` for a data set that
    is not whole, a frame that cannot be read, or a folder that cannot be written.
    """
    if device is not None:
        model = model.to(device)
    methods = model_methods(model, baselines, inference or Inference(), weights_source(checkpoint))
    return evaluate(
        Evaluation(
            methods=methods, dataset=dataset, root=Path(root), output=Path(output), seeds=seeds
        )
    )


def weights_source(checkpoint: str | Path | None) -> dict[str, Any]:
    """Path and hash of a checkpoint; nothing where a model has none."""
    if checkpoint is None:
        return {}
    return {"path": str(checkpoint), "sha256": checkpoint_hash(checkpoint)}


def evaluate(evaluation: Evaluation, world: World | None = None) -> dict[str, Any]:
    """Score all methods and write the results; every process of `world` does a part.

    What is scored is kept beside the output until all is done, so that the same evaluation, after
    it was killed, goes on with what is left. A `UserError` ends it in all processes and leaves
    nothing behind. Returns what `results.json` holds.
    """
    world = world or World(torch.device("cpu"))
    videos = together(
        lambda: open_dataset(evaluation.dataset, evaluation.root, penguin=evaluation.penguin)
    )[world.rank]
    kept = KeptScores(evaluation.output)
    with ExitStack() as stack:

        def begin() -> tuple[str, list[_Task], dict[str, Record], Path | None]:
            if not world.main:
                return "", [], {}, None
            stack.enter_context(kept)
            folder = stack.enter_context(
                whole_folder(evaluation.output, _FILES, writer="smtc evaluate discovery")
            )
            tasks = _tasks(evaluation, videos, world.device.type)
            return secrets.token_hex(8), tasks, kept.begin([task.key for task in tasks]), folder

        queue, tasks, before, folder = together(begin)[0]
        share = _Share(evaluation, videos, kept, Tally(queue), world)
        parts = together(lambda: share.work(tasks, before))

        def conclude() -> dict[str, Any]:
            if folder is None or not world.main:
                return {}
            records = {key: record for part in (before, *parts) for key, record in part.items()}
            with kept.writing():
                results = _write(evaluation, videos, tasks, records, folder, world)
                stack.close()  # the folder gets its name
            return results

        return together(conclude)[0]


def _tasks(evaluation: Evaluation, videos: Sequence[EvaluationVideo], device: str) -> list[_Task]:
    """All there is to do, video by video, so that each costs about as much as the one before."""
    common = {
        "dataset": evaluation.dataset,
        "penguin": evaluation.penguin,
        "device": device,
        "code": code_hash(),
        "versions": versions(),
    }
    shown, tasks = _spread(len(videos), _SHOWN), []
    for index, video in enumerate(videos):
        files = {"video": video.name, "files": stamps(evaluation.root, video.files)}
        for number, method in enumerate(evaluation.methods):
            for seed in evaluation.seeds if method.seeded else (None,):
                pictured = number == 0 and seed in (None, evaluation.seeds[0]) and index in shown
                own = {"method": method.identity, "seed": seed, "pictured": pictured}
                tasks.append(_Task(number, seed, index, pictured, key_of(common | files | own)))
    return tasks


@dataclass(frozen=True)
class _Share:
    """One process's part of the work."""

    evaluation: Evaluation
    videos: Sequence[EvaluationVideo]
    kept: KeptScores
    tally: Tally
    world: World

    def work(self, tasks: Sequence[_Task], before: dict[str, Record]) -> dict[str, Record]:
        """Records, by key, of those tasks that this process got to do; returns when all are done,
        or one process has failed.
        """
        left = [task for task in tasks if task.key not in before]
        title = f"evaluate {self.evaluation.dataset}"
        try:
            with bar(
                total=len(tasks),
                initial=len(before),
                title=title,
                unit="sequence",
                shown=self.world.main,
            ) as shown:
                return self._take(left, shown.update)
        finally:
            # Not in a collective, whose patience may end before another's long sequence does.
            self.tally.meet(self.world.size)

    def _take(self, left: Sequence[_Task], tell: Callable[[int], object]) -> dict[str, Record]:
        done, mine = 0, {}
        while done < len(left) and not self.tally.failed:
            number = self.tally.take()
            if number < len(left):
                mine[left[number].key] = self._do(left[number])
            else:
                time.sleep(POLL)  # for the others
            before, done = done, self.tally.done
            tell(done - before)
        return mine

    def _do(self, task: _Task) -> Record:
        try:
            record = self._score(task)
            self.kept.write(task.key, record)
        except BaseException:
            self.tally.fail()
            raise
        self.tally.finish()
        return record

    def _score(self, task: _Task) -> Record:
        video, method = self.videos[task.video], self.evaluation.methods[task.method]
        truth = video.load_truth()
        found = method.find(video, truth.shape[1:], task.seed or 0)
        scores = PROTOCOLS[self.evaluation.dataset].score(found, truth)
        maps = _packed_maps(found) if task.pictured else None
        return {"scores": scores_to_json(scores), "maps": maps}


def _packed_maps(found: Found) -> dict[str, Any]:
    """The maps of the middle frame of those annotated, small enough to keep."""
    middle = len(found.semantic) // 2
    return {
        "semantic": _packed(found.semantic[middle]),
        "instances": _packed(found.instances[middle]),
        "background": border_label(found.semantic),
    }


def _packed(labels: Pixels) -> str:
    _, data = cv2.imencode(".png", np.ascontiguousarray(labels))
    return base64.b64encode(data.tobytes()).decode()


def _unpacked(text: str) -> Pixels:
    data = np.frombuffer(base64.b64decode(text), np.uint8)
    return np.asarray(cv2.imdecode(data, cv2.IMREAD_UNCHANGED), np.uint8)


def _write(
    evaluation: Evaluation,
    videos: Sequence[EvaluationVideo],
    tasks: Sequence[_Task],
    records: dict[str, Record],
    folder: Path,
    world: World,
) -> dict[str, Any]:
    """All files of the results; returns what `results.json` holds."""
    dataset, methods = evaluation.dataset, evaluation.methods
    scores: dict[tuple[int, int | None], list[Any]] = {}
    for task in tasks:
        own = scores_from_json(records[task.key]["scores"])
        scores.setdefault((task.method, task.seed), []).append(own)
    runs = [Run(methods[number].name, seed, found) for (number, seed), found in scores.items()]
    results = build_results(dataset, PROTOCOLS[dataset], videos, runs)
    results = write_json(folder / "results.json", results)
    write_csv(folder / "results.csv", results["per_video"])
    write_json(folder / "manifest.json", _manifest(evaluation, videos, world))
    samples = [
        _sample(videos[task.video], records[task.key]["maps"]) for task in tasks if task.pictured
    ]
    save_picture(folder / "sheet.png", sample_sheet(samples))
    return results


def _manifest(
    evaluation: Evaluation, videos: Sequence[EvaluationVideo], world: World
) -> dict[str, Any]:
    main = evaluation.methods[0]
    weights = main.weights or {}
    switches = {**main.switches, "foreground": PROTOCOLS[evaluation.dataset].foreground}
    if evaluation.dataset == "segtrackv2":
        switches["penguin"] = evaluation.penguin
    return build_manifest(
        protocol=f"discovery {evaluation.dataset}",
        root=evaluation.root,
        files=[path for video in videos for path in video.files],
        switches=switches,
        checkpoint={name: weights[name] for name in ("path", "sha256") if name in weights} or None,
        weights_sha256=weights.get("weights_sha256"),
        seeds=list(evaluation.seeds),
        methods=[
            method.identity | {"seeds": list(evaluation.seeds) if method.seeded else None}
            for method in evaluation.methods
        ],
        device=world.device.type,
        processes=world.size,
    )


def _sample(video: EvaluationVideo, maps: dict[str, Any]) -> Sample:
    truth = video.load_truth()
    middle = len(truth) // 2
    position = video.annotated[middle]
    return Sample(
        f"{video.name}, frame {position}",
        read_frame(video.frames[position]),
        _unpacked(maps["semantic"]),
        _unpacked(maps["instances"]),
        truth[middle],
        maps["background"],
    )


def model_row(model: SMTC, videos: Sequence[EvaluationVideo], name: str, *, batch: int = 8) -> Row:
    """A model's means under the synthetic protocol, as a row of a comparison table."""
    scores = []
    for video in track(videos, title=name, unit="video"):
        found, truth = _seen(model, video, batch)
        scores.append(PROTOCOLS["synthetic"].score(found, truth))
    return {"model": name, **mean_row(scores)}


def sample_maps(
    model: SMTC, videos: Sequence[EvaluationVideo], count: int = 4, *, batch: int = 8
) -> list[Sample]:
    """The middle frame of `count` of the videos, evenly spread, with the maps `segment` gives."""
    chosen = [videos[index] for index in _spread(len(videos), count)]
    return [_sample(video, _packed_maps(_seen(model, video, batch)[0])) for video in chosen]


def _seen(model: SMTC, video: EvaluationVideo, batch: int) -> tuple[Found, Pixels]:
    """What a model sees in the annotated frames, and their true ids."""
    seen = segment_frames(model, video.iterate_frames(), batch=batch)
    return found_in(seen, video.annotated), video.load_truth()


def _spread(total: int, count: int) -> list[int]:
    return np.unique(np.linspace(0, total - 1, min(count, total)).round().astype(int)).tolist()
