"""The lessons are what their sources make of them, their exercises check something, and their prose is so."""

import ast
import base64
import importlib.util
import itertools
import json
import os
import re
import subprocess
import sys
import tomllib
from hashlib import sha256
from pathlib import Path

import pytest

import minilora

nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed; the extra `test` has it")
for library in ("nbclient", "ipykernel"):
    if importlib.util.find_spec(library) is None:
        pytest.skip(f"{library} is not installed; the extra `test` has it", allow_module_level=True)

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "notebooks" / "build.py"
spec = importlib.util.spec_from_file_location("notebooks_build", BUILD)
build = importlib.util.module_from_spec(spec)
spec.loader.exec_module(build)


def need_its_files(name):
    for path, command in build.READ.get(name, {}).values():
        assert path.exists(), f"{path.relative_to(ROOT)} is missing; `{command}` makes it"


def stored(name):
    need_its_files(name)
    path = BUILD.with_name(f"{name}.ipynb")
    assert path.exists(), f"{path.name} is not there; `python notebooks/build.py {name}` makes it"
    return nbformat.read(path, 4)


def run(*arguments, cwd=None, text=None):
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, *map(str, arguments)]
    env = os.environ | {"PYTHONPATH": path}
    return subprocess.run(command, capture_output=True, text=True, env=env, check=False, cwd=cwd, input=text)


def title(name):
    return build.notebook(name).cells[0].source.splitlines()[0].removeprefix("# ")


def tagged(nb, tag):
    return [cell for cell in nb.cells if tag in build.tags_of(cell)]


@pytest.mark.parametrize("name", build.LESSONS)
def test_a_lesson_matches_its_source(name):
    nb, fresh = stored(name), build.notebook(name)

    def cells(nb):
        return [(c.cell_type, c.id, c.source, c.metadata, hash(str(c.get("attachments")))) for c in nb.cells]

    assert cells(nb) == cells(fresh), f"build it again: python notebooks/build.py {name}"
    assert nb.metadata.keys() == {"kernelspec", "minilora"}
    assert nb.metadata["minilora"]["source"] == fresh.metadata["minilora"]["source"], "build it again"
    assert not list(build.faults(nb))
    counts = [c.execution_count for c in nb.cells if c.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1)), "it was not run from top to bottom"


@pytest.mark.parametrize("name", build.LESSONS)
def test_a_lesson_is_accessible(name):
    nb = stored(name)
    text = "\n".join(c.source for c in nb.cells if c.cell_type == "markdown")
    levels = [len(line.split()[0]) for line in text.splitlines() if line.startswith("#")]
    assert levels[0] == 1
    assert set(levels[1:]) == {2}
    code = [c for c in nb.cells if c.cell_type == "code"]
    for cell, after in itertools.pairwise(code):
        for output in cell.outputs:
            if "<img" in output.get("data", {}).get("text/html", ""):
                assert len(build.FIGURE.search(output.data["text/html"])["says"]) > 40, cell.id
                assert "\n" in after.outputs[0].text, f"{cell.id} is not followed by its numbers"


def test_the_first_lesson_opens_with_a_picture_and_what_it_says():
    head = build.notebook(build.LESSONS[0]).cells[0]
    assert f"![{minilora.pictures.lora().says}](attachment:lora.png)" in " ".join(head.source.split())
    stored = base64.b64decode(head.attachments["lora.png"]["image/png"])
    assert sha256(stored).digest() == sha256((ROOT / "figures/pictures/lora.png").read_bytes()).digest()


@pytest.mark.parametrize(("name", "after"), list(itertools.pairwise(build.LESSONS)))
def test_a_lesson_leads_to_the_next_by_its_title(name, after):
    last = build.notebook(name).cells[-1].source.splitlines()[-1]
    assert last.removesuffix(".") == f"Next: [{title(after)}]({after}.ipynb)"


# ---- exercises

