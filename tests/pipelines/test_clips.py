"""Videos are found in the usual layouts; clips follow from (seed, index) alone."""

import logging
import os
from collections import Counter
from pathlib import Path

import pytest

from smtc.errors import UserError
from smtc.pipelines.clips import (
    ClipSampler,
    Schedule,
    Video,
    find_video_files,
    find_videos,
)


def lay(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def found(root: Path) -> dict[str, list[str]]:
    return {video.name: [Path(f).name for f in video.frames] for video in find_videos(root)}


def made(*lengths: int) -> list[Video]:
    return [
        Video(f"v{n}", tuple(f"v{n}/{i}.jpg" for i in range(length)))
        for n, length in enumerate(lengths)
    ]


def sampler(*lengths: int, frames: int = 4, gap: int = 4, **more: object) -> ClipSampler:
    settings: dict = {"random_gap": False, "seed": 0, **more}
    return ClipSampler(made(*lengths), frames=frames, gap=gap, **settings)


def test_davis_prefers_480p(tmp_path: Path) -> None:
    for resolution in ("1080p", "480p"):
        lay(tmp_path, f"JPEGImages/{resolution}/dog/00000.jpg")
    lay(tmp_path, "JPEGImages/480p/bear/00000.jpg", "Annotations/480p/dog/00000.png")
    assert list(found(tmp_path)) == ["bear", "dog"]
    assert "480p" in find_videos(tmp_path)[0].frames[0]


def test_davis_takes_another_resolution_when_480p_is_absent(tmp_path: Path) -> None:
    lay(tmp_path, "JPEGImages/Full-Resolution/dog/00000.jpg")
    assert found(tmp_path) == {"dog": ["00000.jpg"]}


@pytest.mark.parametrize("inner", ["train/JPEGImages", "JPEGImages", "."])
def test_youtube_vos_and_plain_folders(tmp_path: Path, inner: str) -> None:
    lay(tmp_path / inner, "b1/00005.jpg", "b1/00000.jpg", "a0/00000.PNG", "empty/notes.txt")
    lay(tmp_path, "meta.json")
    assert found(tmp_path) == {"a0": ["00000.PNG"], "b1": ["00000.jpg", "00005.jpg"]}


def test_frames_are_in_natural_order_and_hidden_files_left_out(tmp_path: Path) -> None:
    lay(tmp_path, "v/f10.jpg", "v/f2.JPEG", "v/f1.jpg", "v/._f1.jpg", "v/f3.txt", "v/f01.jpg")
    assert found(tmp_path) == {"v": ["f01.jpg", "f1.jpg", "f2.JPEG", "f10.jpg"]}


def test_frames_in_the_folder_itself_are_one_video(tmp_path: Path) -> None:
    lay(tmp_path / "dog", "1.jpg", "2.jpg")
    assert found(tmp_path / "dog") == {"dog": ["1.jpg", "2.jpg"]}


def test_what_is_wrong_with_a_folder_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=r"nowhere does not exist; give a folder of videos"):
        find_videos(tmp_path / "nowhere")
    lay(tmp_path, "file.txt")
    with pytest.raises(UserError, match="is no folder"):
        find_videos(tmp_path / "file.txt")
    with pytest.raises(UserError, match=r"No videos in .*JPEGImages/480p.*YouTube-VOS"):
        find_videos(tmp_path)

    def forbidden(folder: Path) -> list[str]:
        raise PermissionError(13, "Permission denied", str(folder))

    monkeypatch.setattr(os, "listdir", forbidden)
    with pytest.raises(UserError, match=r"cannot be read \(Permission denied"):
        find_videos(tmp_path)


def test_video_files_have_unique_names(tmp_path: Path) -> None:
    lay(tmp_path, "run/a.mp4", "run/a.avi", "walk/a.mp4", "b.mp4", "b.mp4.MOV", "c.d.webm")
    files = find_video_files(tmp_path)
    assert list(files) == ["b", "b.mp4.MOV", "c.d", "run/a.avi", "run/a.mp4", "walk/a"]
    assert files["b"] == str(tmp_path / "b.mp4")
    known = {path: (0, 40, 80) for path in files.values()}
    videos = find_videos(tmp_path, containers=True, timestamps=known)
    assert [video.name for video in videos] == list(files)
    assert list(videos[0].frames) == [f"{files['b']}#{i}" for i in range(3)]
    assert (videos[0].container, videos[0].timestamps) == (files["b"], range(0, 81, 40))


