"""Parameters are keyed draws; applying them is checked against the steps written out one by one."""

import colorsys

import cv2
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from smtc.config import AugmentConfig, DataConfig
from smtc.pipelines.views import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    ViewParameters,
    apply_view,
    colour_matrix,
    crop_window,
    cut_frames,
    draw_views,
    prepare_frames,
    recolour,
)

EVERYTHING = AugmentConfig(
    crop=(0.3, 0.9),
    flip=0.5,
    grayscale=0.3,
    jitter=(0.4, 0.3, 0.2, 0.1),
    jitter_chance=0.8,
    blur=0.5,
    blur_sigma=(0.5, 2.0),
)


def picture(height: int = 40, width: int = 60, frames: int = 3) -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (frames, height, width, 3), np.uint8)


def as_pixels(view: NDArray[np.float32]) -> NDArray[np.float64]:
    """Undo the normalisation: RGB in [0, 1], `[T,H,W,3]`."""
    return view.transpose(0, 2, 3, 1) * np.array(IMAGENET_STD) + np.array(IMAGENET_MEAN)


def step_by_step(rgb: NDArray, grey: bool, jitter: tuple[float, ...]) -> NDArray:
    """The colour changes in order, on pixels `[...,3]`."""

    def luma(x: NDArray) -> NDArray:
        return (0.299 * x[..., 0] + 0.587 * x[..., 1] + 0.114 * x[..., 2])[..., None]

    brightness, contrast, saturation, hue = jitter
    x = np.broadcast_to(luma(rgb), rgb.shape) if grey else rgb
    x = x * brightness
    x = (x - 0.5) * contrast + 0.5
    x = luma(x) + (x - luma(x)) * saturation
    y = luma(x)[..., 0]
    chroma = (0.595716 * x[..., 0] - 0.274453 * x[..., 1] - 0.321263 * x[..., 2]) + 1j * (
        0.211456 * x[..., 0] - 0.522591 * x[..., 1] + 0.311135 * x[..., 2]
    )
    turned = chroma * np.exp(2j * np.pi * hue)
    i, q = turned.real, turned.imag
    return np.stack(
        [y + 0.9563 * i + 0.6210 * q, y - 0.2721 * i - 0.6474 * q, y - 1.1070 * i + 1.7046 * q], -1
    )


def same(a: ViewParameters, b: ViewParameters, part: str) -> bool:
    if part == "where":
        return (a.crop, a.flip) == (b.crop, b.flip)
    return np.array_equal(a.colour, b.colour) and a.blur_sigma == b.blur_sigma


@pytest.mark.parametrize("grey", [False, True])
@pytest.mark.parametrize("jitter", [(1.3, 0.7, 1.4, 0.1), (0.6, 1.4, 0.2, -0.3), (1, 1, 1, 0)])
def test_the_colour_matrix_is_the_steps_in_order(
    grey: bool, jitter: tuple[float, float, float, float]
) -> None:
    rgb = np.random.default_rng(1).random((50, 3))
    matrix = colour_matrix(grey=grey, jitter=jitter)
    assert (matrix.shape, matrix.dtype) == ((3, 4), np.float32)
    expected = step_by_step(rgb, grey, jitter)
    np.testing.assert_allclose(rgb @ matrix[:, :3].T + matrix[:, 3], expected, atol=2e-3)


def test_grey_makes_the_channels_equal_and_no_change_is_the_identity() -> None:
    np.testing.assert_array_equal(colour_matrix(), np.eye(3, 4))
    np.testing.assert_allclose(colour_matrix(jitter=(1, 1, 1, 0)), np.eye(3, 4), atol=1e-6)
    grey = colour_matrix(grey=True, jitter=(1.2, 0.8, 1.3, 0.2))
    np.testing.assert_allclose(grey, np.broadcast_to(grey[:1], (3, 4)), atol=1e-6)


def test_hue_turns_red_towards_yellow_or_back() -> None:
    """A positive turn of a third takes red to green or blue, as in HSV, and keeps greys."""
    matrix = colour_matrix(jitter=(1, 1, 1, 1 / 3))
    np.testing.assert_allclose(matrix[:, :3].sum(1), 1, atol=1e-6)
    turned = np.clip(matrix[:, :3] @ np.array([1.0, 0, 0]), 0, 1)
    hue = colorsys.rgb_to_hsv(*turned)[0]
    assert min(abs(hue - 1 / 3), abs(hue - 2 / 3)) < 0.06


def test_draws_depend_on_seed_and_index_only() -> None:
    config = DataConfig(augment=EVERYTHING)
    for index in (0, 7, 10**9):
        for one, other in zip(
            draw_views(config, 3, index), draw_views(config, 3, index), strict=True
        ):
            assert same(one, other, "where")
            assert same(one, other, "look")
    assert not same(draw_views(config, 3, 7)[0], draw_views(config, 3, 8)[0], "where")
    assert not same(draw_views(config, 3, 7)[0], draw_views(config, 4, 7)[0], "where")