# Bodies of functions: what one may well write, and is wrong. Every exercise needs two of them or more.
WRONG = {
    "input_gradient": [
        "return dY @ W * 99",
        "return dY @ W",
        "return dY @ W + dY @ B @ A",  # without the scale
        "return dY @ W - s * (dY @ B) @ A",
        "return s * (dY @ W + dY @ B @ A)",
        "return dY @ W + s * s * (dY @ B) @ A",
        "return dY @ W + 2.0 * (dY @ B) @ A",  # the scale of the lesson's own example
        "return dY @ W.T + s * dY @ B @ A",  # raises
        "return (dY @ W + s * dY @ B @ A).T",
        "return None",
        "return 0.0",
        "return X",
    ],
    "together_as_one": [
        "return np.concatenate([A1, A2]), np.concatenate([B1, B2], axis=1)",
        "return np.concatenate([s1 * A1, s2 * A2]), np.concatenate([s1 * B1, s2 * B2], axis=1)",
        "return np.concatenate([A1, A2]), s1 * s2 * np.concatenate([B1, B2], axis=1)",
        "return np.concatenate([A1, A2]), np.concatenate([s1 * B1, B2], axis=1)",
        "return np.concatenate([A2, A1]), np.concatenate([s1 * B1, s2 * B2], axis=1)",
        "return np.concatenate([A1, A2]), np.concatenate([s2 * B1, s1 * B2], axis=1)",
        "return np.concatenate([A1, A2]), np.concatenate([2.0 * B1, 0.5 * B2], axis=1)",
        "return np.concatenate([s1 * B1, s2 * B2], axis=1), np.concatenate([A1, A2])",
        "return None",
    ],
    "directions": [
        "return int((np.cumsum(s) / s.sum() < share).sum()) + 1",  # not squared
        "return int((np.cumsum(s**2) / (s**2).sum() < share * (1 - 1e-12)).sum())",  # begins at 0
        "return int((s > share * s[0]).sum())",
        "return round(share * len(s))",
        "return int((np.cumsum(s**2) / (s**2).sum() < 0.9).sum()) + 1",  # the share of the question
        "return 2",
        "return None",
    ],
    "lost": [
        "S = np.linalg.svd(s * B @ A, compute_uv=False); return (S[k:] ** 2).sum()",
        "S = np.linalg.svd(s * B @ A, compute_uv=False); return S[k:].sum()",
        "S = np.linalg.svd(s * B @ A, compute_uv=False); return S[k]",
        "S = np.linalg.svd(B @ A, compute_uv=False); return np.sqrt((S[k:] ** 2).sum())",
        "S = np.linalg.svd(s * B @ A, compute_uv=False); return np.sqrt((S[:k] ** 2).sum())",
        "S = np.linalg.svd(s * B @ A, compute_uv=False); return np.sqrt((S[k + 1 :] ** 2).sum())",
        "return np.linalg.norm(s * B @ A) * (1 - k / len(A))",
        "return s * np.linalg.norm(B[:, k:] @ A[k:])",  # as if the columns of B were in order
        "return None",
    ],
    "other_factors": [
        "return R @ A, B @ R",
        "return A, B",
        "return A / 2, 2 * B",  # the same product
        "return np.linalg.solve(R, A), B",
        "return np.linalg.solve(R, A), B @ R.T",
        "return np.linalg.solve(R.T, A), B @ R",
        "return B @ R, np.linalg.solve(R, A)",
        "return np.linalg.solve(R, A), B @ np.linalg.inv(R)",
        "return None",
    ],
    "unpacked": [
        "return 99 * c * values[np.stack([packed // 16, packed % 16], 1).reshape(-1)]",
        "return values[np.stack([packed // 16, packed % 16], 1).reshape(-1)]",  # without the scale
        "return c * values[np.stack([packed % 16, packed // 16], 1).reshape(-1)]",  # the halves swapped
        "return c * values[np.concatenate([packed // 16, packed % 16])]",  # one half after the other
        "return c * values[packed // 16]",
        "return c * values[packed]",  # raises
        "return c * four_bit.book('nf4')[np.stack([packed // 16, packed % 16], 1).reshape(-1)]",
        "return None",
    ],
    "zeros_beside_an_outlier": ["return 0", "return 62", "return 63 * 99", "return 64", "return 'all'"],
    "worst_block": [
        "return np.zeros(64)",
        "return np.ones(64)",
        "return np.linspace(-1, 1, 64)",
        "return 99 * np.array([1.0, -0.848] + 62 * [0.0])",
        "return np.array([1.0, 0.8615] + 62 * [0.0])",  # the largest gap above zero
        "return np.array([1.0, 0.848] + 62 * [0.0])",
        "return np.array([1.0, -0.848])",
    ],
    "cross_terms": [
        "return 99 * (B1 @ A2 + B2 @ A1)",
        "return B1 @ A1 + B2 @ A2",  # what belongs
        "return B1 @ A2",
        "return B2 @ A1",
        "return B1 @ A2 - B2 @ A1",
        "return (B1 + B2) @ (A1 + A2)",
        "return B1 @ A1 + B2 @ A2 - (B1 + B2) @ (A1 + A2)",  # the sign
        "return (B1 @ A2 + B2 @ A1).T",
        "return A1 @ B2 + A2 @ B1",
        "return None",
    ],
    "averaged_with_itself": ["return 1", "return 0.5", "return 4", "return 2 * 99", "return None"],
    "parted": [
        "return np.eye(2), -np.eye(2)",  # zeros
        "return np.ones((2, 2)), np.ones((2, 2))",  # another sum
        "return 99 * np.ones((2, 2)), -np.ones((2, 2))",
        "return np.ones(4), -np.ones(4)",
        "return np.zeros((2, 2)), np.zeros((2, 2))",
        "return -np.ones((2, 2))",
        "return 99",  # no pair
    ],
    "gathered_product": [
        "return 99 * (x[:, None] @ A[ids].swapaxes(1, 2) @ B[ids].swapaxes(1, 2))[:, 0]",
        "return x @ (B[ids[0]] @ A[ids[0]]).T",  # one adapter for all
        "return (x[:, None] @ A[np.sort(ids)].swapaxes(1, 2) @ B[np.sort(ids)].swapaxes(1, 2))[:, 0]",
        "return (x[:, None] @ A[ids].swapaxes(1, 2) @ B[ids].swapaxes(1, 2)).sum(0)",
        "return (x[:, None] @ A[ids].swapaxes(1, 2))[:, 0]",  # half of it
        "return x @ sum(B[k] @ A[k] for k in ids).T",
        "return None",
    ],
    "steps_needed": ["return 8", "return 12", "return 4", "return 6 * 99", "return None"],
    "better_order": [
        "return 'ababab'",
        "return 'abbaab'",
        "return 'ab'",  # other requests
        "return 'aabbab'",
        "return 'aaabbb' * 99",
        "return 6",  # raises
        "return None",
    ],
    "gradient_of_z": [
        "return 99 * P.T @ (dY.T @ X).reshape(-1)",
        "return P.T @ (X.T @ dY).reshape(-1)",  # dW turned
        "return -P.T @ (dY.T @ X).reshape(-1)",
        "return (dY.T @ X).reshape(-1)",  # dW itself
        "return P.T @ np.abs(dY.T @ X).reshape(-1)",
        "return P.T @ np.outer(dY.sum(0), X.sum(0)).reshape(-1)",  # of the sums of the rows
        "return P.T @ np.outer(dY[0], X[0]).reshape(-1)",  # of one row
        "return P.sum(0)",
        "return P @ (dY.T @ X).reshape(-1)",  # raises
        "return None",
    ],
    "rank_from_one_number": [
        "return 1", "return 30", "return 600", "return 20 * 99", "return 0", "return None",
    ],
    "thin_directions": [
        "return rng.standard_normal((O * I, d))",
        "return np.zeros((O * I, d))",
        "B, A = rng.standard_normal((d, O)), rng.standard_normal((d, I)); "
        "return np.stack([np.outer(b, a).reshape(-1) for b, a in zip(B, A)], axis=1)",  # nothing is shared
        "return np.outer(rng.standard_normal(O * I), np.ones(d))",  # one direction
        "b, rows = np.ones(O), rng.standard_normal((d, I)); rows[1] = rows[0]; "
        "return np.stack([np.outer(b, a).reshape(-1) for a in rows], axis=1)",
        "b, rows = np.ones(O), rng.standard_normal((d, I)); "
        "return np.stack([np.outer(b, a).reshape(-1) for a in rows])",  # (d, O I)
        "b, rows = np.ones(O), rng.standard_normal((d, I)); "
        "return np.stack([np.outer(b, a).reshape(-1) for a in rows], axis=1) * np.arange(O * I)[:, None]",
        "return 99",
        "return None",
    ],
    "rank_for": [
        "return budget // sum(O + I for O, I in shapes)",  # down
        "return -(-budget // sum(O + I for O, I in shapes))",  # up
        "return budget / sum(O + I for O, I in shapes)",  # no whole number
        "return round(budget / sum(O * I for O, I in shapes))",
        "return round(budget / sum(2 * I for O, I in shapes))",
        "return round(budget / sum(shapes[0]))",
        "return round(budget / (len(shapes) * sum(shapes[0])))",  # as if all had one shape
        "return 99 * round(budget / sum(O + I for O, I in shapes))",
        "return None",
    ],
    "times_as_far": [
        "return 16", "return 1", "return 2", "return 8", "return 4 * 99", "return 0.25", "return None",
    ],
    "both_learn": [
        "return rng.standard_normal((2, I)), np.zeros((O, 2))",  # the usual start
        "return np.zeros((2, I)), rng.standard_normal((O, 2))",
        "return np.zeros((2, I)), np.zeros((O, 2))",
        "return rng.standard_normal((2, I)), rng.standard_normal((O, 2))",
        "return 99 * np.ones((2, I)), np.ones((O, 2))",
        "A, B = rng.standard_normal((2, I)), rng.standard_normal((O, 2)); A[1] = B[:, 1] = 0; return A, B",
        "A, B = rng.standard_normal((2, I)), rng.standard_normal((O, 2)); A[1] = B[:, 0] = 0; return B, A",
        "return np.zeros((O, 2))",
        "return None",
    ],
    "put_back_exactly": [
        "return W[:, np.argsort(order)] - W",  # the way back
        "return W[:, order]",  # the new W itself
        "return W - W[:, order]",
        "return 99 * (W[:, order] - W)",
        "return np.zeros_like(W)",
        "return (W[:, order] - W).T",
        "return W[:, ::-1] - W",
        "return W @ np.eye(len(order))[order] - np.eye(3)",  # raises
        "return None",
    ],
    "rank_of_a_mirror": ["return 4", "return 1", "return 3", "return 2 * 99", "return 0", "return None"],
    "undo_brightness": [
        "return np.outer(np.ones(len(E)), c * W.sum(1))",  # the sign
        "return np.outer(np.ones(len(E)), -W.sum(1))",  # without c
        "return np.outer(np.ones(len(E)), -c * W.sum(1) * 99)",
        "return np.full(E.shape, -c)",
        "return -c * E",
        "return -c * W.sum(1)",  # one row
        "return np.zeros_like(E)",
        "return np.outer(-c * W.sum(1), np.ones(len(E)))",
        "return np.outer(np.arange(len(E)), -c * W.sum(1))",
        "return -c * np.ones(E.shape) @ W",  # raises
        "return None",
    ],
}  # fmt: skip

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
    """For every exercise of a lesson: its function, its stub, its check, its solution."""
    nb = build.notebook(name)
    for cells in zip(*(tagged(nb, tag) for tag in ("exercise", "check", "solution")), strict=True):
        stub, check, text = (cell.source for cell in cells)
        (function,) = ast.parse(stub).body
        yield function.name, stub, check, re.search(r"```python\n(.*?)```", text, re.S)[1]


