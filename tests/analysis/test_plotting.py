"""A figure shows its rows, names axes and units and is reproducible; the page is self-contained."""

import math
import re
from dataclasses import replace
from html import unescape
from html.parser import HTMLParser

import numpy as np
import pytest

from minilora.analysis import figures, plotting, report
from minilora.analysis.measures import BesideBase, BesideOther, Module, Ranks
from minilora.analysis.names import place
from minilora.errors import InputError
from minilora.experiments import merge_equivalence, rank_figures, rank_report, rank_sweep
from minilora.experiments.rank_reading import answer
from minilora.experiments.rank_report import pictures, report_page, table
from minilora.experiments.rank_sweep import Run, with_gaps
from minilora.spectra import effective_rank, noise_spectrum
from minilora.table import Table

SHAPES = {
    "model.layers.0.self_attn.q_proj": (12, 8),
    "model.layers.1.self_attn.q_proj": (12, 8),
    "model.layers.0.mlp.up_proj": (20, 8),
}
TABLE = {"model.embed_tokens": (24, 8)}
# Of three seeds the mean is neither the first nor the middle one, and no two layers or kinds are alike.
APART = (-0.01, -0.02, 0.03)  # from the mean loss
GAINS = (2.0, 2.5, 4.5)  # of the spectra; their mean is 3
UNEVEN = {"layers.0.self_attn.q_proj": 0.7, "layers.1.self_attn.q_proj": 1.3, "layers.0.mlp.up_proj": 2.0}
VERSIONS = {"minilora": "0", "python": "3", "numpy": "2", "blas": "b", "machine": "m"}


def make_rows(targets=("folio",), ranks=(1, 2, 4), seeds=3, gap=1.0):
    """Rows as a sweep makes them, from a formula: mean test loss 2 - gap (1 - 1/(r + 1)) at rank r."""
    rows = []
    for target in targets:
        known = target.startswith("permuted")
        shapes = TABLE if known else SHAPES

        def row(kind, method, rank=0, seed=0, lr=0.0, more=(), target=target, **values):
            config = Run(kind, target, method, rank, ("q_proj",), seed=seed, lr=lr, steps=40, batch=8)
            found = {"id": config.id, "config": rank_sweep.asdict(config), "source": f"text of {target} <&>"}
            found |= {"status": "done", "versions": VERSIONS, "valid": 1.5} | values
            rows.append(found | dict(more))

        def spectra(r, seed, shapes=shapes, full=False):
            gains = {path: GAINS[seed] * UNEVEN.get(path.removeprefix("model."), 1.0) for path in shapes}
            return {
                path: [float(f"{gains[path] * 0.7**i:.6g}") for i in range(min(m, n) if full else r)]
                for path, (m, n) in shapes.items()
            }

        def trained(loss, r, seed, full=False, shapes=shapes, spectra=spectra):
            curve = [[step, 2.0 - (2.0 - loss - 2 * APART[seed]) * step / 40] for step in range(0, 41, 4)]
            return {
                "test": loss + APART[seed], "parameters": 5000 if full else 100 * r, "curve": curve,
                "spectra": spectra(r, seed, full=full), "shapes": {k: list(v) for k, v in shapes.items()},
            }  # fmt: skip

        truth = {"model.embed_tokens": [3.0, 2.0, *[0.0] * 6]}
        more = {"floor": 1.1, "spectra": truth} if known else {}
        row("base", "none", test=2.0, parameters=0, base_digest="d", **more)
        for r in ranks if known else ():
            row("oracle", "none", r, test=1.1 + 0.5 * max(0, 2 - r), parameters=0)
        row("search", "full", seed=1000, lr=1e-3, parameters=5000)
        for seed in range(seeds):
            row("final", "full", seed=seed, lr=1e-3, **trained(2 - gap, 0, seed, full=True))
        for r in ranks:
            for seed in range(seeds):
                row("final", "lora", r, seed, 0.01, **trained(2 - gap * (1 - 1 / (r + 1)), r, seed))
    return with_gaps(rows)


def gone(rows, **config):
    """The rows in which those of a config have diverged."""

    def turn(row):
        if all(row["config"][k] == v for k, v in config.items()):
            return {k: row[k] for k in ("id", "config", "source", "versions")} | {
                "status": "diverged", "error": "step 3: the loss is nan"
            }  # fmt: skip
        return row

    return with_gaps([turn(row) for row in rows])


ROWS = make_rows(("folio", "permuted:2"))
DRAW = {
    "loss_against_rank": lambda rows: rank_figures.loss_against_rank(rows, "folio"),
    "gap_against_parameters": rank_figures.gap_against_parameters,
    "spectra": lambda rows: rank_figures.spectra(rows, "folio"),
    "energy": lambda rows: rank_figures.energy_and_effective_rank(rows, "folio"),
    "known_rank": lambda rows: rank_figures.known_rank(rows, "permuted:2"),
    "curves": lambda rows: rank_figures.learning_curves(rows, "folio"),
    "merge": lambda rows: rank_figures.merge_equivalence(MERGED),
}
MERGED = [
    {"dtype": d, "inputs": n, "rank": 8, "draws": 5, "difference": e * n, "bound": 9 * e * n**2, "ratio": x}
    for d, e, ratios in (("float32", 1e-7, (0.02, 0.08, 0.05)), ("float64", 1e-16, (0.03, 0.1, 0.01)))
    for n, x in zip((16, 32, 64), ratios, strict=True)
]


