"""The experiment with merging: it rounds as a checkpoint does, and measures what plain NumPy measures."""

import copy
import math
from dataclasses import asdict, replace
from unittest import mock

import numpy as np
import pytest
from helpers import gamma, seeds
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from minilora.backend import quiet_overflow, to_device
from minilora.data.batching import batches, eval_batches
from minilora.data.corpora import Corpus
from minilora.errors import ConfigError, FormatError
from minilora.experiments import harness, merging, merging_figures, recipe
from minilora.experiments.merging import (
    CYCLES,
    DTYPES,
    TIMES,
    Plan,
    Run,
    drift,
    in_dtype,
    merged_at,
    restored,
)
from minilora.experiments.merging_figures import UNITS, at, cost, pictures, sentences, spread, tables
from minilora.formats.safetensors import stored
from minilora.layers import Linear, Param
from minilora.lora import Adapted, LowRank, active, inject
from minilora.methods.lora_config import LoraConfig
from minilora.model import Config, llama
from minilora.optim import AdamW, Schedule
from minilora.training import evaluate, train
from minilora.tree import digest, freeze, get, named_params

TINY = Config(hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2,
              num_key_value_heads=1, max_position_embeddings=16)  # fmt: skip
PLAN = Plan(rank=2, alpha=3.0, rates=(1e-2, 3e-2), steps=3, search_steps=2, seeds=3, batch=2,
            test_windows=3, valid_windows=2)  # fmt: skip
FORMATS = {"float32": (24, -126, 128), "bfloat16": (8, -126, 128), "float16": (11, -14, 16)}
U32 = 2.0**-24
FEW = (1, 2, 7)  # cycles


def nearest(x, dtype):
    """Numbers of so many bits from 2^low to 2^high, and below 2^low as far apart as there; ties to even."""
    bits, low, high = FORMATS[dtype]
    x = np.asarray(x, np.float64)
    last = np.ldexp(1.0, np.maximum(np.frexp(x)[1] - 1, low) - (bits - 1))
    y = np.rint(x / last) * last
    return np.where(np.abs(y) < 2.0**high, y, np.copysign(np.inf, x)).astype(np.float32)


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """Short windows, few cycles, and the texts and the base of this file."""
    monkeypatch.setattr(recipe, "LENGTH", 16)
    monkeypatch.setattr(merging, "CYCLES", FEW)
    monkeypatch.setattr(harness, "read_inputs", lambda base, targets: made())


def made():
    """A tiny base, frozen, and a text."""
    base = llama(TINY, np.random.default_rng(0))
    freeze(base)
    ids = np.random.default_rng(1).integers(60, 70, 3000).astype(np.uint8)
    return harness.Inputs("base", base, {"folio": Corpus("folio", "a text", *np.split(ids, [2000, 2500]))})


def run_of(kind="final", **how):
    return Run(kind, **{"plan": PLAN, "seed": 3, "rate": 1e-2} | how)


def other_split(inputs, split):
    """The inputs with other letters in one split."""
    text = inputs.texts["folio"]
    return replace(inputs, texts={"folio": replace(text, **{split: getattr(text, split)[::-1] ^ 1})})


# ---- what is measured, on maps of any shape


def maps(seed, shapes, rank, exponent):
    """Maps (O, I) with W ~ N(0, 1/4), and adapters of which ΔW has about 2^exponent times the size."""
    rng = np.random.default_rng(seed)

    def map_(outputs, inputs):
        shapes = (outputs, inputs), (rank, inputs), (outputs, rank)
        W, A, B = (rng.standard_normal(shape).astype(np.float32) / 2 for shape in shapes)
        W, A, B = map(to_device, (W, A, B))
        pair = LowRank(Param(A), Param(B), 1.5 * 2.0**exponent)
        return Adapted(Linear(Param(W, False)), {"default": pair}, "default")

    return {"layers": [{"q": map_(*shape)} for shape in shapes]}


def dense(tree, t=1.0):
    """W and t ΔW of every map, in float32."""
    for path, adapter in active(tree).items():
        yield get(tree, f"{path}.base.weight").data, (t * adapter.scale * adapter.B.data) @ adapter.A.data


def flat(tree, t):
    """All of them in a row."""
    return (np.concatenate([a.ravel() for a in some]) for some in zip(*dense(tree, t), strict=True))


