"""What a file is that should have been an image: told by its first bytes, never by its name."""

import re

_CONVERT = "; convert it to JPEG or PNG"
_AGAIN = "; download it again"
_KINDS: tuple[tuple[bytes, str], ...] = (
    (rb"RIFF....WEBP", "a WebP image" + _CONVERT),
    (rb"GIF8[79]a", "a GIF image" + _CONVERT),
    (rb"BM.{4}\x00{4}", "a BMP image" + _CONVERT),
    (rb"II\*\x00|MM\x00\*", "a TIFF image" + _CONVERT),
    (rb".{4}ftyp(heic|heix|heim|hevc|mif1|msf1)", "a HEIC image" + _CONVERT),
    (rb".{4}ftypavi[fs]", "an AVIF image" + _CONVERT),
    (rb"\x00\x00\x00\x0cjP  |\xff\x4f\xff\x51", "a JPEG 2000 image" + _CONVERT),
    (rb"\x00\x00\x00\x0cJXL |\xff\x0a", "a JPEG XL image" + _CONVERT),
    (rb".{4}ftyp", "an MP4 or MOV video; give videos as files of their own"),
    (rb"\x1aE\xdf\xa3", "a Matroska or WebM video; give videos as files of their own"),
    (rb"RIFF....AVI ", "an AVI video; give videos as files of their own"),
    (rb"PK\x03\x04|\x1f\x8b|Rar!|7z\xbc\xaf", "an archive; unpack it"),
    (rb"%PDF", "a PDF document" + _CONVERT),
    (rb"version https://git-lfs", "a Git LFS pointer; fetch its content with `git lfs pull`"),
    (rb"(?i)\s*(<!doctype html|<html|<head)", "an HTML page" + _AGAIN),
    (rb"(?i)\s*(<\?xml|<svg)", "an XML or SVG file" + _CONVERT),
    (rb"\x00+\Z", "nothing but zero bytes" + _AGAIN),
)
_KNOWN = [(re.compile(start, re.DOTALL), what) for start, what in _KINDS]
# What an editor would show; some text starts with a byte order mark.
_TEXT = re.compile(rb"(\xef\xbb\xbf)?[\t\n\r\x20-\x7e]+")


def told(head: bytes) -> str | None:
    """`a WebP image; convert it to JPEG or PNG`, or None where the bytes say nothing."""
    for start, what in _KNOWN:
        if start.match(head):
            return what
    return "a text file" + _AGAIN if _TEXT.fullmatch(head[:64]) else None