def line(ax, label):
    """(x, y) of the line with this label."""
    (found,) = [drawn for drawn in ax.get_lines() if drawn.get_label().startswith(label)]
    return np.array(found.get_xdata(), float), np.array(found.get_ydata(), float)


def texts(ax):
    legend = ax.get_legend()
    return [t.get_text() for t in (*ax.texts, *(legend.get_texts() if legend else ()))]


# ---- every figure


@pytest.mark.parametrize("name", DRAW)
def test_the_same_rows_give_the_same_bytes(name):
    pictures = [DRAW[name](ROWS) for _ in range(2)]
    for kind, start in (("png", b"\x89PNG"), ("svg", b"<?xml")):
        one, two = (picture.encoded(kind) for picture in pictures)
        assert one == two
        assert one.startswith(start)
        assert b"Date" not in one
        assert b"dc:date" not in one


@pytest.mark.parametrize("name", DRAW)
def test_every_axis_is_named_and_every_loss_has_a_unit(name):
    for ax in DRAW[name](ROWS).figure.axes:
        if not ax.axison:
            continue
        assert ax.get_xlabel()
        first_of_line = ax.get_subplotspec().colspan.start == 0 or name not in ("spectra",)
        assert ax.get_ylabel() or not first_of_line
        if "loss" in ax.get_ylabel():
            assert ax.get_ylabel().endswith("(nats per character)")
        if "energy" in ax.get_ylabel() or "gap" in ax.get_ylabel():
            assert ax.get_ylabel().endswith("(%)")


@pytest.mark.parametrize("name", DRAW)
def test_curves_differ_in_more_than_colour(name):
    for ax in DRAW[name](ROWS).figure.axes:
        looks = [
            (drawn.get_marker(), drawn.get_linestyle(), drawn.get_linewidth())
            for drawn in ax.get_lines()
            if not drawn.get_label().startswith("_") and not re.fullmatch(r"r = \d+", drawn.get_label())
        ]
        assert len(set(looks)) == len(looks)
        named = [t.get_text() for t in ax.get_legend().get_texts()] if ax.get_legend() else []
        assert len(set(named)) == len(named)


@pytest.mark.parametrize("name", DRAW)
def test_every_figure_has_a_describing_sentence(name):
    says = DRAW[name](ROWS).says
    assert says.endswith(".")
    assert re.search(r"\d", says)
    assert not re.search(r"nan|inf\b|None", says)


def test_a_figure_in_a_notebook_has_its_sentence_as_alt_text():
    picture = plotting.Picture(rank_figures.loss_against_rank(ROWS, "folio").figure, 'a "quoted" <sentence>')
    found = picture._repr_html_()
    assert 'alt="a &quot;quoted&quot; &lt;sentence&gt;"' in found
    assert "<sentence>" not in found


def test_saving_writes_png_and_svg(tmp_path):
    picture = rank_figures.learning_curves(ROWS, "folio")
    picture.save(tmp_path, "a")
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {
        f"a.{kind}": picture.encoded(kind) for kind in ("png", "svg")
    }


def test_drawing_leaves_rcparams_unchanged():
    import matplotlib

    before = dict(matplotlib.rcParams)
    DRAW["spectra"](ROWS).encoded("svg")
    assert dict(matplotlib.rcParams) == before


# ---- what the figures show


def test_the_loss_figure_shows_means_ranges_and_both_references():
    picture = rank_figures.loss_against_rank(ROWS, "folio")
    (ax,) = picture.figure.axes
    ranks, y = line(ax, "LoRA on q_proj, up_proj\n(mean and range of 3 seeds)")
    means = [2 - (1 - 1 / (r + 1)) for r in (1, 2, 4)]
    assert list(ranks) == [1, 2, 4]
    # three numbers near 2: a few roundings
    assert np.abs(y - means).max() <= 8 * 2.0**-53 * 2
    (band,) = [c for c in ax.collections if len(c.get_paths()[0].vertices) > 6]
    heights = band.get_paths()[0].vertices
    at_two = heights[np.isclose(heights[:, 0], 2), 1]
    assert np.isclose(at_two.min(), means[1] - 0.02)
    assert np.isclose(at_two.max(), means[1] + 0.03)
    levels = sorted(float(x.get_ydata()[0]) for x in ax.get_lines() if x.get_label().startswith("_"))
    assert np.allclose(levels, [1.0, 2.0])
    assert {"frozen base", "full fine-tuning (all weights)"} <= set(texts(ax))
    for number in ("2.000", "1.500 at rank 1", "1.333 at rank 2", "1.200 at rank 4", "1.000 for full"):
        assert number in picture.says


def test_the_gap_figure_shows_every_target():
    picture = rank_figures.gap_against_parameters(ROWS)
    (ax,) = picture.figure.axes
    for name in ("First Folio", "letter permutation, 2 swaps"):
        x, y = line(ax, name)
        assert list(x) == [100, 200, 400]
        assert np.allclose(y, [50, 200 / 3, 80])
        assert f"{name}: 50% at 100 parameters, 80% at 400" in picture.says


@pytest.mark.parametrize("count", [1, 4, 5, 7])
def test_the_gap_figure_omits_no_target(count):
    names = tuple(f"t{i}" for i in range(count))
    (ax,) = rank_figures.gap_against_parameters(make_rows(names, ranks=(1, 2), seeds=1)).figure.axes
    assert set(names) <= {text.partition("\n")[0] for text in texts(ax)}


