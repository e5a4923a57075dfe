"""What each protocol makes of a video, against values worked out by hand.

Frames are 40 x 60, so boundaries match within one pixel. The boundary of a square of n x n pixels
is the outline of n + 1 x n + 1, that is 4n pixels: a pixel differs from its east, south or
south-east neighbour.

`SHIFTED`, used throughout: a square of 10 x 10 that lies three pixels to the right of the true one.
    J: 7 x 10 pixels are shared, of 2 · 100 - 70 in all: 70 / 130 = 7/13.
    F: outlines of 11 x 11, 40 pixels each, three columns apart. Of one's upper side, 11 pixels, the
    eight that lie on the other's and one beyond are matched: 9; of the lower side 9; of the nine
    inner pixels of the side that lies within the other the uppermost and the lowest, which touch
    its upper and lower sides: 2; of the fourth side none. 20 of 40, both ways: P = R = F = 1/2.
"""

import json
import math

import numpy as np
import pytest
from written_datasets import (
    square,
    write_davis2016,
    write_davis2017,
    write_fbms59,
    write_list,
    write_segtrackv2,
)

from smtc.errors import UserError
from smtc.evaluation import metrics, protocols
from smtc.evaluation.datasets import DATASETS, open_dataset
from smtc.evaluation.protocols import PROTOCOLS, Found, scores_from_json, scores_to_json

TRUE, SHIFTED, NONE = square(), square(left=13), square(value=0)
J, F = 7 / 13, 1 / 2
OTHER = square(25, 40, 10, 2)
"""A second object, far from the first."""


def seen(frames, semantic=None, proposals=None):
    """What a method sees that finds the ids `frames`."""
    ids = np.stack(frames)
    return Found(semantic=ids if semantic is None else semantic, instances=ids, proposals=proposals)


def scores_of(dataset, found, true):
    return PROTOCOLS[dataset].score(found, np.stack(true))


def davis2017(found, true, proposals=None):
    return scores_of("davis2017-unsupervised", seen(found, proposals=proposals), true)


def same(values, wanted):
    return np.asarray(values) == pytest.approx(np.asarray(wanted, float), abs=1e-12, nan_ok=True)


def test_the_square_that_all_others_are_made_of():
    assert metrics.region_similarity(SHIFTED[None] > 0, TRUE[None] > 0).tolist() == [J]
    assert metrics.boundary_f(SHIFTED[None] > 0, TRUE[None] > 0).tolist() == [F]


def test_every_data_set_has_a_protocol():
    assert set(PROTOCOLS) == set(DATASETS)


# DAVIS-2016, SegTrack-v2 and FBMS-59: foreground.


def long_and_short(dataset):
    """Scores of five frames and of four: J is 1, 7/13, 7/13, 1, 0 and 0, 1, 1, 0; F is 1, 1/2, …"""
    long = seen([TRUE, SHIFTED, SHIFTED, TRUE, NONE])
    short = seen([NONE, TRUE, TRUE, NONE])
    return [scores_of(dataset, long, [TRUE] * 5), scores_of(dataset, short, [TRUE] * 4)]


def test_davis2016_drops_the_ends_of_a_sequence():
    row = PROTOCOLS["davis2016"].summarise(long_and_short("davis2016"))
    assert row["j_frames"] == pytest.approx((1 + J + J + 1 + 0 + 0 + 1 + 1 + 0) / 9)
    assert row["f_frames"] == pytest.approx((1 + F + F + 1 + 0 + 0 + 1 + 1 + 0) / 9)
    assert row["j_sequences"] == pytest.approx(((J + J + 1) / 3 + (1 + 1) / 2) / 2)
    assert row["f_sequences"] == pytest.approx(((F + F + 1) / 3 + (1 + 1) / 2) / 2)


@pytest.mark.parametrize("dataset", ["segtrackv2", "fbms59"])
def test_the_other_data_sets_count_every_annotated_frame(dataset):
    row = PROTOCOLS[dataset].summarise(long_and_short(dataset))
    assert row["j_frames"] == pytest.approx((1 + J + J + 1 + 0 + 0 + 1 + 1 + 0) / 9)
    assert row["j_sequences"] == pytest.approx(((1 + J + J + 1 + 0) / 5 + (1 + 1) / 4) / 2)
    assert row["f_sequences"] == pytest.approx(((1 + F + F + 1 + 0) / 5 + (1 + 1) / 4) / 2)