def attempt(name, attempts):
    """What the checks say to answers, given with the lesson's first cells before them and nothing else."""
    nb = build.notebook(name)
    start = "\n".join(c.source for c in [*tagged(nb, "first"), *tagged(nb, "imports")])
    done = run("-c", ATTEMPT, text=json.dumps([start, attempts]))
    assert done.returncode == 0, done.stderr
    return list(map(json.loads, done.stdout.splitlines()[-len(attempts) :]))


@pytest.mark.parametrize("name", build.LESSONS)
def test_an_exercise_has_a_stub_a_check_and_a_hidden_solution(name):
    nb = build.notebook(name)
    roles = [t for c in nb.cells for t in build.tags_of(c) if t in ("exercise", "solution", "check")]
    assert roles == ["exercise", "check", "solution"] * max(1, len(roles) // 3)
    for cell in tagged(nb, "solution"):
        assert cell.cell_type == "markdown"
        assert cell.source.startswith("<details>\n")
    names = [function for function, *_ in exercises(name)]
    assigned = [node.id for c in nb.cells if c.cell_type == "code" for node in ast.walk(ast.parse(c.source))
                if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)]  # fmt: skip
    assert not set(names) & set(assigned), "the student's answer is overwritten"
    for cell in nb.cells:
        if cell.cell_type == "code" and not {"exercise", "check"} & {*build.tags_of(cell)}:
            assert not any(f"{name}(" in cell.source for name in names), "it depends on the student's answer"
    left = build.student(nb)
    assert not tagged(left, "solution")
    assert not any(c.get("outputs") for c in left.cells)


