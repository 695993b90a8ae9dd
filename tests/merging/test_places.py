"""A module is found in a base under any name that a tool has for it, its rows where they are in the map."""

import json
import math

import numpy as np
import pytest
from bases import random_weights, read, write_file, write_pipeline, write_shards
from by_hand import write_peft
from hypothesis import given
from hypothesis import strategies as st
from lora_cases import change
from safetensors.numpy import save_file

import minilora as ml
from minilora.errors import MismatchError, UnsupportedError
from minilora.formats.safetensors import Tensors
from minilora.lora_files.names import AROUND, FUSED, SWAPPED, WIDTHS
from minilora.merging.by_name import merge_by_name
from minilora.merging.places import MAPS, Names, Slot, places, start_of, weight_of

UNIT = 2.0**-24
RNG = np.random.default_rng(0)


def tensors(shapes):
    """A base of which only names and shapes are known."""
    return Tensors(
        "base", shapes, dict.fromkeys(shapes, "F32"), lambda name: np.zeros(shapes[name], np.float32)
    )


def adapter(folder, shapes, r=2, **config):
    """A PEFT folder with random factors of ΔW (O, I, ...), by module."""
    rng = np.random.default_rng(3)
    factors = {
        module: (
            rng.normal(size=(r, *rest)).astype(np.float32),
            rng.normal(size=(rows, r, *(1,) * (len(rest) - 1))).astype(np.float32),
        )
        for module, (rows, *rest) in shapes.items()
    }
    return write_peft(folder, factors, **config)


def deltas(folder):
    """Module -> ΔW (O, I) of an adapter."""
    opened = ml.open_adapter(folder)
    return {module: change(opened, module) for module in opened.pairs}


def merged(tmp_path, W, folder):
    """W' of a base with these weights in a file, less W; to rounding, ΔW in the base's names."""
    base, out = tmp_path / "base.safetensors", tmp_path / "out.safetensors"
    out.unlink(missing_ok=True)
    write_file(base, W, "float64")
    merge_by_name(base, folder, out)
    return {name: a - W[name] for name, a in read(out).items()}


def near(a, b):
    """The same to rounding of W + ΔW - W in float64, of numbers near 1."""
    return np.allclose(a, b, rtol=0, atol=64 * 2.0**-53 * max(1.0, float(abs(b).max(initial=0))))


# ---- names


WORDS = st.from_regex(r"\A[a-z]{1,3}(_[a-z0-9]{1,2}){0,2}\Z")
PATHS = st.lists(st.lists(WORDS, min_size=1, max_size=4).map(".".join), min_size=1, max_size=6, unique=True)


@given(PATHS, st.data())
def test_a_flattened_name_is_found_by_flattening_the_bases(paths, data):
    """Whatever its words; two names that are the same without dots are both possible."""
    names = Names(tensors({f"{path}.weight": (3, 2) for path in paths}))
    path = data.draw(st.sampled_from(paths))
    same = {p for p in paths if p.replace(".", "_") == path.replace(".", "_")}
    flat = path.replace(".", "_")
    found = {slot.keys[0] for slot in names.find(flat)} if flat not in paths else {f"{flat}.weight"}
    assert {f"{p}.weight" for p in same} == found or flat in paths
    assert names.find(path) == {Slot((f"{path}.weight",))}
    assert not names.find("x." + path)


