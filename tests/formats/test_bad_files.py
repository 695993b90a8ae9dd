"""No reader accepts a bad file: a numbered catalogue of bad input, and one contract for all of it.

Each row spoils a good adapter of PEFT, or its base, in one way or several, and names the door at which that
must be refused. Refused means: one error of ours of exactly the named class, within two seconds and 64 MiB,
with one printable line that names the file; model, adapters and every byte on disk are as they were.

    1-32 config   33-55 container   56-69 keys, shapes, values   70-81 files, bases, saving   98-103 merging
    120-122 what is taken for a base, and bases whose forward pass is another

Rows 101, 102 and 104 to 109 (mixed batches, composition, 4-bit bases) are left out: they are later work.
"""

import contextlib
import errno
import gzip
import io
import json
import os
import pickle
import random
import re
import shutil
import subprocess
import sys
import tracemalloc
import zipfile
from dataclasses import dataclass
from pathlib import Path

import fuzz
import numpy as np
import pytest
from helpers import says, within
from hypothesis import given, settings
from hypothesis import strategies as st
from peft_cases import FIXTURES, IDS
from safetensors.numpy import load as their_load
from safetensors.numpy import save as their_save

from minilora.adapters import remove, set_scale
from minilora.backend import to_host
from minilora.errors import (
    ConfigError,
    FormatError,
    InputError,
    MiniloraError,
    MismatchError,
    NonFiniteError,
    StateError,
    StorageError,
    UnsupportedError,
)
from minilora.formats import atomic
from minilora.formats.huggingface import load, save_model
from minilora.lora import Adapted, adapted, fuse, inject, merge, owners, set_adapter, unmerge
from minilora.methods.lora_config import LoraConfig
from minilora.peft.folder import CONFIG, WEIGHTS, open_adapter
from minilora.peft.loading import load_adapter, save_adapter
from minilora.table import Table
from minilora.tree import named_params

GOOD, BASE = FIXTURES / "adapters" / "untied--q-and-v", FIXTURES / "bases" / "untied"
SHARDS = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
INDEX, TENSORS = "model.safetensors.index.json", "model.safetensors"
Q = "base_model.model.model.layers.0.self_attn.q_proj."
V = "base_model.model.model.layers.1.self_attn.v_proj."


# ---- how a good folder is spoiled


@dataclass
class Place:
    """An adapter's folder and that of its base, to be spoiled."""

    root: Path
    adapter: Path
    base: Path
    file: Path  # the tensors that rows 33 to 55 spoil: the adapter's or the base's


def both(*spoilers):
    def spoil(place):
        for one in spoilers:
            one(place)

    return spoil


def config(*gone, **changes):
    """Change and drop fields of the adapter's config."""

    def spoil(place):
        path = place.adapter / CONFIG
        now = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({k: v for k, v in now.items() if k not in gone}))

    return spoil


def each(field, *values):
    return [config(**{field: value}) for value in values]


def edit(old, new):
    """Change the text of the adapter's config."""

    def spoil(place):
        path = place.adapter / CONFIG
        assert old in path.read_bytes()
        path.write_bytes(path.read_bytes().replace(old, new))

    return spoil


def text(data):
    """Give the adapter's config these bytes."""
    return lambda place: (place.adapter / CONFIG).write_bytes(data)


def raw(change):
    """Change the bytes of the file of tensors."""
    return lambda place: place.file.write_bytes(change(place.file.read_bytes()))


def length(change):
    """Change the length that the file of tensors states of its header, known with that of the file."""
    return raw(lambda b: change(int.from_bytes(b[:8], "little"), len(b)).to_bytes(8, "little") + b[8:])


def header(change):
    """Change the header, given as its object; or as text, where the change gives back bytes."""

    def spoil(place):
        whole = place.file.read_bytes()
        end = 8 + int.from_bytes(whole[:8], "little")
        new = change(json.loads(whole[8:end]))
        new = new if isinstance(new, bytes) else json.dumps(new).encode()
        place.file.write_bytes(len(new).to_bytes(8, "little") + new + whole[end:])

    return spoil


def compact(head):
    return json.dumps(head, separators=(",", ":")).encode()


def written(old, new):
    """Change the first occurrence in the header's text."""
    return header(lambda head: compact(head).replace(old, new, 1))


def first(head):
    """The name of the tensor that lies first in the file."""
    return min(set(head) - {"__metadata__"}, key=lambda name: head[name]["data_offsets"])


def entry(*gone, **changes):
    """Change and drop fields of the first tensor's entry."""

    def change(head):
        new = head[first(head)] | changes
        return head | {first(head): {k: v for k, v in new.items() if k not in gone}}

    return header(change)


def shapes(*values):
    return [entry(shape=value) for value in values]


def offsets(change):
    """Change the first tensor's place: a function of its end."""
    return header(lambda head: head | {
        (name := first(head)): head[name] | {"data_offsets": change(head[name]["data_offsets"][1])}
    })  # fmt: skip


def named(*names):
    """Give the first tensor another name, each in turn."""
    return [
        header(lambda head, name=name: {name if k == first(head) else k: v for k, v in head.items()})
        for name in names
    ]


def bombs(count, entry):
    """A header of very many entries and nothing behind it."""
    new = compact({f"t{i}": entry for i in range(count)})
    return raw(lambda b: len(new).to_bytes(8, "little") + new)


