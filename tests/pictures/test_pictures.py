"""A picture's words never overlap, its numbers are those that are counted, its sizes are to scale."""

import io
import itertools
import json
import math
import re
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest
from helpers import SIZES
from hypothesis import example, given, settings
from hypothesis import strategies as st
from matplotlib.colors import to_rgb
from matplotlib.transforms import Bbox

import minilora as ml
from minilora import pictures, spectra
from minilora.analysis import count
from minilora.compose.arithmetic import cat
from minilora.errors import ConfigError, InputError, MismatchError, StateError, UnsupportedError
from minilora.formats.safetensors import stored
from minilora.layers import Factors
from minilora.lora import active, bases
from minilora.pictures import batch, blocks, canvas, images, maps, memory, sheets, trained
from minilora.tree import size as parameters
from minilora.vision.diffusion import denoiser
from minilora.vision.vit import vit

ROOT = Path(__file__).parents[2]
WIDE = 128256  # the largest side that is drawn here
KINDS = (*count.ATTENTION, *count.MLP, "embed_tokens", "lm_head")


def words(picture):
    """The texts of a picture, those in matrices of numbers too."""
    return [t for ax in picture.figure.axes for t in ax.texts if t.get_text()]


def said(picture):
    return [t.get_text() for t in words(picture)]


def shapes(picture):
    """The corners (n, 2) in inches and the colours of everything filled."""
    return [(p.get_xy()[:-1], p) for p in picture.figure.axes[0].patches]


def boxed(points):
    """Width and height of a rectangle."""
    return np.ptp(points, axis=0)


def faults(picture):
    """What hides words: the edge of the picture, other words, lines and outlines."""
    figure = picture.figure
    figure.draw_without_rendering()
    boxes = [(t.get_text(), t.get_window_extent()) for t in words(picture)]
    beside = [(t.get_text(), t.get_window_extent()) for t in figure.axes[0].texts]
    paths = [
        artist.get_path().transformed(artist.get_transform())
        for ax in figure.axes
        for artist in (*ax.patches, *ax.lines)
    ]
    matrices = [ax.get_window_extent() for ax in figure.axes[1:]]
    for text, box in boxes:
        if not (figure.bbox.x0 <= box.x0 <= box.x1 <= figure.bbox.x1):
            yield text, "is cut at a side"
        if not (figure.bbox.y0 <= box.y0 <= box.y1 <= figure.bbox.y1):
            yield text, "is cut above or below"
        if any(path.intersects_bbox(box, filled=False) for path in paths):
            yield text, "is crossed"
    for (text, box), matrix in itertools.product(beside, matrices):
        if Bbox.intersection(box, matrix) is not None:
            yield text, "lies on a matrix"
    for (a, one), (b, two) in itertools.combinations(boxes, 2):
        if Bbox.intersection(one, two) is not None:
            yield a, f"overlaps {b}"


def lightness(colour):
    """Relative luminance (WCAG 2.1)."""
    rgb = np.array(to_rgb(colour))
    return np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4) @ (0.2126, 0.7152, 0.0722)


def contrast(a, b):
    low, high = sorted((lightness(a), lightness(b)))
    return (high + 0.05) / (low + 0.05)


def adapted(r=3, targets="all-linear", seed=0, **sizes):
    """A tiny model with an adapter whose ΔW is not zero."""
    rng = np.random.default_rng(seed)
    model = ml.llama(ml.Config(**SIZES | sizes), rng)
    ml.inject(model, ml.LoraConfig(r=r, targets=targets, init="both"), rng=rng)
    return model


MODEL = adapted()
ADAPTER = ml.open_adapter(ROOT / "figures/pictures/adapter")
OTHER = ml.open_adapter(ROOT / "figures/pictures/adapter_kjv")
SHAPE = ml.Config(hidden_size=48, intermediate_size=96, num_hidden_layers=2)
DRAWN = {
    "flow": pictures.flow,
    "product": pictures.product,
    "product of few": lambda: pictures.product(6, 5, 3),
    "lora": pictures.lora,
    "block": pictures.block,
    "block, all": lambda: pictures.block("smollm2-135m", 16, KINDS),
    "merging": pictures.merging,
    "rounding": pictures.rounding,
    "rounding of float32": lambda: pictures.rounding(-0.1, 3e-8, 24),
    "four_bits": pictures.four_bits,
    "many_adapters": pictures.many_adapters,
    "overlays": lambda: pictures.overlays(ml.load()),
    "overlays of two": lambda: pictures.overlays(MODEL, 3, ("one", "two")),
    "factors": lambda: pictures.factors(ADAPTER),
    "factors of few": lambda: pictures.factors(MODEL, "layers.1.mlp.up_proj"),
    "adding": lambda: pictures.adding(ADAPTER, OTHER),
    "adding with weights": lambda: pictures.adding(MODEL, adapted(seed=1), "up_proj", (0.25, -1)),
    "images": lambda: pictures.beyond_language(SHAPE),
    "rank_one": lambda: pictures.rank_one(ADAPTER),
    "rank_one of few": lambda: pictures.rank_one(MODEL, first=1),
    "ranks": pictures.ranks,
    "ranks of few": lambda: pictures.ranks(5, 3, (1, 2, 3)),
    "beside_base": lambda: pictures.beside_base(MODEL, "layers.1.mlp.up_proj"),
    "beside_base, whole": lambda: pictures.beside_base(adapted(8, "q_proj")),
}


