"""The ledger: a verdict follows from the committed rows by its rule, and a rule can come out either way."""

import copy
import json
import math
from functools import reduce
from operator import getitem
from pathlib import Path
from statistics import median

import pytest

from minilora.claims import decided as module
from minilora.claims.claim import FAILS, HOLDS
from minilora.claims.cost import COUNTED
from minilora.claims.decided import CLAIMS
from minilora.claims.ledger import LEDGER, claims
from minilora.errors import StorageError
from minilora.experiments.cost import MIXED, STATES
from minilora.experiments.which_matrices import SETS

ROOT = Path(__file__).parents[1]
CLAIM = {claim.decide.__name__: claim for claim in CLAIMS}


@pytest.fixture(scope="module")
def committed():
    """File -> its rows, as they are committed."""
    names = dict.fromkeys(claim.rows for claim in CLAIMS)
    return {name: module.rows_of(ROOT, name) for name in names}


def decided(name, committed, change=None):
    """The verdict of one rule on the committed rows, or on changed ones."""
    claim = CLAIM[name]
    rows = copy.deepcopy(committed[claim.rows])
    if change:
        change(rows)
    return claim.decide(rows)


def test_the_ledger_that_ships_is_what_the_committed_rows_give():
    found = claims(ROOT)
    assert found == claims()
    assert json.loads(LEDGER.read_text(encoding="utf-8")) == found.data()


def test_the_page_shows_the_ledger_and_the_readme_its_first_lines(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "docs")
    from claims import FIRST, opened, page

    assert (ROOT / "docs/claims.md").read_text(encoding="utf-8") == page(claims())
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert opened(readme, claims()) == readme
    assert sum(f"| {entry.statement} |" in readme for entry in claims().entries) == FIRST


def test_the_ledger_prints_each_claim_and_its_verdict_by_subject_in_80_columns():
    ledger = claims()
    first, *lines = str(ledger).splitlines()
    hold, fail = (sum(e.verdict == verdict for e in ledger.entries) for verdict in (HOLDS, FAILS))
    n = len(ledger.entries)
    assert first == f"{n} sentences: {hold} hold, {n - hold - fail} under a condition, {fail} do not here"
    expected = []
    for subject, some in module.SUBJECTS.items():
        expected += ["", subject]
        for claim in some:
            (entry,) = (e for e in ledger.entries if e.statement == claim.statement)
            assert entry.subject == subject
            expected += [f"{claim.statement} ({claim.source})", f"{entry.verdict}: {entry.number}"]
    assert max(map(len, lines)) <= 80
    assert " ".join(" ".join(lines).split()) == " ".join(" ".join(expected).split())
    assert all(line.startswith("  ") for line in lines if line and line not in module.SUBJECTS)


def test_the_ledger_of_figures_has_the_claims_that_they_decide():
    ledger = claims()
    figures = sorted({entry.figure for entry in ledger.entries if entry.figure.startswith("figures/")})
    for some in (figures, figures[::3], ()):
        found = ledger.of(*(figure[len("figures/") : -len(".png")] for figure in some))
        assert found.entries == tuple(entry for entry in ledger.entries if entry.figure in some)


def test_all_rows_of_a_file_are_read(committed):
    for name, rows in committed.items():
        lines = (ROOT / name).read_text(encoding="utf-8")
        found = lines.splitlines() if name.endswith("l") else json.loads(lines)
        if isinstance(found, dict):
            found = found.get("rows", [found])
        assert len(rows) == len(found)


def test_every_claim_has_its_evidence_a_rule_in_words_and_a_sentence_of_its_own():
    assert (
        len({claim.statement for claim in CLAIMS}) == len({claim.decide for claim in CLAIMS}) == len(CLAIMS)
    )
    for claim in CLAIMS:
        assert claim.rule.startswith("Holds ")
        assert claim.rule.endswith(".")
        assert claim.statement.endswith(".")
        for path in (claim.rows, claim.figure):
            assert (ROOT / path).is_file(), path
    for entry in claims().entries:
        assert entry.verdict in (HOLDS, FAILS) or entry.verdict.startswith("holds when ")
        assert any(c.isdigit() for c in entry.number)


# ---- every rule comes out the other way on other rows


def runs(rows, *kinds, **config):
    """The rows of runs of these kinds with these settings."""
    for row in rows:
        c = row["config"]
        if c["kind"] in kinds and config.items() <= c.items():
            yield row


def final(rows, target, method, rank=None):
    """The measured rows of one cell."""
    for row in rows:
        c = row["config"]
        if (c["kind"], c["target"], c["method"]) == ("final", target, method) and rank in (None, c["rank"]):
            yield row


def set_all(rows, key, value):
    for row in rows:
        row[key] = value


def one_seed_below_half(rows):
    next(final(rows, "folio", "lora", 4))["gap_closed"] = 0.5


def all_as_full(rows):
    set_all(final(rows, "folio", "lora"), "test", next(final(rows, "folio", "full"))["test"])


def only_a_middle_rank_as_full(rows):
    all_far_from_full(rows)
    set_all(final(rows, "folio", "lora", 8), "test", next(final(rows, "folio", "full"))["test"])


def all_far_from_full(rows):
    set_all(final(rows, "folio", "lora"), "test", 9.0)


def all_ranks_alike(rows):
    for target in ("folio", "permuted:4"):
        set_all(final(rows, target, "lora"), "test", 1.7)


def ranks_alike_on_one_target(rows):
    set_all(final(rows, "folio", "lora"), "test", 1.7)


def last_doubling_hurts(rows):
    set_all(final(rows, "folio", "lora", 64), "test", 1.6)


