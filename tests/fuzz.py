"""Fuzz the readers: of adapters, starting from PEFT's, of bases, examples, and our own rows and checkpoints.

    python tests/fuzz.py --seconds 300                  coverage-guided where atheris is installed, else blind
    python tests/fuzz.py --target jsonl --seconds 300   or rows, or checkpoints: with right seals
    python tests/fuzz.py --target bases --seconds 300   or gguf (needs the extras gguf and tokenizers)
    python tests/fuzz.py --target lora_files            LoRA files of other tools (needs the extra gguf)

An input is a config and a file of tensors, which must be looked at, compressed to something without a
doubt, loaded beside its tiny base and merged; or a file of examples, which must give the ids of its texts;
or a file of rows, tabled and drawn; or a checkpoint, loaded and saved again, the same; or a base, a folder or
a GGUF file, of which every number is what the package of that format reads, counted as it is loaded, saved
again the same, and merged with an adapter; or another tool's LoRA, opened with and without a given alpha, r
and heads, its factors read, and compressed. Or it must be refused with one printable line. What was read has
not changed in either case. Anything else, or too much time or memory, ends the program with the input in
hex. The last line counts.
"""

import argparse
import contextlib
import inspect
import io
import json
import math
import os
import random
import resource
import shutil
import struct
import sys
import tempfile
import time
import traceback
import warnings
from copy import deepcopy
from pathlib import Path

import numpy as np
from by_hand import FILES
from helpers import TooLong, same_bits, says, tiny, within
from peft_cases import FIXED, FIXTURES, slug
from safetensors import deserialize
from safetensors.numpy import load, save

from minilora import errors, finetune, optim
from minilora.adapters import remove
from minilora.analysis import count
from minilora.analysis import inspect as microscope
from minilora.backend import to_host
from minilora.compose import truncate
from minilora.data import corpora, examples
from minilora.errors import MiniloraError, NonFiniteError
from minilora.experiments import harness, rank_report, rank_sweep, rows
from minilora.formats import atomic, forms, gguf, huggingface, safetensors, tokenizer
from minilora.formats.checkpoint import save_checkpoint
from minilora.formats.checkpoint import sealed as seal_of_checkpoint
from minilora.lora import Adapted, merge, owners, unmerge
from minilora.lora_files import contents, dictionaries, grammar, image, llama_cpp, names, opening, recognise
from minilora.merging import llama
from minilora.peft import config, folder, loading
from minilora.peft.folder import CONFIG, WEIGHTS
from minilora.tree import digest, named_params

sys.path += map(str, Path(__file__).parent.glob("*/"))  # for what is imported from tests
BASES = [slug(base) for base in dict.fromkeys(base for base, _ in FIXED)]
NUMBERS = (0, 1, -1, 2, 3, 7, 8, 12, 2**31, 2**63, 10**400, 0.5, -0.0, 1e308, math.nan, math.inf)
WORDS = (
    "", "q_proj", "lm_head", "embed_tokens", "norm", "all-linear", "all", "lora_only", ".*", "(a+)+", "(",
    r"(.)\1", "(?:(?=(a|b)*c).)*", r"model.layers\.\d.*",
    "x" * 999, "model.layers.1.self_attn.q_proj", "F32", "BF16", "F8_E4M3", "\0", "\x1b[2J", "\ud800", "é",
)  # fmt: skip
LENGTH = 24  # tokens of an example
MEMORY = 1 << 29  # bytes that may be taken beyond those at the start
TENSORS = "model.safetensors"
SHARDS = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
PARTS = ("config.json", TENSORS, f"{TENSORS}.index.json", *SHARDS, "tokenizer.json", "generation_config.json")
WIDE = {"F64": "<f8", "F32": "<f4", "F16": "<f2"}
STRING, ARRAY = 8, 9  # types of a value in a GGUF file
SPLICES = (
    "\ufeff", "\u2028", "\x85", "\r", "\r\n", "\n", "\x0c", "\\ud800", "\\u0000", "?", "[", "}", "漢", "NaN",
)  # fmt: skip
FORMS = ("lora.safetensors", "adapters.safetensors", "adapters.npz", "m.gguf")  # of other tools' LoRAs
SMALL = (  # fixtures of each
    "kohya_lycoris/scalar/*.safetensors", "kohya_lycoris/locon_tucker_mid/*.safetensors",
    "kohya_lycoris/dora_wd_out/*.safetensors", "kohya_sdscripts/fp8_e4m3/*.safetensors",
    "synthetic_names/*/lora.safetensors", "diffusers/sd15_with_metadata/*.safetensors",
    "diffusers_old/*/*.safetensors", "mlx/dora/*.safetensors", "mlx/embedding/*.safetensors",
    "mlx/moe_switch/*.safetensors", "gguf/embed_gguf/*.gguf", "gguf/qwen_small/*.gguf",
    "torchtune/dora/*.safetensors", "loralib/net/*.safetensors",
)  # fmt: skip
ENDS = (  # of names in them
    ".lora_down.weight", ".lora_up.weight", ".lora_mid.weight", ".alpha", ".dora_scale", ".lora_A.weight",
    ".lora_B.weight", ".lora_A.default.weight", ".lora_a", ".lora_b", ".m", ".lora_a.weight", ".lora_A",
    ".lora.down.weight", "_lora.up.weight", ".lora_embedding_A", ".lora_magnitude_vector", ".magnitude",
    ".hada_w1_a", ".diff", ".weight", ".down",
)  # fmt: skip
BEGINNINGS = ("lora_unet_", "lora_te2_", "lycoris_", "base_model.model.", "unet.", "_orig_mod.")
VALUES = (None, True, False, *NUMBERS, *WORDS, [], {}, [0], [3, 12], ["q_proj"], {"q_proj": 2}, [[]])


def join(base, config, weights):
    """An input: which base, length of the config, config, tensors."""
    return bytes([base]) + len(config).to_bytes(4, "little") + config + weights


def split(data, kinds=BASES):
    size = int.from_bytes(data[1:5], "little")
    return data[0] % len(kinds) if data else 0, data[5 : 5 + size], data[5 + size :]


