"""The ledger: a verdict follows from the committed rows by its rule, and a rule can come out either way."""

import copy
import json
from pathlib import Path

import pytest

from minilora.claims import decided as module
from minilora.claims.claim import FAILS, HOLDS
from minilora.claims.decided import CLAIMS
from minilora.claims.ledger import LEDGER, claims
from minilora.errors import StorageError

ROOT = Path(__file__).parents[1]
CLAIM = {claim.decide.__name__: claim for claim in CLAIMS}


@pytest.fixture(scope="module")
def committed():
    """File -> its rows, as they are committed."""
    names = dict.fromkeys(claim.rows for claim in CLAIMS if claim.rows)
    return {name: module.rows_of(ROOT, name) for name in names}


def decided(name, committed, change=None):
    """The verdict of one rule on the committed rows, or on changed ones."""
    claim = CLAIM[name]
    rows = copy.deepcopy(committed.get(claim.rows, ()))
    if change:
        change(rows)
    return claim.decide(rows)


def test_the_ledger_that_ships_is_what_the_committed_rows_give():
    found = claims(ROOT)
    assert found == claims()
    assert json.loads(LEDGER.read_text(encoding="utf-8")) == found.data()


def test_the_page_shows_the_ledger(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "docs")
    from claims import page

    assert (ROOT / "docs/claims.md").read_text(encoding="utf-8") == page(claims())


def test_all_rows_of_a_file_are_read(committed):
    assert len(committed) == 5
    for name, rows in committed.items():
        lines = (ROOT / name).read_text(encoding="utf-8")
        found = lines.splitlines() if name.endswith("l") else json.loads(lines)
        assert len(rows) == len(found["rows"] if isinstance(found, dict) else found)


def test_every_claim_has_its_evidence_a_rule_in_words_and_a_sentence_of_its_own():
    assert (
        len({claim.statement for claim in CLAIMS}) == len({claim.decide for claim in CLAIMS}) == len(CLAIMS)
    )
    for claim in CLAIMS:
        assert claim.rule.startswith("Holds ")
        assert claim.rule.endswith(".")
        assert claim.statement.endswith(".")
        for path in (claim.rows, claim.figure):
            assert not path or (ROOT / path).is_file(), path
        assert bool(claim.rows) == bool(claim.figure)
    for entry in claims().entries:
        assert entry.verdict in (HOLDS, FAILS) or entry.verdict.startswith("holds when ")
        assert any(c.isdigit() for c in entry.number)


# ---- every rule comes out the other way on other rows


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


def three_is_enough(rows):
    set_all(final(rows, "permuted:4", "lora", 3), "test", 1.55)


def four_is_not_enough(rows):
    set_all(final(rows, "permuted:4", "lora", 4), "test", 1.65)


def last_doubling_hurts(rows):
    set_all(final(rows, "folio", "lora", 64), "test", 1.6)


def last_doubling_helps_most(rows):
    set_all(final(rows, "folio", "lora", 64), "test", 1.5)


def one_direction(rows):
    for row in final(rows, "folio", "full"):
        row["spectra"] = {path: [1.0] + [0.0] * (len(S) - 1) for path, S in row["spectra"].items()}


def one_rate_is_another(rows):
    for row in final(rows, "folio", "lora", 8):
        row["config"]["lr"] *= 3


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


CHANGED = [  # rule, what becomes of its rows, what it says then
    ("little_is_enough", one_seed_below_half, FAILS),
    ("as_good_as_full", all_as_full, HOLDS),
    ("as_good_as_full", all_far_from_full, FAILS),
    ("as_good_as_full", only_a_middle_rank_as_full, FAILS),
    ("one_is_enough", all_ranks_alike, HOLDS),
    ("known_rank", three_is_enough, FAILS),
    ("known_rank", four_is_not_enough, FAILS),
    ("diminishing", last_doubling_hurts, FAILS),
    ("diminishing", last_doubling_helps_most, FAILS),
    ("full_is_low", one_direction, HOLDS),
    ("ten_times_the_rate", one_rate_is_another, FAILS),
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
]


@pytest.mark.parametrize(("name", "change", "verdict"), CHANGED)
def test_a_rule_comes_out_the_other_way_on_other_rows(name, change, verdict, committed):
    assert decided(name, committed)[0] != verdict
    assert decided(name, committed, change)[0] == verdict


@pytest.mark.parametrize(
    ("name", "change"),
    [("one_is_enough", ranks_alike_on_one_target), ("negation_unlearns", unlearned("folio", "kjv"))],
)
def test_a_rule_for_all_is_not_met_by_some(name, change, committed):
    assert decided(name, committed)[0] == decided(name, committed, change)[0] == FAILS


def test_every_rule_on_rows_is_tried_on_other_rows():
    assert {name for name, _, _ in CHANGED} == {name for name, claim in CLAIM.items() if claim.rows}


def test_the_arithmetic_is_that_of_the_dimensions():
    """By hand: Llama-2-7B has 32 blocks of width 4096; GPT-3 96 of 12288, and the paper's 4.7 M at r = 1."""
    numbers = {name: claim.decide(())[1] for name, claim in CLAIM.items() if not claim.rows}
    trained = 32 * 4 * 16 * (4096 + 4096)
    total = 6_738_415_616
    assert numbers == {
        "fewer_in_one_map": f"{4096**2 / (8 * 8192):g} times",
        "seven_billion": f"{4 * total / 1e9:.1f} GB",
        "rank_16": f"{trained / 1e6:.1f} million",
        "five_hundred_times": f"{total / trained:.0f} times",
        "ten_thousand_times": f"{174_604_259_328 / (96 * 2 * 2 * 12288):,.0f} times",
        "adapter_megabytes": f"{2 * trained / 1e6:.1f} MB",
    }


def test_rows_that_are_not_there_are_an_error(tmp_path):
    with pytest.raises(StorageError, match=r"rows\.jsonl"):
        claims(tmp_path)
