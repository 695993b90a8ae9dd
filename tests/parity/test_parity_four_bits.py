"""Agreement with bitsandbytes and transformers on 4-bit weights, where they are installed."""

import json

import numpy as np
import pytest
from test_parity import TIED, UNTIED, batch, fresh

from minilora.compose.quantize import quantize_checkpoint
from minilora.formats.huggingface import load, save_model
from minilora.lora import fuse, inject
from minilora.methods.four_bit import SCALES, U, book, decoded, dynamic_map, encoded, middles, steps
from minilora.methods.lora_config import LoraConfig
from minilora.methods.quantize import quantize
from minilora.tree import freeze, named_params

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
bitsandbytes = pytest.importorskip("bitsandbytes")
functional = bitsandbytes.functional

pytestmark = pytest.mark.parity
SHAPES = ((96, 96), (352, 128), (24, 34))


@pytest.fixture(autouse=True)
def no_packed_kernel(monkeypatch):
    """Where a processor has AVX512-BF16, bitsandbytes packs rows by 32, which these tiny maps do not have."""
    monkeypatch.setattr(bitsandbytes.nn.modules, "has_avx512bf16", lambda: False)


def theirs(w, kind, block, double):
    """Their codes (bytes), and their state."""
    codes, state = functional.quantize_4bit(
        torch.from_numpy(w), blocksize=block, quant_type=kind, compress_statistics=double
    )
    return codes.numpy().reshape(-1), state


def unpack(codes, n):
    return np.stack([codes >> 4, codes & 15], 1).reshape(-1)[:n]


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_the_values_are_theirs_to_the_bit(kind):
    assert book(kind).tobytes() == functional.get_4bit_type(kind, device="cpu").numpy().tobytes()
    assert dynamic_map().tobytes() == functional.create_dynamic_map().numpy().tobytes()


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("block", [64, 128, 4096])
@pytest.mark.parametrize("shape", SHAPES)
def test_codes_and_scales_are_theirs(kind, block, shape):
    """A code differs only where w / c is within rounding of a middle: they multiply by 1 / c."""
    w = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    ours, (codes, state) = encoded(w, kind, block, double=False), theirs(w, kind, block, False)
    assert ours.absmax.tobytes() == state.absmax.numpy().tobytes()
    a, b = (book(kind)[unpack(packed, w.size)] for packed in (ours.codes, codes))  # fp4 has two codes for 0
    x = w.reshape(-1) / np.repeat(ours.absmax, block)[: w.size]
    near = (abs(x[:, None] - steps(kind)[0]) <= 4 * U).any(1)
    differ = a != b
    print(f"{kind} {block} {shape}: {differ.sum()} of {w.size} codes differ, {near.sum()} are near a middle")
    assert not (differ & ~near).any()


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_decoding_is_theirs_to_the_bit(kind):
    w = np.random.default_rng(1).standard_normal((96, 128)).astype(np.float32)
    codes, state = theirs(w, kind, 64, False)
    ours = encoded(w, kind, 64, double=False)
    object.__setattr__(ours, "codes", codes)
    own = functional.dequantize_4bit(torch.from_numpy(codes).reshape(-1, 1), state)
    assert np.array_equal(decoded(ours), own.numpy())  # their second zero of fp4 is -0