SDXL = {  # Stability AI's names -> diffusers'
    "input_blocks.0.0": "conv_in", "input_blocks.1.0.in_layers.2": "down_blocks.0.resnets.0.conv1",
    "input_blocks.3.0.op": "down_blocks.0.downsamplers.0.conv",
    "input_blocks.4.0.skip_connection": "down_blocks.1.resnets.0.conv_shortcut",
    "input_blocks.4.1.transformer_blocks.1.attn1.to_out.0":
        "down_blocks.1.attentions.0.transformer_blocks.1.attn1.to_out.0",
    "input_blocks.8.1.proj_in": "down_blocks.2.attentions.1.proj_in",
    "middle_block.0.emb_layers.1": "mid_block.resnets.0.time_emb_proj",
    "middle_block.1.transformer_blocks.9.ff.net.0.proj":
        "mid_block.attentions.0.transformer_blocks.9.ff.net.0.proj",
    "middle_block.2.out_layers.3": "mid_block.resnets.1.conv2",
    "output_blocks.2.1.proj_out": "up_blocks.0.attentions.2.proj_out",
    "output_blocks.2.2.conv": "up_blocks.0.upsamplers.0.conv",
    "output_blocks.5.1.transformer_blocks.0.attn2.to_k":
        "up_blocks.1.attentions.2.transformer_blocks.0.attn2.to_k",
    "output_blocks.8.0.in_layers.2": "up_blocks.2.resnets.2.conv1", "out.2": "conv_out",
    "time_embed.2": "time_embedding.linear_2", "label_emb.0.0": "add_embedding.linear_1",
}  # fmt: skip
BEFORE = ("unet.", "", "model.diffusion_model.", "diffusion_model.")


@pytest.mark.parametrize("before", BEFORE)
@pytest.mark.parametrize("names", [SDXL.keys(), SDXL.values()])
def test_a_unet_is_found_by_either_names_with_any_component(names, before):
    """Stability AI's and diffusers'; in a pipeline, alone, in a checkpoint of all, or as ComfyUI calls it."""
    base = Names(tensors({f"{before}{name}.weight": (3, 2) for name in names}))
    for pair in SDXL.items():
        (want,) = ({*pair} & {*names}) if pair[0] != pair[1] else {pair[0]}
        for name in pair:
            for called in (name, f"unet.{name}", f"unet.{name.replace('.', '_')}"):
                assert base.find(called) == {Slot((f"{before}{want}.weight",))}, called


def test_an_upsampler_without_attention_before_it_is_found():
    """In SD1.5 output_blocks.2.1.conv: its block has no attention, which would be number 1."""
    names = Names(tensors({"model.diffusion_model.output_blocks.2.1.conv.weight": (3, 2)}))
    assert names.find("unet.up_blocks.0.upsamplers.0.conv")


CLIP = "encoder.layers.3.self_attn.q_proj"


@pytest.mark.parametrize("inner", [CLIP, f"text_model.{CLIP}"])
@pytest.mark.parametrize(
    ("name", "component"),
    [
        (f"text_encoder.text_model.{CLIP}", "text_encoder"), (f"text_encoder.{CLIP}", "text_encoder"),
        (f"cond_stage_model.transformer.text_model.{CLIP}", "text_encoder"), (CLIP, "text_encoder"),
        (f"conditioner.embedders.0.transformer.text_model.{CLIP}", "text_encoder"),
        (f"text_encoders.clip_l.transformer.text_model.{CLIP}", "text_encoder"),
        (f"text_encoder_2.text_model.{CLIP}", "text_encoder_2"), (f"text_model.{CLIP}", "text_encoder_2"),
    ],
)  # fmt: skip
def test_a_text_encoder_is_found_with_and_without_its_root(name, component, inner):
    """transformers 5 leaves text_model out. One encoder's names are not the other's."""
    other = {"text_encoder": "text_encoder_2", "text_encoder_2": "text_encoder"}[component]
    names = Names(tensors({f"{name}.weight": (3, 2)}))
    assert names.find(f"{component}.{inner}") == {Slot((f"{name}.weight",))}
    assert bool(names.find(f"{other}.{inner}")) == (name in (CLIP, f"text_model.{CLIP}"))


@pytest.mark.parametrize("ours", ["model.layers.0.mlp.fc", "layers.0.mlp.fc", "model_layers_0_mlp_fc"])
@pytest.mark.parametrize("theirs", ["model.layers.0.mlp.fc", "layers.0.mlp.fc"])
def test_a_root_may_be_there_or_not(ours, theirs):
    assert Names(tensors({f"{theirs}.weight": (3, 2)})).find(ours) == {Slot((f"{theirs}.weight",))}


