"""A base of any form becomes W + ΔW to the rounding of its dtype, and all else in it stays to the bit."""

import json
import math
import shutil
import tracemalloc

import numpy as np
import pytest
from bases import KINDS, listed, random_weights, read, write_file, write_pipeline, write_shards
from by_hand import write_peft
from helpers import tiny
from lora_cases import READ, ROOT, UNIT, change, expected, how
from peft_cases import FIXTURES
from safetensors.numpy import save_file

import minilora as ml
from minilora.errors import InputError, MismatchError, NonFiniteError, StorageError, UnsupportedError
from minilora.formats.safetensors import CALLED, header_of, open_tensors, stored
from minilora.merging import by_name
from minilora.merging.by_name import LIMIT, merge_by_name
from minilora.merging.llama import Merge, merge_llama

OTHERWISE = ("peft/bin_old", "kohya_lycoris/refuse", "synthetic_names/comfy")  # pickles, and what is no LoRA
NO_SCALE = ("loralib", "torchtune")  # in their files; `convert` is given it
TOLD = [name for name in READ if not name.startswith((*OTHERWISE, *NO_SCALE))]
DORA = [name for name in TOLD if "dora" in name]
PLAIN = [name for name in TOLD if name not in DORA]


def file_of(name):
    """What a user gives to `merge`."""
    folder = ROOT / name
    return next(folder.glob("*.f32.gguf"), folder / "style" if name.endswith("subfolder") else folder)


def refused(error, match, base, adapter, out, **given):
    """Merging raises, and leaves the folder around as it was."""
    before = listed(out.parent)
    with pytest.raises(error, match=match):
        merge_by_name(base, adapter, out, **given)
    assert listed(out.parent) == before


def base_of(name, adapter, where, dtype, form):
    """A base with random weights under the true names of a tool's modules, and its path."""
    changes, _ = expected(name)
    W = random_weights({f"{module}.weight": dW.shape for module, dW in changes.items()})
    for module, pair in adapter.pairs.items():
        if pair.copy:
            W[f"{module}.weight"] = adapter.value(pair.copy).astype(float)
    if name.startswith("gguf/embed"):
        W["lm_head.weight"] = W["model.embed_tokens.weight"] + 1
    if name.endswith("xlabs_flux"):  # expected.npz has the parts that it adapts
        D = len(W["transformer.single_transformer_blocks.0.attn.to_q.weight"])
        W |= random_weights(
            {f"transformer.single_transformer_blocks.{n}.proj_mlp.weight": (4 * D, D) for n in (0, 1)}
        )
    if name.startswith("gguf"):
        folder = write_shards(where / "base", W, dtype)
        shutil.copy(ROOT / name / "base_config.json", folder / "config.json")
        return W, folder
    parts = {key.partition(".")[0] for key in W}
    if (
        form == "pipeline"
        and parts <= {"unet", "transformer", "text_encoder", "text_encoder_2"}
        and "h." not in str([*W])
    ):
        return W, write_pipeline(where / "base", W, dtype)
    if form == "shards":
        return W, write_shards(where / "base", W, dtype)
    return W, write_file(where / "base.safetensors", W, dtype)


def out_of(base):
    """The output beside a base, of its form."""
    return base.with_name("out" + base.suffix)


@pytest.mark.parametrize(("name", "i"), [(name, i) for i, name in enumerate(PLAIN)])
def test_a_merged_base_is_W_plus_the_tools_own_change(name, i, tmp_path):
    """To half a last digit of the dtype, and the float32 in which the tool multiplied."""
    dtype, form = [*KINDS][i % 4], ("file", "shards", "pipeline")[i % 3]
    adapter, (changes, _) = ml.open_adapter(file_of(name), **how(name)), expected(name)
    W, base = base_of(name, adapter, tmp_path, dtype, form)
    before = listed(tmp_path)
    found = merge_by_name(base, file_of(name), out_of(base))
    assert {path: a for path, a in listed(tmp_path).items() if path in before} == before
    assert found.dtype == dtype
    written, old = read(out_of(base)), read(base)
    assert written.keys() == W.keys()
    sizes = {}
    for module, pair in adapter.pairs.items():
        A, B = (abs(x).astype(np.float64) for x in adapter.factors(module))
        sizes[module] = (pair.r + 3) * UNIT * abs(pair.scale) * (B @ A).max()
    for key, a in written.items():
        module = key.removesuffix(".weight")
        dW = changes.get(module, np.zeros(a.shape)).astype(np.float64)
        if name == "gguf/qwen_small":  # llama.cpp's converter has lost rsLoRA's scale
            dW /= np.sqrt(adapter.pairs[module].r)
        whole, size = old[key] + dW.reshape(a.shape), sizes.get(module, max(sizes.values()))
        bound = size + (1 + 2.0**-15) * KINDS[dtype] * (abs(whole) + size) + 2.0**-25 * (dtype == "float16")
        assert (abs(a - whole) <= bound).all(), key
        assert np.array_equal(a, old[key]) == (module not in changes), key