def last_doubling_helps_most(rows):
    set_all(final(rows, "folio", "lora", 64), "test", 1.5)


def one_direction(rows):
    for row in final(rows, "folio", "full"):
        row["spectra"] = {path: [1.0] + [0.0] * (len(S) - 1) for path, S in row["spectra"].items()}


def beyond_the_bound(rows):
    rows[-1]["ratio"] = 1.01


def kept(share):
    """Of every ΔW that is requantized."""

    def change(rows):
        for row in rows:
            if (row["way"], row["route"]) == ("scaled", "Q(Ŵ + ΔW)"):
                row["kept"] = share

    return change


def losses(name, less):
    """Every measured loss of a combination or method becomes the base's less so much."""

    def change(rows):
        for row in rows:
            if "losses" in row:
                base = row["losses"]["base"]
                to = {text: loss - less for text, loss in base.items()}
                if name in row["methods"]:
                    row["methods"][name]["losses"] = to
                else:
                    row["losses"][name] = to

    return change


def mean_worse_on_one_text(rows):
    for row in rows:
        if "losses" in row:
            row["losses"]["mean of all"]["kjv"] = 9.0


def unlearned(*texts):
    """Without its adapter each of these texts gets worse by 1, and the base's own by 0.05."""

    def change(rows):
        for row in rows:
            for text in texts if "losses" in row else ():
                more = dict(row["losses"]["base"])
                changed = {text: more[text] + 1, "shakespeare": more["shakespeare"] + 0.05}
                row["losses"][f"- {text}"] = more | changed

    return change


def nearly_the_sum(rows):
    for row in rows:
        if "methods" in row:
            row["methods"]["peft_linear"]["residual"] = 0.009


def half_of_the_base(rows):
    for row in rows:
        if (row.get("kind"), row.get("adapters")) == ("engine", 1000):
            row["to_base"] = 0.5


def in_set(name, nats, budget=None, target=None):
    """The test losses of a set of matrices, at one budget or on one text."""

    def changed(rows):
        runs = [row for row in rows if row["config"]["kind"] == "final"
                and row["config"]["modules"] == list(SETS[name])]  # fmt: skip
        ranks = sorted({row["config"]["rank"] for row in runs})
        for row in runs:
            c = row["config"]
            if target in (None, c["target"]) and (budget is None or c["rank"] == ranks[budget]):
                row["test"] = nats

    return changed


def one_seed_of_all_is_worse(rows):
    for row in rows:
        c = row["config"]
        if (c["kind"], c["modules"], c["seed"]) == ("final", ["all-linear"], 3):
            row["test"] = 9.0


def largest_rank_at(loss):
    """The largest rank's test loss with alpha / r, at whatever rate."""

    def change(rows):
        set_all(runs(rows, "final", rank=96, scale=2 * 16 / 96), "test", loss)

    return change


def one_seed_is_not_better(rows):
    largest_rank_at(1.0)(rows)
    set_all(runs(rows, "final", rank=96, scale=2 * 16 / 96, seed=3), "test", 9.0)


def one_scale_far_off(rows):
    """rsLoRA at r = 96 loses a tenth of a nat at every rate but its own best one."""
    its = {"rank": 96, "scale": 2 * math.sqrt(16 / 96)}
    curve = {row["config"]["rate"]: row["valid"] for row in runs(rows, "search", **its)}
    best = min(curve, key=curve.get)
    for row in runs(rows, "final", **its):
        row["test"] = 1.6 if row["config"]["rate"] == best else 1.7


def rates_of(rank, scale, times):
    """All rates of one scale and rank, searched and trained, times so much."""

    def change(rows):
        for kind in ("search", "final"):
            for row in runs(rows, kind, rank=rank, scale=scale, ratio=1.0):
                row["config"]["rate"] *= times

    return change  # only for rules that read no test loss at the middle rank's rate


def alpha_2r_at(loss):
    """The test losses of alpha = 2r at every rank but the middle."""

    def change(rows):
        for r in (1, 4, 64, 96):
            set_all(runs(rows, "final", rank=r, scale=2.0), "test", loss)

    return change


def better_at_one_rank(rows):
    alpha_2r_at(9.0)(rows)
    set_all(runs(rows, "final", rank=4, scale=2.0), "test", 1.0)


def one_rate_in_ten(rows):
    """Of r = 4 alone the best rate is 25 times full fine-tuning's, and of the others ten times."""
    rates_of(0, 0.0, 1 / 3)(rows)
    rates_of(4, 8.0, 2.5)(rows)


def plus_at(loss):
    def change(rows):
        set_all(runs(rows, "final", ratio=16.0), "test", loss)

    return change


def one_seed_of_plus_is_worse(rows):
    plus_at(1.0)(rows)
    next(runs(rows, "final", ratio=16.0))["test"] = 9.0


def phi(pair, value, first=1):
    """φ of A wherever i and j are among the first."""

    def change(rows):
        for row in rows:
            for sides in row.get("similarity", {pair: {}})[pair].values():
                for i in range(first):
                    for j in range(first):
                        sides["A"][i][j] = value

    return change


def overlap_but_for_one_seed(rows):
    phi("ranks", 1.0)(rows)
    phi("ranks", 0.0)([row for row in rows if row["config"]["seed"] == 3])


def no_gain(rows):
    """r = 8 learns nothing, whatever it overlaps."""
    phi("ranks", 1.0)(rows)
    for row in rows:
        if "losses" in row:
            row["losses"]["8"] = row["losses"]["base"]