def test_a_videos_row_has_recall_and_decay():
    long, _ = long_and_short("davis2016")
    # Within the ends 7/13, 7/13, 1: all above 1/2; bins of frames 1-2, …, 3.
    row = PROTOCOLS["davis2016"].video(long)
    assert (row["j_recall"], row["j_decay"]) == pytest.approx((1, J - 1))
    # With them 1, 7/13, 7/13, 1, 0: four of five; bins of frames 1-2, 2-3, 3-4 and 4-5.
    row = PROTOCOLS["fbms59"].video(long)
    assert (row["j_recall"], row["j_decay"]) == pytest.approx((4 / 5, (1 + J) / 2 - 1 / 2))


def test_objects_of_any_id_are_one_foreground():
    both, found = TRUE + OTHER, np.where(SHIFTED > 0, 9, 0) + np.where(OTHER > 0, 7, 0)
    scores = scores_of("davis2016", seen([found]), [both])
    # 70 + 100 of 130 + 100 pixels; outlines 20 + 40 of 40 + 40.
    assert scores["j"].tolist() == [170 / 230]
    assert scores["f"] == pytest.approx([60 / 80])
    grey = scores_of("davis2016", seen([found]), [np.where(both > 0, 255, 0).astype(np.uint8)])
    assert scores_to_json(grey) == scores_to_json(scores)


def test_all_masks_of_davis2016_count_alike(tmp_path):
    for video in open_dataset("davis2016", write_davis2016(tmp_path)):
        scores = scores_of("davis2016", seen([SHIFTED] * 3), video.load_truth())
        # With the second object, 5 x 5 pixels, the union has 25 more, its outline 20 more.
        wanted = 70 / 155 if video.name == "ids" else J
        assert scores["j"].tolist() == [wanted] * 3, video.name
        recall = 20 / 60 if video.name == "ids" else F
        assert scores["f"] == pytest.approx([2 * F * recall / (F + recall)] * 3)


def test_segtrack_scores_its_merged_objects(tmp_path):
    root = write_segtrackv2(tmp_path)
    for penguin, pixels in ((False, 16), (True, 96)):
        videos = open_dataset("segtrackv2", root, penguin=penguin)
        found = {
            video.name: scores_of("segtrackv2", seen([TRUE] * 3), video.load_truth())
            for video in videos
        }
        assert found["girl"]["j"].tolist() == [1, 1, 1]
        # Of the first object a column is below the threshold; 25 pixels of the second are missed.
        assert found["cheetah"]["j"].tolist() == [90 / 125] * 3
        assert found["penguin"]["j"].tolist() == [0, 0, 0]
        everywhere = seen([np.ones((40, 60), np.uint8)] * 3)
        birds = next(video for video in videos if video.name == "penguin").load_truth()
        assert scores_of("segtrackv2", everywhere, birds)["j"].tolist() == [pixels / 2400] * 3
        row = PROTOCOLS["segtrackv2"].summarise(list(found.values()))
        assert row["j_sequences"] == pytest.approx((1 + 90 / 125 + 0) / 3)


def test_fbms_scores_the_annotated_frames_only(tmp_path):
    videos = {video.name: video for video in open_dataset("fbms59", write_fbms59(tmp_path))}
    left = np.zeros((40, 60), np.uint8)
    left[:, :24] = 1
    wanted = {"marple7": 20 / 24, "cars1": 12 / 24, "marple2": 4 / 24}  # columns above threshold
    scores = []
    for name, share in wanted.items():
        found = seen([left] * len(videos[name].annotated))
        scores.append(scores_of("fbms59", found, videos[name].load_truth()))
        assert scores[-1]["j"].tolist() == [share, share]
    row = PROTOCOLS["fbms59"].summarise(scores)
    assert (row["j_frames"], row["j_sequences"]) == pytest.approx((36 / 72, 36 / 72))


# DAVIS-2017 without supervision: proposals.