def test_spectra_are_means_over_layers_and_seeds_with_full_and_noise():
    picture = rank_figures.spectra(ROWS, "folio")
    panels = {ax.get_title(): ax for ax in picture.figure.axes if ax.axison}
    assert list(panels) == ["q_proj", "up_proj"]
    for (kind, ax), gain in zip(panels.items(), (3.0, 6.0), strict=True):
        assert ax.get_title() == kind
        for r in (1, 2, 4):
            x, y = line(ax, f"r = {r}")
            assert list(x) == list(range(1, r + 1))
            assert np.allclose(y, [gain * 0.7**i for i in range(r)], rtol=1e-5)  # rows have six digits
        full, noise = line(ax, "full")[1], line(ax, "noise")[1]
        assert len(full) == len(noise) == 8
        # the mean of eight spectra of norm one is a little shorter than one
        assert 0.99 <= np.linalg.norm(noise) / np.linalg.norm(full) <= 1
    tall, square = (line(panels[k], "noise")[1] for k in ("up_proj", "q_proj"))
    assert tall[-1] / tall[0] > square[-1] / square[0]  # noise is flatter, the taller the matrix


def test_energy_rises_to_100_percent_and_the_effective_rank_is_below_r():
    picture = rank_figures.energy_and_effective_rank(ROWS, "folio")
    left, right = picture.figure.axes
    for label in ("full", "r = 1", "r = 2", "r = 4"):
        _, y = line(left, label)
        assert np.isclose(y[-1], 100)
        assert (np.diff(y) > 0).all()
    ranks, y = line(right, "LoRA")
    assert (y <= ranks * (1 + 1e-12)).all()
    _, noise = line(right, "noise")
    assert (noise <= ranks * (1 + 1e-12)).all()
    assert math.isclose(y[0], 1, rel_tol=1e-12)
    assert f"{y[2]:.1f} at r = 4 (noise {noise[2]:.1f})" in picture.says


def test_the_known_rank_is_marked_and_losses_are_relative_to_the_floor():
    picture = rank_figures.known_rank(ROWS, "permuted:2")
    left, right = picture.figure.axes
    assert np.allclose(line(left, "LoRA")[1], [1.5 - 1.1, 4 / 3 - 1.1, 1.2 - 1.1])
    assert np.allclose(line(left, "true ΔE, cut to rank r")[1], [0.5, 0, 0])
    assert "2 swaps" in texts(left)
    assert np.allclose(line(right, "true ΔE")[1], [3, 2])
    assert np.allclose(line(right, "LoRA, r = 4")[1], [3 * 0.7**i for i in range(4)], rtol=1e-5)
    assert "0.400 at rank 1" in picture.says


def test_curves_are_means_of_the_validation_losses():
    picture = rank_figures.learning_curves(ROWS, "folio")
    (ax,) = picture.figure.axes
    x, y = line(ax, "full")
    assert list(x) == list(range(0, 41, 4))
    assert np.allclose(y, 2 - np.arange(0, 41, 4) / 40)
    for r in (1, 2, 4):
        x, y = line(ax, f"r = {r}")
        assert list(x) == list(range(0, 41, 4))
        assert np.allclose(y, [2 - (1 - 1 / (r + 1)) * step / 40 for step in x])
    assert "2.000 at the start, 1.000 after 40 steps" in picture.says
    assert "20.0% of the whole fall" in picture.says


def test_the_merge_figure_has_both_types_below_their_bounds():
    (ax,) = rank_figures.merge_equivalence(MERGED).figure.axes
    for dtype in ("float32", "float64"):
        x, y = line(ax, f"observed, {dtype}")
        assert list(x) == [16, 32, 64]
        assert list(y) == [row["difference"] for row in MERGED if row["dtype"] == dtype]
        assert (y <= line(ax, f"bound, {dtype}")[1]).all()
    assert "0.100 of the derived bound" in rank_figures.merge_equivalence(MERGED).says
    real = merge_equivalence.run(draws=1)
    assert rank_figures.merge_equivalence(real).encoded("svg")


@pytest.mark.parametrize("name", DRAW)
def test_tick_labels_are_at_their_values(name):
    count = 0
    for ax in DRAW[name](ROWS).figure.axes:
        for axis in (ax.xaxis, ax.yaxis):
            shown = [t.get_text() for t in axis.get_ticklabels()]
            for at, text in zip(axis.get_ticklocs(), shown, strict=True):
                if re.fullmatch(r"[0-9.]+", text):
                    assert math.isclose(float(text), at)  # matplotlib's own ticks carry some roundings
                    count += 1
    assert count


def named(ax):
    """Text -> (x, y) of the point of the data that it names."""
    return {note.get_text(): note.xy for note in ax.texts}


def test_labels_are_beside_what_they_name():
    (ax,) = rank_figures.loss_against_rank(ROWS, "folio").figure.axes
    heights = {text: y for text, (_, y) in named(ax).items()}
    assert heights == {"frozen base": 2.0, "full fine-tuning (all weights)": pytest.approx(1.0)}
    (ax,) = rank_figures.gap_against_parameters(make_rows()).figure.axes
    assert [list(x) for x in line(ax, "full fine-tuning")] == [[5000], [100]]
    left, right = rank_figures.known_rank(ROWS, "permuted:2").figure.axes
    for side, at in ((left, 2), (right, 2.5)):
        assert [x.get_xdata()[0] for x in side.get_lines() if x.get_linestyle() == ":"] == [at]
    _, right = rank_figures.energy_and_effective_rank(ROWS, "folio").figure.axes
    whole = np.array([0.7**i for i in range(8)]) / sum(0.7**i for i in range(8))
    rank = math.exp(-(whole * np.log(whole)).sum())
    assert np.allclose(line(right, "full fine-tuning")[1], rank, rtol=1e-5)


