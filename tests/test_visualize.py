import numpy as np
import pytest
from PIL import Image

from smtc import visualize
from smtc.visualize import Sample


def test_davis_palette_is_the_usual_colour_map():
    palette = visualize.davis_palette()
    assert palette.shape == (256, 3)
    assert palette[:4].tolist() == [[0, 0, 0], [128, 0, 0], [0, 128, 0], [128, 128, 0]]
    assert palette[255].tolist() == [224, 224, 192]


def test_plain_colours_are_told_apart():
    palette = visualize.plain_palette(background=3).astype(int)
    first = palette[:16]
    distance = np.abs(first[:, None] - first).sum(-1) + 1000 * np.eye(16, dtype=int)
    assert distance.min() > 40
    assert (palette[3] < 64).all()
    assert (palette[16] == palette[0]).all()
    assert (visualize.plain_palette()[3] > 64).any()


def test_object_palette_keeps_zero_dark():
    objects, plain = visualize.object_palette(), visualize.plain_palette()
    assert objects.shape == (256, 3)
    assert (objects[0] < 64).all()
    assert (objects[1:] == plain[:-1]).all()


def test_overlay_tints_outlines_and_leaves_the_rest():
    frame = np.full((12, 12, 3), 100, np.uint8)
    mask = np.zeros((12, 12), np.uint8)
    mask[3:9, 3:9] = 2
    shown = visualize.overlay(frame, mask, opacity=0.5)
    colour = visualize.object_palette()[2].astype(int)
    assert (shown[mask == 0] == 100).all()
    assert (shown[3, 3:9] == colour).all()
    assert np.abs(shown[5, 5] - (100 + colour) / 2).max() <= 1
    assert (frame == 100).all()


def test_contact_sheet_places_pictures_under_their_titles():
    red, blue = (np.full((30, 40, 3), c, np.uint8) for c in ((255, 0, 0), (0, 0, 255)))
    sheet = visualize.contact_sheet([[red, blue], [blue, red]], ("one", "two"), tile=60)
    is_red = (sheet == (255, 0, 0)).all(-1)
    is_blue = (sheet == (0, 0, 255)).all(-1)
    assert is_red.sum() == is_blue.sum() == 2 * 60 * 80
    rows, columns = np.nonzero(is_red)
    first = rows < rows.min() + 60
    assert columns[first].max() < columns[~first].min()
    titles = sheet[: rows.min()]
    assert (titles < 100).all(-1).any()
    named = visualize.contact_sheet([[red, blue]], ("one", "two"), names=["a video"], tile=60)
    below = named[np.nonzero((named == (255, 0, 0)).all(-1))[0].max() + 1 :]
    assert (below < 180).all(-1).any()


def test_large_pictures_are_averaged_and_small_ones_enlarged_by_pixels():
    board = np.indices((40, 40)).sum(0) % 2 * 255
    board = np.repeat(board[..., None], 3, -1).astype(np.uint8)
    assert np.unique(visualize._to_height(board, 20)).tolist() in ([127], [128])
    assert np.unique(visualize._to_height(board, 100)).tolist() == [0, 255]
    assert visualize._to_height(board[:, :20], 80).shape == (80, 40, 3)


def ink(picture, colour_index):
    colour = visualize.plain_palette()[colour_index].astype(int)
    return np.argwhere(np.abs(picture.astype(int) - colour).sum(-1) < 30)


def test_curves_rise_and_fall_with_their_values():
    steps = np.arange(0, 101, 10)
    curves = {"falls": list(zip(steps, 3 - steps / 50, strict=True)), "rises": [(0, 0), (100, 2)]}
    picture = visualize.plot_curves(curves, size=(400, 200), title="loss")
    assert picture.shape == (200, 400, 3)
    for index, sign in ((4, 1), (0, -1)):
        points = ink(picture, index)
        points = points[points[:, 0] > 34]  # below the legend
        left, right = points[points[:, 1] < 150], points[points[:, 1] > 300]
        assert sign * (right[:, 0].mean() - left[:, 0].mean()) > 40


def test_curves_skip_what_is_not_finite_and_survive_little_data():
    nothing = visualize.plot_curves({"empty": []}, size=(300, 150), title="loss")
    assert not len(ink(nothing, 4))
    assert (nothing < 200).all(-1).sum() > 50
    same = {"a": [(0, 1.0), (1, float("nan")), (2, 1.0)], "one": [(1, 1.0)]}
    picture = visualize.plot_curves(same, size=(300, 150), title="loss")
    assert len(ink(picture, 4)) > 100
    visualize.plot_curves({"one": [(5, 0.0)]}, size=(300, 150), title="loss")


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (-0.4, 3, [-1, 0, 1, 2, 3]),
        (0, 300, [0, 100, 200, 300]),
        (2.1, 2.11, [2.1, 2.102, 2.104, 2.106, 2.108, 2.11]),
    ],
)
def test_ticks_are_round_and_enclose_the_values(low, high, ticks):
    assert visualize._round_ticks(low, high).tolist() == pytest.approx(ticks)


@pytest.mark.parametrize("value", [0.0, 1.0, -7e5, 1e-9])
def test_ticks_of_a_constant(value):
    ticks = visualize._round_ticks(value, value)
    assert 2 <= len(ticks) <= 7
    assert ticks[0] <= value <= ticks[-1] and ticks[0] < ticks[-1]


def test_training_report_shows_samples_above_curves(tmp_path):
    frame = np.full((24, 32, 3), 200, np.uint8)
    labels = np.zeros((24, 32), np.uint8)
    labels[5:15, 5:15] = 1
    samples = [Sample(f"video {k}", frame, labels, labels * 2, labels * 3, 0) for k in range(3)]
    path = visualize.training_report(
        tmp_path / "report.png", samples, {"alignment": [(0, 2.0), (10, 1.0)]}
    )
    assert [p.name for p in tmp_path.iterdir()] == ["report.png"]
    with Image.open(path) as image:
        picture = np.asarray(image)
    sheet = visualize.sample_sheet(samples)
    assert np.array_equal(picture[: len(sheet)], sheet)
    assert len(ink(picture[len(sheet) :], 4)) > 100
    # Semantic 1, instance 2 and truth 3 in the colours of plain ids 1, 1 and 2.
    assert len(ink(sheet, 1)) == 2 * len(ink(sheet, 2)) == 2 * 3 * 80 * 80
