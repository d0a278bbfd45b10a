"""Keeps some images with an archive, on which a worker compares precisions and estimates."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from camserve.archive.untrusted import ARCHIVE, read_member, reading, short
from camserve.errors import InvalidInput, InvalidOption, NotFound
from camserve.images import read_image, seen
from camserve.types import Preprocessing

CALIBRATION = "calibration.safetensors"
MOST = 16
"""Number of images that an archive may have."""


def calibration_members(images: Sequence[np.ndarray]) -> dict[str, bytes]:
    """Returns the file that `read_calibration` reads, by name.

    Args:
        images: (H, W, C) as the network sees them, uint8 or float32 in [0, 1].
    """
    from safetensors.numpy import save

    return {CALIBRATION: save({f"{index:02}": np.ascontiguousarray(image) for index, image in enumerate(images)})}


def calibration_images(folder: Path, preprocessing: Preprocessing) -> list[np.ndarray]:
    """Returns the images of a folder as the network sees them, in order of their names.

    Raises:
        NotFound: there is no such folder, or nothing in it.
        InvalidInput: a file is no image.
        InvalidOption: there are too many.
    """
    files = sorted(path for path in folder.iterdir() if path.is_file()) if folder.is_dir() else []
    if not files:
        raise NotFound(f"there are no calibration images in {short(folder)}")
    if len(files) > MOST:
        raise InvalidOption(f"an archive has at most {MOST} calibration images, {short(folder)} has {len(files)}")
    return [seen(read_image(file), preprocessing)[0] for file in files]


def read_calibration(path: Path) -> list[np.ndarray]:
    """Returns the calibration images (H, W, C) of a `.mar` file or of an unpacked archive directory; none without any.

    Raises:
        InvalidInput: they cannot be read.
    """
    from safetensors.numpy import load

    try:
        data = read_member(path, CALIBRATION)
    except InvalidInput:  # an archive without
        return []
    with reading(path, ARCHIVE):
        found = [image for _, image in sorted(load(data).items())][:MOST]
        if any(image.ndim != 3 or image.dtype not in (np.uint8, np.float32) for image in found):
            raise ValueError("calibration images are (height, width, channels) of uint8 or float32")
        return found
