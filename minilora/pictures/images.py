"""LoRA in models of images: the maps of a vision transformer and of a diffusion model, the targets marked.

The models are those of `vision/`, which share their encoder; what `inject` reports of them is drawn. Biases,
norms and the table of places are left out, and what attention and the MLP do between their maps.
"""

from typing import Any, NamedTuple

import numpy as np

from ..analysis.plotting import Picture, styled
from ..data.digits import SIDE
from ..lora import inject
from ..methods.lora_config import LoraConfig
from ..model import Config
from ..vision.diffusion import denoiser, signal
from ..vision.vit import vit
from .canvas import EMBER, FROZEN, LETTER, PASSING, SMALL, SOFT, TRAINED, Canvas

TIMES = 100  # of the diffusion
INK = np.array([[c == "#" for c in row] for row in (
    "........", "..#####.", "..#.....", "..####..", "......#.", "......#.", "..####..", "........",
)])  # fmt: skip
HIGH, TAG = 0.5, 0.36  # inches of a weight, and of the adapter below it
LINES = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")  # of a block


class Found(NamedTuple):
    """A map of a model: its size in words, the numbers trained for it, and whether it is trained in full."""

    size: str
    trained: int
    full: bool = False


def maps_of(model: Any, config: LoraConfig) -> tuple[dict[str, Found], str]:
    """The maps that LoRA finds, by path, and the share of numbers that is trained."""
    report = inject(model, config, rng=np.random.default_rng(0))
    sizes = {row.module: "{} × {}".format(*row.shape) for row in report.rows}
    found = {row.module: Found(sizes[row.module], row.parameters, not row.r) for row in report.rows}
    return found, f"{report.parameters:,} of {report.base_parameters:,} numbers are trained"


def draw_map(c: Canvas, x: float, y: float, width: float, name: str, found: Found) -> None:
    """A map and its adapter around (x, y), or a map that is trained in full."""
    middle = y + (0 if found.full else TAG / 2)
    c.box(x, middle, width, HIGH + TAG * found.full, TRAINED if found.full else FROZEN)
    c.words(x, middle + 0.1, name, SMALL)
    c.words(x, middle - 0.14, found.size, SMALL - 2, SOFT)
    if not found.full:
        c.box(x, y - HIGH / 2, width, TAG, TRAINED)
        c.words(x, y - HIGH / 2, f"+ {found.trained:,}", SMALL, EMBER)


def draw_row(c: Canvas, y: float, kind: str, model: Any, config: LoraConfig, pixels: np.ndarray) -> str:
    """A model from its image to its last map, around a height; the share that is trained."""
    maps, share = maps_of(model, config)
    *_, last = maps
    c.words(0.3, y + 1.62, f"{kind}, r = {config.r}: {share}", at="left")
    c.image(1.0, y, 1.3, pixels)
    c.way((1.8, y), (2.1, y))
    draw_map(c, 3.0, y, 1.8, "patch_embedding", maps["encoder.patch_embedding"])
    if times := [found for path, found in maps.items() if path.startswith("time.")]:
        draw_map(c, 3.0, y - 1.15, 1.8, "time", Found(f"{len(times)} maps", sum(m.trained for m in times)))
        c.words(1.6, y - 1.15, "t", LETTER, slanted=True)
        c.way((1.8, y - 1.15), (2.1, y - 1.15))
        c.way((3.9, y - 1.15), (4.4, y - 1.15), (4.4, y - 0.2))
        c.way((3.9, y), (4.2, y))
        c.sum(4.4, y)
    c.way((3.9 + 0.7 * bool(times), y), (4.9, y))
    c.box(7.5, y, 5.2, 2.5, PASSING)
    c.words(5.05, y + 1.06, f"one of {len(model.encoder.layers)} blocks", SMALL, SOFT, at="left")
    for line, wing, up in zip(LINES, ("self_attn", "mlp"), (0.38, -0.68), strict=True):
        for k, name in enumerate(line):
            x = 7.5 + 1.25 * (k - (len(line) - 1) / 2)
            draw_map(c, x, y + up, 1.15, name, maps[f"encoder.layers.0.{wing}.{name}"])
    c.way((10.1, y), (10.6, y))
    draw_map(c, 11.3, y, 1.4, last, maps[last])
    c.way((12.0, y), (12.5, y))
    return share


@styled
def beyond_language(config: Config, r: int = 4) -> Picture:
    """Where LoRA sits in a vision transformer and in a diffusion model, with the numbers it trains.

    `config` shapes the blocks of both; errors are those of `vit`, `denoiser` and `inject`.
    """
    rng, c = np.random.default_rng(0), Canvas(14.1, 7.5)
    image, noise, a = 2.0 * INK - 1, rng.standard_normal((SIDE, SIDE)), signal(TIMES)[TIMES // 2]
    noisy = np.sqrt(a) * image + np.sqrt(1 - a) * noise
    up, low = 5.4, 1.85
    saved = LoraConfig(r=r, modules_to_save=["classifier"])
    first = draw_row(c, up, "Vision transformer", vit(config, rng), saved, image)
    c.words(12.65, up, "5", 40, at="left")
    second = draw_row(c, low, "Diffusion model", denoiser(config, TIMES, rng), LoraConfig(r=r), noisy)
    c.image(13.2, low, 1.3, noise)
    for x, look, words in ((10.9, FROZEN, "frozen"), (12.5, TRAINED, "trained")):
        c.box(x, up + 1.62, 0.4, 0.32, look)
        c.words(x + 0.34, up + 1.62, words, SMALL, at="left")
    c.snowflake(10.9, up + 1.62)
    return c.picture(
        f"LoRA beside every linear map of two models of images, r = {r}: in a vision transformer from the "
        f"patch_embedding through {', '.join(sum(LINES, ()))} of each block to the classifier, which is "
        f"trained in full ({first}); and in a diffusion model that finds the noise in an image, whose blocks "
        f"are the same ({second})."
    )
