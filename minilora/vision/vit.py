"""A vision transformer: an image is a sequence of patches, and the blocks are the Llama's.

    x_t = W patch_t + E[t];  per block  x += attention(norm(x));  x += mlp(norm(x));  y = V mean norm(x_t)

Dosovitskiy et al. 2021, with the Llama's RMSNorm and gated MLP, and the mean of all tokens for a class token.
Attention has no order of tokens: the learned E alone says where a patch lies. `inject`, `merge` and `train`
know nothing of images. Stands in for transformers' modeling_vit.py; leaves out
sizes other than 8 x 8 pixels, colours and interpolated positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ..backend import Array, normal, to_device, to_host, xp
from ..data.digits import SIDE
from ..errors import InputError, check_int
from ..layers import Embedding, Layer, Linear, Need, Param
from ..model import (
    Block,
    Config,
    after,
    back_untrained,
    blocks,
    check_range,
    drawing,
    host_ints,
)
from ..model import norm as fresh_norm
from ..ops import Back, cross_entropy
from ..tree import dtype_of, outline

PATCH = 2  # pixels in a row of a patch, P = 4 in all
ROW = SIDE // PATCH  # patches in a row of an image, T = 16 in all
PIXELS = SIDE * SIDE


def patches(x: Array) -> Array:
    """Pixels (N, 64) as patches (N, T, P), both row by row."""
    return x.reshape(-1, ROW, PATCH, ROW, PATCH).swapaxes(2, 3).reshape(-1, ROW * ROW, PATCH * PATCH)


def unpatches(x: Array) -> Array:
    """The inverse of `patches`, and its transpose."""
    return x.reshape(-1, ROW, ROW, PATCH, PATCH).swapaxes(2, 3).reshape(-1, PIXELS)


def check_pixels(x: Any, dtype: Any, what: str = "pixels") -> Array:
    """The pixels on the device, in the model's dtype; InputError unless they are (N, 64) floats."""
    try:
        host = to_host(x)
    except ValueError as e:
        raise InputError(f"{what} are ragged; expected rows of {PIXELS} floats") from e
    if host.ndim != 2 or host.shape[1] != PIXELS or not len(host) or host.dtype.kind != "f":
        raise InputError(
            f"{what} are {host.dtype} of shape {host.shape}; expected floats of (N, {PIXELS}), N at least 1"
        )
    return to_device(host, xp.zeros(0, dtype).real.dtype)


@dataclass(eq=False)
class Encoder:
    """From patches to a normed vector for each of them."""

    patch_embedding: Layer  # (D, P)
    position_embedding: Layer  # (T, D)
    layers: list[Block]
    norm: Layer  # (D,)

    def embed(self, pixels: Array, need: Need) -> tuple[Array, Back]:
        """Tokens (N, T, D) of pixels (N, 64), which get no gradient."""
        x, back_x = self.patch_embedding(patches(pixels), need)
        e, back_e = self.position_embedding(xp.arange(ROW * ROW), need)

        def back(dx: Array) -> None:
            back_e(dx.sum(0))
            back_x(dx)

        return x + e, back

    @property
    def embeddings(self) -> list[Layer]:
        """What `embed` trains."""
        return [self.patch_embedding, self.position_embedding]

    def __call__(self, x: Array, need: Need) -> tuple[Array, Back]:
        """The blocks and the norm: x (N, T, D) -> (N, T, D)."""
        backs: list[Back] = []
        for block in self.layers:
            x, back = block(x, None, need)
            if (need := after(need, block)) is Need.ALL:
                backs.append(back)
        x, back = self.norm(x, need)
        if after(need, self.norm) is Need.ALL:
            backs.append(back)

        def back_all(d: Array) -> Array:
            while backs:
                d = backs.pop()(d)  # frees the arrays that the layer kept
            return d

        return x, back_all


@dataclass(eq=False)
class ViT:
    """pixels (N, 64) -> logits (N, classes)."""

    config: Config  # of the blocks
    encoder: Encoder
    classifier: Layer  # (classes, D)

    def __repr__(self) -> str:
        return outline(self)

    def __call__(self, pixels: Array, train: bool = False) -> tuple[Array, Back]:
        """Logits, and when training the `back` that takes their gradient; InputError as in `check_pixels`."""
        need, encoder = Need.WEIGHTS if train else Need.NONE, self.encoder
        x, back_embed = encoder.embed(check_pixels(pixels, dtype_of(self)), need)
        need_x = after(need, encoder.embeddings)
        x, back_x = encoder(x, need_x)
        shape, need_y = x.shape, after(need_x, encoder)
        logits, back_y = self.classifier(x.mean(1), need_y)

        def back(dlogits: Array) -> None:
            d = back_y(dlogits)
            if need_y is Need.ALL:
                d = back_x(xp.broadcast_to(d[:, None] / shape[1], shape))
            if need_x is Need.ALL:
                back_embed(d)

        return logits, back if train else back_untrained

    def loss(self, pixels: Array, labels: Array, train: bool = False) -> tuple[Array, Back]:
        """Mean cross-entropy in nats per image; labels (N,). back() means back(1).

        InputError for labels of another shape or outside the classes.
        """
        labels, pixels = host_ints("labels", labels), check_pixels(pixels, dtype_of(self))
        if labels.shape != pixels.shape[:1]:
            raise InputError(
                f"labels have shape {labels.shape}; expected one for each of {len(pixels)} images"
            )
        logits, back_logits = self(pixels, train)
        check_range("label", labels, logits.shape[1])
        value, back_loss = cross_entropy(logits, to_device(labels))

        def back(d: Any = 1.0) -> None:
            back_logits(back_loss(d))

        return value, back


def vit(config: Config, rng: np.random.Generator, classes: int = 10, dtype: Any = np.float32) -> ViT:
    """A fresh model; of `config` only what shapes the blocks counts. W ~ N(0, 1/inputs), E ~ N(0, 1/D)."""
    check_int("classes", classes, 1)
    draw = drawing(rng, dtype)
    return ViT(
        config, fresh_encoder(config, rng, dtype), Linear(Param(draw((classes, config.hidden_size), 1.0)))
    )


def fresh_encoder(config: Config, rng: np.random.Generator, dtype: Any) -> Encoder:
    """A fresh encoder, as in `vit`."""
    D, draw = config.hidden_size, drawing(rng, dtype)
    return Encoder(
        Linear(Param(draw((D, PATCH * PATCH), 1.0)), Param(xp.zeros(D, dtype))),
        Embedding(Param(normal(rng, (ROW * ROW, D), D**-0.5, dtype))),
        blocks(config, draw, dtype),
        fresh_norm(config, dtype),
    )
