"""safetensors files: what is written is read to the bit, in the bytes of the package `safetensors`."""

import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import safetensors
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays, from_dtype
from safetensors.numpy import load as their_load
from safetensors.numpy import save as their_save

from minilora.errors import FormatError, MiniloraError, StorageError, UnsupportedError
from minilora.formats import atomic
from minilora.formats import safetensors as tensors
from minilora.formats.atomic import write_atomic
from minilora.formats.safetensors import CALLED, FLOATS, layout, narrowed, open_tensors, stored, widened

DTYPES = sorted(CALLED)
printable = st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=20)
names = printable.filter(lambda name: name != "__metadata__")
shapes = array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5)
floats32 = arrays(np.float32, shapes, elements=from_dtype(np.dtype(np.float32)))
bits32 = arrays(np.uint32, st.integers(0, 50)).map(lambda u: u.view(np.float32))  # every NaN too


@st.composite
def strided(draw, dtypes=("f2", "f4", "f8")):
    """An array of any shape, dtype and byte order that lies in memory in any order."""
    dtype = np.dtype(draw(st.sampled_from("<>")) + draw(st.sampled_from(dtypes)))
    shape = draw(shapes)
    step = [draw(st.sampled_from([1, 2, -1, -3])) for _ in shape]
    room = [n * abs(s) for n, s in zip(shape, step, strict=True)]
    raw = draw(arrays(np.uint8, math.prod(room) * dtype.itemsize))
    a = raw.view(dtype).reshape(room)[tuple(slice(None, None, s) for s in step)]
    return a.transpose(draw(st.permutations(range(a.ndim))))


def file(folder, given, *how):
    """Write tensors as a file and open it."""
    write_atomic(folder / "t", layout(given, *how))
    return open_tensors(folder / "t")


def bits(a):
    return a.dtype, a.shape, a.tobytes()


def wide(a):
    """An array in the dtype and byte order in which it is read."""
    with np.errstate(invalid="ignore"):  # a signalling NaN
        return a.astype(np.float64 if a.dtype.itemsize == 8 else np.float32)


# ---- there and back


@given(given=st.dictionaries(names, strided(), max_size=5))
def test_writing_and_reading_are_inverse_to_the_bit(given, tmp_path_factory):
    found = file(tmp_path_factory.mktemp("t"), given)
    assert set(found) == set(given)
    assert len(found) == len(given)
    for name, a in given.items():
        assert bits(found[name]) == bits(wide(a))
        assert found.shapes[name] == a.shape
        assert found.dtypes[name] == CALLED[a.dtype.name]
        assert name in found
    assert "another" * 9 not in found
    with pytest.raises(KeyError):
        found["another" * 9]


@given(given=st.dictionaries(names, strided(("f4", "f8")), max_size=4), dtype=st.sampled_from(DTYPES))
def test_reading_gives_what_stored_gives(given, dtype, tmp_path_factory):
    found = file(tmp_path_factory.mktemp("t"), given, dtype)
    assert set(found.dtypes.values()) <= {CALLED[dtype]}
    for name, a in given.items():
        want = stored(a, dtype)
        assert (found[name].dtype, found[name].shape) == (want.dtype, a.shape)
        assert np.array_equal(found[name], want, equal_nan=True)
        assert np.array_equal(np.signbit(found[name]), np.signbit(want))
        assert np.array_equal(stored(want, dtype), want, equal_nan=True)  # a second time changes nothing


def test_opening_reads_the_header_and_each_access_one_tensor(tmp_path, monkeypatch):
    given = {f"layer.{i}": np.full((30, i), i, np.float32) for i in range(5)}
    path, counts = tmp_path / "t", []
    write_atomic(path, layout(given))
    header = 8 + int.from_bytes(path.read_bytes()[:8], "little")

    def counting(path, start, count, stamp):
        counts.append((start, count))
        return atomic.read_at(path, start, count, stamp)

    monkeypatch.setattr(tensors, "read_at", counting)
    found = open_tensors(path)
    assert sum(count for _, count in counts) == header
    assert all(start + count <= header for start, count in counts)
    assert found.shapes == {name: a.shape for name, a in given.items()}
    counts.clear()
    for name, a in given.items():
        found[name]
        assert counts.pop()[1] == a.nbytes
        assert not counts


