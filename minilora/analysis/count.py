"""The shape of a model -> how many numbers LoRA trains, and the memory it takes. No array is made.

A map W (O, I) gets A (r, I) and B (O, r); DoRA adds a magnitude (O,). A Llama holds its
embedding, L blocks of seven maps and two norms, a last norm, and an untied head as large as the embedding:

    trained = sum of r (O + I)        total = 2 V D + L (2 D H E + 2 D G E + 3 D F + 2 D) + D

A tied head adds no weights but is adapted as a separate map, as in PEFT. Qwen 2 adds biases, Qwen 3 norms
of queries and keys. (Hu et al. 2021, section 5.1; Liu et al. 2024, section 4.) Stands in for PEFT's
print_trainable_parameters, which needs the loaded model; leaves out activations, which depend on the
batch, and the allocator's overhead.
"""

from __future__ import annotations

import math
import os
import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..errors import ConfigError, MismatchError, check_int, nearest, short
from ..formats.atomic import named
from ..formats.gguf import open_gguf
from ..formats.huggingface import Outline, located, read_outline
from ..layers import Embedding, Linear, Param, RMSNorm
from ..methods.lora_config import LoraConfig
from ..model import Config
from ..table import Table, report
from ..targets import find_targets, names, resolve

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
QV = ("q_proj", "v_proj")
MOST = 10**18  # parameters; more must be a typo
DEEPEST = 10_000  # the most blocks that `modules` lists

# fmt: off
LLAMAS = {  # the released config.json: V, D, F, L, H, G
    "llama-2-7b": Config(32000, 4096, 11008, 32, 32, 32, tie_word_embeddings=False),
    "llama-2-13b": Config(32000, 5120, 13824, 40, 40, 40, tie_word_embeddings=False),
    "llama-65b": Config(32000, 8192, 22016, 80, 64, 64, tie_word_embeddings=False),
    "llama-2-70b": Config(32000, 8192, 28672, 80, 64, 8, tie_word_embeddings=False),
    "mistral-7b": Config(32000, 4096, 14336, 32, 32, 8, tie_word_embeddings=False),
    "llama-3-8b": Config(128256, 4096, 14336, 32, 32, 8, tie_word_embeddings=False),
    "smollm2-135m": Config(49152, 576, 1536, 30, 9, 3),
    "tinyllama-1.1b": Config(32000, 2048, 5632, 22, 32, 4, tie_word_embeddings=False),
    "llama-3.2-1b": Config(128256, 2048, 8192, 16, 32, 8),
}
PAPER = {  # the models of Hu et al. 2021: D, L, and for a GPT its positions
    "roberta-base": (768, 12, None), "roberta-large": (1024, 24, None), "deberta-xxl": (1536, 48, None),
    "gpt-2-medium": (1024, 24, 1024), "gpt-2-large": (1280, 36, 1024), "gpt-3": (12288, 96, 2048),
}
PRINTED = {  # model, r, targets: the number that Hu et al. 2021 prints, where, and what it counts
    ("deberta-xxl", 8, QV): ("4.7M", "Table 2, with the r of Table 10",
                             "4.7M is r = 16, as in the authors' scripts"),
    ("gpt-2-medium", 4, QV): ("0.35M", "Table 3, with the r of Table 11",
                              "0.35M is printed for the prefix too, 0.1% of the model"),
    ("gpt-2-large", 4, QV): ("0.77M", "Table 3, with the r of Table 11",
                             "0.77M is printed for the prefix too, 0.1% of the model"),
    ("gpt-3", 64, ATTENTION): ("603.8M", "Table 15", "603.8M is twice the 301.9M of q and v, cut short"),
    ("gpt-3", 2, ATTENTION): ("37.7M", "Appendix D.4", "37.7M is r = 4, as in Table 15"),
}
KEYS = {  # our words for dimensions, and Hugging Face's
    "d": "hidden_size", "layers": "num_hidden_layers", "heads": "num_attention_heads",
    "kv": "num_key_value_heads", "ff": "intermediate_size", "vocab": "vocab_size", "head_dim": "head_dim",
    "tied": "tie_word_embeddings",
}
# fmt: on


