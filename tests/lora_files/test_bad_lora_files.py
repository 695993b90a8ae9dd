"""No reader accepts a bad LoRA file of another tool: a catalogue by tool, and one contract for all of it.

Refused means: one error of ours of exactly the named class, within two seconds, with one printable line that
names the file; nothing is written. Some files can be opened and only their numbers are refused, by whoever
reads them. Whole files that are something else are in test_recognise.py.
"""

import io
import json
import random
import zipfile
from functools import partial
from pathlib import Path

import fuzz
import numpy as np
import pytest
from helpers import says, within
from peft_cases import FIXTURES
from safetensors.numpy import save
from test_bad_files import disk

from minilora.analysis.inspect import inspect
from minilora.compose.truncate import compress
from minilora.errors import ConfigError, FormatError, MismatchError, NonFiniteError, UnsupportedError
from minilora.formats.safetensors import MOST
from minilora.peft.folder import open_adapter
from minilora.table import Table

ROOT = FIXTURES.parent / "lora_files"
NAN, INF = float("nan"), float("inf")
KOHYA = "lora_unet_mid_block_attentions_0_proj_in"
DOWN, UP, MID, DORA, ALPHA = (
    f"{KOHYA}.{end}"
    for end in ("lora_down.weight", "lora_up.weight", "lora_mid.weight", "dora_scale", "alpha")
)
DIFFUSERS, HEADER = "unet.mid_block.attentions.0.proj_in", "lora_adapter_metadata"
MLX, TUNE, LIB = "model.layers.0.self_attn.q_proj", "layers.0.attn.q_proj", "fc"
GGUF = "blk.0.attn_q.weight"
CONFIG = {"fine_tune_type": "lora", "lora_parameters": {"rank": 2, "scale": 20.0, "dropout": 0.0}}


# ---- files, each of one good module with something else in it


def ones(*shape):
    return np.ones(shape, np.float32)


def file(good, metadata=None, **given):
    """A safetensors file: arrays by name, and how it is opened."""

    def make(root, more=(), raw=lambda b: b, told=metadata):
        path = root / "lora.safetensors"
        held = {name: np.asarray(a, order="C") for name, a in (good | dict(more)).items() if a is not None}
        path.write_bytes(raw(save(held, told)))
        return path

    return make


kohya = file({DOWN: ones(2, 3), UP: ones(4, 2), ALPHA: np.float32(1)})
conv = file({DOWN: ones(2, 3, 1, 1), UP: ones(4, 2, 1, 1), MID: ones(2, 2, 3, 3), ALPHA: np.float32(1)})
diffusers = file({f"{DIFFUSERS}.lora_A.weight": ones(2, 3), f"{DIFFUSERS}.lora_B.weight": ones(4, 2)})
torchtune = file({f"{TUNE}.lora_a.weight": ones(2, 3), f"{TUNE}.lora_b.weight": ones(8, 2)})
loralib = file({f"{LIB}.lora_A": ones(2, 3), f"{LIB}.lora_B": ones(4, 2)})


def mlx(root, more=(), config=None):
    """MLX's folder."""
    root = root / "mlx"
    root.mkdir()
    text = config if isinstance(config, bytes) else json.dumps(CONFIG if config is None else config).encode()
    (root / "adapter_config.json").write_bytes(text)
    held = {f"{MLX}.lora_a": ones(3, 2), f"{MLX}.lora_b": ones(2, 4)} | dict(more)
    (root / "adapters.safetensors").write_bytes(save(held, None))
    return root


def scaled(**changes):
    """MLX's config with other lora_parameters."""
    return CONFIG | {"lora_parameters": CONFIG["lora_parameters"] | changes}


def npz(root, more=(), raw=lambda b: b, members=()):
    """MLX's old file of arrays; `members` are put in as they are, name -> bytes."""
    held = {f"{MLX}.lora_a": ones(3, 2), f"{MLX}.lora_b": ones(2, 4)} | dict(more)
    out = io.BytesIO()
    np.savez(out, **held)
    with zipfile.ZipFile(out, "a") as archive:
        for name, data in dict(members).items():
            archive.writestr(name, data)
    (root / "adapters.npz").write_bytes(raw(out.getvalue()))
    return root / "adapters.npz"


