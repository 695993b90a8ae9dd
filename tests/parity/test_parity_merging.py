"""Bases merged by names are what PEFT and diffusers make of the same base and adapter."""

import numpy as np
import pytest
from by_hand import write_peft

import minilora as ml
from minilora.formats.safetensors import open_tensors

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
diffusers = pytest.importorskip("diffusers")
pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore"),  # of the tools
]
UNIT, RANK, ALPHA = 2.0**-24, 3, 5


def factors(weights, rng):
    """Random factors for weights (O, I, ...), by module."""
    return {
        name: (
            rng.normal(size=(RANK, *W.shape[1:])).astype(np.float32),
            rng.normal(size=(len(W), RANK, *(1,) * (W.ndim - 2))).astype(np.float32),
        )
        for name, W in weights.items()
    }


def assert_same(ours, theirs, pairs):
    """W + ΔW in float32 of two programs: r products, a scale or two, a sum, and the rounding of each."""
    assert ours.keys() == theirs.keys()
    for name, a in ours.items():
        A, B = (abs(x.reshape(len(x), -1)) for x in pairs.get(name, (np.zeros((1, 1)),) * 2))
        size = ALPHA / RANK * (B.max() * A.max() * RANK) + abs(theirs[name]).max()
        off = abs(a - theirs[name].reshape(a.shape)).max()
        assert off <= (RANK + 5) * UNIT * size if name in pairs else off == 0, name


@pytest.mark.parametrize("dora", [False, True])
def test_gpt2_with_its_turned_weights_is_as_peft_merges_it(dora, tmp_path):
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_embd=8, n_layer=2, n_head=2, vocab_size=11, n_positions=7)
    model = transformers.GPT2LMHeadModel(config)
    model.save_pretrained(tmp_path / "base")
    how = peft.LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules=["c_attn", "c_proj", "c_fc"], use_dora=dora,
        fan_in_fan_out=True, init_lora_weights=False,
    )  # fmt: skip
    adapted = peft.get_peft_model(model, how)
    adapted.save_pretrained(tmp_path / "adapter")
    theirs = {n: p.detach().numpy() for n, p in adapted.merge_and_unload().state_dict().items()}
    theirs.pop("lm_head.weight")  # which is tied
    found = ml.merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert len(found.rows) == 8
    ours, before = (dict(open_tensors(tmp_path / where / "model.safetensors")) for where in ("out", "base"))
    assert ours.keys() == theirs.keys()
    for name, a in ours.items():
        size = abs(theirs[name]).max() + abs(theirs[name] - before[name]).max()
        assert abs(a - theirs[name]).max() <= (RANK + 8 * (1 + 3 * dora)) * UNIT * size, name
        assert (a == before[name]).all() == (
            not name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))
        )
    loaded = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "out")
    assert np.array_equal(
        loaded.transformer.h[0].attn.c_attn.weight.detach().numpy(),
        ours["transformer.h.0.attn.c_attn.weight"],
    )


def test_a_unet_is_as_diffusers_fuses_it(tmp_path):
    """Linear maps and convolutions, by a file that diffusers loads."""
    torch.manual_seed(0)
    model = diffusers.UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=2, block_out_channels=(8, 16),
        norm_num_groups=4, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), cross_attention_dim=12, attention_head_dim=4,
    )  # fmt: skip
    model.save_pretrained(tmp_path / "unet")
    weights = {
        name: module.weight.detach().numpy()
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d) and "_block" in name.partition(".")[0]
    }
    pairs = factors(weights, np.random.default_rng(0))
    given = write_peft(
        tmp_path / "adapter", {f"unet.{name}": pair for name, pair in pairs.items()}, lora_alpha=ALPHA
    )
    ml.convert(given, tmp_path / "lora.safetensors", "diffusers")
    found = ml.merge_checkpoint(tmp_path / "unet", tmp_path / "lora.safetensors", tmp_path / "out")
    assert len(found.rows) == len(pairs)
    ours = dict(open_tensors(tmp_path / "out/diffusion_pytorch_model.safetensors"))
    model.load_lora_adapter(str(tmp_path / "lora.safetensors"), prefix="unet")
    model.fuse_lora()
    model.unload_lora()
    theirs = {name: p.detach().numpy() for name, p in model.state_dict().items()}
    assert_same(ours, theirs, {f"{name}.weight": pair for name, pair in pairs.items()})
    loaded = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "out")
    assert all(np.array_equal(p.detach().numpy(), ours[name]) for name, p in loaded.state_dict().items())