@pytest.fixture(scope="module", params=DRAWN)
def drawing(request):
    return DRAWN[request.param]()


# ---- every picture


def test_no_words_are_hidden(drawing):
    assert not list(faults(drawing))


def test_the_law_sees_words_that_are_hidden():
    picture = pictures.flow()
    ax = picture.figure.axes[0]
    for where in ((-0.2, 2), (3.0, 4.15), (1.5, 3.1), (3.1, 3.2)):
        text = ax.text(*where, "planted")
        assert [fault for fault in faults(picture) if "planted" in str(fault)], where
        text.remove()
    assert not list(faults(picture))


def test_words_can_be_read_from_the_last_row(drawing):
    """At 1280 pixels width a letter is at least 14 high, and stands out from what is behind it (WCAG AA)."""
    picture = drawing
    for text in words(picture):
        if text.axes is picture.figure.axes[0]:
            assert text.get_fontsize() / 72 * 1280 / picture.figure.get_figwidth() >= 14, text.get_text()
            at = text.get_window_extent()
            middle = ((at.x0 + at.x1) / 2, (at.y0 + at.y1) / 2)
            behind = [
                p.get_facecolor()
                for p in picture.figure.axes[0].patches
                if p.get_facecolor()[3] and p.contains_point(middle)
            ]
            assert contrast(text.get_color(), behind[-1] if behind else "white") >= 4.5, text.get_text()


def test_the_same_bytes_again_and_a_valid_and_small_svg(drawing, request):
    svg = drawing.encoded("svg")
    assert DRAWN[request.node.callspec.params["drawing"]]().encoded("svg") == svg
    assert len(svg) < (150_000 if drawing.figure.axes[1:] else 25_000)
    assert not re.search(rb"dc:date|Matplotlib v", svg)
    links = [v for node in ET.fromstring(svg).iter() for k, v in node.attrib.items() if k.endswith("href")]
    assert all(link.startswith(("#", "data:")) for link in links)
    shown = {node.text for node in ET.fromstring(svg).iter() if node.tag.endswith("}text")}
    assert shown == set(said(drawing))  # as text, to be found and read aloud


def test_every_number_is_in_the_sentence_that_says_the_picture(drawing, request):
    assert len(drawing.says) > 100
    assert not re.search(r"[\[\]\n]", drawing.says)  # it stands in Markdown
    numbers = re.compile(r"\d[\d,.]*\d|\d")
    told = numbers.findall(drawing.says)
    if request.node.callspec.params["drawing"] not in ("block", "block, all", "images"):  # which list shapes
        left = {
            n
            for t in words(drawing)
            if t.axes is drawing.figure.axes[0]
            for n in numbers.findall(t.get_text())
        }
        assert left - {*told} <= {"1", "2"}, left - {*told}  # how many rows an adapter has


LOOKS = (canvas.FROZEN, canvas.TRAINED, *batch.ADAPTERS)
BLINDNESS = {  # Viénot et al. 1999: linear RGB as it is seen
    "deuteranopia": [[0.29275, 0.70725, 0], [0.29275, 0.70725, 0], [-0.02234, 0.02234, 1]],
    "protanopia": [[0.11238, 0.88762, 0], [0.11238, 0.88762, 0], [0.00401, -0.00401, 1]],
}


@pytest.mark.parametrize("kind", BLINDNESS)
def test_frozen_and_trained_and_adapters_differ_for_colour_blind_eyes(kind):
    def seen(colour):
        rgb = np.array(to_rgb(colour)) ** 2.2
        return (np.array(BLINDNESS[kind]) @ rgb).clip(0, 1) ** (1 / 2.2)

    for a, b in itertools.combinations({look.edge for look in LOOKS}, 2):
        assert np.abs(seen(a) - seen(b)).max() > 0.12, (a, b)
    assert canvas.TRAINED.width > 1.5 * canvas.FROZEN.width


# ---- one map

# ruff: noqa: E741

sides = st.integers(1, WIDE)


@settings(max_examples=12)
@given(st.data(), sides, sides)
@example(None, 4096, 4096)
@example(None, WIDE, 1)
@example(None, 1, WIDE)
def test_any_map_is_drawn_to_scale_with_its_counts(data, O, I):
    r = data.draw(st.integers(1, min(O, I))) if data else 1
    for picture in (pictures.lora(O, I, r), pictures.merging(O, I, r)):
        assert not list(faults(picture))
    picture = pictures.product(O, I, r)
    change, B, A = (boxed(points) for points, p in shapes(picture) if len(points) == 4)
    assert change[0] / I == pytest.approx(change[1] / O)
    assert pytest.approx((change[0] * r / I, change[1])) == B
    assert pytest.approx((change[0], change[1] * r / O)) == A
    assert f"{O * I:,}" in said(picture)
    assert f"{r * (O + I):,}" in said(picture)