def test_a_name_that_fits_two_components_is_refused(tmp_path):
    """Of a pipeline with two text encoders, by an adapter that does not say which."""
    W = random_weights({f"{part}.{CLIP}.weight": (4, 4) for part in ("text_encoder", "text_encoder_2")})
    base, out = write_pipeline(tmp_path / "base", W), tmp_path / "out"
    with pytest.raises(MismatchError, match=r"could be text_encoder\.enc.* or text_encoder_2\.enc"):
        merge_by_name(base, adapter(tmp_path / "a", {CLIP: (4, 4)}), out)
    merge_by_name(base, adapter(tmp_path / "b", {f"text_encoder_2.{CLIP}": (4, 4)}), out)
    assert np.array_equal(read(out)[f"text_encoder.{CLIP}.weight"], read(base)[f"text_encoder.{CLIP}.weight"])


# ---- fused maps


def flux(names, D=4):
    """Shapes of two double and single blocks of Flux.1 in diffusers' names or Black Forest Labs'."""
    shapes = {}
    for ours, (theirs, maps) in FUSED.items():
        for n in range(2):
            for whole, parts in maps.items():
                I = 5 * D if parts == ("proj_out",) else D  # noqa: E741
                rows = [I * WIDTHS.get(p, 1) if len(parts) > 1 else D + 2 for p in parts]
                if names == "BFL":
                    shapes[f"transformer.{ours}.{n}.{whole}"] = sum(rows), I
                else:
                    shapes |= {
                        f"transformer.{theirs}.{n}.{p}": (k, I) for p, k in zip(parts, rows, strict=True)
                    }
    for whole, part in AROUND.items():
        shapes[f"transformer.{whole if names == 'BFL' else part}"] = 2 * D, D
    return shapes


