"""Our own files, forged: with a valid digest and another structure they are refused or read as written.

A row or a checkpoint is changed in its structure and sealed again. Reading it gives exactly what is written
there, from which every figure can be drawn, or one line that names file and field; then
nothing has changed.
"""

import json
import math
import sys

import numpy as np
import pytest
from fuzz import forged_checkpoint, forged_rows, held, opened, resealed
from helpers import says
from hypothesis import given, settings
from hypothesis import strategies as st
from test_plotting import make_rows
from test_training import STEPS, Run, Stopped, stop_at

from minilora.errors import FormatError, MismatchError, StorageError, UnsupportedError
from minilora.experiments import harness, rank_sweep
from minilora.experiments.harness import check_plan, id_of, sealed
from minilora.experiments.rank_report import pictures, report_page, table
from minilora.experiments.rank_sweep import read_rows
from minilora.formats import forms
from minilora.formats.atomic import Stamp, write_atomic
from minilora.formats.checkpoint import save_checkpoint

ROWS = make_rows(("folio", "permuted:2"), ranks=(1, 3), seeds=2)
GOOD = b"".join(map(sealed, ROWS))
rngs = st.randoms(use_true_random=False)


def at(row, *path):
    """The container of the last part of a path, and that part."""
    for key in path[:-1]:
        row = row[key]
    return row, path[-1]


def put(*path, value):
    def change(row):
        parent, key = at(row, *path)
        parent[key] = value

    return change


def drop(*path):
    def change(row):
        parent, key = at(row, *path)
        del parent[key]

    return change


# ---- the language of forms


@pytest.mark.parametrize(
    ("form", "good", "bad"),
    [
        (forms.text, "x", 1), (forms.flag, True, 1), (forms.real, 1.0, 1), (forms.whole(), 3, True),
        (forms.whole(2, 4), 4, 5), (forms.whole(2, 4), 2, 1), (forms.whole(), 0, 0.0),
        (forms.number(), -1.5, math.nan), (forms.number(), 2, math.inf), (forms.number(0, 2), 2, 2.1),
        (forms.number(0, 2), 0, False), (forms.one("a", 1), 1, True), (forms.one("a"), "a", None),
        (forms.maybe(forms.text), None, 2), (forms.several(forms.text, 1), ["a"], []),
        (forms.several(forms.text), [], ["a", 1]), (forms.several(forms.text), ["a"], "a"),
        (forms.tuple_of(forms.text, forms.flag), ["a", True], ["a"]), (forms.named(forms.flag), {}, {"a": 1}),
        (forms.record({"a": forms.flag}), {"a": True}, {"a": True, "b": 1}),
        (forms.record({"a": forms.flag}), {"a": True}, {}),
        (forms.record({}, {"a": forms.flag}), {"a": True}, {"a": 1}), (forms.record({}), {}, []),
    ],
)  # fmt: skip
def test_a_form_accepts_valid_values_and_names_invalid_ones(form, good, bad):
    form("x", good)
    with pytest.raises(FormatError, match=r"^x"):
        form("x", bad)


# ---- rows


def bare(row):
    """A row without its seal and without what follows from the others, as JSON: types count."""
    return json.dumps({k: v for k, v in row.items() if k not in ("sha256", "gap_closed")})


def told(lines):
    """The rows of a file, by its own words: the last word on a run is the first."""
    rows = {}
    for line in lines:
        row = json.loads(line)
        if isinstance(row, dict) and row.get("sha256") == harness.seal(row):
            rows.setdefault(row["id"], bare(row))
    return list(rows.values())


def read_or_refused(path, lines):
    """The rows, which are those of the file and can be tabled; or None, with one line about the file."""
    path.write_bytes(b"\n".join(lines) + b"\n")
    try:
        rows = read_rows(path)
    except (FormatError, MismatchError) as e:
        says(e, path)
        return None
    assert list(map(bare, rows)) == told(lines)
    assert all(rank_sweep.Run(**row["config"]).id == row["id"] == id_of(row["config"]) for row in rows)
    assert all(map(sealed, rows))
    table(rows)
    report_page(rows, {})
    return rows


@settings(max_examples=100, deadline=None)
@given(rng=rngs)
def test_a_forged_row_is_refused_or_read_as_written(rng, tmp_path_factory):
    lines = forged_rows(rng, GOOD).splitlines()
    read_or_refused(tmp_path_factory.mktemp("rows") / "rows.jsonl", lines)