@settings(max_examples=6)
@given(st.integers(1, 40), st.integers(1, 40), st.data())
def test_a_small_rank_can_be_counted(O, I, data):
    """B has r columns, A r rows: the white lines between them are equally far apart."""
    r = data.draw(st.integers(1, min(O, I)))
    picture = pictures.product(O, I, r)
    inch = boxed(shapes(picture)[0][0])[0] / I
    lines = [line.get_xydata() for line in picture.figure.axes[0].lines if line.get_color() == "white"]
    upright = [line[0, 0] for line in lines if line[0, 0] == line[1, 0]]
    flat = [line[0, 1] for line in lines if line[0, 1] == line[1, 1]]
    assert len(upright) == len(flat) == (r - 1 if inch > 0.03 else 0)
    assert np.allclose(np.diff(upright), inch)
    assert np.allclose(np.diff(flat), inch)


@settings(max_examples=12)
@given(st.integers(1, 200), st.integers(1, 200), st.data())
@example(4096, 4096, None)
def test_all_ranks_are_drawn_to_the_scale_of_the_change(O, I, data):
    some = data.draw(st.lists(st.integers(1, min(O, I)), min_size=1, max_size=4)) if data else (8, 64, 512)
    picture = pictures.ranks(O, I, some)
    assert not list(faults(picture))
    change, *pairs = (boxed(points) for points, _ in shapes(picture))
    assert change[0] / I == pytest.approx(change[1] / O)
    inch = change[0] / I
    assert np.allclose(pairs, [size for r in some for size in ((r * inch, O * inch), (I * inch, r * inch))])
    for r in some:
        assert {f"r = {r:,}", f"{r * (O + I):,}"} <= {*said(picture)}
        assert f"{r * (O + I):,} at r = {r:,}, {maps.compared(O, I, r)}" in picture.says


@pytest.mark.parametrize(("D", "r"), [(4096, 8), (64, 4), (768, 64), (2, 1)])
def test_a_maps_counts_are_those_of_count(D, r):
    (row,) = count.count(f"d={D},layers=1", r, "q_proj").rows
    assert f"{row.parameters:,}" in said(pictures.product(D, D, r))
    assert f"+ {row.parameters:,}" in said(pictures.merging(D, D, r))
    assert f"r = {r:,}" in said(pictures.flow(D, D, r))
    assert said(pictures.flow(D, D, r)).count(f"d = {D:,}") == 2
    model = ml.Config(**SIZES)
    (row,) = count.count(model, r := 3, "up_proj").rows
    O, I = row.shape
    assert f"{row.parameters // row.number:,}" in said(pictures.product(O, I, r))
    assert {f"O = {O}", f"I = {I}"} <= {*said(pictures.flow(O, I, r))}


def test_fewer_numbers_are_not_claimed_of_a_high_rank():
    assert "256 times fewer" in said(pictures.product())
    assert "2 times as many" in said(pictures.product(8, 8, 8))
    assert "1 times as many" in said(pictures.product(8, 8, 4))


def test_what_is_frozen_and_what_is_trained_look_so():
    """W is frozen, A and B are trained, in the flow; ΔW is dashed, since nothing keeps it."""
    looks = [
        (p.get_linewidth(), p.get_linestyle()) for points, p in shapes(pictures.flow()) if len(points) == 4
    ]
    frozen, ours = ((look.width, look.dashes) for look in (canvas.FROZEN, canvas.TRAINED))
    assert looks == [frozen, ours, ours]
    first = next(p for _, p in shapes(pictures.product()))
    assert first.get_linestyle() == "--"


def test_merged_and_unmerged_say_what_each_needs():
    all_, few = "16,777,216", "+ 65,536"
    shown = said(pictures.merging())
    assert (shown.count(all_), shown.count(few)) == (4, 2)


# ---- rounding

magnitudes, signs, formats = st.floats(1e-3, 1e4), st.sampled_from([-1, 1]), st.sampled_from([24, 11, 8])


def in_format(x, bits):
    """x as NumPy rounds it, or as a file in bfloat16 holds it."""
    dtype = {24: "float32", 11: "float16", 8: "bfloat16"}[bits]
    return float(stored(np.float64([x]), dtype)[0])


