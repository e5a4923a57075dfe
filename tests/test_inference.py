import numpy as np
import pytest
import torch
from colour_model import GREEN, GREY, RED, ColourModel

from smtc import inference
from smtc.errors import UserError
from smtc.inference import (
    CHUNK,
    InferenceSettings,
    predict,
    predict_chunks,
    segment,
    segment_frames,
    segment_prediction,
)
from smtc.model import SMTC


def scene(frames=6, size=(64, 96)):
    """Grey frames with a red box on the left and a green one on the right."""
    video = np.full((frames, *size, 3), GREY, np.uint8)
    video[:, 16:40, 8:32] = RED
    video[:, 24:48, 60:84] = GREEN
    return video


def core(mask, top, left):
    """The ids in the inner part of a 24 pixel box, away from upsampled borders."""
    return set(np.unique(mask[:, top + 8 : top + 16, left + 8 : left + 16]).tolist())


def slots(**settings):
    """Ids are those of the slots: n * P + p + 1."""
    return InferenceSettings(track=False, **settings)


def test_objects_are_found_with_ids_scores_and_semantics():
    model = ColourModel(scores=((1, 1), (0.75, 0.1), (0.1, 0.5)))
    found = segment(model, scene())
    assert found.masks.shape == found.semantic.shape == (6, 64, 96)
    assert found.masks.dtype == found.semantic.dtype == np.uint8
    # Ids count from 1, in the order of slots: red is semantic 1, green semantic 2.
    assert core(found.masks, 16, 8) == {1}
    assert core(found.masks, 24, 60) == {2}
    assert set(np.unique(found.masks)) == {0, 1, 2}
    assert (found.masks[:, 0] == 0).all()
    assert core(found.semantic, 16, 8) == {1}
    assert core(found.semantic, 24, 60) == {2}
    assert found.scores == [{1: 0.75, 2: 0.5}] * 6
    frames = list(found)
    assert len(frames) == 6 and frames[2].scores is found.scores[2]
    assert np.array_equal(frames[2].mask, found.masks[2])
    assert np.array_equal(frames[2].semantic, found.semantic[2])


def test_candidates_below_the_similarity_are_left_out():
    model = ColourModel(scores=((0.2, 0.2), (0.4999, 0.2), (1, 1)))
    found = segment(model, scene(), preset=slots())
    # The background competes whatever its scores, so nothing else takes the red box.
    assert core(found.masks, 16, 8) == {0}
    assert core(found.masks, 24, 60) == {6}


def test_a_semantic_must_cover_the_area_asked_for():
    video = scene()
    video[:, :, 48:] = np.where(np.arange(48)[:, None] < 40, GREEN, GREY)
    # Green covers more than a third, red less than a tenth; grey still holds most of the border.
    video[:, 54:, 48:] = GREY
    found = segment(ColourModel(), video, preset=slots(min_area=0.2))
    assert set(np.unique(found.masks)) == {0, 6}
    assert {3, 6} <= set(np.unique(segment(ColourModel(), video, preset=slots()).masks))


def test_background_is_the_slot_on_most_of_the_border_of_the_video():
    video = scene()
    video[0, :, :] = GREEN
    prediction = predict(ColourModel(), video)
    assert prediction.background == 0
    assert predict(ColourModel(), video[:1]).background == 2


def test_masks_are_soft_and_sum_to_one():
    prediction = predict(ColourModel(sharpness=1.0), scene(frames=3))
    assert prediction.semantic.shape == (3, 3, 8, 8)
    assert torch.allclose(prediction.semantic.sum(1), torch.ones(3, 8, 8))
    assert torch.allclose(prediction.instance.sum(2), prediction.semantic)
    assert prediction.scores.shape == (3, 3, 2)