CURVE = [[step, 1.0] for step in range(0, 41, 4)]
Q = "model.layers.0.self_attn.q_proj"
FORGED = {  # of the last row, a LoRA of rank 3 (12, 8) on folio: what is changed, and the field that is told
    "no loss": (drop("test"), "row.test is missing"),
    "NaN": (put("test", value=math.nan), "row.test is nan"),
    "infinite": (put("valid", value=math.inf), "row.valid is inf"),
    "a sum that overflows": (put("test", value=1e308), "row.test is 1e+308"),
    "a text": (put("test", value="1.5"), "row.test is '1.5'"),
    "true": (put("test", value=True), "row.test is True"),
    "a count with a point": (put("parameters", value=3.0), "row.parameters"),
    "a count below zero": (put("parameters", value=-1), "row.parameters"),
    "another status": (put("status", value="open"), "row.status"),
    "diverged with a loss": (lambda row: row.update(status="diverged", error="x"), "is unknown"),
    "a field more": (put("extra", value=1), "row.'extra' is unknown"),
    "a config without a field": (drop("config", "lr"), "row.config.lr is missing"),
    "a config with one more": (put("config", "more", value=1), "row.config.'more' is unknown"),
    "a config of text": (put("config", value="x"), "row.config"),
    "another kind": (put("config", "kind", value="finel"), "row.config.kind is 'finel'"),
    "another method": (put("config", "method", value="none"), "row.config.method is 'none'"),
    "rank 0": (put("config", "rank", value=0), "row.config.rank"),
    "an absurd rank": (put("config", "rank", value=10**30), "row.config.rank"),
    "another rank": (put("config", "rank", value=2), f"row.spectra['{Q}']"),
    "steps below zero": (put("config", "steps", value=-40), "row.config.steps"),
    "absurd steps": (put("config", "steps", value=10**18), "row.config.steps"),
    "other steps": (put("config", "steps", value=50), "row.curve"),
    "a target that is none": (put("config", "target", value=["folio"]), "row.config.target"),
    "another setting": (put("config", "batch", value=9), "batch is 9; expected "),
    "other modules": (put("config", "modules", value=["v_proj"]), "modules of lora"),
    "a curve of numbers": (put("curve", value=[1, 2]), "row.curve[0]"),
    "a curve with a gap": (put("curve", value=CURVE[:3] + CURVE[4:]), "row.curve"),
    "a curve with text": (put("curve", 4, value=[16, "1"]), "row.curve[4][1] is '1'"),
    "no spectrum": (put("spectra", Q, value=[]), f"row.spectra['{Q}']"),
    "a spectrum below zero": (put("spectra", Q, 1, value=-1.0), f"row.spectra['{Q}'][1] is -1.0"),
    "a longer spectrum": (put("spectra", Q, value=[1.0] * 4), f"row.spectra['{Q}']"),
    "a shape less": (drop("shapes", Q), "row: shapes and spectra are of different modules"),
    "a shape of one": (put("shapes", Q, value=[12]), f"row.shapes['{Q}']"),
    "an absurd shape": (put("shapes", Q, value=[10**9, 8]), f"row.spectra['{Q}']"),
    "another shape": (put("shapes", Q, value=[13, 8]), "shape of 'q_proj' is [13, 8]; expected "),
    "versions of numbers": (put("versions", value={"numpy": 2}), "row.versions['numpy'] is 2"),
    "a gap of text": (put("gap_closed", value="all"), "row.gap_closed is 'all'"),
}  # fmt: skip


@pytest.mark.parametrize("kind", FORGED)
def test_an_invalid_row_with_a_valid_digest_is_refused_by_its_field(kind, tmp_path):
    change, field = FORGED[kind]
    *lines, last = GOOD.splitlines()[: sum(row["config"]["target"] == "folio" for row in ROWS)]
    row = json.loads(last)
    change(row)
    row["id"] = id_of(row["config"])
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n".join([*lines, resealed(row)]))
    with pytest.raises((FormatError, MismatchError)) as e:
        read_rows(path)
    says(e.value, path)
    assert field in str(e.value)
    assert f"line {len(lines) + 1}: row" in str(e.value) or isinstance(e.value, MismatchError)