def npy(shape, dtype="<f4", order="False"):
    """An array of an .npz that says so, and has four bytes of numbers."""
    text = f"{{'descr': '{dtype}', 'fortran_order': {order}, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\1\0" + len(text).to_bytes(2, "little") + text + b"\0\0\0\0"


def llama(root, values=None, tensors=None, raw=lambda b: b):
    """An adapter in GGUF: values by name, and tensors as (rows, columns) by name."""
    pytest.importorskip("gguf")
    told = {
        "general.architecture": "llama", "general.type": "adapter", "adapter.type": "lora",
        "adapter.lora.alpha": 4.0,
    } | (values or {})  # fmt: skip
    shapes = {f"{GGUF}.lora_a": (2, 3), f"{GGUF}.lora_b": (8, 2)} | (tensors or {})
    entries = [[n, list(s[::-1]), 0, ones(*s).tobytes()] for n, s in shapes.items() if s]
    values = [[n, *((6, v) if isinstance(v, float) else fuzz.typed(v))] for n, v in told.items()]
    (root / "m.gguf").write_bytes(raw(fuzz.composed(values, entries)))
    return root / "m.gguf"


def with_(make, *changes):
    """One way for each of the changes to the arrays."""
    return [partial(make, more=change) for change in changes]


def cut(make):
    """Prefixes of a good file."""
    return [partial(make, raw=lambda b, part=part: b[: int(part * len(b))]) for part in (0.1, 0.5, 0.99)]


def told(make, name, *values):
    """The header with one more entry."""
    return [partial(make, told={name: value}) for value in values]


def peft(**changes):
    """PEFT's config of a component in the header of diffusers."""
    fields = {"unet.r": 2, "unet.lora_alpha": 4} | {f"unet.{name}": value for name, value in changes.items()}
    return json.dumps({name: value for name, value in fields.items() if value is not ...})


def named(*names):
    """kohya's module under other names."""
    return with_(kohya, *({DOWN: None, UP: None, ALPHA: None, f"{name}.lora_down.weight": ones(2, 3),
                           f"{name}.lora_up.weight": ones(4, 2)} for name in names))  # fmt: skip


def unread(dtype):
    """The first factor's dtype is another of as many bytes."""
    old = b'"dtype":"F32","shape":[2,3]'
    return partial(kohya, raw=lambda b: b.replace(old, old.replace(b"F32", dtype)))


def many(root):
    """A file of 100,001 empty tensors."""
    entry = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    head = json.dumps({f"lora_unet_{i}.lora_up.weight": entry for i in range(MOST + 1)}).encode()
    (root / "lora.safetensors").write_bytes(len(head).to_bytes(8, "little") + head)
    return root / "lora.safetensors"


# ---- the rows: whose file, what is tried, error, what it says, the ways