# ---- an adapter under the microscope


def looked(name, norm, S, other=None, base=None, shape=(12, 20)):
    """A module as `inspect` would describe it, but that every number is another one."""
    found = re.match(r"model\.layers\.(\d+)\.", name)
    mine, noise = Ranks(len(S) * 0.6, 1.5, 1, 2), Ranks(len(S) * 0.8, 1.9, 2, 3)
    beside = BesideBase(base, 2.0, 3.0, 0.4, 0.1, 1, (0.9,), 0.5) if base else None
    if other:
        phi = tuple(other / (i + 1) for i in range(len(S)))
        chance = tuple((i + 1) / shape[1] for i in range(len(S)))
        halves = (tuple(x / 2 for x in values) for values in (phi, chance))
        other = BesideOther(0.3, phi, next(halves), chance, next(halves), norm + other)
    return Module(name, *place(name), int(found[1]) if found else None, shape, len(S), 1.0, 1.0,
                  norm, tuple(S), mine, noise, beside, other or None)  # fmt: skip


def some_modules(**how):
    """Layers 0, 2 and 10, of which the last has no k_proj; kinds that a Llama has and has not; and a head."""
    found = [looked("lm_head", 9.0, [3.0, 1.0, 0.5], **how)]
    for layer in (0, 2, 10):
        for i, kind in enumerate(("up_proj", "k_proj", "q_proj", "adapter_in")):
            if (layer, kind) != (10, "k_proj"):
                S = [(layer + 1) * 0.5**j for j in range(4 if kind != "q_proj" else 2)]
                found.append(looked(f"model.layers.{layer}.x.{kind}", 10 * layer + i + 1.0, S, **how))
    return found


GRID = [[3, 23, 103], [2, 22, math.nan], [1, 21, 101], [4, 24, 104]]  # q, k, up, adapter_in; layers 0, 2, 10
VIEWS = {
    "heat_map": lambda: figures.heat_map(some_modules()),
    "heat_map beside a base": lambda: figures.heat_map(some_modules(base=0.25)),
    "adapter_spectra": lambda: figures.adapter_spectra(some_modules()),
    "dense_spectra": lambda: figures.dense_spectra(some_modules(), ("q_proj", "up_proj")),
    "subspaces": lambda: figures.subspaces(some_modules(other=0.9)),
    "difference": lambda: figures.difference(some_modules(other=0.9)),
    "curves": lambda: figures.curves(LINES, "block size", "error", "3 lines.", "log"),
    "matrices": lambda: figures.matrices(MATRICES, "2 matrices."),
}
LINES = {"one": ([2, 8, 4], [3.0, 1.0, 2.0]), "two": ([2, 16], [0.5, 0.25]), "three": ([4], [7.0])}
MATRICES = {"small": [[1, -0.25, 0], [0.5, math.nan, -4]], "large": np.arange(99).reshape(9, 11) / 50}


@pytest.mark.parametrize("name", VIEWS)
def test_the_same_modules_give_the_same_bytes(name):
    import matplotlib

    before = dict(matplotlib.rcParams)
    one, two = (VIEWS[name]().encoded("svg") for _ in range(2))
    assert one == two
    assert one.startswith(b"<?xml")
    assert b"dc:date" not in one
    assert dict(matplotlib.rcParams) == before


@pytest.mark.parametrize("name", VIEWS)
def test_every_view_has_named_axes_and_a_sentence(name):
    picture = VIEWS[name]()
    shown = [ax for ax in picture.figure.axes if ax.axison]
    assert all(ax.get_ylabel() or ax.get_yticklabels()[0].get_text() or ax.get_title() for ax in shown)
    assert any(ax.get_xlabel() for ax in shown)
    assert picture.says.endswith(".")
    assert re.search(r"\d", picture.says)
    assert not re.search(r"nan|inf\b|None", picture.says)


def test_the_heat_map_has_every_module_in_its_cell():
    picture = figures.heat_map(some_modules())
    top, bottom, bar, _ = picture.figure.axes
    for ax in (top, bottom):
        assert [t.get_text() for t in ax.get_yticklabels()] == ["q_proj", "k_proj", "up_proj", "adapter_in"]
        assert [t.get_text() for t in ax.get_xticklabels()] == ["0", "2", "10"]
    shares, norms = (ax.get_images()[0] for ax in (top, bottom))
    found = np.ma.filled(norms.get_array().astype(float), np.nan)
    assert np.array_equal(found, GRID, equal_nan=True)
    found = np.ma.filled(shares.get_array().astype(float), np.nan)
    assert np.array_equal(np.isnan(found), np.isnan(GRID))
    assert np.allclose(found[~np.isnan(GRID)], 75)
    assert shares.get_clim() == (0, 100)
    assert norms.get_clim() == (0, 104)
    assert bar.get_ylabel() == "effective rank\n(% of noise's)"
    assert "mean effective rank in % of noise's: q_proj 75, k_proj 75" in picture.says
    assert "mean |ΔW|: q_proj 43, k_proj 12, up_proj 41, adapter_in 44" in picture.says