def test_views_share_where_but_not_look() -> None:
    pairs = [draw_views(DataConfig(augment=EVERYTHING), 0, i) for i in range(40)]
    assert all(same(*pair, "where") for pair in pairs)
    assert sum(same(*pair, "look") for pair in pairs) < 8
    apart = DataConfig(augment=EVERYTHING, spatial="independent")
    moved = [draw_views(apart, 0, i) for i in range(40)]
    assert not any(same(*pair, "where") for pair in moved)
    for pair, other in zip(pairs, moved, strict=True):
        assert same(pair[0], other[0], "where")
        assert same(pair[1], other[1], "look")


def test_switching_one_part_off_leaves_the_others() -> None:
    without = DataConfig(augment=AugmentConfig(**{**vars(EVERYTHING), "grayscale": 0.0, "flip": 0}))
    for index in range(30):
        full = draw_views(DataConfig(augment=EVERYTHING), 0, index)[1]
        less = draw_views(without, 0, index)[1]
        assert (full.crop, full.blur_sigma) == (less.crop, less.blur_sigma)


def test_draws_stay_in_their_ranges_and_keep_their_chances() -> None:
    views = [draw_views(DataConfig(augment=EVERYTHING), 1, i)[0] for i in range(1500)]
    areas = np.array([v.crop[2] * v.crop[3] for v in views])
    assert 0.3 <= areas.min() < 0.32
    assert 0.88 < areas.max() <= 0.9
    assert all(v.crop[0] >= 0 and v.crop[0] + v.crop[2] <= 1 + 1e-9 for v in views)
    assert all(v.crop[1] >= 0 and v.crop[1] + v.crop[3] <= 1 + 1e-9 for v in views)
    sigmas = np.array([v.blur_sigma for v in views if v.blur_sigma])
    assert 0.5 <= sigmas.min() < 0.55
    assert 1.95 < sigmas.max() <= 2
    grey = np.mean([np.ptp(v.colour, axis=0).max() < 1e-6 for v in views])
    still = np.mean([np.array_equal(v.colour, np.eye(3, 4)) for v in views])
    chances = np.mean([v.flip for v in views]), len(sigmas) / len(views), grey, still
    np.testing.assert_allclose(chances, (0.5, 0.5, 0.3, 0.7 * 0.2), atol=0.05)


def test_jitter_strengths() -> None:
    brightness = DataConfig(augment=AugmentConfig(jitter=(0.4, 0, 0, 0), jitter_chance=1))
    drawn = [draw_views(brightness, 0, i)[0].colour for i in range(500)]
    np.testing.assert_allclose(drawn[0], drawn[0][0, 0] * np.eye(3, 4), atol=1e-6)
    factors = [colour[0, 0] for colour in drawn]
    np.testing.assert_allclose((min(factors), max(factors)), (0.6, 1.4), atol=0.02)

    hue = DataConfig(augment=AugmentConfig(jitter=(0, 0, 0, 0.25), jitter_chance=1))
    turned = [draw_views(hue, 0, i)[0].colour for i in range(500)]
    for turn in (-0.25, 0.25):
        extreme = colour_matrix(jitter=(1, 1, 1, turn))
        assert min(np.abs(colour - extreme).max() for colour in turned) < 0.03


def test_nothing_at_all_is_the_normalised_frame() -> None:
    frames = picture(32, 32)
    view = apply_view(frames, ViewParameters(), (32, 32))
    assert (view.shape, view.dtype) == ((3, 3, 32, 32), np.float32)
    np.testing.assert_allclose(as_pixels(view), frames / 255, atol=1e-6)


@pytest.mark.parametrize("flip", [False, True])
def test_crop_resize_and_flip(flip: bool) -> None:
    frames = picture(40, 60)
    view = apply_view(frames, ViewParameters(crop=(0.5, 0.25, 0.3, 0.5), flip=flip), (16, 24))
    for frame, got in zip(frames, as_pixels(view), strict=True):
        expected = cv2.resize(frame[10:30, 30:48], (24, 16), interpolation=cv2.INTER_LINEAR)
        np.testing.assert_allclose(got, (expected[:, ::-1] if flip else expected) / 255, atol=1e-6)


def test_the_centred_crop_has_the_shape_of_the_view() -> None:
    whole = (0.0, 0.0, 1.0, 1.0)
    assert crop_window(whole, (40, 100), (32, 32), "squash") == (0, 0, 40, 100)
    assert crop_window(whole, (40, 100), (32, 32), "crop") == (0, 30, 40, 40)
    assert crop_window(whole, (90, 40), (20, 40), "crop") == (35, 0, 20, 40)
    assert crop_window((0.5, 0.5, 0.5, 0.5), (40, 100), (32, 32), "crop") == (20, 50, 20, 20)
    assert crop_window((0.999, 0.999, 0.001, 0.001), (8, 8), (4, 4), "squash")[2:] == (1, 1)


def test_halves_are_rounded_up() -> None:
    """As DALI can do it too; `round` would take 2.5 to 2 and 3.5 to 4."""
    whole = (0.0, 0.0, 1.0, 1.0)
    assert crop_window(whole, (4, 9), (4, 4), "crop") == (0, 3, 4, 4)
    assert crop_window(whole, (4, 11), (4, 4), "crop") == (0, 4, 4, 4)
    assert crop_window((0.5, 0.5, 0.5, 0.5), (5, 7), (4, 4), "squash") == (3, 4, 2, 3)
    assert crop_window((0.0, 0.0, 0.5, 0.5), (5, 7), (4, 4), "squash") == (0, 0, 3, 4)