def amplified(factor, emphasis):
    def change(rows):
        for row in rows:
            for found in row.get("weights", {"4": {}})["4"].values():
                found.update(factor=factor, emphasis=emphasis)

    return change


def known_runs(rows, *tasks):
    """The measured rows of all tasks with a planted rank, or of some."""
    for row in rows:
        c = row["config"]
        if c["kind"] == "final" and c["planted"] and (c["task"] in tasks or not tasks):
            yield row, c["planted"], c["rank"]


def as_planted(*tasks):
    """Excess and spectra as if LoRA found the answer exactly, in all tasks or some."""

    def change(rows):
        for row, k, r in known_runs(rows, *tasks):
            row["excess"] = row["best"] = max(k - r, 0) / k
            row["spectrum"] = [1.0] * min(k, r) + [1e-6] * max(r - k, 0)

    return change


def far_from_planted(rows):
    """One run too many of each task has gained nothing, and shows another rank."""
    as_planted()(rows)
    for task in ("map", "teacher", "permutation"):
        row, k, _ = next(found for found in known_runs(rows, task) if found[2] == 16)
        row["excess"] = 1.0
        row["spectrum"] = [1.0] * (k + 1) + [1e-6] * (15 - k)


def no_rank_is_enough(rows):
    for row, _, _ in known_runs(rows):
        row["excess"] = 1.0


def rounded_at(lost, least=0.0):
    """What rounding to bfloat16 loses of ΔW times t or more."""

    def change(rows):
        for row in rows:
            for t, found in row["merged"]["bfloat16"] if "merged" in row else ():
                found["lost"] = lost if t >= least else found["lost"]

    return change


def merged_at(nats):
    """By how much one seed's merge in bfloat16 changes the loss."""

    def change(rows):
        found = next(row for row in rows if "merged" in row)["merged"]["bfloat16"][-1][1]
        found["test"] = found["apart"] + nats

    return change


def undone(*ways):
    def change(rows):
        for row in rows:
            for way in ways if "merged" in row else ():
                for cycles in row[way].values():
                    for pair in cycles:
                        pair[1] = 0.0

    return change


def latency(how, ratio, width=None):
    """The time of a token over the base's, at one width or at all."""

    def change(rows):
        for row in rows:
            if (row["part"], row.get("job")) == ("latency", "token") and width in (None, row["size"]["D"]):
                row["to_base"][how] = ratio

    return change


def step_of(ratio):
    def change(rows):
        set_all(rows, "to_full", ratio)

    return change


def peak_of(ratio):
    def change(rows):
        rows[0]["memory"]["ratio"]["peak"] = ratio

    return change


def lora_at(key, value, target=None, least=1, seeds=None):
    """A loss of LoRA as trained, from a rank on, on one text or on both, for some seeds or all."""

    def change(rows):
        for row in runs(rows, "final"):
            c = row["config"]
            if c["rank"] >= least and target in (None, c["target"]) and (seeds is None or c["seed"] in seeds):
                row[key] = value

    return change


def fronts_at(lora, full):
    """What LoRA and full fine-tuning have on the text of pretraining at every rate."""

    def change(rows):
        for row in runs(rows, "front", "final"):
            row["own_test"] = lora if row["config"]["rank"] else full

    return change


def maps_at(seeds=range(5), **values):
    """Numbers of every map: those of LoRA, and with full_ those of full fine-tuning."""

    def change(rows):
        for row in (row for row in runs(rows, "final") if row["config"]["seed"] in seeds):
            for kept in row["maps"].values():
                for key, value in values.items():
                    if key.startswith("full_") == (row["config"]["rank"] == 0):
                        kept[key.removeprefix("full_")] = value

    return change


def both(*changes):
    def change(rows):
        for each in changes:
            each(rows)

    return change


def start_cells(rows, start, kind="final"):
    for row in rows:
        if (row["config"]["kind"], row["config"].get("start")) == (kind, start):
            yield row


def start_at(start, key, value):
    """A measured value of every seed of one start, at every rate."""

    def change(rows):
        set_all(start_cells(rows, start), key, value)

    return change


def one_seed_of_a_start_at(start, first, others):
    def change(rows):
        set_all(start_cells(rows, start), "test", others)
        for row in start_cells(rows, start):
            row["test"] = first if row["config"]["seed"] == 0 else row["test"]

    return change


def rates_of_a_start(start, times):
    """All its rates, searched and trained, times so much; for rules that read no common rate."""

    def change(rows):
        for kind in ("search", "final"):
            for row in start_cells(rows, start, kind):
                row["config"]["rate"] *= times

    return change


def both_random_at_the_base(rows):
    (base,) = (row["test"] for row in rows if row["config"]["kind"] == "base")
    start_at("both random", "start", base)(rows)


def uniform_as_gaussian(rows):
    for start in ("B zero", "B zero (Gaussian A)"):
        start_at(start, "test", 1.7)(rows)


def there_at_once(rows):
    for row in start_cells(rows, "LoRA-GA"):
        row["losses"] = [0.5] * len(row["losses"])