@pytest.mark.parametrize("name", DORA)
def test_magnitudes_scale_as_in_the_tool(name, tmp_path):
    """m (W + ΔW) / |W + ΔW|, of outputs or of inputs; LyCORIS adds float32's eps to the norm."""
    adapter, (_, held) = ml.open_adapter(file_of(name)), expected(name)
    W = {f"{module}.weight": held[f"W::{module}"] for module in adapter.pairs}
    base = write_file(tmp_path / "base.safetensors", W)
    merge_by_name(base, file_of(name), out_of(base))
    for key, a in read(out_of(base)).items():
        module = key.removesuffix(".weight")
        pair, axis = adapter.pairs[module], int(name.endswith("wd_in_old"))
        theirs = held[f"Wmerged::{module}"].astype(np.float64)
        old, dW = W[key].astype(np.float64), change(adapter, module).reshape(a.shape)
        A, B = (abs(x).astype(np.float64) for x in adapter.factors(module))
        size = abs(old) + abs(pair.scale) * (B @ A).reshape(a.shape)  # of what the tool sums in float32
        axes = tuple(i for i in range(a.ndim) if i != axis)
        norm = np.sqrt(((old + dW) ** 2).sum(axes, keepdims=True))
        reach = np.sqrt((size**2).sum(axes, keepdims=True))
        n = old.size // old.shape[axis]
        off = (pair.r + 4) * UNIT * (size / norm + reach * abs(old + dW) / norm**2)
        off += (n * UNIT + 2 * UNIT / norm) * abs(old + dW) / norm
        m = adapter.value(next(iter(pair.vectors.values()))).reshape(
            [-1 if i == axis else 1 for i in range(a.ndim)]
        )
        assert (abs(a - theirs) <= abs(m) * off + 2 * UNIT * abs(theirs)).all(), key


UNTIED = [
    folder.name for folder in sorted((FIXTURES / "adapters").iterdir()) if not folder.name.startswith("tied")
]
BOTH = [(name, None) for name in UNTIED]
BOTH += [
    (name, dtype) for name in ("untied--patterns", "biases--DoRA") for dtype in KINDS if dtype != "float32"
]


@pytest.mark.parametrize(("name", "dtype"), BOTH)
def test_a_llama_is_merged_to_the_same_bits_by_either_way(name, dtype, tmp_path):
    """Both sum in float64 and round once; DoRA, biases and saved modules too. In float64 the order shows."""
    base, adapter = FIXTURES / "bases" / name.partition("--")[0], FIXTURES / "adapters" / name
    one = merge_llama(base, adapter, tmp_path / "one", dtype=dtype)
    two = merge_by_name(base, adapter, tmp_path / "two", dtype=dtype)
    a, b = read(tmp_path / "one"), read(tmp_path / "two")
    assert one.dtype == two.dtype
    assert a.keys() == b.keys()
    for key in a:
        if dtype == "float64":
            assert abs(a[key] - b[key]).max() <= 8 * 2.0**-53 * abs(a[key]).max(), key
        else:
            assert np.array_equal(a[key], b[key]), key
    rows = {row.module: row for row in two.rows}
    for row in one.rows:
        if row.module in rows:  # a saved module is in no row here
            for part in ("largest", "relative"):
                assert getattr(rows[row.module], part) == pytest.approx(getattr(row, part), rel=1e-10)
            assert rows[row.module].lost == pytest.approx(row.lost, rel=1e-6)


SHAPES = {f"blocks.{i}.{kind}.weight": shape for i in range(4) for kind, shape in
          {"fc": (6, 5), "conv": (4, 3, 3, 2), "norm": (7,)}.items()}  # fmt: skip


def factors(shapes, r=2, seed=1, size=1.0):
    """Random factors for weights of these shapes, by module."""
    rng = np.random.default_rng(seed)
    return {
        name.removesuffix(".weight"): (
            rng.normal(size=(r, *shape[1:])).astype(np.float32),
            size * rng.normal(size=(shape[0], r, *(1,) * (len(shape) - 2))).astype(np.float32),
        )
        for name, shape in shapes.items()
        if len(shape) > 1
    }


@pytest.fixture
def adapter(tmp_path):
    return write_peft(tmp_path / "adapter", factors(SHAPES))


