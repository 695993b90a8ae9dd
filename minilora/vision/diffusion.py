"""A denoising diffusion model of 8 x 8 images: it learns what noise was added, and draws by taking it away.

    x_t = √a_t x_0 + √(1 - a_t) ε,  ε ~ N(0, 1),  t = 1 ... T        loss = mean (ε̂(x_t, t) - ε)²
    x_{t-1} = c_0 x̂_0 + c_t x_t + σ_t z,    x̂_0 = (x_t - √(1 - a_t) ε̂) / √a_t, within -1 and 1

Ho et al. 2020 (equations 4, 6, 7 and 14), with the cosine a_t of Nichol and Dhariwal 2021 and β_t = 1 - a_t /
a_{t-1}. ε̂ is the encoder of `vit.py`, with the time added to every token, and a linear map from each token to
the pixels of its patch. Stands in for diffusers' DDPM; leaves out classes, guidance, learned variances and
faster samplers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from ..backend import Array, to_device, to_host, xp
from ..data.digits import Images, batches
from ..errors import ConfigError, InputError, check_int
from ..layers import Layer, Linear, Need, Param
from ..model import MLP, Config, after, back_untrained, drawing, host_ints
from ..ops import Back
from ..tree import dtype_of, outline
from .vit import PATCH, PIXELS, Encoder, check_pixels, fresh_encoder, patches, unpatches

OFFSET = 0.008  # keeps the first noise from vanishing
LARGEST = 0.999  # of β_t


def signal(steps: int) -> np.ndarray:
    """a_t, t = 0 ... T: the share of variance that is still the image, 1 at first; (T + 1,) float64."""
    t = np.arange(check_int("steps", steps, 1) + 1) / steps
    a = np.cos((t + OFFSET) / (1 + OFFSET) * math.pi / 2) ** 2
    return np.cumprod(np.concatenate([[1.0], np.maximum(a[1:] / a[:-1], 1 - LARGEST)]))


class Noisy(NamedTuple):
    """Pixels (N, 64) with noise, and the time t (N,) of each image."""

    pixels: np.ndarray
    time: np.ndarray


Batch = tuple[Noisy, np.ndarray]  # and the noise ε (N, 64)


def add_noise(pixels: np.ndarray, rng: np.random.Generator, steps: int) -> Batch:
    """Images at random times, with that much noise, and the noise."""
    time = rng.integers(1, steps + 1, len(pixels))
    noise = rng.standard_normal(pixels.shape)
    a = signal(steps)[time][:, None]
    noisy = np.sqrt(a) * pixels + np.sqrt(1 - a) * noise
    return Noisy(noisy.astype(pixels.dtype), time), noise.astype(pixels.dtype)


def noised(images: Images, rng: np.random.Generator, batch_size: int, steps: int) -> Iterator[Batch]:
    """Endless batches of images drawn at random, with noise; errors as in `digits.batches`."""
    return (add_noise(pixels, rng, steps) for pixels, _ in batches(images, rng, batch_size))


def waves(time: Array, width: int, steps: int, dtype: Any) -> Array:
    """Sines and cosines (N, width) of t / T at frequencies from 1 to 1000 (Vaswani et al. 2017)."""
    half = width // 2
    frequency = 1000.0 ** (xp.arange(half) / max(half - 1, 1))
    angle = time[:, None] / steps * frequency
    return xp.concatenate([xp.sin(angle), xp.cos(angle)], 1).astype(dtype)


@dataclass(eq=False)
class Denoiser:
    """Noisy images (N, 64) and their times (N,) -> the noise in them (N, 64)."""

    config: Config  # of the blocks
    steps: int  # T
    encoder: Encoder
    time: MLP  # (D -> D)
    output: Layer  # (P, D)

    def __repr__(self) -> str:
        return outline(self)

    def __call__(self, noisy: Noisy, train: bool = False) -> tuple[Array, Back]:
        """The noise, and when training the `back` that takes its gradient.

        InputError for pixels that are not (N, 64) floats, or times that are not N ints from 1 to T.
        """
        need, encoder = Need.WEIGHTS if train else Need.NONE, self.encoder
        pixels = check_pixels(noisy.pixels, dtype_of(self))
        time = self.check(noisy.time, len(pixels))
        x, back_embed = encoder.embed(pixels, need)
        e, back_time = self.time(waves(time, x.shape[2], self.steps, x.real.dtype), need)
        need_x = after(need, [*encoder.embeddings, self.time])
        x, back_x = encoder(x + e[:, None], need_x)
        need_y = after(need_x, encoder)
        y, back_y = self.output(x, need_y)

        def back(dy: Array) -> None:
            d = back_y(patches(dy))
            if need_y is Need.ALL:
                d = back_x(d)
            if need_x is Need.ALL:
                back_time(d.sum(1))
                back_embed(d)

        return unpatches(y), back if train else back_untrained

    def check(self, time: Any, count: int) -> Array:
        """The times of so many images on the device, or InputError."""
        host = host_ints("times", time)
        if host.shape != (count,):
            raise InputError(f"times have shape {host.shape}; expected one for each of {count} images")
        if host.min() < 1 or host.max() > self.steps:
            raise InputError(f"times are {host.min()} to {host.max()}; expected 1 to {self.steps}")
        return to_device(host)

    def loss(self, noisy: Noisy, noise: Array, train: bool = False) -> tuple[Array, Back]:
        """The mean square of the error per pixel; noise (N, 64). back() means back(1)."""
        noise = check_pixels(noise, dtype_of(self), "noise")
        pixels = check_pixels(noisy.pixels, dtype_of(self))
        if noise.shape != pixels.shape:
            raise InputError(f"noise has shape {noise.shape}; expected the pixels' {pixels.shape}")
        y, back_y = self(Noisy(pixels, noisy.time), train)
        error = y - noise
        value = (error * error).sum() / error.size

        def back(d: Any = 1.0) -> None:
            back_y(error * error.real.dtype.type(2 * d / error.size))

        return value, back


def denoiser(config: Config, steps: int, rng: np.random.Generator, dtype: Any = np.float32) -> Denoiser:
    """A fresh model of T `steps`; of `config` only what shapes the blocks counts.

    ConfigError for a width that is odd. The last map starts at zero, so that the first guess is no noise.
    """
    D, F, draw = config.hidden_size, config.intermediate_size, drawing(rng, dtype)
    if D % 2:
        raise ConfigError(f"hidden_size is {D}; expected an even number (a sine and a cosine of each wave)")
    check_int("steps", steps, 1)
    encoder = fresh_encoder(config, rng, dtype)
    time = MLP(*(Linear(Param(draw(shape, 1.0))) for shape in ((F, D), (F, D), (D, F))))
    return Denoiser(config, steps, encoder, time, Linear(Param(xp.zeros((PATCH * PATCH, D), dtype))))


def sample(model: Denoiser, count: int, rng: np.random.Generator) -> np.ndarray:
    """`count` images (count, 64), drawn from noise in T steps; all random numbers are drawn on the host."""
    a, dtype = signal(model.steps), dtype_of(model)
    x = rng.standard_normal((check_int("count", count, 1), PIXELS))
    for t in range(model.steps, 0, -1):
        noisy = Noisy(x.astype(dtype), np.full(count, t))
        noise = to_host(model(noisy)[0]).astype(np.float64)
        start = np.clip((x - math.sqrt(1 - a[t]) * noise) / math.sqrt(a[t]), -1, 1)
        mean, deviation = posterior(a, t)
        x = mean[0] * start + mean[1] * x
        if t > 1:
            x += deviation * rng.standard_normal(x.shape)
    return x


def posterior(a: np.ndarray, t: int) -> tuple[tuple[float, float], float]:
    """Of x_{t-1}, given x_0 and x_t: their coefficients c_0 and c_t in its mean, and its deviation σ_t.

    With β = 1 - a_t / a_{t-1}: c_0 = √a_{t-1} β / (1 - a_t), c_t = √(1 - β) (1 - a_{t-1}) / (1 - a_t) and
    σ² = β (1 - a_{t-1}) / (1 - a_t). At t = 1 it is x_0 itself.
    """
    before, now = float(a[t - 1]), float(a[t])
    beta = 1 - now / before
    means = math.sqrt(before) * beta / (1 - now), math.sqrt(1 - beta) * (1 - before) / (1 - now)
    return means, math.sqrt(beta * (1 - before) / (1 - now))