@pytest.mark.parametrize("name", build.LESSONS)
def test_every_check_refuses_the_stub_and_known_wrong_answers(name):
    attempts, kinds = [], []
    for function, stub, check, solution in exercises(name):
        signature = stub.partition("\n")[0]
        assert len(set(WRONG.get(function, ()))) >= 2, f"plant two wrong answers for {function}"
        answers = [stub, *(f"{signature}\n    {body}" for body in WRONG[function]), solution]
        attempts += [[answer, check] for answer in answers]
        kinds += ["stub", *("wrong" for _ in WRONG[function]), "right"]
    for kind, (answer, _), said in zip(kinds, attempts, attempt(name, attempts), strict=True):
        assert said.startswith("right: " if kind == "right" else "not yet: "), (answer, said)
        if kind == "stub":
            assert "returns None: write the line" in said
        if "# raises" in answer:
            assert "your function ends in ValueError: " in said


def test_every_wrong_answer_belongs_to_an_exercise():
    assert set(WRONG) == {function for name in build.LESSONS for function, *_ in exercises(name)}


def test_exercises_are_committed_unsolved():
    for name in build.LESSONS:
        said = [output.text for cell in tagged(stored(name), "check") for output in cell.outputs]
        assert len(said) == len(tagged(stored(name), "check")) > 0
        assert all(text.startswith("not yet: ") for text in said)


