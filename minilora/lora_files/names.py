"""The names of modules in other tools' files -> dotted paths, as in the model that they change.

    lora_te1_text_model_encoder_layers_0_mlp_fc1 -> text_encoder.text_model.encoder.layers.0.mlp.fc1
    ...attn1.processor.to_out_lora               -> ...attn1.to_out.0

kohya's tools write `_` for each dot, though names have underscores, too. The dots come back by a list of
names with underscores in the image models (`ATOMS`): the longest that fits is taken, and elsewhere every `_`
becomes a dot. A path that is wrong for that works all the same: only a comparison with a base needs it.
"""

from __future__ import annotations

import re

ATOMS = frozenset((
    "down_blocks", "up_blocks", "mid_block", "input_blocks", "middle_block", "output_blocks",
    "transformer_blocks", "single_transformer_blocks", "joint_transformer_blocks", "double_blocks",
    "single_blocks", "time_embedding", "time_proj", "add_embedding", "time_emb_proj", "time_embed",
    "label_emb", "conv_in", "conv_out", "conv_shortcut", "conv_norm_out", "proj_in", "proj_out",
    "proj_mlp", "to_q", "to_k", "to_v", "to_out", "to_add_out", "add_q_proj", "add_k_proj", "add_v_proj",
    "linear_1", "linear_2", "linear_3", "in_layers", "out_layers", "emb_layers", "skip_connection",
    "norm_out", "norm1_context", "ff_context", "norm_k", "norm_q", "x_embedder", "context_embedder",
    "time_text_embed", "timestep_embedder", "guidance_embedder", "text_embedder", "img_in", "txt_in",
    "time_in", "vector_in", "guidance_in", "in_layer", "out_layer", "final_layer", "adaLN_modulation",
    "img_attn", "txt_attn", "img_mlp", "txt_mlp", "img_mod", "txt_mod", "text_model", "self_attn",
    "cross_attn", "out_proj", "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    "text_projection", "lm_head", "embed_tokens", "token_embedding", "position_embedding", "wi_0", "wi_1",
    "pos_embed", "patch_embedding", "condition_embedder", "time_embedder", "token_refiner",
    "refiner_blocks", "caption_projection", "time_caption_embed", "caption_embedder", "noise_refiner",
    "context_refiner", "feed_forward", "adaln_single", "resolution_embedder", "aspect_ratio_embedder",
    "relative_attention_bias",
))  # fmt: skip
MOST = max(atom.count("_") for atom in ATOMS) + 1  # words of an atom
COMPONENTS = {  # the prefix of a flattened name -> the component of a pipeline, by diffusers' names
    "lora_unet": "unet", "lora_te": "text_encoder", "lora_te1": "text_encoder",
    "lora_te2": "text_encoder_2", "lora_te3": "text_encoder_3", "lora_transformer": "transformer",
    "lora_prior_unet": "prior", "lora_prior_te": "text_encoder", "lycoris": "",
}  # fmt: skip
OF_FLUX_IN_KOHYA = {"lora_unet": "transformer", "lora_te3": "text_encoder_2"}
UNET = re.compile(r"(down_blocks|up_blocks|mid_block|conv_(in|out)|(time|add)_embedding)(?![^.])")
PREFIXES = {  # and back
    "unet": "lora_unet", "text_encoder": "lora_te", "text_encoder_2": "lora_te2",
    "text_encoder_3": "lora_te3", "transformer": "lora_transformer", "prior": "lora_prior_unet",
    "diffusion_model": "lora_unet",
    "": "lycoris",
}  # fmt: skip
FLAT = re.compile(f"({'|'.join(sorted(COMPONENTS, key=len, reverse=True))})_([A-Za-z0-9_-]+)")
FLUX = re.compile(r"((diffusion_model|transformer)\.)?(double|single)_blocks[._]")
OF_FLUX = re.compile(r"(double|single)_blocks\.")
BEFORE = re.compile(r"(unet\.|transformer\.|text_encoder(?:_[0-9])?\.)?(?:base_model\.model\.)+")
XLABS = re.compile(r"((double|single)_blocks\.[0-9]+)\.processor\.(qkv|proj)_lora([12]?)")
STREAMS = {"1": "img_attn", "2": "txt_attn"}  # of a double block in XLabs' files
SINGLE = {"qkv": "linear1", "proj": "linear2"}  # and of a single one
OLD = {"to_q_lora": "to_q", "to_k_lora": "to_k", "to_v_lora": "to_v", "to_out_lora": "to_out.0"}
OLD_TEXT = {
    "to_q_lora": "q_proj", "to_k_lora": "k_proj", "to_v_lora": "v_proj", "to_out_lora": "out_proj",
}  # fmt: skip
FUSED = {  # in Black Forest Labs' names of Flux -> in diffusers', in the order of the rows of B
    "double_blocks": ("transformer_blocks", {
        "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"), "img_attn.proj": ("attn.to_out.0",),
        "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
        "txt_attn.proj": ("attn.to_add_out",), "img_mlp.0": ("ff.net.0.proj",), "img_mlp.2": ("ff.net.2",),
        "txt_mlp.0": ("ff_context.net.0.proj",), "txt_mlp.2": ("ff_context.net.2",),
        "img_mod.lin": ("norm1.linear",), "txt_mod.lin": ("norm1_context.linear",),
    }),
    "single_blocks": ("single_transformer_blocks", {
        "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"), "linear2": ("proj_out",),
        "modulation.lin": ("norm.linear",),
    }),
}  # fmt: skip
HOMES = {  # the same table from diffusers' side: block, part -> block, fused map, all its parts
    to: {part: (blocks, name, parts) for name, parts in names.items() for part in parts}
    for blocks, (to, names) in FUSED.items()
}
AROUND = {  # the modules before and after the blocks
    "img_in": "x_embedder", "txt_in": "context_embedder", "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
    "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
}  # fmt: skip
WIDTHS = {"proj_mlp": 4}  # rows of a part over those of q, of which a fused map has one of each
SWAPPED = "final_layer.adaLN_modulation.1"  # its rows are shift and scale, in diffusers scale and shift
SGM = re.compile(r"unet\.(input|output)_blocks\.(\d+)\.(\d+)(?:\.(.+))?")
MIDDLE = re.compile(r"unet\.middle_block\.([012])\.(.+)")
UNET_BLOCK = re.compile(
    r"unet\.(?:(down|up)_blocks\.(\d+)|mid_block)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)"
)
LAYERS = 3  # entries of a level in Stability AI's lists of blocks: two layers, and a change of size
RESNET = {
    "in_layers.0": "norm1", "in_layers.2": "conv1", "emb_layers.1": "time_emb_proj", "out_layers.0": "norm2",
    "out_layers.3": "conv2", "skip_connection": "conv_shortcut",
}  # fmt: skip
ENDS = {
    "input_blocks.0.0": "conv_in", "out.0": "conv_norm_out", "out.2": "conv_out",
    "time_embed.0": "time_embedding.linear_1", "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1", "label_emb.0.2": "add_embedding.linear_2",
}  # fmt: skip
TORCHTUNE = {
    "attn.q_proj": "self_attn.q_proj", "attn.k_proj": "self_attn.k_proj", "attn.v_proj": "self_attn.v_proj",
    "attn.output_proj": "self_attn.o_proj", "mlp.w1": "mlp.gate_proj", "mlp.w2": "mlp.down_proj",
    "mlp.w3": "mlp.up_proj", "tok_embeddings": "model.embed_tokens", "output": "lm_head",
}  # fmt: skip


