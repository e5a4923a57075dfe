"""Scores on held-out videos while a run goes on."""

from pathlib import Path

import numpy as np

from smtc.config import EvalConfig
from smtc.errors import UserError
from smtc.evaluation.datasets import open_dataset
from smtc.evaluation.protocols import PROTOCOLS, Found, Protocol, found_in
from smtc.inference import segment_frames
from smtc.model import SMTC
from smtc.training import distributed
from smtc.training.distributed import World

_SMALL_IS_GOOD = ("identity_switch_rate",)
_METRICS = {"synthetic": "fg_iou", "davis2016": "j_sequences"}


class HeldOut:
    """The held-out videos of a run, found at once; `UserError` where they are not whole, or where
    there is no score of the name `eval.metric`.
    """

    def __init__(self, config: EvalConfig, world: World) -> None:
        assert config.data is not None
        self._world = world
        self.metric = config.metric or _METRICS[config.dataset]
        self._protocol = PROTOCOLS[config.dataset]
        names = [name for name in _score_names(self._protocol) if name not in _SMALL_IS_GOOD]
        if self.metric not in names:
            raise UserError(
                f"There is no score {self.metric!r} for eval.metric; there are {', '.join(names)}."
            )
        self._videos = open_dataset(config.dataset, Path(config.data))

    def score(self, model: SMTC) -> dict[str, float]:
        """The data set's means, by score, in every process; each does a part of the videos."""
        mine = []
        for index in range(self._world.rank, len(self._videos), self._world.size):
            video = self._videos[index]
            found = found_in(segment_frames(model, video.iterate_frames()), video.annotated)
            mine.append((index, self._protocol.score(found, video.load_truth())))
        scores = dict(pair for part in distributed.gather(mine) for pair in part)
        return self._protocol.summarise([scores[index] for index in sorted(scores)])


def _score_names(protocol: Protocol) -> list[str]:
    """What `protocol` calls its scores, found by scoring a video of three empty frames."""
    nothing = np.zeros((3, 2, 2), np.uint8)
    found = Found(semantic=nothing, instances=nothing, regions=nothing)
    return list(protocol.summarise([protocol.score(found, nothing)]))