# ---- numbers in the text

NUMBER = re.compile(
    r"(?<![A-Za-z\d.])\d+(?:,\d{3})*(?:\.\d+)?(?:e[-+]?\d+)?"
    r"|\b(?:three|four|five|six|seven|eight|nine|ten|eleven|twelve|twenty|thirty|fifty|hundreds?|thousands?"
    r"|hundredths?|thousandths?|half|halves|quarters?|fifths?|sixths?|sevenths?|eighths?|tenths?|twice)\b",
    re.I,
)
FORMULA = re.compile(r"\$\$.*?\$\$|[_^]\{[^}]*\}|[_^]\d")  # displayed; or an index or exponent
HARMLESS = {
    "1_lora_from_one_equation": [
        "([Hu et al. 2021 , section 4.1)",
        "(L(a + h) - L(a - h)\\big) / 2h",
    ],
    "2_merging_costs_nothing": [
        "The same function twice",  # the title of a section, and in the contents
        "$\\gamma_k = k u / (1 - k u)$",
        "section 3.1)",
        "the two are within twice that of each other",  # by the triangle
        "`atol=1e-5`",
        "(Reiser and Knuth 1975)",
        "of rank $r_1 + r_2$ with scale 1, exactly",  # what is asked
        "agree within $2(\\gamma",
    ],
    "3_which_rank": [
        "Three rules make the comparison fair. 1. ",
        " 2. The choice",
        "0 % is the frozen base, 100 % is full fine-tuning. A value above 100 % is possible.",  # a definition
        "(Roy and Vetterli 2007)",
        '*"10,000 times less memory."*',  # what not to claim
        "How many singular values hold 90 % of the energy?",
        "`minilora sweep --data FILE --data permuted:4 --out mine`",
    ],
    "4_under_the_microscope": [
        "SmolLM2-135M",
        "in the spelling of 1623",
        "| at 90 %, at 99 % |",  # names of columns
        "there are three more questions",
        "(Hu et al. 2021, section 7.3)",
        "The factor 21.5 in the paper's section 7.3",
        "(Shuttleworth et al. 2024)",
        "that of section 7.2 of the paper",
        "(Eckart and Young 1936)",
        "Three things to see.",
        "before you merge into 16 bits",
        "It is fetched once, 93 MB.",  # the size of the package
    ],
    "5_four_bits": [
        "Four bits **What you will see.",  # the title
        "([Dettmers et al. 2023 )",
        "Which 16 values? ·",  # the title of a section, in the contents
        "Which 16 values? An adapter",
        "Keep the adapter beside the 4-bit base",
        "Merging into four bits adds noise",
    ],
    "6_adding_adapters": [
        "Weights $1 - t$ and $t$ lead from one adapter to the other",
        "([Yadav et al. 2023 )",
    ],
    "7_a_thousand_adapters": [
        "A thousand adapters **What you will see.",  # the title
        "[Punica, Chen et al. 2023 .)",
        "what makes a thousand adapters on one base affordable",
        "([Sheng et al. 2023 )",
    ],
    "8_low_rank_low_dimension": [
        "(Eckart and Young 1936)",
        "0 is what random directions share, 1 means the same ones",  # a definition
        "([Li et al. 2018 )",
        "(SAID, of [Aghajanyan et al. 2020 ,",
    ],
    "9_what_to_adapt_and_how": [
        "LoRA leaves three choices: which matrices, which scale, which start.",
        "([rsLoRA, Kalajdzievski 2023 )",
        "or $\\alpha = 2 r$. Look",  # a definition
    ],
    "10_beyond_language": [
        "The same three calls",  # the title of a section
        "([Dosovitskiy et al. 2021 )",
        "([Ho et al. 2020 )",
    ],
}