@settings(max_examples=30)
@given(magnitudes, signs, st.integers(-384, 384).filter(bool), formats)
@example(1.0, 1, 147, 8)
@example(1.0, -1, 26, 24)  # where numbers are denser
@example(2.0, 1, -26, 11)
@example(1.0, 1, 32, 11)  # a tie, to even
@example(1.0, 1, 96, 8)
def test_a_sum_is_rounded_to_scale_as_numpy_rounds_it_and_within_the_bound(size, sign, steps, bits):
    """The change is a multiple of 1/64 of the distance between numbers, so that the sum itself is exact."""
    weight = in_format(sign * size, bits)
    change = steps / 64 * memory.gap(weight, bits)
    total = weight + change
    picture = pictures.rounding(weight, change, bits)
    assert not list(faults(picture))
    step, right = memory.gap(total, bits), in_format(total, bits)

    def at(x):
        return pytest.approx(memory.MIDDLE + memory.GAP * (x - total) / step, abs=1e-6)

    *_, kept, exact = [p for p, _ in shapes(picture) if len(p) > 30]
    assert (kept[:, 0].min() + kept[:, 0].max()) / 2 == at(right)
    assert (exact[:, 0].min() + exact[:, 0].max()) / 2 == at(total)
    (box,) = [p for p, patch in shapes(picture) if patch.get_linestyle() == "--"]
    bound = abs(total) * 2.0**-bits
    assert (box[:, 0].min(), box[:, 0].max()) == (at(total - bound), at(total + bound))
    assert abs(right - total) <= bound
    near = {in_format(total + k / 4 * step, bits) for k in range(-12, 13)}
    lines = [line.get_xydata() for line in picture.figure.axes[0].lines]
    ticks = sorted(line[0, 0] for line in lines if 0 < np.ptp(line[:, 1]) < 0.5)
    assert ticks == [at(x) for x in sorted(near) if abs(x - total) < memory.SEEN * step]
    bold = [t.get_text() for t in words(picture) if t.get_fontweight() == "bold"]
    assert bold[0] == f"{right:.9g}"
    assert f"W + ΔW = {total:.9g} is stored as {right:.9g}: off by {abs(right - total):.3g}" in bold


# ---- models

models = st.sampled_from([*count.LLAMAS, "d=96,layers=3,heads=4,ff=256,vocab=99"])


@settings(max_examples=8)
@given(models, st.integers(1, 64), st.sets(st.sampled_from(KINDS), min_size=1))
@example("llama-2-70b", 64, {*KINDS})
def test_a_block_marks_its_targets_with_their_counts(model, r, targets):
    counts = count.count(model, r, sorted(targets))
    picture = pictures.block(model, r, sorted(targets))
    shown = said(picture)
    assert not list(faults(picture))
    assert sorted(t for t in shown if t.startswith("+ ")) == sorted(
        f"+ {row.parameters // row.number:,}" for row in counts.rows
    )
    marked = {}
    place = {t.get_text(): t.get_window_extent() for t in words(picture)}
    for text in words(picture):
        if text.get_text().startswith("+ "):
            at = text.get_window_extent()
            (above,) = [k for k in KINDS if abs((place[k].x0 + place[k].x1) - (at.x0 + at.x1)) < 4
                        and 0 < place[k].y0 - at.y1 < 0.6 * picture.figure.dpi]  # fmt: skip
            marked[above] = text.get_text()
    assert marked == {row.kind: f"+ {row.parameters // row.number:,}" for row in counts.rows}
    for row in count.count(model, 1, KINDS).rows:
        assert row.kind in shown
        assert "{} × {}".format(*row.shape) in shown
    (share,) = [t for t in shown if "numbers are trained" in t]
    assert f"{counts.parameters:,} of {counts.total:,}" in share
    assert f"one of {count.shape_of(model).maps['q_proj'][2]} blocks" in shown


@settings(max_examples=6)
@given(models, st.integers(1, 64))
def test_four_bits_has_the_memory_of_count_to_scale(model, r):
    counts = count.count(model, r, "all-linear")
    picture = pictures.four_bits(model, r)
    assert not list(faults(picture))
    bars = [boxed(points) for points, p in shapes(picture) if len(points) == 4][-4:]
    whole = [sum(counts.memory[how]) for how in ("LoRA", "QLoRA")]
    ours = 16 * counts.parameters  # 2 bytes, 2 of the gradient, 12 of Adam
    expected = [whole[0] - ours, ours, whole[1] - ours, ours]
    assert [w for w, _ in bars] == pytest.approx([memory.LONGEST * n / whole[0] for n in expected])
    for size in expected[::2]:
        assert f"base {count.human(size)}" in said(picture)
    assert said(picture).count(f"A, B, gradients, moments {count.human(ours)}") == 2


@settings(max_examples=6)
@given(models, st.integers(1, 64), st.integers(1, 10**5))
def test_many_adapters_have_the_bytes_of_count(model, r, number):
    counts = count.count(model, r, count.QV)
    picture = pictures.many_adapters(model, r, number=number)
    assert not list(faults(picture))
    base, each = count.human(2 * counts.total), count.human(counts.half_bytes)
    assert f"{model} in 16 bits: {base}, each adapter {each}" in said(picture)
    assert count.human(2 * counts.total + number * counts.half_bytes) in picture.says
    rows = [t for t in said(picture) if t.endswith(("row", "rows"))]
    assert [int(t.split()[0]) for t in rows] == [6, 2, 2, 1]
    assert rows[1:] == [f"{n} row{'s' * (n > 1)}" for n in map(batch.BATCH.count, (1, 2, 3))]