def test_the_heat_map_shows_relative_changes_if_all_are_known():
    modules = some_modules(base=0.25)
    image = figures.heat_map(modules).figure.axes[1].get_images()[0].get_array()
    assert set(np.ma.compressed(image).tolist()) == {0.25}
    assert "mean |ΔW| / |W|: q_proj 0.25" in figures.heat_map(modules).says
    mixed = [looked("lm_head", 9.0, [1.0]), *modules[1:]]
    assert "|ΔW| / |W|" not in figures.heat_map(mixed).says


def test_the_heat_map_has_few_ticks_for_many_layers_and_one_for_none():
    many = figures.heat_map([looked(f"model.layers.{i}.q_proj", 1.0 + i, [1.0]) for i in range(80)])
    bottom = many.figure.axes[1]
    assert list(bottom.get_xticks()) == list(range(0, 80, 5))
    assert [t.get_text() for t in bottom.get_xticklabels()] == [str(i) for i in range(0, 80, 5)]
    assert bottom.get_images()[0].get_array().shape == (1, 80)
    none = figures.heat_map([looked("lm_head", 2.0, [1.0]), looked("embed_tokens", 3.0, [1.0])])
    assert none.figure.axes[1].get_images()[0].get_array().tolist() == [[3.0], [2.0]]


def test_adapter_spectra_are_normalised_and_shown_with_noise():
    picture = figures.adapter_spectra(some_modules())
    shown = {ax.get_title(): ax for ax in picture.figure.axes if ax.axison}
    assert list(shown) == ["q_proj", "k_proj", "up_proj", "adapter_in", "lm_head"]
    for kind, ax in shown.items():
        *lines, noise = ax.get_lines()
        assert len(lines) == {"k_proj": 2, "lm_head": 1}.get(kind, 3)
        for drawn in lines:
            S = {"lm_head": [3.0, 1.0, 0.5], "q_proj": [1.0, 0.5]}.get(kind, [1.0, 0.5, 0.25, 0.125])
            assert list(drawn.get_xdata()) == list(range(1, len(S) + 1))
            assert np.allclose(drawn.get_ydata(), np.array(S) / S[0])
        assert noise.get_linestyle() == "--"
        y = np.array(noise.get_ydata())
        assert len(y) == len(lines[0].get_ydata())
        assert y[0] == 1
        assert (np.diff(y) < 0).all()
        assert ax.get_yscale() == "log"
    colours = [drawn.get_color() for drawn in shown["q_proj"].get_lines()[:-1]]
    assert len(set(colours)) == 3
    assert "q_proj 1.2, k_proj 2.4, up_proj 2.4, adapter_in 2.4, lm_head 1.8" in picture.says


def test_dense_spectra_stand_beside_a_gaussian_matrix_of_their_norm():
    """Not beside a product of two factors, whose spectrum falls faster."""
    rng, shape = np.random.default_rng(5), (40, 60)
    S = [np.linalg.svd(rng.standard_normal(shape), compute_uv=False) for _ in range(6)]
    modules = [looked(f"model.layers.{i}.x.q_proj", 1.0, s.tolist(), shape=shape) for i, s in enumerate(S)]
    picture = figures.dense_spectra([*modules, looked("lm_head", 1.0, [9.0] * 40, shape=shape)], ["q_proj"])
    own, noise = picture.figure.axes[0].get_lines()
    assert [own.get_label(), noise.get_label()] == ["q_proj", "q_proj, noise"]
    assert [own.get_linestyle(), noise.get_linestyle()] == ["-", ":"]
    own, noise = own.get_ydata(), noise.get_ydata()
    assert np.allclose(own, np.mean(S, 0))
    unit = noise_spectrum(shape, np.random.default_rng(0))
    assert np.allclose(noise, np.linalg.norm(own) * unit)
    shares = [f"{(values[:8] ** 2).sum() / (values**2).sum():.0%}" for values in (own, noise)]
    assert f"begins at {own[0]:.2f} (noise {noise[0]:.2f}), its first 8 hold {shares[0]} of" in picture.says
    assert picture.says.endswith(f"(noise {shares[1]}).")
    ranks = 40 * 0.6, effective_rank(noise)
    assert "effective rank: q_proj {:.0f}, noise {:.0f}".format(*ranks) in picture.figure.get_suptitle()


def test_subspace_similarities_are_means_over_layers_with_chance_dotted():
    wide = looked("model.layers.3.x.q_proj", 1.0, [1.0] * 5, other=0.5, shape=(12, 40))
    picture = figures.subspaces(
        [*some_modules(other=0.9), wide, looked("model.layers.4.x.q_proj", 1.0, [1.0])]
    )
    for ax, part in zip(picture.figure.axes, (1, 0.5), strict=True):  # here outputs are half of inputs
        assert ax.get_ylabel() == f"φ(i, i) of {'input' if part == 1 else 'output'} directions"
        x, y = line(ax, "q_proj")
        assert list(x) == [1, 2]  # as many as all of them have
        assert np.allclose(y, np.array([(3 * 0.9 + 0.5) / 4, (3 * 0.45 + 0.25) / 4]) * part)
        dotted = [drawn for drawn in ax.get_lines() if drawn.get_linestyle() == ":"]
        assert len(dotted) == 5
        (chance,) = (drawn.get_ydata() for drawn in dotted if len(drawn.get_ydata()) == 2)
        assert np.allclose(chance, np.array([(3 / 20 + 1 / 40) / 4, (6 / 20 + 2 / 40) / 4]) * part)
        bottom, top = ax.get_ylim()
        assert bottom == 0
        assert 0.9 < top <= 1.02
    (legend,) = picture.figure.legends
    names = [t.get_text() for t in legend.get_texts()]
    assert names == ["lm_head", "up_proj", "k_proj", "q_proj", "adapter_in"]
    assert "q_proj inputs 0.80 to 0.40 (chance 0.088), outputs 0.40 to 0.20 (chance 0.044)" in picture.says


