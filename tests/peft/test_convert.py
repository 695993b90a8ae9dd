"""Another tool's form of a LoRA has the same ΔW, by readings that are not ours, or is refused by name."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from by_hand import write_peft
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import minilora as ml
from minilora.errors import ConfigError, InputError, MismatchError, StorageError, UnsupportedError
from minilora.formats.gguf import half_split, neighbours
from minilora.formats.safetensors import open_tensors
from minilora.lora_files.contents import Entry
from minilora.lora_files.names import dotted, flattened, of_sgm, path_of, to_sgm
from minilora.peft.convert import FORMS, convert
from minilora.peft.language_forms import gguf_bytes

ROOT = Path(__file__).parents[1] / "fixtures/lora_files"
UNIT = 2.0**-24
FILE = {"kohya": ".safetensors", "diffusers": ".safetensors", "gguf": ".gguf"}
LLAMA = {"model_type": "llama", "num_attention_heads": 4, "num_key_value_heads": 2}
HEADS = (4, 2)
SOURCES = {  # of every shape that a form has to hold
    "peft/plain": FORMS, "peft/rslora_patterns": FORMS, "peft/qwen2": FORMS,
    "peft/dora": ("peft", "kohya", "diffusers", "mlx"), "peft/embed_lmhead": ("peft", "mlx", "gguf"),
    "peft/conv2d": ("peft", "kohya", "diffusers"), "peft/conv2d_dora": ("peft", "kohya", "diffusers"),
    "kohya_lycoris/locon_tucker_mid": ("peft", "kohya", "diffusers"),
    "kohya_lycoris/rs_lora": ("peft", "kohya", "diffusers"),
    "kohya_sdscripts/fp8_e4m3": ("peft", "kohya", "diffusers"),
    "kohya_sdscripts/sd15_conv": ("peft", "kohya", "diffusers"),
    "kohya_sdxl/sdxl_sgm_names": ("peft", "kohya"), "kohya_sdscripts/sdxl_te1_te2": ("peft", "diffusers"),
    "kohya_flux/flux_bfl_names": ("peft", "kohya", "diffusers"),
    "kohya_flux/converted_to_ai_toolkit": ("peft", "kohya", "diffusers"),
    "diffusers/flux_transformer": ("peft", "kohya", "diffusers"),
    "diffusers/sd15_dreambooth_script": ("peft", "kohya", "diffusers"),
    "diffusers/unet_only_save_lora_adapter": ("peft", "kohya", "diffusers"),
    "synthetic_names/xlabs_flux": ("peft", "kohya", "diffusers"),
    "mlx/lora_keys_last_layer": FORMS, "mlx/dora": ("peft", "mlx"),
    "gguf/embed_gguf": ("peft", "mlx", "gguf"),
}  # fmt: skip


def source(name):
    return next((ROOT / name).glob("*.f32.gguf"), ROOT / name)


def base(folder):
    (folder / "base").mkdir()
    (folder / "base/config.json").write_text(json.dumps(LLAMA))
    return folder / "base"


def factors(adapter, module):
    """A and s B of a module in float64."""
    A, B = (x.astype(np.float64) for x in adapter.factors(module))
    return A, adapter.pairs[module].scale * B


@pytest.mark.parametrize(
    ("name", "form"), [(name, form) for name, forms in SOURCES.items() for form in forms]
)
def test_what_is_written_reads_as_the_same_change(name, form, tmp_path):
    """One rounding of s B in float32, and one of A where it is a product; else to the bit."""
    out = tmp_path / f"out{FILE.get(form, '')}"
    told = convert(source(name), out, form, base=base(tmp_path))
    old = ml.open_adapter(source(name), heads=HEADS)
    new = ml.open_adapter(out, heads=HEADS)
    assert told.modules == len(new.pairs)
    assert told.difference <= 2 * UNIT * told.norm * 4
    if old.pairs.keys() != new.pairs.keys():
        return  # other names or parts: the laws of names and of Flux, below
    for module, pair in old.pairs.items():
        (A, B), (A2, B2) = factors(old, module), factors(new, module)
        size = abs(B) @ abs(A)
        assert (abs(B @ A - B2 @ A2) <= 3 * UNIT * size).all(), module
        for one, other in zip(
            sorted(pair.vectors.items()), sorted(new.pairs[module].vectors.items()), strict=True
        ):
            assert one[0] == other[0]
            assert np.array_equal(old.value(one[1]).ravel(), new.value(other[1]).ravel())


def independent(path, form):
    """Name -> ΔW of a file, by the formulas of its format and another reader of its container."""
    if form == "mlx":
        held = load_file(path / "adapters.safetensors")
        scale = json.loads((path / "adapter_config.json").read_text())["lora_parameters"]["scale"]
        return {n[:-7]: scale * (held[n] @ held[n[:-1] + "b"]).T for n in held if n.endswith(".lora_a")}
    held = load_file(path)
    if form == "kohya":
        return {
            n[:-6]: float(held[n]) / len(down) * up.reshape(len(up), -1) @ down.reshape(len(down), -1)
            for n in held if n.endswith(".alpha")
            for down, up in [(held[f"{n[:-6]}.lora_down.weight"], held[f"{n[:-6]}.lora_up.weight"])]
        }  # fmt: skip
    return {
        n[:-14]: held[n[:-13] + "lora_B.weight"].reshape(-1, len(held[n])) @ held[n].reshape(len(held[n]), -1)
        for n in held if n.endswith("lora_A.weight")
    }  # fmt: skip


@pytest.mark.parametrize("form", ["kohya", "diffusers", "mlx"])
@pytest.mark.parametrize(
    "name", ["peft/rslora_patterns", "kohya_sdscripts/sd15_conv", "diffusers/sd15_with_metadata"]
)
def test_the_formulas_of_the_form_give_the_change(name, form, tmp_path):
    if form == "mlx" and name != "peft/rslora_patterns":
        with pytest.raises(UnsupportedError, match="is a convolution"):
            convert(source(name), tmp_path / "out", form)
        return
    out = tmp_path / f"out{FILE.get(form, '')}"
    convert(source(name), out, form)
    old, found = ml.open_adapter(source(name)), independent(out, form)
    names = {flattened(m) if form == "kohya" else m: m for m in old.pairs}
    assert names.keys() == found.keys()
    for name_there, module in names.items():
        A, B = factors(old, module)
        bound = (len(A) + 6) * UNIT * (abs(B) @ abs(A))
        assert (abs(found[name_there].astype(np.float64).reshape(bound.shape) - B @ A) <= bound).all(), module


def test_one_module_of_each_dtype_keeps_it_where_nothing_is_folded(tmp_path):
    for name in ("kohya_sdscripts/sd15_linear", "kohya_flux/flux_bfl_names", "kohya_sdscripts/sd15_conv"):
        out = tmp_path / f"{Path(name).name}.safetensors"
        convert(source(name), out, "kohya")
        (path,) = (ROOT / name).glob("*.safetensors")
        old, new = open_tensors(path), open_tensors(out)
        assert old.keys() == new.keys()
        for key in old:
            assert np.array_equal(old[key], new[key])
            assert key.endswith(".alpha") or old.dtypes[key] == new.dtypes[key]


def test_strings_of_the_header_stay_and_sizes_are_told_anew(tmp_path):
    convert(source("kohya_sdscripts/sd15_conv"), tmp_path / "a.safetensors", "diffusers")
    convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "kohya")
    (path,) = (ROOT / "kohya_sdscripts/sd15_conv").glob("*.safetensors")
    old, new = open_tensors(path).metadata, open_tensors(tmp_path / "b.safetensors").metadata
    about = {"ss_network_module", "ss_network_dim", "ss_network_alpha", "ss_network_args"}
    about |= {"sshs_model_hash", "sshs_legacy_hash"}  # of the file's own bytes
    assert json.loads(old["ss_network_args"]) == {"conv_dim": "4", "conv_alpha": "1.0"}
    assert json.loads(new["ss_network_args"]) == {"conv_dim": "4"}  # diffusers has no alpha; r stayed
    assert not new.keys() & {"sshs_model_hash", "sshs_legacy_hash"}
    assert {k: v for k, v in old.items() if k not in about} == {
        k: v for k, v in new.items() if k not in about
    }
    assert (
        new["ss_network_dim"] == new["ss_network_alpha"] == "Dynamic"
    )  # linear maps and convolutions differ


SIZES = {"ss_network_dim": "4", "ss_network_alpha": "2", "lora_rank": "4", "network_alpha": "2"}


@pytest.mark.parametrize("form", ["peft", "kohya", "diffusers", "mlx"])
@pytest.mark.parametrize("alpha", [2.0, 4.0])
def test_what_a_header_says_of_sizes_is_true_of_what_is_written(form, alpha, tmp_path):
    """So network_alpha, which is the alpha of a file without alphas, scales nothing twice."""
    rng, header = np.random.default_rng(0), SIZES | {name: f"{alpha:g}" for name in SIZES if "alpha" in name}
    tensors = {f"model.layers.{i}.x.lora_{half}.weight": rng.standard_normal(shape).astype(np.float32)
               for i in range(2) for half, shape in (("A", (4, 6)), ("B", (5, 4)))}  # fmt: skip
    save_file(tensors, tmp_path / "a.safetensors", header | {"ss_comment": "mine"})
    out = tmp_path / f"b{FILE.get(form, '')}"
    told = convert(tmp_path / "a.safetensors", out, form)
    assert told.difference == 0
    file = out if out.is_file() else next(out.glob("*.safetensors"))
    new = open_tensors(file).metadata
    assert new["ss_comment"] == "mine"
    sizes = {(p.r, p.scale * p.r) for p in ml.open_adapter(out).pairs.values()}
    assert sizes == {(4, 4.0 if form == "diffusers" else alpha)}
    for name in new.keys() & SIZES.keys():
        assert float(new[name]) == (alpha if "alpha" in name else 4)
    stay = alpha == 4 or form != "diffusers"
    assert new.keys() & SIZES.keys() == {name for name in SIZES if stay or "alpha" not in name}


@pytest.mark.parametrize(("own", "given"), [(8.0, None), (None, 8.0)])
@pytest.mark.parametrize("name", ["alpha", "lora_alpha", "network_alpha"])
def test_an_alpha_of_the_header_that_did_not_count_goes(own, given, name, tmp_path):
    """The modules' own alpha counts before it, and so does one that is given."""
    down, up = np.ones((8, 3), np.float32), np.ones((2, 8), np.float32)
    alpha = {"x.alpha": np.array(own, np.float32)} if own else {}
    tensors = {"x.lora_down.weight": down, "x.lora_up.weight": up} | alpha
    save_file(tensors, tmp_path / "a.safetensors", {name: "4"})
    for form in ("diffusers", "kohya"):
        out = tmp_path / f"{form}{FILE.get(form, '')}"
        assert convert(tmp_path / "a.safetensors", out, form, alpha=given).difference == 0
        assert name not in open_tensors(out if out.is_file() else next(out.glob("*.safetensors"))).metadata


