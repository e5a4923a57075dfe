"""Random draws that depend on what they are for, not on who draws them or when."""

from enum import IntEnum

import numpy as np

from smtc.errors import UserError


class Stream(IntEnum):
    """What a draw is for; draws of different streams are independent."""

    EPOCH = 0
    CLIP = 1
    REPLACEMENT = 2
    SPATIAL = 3
    PHOTOMETRIC = 4


def generator(seed: int, stream: Stream, *key: int) -> np.random.Generator:
    """A fresh generator for (seed, stream, key): the same in any process and in any order."""
    if seed < 0:
        raise UserError(f"The seed is {seed}; use 0 or more.")
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, stream, *key])))