def test_the_difference_of_two_adapters_has_their_cosines_and_norms():
    modules = [m for m in some_modules(other=0.9) if "q_proj" in m.module or "up_proj" in m.module]
    cosines = [0.1, -0.5, 0.9, 0.2, -0.3, 1.0]
    modules = [replace(m, other=replace(m.other, cosine=c, norm=m.norm * (1 + c)))
               for m, c in zip(modules, cosines, strict=True)]  # fmt: skip
    alone = looked("model.layers.7.x.v_proj", 1.0, [1.0])
    picture = figures.difference([*modules, alone])
    wanted = {"q_proj": cosines[1::2], "up_proj": cosines[::2]}
    top, bottom, *_ = picture.figure.axes
    for ax, limit in (
        (top, 1),
        (bottom, max(abs(m.norm * c) for m, c in zip(modules, cosines, strict=True))),
    ):
        assert [t.get_text() for t in ax.get_yticklabels()] == list(wanted)
        assert [t.get_text() for t in ax.get_xticklabels()] == ["0", "2", "10"]
        assert ax.get_images()[0].get_clim() == pytest.approx((-limit, limit))
    assert top.get_images()[0].get_array().tolist() == list(wanted.values())
    norms = np.array([[m.norm for m in modules if m.kind == kind] for kind in wanted])
    found = bottom.get_images()[0].get_array()
    assert np.allclose(found, norms * list(wanted.values()), rtol=1e-12)
    assert f"mean cosine: q_proj {np.mean(wanted['q_proj']):.3g}" in picture.says


def test_of_very_many_kinds_the_first_are_drawn():
    modules = [looked(f"lora_unet_{i:03}", 1.0, [1.0], other=0.5) for i in range(200)]
    picture = figures.heat_map(modules)
    assert picture.figure.axes[0].get_images()[0].get_array().shape == (figures.MOST, 1)
    assert f"{200 - figures.MOST} more kinds are not shown" in picture.says
    assert len([ax for ax in figures.adapter_spectra(modules).figure.axes if ax.axison]) == figures.MOST
    lines = [
        drawn
        for drawn in figures.subspaces(modules).figure.axes[0].get_lines()
        if drawn.get_marker() != "None"
    ]
    assert len({(drawn.get_color(), drawn.get_marker()) for drawn in lines}) == len(lines) == figures.MOST


def test_a_figure_is_rendered_once_per_format():
    picture = figures.subspaces(some_modules(other=0.9))
    calls = []

    class Counting:
        def savefig(self, stream, format, metadata):
            calls.append(format)
            picture.figure.savefig(stream, format=format, metadata=metadata)

    counted = plotting.Picture(Counting(), picture.says)
    first = {kind: counted.encoded(kind) for kind in ("png", "svg")}
    assert {kind: counted.encoded(kind) for kind in ("svg", "png")} == first
    counted._repr_html_()
    assert calls == ["png", "svg"]
    assert first["svg"] == picture.encoded("svg")
    assert "made" not in repr(counted)
    assert plotting.Picture(picture.figure, picture.says) == picture
    assert plotting.Picture(picture.figure, picture.says).made == {}


# ---- rows that are not all there


def drawn(rows):
    """The whole page, with every figure that these rows are enough for."""
    return report_page(rows, pictures(rows))


def test_one_seed_and_one_rank_can_be_drawn():
    rows = make_rows(("folio", "permuted:2"), ranks=(2,), seeds=1)
    assert "(a single seed)" in texts(rank_figures.loss_against_rank(rows, "folio").figure.axes[0])[-1]
    assert "</html>" in drawn(rows)


def test_drawing_without_runs_is_an_input_error():
    for draw in (
        rank_figures.loss_against_rank,
        rank_figures.spectra,
        rank_figures.energy_and_effective_rank,
        rank_figures.known_rank,
    ):
        with pytest.raises(InputError, match="no finished run"):
            draw(ROWS, "kjv")


PARTS = {
    "no full run": {"method": "full"},
    "no LoRA run": {"method": "lora"},
    "one rank": {"rank": 2},
    "one seed": {"seed": 0, "kind": "final"},
    "no final run": {"kind": "final"},
}


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("targets", [
    ("permuted:2",),  # which has every figure
    pytest.param(("folio", "permuted:2"), marks=pytest.mark.slow),
])  # fmt: skip
def test_the_report_is_written_whichever_runs_diverged(part, targets):
    rows = gone(make_rows(targets), **PARTS[part])
    assert "diverged" in table(rows) or part == "one seed"
    assert "</html>" in drawn(rows)


def test_a_sweep_where_full_fine_tuning_is_no_better_is_drawn():
    rows = make_rows(gap=-0.5)
    assert {row["gap_closed"] for row in rows if row["config"]["kind"] == "final"} == {None}
    assert "</html>" in drawn(rows)


def test_a_target_without_a_gap_does_not_hide_the_others():
    rows = [*make_rows(("t1",), gap=-0.5), *make_rows(("t2",))]
    (ax,) = rank_figures.gap_against_parameters(rows).figure.axes
    assert any(text.startswith("t2\n") for text in texts(ax))


# ---- the table and the page