def merged(t, tree, dtype):
    """What `merged_at` says of the maps."""
    with mock.patch.object(merging, "loss_on", return_value=2.0):
        return merged_at(t, tree, dtype, run_of(), TEXTS)


TEXTS = made()
sides = st.integers(1, 9)
trees = st.builds(
    maps,
    seeds,
    st.lists(st.tuples(sides, sides), min_size=1, max_size=2),
    st.integers(1, 3),
    st.integers(-12, 1),
)
times, kinds = st.sampled_from([0.001, 0.3, 1.0, 4]), st.sampled_from(DTYPES)


@given(arrays(np.float32, 9, elements=st.floats(width=32, allow_nan=False)), kinds)
def test_what_is_stored_is_the_nearest_number_of_the_dtype(x, dtype):
    assert stored(x, dtype).tobytes() == nearest(x, dtype).tobytes()


@given(trees, kinds)
def test_only_the_base_is_rounded(tree, dtype):
    before = digest(tree)
    data = {path: p.data for path, p in named_params(in_dtype(tree, dtype)).items()}
    for path, p in named_params(tree).items():
        want = p.data if path.endswith((".A", ".B")) else nearest(p.data, dtype)
        assert data[path].tobytes() == want.tobytes()
    assert digest(tree) == before


@given(trees, times, kinds)
def test_size_kept_and_lost_are_those_of_plain_matrices(tree, t, dtype):
    """Sums of n products differ by gamma(n) of what is summed; a quotient and a root add a rounding each."""
    base = in_dtype(tree, dtype)
    before = digest(base)
    W, delta = flat(base, t)
    got = nearest(W + delta, dtype).astype(np.float64) - W
    W, delta, n = W.astype(np.float64), delta.astype(np.float64), W.size
    wanted = math.fsum(delta**2)
    found = merged(t, base, dtype)
    assert found["size"] == pytest.approx(math.sqrt(wanted / math.fsum(W**2)), rel=gamma(n + 4), abs=0)
    assert found["lost"] == pytest.approx(
        math.sqrt(math.fsum((got - delta) ** 2) / wanted), rel=gamma(n + 4), abs=0
    )
    terms = math.fsum(abs(got * delta)) / wanted
    assert found["kept"] == pytest.approx(
        math.fsum(got * delta) / wanted, rel=0, abs=gamma(2 * n + 4) * terms
    )
    assert digest(base) == before


@given(trees, times, kinds)
def test_a_merge_loses_at_most_its_bound_and_keeps_all_but_what_it_loses(tree, t, dtype):
    """|R(x) - x| <= u |x| + η / 2, η the smallest subnormal; narrower dtypes are rounded to float32 before.

    Over all maps |W + t ΔW| <= |W| + |t ΔW|, so lost <= u (1 + size) / size. By Cauchy and Schwarz
    |kept - 1| = |<lost part, t ΔW>| / |t ΔW|² is at most what is lost.
    """
    base = in_dtype(tree, dtype)
    found = merged(t, base, dtype)
    W, delta = flat(base, t)
    W, delta, n = W.astype(np.float64), delta.astype(np.float64), W.size
    assert {dtype: 2.0**-bits for dtype, (bits, _, _) in FORMATS.items()} == UNITS
    u = U32 if dtype == "float32" else UNITS[dtype] * (1 + U32) + U32
    bits, low, _ = FORMATS[dtype]
    tiny = math.ldexp(math.sqrt(n), low - bits)  # |η / 2| over all maps; η = 2^(low + 1 - bits)
    whole, own = np.linalg.norm(W + delta), np.linalg.norm(delta)
    slack = 1 + gamma(2 * n + 9)  # of the norms
    assert found["lost"] <= slack * (u * whole + tiny) / own
    assert found["lost"] <= slack * (u * (1 + found["size"]) / found["size"] + tiny / own)
    assert abs(found["kept"] - 1) <= found["lost"] + gamma(2 * n + 9) * (1 + found["lost"])
    if dtype == "float32":
        assert abs(found["kept"] - 1) <= slack * (U32 * whole / own) + gamma(2 * n + 9)


