"""Files that `convert` writes load in the tools themselves, which then change their weights by our ΔW.

diffusers reads its own form and kohya's, LyCORIS kohya's, PEFT its own, mlx-lm its own. llama.cpp is not on a
package index; the everyday tests read its form with the package `gguf`.
"""

import json
from pathlib import Path

import numpy as np
import pytest
from by_hand import write_peft

import minilora as ml
from minilora.peft.convert import convert

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore"),  # of the tools
]
UNIT, RANK, ALPHA = 2.0**-24, 3, 5  # a scale that is no power of two


@pytest.fixture(scope="module")
def unet():
    """A tiny U-Net of Stable Diffusion's kinds of modules, and its weights."""
    torch.manual_seed(0)
    model = diffusers.UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=2, block_out_channels=(8, 16),
        norm_num_groups=4, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), cross_attention_dim=12, attention_head_dim=4,
    )  # fmt: skip
    weights = {
        name: module.weight.detach().clone()
        for name, module in model.named_modules()
        if name.split(".")[0].endswith(("_blocks", "_block"))
        and isinstance(module, torch.nn.Linear | torch.nn.Conv2d)
    }
    return model, weights


@pytest.fixture(scope="module")
def adapter(unet, tmp_path_factory):
    """A PEFT folder for all its linear maps and convolutions."""
    rng, folder = np.random.default_rng(0), tmp_path_factory.mktemp("peft") / "a"
    factors = {}
    for name, W in unet[1].items():
        A = rng.normal(size=(RANK, *W.shape[1:]))
        B = rng.normal(size=(len(W), RANK, *(1,) * (W.ndim - 2)))
        factors[f"unet.{name}"] = A.astype(np.float32), B.astype(np.float32)
    return write_peft(folder, factors, lora_alpha=ALPHA)


def assert_changed(given, module, before, after):
    """W + ΔW, of float32: a product over r, a scale or two, a sum."""
    A, B = (x.astype(np.float64) for x in given.factors(module))
    s, W = given.pairs[module].scale, before.double().numpy()
    size = abs(s) * (abs(B) @ abs(A)).reshape(W.shape) + abs(W)
    off = abs(after.detach().double().numpy() - W - (s * B @ A).reshape(W.shape))
    assert (off <= (len(A) + 6) * UNIT * size).all(), module


@pytest.mark.parametrize("form", ["diffusers", "kohya"])
def test_diffusers_loads_its_own_form_and_kohyas(form, unet, adapter, tmp_path):
    from diffusers.loaders.lora_conversion_utils import _convert_non_diffusers_lora_to_diffusers
    from safetensors.torch import load_file

    model, weights = unet
    out = tmp_path / "a.safetensors"
    convert(adapter, out, form)
    try:
        if form == "kohya":
            tensors, alphas = _convert_non_diffusers_lora_to_diffusers(load_file(out))
            model.load_lora_adapter(tensors, network_alphas=alphas, prefix="unet")
        else:
            model.load_lora_adapter(str(out), prefix="unet")
        model.fuse_lora()
        model.unload_lora()
        given, modules = ml.open_adapter(adapter), dict(model.named_modules())
        for name, W in weights.items():
            assert_changed(given, f"unet.{name}", W, modules[name].weight)
    finally:
        for name, module in model.named_modules():
            if name in weights:
                module.weight.data = weights[name].clone()


def test_lycoris_loads_kohyas_form(unet, adapter, tmp_path):
    pytest.importorskip("lycoris")
    from lycoris.modules import get_module, make_module
    from safetensors.torch import load_file

    model, weights = unet
    convert(adapter, tmp_path / "a.safetensors", "kohya")
    tensors, given = load_file(tmp_path / "a.safetensors"), ml.open_adapter(adapter)
    modules = dict(model.named_modules())
    for name, W in weights.items():
        flat = f"lora_unet_{name.replace('.', '_')}"
        made = make_module(*get_module(tensors, flat), flat, modules[name])
        after, _ = made.get_merged_weight(1.0)
        assert_changed(given, f"unet.{name}", W, after.reshape(W.shape))


LLAMA = {
    "model_type": "llama", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "vocab_size": 40, "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}  # fmt: skip
SHAPES = {
    "self_attn.q_proj": (16, 16), "self_attn.k_proj": (8, 16), "mlp.gate_proj": (24, 16),
    "mlp.down_proj": (16, 24),
}  # fmt: skip


@pytest.fixture
def language(tmp_path):
    """A PEFT folder for a tiny Llama, with another rank in one kind of module."""
    rng = np.random.default_rng(0)
    factors = {}
    for n in range(2):
        for name, (O, I) in SHAPES.items():  # noqa: E741
            r = RANK + (name == "mlp.down_proj")
            A, B = rng.normal(size=(r, I)), rng.normal(size=(O, r))
            factors[f"model.layers.{n}.{name}"] = A.astype(np.float32), B.astype(np.float32)
    return write_peft(tmp_path / "a", factors, lora_alpha=ALPHA)


@pytest.mark.parametrize("by_way_of", ["kohya", "mlx", "gguf"])
def test_peft_loads_what_came_from_another_form(by_way_of, language, tmp_path):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    way = tmp_path / {"kohya": "b.safetensors", "mlx": "b", "gguf": "b.gguf"}[by_way_of]
    convert(language, way, by_way_of, base=tmp_path)
    convert(way, tmp_path / "c", "peft", base=tmp_path)
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    merged = peft.PeftModel.from_pretrained(model, tmp_path / "c").merge_and_unload()
    after, given = dict(merged.named_parameters()), ml.open_adapter(language)
    assert len(given.pairs) == 2 * len(SHAPES)
    for module in given.pairs:
        assert_changed(given, module, before[f"{module}.weight"], after[f"{module}.weight"])


def test_mlx_loads_its_own_form(language, tmp_path):
    mx = pytest.importorskip("mlx.core")
    from mlx.utils import tree_flatten
    from mlx_lm.models import llama
    from mlx_lm.tuner.utils import load_adapters

    convert(language, tmp_path / "b", "mlx")
    mx.random.seed(0)
    model = llama.Model(llama.ModelArgs.from_dict(LLAMA))
    before = {name: np.array(value) for name, value in tree_flatten(model.parameters())}
    model = load_adapters(model, str(tmp_path / "b"))
    given, layers = ml.open_adapter(language), dict(model.named_modules())
    for module in given.pairs:
        after = np.array(layers[module].fuse().weight)
        assert_changed(given, module, torch.tensor(before[f"{module}.weight"]), torch.tensor(after))
    assert Path(tmp_path / "b/adapters.safetensors").exists()