@pytest.mark.parametrize(("count", "batch", "clips"), [(6, 1, [1, 1]), (6, 2, [2]), (9, 2, [2, 1])])
def test_windows_do_not_overlap_and_the_last_frame_fills_the_last_window(count, batch, clips):
    model, seen = ColourModel(), []
    encode = model.features
    model.features = lambda clip: seen.append(clip[..., 0, 0]) or encode(clip)
    video = scene(frames=count)
    video[:, 0, 0] = np.arange(count)[:, None]
    video = np.repeat(video[:, :1, :1], 64, 1).repeat(96, 2)
    prediction = predict(model, iter(video), batch=batch)
    assert len(prediction.semantic) == count
    assert [shape[0] for shape, _ in model.calls] == clips
    red = torch.cat([clip[:, :, 0].flatten() for clip in seen]) * 0.229 + 0.485
    order = [min(k, count - 1) for k in range(len(red))]
    assert (red * 255).round().int().tolist() == order


def test_the_model_is_left_in_the_modes_it_had():
    model = ColourModel().train()
    model.dropout.eval()
    segment(model, scene(frames=1))
    assert model.training and not model.dropout.training


def test_official_preset_follows_the_authors_script(monkeypatch):
    model = ColourModel(scores=((0.6, 0.6), (1, 0.1), (0.1, 0.9)), sharpness=3.0)
    given = {}
    prepare = inference.prepare_frames

    def watched(frames, size, **statistics):
        given.update(statistics)
        return prepare(frames, size, **statistics)

    monkeypatch.setattr(inference, "prepare_frames", watched)
    found = segment(model, scene(), preset="official", batch=1)
    assert model.calls[0] == ((1, 4, 3, 480, 800), 5)
    assert given["mean"] == (0.43216, 0.394666, 0.37645)
    assert given["std"] == (0.22803, 0.22145, 0.216989)
    # The background is a candidate like any other here: it has the ids 1 and 2.
    assert core(found.masks, 16, 8) == {3}
    assert core(found.masks, 24, 60) == {4}
    assert set(np.unique(found.masks)) == {1, 2, 3, 4}


def test_a_real_model_gives_the_same_whatever_the_batch(tiny_config):
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = SMTC(tiny_config().model)
    video = np.random.default_rng(0).integers(0, 256, (7, 40, 56, 3), dtype=np.uint8)
    one, three = segment(model, video), segment(model, list(video), batch=3)
    assert np.mean(one.masks != three.masks) < 1e-3
    assert one.masks.max() <= model.config.slots * model.config.instances
    assert all(
        set(s) == set(np.unique(m)) - {0} for s, m in zip(one.scores, one.masks, strict=True)
    )


@pytest.mark.parametrize(
    ("frames", "sentence"),
    [
        ([], "no frames"),
        (np.zeros((2, 8, 8, 3), np.float32), "Frame 0 is float32"),
        (np.zeros((2, 8, 8), np.uint8), r"uint8 \[8, 8\]; frames must be RGB"),
        ([np.zeros((8, 8, 3), np.uint8), np.zeros((8, 9, 3), np.uint8)], "one size"),
        (np.zeros((2, 0, 8, 3), np.uint8), r"uint8 \[0, 8, 3\]; .* of one pixel at least"),
        (iter([np.zeros((8, 8, 3), np.uint8)]), "The frames are a list_iterator; give an array"),
        (None, "The frames are a NoneType"),
        (np.array(3), "The frames are a ndarray"),
        ("frames.mp4", "The frames are a str"),
        ([[[[0, 0, 0]]]], "Frame 0 is a list; frames must be NumPy arrays"),
    ],
)
def test_frames_that_are_no_video_are_refused(frames, sentence):
    with pytest.raises(UserError, match=sentence):
        segment(ColourModel(), frames)


