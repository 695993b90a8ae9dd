"""What the readings of the experiments share: which rows are measured, and numbers and texts in words."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minilora.errors import ConfigError
from minilora.experiments.reading import finals, said, spread, title

numbers = st.floats(-1e6, 1e6, allow_nan=False)
formats = st.sampled_from([".2f", "+.3f", ".4f", ".2g", "g", "+.1e", ".0%"])


@given(numbers, formats)
def test_a_number_is_said_as_its_format_says_but_for_a_zero_below_zero(x, how):
    text = f"{x:{how}}"
    zero = not set(text) & set("123456789")
    assert said(x, how) == (f"{0.0:{how}}" if zero else text)
    assert not (zero and said(x, how).startswith("-"))


@pytest.mark.parametrize("x", [math.inf, -math.inf, math.nan])
def test_what_is_no_number_is_said_as_it_is(x):
    assert said(x, ".2f") == f"{x:.2f}"


@given(st.lists(numbers, min_size=1, max_size=9), formats)
def test_a_spread_is_the_median_and_the_range(values, how):
    middle, low, high = (said(float(x), how) for x in (np.median(values), min(values), max(values)))
    whole = f"{middle} ({low} to {high})" if len(values) > 1 else middle  # one has no range
    assert spread(values, how) == spread(np.array(values), how) == whole


def test_measured_rows_are_final_and_done():
    kinds = [("search", "done"), ("final", "done"), ("final", "diverged"), ("base", "done")]
    rows = [{"config": {"kind": kind}, "status": status} for kind, status in kinds]
    assert finals(rows) == rows[1:2]
    with pytest.raises(ConfigError, match="nothing was measured"):
        finals(rows[2:])


def test_a_text_has_a_heading_that_can_be_drawn():
    assert [title(text) for text in ("folio", "shakespeare", "permuted:3")] == [
        "First Folio", "modern Shakespeare", "letter permutation, 3 swaps",
    ]  # fmt: skip
    assert title("/a/folder/my$text.txt") == "my\\$text.txt"