def joined(files):
    """A folder as an input: of each of PARTS its length, 0 if it is not there, and its bytes."""
    contents = [files.get(name, b"") for name in PARTS]
    return b"".join(len(content).to_bytes(4, "little") + content for content in contents)


def parted(data):
    """The files of such an input, name -> bytes."""
    files = {}
    for name in PARTS:
        end = 4 + int.from_bytes(data[:4], "little")
        files[name], data = data[4:end], data[end:]
    return {name: content for name, content in files.items() if content}


# ---- the readers


def held_memory():
    """The most bytes that this process has ever held at once."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


class Readers:
    """Calls the readers of one kind of file with an input, and counts.

    A subclass has `read(data)`, whether the input was accepted; `corpus()`, what to start from;
    `mutated(rng, data, others)`, an input near one; and `modules`, whose coverage guides.
    """

    limit = 2  # seconds

    def __init__(self, folder):
        self.folder, self.out = Path(folder), Path(folder).with_name("out")
        self.inputs, self.accepted, self.start = 0, 0, time.monotonic()
        self.held = held_memory()

    def __call__(self, data):
        self.inputs += 1
        try:
            with within(self.limit):
                self.accepted += self.read(data)
            assert held_memory() < self.held + MEMORY
        except BaseException:  # a panic of a package in Rust is no Exception
            print(f"input: {data.hex()}", flush=True)
            raise

    def done(self, call, *args, root=None):
        """Whether the call is done, and not refused as it should be: naming what is in the root."""
        try:
            call(*args)
        except MiniloraError as e:
            says(e, root or self.folder)
            return False
        return True

    def line(self, engine):
        """The counts."""
        refused, seconds = self.inputs - self.accepted, time.monotonic() - self.start
        counts = f"{self.inputs} inputs, {refused} refused, {self.accepted} accepted"
        return f"{counts}, {seconds:.0f} seconds, {engine}"


class Adapters(Readers):
    """A config and a file of tensors beside a base."""

    modules = (config, folder, loading, errors, huggingface, atomic, safetensors)

    def __init__(self, folder):
        super().__init__(folder)
        self.models = [huggingface.load(FIXTURES / "bases" / base) for base in BASES]
        self.prints = [loading.base_print(model) for model in self.models]

    def read(self, data):
        base, settings, weights = split(data)
        (self.folder / CONFIG).write_bytes(settings)
        (self.folder / WEIGHTS).write_bytes(weights)
        self.done(self.tensors)
        self.done(config.read_settings, self.folder / CONFIG)
        if not self.done(folder.open_adapter, self.folder):
            return False
        if self.inputs % 10 == 0:  # it takes longer than all the rest
            self.done(self.looked_at)
        return self.done(self.beside, base)

    def looked_at(self):
        """What is said is printable, and what is compressed has nothing left to be doubted."""
        said = str(microscope.inspect(self.folder))
        assert all(line.isprintable() for line in said.splitlines()), ascii(said)
        truncate.compress(self.folder, self.out, rank=1, overwrite=True)
        assert not folder.open_adapter(self.out).doubts

    def tensors(self):
        """Every tensor of the file is what its header says."""
        found = safetensors.open_tensors(self.folder / WEIGHTS)
        for name in found:
            assert found[name].shape == found.shapes[name]

    def beside(self, base):
        """Load beside a base, of which no bit and no adapter is left after it or after a refusal."""
        model = deepcopy(self.models[base])
        try:
            said = str(loading.load_adapter(model, self.folder))
            assert all(line.isprintable() for line in said.splitlines()), ascii(said)
            with contextlib.suppress(NonFiniteError):
                merge(model)
                unmerge(model)
            remove(model, "default")
        finally:
            assert not any(isinstance(layer, Adapted) for _, layer in owners(model))
            assert loading.base_print(model) == self.prints[base]

    def corpus(self):
        """The fixtures as inputs."""
        for base, adapter in FIXED:
            folder = FIXTURES / "adapters" / f"{slug(base)}--{slug(adapter)}"
            parts = (folder / CONFIG).read_bytes(), (folder / WEIGHTS).read_bytes()
            yield join(BASES.index(slug(base)), *parts)

    def mutated(self, rng, data, others):
        return mutated(rng, data, others)


class Examples(Readers):
    """A file of JSON lines or a JSON array: every example that is accepted is one of those that lie in it."""

    modules = (corpora, errors, finetune)

    def read(self, raw):
        kind, raw = raw[:1], raw[1:]
        path = self.folder / ("d.json" if kind == b"[" else "d.jsonl")
        path.write_bytes(raw)
        return self.done(self.whole, path, raw)

    def whole(self, path, raw):
        words = tokenizer.Tokenizer(tokenizer.encode, tokenizer.decode, frozenset({10}), fold=True)
        found = examples.examples(path, words, LENGTH)
        text = raw.decode().removeprefix("\ufeff")
        lines = [line for line in text.split("\n") if line.strip()]
        rows = json.loads(text) if path.suffix == ".json" else [json.loads(line) for line in lines]
        assert len(found) == len(rows)
        for (ids, start), row in zip(found, rows, strict=True):
            assert 1 <= start < len(ids) <= LENGTH + 1
            whole = row["text"] if "text" in row else row["prompt"] + row["completion"]
            assert (tokenizer.fold(whole) + "\n").endswith(tokenizer.decode(ids)[-len(whole) - 1 :])
        if found:
            labels = examples.padded(found)[1]
            assert (labels >= 0).sum() == sum(len(ids) - start for ids, start in found)

    def corpus(self):
        """Pairs and texts, in lines and in an array."""
        rows = [{"prompt": f"{i} times 2 is", "completion": f" {2 * i}.\u2028"} for i in range(3)]
        rows += [{"text": "Wherefore art? caf\u00e9"}, {"prompt": "p" * 30, "completion": "c", "more": [1]}]
        for plain in (True, False):
            lines = [json.dumps(row, ensure_ascii=plain).encode() for row in rows]
            yield b"l" + b"\r\n".join(lines)
            yield b"[" + b"[" + b", ".join(lines) + b"]"

    def mutated(self, rng, raw, others):
        kind, raw = raw[:1], raw[1:]
        for _ in range(rng.choice([1, 1, 2])):
            how = rng.randrange(5)
            if how < 2 and kind == b"[":
                raw = swapped(rng, raw)
            elif how < 2:
                lines = raw.split(b"\n")
                at = rng.randrange(len(lines))
                lines[at] = swapped(rng, lines[at])
                raw = b"\n".join(lines)
            else:
                raw = rng.choice([flipped, cut, spliced])(rng, raw)
        return rng.choice([kind, kind, kind, b"l", b"["]) + raw


class Rows(Readers):
    """A file of rows: what is accepted is what stands there, and can be tabled; one in ten is drawn."""

    modules = (errors, forms, rows, rank_sweep)
    limit = 30

    def read(self, data):
        path = self.folder / "rows.jsonl"
        path.write_bytes(data)
        with contextlib.redirect_stderr(io.StringIO()):  # damaged lines
            return self.done(self.whole, path)

    def whole(self, path):
        found = rank_sweep.read_rows(path)
        lines = {bare(json.loads(harness.sealed(row))) for row in found}
        assert lines <= {bare(row) for row in map(parsed, path.read_bytes().splitlines()) if row}
        said = rank_report.table(found)
        assert all(line.isprintable() for line in said.splitlines()), ascii(said)
        if found:
            rank_report.report_page(found, rank_report.pictures(found) if self.inputs % 10 == 0 else {})

    def corpus(self):
        """Small sweeps of two kinds."""
        from test_plotting import make_rows

        for targets in (("folio", "permuted:2"), ("mine.txt",)):
            yield b"".join(map(harness.sealed, make_rows(targets, ranks=(1, 3), seeds=2)))

    def mutated(self, rng, data, others):
        for _ in range(rng.choice([1, 1, 2])):
            data = flipped(rng, data) if rng.random() < 0.05 else forged_rows(rng, data)
        return data


class Checkpoints(Readers):
    """A checkpoint of a tiny run: what is accepted is saved again as it was; else nothing has changed."""

    modules = (errors, forms, optim, sys.modules[save_checkpoint.__module__])

    def __init__(self, folder):
        super().__init__(folder)
        from test_training import Run

        self.fresh = Run

    def read(self, data):
        path = self.folder / "c.safetensors"
        path.write_bytes(data)
        return self.done(self.again, path, data)

    def again(self, path, data):
        run = self.fresh(seed=7)
        before = self.state(run)
        try:
            history = run.load(path)
        except MiniloraError:
            assert self.state(run) == before
            raise
        save_checkpoint(path, run.model, run.optimizer, run.rngs, history, run.about())
        assert held(path.read_bytes()) == held(data)

    def state(self, run):
        moments = {k: a.tobytes() for k, a in run.optimizer.state().items()}
        return digest(run.model), moments, run.optimizer.t, [r.bit_generator.state for r in run.rngs.values()]

    def corpus(self):
        """One after two steps."""
        path = self.folder / "c.safetensors"
        self.fresh().train(steps=2, checkpoint=path)
        yield path.read_bytes()

    def mutated(self, rng, data, others):
        for _ in range(rng.choice([1, 1, 2])):
            how = rng.choice([flipped, cut]) if rng.random() < 0.05 else forged_checkpoint
            data = how(rng, data)
        return data


class Bases(Readers):
    """The folder of a base, its config and its tensors in one file or several."""

    modules = (errors, huggingface, count, atomic, safetensors)

    def __init__(self, folder):
        super().__init__(folder)
        self.where = self.folder
        self.adapter = self.folder.with_name("adapter")
        shutil.copytree(FIXTURES / "adapters" / "untied--q-and-v", self.adapter)

    def contents(self, data):
        """The files of an input, name -> bytes."""
        return parted(data)

    def read(self, data):
        given = self.contents(data)
        for path in self.folder.iterdir():
            path.unlink()
        for name, content in given.items():
            (self.folder / name).write_bytes(content)
        gguf.header.cache_clear()  # a clock may be too coarse to tell two files
        try:
            self.done(self.counted)
            self.done(self.tensors)
            done = self.done(self.loaded)
            if done and self.inputs % 10 == 0:
                self.done(self.merged, root=self.folder.parent)
            return done
        finally:
            assert {path.name: path.read_bytes() for path in self.folder.iterdir()} == given

    def counted(self):
        """Modules and parameters agree, of any architecture whose names and shapes are known."""
        tree, counts = count.modules(self.where), count.count(self.where, 1, [*count.ATTENTION, *count.MLP])
        maps = [row for row in tree.rows if row.layer == "Linear" and row.module != "lm_head"]
        assert counts.parameters == sum(sum(row.shape) for row in maps)
        for said in (tree, counts):
            assert all(line.isprintable() for line in str(said).splitlines()), ascii(str(said))

    def tensors(self):
        """Every tensor of whatever architecture has the shape that is said."""
        weights = huggingface.weights(self.where)
        for name in weights:
            assert weights[name].shape == weights.shapes[name]

    def loaded(self):
        """A model has the numbers of the file and of no other, counts them right, and is saved as it is."""
        base = huggingface.checkpoint(self.where)
        for dtype in (np.float64, np.float32):
            model = huggingface.assemble(base, dtype)
            ours, theirs = arrays(model), self.theirs(base.tensors.keys())
            assert same_bits({name: a.astype(dtype) for name, a in theirs.items()}, ours)
        huggingface.save_model(model, self.out, "", overwrite=True)
        again = huggingface.load(self.out)
        assert again.config == model.config == base.config
        assert same_bits(arrays(again), ours)
        shapes = {name: a.shape for name, a in ours.items()}
        tree, counts = count.modules(self.where), count.count(self.where, 1)
        tied = tree.tied * ["lm_head"]
        weights = {f"{row.module}.weight": row.shape for row in tree.rows if row.module not in tied}
        assert weights == {name: shape for name, shape in shapes.items() if name.endswith(".weight")}
        assert counts.total == sum(map(math.prod, shapes.values()))
        self.done(self.told, base)

    def theirs(self, names):
        """The tensors as the package safetensors reads them, less the buffers and a head that is tied."""
        config = json.loads((self.folder / "config.json").read_text("utf-8-sig"))
        shards = {TENSORS}
        if not (self.folder / TENSORS).exists():
            index = json.loads((self.folder / f"{TENSORS}.index.json").read_text("utf-8-sig"))
            shards = set(index["weight_map"].values())
        found, raws = {}, [(self.folder / name).read_bytes() for name in shards]
        for name, entry in (pair for raw in raws for pair in deserialize(raw)):
            if name not in names:
                tied = name == "lm_head.weight" and config.get("tie_word_embeddings")
                assert tied or huggingface.is_buffer(name, tuple(entry["shape"])), name
            elif entry["dtype"] == "BF16":
                upper = np.frombuffer(entry["data"], "<u2").astype(np.uint32)
                found[name] = (upper << 16).view(np.float32).reshape(entry["shape"])
            else:
                found[name] = np.frombuffer(entry["data"], WIDE[entry["dtype"]]).reshape(entry["shape"])
        return found

    def told(self, base):
        """A tokenizer gives ids of the vocabulary."""
        words = huggingface.tokenizer_of(base)
        ids = words.encode("the 12th thing")
        assert all(0 <= i < base.config.vocab_size for i in [*ids, *words.start])
        words.decode(ids)

    def merged(self):
        """A merged base has what is not adapted as it was, up to the rounding of what it is stored as."""
        atomic.remove_tree(self.out)
        report = llama.merge_llama(self.where, self.adapter, self.out)
        assert all(line.isprintable() for line in str(report).splitlines()), ascii(str(report))
        before, after = (huggingface.checkpoint(where).tensors for where in (self.where, self.out))
        same = [name for name in before if not name.endswith(("q_proj.weight", "v_proj.weight"))]
        assert before.keys() == after.keys()
        want = {name: safetensors.stored(before[name], report.dtype) for name in same}
        assert same_bits({name: after[name] for name in same}, want)
        for name, content in huggingface.beside(self.where).items():
            assert (self.out / name).read_bytes() == content

    def corpus(self):
        """The fixtures, one of them also with a tokenizer, and as a Qwen; and one in float64."""
        for base in BASES:
            found = {path.name: path.read_bytes() for path in (FIXTURES / "bases" / base).iterdir()}
            yield joined(found)
        words = tokenizer_json(self.folder / "m.gguf")
        yield joined(found | {"tokenizer.json": words, "generation_config.json": b'{"eos_token_id": 2}'})
        qwen = json.loads(found["config.json"]) | {"model_type": "qwen3"}
        yield joined(found | {"config.json": json.dumps(qwen).encode()})
        huggingface.save_model(tiny(0, np.float64, num_hidden_layers=1)[0], self.out, "")
        yield joined({path.name: path.read_bytes() for path in self.out.iterdir()})

    def mutated(self, rng, data, others):
        found, other = parted(data), parted(rng.choice(others))
        for _ in range(rng.choice([1, 1, 1, 2, 3])):
            name = rng.choice([*found, "config.json", "config.json"])
            content, how = found.get(name, b""), rng.random()
            if how < 0.1:
                found[name] = rng.choice([flipped, cut])(rng, content)
            elif how < 0.2:
                found[name] = other.get(rng.choice([name, name, *PARTS]), b"")
            elif not name.endswith("safetensors"):
                found[name] = rng.choice([swapped, swapped, reformed])(rng, content)
            else:
                found[name] = rng.choice([headed, recast, recast, stated])(rng, content)
        return joined(found)


class Gguf(Bases):
    """A Llama in a GGUF file."""

    modules = (errors, huggingface, gguf, count)

    def __init__(self, folder):
        super().__init__(folder)
        self.where = self.folder / "m.gguf"

    def contents(self, data):
        return {"m.gguf": data}

    def theirs(self, names):
        """The tensors as the package gguf decodes their bytes, rows of queries and keys put back."""
        from gguf import GGMLQuantizationType, dequantize
        from test_gguf import in_halves

        values, entries = dissolved(self.where.read_bytes())
        c, found = {name: value for name, _, value in values}, {}
        H = c["llama.attention.head_count"]
        heads = {"attn_q": H, "attn_k": c.get("llama.attention.head_count_kv", H)}
        for name, dims, kind, raw in entries:
            rows = np.frombuffer(raw, np.uint8).reshape(math.prod(dims[1:]), -1)
            with np.errstate(all="ignore"):
                W = np.asarray(dequantize(rows, GGMLQuantizationType(kind)), np.float32).reshape(dims[::-1])
            count = heads.get(name.split(".")[-2])
            found[gguf.hf_name(name)] = in_halves(W, count) if count else W
        return found

    def told(self, base):
        super().told(base)
        gguf.special(self.where)

    def corpus(self):
        """One of blocks of several kinds, and the fixture that the adapter belongs to."""
        import test_gguf

        tokenizer_json(self.where)
        yield self.where.read_bytes()
        base = huggingface.load(FIXTURES / "bases" / "untied")
        c, held = base.config, arrays(base)
        values = test_gguf.VALUES | test_gguf.WORDS | {
            "llama.embedding_length": c.hidden_size, "llama.feed_forward_length": c.intermediate_size,
            "llama.attention.head_count": c.num_attention_heads, "llama.rope.dimension_count": c.E,
            "llama.attention.head_count_kv": c.num_key_value_heads,
        }  # fmt: skip
        given = {theirs: held[name] for theirs, (name, *_) in (test_gguf.TENSORS | test_gguf.OUTPUT).items()}
        test_gguf.write(self.where, given, values, kinds=dict.fromkeys(given, "F32"))
        yield self.where.read_bytes()

    def mutated(self, rng, data, others):
        for _ in range(rng.choice([1, 1, 1, 2, 3])):
            how = rng.choice([flipped, flipped, cut]) if rng.random() < 0.1 else forged_gguf
            data = how(rng, data)
        return data


class LoraFiles(Readers):
    """A LoRA as another tool writes it: one file, or MLX's with its config."""

    modules = (
        errors, safetensors, gguf, folder, contents, dictionaries, grammar, image, llama_cpp, names, opening,
        recognise,
    )  # fmt: skip
    given = (  # with what a file does not hold, or without it
        {"alpha": 8, "r": 4, "heads": (4, 2)},
        {},
    )

    def read(self, data):
        form, settings, raw = split(data, FORMS)
        for path in self.folder.iterdir():
            path.unlink()
        where = self.folder / FORMS[form]
        where.write_bytes(raw)
        if FORMS[form] == "adapters.safetensors":
            (self.folder / CONFIG).write_bytes(settings)
        gguf.header.cache_clear()
        return any([self.done(self.opened, where, how) for how in self.given])

    def opened(self, where, how):
        """Every tensor has the shape that is said, and a pair's factors fit together."""
        found = folder.open_adapter(where, **how)
        said = [*found.all_notes, *(f"{m} {pair}" for m, pair in found.pairs.items())]
        assert all(line.isprintable() for line in said), ascii(said)
        for name in found.tensors:
            with contextlib.suppress(MiniloraError):  # NaN, or a dtype that is none of factors
                assert found.tensors[name].shape == found.tensors.shapes[name], name
        for m, pair in found.pairs.items():
            A, B = found.factors(m)
            assert (pair.r, math.prod(A.shape[1:])) == (len(A), pair.shape[1]), m
            assert (len(B), B.shape[1]) == (pair.shape[0], pair.r), m
            assert 0 < pair.scale < math.inf, m
        if self.inputs % 10 == 0 and not how:
            self.looked_at(where, found)

    def looked_at(self, where, found):
        """What is said is printable, and compressing writes a folder of the same modules without a doubt."""
        said = str(microscope.inspect(where))
        assert all(line.isprintable() for line in said.splitlines()), ascii(said)
        rank = max(pair.r for pair in found.pairs.values())
        truncate.compress(where, self.out, rank=rank, overwrite=True)
        again = folder.open_adapter(self.out)
        assert not again.doubts
        assert again.pairs.keys() == found.pairs.keys()

    def corpus(self):
        """Small files of every form among the fixtures."""
        for path in (path for pattern in SMALL for path in sorted(FILES.glob(pattern))):
            form = path.name if path.name in FORMS else "m.gguf" if path.suffix == ".gguf" else FORMS[0]
            settings = path.with_name(CONFIG).read_bytes() if form == "adapters.safetensors" else b""
            yield join(FORMS.index(form), settings, path.read_bytes())
            if form == "adapters.safetensors":
                yield join(FORMS.index("adapters.npz"), b"", zipped(load(path.read_bytes())))

    def mutated(self, rng, data, others):
        form, settings, raw = split(data, FORMS)
        for _ in range(rng.choice([1, 1, 1, 2, 3])):
            how = rng.random()
            if how < 0.1:
                raw = rng.choice([flipped, cut])(rng, raw)
            elif how < 0.12:
                form, _, raw = split(rng.choice(others), FORMS)
            elif FORMS[form] == "m.gguf":
                raw = forged_gguf(rng, raw)
            elif FORMS[form] == "adapters.npz":
                raw = rearranged(rng, raw)
            elif FORMS[form] == "adapters.safetensors" and how < 0.4:
                settings = rng.choice([swapped, swapped, reformed])(rng, settings)
            else:
                raw = rng.choice([headed, restyled, restyled, retold, recast, stated])(rng, raw)
        return join(form, settings, raw)