@settings(max_examples=6)
@given(st.integers(0, 10), st.integers(1, 8), st.integers(2, 3))
def test_sheets_have_their_numbers_to_scale_on_a_base_that_adapters_do_not_change(seed, r, number):
    rng = np.random.default_rng(seed)
    model = ml.llama(ml.Config(**SIZES), rng)
    report = ml.inject(model, ml.LoraConfig(r=r, init="both"), rng=rng)
    names = ["one", "two", "three"][:number]
    picture = pictures.overlays(model, r, names)
    assert not list(faults(picture))
    W = bases(model)[sheets.SHOWN].weight.data
    (painting,) = picture.figure.axes[0].images
    shown = painting.get_array().astype(float)
    assert len(np.unique(shown)) <= 2 * sheets.SHADES + 1
    kept = np.abs(W) < 2.9 * W.std()
    assert np.abs(shown * 3 * W.std() / sheets.SHADES - W)[kept].max() <= 0.51 * 3 * W.std() / sheets.SHADES
    counts = [f"{name}: {report.parameters:,} numbers" for name in names]
    assert {*counts, f"the frozen base: {report.base_parameters:,} numbers"} < {*said(picture)}
    planes = [(points, p) for points, p in shapes(picture) if len(points) == 4][2:]  # after the slab's sides
    for (sheet, _), (B, _), (A, _) in zip(*[iter(planes)] * 3, strict=True):
        (x, y), (right, _), _, back = sheet
        assert np.allclose(B[1] - B[0], ((right - x) * r / W.shape[1], 0))  # r of its columns
        assert np.allclose(B[[0, 3]], [(x, y), back])
        assert np.allclose(back - A[0], (back - sheet[0]) * r / W.shape[0])  # r of its rows
        assert np.allclose(A[2:], sheet[2:])
    assert len(planes) == 3 * number
    looks = {p.get_facecolor() for points, p in planes[::3]}
    assert len(looks) == number
    assert all(0 < alpha < 0.5 for *_, alpha in looks)  # one sees through


# ---- a trained adapter


def matrices(picture):
    return [
        np.ma.filled(ax.get_images()[0].get_array().astype(float), np.nan) for ax in picture.figure.axes[1:]
    ]


@settings(max_examples=6)
@given(
    st.integers(0, 10), st.integers(1, 8), st.integers(1, 6), st.sampled_from(["q_proj", "k_proj", "up_proj"])
)
def test_the_numbers_are_those_of_the_adapter_and_its_parts_are_a_sum(seed, r, first, kind):
    model = adapted(r, [kind], seed)
    path = f"model.layers.0.{'mlp' if kind == 'up_proj' else 'self_attn'}.{kind}"
    pair = active(model)[path]
    change = pair.delta()
    picture = pictures.factors(model)
    assert not list(faults(picture))
    for shown, M in zip(matrices(picture), (change, pair.B.data, pair.A.data), strict=True):
        assert np.allclose(shown, M, rtol=1e-6, atol=1e-7)
    picture = pictures.rank_one(model, kind, first)
    assert not list(faults(picture))
    whole, *parts = matrices(picture)
    assert np.allclose(whole, change, rtol=1e-6, atol=1e-7)
    assert np.allclose(sum(parts), whole, atol=1e-6 * np.abs(change).max())
    assert [np.linalg.matrix_rank(M, tol=1e-6) for M in parts[: min(first, r)]] == [1] * min(first, r)
    S = np.linalg.svd(change.astype(float), compute_uv=False)[:r]
    shares = [float(t[:-1]) for t in said(picture) if t.endswith("%")]
    energies = [*(S[: min(first, r)] ** 2), (S[first:] ** 2).sum()][: len(parts)]
    assert np.allclose(shares, 100 * np.array(energies) / (S**2).sum(), atol=0.0501)
    assert len(parts) == min(first, r) + (first < r)


@settings(max_examples=6)
@given(st.integers(0, 10), st.integers(1, 8), st.sampled_from(["q_proj", "k_proj", "up_proj", "down_proj"]))
def test_the_bars_are_the_singular_values_of_the_base_and_the_shares_of_its_directions(seed, r, kind):
    model = adapted(r, [kind], seed)
    (path, pair), *_ = active(model).items()
    layer = ml.lora.adapted(model)[path]
    picture = pictures.beside_base(model)
    assert not list(faults(picture))
    left, S, _ = np.linalg.svd(layer.base.weight.data.astype(float), full_matrices=False)
    U, *_ = spectra.thin_svd(*pair.change(layer.base))
    n, O = len(S), len(U)
    own, rest, ours, others = (
        [points for points, p in shapes(picture) if to_rgb(p.get_facecolor()) == to_rgb(colour)]
        for colour in (canvas.ICE, canvas.FROZEN.fill, canvas.ORANGE, canvas.TRAINED.fill)
    )
    assert sum(map(len, (own, rest, ours, others))) == 4

    def heights(*outlines):
        return np.concatenate([points[0, 1] - points[1:-1:2, 1] for (points,) in outlines])

    assert np.allclose(heights(own, rest) / heights(own)[0], S / S[0])
    assert len(heights(own)) == len(heights(ours)) == min(r, n)
    shares = ((U.T @ left) ** 2).sum(0)
    chance = picture.figure.axes[0].lines[-1].get_ydata()[0]
    scale = (ours[0][0, 1] - chance) / (r / O)
    assert np.allclose(heights(ours, others), scale * shares, atol=1e-9)
    shared = f"{spectra.similarity(U, left)[r - 1, r - 1]:.1%} of the first {r}"
    shared += f", {shares[r:].mean():.1%} of the others" if n > r else ""
    assert shared in said(picture)
    assert shared in picture.says
    assert f"chance {r / O:.1%}" in said(picture)


