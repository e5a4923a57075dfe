"""A long run needs no more memory than a short one."""

import gc
import logging
import os
import sys
from pathlib import Path

import pytest
from torch import Tensor
from toy import TinyConfig, with_output

from smtc.method import SMTCMethod
from smtc.training.trainer import train

STEPS, SETTLED = 2000, 400
MEGABYTE = 10**6


class Weighed(SMTCMethod):
    """Notes how much memory the process has every 100 steps."""

    weights: list[tuple[int, float]]

    def after_step(self, step: int, skipped: Tensor) -> None:
        super().after_step(step, skipped)
        if step == 0:
            self.weights = []
        if (step + 1) % 100 == 0:
            gc.collect()
            self.weights.append((step + 1, resident()))


def resident() -> float:
    """MB of this process in memory now."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / MEGABYTE


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_two_thousand_steps_need_no_more_memory(
    tiny_config: TinyConfig, tmp_path: Path, synthetic_data: Path
) -> None:
    """With logs, checkpoints, pictures and scores; measured after 400 steps, which warm all up."""
    config = with_output(
        tiny_config,
        tmp_path / "run",
        model__resolution=(48, 48),
        objective__instance_from_step=0,
        optim__encoder_from_step=100,
        train__steps=STEPS,
        train__log_every=10,
        train__checkpoint_every=100,
        train__pictures_every=100,
        eval__data=str(synthetic_data),
        eval__every=200,
    )
    method = Weighed(config)
    logging.disable(logging.DEBUG)  # pytest would keep what torch says of each checkpoint
    try:
        train(config, method=method)
    finally:
        logging.disable(logging.NOTSET)
    found = dict(method.weights)
    before, after = found[SETTLED], max(found[step] for step in (STEPS - 100, STEPS))
    # A single small tensor kept of every step would make 6.
    assert after - before < 4, method.weights
