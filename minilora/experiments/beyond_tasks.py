"""The tasks of the experiment beyond language: which images, which base, and what counts as learned.

    5 to 9, inverted, rotated    a classifier of the digits 0 to 4 is adapted to others, or to changed pixels
    permuted:k                   k + 1 pixels of a patch change places: ΔW = W Pᵀ - W, of rank k, undoes it
    drawing 5 to 9               a diffusion model of the digits 0 to 4 is adapted to draw others

A model that is adapted to permuted pixels learns the logits that the base has on the plain image, so that the
known ΔW leaves no loss at all. A drawing counts as a new digit if the training image nearest to it shows one.
"""

import copy
import functools
import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from ..backend import Array, to_device, to_host
from ..data.digits import SIDE, Images, batches, digits
from ..errors import NonFiniteError
from ..model import Config
from ..optim import AdamW, Schedule
from ..tree import freeze, trained
from ..vision.diffusion import Denoiser, add_noise, denoiser, noised
from ..vision.vit import PATCH, ViT, patches, unpatches, vit
from .recipe import learn

OLD, NEW = range(5), range(5, 10)  # the digits of the bases, and those that are new to them
CLASSIFIED, DRAWN = ("5 to 9", "inverted", "rotated"), "drawing 5 to 9"
SHAPE = Config(hidden_size=48, intermediate_size=96, num_hidden_layers=2)  # of the blocks of both bases
TIMES = 100  # of the diffusion
RATE = 3e-3  # of pretraining
DRAWS = 4  # of noise, for each image that is measured


def planted(task: str) -> int:
    """k of "permuted:k", else 0."""
    return int(task.partition(":")[2] or 0)


def order(k: int) -> np.ndarray:
    """A permutation of the pixels of a patch that turns the first k + 1 in a cycle: rank(P - I) = k."""
    return np.array([*np.roll(np.arange(k + 1), 1), *range(k + 1, PATCH**2)])


def changed(task: str, pixels: np.ndarray) -> np.ndarray:
    """The pixels (N, 64) of a task."""
    if task == "inverted":
        return -pixels
    if task == "rotated":
        return np.rot90(pixels.reshape(-1, SIDE, SIDE), axes=(1, 2)).reshape(pixels.shape).copy()
    return unpatches(patches(pixels)[..., order(planted(task))])


def seen(task: str, split: str, base: Any) -> Images:
    """The images of one split, each with its digit; the permuted ones with the base's logits instead."""
    some = getattr(digits(), split).of(NEW if "5 to 9" in task else OLD)
    labels = to_host(base(some.pixels)[0]) if planted(task) else some.labels
    return Images(changed(task, some.pixels), labels)


@functools.cache
def pretrained(draws: bool, steps: int, batch: int) -> Any:
    """A frozen base for the digits 0 to 4: a classifier, or a diffusion model; made once in each process."""
    fresh, rng, images = np.random.default_rng(0), np.random.default_rng([0, 1]), digits().train.of(OLD)
    model: Any = denoiser(SHAPE, TIMES, fresh) if draws else vit(SHAPE, fresh)
    learn(model, drawn(model, images, rng, batch), AdamW(RATE, betas=(0.9, 0.99)), steps)
    freeze(model)
    return model


def known(base: ViT, task: str) -> ViT:
    """The base with the ΔW that undoes a permutation."""
    model: Any = copy.deepcopy(base)
    weight = model.encoder.patch_embedding.weight
    weight.data = weight.data[:, to_device(order(planted(task)))]
    return model


def drawn(model: Any, images: Images, rng: np.random.Generator, batch: int) -> Iterator[Any]:
    """Batches of images drawn at random, with noise for a diffusion model."""
    return noised(images, rng, batch, TIMES) if isinstance(model, Denoiser) else batches(images, rng, batch)


def adapt(
    model: Any, task: str, base: Any, rng: np.random.Generator, batch: int, optimizer: AdamW, steps: int
) -> None:
    """Train what is trainable."""
    source = drawn(model, seen(task, "train", base), rng, batch)
    if not planted(task):
        learn(model, source, optimizer, steps)
        return
    schedule, params = Schedule(steps, warmup=steps // 20), trained(model)
    for step in range(steps):
        pixels, logits = next(source)
        guess, back = model(pixels, train=True)
        back(square(guess, to_device(logits))[1])
        optimizer.step(params, optimizer.lr * schedule(step))


def square(guess: Array, target: Array) -> tuple[float, Array]:
    """The mean square of the difference, and its gradient."""
    error = guess - target
    return float((error * error).sum()) / error.size, error * error.dtype.type(2 / error.size)


def loss(model: Any, task: str, split: str, base: Any) -> float:
    """Nats per image; of permuted pixels the mean square in the logits, of a diffusion model in the noise."""
    images = seen(task, split, base)
    if isinstance(model, Denoiser):
        rng = np.random.default_rng(0)  # the same noise for all
        some = [model.loss(*add_noise(images.pixels, rng, TIMES))[0] for _ in range(DRAWS)]
        found = float(np.mean([float(one) for one in some]))
    elif planted(task):
        found = square(model(images.pixels)[0], to_device(images.labels))[0]
    else:
        found = float(model.loss(images.pixels, images.labels)[0])
    if not math.isfinite(found):
        raise NonFiniteError(f"the loss on {split} is {found}")
    return found


def right(model: ViT, task: str, base: ViT) -> float:
    """The share of test images whose class is found; of permuted ones, the class that the base finds."""
    images = seen(task, "test", base)
    labels = images.labels.argmax(1) if planted(task) else images.labels
    return float((to_host(model(images.pixels)[0].argmax(1)) == labels).mean())


def new(drawings: np.ndarray) -> float:
    """The share of drawings (N, 64) whose nearest training image, of all ten digits, shows a new one."""
    known = digits().train
    nearest = [((x - known.pixels) ** 2).sum(1).argmin() for x in drawings]
    return float(np.isin(known.labels[nearest], NEW).mean())