def test_ids_are_matched_once_a_sequence_and_masks_once_a_frame():
    """Ids 5 and 6 change places in the last of three frames."""
    right = np.where(TRUE > 0, 5, 0) + np.where(OTHER > 0, 6, 0)
    wrong = np.where(TRUE > 0, 6, 0) + np.where(OTHER > 0, 5, 0)
    scores = davis2017([right, right, wrong], [TRUE + OTHER] * 3)
    assert scores["per_sequence_j"].tolist() == [[1, 1, 0], [1, 1, 0]]
    assert scores["per_sequence_f"].tolist() == [[1, 1, 0], [1, 1, 0]]
    assert scores["per_frame_j"].tolist() == [[1, 1, 1], [1, 1, 1]]
    row = PROTOCOLS["davis2017-unsupervised"].summarise([scores])
    # Bins of three frames: 1-2, 2, 2-3, 3. So the first is 1, the last 0.
    names = ("jf_mean", "j_mean", "j_recall", "j_decay", "f_mean", "f_recall", "f_decay")
    values = [row[f"per_sequence_{name}"] for name in names]
    assert values == pytest.approx([2 / 3, 2 / 3, 2 / 3, 1, 2 / 3, 2 / 3, 1])
    assert [row[f"per_frame_{name}"] for name in names] == [1, 1, 1, 0, 1, 1, 0]
    assert len(row) == 14


def test_the_matching_is_by_the_mean_of_j_and_f_over_time():
    """A shrunken square has the greater J, a shifted one the greater mean of J and F."""
    true = square(5, 5, 20)
    shrunken, shifted = square(7, 7, 16), square(5, 10, 20, 2)
    # J 256/400, F 0 (two pixels off) against J 15/25 and, outlines of 21 x 21 five apart,
    # (17 + 17 + 2) / 80.
    scores = davis2017([shrunken, shifted], [true, true])
    assert same(scores["per_sequence_j"], [[0, 0.6]])
    assert same(scores["per_sequence_f"], [[0, 36 / 80]])
    overlapping = np.stack([shrunken > 0, shifted > 0])
    scores = davis2017([NONE, NONE], [true, true], proposals=[overlapping, overlapping[:1]])
    assert same(scores["per_frame_j"], [[0.6, 256 / 400]])
    assert same(scores["per_frame_f"], [[36 / 80, 0]])
    assert same(scores["per_sequence_j"], [[0, 0]])


def test_the_matching_has_the_greatest_sum():
    """Taken one by one, the first object's best proposal would be the second's only one.

    The objects lie in columns 10-19 and 20-29. Proposal 7, in columns 13-24, has J 70/150 and F
    40/84 with the first (20 of its 44 pixels of outline are matched, 20 of 40 there), J 50/170 and
    F 32/84 with the second (16 of 44, 16 of 40). Proposal 8, in columns 10-12, has J 30/100 and F
    38/66 with the first (19 of 26, 19 of 40) and nothing with the second. The means of J and F are
    0.471, 0.338, 0.438 and 0.
    """
    true = square() + square(left=20, value=2)
    found = np.zeros_like(true)
    found[10:20, 13:25], found[10:20, 10:13] = 7, 8
    scores = davis2017([found], [true])
    assert same(scores["per_sequence_j"], [[30 / 100], [50 / 170]])
    assert same(scores["per_sequence_f"], [[38 / 66], [32 / 84]])
    assert same(scores["per_frame_j"], scores["per_sequence_j"])
    assert same(scores["per_frame_f"], scores["per_sequence_f"])


def test_objects_without_a_proposal_get_an_empty_one():
    """One proposal for two objects, of which the second leaves in the last frame."""
    scores = davis2017([SHIFTED * 4] * 3, [TRUE + OTHER, TRUE + OTHER, TRUE])
    assert same(scores["per_sequence_j"], [[J, J, J], [0, 0, 1]])
    assert same(scores["per_sequence_f"], [[F, F, F], [0, 0, 1]])
    # An object that is not there is not scored where each frame is matched by itself.
    assert same(scores["per_frame_j"], [[J, J, J], [0, 0, math.nan]])
    row = PROTOCOLS["davis2017-unsupervised"].summarise([scores])
    assert row["per_sequence_j_mean"] == pytest.approx((J + 1 / 3) / 2)
    assert row["per_frame_j_mean"] == pytest.approx((J + 0) / 2)
    # 7/13 counts as found, 1/2 in F does not.
    assert row["per_sequence_j_recall"] == pytest.approx((1 + 1 / 3) / 2)
    assert row["per_sequence_f_recall"] == pytest.approx((0 + 1 / 3) / 2)
    assert row["per_frame_j_recall"] == pytest.approx((1 + 0) / 2)
    nothing = davis2017([NONE], [TRUE + OTHER])
    assert all(not values.any() for values in nothing.values())