def test_folders_of_frames_come_before_video_files(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lay(tmp_path, "v/1.jpg", "a.mp4", "v/b.avi", "c.mkv")
    with caplog.at_level(logging.WARNING, "smtc"):
        assert found(tmp_path) == {"v": ["1.jpg"]}
        assert not caplog.records
        assert [video.container for video in find_videos(tmp_path, containers=True)] == [None]
    assert [record.getMessage() for record in caplog.records] == [
        f"Left out in {tmp_path}, where folders of frames come first: "
        "3 video files (a.mp4, c.mkv, …)"
    ]


def test_a_folder_of_video_files_only_is_refused_with_a_hint(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"itself, and for video files \(\.mp4, .*\.m4v\)\.$"):
        find_videos(tmp_path, containers=True)
    lay(tmp_path, "run/a.mp4")
    with pytest.raises(UserError, match=r"itself\. It holds 1 video file \(a\.mp4"):
        find_videos(tmp_path)


def test_an_epoch_is_one_permutation_of_the_videos() -> None:
    clips = sampler(*[20] * 7)
    epochs = [[clips.clip(e * 7 + i).video.name for i in range(7)] for e in range(3)]
    for names in epochs:
        assert sorted(names) == [f"v{n}" for n in range(7)]
    assert epochs[0] != epochs[1] != epochs[2]


def test_a_clip_depends_on_seed_and_index_only() -> None:
    one, other = sampler(*[30] * 9), sampler(*[30] * 9)
    forwards = [one.clip(i) for i in range(40)]
    assert forwards == [other.clip(i) for i in reversed(range(40))][::-1]
    another = sampler(*[30] * 9, seed=1)
    assert forwards != [another.clip(i) for i in range(40)]


def test_starts_are_uniform_over_all_that_fit() -> None:
    starts = Counter(sampler(16).clip(i).start for i in range(2000))
    assert sorted(starts) == [0, 1, 2, 3]
    assert all(400 < count < 600 for count in starts.values())


def test_frames_are_a_gap_apart() -> None:
    clip = sampler(40).clip(3)
    assert clip.frames == tuple(clip.start + 4 * i for i in range(4))
    assert clip.paths == tuple(f"v0/{i}.jpg" for i in clip.frames)


@pytest.mark.parametrize(("length", "gap"), [(4, 1), (6, 1), (7, 2), (12, 3), (13, 4), (99, 4)])
def test_the_gap_shrinks_until_the_clip_fits(length: int, gap: int) -> None:
    clips = [sampler(length).clip(i) for i in range(30)]
    assert {clip.gap for clip in clips} == {gap}
    assert max(clip.frames[-1] for clip in clips) <= length - 1


def test_a_random_gap_takes_every_value() -> None:
    gaps = Counter(sampler(40, random_gap=True).clip(i).gap for i in range(800))
    assert sorted(gaps) == [1, 2, 3, 4]
    assert min(gaps.values()) > 150


def test_clips_of_one_frame() -> None:
    assert {sampler(3, frames=1).clip(i).frames for i in range(50)} == {(0,), (1,), (2,)}


def test_short_videos_are_left_out_with_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "smtc"):
        clips = sampler(3, 20, 2, 1, 3, 3, 0)
    assert {clips.clip(i).video.name for i in range(9)} == {"v1"}
    assert [r.getMessage() for r in caplog.records] == [
        "6 of 7 videos have fewer than 4 frames and are left out: v0, v2, v3, v4, v5, …"
    ]


def test_only_short_videos_are_refused() -> None:
    with pytest.raises(UserError, match=r"All 2 videos have fewer than 4 frames.*data\.frames"):
        sampler(3, 2)


def test_replacements_visit_every_video_and_repeat_exactly() -> None:
    clips = sampler(*[20] * 6)
    replaced = [clips.clip(11, attempt) for attempt in range(1, 7)]
    assert {clip.video.name for clip in replaced} == {f"v{n}" for n in range(6)}
    assert replaced == [sampler(*[20] * 6).clip(11, attempt) for attempt in range(1, 7)]
    assert replaced[0].index == 11
    orders = {tuple(clips.clip(i, a).video.name for a in range(1, 7)) for i in range(20)}
    assert len(orders) > 10


@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_ranks_share_the_global_order(world: int) -> None:
    ranks = [Schedule(batch=4, steps=5, rank=rank, world=world) for rank in range(world)]
    drawn = [i for step in range(5) for rank in ranks for i in rank.samples(step)]
    assert drawn == list(range(5 * 4 * world))
    resumed = Schedule(batch=4, steps=5, start_step=3, world=world)
    assert list(resumed.remaining) == [3, 4]
    assert resumed.samples(4) == ranks[0].samples(4)


@pytest.mark.parametrize(("old", "new"), [(1, 2), (2, 1), (3, 8), (8, 3)])
def test_a_change_of_world_size_leaves_no_gap_and_repeats_nothing(old: int, new: int) -> None:
    before = [Schedule(batch=3, steps=4, rank=rank, world=old) for rank in range(old)]
    more: dict = {"batch": 3, "steps": 9, "start_step": 4, "start_sample": 4 * 3 * old}
    after = [Schedule(rank=rank, world=new, **more) for rank in range(new)]
    drawn = [i for rank in before for step in rank.remaining for i in rank.samples(step)]
    drawn += [i for rank in after for step in rank.remaining for i in rank.samples(step)]
    assert sorted(drawn) == list(range(4 * 3 * old + 5 * 3 * new))


def test_a_finished_schedule_has_no_steps() -> None:
    assert not Schedule(batch=1, steps=3, start_step=5).remaining


def test_a_negative_seed_is_refused() -> None:
    with pytest.raises(UserError, match="seed is -1"):
        sampler(20, seed=-1).clip(0)
