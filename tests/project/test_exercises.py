"""A check accepts its solution, refuses wrong answers with hints that help, and tells a stub what to do."""

import ast
import json
import re

import pytest

from minilora.course.exercises import chosen, given, predicted, verdict
from notebooks import BUILD, build, run, stored, tagged

KINDS = ("# Write the line.", "# Predict, then run.", "# Change, and explain.")
ATTEMPT = """
import contextlib, io, json, sys
start, attempts = json.load(sys.stdin)
names = {}
exec(start, names)
for exercise, check in attempts:
    with contextlib.redirect_stdout(io.StringIO()) as said:
        exec(exercise, names)
        exec(check, names)
    print(json.dumps(said.getvalue()))
"""


def exercises(name):
    """For every exercise of a lesson: its function, its stub, its check."""
    nb = build.notebook(name)
    for stub, check in zip(tagged(nb, "exercise"), tagged(nb, "check"), strict=True):
        (function,) = ast.parse(stub.source).body
        yield function.name, stub.source, check.source


def solutions(name):
    """Function -> its solution, and the wrong answers, each with words that the check says to it."""
    text = (BUILD.parent / "solutions" / f"{name}.md").read_text(encoding="utf-8")
    found = {}
    for part in re.split(r"(?m)^## ", text)[1:]:
        function, _, body = part.partition("\n")
        (right,) = re.findall(r"```python\n(.*?)```", body, re.S)
        found[function] = right, re.findall(r"(?m)^- `(.+)`: (.+)$", body)
    return found


def attempt(name, attempts):
    """What the checks say to answers, given with the lesson's first cells before them and nothing else."""
    start = "\n".join(cell.source for cell in tagged(build.notebook(name), "first", "imports"))
    done = run("-c", ATTEMPT, text=json.dumps([start, attempts]))
    assert done.returncode == 0, done.stderr
    return list(map(json.loads, done.stdout.splitlines()[-len(attempts) :]))


@pytest.mark.parametrize("name", build.LESSONS)
def test_a_lesson_has_exercises_of_three_kinds_each_with_its_check_and_solution(name):
    kinds = [stub.partition("\n")[0] for _, stub, _ in exercises(name)]
    assert set(kinds) == set(KINDS)
    assert len(kinds) >= 3
    roles = [t for c in build.notebook(name).cells for t in build.tags_of(c) if t in ("exercise", "check")]
    assert roles == ["exercise", "check"] * len(kinds)
    assert list(solutions(name)) == [function for function, *_ in exercises(name)]
    links = [c for c in build.notebook(name).cells if f"](solutions/{name}.md)" in c.source]
    assert [c.source.startswith("## Exercises\n") for c in links] == [True]


@pytest.mark.parametrize("name", build.LESSONS)
def test_nothing_but_the_student_writes_the_answer(name):
    """No cell, hidden or not, defines or calls what an exercise asks for, but its stub and its check."""
    functions = {function for function, *_ in exercises(name)}
    seen = {}
    for cell in build.notebook(name, claims=True).cells:
        if cell.cell_type == "code":
            nodes = list(ast.walk(ast.parse(cell.source)))
            written = {n.name for n in nodes if isinstance(n, ast.FunctionDef)}
            named = {n.id for n in nodes if isinstance(n, ast.Name)}
            for function in functions & (written | named):
                seen.setdefault(function, []).append(build.tags_of(cell))
    assert seen == {function: [["exercise"], ["check"]] for function in functions}


@pytest.mark.parametrize("name", build.LESSONS)
def test_a_check_accepts_the_solution_and_refuses_the_stub_and_wrong_answers_with_hints(name):
    known, attempts, expected = solutions(name), [], []
    for function, stub, check in exercises(name):
        (signature,) = re.findall(r"^def .*?:(?=$|  #)", stub, re.M)
        right, wrong = known[function]
        assert len({body for body, _ in wrong}) >= 2, f"name two wrong answers to {function}"
        assert len({hint for _, hint in wrong}) >= 2, f"{function} says the same to all"
        answers = [stub, right, *(f"{signature}\n    {body}" for body, _ in wrong)]
        attempts += [[answer, check] for answer in answers]
        expected += ["write it in place of None", "", *(hint for _, hint in wrong)]
    for (answer, _), hint, said in zip(attempts, expected, attempt(name, attempts), strict=True):
        assert said.startswith("not yet: " if hint else "right: "), (answer, said)
        assert hint in said, (answer, said)
        assert len(hint.split()) != 1, f"{hint!r} is no hint"