def test_the_shares_of_the_first_directions_are_the_overlap_of_inspect(tmp_path):
    model = ml.load()
    ml.load_adapter(model, ROOT / "figures/pictures/adapter")
    (m,) = ml.inspect(ROOT / "figures/pictures/adapter", base="base").modules
    assert f"{m.base.overlap:.1%} of the first 8" in pictures.beside_base(model).says
    assert f"random directions would share {m.base.random_overlap:.1%}" in pictures.beside_base(model).says


weights = st.floats(-4, 4).map(lambda w: round(w, 2))


@settings(max_examples=6)
@given(
    st.integers(0, 10), st.integers(1, 5), st.integers(1, 5), weights, weights,
    st.sampled_from(["q_proj", "k_proj", "up_proj"]),
)  # fmt: skip
@example(0, 1, 5, 0.25, -0.75, "q_proj")
def test_the_sum_of_two_adapters_is_cat_s_and_so_are_its_factors(seed, r1, r2, w1, w2, kind):
    models = adapted(r1, [kind], seed), adapted(r2, [kind], seed + 1)
    path = f"model.layers.0.{'mlp' if kind == 'up_proj' else 'self_attn'}.{kind}"
    pairs = [active(model)[path] for model in models]
    updates = [(w, Factors(p.B.data, p.A.data, p.scale)) for w, p in zip((w1, w2), pairs, strict=True)]
    picture = pictures.adding(*models, kind, (w1, w2))
    assert not list(faults(picture))
    one, B1, A1, two, B2, A2, both, *factors = matrices(picture)
    close = {"rtol": 1e-5, "atol": 1e-6}
    made = cat(updates).factors if w1 or w2 else None
    for shown, (w, (B, A, s)) in zip((one, two), updates, strict=True):
        assert np.allclose(shown, w * s * B @ A, **close)
    assert np.allclose(both, made.B @ made.A if made else 0, **close)
    for shown, M in zip((B1, A1, B2, A2), (M for p in pairs for M in (p.B.data, p.A.data)), strict=True):
        assert np.allclose(shown, M, rtol=1e-6)
    assert all((a == b).all() for a, b in zip(factors, (B1, A1, B2, A2), strict=True))
    ranks = [t for t in said(picture) if t.startswith("rank ")]
    assert ranks == [f"rank {r1}", f"rank {r2}", f"rank {r1} + {r2}"]
    assert f"at most {r1 + r2}" in picture.says
    ranges = {ax.get_images()[0].get_clim() for ax in picture.figure.axes[1::3][:3]}
    assert len(ranges) == 1


def test_the_factors_of_a_sum_lie_beside_it_in_one_order():
    """Side by side, and one above the other, with the edges of their adapters."""
    first, second = (ax.get_position() for ax in pictures.adding(ADAPTER, OTHER).figure.axes[-4::2])
    assert (first.y0, first.y1) == pytest.approx((second.y0, second.y1))
    assert first.x1 < second.x0
    first, second = (ax.get_position() for ax in pictures.adding(ADAPTER, OTHER).figure.axes[-3::2])
    assert (first.x0, first.x1) == pytest.approx((second.x0, second.x1))
    assert first.y0 > second.y1
    edges = [to_rgb(p.get_edgecolor()) for _, p in shapes(pictures.adding(ADAPTER, OTHER))]
    assert edges == [to_rgb(batch.ADAPTERS[k].edge) for k in (0, 0, 1, 1, 0, 0, 1, 1)]


# ---- models of images