def test_a_string_that_no_file_can_hold_is_replaced(tmp_path):
    """A lone surrogate, as an escape in the header's JSON."""
    down, up = np.ones((1, 3), np.float32), np.ones((2, 1), np.float32)
    tensors = {"x.lora_down.weight": down, "x.lora_up.weight": up}
    save_file(tensors, tmp_path / "a.safetensors", {"ss_x": "a@@@@@@b"})
    raw = (tmp_path / "a.safetensors").read_bytes()
    (tmp_path / "a.safetensors").write_bytes(raw.replace(b"@@@@@@", rb"\ud800"))
    for out in (tmp_path / "b.safetensors", tmp_path / "c"):
        convert(tmp_path / "a.safetensors", out, "kohya" if out.suffix else "peft")
    assert open_tensors(tmp_path / "b.safetensors").metadata["ss_x"] == "a?b"
    assert safe_open(tmp_path / "b.safetensors", "np").metadata()["ss_x"] == "a?b"


def test_flux_is_split_and_fused_again(tmp_path):
    """kohya's own converter splits the same way, and what was split is fused to the same bits."""
    one = ROOT / "kohya_flux/flux_bfl_names"
    convert(one, tmp_path / "split.safetensors", "diffusers")
    split = ml.open_adapter(tmp_path / "split.safetensors")
    theirs = ml.open_adapter(ROOT / "kohya_flux/converted_to_ai_toolkit")
    for module in theirs.pairs:
        (A, B), (A2, B2) = factors(split, module), factors(theirs, module)
        assert (abs(B @ A - B2 @ A2) <= 4 * UNIT * (abs(B) @ abs(A))).all(), module
    convert(tmp_path / "split.safetensors", tmp_path / "fused.safetensors", "kohya")
    old, new = ml.open_adapter(one), ml.open_adapter(tmp_path / "fused.safetensors")
    assert old.pairs.keys() == new.pairs.keys()
    for module in old.pairs:
        (A, B), (A2, B2) = factors(old, module), factors(new, module)
        assert np.array_equal(A, A2), module
        assert np.array_equal(B, B2), module