def dotted(flat: str) -> str:
    """A flattened path with its dots, as far as `ATOMS` has its names: "mid_block_attentions_0" and so on."""
    words, parts = [word for word in flat.split("_") if word], []
    while words:
        for n in range(min(MOST, len(words)), 0, -1):
            if n == 1 or "_".join(words[:n]) in ATOMS:
                parts.append("_".join(words[:n]))
                words = words[n:]
                break
    return ".".join(parts)


def is_flux(name: str) -> bool:
    """Whether a name is that of a block of Flux, in the names of Black Forest Labs."""
    match = FLAT.fullmatch(name)
    return bool(FLUX.match(name) or (match and match[1] == "lora_unet" and FLUX.match(match[2])))


def path_of(name: str, flux: bool = False) -> str:
    """The path of a module in the model, from its name in a file of any tool but torchtune.

    `flux` says that the file is one of Flux, whose transformer is called a U-Net, a diffusion model or
    nothing, and whose second text encoder in diffusers is the third in kohya's names.
    """
    if match := FLAT.fullmatch(name):
        component = OF_FLUX_IN_KOHYA.get(match[1]) if flux else None
        component = component or COMPONENTS[match[1]]
        return ".".join(filter(None, (component, dotted(match[2]))))
    if match := XLABS.fullmatch(name):
        inner = f"{STREAMS[match[4]]}.{match[3]}" if match[4] else SINGLE[match[3]]
        return f"transformer.{match[1]}.{inner}"
    if flux and (OF_FLUX.match(name) or name in AROUND):
        return f"transformer.{name}"
    name = BEFORE.sub(lambda match: match[1] or "", name, count=1) if BEFORE.match(name) else name
    if flux and name.partition(".")[0] == "diffusion_model":
        name = f"transformer.{name.partition('.')[2]}"
    above, _, last = name.replace(".processor.", ".").rpartition(".")
    last = (OLD_TEXT if "text_encoder" in above or "text_model" in above else OLD).get(last, last)
    return f"{above}.{last}" if above else last