FIT = r"expected \(r, I\) and \(O, r\)"
REFUSED = [
    ("kohya", "two ranks", MismatchError, FIT,
     with_(kohya, {UP: ones(4, 3)}, {DOWN: ones(3, 3)}, {UP: ones(4)}, {UP: ones(4, 2, 3, 3)})),
    ("kohya", "factors that are no matrices", MismatchError, FIT,
     with_(kohya, {DOWN: np.float32(1)}, {DOWN: ones(2)}, {DOWN: ones(2, 3, 1, 1, 1, 1)})),
    ("kohya", "rank 0", MismatchError, "has empty factors",
     with_(kohya, {DOWN: ones(0, 3), UP: ones(4, 0)}, {DOWN: ones(2, 0)}, {UP: ones(0, 2)})),
    ("kohya", "alpha not finite or below 0", ConfigError, r"alpha is (nan|inf|-inf|-1.0); expected a finite",
     with_(kohya, *({ALPHA: np.float32(x)} for x in (NAN, INF, -INF, -1)))),
    ("kohya", "alpha of two numbers or none", MismatchError, r"alpha has shape .*; expected one number",
     with_(kohya, {ALPHA: ones(2)}, {ALPHA: ones(0)}, {ALPHA: ones(1, 2)})),
    ("kohya", "alpha no number", UnsupportedError, "alpha: dtype is BOOL",
     with_(kohya, {ALPHA: np.array(True)})),
    ("kohya", "a scale beyond all bounds", ConfigError, "the scale of unet.mid_block.*proj_in is",
     with_(kohya, {ALPHA: np.float64(5e-324)})),
    ("kohya", "alphas for all that are none", ConfigError, "in the header is .*; expected a number above 0",
     told(file({DOWN: ones(2, 3), UP: ones(4, 2)}), "network_alpha", "x", "", "nan", "inf", "-1", "0",
          "9" * 5000)),
    ("LyCORIS", "a core of another shape", MismatchError, r"lora_mid .* and lora_down .*; expected \(r, r, k",
     with_(conv, {MID: ones(2)}, {MID: ones(2, 3, 3, 3)}, {MID: ones(2, 2)}, {MID: np.float32(1)},
           {DOWN: ones(2, 3, 3, 3)}, {DOWN: ones(2)})),
    ("LyCORIS", "a core of another rank", MismatchError, FIT, with_(conv, {MID: ones(3, 2, 3, 3)})),
    ("LyCORIS", "a core that makes terabytes", UnsupportedError, "makes a factor .*; expected at most",
     with_(conv, {MID: ones(2, 2, 500, 500), DOWN: ones(2, 10**5)})),
    ("any", "names with odd characters", MismatchError, r"the tensor name '.* is invalid; expected printable",
     named("lora_unet_ä", "lora_unet_a b", "a\n", "\x1b[2J", "а", "a" * 600, "\0")),
    ("any", "names that are no paths", MismatchError, r"'.*' cannot be the name of a module",
     named("", "a..b", "../a", "a/b", "a.", "a:b", "__class__.{}")),
    ("any", "a module by two names", MismatchError, "are the same part of unet.mid_block",
     with_(kohya, {f"{DIFFUSERS}.lora_A.weight": ones(2, 3)}, {f"{DIFFUSERS}.alpha": np.float32(1)},
           {f"_orig_mod.{DOWN}": ones(2, 3)})),
    ("any", "cut", FormatError, "lora.safetensors: ", cut(kohya)),
    ("any", "100,001 tensors", FormatError, "header has 100001 tensors; expected at most 100000", [many]),
    ("diffusers", "a header that is none", FormatError, "lora_adapter_metadata is not a JSON object",
     told(diffusers, HEADER, "", "{", "[]", "null", "x", '{"unet.r": 1, "unet.r": 2}', "[" * 100_000)),
    ("diffusers", "a header with half a character", FormatError, "lora_adapter_metadata is not a JSON object",
     [partial(diffusers, told={HEADER: "@" * 6}, raw=lambda b: b.replace(b"@" * 6, rb"\ud800"))]),
    ("diffusers", "a header without r or alpha", ConfigError, "(r|lora_alpha) is missing; expected a number",
     told(diffusers, HEADER, peft(r=...), peft(lora_alpha=...))),
    ("diffusers", "a header of other types", ConfigError, "(r|lora_alpha|alpha_pattern|use_rslora) is ",
     told(diffusers, HEADER, *(peft(lora_alpha=x) for x in ("8", None, True, [8], NAN, INF, -1, 0)),
          peft(r=0), peft(r="8"), peft(r=2.0), peft(alpha_pattern=[]), peft(alpha_pattern=8),
          peft(use_rslora="false"))),
    ("diffusers", "a header with bad patterns", ConfigError, r"alpha_pattern\S* is ",
     told(diffusers, HEADER, peft(alpha_pattern={"proj_in": "x"}), peft(alpha_pattern={"proj_in": 0}),
          peft(alpha_pattern={"(": 8}))),
    ("diffusers", "a header of another method", UnsupportedError, "peft_type is 'IA3'; expected 'LORA'",
     told(diffusers, HEADER, peft(peft_type="IA3"))),
    ("MLX", "two ranks", MismatchError, FIT, with_(mlx, {f"{MLX}.lora_b": ones(3, 4)})),
    ("MLX", "factors that are no matrices", MismatchError, r"expected \(I, r\) and \(r, O\)",
     with_(mlx, {f"{MLX}.lora_a": ones(2)}, {f"{MLX}.lora_b": ones(1, 2, 4)},
           {f"{MLX}.lora_a": ones(2, 3, 2), f"{MLX}.lora_b": ones(3, 2, 4)})),
    ("MLX", "empty experts", MismatchError, r"expected \(I, r\) and \(r, O\)",
     with_(mlx, {f"{MLX}.lora_a": ones(2**40, 0, 2), f"{MLX}.lora_b": ones(2**40, 2, 0)})),
    ("MLX", "a config that is none", FormatError, "is not a JSON object",
     [partial(mlx, config=text) for text in (b"[]", b"{", b'{"fine_tune_type": "lora"} {}', b"\xff")]),
    ("MLX", "no parameters", ConfigError, "lora_parameters is .*; expected rank and scale",
     [partial(mlx, config=CONFIG | {"lora_parameters": value}) for value in (None, [], 8, "8")]),
    ("MLX", "a scale that is none", ConfigError, "lora_parameters scale is .*; expected a number",
     [partial(mlx, config=scaled(scale=x)) for x in ("20", None, True, [20], NAN, INF, -1, 0, 10**400)]),
    ("MLX", "alpha and rank that are none", ConfigError, "lora_parameters (rank|alpha) is ",
     [partial(mlx, config=scaled(**x)) for x in ({"alpha": 0}, {"alpha": "8"}, {"alpha": 8, "rank": 0})]),
    ("MLX", "a scale beyond all bounds", ConfigError, f"the scale of {MLX} is inf",
     [partial(mlx, config=scaled(scale=1.7e308))]),
    ("MLX", "another method", UnsupportedError, "fine_tune_type is .*; nearest: '(dora|lora)', '(dora|lora)'",
     [partial(mlx, config=CONFIG | {"fine_tune_type": value}) for value in ("full", "loraa", 3, None, [])]),
    ("MLX's arrays", "a pickle", UnsupportedError, r"x: dtype is '\|O'; expected <f2, <f4, <f8",
     with_(npz, {"x": np.array([{}])})),
    ("MLX's arrays", "another dtype", UnsupportedError, "x: dtype is '(<i4|>f4|<c8|<U1|[|]b1)'; expected <f2",
     with_(npz, *({"x": np.ones(1, kind)} for kind in ("i4", ">f4", "c8", "U1", "?")))),
    ("MLX's arrays", "something else in it", FormatError, "'x.*' is no array",
     [partial(npz, members={"x.npy": data}) for data in (
         b"", b"x" * 100, npy("(1,)")[:20], npy("(-1,)"), npy("(1,").replace(b"<f4", b"[('a', '<f4')]"),
         npy("(4611686018427387904, 0)"), npy("(1,)", order="None"))]),
    ("MLX's arrays", "more than there is", FormatError, "x: has .* bytes; expected",
     [partial(npz, members={"x": npy(shape)}) for shape in ("(2,)", "(99999999999, 9)", "(0,)")]),
    ("MLX's arrays", "an array twice", FormatError, "has two arrays of the same name",
     [partial(npz, members={f"{MLX}.lora_a": npy("()")})]),
    ("MLX's arrays", "cut", FormatError, "is not a file of NumPy arrays", cut(npz)),
    ("MLX's arrays", "names with odd characters", MismatchError, "the tensor name '.* is invalid",
     [partial(npz, members={name: npy("(1,)")}) for name in ("ä", "a b", "a" * 600)]),
    ("llama.cpp", "a model", UnsupportedError, "'general.type': 'model'.*; expected an adapter of",
     [partial(llama, values={"general.type": "model"})]),
    ("llama.cpp", "another kind of adapter", UnsupportedError, "'control'.*; expected an adapter of type",
     [partial(llama, values={"adapter.type": "control"})]),
    ("llama.cpp", "alpha that is none", ConfigError, "adapter.lora.alpha is .*; expected a number",
     [partial(llama, values={"adapter.lora.alpha": x}) for x in (NAN, INF, -1.0, "4", 4, True)]),
    ("llama.cpp", "two ranks", MismatchError, FIT, [partial(llama, tensors={f"{GGUF}.lora_b": (8, 3)})]),
    ("llama.cpp", "half a pair", MismatchError, "has no lora_[AB]; there is",
     [partial(llama, tensors={f"{GGUF}.lora_{x}": None}) for x in "ab"]),
    ("llama.cpp", "names with odd characters", MismatchError, "the tensor name '.* is invalid",
     [partial(llama, tensors={name: (2, 2)}) for name in ("a b", "\x1b[2J", "a" * 600)]),
    ("llama.cpp", "cut", FormatError, "m.gguf: ", cut(llama)),
    ("MLX", "a part of kohya's", MismatchError, "alpha' is no part of a file of MLX; expected only a, b,",
     with_(mlx, {f"{MLX}.alpha": ones(1)})),
    ("torchtune", "a part of kohya's", MismatchError, "no part of a file of torchtune; expected only A, B,",
     with_(file({"output.lora_a.weight": ones(2, 3), "output.lora_b.weight": ones(8, 2)}),
           *({f"lm_head.{end}": ones(1)} for end in ("alpha", "dora_scale", "lora_mid.weight")))),
    ("loralib", "a part of kohya's", MismatchError, "no part of a file of loralib; expected only A, B$",
     with_(loralib, {f"{LIB}.alpha": np.float32(1)})),
]  # fmt: skip
NUMBERS = [  # opened, but the numbers are refused
    ("kohya", "not finite", NonFiniteError, "not finite, the first at",
     with_(kohya, {UP: np.full((4, 2), NAN, "f4")}, {DOWN: np.array([[1, 1, INF]] * 2, "f4")})),
    ("kohya", "a product beyond float64", NonFiniteError, "its factors are too large",
     with_(kohya, *({DOWN: np.full((2, 3), a), UP: np.full((4, 2), b)}
                    for a, b in ((1e200, 1e200), (-1e200, 1e200), (1.2e154, 1.2e154))))),
    ("LyCORIS", "a core that is not finite", NonFiniteError, "not finite",
     with_(conv, {MID: np.full((2, 2, 3, 3), NAN, "f4")})),
    ("any", "another dtype", UnsupportedError, "dtype is (I32|U32|F8_E5M2); expected one of F64",
     [unread(dtype) for dtype in (b"I32", b"U32")]),
    ("MLX's arrays", "numbers that are damaged", FormatError, "cannot be read: Bad CRC-32",
     [partial(npz, more={f"{MLX}.lora_a": ones(9000, 2)},
              raw=lambda b: b.replace(ones(8000, 2).tobytes(), bytes(64_000)))]),
]  # fmt: skip
GIVEN = [  # what a file does not hold, given wrongly
    ("torchtune", "alpha that is none", ConfigError, "alpha is .*; expected a number in", torchtune,
     [{"alpha": x} for x in (NAN, INF, 0, -1, "8", True)]),
    ("torchtune", "heads that are none", ConfigError, "(query|key) heads is .*; expected an int, at least 1",
     torchtune, [{"alpha": 8, "heads": heads} for heads in ((0, 2), (4, -1), (4, 2.0))]),
    ("torchtune", "heads that do not fit", MismatchError, "has 8 rows; expected pairs for 3 heads", torchtune,
     [{"alpha": 8, "heads": (3, 3)}]),
    ("torchtune", "a magnitude of other heads", MismatchError, "has 6 rows; expected pairs for 2 heads",
     file({f"{TUNE}.lora_a.weight": ones(2, 3), f"{TUNE}.lora_b.weight": ones(6, 2)}),
     [{"alpha": 8, "heads": (2, 2)}]),
    ("llama.cpp", "heads that do not fit", MismatchError, "has 8 rows; expected pairs for (3|8) heads", llama,
     [{"heads": (3, 3)}, {"heads": (8, 8)}]),
    ("loralib", "r that is none", ConfigError, "r is .*; expected an int, at least 1", loralib,
     [{"alpha": 8, "r": r} for r in (0, -1, 2.0, True)]),
    ("loralib", "r that does not fit", MismatchError, "expected multiples of r = 3", loralib,
     [{"alpha": 8, "r": 3}]),
    ("loralib", "parts that make terabytes", UnsupportedError, "makes a factor .*; expected at most",
     file({f"{LIB}.lora_A": ones(10**5, 1), f"{LIB}.lora_B": ones(10**5, 1)}), [{"alpha": 8, "r": 1}]),
    ("loralib", "parts that do not fit", MismatchError, "expected multiples of r = 2",
     file({f"{LIB}.lora_A": ones(6, 3), f"{LIB}.lora_B": ones(4, 2)}), [{"alpha": 8, "r": 2}]),
]  # fmt: skip
TAKEN = [
    ("kohya", "alpha 0", "1 module has an alpha of 0, read as r here", with_(kohya, {ALPHA: np.float32(0)})),
    ("kohya", "no alpha", "1 module has no alpha, so the scale is 1", with_(kohya, {ALPHA: None})),
    ("kohya", "alpha of a whole number", "", with_(kohya, {ALPHA: np.int64(1)}, {ALPHA: ones(1)})),
    ("LyCORIS", "magnitudes of neither side", "magnitude of inputs or outputs: 1 module is not",
     with_(kohya, {DORA: ones(3)}, {DORA: np.float32(1)})),
    ("MLX", "no scale", "the config has no scale, so it is MLX's usual 20",
     [partial(mlx, config=CONFIG | {"lora_parameters": {"rank": 2}})]),
    ("MLX's arrays", "no config", "there is no config beside it, so the scale is MLX's usual 20", [npz]),
    ("llama.cpp", "no heads", "the rows of q_proj and k_proj are in llama.cpp's order", [llama]),
]  # fmt: skip