def test_a_proposal_where_an_object_is_gone_is_wrong():
    scores = davis2017([TRUE, TRUE], [TRUE, NONE])
    assert scores["per_sequence_j"].tolist() == [[1, 0]]
    assert same(scores["per_frame_j"], [[1, math.nan]])
    row = PROTOCOLS["davis2017-unsupervised"].summarise([scores])
    assert (row["per_sequence_j_recall"], row["per_frame_j_recall"]) == (1 / 2, 1)


def test_an_object_may_stay_when_the_first_is_gone():
    scores = davis2017([TRUE + OTHER, OTHER * 4], [TRUE + OTHER, OTHER])
    assert same(scores["per_frame_j"], [[1, math.nan], [1, 1]])
    assert same(scores["per_frame_f"], [[1, math.nan], [1, 1]])


def test_proposals_left_over_are_ignored():
    junk = TRUE + np.where(OTHER > 0, 9, 0) + square(0, 30, 8, 4)
    scores = davis2017([junk], [TRUE])
    assert [values.tolist() for values in scores.values()] == [[[1]]] * 4
    row = PROTOCOLS["davis2017-unsupervised"].video(scores)
    assert row["objects"] == 1 and row["per_sequence_jf_mean"] == 1


def test_void_counts_nowhere():
    """The prediction covers the object and void beside it, and an object's part is void."""
    true = TRUE.copy()
    true[10:20, 20:25] = 255
    found = square(10, 10, 10)
    found[10:20, 20:25] = 1
    scores = davis2017([found, TRUE], [true, true])
    assert scores["per_sequence_j"].tolist() == [[1, 1]]
    assert scores["per_sequence_f"].tolist() == [[1, 1]]
    assert scores["per_frame_f"].tolist() == [[1, 1]]
    # Without void: 100 of 150 pixels.
    plain = davis2017([found, found], [TRUE, TRUE])
    assert same(plain["per_sequence_j"], [[100 / 150] * 2])
    half = TRUE.copy()
    half[:, 15:20] = np.where(half[:, 15:20] > 0, 255, 0)
    # Columns 10-14 are left of the object, 13-14 and 20-22 of the prediction: 2 of 8.
    assert same(davis2017([SHIFTED], [half])["per_sequence_j"], [[2 / 8]])


