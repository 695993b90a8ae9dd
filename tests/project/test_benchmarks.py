"""The GPU benchmark without a GPU: its dry run passes and writes nothing, a real one is refused.

And the table of the activations that a block stores matches the code, as do the calls of packed training;
LoRA's rivals are timed as the experiment trains them.
"""

import ast
import copy
import importlib.util
import itertools
import json
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

import minilora as ml
from minilora import lora, tree
from minilora.analysis.plotting import Picture
from minilora.lora import Adapted

ROOT = Path(__file__).parents[2]


def gpu(*arguments, **env):
    command = [sys.executable, "benchmarks/gpu.py", *arguments]
    return subprocess.run(command, cwd=ROOT, env=os.environ | env, capture_output=True, text=True)


@pytest.mark.slow
def test_the_dry_run_passes_and_writes_no_figure():
    def results():
        return {file: file.read_bytes() for file in (ROOT / "benchmarks/results").iterdir()}

    before = results()
    done = gpu("--dry-run")
    assert done.returncode == 0, done.stderr
    *rows, last = done.stdout.splitlines()
    assert all("transfers 1, difference 0;" in row for row in rows)
    assert len(rows) == 2
    assert "no figure" in last
    assert results() == before


def test_without_a_gpu_the_benchmark_says_so_in_one_line():
    done = gpu(CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 1
    assert done.stderr.startswith("no GPU")
    assert len(done.stderr.splitlines()) == 1
    assert not done.stdout


@pytest.mark.parametrize("precision", ["float32", "TF32"])
def test_a_difference_beyond_the_bound_is_seen(precision, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import gpu

    rng = np.random.default_rng(0)
    exact = {"g": rng.standard_normal((5, 7))}
    cpu = {"g": exact["g"].astype(np.float32)}
    u = gpu.UNIT[precision]
    for size, passes in ((u, True), (100 * u, False)):
        device = {"g": exact["g"] * (1 + size * rng.standard_normal((5, 7)))}
        assert (gpu.worst(device, cpu, exact, precision) <= 1) == passes
    assert gpu.worst(cpu, cpu, exact, precision) == 0


def test_the_mutation_score_matches_its_rows_and_each_survivor_has_a_reason():
    """And nine of ten changes that are not equivalent are seen."""
    results = ROOT / "benchmarks/results"
    rows = json.loads((results / "mutation.json").read_text())["rows"]
    reasons = json.loads((results / "mutation_survivors.json").read_text())
    lines = (results / "mutation.md").read_text(encoding="utf-8").splitlines()
    for name in [*dict.fromkeys(row["file"] for row in rows), "all"]:
        some = [row for row in rows if name in (row["file"], "all")]
        equal, seen = (sum(row["outcome"] == what for row in some) for what in ("equivalent", "seen"))
        places = sum({row["file"]: row["places"] for row in some}.values())
        share = seen / (len(some) - equal)
        assert f"| {name} | {places} | {len(some)} | {equal} | {seen} | {share:.0%} |" in lines
    assert share >= 0.9
    left = [row for row in rows if row["outcome"] != "seen"]
    assert all(row["reason"] for row in left)
    given = {(file, change): why for file, some in reasons.items() for change, why in some.items()}
    of = {(row["file"], f"{row['old']} -> {row['new']}"): row for row in left}
    assert given == {key: [row["outcome"] == "equivalent", row["reason"]] for key, row in of.items()}


def test_the_table_of_stored_activations_matches_the_code(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import kept

    size = next(size for size in kept.SIZES if size[0] == 128)
    found = {kind: kept.kept(kind, size) for kind in kept.KINDS}
    rows = json.loads((ROOT / "benchmarks/results/kept.json").read_text())["rows"]
    for row in rows:
        arrays = {kind: some[row["name"]] for kind, some in found.items() if row["name"] in some}
        assert row["bytes"] == {kind: a.nbytes for kind, a in arrays.items()}, row["name"]
    assert {row["name"] for row in rows} == {name for some in found.values() for name in some}
    total = {kind: sum(a.nbytes for a in some.values()) for kind, some in found.items()}
    assert total["LoRA"] == total["everything trained"]  # LoRA saves no activations
    assert total["LoRA, full"] < total["frozen base"] / 5
    assert total["LoRA, full"] < total["LoRA, selective"] < 0.7 * total["LoRA"]


def test_the_calls_of_packed_training_match_the_code_and_its_page_the_rows(monkeypatch):
    """And packing saves calls, the more the more runs, but no more than those of the base."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import packed

    rows = json.loads((ROOT / "benchmarks/results/packed.json").read_text())["rows"]
    size = packed.SIZES[1]
    some = {row["runs"]: row["calls"] for row in rows if row["size"] == packed.named(size)}
    assert some[2] == {kind: packed.calls(2, kind, size) for kind in packed.KINDS}
    assert packed.table(rows) in (ROOT / "benchmarks/results/packed.md").read_text()
    share = [calls["packed"]["all"] / calls["unpacked"]["all"] for K, calls in some.items() if K > 1]
    assert share == sorted(share, reverse=True)
    assert 0.5 < share[-1] < share[0] < 1
    speed = (ROOT / "docs/speed.md").read_text(encoding="utf-8")
    for size in packed.SIZES:
        own = [row for row in rows if row["size"] == packed.named(size)]
        assert "| " + " | ".join(f"{row['packed_to_unpacked']:.2f}" for row in own) + " |" in speed
    all_of = [[row["calls"][kind]["all"] for kind in packed.KINDS] for row in rows[: len(packed.RUNS)]]
    assert "| " + " | ".join(f"{ours / theirs:.2f}" for ours, theirs in all_of) + " |" in speed


def test_the_page_on_serving_has_the_numbers_of_its_rows(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import serving

    rows = json.loads((ROOT / "benchmarks/results/serving.json").read_text(encoding="utf-8"))["rows"]
    page = (ROOT / "docs/serving.md").read_text(encoding="utf-8")
    for text in (*serving.tables(rows), *serving.said(rows)):
        assert text in page
    (counted,) = (row for row in rows if row["part"] == "past one machine")
    assert counted == {"part": "past one machine", **serving.count()}


def test_qlora_may_start_at_the_best_part_of_what_quantizing_lost(monkeypatch):
    """Of the same rank nothing is nearer to W - Ŵ: what is left are its other singular values."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import merge_four_bits

    base = ml.load()
    model = copy.deepcopy(base)
    ml.quantize(model)
    four = merge_four_bits.weights(model)
    ml.inject(model, ml.LoraConfig(r=merge_four_bits.RANK, alpha=5), rng=np.random.default_rng(0))
    merge_four_bits.start_at_residual(model, base)
    for path, change in merge_four_bits.changes(model).items():
        lost = (merge_four_bits.weights(base)[path] - four[path]).astype(np.float64)
        rest = np.linalg.norm(np.linalg.svd(lost, compute_uv=False)[merge_four_bits.RANK :])
        rounding = max(lost.shape) * 2.0**-24 * np.linalg.norm(lost)  # of the SVD in float32
        assert abs(np.linalg.norm(lost - change) - rest) <= rounding < 0.01 * rest, path


def test_the_methods_that_are_timed_are_those_of_the_experiment(monkeypatch):
    """Each takes a training step; at inference what merges runs as it is and merged, the rest as it is."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import methods

    for name in (steps := methods.runners("step")):
        run = methods.run_of("step", name, methods.SMALL)
        assert np.isfinite(losses := [run() for _ in range(3)]).all()
        assert losses[2] < losses[0], name
    beside = {*steps} - {*methods.PLAIN}
    assert {*methods.runners("token")} == {
        "base", "base again", "biases", *beside, *(f"{name}, merged" for name in beside - {*methods.UNMERGED})
    }  # fmt: skip
    for name in methods.runners("token"):
        methods.run_of("token", name, methods.SMALL)()
        model, _ = methods.ready(name, methods.SMALL)
        merged = [layer.merged is not None for _, layer in tree.walk(model) if isinstance(layer, Adapted)]
        assert any(merged) == all(merged or [False]) == name.endswith(", merged")
        assert bool(merged) == (name.removesuffix(", merged") in beside)
    counts = [
        tree.size(tree.trained(methods.ready(name, methods.SHAPES[0])[0])) for name in ("LoRA", "prefix")
    ]
    assert counts == [10944, 10944]


def test_the_page_and_the_figure_of_the_methods_have_their_numbers(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import methods

    rows = []
    for size in methods.SHAPES:
        for job in methods.JOBS:
            first, *others = methods.runners(job)
            ms = {name: size[0] + i for i, name in enumerate((first, *others))}
            rows.append({"job": job, "size": methods.named(size), "ms": ms,
                         "ratio": {name: ms[name] / ms[first] for name in others}})  # fmt: skip
    monkeypatch.setattr(methods, "RESULTS", tmp_path)
    methods.draw(rows)
    lines = (tmp_path / "methods.md").read_text(encoding="utf-8").splitlines()
    (lora,) = (line for line in lines if line.startswith("| LoRA |"))
    of_lora = [f"{row['ms']['LoRA']:.2f} ({row['ratio']['LoRA']:.2f})" for row in rows]
    assert lora == f"| LoRA | {' | '.join(of_lora)} |"
    (merged,) = (line for line in lines if line.startswith("| LoRA, merged |"))
    assert merged.startswith("| LoRA, merged |  | ")  # a merged model is not trained
    svg = (tmp_path / "methods.svg").read_text(encoding="utf-8")
    assert all(name in svg for name in methods.METHODS if name not in methods.PLAIN)
    assert f"a token at D = 256, times the base's: LoRA {rows[-1]['ratio']['LoRA']:.2f}; LoRA, merged" in svg


def test_the_committed_page_of_the_methods_is_that_of_its_rows(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import methods

    rows = json.loads((ROOT / "benchmarks/results/methods.json").read_text())["rows"]
    assert methods.table(rows) in (ROOT / "benchmarks/results/methods.md").read_text(encoding="utf-8")
    assert [(row["job"], row["size"]) for row in rows] == [
        (job, methods.named(size)) for size in methods.SHAPES for job in methods.JOBS
    ]


@pytest.mark.slow
def test_a_quick_race_of_the_methods_tells_every_time_and_writes_nothing():
    results = ROOT / "benchmarks/results"
    before = {file: file.read_bytes() for file in results.iterdir()}
    command = [sys.executable, "benchmarks/methods.py", "--quick"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    names = [line.partition("  ")[0] for line in done.stdout.splitlines()]
    assert names == [
        "step, D = 16", "all weights", "LoRA", "prefix", "norms",
        "token, D = 16", "base", "base again", "LoRA", "prefix", "LoRA, merged",
    ]  # fmt: skip
    assert {file: file.read_bytes() for file in results.iterdir()} == before


def test_the_parts_of_a_step_add_up_to_it_and_change_nothing(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import step
    import step_parts

    size = (16, 2, 4, 24, 8, 11, 4)
    plain, timed = step.step("lora", *size), step.step("lora", *size)
    monkeypatch.setattr("time.perf_counter", itertools.count().__next__)  # a second passes at each look
    start = time.perf_counter()
    losses = []
    ms = step_parts.parts(lambda: losses.append(timed()))
    looks = time.perf_counter() - start
    assert sum(ms.values()) == 1000 * (looks - 3)  # two looks before the run, and one after it
    assert all(ms[kind] > 0 for kind in step_parts.KINDS)
    plain_losses = [plain() for _ in range(2)]
    assert [*losses, timed()] == plain_losses
    assert ms["products"] > ms["optimizer"]  # more calls, so more looks


def test_a_step_that_only_calls_has_the_micro_batches_of_the_whole(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import step_parts

    from minilora.fast import parallel

    size = (64, 1, 4, 24, 512, 11, 9)
    cut = parallel.micro_batches

    def counted(run):
        seen = []
        monkeypatch.setattr(parallel, "micro_batches", lambda *a: seen.append(len(list(cut(*a)))) or cut(*a))
        run()
        return seen

    assert counted(step_parts.calls(*size)) == counted(step_parts.steps.step("lora", *size)) == [3]


def test_a_step_that_only_calls_makes_the_calls_of_the_step(monkeypatch):
    """In a narrow model the products of a step would have another order."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import step_parts

    size = (64, 1, 4, 24, 512, 11, 9)

    def counted(run):
        called = Counter()
        with monkeypatch.context() as patch:
            for _, owner, name in step_parts.PLACES:
                if owner is not step_parts.xp:  # attention's tiles: one token has one
                    at, f = (owner, name), getattr(owner, name)
                    patch.setattr(*at, lambda *a, at=at, f=f, **k: called.update([at]) or f(*a, **k))
            run()
        return called

    calls = counted(step_parts.calls(*size))
    assert calls == counted(step_parts.steps.step("lora", *size))
    assert calls[lora.LowRank, "learn"] == 3 * 7


def test_the_page_on_speed_has_the_parts_of_a_step(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import step_parts

    rows = json.loads((ROOT / "benchmarks/results/step_parts.json").read_text())["rows"]
    assert step_parts.table(rows) in (ROOT / "docs/speed.md").read_text(encoding="utf-8")


def test_a_new_row_of_the_step_replaces_one_of_the_same_processor_size_and_threads(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import step

    def row(processor, D, threads, ms):
        return {"machine": {"processor": processor}, "size": {"D": D}, "threads": threads, "ms": ms}

    old = [row("a", 64, 1, 5), row("a", 64, 2, 4), row("b", 64, 1, 3)]
    new = [row("a", 64, 2, 7), row("a", 128, 2, 9)]
    assert step.merged(old, new) == [old[0], new[0], old[2], new[1]]


@pytest.mark.parametrize("count", [1, 3])
def test_a_step_is_drawn_for_any_number_of_processors(count, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import step

    rows = json.loads((ROOT / "benchmarks/results/step.json").read_text())["rows"]
    newest = [row for row in rows if "selective" in row["ms"]]
    drawn = []
    monkeypatch.setattr(Picture, "save", lambda picture, folder, name: drawn.append(picture.figure))
    step.draw([row | {"machine": {"processor": f"P{i}"}} for i in range(count) for row in newest])
    titles = [ax.get_title() for ax in drawn[0].axes]
    assert titles == [
        *(f"A LoRA step, on P{i}" for i in range(count)),
        f"What it holds on two threads, on P{count - 1}", f"What recomputation costs, on P{count - 1}",
    ]  # fmt: skip


def test_each_step_that_is_timed_or_weighed_recomputes_and_cuts_as_its_name_says(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import step

    from minilora.fast import parallel

    size, cut = (64, 1, 4, 24, 512, 11, 9), parallel.MICRO_BATCH
    wrap, micro_batches = parallel.wrap, parallel.micro_batches
    seen = []

    def wrapped(model, how):
        seen.append(how)
        wrap(model, how)

    def parts(*batch):
        seen.append(len(cuts := list(micro_batches(*batch))))
        return cuts

    monkeypatch.setattr(parallel, "wrap", wrapped)
    monkeypatch.setattr(parallel, "micro_batches", parts)
    found = {}
    for name in dict.fromkeys((*step.OURS[1:], *step.HELD)):
        monkeypatch.setattr(parallel, "MICRO_BATCH", cut)
        seen.clear()
        step.step(name, *size)()
        found[name] = (*seen,)
    assert found == {
        "lora": (3,), "full": (3,), "selective": ("selective", 3), "recomputed": ("full", 3),
        "whole": (1,), "selective whole": ("selective", 1),
    }  # fmt: skip


def test_a_forced_order_of_products_is_the_one_that_runs(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import gradient_order
    import step

    run = step.step("lora", 16, 2, 4, 24, 8, 11, 8, r=3)
    called, losses = [], []
    for name in ("learn", "learn_from"):
        real = getattr(lora.LowRank, name)
        monkeypatch.setattr(lora.LowRank, name, lambda *a, n=name, f=real: called.append(n) or f(*a))
    for way, expected in (("factors", "learn"), ("weight", "learn_from")):
        called.clear()
        losses.append(gradient_order.forced(run, way)())
        assert called == [expected] * 14
    assert losses[1] < losses[0]  # the first step was made


def test_the_page_on_speed_has_the_two_orders_of_products(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import gradient_order

    rows = json.loads((ROOT / "benchmarks/results/gradient_order.json").read_text())["rows"]
    page = (ROOT / "docs/speed.md").read_text(encoding="utf-8").replace(" %", "%")
    assert gradient_order.table(rows) in page
    assert gradient_order.said(rows) in page


def test_runs_take_turns_to_and_fro_and_the_first_two_rounds_warm_up(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import step

    ran = []
    times = step.rounds({name: lambda name=name: ran.append(name) for name in "abc"}, 2)
    assert "".join(ran) == "abccbaabccba"
    assert {name: len(t) for name, t in times.items()} == dict.fromkeys("abc", 2)


def test_an_order_of_products_is_that_many_times_as_fast(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import gradient_order

    times = {"factors": [2.0, 6.0, 4.0], "weight": [1.0, 3.0, 2.0], "chosen": [4.0, 12.0, 8.0]}
    monkeypatch.setattr(gradient_order.steps, "step", lambda *size, r: None)
    monkeypatch.setattr(gradient_order.steps, "rounds", lambda runs, count: times)
    row = gradient_order.measure(gradient_order.SIZES[0], 4)
    assert row["to_factors"] == {"weight": 2.0, "chosen": 0.5}
    assert row["ms"] == {"factors": 4.0, "weight": 2.0, "chosen": 8.0}


def test_two_processes_are_judged_by_the_slower_of_them(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import sweep

    made = []

    class Fake:
        def __init__(self, argv, env):
            self.answers = [[100.0, 160.0], [125.0]][len(made) % 2] * 3
            made.append(env)

        def line(self):
            return "ready"

        def run(self):
            return self.answers.pop(0)

        def close(self):
            assert self.answers == []

    monkeypatch.setattr(sweep, "Contestant", Fake)
    assert sweep.two_of_products(3) == 2 * 100 / 160
    assert made == [sweep.threads(1)] * 2


def test_the_page_on_speed_has_the_numbers_of_the_sweep(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import sweep

    found = json.loads((ROOT / "benchmarks/results/sweep.json").read_text())
    assert sweep.said(found["rows"]) in (ROOT / "docs/speed.md").read_text(encoding="utf-8").replace(
        " %", "%"
    )
    monkeypatch.setattr(sweep, "processor", lambda: found["processor"])
    assert sweep.merged(found, found["rows"][0]) == [*found["rows"], found["rows"][0]]
    other = found["rows"][0] | {"steps": 7}
    assert sweep.merged(found, other) == sweep.merged({}, other) == [other]
    monkeypatch.setattr(sweep, "processor", lambda: "another one")
    assert sweep.merged(found, other) == [other]


def test_the_page_on_speed_has_the_numbers_of_inference():
    rows = json.loads((ROOT / "benchmarks/results/inference.json").read_text())["rows"]
    to_base = {(row["job"], row["size"]["D"]): row["to_base"] for row in rows if row["part"] == "latency"}
    token, forward = ([to_base[job, D] for D in (64, 128, 256, 512)] for job in ("token", "forward"))

    def span(values, form):
        return f"{min(values):{form}} to {max(values):{form}}"

    beyond = {f"{found['merged'] - 1:.0%}" for found in token[2:]}
    assert len(beyond) == 1
    of_64, of_128 = (f"{found['merged'] - 1:.0%}" for found in token[:2])
    again = [max(abs(found["base again"] - 1) for found in some) for some in (forward, token)]
    cost = [f"{found['unmerged'] - 1:.0%}" for found in token]
    times = [row["times_faster"] for row in rows if row["part"] == "decoding"]
    said = (
        f"base's time: {span([found['merged'] for found in forward], '.2f')} of a forward",
        f"where the base timed against itself differs by up to {again[0]:.0%}",
        f"takes: {of_64} at D = 64, {of_128} at 128 and {beyond.pop()} beyond, "
        f"where the base against itself differs by up to {again[1]:.0%}",
        f"costs {cost[0]} of a token's time at D = 64, {cost[1]} at 128, {cost[2]} at 256 and "
        f"{cost[3]} at 512",
        f"and {span([100 * (found['unmerged'] - 1) for found in forward], '.0f')}% of a forward's",
        f"decoding is {span(times, '.1f')} times",
    )
    page = (ROOT / "docs/speed.md").read_text(encoding="utf-8").replace(" %", "%")
    for words in said:
        assert words in page, words


PROGRAMS = sorted((ROOT / "benchmarks").glob("*.py"))


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.stem)
def test_a_benchmark_names_only_what_there_is(program, monkeypatch):
    """What it imports from the package and from its neighbours; other libraries may be missing here."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    ours = {"minilora", *(other.stem for other in PROGRAMS)}
    asked = [
        (node.module, alias.name)
        for node in ast.walk(ast.parse(program.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and node.module.partition(".")[0] in ours
        for alias in node.names
    ]
    for module, name in asked:
        if module != "rivals":  # which needs torch
            found = importlib.import_module(module)
            assert hasattr(found, name) or importlib.util.find_spec(f"{module}.{name}"), f"{module}.{name}"