def test_parts_that_differ_are_fused_block_by_block(tmp_path):
    """Some of q, k, v alone: the rows of the others are zeros."""
    rng = np.random.default_rng(0)
    at = "transformer.single_transformer_blocks.0."
    parts = {f"{at}attn.to_q": (2, 8), f"{at}proj_mlp": (3, 32)}
    drawn = {m: (rng.normal(size=(r, 8)), rng.normal(size=(rows, r))) for m, (r, rows) in parts.items()}
    write_peft(tmp_path / "a", drawn)
    convert(tmp_path / "a", tmp_path / "b.safetensors", "kohya")
    adapter = ml.open_adapter(tmp_path / "b.safetensors")
    assert list(adapter.pairs) == ["transformer.single_blocks.0.linear1"]
    A, B = factors(adapter, "transformer.single_blocks.0.linear1")
    old = ml.open_adapter(tmp_path / "a")
    (A1, B1), (A2, B2) = (factors(old, m) for m in parts)
    want = np.vstack([B1 @ A1, np.zeros((16, 8)), B2 @ A2])
    assert A.shape == (5, 8)
    assert (abs(B @ A - want) <= 4 * UNIT * (abs(B) @ abs(A))).all()


def test_shift_and_scale_change_places_between_flux_and_diffusers(tmp_path):
    rng = np.random.default_rng(0)
    ours, theirs = "transformer.final_layer.adaLN_modulation.1", "transformer.norm_out.linear"
    block = "transformer.single_transformer_blocks.0.attn.to_q"
    drawn = {m: (rng.normal(size=(2, 4)), rng.normal(size=(n, 2))) for m, n in ((theirs, 8), (block, 4))}
    write_peft(tmp_path / "a", drawn, lora_alpha=2)
    convert(tmp_path / "a", tmp_path / "b.safetensors", "kohya")
    convert(tmp_path / "b.safetensors", tmp_path / "c.safetensors", "diffusers")
    bfl, again = (ml.open_adapter(tmp_path / f"{name}.safetensors") for name in "bc")
    B = drawn[theirs][1]
    assert np.array_equal(factors(bfl, ours)[1], np.concatenate([B[4:], B[:4]]))
    assert np.array_equal(factors(again, theirs)[1], B)


