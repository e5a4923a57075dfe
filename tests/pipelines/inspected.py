"""Data folders that `smtc data inspect` is let loose on, and what it wrote about them."""

from pathlib import Path

from smtc.pipelines.manifest import Manifest, load_manifest
from smtc.pipelines.places import cache_folder


def three_videos(root: Path, picture: bytes) -> Path:
    """A folder of videos `a`, `b` and `c` of six frames that show `picture`."""
    for video in "abc":
        (root / video).mkdir(parents=True)
        for frame in range(6):
            (root / video / f"{frame}.jpg").write_bytes(picture)
    return root


def manifest_of(folder: Path) -> Manifest:
    """What the loaders find."""
    manifest = load_manifest(cache_folder(folder), folder)
    assert manifest is not None
    return manifest


def reasons(folder: Path) -> dict[str, str]:
    """`<video>/<file>` to reason of the broken files in the manifest."""
    return {
        f"{record.name}/{name}": broken.reason
        for record in manifest_of(folder).videos
        for name, broken in record.broken.items()
    }


def with_a_gap(picture: bytes) -> bytes:
    middle = len(picture) // 2
    return picture[:middle] + picture[middle + 600 :]
