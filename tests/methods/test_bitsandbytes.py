"""A folder in 4 bits: bitsandbytes' names and bytes, loaded to the bit; a bad file is refused by name."""

import json

import numpy
import pytest
from helpers import batch, same_bits, says, seeds, stored, tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from library import np
from safetensors.numpy import load_file, save_file

from minilora.backend import to_device, to_host
from minilora.compose.quantize import quantize_checkpoint
from minilora.errors import (
    FormatError,
    InputError,
    MiniloraError,
    MismatchError,
    NonFiniteError,
    StorageError,
    UnsupportedError,
)
from minilora.formats import huggingface
from minilora.formats.huggingface import checkpoint, load, save_model, weights
from minilora.formats.safetensors import CALLED, open_tensors
from minilora.lora import fuse, inject
from minilora.methods import four_bit
from minilora.methods.bitsandbytes import KINDS, blocks_of, is_four_bit, parts_of, shape_of
from minilora.methods.four_bit import BLOCKS, Scales, book, decoded, dynamic_map, encoded
from minilora.methods.lora_config import LoraConfig
from minilora.methods.quantize import quantize
from minilora.tree import digest, freeze, named_params

PATH = "model.layers.0.self_attn.q_proj.weight"


def packed(model):
    """What a 4-bit weight says beside its arrays."""
    return {
        path: (p.data.kind, p.data.block, p.shape, p.dtype)
        for path, p in named_params(model).items()
        if p.packed
    }


def quantized(seed=0, kind="nf4", block=32, double=True, **how):
    model, rng = tiny(seed, np.float32, **how)
    freeze(model)
    quantize(model, kind=kind, block=block, double=double)
    return model, rng


@pytest.fixture
def folder(tmp_path):
    """A folder in 4 bits."""
    save_model(quantized()[0], tmp_path / "base", "")
    return tmp_path / "base"


@settings(max_examples=12)
@given(seed=st.integers(0, 99), kind=st.sampled_from(KINDS), block=st.sampled_from([32, 64]),
       double=st.booleans(), tie=st.booleans(), bias=st.booleans())  # fmt: skip
def test_saving_and_loading_are_inverse_to_the_bit(seed, kind, block, double, tie, bias, tmp_path_factory):
    out = tmp_path_factory.mktemp("four")
    model, rng = quantized(seed, kind, block, double, tie_word_embeddings=tie, attention_bias=bias)
    save_model(model, out / "base", "")
    other = load(out / "base")
    assert packed(other) == packed(model)
    assert packed(other)
    assert same_bits(stored(model), stored(other))
    ids = batch(rng)[0]
    assert to_host(model(ids)[0]).tobytes() == to_host(other(ids)[0]).tobytes()
    save_model(other, out / "again", "")
    for name in ("model.safetensors", "config.json"):
        assert (out / "base" / name).read_bytes() == (out / "again" / name).read_bytes()


@settings(max_examples=60)
@given(seed=seeds, shape=st.tuples(st.integers(1, 19), st.integers(1, 31)), kind=st.sampled_from(KINDS),
       block=st.sampled_from(BLOCKS), double=st.booleans())  # fmt: skip