TARGETS = {
    "adapters": Adapters, "jsonl": Examples, "rows": Rows, "checkpoints": Checkpoints, "bases": Bases,
    "gguf": Gguf, "lora_files": LoraFiles,
}  # fmt: skip


def tokenizer_json(path):
    """Write a small GGUF file, whose tokenizer in the form of Hugging Face is returned, as bytes."""
    from test_gguf import weights, write

    write(path, weights())
    return gguf.tokenizer_json(path).encode()


def arrays(model):
    """The parameters of a model, path -> array."""
    return {path: to_host(p.dense()) for path, p in named_params(model).items()}


# ---- our own files, forged: another structure under a right seal


def parsed(line):
    """The object in a line, or nothing."""
    with contextlib.suppress(ValueError, RecursionError):
        row = json.loads(line)
        return row if isinstance(row, dict) else None


def bare(row):
    """A row as text, so that types count, without its seal and without what follows from the others."""
    return json.dumps({k: v for k, v in row.items() if k not in ("sha256", "gap_closed")})


def reshaped(rng, tree):
    """A JSON value with a part dropped, renamed, doubled, swapped, nested or retyped, at any depth."""
    inside = isinstance(tree, dict | list) and len(tree) > 0
    keys = list(tree) if isinstance(tree, dict) else list(range(len(tree))) if inside else []
    new = tree.copy() if inside else tree
    if inside and rng.random() < 0.75:
        key = rng.choice(keys)
        new[key] = reshaped(rng, tree[key])
        return new
    how = rng.randrange(6)
    if inside and how < 4:
        a, b = rng.choice(keys), rng.choice(keys)
        if how == 0:
            del new[a]
        elif how == 1:
            new[a], new[b] = new[b], new[a]
        elif isinstance(tree, dict):
            new[rng.choice([*WORDS, *keys, a[:-1], a.upper()])] = new.pop(a) if how == 2 else new[a]
        else:
            new.insert(b, new[a])
        return new
    return [tree] if how == 4 else {rng.choice(WORDS): tree} if how == 5 else near(rng, tree)