def refused(call, root, error, match):
    before = disk(root)
    with within(2), pytest.raises(error, match=match) as e:
        call()
    assert type(e.value) is error
    says(e.value, root)
    assert disk(root) == before


def cases(rows):
    """One case for each way of each row."""
    return [
        pytest.param(*rest, way, id=f"{tool}, {what}, {i}")
        for tool, what, *rest, ways in rows
        for i, way in enumerate(ways)
    ]


@pytest.mark.parametrize(("error", "match", "make"), cases(REFUSED))
def test_a_bad_lora_file_is_refused_with_one_line_and_nothing_is_written(error, match, make, tmp_path):
    path = make(tmp_path)
    refused(lambda: open_adapter(path), tmp_path, error, match)
    refused(lambda: inspect(path), tmp_path, error, match)
    refused(lambda: compress(path, tmp_path / "out", rank=1), tmp_path, error, match)


@pytest.mark.parametrize(("error", "match", "make"), cases(NUMBERS))
def test_numbers_that_cannot_be_read_are_refused_by_whoever_reads_them(error, match, make, tmp_path):
    path = make(tmp_path)
    assert open_adapter(path).pairs
    refused(lambda: inspect(path), tmp_path, error, match)
    refused(lambda: compress(path, tmp_path / "out", rank=1), tmp_path, error, match)


