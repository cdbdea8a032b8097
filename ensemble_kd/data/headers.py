"""What the first bytes of an image file say: its size, whether it is grey, and why it is none."""

from __future__ import annotations

from typing import IO

from PIL import Image, UnidentifiedImageError

FORMATS = ("JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF", "PPM")
"""What is opened, whatever a file is called: Pillow would hand others, such as EPS, to other programs."""
HEAD = 256
"""Bytes that tell what a file is."""
_ORIENTATION = 0x0112  # the tag in EXIF


def look_at(file: IO[bytes]) -> tuple[tuple[int, int], str]:
    """(width, height) of an image when it stands upright, and the mode of Pillow's that it is read in.

    Raises:
        Exception: of many kinds, from Pillow, where it is no image, or one that is too large.
    """
    with Image.open(file, formats=FORMATS) as image:
        if image.width * image.height > (Image.MAX_IMAGE_PIXELS or float("inf")):
            raise Image.DecompressionBombError
        # Of any image, as that of PNGs would decode them to look behind their pixels.
        turned = Image.Image.getexif(image).get(_ORIENTATION, 1) in (5, 6, 7, 8)
        size = image.size[::-1] if turned else image.size
        return size, "L" if is_sixteen_bit(image) else image.mode


def is_grey(mode: str) -> bool:
    """Whether images that are read in this mode have no colours."""
    return mode in ("1", "L")


def is_sixteen_bit(image: Image.Image) -> bool:
    """Whether it is grey of 16 bits.

    Raises:
        ValueError: it is grey of 32 bits, for which no number is known to be white.
    """
    if image.mode in ("I", "F") and image.format not in ("PNG", "PPM"):
        raise ValueError("its grey has 32 bits, of which none is known to be white: save it with 8 or 16")
    return image.mode == "I" or image.mode.startswith("I;16")


def why_broken(head: bytes, error: Exception) -> str:
    """Why Pillow refused a file that starts with the bytes `head`."""
    if isinstance(error, (Image.DecompressionBombError, Image.DecompressionBombWarning)):
        return "it has so many pixels that it could exhaust the memory"
    start = head.lstrip().lower()
    if not start:
        return "the file is empty"
    if start.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "it is a web page, saved under an image's name"
    if isinstance(error, UnidentifiedImageError):
        return "it is no image that Pillow knows"
    return str(error) or type(error).__name__
