"""Tiny data sets in the layouts that people have on disk, written by code, oddities included.

Frames are 40 x 60. A boundary there is matched within one pixel, as ceil(0.008 · 72.1) = 1.
"""

from pathlib import Path

import numpy as np
from PIL import Image

from smtc.pipelines.images import write_ids

HEIGHT, WIDTH = 40, 60


def square(top=10, left=10, size=10, value=1):
    """A frame's mask, uint8 `[40,60]`: one square of `value`."""
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[top : top + size, left : left + size] = value
    return mask


def frame(index=0):
    """A frame `[40,60,3]` unlike its neighbours."""
    return np.full((HEIGHT, WIDTH, 3), 40 + 10 * index, np.uint8)


def save(path, pixels):
    """Write a picture with the format that the file's name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(pixels, np.uint8)).save(path)
    return path


def save_ids(path, ids):
    """Write a mask as a palette PNG in DAVIS's colours."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_ids(path, np.asarray(ids, np.uint8))
    return path


def write_list(root, place, *lines):
    path = Path(root) / place
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))


def write_synthetic(root):
    """One video as `smtc data synthesize` writes it."""
    for index in range(3):
        save(root / f"JPEGImages/480p/00000/{index:05d}.jpg", frame(index))
        for kind in ("Annotations", "Categories"):
            save_ids(root / kind / f"480p/00000/{index:05d}.png", square())
    return root


def write_davis2016(root):
    """Three kinds of masks: 0/255 grey, 0/1 with a palette, and DAVIS-2017's ids with a palette."""
    both = square() + square(top=25, left=40, size=5, value=3)
    for index in range(3):
        for name in ("grey", "palette", "ids"):
            save(root / f"JPEGImages/480p/{name}/{index:05d}.jpg", frame(index))
        masks = root / "Annotations/480p"
        save(masks / f"grey/{index:05d}.png", square(value=255))
        save_ids(masks / f"palette/{index:05d}.png", square())
        save_ids(masks / f"ids/{index:05d}.png", both)
    write_list(root, "ImageSets/2016/val.txt", "palette", "grey", "ids")
    return root


def write_davis2017(root, videos=None):
    """Videos by name, each a list of ids; `Annotations` lacks void as the real one does."""
    videos = videos or {"dogs": [square(left=10 + k) + square(25, 40, 8, 2) for k in range(3)]}
    for name, masks in videos.items():
        for index, ids in enumerate(masks):
            save(root / f"JPEGImages/480p/{name}/{index:05d}.jpg", frame(index))
            save_ids(root / f"Annotations_unsupervised/480p/{name}/{index:05d}.png", ids)
    write_list(root, "ImageSets/2017/val.txt", *videos)
    return root


def in_grey(mask, edge=0):
    """A mask of 0 and 1 as an RGB picture of 0 and 255 whose leftmost column of object is `edge`
    brighter than black: antialiasing.
    """
    pixels = mask * 255
    left = int(np.flatnonzero(mask.any(0))[0])
    pixels[:, left] = np.where(mask[:, left], edge, 0)
    return np.repeat(pixels[..., None], 3, axis=2)


def write_segtrackv2(root):
    """A video of one object, one of two (BMP beside PNG) and the penguins."""
    images, truth = root / "JPEGImages", root / "GroundTruth"
    for index in range(3):
        save(images / f"girl/girl_{index:05d}.png", frame(index))
        save(truth / f"girl/girl_{index:05d}.png", in_grey(square(), edge=128))
        save(images / f"cheetah/cheetah_{index:05d}.bmp", frame(index))
        save(truth / f"cheetah/1/cheetah_{index:05d}.bmp", in_grey(square(), edge=127))
        save(truth / f"cheetah/2/cheetah_{index:05d}.png", in_grey(square(25, 40, 5), edge=255))
        save(images / f"penguin/penguin_{index:05d}.jpg", frame(index))
        for number in range(1, 7):
            mask = in_grey(square(2 + 6 * (number - 1), 20, 4), edge=255)
            save(truth / f"penguin/{number}/penguin_{index:05d}.png", mask)
    (truth / "girl/._girl_00000.png").write_bytes(b"\0")  # what macOS leaves behind
    return root


def write_fbms59(root):
    """Four videos of six frames: two of the older kind with grey codes, in PGM, their frames
    without leading zeros in one; one of the newer kind in PPM, white where it is background; one
    that somebody converted to PNG. Each has two or three masks.
    """
    test = root / "Testset"
    for index in range(1, 7):
        save(test / f"marple7/marple7_{index:03d}.jpg", frame(index))
        save(test / f"marple2/{index + 5}.jpg", frame(index))
        save(test / f"camel01/camel01_{index:04d}.jpg", frame(index))
        save(test / f"cars1/cars1_{index:02d}.jpg", frame(index))
    codes = grey_codes(12, 13, 25, 26, 102, 103)
    for index in (1, 4):
        save(test / f"marple7/GroundTruth/marple7_{index:03d}.pgm", codes)
        save(test / f"cars1/GroundTruth/{index:03d}.png", codes)
    for index in (6, 11):
        save(test / f"marple2/GroundTruth/{index:03d}.pgm", codes)
    for index in (1, 3, 6):
        truth = test / f"camel01/GroundTruth/camel01_{index:04d}"
        save(truth.with_name(truth.name + "_gt.ppm"), coloured(index))
        save(truth.with_name(truth.name + "_PROB_gt.ppm"), frame(index))
    (test / "camel01/GroundTruth/camel01Def.dat").write_text("Total number of regions:\n3\n")
    (test / "camel01/camel01.bmf").write_text("6 1\n")
    return root


def grey_codes(*values):
    """A mask `[40,60]` of vertical stripes, four columns wide, from the left; the rest is black."""
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    for place, value in enumerate(values):
        mask[:, 4 * place : 4 * place + 4] = value
    return mask


def coloured(index):
    """A colour-coded mask: white, a blue object (brightness 29) and a red one (76)."""
    pixels = np.full((HEIGHT, WIDTH, 3), 255, np.uint8)
    pixels[5:10, index : index + 10] = (0, 0, 255)
    pixels[20:30, 30:40] = (255, 0, 0)
    return pixels


WRITERS = {
    "synthetic": write_synthetic,
    "davis2016": write_davis2016,
    "davis2017-unsupervised": write_davis2017,
    "segtrackv2": write_segtrackv2,
    "fbms59": write_fbms59,
}
