"""Every tool's own file gives the ΔW that the tool computed, to rounding; fixtures/lora_files says whose."""

import json

import numpy as np
import pytest
from lora_cases import READ, ROOT, UNIT, change, expected, how
from safetensors.numpy import save_file

import minilora as ml
from minilora.analysis.inspect import survey
from minilora.errors import MismatchError, UnsupportedError
from minilora.formats.safetensors import open_tensors
from minilora.lora_files.grammar import parsed, sort_out
from minilora.lora_files.names import of_torchtune
from minilora.model import Config
from minilora.peft.folder import check_agreement


def assert_same(adapter, module, dW, weight=None):
    """The same matrix, where each entry is a sum of r products of two values, times a scale, in float32.

    `weight` is the largest |W| where a tool merges, so that its ΔW is the rounded W + ΔW less W.
    """
    ours, (A, B), pair = change(adapter, module), adapter.factors(module), adapter.pairs[module]
    size = abs(pair.scale) * (abs(B).astype(np.float64) @ abs(A).astype(np.float64))
    off = abs(ours - dW.astype(np.float64).reshape(ours.shape))
    size = size.T if pair.embedding else size
    bound = (pair.r + 3) * UNIT * size + (0 if weight is None else 2 * UNIT * (weight + size))
    assert (off <= bound).all(), module


OTHERWISE = (  # read below, with what their files do not hold or hold in another form
    "gguf/", "loralib/", "torchtune/", "peft/bin_old", "peft/dora", "peft/conv2d_dora", "mlx/dora",
    "synthetic_names/xlabs", "kohya_lycoris/refuse",
)  # fmt: skip


@pytest.mark.parametrize("name", [name for name in READ if not name.startswith(OTHERWISE)])
def test_every_module_of_a_file_has_the_tools_own_change(name):
    folder = ROOT / name
    adapter = ml.open_adapter(folder / "style" if name.endswith("subfolder") else folder, **how(name))
    changes, _ = expected(name)
    assert changes.keys() == adapter.pairs.keys()
    for module, dW in changes.items():
        turned = adapter.settings.fan_in_fan_out
        assert_same(adapter, module, dW.T if turned else dW)


@pytest.mark.parametrize(
    "name", ["peft/dora", "peft/conv2d_dora", "mlx/dora", "kohya_lycoris/dora_wd_out", "torchtune/dora"]
)
def test_magnitudes_scale_the_rows_as_in_the_tool(name):
    """W' = m (W + ΔW) / |W + ΔW|; LyCORIS adds float32's eps to the norm."""
    adapter = ml.open_adapter(ROOT / name, **how(name))
    _, held = expected(name)
    assert adapter.settings.flags == {"use_dora"}
    if name.startswith("torchtune"):  # its own weights are there in its own order
        adapter = ml.open_adapter(ROOT / name, **how(name) | {"heads": None})
        own = [key.removeprefix("W::tune::") for key in held if key.startswith("W::tune::")]
        held = {f"{w}::{of_torchtune(m)}": held[f"{w}::tune::{m}"] for w in ("W", "Wmerged") for m in own}
    for module, pair in adapter.pairs.items():
        W = held[f"W::{module}"].astype(np.float64).reshape(pair.shape)
        merged = held[f"Wmerged::{module}"].astype(np.float64).reshape(pair.shape)
        m = adapter.value(pair.vectors["lora_magnitude_vector"]).astype(np.float64).reshape(-1, 1)
        whole = W + change(adapter, module)
        norm = np.linalg.norm(whole, axis=1, keepdims=True)
        A, B = (abs(x).astype(np.float64) for x in adapter.factors(module))
        size = abs(W) + abs(pair.scale) * (B @ A)  # of what is summed in float32
        off = (pair.r + 4) * UNIT * (size + np.linalg.norm(size, axis=1, keepdims=True) * abs(whole) / norm)
        off += (pair.shape[1] * UNIT + 2 * UNIT / norm) * abs(whole)
        assert (abs(m * whole / norm - merged) <= abs(m) / norm * off).all(), module