# ---- the package's bytes


def theirs(given, dtype, metadata):
    """The bytes that the package writes; it takes bfloat16 by address or, before 0.8, as bytes."""
    if dtype != "bfloat16":
        kinds = {name: dtype or a.dtype.name for name, a in given.items()}
        with np.errstate(over="ignore", invalid="ignore"):
            cast = {name: np.asarray(a, kinds[name], order="C") for name, a in given.items()}
        return their_save(cast, metadata)
    bits = {name: narrowed(a) for name, a in given.items()}
    if not hasattr(safetensors, "TensorSpec"):
        entries = {k: {"dtype": dtype, "shape": a.shape, "data": a.tobytes()} for k, a in bits.items()}
    else:
        entries = {
            k: safetensors.TensorSpec(dtype=dtype, shape=a.shape, data_ptr=a.ctypes.data, data_len=a.nbytes)
            for k, a in bits.items()
        }
    return bytes(safetensors.serialize(entries, metadata))


@given(
    given=st.dictionaries(names, strided(("f4", "f8")), max_size=5),
    dtype=st.sampled_from([None, *DTYPES]),
    metadata=st.sampled_from([None, {"format": "np"}, {"é\n": 'a "quoted" \\ 字'}]),
)
def test_the_bytes_match_the_package(given, dtype, metadata):
    assert b"".join(layout(given, dtype, metadata)) == theirs(given, dtype, metadata or {"format": "pt"})


@given(given=st.dictionaries(names, strided(), max_size=5))
def test_mixed_dtypes_match_the_package_in_both_directions(given):
    raw = b"".join(layout(given))
    assert raw == theirs(given, None, {"format": "pt"})
    found = their_load(raw)
    assert set(found) == set(given)
    for name, a in given.items():
        assert bits(found[name]) == bits(a.astype(a.dtype.newbyteorder("=")))


@given(given=st.dictionaries(names, floats32, max_size=5), data=st.data())
def test_the_bytes_do_not_depend_on_dictionary_order(given, data):
    metadata = {"format": "pt", "minilora": "{}", "b": "2"}
    raw = b"".join(layout(given, None, metadata))
    for _ in range(3):
        shuffled = {name: given[name] for name in data.draw(st.permutations(sorted(given)))}
        order = data.draw(st.permutations(sorted(metadata)))
        assert b"".join(layout(shuffled, None, {key: metadata[key] for key in order})) == raw


@settings(max_examples=10)
@given(given=st.dictionaries(names, floats32, min_size=1, max_size=3))
def test_several_metadata_entries_are_read_by_both(given, tmp_path_factory):
    metadata, folder = {"format": "pt", "minilora": '{"a": "é"}'}, tmp_path_factory.mktemp("t")
    assert file(folder, given, None, metadata).metadata == metadata
    with safetensors.safe_open(folder / "t", "np") as f:
        assert f.metadata() == metadata
        assert set(f.keys()) == set(given)


def test_bfloat16_written_by_the_package_is_read(tmp_path):
    a = np.array([[1.0, -2.5], [np.inf, 3e38]], np.float32)
    write_atomic(tmp_path / "t", theirs({"w": a}, "bfloat16", {}))
    found = open_tensors(tmp_path / "t")
    assert found.dtypes == {"w": "BF16"}
    assert bits(found["w"]) == bits(stored(a, "bfloat16"))


# ---- bfloat16


def value(upper):
    """The value (n,) of bfloat16 by its bits, as float64; 2^128 where infinity lies."""
    exponent, fraction = upper.astype(np.int64) >> 7 & 0xFF, upper.astype(np.int64) & 0x7F
    size = np.ldexp(fraction + 128.0 * (exponent > 0), np.maximum(exponent, 1) - 134)
    return np.where(upper >> 15, -size, size)