def test_wrong_settings_are_refused():
    with pytest.raises(UserError, match="'authors'; choose from default, official"):
        segment(ColourModel(), scene(), preset="authors")
    for batch in (0, -1, 1.5):
        with pytest.raises(UserError, match=f"batch is {batch}; give a whole number"):
            segment(ColourModel(), scene(), batch=batch)
    with pytest.raises(UserError, match="no frames"):
        predict(ColourModel(), iter([]))


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"min_object": 1.5}, r"min_object \(--area\) is 1.5; give a share"),
        ({"min_area": -0.1}, "min_area is -0.1"),
        ({"threshold": float("nan")}, "threshold is nan"),
        ({"similarity": 2}, r"similarity \(--score\) is 2; give a cosine"),
        ({"max_objects": 0}, "max_objects is 0; give 1 to 255"),
        ({"max_objects": 256}, "max_objects is 256"),
        ({"iterations": 0}, "iterations is 0"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_impossible_settings_are_refused(settings, sentence):
    with pytest.raises(UserError, match=sentence):
        InferenceSettings(**settings)


@pytest.mark.parametrize("size", [(30, 32), (32, 3), (0, 32), (-4, 32)])
def test_a_size_that_the_model_cannot_take_is_refused_before_the_work(size):
    model = ColourModel()
    with pytest.raises(UserError, match=rf"The size {size[0]}x{size[1]} is no multiple .*\(4\)"):
        predict(model, scene(), settings=InferenceSettings(size=size))
    assert model.calls == []


def moving(frames):
    """A red box that goes from the left half into the right one and back."""
    video = np.full((frames, 64, 96, 3), GREY, np.uint8)
    for index in range(frames):
        left = round(12 + 48 * abs(np.sin(index / 12)))
        video[index, 16:40, left : left + 24] = RED
    return video


def test_a_stream_gives_what_the_whole_gives():
    video = moving(75)
    whole = segment(ColourModel(), video)
    streamed = list(segment_frames(ColourModel(), iter(video)))
    assert np.array_equal(np.stack([frame.mask for frame in streamed]), whole.masks)
    assert [frame.scores for frame in streamed] == whole.scores
    later = segment_prediction(predict(ColourModel(), video), (64, 96), InferenceSettings())
    assert np.array_equal(np.stack([frame.mask for frame in later]), whole.masks)


def test_a_stream_is_read_a_chunk_at_a_time():
    read = []
    video = moving(3 * CHUNK)
    found = segment_frames(ColourModel(), (read.append(k) or f for k, f in enumerate(video)))
    next(found)
    assert len(read) == CHUNK
    for _ in range(CHUNK):
        next(found)
    assert len(read) == 2 * CHUNK
    sizes = [len(part) for part in predict_chunks(ColourModel(), iter(video[:70]), batch=3)]
    assert sizes == [32, 32, 6]


def test_an_id_follows_its_object_over_slots_and_chunks():
    """A box whose slot changes in each frame, and a still one beside it."""
    count = 2 * CHUNK + 3
    instance = torch.zeros(count, 2, 2, 8, 12)
    embeddings = torch.eye(4).view(2, 2, 4).repeat(count, 1, 1, 1)
    still, moving_box = torch.tensor([0, 0, 0, 1.0]), torch.tensor([0, 0, 1.0, 0])
    for index in range(count):
        slot = index % 2
        left = index // 16
        instance[index, 0] = 0.1
        instance[index, 1, slot, 2:5, left : left + 3] = 1
        instance[index, 1, 1 - slot, 2:5, 9:11] = 1
        embeddings[index, 1, slot], embeddings[index, 1, 1 - slot] = moving_box, still
    scores = torch.ones(count, 2, 2)
    cuts = torch.zeros(count, dtype=torch.bool)
    prediction = inference.Prediction(instance.sum(2), instance, scores, embeddings, cuts)
    found = [f.mask for f in segment_prediction(prediction, (8, 12), InferenceSettings())]
    assert all(mask[3, index // 16 + 1] == 1 for index, mask in enumerate(found))
    assert all(mask[3, 10] == 2 for mask in found)
    fixed = [f.mask for f in segment_prediction(prediction, (8, 12), slots())]
    assert [mask[3, 10] for mask in fixed[:3]] == [4, 3, 4]


def test_the_background_may_change_slowly_but_not_for_a_moment():
    grey, green = scene(frames=CHUNK), scene(frames=CHUNK)
    green[(green == GREY).all(-1)] = (0, 254, 0)

    def backgrounds(*parts):
        prediction = predict(ColourModel(), np.concatenate(parts))
        prediction.cuts[:] = False
        found = segment_prediction(prediction, (64, 96), InferenceSettings())
        return [frame.background for frame in found][::CHUNK]

    # The second chunk is green, and so counts once against half of the grey one.
    assert backgrounds(grey, green, green) == [0, 2, 2]
    assert backgrounds(grey, green[:8], grey[:24], grey) == [0, 0, 0]
    assert backgrounds(grey, green[:17], grey[:15], grey) == [0, 0, 0]


def test_with_a_scene_background_and_ids_begin_anew():
    grey, green = scene(frames=5), scene(frames=5)
    green[(green == GREY).all(-1)] = (0, 254, 0)
    found = list(segment_frames(ColourModel(), np.concatenate([grey, green, grey])))
    assert [frame.background for frame in found] == [0] * 5 + [2] * 5 + [0] * 5
    ids = [set(frame.scores) for frame in found]
    assert ids[:5] == [{1, 2}] * 5 and ids[10:] == [ids[10]] * 5
    assert not (ids[4] & ids[5] or ids[5] & ids[10] or ids[4] & ids[10])


def test_a_scene_ends_where_colours_change_at_once():
    rng = np.random.default_rng(0)
    first, second = rng.integers(0, 100, (2, 40, 64, 96, 3), dtype=np.uint8)
    second += 120
    parts = [first[:CHUNK], second[:9], first[32:33], first[33:36]]
    cuts = predict(ColourModel(), np.concatenate(parts)).cuts
    assert cuts.nonzero()[:, 0].tolist() == [CHUNK, CHUNK + 9]
    # A quarter of the frame that changes is the least.
    for rows, cut in ((15, False), (16, True)):
        changed = first[:2].copy()
        changed[:] = 30
        changed[1, :rows] = 200
        assert predict(ColourModel(), changed).cuts.tolist() == [False, cut]
    # A chunk that is not the first knows the frame before it.
    later = next(predict_chunks(ColourModel(), second[:3], before=first[0]))
    assert later.cuts.tolist() == [True, False, False]


def test_a_model_that_says_nan_is_told():
    model = ColourModel()
    with torch.no_grad():
        model.colours[1, 1] = torch.nan
    with pytest.raises(UserError, match="The model says NaN"):
        segment(model, scene())


def test_small_objects_and_all_but_the_largest_are_background():
    video = scene()
    video[:, 4:8, 4:8] = GREEN  # 16 of 6144 pixels
    video[:, 24:40, 60:84] = GREY  # the large green box shrinks to 8 x 24
    everything = segment(ColourModel(resolution=(64, 96)), video, preset=slots())
    assert set(np.unique(everything.masks)) == {0, 3, 5, 6}
    model = ColourModel(resolution=(64, 96))
    assert set(np.unique(segment(model, video, preset=slots(min_object=0.01)).masks)) == {0, 3, 6}
    assert set(np.unique(segment(model, video, preset=slots(max_objects=1)).masks)) == {0, 3}
    tracked = segment(model, video, preset=InferenceSettings(max_objects=2))
    assert set(np.unique(tracked.masks)) == {0, 1, 2}


def test_half_precision_is_close_and_seeds_differ(tiny_config):
    torch.manual_seed(0)
    model = SMTC(tiny_config().model)
    video = np.random.default_rng(0).integers(0, 256, (5, 40, 56, 3), dtype=np.uint8)
    full = predict(model, video)
    half = predict(model, video, settings=InferenceSettings(precision="bf16"))
    assert half.semantic.dtype == torch.float32
    assert 0 < (full.semantic - half.semantic).abs().max() < 0.1
    again = predict(model, video, settings=InferenceSettings(seed=0))
    assert torch.equal(again.instance, full.instance)
    other = predict(model, video, settings=InferenceSettings(seed=1))
    assert torch.equal(other.semantic, full.semantic)
    assert not torch.equal(other.instance, full.instance)


def test_many_slots_need_tracking():
    prediction = inference.Prediction(
        torch.ones(1, 64, 2, 2) / 64,
        torch.ones(1, 64, 5, 2, 2) / 320,
        torch.ones(1, 64, 5),
        torch.eye(320).view(1, 64, 5, 320),
        torch.zeros(1, dtype=torch.bool),
    )
    with pytest.raises(UserError, match="320 instance slots are more than the 255 ids"):
        next(segment_prediction(prediction, (4, 4), slots()))
    prediction.instance[0, 63, 4, 0] = 1
    found = next(segment_prediction(prediction, (4, 4), InferenceSettings()))
    assert found.scores == {1: 1.0}
    assert found.mask[0].all() and not found.mask[3].any()
