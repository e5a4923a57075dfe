"""What a run watches for while it goes: gradients that are not finite, and collapse."""

import logging
from collections import deque
from typing import Literal

import torch
from torch import Tensor

from smtc.config import ObjectiveConfig
from smtc.errors import UserError
from smtc.pipelines.batch import Source
from smtc.training import distributed

logger = logging.getLogger("smtc")

_COLLAPSED_AFTER = 500  # steps
_NAMED = 8  # clips of a bad step that a message names


class FiniteWatch:
    """Remembers which steps were left out, and the clips of the last steps to say of which files.

    Such a step changed neither weights nor teacher. `policy` "stop" ends the run at the next log,
    "skip" says how many there were and goes on.
    """

    def __init__(self, policy: Literal["stop", "skip"], kept: int, device: torch.device) -> None:
        self._policy = policy
        self._count = torch.zeros((), dtype=torch.int64, device=device)
        self._first = torch.full_like(self._count, -1)
        self._clips: deque[tuple[int, list[Source]]] = deque(maxlen=kept)
        self.total = 0
        """Steps left out so far, as known at the last look."""

    def note(self, step: int, bad: Tensor, sources: list[Source]) -> None:
        """Step `step` used the clips of `sources`; `bad` (bool `[]`) stays on the device."""
        self._first = torch.where(bad & (self._first < 0), step, self._first)
        self._count += bad
        self._clips.append((step, sources))

    def look(self, good_until: str) -> None:
        """Read the count. `UserError` under "stop", naming the step, its files and `good_until`."""
        count, first = torch.stack([self._count, self._first]).tolist()
        self._count.zero_()
        self._first.fill_(-1)
        if not count:
            return
        self.total += count
        mine = [clip for step, clips in self._clips if step == first for clip in clips]
        found = [clip for clips in distributed.gather(mine) for clip in clips]
        names = ", ".join(f"{clip.video} from frame {clip.start}" for clip in found[:_NAMED])
        more = f" and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
        what = f"The gradient of step {first} was not finite (clips: {names}{more})"
        if self._policy == "stop":
            raise UserError(
                f"{what}; the weights were left as they were. {good_until} Lower optim.lr, look at "
                "these clips, or go on without such steps with --train.nonfinite skip."
            )
        logger.warning("%s; %d steps were left out since the last log.", what, count)


class CollapseWatch:
    """Says once that no instance has been valid for long, and which thresholds decide that."""

    def __init__(self, config: ObjectiveConfig) -> None:
        self._config = config
        self._since: int | None = None  # the first logged step of a row without a valid instance
        self._said = False

    def look(self, step: int, values: dict[str, float]) -> None:
        """Take in the logged `values` of `step`; a method without instances has nothing to say."""
        config = self._config
        if values.get("valid_share") != 0 or step <= config.instance_from_step:
            self._since = None
            return
        self._since = step if self._since is None else self._since
        if self._said or step - self._since < _COLLAPSED_AFTER:
            return
        self._said = True
        logger.warning(
            "No instance was valid for %d steps, so the instance loss is 0. A semantic has to "
            "cover objective.area (%g) of the frame and an instance slot to have a cosine above "
            "objective.similarity (%g) to it: lower the one that is missed; see slots_used and "
            "mask_entropy.",
            *(step - self._since, config.area, config.similarity),
        )
