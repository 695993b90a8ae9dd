"""Digests: one form of bytes for names, shapes, dtypes and numbers, whoever asks."""

import hashlib
import json

import numpy as np
from helpers import tiny
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from minilora.backend import to_device, to_host
from minilora.digests import of_arrays, of_bytes, of_json
from minilora.formats.checkpoint import sealed as seal_of_checkpoint
from minilora.formats.huggingface import fingerprint
from minilora.formats.safetensors import sealed
from minilora.tree import digest, named_params

FLOATS = st.sampled_from(["<f2", "<f4", "<f8"])
tensors = st.dictionaries(
    st.text("abc.", min_size=1),
    FLOATS.flatmap(lambda dtype: arrays(dtype, array_shapes(min_dims=1, min_side=0, max_side=4))),
    max_size=4,
)


def by_hand(pairs, before=b""):
    """As files and rows that were written before hold it."""
    h = hashlib.sha256(before)
    for name, a in pairs:
        h.update(f"{name} {a.shape} {a.dtype.str}\n".encode() + a.tobytes())
    return h.hexdigest()


@given(tensors=tensors)
def test_every_digest_of_arrays_has_the_same_form(tensors):
    pairs = sorted(tensors.items())
    assert of_arrays(pairs) == sealed(tensors) == sealed(dict(reversed(pairs))) == by_hand(pairs)
    with np.errstate(over="ignore", invalid="ignore"):
        narrow = [(name, a.astype(np.float32)) for name, a in pairs]
    assert fingerprint(tensors) == of_arrays(pairs, np.float32) == by_hand(narrow)
    meta = {"run": {"steps": 3}, "sha256": "x"}
    assert seal_of_checkpoint(meta, tensors) == by_hand(pairs, json.dumps({"run": {"steps": 3}}).encode())


def test_a_models_digest_is_the_digest_of_its_parameters():
    model = tiny()[0]
    params = {path: to_host(p.data) for path, p in named_params(model).items()}
    assert digest(model) == by_hand(sorted(params.items())) == sealed(params)


@given(a=arrays("<f4", (3, 4)))
def test_the_digest_ignores_memory_order_and_device(a):
    pairs = [("a", a)]
    assert of_arrays(pairs) == of_arrays([("a", np.asfortranarray(a))]) == of_arrays([("a", to_device(a))])
    assert of_arrays(pairs) != of_arrays([("b", a)])
    assert of_arrays(pairs) != of_arrays([("a", a.reshape(4, 3))])
    assert of_arrays(pairs) != of_arrays([("a", a.view("<i4"))])


def test_digests_of_bytes_and_of_json():
    assert of_bytes(b"abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert of_json({"b": 1, "a": [True]}) == of_bytes(b'{"b": 1, "a": [true]}')
    assert of_json({"b": 1, "a": 2}, sort=True) == of_json({"a": 2, "b": 1})