def huge(place):
    """Let the first tensor have 8 GiB, of which the disk holds none."""
    whole = place.file.read_bytes()
    end = 8 + int.from_bytes(whole[:8], "little")
    head = json.loads(whole[8:end])
    big, start = head.pop(first(head)), 0
    name = first(json.loads(whole[8:end]))
    for other in sorted((k for k in head if k != "__metadata__"), key=lambda k: head[k]["data_offsets"]):
        size = head[other]["data_offsets"][1] - head[other]["data_offsets"][0]
        head[other]["data_offsets"] = [start, start := start + size]
    rows = big["shape"][0]
    big |= {"shape": [rows, 2**31 // rows], "data_offsets": [start, start + 4 * rows * (2**31 // rows)]}
    new = compact(head | {name: big})
    place.file.write_bytes(len(new).to_bytes(8, "little") + new)
    os.truncate(place.file, 8 + len(new) + big["data_offsets"][1])


def sparse(size, stated):
    def spoil(place):
        place.file.write_bytes(stated.to_bytes(8, "little"))
        os.truncate(place.file, size)

    return spoil


def tensors(change):
    """Change the adapter's arrays by name."""

    def spoil(place):
        path = place.adapter / WEIGHTS
        path.write_bytes(their_save(change(their_load(path.read_bytes())), {"format": "pt"}))

    return spoil


def array(name, change):
    """Change one array of the adapter."""
    return tensors(lambda t: t | {name: np.ascontiguousarray(change(t[name]))})


def without(*names):
    return tensors(lambda t: {k: a for k, a in t.items() if k not in names})


def called(change):
    """Give all tensors of the adapter other names."""
    return tensors(lambda t: {change(k): a for k, a in t.items()})


def zeros(name, *shape):
    """Give the adapter one more tensor, or another in the place of one."""
    return tensors(lambda t: t | {name: np.zeros(shape, np.float32)})


def more(module):
    """Give a module of that name the factors of another one too."""
    return tensors(lambda t: t | {k.replace(Q, f"{module}."): a.copy() for k, a in t.items() if Q in k})


def put(a, at, value):
    a = a.copy()
    a[at] = value
    return a


def fixture(name):
    """Another adapter of PEFT."""

    def spoil(place):
        shutil.copy(FIXTURES / "adapters" / name / CONFIG, place.adapter)
        shutil.copy(FIXTURES / "adapters" / name / WEIGHTS, place.adapter)

    return spoil


def based(name):
    """Another base."""

    def spoil(place):
        shutil.rmtree(place.base)
        shutil.copytree(FIXTURES / "bases" / name, place.base)

    return spoil


def shape(**changes):
    """Change fields of the base's config."""

    def spoil(place):
        path = place.base / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return spoil


def weights(change):
    """Change the arrays of the base."""

    def spoil(place):
        path = place.base / TENSORS
        path.write_bytes(their_save(change(their_load(path.read_bytes())), {"format": "pt"}))

    return spoil


def index(change):
    """Change the weight_map of a base in two files."""

    def spoil(place):
        based("sharded")(place)
        path = place.base / INDEX
        path.write_text(json.dumps({"weight_map": change(json.loads(path.read_text())["weight_map"])}))

    return spoil


def shard(name):
    """Let the first file of a base in two be called so."""
    return index(lambda m: {k: name if file == SHARDS[0] else file for k, file in m.items()})


def linked(target):
    """Let the first file of a base in two be a link."""

    def spoil(place):
        based("sharded")(place)
        os.rename(place.base / SHARDS[0], place.root / SHARDS[0])
        (place.base / SHARDS[0]).symlink_to(target)

    return spoil


def ours(place):
    """The adapter as minilora writes it beside its base."""
    model = load(BASE)
    load_adapter(model, GOOD)
    shutil.rmtree(place.adapter)
    save_adapter(model, place.adapter)


def become(kind, name, folder="adapter"):
    """Put something that is not a file in the place of one."""

    def spoil(place):
        path = getattr(place, folder) / name
        path.unlink()
        if kind == "fifo":
            os.mkfifo(path)
        elif kind == "folder":
            path.mkdir()
        elif kind != "missing":
            path.symlink_to({"dangling": "none", "loop": path.name, "endless": "/dev/zero"}[kind])

    return spoil


def instead(name):
    """The adapter's tensors lie in a file of another name."""
    return lambda place: os.rename(place.adapter / WEIGHTS, place.adapter / name)


def hub(folder):
    """Lay a folder out as the hub's client does: links to files that are called by their digest."""

    def spoil(place):
        old, new = getattr(place, folder), place.root / f"models--{folder}" / "snapshots" / ("0" * 40)
        new.mkdir(parents=True)
        (blobs := new.parent.parent / "blobs").mkdir()
        for i, path in enumerate(sorted(old.iterdir())):
            os.rename(path, blobs / f"{i:064}")
            (new / path.name).symlink_to(f"../../blobs/{i:064}")
        setattr(place, folder, new)

    return spoil


class Runs:
    """A pickle that makes a folder when it is opened."""

    def __reduce__(self):
        return os.mkdir, ("it-ran",)


def zipped(**files):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as z:
        for name, data in files.items():
            z.writestr(name, data)
    return out.getvalue()


# ---- the rows that are refused

ADAPTER = ("adapter",)  # open_adapter and load_adapter
BESIDE = ("beside",)  # load_adapter alone: it is the base that tells, or the numbers
TOLD = ("told",)  # load_adapter; who only looks at it reads the same as a note
BASES = ("base",)
FILE = ADAPTER + BASES  # any safetensors file
NAN, INF = float("nan"), float("inf")
DEEP = b"[" * 100_000 + b"]" * 100_000
LFS = b"version https://git-lfs.github.com/spec/v%s\noid sha256:0123abcd\nsize 12\n"
KINDS = ("missing", "folder", "dangling", "loop", "fifo", "endless")
DIGITS = b"9" * 5000
OTHER_METHODS = ("IA3", "ADALORA", "PREFIX_TUNING", "A_METHOD_OF_TOMORROW")
SWITCHES = {
    "lora_bias": True, "use_qalora": True, "alora_invocation_tokens": [1], "layer_replication": [[0, 2]],
    "target_parameters": ["x"], "trainable_token_indices": [1], "megatron_config": {"a": 1},
    "arrow_config": {"a": 1}, "ensure_weight_tying": True, "init_lora_weights": "pissa_niter_4",
}  # fmt: skip
ESC = "\x1b[31mred\x1b[2J"
EXPLODING = (  # for who tries one way after the other
    "(a+)+$",
    "(.*)*x",
    "(a|a)*",
    "(?!x).*x",
    "(?:aa|a)" * 40 + "x",
    "a?" * 40 + "a" * 40,
    ".*.*.*.*.*.*x",
    ".*" * 400 + "x",
    "(a{1,60}){1,60}",
    "((((a|b)|c)|d)|e)?" * 9,
)
NOT_DONE = (
    r"(.)\1",
    "(?>a)",
    "a*+",
    "a?+",
    "a{2}+",
    r"(a)?(?(1)b|c)",
    "(?P<x>.)(?P=x)",
    "(?i)Q_PROJ",
    "(?x) q_proj",
    "(?#why)q_proj",
    "(?-i:q_proj)",
    r"\x71_proj",
    r"\u0071_proj",
    r"\N{DIGIT ONE}",
    "\xe9",
    ESC,
    "q\0",
    "x?" * 5001,
    "(" * 60 + ")" * 60,
    r"\p{L}",
)
ASIDE = (
    "lora_bias", "alora_invocation_tokens", "layer_replication", "trainable_token_indices",
    "ensure_weight_tying",
)  # fmt: skip
OTHER_DTYPES = ("BOOL", "U8", "I8", "I16", "I32", "I64", "C64", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F4")
ZERO = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}

# number, what it is, where it must be refused, the error, what its message says, how to get there
REFUSED = [
    (1, "rank 0", ADAPTER, ConfigError, "r is 0; expected an int, at least 1", [config(r=0)]),
    (2, "negative rank", ADAPTER, ConfigError, "r is -3; expected an int, at least 1", [config(r=-3)]),
    (4, "rank not whole", ADAPTER, ConfigError, r"\br is .*expected an int",
        each("r", 8.5, 3.0, "3", [3], None)),
    (5, "rank True", ADAPTER, ConfigError, "r is True; expected an int", [config(r=True)]),
    (6, "endless rank", ADAPTER, ConfigError, "r is [19]0+.*; expected at most", each("r", 10**9, 10**400)),
    (6, "rank of 5,000 digits", ADAPTER, FormatError, "not a JSON object",
        [edit(b'"r": 3', b'"r": ' + DIGITS)]),
    (7, "no rank", ADAPTER, ConfigError, "r is missing", [config("r")]),
    (7, "no alpha", ADAPTER, ConfigError, "lora_alpha is missing", [config("lora_alpha")]),
    (8, "rank of another file", TOLD, MismatchError, r"lora_A \(3, 12\).*config's r = 4", [config(r=4)]),
    (9, "alpha not finite", ADAPTER, ConfigError, r"lora_alpha is .*expected a number in \(0, inf\)",
        [*each("lora_alpha", NAN, INF, -INF), edit(b'"lora_alpha": 7', b'"lora_alpha": 1e999')]),
    (10, "negative alpha", ADAPTER, ConfigError, "lora_alpha is -8", [config(lora_alpha=-8)]),
    (11, "alpha 0", ADAPTER, ConfigError, r"lora_alpha is -?0", each("lora_alpha", 0, 0.0, -0.0)),
    (12, "alpha no number", ADAPTER, ConfigError, "lora_alpha is",
        each("lora_alpha", "8", True, [8], None, 10**400)),
    (13, "dropout", ADAPTER, ConfigError, r"lora_dropout is .*\[0, 1\)",
        each("lora_dropout", -0.1, 1, 1.5, NAN, "0.1", True, None)),
    (14, "no targets", ADAPTER, ConfigError, "target_modules is ''", each("target_modules", "")),
    (14, "no targets", BESIDE, ConfigError, "target_modules is empty", each("target_modules", [], None)),
    (15, "an unknown target", TOLD, MismatchError, "target_modules 'nope_proj'; nearest: .*'q_proj'",
        [config(target_modules=["q_proj", "v_proj", "nope_proj"])]),
    (15, "unknown targets", TOLD, MismatchError, r"q_proj, which target_modules \('nope',\) does not match",
        [config(target_modules=["nope"]), config(target_modules=["nope"] * 20_000)]),
    (15, "endless targets", TOLD, MismatchError, "target_modules",
        [config(target_modules=["q_proj", "v_proj", "x" * 500_000]),
         config(target_modules=["q_proj", "v_proj", *(f"x{i}" for i in range(50_000))])]),
    (16, "targets of another type", ADAPTER, ConfigError, "target_modules (is|has the entry)",
        each("target_modules", 7, {"q_proj": 1}, [["q_proj"]], ["q_proj", None], True)),
    (16, "a target without a name", BESIDE, ConfigError, "target_modules has the entry ''",
        each("target_modules", [""])),
    (17, "no regular expression", BESIDE, ConfigError, "target_modules is .*not a regular expression",
        each("target_modules", "(", "[a", "*a", "a{3,2}", "a**", ")", "[[a]", "[a--b]")),
    (17, "regular expression not done", BESIDE, UnsupportedError, "target_modules is .*not supported",
        each("target_modules", *NOT_DONE)),
    (17, "pattern not done", ADAPTER, UnsupportedError, "alpha_pattern is .*not supported",
        [config(alpha_pattern={key: 3}) for key in NOT_DONE]),
    (18, "exploding regular expression", BESIDE, MismatchError, "which target_modules .* does not match",
        each("target_modules", *EXPLODING)),
    (18, "more steps than are counted", BESIDE, UnsupportedError, r"comparing with \d modules takes more",
        [config(target_modules="(?:(?=(?:" + "|" * 9000 + ".)*j).)*")]),
    (18, "more steps for ranks", ADAPTER, UnsupportedError, r"comparing with \d modules takes more",
        [config(rank_pattern={f"{i}(x){'y' * 200}": 3 for i in range(500)})]),
    (19, "paths for names", BESIDE, ConfigError, "target_modules has the entry",
        each("target_modules", *(["q_proj", n] for n in
             ("../x", "/etc/passwd", "a/b", "..", "a\0", "a\n", ".a")))),
    (21, "no peft_type", ADAPTER, ConfigError, "peft_type is .*'LORA'",
        [config("peft_type"), *each("peft_type", None, "", "lora", "no such method", ["LORA"], 1)]),
    (22, "another method", ADAPTER, UnsupportedError, "peft_type is '[A-Z_0-9]+'; expected 'LORA'",
        each("peft_type", *OTHER_METHODS)),
    (23, "switched on", ADAPTER, UnsupportedError, "|".join(SWITCHES),
        [config(**{k: v}) for k, v in SWITCHES.items() if k not in ASIDE]),
    (23, "switched on beside the factors", TOLD, UnsupportedError, "|".join(ASIDE),
        [config(**{k: v}) for k, v in SWITCHES.items() if k in ASIDE]),
    (23, "DoRA without magnitudes", TOLD, MismatchError, "no lora_magnitude", [config(use_dora=True)]),
    (23, "saved modules without tensors", TOLD, MismatchError, "modules_to_save 'lm_head'",
        [config(modules_to_save=["lm_head"])]),
    (23, "transposed weights", BESIDE, UnsupportedError, "fan_in_fan_out", [config(fan_in_fan_out=True)]),
    (24, "flag not a bool", ADAPTER, ConfigError, "expected true or false", [
        config(**{flag: value}) for value in ("false", 0, 1, [])
        for flag in ("use_rslora", "use_dora", "fan_in_fan_out", "lora_bias", "use_qalora")]),
    (25, "unknown bias", ADAPTER, ConfigError, "bias is .*'none', 'lora_only' or 'all'",
        each("bias", "some", None, True, ["all"])),
    (25, "biases that are missing", BESIDE, MismatchError, r"no tensor for .*\.bias",
        [both(based("biases"), config(bias="lora_only")), both(based("biases"), config(bias="all"))]),
    (26, "pattern of another type", ADAPTER, ConfigError, "(rank|alpha)_pattern is .*expected an object",
        [config(**{f"{p}_pattern": v}) for p in ("rank", "alpha") for v in ([], ["q_proj"], 3, "", False)]),
    (26, "pattern of bad numbers", ADAPTER, ConfigError, r"(rank|alpha)_pattern\['q_proj'\] is",
        [*each("rank_pattern", *({"q_proj": v} for v in (0, -1, 3.0, "3", True, None, 10**9))),
         *each("alpha_pattern", *({"q_proj": v} for v in (0, NAN, INF, "3", True, None, 10**400)))]),
    (26, "pattern of another file", TOLD, MismatchError, r"q_proj has lora_A \(3, 12\).*r = 2",
        [config(rank_pattern={"q_proj": 2})]),
    (26, "endless pattern", ADAPTER, ConfigError, "rank_pattern is .*at most 50000 numbers",
        [config(rank_pattern={f"x{i}": 3 for i in range(50_001)})]),
    (26, "endless lists", ADAPTER, ConfigError, "(modules_to_save|layers_pattern) is .*at most 1000 names",
        [config(**{field: ["norm"] + [f"x{i}" for i in range(1000)]})
         for field in ("modules_to_save", "layers_pattern")]),
    (26, "a key that matches no module of the base", BESIDE, MismatchError,
        "(rank|alpha)_pattern has '.*k_projs', which matches no module of the base; nearest: .*k_proj",
        [config(**{f"{p}_pattern": {key: 3}})
         for p in ("rank", "alpha") for key in ("k_projs", ".*k_projs")]),
    (27, "layers that are none", ADAPTER, ConfigError, "layers_to_transform",
        each("layers_to_transform", -1, [-1], [0.0], ["0"], True, [True], [], {}, "0")),
    (27, "layers of a regular expression", BESIDE, ConfigError, "layers_to_transform",
        [config(target_modules=".*(q|v)_proj", layers_to_transform=[0])]),
    (27, "layers_pattern", ADAPTER, ConfigError, "layers_pattern", each("layers_pattern", 1, [1], {}, False)),
    (27, "everything excluded", BESIDE, ConfigError, "exclude_modules",
        each("exclude_modules", ["q_proj", "v_proj"], ".*", ["self_attn.q_proj", "v_proj"])),
    (27, "exclusion of another type", ADAPTER, ConfigError, "exclude_modules",
        each("exclude_modules", 1, [1], {})),
    (27, "exclusion without a name", BESIDE, ConfigError, "exclude_modules has",
        each("exclude_modules", [""])),
    (29, "no config", ADAPTER, StorageError, "adapter_config.json: is missing", [become("missing", CONFIG)]),
    (29, "config that is none", ADAPTER, FormatError, "adapter_config.json", [text(b) for b in (
        b"", b'{"r": 3, "lora_', bytes(1000), b"r: 3", b'{"a": "\xff"}', b"[]", b"null", b'"r"', b"3",
        b"{'r': 3}", 2 * b"\xef\xbb\xbf" + b"{}", '{"r": 3}'.encode("utf-16"), b'{"r": 3}\0',
        b'{"a": "\n"}')]),
    (30, "deep config", ADAPTER, FormatError, "adapter_config.json",
        [text(DEEP), text(b'{"a":' * 100_000 + b"1" + b"}" * 100_000), text(b'{"r":3,"a":' + DEEP + b"}")]),
    (31, "a key twice", ADAPTER, FormatError, "the key '(r|a|lora_alpha)' is given twice", [
        edit(b'"r": 3', b'"r": 3, "r": 3'), edit(b'"rank_pattern": {}', b'"rank_pattern": {"a": 1, "a": 2}'),
        edit(b'"lora_alpha": 7', b'"lora_alpha": 7, "lora_alpha": 12345')]),
    (32, "endless config", ADAPTER, StorageError, "adapter_config.json.*at most 8388608",
        [text(b"{}" + b" " * (1 << 23)), lambda place: os.truncate(place.adapter / CONFIG, 1 << 40)]),
    (32, "config that is no file", ADAPTER, StorageError, "adapter_config.json",
        [become(k, CONFIG) for k in KINDS]),

    (33, "hardly any bytes", FILE, FormatError, r"has [07] bytes",
        [raw(lambda b: b""), raw(lambda b: b[:7])]),
    (34, "length of the header", FILE, FormatError, "header", [
        *(length(lambda n, size, new=new: new) for new in (0, 2**63, 2**64 - 1, 2**40)),
        length(lambda n, size: size), length(lambda n, size: size - 7), raw(lambda b: b[:8][::-1] + b[8:])]),
    (35, "header over 100 MB", FILE, FormatError, "header length 100000001; expected at most 100000000",
        [sparse(300_000_000, 100_000_001)]),
    (36, "length off by one", FILE, FormatError, "header", [
        length(lambda n, size, d=d: n + d) for d in (-1, 1)]),
    (37, "cut", FILE, FormatError, "bytes|header", [
        raw(lambda b, n=n: b[:n]) for n in (8, 9, 500, 1007, 1009, -1)]),
    (38, "something behind", FILE, FormatError, "has .* bytes; its header says",
        [raw(lambda b: b + b"\0"), raw(lambda b: b + zipped(a=b"b")), raw(lambda b: b + b)]),
    (39, "another format", FILE, FormatError, "header", [raw(lambda b, new=new: new) for new in (
        pickle.dumps(Runs()), pickle.dumps(Runs(), 0), zipped(**{"data.pkl": pickle.dumps(Runs())}),
        gzip.compress(b"a" * 999), b'{"w": [1, 2, 3]}', b"GGUF\3\0\0\0" + bytes(99))]),
    (40, "zeros", FILE, FormatError, "header", [raw(lambda b: bytes(len(b)))]),
    (41, "header that is none", FILE, FormatError, "header is not a JSON object", [
        *(header(lambda head, new=new: new) for new in
          (b"w: 3", b"[]", b'"w"', b"null", b"3", b"{\xff}", b"", DEEP)),
        header(lambda head: b"\xef\xbb\xbf" + compact(head)), header(lambda head: compact(head) + b"\0" * 8),
        header(lambda head: json.dumps(head).encode("utf-16")), header(lambda head: b" " + compact(head))]),
    (42, "lone surrogate", FILE, FormatError, r"\\\\?ud800", named("a\ud800b")),
    (43, "a key twice", FILE, FormatError, "is given twice", [
        written(b'"dtype":"F32"', b'"dtype":"F32","dtype":"F32"'), written(b"{", b'{"__metadata__":{},'),
        written(b"{", b'{"__metadata__":{"a":"1","a":"2"},"x":{},'),
        header(lambda head: compact(head)[:-1] + b"," + compact({first(head): head[first(head)]})[1:])]),
    (44, "entry that is none", FILE, FormatError, "entry is .*expected dtype, shape and data_offsets", [
        entry("dtype"), entry("shape"), entry("data_offsets"), entry(extra=1), entry(extra=None),
        *(header(lambda head, new=new: head | {first(head): new}) for new in
          (["F32", [3], [0, 12]], None, "x", 3))]),
    (45, "dtype that is none", FILE, FormatError, "dtype is",
        [entry(dtype=d) for d in ("F31", "f32", "", 32, None, {}, ["F32"], "F8_" + "A" * 9999, ESC)]),
    (46, "another dtype", BESIDE + BASES, UnsupportedError, "dtype is",
        [entry(dtype=d) for d in OTHER_DTYPES]),
    (47, "shape that is none", FILE, FormatError, "shape is",
        shapes([-3, 12], [-3, -12], [3.0, 12], "3", None, [True, 36], [[3], 12], {}, 36, [None])),
    (48, "shape beyond all bounds", FILE, FormatError, "shape|bytes|header", [
        *shapes([2**62, 8], [2**63, 2], [2**61, 8], [2**32, 2**32], [10**400], [1] * 99, [2**61] * 50_000),
        *shapes([0, 2**61]), written(b'"shape":[', b'"shape":[1e999,'),
        written(b'"shape":[', b'"shape":[' + DIGITS + b",")]),
    (49, "shape of another size", FILE, FormatError, r"data_offsets is .*expected \d+ bytes",
        shapes([4, 13], [0], [1], [])),
    (50, "offsets astray", FILE, FormatError, "data_offsets|bytes", [
        offsets(lambda end: [end, 0]), offsets(lambda end: [-end, 0]), offsets(lambda end: [4, end + 4]),
        offsets(lambda end: [end, 2 * end]), offsets(lambda end: [10**6, 10**6 + end]),
        header(lambda head: head | {"alias": head[first(head)]}),
        header(lambda head: {k: v for k, v in head.items() if k != first(head)})]),
    (51, "offsets that are none", FILE, FormatError, "data_offsets is", [
        offsets(lambda end, new=new: new) for new in (
            [0], [0, 1, 2], [], "x", None, {}, [0.0, 144.0], [0, NAN], [0, 2**63], [0, 10**400],
            [False, 144], ["0", "144"])]),
    (52, "metadata", FILE, FormatError, "__metadata__ is .*expected strings",
        [header(lambda head, new=new: head | {"__metadata__": new})
         for new in ([], "x", 3, {"a": 1}, {"a": None}, {"a": {}}, {"format": "pt", ESC: 1})]),
    (53, "bombs", FILE, FormatError, "header|overlap", [
        header(lambda head: b'{"a":' * 100_000), header(lambda head: b'{"a":' + DEEP + b"}"),
        bombs(100_001, ZERO), bombs(120_000, {"dtype": "F32", "shape": [9], "data_offsets": [0, 36]}),
        header(lambda head: {f"a{i}": head[first(head)] for i in range(5000)})]),
    (53, "endless name", FILE, MismatchError, "the tensor name", named("x" * 1_000_000)),
    (55, "8 GiB in one tensor", BESIDE + BASES, MismatchError, "8 GiB|shape|factors", [huge]),

    (56, "half a pair", ADAPTER, MismatchError, "q_proj has no lora_[AB]; there is", [
        without(Q + "lora_A.weight"), without(Q + "lora_B.weight")]),
    (56, "a module without its pair", BESIDE, MismatchError,
        r"no factors for 1 module of the config.*layers\.1\.self_attn\.v_proj",
        [without(V + "lora_A.weight", V + "lora_B.weight")]),
    (56, "no LoRA", ADAPTER, MismatchError, "no lora_A and lora_B", [tensors(lambda t: {})]),
    (56, "a saved module without one of its parts", BESIDE, MismatchError, r"no tensor for .*norm\.weight",
        [both(based("tied"), fixture("tied--saved-norm-and-head"),
              without("base_model.model.model.layers.1.input_layernorm.weight"))]),
    (56, "a pair without its bias", BESIDE, MismatchError, r"no tensor for .*q_proj\.bias",
        [both(based("biases"), fixture("biases--bias-lora_only"), without(Q + "base_layer.bias"))]),
    (57, "keys too many", TOLD, MismatchError, "1 tensor is not of a LoRA.*, the first", [
        zeros(name, 3, 12) for name in (
            Q + "lora_C.weight", Q + "lora_A.bias", Q + "weight", "anything", "../../../../evil", "a.b.c",
            "base_model.model.model.norm.weight")]),
    (57, "two keys of one tensor", ADAPTER, MismatchError, "q_proj.* and .*q_proj.* are the same tensor", [
        zeros(name, 3, 12) for name in (
            Q + "lora_A.other.weight", Q + "lora_A.default.weight", f"_orig_mod.{Q}lora_A.weight",
            Q.removeprefix("base_model.model.") + "lora_A.weight")]),
    (57, "two adapters", ADAPTER, MismatchError, "holds the adapters 'a' and 'b', as in", [
        called(lambda k: k.replace(".weight", ".a.weight" if "_A" in k else ".b.weight"))]),
    (57, "a table of another size", BESIDE, MismatchError, "resize the base's vocabulary first",
        [zeros("base_model.model.model.embed_tokens.weight", 25, 12)]),
    (57, "one of two tables", BESIDE, MismatchError, "ties head and embedding: expected both", [
        both(based("tied"), zeros(f"base_model.model.{k}.weight", 23, 12))
        for k in ("lm_head", "model.embed_tokens")]),
    (57, "a layer too many", BESIDE, MismatchError,
        r"no module model\.layers\.99\.self_attn\.q_proj; nearest",
        [tensors(lambda t: t | {k.replace("layers.0", "layers.99"): a.copy() for k, a in t.items()})]),
    (57, "a parameter twice", ADAPTER, MismatchError, "are the same tensor",
        [both(fixture("tied--saved-embedding"), zeros("model.embed_tokens.weight", 23, 12))]),
    (57, "trained and replaced", TOLD, MismatchError, r"q_proj\.(bias|weight)", [
        both(config(modules_to_save=["proj"]), zeros(Q + "weight", 12, 12)),
        both(config(bias="all"), zeros(Q + "bias", 12))]),
    (57, "biases of a base without", BESIDE, MismatchError, r"no parameter .*q_proj\.bias",
        [both(config(bias="lora_only"), zeros(Q + "base_layer.bias", 12))]),
    (58, "another prefix", BESIDE, MismatchError, "no module base_model.modle",
        [called(lambda k: k.replace("base_model.model", "base_model.modle"))]),
    (58, "a language model's part", BESIDE, MismatchError, "language model only", [
        called(lambda k: k.replace("model.layers", "model.language_model.layers"))]),
    (58, "other letters", ADAPTER, MismatchError, "no lora_A|printable",
        [called(str.upper), called(lambda k: k.replace("lora_A", "lora_a")),
         called(lambda k: k.replace("lora_A", "l\u043era_A")),
         *named("", "\0", "a\0b", "é", "a b", "\u202ex")]),
    (59, "terminal escapes", ADAPTER, MismatchError, r"\\x1b\[31m", named(ESC, Q + ESC)),
    (60, "attributes for names", TOLD, MismatchError, "__class__|__init__",
        [more(m) for m in ("__class__", "model.__class__.__init__", "model.layers.0.__class__")]),
    (60, "attributes for names", BESIDE, MismatchError, "no module model.__class__",
        [both(config(target_modules=["q_proj", "v_proj", "__class__"]), more("model.__class__"))]),
    (61, "A and B swapped", ADAPTER, MismatchError, r"_proj has .*lora_A \((12|4), 3\) and lora_B \(3, 12\)",
        [called(lambda k: k.replace("lora_A", "x").replace("lora_B", "lora_A").replace("x", "lora_B"))]),
    (61, "both transposed", ADAPTER, MismatchError, r"v_proj has lora_A \(12, 3\) and lora_B \(3, 4\)",
        [tensors(lambda t: {k: np.ascontiguousarray(a.T) for k, a in t.items()})]),
    (61, "one of them transposed", ADAPTER, MismatchError, "q_proj has lora_A",
        [array(Q + "lora_A.weight", np.transpose), array(Q + "lora_B.weight", np.transpose)]),
    (62, "two ranks", ADAPTER, MismatchError, r"q_proj has lora_A .*expected \(r, I\) and \(O, r\)", [
        array(Q + "lora_A.weight", lambda a: a[:2]), array(Q + "lora_B.weight", lambda b: b[:, :2])]),
    (62, "another rank", TOLD, MismatchError, "q_proj has lora_A .*r = 3", [
        tensors(lambda t: t | {Q + "lora_A.weight": t[Q + "lora_A.weight"][:2].copy(),
                               Q + "lora_B.weight": t[Q + "lora_B.weight"][:, :2].copy()})]),
    (63, "rank 0", ADAPTER, MismatchError, r"\(0, 12\)", [tensors(
        lambda t: {k: np.zeros((0, 12) if "_A" in k else (12, 0), "f4") for k in t})]),
    (63, "not matrices", ADAPTER, MismatchError, "q_proj has lora_A .*; expected", [
        array(Q + "lora_A.weight", lambda a: a[0, 0]), array(Q + "lora_A.weight", np.ravel),
        array(Q + "lora_A.weight", lambda a: a[None]), array(Q + "lora_B.weight", lambda b: b[..., None])]),
    (63, "a convolution's", BESIDE, MismatchError, "q_proj has factors .*base's weight", [tensors(
        lambda t: {k: a[..., None] if "0.self_attn.q_proj" in k else a for k, a in t.items()})]),
    (64, "adapter of another base", BESIDE, MismatchError, "[qk]_proj has factors for a linear map of", [
        fixture("head_dim--DoRA-rsLoRA"), array(Q + "lora_B.weight", lambda b: np.repeat(b, 2, 0)),
        tensors(lambda t: t | {k: np.zeros((3, 14), "f4") for k in t if "_A" in k})]),
    (64, "adapter that holds another base", BESIDE, MismatchError, "is not the base's weight", [both(
        fixture("untied--embedding-and-head"),
        array("base_model.model.lm_head.base_layer.weight", np.negative))]),
    (64, "an embedding's for a linear map", BESIDE, MismatchError, "factors for an embedding",
        [called(lambda k: re.sub(r"lora_([AB])\.weight", r"lora_embedding_\1", k))]),
    (65, "another base of these shapes", BESIDE, MismatchError, "fingerprint '[0-9a-f]{12}'.*'[0-9a-f]{12}'",
        [both(ours, weights(lambda t: {k: -a for k, a in t.items()}))]),
    (65, "a fingerprint that is none", ADAPTER, MismatchError, "minilora is", [
        both(ours, header(lambda head, new=new: head | {"__metadata__": {"minilora": new}}))
        for new in ("{", "[]", ESC, DEEP.decode(), "1" * 5000)]),
    (65, "a fingerprint of escapes", BESIDE, MismatchError, r"fingerprint '\\x1b", [
        header(lambda head: head | {"__metadata__": {"minilora": json.dumps({"base": ESC * 999})}})]),
    (66, "not finite", BESIDE, NonFiniteError, r"lora_[AB]\.weight has \d+ values .*, the first at \(", [
        *(array(f"{Q}lora_{h}.weight", lambda a, at=at, v=v: put(a, at, v))
          for h in "AB" for at in ((0, 0), (-1, -1)) for v in (NAN, INF, -INF)),
        array(Q + "lora_A.weight", lambda a: a * np.float32(NAN))]),
    (66, "not finite where it replaces", BESIDE, NonFiniteError, "lm_head.weight has 1 values", [both(
        based("tied"), fixture("tied--saved-norm-and-head"),
        array("base_model.model.lm_head.weight", lambda a: put(a, (3, 2), NAN)))]),
    (66, "other numbers than were written", ADAPTER, MismatchError, "sha256 differs", [
        both(ours, raw(lambda b: b[:-1] + bytes([b[-1] ^ 1])))]),
    (67, "product beyond float32", BESIDE, NonFiniteError, "q_proj.* is not finite in float32", [
        tensors(lambda t: {k: a * np.float32(1e30) for k, a in t.items()}), config(lora_alpha=1e300),
        config(alpha_pattern={"v_proj": 1e39, "q_proj": 1e300}),
        tensors(lambda t: {k: a * np.float64(1e200) for k, a in t.items()})]),

    (70, "tensors that are no file", ADAPTER, StorageError, WEIGHTS, [become(k, WEIGHTS) for k in KINDS]),
    (70, "tensors that are no file", BASES, StorageError, TENSORS,
        [become(k, TENSORS, "base") for k in KINDS]),
    (70, "no folder", ADAPTER, StorageError, "cannot be read|missing", [
        lambda place, path=path: setattr(place, "adapter", place.root / path)
        for path in ("none", "base/config.json", "n" * 300, "a\0b")]),
    (70, "the folder above", ADAPTER, StorageError, "there is one in 'adapter'",
        [lambda place: setattr(place, "adapter", place.root)]),
    (71, "a pickle only", ADAPTER, UnsupportedError, "model.bin.* pickle", [instead("adapter_model.bin")]),
    (71, "a pickle only", BASES, UnsupportedError, "pytorch_model.bin.* pickle",
        [lambda place: os.rename(place.base / TENSORS, place.base / "pytorch_model.bin")]),
    (72, "what an interrupted save leaves", ADAPTER, StorageError, WEIGHTS,
        [instead(f".{WEIGHTS}.77.0123abcd.tmp")]),
    (73, "names that are paths", BASES, FormatError, "weight_map names", [
        *map(shard, (f"../{SHARDS[0]}", "/etc/passwd", "C:\\x", "C:x", "a\0b", "", ".", "..", ESC)),
        shard("x" * 999)]),
    (73, "links", BASES, StorageError, "is a link", [
        linked(f"../{SHARDS[0]}"), linked("/dev/zero"), linked("none/none"), linked("/etc/passwd")]),
    (73, "a weight_map that is none", BASES, FormatError, "weight_map is",
        [index(lambda m, new=new: new) for new in (None, [], "x", {"a": 1}, {"a": None})]),
    (74, "no such file", BASES, MismatchError, "nope.safetensors", [shard("nope.safetensors")]),
    (74, "shards and weight_map differ", BASES, MismatchError, "is not in this file|not in weight_map", [
        index(lambda m: m | {"model.norm.weights": SHARDS[0]}), index(lambda m: dict(list(m.items())[1:])),
        index(lambda m: dict.fromkeys(m, SHARDS[0])),
        both(based("sharded"), lambda place: shutil.copy(BASE / TENSORS, place.base / SHARDS[1]))]),
    (75, "sizes that are none", BASES, ConfigError, "config.json: [a-z_]+ is", [
        *(shape(**{f"{what}_size": value}) for what in ("vocab", "hidden", "intermediate")
          for value in (0, -1, "3", 3.0, True)),
        shape(num_hidden_layers=0), shape(num_attention_heads=0), shape(num_key_value_heads=2),
        shape(num_attention_heads=5, head_dim=None), shape(head_dim=3), shape(head_dim=2.0),
        shape(rms_norm_eps=NAN), shape(rms_norm_eps="x"), shape(tie_word_embeddings="yes"),
        shape(max_position_embeddings=-1)]),
    (75, "sizes beyond all bounds", BASES, MismatchError, "missing|shape", [
        shape(hidden_size=3 * 2**40), shape(vocab_size=10**15), shape(intermediate_size=10**12),
        shape(num_hidden_layers=10**9), shape(num_hidden_layers=10**400),
        both(huge, shape(num_hidden_layers=10**6))]),
    (76, "a tensor missing", BASES, MismatchError, "lm_head.weight is missing",
        [weights(lambda t: {k: a for k, a in t.items() if k != "lm_head.weight"})]),
    (76, "a tensor too many", BASES, MismatchError, "not expected", [
        weights(lambda t, name=name: t | {name: np.zeros(3, "f4")})
        for name in ("x", "model.layers.7.mlp.up_proj.weight")]),
    (76, "a name that is none", BASES, MismatchError, "printable", named(ESC, "é", "")),
    (76, "another head than the tied", BASES, MismatchError, "should be tied", [
        both(shape(tie_word_embeddings=True), weights(lambda t, a=a: t | {"lm_head.weight": a}))
        for a in (np.zeros((23, 12), "f4"), np.zeros(3, "f4"))]),
    (76, "not finite", BASES, NonFiniteError, r"model\.norm\.weight", [
        weights(lambda t, v=v: t | {"model.norm.weight": put(t["model.norm.weight"], 11, v)})
        for v in (NAN, INF)]),
    (76, "config that is none", BASES, FormatError, "config.json", [
        lambda place, b=b: (place.base / "config.json").write_bytes(b) for b in (b"", DEEP, b"[]", b"\xff")]),

    (120, "a pointer of Git LFS", FILE, FormatError, "is a pointer of Git LFS", [
        raw(lambda b, version=version: LFS % version) for version in (b"1", b"1.0.0")]),
    (120, "a pointer of Git LFS", BASES, FormatError, "config.json: is a pointer of Git LFS",
        [lambda place: (place.base / "config.json").write_bytes(LFS % b"1")]),
    (121, "an adapter for a base", BASES, MismatchError, "is an adapter; expected a base model", [
        lambda place: setattr(place, "base", place.adapter),
        lambda place: setattr(place, "base", place.adapter / WEIGHTS)]),
    (121, "a file for a base", BASES, StorageError, "a tensor file without its config", [
        lambda place: setattr(place, "base", (place.base / TENSORS).rename(place.root / "m.safetensors"))]),
    (121, "a pickle for a base", BASES, UnsupportedError, "is a pickle", [
        lambda place, end=end: setattr(place, "base", (place.base / TENSORS).rename(place.root / f"m{end}"))
        for end in (".bin", ".pt", ".pth", ".ckpt")]),
    (121, "the folder above", BASES, StorageError, r"has no config\.json; did you mean .*base",
        [lambda place: setattr(place, "base", place.root)]),
    (121, "a pipeline of diffusers", BASES, UnsupportedError, "expected one model",
        [lambda place: os.rename(place.base / "config.json", place.base / "model_index.json")]),
    (122, "a forward pass that is another", BASES, UnsupportedError, r"config\.json: [a-z_]+ is", [
        *(shape(model_type=kind) for kind in ("qwen2", "qwen3", "gpt2", "", 3, ["llama"])),
        *(shape(rope_scaling=ropes) for ropes in (
            {"type": "linear", "factor": 2.0}, {"rope_type": "yarn", "factor": 4.0}, {"type": "dynamic"},
            [2.0])),
        shape(model_type="mistral", sliding_window=4096), shape(hidden_act="gelu"),
        shape(quantization_config={"bits": 4}), shape(partial_rotary_factor=0.5)]),
]  # fmt: skip

# ---- the rows that are taken, and what is said about them

TAKEN = [
    (3, "rank above that of the module", "r = 20 is larger than its module.s largest possible rank", [both(
        config(r=20),
        tensors(lambda t: {
            k: np.resize(a, (20, 12) if "_A" in k else (len(a), 20)) for k, a in t.items()}))]),
    (17, "regular expressions in use", "", [config(target_modules=p) for p in (
        r".*\.(q|v)_proj", r"model\.layers\.\d+\.self_attn\.(q_proj|v_proj)", r".*self_attn.*(q|v)_proj$",
        r"^model\.layers\.([0-9]|1[0-9])\.(self_attn|mlp)\.(q|v)_proj", r".*decoder.*|.*(q|v)_proj",
        r"(model|lm_head)\.layers\.[0-9]+\.self_attn\.[qv]_proj")]),
    (18, "exploding patterns", "has keys that match no module of the file", [
        config(alpha_pattern={rf"{p}|q_projection|embed_tokens": 9}) for p in EXPLODING]),
    (18, "exploding exclusions", "", each("exclude_modules", *EXPLODING)),
    (20, "a module by two names", "", [
        config(target_modules=["q_proj", "v_proj", "q_proj"]),
        config(target_modules=["q_proj", "self_attn.q_proj", "v_proj"])]),
    (26, "keys that disagree", "keys of alpha_pattern disagree",
        [config(alpha_pattern={".*_proj": 7, "v_proj": 3})]),
    (26, "a key that means another module", "alpha_pattern has keys that match no module of the file, as in",
        [config(alpha_pattern={"k_proj": 5}), config(alpha_pattern={"k_proj": 5, "v_proj": 7, "o_proj": 3})]),
    (24, "null for false", "", [config(**{flag: None}) for flag in
        ("use_rslora", "use_dora", "fan_in_fan_out", "lora_bias", "use_qalora", "ensure_weight_tying")]),
    (29, "a byte order mark", "begins with a byte order mark", [
        lambda place: (place.adapter / CONFIG).write_bytes(b"\xef\xbb\xbf" + (GOOD / CONFIG).read_bytes())]),
    (27, "layers that the file has not", "layers_to_transform has layers that the file lacks, as in",
        [config(layers_to_transform=[0, 1, 99]), config(layers_to_transform=[1, 0, 10**400])]),
    (28, "unknown fields that are off", "", [config(a=None, b=False, c={}, d=[])]),
    (28, "unknown fields that are on", "'use_magic'", [config(use_magic=True), config(use_magic=1, b="x")]),
    (28, "unknown fields of odd names", r"\\(x1b|ud800)", [config(**{ESC: 1}), config(**{"\ud800": 1})]),
    (28, "more than is said", "unknown and ignored", [config(**{f"{'x' * 99}{i}": 1 for i in range(5000)})]),
    (52, "odd metadata", "", [header(lambda head: head | {"__metadata__": {"\ud800": ESC}})]),
    (58, "names without prefix", "do not begin with base_model.model",
        [called(lambda k: k.removeprefix("base_model.model."))]),
    (58, "names with that of the adapter", "names contain the adapter's",
        [called(lambda k: k.replace(".weight", ".default.weight"))]),
    (65, "a base that is only named", "called 'a-tiny-llama'; only names and shapes", [config()]),
    (65, "a base of an odd name", r"called '\\x1b", [config(base_model_name_or_path=ESC)]),
    (68, "two dtypes", "", [
        tensors(lambda t: {k: a.astype("f8" if "_A" in k else "f4") for k, a in t.items()})]),
    (69, "another dtype than the base's", "", [tensors(lambda t: {k: a.astype("f8") for k, a in t.items()})]),
    (81, "as the hub's client lays it out", "", [
        hub("adapter"), hub("base"), both(based("sharded"), hub("base"))]),
]  # fmt: skip


# ---- the contract


@contextlib.contextmanager
def at_most(mebibytes):
    """No more memory than that is taken for Python's and NumPy's objects. Counting it takes time."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < mebibytes << 20
    finally:
        tracemalloc.stop()


def disk(root):
    """All that lies below a folder: kind, time of change, and bytes."""
    found = {}
    for path in sorted(root.rglob("*")):
        how = path.lstat()
        small = path.is_file() and not path.is_symlink() and how.st_size < 1 << 20
        found[path] = how.st_mode, how.st_size, how.st_mtime_ns, path.read_bytes() if small else None
    return found


def state(model):
    """Every array, what is trained, and all adapters with which is active and what is merged."""
    arrays = {
        k: (p.trainable, p.grad is None, p.data.dtype, p.data.shape, to_host(p.data).tobytes())
        for k, p in named_params(model).items()
    }
    layers = dict(owners(model))
    beside = {k: (list(x.adapters), x.active, x.merged) for k, x in layers.items() if isinstance(x, Adapted)}
    return arrays, list(layers), beside


def refused(call, root, model, error, match, before):
    with within(2), pytest.raises(error, match=match) as e:
        call()
    assert type(e.value) is error
    says(e.value, root)
    assert (disk(root), state(model)) == before


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A good adapter and its base."""
    for folder, names in ((GOOD, (CONFIG, WEIGHTS)), (BASE, ("config.json", TENSORS))):
        (at := tmp_path / ("adapter" if folder == GOOD else "base")).mkdir()
        for name in names:
            shutil.copy(folder / name, at)
    monkeypatch.chdir(tmp_path)
    return Place(tmp_path, tmp_path / "adapter", tmp_path / "base", tmp_path / "adapter" / WEIGHTS)


def beside(place):
    """The model of the place's base, with an adapter beside it that is active."""
    model = load(place.base)
    inject(model, LoraConfig(r=1, targets=["gate_proj"]), rng=np.random.default_rng(0), name="mine")
    return model


@pytest.mark.parametrize(("door", "error", "match", "spoil"), [
    pytest.param(door, error, match, spoil, id=f"row {number}, {what}, {door} {i}")
    for number, what, doors, error, match, spoilers in REFUSED for door in doors for i,
    spoil in enumerate(spoilers)
])  # fmt: skip
def test_bad_input_is_refused_with_one_line_and_changes_nothing(door, error, match, spoil, place):
    if door == "base":
        place.file = place.base / TENSORS
    spoil(place)
    model = load(BASE) if door == "base" else beside(place)
    calls = {
        "base": [lambda: load(place.base)],
        "beside": [lambda: load_adapter(model, place.adapter)],
        "told": [lambda: load_adapter(model, place.adapter)],
        "adapter": [lambda: open_adapter(place.adapter), lambda: load_adapter(model, place.adapter)],
    }[door]
    if door == "beside":
        open_adapter(place.adapter)
    if door == "told":
        assert any(re.search(match, said) for said in open_adapter(place.adapter).all_notes)
    before = disk(place.root), state(model)
    for call in calls:
        refused(call, place.root, model, error, match, before)
    with at_most(64), contextlib.suppress(error):
        calls[0]()


def factors(folder):
    """The factors and scales of an adapter by module, and the parameters in whose place it has others."""
    found = open_adapter(folder)
    pairs = {m: (p.scale, *(x.tobytes() for x in found.factors(m))) for m, p in found.pairs.items()}
    return pairs, {name: found.value(k).tobytes() for name, k in found.replaced.items()}


@pytest.mark.parametrize(("match", "spoil"), [
    pytest.param(match, spoil, id=f"row {number}, {what}, {i}")
    for number, what, match, spoilers in TAKEN for i, spoil in enumerate(spoilers)
])  # fmt: skip
def test_unusual_input_is_accepted_and_reported(match, spoil, place):
    spoil(place)
    model, before = beside(place), disk(place.root)
    with within(2):
        found = load_adapter(model, place.adapter)
    said = str(found)
    assert re.search(match, said)
    assert all(line.isprintable() and len(line) <= 2000 for line in said.splitlines())
    assert len(said.splitlines()) < 9
    others = [note for note in found.notes if "only names and shapes" not in note]
    assert bool(others) == bool(match and "called" not in match)
    assert {p.data.dtype for p in named_params(model).values()} == {np.dtype(np.float32)}
    assert disk(place.root) == before
    assert len(found.norms) == 4
    if "larger" not in match:
        good = beside(Place(place.root, GOOD, BASE, GOOD))
        load_adapter(good, GOOD)
        assert state(model) == state(good)


# ---- saving, names and merging: a model with the adapter "default" beside the good base, and what is called


def bad(value):
    """Let the last B not be finite."""

    def spoil(model):
        *_, layer = adapted(model).values()
        layer.adapters["default"].B.data[-1, -1] = value

    return spoil


def nothing(model):
    """Leave it as it is."""


def does(call, *args):
    return lambda model, root: call(model, *args)


def injects(name):
    return lambda model, root: inject(model, LoraConfig(r=1), rng=np.random.default_rng(0), name=name)


def loads(name):
    return lambda model, root: load_adapter(model, root / "adapter", name)


def saves(name, **how):
    return lambda model, root: save_adapter(model, root / name, **how)


def saves_model(name):
    return lambda model, root: save_model(load(root / "base"), root / name, "")


NAMES = (
    "", ".", "..", "a/b", "a\\b", "a\0b", "a" * 256, "a" * 10**6, "é", " ", "a.b", ESC, "__base__", None, 1,
)  # fmt: skip
IS_FILE = "adapter/adapter_config.json"
CALLS = [
    (77, "name of an adapter", InputError, "adapter name is", nothing, [
        call(name) for call in (injects, loads) for name in NAMES]),
    (77, "name of a folder", StorageError, "cannot be|is there already|not written", nothing, [
        call(name) for call in (saves, saves_model)
        for name in ("", ".", "..", "a\0b", "a" * 256, f"{IS_FILE}/a")]),
    (79, "a target that exists", StorageError, "is there already", nothing, [
        call(name) for call in (saves, saves_model) for name in ("adapter", IS_FILE, "link", "base")]),
    (80, "a link to overwrite", StorageError, "only the folder of a model", nothing, [
        saves("link", overwrite=True)]),
    (98, "merging twice", StateError, "is merged; unmerge it first", merge, [does(merge)]),
    (98, "unmerging what is not merged", StateError, "not merged", nothing, [does(unmerge)]),
    (99, "merging NaN", NonFiniteError, r"layers\.1\.self_attn\.v_proj\.weight is not finite", bad(NAN),
        [does(merge), does(fuse)]),
    (99, "merging infinity", NonFiniteError, "not finite", bad(INF), [does(merge), saves("new")]),
    (100, "at work while merged", StateError, "merged", merge, [
        injects("b"), loads("b"), does(remove, "default"), does(set_scale, 2.0), does(set_adapter, "default"),
        lambda model, root: model.loss(IDS, IDS, train=True)]),
    (103, "a name in use", InputError, "'default' is there already", nothing, [
        injects("default"), loads("default")]),
]  # fmt: skip


@pytest.mark.parametrize(("error", "match", "before", "call"), [
    pytest.param(error, match, before, call, id=f"row {number}, {what}, {i}")
    for number, what, error, match, before, calls in CALLS for i, call in enumerate(calls)
])  # fmt: skip
def test_a_refused_call_changes_nothing(error, match, before, call, place):
    model = load(place.base)
    load_adapter(model, place.adapter)
    before(model)
    (place.root / "link").symlink_to("adapter")
    was = disk(place.root), state(model)
    with within(2), pytest.raises(error, match=match) as e:
        call(model, place.root)
    assert type(e.value) is error
    assert str(e.value).isprintable()
    assert len(str(e.value)) <= 2000
    assert (disk(place.root), state(model)) == was


@pytest.mark.parametrize(("name", "number"), [
    ("open", errno.EROFS), ("open", errno.EACCES), ("write", errno.ENOSPC), ("fsync", errno.EIO),
    ("rename", errno.ENOSPC), ("replace", errno.EROFS),
])  # fmt: skip
@pytest.mark.parametrize("target", ["new", "adapter"])
def test_row_78_a_failing_disk_leaves_the_old_files(name, number, target, place, monkeypatch):
    if name == "rename":  # where no step of the system exchanges two names
        monkeypatch.setattr(atomic, "exchanged", lambda *names: False)
    model, real = load(place.base), getattr(os, name)
    load_adapter(model, place.adapter)
    was, calls = disk(place.root), 0

    def failing(*args, **how):
        nonlocal calls
        calls += 1
        if calls == nth:
            raise OSError(number, os.strerror(number))
        return real(*args, **how)

    nth, refusal = 0, None
    while nth == 0 or refusal:
        calls, refusal, nth = 0, None, nth + 1
        with monkeypatch.context() as m:
            m.setattr(os, name, failing)
            try:
                save_adapter(model, place.root / target, overwrite=True)
            except StorageError as e:
                refusal = e
        if refusal:
            says(refusal, place.root)
            assert os.strerror(number) in str(refusal)
            assert disk(place.root) == was
    assert nth > 1
    assert len(open_adapter(place.root / target).pairs) == 4


def table():
    """All rows as Markdown: what is tried, in how many ways, and the error; "taken" where it is valid."""
    lines = [
        (n, what, len(spoils), error.__name__ + ", or a note without a base" * (doors == TOLD))
        for n, what, doors, error, _, spoils in REFUSED
    ]
    lines += [(n, what, len(ways), f"taken{', with a note' * bool(note)}") for n, what, note, ways in TAKEN]
    lines += [(n, what, len(calls), error.__name__) for n, what, error, _, _, calls in CALLS]
    lines += [
        (37, "every prefix of a good file", "all", "FormatError"),
        (54, "every single bit of the header", "all", "one of these, or the same factors"),
        (78, "every write that the disk refuses", "all", "StorageError"),
    ]
    cells = [tuple(map(str, line)) for line in sorted(lines, key=lambda line: line[0])]
    return Table(("row", "what is tried", "ways", "error"), cells).markdown("rlrl")


def test_the_table_of_bad_files_matches_the_tests():
    """`python tests/formats/test_bad_files.py` prints it."""
    assert table() in (Path(__file__).parents[2] / "benchmarks/results/bad_files.md").read_text()


def test_every_row_has_a_case():
    tables = {row[0] for table in (REFUSED, TAKEN, CALLS) for row in table}
    assert tables | {54, 78} == {*range(1, 82), 98, 99, 100, 103, *range(120, 123)}


def test_row_65_force_accepts_another_base(place):
    ours(place)
    weights(lambda t: {k: -a for k, a in t.items()})(place)
    model = load(place.base)
    with pytest.raises(MismatchError):
        load_adapter(model, place.adapter)
    assert len(load_adapter(model, place.adapter, force=True).norms) == 4


# ---- every damage of a kind


def harmless(place, good):
    """Refused by the contract, or exactly what the good adapter is; whether it was refused."""
    try:
        assert factors(place.adapter) == good
    except MiniloraError as e:
        says(e, place.root)
        return True
    return False


def test_rows_37_and_38_every_prefix_and_every_trailing_byte_is_refused(place):
    whole, good = place.file.read_bytes(), factors(GOOD)
    for byte in range(0, 256, 5):
        place.file.write_bytes(whole + bytes([byte]))
        assert harmless(place, good)
    for size in reversed(range(len(whole))):
        os.truncate(place.file, size)
        with pytest.raises(FormatError) as e:
            open_adapter(place.adapter)
        says(e.value, place.root)


@pytest.mark.parametrize("step", [3, pytest.param(1, marks=pytest.mark.slow)])
def test_row_54_every_flipped_bit_of_the_header_is_refused_or_harmless(step, place):
    whole, good, taken = place.file.read_bytes(), factors(GOOD), []
    with open(place.file, "r+b", buffering=0) as file:
        for at in range(0, 8 + int.from_bytes(whole[:8], "little"), step):
            for bit in range(8):
                os.pwrite(file.fileno(), bytes([whole[at] ^ 1 << bit]), at)
                if not harmless(place, good):
                    taken.append(at)
            os.pwrite(file.fileno(), whole[at : at + 1], at)
    inside = whole.index(b"{", 9), whole.index(b"}")
    assert all(inside[0] < at < inside[1] for at in taken)  # of the metadata's text
    assert len(taken) > 40 / step


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A folder to be spoiled again and again, and its model."""
    root = tmp_path_factory.mktemp("again")
    shutil.copytree(GOOD, root / "adapter")
    return root, load(BASE)


def done_or_refused(root, model):
    """The adapter is loaded and taken away, or refused by the contract."""
    with within(2):
        try:
            load_adapter(model, root / "adapter")
            remove(model, "default")
        except MiniloraError as e:
            says(e, root)
    assert not any(isinstance(layer, Adapted) for _, layer in owners(model))


@settings(max_examples=300)
@given(flips=st.lists(st.tuples(st.integers(0, 2**16), st.integers(0, 255)), min_size=1, max_size=4))
def test_a_config_with_changed_bytes_is_loaded_or_refused(flips, good):
    whole = bytearray((GOOD / CONFIG).read_bytes())
    for at, byte in flips:
        whole[at % len(whole)] = byte
    (good[0] / "adapter" / CONFIG).write_bytes(whole)
    done_or_refused(*good)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9) |
    st.sampled_from(["q_proj", "v_proj", ".*", "all-linear", "all", "lora_only", 3, 7, "(", 2**63, 1e308]),
    lambda inner: st.lists(inner, max_size=3) |
    st.dictionaries(st.text(max_size=5) | st.just("q_proj"), inner, max_size=3),
    max_leaves=5,
)  # fmt: skip
fields_of_config = st.sampled_from(sorted(json.loads((GOOD / CONFIG).read_text())))


@settings(max_examples=300)
@given(changes=st.dictionaries(fields_of_config, json_values, min_size=1, max_size=3))
def test_any_value_of_any_field_is_loaded_or_refused(changes, good):
    now = json.loads((GOOD / CONFIG).read_text()) | changes
    (good[0] / "adapter" / CONFIG).write_text(json.dumps(now))
    done_or_refused(*good)


def extras():
    """The fuzzers of bases need both."""
    pytest.importorskip("gguf")
    pytest.importorskip("tokenizers")


@pytest.mark.parametrize("target", ["bases", "gguf"])
def test_a_mutated_base_is_refused_or_read_correctly(target, tmp_path):
    extras()
    (tmp_path / "read").mkdir()
    readers, rng = fuzz.TARGETS[target](tmp_path / "read"), random.Random(0)
    seeds = list(readers.corpus())
    for _ in range(100):
        readers(readers.mutated(rng, rng.choice(seeds), seeds))
    assert readers.inputs / 10 < readers.accepted < readers.inputs / 2


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["best", "random"])
@pytest.mark.parametrize("target", ["adapters", "jsonl", "bases", "gguf", "lora_files"])
def test_five_seconds_of_fuzzing(target, engine):
    if target in ("bases", "gguf", "lora_files"):
        extras()
    program = Path(__file__).parents[1] / "fuzz.py"
    how = ["--target", target, *(["--engine", "random"] if engine == "random" else [])]
    done = subprocess.run(
        [sys.executable, program, "--seconds", "5", *how], capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    counts = r"\d+ inputs, \d+ refused, [1-9]\d* accepted, \d+ seconds, (atheris|random)"
    assert re.fullmatch(counts, done.stdout.strip())


if __name__ == "__main__":
    print(table())