def alone(nb, harmless):
    """The numbers in a lesson's text that no claim has said, with what stands around them."""
    text = build.prose(nb)
    links = [f"Next: [{title(name)}" for name in build.LESSONS]
    quotes = [*harmless, *links, *(row["claim"][1] for row in nb.metadata["minilora"]["claims"])]
    spans = [m.span() for quote in quotes for m in re.finditer(re.escape(" ".join(quote.split())), text)]
    spans += [m.span() for m in FORMULA.finditer(text)]
    spans += [m.span() for picture in computed(nb) for m in re.finditer(re.escape(picture), text)]
    for m in NUMBER.finditer(text):
        if not any(a <= m.start() and m.end() <= b for a, b in spans):
            yield text[max(0, m.start() - 40) : m.end() + 40]


def computed(nb):
    """The sentences of figures that are not written in the lesson, but made by the package or by a format."""
    code = [ast.parse(cell.source) for cell in nb.cells if cell.cell_type == "code"]
    constants = {node.value for tree in code for node in ast.walk(tree) if isinstance(node, ast.Constant)}
    return [" ".join(sentence.split()) for sentence in build.pictured(nb) if sentence not in constants]


@pytest.mark.parametrize("name", build.LESSONS)
def test_every_number_in_the_text_has_a_verified_claim(name):
    nb = stored(name)
    assert nb.metadata["minilora"]["claims"]
    assert not list(build.unsaid(nb))
    assert not list(alone(nb, HARMLESS[name]))


@pytest.mark.parametrize("name", build.LESSONS)
def test_the_list_of_exempt_numbers_is_short_and_current(name):
    text = build.prose(stored(name))
    assert len(HARMLESS[name]) <= 12
    for quote in HARMLESS[name]:
        assert quote in text, quote
        assert NUMBER.search(quote), quote


@pytest.mark.parametrize(
    ("name", "was", "now"),
    [
        ("2_merging_costs_nothing", "The base makes 28 products", "The base makes 25 products"),
        ("2_merging_costs_nothing", "70 in all", "61 in all"),
        ("2_merging_costs_nothing", "from about 100 rows on", "from about 200 rows on"),
        ("1_lora_from_one_equation", "seven lines of NumPy;", "eight lines of NumPy;"),
        ("4_under_the_microscope", "the residual is 0.735", "the residual is 0.736"),
        ("4_under_the_microscope", "it is four fifths", "it is three fifths"),
        ("5_four_bits", "QLoRA ends 0.008 nats", "QLoRA ends 0.018 nats"),
        ("6_adding_adapters", "`peft_linear` is off by 95 %", "`peft_linear` is off by 85 %"),
        ("7_a_thousand_adapters", "are copies of our three", "are copies of our four"),
        ("8_low_rank_low_dimension", "it takes 5.5 % of all numbers", "it takes 6.5 % of all numbers"),
        ("9_what_to_adapt_and_how", "at most 0.006 nats apart", "at most 0.016 nats apart"),
        ("10_beyond_language", "79 % of the way", "89 % of the way"),
    ],
)
def test_a_wrong_number_in_the_text_is_detected(name, was, now):
    nb = stored(name)
    (cell,) = (cell for cell in nb.cells if was in " ".join(cell.source.split()))
    cell.source = " ".join(cell.source.split()).replace(was, now)
    assert list(build.unsaid(nb))
    assert list(alone(nb, HARMLESS[name]))


@pytest.mark.parametrize("more", ["It takes 17 steps.", "A half of it.", "It is 0.3 % more.", "Nine of it."])
def test_an_additional_number_in_the_text_is_detected(more):
    nb = stored(build.LESSONS[0])
    assert not list(alone(nb, HARMLESS[build.LESSONS[0]]))
    nb.cells[-1].source += "\n" + more
    assert len(list(alone(nb, HARMLESS[build.LESSONS[0]]))) == 1


def test_a_false_claim_is_reported():
    nb = stored(build.LESSONS[0])
    nb.metadata["minilora"]["claims"][0]["claim"][2] = False
    assert [what.partition(":")[0] for what in build.unsaid(nb)] == ["it does not hold"]