@settings(max_examples=200)
@given(x=bits32)
def test_bfloat16_rounds_to_nearest_even(x):
    x = x[np.isfinite(x)]
    upper, exact = x.view(np.uint32) >> 16, x.astype(np.float64)
    down, up = np.abs(exact - value(upper)), np.abs(value(upper + 1) - exact)  # towards 0, and away from it
    want = np.where((down < up) | ((down == up) & (upper % 2 == 0)), upper, upper + 1)
    assert np.array_equal(narrowed(x), want)


def test_every_bfloat16_and_every_midpoint_rounds_correctly():
    upper = np.arange(1 << 16, dtype=np.uint32)
    finite = np.isfinite(widened(upper.astype(np.uint16)))
    assert np.array_equal(narrowed(widened(upper.astype(np.uint16)))[finite], upper[finite])
    for below, above in ((0x7FFF, 0), (0x8000, None), (0x8001, 1)):
        x = ((upper << 16) | below).view(np.float32)[finite]
        step = upper[finite] % 2 if above is None else above
        assert np.array_equal(narrowed(x), upper[finite] + step)


@given(x=bits32)
def test_nan_and_infinity_survive_narrowing(x):
    found = widened(narrowed(x))
    assert np.array_equal(np.isnan(found), np.isnan(x))
    assert np.array_equal(np.signbit(found), np.signbit(x))
    assert np.array_equal(found[np.isinf(x)], x[np.isinf(x)])
    assert found.dtype == np.float32
    assert narrowed(x).dtype == np.uint16


@given(bits=arrays(np.uint16, shapes))
def test_narrowing_undoes_widening(bits):
    x = widened(bits)
    assert x.shape == bits.shape
    number = ~np.isnan(x)
    assert np.array_equal(narrowed(x)[number], bits[number])
    assert np.array_equal(widened(narrowed(x)), x, equal_nan=True)


@given(a=strided(("f4", "f8")), dtype=st.sampled_from(DTYPES))
def test_stored_keeps_the_shape_and_rounds_to_nearest(a, dtype):
    found = stored(a, dtype)
    assert found.shape == a.shape
    assert found.dtype == (np.float64 if dtype == "float64" else np.float32)
    with np.errstate(invalid="ignore"):
        exact = wide(a).astype(np.float64)
    bits = {"float64": 53, "float32": 24, "float16": 11, "bfloat16": 8}[dtype]
    low, high = {"float16": (2.0**-14, 65504), "float64": (0, np.inf)}.get(dtype, (2.0**-126, 2.0**127))
    inside = (np.abs(exact) >= low) & (np.abs(exact) <= high)
    with np.errstate(invalid="ignore", over="ignore"):
        error = np.abs(found.astype(np.float64) - exact)[inside]
    # half a unit in the last place; a float64 that becomes bfloat16 is rounded to float32 before
    assert (error <= (2.0**-bits + 2.0**-24 * (dtype == "bfloat16")) * np.abs(exact[inside])).all()


# ---- damage


@pytest.fixture(scope="module")
def whole():
    """A good file with every dtype, a scalar and an empty tensor."""
    shapes = {"a.b": ((2, 3), np.float32), "c": ((), np.float64), "d": ((0, 2), np.float16)}
    return b"".join(layout({name: np.ones(*how) for name, how in shapes.items()}))


def said(error, path):
    """The error is one line of a sane length that names the file."""
    assert str(path) in str(error)
    assert len(str(error).splitlines()) == 1
    assert len(str(error)) < 600


def test_every_prefix_is_refused_with_one_line_that_names_the_file(whole, tmp_path):
    (tmp_path / "t").write_bytes(whole + b"\0")
    for cut in (len(whole) + 1, *reversed(range(len(whole)))):
        os.truncate(tmp_path / "t", cut)
        with pytest.raises(FormatError) as e:
            open_tensors(tmp_path / "t")
        said(e.value, tmp_path / "t")