def there_at_two_thirds(rows):
    for row in start_cells(rows, "LoRA-GA"):
        steps = len(row["losses"])
        row["losses"] = [9.0 if i < 2 * steps // 3 else 0.5 for i in range(steps)]


def of_start(rows, target, width, pretrained):
    (row,) = runs(rows, "start", target=target, width=width, pretrained=pretrained)
    return row


def every_start_reaches_it_at(d, width=None, pretrained=None, method="subspace", measure="test"):
    """From d on a random subspace is as good as all weights, below it no better than the start."""

    def change(rows):
        for row in runs(rows, "final", method=method):
            c = row["config"]
            if (width is None or c["width"] == width) and (
                pretrained is None or c["pretrained"] == pretrained
            ):
                same = {k: c[k] for k in ("target", "width", "pretrained")}
                full = median([one[measure] for one in runs(rows, "final", method="full", **same)])
                start = of_start(rows, *same.values())
                row[measure] = full if c["size"] >= d else start[measure]

    return change


def by_pretraining(base, long, short, random, measure="test"):
    """d90 of the four starts of one width."""
    at = {(WIDTH, 0): random, (WIDTH, 60): short, (WIDTH, 600): long, (BASE, 0): base}
    return both(*(every_start_reaches_it_at(d, *start, measure=measure) for start, d in at.items()))


def by_width(*dims, measure="test"):
    return both(
        *(
            every_start_reaches_it_at(d, w, 600, measure=measure)
            for w, d in zip((32, 56, 96), dims, strict=True)
        )
    )


def lora_is(more, rank):
    """LoRA's loss at a rank is that of the random subspace with as many numbers, less so much."""

    def change(rows):
        for row in runs(rows, "final", method="lora", size=rank):
            (same,) = runs(
                rows,
                "final",
                method="subspace",
                width=0,
                target="folio",
                size=row["parameters"],
                seed=row["config"]["seed"],
            )
            row["test"] = same["test"] - more

    return change


def ranks_are(share):
    def change(rows):
        for row in runs(rows, "final", method="subspace"):
            row["rank"] = share

    return change


def no_accuracy(rows):
    """No start, and no random subspace, comes near to the accuracy of all weights."""
    for row in (*runs(rows, "start"), *runs(rows, "final", method="subspace")):
        row["accuracy"] = 0.0


def one_seed_never_from_the_base(rows):
    """From the base all seeds but one need few numbers, from random weights many; none is accurate."""
    both(by_pretraining(LOW, LOW, LOW, HIGH), no_accuracy)(rows)
    for row in runs(rows, "final", method="subspace", width=BASE, seed=3):
        row["test"] = 9.0


def said_at(d):
    return every_start_reaches_it_at(d, 0, method="said")


def costs(model, times, *path):
    """A number in every row of a model, or each of its bytes, times so much."""

    def change(rows):
        *above, last = path
        for row in runs(rows, "counted", model=model):
            place = reduce(getitem, above, row)
            old = place[last]
            place[last] = [times * x for x in old] if isinstance(old, list) else times * old

    return change


def memory_of(model, times, way, *states):
    """The bytes of training a model one way, in some number formats."""
    return both(*(costs(model, times, "memory", state, way) for state in states))


NONE, LOW, MIDDLE, HIGH = 10**9, 342, 5472, 87552
BASE, WIDTH = 0, 96


def of_method(rows, method, *ranks, kind="final"):
    """The rows of a method, of all its sizes or of some."""
    for row in runs(rows, kind, method=method):
        if not ranks or row["config"]["rank"] in ranks:
            yield row


def reversed_leaves(rank, excess, seeds=range(5)):
    """What LoRA of a rank leaves of the base's excess on reversed text, for some seeds or all."""

    def change(rows):
        for row in runs(rows, "final", task="reversed", rank=rank):
            if row["config"]["seed"] in seeds:
                row["excess"] = excess

    return change


def method_at(loss, *methods, ranks=()):
    """Every seed of these methods has that test loss."""

    def change(rows):
        for method in methods:
            set_all(of_method(rows, method, *ranks), "test", loss)

    return change


def one_seed_of_a_method_at(first, others, method, *ranks):
    def change(rows):
        method_at(others, method, ranks=ranks)(rows)
        for row in of_method(rows, method, *ranks):
            row["test"] = first if row["config"]["seed"] == 0 else row["test"]

    return change


def falling(method, losses):
    """The losses of its sizes, the smallest rank first."""

    def change(rows):
        ranks = sorted({row["config"]["rank"] for row in of_method(rows, method)})
        for rank, loss in zip(ranks, losses, strict=False):
            set_all(of_method(rows, method, rank), "test", loss)

    return change


def ratio_at(job, value, *names):
    """The time of some contestants at every size."""

    def change(rows):
        for row in rows:
            if row["job"] == job:
                row["ratio"] |= dict.fromkeys(names, value)

    return change


BOTH, ROWS_BEFORE = ("bottleneck, Houlsby", "bottleneck, Pfeiffer"), ("prefix", "prompt")


def base_and_full(rows, width):
    """The base's loss on the target, and the median of full fine-tuning."""
    (base,) = runs(rows, "base", width=width)
    return base["test"], median(row["test"] for row in runs(rows, "final", width=width, rank=0))


def left_by_width(*nats):
    """LoRA's loss less full fine-tuning's at every rank, by width from the narrowest on."""

    def change(rows):
        widths = sorted({row["config"]["width"] for row in rows})
        for width, more in zip(widths, nats, strict=True):
            _, full = base_and_full(rows, width)
            for row in runs(rows, "final", width=width):
                if row["config"]["rank"]:
                    row["test"] = full + more

    return change


def one_rank_left_alone(rank):
    """The widest base leaves less at this rank only."""

    def change(rows):
        left_by_width(0.1, 0.1, 0.1)(rows)
        _, full = base_and_full(rows, 128)
        set_all(runs(rows, "final", width=128, rank=rank), "test", full + 0.05)

    return change


def one_seed_leaves_more(rows):
    """All but one seed of the widest base leave less, at each rank."""
    left_by_width(0.1, 0.1, 0.05)(rows)
    _, full = base_and_full(rows, 128)
    for row in runs(rows, "final", width=128, seed=2):
        if row["config"]["rank"]:
            row["test"] = full + 0.11


def enough_from(*ranks):
    """By width, the rank from which on LoRA closes the gap; below it nothing."""

    def change(rows):
        widths = sorted({row["config"]["width"] for row in rows})
        for width, least in zip(widths, ranks, strict=True):
            base, full = base_and_full(rows, width)
            for row in runs(rows, "final", width=width):
                if row["config"]["rank"]:
                    row["test"] = full if row["config"]["rank"] >= least else base

    return change


def closes(**shares):
    """The share of the gap that the ranks of SmolLM2 close: r1=..., r4=... with every seed."""

    def change(rows):
        base, full = base_and_full(rows, 576)
        for name, share in shares.items():
            set_all(runs(rows, "final", rank=int(name[1:])), "test", base - share * (base - full))

    return change


def one_seed_closes_half(rows):
    """r = 4 closes all with every seed but one, which closes less than half."""
    closes(r4=1.0)(rows)
    base, full = base_and_full(rows, 576)
    set_all(runs(rows, "final", rank=4, seed=1), "test", base - 0.49 * (base - full))


def rates_over_full(**times):
    """The best rates of SmolLM2's ranks over that of full fine-tuning."""

    def change(rows):
        full = next(runs(rows, "final", rank=0))["config"]["rate"]
        for name, factor in times.items():
            for row in runs(rows, "final", rank=int(name[1:])):
                row["config"]["rate"] = factor * full

    return change


def beyond_at(
    key, value, tasks=("5 to 9", "inverted", "rotated", "drawing 5 to 9"), ranks=None, method="lora"
):
    """A measured value of the final rows of some tasks, one method and some ranks."""

    def change(rows):
        for row in rows:
            c = row["config"]
            of = c["kind"] == "final" and c["method"] == method and c["task"] in tasks
            if of and (ranks is None or c["rank"] in ranks):
                row[key] = value

    return change


def beyond_solved_from(rank_of):
    """Permuted pixels: no loss from a rank on, all of the base's below it."""

    def change(rows):
        for row in rows:
            c = row["config"]
            if c["kind"] == "base" and ":" in c["task"]:
                row["test"] = 1.0
            if c["kind"] == "final" and ":" in c["task"]:
                row["test"] = 1e-6 if c["rank"] >= rank_of(int(c["task"][-1])) else 1.0

    return change


def digits_at(d):
    return every_start_reaches_it_at(d, 48, 0, measure="accuracy")


CHANGED = [  # rule, what becomes of its rows, what it says then
    ("little_is_enough", one_seed_below_half, FAILS),
    ("as_good_as_full", all_as_full, HOLDS),
    ("as_good_as_full", all_far_from_full, FAILS),
    ("as_good_as_full", only_a_middle_rank_as_full, FAILS),
    ("one_is_enough", all_ranks_alike, HOLDS),
    ("diminishing", last_doubling_hurts, FAILS),
    ("diminishing", last_doubling_helps_most, FAILS),
    ("full_is_low", one_direction, HOLDS),
    ("merging_is_exact", beyond_the_bound, FAILS),
    ("merging_into_four_bits", kept(0.9), HOLDS),
    ("merging_into_four_bits", kept(0.89), FAILS),
    ("adding_blends", losses("folio + kjv + code", 0.1), HOLDS),
    ("adding_blends", losses("mean of all", -0.1), FAILS),
    ("adding_blends", mean_worse_on_one_text, FAILS),
    ("ties_helps", losses("ties", 1.0), HOLDS),
    ("negation_unlearns", unlearned("folio", "kjv", "code"), HOLDS),
    ("linear_is_a_sum", nearly_the_sum, HOLDS),
    ("many_over_one", half_of_the_base, FAILS),
    ("known_rank", as_planted(), HOLDS),
    ("known_rank", no_rank_is_enough, FAILS),
    ("spectrum_shows_it", as_planted(), HOLDS),
    ("spectrum_shows_it", far_from_planted, FAILS),
    ("best_of_its_rank", as_planted(), HOLDS),
    ("best_of_its_rank", far_from_planted, FAILS),
    ("dimension_is_low", every_start_reaches_it_at(LOW), HOLDS),
    ("dimension_is_low", both(no_accuracy, every_start_reaches_it_at(MIDDLE)), FAILS),
    ("base_is_lower_than_random", by_pretraining(LOW, MIDDLE, MIDDLE, HIGH), HOLDS),
    ("base_is_lower_than_random", one_seed_never_from_the_base, FAILS),
    ("pretraining_lowers_it", by_pretraining(LOW, 1368, MIDDLE, HIGH), HOLDS),
    ("width_lowers_it", by_width(MIDDLE, 1368, LOW), HOLDS),
    ("low_dimension_is_low_rank", ranks_are(0.2), HOLDS),
    ("only_the_count_matters", lora_is(0.5, 4), FAILS),
    ("scales_lower_it", both(every_start_reaches_it_at(MIDDLE, 0), said_at(LOW)), HOLDS),
    ("q_and_v", in_set("QV", 0.1), HOLDS),
    ("all_over_q_and_v", in_set("all", 9.0), FAILS),
    ("all_over_q_and_v", in_set("all", 9.0, target="folio"), "holds when the text is code"),
    ("all_over_q_and_v", one_seed_of_all_is_worse, FAILS),
    ("most_at_low_rank", in_set("QV", 9.0, 0), HOLDS),
    ("more_matrices", in_set("QKVO", 0.1), HOLDS),
    ("mlp_over_attention", in_set("QKVO", 0.1, 1, "code"), FAILS),
    ("attention_adds_nothing", in_set("all", 0.1, 1, "code"), FAILS),
    ("high_ranks_collapse", one_seed_is_not_better, HOLDS),
    ("one_rate_fits_all", one_scale_far_off, FAILS),
    ("rates_are_alike", rates_of(96, 2 * 16 / 96, 8), FAILS),
    ("alpha_is_a_rate", alpha_2r_at(9.0), FAILS),
    ("alpha_2r_is_better", alpha_2r_at(1.0), HOLDS),
    ("lora_plus_helps", plus_at(1.0), HOLDS),
    ("ten_times_the_rate", rates_of(0, 0.0, 1 / 3), HOLDS),
    ("rank_matters_most", largest_rank_at(0.1), HOLDS),
    ("ranks_overlap", phi("ranks", 1.0), HOLDS),
    ("seeds_agree", phi("seeds", 1.0, 7), HOLDS),
    ("seeds_agree", phi("seeds", 1.0), "holds when the first 1 are meant"),
    ("amplifies", amplified(20.0, 0.05), HOLDS),
    ("follows_w", amplified(1.0, 0.05), HOLDS),
    ("amplifies", amplified(20.0, 0.1), FAILS),
    ("amplifies", amplified(9.0, 0.05), FAILS),
    ("rounding_is_nothing", rounded_at(0.01), HOLDS),
    ("rounding_is_nothing", rounded_at(0.011, least=1.0), FAILS),
    ("loss_stays", merged_at(-2e-3), FAILS),
    ("subtracting_undoes_it", undone("one", "others"), HOLDS),
    ("subtracting_undoes_it", undone("one"), "holds when it is the same ΔW"),
    ("merged_costs_nothing", latency("merged", 1.2), FAILS),
    ("adapters_slow_inference", latency("unmerged", 1.04, 128), FAILS),
    ("adapters_slow_inference", latency("merged", 1.05), HOLDS),
    ("fraction_of_the_time", step_of(0.49), HOLDS),
    ("begins_at_the_base", start_at("B zero", "start", 2.0349), FAILS),
    ("begins_at_the_base", both_random_at_the_base, FAILS),
    ("zero_is_critical", one_seed_of_a_start_at("both random", 1.0, 9.0), FAILS),
    ("both_zero_is_stuck", start_at("both zero", "gradients", {"A": 0.0, "B": 1e-30}), FAILS),
    ("both_zero_is_stuck", start_at("both zero", "gradients", {"A": 1e-30, "B": 0.0}), FAILS),
    ("both_zero_is_stuck", one_seed_of_a_start_at("both zero", 2.0, 2.0), FAILS),
    ("b_zero_beats_a_zero", one_seed_of_a_start_at("A zero", 1.0, 9.0), FAILS),
    ("b_zero_takes_larger_rates", rates_of_a_start("A zero", 1 / 64), HOLDS),
    ("any_draw_of_a", uniform_as_gaussian, HOLDS),
    ("pissa_is_better", start_at("PiSSA", "test", 1.0), HOLDS),
    ("olora_is_better", start_at("OLoRA", "test", 1.0), HOLDS),
    ("lora_ga_is_better", start_at("LoRA-GA", "test", 1.0), HOLDS),
    ("lora_ga_is_faster", there_at_once, HOLDS),
    ("principal_directions_help", start_at("PiSSA", "test", 1.0), HOLDS),
    ("learns_less", lora_at("test", 0.1), FAILS),
    (
        "learns_less",
        both(lora_at("test", 9.0), lora_at("test", 0.1, "folio", 16)),
        "holds when r is at most 4 on folio or the text is code",
    ),
    ("learns_less", both(lora_at("test", 9.0), lora_at("test", 0.1, seeds=(2,))), FAILS),
    ("forgets_less", lora_at("own_test", 9.0), FAILS),
    (
        "forgets_less",
        both(lora_at("own_test", 0.1), lora_at("own_test", 9.0, "code", seeds=(0,))),
        "holds when the text is folio",
    ),
    ("forgets_less_at_equal_loss", fronts_at(0.1, 9.0), HOLDS),
    ("has_intruders", maps_at(intruders=3, full_intruders=0), HOLDS),
    ("has_intruders", maps_at(intruders=0, full_intruders=0), FAILS),
    ("has_intruders", maps_at(intruders=3, full_intruders=1), FAILS),
    ("full_is_of_high_rank", maps_at((2,), full_effective_rank=20.0), FAILS),
    ("four_bits_save_memory", peak_of(0.5), FAILS),
    ("fewer_in_one_map", costs("llama-2-7b", 2, "maps"), FAILS),
    ("seven_billion", costs("llama-2-7b", 1.03, "total"), HOLDS),
    ("rank_16", costs("llama-2-7b", 2, "parameters"), FAILS),
    ("rank_16", costs("llama-2-7b", 0.5, "parameters"), FAILS),
    ("five_hundred_times", costs("llama-2-7b", 0.5, "parameters"), HOLDS),
    ("adapter_megabytes", costs("llama-2-7b", 2, "file", "bfloat16"), FAILS),
    ("adapter_megabytes", costs("llama-2-7b", 0.25, "file", "bfloat16"), FAILS),
    ("ten_thousand_times", costs("gpt-3", 0.25, "total"), FAILS),
    ("checkpoint", costs("gpt-3", 0.9, "total"), FAILS),
    ("checkpoint", costs("gpt-3", 1.2, "total"), FAILS),
    ("as_much_less_memory", memory_of("gpt-3", 1e-4, "LoRA", MIXED), HOLDS),
    ("a_third_of_the_memory", memory_of("gpt-3", 1.5, "LoRA", "float32"), FAILS),
    ("terabytes", memory_of("gpt-3", 0.57, "full", "bfloat16"), HOLDS),
    ("sixty_five_billion", memory_of("llama-65b", 0.99, "full", "bfloat16"), FAILS),
    ("on_one_card", memory_of("llama-2-7b", 0.85, "LoRA", *STATES), HOLDS),
    ("on_one_card", memory_of("llama-2-7b", 2.0, "LoRA", *STATES), FAILS),
    (
        "on_one_card",
        memory_of("llama-2-7b", 2.0, "LoRA", MIXED),
        "holds when the weights are in bfloat16",
    ),
    ("lora_beats_what_cannot_be_merged", method_at(9.0, *BOTH, *ROWS_BEFORE), HOLDS),
    ("lora_beats_what_cannot_be_merged", method_at(1.0, *BOTH, *ROWS_BEFORE), FAILS),
    ("lora_stays_ahead", method_at(9.0, *BOTH, *ROWS_BEFORE), HOLDS),
    ("lora_stays_ahead", method_at(1.0, "bottleneck, Houlsby", "prefix", "prompt", ranks=(4,)), FAILS),
    (
        "more_rows_hurt",
        both(falling("prefix", (2.0, 1.9, 1.8, 1.7)), falling("prompt", (2.0, 1.9, 1.8))),
        FAILS,
    ),
    (
        "more_rows_hurt",
        both(falling("prefix", (2.0, 1.9, 1.8, 1.85)), falling("prompt", (2.0, 1.9, 1.95))),
        HOLDS,
    ),
    (
        "more_rows_hurt",
        both(falling("prefix", (2.0, 1.9, 1.8, 1.85)), falling("prompt", (2.0, 1.9, 1.8))),
        "holds when it is prefix tuning",
    ),
    (
        "more_rows_hurt",
        both(
            falling("prefix", (2.0, 1.9, 1.8, 1.7)),
            falling("prompt", (2.0, 1.9, 1.8)),
            one_seed_of_a_method_at(1.0, 1.85, "prefix", 16),
        ),
        FAILS,
    ),
    ("prompts_trail", method_at(1.0, "prompt", ranks=(4,)), FAILS),
    ("prefixes_match", method_at(1.0, "prefix", ranks=(16,)), HOLDS),
    ("bottlenecks_match", method_at(1.0, "bottleneck, Houlsby", ranks=(2,)), HOLDS),
    ("norms_are_not_enough", one_seed_of_a_method_at(1.0, 9.0, "norms"), FAILS),
    ("biases_match", method_at(1.0, "biases"), HOLDS),
    ("dora_is_better", method_at(1.0, "DoRA"), HOLDS),
    ("dora_is_better", method_at(9.0, "DoRA"), FAILS),
    (
        "dora_is_better",
        both(method_at(1.0, "DoRA"), one_seed_of_a_method_at(9.0, 1.0, "DoRA", 4)),
        "holds when r is 1 or 2 or 16",
    ),
    ("dora_of_half_the_rank", method_at(1.0, "DoRA"), HOLDS),
    ("vera_needs_a_tenth", method_at(1.0, "VeRA"), HOLDS),
    ("more_than_lora", method_at(1.0, "LoRA, norms, embedding"), HOLDS),
    ("more_than_lora", one_seed_of_a_method_at(9.0, 1.0, "LoRA, norms, embedding"), FAILS),
    ("size_narrows_the_gap", left_by_width(0.1, 0.05, 0.1), FAILS),
    ("size_narrows_the_gap", one_seed_leaves_more, FAILS),
    ("size_narrows_the_gap", one_rank_left_alone(4), "holds when r is 4"),
    ("size_lowers_the_rank", enough_from(4, 4, 4), "holds when the rank is taken as a share of the width"),
    ("size_lowers_the_rank", enough_from(1, 4, 16), FAILS),
    ("size_lowers_the_rank", enough_from(16, 8, 64), FAILS),
    ("needs_rank", both(reversed_leaves(1, 0.3), reversed_leaves(64, 0.3)), FAILS),
    ("needs_rank", both(reversed_leaves(1, 0.9), reversed_leaves(64, 0.885)), FAILS),  # less than 0.02
    ("needs_rank", reversed_leaves(1, 0.0, seeds=(3,)), FAILS),
    ("on_vision_transformers", beyond_at("share", 0.0), FAILS),
    ("on_vision_transformers", beyond_at("share", 1.0), HOLDS),
    (
        "on_vision_transformers",
        both(beyond_at("share", 0.0), beyond_at("share", 1.0, ("inverted",))),
        "holds when the task is inverted",
    ),
    ("on_diffusion_models", beyond_at("share", 0.0), FAILS),
    ("four_is_most", beyond_at("share", 1.0), HOLDS),
    ("images_need_the_planted_rank", beyond_solved_from(lambda k: min(k, 2)), FAILS),
    ("images_need_the_planted_rank", beyond_solved_from(lambda k: k + 1), FAILS),
    ("images_need_the_planted_rank", beyond_solved_from(lambda k: 1), FAILS),
    ("updates_are_of_low_rank", beyond_at("spectrum", [1.0, 0.1] + 46 * [0.001], method="full"), HOLDS),
    ("bottlenecks_slow_inference", ratio_at("token", 1.04, BOTH[1]), FAILS),
    ("merged_is_free", ratio_at("forward", 2.0, "DoRA, merged"), FAILS),
    ("digits_take_hundreds", digits_at(2048), FAILS),
    ("real_model_needs_little", closes(r4=0.49), FAILS),
    ("real_model_needs_little", one_seed_closes_half, FAILS),
    ("ranks_start_alike", closes(r1=0.96, r4=1.0, r16=1.0, r64=1.0), HOLDS),
    ("ranks_start_alike", closes(r1=0.8, r4=0.85, r16=0.9, r64=1.0), FAILS),
    ("fifteen_times_the_rate", rates_over_full(r1=7.4), FAILS),
    ("fifteen_times_the_rate", rates_over_full(r64=40), FAILS),
]


@pytest.mark.parametrize(("name", "change", "verdict"), CHANGED)
def test_a_rule_comes_out_the_other_way_on_other_rows(name, change, verdict, committed):
    assert decided(name, committed)[0] != verdict
    assert decided(name, committed, change)[0] == verdict


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("one_is_enough", ranks_alike_on_one_target),
        ("four_is_most", beyond_at("share", 0.0, ("rotated",))),
        (
            "updates_are_of_low_rank",
            beyond_at("spectrum", [1.0, 0.1] + 46 * [0.001], ("5 to 9",), method="full"),
        ),
        (
            "dora_of_half_the_rank",
            both(method_at(1.0, "DoRA"), method_at(9.0, "DoRA", ranks=(2,))),
        ),
        ("negation_unlearns", unlearned("folio", "kjv")),
        ("lora_plus_helps", one_seed_of_plus_is_worse),
        ("alpha_2r_is_better", better_at_one_rank),
        ("ten_times_the_rate", one_rate_in_ten),
        ("ranks_overlap", no_gain),
        ("ranks_overlap", phi("ranks", 0.4)),
        ("ranks_overlap", overlap_but_for_one_seed),
        ("seeds_agree", phi("seeds", 0.4)),
        ("pretraining_lowers_it", both(by_pretraining(LOW, MIDDLE, 1368, HIGH), no_accuracy)),
        ("width_lowers_it", both(by_width(1368, MIDDLE, LOW), no_accuracy)),
        ("low_dimension_is_low_rank", ranks_are(0.25)),
        ("scales_lower_it", both(every_start_reaches_it_at(LOW, 0), said_at(MIDDLE))),
        ("any_draw_of_a", start_at("B zero (Gaussian A)", "test", 9.0)),
        ("any_draw_of_a", start_at("B zero (Gaussian A)", "test", 1.0)),
        ("pissa_is_better", one_seed_of_a_start_at("PiSSA", 9.0, 1.0)),
        ("olora_is_better", one_seed_of_a_start_at("OLoRA", 9.0, 1.0)),
        ("lora_ga_is_better", one_seed_of_a_start_at("LoRA-GA", 9.0, 1.0)),
        ("lora_ga_is_faster", there_at_two_thirds),
        ("principal_directions_help", one_seed_of_a_start_at("PiSSA", 9.0, 1.0)),
    ],
)
def test_a_rule_for_all_is_not_met_by_some(name, change, committed):
    assert decided(name, committed)[0] == decided(name, committed, change)[0] == FAILS