def of_torchtune(name: str) -> str:
    """Hugging Face's path of a module of torchtune's Llama: layers.0.attn.q_proj and so on."""
    name = name.removeprefix("base_model.model.")
    match = re.fullmatch(r"(?:(layers\.[0-9]+)\.)?(.+)", name)
    inner = TORCHTUNE.get(match[2], match[2]) if match else name
    return f"model.{match[1]}.{inner}" if match and match[1] else inner


def of_sgm(path: str) -> str:
    """diffusers' path of a module of a U-Net in Stability AI's names, which kohya has for SDXL.

    unet.input_blocks.4.1.proj_in -> unet.down_blocks.1.attentions.0.proj_in
    """
    if end := ENDS.get(path.removeprefix("unet.")):
        return f"unet.{end}"
    if match := MIDDLE.fullmatch(path):
        layer = {"0": "resnets.0", "1": "attentions.0", "2": "resnets.1"}[match[1]]
        return f"unet.mid_block.{layer}.{RESNET.get(match[2], match[2])}"
    if not (match := SGM.fullmatch(path)) or not match[4]:
        return path
    down, i, j, inner = match[1] == "input", int(match[2]), int(match[3]), match[4]
    block, n = divmod(i - down, LAYERS)
    above = f"unet.{'down' if down else 'up'}_blocks.{block}"
    if inner in ("op", "conv"):
        return f"{above}.{'downsamplers' if down else 'upsamplers'}.0.conv"
    return f"{above}.attentions.{n}.{inner}" if j else f"{above}.resnets.{n}.{RESNET.get(inner, inner)}"


def to_sgm(path: str) -> str:
    """Stability AI's path of a module of SDXL's U-Net in diffusers' names: what `of_sgm` undoes."""
    ends, inner_names = ({new: old for old, new in names.items()} for names in (ENDS, RESNET))
    if end := ends.get(path.removeprefix("unet.")):
        return f"unet.{end}"
    if not (match := UNET_BLOCK.fullmatch(path)):
        return path
    way, level, kind, n, inner = match[1], int(match[2] or 0), match[3], int(match[4]), match[5]
    inner = inner_names.get(inner, inner) if kind == "resnets" else inner
    if not way:
        return f"unet.middle_block.{1 if kind == 'attentions' else 2 * n}.{inner}"
    if kind == "downsamplers":
        return f"unet.input_blocks.{LAYERS * (level + 1)}.0.op"
    if kind == "upsamplers":
        return f"unet.output_blocks.{LAYERS * level + 2}.2.conv"
    side, i = ("input", 1) if way == "down" else ("output", 0)
    return f"unet.{side}_blocks.{LAYERS * level + n + i}.{int(kind == 'attentions')}.{inner}"


def whole(path: str) -> str:
    """A path with its component: files of a U-Net alone leave it out."""
    return f"unet.{path}" if UNET.match(path) else path


def flattened(path: str, numbered: bool = False, flux: bool = False) -> str:
    """kohya's name of a module; the first text encoder is `numbered` where there are more.

    `flux` says that a transformer has the names of Black Forest Labs, and so is called a U-Net.
    """
    component, _, inner = whole(path).partition(".")
    if component not in PREFIXES:
        component, inner = "", path
    in_kohya = {ours: prefix for prefix, ours in OF_FLUX_IN_KOHYA.items()} if flux else {}
    prefix = in_kohya.get(component, PREFIXES[component])
    number = "1" if numbered and component == "text_encoder" else ""
    return f"{prefix}{number}_{inner.replace('.', '_')}"