def resealed(value, arrays=None):
    """A row, or what a checkpoint says with its arrays, with its right seal, as bytes."""
    if not isinstance(value, dict):
        sealed = value
    elif arrays is None:
        value = {k: v for k, v in value.items() if k != "sha256"}
        sealed = value | {"sha256": harness.seal(value)}
    else:
        sealed = value | {"sha256": seal_of_checkpoint(value, arrays)}
    text = json.dumps(sealed)
    return text.encode() if arrays is None else save(arrays, metadata={"minilora": text})


def forged_rows(rng, data):
    """Rows of which one has another structure, and mostly the id that follows from its config."""
    lines = data.splitlines()
    at = rng.randrange(len(lines) or 1)
    row = parsed(lines[at]) if lines else None
    if row is None:
        return data
    row.pop("sha256", None)
    part = rng.choice(["whole", "config", rng.choice([*row, "whole"])])
    row = reshaped(rng, row) if part not in row else row | {part: reshaped(rng, row[part])}
    if isinstance(row, dict) and isinstance(row.get("config"), dict) and rng.random() < 0.8:
        row["id"] = rows.id_of(row["config"])
    if rng.random() < 0.9:
        lines[at] = resealed(row)
    else:
        lines.append(resealed(row))
    return b"\n".join(lines) + b"\n"