class Shape(NamedTuple):
    """The maps of a model that can be adapted, and its number of parameters."""

    maps: dict[str, tuple[int, int, int]]  # kind -> O, I, how many
    total: int | None  # None if unknown
    blocks: int = 0  # weights of the linear maps in the blocks, which QLoRA quantizes


class Target(NamedTuple):
    """One kind of adapted module: its weight (O, I), how many there are, their trained parameters in all."""

    kind: str
    shape: tuple[int, int]
    number: int
    parameters: int


class Memory(NamedTuple):
    """Bytes that training needs."""

    weights: int
    gradients: int
    optimizer: int  # a float32 master copy and Adam's two moments


@report
@dataclass(frozen=True)
class Counts:
    """What `count` found; prints as a table."""

    name: str
    rank: int
    dora: bool
    rows: tuple[Target, ...]
    total: int | None  # parameters of the base, None if unknown
    memory: dict[str, Memory] | None  # of "full", "LoRA" and "QLoRA", without activations; None as `total`
    note: str = ""  # a number that the paper prints instead, or a common miscount

    @property
    def parameters(self) -> int:
        """All trained parameters."""
        return sum(row.parameters for row in self.rows)

    @property
    def share(self) -> float | None:
        """Trained parameters over those of the base."""
        return self.parameters / self.total if self.total else None

    @property
    def reduction(self) -> float | None:
        """Parameters of the base over the trained ones."""
        return self.total / self.parameters if self.total else None

    @property
    def float32_bytes(self) -> int:
        """The adapter on disk, in float32."""
        return 4 * self.parameters

    @property
    def half_bytes(self) -> int:
        """The adapter on disk, in float16 or bfloat16."""
        return 2 * self.parameters

    def data(self) -> dict[str, Any]:
        more = {"parameters": self.parameters, "share": self.share, "reduction": self.reduction}
        rows = [row._asdict() for row in self.rows]
        memory = {how: m._asdict() for how, m in (self.memory or {}).items()}
        return asdict(self) | more | {"rows": rows, "memory": memory}

    def parts(self) -> list[str | Table]:
        trained = f"{self.parameters:,} parameters are trained; the total is not known"
        if self.total:
            of = f"{self.parameters:,} of {self.total:,} parameters are trained"
            trained = f"{of}: {self.share:.3%}, 1 in {self.reduction:,.1f}"
        rows = [(w.kind, "{} x {}".format(*w.shape), str(w.number), f"{w.parameters:,}") for w in self.rows]
        parts: list[str | Table] = [
            f"{self.name}, {'DoRA' if self.dora else 'LoRA'} of rank {self.rank}", trained, "",
            Table(("target", "shape", "number", "parameters"), rows), "",
            f"adapter on disk: {human(self.float32_bytes)} in float32, {human(self.half_bytes)} in 16 bits",
        ]  # fmt: skip
        if self.memory:
            head = ("training, without activations", "weights", "gradients", "optimizer", "total")
            memory = [(kind, *map(human, m), human(sum(m))) for kind, m in self.memory.items()]
            parts += ["", Table(head, memory)]
        if self.note:
            parts += ["", *textwrap.wrap("note: " + self.note, 88)]
        return parts


