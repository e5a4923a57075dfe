"""Ids that follow objects, frame by frame."""

import numpy as np

from smtc.tracking import MATCHED, REMEMBERED, Tracker


def box(top, left, size=4, grid=16):
    mask = np.zeros((grid, grid), np.float32)
    mask[top : top + size, left : left + size] = 1
    return mask


def kind(*values):
    vector = np.array(values, np.float32)
    return vector / np.linalg.norm(vector)


A, B, C = kind(1, 0, 0), kind(0, 1, 0), kind(0, 0, 1)


def update(tracker, *objects):
    masks = np.array([mask for mask, _ in objects], np.float32).reshape(-1, 16, 16)
    embeddings = np.array([one for _, one in objects], np.float32).reshape(-1, 3)
    return tracker.update(masks, embeddings).tolist()


def test_ids_count_in_order_of_appearance_and_follow_objects_in_any_order():
    tracker = Tracker()
    assert update(tracker, (box(0, 0), A), (box(8, 8), B)) == [1, 2]
    assert update(tracker, (box(8, 9), B), (box(4, 4), C), (box(1, 0), A)) == [2, 3, 1]
    assert update(tracker) == []
    assert update(tracker, (box(5, 4), C)) == [3]


def test_alike_objects_are_told_apart_by_where_they_are():
    tracker = Tracker()
    update(tracker, (box(0, 0), A), (box(0, 8), A))
    for step in range(1, 5):
        assert update(tracker, (box(step, 8), A), (box(step, 0), A)) == [2, 1]


def test_objects_in_one_place_are_told_apart_by_what_they_are():
    tracker = Tracker()
    update(tracker, (box(4, 4), A), (box(4, 5), B))
    assert update(tracker, (box(4, 5), A), (box(4, 4), B)) == [1, 2]


def test_the_greatest_sum_decides_not_the_greedy_choice():
    tracker = Tracker()
    update(tracker, (box(4, 4), kind(1, 0.2, 0)), (box(4, 6), kind(1, 0, 0.2)))
    # The first is a little more like track 2, the second could only be track 2.
    ids = update(tracker, (box(4, 5), kind(1, 0.1, 0.11)), (box(4, 8), kind(1, 0, 1)))
    assert ids == [1, 2]


def test_what_matches_too_little_is_new():
    tracker = Tracker()
    update(tracker, (box(0, 0), A))
    alike = kind(2 * MATCHED - 0.02, np.sqrt(1 - (2 * MATCHED - 0.02) ** 2), 0)
    assert update(tracker, (box(8, 8), alike)) == [2]
    tracker = Tracker()
    update(tracker, (box(0, 0), A))
    alike = kind(2 * MATCHED + 0.02, np.sqrt(1 - (2 * MATCHED + 0.02) ** 2), 0)
    assert update(tracker, (box(8, 8), alike)) == [1]


def test_an_object_out_of_sight_is_found_again_for_a_while():
    for away, number in ((REMEMBERED - 1, 1), (REMEMBERED, 2)):
        tracker = Tracker()
        update(tracker, (box(0, 0), A))
        for _ in range(away):
            update(tracker)
        assert update(tracker, (box(2, 2), A)) == [number]


def test_a_slowly_changing_object_keeps_its_id():
    tracker = Tracker()
    for step in range(40):
        turned = kind(np.cos(step / 8), np.sin(step / 8), 0)
        assert update(tracker, (box(4 + step % 2, 4), turned)) == [1]


def test_when_ids_run_out_the_one_longest_out_of_sight_is_given_away():
    tracker = Tracker(max_objects=2)
    assert update(tracker, (box(0, 0), A), (box(12, 12), B)) == [1, 2]
    assert update(tracker, (box(12, 12), B)) == [2]
    assert update(tracker, (box(12, 12), B), (box(6, 6), C)) == [2, 1]
    # What had the id is forgotten.
    assert update(tracker, (box(0, 0), A), (box(6, 6), C)) == [2, 1]


def test_nothing_to_follow_is_no_error():
    tracker = Tracker()
    assert update(tracker) == [] and update(tracker) == []
    assert update(tracker, (np.zeros((16, 16)), A)) == [1]
    assert update(tracker, (np.zeros((16, 16)), A)) == [1]


def test_what_matches_too_little_does_not_push_others_off_their_ids():
    tracker = Tracker()
    update(tracker, (box(2, 2), kind(1, 1, 0)), (box(2, 4), kind(1, 1.2, 0)))
    # The first moves on, the second is gone, and what is new is like neither.
    assert update(tracker, (box(2, 3), kind(1, 1.1, 0)), (box(12, 12), -A)) in ([1, 3], [2, 3])
    tracker = Tracker()
    update(tracker, (box(2, 2), A), (box(2, 3), kind(1, 0.3, 0)))
    strange = kind(0.1, 0, 1)
    # Both together would gain most if the first took 2 and the stranger 1.
    assert update(tracker, (box(2, 2), kind(1, 0.1, 0)), (box(12, 12), strange)) == [1, 3]


def test_after_a_scene_nothing_is_found_again_but_numbers_go_on():
    tracker = Tracker(max_objects=3)
    assert update(tracker, (box(0, 0), A), (box(12, 12), B)) == [1, 2]
    tracker.forget()
    assert update(tracker, (box(0, 0), A)) == [3]
    assert update(tracker, (box(0, 0), A)) == [3]
    tracker.forget()
    assert update(tracker, (box(0, 0), A)) == [1]


def test_a_state_is_all_that_is_remembered():
    first, second = Tracker(3), Tracker(3)
    update(first, (box(0, 0), A), (box(12, 12), B))
    update(first, (box(0, 1), A))
    second.restore(first.state())
    for objects in ([(box(12, 12), B)], [(box(5, 5), C)], [(box(0, 1), A), (box(12, 11), B)]):
        assert update(first, *objects) == update(second, *objects)
    assert all(np.array_equal(v, second.state()[k]) for k, v in first.state().items())