@pytest.mark.parametrize(("dtype", "t"), [("bfloat16", 2.0**-10), ("float16", 2.0**-13)])
def test_a_change_below_half_a_unit_in_the_last_place_is_gone(dtype, t):
    """Numbers from 1 to 2 lie 2 u apart, those just below 1 lie u apart; so nothing below u / 2 is seen."""
    tree = maps(0, [(3, 5)], 1, 0)
    layer = tree["layers"][0]["q"]
    layer.base.weight.data = nearest(np.linspace(1, 1.99, 15).reshape(3, 5), dtype)
    layer.adapters["default"].B.data[:] = -0.6
    layer.adapters["default"].A.data[:] = 1  # ΔW = -0.9
    found = merged(t, tree, dtype)
    assert (found["kept"], found["lost"]) == (0, 1)
    assert merged(t, tree, "float32")["lost"] < 1e-3
    assert merged(8 * t, tree, dtype)["kept"] > 0


def looped(tree, dtype, move):
    """|W_n - W| / |ΔW| after the cycles, with every sum written out."""
    away, size = dict.fromkeys(FEW, 0.0), 0.0
    for first, delta in dense(tree):
        W, step, n_in = first.copy(), nearest(delta, dtype), first.shape[1]
        size += math.fsum((delta.astype(np.float64) ** 2).ravel())
        moved = np.empty_like(step)
        for n in range(1, 1 + FEW[-1]):
            for j in range(n_in):
                moved[:, (j + n * move) % n_in] = step[:, j]
            W = nearest(W + moved, dtype)
            W = nearest(W - moved, dtype)
            if n in FEW:
                away[n] += math.fsum(((W.astype(np.float64) - first) ** 2).ravel())
    return [math.sqrt(x / size) for x in away.values()]


@given(trees, kinds, st.integers(0, 2))
def test_the_drift_is_that_of_a_plain_loop(tree, dtype, move):
    """A difference is rounded to float32 before it is squared; sums in float64 do not count beside that."""
    base = in_dtype(tree, dtype)
    before = digest(base)
    assert drift(base, dtype, move) == pytest.approx(looped(base, dtype, move), rel=gamma(2, U32), abs=0)
    assert digest(base) == before


@given(trees, kinds)
def test_one_change_moves_W_in_the_first_cycle_only(tree, dtype):
    """x + y - y is again itself after another + y - y, with ties to even (Reiser and Knuth 1975).

    A sum that is rounded to float32 before is rounded as if once: 24 >= 2 p + 2 bits (Figueroa 1995).
    """
    away = drift(in_dtype(tree, dtype), dtype, 0)
    assert away == [away[0]] * len(FEW)


def test_a_change_that_moves_on_drifts_further_than_one_that_stays():
    base = in_dtype(maps(5, [(40, 30)], 2, 0), "bfloat16")
    stays, moves = (drift(base, "bfloat16", move)[-1] for move in (0, 1))
    assert 0 < stays < moves


def in_place(sign):
    """The habit of adding to W itself."""

    def add(model):
        for path, adapter in active(model).items():
            weight = get(model, f"{path}.base.weight")
            weight.data += sign * adapter.delta()

    return add


@given(trees)
def test_merge_and_unmerge_are_measured_and_restore_every_bit(tree):
    """Were they in place, the measurement would say what the loop says."""
    before = digest(tree)
    assert restored(tree) == [0, 0, 0]
    assert digest(tree) == before
    with mock.patch.multiple(merging, merge=in_place(1), unmerge=in_place(-1)):
        found = restored(copy.deepcopy(tree))
    assert found == pytest.approx(looped(tree, "float32", 0), rel=gamma(2, U32), abs=0)


def test_arrays_on_a_device_give_the_same_numbers(request):
    def numbers():
        tree = maps(2, [(4, 6), (3, 2)], 2, -3)
        base = in_dtype(tree, "bfloat16")
        return merged(0.3, base, "bfloat16"), drift(base, "bfloat16", 1), restored(tree)

    on_host = numbers()
    request.getfixturevalue("device")
    assert numbers() == on_host


# ---- one run