@pytest.mark.parametrize(("error", "match", "make", "how"), cases(GIVEN))
def test_what_is_given_beside_a_file_is_checked(error, match, make, how, tmp_path):
    path = make(tmp_path)

    def read():
        found = open_adapter(path, **how)
        return [found.factors(module) for module in found.pairs]

    refused(read, tmp_path, error, match)


@pytest.mark.parametrize(("note", "make"), cases(TAKEN))
def test_an_unusual_lora_file_is_read_and_a_note_says_so(note, make, tmp_path):
    found = open_adapter(path := make(tmp_path))
    assert note in "; ".join(found.all_notes)
    assert bool(note) == bool(found.all_notes)
    assert inspect(path).modules


@pytest.mark.parametrize(("scale", "make"), [
    pytest.param(0.5, kohya, id="alpha / r"),
    pytest.param(1, *with_(kohya, {ALPHA: np.float32(0)}), id="an alpha of 0 is r"),
    pytest.param(1, *with_(kohya, {ALPHA: None}), id="no alpha"),
    pytest.param(4, *told(file({DOWN: ones(2, 3), UP: ones(4, 2)}), "network_alpha", "8"), id="one for all"),
    pytest.param(2, *told(diffusers, HEADER, peft()), id="diffusers' header"),
    pytest.param(20, mlx, id="MLX"),
    pytest.param(40, partial(mlx, config=scaled(alpha=4)), id="MLX, before 2024-03"),
    pytest.param(2, llama, id="llama.cpp"),
    pytest.param(1, partial(llama, values={"adapter.lora.alpha": 0.0}), id="llama.cpp, an alpha of 0 is r"),
])  # fmt: skip
def test_the_scale_is_where_each_tool_keeps_it(scale, make, tmp_path):
    (pair,) = open_adapter(make(tmp_path)).pairs.values()
    assert pair.scale == scale