def test_halves_are_not_scaled_in_their_own_dtype(tmp_path):
    """Half of the smallest float16 is no float16."""
    least = np.full((2, 1), 2.0**-24, np.float16)
    tensors = {"x.lora_down.weight": np.ones((1, 3), np.float16), "x.lora_up.weight": least}
    save_file(tensors | {"x.alpha": np.array(0.5, np.float16)}, tmp_path / "a.safetensors")
    told = convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "diffusers")
    new = open_tensors(tmp_path / "b.safetensors")
    assert np.array_equal(new["x.lora_B.weight"], np.full((2, 1), 2.0**-25))
    assert (new.dtypes["x.lora_A.weight"], new.dtypes["x.lora_B.weight"]) == ("F16", "F32")
    assert told.difference == 0


@pytest.mark.parametrize(
    ("name", "form"),  # B is rounded; A and B have more columns; A is rounded
    [
        ("peft/rslora_patterns", "diffusers"),
        ("peft/rslora_patterns", "mlx"),
        ("kohya_lycoris/locon_tucker_mid", "peft"),
    ],
)
def test_the_difference_is_that_of_what_was_written(name, form, tmp_path):
    source, out = ROOT / name, tmp_path / f"b{FILE.get(form, '')}"
    told = convert(source, out, form)
    old, new = ml.open_adapter(source), ml.open_adapter(out)
    changes = [[B @ A for A, B in (factors(x, m) for m in old.pairs)] for x in (old, new)]
    size = np.linalg.norm([np.linalg.norm(dW) for dW in changes[0]])
    off = np.linalg.norm([np.linalg.norm(dW - other) for dW, other in zip(*changes, strict=True)])
    assert off > 0
    assert abs(told.norm - size) <= 1e-12 * size
    assert abs(told.difference - off) <= 1e-12 * size


SDXL = [
    "conv_in", "conv_out", "time_embedding.linear_1", "time_embedding.linear_2", "add_embedding.linear_1",
    "add_embedding.linear_2", "mid_block.resnets.0.conv1", "mid_block.resnets.1.time_emb_proj",
    "mid_block.attentions.0.transformer_blocks.9.ff.net.0.proj",
    *(f"down_blocks.{b}.resnets.{n}.{part}" for b in range(3) for n in range(2)
      for part in ("conv1", "conv2", "time_emb_proj", "conv_shortcut")),
    *(f"up_blocks.{b}.resnets.{n}.conv2" for b in range(3) for n in range(3)),
    *(f"down_blocks.{b}.attentions.{n}.proj_in" for b in (1, 2) for n in range(2)),
    *(f"up_blocks.{b}.attentions.{n}.transformer_blocks.1.attn2.to_out.0" for b in (0, 1) for n in range(3)),
    "down_blocks.0.downsamplers.0.conv", "down_blocks.1.downsamplers.0.conv", "up_blocks.0.upsamplers.0.conv",
    "up_blocks.1.upsamplers.0.conv",
]  # fmt: skip


def test_names_of_sdxl_go_to_stability_ais_and_back():
    there = [to_sgm(f"unet.{path}") for path in SDXL]
    assert len(set(there)) == len(SDXL)
    assert not any(
        part in path for path in there for part in ("down_blocks", "up_blocks", "mid_block", "resnets")
    )
    assert [of_sgm(path) for path in there] == [f"unet.{path}" for path in SDXL]
    known = {  # as in diffusers' converter and kohya's files
        "unet.input_blocks.4.1.transformer_blocks.0.attn1.to_q":
            "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
        "unet.input_blocks.3.0.op": "unet.down_blocks.0.downsamplers.0.conv",
        "unet.input_blocks.7.0.in_layers.2": "unet.down_blocks.2.resnets.0.conv1",
        "unet.middle_block.2.out_layers.3": "unet.mid_block.resnets.1.conv2",
        "unet.output_blocks.5.2.conv": "unet.up_blocks.1.upsamplers.0.conv",
        "unet.output_blocks.3.1.proj_out": "unet.up_blocks.1.attentions.0.proj_out",
        "unet.label_emb.0.2": "unet.add_embedding.linear_2",
    }  # fmt: skip
    assert {path: of_sgm(path) for path in known} == known


WORDS = """down_blocks 0 17 attn1 to_q to_out ff net proj time_emb_proj transformer_blocks text_model encoder
    layers self_attn out_proj fc1"""
PATHS = st.lists(st.sampled_from(WORDS.split()), min_size=1, max_size=8)


@given(PATHS)
def test_dots_come_back_to_flattened_names(parts):
    """By the atoms alone, for any path of them."""
    path = ".".join(parts)
    assert dotted(path.replace(".", "_")) == path
    assert path_of(flattened(f"text_encoder_2.{path}")) == f"text_encoder_2.{path}"