def by_hand(run, inputs, steps):
    """The base with its adapter, trained as the recipe says."""
    model, text = copy.deepcopy(inputs.base), inputs.texts["folio"]
    inject(model, LoraConfig(r=2, alpha=3), rng=np.random.default_rng([run.seed, 0]))
    train(
        model, batches(text.train, np.random.default_rng([run.seed, 1]), 2, 16),
        AdamW(run.rate, betas=(0.9, 0.99)), steps=steps, schedule=Schedule(steps, warmup=steps // 20),
    )  # fmt: skip
    return model


def loss(model, text, split):
    return evaluate(
        model, eval_batches(getattr(text, split), 16, 16, limit=16 * {"test": 3, "valid": 2}[split])
    )


def test_a_search_is_the_validation_loss_of_a_short_run():
    inputs = made()
    row = merging.work(run_of("search"), inputs)
    assert row["valid"] == loss(by_hand(run_of(), inputs, 2), inputs.texts["folio"], "valid")


def test_a_seed_measures_models_made_by_hand():
    """Losses to the bit, after as many steps as a warm-up needs; the base is not written."""
    inputs = made()
    before = digest(inputs.base)
    text, row = inputs.texts["folio"], merging.work(run_of(plan=replace(PLAN, steps=20)), inputs)
    assert digest(inputs.base) == before
    model = by_hand(run_of(), inputs, 20)
    assert row["merged"].keys() == row["one"].keys() == row["others"].keys() == set(DTYPES)
    lost = {}
    for dtype in DTYPES:
        rounded = copy.deepcopy(inputs.base)
        for p in named_params(rounded).values():
            p.data = nearest(p.data, dtype)
        assert [t for t, _ in row["merged"][dtype]] == list(TIMES)
        for t, found in row["merged"][dtype]:
            apart, plain = copy.deepcopy(model), copy.deepcopy(rounded)
            for path, adapter in active(apart).items():
                adapter.scale *= t
                weight = get(plain, f"{path}.weight")
                get(apart, f"{path}.base.weight").data = weight.data
                weight.data = nearest(adapter.delta() + weight.data, dtype)
            for path, p in named_params(apart).items():
                if ".adapters." not in path:
                    p.data = nearest(p.data, dtype)
            assert found["test"] == loss(plain, text, "test")
            assert found["apart"] == loss(apart, text, "test")
            lost[dtype, t] = found["lost"]
        base = in_dtype(model, dtype)
        for way, move in (("one", 0), ("others", 1)):
            assert row[way][dtype] == [[n, x] for n, x in zip(FEW, drift(base, dtype, move), strict=True)]
    assert row["unmerge"] == [[n, 0.0] for n in FEW]
    assert all(lost["float32", t] < lost["float16", t] < lost["bfloat16", t] for t in TIMES)
    assert all(lost[dtype, TIMES[0]] > lost[dtype, 1.0] for dtype in DTYPES)


def test_test_text_chooses_no_rate_and_validation_text_measures_nothing():
    inputs = made()
    for kind, seen, unseen in (("search", "valid", "test"), ("final", "test", "valid")):
        row, same, other = (
            merging.work(run_of(kind), x)
            for x in (inputs, other_split(inputs, unseen), other_split(inputs, seen))
        )
        assert row == same
        assert row != other
        assert ("valid" in row) == (kind == "search")


def test_the_seed_draws_the_adapter_and_its_batches():
    one, again, other = (merging.work(run_of(seed=seed), made()) for seed in (3, 3, 4))
    assert one == again
    assert all(one["merged"][dtype] != other["merged"][dtype] for dtype in DTYPES)


# ---- the grid


def crafted(run, inputs=None, o=(0.0, 5.0, 1.0)):
    """A row in no time; the last seed is the middle one of three."""
    c = asdict(run)
    row = {"id": run.id, "config": c, "source": "crafted", "status": "done"}
    if run.kind == "search":
        return row | {"valid": abs(math.log(run.rate / 2e-2))}
    m = o[run.seed]  # seeds differ, and no median is a mean

    def found(d, i):
        return {"size": TIMES[i] / 8 * (1 + m / 100), "kept": 1 - d / 16 - i / 64 + m / 256,
                "lost": (1 + d + m / 10) / 10 ** (1 + i), "apart": 2.0 + m,
                "test": 2.0 + m + (1 + m) * d * 10.0 ** (i - 8)}  # fmt: skip

    def away(*first):
        return {dtype: [[n, x * (1 + m) * (j + 1)] for j, n in enumerate(CYCLES)]
                for dtype, x in zip(DTYPES, first, strict=True)}  # fmt: skip

    return row | {
        "merged": {dtype: [[t, found(d, i)] for i, t in enumerate(TIMES)] for d, dtype in enumerate(DTYPES)},
        "one": away(0.0, 1e-3, 2e-4), "others": away(1e-8, 1e-2, 2e-3),
        "unmerge": [[n, 0.0] for n in CYCLES],
    }  # fmt: skip


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Crafted rows of three seeds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(harness, "read_inputs", lambda base, targets: made())
        patch.setattr(merging, "work", crafted)
        return merging.run(PLAN, tmp_path_factory.mktemp("rows"), jobs=1)


def test_every_seed_is_measured_at_the_best_rate_of_the_search(rows):
    """The edge is left by half a decade; the search's seed is none of those that are measured."""
    searches, finals = (
        [row["config"] for row in rows if row["config"]["kind"] == kind] for kind in ("search", "final")
    )
    assert [c["rate"] for c in searches] == [1e-2, 3e-2, 0.095]
    assert {c["seed"] for c in searches} == {harness.SEARCH_SEED}
    assert [(c["seed"], c["rate"]) for c in finals] == [(seed, 3e-2) for seed in range(3)]
    assert {c["text"] for c in (*searches, *finals)} == {made().texts["folio"].digest}


def test_an_edge_is_left_at_most_twice(tmp_path, monkeypatch):
    monkeypatch.setattr(merging, "work", lambda run, inputs: crafted(run) | (
        {"valid": -run.rate} if run.kind == "search" else {}))  # fmt: skip
    found = merging.run(replace(PLAN, rates=(1e-2,)), tmp_path, jobs=1)
    assert [row["config"]["rate"] for row in found] == [1e-2, 0.032, 0.1, *[0.1] * 3]


# ---- reading


def test_numbers_are_read_from_where_they_stand(rows):
    assert at(rows, "float16", "lost").shape == (3, len(TIMES))
    assert at(rows, "float16", "lost")[1].tolist() == [(1 + 2 + 0.5) / 10 ** (1 + i) for i in range(4)]
    assert cost(rows, "bfloat16")[2] == pytest.approx([2 * 10.0 ** (i - 8) for i in range(4)], abs=1e-15)
    assert merging_figures.drift(rows, "others", "bfloat16")[1] == pytest.approx([0.06, 0.12, 0.18, 0.24])
    assert merging_figures.drift(rows, "one", "float16")[0] == pytest.approx([2e-4, 4e-4, 6e-4, 8e-4])
    assert (merging_figures.restored(rows) == np.zeros((3, len(CYCLES)))).all()


def test_a_spread_is_the_median_and_the_range():
    assert spread(np.array([1.0, 9.0, 2.0]), ".2f") == "2.00 (1.00 to 9.00)"
    assert spread(np.array([0.001, 1e-7, 3e-3]), "+.1e") == "+1.0e-03 (+1.0e-07 to +3.0e-03)"


def test_tables_say_what_the_rows_say(rows):
    one, away = tables(rows)
    assert [line[:2] for line in one.rows] == [(dtype, f"{t:g}") for dtype in DTYPES for t in TIMES]
    assert one.rows[4 + 2] == (
        "bfloat16", "0.1", "0.013", "0.910 (0.906 to 0.926)", "0.0021 (0.002 to 0.0025)",
        "+2.0e-06 (+1.0e-06 to +6.0e-06)",
    )  # fmt: skip
    assert one.head == ("dtype", "t", "of W's norm", "kept", "lost", "merged less apart, nats")
    assert one.caption.endswith("3 seeds")
    assert away.head == ("in place", "1 cycle", "10 cycles", "100 cycles", "1000 cycles")
    assert [line[0] for line in away.rows] == [
        *(f"{dtype}, {how}" for dtype in DTYPES for how in ("the same ΔW", "another ΔW each time")),
        "merge and unmerge",
    ]
    assert away.rows[2][1:] == tuple(
        f"{2 * x:.2g} ({x:.2g} to {6 * x:.2g})" for x in (0.001, 0.002, 0.003, 0.004)
    )
    assert away.rows[-1][1:] == ("0 (0 to 0)",) * len(CYCLES)
    assert all(len(line) == len(table.head) for table in (one, away) for line in table.rows)


def test_sentences_are_medians_over_the_seeds_and_the_worst_cost(rows):
    assert sentences(rows) == [
        "Rounding the merged weights loses, of ΔW: float32 0.00011, bfloat16 0.00021, float16 0.00031; "
        "of ΔW / 1,000: 0.11, 0.21, 0.31.",
        "A merge changes the test loss by at most 1.2e-04 nats.",
        "W after 1,000 times in place, with another ΔW each time, in norms of ΔW away from its start: "
        "float32 8e-08, bfloat16 0.08, float16 0.016; with the same one: 0, 0.008, 0.0016. "
        "Merge and unmerge: 0.",
    ]


def test_a_cost_may_be_a_gain_and_a_measured_drift_is_told(rows):
    worse = copy.deepcopy(rows)
    worse[-1]["merged"]["float32"][0][1]["test"] = worse[-1]["merged"]["float32"][0][1]["apart"] - 0.25
    worse[-2]["unmerge"][1][1] = 0.5
    assert sentences(worse)[1] == "A merge changes the test loss by at most 2.5e-01 nats."
    assert sentences(worse)[2].endswith("Merge and unmerge: 0.5.")


def lines_of(ax):
    """(Colour, line style) -> the data of each line."""
    return {(line.get_color(), line.get_linestyle()): line.get_data() for line in ax.get_lines()}


def test_figures_draw_the_medians_and_the_bound(rows):
    drawn = pictures(rows)
    assert drawn.keys() == {"rounding", "drifting"}
    rounding, drifting = (lines_of(drawn[name].figure.axes[0]) for name in ("rounding", "drifting"))
    size = np.array(TIMES) / 8 * 1.01
    for d, (dtype, (colour, _)) in enumerate(merging_figures.LOOKS.items()):
        x, y = rounding[colour, "-"]
        assert x == pytest.approx(size)
        assert y == pytest.approx([(1.1 + d) / 10 ** (1 + i) for i in range(4)])
        x, y = rounding[colour, ":"]
        assert y == pytest.approx(2.0 ** -FORMATS[dtype][0] * (1 / size + 1))
        for way, style in (("others", "-"), ("one", ":")):
            x, y = drifting[colour, style]
            assert tuple(x) == CYCLES
            assert y == pytest.approx(2 * np.array([away for _, away in rows[-3][way][dtype]]))
    assert drifting[merging_figures.GREY, "-"][1].tolist() == [0] * len(CYCLES)
    losses, walk = sentences(rows)[0], sentences(rows)[2]
    assert losses in drawn["rounding"].says
    assert walk in drawn["drifting"].says
    titles = {name: picture.figure.get_suptitle() for name, picture in drawn.items()}
    assert titles["rounding"].endswith("Of ΔW: float32 0.00011, bfloat16 0.00021, float16 0.00031")
    assert titles["drifting"].endswith("Off by |ΔW| times float32 8e-08, bfloat16 0.08, float16 0.016")


@pytest.mark.slow
def test_the_same_rows_give_the_same_figures(rows):
    drawn, again = pictures(rows), pictures(rows)
    for name, picture in drawn.items():
        assert picture.encoded("svg") == again[name].encoded("svg")
        svg = picture.encoded("svg").decode()
        assert all(dtype in svg for dtype in DTYPES)
        assert "ΔW" in svg


def test_a_seed_that_diverged_is_left_out_and_none_is_refused(rows):
    lost = [row | {"status": "diverged"} if row["config"]["seed"] == 1 else row for row in rows]
    assert at(lost, "float16", "lost").shape == (2, len(TIMES))
    assert "2 seeds" in tables(lost)[0].caption
    with pytest.raises(ConfigError, match="nothing was measured"):
        tables([row for row in rows if row["config"]["kind"] == "search"])


# ---- rows and plans


def test_a_finished_folder_is_read_not_run(tmp_path, monkeypatch):
    monkeypatch.setattr(merging, "work", crafted)
    first = merging.run(PLAN, tmp_path, jobs=1)
    data = (tmp_path / "rows.jsonl").read_bytes()
    monkeypatch.setattr(merging, "work", None)
    assert merging.run(PLAN, tmp_path, jobs=1) == first
    assert (tmp_path / "rows.jsonl").read_bytes() == data
    assert harness.read_rows(tmp_path / "rows.jsonl", merging.FORM) == first


def test_a_row_that_a_run_writes_is_read(tmp_path, monkeypatch):
    """With as many cycles as the committed rows have, whose drift is that of fewer."""
    monkeypatch.setattr(merging, "CYCLES", CYCLES)
    for name in ("drift", "restored"):
        monkeypatch.setattr(merging, name, mock.Mock(return_value=[0.0, 0.5, 1.0, 1.5]))
    row = merging.work(run_of(), made()) | {"versions": {}}
    (tmp_path / "rows.jsonl").write_bytes(harness.sealed(row))
    (found,) = harness.read_rows(tmp_path / "rows.jsonl", merging.FORM)
    assert [found[key] for key in merging.MEASURED] == [row[key] for key in merging.MEASURED]


def changed(row, path, value):
    """A copy of the row with another value at a path; without it, if the value is ..."""
    row = copy.deepcopy(row)
    at = row
    for key in path[:-1]:
        at = at[key]
    if value is ...:
        del at[path[-1]]
    else:
        at[path[-1]] = value
    return row


@pytest.mark.parametrize(
    ("path", "value", "named"),
    [(("merged", "float16"), ..., r"merged\.float16 is missing"),
     (("merged", "float64"), [], "'float64' is unknown"),
     (("merged", "float32", 1), ..., "merged.float32 is"),
     (("merged", "float32", 1, 0), 0.02, r"merged.float32\[1\]\[0\] is 0.02"),
     (("merged", "float32", 1, 1, "kept"), "all", r"merged.float32\[1\]\[1\].kept"),
     (("merged", "float32", 1, 1, "lost"), -0.1, r"merged.float32\[1\]\[1\].lost"),
     (("merged", "float32", 1, 1, "size"), None, r"merged.float32\[1\]\[1\].size"),
     (("merged", "float32", 1, 1, "apart"), ..., r"merged.float32\[1\]\[1\].apart is missing"),
     (("merged", "float32", 1, 1, "more"), 1.0, "'more' is unknown"),
     (("one", "bfloat16", 0, 1), -1.0, r"one.bfloat16\[0\]\[1\]"),
     (("others", "float32", 2, 0), 99, r"others.float32\[2\]\[0\] is 99"),
     (("others", "float32"), [], "others.float32"),
     (("unmerge", 3), ..., "unmerge is"),
     (("unmerge",), ..., "unmerge is missing"),
     (("valid",), 1.0, "'valid' is unknown"),
     (("status",), "lost", "status")],
    ids=lambda x: ".".join(map(str, x)) if isinstance(x, tuple) else "",
)  # fmt: skip
def test_a_row_that_no_run_writes_is_refused(path, value, named, rows, tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(harness.sealed(changed(rows[-1], path, value)))
    with pytest.raises(FormatError, match=f"line 1: row.*{named}"):
        harness.read_rows(tmp_path / "rows.jsonl", merging.FORM)


@pytest.mark.parametrize(
    "change",
    [{"rates": ()}, {"rates": (0.0,)}, {"rates": (1e-2, math.inf)}, {"alpha": 0}, {"alpha": math.nan},
     {"rank": 0}, {"steps": 0}, {"search_steps": 2.0}, {"seeds": 1.5}, {"batch": 0}, {"test_windows": 0},
     {"valid_windows": True}],
    ids=repr,
)  # fmt: skip
def test_an_empty_or_impossible_plan_is_refused(change):
    with pytest.raises(ConfigError):
        Plan(**change)


def test_a_rank_that_does_not_fit_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="r is 5"):
        merging.run(replace(PLAN, rank=5), tmp_path, jobs=1)


def test_weights_too_large_for_the_dtype_are_a_run_that_diverged(monkeypatch):
    """In float16 they overflow: the row says so, and no number is made up."""
    inputs = made()
    get(inputs.base, "model.layers.0.self_attn.v_proj.weight").data[0, 0] = 1e5
    with quiet_overflow():
        row = merging.work(run_of(plan=replace(PLAN, steps=1)), inputs)
    assert row["status"] == "diverged"
    assert row.keys() == {"id", "config", "source", "status", "error"}