def human(size: int) -> str:
    """A number of bytes in the largest decimal unit that fits, kB to TB."""
    power = min(max((len(str(size)) - 1) // 3, 1), 4)
    return f"{size / 1000**power:.2f} {('kB', 'MB', 'GB', 'TB')[power - 1]}"


def count(
    model: str | Path | Config, rank: int = 8, targets: str | Sequence[str] = QV, dora: bool = False
) -> Counts:
    """The parameters that LoRA (or DoRA) of one rank trains on these targets; the model is never loaded.

    The model is a Config, a name in LLAMAS or PAPER, dimensions ("d=768,layers=12"; see `dimensions`),
    or a config.json or its folder. Targets are kinds (q_proj, ..., embed_tokens, lm_head) or "all-linear",
    all maps of the blocks. ConfigError, MismatchError, or whatever reading the file raises.
    """
    LoraConfig(r=rank, targets=targets, dora=dora)  # refuses invalid values
    name = "Config" if isinstance(model, Config) else str(model)
    maps, total, blocks = shape_of(model)
    if sum(map(math.prod, maps.values())) > MOST:
        raise ConfigError(f"{short(name)} has more than {MOST:.0e} parameters; expected fewer")
    entries = names("targets", targets)
    if "all-linear" in entries:
        if not maps.keys() >= {*MLP}:
            raise MismatchError(f"all-linear: {name} has only {', '.join(maps)}; expected some of them")
        entries = [entry for entry in entries if entry != "all-linear"] + [*ATTENTION, *MLP]
    rows = []
    for kind in resolve("targets", entries, list(maps)):
        shape, number = maps[kind][:2], maps[kind][2]
        if rank > min(shape):
            what = f"r is {short(rank)} for {kind} of shape {shape}"
            raise ConfigError(f"{what}; expected at most {min(shape)}")
        if dora and kind == "embed_tokens":
            raise ConfigError("dora is for linear maps; embed_tokens is an embedding")
        parameters = rank * sum(shape) + (shape[0] if dora else 0)
        rows.append(Target(kind, shape, number, number * parameters))
    trained = sum(row.parameters for row in rows)
    memory = None if total is None else training_memory(total, blocks, trained)
    note = remark(name, rank, rows, maps["q_proj"][0], dora)
    return Counts(name, rank, dora, tuple(rows), total, memory, note)


class Module(NamedTuple):
    """One module of a model: its name, kind of layer, weight's shape, and whether the targets select it."""

    module: str
    layer: str  # Linear, Embedding or RMSNorm
    shape: tuple[int, ...]
    adapted: bool


@report
@dataclass(frozen=True)
class Tree:
    """All modules of a model; prints as a table."""

    name: str
    rows: tuple[Module, ...]
    tied: bool  # whether the head shares the embedding's table; it is still adapted separately

    def data(self) -> dict[str, Any]:
        return {"name": self.name, "tied": self.tied, "rows": [row._asdict() for row in self.rows]}

    def parts(self) -> list[str | Table]:
        rows = [(w.module, w.layer, " x ".join(map(str, w.shape)), "*" * w.adapted) for w in self.rows]
        adapted = sum(w.adapted for w in self.rows)
        total = f"{self.name}: {len(self.rows)} modules, {adapted} of them adapted (*)"
        total += "; lm_head is the table of embed_tokens" if self.tied else ""
        return [Table(("module", "layer", "shape", ""), rows), total]


def modules(base: Path | str = "base", targets: str | Sequence[str] = "all-linear") -> Tree:
    """The modules of a base by Hugging Face's names, and which of them `targets` selects; reads no weight.

    The base is a name in LLAMAS, or as in `load`. MismatchError for a target that selects nothing.
    """
    outline = Outline(LLAMAS[str(base)]) if str(base) in LLAMAS else outline_of(base)
    if (L := outline.config.num_hidden_layers) > DEEPEST:
        raise ConfigError(f"{short(str(base))} has {short(L)} layers; expected at most {DEEPEST}")
    before, block, after = parts(outline)
    layers = {f"model.layers.{i}.{name}": part for i in range(L) for name, part in block.items()}
    layers = before | layers | after
    adapted = set(find_targets({m: BLANK[part.layer] for m, part in layers.items()}, targets))
    rows = [Module(m, part.layer, part.shape, m in adapted) for m, part in layers.items()]
    return Tree(str(base), tuple(rows), outline.config.tie_word_embeddings)


def outline_of(base: Path | str) -> Outline:
    """The names and shapes of a checkpoint, from its config.json or GGUF header only."""
    where = located(base)
    if where.suffix == ".gguf":
        return Outline(open_gguf(where)[0])
    return read_outline(named(where) if where.is_file() or where.suffix == ".json" else where / "config.json")


def remark(name: str, rank: int, rows: Sequence[Target], queries: int, dora: bool) -> str:
    """A note: the number that the paper prints instead, or the count if k and v were as wide as q."""
    trained = sum(row.parameters for row in rows)
    theirs = PRINTED.get((name, rank, tuple(row.kind for row in rows)))
    if theirs and not dora:
        number, where, what = theirs
        return f"Hu et al. 2021 prints {number} ({where}); right is {trained:,}: {what}"
    narrow = [row for row in rows if row.kind in ("k_proj", "v_proj") and row.shape[0] < queries]
    if not narrow:
        return ""
    wide = trained + sum(row.number * (rank + dora) * (queries - row.shape[0]) for row in narrow)
    outputs = f"{narrow[0].shape[0]} outputs of {' and '.join(row.kind for row in narrow)}"
    return f"grouped queries: {outputs}, not {queries}, which would count {wide:,}"


def training_memory(total: int, blocks: int, trained: int) -> dict[str, Memory]:
    """Bytes of weights, gradients and optimizer in mixed precision with Adam, without activations.

    A trained parameter takes 2 + 2 + 12 bytes (Rajbhandari et al. 2020, section 3.1), a frozen one 2. QLoRA
    holds the maps of the blocks in NF4 with double quantization, 4 + 8/64 + 32/(64*256) = 2113/512 bits a
    weight (Dettmers et al. 2023, section 3), and the rest of the base in 16 bits.
    """
    quantized = -(-blocks * 2113 // 4096)
    rest = 2 * (total - blocks)
    cases = {"full": (0, total), "LoRA": (2 * total, trained), "QLoRA": (quantized + rest, trained)}
    return {how: Memory(frozen + 2 * n, 2 * n, 12 * n) for how, (frozen, n) in cases.items()}


class Part(NamedTuple):
    """One module: its kind of layer, its weight's shape, whether it has a bias."""

    layer: str  # Linear, Embedding or RMSNorm
    shape: tuple[int, ...]
    bias: bool = False

    @property
    def parameters(self) -> int:
        """How many numbers weight and bias have."""
        return math.prod(self.shape) + self.bias * self.shape[0]


BLANK: dict[str, Any] = {  # one layer of each kind, to test which can be adapted
    "Linear": Linear(Param(np.zeros((1, 1)))),
    "Embedding": Embedding(Param(np.zeros((1, 1)))),
    "RMSNorm": RMSNorm(Param(np.zeros(1))),
}


def parts(outline: Outline) -> tuple[dict[str, Part], dict[str, Part], dict[str, Part]]:
    """The modules of a model by name, in order: before the blocks, in each block, after them."""
    c, kind = outline.config, outline.kind
    V, D, F, E = c.vocab_size, c.hidden_size, c.intermediate_size, c.E
    Q, K = c.num_attention_heads * E, c.num_key_value_heads * E
    biased = ATTENTION[:3] if kind == "qwen2" else ATTENTION * c.attention_bias + MLP * c.mlp_bias

    def maps(above: str, shapes: Mapping[str, tuple[int, int]]) -> dict[str, Part]:
        return {f"{above}.{name}": Part("Linear", shape, name in biased) for name, shape in shapes.items()}

    norm, of_head = Part("RMSNorm", (D,)), Part("RMSNorm", (E,))
    block = {
        "input_layernorm": norm,
        **maps("self_attn", dict(zip(ATTENTION, ((Q, D), (K, D), (K, D), (D, Q)), strict=True))),
        **({"self_attn.q_norm": of_head, "self_attn.k_norm": of_head} if kind == "qwen3" else {}),
        "post_attention_layernorm": norm,
        **maps("mlp", dict(zip(MLP, ((F, D), (F, D), (D, F)), strict=True))),
    }
    table = Part("Embedding", (V, D))
    return {"model.embed_tokens": table}, block, {"model.norm": norm, "lm_head": Part("Linear", (V, D))}


def llama_shape(outline: Outline) -> Shape:
    """A Llama's maps and its total, biases and norms included."""
    c = outline.config
    before, block, after = parts(outline)
    L = c.num_hidden_layers
    outer = before | after
    maps = {
        name.rpartition(".")[2]: (part.shape[0], part.shape[1], number)
        for where, number in ((block, L), (outer, 1))
        for name, part in where.items()
        if part.layer != "RMSNorm"
    }
    inner = L * sum(math.prod(part.shape) for part in block.values() if part.layer == "Linear")
    total = L * sum(part.parameters for part in block.values()) + sum(p.parameters for p in outer.values())
    total -= outer["lm_head"].parameters * c.tie_word_embeddings
    return Shape(maps, total, inner)


def square_shape(D: int, L: int, positions: int | None = None) -> Shape:
    """The four D x D maps of attention in each of L layers: all that Hu et al. 2021 adapts.

    With `positions`, the total is that of a GPT-2 or GPT-3 (Brown et al. 2020, section 2.1): 50,257 tokens,
    learned positions, a tied head, blocks of 12 D² weights and 13 D biases and norms, a last norm.
    """
    maps = dict.fromkeys(ATTENTION, (D, D, L))
    if positions is None:
        return Shape(maps, None)
    blocks = 12 * D * D * L
    return Shape(maps, (50257 + positions) * D + blocks + 13 * D * L + 2 * D, blocks)


def shape_of(model: str | Path | Config) -> Shape:
    """The shape of a model as `count` takes it."""
    return llama_shape(Outline(model)) if isinstance(model, Config) else find_shape(str(model))


def find_shape(model: str) -> Shape:
    """The shape of a model given by a known name, a file, a folder or dimensions."""
    if model in LLAMAS:
        return llama_shape(Outline(LLAMAS[model]))
    if model in PAPER:
        return square_shape(*PAPER[model])
    if os.sep in model or os.path.exists(model):
        return llama_shape(outline_of(model))
    if "=" in model:
        return dimensions(model)
    expected = f"a file, dimensions (d=768,layers=12) or a name; {nearest(model, [*LLAMAS, *PAPER])}"
    raise ConfigError(f"model is {short(model)}; expected {expected}")


def dimensions(text: str) -> Shape:
    """The shape described by a text such as "d=4096,layers=32,heads=32,kv=8,ff=14336,vocab=128256".

    Defaults: kv is heads, head_dim is d / heads, tied is false. d and layers alone mean the square maps of
    attention. ConfigError for anything else.
    """
    sizes: dict[str, Any] = {}
    for part in text.split(","):
        key, _, value = (piece.strip() for piece in part.partition("="))
        if key not in KEYS:
            raise ConfigError(f"{short(key)} is not a dimension of a model; {nearest(key, KEYS)}")
        if key in sizes:
            raise ConfigError(f"{key} is given twice in {short(text)}; expected it once")
        number = int(value) if re.fullmatch("[0-9]{1,99}", value) else value
        sizes[key] = {"true": True, "false": False}.get(value, number)  # a wrong type is refused below
    square = sizes.keys() <= {"d", "layers"}
    needed = ("d", "layers") if square else ("d", "layers", "heads", "ff", "vocab")
    if missing := [key for key in needed if key not in sizes]:
        raise ConfigError(f"{short(text)} lacks {', '.join(missing)}; expected {', '.join(needed)}")
    if square:
        return square_shape(check_int("d", sizes["d"], 1), check_int("layers", sizes["layers"], 1))
    sizes = {"kv": sizes["heads"], "tied": False} | sizes
    return llama_shape(Outline(Config(**{KEYS[key]: value for key, value in sizes.items()})))