def test_arrays_of_numpy_are_read_as_they_are(tmp_path):
    """In either order, packed or not, and only when asked for: a header beside them may promise terabytes."""
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((3, 2)), np.asfortranarray(rng.standard_normal((2, 4)).astype("f2"))
    for save_as in (np.savez, np.savez_compressed):
        save_as(tmp_path / "adapters.npz", **{f"{MLX}.lora_a": a, f"{MLX}.lora_b": b})
        found = open_adapter(tmp_path)
        A, B = found.factors(MLX)
        assert np.array_equal(A, a.T)
        assert np.array_equal(B, b.T)
        assert (A.dtype, B.dtype) == (np.float64, np.float32)
        assert found.pairs[MLX].scale == 20


def test_a_mutated_lora_file_is_refused_or_read(tmp_path):
    pytest.importorskip("gguf")
    (tmp_path / "read").mkdir()
    readers, rng = fuzz.TARGETS["lora_files"](tmp_path / "read"), random.Random(0)
    seeds = list(readers.corpus())
    for _ in range(200):
        readers(readers.mutated(rng, rng.choice(seeds), seeds))
    assert readers.inputs / 10 < readers.accepted < readers.inputs * 0.7


def table():
    """All rows as Markdown; "taken": unusual but valid."""
    lines = [(tool, what, len(ways), error.__name__) for tool, what, error, _, ways in REFUSED]
    lines += [(tool, what, len(ways), f"{error.__name__}, by whoever reads them")
              for tool, what, error, _, ways in NUMBERS]  # fmt: skip
    lines += [(tool, f"{what}, as given", len(ways), error.__name__) for tool, what, error, *_, ways in GIVEN]
    lines += [
        (tool, what, len(ways), f"taken{', with a note' * bool(note)}") for tool, what, note, ways in TAKEN
    ]
    cells = [tuple(map(str, line)) for line in sorted(lines, key=lambda line: line[0])]
    return Table(("file", "what is tried", "ways", "error"), cells).markdown("llrl")


def test_the_table_of_bad_lora_files_matches_the_tests():
    """`python tests/lora_files/test_bad_lora_files.py` prints it."""
    assert table() in (Path(__file__).parents[2] / "benchmarks/results/bad_files.md").read_text()


if __name__ == "__main__":
    print(table())