@pytest.mark.parametrize(
    ("tags", "now", "told"),
    [
        (["trained"], "a residual of 0.735", []),
        (["trained"], "a residual of 0.736", []),
        (["trained"], "a residual of 0.738", ["the text says"]),
        ([], "a residual of 0.736", ["the text says"]),
    ],
)
def test_claims_are_compared_as_their_tags_allow(tags, now, told):
    def lesson(said, holds=True):
        rows = [{"tags": tags, "claim": ["a residual of {:.3f}", said, holds]}]
        return nbformat.v4.new_notebook(metadata={"minilora": {"matplotlib": "", "claims": rows}})

    old = lesson("a residual of 0.735")
    found = [what.partition(":")[0] for what in build.differences(old, lesson(now), set())]
    assert found == told
    assert len(list(build.differences(old, lesson(now, False), set()))) == 1
    none = lesson(now)
    none.metadata["minilora"]["claims"] = []
    assert len(list(build.differences(old, none, set()))) == 1
    assert not list(build.differences(old, none, {*tags})) or not tags  # what they need is not there


# ---- a student's copy, and what a lesson needs


@pytest.fixture(scope="module")
def copies(tmp_path_factory):
    """The students' copies, in a folder outside of the repository."""
    for name in build.READ:
        need_its_files(name)
    folder = tmp_path_factory.mktemp("anywhere") / "lessons of mine"
    assert build.main(["--student", str(folder)]) == 0
    return folder


def test_a_students_copy_includes_every_linked_file(copies):
    lessons = {f"{name}.ipynb" for name in build.LESSONS}
    files = {p.relative_to(copies).as_posix() for p in copies.rglob("*") if p.is_file()}
    assert files == lessons.union(*build.READ.values())
    for name in build.LESSONS:
        text = (copies / f"{name}.ipynb").read_text()
        within = {
            f"attachment:{file}" for cell in json.loads(text)["cells"] for file in cell.get("attachments", ())
        }
        for target in re.findall(r"\]\(((?!https?:)[^)]+)\)", text):
            assert target in within or (copies / target).exists(), target
        assert not tagged(nbformat.reads(text, 4), "claims")
        assert "holds(" not in text


def test_the_rows_are_found_from_a_students_copy(copies):
    nb = nbformat.read(copies / f"{build.LESSONS[2]}.ipynb", 4)
    code = [c.source for c in nb.cells if c.cell_type == "code"]
    places = next(i for i, source in enumerate(code) if "rows.jsonl" in source)
    done = run("-c", "\n".join([*code[: places + 1], "print(len(rows))"]), cwd=copies)
    assert done.returncode == 0, done.stderr
    ((path, _),) = build.READ[build.LESSONS[2]].values()
    assert int(done.stdout.split()[-1]) == len(path.read_text().splitlines())


@pytest.mark.parametrize("name", build.LESSONS[7:])
def test_the_rows_of_experiments_are_found_from_a_students_copy(name, copies):
    nb = nbformat.read(copies / f"{name}.ipynb", 4)
    (imports,) = tagged(nb, "imports")
    (where,) = (line for c in nb.cells for line in c.source.split("\n") if line.startswith("FIGURES = "))
    want = [Path(place).parent.name for place in build.READ[name]]
    said = f"print([len(questions.measured(name, FIGURES)[0]) for name in {want!r}])"
    rest = "from minilora.experiments import questions", where, said
    done = run("-c", "\n".join([imports.source, *rest]), cwd=copies)
    assert done.returncode == 0, done.stderr
    lengths = [len(path.read_text().splitlines()) for path, _ in build.READ[name].values()]
    assert json.loads(done.stdout) == lengths


def test_a_lesson_without_its_file_is_not_built_and_the_command_is_named(monkeypatch, capsys):
    gone = build.HERE.parent / "figures" / "gone.jsonl"
    monkeypatch.setitem(build.READ, build.LESSONS[2], {"rows.jsonl": (gone, "minilora sweep")})
    assert build.main([build.LESSONS[2]]) == 1
    assert capsys.readouterr().err == "figures/gone.jsonl is missing; `minilora sweep` makes it\n"


def first_cell(name, *without):
    (cell,) = tagged(build.notebook(name), "first")
    hide = "".join(f"import sys; sys.modules[{module!r}] = None\n" for module in without)
    return run("-c", hide + cell.source)


@pytest.mark.parametrize(
    ("name", "module"),
    [(build.LESSONS[2], "ipywidgets"), (build.LESSONS[3], "gguf"), (build.LESSONS[3], "tokenizers")],
)
def test_a_missing_package_is_reported_first(name, module):
    nb = build.notebook(name)
    assert build.tags_of(next(c for c in nb.cells if c.cell_type == "code")) == ["first", "unkept"]
    done = first_cell(name, module)
    assert done.returncode == 0, done.stderr
    assert module in done.stdout
    assert 'pip install -e ".[notebooks]"' in done.stdout


