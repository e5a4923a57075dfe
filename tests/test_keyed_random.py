"""Keyed draws: the right distributions, and nothing but the key matters."""

import math

import pytest
import torch
from scipy import stats

from smtc.keyed_random import keyed_bits, keyed_normal, keyed_other_frame, keyed_uniform

INDEX = torch.arange(200)


def test_bits_fill_32_bits_evenly() -> None:
    bits = keyed_bits(3, INDEX, 1, 100).flatten()
    assert bits.dtype == torch.int64 and bits.min() >= 0 and bits.max() < 2**32
    # Binomial with n = 20000: 5 standard deviations are .018.
    for bit in range(32):
        assert abs((bits >> bit & 1).double().mean() - 0.5) < 0.018, bit


def test_uniform_is_uniform_and_open() -> None:
    draws = keyed_uniform(0, INDEX, 0, 500)
    assert draws.shape == (200, 500) and draws.dtype == torch.float32
    assert draws.min() > 0 and draws.max() < 1
    assert stats.kstest(draws.flatten().numpy(), "uniform").pvalue > 1e-3
    # Neither along a sample's positions nor along samples.
    assert stats.kstest(draws.mean(0).numpy(), "norm", (0.5, (1 / 12 / 200) ** 0.5)).pvalue > 1e-3
    assert stats.kstest(draws.mean(1).numpy(), "norm", (0.5, (1 / 12 / 500) ** 0.5)).pvalue > 1e-3


def test_normal_is_normal() -> None:
    draws = keyed_normal(7, INDEX, 2, (4, 5, 25))
    assert draws.shape == (200, 4, 5, 25) and draws.dtype == torch.float32
    assert draws.isfinite().all()
    assert abs(float(draws.mean())) < 0.015
    assert abs(float(draws.var()) - 1) < 0.02
    assert stats.kstest(draws.flatten().numpy(), "norm").pvalue > 1e-3


def test_neighbours_are_uncorrelated() -> None:
    draws = keyed_normal(0, torch.arange(2000), 0, (3,)).double()
    pairs = {
        "position": (draws[:, 0], draws[:, 1]),
        "index": (draws[:-1, 0], draws[1:, 0]),
        "seed": (draws[:, 0], keyed_normal(1, torch.arange(2000), 0, (3,)).double()[:, 0]),
        "stream": (draws[:, 0], keyed_normal(0, torch.arange(2000), 1, (3,)).double()[:, 0]),
    }
    for name, (a, b) in pairs.items():
        correlation = float(torch.corrcoef(torch.stack([a, b]))[0, 1])
        assert abs(correlation) < 5 / math.sqrt(2000), name


def test_a_sample_does_not_depend_on_its_batch() -> None:
    index = torch.tensor([5, 900, 2, 7])
    together = keyed_normal(4, index, 1, (6, 3))
    for position, one in enumerate(index):
        torch.testing.assert_close(
            keyed_normal(4, one[None], 1, (6, 3))[0], together[position], rtol=1e-6, atol=1e-6
        )
    assert torch.equal(keyed_bits(4, index.flip(0), 1, 18).flip(0), keyed_bits(4, index, 1, 18))


@pytest.mark.parametrize(
    "other",
    [(1, 0, 0), (0, 1, 0), (0, 0, 1), (2**32, 0, 0), (0, 2**32, 0), (0, 2**40 + 1, 0)],
    ids=["seed", "index", "stream", "high seed", "high index", "large index"],
)
def test_every_part_of_the_key_matters(other: tuple[int, int, int]) -> None:
    seed, index, stream = other
    base = keyed_bits(0, torch.tensor([0]), 0, 1000)
    changed = keyed_bits(seed, torch.tensor([index]), stream, 1000)
    assert (base == changed).sum() <= 1


def test_the_same_key_gives_the_same_numbers() -> None:
    torch.manual_seed(0)
    first = keyed_normal(3, INDEX, 1, (4,))
    torch.manual_seed(1)
    assert torch.equal(first, keyed_normal(3, INDEX, 1, (4,)))


def test_the_numbers_stay_the_same_from_version_to_version() -> None:
    expected = [3501084599, 2946010628, 3431600847, 1494576544]
    assert keyed_bits(0, torch.tensor([0]), 0, 4).tolist() == [expected]


@pytest.mark.parametrize("frames", [2, 3, 4, 7])
def test_another_frame_is_another_frame_and_each_equally_likely(frames: int) -> None:
    drawn = keyed_other_frame(1, torch.arange(3000), 3, frames)
    assert drawn.shape == (3000, frames) and drawn.dtype == torch.int64
    for t in range(frames):
        counts = torch.bincount(drawn[:, t], minlength=frames)
        assert counts[t] == 0 and len(counts) == frames
        others = counts[torch.arange(frames) != t]
        if len(others) > 1:
            assert stats.chisquare(others.numpy()).pvalue > 1e-3