def opened(data):
    """What a checkpoint says, and its arrays."""
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return json.loads(header["__metadata__"]["minilora"]), load(data)


def held(data):
    """The content of a checkpoint, to be compared: without the order of names, and the seal that tells it."""
    meta, arrays = opened(data)
    meta.pop("sha256")
    return json.dumps(meta, sort_keys=True), {k: (a.shape, a.dtype, a.tobytes()) for k, a in arrays.items()}


def forged_checkpoint(rng, data):
    """A checkpoint that says something else, or has other arrays."""
    try:
        meta, arrays = opened(data)
    except Exception:  # damaged already
        return data
    if rng.random() < 0.5 or not arrays or not isinstance(meta, dict):
        part = rng.choice([*meta, "whole"]) if isinstance(meta, dict) else "whole"
        meta = reshaped(rng, meta) if part == "whole" else meta | {part: reshaped(rng, meta[part])}
    else:
        arrays = other_arrays(rng, arrays)
    return resealed(meta, {k: np.ascontiguousarray(a) if a.ndim else a for k, a in arrays.items()})


def other_arrays(rng, arrays, known=("v.x",)):
    """Some arrays of which one is gone, renamed, swapped, retyped, reshaped, or has another number."""
    arrays, names = dict(arrays), sorted(arrays)
    name, other = rng.choice(names), rng.choice(names)
    a = arrays[name].copy()
    how = rng.randrange(6)
    if how == 0:
        del arrays[name]
    elif how == 1:
        arrays[rng.choice(["x", name[1:], f"m{name[1:]}", f"{name}.x", *known])] = a
    elif how == 2:
        arrays[name], arrays[other] = arrays[other], a
    elif how == 3 and a.size and a.dtype.kind == "f":
        with np.errstate(over="ignore"):
            a.flat[rng.randrange(a.size)] = rng.choice([math.nan, math.inf, -1.0, 0.5, 1e30])
        arrays[name] = a
    elif how == 4:
        with np.errstate(all="ignore"):
            arrays[name] = a.astype(rng.choice(["f2", "f4", "f8", "i4", "?"]))
    else:
        less = np.atleast_1d(a)[..., :-1]
        arrays[name] = rng.choice([a[None], a.T, less, a.ravel(), np.zeros((), a.dtype)])
    return arrays