@pytest.mark.parametrize("name", build.LESSONS)
def test_an_explanation_needs_its_letter_and_every_other_letter_is_refuted(name):
    """The right value with each letter: one is right, and the hints of the others differ."""
    for function, stub, check in exercises(name):
        if not stub.startswith(KINDS[2]):
            continue
        letters = re.findall(r"(?m)^    (\w): ", stub)
        assert letters == ["a", "b", "c"]
        right, _ = solutions(name)[function]
        (letter,) = re.findall(r', "(\w)"$', right.rstrip(), re.M)
        given = [right.replace(f', "{letter}"', f', "{other}"') for other in [*letters, "z"]]
        said = attempt(name, [[answer, check] for answer in given])
        assert [s.startswith("right: ") for s in said] == [other == letter for other in [*letters, "z"]]
        assert len(set(said)) == 4
        assert "'z' is no explanation; expected one of a, b, c" in said[3]


def test_the_hidden_defect_of_a_multiple_is_refused():
    (name,) = (name for name in build.LESSONS if "input_gradient" in solutions(name))
    (check,) = (check for function, _, check in exercises(name) if function == "input_gradient")
    line = "def input_gradient(dY, W, A, B, s): return "
    bodies = ("dY @ W * 99", "99 * (dY @ W + s * (dY @ B) @ A)", "dY @ W + s * (dY @ B) @ A")
    said = attempt(name, [[line + body, check] for body in bodies])
    assert [s.partition(":")[0] for s in said] == ["not yet", "not yet", "right"]


def test_exercises_are_committed_unsolved():
    for name in build.LESSONS:
        said = [output.text for cell in tagged(stored(name), "check") for output in cell.outputs]
        assert len(said) == len(tagged(stored(name), "check")) > 0
        assert all(text.startswith("not yet: there is no answer yet") for text in said)


# ---- what the checks share


@pytest.mark.parametrize("answer", [None, (None, None), ([1, 2], None), (None, "a")])
def test_a_stub_is_told_what_to_do(answer):
    with pytest.raises(AssertionError, match="write it in place of None"):
        given(answer)


@pytest.mark.parametrize("answer", [0, "", (1, "a"), [None], 0.0])
def test_an_answer_is_returned_as_it_is(answer):
    assert given(answer) is answer


@pytest.mark.parametrize(
    ("guess", "said"),
    [(4, None), (4.4, None), (3.6, None), (2, "half"), (1.6, "half"), (5, "other"), (-4, "other"),
     ("4", "is not a number; expected one, such as 12.5$"), (None, "in place of None"),
     (float("nan"), "half")],
)  # fmt: skip
def test_a_prediction_is_right_within_its_margin(guess, said):
    if said is None:
        predicted(guess, 4, {2: "half"}, "other", 0.5)
        return
    with pytest.raises(AssertionError, match=said):
        predicted(guess, 4, {2: "half"}, "other", 0.5)


def test_only_the_right_letter_is_accepted():
    chosen("b", "b", {"a": "no a", "c": "no c"})
    for letter, said in (("a", "no a"), ("c", "no c"), ("d", "expected one of a, b, c"), (None, "in place")):
        with pytest.raises(AssertionError, match=said):
            chosen(letter, "b", {"a": "no a", "c": "no c"})


def test_a_verdict_says_what_is_wrong_and_stops_nothing(capsys):
    def wrong():
        raise AssertionError("a hint")

    for check in (lambda: "all", wrong, lambda: 1 / 0):
        verdict(check)
    first, second, third = capsys.readouterr().out.splitlines()
    assert (first, second) == ("right: all", "not yet: a hint")
    assert third.startswith("not yet: your answer ends in ZeroDivisionError: division by zero")
    with pytest.raises(KeyboardInterrupt):
        verdict(lambda: (_ for _ in ()).throw(KeyboardInterrupt))