def test_magnitudes_of_inputs_are_read_and_refused_where_there_is_no_place_for_them(tmp_path):
    """One for each channel; kohya's form keeps them, to the bit. tests/merging merges them."""
    source = ROOT / "kohya_lycoris/dora_wd_in_old"
    adapter, (file,) = ml.open_adapter(source), source.glob("*.safetensors")
    assert not adapter.doubts
    tensors = open_tensors(file)
    for module, pair in adapter.pairs.items():
        m = adapter.value(pair.vectors["dora_scale"])
        assert m.shape == adapter.tensors.shapes[pair.A][1:2], module
    assert any("scale the columns" in note for note in ml.inspect(source).notes)
    ml.convert(source, tmp_path / "same.safetensors", "kohya")
    again = open_tensors(tmp_path / "same.safetensors")
    assert again.shapes == tensors.shapes
    assert all(np.array_equal(again[key], tensors[key]) for key in tensors)
    folder = tmp_path / "out"
    for refuse in (
        lambda: ml.convert(source, tmp_path / "out.safetensors", "diffusers"),
        lambda: ml.convert(source, folder, "mlx"),
        lambda: ml.compress(source, folder, rank=1),
        lambda: ml.combine([(source, 1.0)], folder),
    ):
        with pytest.raises(UnsupportedError, match=r"magnitude of each input|dora_scale"):
            refuse()
        assert not folder.exists()


def test_a_model_refuses_magnitudes_of_inputs(tmp_path):
    rng, at = np.random.default_rng(0), "model.layers.0.self_attn.q_proj"
    model = ml.llama(Config(hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2,
                            num_key_value_heads=1), rng=rng)  # fmt: skip
    A, B = rng.normal(size=(2, 8)).astype(np.float32), rng.normal(size=(8, 2)).astype(np.float32)
    tensors = {f"{at}.lora_down.weight": A, f"{at}.lora_up.weight": B}
    save_file(tensors | {f"{at}.dora_scale": np.ones((1, 8), np.float32)}, tmp_path / "a.safetensors")
    with pytest.raises(UnsupportedError, match="has a dora_scale, which no adapter here has"):
        ml.load_adapter(model, tmp_path / "a.safetensors")


