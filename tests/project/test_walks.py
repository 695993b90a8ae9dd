"""However a writing command is stopped, its output is the old or the new one; the next start cleans up."""

import pytest
from walks import (
    INJURIES,
    PLACES,
    QUIET,
    ROOT,
    STREAMS,
    TEMPORARY,
    commands,
    look,
    walk_links,
    walk_streams,
    walker,
)

NAMES = [place.name for place in PLACES]


@pytest.fixture(scope="module")
def walk():
    """The Walk of a place by its name, made once."""
    made = {}
    with walker() as start:

        def walk_of(name):
            if name not in made:
                made[name] = start(PLACES[NAMES.index(name)])
            return made[name]

        yield walk_of


def test_every_command_is_walked_or_known_to_write_nothing():
    walked = {place.argv[0] for place in PLACES}
    assert walked | QUIET.keys() == set(commands())
    assert walked & QUIET.keys() == {"inspect"}


def test_the_table_of_walks_is_complete():
    lines = (ROOT / "benchmarks/results/walks.md").read_text(encoding="utf-8").splitlines()
    assert lines[2].startswith("`python tests/walks.py`: ")
    assert [line.split(" | ")[0][2:] for line in lines if line.startswith("| ")] == ["command", "---", *NAMES]


@pytest.mark.parametrize("name", QUIET)
def test_commands_that_only_read_write_nothing(name, walk):
    from dataclasses import replace

    any_walk = walk("compress")
    any_walk.fresh()
    code, said, calls = any_walk.runner.run(replace(PLACES[0], argv=QUIET[name]), any_walk.root)
    assert code == (2 if name == "serve" else 0), said
    assert bool(calls) is (name in TEMPORARY)
    assert look(any_walk.root) == any_walk.before


def some(points, count=1):
    """A few of many, the last ones among them: there names change."""
    return list(points)[-2 :: -max(len(points) // count, 1)]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_killed_command_leaves_the_old_or_the_new_output(name, walk):
    """A sample; the whole walk is below."""
    here = walk(name)
    for at in some(here.points("kill")):
        here.hurt("kill", at)


def test_an_overwrite_never_loses_the_name(walk):
    """With an exchange in one step OUT is always there; without one, at worst until the next start."""
    here = walk("compress --overwrite")
    assert {here.hurt("kill", at) for at in list(here.points("kill"))[-7:]} == {"old", "new"}
    here = walk("compress --overwrite, no exchange")
    states = [here.hurt("kill", at) for at in list(here.points("kill"))[-9:]]
    assert set(states) == {"old", "new", "absent"}
    assert states.count("absent") == 1


@pytest.mark.parametrize("name", ["extract", "sweep"])
def test_a_command_killed_during_a_write_leaves_the_old_or_the_new_output(name, walk):
    here = walk(name)
    for at in some(here.points("torn"), 4):
        here.hurt("torn", at)


@pytest.mark.parametrize("injury", INJURIES[2:])
@pytest.mark.parametrize("name", ["extract", "train", "data", "sweep"])
def test_a_stopped_or_failed_command_leaves_nothing(injury, name, walk):
    here = walk(name)
    for at in some(here.points(injury)):
        here.hurt(injury, at)


@pytest.mark.parametrize("kind", ["stdout closed", "stderr gone", "both full", "both ascii"])
def test_a_command_finishes_with_any_standard_streams(kind, walk):
    walk_streams(walk("compress"), kind)


@pytest.mark.parametrize(
    "name", ["merge", "merge by names", "data", pytest.param("train", marks=pytest.mark.slow)]
)
def test_no_link_is_followed(name, walk):
    """A link in a cache is no text that was fetched, so the cache is made anew; all others are refused."""
    assert ("replaced" if name == "data" else "refused") in {outcome for _, outcome in walk_links(walk(name))}


@pytest.mark.slow
@pytest.mark.parametrize("injury", INJURIES)
@pytest.mark.parametrize("name", NAMES)
def test_the_whole_walk(injury, name, walk):
    here = walk(name)
    for at in here.points(injury):
        here.hurt(injury, at)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_the_whole_walk_of_streams_and_links(name, walk):
    here = walk(name)
    for kind in STREAMS:
        walk_streams(here, kind)
    list(walk_links(here))
