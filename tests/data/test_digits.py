"""The digits: the known file and no other, splits that never change, and draws of them."""

import gzip
import itertools
import subprocess
import sys

import numpy
import pytest

from minilora.data import digits as module
from minilora.data.digits import CUTS, DIGEST, FILE, Images, batches, digits
from minilora.errors import ConfigError, FormatError, InputError, UnsupportedError


def rows():
    """The file by the standard library alone."""
    text = gzip.decompress(module.digits_file().read_bytes()).decode()
    return [[int(x) for x in line.split(",")] for line in text.split()]


def test_the_images_are_those_of_the_file_in_its_order():
    d, lines = digits(), rows()
    assert len(lines) == 1797
    pixels = numpy.concatenate([part.pixels for part in (d.train, d.valid, d.test)])
    labels = numpy.concatenate([part.labels for part in (d.train, d.valid, d.test)])
    assert pixels.tolist() == [[x / 8 - 1 for x in line[:-1]] for line in lines]  # exact: eighths
    assert labels.tolist() == [line[-1] for line in lines]
    assert pixels.dtype == numpy.float32
    assert (pixels.min(), pixels.max()) == (-1, 1)
    assert [len(part.labels) for part in (d.train, d.valid, d.test)] == [1000, 300, 497]
    for part in (d.train, d.valid, d.test):  # no digit is rare in any
        assert numpy.bincount(part.labels).min() >= 0.9 * len(part.labels) / 10


def test_no_image_is_in_two_splits():
    d = digits()
    some = [{row.tobytes() for row in part.pixels} for part in (d.train, d.valid, d.test)]
    assert all(not a & b for a, b in itertools.combinations(some, 2))


def test_some_digits_are_all_images_of_these_and_no_others():
    part = digits().test
    some = part.of(range(5, 10))
    assert set(some.labels.tolist()) == set(range(5, 10))
    assert len(some.labels) == sum(label >= 5 for label in part.labels.tolist())
    assert numpy.array_equal(some.pixels, part.pixels[part.labels >= 5])


def test_a_package_that_is_missing_is_named_with_its_extra(monkeypatch, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UnsupportedError, match=r'scikit-learn is not installed.*"minilora\[vision\]"'):
        module.digits_file()

    class Spec:
        submodule_search_locations = (str(tmp_path),)  # a package without the file

    monkeypatch.setattr("importlib.util.find_spec", lambda name: Spec)
    with pytest.raises(UnsupportedError):
        module.digits_file()


def test_another_file_is_refused(monkeypatch, tmp_path):
    """One bit off."""
    data = bytearray(module.digits_file().read_bytes())
    data[100] ^= 1
    path = tmp_path / "digits.csv.gz"
    path.write_bytes(data)
    monkeypatch.setattr(module, "digits_file", lambda: path)
    with pytest.raises(FormatError, match="sha256 differs"):
        digits.__wrapped__()


def test_scikit_learn_is_read_but_never_imported():
    code = (
        "import sys; from minilora.data.digits import digits; digits(); "
        "assert not {'sklearn', 'scipy'} & {name.partition('.')[0] for name in sys.modules}"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert len(DIGEST) == 64
    assert FILE.endswith(".gz")
    assert CUTS == (1000, 1300)


def test_batches_are_drawn_with_their_labels_and_by_the_generator():
    images = Images(numpy.arange(640.0).reshape(10, 64), numpy.arange(10))

    def some(seed):
        return list(itertools.islice(batches(images, numpy.random.default_rng(seed), 4), 30))

    seen = set()
    for pixels, labels in some(0):
        assert pixels.shape == (4, 64)
        assert numpy.array_equal(pixels, images.pixels[labels])
        seen |= set(labels.tolist())
    assert seen == set(range(10))
    one, again, two = ([labels.tolist() for _, labels in some(seed)] for seed in (0, 0, 1))
    assert one == again != two


def test_no_batch_can_be_drawn_from_nothing():
    images = Images(numpy.zeros((0, 64)), numpy.zeros(0, int))
    with pytest.raises(InputError, match="no image"):
        batches(images, numpy.random.default_rng(0), 4)
    with pytest.raises(ConfigError, match="batch_size is 0"):
        batches(digits().train, numpy.random.default_rng(0), 0)


def test_the_images_cannot_be_written():
    with pytest.raises(ValueError, match="read-only"):
        digits().train.pixels[0, 0] = 0