def test_the_parts_of_any_weight_give_it_back(seed, shape, kind, block, double):
    """An odd number of weights, and every size of blocks."""
    w = numpy.random.default_rng(seed).standard_normal(shape).astype(numpy.float32)
    blocks = encoded(to_device(w), kind, block, double)
    parts = parts_of("w", blocks)
    codes = parts.pop("w")
    assert codes.shape == (-(-w.size // 2), 1)
    state = json.loads(parts.pop(f"w.quant_state.bitsandbytes__{kind}").tobytes())
    assert shape_of("w", kind, state) == shape
    own = blocks_of("w", state, codes, {k.removeprefix("w."): a for k, a in parts.items()}, np.float32)
    assert same_bits(*({str(i): to_host(a) for i, a in enumerate(b.arrays)} for b in (blocks, own)))
    assert (own.shape, own.dtype, own.kind, own.block) == (shape, w.dtype, kind, block)
    for a in own.arrays:
        if isinstance(a, numpy.ndarray):
            with pytest.raises(ValueError, match="read-only"):
                a[...] = 0
    assert not double or own.absmax.values is blocks.absmax.values  # 1 kB once, not for each weight


def test_a_folder_in_shards_is_the_same_model(folder):
    """Parts of one weight may lie in several files."""
    expected, tensors = stored(load(folder)), load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    files = {name: f"model-0000{i % 3 + 1}-of-00003.safetensors" for i, name in enumerate(sorted(tensors))}
    for file in set(files.values()):
        save_file({k: a for k, a in tensors.items() if files[k] == file}, folder / file, {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    assert same_bits(stored(load(folder)), expected)


def test_renamed_a_weight_is_still_in_4_bits(folder):
    tensors = checkpoint(folder).tensors
    other = tensors.renamed({f"x.{name}": name for name in tensors})
    assert other.packed.keys() == {f"x.{name}" for name in tensors.packed}
    assert PATH in tensors.packed
    blocks = other.packed[f"x.{PATH}"](np.float32)
    assert to_host(decoded(blocks)).tobytes() == other[f"x.{PATH}"].tobytes() == tensors[PATH].tobytes()


def test_maps_that_were_fused_are_named_in_the_config(tmp_path):
    """So transformers leaves them dense."""
    model, rng = quantized()
    inject(model, LoraConfig(r=2, targets=["q_proj"], init="both"), rng=rng)
    fuse(model)
    save_model(model, tmp_path / "base", "")
    config = json.loads((tmp_path / "base/config.json").read_text())["quantization_config"]
    skipped = [f"model.layers.{i}.self_attn.q_proj" for i in range(model.config.num_hidden_layers)]
    assert config["llm_int8_skip_modules"] == ["lm_head", *skipped]
    assert same_bits(stored(load(tmp_path / "base")), stored(model))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
def test_what_is_not_quantized_keeps_the_bases_dtype(dtype, tmp_path):
    """Quantizing writes it, and so does merging afterwards, although the largest tensor is in 4 bits."""
    model, _ = tiny(0, np.float64, intermediate_size=64)
    freeze(model)
    save_model(model, tmp_path / "in", "", dtype=dtype)
    quantize_checkpoint(tmp_path / "in", tmp_path / "out")
    tensors = checkpoint(tmp_path / "out")
    plain = {kind for name, kind in tensors.tensors.dtypes.items() if name not in tensors.tensors.packed}
    assert plain == {CALLED[dtype]}
    assert tensors.dtype == dtype == json.loads((tmp_path / "out/config.json").read_text())["torch_dtype"]
    again = load(tmp_path / "in", np.float64)
    quantize(again)
    assert digest(again) == digest(load(tmp_path / "out", np.float64))


def test_a_scale_that_is_too_large_for_the_asked_dtype_is_refused(folder):
    tensors = load_file(folder / "model.safetensors")
    state(nested_offset=70000.0)(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    source = checkpoint(folder).tensors.packed[PATH]
    assert source(np.float32).dtype == np.float32
    with pytest.raises(NonFiniteError, match=f"{PATH}: the scales are not finite in float16"):
        source(np.float16)


@pytest.mark.parametrize("how", [{"kind": ["nf4"]}, {"kind": None}, {"block": 48}, {"block": "64"}])
def test_kind_and_block_are_looked_at_before_the_base_is_read(how, tmp_path):
    with pytest.raises(InputError, match=next(iter(how))):
        quantize_checkpoint(tmp_path / "missing", tmp_path / "out", **how)


def test_the_tensors_are_bitsandbytes_own(folder):
    tensors = load_file(folder / "model.safetensors")  # the package safetensors
    parts = {name.removeprefix(PATH): a for name, a in tensors.items() if name.startswith(PATH)}
    state = json.loads(parts.pop(".quant_state.bitsandbytes__nf4").tobytes())
    offset = state.pop("nested_offset")
    assert state == {"quant_type": "nf4", "blocksize": 32, "dtype": "float32", "shape": [24, 10],
                     "nested_blocksize": 256, "nested_dtype": "float32"}  # fmt: skip
    assert {name: (a.dtype.name, a.shape) for name, a in parts.items()} == {
        "": ("uint8", (120, 1)), ".absmax": ("uint8", (8,)), ".quant_map": ("float32", (16,)),
        ".nested_absmax": ("float32", (1,)), ".nested_quant_map": ("float32", (256,)),
    }  # fmt: skip
    assert parts[".quant_map"].tobytes() == book("nf4").tobytes()
    assert parts[".nested_quant_map"].tobytes() == dynamic_map().tobytes()
    p = named_params(quantized()[0])[PATH].data
    assert isinstance(p.absmax, Scales)
    assert offset == float(to_host(p.absmax.offset))
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert is_four_bit(config)
    assert (config["bnb_4bit_quant_type"], config["bnb_4bit_use_double_quant"]) == ("nf4", True)
    plain = {name for name in tensors if "_proj" not in name}
    assert plain == {name for name in named_params(quantized()[0]) if "_proj" not in name}


def test_loading_never_forms_the_float_model(folder, monkeypatch):
    monkeypatch.setattr(four_bit, "decoded", lambda blocks: pytest.fail("decoded"))
    monkeypatch.setattr(huggingface, "decoded", lambda blocks: pytest.fail("decoded"))
    model = load(folder)
    assert all(p.packed for path, p in named_params(model).items() if "_proj" in path)


def test_read_as_a_checkpoint_of_any_kind_a_weight_is_decoded(folder):
    model = load(folder)
    tensors = weights(folder)
    for path, p in named_params(model).items():
        assert tensors[path].tobytes() == to_host(p.dense()).tobytes()
        assert tensors.shapes[path] == p.shape
    assert checkpoint(folder).tensors.dtypes[PATH] == "NF4"
    assert weights(folder / "model.safetensors")[PATH].tobytes() == tensors[PATH].tobytes()
    wide = load(folder, np.float64)
    assert (
        to_host(named_params(wide)[PATH].dense()).astype(numpy.float32).tobytes() == tensors[PATH].tobytes()
    )
    assert named_params(wide)[PATH].dtype == np.float64


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_another_dtype_is_for_the_weights_that_are_not_in_4_bits(dtype, tmp_path):
    model, _ = quantized()
    save_model(model, tmp_path / "base", "", dtype=dtype)
    other = load(tmp_path / "base")
    one, two = ({k: v for k, v in stored(m).items() if "_proj" in k} for m in (model, other))
    assert same_bits(one, two)
    assert digest(model) != digest(other)


@pytest.mark.parametrize("double", [True, False])
def test_the_command_writes_what_quantizing_in_memory_gives(double, tmp_path):
    model, _ = tiny(0, np.float32)
    freeze(model)
    save_model(model, tmp_path / "in", "", {"eos_token_id": 3}, beside={"tokenizer_config.json": b"{}"})
    report = quantize_checkpoint(tmp_path / "in", tmp_path / "out", kind="fp4", block=64, double=double)
    expected = quantize(model, kind="fp4", block=64, double=double)
    assert report.rows == expected.rows
    assert same_bits(stored(load(tmp_path / "out")), stored(model))
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["eos_token_id"] == 3
    assert (tmp_path / "out/tokenizer_config.json").read_bytes() == b"{}"
    assert str(report).splitlines()[-1].startswith(f"{tmp_path}/out: fp4 in blocks of 64")
    with pytest.raises(StorageError):
        quantize_checkpoint(tmp_path / "in", tmp_path / "out")
    quantize_checkpoint(tmp_path / "in", tmp_path / "out", overwrite=True)
    assert packed(load(tmp_path / "out"))[PATH][0] == "nf4"
    with pytest.raises(MiniloraError, match="quantized already"):
        quantize_checkpoint(tmp_path / "out", tmp_path / "again")
    with pytest.raises(InputError, match="nearest: 'nf4'"):
        quantize_checkpoint(tmp_path / "in", tmp_path / "again", kind="int4")
    with pytest.raises(InputError, match="is the input"):
        quantize_checkpoint(tmp_path / "in", tmp_path / "in", overwrite=True)
    assert not (tmp_path / "again").exists()


def test_a_files_own_map_is_kept_to_the_bit(folder, tmp_path):
    """Another machine rounds its last bit otherwise."""
    tensors = load_file(folder / "model.safetensors")
    name = f"{PATH}.nested_quant_map"
    tensors[name] = numpy.nextafter(tensors[name], numpy.float32(2))
    tensors[name][tensors[name] < 1e-9] = dynamic_map()[tensors[name] < 1e-9]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    model = load(folder)
    scales = named_params(model)[PATH].data.absmax
    assert to_host(scales.values).tobytes() == tensors[name].tobytes()
    save_model(model, tmp_path / "again", "")
    again = load_file(tmp_path / "again/model.safetensors")
    assert again.keys() == tensors.keys()
    assert all(again[key].tobytes() == a.tobytes() for key, a in tensors.items())


def test_int4_has_no_form_in_files_and_nothing_is_written(tmp_path):
    model, _ = quantized(kind="int4")
    with pytest.raises(UnsupportedError, match=f"{PATH} is int4; expected nf4 or fp4"):
        save_model(model, tmp_path / "base", "")
    assert not list(tmp_path.iterdir())


def state(**changes):
    def change(tensors):
        name = f"{PATH}.quant_state.bitsandbytes__nf4"
        was = json.loads(tensors[name].tobytes()) | changes
        was = {k: v for k, v in was.items() if v is not ...}
        tensors[name] = numpy.frombuffer(json.dumps(was).encode(), numpy.uint8).copy()

    return change


def part(suffix, make):
    def change(tensors):
        name = f"{PATH}{suffix}"
        tensors[name] = make(tensors[name])

    return change


def overflowing(tensors):
    part(".nested_absmax", filled(3e38))(tensors)
    part(".absmax", filled(255))(tensors)
    state(nested_offset=3e38)(tensors)


def without(suffix):
    return lambda tensors: tensors.pop(f"{PATH}{suffix}")


def filled(value):
    return lambda a: numpy.full_like(a, value)


def renamed(tensors):
    tensors[f"{PATH}.quant_state.bitsandbytes__nf5"] = tensors.pop(f"{PATH}.quant_state.bitsandbytes__nf4")


def raw(content):
    return part(".quant_state.bitsandbytes__nf4", lambda a: numpy.frombuffer(content, numpy.uint8).copy())


BAD = {
    "few codes": (part("", lambda a: a[:-1]), FormatError, "codes is uint8 .119,.; expected uint8 .120,."),
    "many codes": (part("", lambda a: numpy.vstack([a, a])), FormatError, "codes"),
    "codes in float": (part("", lambda a: a.astype(numpy.float32)), FormatError, "dtype is F32; expected U8"),
    "no codes": (without(""), FormatError, "is missing; its quant_state is there"),
    "no absmax": (without(".absmax"), FormatError, "absmax is missing"),
    "no map": (without(".quant_map"), FormatError, "quant_map is missing"),
    "no nested map": (without(".nested_quant_map"), FormatError, "nested_quant_map is missing"),
    "absmax short": (part(".absmax", lambda a: a[:-1]), FormatError, "absmax is uint8 .7,."),
    "absmax in float": (part(".absmax", lambda a: a.astype(numpy.float32)), FormatError, "absmax is float32"),
    "scales NaN": (part(".nested_absmax", filled(numpy.nan)), NonFiniteError, "the scales are not finite"),
    "scales inf": (part(".nested_absmax", filled(numpy.inf)), NonFiniteError, "the scales are not finite"),
    "scales overflow": (overflowing, NonFiniteError, "the scales are not finite"),
    "offset too large": (state(nested_offset=1e39), FormatError, "nested_offset is 1e.39"),
    "scale below 0": (part(".nested_absmax", filled(-1)), FormatError, "a scale is -1; expected at least 0"),
    "other values": (part(".quant_map", lambda a: a[::-1].copy()), FormatError, "quant_map has other values"),
    "8-bit values": (part(".nested_quant_map", lambda a: a / 2), FormatError, "nested_quant_map has other"),
    "state not JSON": (raw(b"nf4"), FormatError, "quant_state is not a JSON object"),
    "state twice": (raw(b'{"shape": [24, 10], "shape": [24, 10]}'), FormatError, "given twice"),
    "state nested": (raw(b"[" * 4000), FormatError, "quant_state is not a JSON object"),
    "state long": (raw(b" " * 5000), FormatError, "quant_state is too long"),
    "state with more": (state(evil=1), FormatError, "the state has 'evil'"),
    "state with less": (state(blocksize=...), FormatError, "the state lacks 'blocksize'"),
    "another type": (state(quant_type="fp4"), FormatError, "quant_type is 'fp4'; expected nf4"),
    "unknown type": (renamed, FormatError, "quant_type is 'nf4'; expected nf5"),
    "block size odd": (state(blocksize=33), FormatError, "blocksize is 33"),
    "block size 0": (state(blocksize=0), FormatError, "blocksize is 0"),
    "block size true": (state(blocksize=True), FormatError, "blocksize is True"),
    "block size another": (state(blocksize=64), FormatError, "absmax is uint8"),
    "shape flat": (state(shape=[240]), FormatError, "shape is .240."),
    "shape turned": (state(shape=[10, 24]), MismatchError, "has shape .10, 24.; expected .24, 10."),
    "shape huge": (state(shape=[1 << 40, 1 << 40]), FormatError, "expected two ints"),
    "shape large": (state(shape=[1 << 29, 1 << 29]), MismatchError, "has shape"),
    "shape negative": (state(shape=[-24, -10]), FormatError, "expected two ints"),
    "shape of floats": (state(shape=[24.0, 10.0]), FormatError, "expected two ints"),
    "offset NaN": (state(nested_offset=float("nan")), FormatError, "nested_offset is nan"),
    "offset text": (state(nested_offset="1"), FormatError, "nested_offset is '1'"),
    "nested block": (state(nested_blocksize=64), FormatError, "nested_blocksize is 64"),
    "dtype unknown": (state(dtype="complex64"), FormatError, "dtype is 'complex64'"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_refused_by_name(name, folder):
    change, error, match = BAD[name]
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(error, match=match) as e:
        load(folder)
    says(e.value, folder)
    assert PATH in str(e.value)


@pytest.mark.parametrize(("value", "error", "says"), [
    (numpy.nan, NonFiniteError, "not finite"), (numpy.inf, NonFiniteError, "not finite"),
    (-1, FormatError, "at least 0"),
])  # fmt: skip
def test_a_bad_scale_in_float32_is_refused(value, error, says, tmp_path):
    save_model(quantized(double=False)[0], tmp_path / "base", "")
    tensors = load_file(tmp_path / "base/model.safetensors")
    tensors[f"{PATH}.absmax"][-1] = value
    save_file(tensors, tmp_path / "base/model.safetensors", {"format": "pt"})
    with pytest.raises(error, match=f"{PATH}: .*{says}"):
        load(tmp_path / "base")


@pytest.mark.parametrize("config", [
    {"quant_method": "gptq", "bits": 4}, {"quant_method": "bitsandbytes", "load_in_8bit": True},
    {"quant_method": "bitsandbytes", "load_in_4bit": "yes"}, "nf4", 4,
])  # fmt: skip
def test_another_quantization_is_refused_by_its_config(config, folder):
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"quantization_config": config}))
    with pytest.raises(UnsupportedError, match="quantization_config is"):
        load(folder)


def test_a_model_with_adapters_is_not_saved(tmp_path):
    model, rng = quantized()
    inject(model, LoraConfig(r=2), rng=rng)
    with pytest.raises(MiniloraError, match="fuse"):
        save_model(model, tmp_path / "base", "")


def test_floats_cannot_be_read_as_bytes_nor_bytes_as_floats(folder):
    tensors = open_tensors(folder / "model.safetensors")
    with pytest.raises(FormatError, match="dtype is F32; expected U8"):
        tensors.bytes_of("model.norm.weight")
    with pytest.raises(UnsupportedError, match="dtype is U8"):
        tensors[PATH]
    assert tensors.bytes_of(PATH).shape == (120, 1)