def in_bfl(weights):
    """Matrices of Flux in diffusers' names, as Black Forest Labs' model has them."""
    made = {}
    for ours, (theirs, maps) in FUSED.items():
        for n in range(2):
            for whole, parts in maps.items():
                made[f"{ours}.{n}.{whole}"] = np.concatenate(
                    [weights[f"transformer.{theirs}.{n}.{p}"] for p in parts]
                )
    for whole, part in AROUND.items():
        a = weights[f"transformer.{part}"]
        made[whole] = np.roll(a, len(a) // 2, 0) if whole == SWAPPED else a
    return made


@pytest.mark.parametrize("before", ["", "transformer.", "model.diffusion_model."])
def test_flux_is_split_and_fused_and_its_last_rows_swapped(before, tmp_path):
    """An adapter with diffusers' names changes Black Forest Labs' weights as its own, and the other way."""
    split = adapter(tmp_path / "split", flux("diffusers"))
    dW = deltas(split)
    base = {f"{before}{n}.weight": RNG.normal(size=a.shape) for n, a in in_bfl(dW).items()}
    found = merged(tmp_path, base, split)
    assert found.keys() == base.keys()
    assert all(near(found[f"{before}{n}.weight"], a) for n, a in in_bfl(dW).items())
    fused = adapter(tmp_path / "fused", flux("BFL"))
    base = {f"{n}.weight": RNG.normal(size=a.shape) for n, a in dW.items()}
    found = {name.removesuffix(".weight"): a for name, a in merged(tmp_path, base, fused).items()}
    ours = in_bfl(found)
    assert all(near(ours[m.removeprefix("transformer.")], a) for m, a in deltas(fused).items())


@pytest.mark.parametrize(("whole", "parts"), [(w, p) for w, splits in MAPS.items() for p in splits])
def test_fused_maps_are_found_in_parts_and_parts_in_fused_maps(whole, parts, tmp_path):
    n, (O, I) = len(parts), (4, 3)  # noqa: E741
    ending = "in_proj_weight" if whole == "in_proj" else f"{whole}.weight"
    base = {f"b.{ending}": RNG.normal(size=(n * O, I)), "b.other.weight": RNG.normal(size=(2, 2))}
    split = adapter(tmp_path / "split", {f"b.{part}": (O, I) for part in parts})
    found = merged(tmp_path, base, split)
    assert near(found[f"b.{ending}"], np.concatenate([deltas(split)[f"b.{part}"] for part in parts]))
    one = adapter(tmp_path / "one", {f"b.{parts[-1]}": (O, I)})
    found = merged(tmp_path, base, one)[f"b.{ending}"]
    assert near(found[-O:], deltas(one)[f"b.{parts[-1]}"])
    assert not found[:-O].any()
    sizes = [O, 2, 2][:n] if n == 3 else [O] * n  # fewer heads for keys and values
    base = {f"b.{part}.weight": RNG.normal(size=(k, I)) for part, k in zip(parts, sizes, strict=True)}
    fused = adapter(tmp_path / "fused", {f"b.{whole}": (sum(sizes), I)})
    found = merged(tmp_path, base, fused)
    assert near(np.concatenate([found[f"b.{part}.weight"] for part in parts]), deltas(fused)[f"b.{whole}"])


@given(st.integers(1, 9), st.integers(1, 5), st.sampled_from(["equal", "flux", "few", "two"]))
def test_the_parts_of_a_map_tile_it(rows, few, kind):
    parts, sizes = {
        "equal": (("q", "k", "v"), [rows] * 3), "two": (("gate_proj", "up_proj"), [rows] * 2),
        "flux": (("a.to_q", "a.to_k", "a.to_v", "proj_mlp"), [rows] * 3 + [4 * rows]),
        "few": (("q", "k", "v"), [few + rows, few, few]),
    }[kind]  # fmt: skip
    starts = [
        start_of(Slot(("w",), parts, own), size, sum(sizes)) for own, size in zip(parts, sizes, strict=True)
    ]
    assert starts == [0, *np.cumsum(sizes)[:-1]]


@pytest.mark.parametrize(
    ("own", "rows", "total"), [("q", 4, 13), ("v", 5, 9), ("q", 4, 20), ("k", 4, 11), ("gate", 3, 7)]
)
def test_a_part_with_other_rows_has_no_place(own, rows, total):
    """k and v have as many rows as each other, and no more than q."""
    parts = ("gate", "up") if own == "gate" else ("q", "k", "v")
    assert start_of(Slot(("w",), parts, own), rows, total) is None


def test_two_modules_at_one_place_are_refused(tmp_path):
    base = write_file(tmp_path / "base.safetensors", random_weights({"b.qkv.weight": (12, 3)}))
    twice = adapter(tmp_path / "twice", {"b.qkv": (12, 3), "b.to_k": (4, 3)})
    with pytest.raises(MismatchError, match=r"b\.qkv and b\.to_k both change b\.qkv\.weight"):
        merge_by_name(base, twice, tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


def test_open_clip_has_the_rows_of_three_maps_in_one(tmp_path):
    """The second text encoder of SDXL in a checkpoint of all."""
    at, to = (
        "conditioner.embedders.1.model.transformer.resblocks.3",
        "text_encoder_2.text_model.encoder.layers.3",
    )
    shapes = {"attn.in_proj_weight": (12, 4), "attn.out_proj.weight": (4, 4), "mlp.c_fc.weight": (16, 4),
              "mlp.c_proj.weight": (4, 16)}  # fmt: skip
    base = {f"{at}.{name}": RNG.normal(size=shape) for name, shape in shapes.items()}
    base |= {f"{at}.mlp.c_fc.bias": RNG.normal(size=16), f"{at}.mlp.c_proj.bias": RNG.normal(size=4)}
    maps = {f"self_attn.{p}_proj": (4, 4) for p in ("q", "k", "v", "out")} | {
        "mlp.fc1": (16, 4),
        "mlp.fc2": (4, 16),
    }
    folder = adapter(tmp_path / "a", {f"{to}.{name}": shape for name, shape in maps.items()})
    found, dW = merged(tmp_path, base, folder), deltas(folder)
    qkv = np.concatenate([dW[f"{to}.self_attn.{p}_proj"] for p in "qkv"])
    assert near(found[f"{at}.attn.in_proj_weight"], qkv)
    assert near(found[f"{at}.attn.out_proj.weight"], dW[f"{to}.self_attn.out_proj"])
    assert near(found[f"{at}.mlp.c_fc.weight"], dW[f"{to}.mlp.fc1"])
    assert near(found[f"{at}.mlp.c_proj.weight"], dW[f"{to}.mlp.fc2"])


# ---- magnitudes at these places


def kohya_dora(path, module, O, I, axis):  # noqa: E741
    """LyCORIS' file of one DoRA module, with magnitudes of outputs (0) or inputs (1); its A, B and m."""
    A, B, m = (
        RNG.normal(size=shape).astype(np.float32) for shape in ((2, I), (O, 2), ((O, 1), (1, I))[axis])
    )
    save_file(
        {f"{module}.lora_down.weight": A, f"{module}.lora_up.weight": B, f"{module}.dora_scale": abs(m)}, path
    )
    return A.astype(float), B.astype(float), abs(m).astype(float)


@pytest.mark.parametrize("axis", [0, 1])
def test_magnitudes_of_a_part_act_on_its_rows_alone(axis, tmp_path):
    W = RNG.normal(size=(12, 3))
    A, B, m = kohya_dora(tmp_path / "a.safetensors", "b.to_k", 4, 3, axis)
    V = W[4:8] + B @ A
    V = m * V / np.linalg.norm(V, axis=1 - axis, keepdims=True)
    found = merged(tmp_path, {"b.qkv.weight": W}, tmp_path / "a.safetensors")["b.qkv.weight"]
    assert near(found[4:8], V - W[4:8])
    assert not found[:4].any()
    assert not found[8:].any()


def test_magnitudes_of_a_fused_map_act_on_its_parts_unless_they_are_of_inputs(tmp_path):
    W = RNG.normal(size=(12, 3))
    parts = {f"b.{p}_proj.weight": W[4 * i : 4 * i + 4] for i, p in enumerate("qkv")}
    A, B, m = kohya_dora(tmp_path / "out.st.safetensors", "b.qkv", 12, 3, 0)
    V = W + B @ A
    V = m * V / np.linalg.norm(V, axis=1, keepdims=True)
    found = merged(tmp_path, parts, tmp_path / "out.st.safetensors")
    assert near(np.concatenate([found[f"b.{p}_proj.weight"] for p in "qkv"]), V - W)
    kohya_dora(tmp_path / "in.safetensors", "b.qkv", 12, 3, 1)
    with pytest.raises(
        UnsupportedError, match="magnitude of each input, and the base has its rows in several"
    ):
        merged(tmp_path, parts, tmp_path / "in.safetensors")


# ---- what is stored (I, O)


@pytest.mark.parametrize("turned", [True, False])
@pytest.mark.parametrize("square", [True, False])
def test_gpt2s_maps_are_turned_by_names_and_shapes_or_by_the_config(turned, square, tmp_path):
    """A bias tells which side is the outputs'; of square maps alone only the adapter's config does."""
    O, I = (4, 4) if square else (12, 4)  # noqa: E741
    name = "c_proj" if square else "c_attn"
    W = {f"transformer.h.0.attn.{name}.weight": RNG.normal(size=(I, O) if turned or square else (O, I))}
    if not square:
        W[f"transformer.h.0.attn.{name}.bias"] = RNG.normal(size=O)
    for before in ("transformer.", ""):
        folder = adapter(
            tmp_path / f"a{before}", {f"{before}h.0.attn.{name}": (O, I)}, fan_in_fan_out=turned and square
        )
        (dW,) = deltas(folder).values()
        found = merged(tmp_path, W, folder)[f"transformer.h.0.attn.{name}.weight"]
        assert near(found, dW.T if turned else dW)


def test_inspect_compares_with_the_same_weights_as_merge_changes(tmp_path):
    """Fused and split maps, names of any tool and pipelines: |ΔW| / |W| is merge's own."""
    folder = adapter(tmp_path / "split", flux("diffusers"))
    W = {f"{n}.weight": RNG.normal(size=a.shape) for n, a in in_bfl(deltas(folder)).items()}
    base = write_file(tmp_path / "base.safetensors", W, "float64")
    told = {
        row.module: row.relative for row in merge_by_name(base, folder, tmp_path / "out.safetensors").rows
    }
    seen = {m.module: m.base.relative for m in ml.inspect(folder, base).modules}
    assert seen.keys() == told.keys()
    assert all(math.isclose(seen[m], told[m], rel_tol=1e-9) for m in seen)
    names = {f"transformer.{name}": a for name, a in W.items()}
    piped = write_pipeline(tmp_path / "pipe", names, "float64")
    again = {m.module: m.base.relative for m in ml.inspect(folder, piped).modules}
    assert again == seen


def test_the_weight_of_a_place_is_that_which_is_changed(tmp_path):
    shapes = {"b.in_proj_weight": (12, 3), "h.0.c_attn.weight": (3, 12), "h.0.c_attn.bias": (12,)}
    W = {name: RNG.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    base = Tensors("base", {n: a.shape for n, a in W.items()}, dict.fromkeys(W, "F32"), W.__getitem__)
    folder = adapter(tmp_path / "a", {"b.k_proj": (4, 3), "h.0.c_attn": (12, 3)})
    found = places(ml.open_adapter(folder), Names(base))
    assert np.array_equal(weight_of(base, found["b.k_proj"]), W["b.in_proj_weight"][4:8])
    assert np.array_equal(weight_of(base, found["h.0.c_attn"]), W["h.0.c_attn.weight"].T)
    assert weight_of(base, found["b.k_proj"]).dtype == np.float64


def heads(folder, q, k):
    """A folder with a fused map of 12 rows and a config with these heads."""
    write_shards(folder, random_weights({"b.qkv_proj.weight": (12, 3)}))
    (folder / "config.json").write_text(json.dumps({"num_attention_heads": q, "num_key_value_heads": k}))
    return folder


def test_unequal_parts_of_a_map_are_those_of_the_bases_heads_or_fill_it(tmp_path):
    alone = write_file(tmp_path / "base.safetensors", random_weights({"b.qkv_proj.weight": (12, 3)}))
    grouped, equal = heads(tmp_path / "grouped", 4, 1), heads(tmp_path / "equal", 4, 4)
    all_three = adapter(tmp_path / "all", {"b.q_proj": (8, 3), "b.k_proj": (2, 3), "b.v_proj": (2, 3)})
    one = adapter(tmp_path / "one", {"b.k_proj": (2, 3)})
    torn = adapter(tmp_path / "torn", {"b.q_proj": (4, 3), "b.k_proj": (2, 3), "b.v_proj": (2, 3)})
    right = {all_three: (alone, grouped, equal), one: (grouped,), torn: ()}
    for lora in right:
        for base in (alone, grouped, equal):
            out = tmp_path / f"{lora.name}-{base.name}"
            if base in right[lora]:
                merge_by_name(base, lora, out)
            else:
                with pytest.raises(MismatchError, match=r"b\.qkv_proj\.weight have .* of its 12 rows"):
                    merge_by_name(base, lora, out)
                assert not out.exists()


def test_a_bias_is_never_put_among_rows_in_another_order(tmp_path):
    ends = {"weight": (8, 3), "bias": (8,)}
    shapes = {f"{SWAPPED}.{end}": shape for end, shape in ends.items()}
    shapes["single_blocks.0.linear2.weight"] = (3, 3)
    base = write_file(tmp_path / "base.safetensors", random_weights(shapes))
    more = {f"base_model.model.norm_out.linear.{e}": np.ones(n, np.float32) for e, n in ends.items()}
    column = np.ones((3, 1), np.float32)
    lora = write_peft(
        tmp_path / "a", {"single_transformer_blocks.0.proj_out": (column.T, column)}, more,
        modules_to_save=["norm_out.linear"],
    )  # fmt: skip
    with pytest.raises(MismatchError, match=r"the base has no parameter norm_out\.linear\.(weight|bias)"):
        merge_by_name(base, lora, tmp_path / "out.safetensors")