@settings(max_examples=300)
@given(data=st.data())
def test_a_flipped_bit_is_an_error_or_changes_only_numbers_or_names(data, whole, tmp_path_factory):
    raw, path = bytearray(whole), tmp_path_factory.mktemp("t") / "t"
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, len(raw) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(raw)
    try:
        found = open_tensors(path)
        for name in found:
            assert found[name].shape == found.shapes[name]
    except MiniloraError as e:
        said(e, path)


def test_headers_that_the_package_refuses_are_refused(whole, tmp_path):
    """Changed headers: whatever the package takes for damage, we do."""
    length = int.from_bytes(whole[:8], "little")
    header, rest = json.loads(whole[8 : 8 + length]), whole[8 + length :]
    changes = []
    for name, entry in header.items():
        if name != "__metadata__":
            begin, end = entry["data_offsets"]
            for new in (
                {"dtype": "F31"}, {"dtype": "F64"}, {"shape": [7]}, {"shape": [-1, -6]}, {"shape": None},
                {"data_offsets": [begin + 1, end + 1]}, {"data_offsets": [end + 1, begin]},
                {"data_offsets": [begin]}, {"data_offsets": [begin, end + 8]},
            ):  # fmt: skip
                changes.append(header | {name: entry | new})
            changes.append({k: v for k, v in header.items() if k != name})
            changes.append(header | {name: {k: v for k, v in entry.items() if k != "dtype"}})
    refused = 0
    for changed in changes:
        text = json.dumps(changed).encode()
        raw = len(text).to_bytes(8, "little") + text + rest
        (tmp_path / "t").write_bytes(raw)
        try:
            their_load(raw)
        except safetensors.SafetensorError:
            refused += 1
            with pytest.raises(MiniloraError):
                open_tensors(tmp_path / "t")
    assert refused > len(changes) // 2


def test_a_file_that_shrinks_while_read_is_a_storage_error(whole, tmp_path):
    (tmp_path / "t").write_bytes(whole)
    found = open_tensors(tmp_path / "t")
    (tmp_path / "t").write_bytes(whole[:-1])
    with pytest.raises(StorageError, match="has changed meanwhile"):
        found["a.b"]


def test_the_dtypes_have_the_sizes_of_the_format():
    assert {name: np.dtype(kind).itemsize for name, kind in FLOATS.items()} == {
        "F64": 8, "F32": 4, "BF16": 2, "F16": 2
    }  # fmt: skip
    assert set(CALLED.values()) == set(FLOATS)


@given(
    given=st.dictionaries(names, strided(("f4", "f8")), max_size=4),
    codes=st.dictionaries(names, strided(("u1",)), max_size=4),
    dtype=st.sampled_from([None, "float16", "float32"]),
)
def test_bytes_stay_bytes_whatever_the_dtype_of_the_rest(given, codes, dtype, tmp_path_factory):
    """They stand in the package's order, and are not read as floats."""
    found = file(tmp_path_factory.mktemp("t"), given | codes, dtype, None, codes)
    with np.errstate(over="ignore", invalid="ignore"):
        cast = {name: a.astype(dtype or a.dtype) for name, a in given.items()}
    assert Path(found.where).read_bytes() == theirs(cast | codes, None, {"format": "pt"})
    for name, a in codes.items():
        assert bits(found.bytes_of(name)) == bits(a)
        with pytest.raises(UnsupportedError, match="dtype is U8"):
            found[name]


def test_bytes_of_another_size_than_their_shape_are_refused(tmp_path):
    header = json.dumps({"a": {"dtype": "U8", "shape": [2, 3], "data_offsets": [0, 5]}}).encode()
    (tmp_path / "t").write_bytes(len(header).to_bytes(8, "little") + header + bytes(5))
    found = open_tensors(tmp_path / "t")
    with pytest.raises(FormatError, match=r"a: has 5 bytes; expected \(2, 3\) of U8"):
        found.bytes_of("a")


def test_tensors_of_another_format_have_no_bytes():
    found = tensors.Tensors("a.gguf", {"a": (2,)}, {"a": "F32"}, {"a": np.zeros(2)}.__getitem__)
    with pytest.raises(FormatError, match="a: is stored in a format without tensors of bytes"):
        found.bytes_of("a")