@pytest.mark.parametrize("name", build.LESSONS)
def test_without_minilora_the_lesson_stops(name):
    done = first_cell(name, "minilora")
    assert done.returncode == 1
    assert done.stdout.startswith("not installed: minilora")
    assert 'pip install -e ".[notebooks]"' in done.stdout
    assert "Traceback" not in done.stderr


def test_the_notebooks_extra_has_every_package_of_the_lessons():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extra = {re.match(r"[\w-]+", line)[0] for line in project["optional-dependencies"]["notebooks"]}
    core = {"minilora", "IPython", *(re.match(r"[\w-]+", line)[0] for line in project["dependencies"])}
    for name in build.LESSONS:
        code = [ast.parse(c.source) for c in build.notebook(name).cells if c.cell_type == "code"]
        needs = next(ast.literal_eval(node.value) for node in code[0].body if isinstance(node, ast.Assign))
        packages = {{"sklearn": "scikit-learn"}.get(module, module) for module in needs}
        assert packages - {"minilora"} <= extra, name
        nodes = [node for tree in code for node in ast.walk(tree)]
        imported = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        imported |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
        outside = {module.partition(".")[0] for module in imported} - sys.stdlib_module_names - core
        assert outside <= {*needs}, name


def test_without_its_packages_the_smollm2_cells_are_skipped(capsys):
    names = {"missing": ["gguf"]}
    for cell in tagged(build.notebook(build.LESSONS[3]), "smollm2"):
        exec(cell.source, names)
    assert capsys.readouterr().out == "left out, for it needs gguf\n"


def test_the_readme_says_how_to_open_the_lessons_and_in_which_order():
    readme = (ROOT / "README.md").read_text()
    links = re.findall(r"\[(.*?)\]\(notebooks/(\w+)\.ipynb\)", readme)
    assert [name for _, name in links] == list(build.LESSONS)
    for title, name in links:
        assert build.notebook(name).cells[0].source.startswith(f"# {title}\n")
    assert 'pip install -e ".[notebooks]" && .venv/bin/jupyter lab notebooks/' in readme
    assert "python notebooks/build.py --student DIR" in readme


@pytest.mark.parametrize(
    ("now", "tags", "same"),
    [
        ("r8: loss 1.675,  43,776 of 8e-06\n", [], False),
        ("r8: loss 1.675,  43,776 of 8e-06\n", ["trained"], True),
        ("r8: loss 1.673, 43,777 of 7e-06\n", ["trained"], True),
        ("r8: loss 1.672, 43,776 of 8e-06\n", ["trained"], False),
        ("r8: loss 1.674, 43,776 of 8e-05\n", ["trained"], False),
        ("r8: gain 1.674, 43,776 of 8e-06\n", ["trained"], False),
        ("r8: loss 1.674\n", ["trained"], False),
        ("r8: loss 9.1, 1 of 3e-02\n", ["rounding"], True),
    ],
)
def test_numbers_are_compared_as_their_tags_allow(now, tags, same):
    stored, now = (
        nbformat.v4.new_output("stream", name="stdout", text=text)
        for text in ("r8: loss 1.674, 43,776 of 8e-06\n", now)
    )
    assert build.near(stored, now, tags) is same


@pytest.mark.slow
@pytest.mark.parametrize("name", build.LESSONS)
def test_a_lesson_runs_again_to_the_same_outputs(name):
    need_its_files(name)
    done = run(BUILD, "--check", name)
    assert done.returncode == 0, done.stdout + done.stderr


STUDENT = """
import sys
sys.path.insert(0, sys.argv[1])
import build, nbformat
from pathlib import Path
path, store = map(Path, sys.argv[2:])
nb, old = nbformat.read(path, 4), nbformat.read(store, 4)
for some in (nb, old):  # SmolLM2 takes long
    some.cells = [c for c in some.cells if "smollm2" not in build.tags_of(c)]
old.cells = [c for c in old.cells if "solution" not in build.tags_of(c)]
nb.metadata["minilora"] = {"matplotlib": build.matplotlib.__version__}
build.execute(nb, path.parent)
old.metadata["minilora"]["claims"] = nb.metadata["minilora"]["claims"]  # none: they do not go along
missing = set(build.lacking([old]))
print(*build.faults(nb), *build.differences(old, nb, missing))
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", build.LESSONS)
def test_a_students_copy_runs_anywhere_with_the_stored_outputs(name, copies):
    copy, store = (folder / f"{name}.ipynb" for folder in (copies, BUILD.parent))
    done = run("-c", STUDENT, BUILD.parent, copy, store, cwd="/")
    assert (done.returncode, done.stdout) == (0, "\n"), done.stdout + done.stderr