class Page(HTMLParser):
    """What of a page matters here."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.ids, self.used = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.tags.append((tag, given))
        if "id" in given:
            self.ids.append(given["id"])
        for key, value in attrs:
            if key in ("href", "xlink:href", "src") and (value or "").startswith("#"):
                self.used.append(value[1:])
            self.used += re.findall(r"url\(#([^)]+)\)", value or "")

    def all(self, tag):
        return [given for name, given in self.tags if name == tag]


@pytest.fixture(scope="module")
def figures_of_rows():
    return pictures(ROWS)


@pytest.fixture(scope="module")
def html(figures_of_rows):
    return report_page(ROWS, figures_of_rows)


def test_the_page_loads_nothing_and_runs_nothing(html):
    page = Page(html)
    for tag in ("script", "link", "iframe", "object", "embed", "img", "video", "base", "foreignobject"):
        assert not page.all(tag), tag
    for tag, given in page.tags:
        for key, value in given.items():
            assert not key.startswith("on"), (tag, key)
            if key in ("href", "xlink:href", "src", "srcset", "action", "data"):
                assert value.startswith("#") or value.startswith("data:"), (tag, key, value)
            assert "url(http" not in (value or "")
    assert "@import" not in html
    assert not re.search(r"url\(\s*['\"]?(https?:|//)", html)


def test_the_page_is_accessible(html, figures_of_rows):
    page = Page(html)
    (root,) = page.all("html")
    assert root["lang"] == "en"
    assert len(page.all("h1")) == len(page.all("main")) == len(page.all("title")) - len(page.all("svg")) == 1
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1
    assert set(levels[1:]) == {2}
    assert len(page.all("table")) == len(page.all("caption")) == 2
    assert {given["scope"] for given in page.all("th")} == {"col", "row"}
    assert len(page.all("svg")) == len(page.all("figcaption")) == len(figures_of_rows)
    for svg in page.all("svg"):
        assert svg["role"] == "img"
        assert svg["aria-labelledby"] in page.ids


def plain(html):
    """The words of a page."""
    return " ".join(unescape(re.sub(r"<(style|svg)[^>]*>.*?</\1>|<[^>]*>", " ", html, flags=re.S)).split())


def test_the_page_opens_with_the_question_and_the_answer_and_a_list_of_its_parts(html):
    page = Page(html)
    links = [given["href"] for given in page.all("a")]
    skip, *contents = links
    assert skip == contents[0] == "#part-1"
    assert contents == [f"#{given['id']}" for given in page.all("h2")]
    text = plain(html)
    order = (
        "What was asked",
        "First Folio. 4 directions are",
        "letter permutation, 2 swaps. 4 dir",
        "effective rank how many",
        "Text: text of folio",
        "nats the unit",
        "singular values s_1 ≥",
    )
    assert sorted(order, key=text.index) == list(order)
    assert "LoRA closes 50% of the gap to full fine-tuning at r = 1, and at most 80%, at r = 4." in text
    assert (
        "LoRA adapts the embedding only; full fine-tuning trains all 5,000 weights. Both take 40 steps."
        in text
    )


def test_each_term_is_defined_once_before_it_is_used(html):
    text = plain(html)
    for term in (*rank_report.FIRST, *rank_report.TABLED, *rank_report.DRAWN):
        assert text.count(f"{term} {report.TERMS[term]}") == 1
    assert len(re.findall("<dfn>", html)) == len({*re.findall("<dfn>(.*?)</dfn>", html)})


def test_a_page_can_be_read_on_a_phone_and_by_keyboard(html):
    """What is wide scrolls in a box that has a name and that the keyboard reaches; the focus can be seen."""
    page = Page(html)
    boxes = [given for given in page.all("div") if given.get("class") == "wide"]
    assert len(boxes) == len(page.all("table"))
    assert len({box["aria-label"] for box in boxes}) == len(boxes)
    assert all((box["tabindex"], box["role"]) == ("0", "group") for box in boxes)
    assert html.count("<table>") == len(re.findall('<div class="wide"[^>]*><table>', html))
    for rule in (
        ".wide { overflow-x: auto }",
        "svg { max-width: 100%; height: auto }",
        ":focus-visible { outline: 3px",
    ):
        assert rule in html
    assert 'content="width=device-width, initial-scale=1"' in html


def test_the_gap_beyond_100_percent_is_explained_where_it_is(html):
    why = "Where LoRA closes more than 100 % of the gap, its test loss is below full fine-tuning"
    assert why not in html
    rows = make_rows(ranks=(1, 2))
    better = [row | {"test": 0.5} if row["config"]["rank"] == 2 else row for row in rows]
    assert why in report_page(with_gaps(better), {})
    assert "and at most 150%, at r = 2" in report_page(with_gaps(better), {})


def test_of_a_single_seed_no_range_is_told(tmp_path):
    rows = make_rows(seeds=1)
    for text in (drawn(rows), table(rows)):
        assert "1 seed" not in text
        assert "range over seeds" not in plain(text).replace("range over seeds the least", "")
    assert "There is a single seed, so nothing here says" in drawn(rows)
    assert "range over seeds" in table(make_rows(seeds=2))


def test_a_target_without_all_its_runs_has_no_answer():
    page = plain(report_page(gone(make_rows(("folio", "kjv")), target="kjv", method="full"), {}))
    assert "King James Bible. No answer, since not all kinds of its runs are finished." in page
    assert "First Folio. 4 directions are enough" in page


@pytest.mark.parametrize(("losses", "said"), [
    ((1.5, 1.2, 1.19), "2 directions are enough: r = 1 gives 62% of the largest gain, r = 2 gives 99%"),
    ((1.01, 1.0, 1.0), "1 direction is enough: r = 1 gives 99% of the largest gain"),
    ((1.2, 1.17, 1.15), "no rank stands out: r = 1 gives 94%, r = 2 gives 98%, "
     "r = 4 gives 100% of the largest gain"),
    ((2.0, 2.5, 2.1), "LoRA gains nothing over the frozen base at any rank"),
])  # fmt: skip
def test_the_answer_is_the_first_rank_that_gives_all_but_two_percent(losses, said):
    loss = dict(zip((1, 2, 4), losses, strict=True))
    rows = [row | {"test": loss.get(row["config"]["rank"], row.get("test"))} for row in make_rows()]
    assert answer(rows, "folio") == said
    assert said in rank_figures.loss_against_rank(rows, "folio").figure.get_suptitle()


@pytest.mark.parametrize(("seeds", "said"), [(1, "a single seed"), (3, "mean and range of 3 seeds")])
def test_a_figure_says_what_lora_adapts_and_over_how_many_seeds(seeds, said):
    rows = make_rows(("permuted:2",), seeds=seeds)
    (ax,) = rank_figures.loss_against_rank(rows, "permuted:2").figure.axes
    assert f"LoRA on the embedding only\n({said})" in texts(ax)


def test_ids_are_unique_and_every_reference_resolves(html):
    page = Page(html)
    assert len(set(page.ids)) == len(page.ids)
    assert set(page.used) <= set(page.ids)


def test_the_page_states_source_versions_and_losses(html):
    assert "text of folio &lt;&amp;&gt;" in html
    assert "<&>" not in html
    for name, value in VERSIONS.items():
        assert f"{name}: {value}" in html
    for cell in ("LoRA r = 4", "full fine-tuning", "frozen base", "1.3333", "1.3133 to 1.3633", "67%"):
        assert cell in html
        assert cell in table(ROWS)
    assert "nats per character" in html


NAMES = {
    "the end of another": ("lio", "my_lio"),
    "the end of a figure's name": ("parameters", "folio"),
    "the same stem": ("one/text.txt", "two/text.txt"),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", NAMES)
def test_targets_with_similar_names_get_separate_figures(case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in NAMES[case]:
        if "/" in name:
            (tmp_path / name).parent.mkdir()
            (tmp_path / name).write_text("")
    rows = make_rows(NAMES[case], ranks=(1,), seeds=1)
    found = pictures(rows)
    assert len(found) == 2 * 4 + 1
    page = Page(report_page(rows, found))
    assert len(page.all("svg")) == len(found)
    assert len(set(page.ids)) == len(page.ids)


def test_figure_names_depend_only_on_the_rows(tmp_path):
    """The folder may have moved to a machine that has not the user's text."""
    path = tmp_path / "mine.txt"
    path.write_text("")
    rows = make_rows((str(path),), ranks=(1, 2), seeds=1)
    before = set(pictures(rows))
    path.unlink()
    assert set(pictures(rows)) == before


