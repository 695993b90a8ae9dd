"""Handwritten digits: 1,797 images of 8 x 8 pixels, in three splits that never change.

The test part of UCI's Optical Recognition of Handwritten Digits (Alpaydin and Kaynak 1998, CC-BY 4.0), as
scikit-learn ships it in one file. The file is read by itself, and its sha256 checked; scikit-learn, which
would load SciPy, is not imported. The splits are runs of the file in its order. Stands in for
sklearn.datasets.load_digits; leaves out larger images, augmentation and epochs.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..digests import of_bytes
from ..errors import FormatError, InputError, UnsupportedError, check_int
from ..formats.atomic import read

SIDE = 8  # pixels
GREYS = 16  # the largest value in the file
CUTS = 1000, 1300  # where validation and test begin
FILE = "datasets/data/digits.csv.gz"
DIGEST = "09f66e6debdee2cd2b5ae59e0d6abbb73fc2b0e0185d2e1957e9ebb51e23aa22"

Batch = tuple[np.ndarray, np.ndarray]  # pixels (N, 64) and labels (N,)


@dataclass(frozen=True, eq=False)
class Images:
    """Pixels (N, 64) float32, row by row, -1 for paper and 1 for ink, and the digits (N,) int64 they show."""

    pixels: np.ndarray
    labels: np.ndarray

    def of(self, digits: Sequence[int]) -> Images:
        """Those that show one of these digits."""
        some = np.isin(self.labels, digits)
        return Images(self.pixels[some], self.labels[some])


@dataclass(frozen=True, eq=False)
class Digits:
    """The images in three splits, and their source in words."""

    train: Images
    valid: Images
    test: Images
    source: str = "handwritten digits of UCI, 8 x 8 pixels, from scikit-learn (CC-BY 4.0)"


def digits_file() -> Path:
    """Where scikit-learn's file lies; UnsupportedError, with the line that installs it, if it is missing."""
    from importlib.util import find_spec  # finds a package without running it

    spec = find_spec("sklearn")
    for folder in (spec and spec.submodule_search_locations) or ():
        if (path := Path(folder, FILE)).is_file():
            return path
    what = f"scikit-learn is here without {FILE}" if spec else "the package scikit-learn is not installed"
    raise UnsupportedError(f'{what}; expected: pip install "minilora[vision]"')


@functools.cache
def digits() -> Digits:
    """All images. UnsupportedError as in `digits_file`, FormatError for a file that is not the known one."""
    import gzip

    path = digits_file()
    data = read(path, 1 << 20)
    if of_bytes(data) != DIGEST:
        raise FormatError(f"{path}: is not the known file of digits: its sha256 differs")
    table = np.array([line.split(b",") for line in gzip.decompress(data).split()], np.int64)
    pixels = (table[:, :-1] * (2 / GREYS) - 1).astype(np.float32)
    pixels.setflags(write=False)  # the splits that never change
    splits = zip(np.split(pixels, CUTS), np.split(table[:, -1], CUTS), strict=True)
    train, valid, test = (Images(*split) for split in splits)
    return Digits(train, valid, test)


def batches(images: Images, rng: np.random.Generator, batch_size: int) -> Iterator[Batch]:
    """Endless batches of images drawn at random, with replacement.

    ConfigError for a size below one, InputError if there is no image.
    """
    check_int("batch_size", batch_size, 1)
    if not len(images.labels):
        raise InputError("there is no image to draw; expected at least one")

    def draw() -> Iterator[Batch]:
        while True:
            i = rng.integers(len(images.labels), size=batch_size)
            yield images.pixels[i], images.labels[i]

    return draw()