def test_windows_stay_inside_the_frame() -> None:
    rng = np.random.default_rng(0)
    for _ in range(2000):
        w, h = rng.uniform(0.01, 1, 2)
        x, y = rng.uniform(0, 1 - w), rng.uniform(0, 1 - h)
        height, width = (int(n) for n in rng.integers(1, 60, 2))
        resize = ("squash", "crop")[int(rng.integers(2))]
        top, left, rows, columns = crop_window((x, y, w, h), (height, width), (32, 48), resize)
        assert 0 <= top < top + rows <= height
        assert 0 <= left < left + columns <= width


def test_colour_is_clamped_before_the_blur() -> None:
    frames = picture(32, 32)
    jitter = (1.4, 1.3, 1.2, 0.2)
    view = ViewParameters(colour=colour_matrix(jitter=jitter), blur_sigma=1.5)
    expected = np.clip(step_by_step(frames / 255, False, jitter), 0, 1)
    assert ((expected == 0) | (expected == 1)).mean() > 0.1
    blurred = np.stack([cv2.GaussianBlur(frame, (25, 25), 1.5) for frame in expected])
    np.testing.assert_allclose(as_pixels(apply_view(frames, view, (32, 32))), blurred, atol=3e-3)
    sharp = ViewParameters(colour=view.colour)
    np.testing.assert_allclose(as_pixels(apply_view(frames, sharp, (32, 32))), expected, atol=3e-3)


def test_the_blur_kernel_is_as_wide_as_said() -> None:
    frames = np.zeros((1, 31, 31, 3), np.uint8)
    frames[0, 15, 15] = 255
    view = apply_view(frames, ViewParameters(blur_sigma=3.0), (31, 31), blur_kernel=5)
    assert (as_pixels(view)[0, ..., 0] > 1e-4).sum() == 25


@pytest.mark.parametrize("sigma", [0.1, 0.43, 0.87, 1.3, 2.0, 4.0])
def test_the_blur_leaves_out_only_what_weighs_nothing(sigma: float) -> None:
    """A Gaussian of 25 taps in double precision, whatever is cut off for speed."""
    frames = np.random.default_rng(2).integers(0, 2, (1, 48, 40, 3)).astype(np.uint8) * 255
    got = apply_view(frames, ViewParameters(blur_sigma=sigma), (48, 40))
    taps = np.exp(-(np.arange(-12, 13) ** 2) / (2 * sigma**2))
    kernel = taps / taps.sum()
    whole = cv2.sepFilter2D(frames[0] / 255, -1, kernel, kernel, borderType=cv2.BORDER_REFLECT_101)
    expected = (whole - IMAGENET_MEAN) / IMAGENET_STD
    np.testing.assert_allclose(got[0], expected.transpose(2, 0, 1), atol=1e-5)


def test_a_view_is_a_cut_and_its_colours() -> None:
    frames = picture(20, 28)
    view = ViewParameters((0.1, 0.2, 0.6, 0.5), True, colour_matrix(jitter=(1.2, 1.1, 1, 0)), 0.8)
    cut = cut_frames(frames, view, (12, 16))
    assert (cut.shape, cut.dtype) == ((3, 12, 16, 3), np.uint8)
    np.testing.assert_array_equal(recolour(cut, view), apply_view(frames, view, (12, 16)))


def test_a_view_is_written_where_it_is_wanted() -> None:
    frames, batch = picture(20, 20, 2), torch.zeros(2, 2, 2, 3, 16, 16)
    view = ViewParameters(flip=True, blur_sigma=1.0)
    result = apply_view(frames, view, (16, 16), out=batch[1, 0].numpy())
    np.testing.assert_array_equal(batch[1, 0].numpy(), apply_view(frames, view, (16, 16)))
    assert np.shares_memory(result, batch.numpy())
    assert batch[0].abs().sum() == batch[1, 1].abs().sum() == 0


def test_frames_of_several_sizes_make_one_clip() -> None:
    frames = [np.full((10 + 7 * i, 30, 3), 60 * i, np.uint8) for i in range(3)]
    view = apply_view(frames, ViewParameters(), (8, 8), resize="crop")
    np.testing.assert_allclose(as_pixels(view)[:, 4, 4, 1] * 255, [0, 60, 120], atol=1e-3)


def test_frames_for_evaluation() -> None:
    frames = picture(20, 40)
    got = prepare_frames(frames, (16, 16))
    assert (got.shape, got.dtype) == ((3, 3, 16, 16), torch.float32)
    plain = apply_view(frames, ViewParameters(), (16, 16))
    np.testing.assert_array_equal(got.numpy(), plain)
    halves = prepare_frames(frames, (20, 40), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    np.testing.assert_allclose(halves.numpy(), frames.transpose(0, 3, 1, 2) / 127.5 - 1, atol=1e-5)