# ---- the files of a base, forged

MORE = {  # what a GGUF file may say besides
    "general.alignment": (1, 8, 24, 64, 0), "llama.rope.scaling.type": ("none", "linear"),
    "llama.rope.scale_linear": (1.0, 2.0), "tokenizer.ggml.add_bos_token": (True, 1),
    "adapter.lora.alpha": (0.0, 16.0, math.nan, -1.0), "general.type": ("adapter", "model"),
}  # fmt: skip


def reformed(rng, text):
    """JSON text of another structure; other text as it is."""
    try:
        return json.dumps(reshaped(rng, json.loads(text))).encode("utf-8", "surrogatepass")
    except (ValueError, RecursionError):
        return text


def recast(rng, data):
    """A whole file of tensors again, that has other arrays; another file, or one of bfloat16, as it is."""
    try:
        arrays = load(data)
    except Exception:
        return data
    extra = ("lm_head.weight", "model.layers.0.self_attn.rotary_emb.inv_freq", "model.norm.weight")
    arrays = other_arrays(rng, arrays, extra) if arrays else arrays
    return save({k: np.ascontiguousarray(a) if a.ndim else a for k, a in arrays.items()})


def lined(data):
    """The header of a file of tensors and the bytes behind it; ValueError, or RecursionError, for others."""
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    if not isinstance(header, dict) or not all(isinstance(entry, dict) for entry in header.values()):
        raise ValueError
    return header, data[end:]


def headlined(header, body):
    """A file of tensors with that header."""
    text = json.dumps(header).encode("utf-8", "surrogatepass")
    return len(text).to_bytes(8, "little") + text + body


def restyled(rng, data):
    """A file with a tensor's name, or those of its whole module, ended or begun as another tool does."""
    try:
        header, body = lined(data)
    except (ValueError, RecursionError):
        return data
    if not (known := [name for name in header if grammar.parsed(name)[1]]):
        return data
    key = rng.choice(known)
    module = grammar.parsed(key)[0]
    beginning, another = rng.choice([*BEGINNINGS, ""]), grammar.parsed(rng.choice(known))[0]
    new = rng.choice([module, another, beginning + module, module.replace("_", "."), module[1:]])
    names = {name: name.replace(module, new) for name in known if grammar.parsed(name)[0] == module}
    if rng.random() < 0.5:
        names = {key: new + rng.choice([key[len(module) :], *ENDS])}
    return headlined({names.get(name, name): entry for name, entry in header.items()}, body)


def retold(rng, data):
    """A file whose header says something else of scales and configs."""
    try:
        header, body = lined(data)
    except (ValueError, RecursionError):
        return data
    told = header.get("__metadata__", {})
    name = rng.choice([*image.NUMBERS, image.CONFIGS, image.CONFIGS, "ss_base_model_version"])
    value = str(near(rng, 8))
    if name == image.CONFIGS and isinstance(old := told.get(name), str):
        text = rng.choice([swapped, reformed])(rng, old.encode("utf-8", "surrogatepass"))
        value = text.decode("utf-8", "replace")
    told = told | {name: value}
    return headlined({"__metadata__": told} | header | {"__metadata__": told}, body)


def zipped(held):
    """Arrays as the bytes of an .npz."""
    out = io.BytesIO()
    np.savez(out, **held)
    return out.getvalue()