def test_text_encoders_are_numbered_where_there_are_several():
    inner = "text_model.encoder.layers.0.mlp.fc1"
    flat = inner.replace(".", "_")
    assert flattened(f"text_encoder.{inner}") == f"lora_te_{flat}"
    assert flattened(f"text_encoder.{inner}", numbered=True) == f"lora_te1_{flat}"
    assert flattened(f"text_encoder_2.{inner}", numbered=True) == f"lora_te2_{flat}"
    assert flattened("down_blocks.0.proj_in") == "lora_unet_down_blocks_0_proj_in"  # a U-Net alone
    assert flattened("model.layers.0.q_proj") == "lycoris_model_layers_0_q_proj"
    assert flattened("transformer.img_in") == "lora_transformer_img_in"
    assert flattened("transformer.img_in", flux=True) == "lora_unet_img_in"


@given(heads=st.integers(1, 5), half=st.integers(1, 4), columns=st.integers(1, 3))
def test_rows_go_to_neighbours_and_back(heads, half, columns):
    W = np.arange(2.0 * heads * half * columns).reshape(-1, columns)
    moved = neighbours(W, heads)
    assert np.array_equal(half_split(moved, heads), W)
    assert np.array_equal(moved[:2], W[[0, half]])  # the first pair of the first head


def test_gguf_has_one_alpha_and_what_differs_is_in_the_factors(tmp_path):
    import gguf

    out = tmp_path / "a.gguf"
    convert(ROOT / "peft/rslora_patterns", out, "gguf", base=base(tmp_path))
    reader = gguf.GGUFReader(out)
    values = {name: f.parts[-1] for name, f in reader.fields.items()}
    assert bytes(values["general.type"]) == b"adapter"
    assert bytes(values["adapter.type"]) == b"lora"
    assert bytes(values["general.architecture"]) == b"llama"
    (alpha,) = values["adapter.lora.alpha"].tolist()
    old = ml.open_adapter(ROOT / "peft/rslora_patterns")
    held = {t.name: t.data for t in reader.tensors}
    names = {
        "q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output",
        "gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down",
    }  # fmt: skip
    assert len(held) == 2 * len(old.pairs)
    for module in old.pairs:
        n, last = module.split(".")[2], module.rpartition(".")[2]
        a, b = (held[f"blk.{n}.{names[last]}.weight.lora_{half}"] for half in "ab")
        dW = alpha / len(a) * b.astype(np.float64) @ a
        if last in ("q_proj", "k_proj"):
            dW = half_split(dW, HEADS[last == "k_proj"])
        A, B = factors(old, module)
        assert (abs(dW - B @ A) <= 4 * UNIT * (abs(B) @ abs(A))).all(), module