def test_a_table_escapes_html():
    found = Table(["<b>"], [["<c>", "<d>"]], "<a>").html()
    for letter in "abcd":
        assert f"&lt;{letter}&gt;" in found


def test_curves_go_through_their_points_each_with_a_look_of_its_own():
    (ax,) = VIEWS["curves"]().figure.axes
    for name, points in LINES.items():
        assert [list(v) for v in line(ax, name)] == [list(v) for v in points]
    assert (ax.get_xlabel(), ax.get_ylabel(), ax.get_xscale()) == ("block size", "error", "log")
    assert [t.get_text() for t in ax.get_xticklabels()] == ["2", "4", "8", "16"]
    assert list(ax.get_xticks()) == [2, 4, 8, 16]
    looks = {(x.get_marker(), x.get_linestyle(), x.get_color()) for x in ax.get_lines()}
    assert len(looks) == len(LINES)
    (plain,) = figures.curves({"one": ([0.0, 1.0], [2.0, 3.0])}, "t", "loss", "One line.").figure.axes
    assert plain.get_xscale() == "linear"


def test_matrices_share_a_range_around_zero_and_small_ones_show_their_numbers():
    small, large, _ = VIEWS["matrices"]().figure.axes
    assert [ax.get_title() for ax in (small, large)] == list(MATRICES)
    assert [ax.get_ylabel() for ax in (small, large)] == ["2 rows", "9 rows"]
    assert [ax.get_xlabel() for ax in (small, large)] == ["3 columns", "11 columns"]
    for ax, M in zip((small, large), MATRICES.values(), strict=True):
        found = np.ma.filled(ax.get_images()[0].get_array().astype(float), np.nan)
        assert np.array_equal(found, M, equal_nan=True)
        assert ax.get_images()[0].get_clim() == (-4, 4)
    written = {t.get_position(): t.get_text() for t in small.texts}  # (column, row)
    assert written == {(0, 0): "1", (1, 0): "-0.25", (2, 0): "0", (0, 1): "0.5", (1, 1): "", (2, 1): "-4"}
    assert not large.texts
    most, more, _ = figures.matrices({"64": np.eye(8), "65": np.ones((5, 13))}, "Two.").figure.axes
    assert (len(most.texts), len(more.texts)) == (64, 0)
    zero, *_ = figures.matrices({"nothing": np.zeros((2, 2))}, "Nothing.").figure.axes
    assert zero.get_images()[0].get_clim() == (-1, 1)