@pytest.mark.parametrize("dtype", KINDS)
def test_what_is_not_adapted_stays_to_the_byte_and_so_do_header_and_strings(dtype, tmp_path):
    """All tensors of other dtypes, too, and all if ΔW is zero."""
    W = {name: stored(a, dtype) for name, a in random_weights(SHAPES).items()}
    write_file(tmp_path / "base.safetensors", W, dtype, {"format": "pt", "modelspec.title": "ä \n"})
    if dtype == "float16":  # no package writes bfloat16 from NumPy
        more = {"ids": np.arange(5), "mask": np.array([True, False]), "codes": np.arange(3, dtype=np.uint8)}
        save_file(
            {k: a.astype(dtype) for k, a in W.items()} | more,
            tmp_path / "base.safetensors",
            {"b": "1", "a": "2"},
        )
    zero = write_peft(tmp_path / "zero", factors(SHAPES, size=0.0))
    found = merge_by_name(tmp_path / "base.safetensors", zero, tmp_path / "zero.safetensors")
    assert (tmp_path / "zero.safetensors").read_bytes() == (tmp_path / "base.safetensors").read_bytes()
    assert not found.rows
    assert (found.relative, found.lost) == (0, 0)
    one = write_peft(tmp_path / "one", factors({"blocks.1.fc.weight": (6, 5)}))
    merge_by_name(tmp_path / "base.safetensors", one, tmp_path / "out.safetensors")
    old, new = ((tmp_path / f"{which}.safetensors").read_bytes() for which in ("base", "out"))
    start, _, _, places = header_of(tmp_path / "base.safetensors")
    place = places["blocks.1.fc.weight"]
    begin, end = start + place.begin, start + place.end
    assert old[:begin] + old[end:] == new[:begin] + new[end:]
    assert old[begin:end] != new[begin:end]