BAD = {  # what is asked -> the error
    "an unknown form": ("peft/plain", "o", "mlz", {}, InputError, "to is 'mlz'; nearest: 'mlx'"),
    "a folder for a file": ("peft/plain", "o", "kohya", {}, InputError, "a name that ends in .safetensors"),
    "a file for a folder": ("peft/plain", "o.gguf", "mlx", {}, InputError, "the name of a folder"),
    "an embedding for kohya": (
        "peft/embed_lmhead", "o.safetensors", "kohya", {}, UnsupportedError, "embedding",
    ),
    "an embedding for diffusers": (
        "peft/embed_lmhead", "o.safetensors", "diffusers", {}, UnsupportedError, "embedding",
    ),
    "a convolution for MLX": ("peft/conv2d", "o", "mlx", {}, UnsupportedError, "c1 is a convolution"),
    "llama.cpp's without a base": ("peft/plain", "o.gguf", "gguf", {}, ConfigError, "expected base"),
    "magnitudes for llama.cpp": ("peft/dora", "o.gguf", "gguf", {"base": LLAMA}, UnsupportedError, "DoRA"),
    "another architecture": (
        "peft/plain", "o.gguf", "gguf", {"base": LLAMA | {"model_type": "lama"}}, UnsupportedError, "'llama'",
    ),
    "a base without heads": (
        "peft/plain", "o.gguf", "gguf", {"base": {"model_type": "llama"}}, ConfigError, "num_attention_heads",
    ),
    "heads that do not fit": (
        "peft/plain", "o.gguf", "gguf", {"base": LLAMA | {"num_attention_heads": 3}}, MismatchError,
        "has 16 rows; expected pairs for the base's 3 heads",
    ),
    "a module without a name": (
        "peft/gpt2_conv1d", "o.gguf", "gguf", {"base": LLAMA}, UnsupportedError, "no name in llama.cpp's",
    ),
    "full differences": (
        "synthetic_names/comfy_diffusion_model", "o", "peft", {}, MismatchError, "full difference: 1 module",
    ),
    "magnitudes of inputs": ("kohya_lycoris/dora_wd_in_old", "o", "peft", {}, UnsupportedError, "each input"),
    "loralib's convolution": (
        "loralib/net", "o", "peft", {"alpha": 8, "r": 4}, MismatchError, "conv is a convolution",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_what_a_form_cannot_hold_is_refused_and_nothing_is_written(what, tmp_path):
    name, out, form, options, error, says = BAD[what]
    if "base" in options:
        (tmp_path / "config.json").write_text(json.dumps(options["base"]))
        options = options | {"base": tmp_path}
    with pytest.raises(error, match=says):
        convert(ROOT / name, tmp_path / "new" / out, form, **options)
    assert not (tmp_path / "new").exists()


def test_an_output_is_replaced_when_asked_and_never_the_input(tmp_path):
    (tmp_path / "o.safetensors").write_bytes(b"old")
    with pytest.raises(StorageError, match="is there already"):
        convert(ROOT / "peft/plain", tmp_path / "o.safetensors", "kohya")
    assert (tmp_path / "o.safetensors").read_bytes() == b"old"
    convert(ROOT / "peft/plain", tmp_path / "o.safetensors", "kohya", overwrite=True)
    once = (tmp_path / "o.safetensors").read_bytes()
    with pytest.raises(InputError, match="is the input"):
        convert(tmp_path / "o.safetensors", tmp_path / "o.safetensors", "diffusers", overwrite=True)
    assert (tmp_path / "o.safetensors").read_bytes() == once
    convert(ROOT / "peft/plain", tmp_path / "o", "mlx")
    convert(ROOT / "peft/plain", tmp_path / "o", "peft", overwrite=True)
    assert ml.open_adapter(tmp_path / "o").pairs.keys() == ml.open_adapter(ROOT / "peft/plain").pairs.keys()


def test_values_too_large_for_their_dtype_are_refused(tmp_path):
    big = {"a.q_proj": (np.full((1, 2), 1.0), np.full((2, 1), 3e38))}
    write_peft(tmp_path / "a", big, lora_alpha=3)
    with pytest.raises(ml.errors.NonFiniteError, match="too large for F32"):
        convert(tmp_path / "a", tmp_path / "o.safetensors", "diffusers")
    assert not (tmp_path / "o.safetensors").exists()


def test_values_too_large_for_llama_cpps_float32_are_refused(tmp_path):
    big = {"model.layers.0.mlp.up_proj": (np.full((1, 2), 1.0), np.full((2, 1), 1e39))}
    write_peft(tmp_path / "a", big, lora_alpha=1)
    with pytest.raises(ml.errors.NonFiniteError, match="lora_b is too large for float32"):
        convert(tmp_path / "a", tmp_path / "o.gguf", "gguf", base=base(tmp_path))
    assert not (tmp_path / "o.gguf").exists()


# ---- which model it is


def drawn(tmp_path, shapes):
    """A PEFT folder with modules of these shapes (O, I)."""
    rng = np.random.default_rng(0)
    factors = {m: (rng.normal(size=(2, I)), rng.normal(size=(O, 2))) for m, (O, I) in shapes.items()}  # noqa: E741
    return write_peft(tmp_path / "in", factors, lora_alpha=2)


def names_of(path):
    """Names of the modules in a safetensors file."""
    return {re.sub(r"\.(lora_(down|up|A|B)\.weight|alpha)$", "", key) for key in open_tensors(path)}


DOWN, INPUT = "down_blocks.1.attentions.0.transformer_blocks", "input_blocks.4.1.transformer_blocks"
UNETS = {  # a module and its inputs -> its name in kohya's form, with dots
    (f"{DOWN}.1.attn1.to_q", 4): f"{INPUT}.1.attn1.to_q",
    (f"{DOWN}.0.attn2.to_k", 2048): f"{INPUT}.0.attn2.to_k",
    ("add_embedding.linear_1", 4): "label_emb.0.0",
    (f"{DOWN}.0.attn2.to_k", 768): f"{DOWN}.0.attn2.to_k",  # not SDXL
}


@pytest.mark.parametrize("path", UNETS)
def test_sdxl_is_known_by_its_unet_alone(path, tmp_path):
    """No metadata and no second text encoder: its text has 2048 numbers, its attention several blocks."""
    for start in ("unet.", ""):
        folder = tmp_path / f"at{len(start)}"
        convert(drawn(folder, {start + path[0]: (6, path[1])}), folder / "a.safetensors", "kohya")
        assert names_of(folder / "a.safetensors") == {f"lora_unet_{UNETS[path].replace('.', '_')}"}


@pytest.mark.parametrize("start", ["diffusion_model.", "transformer.", ""])
def test_flux_is_known_under_any_prefix(start, tmp_path):
    inner = {"double_blocks.0.img_attn.qkv": (12, 4), "img_in": (4, 3), "single_blocks.1.linear1": (28, 4)}
    tensors = {f"{start}{m}.lora_A.weight": np.ones((2, shape[1]), np.float32) for m, shape in inner.items()}
    tensors |= {f"{start}{m}.lora_B.weight": np.ones((shape[0], 2), np.float32) for m, shape in inner.items()}
    save_file(tensors, tmp_path / "b.safetensors")
    convert(tmp_path / "b.safetensors", tmp_path / "c.safetensors", "kohya")
    assert names_of(tmp_path / "c.safetensors") == {f"lora_unet_{m.replace('.', '_')}" for m in inner}
    convert(tmp_path / "b.safetensors", tmp_path / "d.safetensors", "diffusers")
    parts = {f"transformer.transformer_blocks.0.attn.to_{part}" for part in "qkv"}
    parts |= {f"transformer.single_transformer_blocks.1.attn.to_{part}" for part in "qkv"}
    parts |= {"transformer.single_transformer_blocks.1.proj_mlp", "transformer.x_embedder"}
    assert names_of(tmp_path / "d.safetensors") == parts


def test_fluxs_second_text_encoder_is_kohyas_third(tmp_path):
    inner = "encoder.block.0.layer.0.SelfAttention.q"
    flux = {"transformer.single_blocks.0.linear2": (4, 20), f"text_encoder_2.{inner}": (4, 4)}
    convert(drawn(tmp_path, flux), tmp_path / "a.safetensors", "kohya")
    assert f"lora_te3_{inner.replace('.', '_')}" in names_of(tmp_path / "a.safetensors")
    assert f"text_encoder_2.{inner}" in ml.open_adapter(tmp_path / "a.safetensors").pairs


AURA = [
    f"transformer.{m}" for m in ("single_transformer_blocks.0.attn.to_q", "joint_transformer_blocks.0.ff.x")
]
OTHER_MODELS = {  # which are not Flux.1, though some names agree -> what diffusers' form says, if refused
    "Flux.2's rows": ({"transformer.single_blocks.0.linear1": (72, 8)}, "72 rows for 8 inputs"),
    "SD3 in kohya's names": ({"unet.joint_blocks.0.x_block.attn.qkv": (12, 4)}, "no module of a U-Net"),
    "Qwen-Image": ({"transformer.img_in": (4, 4)}, None),
    "AuraFlow": (dict.fromkeys(AURA, (4, 4)), None),
}


@pytest.mark.parametrize("model", OTHER_MODELS)
def test_other_models_are_not_taken_for_flux(model, tmp_path):
    shapes, says = OTHER_MODELS[model]
    source = drawn(tmp_path, shapes)
    if says:
        with pytest.raises(UnsupportedError, match=says):
            convert(source, tmp_path / "a.safetensors", "diffusers")
        assert not (tmp_path / "a.safetensors").exists()
        return
    convert(source, tmp_path / "a.safetensors", "diffusers")
    assert names_of(tmp_path / "a.safetensors") == shapes.keys()
    told = convert(source, tmp_path / "b.safetensors", "kohya")
    assert names_of(tmp_path / "b.safetensors") == {f"lora_{m.replace('.', '_')}" for m in shapes}
    assert any("OneTrainer" in note for note in told.notes)


TWICE = [f"unet.{m}.proj_in" for m in ("input_blocks.4.1", "down_blocks.1.attentions.0")]


@pytest.mark.parametrize(
    ("form", "paths", "says"),
    [
        ("kohya", ["unet.my__thing.a"], "would not be found again"),
        ("diffusers", ["model.a.processor.b"], "would not be found again"),
        ("diffusers", TWICE, "both called"),
        ("kohya", ["unet.a.b_c", "unet.a_b.c"], "both called"),
    ],
)
def test_names_that_cannot_be_told_again_are_refused_before_anything_is_replaced(form, paths, says, tmp_path):
    (tmp_path / "o.safetensors").write_bytes(b"old")
    source = drawn(tmp_path, dict.fromkeys(paths, (4, 4)))
    with pytest.raises(MismatchError, match=says):
        convert(source, tmp_path / "o.safetensors", form, overwrite=True)
    assert (tmp_path / "o.safetensors").read_bytes() == b"old"


def test_magnitudes_of_convolutions_have_pefts_shape(tmp_path):
    """(1, O, 1, 1), and (O,) of linear maps, from LyCORIS' (O, 1, 1, 1) and (O, 1) and back."""
    source = ROOT / "kohya_lycoris/dora_wd_out"
    convert(source, tmp_path / "p", "peft")
    convert(tmp_path / "p", tmp_path / "k.safetensors", "kohya")
    held = open_tensors(tmp_path / "p/adapter_model.safetensors")
    (path,) = source.glob("*.safetensors")
    axes = set()
    for key in (key for key in held if key.endswith("lora_magnitude_vector")):
        A, B = (held.shapes[key.replace("magnitude_vector", f"{half}.weight")] for half in "AB")
        axes.add(len(A))
        assert held.shapes[key] == ((B[0],) if len(A) == 2 else (1, B[0], *(1,) * (len(A) - 2)))
    assert axes == {2, 4}
    of_files = (open_tensors(file).shapes for file in (path, tmp_path / "k.safetensors"))
    old, again = ({key: shape for key, shape in shapes.items() if "dora" in key} for shapes in of_files)
    assert old == again != {}


def test_experts_have_hugging_faces_names_and_mlx_is_refused(tmp_path):
    told = convert(ROOT / "mlx/moe_switch", tmp_path / "p", "peft")
    assert told.difference == 0
    assert "model.layers.0.mlp.experts.3.down_proj" in ml.open_adapter(tmp_path / "p").pairs
    with pytest.raises(UnsupportedError, match="is an expert"):
        convert(tmp_path / "p", tmp_path / "m", "mlx")


@pytest.mark.parametrize(
    ("name", "task"), [("mlx/lora_default", "CAUSAL_LM"), ("diffusers/flux_transformer", None)]
)
def test_only_a_language_models_folder_says_that_it_is_one(name, task, tmp_path):
    convert(ROOT / name, tmp_path / "p", "peft")
    assert json.loads((tmp_path / "p/adapter_config.json").read_text())["task_type"] == task


def test_copies_of_the_base_are_left_out_and_said(tmp_path):
    told = convert(ROOT / "peft/embed_lmhead", tmp_path / "m", "mlx")
    assert any("of the base's weights left out" in note for note in told.notes)


def test_fused_parts_of_two_dtypes_keep_all_bits(tmp_path):
    at = "transformer.single_transformer_blocks.0.attn."
    third = np.full((1, 4), 1 / 3, np.float32)
    tensors = {f"{at}to_q.lora_A.weight": third.astype(np.float16), f"{at}to_k.lora_A.weight": third}
    tensors |= {f"{at}to_{part}.lora_B.weight": np.ones((4, 1), np.float32) for part in "qk"}
    save_file(tensors, tmp_path / "a.safetensors")
    told = convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "kohya")
    assert told.difference <= 8 * 2.0**-53 * told.norm  # of looking: a float16 loses 1e-4


# ---- tables and orders

ARCHITECTURES = {  # the base's model_type -> llama.cpp's name, and whether it reorders rows of q and k
    "llama": ("llama", True), "mistral": ("llama", True), "granite": ("granite", True),
    "qwen2": ("qwen2", False), "qwen3": ("qwen3", False),
}  # fmt: skip


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_each_architecture_has_llama_cpps_name_and_order_of_rows(kind, tmp_path):
    import gguf

    (tmp_path / "config.json").write_text(json.dumps(LLAMA | {"model_type": kind}))
    source = drawn(tmp_path, {"model.layers.0.self_attn.k_proj": (8, 16)})
    convert(source, tmp_path / "a.gguf", "gguf", base=tmp_path)
    reader = gguf.GGUFReader(tmp_path / "a.gguf")
    name, moved = ARCHITECTURES[kind]
    assert bytes(reader.fields["general.architecture"].parts[-1]).decode() == name
    (B,) = (t.data for t in reader.tensors if t.name == "blk.0.attn_k.weight.lora_b")
    was = ml.open_adapter(source).factors("model.layers.0.self_attn.k_proj")[1].astype(np.float32)
    assert np.array_equal(B, neighbours(was, HEADS[1]) if moved else was)


@pytest.mark.parametrize(
    ("architecture", "moved"), [("llama", True), ("granite", True), ("llada", True), ("qwen2", False)]
)
def test_rows_are_known_to_be_reordered_by_the_architecture(architecture, moved, tmp_path):
    name = "blk.0.attn_q.weight.lora_"
    tensors = {f"{name}a": Entry((2, 4), "F32", lambda: np.ones((2, 4), np.float32))}
    tensors[f"{name}b"] = Entry((8, 2), "F32", lambda: np.ones((8, 2), np.float32))
    values = {"general.architecture": architecture, "adapter.lora.alpha": 2.0}
    (tmp_path / "a.gguf").write_bytes(gguf_bytes(values, tensors))
    assert bool(ml.open_adapter(tmp_path / "a.gguf").doubts) is moved


def test_most_modules_keep_their_factors_in_gguf(tmp_path):
    """The one alpha is that of most of them."""
    rng, one = np.random.default_rng(0), "model.layers.0.mlp."
    names = ("gate_proj", "up_proj", "down_proj")
    factors = {f"{one}{n}": (rng.normal(size=(2, 4)), rng.normal(size=(4, 2))) for n in names}
    write_peft(tmp_path / "a", factors, lora_alpha=6, alpha_pattern={"down_proj": 5})
    convert(tmp_path / "a", tmp_path / "b.gguf", "gguf", base=base(tmp_path))
    old, new = ml.open_adapter(tmp_path / "a"), ml.open_adapter(tmp_path / "b.gguf", heads=HEADS)
    for module in factors:
        kept = np.array_equal(new.factors(module)[1], old.factors(module)[1].astype(np.float32))
        assert kept is not module.endswith("down_proj")


@pytest.mark.parametrize(
    ("shapes", "network"),
    [
        ({"transformer.single_blocks.0.linear2": (4, 20)}, "networks.lora_flux"),
        ({"unet.mid_block.attentions.0.proj_in": (4, 4)}, "networks.lora"),
    ],
)
def test_the_network_module_is_that_of_the_model(shapes, network, tmp_path):
    convert(drawn(tmp_path, shapes), tmp_path / "a.safetensors", "kohya")
    assert open_tensors(tmp_path / "a.safetensors").metadata["ss_network_module"] == network