def test_flux_keeps_its_fused_maps():
    """XLabs adapts the rows of q, k and v of a single block's linear1; the expected parts are split."""
    split, _ = expected("synthetic_names/xlabs_flux")
    adapter = ml.open_adapter(ROOT / "synthetic_names/xlabs_flux")
    parts = {
        "img_attn.qkv": ("to_q", "to_k", "to_v"),
        "txt_attn.qkv": ("add_q_proj", "add_k_proj", "add_v_proj"),
        "img_attn.proj": ("to_out.0",),
        "txt_attn.proj": ("to_add_out",),
    }
    seen = 0
    for module in adapter.pairs:
        _, kind, n, inner = module.split(".", 3)
        if kind == "double_blocks":
            names = [f"transformer.transformer_blocks.{n}.attn.{part}" for part in parts[inner]]
        elif inner == "linear2":
            names = [f"transformer.single_transformer_blocks.{n}.proj_out"]
        else:
            names = [f"transformer.single_transformer_blocks.{n}.attn.to_{part}" for part in "qkv"]
        seen += len(names)
        dW = np.concatenate([split[name] for name in names])
        if inner == "linear1":
            dW = np.pad(dW, ((0, 4 * len(dW) // 3), (0, 0)))
        assert_same(adapter, module, dW)
    assert seen == len(split)


@pytest.mark.parametrize("name", ["torchtune/lora", "gguf/llama_gqa", "gguf/embed_gguf"])
def test_rows_of_queries_and_keys_come_into_hugging_faces_order_with_the_heads(name):
    (path,) = (ROOT / name).glob("*.f32.gguf" if name.startswith("gguf") else "*.safetensors")
    with np.load(ROOT / name / "expected.npz") as held:
        ours, theirs = (
            ml.open_adapter(path, **how(name)),
            ml.open_adapter(path, **how(name) | {"heads": None}),
        )
        assert not ours.doubts
        assert "the rows of q_proj and k_proj are in" in theirs.doubts[0]
        about = json.loads((ROOT / name / "expected.json").read_text())
        own = {f"hf::{m['hf']}": f"gguf::{n}" for n, m in about.get("modules", {}).items()}
        own |= {f"hf::{of_torchtune(n[6:])}": n for n in held if n.startswith("tune::")}
        changes = {key.removeprefix("hf::"): key for key in held if key.startswith("hf::")}
        assert changes.keys() == ours.pairs.keys() == theirs.pairs.keys()
        for module, key in changes.items():
            merged = 1.0 if name.startswith("torchtune") else None
            assert_same(ours, module, held[key], merged)
            assert_same(theirs, module, held[own[key]], merged)
            moved = module.endswith(("q_proj", "k_proj"))
            assert np.array_equal(change(ours, module), change(theirs, module)) is not moved


@pytest.mark.parametrize("heads", [(3, 2), (4, 3)])
def test_rows_that_are_no_pairs_of_every_head_are_refused(heads):
    adapter = ml.open_adapter(ROOT / "gguf/llama_gqa/llama_gqa.f32.gguf", heads=heads)
    with pytest.raises(MismatchError, match="expected pairs for 3 heads"):
        [adapter.factors(module) for module in adapter.pairs]


def rounding(a, kind):
    """The largest error of values stored in a type of GGUF, by entry."""
    size = abs(a).astype(np.float64)
    if kind == "Q8_0":  # of 32 values: multiples of the largest / 127, which is a float16
        largest = size.reshape(-1, 32).max(1, keepdims=True) * np.ones((1, 32))
        return largest.reshape(a.shape) * (0.5 / 127 + 2.0**-11)
    return size * {"F32": 0.0, "F16": 2.0**-11, "BF16": 2.0**-8}[kind]  # a bfloat16 is cut off


@pytest.mark.parametrize("kind", ["f32", "f16", "bf16", "q8_0"])
def test_factors_in_gguf_are_those_of_the_source_to_the_rounding_of_their_type(kind):
    name = "gguf/llama_gqa"
    source = ml.open_adapter(ROOT / name / "source_peft")
    adapter = ml.open_adapter(ROOT / name / f"llama_gqa.{kind}.gguf", **how(name))
    assert adapter.pairs.keys() == source.pairs.keys()
    seen = set()
    for module, pair in adapter.pairs.items():
        assert pair.scale == source.pairs[module].scale
        for key, ours, theirs in zip(
            (pair.A, pair.B), adapter.factors(module), source.factors(module), strict=True
        ):
            seen.add(adapter.tensors.dtypes[key])
            bound = rounding(theirs, adapter.tensors.dtypes[key])
            assert (abs(ours.astype(np.float64) - theirs) <= bound + 2.0**-25).all(), (
                key
            )  # 2**-25: subnormals
    assert kind.upper() in seen


def test_a_gguf_has_lost_the_scale_of_rslora_and_its_own_reading_is_taken():
    adapter = ml.open_adapter(ROOT / "gguf/qwen_small/qwen_small.f32.gguf")
    source = ml.open_adapter(ROOT / "gguf/qwen_small/source_peft")
    assert not adapter.doubts  # a Qwen's rows are not reordered
    for module, pair in adapter.pairs.items():
        assert pair.scale == pytest.approx(source.pairs[module].scale / pair.r**0.5, rel=4 * 2.0**-53)
        for ours, theirs in zip(adapter.factors(module), source.factors(module), strict=True):
            assert np.array_equal(ours, theirs)


@pytest.mark.parametrize("name", ["torchtune/lora", "loralib/net"])
def test_looking_takes_the_scale_that_a_file_does_not_have(name):
    about = {key: value for key, value in how(name).items() if key != "heads"}
    opened = ml.open_adapter(ROOT / name, **about)
    seen = ml.inspect(ROOT / name, against=ROOT / name, **about)
    for m in seen.modules:
        assert (m.r, m.scale) == (opened.pairs[m.module].r, opened.pairs[m.module].scale)
        assert m.norm == m.other.norm > 0
    (line,) = survey([ROOT / name], **about).lines
    assert line.numbers.norm == pytest.approx(seen.norm, rel=1e-14)
    assert "give alpha" in survey([ROOT / name]).lines[0].error


def test_loralibs_merged_maps_convolutions_and_tables():
    adapter = ml.open_adapter(ROOT / "loralib/net", **how("loralib/net"))
    with np.load(ROOT / "loralib/net/expected.npz") as held:
        assert_same(adapter, "fc", held["fc"])
        assert_same(adapter, "emb", held["emb"].T, weight=4.0)  # drawn from a normal distribution
        assert_same(adapter, "c_attn", held["c_attn"].T)
        assert_same(adapter, "conv", held["conv"])
        parts = held["qkv"].reshape(3, 12, 12)
        assert not parts[1].any()  # not adapted, and not in the file
        assert_same(adapter, "qkv", parts[[0, 2]].reshape(24, 12))
    assert [note.partition(" ")[0] for note in adapter.notes] == ["c_attn", "qkv"]


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("refuse_loha", r"holds no LoRA but LoHa \(54 modules\)"),
        ("refuse_lokr", r"holds no LoRA but LoKr \(54 modules\)"),
        ("refuse_full_diff_norm", r"but full difference \(4 modules\), difference of a bias \(4 modules\)"),
    ],
)
def test_what_is_no_lora_is_refused_by_name_and_number(name, says):
    with pytest.raises(UnsupportedError, match=says):
        ml.open_adapter(ROOT / "kohya_lycoris" / name)


def test_what_is_no_lora_beside_one_is_said_and_a_model_refuses_it():
    adapter = ml.open_adapter(ROOT / "synthetic_names/comfy_diffusion_model")
    assert [doubt.partition(",")[0] for doubt in adapter.doubts] == [
        "full difference: 1 module is not in the numbers",
        "difference of a bias: 1 module is not in the numbers",
    ]
    with pytest.raises(MismatchError, match="not in the numbers"):
        check_agreement(adapter)


@pytest.mark.parametrize("name", READ)
def test_every_tensor_of_a_file_is_a_part_of_a_module_or_reported(name):
    for path in (ROOT / name).glob("*.safetensors"):
        keys = set(open_tensors(path))
        sorted_out = sort_out(str(path), keys)
        parts = [key for part in sorted_out.parts.values() for key in part.values()]
        others = {name for names in sorted_out.others.values() for name in names}
        rest = keys - {*parts}
        assert len(parts) + len(rest) == len(keys)
        assert {parsed(key)[0] for key in rest} <= others


def test_a_file_that_mixes_styles_is_read_whole():
    """diffusers' own script writes it, and diffusers judges it by the first name: 8 of 40 modules."""
    adapter = ml.open_adapter(ROOT / "diffusers/sd15_dreambooth_script")
    assert len(adapter.pairs) == 44
    assert any("others of" in note for note in adapter.notes)


def test_a_base_may_be_one_component_or_a_checkpoint_of_all(tmp_path):
    """Names of the file begin with `unet.`, those of a base with nothing, or with model.diffusion_model."""
    path = next((ROOT / "kohya_sdxl/sdxl_sgm_names").glob("*.safetensors"))
    adapter, rng = ml.open_adapter(path), np.random.default_rng(0)
    of_unet = {m: pair.shape for m, pair in adapter.pairs.items() if m.startswith("unet.")}
    for before in ("", "model.diffusion_model."):
        weights = {f"{before}{m[5:]}.weight": rng.normal(size=shape) for m, shape in of_unet.items()}
        save_file(weights, tmp_path / "base.safetensors")
        seen = ml.inspect(path, tmp_path / "base.safetensors")
        assert {m.module for m in seen.modules if m.base} == of_unet.keys()
        assert any("not in the base" in note for note in seen.notes)  # the text encoders


def test_with_a_base_rows_of_queries_and_keys_are_compared_in_its_order(tmp_path):
    """|ΔW|'s overlap with W and the cosine with the source are those of the source itself."""
    folder = ROOT / "gguf/llama_gqa"
    base, rng = tmp_path / "base", np.random.default_rng(0)
    base.mkdir()
    (base / "config.json").write_text((folder / "base_config.json").read_text())
    source = ml.open_adapter(folder / "source_peft")
    weights = {f"{m}.weight": rng.normal(size=pair.shape) for m, pair in source.pairs.items()}
    save_file(weights, base / "model.safetensors")
    seen = ml.inspect(folder / "llama_gqa.f32.gguf", base, folder / "source_peft")
    assert all(m.other.cosine > 1 - 1e-6 for m in seen.modules)
    assert not any("order" in note for note in seen.notes)
    alone = ml.inspect(folder / "llama_gqa.f32.gguf", against=folder / "source_peft")
    assert {m.kind for m in alone.modules if m.other.cosine < 0.9} == {"q_proj", "k_proj"}
    assert any("in llama.cpp's order" in note for note in alone.notes)


def test_any_of_mlxs_files_has_the_scale_of_the_config_beside_it(tmp_path):
    """mlx-lm writes 0000100_adapters.safetensors as it trains; its Flux example has a rank in the header."""
    (source,) = (ROOT / "mlx/lora_default").glob("*.safetensors")
    config = json.loads((ROOT / "mlx/lora_default/adapter_config.json").read_text())
    config["lora_parameters"]["scale"] = 5.0
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    (tmp_path / "0000100_adapters.safetensors").write_bytes(source.read_bytes())
    adapter = ml.open_adapter(tmp_path / "0000100_adapters.safetensors")
    assert {pair.scale for pair in adapter.pairs.values()} == {5.0}
    assert not adapter.notes
    tensors = {"x.lora_a": np.ones((4, 2), np.float32), "x.lora_b": np.ones((2, 3), np.float32)}
    for metadata, scale in (({"lora_rank": "2"}, 1.0), (None, 20.0)):
        (tmp_path / "alone").mkdir(exist_ok=True)
        save_file(tensors, tmp_path / "alone/flux.safetensors", metadata)
        assert ml.open_adapter(tmp_path / "alone/flux.safetensors").pairs["x"].scale == scale


@pytest.mark.parametrize("name", ["gguf/llama_gqa", "synthetic_names/comfy_diffusion_model"])
def test_what_a_smaller_file_would_lack_is_refused(name, tmp_path):
    source = next((ROOT / name).glob("*.f32.gguf"), ROOT / name)
    with pytest.raises(MismatchError, match="a smaller file would lack it"):
        ml.compress(source, tmp_path / "out", rank=1)
    assert not (tmp_path / "out").exists()


ORDER = (
    "adapters.safetensors",
    "pytorch_lora_weights.safetensors",
    "adapter_model.safetensors",
    "z.safetensors",
)


def test_of_several_files_in_a_folder_the_tools_own_name_counts(tmp_path):
    """MLX's, diffusers', PEFT's; another name only if it is alone."""
    for scale, name in enumerate(ORDER, 1):
        tensors = {"x.lora_down.weight": np.ones((1, 4), np.float32), "x.alpha": np.array(scale, np.float32)}
        save_file(tensors | {"x.lora_up.weight": np.ones((3, 1), np.float32)}, tmp_path / name)
    for scale, name in enumerate(ORDER, 1):
        assert ml.open_adapter(tmp_path).pairs["x"].scale == scale
        (tmp_path / name).unlink()


def test_the_first_of_the_headers_alphas_counts_and_none_is_none(tmp_path):
    tensors = {"x.lora_A.weight": np.ones((2, 4), np.float32), "x.lora_B.weight": np.ones((3, 2), np.float32)}
    header = {"lora_alpha": "6", "network_alpha": "8", "alpha": "10"}
    for name in header:
        save_file(tensors, tmp_path / "a.safetensors", header)
        assert ml.open_adapter(tmp_path / "a.safetensors").pairs["x"].scale == float(header[name]) / 2
        header = header | {name: "None"}


@pytest.mark.parametrize("kind", ["weight", "bias"])
def test_a_copy_of_the_base_is_said_to_be_one(kind, tmp_path):
    tensors = {"x.lora_A.weight": np.ones((2, 4), np.float32), "x.lora_B.weight": np.ones((3, 2), np.float32)}
    save_file(tensors | {f"x.base_layer.{kind}": np.ones(3, np.float32)}, tmp_path / "a.safetensors")
    (doubt,) = ml.open_adapter(tmp_path / "a.safetensors").doubts
    assert doubt.startswith("copy of the base: 1 module")