def test_every_rule_on_rows_is_tried_on_other_rows():
    assert {name for name, _, _ in CHANGED} == CLAIM.keys()


def test_the_arithmetic_is_that_of_the_dimensions(committed):
    """By hand: Llama-2-7B has 32 blocks of width 4096; GPT-3 96 of 12288, and the paper's 4.7 M at r = 1."""
    trained, of_gpt = 32 * 4 * 16 * (4096 + 4096), 96 * 2 * 2 * 12288
    total, gpt, largest = 6_738_415_616, 174_604_259_328, 65_285_660_672
    half, whole = (w * total + more * trained for w, more in ((2, 12), (4, 16)))
    less = {"float32": (16, 4, 16), MIXED: (16, 2, 16), "bfloat16": (12, 2, 12)}
    times = {state: full * gpt / (w * gpt + more * 4 * of_gpt) for state, (full, w, more) in less.items()}
    assert {name: decided(name, committed)[1] for name, claim in CLAIM.items() if claim.rows == COUNTED} == {
        "fewer_in_one_map": f"{4096**2 / (8 * 8192):g} times",
        "seven_billion": f"{4 * total / 1e9:.1f} GB",
        "rank_16": f"{trained / 1e6:.1f} million",
        "five_hundred_times": f"{total / trained:.0f} times",
        "ten_thousand_times": f"{gpt / of_gpt:,.0f} times",
        "adapter_megabytes": f"{2 * trained / 1e6:.1f} MB",  # the header is less than what is cut off
        "checkpoint": f"{gpt / (4 * of_gpt):,.0f} times, {8 * of_gpt / 1e6:.1f} MB in 16 bits",
        "as_much_less_memory": f"{16 * gpt / (2 * gpt + 16 * of_gpt):.1f} times less",
        "a_third_of_the_memory": ", ".join(f"{x:.1f} times less in {state}" for state, x in times.items()),
        "terabytes": f"{12 * gpt / 1e12:.2f} TB to {16 * gpt / 1e12:.2f} TB",
        "sixty_five_billion": f"{12 * largest / 1e9:.2f} GB to {16 * largest / 1e12:.2f} TB",
        "on_one_card": f"{whole / 1e9:.1f} GB in float32, {(half + 4 * trained) / 1e9:.1f} GB in {MIXED}, "
        f"{half / 1e9:.1f} GB in bfloat16",
    }


def test_rows_that_are_not_there_are_an_error(tmp_path):
    with pytest.raises(StorageError, match=r"rows\.jsonl"):
        claims(tmp_path)