@pytest.mark.parametrize("shape", SHAPES)
def test_scales_in_8_bits_are_theirs(shape):
    """The mean is summed in another order; apart from that, scales differ only beside a middle of the map."""
    w = np.random.default_rng(2).standard_normal(shape).astype(np.float32)
    ours = encoded(w, "nf4", 64, double=True).absmax
    _, state = theirs(w, "nf4", 64, True)
    offset = float(state.offset)
    assert abs(float(ours.offset) - offset) <= 32 * U * offset  # two orders of a sum of positive numbers
    assert abs(ours.absmax - state.state2.absmax.numpy()).max() <= 64 * U * offset
    their_codes, top = state.absmax.numpy(), state.state2.absmax.numpy().repeat(SCALES)[: len(ours.codes)]
    differ = ours.codes != their_codes
    print(f"{shape}: {differ.sum()} of {len(differ)} scales differ")
    assert abs(ours.codes.astype(int) - their_codes.astype(int)).max() <= 1
    c, between = encoded(w, "nf4", 64, double=False).absmax, middles(dynamic_map())
    x = (c - np.float32(offset)) / top  # moved by the errors of the offset and of the largest
    moved = (32 * U + 64 * U) * offset / top + 4 * U
    near = (abs(x[:, None] - between) <= moved[:, None]).any(1)
    assert not (differ & ~near).any()
    assert len(ours.absmax) == -(-len(ours.codes) // SCALES)


def agree(other, folder, rng):
    """Their logits are at most 64 times as far from those in float64, of the same weights, as ours."""
    ids = batch(rng)[0]
    with torch.no_grad():
        theirs = other(torch.from_numpy(ids)).logits.numpy()
    ours, exact = (load(folder, dtype)(ids)[0] for dtype in (np.float32, np.float64))
    rounding = max(abs(ours - exact).max(), U * abs(exact).max())
    assert 0 < abs(theirs - exact).max() <= 64 * rounding


@pytest.mark.parametrize("config", [TIED, UNTIED], ids=["tied", "untied"])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [True, False])
def test_transformers_loads_our_folder_with_the_same_logits(config, kind, double, tmp_path):
    model, rng = fresh(config, np.float32)
    freeze(model)
    quantize(model, kind=kind, double=double)
    save_model(model, tmp_path / "ours", "")
    other = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", device_map="cpu", dtype=torch.float32
    )
    found = {name: p for name, p in other.named_parameters() if isinstance(p, bitsandbytes.nn.Params4bit)}
    params = named_params(model)
    assert sorted(found) == sorted(path for path, p in params.items() if p.packed)
    for path, p in found.items():
        own = functional.dequantize_4bit(p.data, p.quant_state).numpy()
        assert own.tobytes() == params[path].dense().tobytes(), path
    agree(other, tmp_path / "ours", rng)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_transformers_leaves_fused_maps_dense_and_reads_what_a_command_wrote(dtype, tmp_path):
    model, rng = fresh(TIED, np.float32)
    save_model(model, tmp_path / "in", "", dtype=dtype)
    quantize_checkpoint(tmp_path / "in", tmp_path / "four")
    model = load(tmp_path / "four")
    inject(model, LoraConfig(r=2, targets=["q_proj"], init="both"), rng=rng)
    fuse(model)
    save_model(model, tmp_path / "fused", "")
    for name in ("four", "fused"):
        other = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / name, device_map="cpu", dtype=torch.float32
        )
        found = {k for k, p in other.named_parameters() if isinstance(p, bitsandbytes.nn.Params4bit)}
        assert found == {path for path, p in named_params(load(tmp_path / name)).items() if p.packed}
        if dtype == "float32":  # else they compute in bfloat16
            agree(other, tmp_path / name, rng)


def test_their_folder_loads_here(tmp_path):
    model, rng = fresh(TIED, np.float32)
    save_model(model, tmp_path / "float", "")
    how = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )  # fmt: skip
    other = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "float", quantization_config=how, device_map="cpu", dtype=torch.float32
    )
    other.save_pretrained(tmp_path / "theirs")
    config = json.loads((tmp_path / "theirs/config.json").read_text())
    assert config["quantization_config"]["load_in_4bit"] is True
    ours = load(tmp_path / "theirs")
    for name, p in other.named_parameters():
        if isinstance(p, bitsandbytes.nn.Params4bit):
            own = functional.dequantize_4bit(p.data, p.quant_state).numpy()
            assert own.tobytes() == named_params(ours)[name].dense().tobytes()
    agree(other, tmp_path / "theirs", rng)