def test_twenty_ids_count_in_a_sequence():
    """25 ids: the small ones are left out, however well they fit, but not within a frame."""
    strips = np.zeros((40, 60), np.uint8)
    for index in range(24):
        strips[20 + index % 12, (index // 12) * 30 : (index // 12) * 30 + 30] = index + 2
    true = square(5, 5, 4)
    scores = davis2017([strips + true], [true])
    assert scores["per_sequence_j"].tolist() == [[0]]
    assert scores["per_frame_j"].tolist() == [[1]]
    few = np.where(strips > 20, 0, strips)  # 19 ids and the right one
    assert davis2017([few + true], [true])["per_sequence_j"].tolist() == [[1]]


def test_three_hundred_masks_count_in_a_frame():
    masks = np.zeros((301, 40, 60), bool)
    masks[300] = TRUE > 0
    assert davis2017([NONE], [TRUE], proposals=[masks])["per_frame_j"].tolist() == [[0]]
    assert davis2017([NONE], [TRUE], proposals=[masks[1:]])["per_frame_j"].tolist() == [[1]]
    # A frame without any proposal is no error.
    assert davis2017([NONE], [TRUE], proposals=[masks[:0]])["per_frame_j"].tolist() == [[0]]


def test_means_are_over_objects_not_sequences():
    first = davis2017([TRUE + OTHER], [TRUE + OTHER])
    second = davis2017([SHIFTED], [TRUE])
    row = PROTOCOLS["davis2017-unsupervised"].summarise([first, second])
    assert row["per_sequence_j_mean"] == pytest.approx((1 + 1 + J) / 3)
    assert row["per_sequence_f_mean"] == pytest.approx((1 + 1 + F) / 3)
    assert row["per_sequence_jf_mean"] == pytest.approx(((2 + J) / 3 + (2 + F) / 3) / 2)


def test_objects_are_those_of_the_first_frame(tmp_path):
    late = [TRUE, TRUE + OTHER]
    scores = davis2017(late, late)
    assert scores["per_sequence_j"].shape == (1, 2)
    void = np.where(TRUE > 0, 255, 0).astype(np.uint8)
    with pytest.raises(UserError, match="first mask shows no object; use the masks of Annotations"):
        davis2017([TRUE, TRUE], [void, TRUE])
    root = write_davis2017(tmp_path, {"a": [void, TRUE], "b": [TRUE, void]})
    first, second = open_dataset("davis2017-unsupervised", root)
    with pytest.raises(UserError, match=r"a/00000\.png: it shows no object, .*; use the original"):
        first.load_truth()
    assert second.load_truth()[1].max() == 255


def test_a_data_set_on_disk_gives_the_same(tmp_path):
    write_davis2017(tmp_path, {"a": [TRUE + OTHER] * 3, "b": [TRUE] * 2, "unlisted": [TRUE]})
    write_list(tmp_path, "ImageSets/2017/val.txt", "b", "a")
    found = {"a": [SHIFTED + OTHER] * 3, "b": [TRUE] * 2}
    scores = [
        scores_of("davis2017-unsupervised", seen(found[video.name]), video.load_truth())
        for video in open_dataset("davis2017-unsupervised", tmp_path)
    ]
    row = PROTOCOLS["davis2017-unsupervised"].summarise(scores)
    assert row["per_sequence_j_mean"] == pytest.approx((J + 1 + 1) / 3)


# The synthetic protocol: identity.


def identity(found, true):
    scores = protocols.score_identity(np.stack(found), np.stack(true))
    return {name: values.tolist() for name, values in scores.items()}, protocols.mean_row([scores])


def test_an_id_that_changes_is_a_switch():
    """The first object is 5, 5, 6; the second 6, lost, 6: it is matched anew to its old id."""
    ids = [
        np.where(TRUE > 0, 5, 0) + np.where(OTHER > 0, 6, 0),
        np.where(TRUE > 0, 5, 0),
        np.where(TRUE > 0, 7, 0) + np.where(OTHER > 0, 6, 0),
    ]
    counts, row = identity(ids, [TRUE + OTHER] * 3)
    assert counts == {
        "id_switches": [0, 0, 1],
        "id_transitions": [0, 1, 2],
        "ids_matched": [2, 1, 2],
        "ids_visible": [2, 2, 2],
    }
    assert row == pytest.approx({"identity_switch_rate": 1 / 3, "id_coverage": 5 / 6})


def test_ids_that_change_places_are_two_switches():
    right = TRUE + OTHER
    wrong = np.where(right > 0, 3 - right, 0)
    counts, row = identity([right, wrong, right], [right] * 3)
    assert counts["id_switches"] == [0, 2, 2] and row["identity_switch_rate"] == 1
    assert row["id_coverage"] == 1


def test_who_finds_nothing_never_switches_but_covers_nothing():
    _, row = identity([NONE] * 3, [TRUE] * 3)
    assert math.isnan(row["identity_switch_rate"]) and row["id_coverage"] == 0
    _, row = identity([TRUE] * 3, [NONE] * 3)
    assert math.isnan(row["identity_switch_rate"]) and math.isnan(row["id_coverage"])
    # One frame cannot switch.
    _, row = identity([TRUE], [TRUE])
    assert math.isnan(row["identity_switch_rate"]) and row["id_coverage"] == 1


def test_what_is_small_or_badly_hit_is_not_matched():
    small = square(30, 5, 5, 3)  # 25 pixels
    grazing = square(10, 16, 10)  # 40 of 160 pixels: 0.25
    hit = square(10, 15, 10)  # 50 of 150: a third
    counts, _ = identity([small + grazing, small + hit], [small + TRUE] * 2)
    assert counts["ids_visible"] == [1, 1] and counts["ids_matched"] == [0, 1]


def test_background_is_no_id():
    counts, _ = identity([np.where(TRUE > 0, 0, 3)], [TRUE])
    assert counts["ids_matched"] == [0] and counts["ids_visible"] == [1]


def test_one_id_is_matched_to_one_object():
    """One id over two touching objects: each is half of it, one is matched."""
    true = square(10, 10, 10) + square(10, 20, 10, 2)
    counts, _ = identity([np.where(true > 0, 4, 0)], [true])
    assert counts["ids_matched"] == [1] and counts["ids_visible"] == [2]


def test_the_sum_of_ious_decides_who_is_matched():
    """Alone the first object would take the id that the second needs."""
    true = square(10, 10, 10) + square(10, 20, 10, 2)
    ids = np.zeros((40, 60), np.uint8)
    ids[10:20, 10:14] = 5  # IoU 40/100 with the first object
    ids[10:20, 14:30] = 6  # 60/200 with the first, 100/160 with the second
    counts, _ = identity([ids], [true])
    assert counts["ids_matched"] == [2]


def test_a_rate_is_a_ratio_of_sums_over_videos():
    long = protocols.score_identity(np.stack([TRUE, TRUE * 2, TRUE * 2]), np.stack([TRUE] * 3))
    short = protocols.score_identity(np.stack([TRUE, TRUE * 2]), np.stack([TRUE] * 2))
    row = protocols.mean_row([long, short])
    assert row["identity_switch_rate"] == pytest.approx((1 + 1) / (2 + 1))


def test_the_synthetic_protocol_scores_identity_on_instances():
    found = Found(
        semantic=np.stack([TRUE, TRUE]), instances=np.stack([TRUE, TRUE * 2]), regions=None
    )
    row = PROTOCOLS["synthetic"].summarise([PROTOCOLS["synthetic"].score(found, found.semantic)])
    assert row["identity_switch_rate"] == 1 and row["id_coverage"] == 1 and row["miou"] == 1
    assert "id_switches" not in row


# All of them.


@pytest.mark.parametrize("dataset", DATASETS)
def test_scores_come_back_from_json_to_the_last_bit(dataset):
    found = seen([SHIFTED, NONE, TRUE])
    protocol = PROTOCOLS[dataset]
    scores = scores_of(dataset, found, [TRUE, NONE, TRUE + OTHER])
    text = json.dumps(scores_to_json(scores), allow_nan=False)
    back = scores_from_json(json.loads(text))
    assert list(back) == list(scores)
    for name, values in scores.items():
        assert back[name].dtype == np.float64
        np.testing.assert_array_equal(back[name], values)
    for make in (protocol.summarise, lambda one: protocol.video(one[0])):
        assert scores_to_json_row(make([back])) == scores_to_json_row(make([scores]))


def scores_to_json_row(row):
    return {name: None if math.isnan(value) else value for name, value in row.items()}


def test_real_masks_are_perfect_and_shifted_ones_are_not(davis2016):
    video = next(v for v in open_dataset("davis2016", davis2016) if v.name == "car-shadow")
    truth = np.stack([video.read(paths) for paths in video.annotations[:6]])
    moved = np.roll(truth, 12, axis=2)
    for dataset, true in (("davis2016", truth), ("davis2017-unsupervised", truth // 255)):
        perfect = scores_of(dataset, seen(true), true)
        assert all((values == 1).all() for values in perfect.values())
        worse = scores_of(dataset, seen(np.roll(true, 12, axis=2)), true)
        names = ("j", "f") if dataset == "davis2016" else ("per_sequence_j", "per_sequence_f")
        j, f = (worse[name].ravel() for name in names)
        assert (j > 0.5).all() and (j < 0.95).all() and (f < j).all()
        assert same(j, metrics.region_similarity(moved > 0, truth > 0))
        assert same(f, metrics.boundary_f(moved > 0, truth > 0))
