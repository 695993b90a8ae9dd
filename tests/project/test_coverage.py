"""COVERAGE.md is made from its table, and every quote in it stands in the section that it names."""

import importlib.util
import re
from functools import cache

import pytest

from notebooks import BUILD, build, stored

spec = importlib.util.spec_from_file_location("statements", BUILD.with_name("statements.py"))
statements = importlib.util.module_from_spec(spec)
spec.loader.exec_module(statements)
ROWS = [row for rows in statements.SUBJECTS.values() for row in rows]
SHOWN = [row for row in ROWS if row.lesson]


@cache
def sections(lesson):
    return statements.sections(stored(statements.numbered(lesson)))


def stands(row, found):
    """Whether the section exists and says what is quoted."""
    return build.plain(row.quote) in found.get(row.section, "")


@pytest.mark.parametrize("row", SHOWN, ids=lambda row: row.statement)
def test_the_quote_stands_in_its_section(row):
    found = sections(row.lesson)
    assert row.section in found, f"sections: {', '.join(found)}"
    where = [heading for heading, text in found.items() if build.plain(row.quote) in text]
    assert stands(row, found), f"not there; it stands in {where}"


@pytest.mark.parametrize("row", SHOWN, ids=lambda row: row.statement)
def test_a_quote_with_another_number_or_place_is_missed(row):
    found = sections(row.lesson)
    if re.search(r"\d", row.quote):
        assert not stands(row._replace(quote=re.sub(r"\d(?!.*\d)", "77", row.quote)), found)
    assert not stands(row._replace(section=row.section + " not"), found)
    others = [heading for heading in found if heading != row.section]
    assert not all(stands(row._replace(section=heading), found) for heading in others)


def test_most_statements_are_shown_by_a_number_and_each_is_said_once():
    assert len({row.statement for row in ROWS}) == len(ROWS) > 50
    assert len(SHOWN) >= len(ROWS) - 5
    assert sum(bool(re.search(r"\d", row.quote)) for row in SHOWN) > 0.9 * len(SHOWN)
    for row in ROWS:
        assert bool(row.lesson) == bool(row.section) == bool(row.quote), row.statement
        assert row.lesson or not row.differs


def test_the_share_that_an_adapter_of_a_7b_model_trains_differs_from_what_is_said():
    (row,) = (row for row in ROWS if "500 to 1,000" in row.statement)
    assert "402" in row.quote
    assert "402" in row.differs


def test_the_page_is_made_from_the_table():
    page = BUILD.with_name("COVERAGE.md").read_text(encoding="utf-8")
    assert page == statements.page(), "python notebooks/statements.py"
    assert page.count("not shown yet") == len(ROWS) - len(SHOWN)
    for name in re.findall(r"\]\((\w+)\.ipynb\)", page):
        assert name in build.LESSONS