@pytest.mark.parametrize("dtype", KINDS)
def test_another_dtype_is_that_of_every_float_and_is_told(dtype, tmp_path, adapter):
    W = random_weights(SHAPES)
    folder = write_shards(tmp_path / "base", W)
    save_file({"ids": np.arange(5), "x": np.ones(3, np.float32)}, folder / "model-00001-of-00003.safetensors")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"] = {n: f for n, f in index["weight_map"].items() if "00001-of" not in f}
    index["weight_map"] |= dict.fromkeys(("ids", "x"), "model-00001-of-00003.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {"torch_dtype": "float32", "dtype": "float32", "architectures": ["A"], "x": [1, "ä"]}
    (folder / "config.json").write_text(json.dumps(config))
    inside = {name: W[name].shape for name in index["weight_map"] if name in W}
    adapter = write_peft(tmp_path / "some", factors(inside))
    merge_by_name(folder, adapter, tmp_path / "out", dtype=dtype)
    total = 0
    for file in (tmp_path / "out").glob("*.safetensors"):
        _, _, metadata, places = header_of(file)
        assert metadata == header_of(folder / file.name).metadata
        assert {p.dtype for p in places.values()} <= {CALLED[dtype], "I64"}
        total += sum(p.end - p.begin for p in places.values())
    now = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert now == index | {"metadata": {"total_size": total}}
    told = json.loads((tmp_path / "out/config.json").read_text())
    assert told == config | {"torch_dtype": dtype, "dtype": dtype}
    written = open_tensors(tmp_path / "out/model-00002-of-00003.safetensors")
    for name in written:
        if written.shapes[name] == (7,):
            assert np.array_equal(written[name], stored(W[name].astype(np.float32), dtype))


def test_the_peak_of_memory_is_one_tensor_in_float64(tmp_path, monkeypatch):
    """Whatever the number of tensors: 8 bytes for a number of the largest, the factors, and some blocks."""
    monkeypatch.setattr(by_name, "BLOCK", 1 << 12)
    largest, r = 1 << 17, 2
    shapes = {f"blocks.{i}.fc.weight": (256, largest // 256 >> (i % 2)) for i in range(40)}
    adapter = write_peft(tmp_path / "adapter", factors(shapes, r))
    for dtype in ("float32", "bfloat16"):
        base = write_shards(tmp_path / dtype, random_weights(shapes), dtype)
        tracemalloc.start()
        merge_by_name(base, adapter, tmp_path / f"out-{dtype}")
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak <= 8 * largest + 8 * 2 * r * (256 + largest // 256) + 16 * 8 * by_name.BLOCK + (1 << 19)
        assert peak < sum(math.prod(s) for s in shapes.values())  # a quarter of the base in float32


@pytest.mark.parametrize("form", [write_file, write_shards, write_pipeline])
def test_a_failing_write_leaves_nothing_and_the_base_as_it_was(form, tmp_path, monkeypatch):
    shapes = {f"unet.{name}": shape for name, shape in SHAPES.items()}
    base = form(tmp_path / ("base" + ".safetensors" * (form is write_file)), random_weights(shapes))
    adapter, calls = write_peft(tmp_path / "adapter", factors(shapes)), []

    def full(a, dtype):
        calls.append(dtype)
        if len(calls) > 3:
            raise OSError(28, "No space left on device")
        return a.astype("<f4")

    monkeypatch.setattr(by_name, "encoded", full)
    refused(StorageError, "No space left", base, adapter, out_of(base))


# ---- the forms of a base


def test_other_files_are_copied_and_other_forms_of_the_weights_are_not(tmp_path):
    names = {f"{part}.{name}": shape for part in ("unet", "text_encoder") for name, shape in SHAPES.items()}
    base = write_pipeline(tmp_path / "base", random_weights(names))
    kept = {
        "scheduler/config.json": b"{}",
        "tokenizer/merges.txt": b"a b",
        "README.md": b"card \xff",
        "unet/x/y.py": b"1",
        "safety_checker/pytorch_model.bin": b"of another model",
    }
    left = ("unet/diffusion_pytorch_model.fp16.safetensors", "unet/diffusion_pytorch_model.bin", "all.ckpt",
            "text_encoder/pytorch_model.bin.index.json", "unet/model.onnx")  # fmt: skip
    for name in (*kept, *left, ".git/config", "unet/.cache"):
        path = base / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(kept.get(name, b"x"))
    adapter = write_peft(tmp_path / "adapter", factors(names))
    found = merge_by_name(base, adapter, tmp_path / "out")
    old, new = listed(base), listed(tmp_path / "out")
    there = {str(path): a for path, a in new.items() if a is not False}
    assert there.keys() == {str(p) for p, a in old.items() if a is not False} - {
        *left,
        ".git/config",
        "unet/.cache",
    }
    assert all(there[name] == a for name, a in kept.items())
    assert all(
        there[n] == a for p, a in old.items() if (n := str(p)) in there and not n.endswith("safetensors")
    )
    assert any("weights in another form" in note and "and 4 more" in note for note in found.notes)
    (base / "unet/link").symlink_to(tmp_path / "adapter")
    refused(StorageError, "link: is a link", base, adapter, tmp_path / "again")


@pytest.mark.parametrize("name", ["diffusion_pytorch_model.fp16.safetensors", "sd.safetensors"])
def test_a_folder_with_one_file_of_any_name_is_a_base(name, tmp_path, adapter):
    W = random_weights(SHAPES)
    write_file(tmp_path / "base" / name, W)
    merge_by_name(tmp_path / "base", adapter, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == [name]
    seen = ml.inspect(adapter, tmp_path / "base")
    assert all(m.base for m in seen.modules)
    write_file(tmp_path / "base/other.safetensors", W)
    refused(StorageError, "has 2 tensor files", tmp_path / "base", adapter, tmp_path / "again")


def test_an_index_of_a_variant_is_read_and_copied(tmp_path, adapter):
    base = write_shards(tmp_path / "base", random_weights(SHAPES))
    (base / "model.safetensors.index.json").rename(base / "model.safetensors.index.fp16.json")
    merge_by_name(base, adapter, tmp_path / "out")
    assert {p.name for p in base.iterdir()} == {p.name for p in (tmp_path / "out").iterdir()}


def test_merge_checkpoint_takes_the_llamas_way_for_a_llama_and_says_why_elsewhere(tmp_path, adapter):
    llama = ml.merge_checkpoint(
        FIXTURES / "bases/untied", FIXTURES / "adapters/untied--q-and-v", tmp_path / "m"
    )
    assert isinstance(llama, Merge)
    W = random_weights(SHAPES)
    alone = write_file(tmp_path / "base.safetensors", W)
    folder = write_shards(tmp_path / "folder", W)
    cases = [
        (alone, None, "a file without a config"),
        (folder, None, "no config.json"),
        (folder, {"model_type": "gpt2"}, "model_type is 'gpt2'"),
        (folder, {"model_type": "qwen2"}, "model_type is 'qwen2'"),
        (folder, {"model_type": "llama", "sliding_window": 5}, "sliding_window"),
        (folder, {"_class_name": "UNet2DConditionModel"}, "no language model"),
        (folder, {"_class_name": "AutoencoderKL", "model_type": "llama"}, "no language model"),
    ]
    for i, (base, config, why) in enumerate(cases):
        if config:
            (base / "config.json").write_text(json.dumps(config))
        out = tmp_path / f"out{i}{base.suffix}"
        found = ml.merge_checkpoint(base, adapter, out)
        assert found.notes[0].startswith("no logits were compared: ")
        assert why in found.notes[0]
        assert f"note: {found.notes[0]}" in str(found).splitlines()
        with pytest.raises(InputError, match="expected no probe"):
            ml.merge_checkpoint(base, adapter, tmp_path / "never", probe=[1])
    of_pipeline = {f"unet.{name}": shape for name, shape in SHAPES.items()}
    pipe = write_pipeline(tmp_path / "pipe", random_weights(of_pipeline))
    found = ml.merge_checkpoint(pipe, write_peft(tmp_path / "b", factors(of_pipeline)), tmp_path / "piped")
    assert "a pipeline of several models" in found.notes[0]
    with pytest.raises(StorageError, match="none"):
        ml.merge_checkpoint(tmp_path / "none", adapter, tmp_path / "never")


# ---- what is said about it


def test_every_number_of_the_report_matches_the_dense_matrices(tmp_path, adapter):
    W = random_weights(SHAPES)
    base = write_file(tmp_path / "base.safetensors", W, "bfloat16")
    found = merge_by_name(base, adapter, tmp_path / "out.safetensors")
    old, new, given = read(base), read(tmp_path / "out.safetensors"), ml.open_adapter(adapter)
    assert [row.module for row in found.rows] == [*given.pairs]
    sums = np.zeros(3)
    for row in found.rows:
        a = old[f"{row.module}.weight"].astype(float)
        dW = change(given, row.module).reshape(a.shape)
        norms = [np.linalg.norm(x) for x in (dW, a, new[f"{row.module}.weight"] - (a + dW))]
        sums += np.square(norms)
        assert row.largest == pytest.approx(abs(dW).max(), rel=1e-10)
        assert row.relative == pytest.approx(norms[0] / norms[1], rel=1e-10)
        assert row.lost == pytest.approx(norms[2] / norms[0], rel=1e-6)
        most = KINDS["bfloat16"] * np.linalg.norm(new[f"{row.module}.weight"]) / norms[0]
        assert 0 < row.lost < (1 + KINDS["bfloat16"]) * most
    assert found.relative == pytest.approx(math.sqrt(sums[0] / sums[1]))
    assert found.lost == pytest.approx(math.sqrt(sums[2] / sums[0]))
    again = json.loads(json.dumps(found.data()))
    assert [row["module"] for row in again["rows"]] == [*given.pairs]
    assert again["dtype"] == "bfloat16"


def test_a_report_shows_some_modules_and_counts_the_others(tmp_path):
    shapes = {f"blocks.{i}.fc.weight": (3, 2) for i in range(LIMIT + 2)}
    base = write_file(tmp_path / "base.safetensors", random_weights(shapes))
    for n, more in ((LIMIT, ""), (LIMIT + 1, "1 more module is"), (LIMIT + 2, "2 more modules are")):
        some = dict([*shapes.items()][:n])
        adapter = write_peft(tmp_path / f"a{n}", factors(some))
        lines = str(merge_by_name(base, adapter, tmp_path / f"out{n}.safetensors")).splitlines()
        assert sum(line.startswith("blocks.") for line in lines) == LIMIT
        assert ("not shown" in "".join(lines)) == bool(more)
        assert any(line.startswith(more) for line in lines)


def test_progress_counts_the_merged_tensors(tmp_path, adapter):
    base, seen = write_file(tmp_path / "base.safetensors", random_weights(SHAPES)), []
    merge_by_name(base, adapter, tmp_path / "out.safetensors", progress=lambda *count: seen.append(count))
    assert seen == [(i + 1, 8) for i in range(8)]


# ---- what is refused, and that nothing is left of it


def test_what_does_not_fit_is_refused_by_name(tmp_path):
    W = random_weights(SHAPES | {"lm_head.weight": (5, 4)})
    base, out = write_file(tmp_path / "base.safetensors", W), tmp_path / "out.safetensors"

    def given(name, shapes, more=None, **config):
        return write_peft(tmp_path / name, factors(shapes), more, **config)

    fc = {"blocks.0.fc.weight": (6, 5)}
    gone = given("gone", fc | {"blocks.9.fc.weight": (6, 5)})
    refused(
        MismatchError, r"the base has no blocks\.9\.fc\.weight; nearest: 'blocks\.\d\.fc", base, gone, out
    )
    other = given("other", {"blocks.0.fc.weight": (6, 4)})
    refused(MismatchError, r"blocks\.0\.fc is \(6, 4\); the base's is \(6, 5\)", base, other, out)
    kernel = given("kernel", {"blocks.0.conv.weight": (4, 3, 2, 3)})
    refused(MismatchError, r"conv is \(4, 18\); the base's is \(4, 3, 3, 2\)", base, kernel, out)
    flat = given("flat", {"blocks.0.conv.weight": (4, 18)})
    merge_by_name(base, flat, tmp_path / "flat.safetensors")
    at = "base_model.model.blocks.0"
    bias = given("bias", fc, {f"{at}.fc.base_layer.bias": np.ones(6, np.float32)}, bias="all")
    refused(MismatchError, r"the base has no parameter blocks\.0\.fc\.bias; nearest", base, bias, out)
    saved = given("saved", fc, {f"{at}.norm.weight": np.ones(8, np.float32)}, modules_to_save=["norm"])
    refused(MismatchError, r"norm\.weight has shape \(8,\); the base's is \(7,\)", base, saved, out)
    unmentioned = given("unmentioned", fc, {f"{at}.norm.weight": np.ones(7, np.float32)})
    refused(MismatchError, "not of a LoRA with this config", base, unmentioned, out)
    extra = ROOT / "synthetic_names/comfy_diffusion_model"
    refused(MismatchError, "full difference: 1 module", base, extra, out)
    save_file({"blocks.0.fc.weight": np.ones((6, 5), np.uint8)}, tmp_path / "codes.safetensors")
    codes = tmp_path / "codes.safetensors"
    refused(UnsupportedError, r"blocks\.0\.fc\.weight: dtype is U8", codes, given("codes", fc), out)
    refused(MismatchError, r"is \(6, 5\) in U8", codes, other, out)
    refused(InputError, "dtype is 'float8'; nearest", base, given("d", fc), out, dtype="float8")
    refused(InputError, "ends in .safetensors", base, tmp_path / "d", tmp_path / "out")
    refused(InputError, "name of a folder", write_shards(tmp_path / "f", W), tmp_path / "d", out)
    (tmp_path / "mine.safetensors").write_text("mine")
    refused(StorageError, "is there already", base, tmp_path / "d", tmp_path / "mine.safetensors")
    refused(InputError, "is the input", tmp_path / "f", tmp_path / "d", tmp_path / "f/inside")
    refused(
        UnsupportedError, "is a pickle", write_file(tmp_path / "a.ckpt", W), tmp_path / "d", tmp_path / "o"
    )


def test_a_saved_norm_and_a_bias_take_the_place_of_the_bases(tmp_path):
    W = random_weights(SHAPES | {"blocks.0.fc.bias": (6,)})
    base, at = write_file(tmp_path / "base.safetensors", W, "float16"), "base_model.model.blocks"
    norm, bias = (np.arange(n, dtype=np.float32) / 3 for n in (7, 6))
    adapter = write_peft(
        tmp_path / "a", factors({"blocks.0.fc.weight": (6, 5)}),
        {f"{at}.1.norm.weight": norm, f"{at}.0.fc.base_layer.bias": bias},
        modules_to_save=["1.norm"], bias="all",
    )  # fmt: skip
    found = merge_by_name(base, adapter, tmp_path / "out.safetensors")
    written = read(tmp_path / "out.safetensors")
    assert np.array_equal(written["blocks.1.norm.weight"], stored(norm, "float16"))
    assert np.array_equal(written["blocks.0.fc.bias"], stored(bias, "float16"))
    assert set(found.replaced) == {"blocks.1.norm.weight", "blocks.0.fc.bias"}
    assert "replaced: " in str(found)


def test_a_table_that_is_also_the_head_is_not_changed_for_both(tmp_path):
    """PEFT's adapter of the embedding leaves a tied head as it is, and the other way round."""
    tensors = {"model.embed_tokens": (9, 4), "model.layers.0.q_proj": (4, 4)}
    W = random_weights({f"{name}.weight": shape for name, shape in tensors.items()})
    of_head = write_peft(tmp_path / "head", factors({"lm_head.weight": (9, 4)}))
    saved = write_peft(
        tmp_path / "saved", factors({"model.layers.0.q_proj.weight": (4, 4)}),
        {"base_model.model.model.embed_tokens.weight": np.ones((9, 4), np.float32)},
        modules_to_save=["embed_tokens"],
    )  # fmt: skip
    tied, alone = write_shards(tmp_path / "tied", W), write_file(tmp_path / "alone.safetensors", W)
    (tied / "config.json").write_text('{"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}')
    says = r"model\.embed_tokens\.weight, which is both embedding and head"
    for adapter in (of_head, saved):
        refused(UnsupportedError, says, tied, adapter, tmp_path / "out")
    refused(UnsupportedError, says, alone, of_head, tmp_path / "out.safetensors")
    W["lm_head.weight"] = W["model.embed_tokens.weight"] * 2
    free = write_file(tmp_path / "free.safetensors", W)
    for adapter in (of_head, saved):
        merge_by_name(free, adapter, tmp_path / f"{adapter.name}.safetensors")
    repeated = write_shards(tmp_path / "repeated", W)
    (repeated / "config.json").write_text('{"tie_word_embeddings": true, "model_type": "gemma"}')
    refused(UnsupportedError, r"lm_head\.weight, which is both", repeated, of_head, tmp_path / "out")


def test_another_base_is_refused_unless_forced(tmp_path):
    """An adapter that minilora extracted carries the fingerprint of its base, of any architecture."""
    rng = np.random.default_rng(0)
    W = {"a.weight": rng.normal(size=(5, 4)), "b.weight": rng.normal(size=(3, 5))}
    base = write_file(tmp_path / "base.safetensors", W)
    dW = rng.normal(size=(5, 1)) @ rng.normal(size=(1, 4))
    tuned = write_file(tmp_path / "tuned.safetensors", W | {"a.weight": W["a.weight"] + dW})
    other = write_file(tmp_path / "other.safetensors", {name: a + 1 for name, a in W.items()})
    ml.extract(base, tuned, tmp_path / "lora", rank=1)
    merge_by_name(base, tmp_path / "lora", tmp_path / "out.safetensors")
    again = read(tmp_path / "out.safetensors")["a.weight"]
    assert abs(again - read(tuned)["a.weight"]).max() <= 8 * UNIT * abs(again).max()
    refused(MismatchError, "another base", other, tmp_path / "lora", tmp_path / "no.safetensors")
    merge_by_name(other, tmp_path / "lora", tmp_path / "yes.safetensors", force=True)


@pytest.mark.parametrize("large", [1e5, 7e4, math.inf, math.nan])
def test_values_that_do_not_fit_the_dtype_are_refused(large, tmp_path, adapter):
    W = random_weights(SHAPES)
    W["blocks.1.fc.weight"][2, 3] = large
    base = write_file(tmp_path / "base.safetensors", W)
    says = r"blocks\.1\.fc\.weight has values that are not finite in F16"
    refused(NonFiniteError, says, base, adapter, tmp_path / "out.safetensors", dtype="float16")
    W["blocks.1.norm.weight"][0] = large  # not adapted: only a finite value may not become another
    W["blocks.1.fc.weight"][2, 3] = 0
    write_file(base, W)
    merge_by_name(base, adapter, tmp_path / "same.safetensors")
    if math.isfinite(large):
        says = r"norm\.weight has values that are not finite in F16"
        refused(NonFiniteError, says, base, adapter, tmp_path / "out.safetensors", dtype="float16")
    else:
        merge_by_name(base, adapter, tmp_path / "out.safetensors", dtype="float16")


# ---- what a second look found


def saved(folder, names, shape, W):
    """An adapter of q_proj that brings these weights whole."""
    whole = {
        name: np.arange(math.prod(shape), dtype=np.float32).reshape(shape) + i for i, name in enumerate(names)
    }
    more = {f"base_model.model.{name}": a for name, a in whole.items()}
    modules = [name.rpartition(".")[0] for name in names]
    return write_peft(folder, factors({"model.q_proj.weight": W}), more, modules_to_save=modules)


def test_a_saved_head_never_takes_the_place_of_a_table(tmp_path):
    W = random_weights({"model.embed_tokens.weight": (6, 4), "model.q_proj.weight": (4, 4)})
    base, out = write_file(tmp_path / "base.safetensors", W), tmp_path / "out.safetensors"
    head = saved(tmp_path / "head", ["lm_head.weight"], (6, 4), (4, 4))
    refused(UnsupportedError, "which is both embedding and head", base, head, out)
    both = saved(tmp_path / "both", ["model.embed_tokens.weight", "lm_head.weight"], (6, 4), (4, 4))
    refused(MismatchError, r"both change model\.embed_tokens\.weight", base, both, out)


@pytest.mark.parametrize(
    ("config", "table"),
    [
        ({"architectures": ["BloomForCausalLM"]}, "transformer.word_embeddings"),
        ({"architectures": ["T5ForConditionalGeneration"]}, "shared"),
        ({"text_config": {"tie_word_embeddings": True}}, "language_model.model.embed_tokens"),
    ],
)
def test_a_tied_table_is_known_by_its_models_names(config, table, tmp_path):
    base = write_shards(tmp_path / "base", random_weights({f"{table}.weight": (6, 4)}))
    (base / "config.json").write_text(json.dumps(config))
    adapter = write_peft(tmp_path / "a", factors({f"{table}.weight": (6, 4)}))
    refused(UnsupportedError, "which is both embedding and head", base, adapter, tmp_path / "out")


def test_the_file_of_a_folder_is_tied_as_the_folder_is(tmp_path):
    write_file(tmp_path / "m/model.safetensors", random_weights({"wte.weight": (6, 4)}))
    (tmp_path / "m/config.json").write_text('{"architectures": ["GPT2LMHeadModel"]}')
    adapter = write_peft(tmp_path / "a", factors({"wte.weight": (6, 4)}))
    for base, out in ((tmp_path / "m", "out"), (tmp_path / "m/model.safetensors", "out.safetensors")):
        refused(UnsupportedError, "which is both embedding and head", base, adapter, tmp_path / out)


def test_a_saved_tensor_over_codes_is_refused_by_its_dtype(tmp_path):
    W = {"model.q_proj.weight": np.ones((4, 4), np.float32), "lm_head.weight": np.ones((6, 4), np.int8)}
    save_file(W, tmp_path / "base.safetensors")
    head = saved(tmp_path / "head", ["lm_head.weight"], (6, 4), (4, 4))
    says = r"lm_head\.weight: dtype is I8; expected one of F64"
    refused(UnsupportedError, says, tmp_path / "base.safetensors", head, tmp_path / "out.safetensors")


def test_a_model_in_a_folder_of_its_own_is_copied_whole(tmp_path):
    base = write_shards(tmp_path / "base", random_weights(SHAPES))
    dense = write_file(base / "2_Dense/model.safetensors", random_weights({"linear.weight": (2, 3)}))
    (base / "onnx").mkdir()
    (base / "onnx/model.onnx").write_bytes(b"the same weights, unmerged")
    found = merge_by_name(base, write_peft(tmp_path / "a", factors(SHAPES)), tmp_path / "out")
    assert (tmp_path / "out/2_Dense/model.safetensors").read_bytes() == dense.read_bytes()
    assert not (tmp_path / "out/onnx/model.onnx").exists()
    assert any("another form: onnx/model.onnx" in note for note in found.notes)


def test_a_base_behind_a_link_without_a_suffix_is_recognised_as_its_own(tmp_path):
    rng = np.random.default_rng(0)
    W = {"a.weight": rng.normal(size=(5, 4))}
    base = write_file(tmp_path / "base.safetensors", W)
    dW = rng.normal(size=(5, 1)) @ rng.normal(size=(1, 4))
    tuned = write_file(tmp_path / "tuned.safetensors", {"a.weight": W["a.weight"] + dW})
    ml.extract(base, tuned, tmp_path / "lora", rank=1)
    base.rename(tmp_path / "blob")
    (tmp_path / "link.safetensors").symlink_to(tmp_path / "blob")
    merge_by_name(tmp_path / "link.safetensors", tmp_path / "lora", tmp_path / "out.safetensors")
    assert abs(read(tmp_path / "out.safetensors")["a.weight"] - read(tuned)["a.weight"]).max() <= 1e-5


def test_a_component_that_is_a_link_is_refused_by_its_own_name(tmp_path):
    base = write_pipeline(tmp_path / "base", random_weights({"unet.a.weight": (5, 4)}))
    adapter = write_peft(tmp_path / "a", factors({"unet.a.weight": (5, 4)}))
    (base / "unet").rename(tmp_path / "elsewhere")
    (base / "unet").symlink_to(tmp_path / "elsewhere")
    refused(StorageError, "base/unet: is a link", base, adapter, tmp_path / "out")


def test_modules_of_the_config_without_factors_are_told(tmp_path):
    shapes = {f"model.layers.{i}.{name}.weight": (4, 4) for i in (0, 1) for name in ("q_proj", "v_proj")}
    base = write_file(tmp_path / "base.safetensors", random_weights(shapes))
    some = dict(list(shapes.items())[:3])
    lacking = write_peft(tmp_path / "lacking", factors(some), target_modules=["q_proj", "v_proj"])
    found = merge_by_name(base, lacking, tmp_path / "out.safetensors")
    says = "the adapter has no factors for 1 module of its config, such as model.layers.1.v_proj"
    assert says in found.notes
    full = write_peft(tmp_path / "full", factors(shapes), target_modules=["q_proj", "v_proj"])
    notes = merge_by_name(base, full, tmp_path / "other.safetensors").notes
    assert not any("no factors" in note for note in notes)


def test_magnitudes_of_inputs_are_merged_by_names_into_a_llama_too(tmp_path):
    model, _ = tiny(dtype=np.float32)
    ml.save_model(model, tmp_path / "base", "")
    module, (O, I) = "model_layers_0_self_attn_q_proj", model.model.layers[0].self_attn.q_proj.weight.shape  # noqa: E741
    tensors = {
        f"lora_unet_{module}.lora_down.weight": np.ones((1, I), np.float32),
        f"lora_unet_{module}.lora_up.weight": np.ones((O, 1), np.float32),
        f"lora_unet_{module}.dora_scale": np.ones((1, I), np.float32),
    }
    save_file(tensors, tmp_path / "in.safetensors")
    found = ml.merge_checkpoint(tmp_path / "base", tmp_path / "in.safetensors", tmp_path / "out")
    assert any("no model here has magnitudes of inputs" in note for note in found.notes)
    written = read(tmp_path / "out")["model.layers.0.self_attn.q_proj.weight"]
    assert np.allclose(np.linalg.norm(written, axis=0), 1, rtol=0, atol=8 * UNIT)