def test_a_row_with_the_id_of_another_run_is_refused(tmp_path):
    *lines, last = GOOD.splitlines()
    (tmp_path / "rows.jsonl").write_bytes(b"\n".join([*lines, resealed(json.loads(last) | {"id": "0" * 16})]))
    with pytest.raises(FormatError, match=r"row\.id is '0{16}'; its config gives "):
        read_rows(tmp_path / "rows.jsonl")


def test_two_rows_of_one_run_are_refused_and_duplicates_merged(tmp_path):
    lines, path = GOOD.splitlines(), tmp_path / "rows.jsonl"
    assert len(read_or_refused(path, [*lines, lines[4]])) == len(lines)
    path.write_bytes(b"\n".join([*lines, resealed(json.loads(lines[-1]) | {"test": 1.2})]))
    with pytest.raises(
        MismatchError, match=f"line {len(lines) + 1}: differs from an earlier row of the same run"
    ):
        read_rows(path)


def test_gap_closed_is_computed_from_the_rows_not_read(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n".join(resealed(row | {"gap_closed": 0.123} if "gap_closed" in row else row)
                                for row in ROWS))  # fmt: skip
    assert list(map(sealed, read_rows(path))) == GOOD.splitlines(keepends=True)
    alone = [row for row in ROWS if row["config"]["kind"] != "base"]
    path.write_bytes(b"\n".join(map(resealed, alone)))
    assert not any("gap_closed" in row for row in read_rows(path))


def test_a_negligible_gap_has_no_gap_closed(tmp_path):
    """1e38 / 1e-300 is infinite, which no row can hold."""
    rows = [json.loads(line) for line in make_lines(test={"none": 1e-300, "full": 0.0, "lora": 1e38})]
    (found,) = {row.get("gap_closed", 0) for row in rank_sweep.with_gaps(rows) if "curve" in row and
                row["config"]["method"] == "lora"}  # fmt: skip
    assert found is None


def make_lines(test):
    return [resealed(row | {"test": test[row["config"]["method"]]} if "test" in row else row)
            for row in make_rows(ranks=(1,), seeds=1)]  # fmt: skip


LACKS = {
    "base": {"kind": "base"}, "oracle": {"kind": "oracle"}, "full": {"method": "full"},
    "lora": {"kind": "final", "method": "lora"}, "one rank": {"rank": 3}, "one seed": {"seed": 1},
}  # fmt: skip


@pytest.mark.parametrize("gone", LACKS)
def test_the_rest_is_drawn_whichever_rows_are_damaged(gone, tmp_path):
    def spoiled(row):
        return all(row["config"][k] == v for k, v in LACKS[gone].items())

    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n".join(b"damaged" if spoiled(row) else resealed(row) for row in ROWS))
    rows = read_rows(path)
    assert len(rows) == sum(not spoiled(row) for row in ROWS)
    assert report_page(rows, {})
    assert all(picture.says for picture in pictures(rows).values())


OTHER_TARGETS = {  # what a plan may ask for, beside what is usual
    "a permutation without its table": {"modules": ("model.layers.0.self_attn.q_proj",)},
    "ranks below the elbow": {"ranks": (1,)},
    "a head": {"modules": ("lm_head",)},
}


@pytest.mark.parametrize("kind", OTHER_TARGETS)
def test_every_plan_can_be_drawn(kind):
    how = OTHER_TARGETS[kind]
    rows = make_rows(("permuted:4",), ranks=how.get("ranks", (1, 3)), seeds=1)
    names = how.get("modules", ("model.embed_tokens",))
    for row in rows:
        if "shapes" in row:
            for part in ("shapes", "spectra"):
                row[part] = {name: next(iter(row[part].values())) for name in names}
        elif row["config"]["kind"] == "base":
            row["spectra"] = {"model.embed_tokens": [3.0, 2.0, 1.5, 1.0, 0.0, 0.0, 0.0, 0.0]}
    assert report_page(rows, {})
    assert all(picture.says for picture in pictures(rows).values())