def rearranged(rng, data):
    """An .npz of other arrays, or with another header of one; another file as it is."""
    try:
        with np.load(io.BytesIO(data)) as file:
            held = other_arrays(rng, dict(file), ("model.layers.0.x.lora_a", "model.layers.0.x.m"))
        new = zipped({name.replace("/", ""): a for name, a in held.items()})
    except Exception:
        return data
    if rng.random() < 0.3:  # CRCs still hold what was there
        old = rng.choice([b"(4,", b"<f4", b"False", b"'shape'", b"NUMPY\x01", b"PK\x01\x02"])
        more = rng.choice([b"(9,", b"|O8", b"True ", b"'shapf'", b"NUMPY\x02", b"(-1", b"<i4"])
        new = new.replace(old, more.ljust(len(old))[: len(old)], rng.choice([1, -1]))
    return new


def dissolved(raw):
    """What a GGUF file says: lists of values [name, type, value] and of tensors [name, dims, kind, bytes]."""
    from gguf import GGML_QUANT_SIZES

    at = 24

    def number(kind):
        nonlocal at
        at += struct.calcsize(f"<{kind}")
        return struct.unpack_from(f"<{kind}", raw, at - struct.calcsize(f"<{kind}"))[0]

    def text():
        nonlocal at
        size = number("Q")
        at += size
        return raw[at - size : at].decode()

    def value(kind):
        if kind == ARRAY:
            kind, count = number("I"), number("Q")
            return [kind, [value(kind) for _ in range(count)]]
        return text() if kind == STRING else number(gguf.SCALARS[kind])

    tensors, values = struct.unpack_from("<QQ", raw, 8)
    values = [[text(), kind := number("I"), value(kind)] for _ in range(values)]
    entries = [[text(), [number("Q") for _ in range(number("I"))], number("I"), number("Q")]
               for _ in range(tensors)]  # fmt: skip
    start = -(-at // alignment(values)) * alignment(values)
    for entry in entries:
        block, size = GGML_QUANT_SIZES[entry[2]]
        begin = start + entry[3]
        entry[3] = raw[begin : begin + math.prod(entry[1]) // block * size]
    return values, entries


def alignment(values):
    """The alignment among values, or the usual one."""
    own = [value for name, _, value in values if name == "general.alignment"]
    return own[0] if own and type(own[0]) is int and 0 < own[0] < 1 << 16 else 32


def packed(kind, value):
    """A value of a GGUF file as bytes; struct.error, or another, if it is none of that type."""
    if kind == STRING:
        return struct.pack("<Q", len(raw := value.encode("utf-8", "surrogatepass"))) + raw
    if kind == ARRAY:
        return struct.pack("<IQ", value[0], len(value[1])) + b"".join(packed(value[0], v) for v in value[1])
    return struct.pack(f"<{gguf.SCALARS[kind]}", value)


def typed(value):
    """A JSON value as [type, value] of a GGUF file: in the first type that holds it, or as text."""
    if isinstance(value, list):
        items = [typed(v) for v in value]
        kind = items[0][0] if items else STRING
        return [ARRAY, [kind, [v for k, v in items if k == kind]]]
    for kind in {bool: (7,), int: (4, 11), float: (6, 12), str: (STRING,)}.get(type(value), ()):
        with contextlib.suppress(struct.error, OverflowError):
            packed(kind, value)
            return [kind, value]
    return [STRING, str(value)]


def composed(values, tensors, slip=0, version=3):
    """The bytes of a GGUF file that says that; one tensor, if any, lies `slip` beside its place."""
    align, head, body = alignment(values), [], b""
    for name, kind, value in values:
        head.append(packed(STRING, name) + struct.pack("<I", kind) + packed(kind, value))
    for name, dims, kind, raw in tensors:
        place = (len(body) + (slip if body else 0)) % 2**64
        head.append(packed(STRING, name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, place))
        body += raw + bytes(-len(raw) % align)
    start = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(values)) + b"".join(head)
    return start + bytes(-len(start) % align) + body


def forged_gguf(rng, data):
    """A GGUF file that says something else, mostly with as many bytes as that takes; others as they are."""
    from gguf import GGML_QUANT_SIZES

    try:
        values, tensors = dissolved(data)
        how, entries = rng.randrange(10), rng.choice([values, tensors])
        entry, value, tensor = rng.choice(entries), rng.choice(values), rng.choice(tensors)
        if how == 0:
            entries.remove(entry)
        elif how == 1:
            entries.insert(rng.randrange(len(entries) + 1), list(entry))
        elif how == 2:
            names = [e[0] for e in entries]
            entry[0] = rng.choice([*WORDS, *names, entry[0].replace("0", "1"), "output.weight"])
        elif how < 5:
            old = value[2][1] if value[1] == ARRAY else value[2]
            value[1:] = typed(somewhere(rng, old, lambda v: near(rng, v)))
        elif how == 5:
            kind = rng.randrange(13)
            packed(kind, value[2])
            value[1] = kind
        elif how == 6:
            name = rng.choice(list(MORE))
            values.append([name, *typed(rng.choice([*MORE[name], *VALUES]))])
        elif how == 7:
            a = np.frombuffer(tensor[3], "<f4").copy()
            a[rng.randrange(len(a))] = rng.choice([math.nan, math.inf, -1.0, 0.5, 1e30])
            tensor[3] = a.tobytes()
        else:
            if how == 8:
                dims = tensor[1]
                at = rng.randrange(len(dims))
                dims[at] = rng.choice([0, 1, 2, dims[at] - 1, dims[at] + 1, dims[at] * 32, 2**32, 2**63])
                tensor[1] = rng.choice([dims, dims[::-1], [*dims, 1], [1, *dims], dims[:-1]])
            else:
                tensor[2] = rng.choice([*GGML_QUANT_SIZES, 99])
            block, each = GGML_QUANT_SIZES.get(tensor[2], (1, 4))
            if rng.random() < 0.9 and (size := math.prod(tensor[1]) // block * each) < 1 << 16:
                tensor[3] = (tensor[3] * (size // (len(tensor[3]) or 1) + 1))[:size]
        slip = rng.choice([32, -32, 1, 2**40]) if rng.random() < 0.03 else 0
        return composed(values, tensors, slip, rng.choice([3] * 30 + [2, 1, 4]))
    except (ArithmeticError, IndexError, KeyError, MemoryError, TypeError, ValueError, AttributeError,
            struct.error):  # fmt: skip
        return data


# ---- mutations that know the format


def somewhere(rng, tree, change):
    """A JSON value with one part of it changed, at any depth."""
    if isinstance(tree, dict) and tree and rng.random() < 0.9:
        key = rng.choice(list(tree))
        return {k: somewhere(rng, v, change) if k == key else v for k, v in tree.items()}
    if isinstance(tree, list) and tree and rng.random() < 0.7:
        at = rng.randrange(len(tree))
        return [somewhere(rng, v, change) if i == at else v for i, v in enumerate(tree)]
    return change(tree)


def swapped(rng, text):
    """JSON text with a value, key or entry changed; other text as it is."""
    try:
        tree = json.loads(text)
    except (ValueError, RecursionError):
        return text
    how = rng.randrange(4)
    if how == 0 and isinstance(tree, dict) and tree:
        gone = rng.choice(list(tree))
        tree = {k: v for k, v in tree.items() if k != gone}
    elif how == 1 and isinstance(tree, dict) and tree:
        old = rng.choice(list(tree))
        new = rng.choice([*WORDS, *tree, old.replace("0", "1"), old.replace("_A", "_B")])
        tree = {new if k == old else k: v for k, v in tree.items()}
    else:
        tree = somewhere(rng, tree, lambda old: near(rng, old))
    return json.dumps(tree).encode("utf-8", "surrogatepass")


def near(rng, old):
    """Another value in the place of one, not always of its type."""
    if type(old) is int and rng.random() < 0.7:
        return old + rng.choice([-1, 1, old, -old, 12, 144])
    return rng.choice(VALUES)


def flipped(rng, data):
    data = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        if data:
            data[rng.randrange(len(data))] = rng.choice([rng.randrange(256), *b'{}[]",:019e-'])
    return bytes(data)


def cut(rng, data):
    """A piece less, or twice."""
    a, b = sorted(rng.randrange(len(data) + 1) for _ in range(2))
    return rng.choice([data[:a], data[:a] + data[b:], data[:b] + data[a:]])


def spliced(rng, data):
    """With a piece that some reader of lines or of JSON stumbles over."""
    at = rng.randrange(len(data) + 1)
    return data[:at] + rng.choice(SPLICES).encode() + data[at:]


def stated(rng, weights):
    """Another length of the header."""
    size = int.from_bytes(weights[:8], "little")
    size = rng.choice([size - 1, size + 1, 0, 2**63, len(weights), len(weights) - 8, rng.randrange(2**64)])
    return (size % 2**64).to_bytes(8, "little") + weights[8:]


def headed(rng, weights):
    """Another header."""
    end = 8 + int.from_bytes(weights[:8], "little")
    new = swapped(rng, weights[8:end])
    return len(new).to_bytes(8, "little") + new + weights[end:]


def mutated(rng, data, others):
    """An input near this one."""
    base, config, weights = split(data)
    _, other_config, other_weights = split(rng.choice(others))
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        how = rng.randrange(10)
        if how < 3:
            config = swapped(rng, config)
        elif how < 6:
            weights = headed(rng, weights)
        else:
            base, config, weights = (
                (base, flipped(rng, config), weights) if how == 6 else
                (base, config, rng.choice([flipped, cut, stated])(rng, weights)) if how == 7 else
                (base, cut(rng, config), weights) if how == 8 else
                rng.choice([(rng.randrange(len(BASES)), config, weights), (base, other_config, weights),
                            (base, config, other_weights)])
            )  # fmt: skip
    return join(base, config, weights)


# ---- the engines


def guided(atheris, readers, seeds, seconds):
    """libFuzzer keeps the inputs that reach new code; half of the mutations are its own. Does not return."""

    def one(data):
        try:
            readers(data)
        except (Exception, TooLong):
            traceback.print_exc()
            stop(1)
        if time.monotonic() - readers.start > seconds:
            print(readers.line("atheris"), flush=True)
            stop(0)

    def stop(code):
        shutil.rmtree(readers.folder.parent)
        os._exit(code)  # libFuzzer has no other end

    def mutator(data, most, seed):
        rng = random.Random(seed)
        new = readers.mutated(rng, data, seeds) if rng.random() < 0.5 else atheris.Mutate(data, most)
        return new[:most]

    for module in readers.modules:
        for _, function in inspect.getmembers(module, inspect.isfunction):
            if function.__module__ == module.__name__ and not hasattr(function, "__wrapped__"):
                atheris.instrument_func(function)
    start = readers.folder.parent / "corpus"
    start.mkdir()
    for i, seed in enumerate(seeds):
        (start / str(i)).write_bytes(seed)
    how = ["-max_len=100000", "-timeout=0", "-rss_limit_mb=1024", "-verbosity=0"]
    atheris.Setup([sys.argv[0], *how, str(start)], one, custom_mutator=mutator)
    atheris.Fuzz()


def blind(readers, seeds, seconds, seed):
    """Mutations of the seeds and of what was accepted."""
    rng, pool = random.Random(seed), list(seeds)
    while time.monotonic() - readers.start < seconds:
        data, before = readers.mutated(rng, rng.choice(pool), seeds), readers.accepted
        readers(data)
        if readers.accepted > before and len(pool) < 1000:
            pool.append(data)
    print(readers.line("random"))


def main():
    warnings.simplefilter("error")  # no reader warns
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", choices=TARGETS, default="adapters", help="which readers (adapters)")
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--seed", type=int, default=0, help="of the random engine")
    parser.add_argument("--engine", choices=["atheris", "random"])
    args = parser.parse_args()
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        (Path(folder) / "read").mkdir()
        readers = TARGETS[args.target](Path(folder) / "read")
        seeds = list(readers.corpus())
        try:
            import atheris
        except ImportError:
            atheris = None
        if atheris and args.engine != "random":
            guided(atheris, readers, seeds, args.seconds)
        blind(readers, seeds, args.seconds, args.seed)


if __name__ == "__main__":
    main()
