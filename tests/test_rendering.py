"""Soft masks to masks of a frame's size, against the obvious way over all masks."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from smtc.rendering import SoftMasks, frame_masks, soft_masks, winners


def soft(masks, semantics, scores, candidates=None):
    scores = torch.tensor(scores)
    chosen = torch.ones(len(masks), dtype=torch.bool) if candidates is None else candidates
    return SoftMasks(masks, torch.tensor(semantics), scores, chosen)


def rendered(given, size, **options):
    usual = {"background": None, "threshold": 0.3, "min_object": 0.0, "max_objects": 255}
    return frame_masks(given, size, **(usual | options))


def random_masks(count, seed=0, sharpness=6.0, grid=(6, 7)):
    generator = torch.Generator().manual_seed(seed)
    return (sharpness * torch.randn(count, *grid, generator=generator)).softmax(0)


@pytest.mark.parametrize("size", [(33, 50), (6, 7), (3, 4), (1, 1), (200, 90)])
@pytest.mark.parametrize("sharpness", [0.1, 6.0])
def test_winners_is_the_argmax_of_bilinearly_upsampled_masks(size, sharpness):
    masks = random_masks(12, sharpness=sharpness)
    whole = F.interpolate(masks[None], size, mode="bilinear", align_corners=False)[0]
    assert np.array_equal(winners(masks, size), whole.argmax(0).numpy())


def test_ties_go_to_the_first_mask_and_many_masks_have_numbers():
    assert not winners(torch.ones(3, 2, 2), (4, 4)).any()
    masks = torch.zeros(300, 2, 2)
    masks[299] = 1
    assert (winners(masks, (3, 3)) == 299).all()


def test_candidates_compete_with_all_masks_of_the_background():
    masks = random_masks(6, seed=1)
    candidates = torch.tensor([True, False, True, True, False, True])
    given = soft(masks, [0, 0, 1, 1, 2, 2], [1.0] * 6, candidates)
    found = rendered(given, (40, 30), background=1)
    # 2 and 3 are background, 1 and 4 are no candidates.
    allowed = [0, 2, 3, 5]
    whole = F.interpolate(masks[None, allowed], (40, 30), mode="bilinear")[0].argmax(0).numpy()
    wanted = np.array([1, 0, 0, 6])[whole]
    assert np.array_equal(found.paint(found.slots + 1), wanted)
    assert set(found.slots) <= {0, 5}
    assert found.proposals().sum() == (wanted > 0).sum()


def test_threshold_masks_are_stretched_nearest_and_painted_by_rising_score():
    masks = torch.tensor([[[0.10, 0.13], [0.14, 0.20]], [[0.5, 0.0], [0.0, 0.9]]])
    # The first, stretched: 0, .3, .4, 1.
    found = rendered(soft(masks, [0, 1], [0.9, 0.6]), (4, 4), threshold=0.31)
    shown = found.paint(found.slots + 1).tolist()
    assert shown == [[2, 2, 0, 0], [2, 2, 0, 0], [1, 1, 1, 1], [1, 1, 1, 1]]
    first, second = found.proposals()
    assert first.tolist() == [[False] * 4] * 2 + [[True] * 4] * 2
    assert second.astype(int).tolist() == [[1, 1, 0, 0]] * 2 + [[0, 0, 1, 1]] * 2
    found = rendered(soft(masks, [0, 1], [0.1, 0.4]), (2, 2), threshold=0.31)
    assert found.paint(found.slots + 1).tolist() == [[2, 0], [1, 2]]
    flat = rendered(soft(torch.full((2, 2, 2), 0.7), [0, 1], [0.9, 0.6]), (4, 4))
    assert not flat.labels.any() and len(flat.slots) == 0


@pytest.mark.parametrize("size", [(31, 18), (5, 4), (6, 7), (64, 64)])
def test_threshold_masks_are_those_of_the_authors_script(size):
    """Upsampled first, stretched after, one candidate after the other."""
    masks, scores = random_masks(5, seed=2, sharpness=2.0), [0.9, 0.5, 0.7, 0.6, 0.8]
    found = rendered(soft(masks, range(5), scores), size)
    wanted = np.zeros(size, int)
    for index in np.argsort(scores):
        large = F.interpolate(masks[None, index : index + 1], size, mode="nearest")[0, 0]
        low, high = large.min(), large.max()
        wanted[((large - low) / (high - low) > 0.3).numpy()] = index + 1
    assert np.array_equal(found.paint(found.slots + 1), wanted)


def test_area_and_number_limit_objects():
    masks = torch.zeros(4, 10, 10)
    masks[0] = 0.1
    masks[1, :2], masks[2, 4:8], masks[3, 9, 9] = 1, 1, 1
    given = soft(masks, [0, 1, 2, 3], [1.0] * 4)
    assert rendered(given, (10, 10), background=0).slots.tolist() == [1, 2, 3]
    assert rendered(given, (10, 10), background=0, min_object=0.011).slots.tolist() == [1, 2]
    assert rendered(given, (10, 10), background=0, min_object=0.01).slots.tolist() == [1, 2, 3]
    one = rendered(given, (10, 10), background=0, max_objects=1)
    assert one.slots.tolist() == [2]
    assert one.paint(np.array([7]))[5, 5] == 7 and not one.labels[0].any()


def test_candidates_need_score_and_area():
    semantic = torch.zeros(2, 4, 4)
    semantic[0, :2], semantic[1, 2:] = 0.9, 0.2
    scores = torch.tensor([[0.5, 0.49], [0.9, 0.9]])
    instance = torch.zeros(2, 2, 4, 4)
    options = {"similarity": 0.5, "threshold": 0.3}
    found = soft_masks(semantic, instance, scores, min_area=0.0, **options)
    assert found.candidates.tolist() == [True, False, True, True]
    assert found.semantics.tolist() == [0, 0, 1, 1]
    found = soft_masks(semantic, instance, scores, min_area=0.5, **options)
    assert found.candidates.tolist() == [True, False, False, False]


@pytest.mark.parametrize("size", [(12, 14), (96, 56), (13, 29), (3, 5)])
def test_what_is_visible_is_a_share_of_each_token(size):
    masks = torch.zeros(3, 6, 7)
    masks[0] = 0.1
    masks[1, :3], masks[2, 3:] = 1, 1
    found = rendered(soft(masks, [0, 1, 2], [1.0] * 3), size, background=0)
    seen = found.visible()
    assert seen.shape == (2, 6, 7) and seen.dtype == np.float32
    assert seen[0, 0].min() == 1 and seen[1, 5].min() == 1
    assert seen.sum(0) == pytest.approx(np.ones((6, 7)))