@settings(max_examples=6)
@given(st.integers(1, 4), st.sampled_from([16, 48, 64]), st.integers(1, 3))
def test_models_of_images_have_the_numbers_that_inject_trains(r, width, blocks):
    config = ml.Config(hidden_size=width, intermediate_size=2 * width, num_hidden_layers=blocks)
    picture = pictures.beyond_language(config, r)
    assert not list(faults(picture))
    shown = said(picture)
    few, more = r * 2 * width, r * 3 * width
    places = [f"+ {few:,}"] * 4 + [f"+ {more:,}"] * 3
    ends = [f"+ {r * (width + 4):,}"] * 3  # two patch embeddings, and the output
    assert sorted(t for t in shown if t.startswith("+ ")) == sorted([*2 * places, *ends, f"+ {3 * more:,}"])
    assert f"10 × {width}" in shown  # the classifier, in full
    trained = blocks * (4 * few + 3 * more) + r * (width + 4)
    images = (vit(config, np.random.default_rng(0)), trained + 10 * width)
    draws = (denoiser(config, 9, np.random.default_rng(0)), trained + r * (width + 4) + 3 * more)
    for model, numbers in (images, draws):
        assert any(f"r = {r}: {numbers:,} of {parameters(model):,} numbers" in t for t in shown)
    assert shown.count(f"one of {blocks} blocks") == 2


def test_a_model_and_its_saved_adapter_give_one_picture(tmp_path):
    ml.save_adapter(MODEL, tmp_path / "a", base="tiny")
    opened = ml.open_adapter(tmp_path / "a")
    for draw in (pictures.factors, pictures.rank_one):
        a, b = (draw(source, "layers.1.mlp.up_proj") for source in (MODEL, opened))
        assert a.says == b.says
        for one, two in zip(matrices(a), matrices(b), strict=True):
            assert np.allclose(one, two, rtol=1e-6, atol=1e-7)


def test_an_adapter_that_does_nothing_can_be_drawn():
    rng = np.random.default_rng(0)
    model = ml.llama(ml.Config(**SIZES), rng)
    ml.inject(model, ml.LoraConfig(r=2), rng=rng)
    assert "first 0.0%" in pictures.rank_one(model, first=1).says
    assert not matrices(pictures.factors(model))[0].any()


def test_matrices_stand_where_their_product_is_formed():
    """B is beside ΔW, row by row; A above it, column by column."""
    change, B, A = (ax.get_position() for ax in pictures.factors(ADAPTER).figure.axes[1:])
    assert (B.y0, B.y1) == pytest.approx((change.y0, change.y1))
    assert (A.x0, A.x1) == pytest.approx((change.x0, change.x1))
    assert B.x1 < change.x0
    assert A.y0 > change.y1


def test_parts_share_the_range_of_their_sum_and_factors_have_their_own():
    def ranges(picture):
        return [ax.get_images()[0].get_clim() for ax in picture.figure.axes[1:]]

    for picture, of in ((pictures.factors(ADAPTER), None), (pictures.rank_one(ADAPTER), 0)):
        every = matrices(picture)
        most = [np.abs(M if of is None else every[of]).max() for M in every]
        assert np.allclose(ranges(picture), [(-m, m) for m in most])


@pytest.mark.parametrize(
    ("draw", "error", "words"),
    [
        (lambda: pictures.flow(4, 6, 5), ConfigError, r"r is 5 for shape \(4, 6\); expected at most 4"),
        (lambda: pictures.product(0, 6, 1), ConfigError, "O is 0; expected an int, at least 1"),
        (lambda: pictures.merging(4, 6, 2.0), ConfigError, "r is 2.0"),
        (lambda: pictures.rounding(1.0, 0.0), ConfigError, "change is 0.0 for weight 1.0; expected a sum"),
        (lambda: pictures.rounding(1.0, -1.0), ConfigError, "neither W nor 0"),
        (lambda: pictures.rounding(1.0, 1e-20), ConfigError, "neither W nor 0"),
        (lambda: pictures.rounding(np.nan, 1.0), ConfigError, "weight is nan"),
        (lambda: pictures.rounding(1.0, 1e31), ConfigError, "change is 1e.31"),
        (lambda: pictures.rounding(bits=3), ConfigError, "bits is 3; expected an int, at least 4"),
        (lambda: pictures.rounding(bits=53), ConfigError, "bits is 53; expected at most 24"),
        (lambda: pictures.block("llama-3-8b", 8, "q_prj"), MismatchError, "nearest: 'q_proj'"),
        (lambda: pictures.block("llama-3-8c"), ConfigError, "nearest: 'llama-3-8b'"),
        (lambda: pictures.block("gpt-3"), MismatchError, "gpt-3 has only q_proj.*; expected a Llama"),
        (
            lambda: pictures.four_bits("roberta-base", 8, "q_proj"),
            MismatchError,
            "roberta-base are not known",
        ),
        (lambda: pictures.many_adapters("roberta-base"), MismatchError, "roberta-base are not known"),
        (lambda: pictures.overlays(MODEL, names=["one"]), ConfigError, "names has 1; expected 2 or 3"),
        (lambda: pictures.overlays(MODEL, 99), ConfigError, "r is 99 for"),
        (lambda: pictures.many_adapters(number=0), ConfigError, "number is 0"),
        (
            lambda: pictures.factors(ml.llama(ml.Config(**SIZES), np.random.default_rng(0))),
            StateError,
            "no adapter",
        ),
        (lambda: pictures.factors(MODEL, "q_prj"), MismatchError, "nearest: 'q_proj'"),
        (lambda: pictures.rank_one(ADAPTER, "v_proj"), MismatchError, "matches no module"),
        (lambda: pictures.rank_one(ADAPTER, first=7), ConfigError, "first is 7; expected at most 6"),
        (lambda: pictures.rank_one(ADAPTER, first=0), ConfigError, "first is 0"),
        (lambda: pictures.ranks(4, 6, (1, 5)), ConfigError, r"r is 5 for shape \(4, 6\); expected at most 4"),
        (lambda: pictures.beside_base(MODEL, "q_prj"), MismatchError, "nearest: 'q_proj'"),
        (lambda: pictures.beside_base(ADAPTER), StateError, "no adapter"),
        (lambda: pictures.adding(ADAPTER, MODEL), MismatchError, r"\(96, 96\) and .*; expected the same"),
        (lambda: pictures.adding(ADAPTER, OTHER, "v_proj"), MismatchError, "matches no module"),
        (lambda: pictures.adding(ADAPTER, OTHER, None, (1,)), InputError, "expected two numbers"),
        (lambda: pictures.adding(ADAPTER, OTHER, weights=(1, math.nan)), InputError, "expected two numbers"),
        (lambda: pictures.beyond_language(SHAPE, 5), ConfigError, "r"),
    ],
)
def test_what_cannot_be_drawn_is_an_error_that_names_it(draw, error, words):
    with pytest.raises(error, match=words):
        draw()


