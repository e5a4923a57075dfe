"""Scores on held-out videos while a run goes on."""

from pathlib import Path

from smtc.config import EvalConfig
from smtc.errors import UserError
from smtc.evaluation.datasets import open_dataset
from smtc.evaluation.discovery import PROTOCOLS
from smtc.inference import predict
from smtc.model import SMTC
from smtc.training import distributed
from smtc.training.distributed import World

_METRICS = {"synthetic": "fg_iou", "davis2016": "j_sequences"}


class HeldOut:
    """The held-out videos of a run, found at once; `UserError` where they are not whole."""

    def __init__(self, config: EvalConfig, world: World) -> None:
        assert config.data is not None
        self._world = world
        self.metric = config.metric or _METRICS[config.dataset]
        self._protocol = PROTOCOLS[config.dataset]
        self._videos = open_dataset(config.dataset, Path(config.data))

    def score(self, model: SMTC) -> dict[str, float]:
        """The data set's means, by score, in every process; each does a part of the videos."""
        mine = []
        for index in range(self._world.rank, len(self._videos), self._world.size):
            video = self._videos[index]
            frames, truth = video.load()
            mine.append((index, self._protocol.score(predict(model, frames), video, truth)))
        found = dict(pair for part in distributed.gather(mine) for pair in part)
        means = self._protocol.summarise([found[index] for index in sorted(found)])
        if self.metric not in means:
            raise UserError(
                f"There is no score {self.metric!r} for eval.metric; there are {', '.join(means)}."
            )
        return means