PLAN = {"schema": 1, "plan": {"seeds": 3, "alpha": None}, "versions": {"numpy": "2"}}
PLANS = {
    "a list": [], "a text in the place of a part": PLAN | {"plan": "x"}, "null": PLAN | {"plan": None},
    "a part in the place of a number": PLAN | {"schema": {"a": 1}}, "a part more": PLAN | {"more": 1},
    "a null more": PLAN | {"plan": PLAN["plan"] | {"more": None}},
    "a null less": PLAN | {"plan": {"seeds": 3}}, "a part less": {"schema": 1},
    "another number": PLAN | {"plan": PLAN["plan"] | {"seeds": 4}},
}  # fmt: skip


@pytest.mark.parametrize("kind", PLANS)
def test_a_forged_plan_is_refused(kind, tmp_path):
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(PLANS[kind]))
    with pytest.raises((FormatError, MismatchError)) as e:
        check_plan(path, PLAN)
    says(e.value, tmp_path)


# ---- checkpoints


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The bytes of a checkpoint after 3 steps."""
    path = tmp_path_factory.mktemp("saved") / "c.safetensors"
    with pytest.raises(Stopped):
        Run().train(checkpoint=path, checkpoint_every=3, progress=stop_at(3))
    return path.read_bytes()


def loads_or_not(path, data):
    """The error of loading, after which the run is as it was; or None, and saving gives the file again."""
    write_atomic(path, data)
    run = Run(seed=7)
    run.history = None
    before = everything(run)
    try:
        history = run.load(path)
    except (FormatError, MismatchError) as e:
        says(e, path)
        assert everything(run) == before
        return e
    save_checkpoint(path, run.model, run.optimizer, run.rngs, history, run.about())
    assert held(path.read_bytes()) == held(data)
    assert run.optimizer.t == len(history.loss) <= STEPS
    return None


def everything(run):
    """All that loading may change."""
    from minilora.tree import digest

    moments = {k: a.tobytes() for k, a in run.optimizer.state().items()}
    return digest(run.model), moments, run.optimizer.t, [r.bit_generator.state for r in run.rngs.values()]


@settings(max_examples=60, deadline=None)
@given(rng=rngs)
def test_a_forged_checkpoint_is_refused_or_read_as_written(rng, checkpoint, tmp_path_factory):
    path = tmp_path_factory.mktemp("c") / "c.safetensors"
    loads_or_not(path, forged_checkpoint(rng, checkpoint))


def arrays(change):
    """Change the arrays of one parameter: those of the first name of a kind."""
    return lambda meta, tensors: change(tensors)


def meta(change):
    return lambda meta, tensors: change(meta)


def turned(kind, change):
    def turn(tensors):
        name = next(k for k in sorted(tensors) if k.startswith(kind))
        tensors[name] = change(tensors[name].copy())

    return turn


def filled(value):
    def fill(a):
        a.flat[-1] = value
        return a

    return fill


def both_gone(tensors):
    name = next(k for k in sorted(tensors) if k.startswith("m."))[1:]
    del tensors[f"m{name}"], tensors[f"v{name}"]


STATE = ("rngs", "batches")
CHECKPOINTS = {  # what is changed, and what is told
    "more steps than the run": (meta(put("history", "loss", value=[1.0] * (STEPS + 1))), "after step 7"),
    "no step": (meta(put("history", "loss", value=[])), "history.loss"),
    "a loss of NaN": (meta(put("history", "loss", 1, value=math.nan)), "history.loss[1] is nan"),
    "a loss of text": (meta(put("history", "loss", 1, value="1")), "history.loss[1] is '1'"),
    "an eval below zero": (meta(put("history", "evals", 0, value=[-1, 2.0])), "history.evals[0][0] is -1"),
    "an eval of text": (meta(put("history", "evals", 0, value=[0, "2"])), "history.evals[0][1] is '2'"),
    "evals that fall": (meta(put("history", "evals", value=[[2, 1.0], [0, 1.0]])), "history.evals"),
    "evals of later": (meta(put("history", "evals", value=[[4, 1.0]])), "history.evals"),
    "no evals": (meta(drop("history", "evals")), "history.evals is missing"),
    "history of text": (meta(put("history", value="x")), "meta.history"),
    "one more": (meta(put("more", value=1)), "meta.'more' is unknown"),
    "a run of null": (meta(put("run", value=None)), "meta.run is None"),
    "a run with one more": (meta(put("run", "more", value=None)), "more"),
    "2.0 for 2": (meta(put("run", "accumulate", value=2.0)), "'accumulate' 2.0"),
    "a state without a number": (meta(drop(*STATE, "uinteger")), "uinteger is missing"),
    "a state too large": (meta(put(*STATE, "state", "state", value=2**128)), "state.state"),
    "a state below zero": (meta(put(*STATE, "state", "inc", value=-1)), "state.inc"),
    "half a number too large": (meta(put(*STATE, "uinteger", value=2**32)), "uinteger"),
    "a state of a float": (meta(put(*STATE, "state", "state", value=1.0)), "state.state"),
    "a flag of 2": (meta(put(*STATE, "has_uint32", value=2)), "has_uint32"),
    "a list as state": (meta(put(*STATE, value=[])), "meta.rngs['batches']"),
    "another generator": (meta(put(*STATE, "bit_generator", value="MT19937")), "bit_generator"),
    "a generator's sister": (meta(put(*STATE, "bit_generator", value="PCG64DXSM")), "batches is a PCG64DXSM"),
    **{f"NaN in {k}": (arrays(turned(k, filled(math.nan))), k) for k in ("p.", "m.", "v.")},
    **{f"infinite in {k}": (arrays(turned(k, filled(-math.inf))), k) for k in ("p.", "m.", "v.")},
    **{f"float64 in {k}": (arrays(turned(k, np.float64)), k) for k in ("p.", "m.", "v.")},
    **{f"one less in {k}": (arrays(turned(k, lambda a: a[..., :-1].copy())), k) for k in ("p.", "m.", "v.")},
    "a square below zero": (arrays(turned("v.", filled(-1e-9))), "v."),
    "one moment less": (arrays(lambda t: t.pop(max(t))), "v."),
    "two moments less": (arrays(both_gone), "m."),
    "a moment more": (arrays(lambda t: t.update({"m.x": t[max(t)], "v.x": t[max(t)]})), "'m.x'"),
    "another name": (arrays(lambda t: t.update({"x": t[max(t)]})), "'x'"),
}  # fmt: skip


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_an_invalid_checkpoint_with_a_valid_digest_is_refused(kind, checkpoint, tmp_path):
    change, field = CHECKPOINTS[kind]
    about, tensors = opened(checkpoint)
    change(about, tensors)
    error = loads_or_not(tmp_path / "c", resealed(about, tensors))
    assert error is not None
    assert field in str(error)


def test_the_largest_generator_state_is_accepted(checkpoint, tmp_path):
    about, tensors = opened(checkpoint)
    put(*STATE, "uinteger", value=2**32 - 1)(about)
    put(*STATE, "state", "state", value=2**128 - 1)(about)
    assert loads_or_not(tmp_path / "c", resealed(about, tensors)) is None


def test_a_checkpoint_stores_moments_of_parameters_without_gradient(tmp_path):
    """So that one that lacks them is told from one that never had them."""
    run = Run()
    run.train(steps=2)
    run.optimizer.m.pop(max(run.optimizer.m))
    run.optimizer.v.pop(max(run.optimizer.v))
    save_checkpoint(tmp_path / "c", run.model, run.optimizer, run.rngs, run.history, run.about())
    other = Run(seed=3)
    assert other.load(tmp_path / "c") == run.history
    assert not other.optimizer.v[max(other.optimizer.v)].any()


def test_an_unsupported_generator_is_refused_before_the_first_step(tmp_path):
    run = Run()
    run.rngs["dropout"] = np.random.Generator(np.random.MT19937(0))
    with pytest.raises(UnsupportedError, match="dropout is a MT19937"):
        run.train(checkpoint=tmp_path / "c")
    assert run.optimizer.t == 0
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_may_be_as_large_as_its_run(checkpoint, tmp_path, monkeypatch):
    """Full fine-tuning of a model of 135 million parameters saves 1.6 GB."""
    (tmp_path / "c").write_bytes(checkpoint)
    size, module = (
        sum(a.nbytes for a in opened(checkpoint)[1].values()),
        sys.modules[save_checkpoint.__module__],
    )
    monkeypatch.setattr(module, "stamp_of", lambda path: Stamp(0, 0, size + (1 << 25), 0))
    Run(seed=7).load(tmp_path / "c")
    monkeypatch.setattr(module, "stamp_of", lambda path: Stamp(0, 0, size + (1 << 27), 0))
    with pytest.raises(StorageError, match="bytes; at most"):
        Run(seed=7).load(tmp_path / "c")