def test_an_adapter_without_two_factors_is_refused(tmp_path):
    rng = np.random.default_rng(0)
    model = ml.llama(ml.Config(**SIZES), rng)
    ml.inject(model, ml.LoraConfig(r=2, dora=True), rng=rng)
    with pytest.raises(UnsupportedError, match="no product of two factors"):
        pictures.factors(model)
    folder = ROOT / "tests/fixtures/adapters/tied--saved-embedding"
    assert ml.open_adapter(folder).pairs
    empty = ml.llama(ml.Config(**SIZES), rng)
    ml.inject(empty, ml.LoraConfig(r=2, targets="q_proj"), rng=rng)
    ml.save_adapter(empty, tmp_path / "a", base="tiny")
    opened = ml.open_adapter(tmp_path / "a")
    object.__setattr__(opened, "pairs", {})
    with pytest.raises(MismatchError, match="has no factors A and B"):
        pictures.factors(opened)


def test_every_picture_is_in_the_api():
    defined = {
        name
        for module in (maps, blocks, memory, batch, sheets, trained, images)
        for name, f in vars(module).items()
        if getattr(f, "__module__", "") == module.__name__
        and f.__annotations__.get("return") is ml.plots.Picture
    }
    assert defined == {*pictures.__all__}
    assert ml.pictures is pictures
    assert all(getattr(pictures, name).__doc__ for name in defined)


# ---- the committed files


@pytest.fixture(scope="module")
def committed():
    import pictures as program  # docs/pictures.py

    return program, program.drawn()


PAGES = {
    "README.md": ["lora"], "docs/merging.md": ["merging"], "docs/four_bits.md": ["four_bits"],
    "docs/serving.md": ["many_adapters"], "docs/low_rank.md": ["factors", "rank_one"],
    "docs/what_to_adapt.md": ["block"], "docs/adding_adapters.md": ["adding"],
    "docs/beyond_language.md": ["beyond_language"],
}  # fmt: skip


def test_the_files_are_what_the_program_draws(committed):
    """If not: python docs/pictures.py. Another matplotlib may place words otherwise: they are compared."""
    program, drawn = committed
    files = {file.name for file in program.FOLDER.iterdir() if file.is_file()}
    assert files == {f"{name}.{kind}" for name in drawn for kind in ("png", "svg")} | {"MANIFEST.json"}
    made = json.loads(program.MANIFEST.read_text())
    same = made["matplotlib"] == ml.plots.made_with()["matplotlib"]
    assert made["says"] == {name: picture.says for name, picture in drawn.items()}
    for name, picture in drawn.items():
        for kind in ("png", "svg") if same else ():
            stored = (program.FOLDER / f"{name}.{kind}").read_bytes() == picture.encoded(kind)
            assert stored, f"{name}.{kind}"  # no comparison of bytes, which takes pytest minutes to explain
        svg = ET.parse(io.BytesIO((program.FOLDER / f"{name}.svg").read_bytes()))
        texts = {node.text for node in svg.iter() if node.tag.endswith("}text")}
        assert texts == set(said(picture)), name


def test_pages_show_pictures_near_their_head_with_their_sentences(committed):
    program, drawn = committed
    says = {name: picture.says for name, picture in drawn.items()}
    shown = {}
    for page in program.pages():
        text = page.read_text(encoding="utf-8")
        assert program.filled(text, says) == text, f"{page.name}: python docs/pictures.py"
        if found := [match[2] for match in program.SHOWN.finditer(text)]:
            shown[page.relative_to(ROOT).as_posix()] = found
            assert text[: program.SHOWN.search(text).start()].count("\n## ") == 0
    assert shown == PAGES
