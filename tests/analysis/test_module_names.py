"""Every name has a place; those of image models are grouped by what they do, block by block."""

import pytest
from helpers import within
from hypothesis import given
from hypothesis import strategies as st

from minilora.analysis.names import block_or_layer, brief, order, place
from minilora.targets import LAYER

PLACES = {  # of the U-Nets, transformers and encoders that diffusers, sgm and Black Forest Labs name
    "unet.down_blocks.0.attentions.1.transformer_blocks.9.attn1.to_q": ("unet", "attn1.to_q", "down 0.1"),
    "unet.up_blocks.3.attentions.2.transformer_blocks.0.ff.net.0.proj": ("unet", "ff.net.0.proj", "up 3.2"),
    "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0": ("unet", "attn2.to_out.0", "mid 0"),
    "unet.down_blocks.2.resnets.1.conv1": ("unet", "resnets.conv1", "down 2.1"),
    "unet.mid_block.resnets.1.time_emb_proj": ("unet", "resnets.time_emb_proj", "mid 1"),
    "unet.up_blocks.1.upsamplers.0.conv": ("unet", "upsamplers.conv", "up 1.0"),
    "unet.down_blocks.1.attentions.0.proj_in": ("unet", "proj_in", "down 1.0"),
    "unet.time_embedding.linear_1": ("unet", "time_embedding.linear_1", ""),
    "unet.conv_in": ("unet", "conv_in", ""),
    "unet.input_blocks.4.1.transformer_blocks.0.attn1.to_q": ("unet", "attn1.to_q", "in 4"),
    "unet.output_blocks.2.2.conv": ("unet", "conv", "out 2"),
    "unet.middle_block.1.proj_in": ("unet", "proj_in", "mid 1"),
    "down_blocks.0.attentions.1.transformer_blocks.0.attn1.to_v": ("", "attn1.to_v", "down 0.1"),
    "transformer.double_blocks.3.img_attn.qkv": ("transformer", "img_attn.qkv", "3"),
    "transformer.double_blocks.18.txt_mlp.2": ("transformer", "txt_mlp.2", "18"),
    "transformer.single_blocks.37.linear1": ("transformer", "linear1", "single 37"),
    "transformer.transformer_blocks.3.attn.to_q": ("transformer", "attn.to_q", "3"),
    "transformer.single_transformer_blocks.3.attn.to_q": ("transformer", "attn.to_q", "single 3"),
    "transformer.noise_refiner.1.attention.to_q": ("transformer", "attention.to_q", "noise_refiner 1"),
    "transformer.layers.1.attention.to_q": ("transformer", "attention.to_q", "1"),
    "diffusion_model.blocks.7.cross_attn.k": ("diffusion_model", "cross_attn.k", "7"),
    "text_encoder.text_model.encoder.layers.5.mlp.fc1": ("text_encoder", "fc1", "5"),
    "text_encoder_2.text_model.encoder.layers.5.self_attn.q_proj": ("text_encoder_2", "q_proj", "5"),
    "text_encoder_3.encoder.block.3.layer.0.SelfAttention.q": ("text_encoder_3", "q", "3"),
    "model.layers.3.mlp.down_proj": ("", "down_proj", "3"),
    "model.layers.2.mlp.experts.1.w1": ("", "w1", "2"),
    "model.visual.blocks.3.attn.qkv": ("", "qkv", "visual 3"),
    "model.decoder.layers.3.fc1": ("", "fc1", "decoder 3"),
    "transformer.h.0.attn.c_attn": ("", "c_attn", "0"),
    "classifier.0": ("", "classifier.0", ""),
    "lm_head": ("", "lm_head", ""),
    "lora_unet_some_thing": ("", "lora_unet_some_thing", ""),
}


@pytest.mark.parametrize("name", PLACES)
def test_a_name_has_its_component_kind_and_block(name):
    assert place(name) == PLACES[name]


@pytest.mark.parametrize("name", PLACES)
def test_denoisers_have_blocks_and_all_others_layers(name):
    denoiser = PLACES[name][0] in ("unet", "transformer", "diffusion_model")
    assert block_or_layer([name]) == ("block" if denoiser or name.startswith("down_blocks") else "layer")
    assert block_or_layer([name, "unet.conv_in"]) == "block"


words = st.sampled_from([word for name in PLACES for word in name.split(".")])


@given(parts=st.lists(words | st.text(max_size=3) | st.just("9" * 5000), max_size=7))
def test_any_name_has_a_place_and_an_order(parts):
    name = ".".join(parts)
    at = place(name)
    assert name.endswith(at.kind.rpartition(".")[2])
    assert bool(at.kind) is bool(name)
    assert brief(name) or not name
    sorted([at, place("model.layers.3.x"), place("lm_head"), place(name + ".1.x")], key=order)


def test_a_long_name_is_placed_at_once():
    with within(2):  # tried from each of its letters, it would take five times as long
        assert place(f"{'9' * 30_000}.x").kind == "x"


@given(name=st.sampled_from(["self_attn.q_proj", "mlp.down_proj"]), layer=st.integers(0, 999))
def test_the_modules_of_a_llama_are_grouped_by_their_last_name_and_layer(name, layer):
    path = f"model.layers.{layer}.{name}"
    assert place(path) == ("", name.rpartition(".")[2], LAYER.match(path)[1])


def test_the_blocks_come_as_data_passes_and_encoders_last():
    wanted = [
        *(f"unet.down_blocks.{i}.attentions.{j}.proj_in" for i in (0, 2, 10) for j in (0, 1)),
        "unet.mid_block.attentions.0.proj_in",
        *(f"unet.up_blocks.{i}.attentions.{j}.proj_in" for i in (0, 1) for j in (0, 2)),
        "unet.conv_in",
        *(f"text_encoder.text_model.encoder.layers.{i}.mlp.fc1" for i in (0, 1, 2, 10)),
        *(f"text_encoder_2.text_model.encoder.layers.{i}.mlp.fc1" for i in (0, 1, 2, 10)),
    ]
    assert sorted(reversed(wanted), key=lambda name: order(place(name))) == wanted
    lists = "transformer_blocks", "single_transformer_blocks"
    flux = [f"transformer.{blocks}.{i}.attn.to_q" for blocks in lists for i in (0, 2, 10)]
    assert sorted(reversed(flux), key=lambda name: order(place(name))) == flux
