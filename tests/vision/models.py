"""A tiny model of each kind, and batches for it."""

import re

from helpers import SIZES
from library import np

from minilora.backend import to_device
from minilora.lora import inject
from minilora.methods.lora_config import LoraConfig
from minilora.model import Config
from minilora.tree import named_params
from minilora.vision.diffusion import Noisy, denoiser
from minilora.vision.vit import vit

CONFIG = Config(**SIZES)
CLASSES, STEPS, N = 7, 9, 5
EVERYTHING = re.compile(r".*(_proj|_embedding|classifier|output)")
KINDS = ("vit", "denoiser")


def model_of(kind, seed=0, dtype=np.float64, config=CONFIG):
    """A model whose norms, biases and last map matter, too, and the generator that goes on."""
    rng = np.random.default_rng(seed)
    model = vit(config, rng, CLASSES, dtype) if kind == "vit" else denoiser(config, STEPS, rng, dtype)
    for path, p in named_params(model).items():
        if p.data.ndim == 1 or path == "output.weight":
            p.data += to_device(0.3 * rng.standard_normal(p.data.shape), dtype)
    return model, rng


def lora_of(kind, seed=0, dtype=np.float64, **how):
    """The like with a LoRA of both factors on every linear map and embedding."""
    model, rng = model_of(kind, seed, dtype)
    inject(model, LoraConfig(r=3, alpha=7, **{"targets": EVERYTHING, "init": "both"} | how), rng=rng)
    return model, rng


def batch_of(kind, rng, dtype=np.float64, n=N):
    """Pixels and labels; or noisy pixels with their times, and the noise."""
    pixels = rng.standard_normal((n, 64)).astype(dtype)
    if kind == "vit":
        return pixels, rng.integers(0, CLASSES, n)
    return Noisy(pixels, rng.integers(1, STEPS + 1, n)), rng.standard_normal((n, 64)).astype(dtype)


def answer(model, batch):
    """What the model says of a batch."""
    return model(batch[0])[0]
