"""The lessons are what their sources make of them, and what their text says is so."""

import ast
import base64
import itertools
import json
import re
import shutil
import sys
import tomllib
from hashlib import sha256

import nbformat
import pytest

from minilora.course import lessons as course
from minilora.course.exercises import PACKAGES
from notebooks import BUILD, ROOT, build, run, stored, tagged, title

PICTURES = ROOT / "figures/pictures"


@pytest.mark.parametrize("name", build.LESSONS)
def test_a_lesson_matches_its_source(name):
    nb, fresh = stored(name), build.notebook(name)

    def cells(nb):
        return [(c.cell_type, c.id, c.source, c.metadata) for c in nb.cells]

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


@pytest.mark.parametrize("name", build.LESSONS)
def test_a_lesson_opens_with_a_picture_and_what_it_says(name):
    head = build.notebook(name).cells[0]
    title, picture, see, need, *_ = head.source.split("\n\n")
    assert title.startswith("# ")
    assert see.startswith("**What you will see.** ")
    assert need.startswith("**What you need.** ")
    (file,) = head.attachments
    says = json.loads((PICTURES / "MANIFEST.json").read_text(encoding="utf-8"))["says"]
    assert picture == f"![{says[file.removesuffix('.png')]}](attachment:{file})"
    stored = base64.b64decode(head.attachments[file]["image/png"])
    assert sha256(stored).digest() == sha256((PICTURES / file).read_bytes()).digest()


def test_no_two_lessons_open_with_one_picture():
    files = [file for name in build.LESSONS for file in build.notebook(name).cells[0].attachments]
    assert len({*files}) == len(files) == len(build.LESSONS)


@pytest.mark.parametrize("name", build.LESSONS)
def test_a_lesson_is_short_and_closes_with_what_to_take_along(name):
    nb = stored(name)
    assert len(nb.cells) <= 25
    text = " ".join(cell.source for cell in nb.cells if cell.cell_type == "markdown")
    assert len(build.plain(re.sub(r"!\[[^]]*\]", "", text)).split()) <= 950
    assert nb.cells[-1].source.startswith("## To take along\n")


@pytest.mark.parametrize("name", build.LESSONS)
def test_a_lesson_needs_only_earlier_ones(name):
    need = build.notebook(name).cells[0].source.split("\n\n")[3]
    earlier = build.LESSONS[: build.LESSONS.index(name)]
    found = re.findall(r"\[([^]]+)\]\((\w+)\.ipynb\)", need)
    assert {lesson for _, lesson in found} <= {*earlier}
    assert all(" ".join(words.split()) == title(lesson) for words, lesson in found)


COLUMNS = 98  # of printed text, 6.6 pixels each, in JupyterLab 1,100 pixels wide, its list of files open


@pytest.mark.parametrize("name", build.LESSONS)
def test_no_printed_line_is_wrapped_in_a_window_of_1100_pixels(name):
    for cell in stored(name).cells:
        for output in cell.get("outputs", []):
            for line in output.get("text", "").splitlines():
                assert len(line) <= COLUMNS, (cell.id, line)


@pytest.mark.parametrize(("name", "after"), list(itertools.pairwise(build.LESSONS)))
def test_a_lesson_leads_to_the_next_by_its_title(name, after):
    last = build.notebook(name).cells[-1].source.splitlines()[-1]
    assert last.removesuffix(".") == f"Next: [{title(after)}]({after}.ipynb)"


# ---- numbers in the text

NUMBER = re.compile(
    r"(?<![A-Za-z\d.])\d+(?:,\d{3})*(?:\.\d+)?(?:e[-+]?\d+)?"
    r"|\b(?:three|four|five|six|seven|eight|nine|ten|eleven|twelve|twenty|thirty|fifty|hundreds?|thousands?"
    r"|hundredths?|thousandths?|half|halves|quarters?|fifths?|sixths?|sevenths?|eighths?|tenths?|twice)\b",
    re.I,
)
FORMULA = re.compile(r"\$\$.*?\$\$|[_^]\{[^}]*\}|[_^]\d")  # displayed; or an index or exponent
HARMLESS = {
    "1_overlays": [
        "([Hu et al. 2021 )",
        "those of the first four",  # of the tools just named
        "([Gunter et al. 2024 ) describes one base of about 3 billion numbers",
        "Rank 16 is a usual first choice",
        "PEFT takes 8 unless you say otherwise",
        "their version 1.5 with LoRA",
        "rank 256 closed most of it ([Biderman et al. 2024 )",
        "([Schulman et al. 2025 )",
    ],
    "2_lora_from_one_equation": ["([Hu et al. 2021 , section 4.1)"],
    "3_merging_costs_nothing": ["(Reiser and Knuth 1975)"],
    "4_which_rank": [
        "Three rules make the comparison fair. 1. ",
        " 2. The choice",
        "0 % is the frozen base, 100 % is full fine-tuning.",  # a definition
        "(Roy and Vetterli 2007)",
        "`minilora sweep --data FILE --data permuted:4 --out mine`",
    ],
    "11_under_the_microscope": [
        "in the spelling of 1623",
        "| 90 %, 99 % |",  # names of columns
        "[Hu et al. 2021 , section 7.2:",
        "(Eckart and Young 1936)",
    ],
    "12_against_its_base": [
        "SmolLM2-135M",
        "Three questions, and what chance would answer",
        "(Hu et al. 2021, section 7.3)",
        "The factor 21.5 in the paper's section 7.3",
        "(Shuttleworth et al. 2024)",
        "before you merge into 16 bits",
        "It is fetched once, 93 MB.",  # the size of the package
    ],
    "7_four_bits": [
        "([Dettmers et al. 2023 )",
        "Which 16 values? ·",  # the title of a section, in the contents
        "Which 16 values? An adapter",
        "Keep the adapter beside the 4-bit base",
        "Merging into four bits adds noise",
    ],
    "8_adding_adapters": [
        "Weights $1 - t$ and $t$ lead from one adapter to the other",
        "([Yadav et al. 2023 )",
    ],
    "9_a_thousand_adapters": [
        "[Punica, Chen et al. 2023 .)",
        "what makes a thousand adapters on one base affordable",
        "([Sheng et al. 2023 )",
    ],
    "6_low_rank_low_dimension": [
        "(Eckart and Young 1936)",
        "0 is what random directions share, 1 means the same ones",  # a definition
        "([Li et al. 2018 )",
        "(SAID, of [Aghajanyan et al. 2020 ,",
    ],
    "5_what_to_adapt_and_how": [
        "LoRA leaves three choices: which matrices, which scale, which start.",
        "([rsLoRA, Kalajdzievski 2023 )",
        "as with $\\alpha = 2 r$. Look",  # a definition
    ],
    "10_beyond_language": [
        "more than 100 % means",  # a definition
        "The same three calls",  # the title of a section
        "([Dosovitskiy et al. 2021 )",
        "([Ho et al. 2020 )",
    ],
    "13_how_do_we_know": [
        "(L(a + h) - L(a - h)\\big) / 2h",
        "$\\gamma_k = k u / (1 - k u)$",
        "section 3.1)",
        "the two are within twice that of each other",  # by the triangle
        "`atol=1e-5`",
    ],
}


def alone(nb, name):
    """The numbers in a lesson and its solutions that no claim has said, with what stands around them."""
    text, harmless = f"{build.prose(nb)} {build.solutions(name)}", HARMLESS[name]
    links = [f"Next: [{title(name)}" for name in build.LESSONS]
    pictures = [says for cell in nb.cells for says in re.findall(r"!\[([^]]*)\]", cell.source)]
    claimed = [row["claim"][1] for row in nb.metadata["minilora"]["claims"]]
    quotes = [f"{title(name)} ![", *harmless, *links, *pictures, *claimed]
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
    assert not list(build.unsaid(nb, name))
    assert not list(alone(nb, name))


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
        ("1_overlays", "from 2.03 to 1.70", "from 2.03 to 1.60"),
        ("3_merging_costs_nothing", "The base makes 28 products", "The base makes 25 products"),
        ("3_merging_costs_nothing", "70 in all", "61 in all"),
        ("3_merging_costs_nothing", "from about 100 rows on", "from about 200 rows on"),
        ("13_how_do_we_know", "With losses 0.1 nats lower", "With losses 0.2 nats lower"),
        ("13_how_do_we_know", "right to about nine digits", "right to about ten digits"),
        ("2_lora_from_one_equation", "seven lines of NumPy;", "eight lines of NumPy;"),
        ("4_which_rank", "rank 8 95 %", "rank 8 85 %"),
        ("4_which_rank", "uses 67.5 of 96", "uses 68.5 of 96"),
        ("11_under_the_microscope", "this recipe and 80 steps", "this recipe and 90 steps"),
        ("11_under_the_microscope", "are above 7 of 8", "are above 6 of 8"),
        ("12_against_its_base", "the residual is 0.735", "the residual is 0.736"),
        ("12_against_its_base", "it is four fifths", "it is three fifths"),
        ("7_four_bits", "QLoRA ends 0.008 nats", "QLoRA ends 0.018 nats"),
        ("8_adding_adapters", "`peft_linear` is off by 95 %", "`peft_linear` is off by 85 %"),
        ("9_a_thousand_adapters", "are copies of our three", "are copies of our four"),
        ("6_low_rank_low_dimension", "it takes 5.5 % of all numbers", "it takes 6.5 % of all numbers"),
        ("5_what_to_adapt_and_how", "at most 0.006 nats apart", "at most 0.016 nats apart"),
        ("10_beyond_language", "79 % of the way", "89 % of the way"),
    ],
)
def test_a_wrong_number_in_the_text_is_detected(name, was, now):
    nb = stored(name)
    (cell,) = (cell for cell in nb.cells if was in " ".join(cell.source.split()))
    cell.source = " ".join(cell.source.split()).replace(was, now)
    assert list(build.unsaid(nb, name))
    assert list(alone(nb, name))


@pytest.mark.parametrize("more", ["It takes 17 steps.", "A half of it.", "It is 0.3 % more.", "Nine of it."])
def test_an_additional_number_in_the_text_is_detected(more):
    nb = stored(build.LESSONS[0])
    assert not list(alone(nb, build.LESSONS[0]))
    nb.cells[-1].source += "\n" + more
    assert len(list(alone(nb, build.LESSONS[0]))) == 1


def test_a_false_claim_is_reported():
    nb = stored(build.LESSONS[0])
    nb.metadata["minilora"]["claims"][0]["claim"][2] = False
    assert [what.partition(":")[0] for what in build.unsaid(nb, build.LESSONS[0])] == ["it does not hold"]


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


# ---- what a lesson needs


def hidden(*modules):
    """Code that makes these modules look as if they were not installed."""
    return "".join(f"import sys; sys.modules[{module!r}] = None\n" for module in modules)


def needs(name):
    """The modules beside minilora that a lesson looks for first."""
    (cell,) = tagged(build.notebook(name), "first")
    calls = [node for node in ast.walk(ast.parse(cell.source)) if isinstance(node, ast.Call)]
    return [ast.literal_eval(word) for call in calls if call.func.id == "absent" for word in call.args]


NEEDS = [(name, module) for name in build.LESSONS for module in needs(name)]


def test_what_a_lesson_needs_is_looked_for_first():
    assert {module for _, module in NEEDS} == {"ipywidgets", "gguf", "tokenizers", "sklearn"}
    for name in build.LESSONS:
        code = [c for c in build.notebook(name).cells if c.cell_type == "code"]
        assert build.tags_of(code[0]) == ["first", "unkept"]


@pytest.mark.parametrize(("name", "module"), NEEDS)
def test_a_missing_package_is_reported_first(name, module):
    (cell,) = tagged(build.notebook(name), "first")
    done = run("-c", hidden(module) + cell.source + f"\nassert {module!r} in missing")
    assert done.returncode == 0, done.stderr
    package = PACKAGES.get(module, module)
    assert f"not installed: {package}; install it and restart the kernel" in done.stdout


@pytest.mark.parametrize("name", build.LESSONS)
def test_without_minilora_a_lesson_stops_and_says_why(name):
    (cell,) = tagged(build.notebook(name), "first")
    done = run("-c", hidden("minilora") + cell.source)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "minilora is not installed where this kernel runs; its README says how\n"


OPTIONAL = sorted({name for name, module in NEEDS if module != "sklearn"})  # which a lesson cannot do without


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIONAL)
def test_a_lesson_runs_to_its_end_without_optional_packages(name):
    nb = build.notebook(name)
    nb.cells.insert(0, nbformat.v4.new_code_cell(hidden(*needs(name))))
    assert not list(build.faults(build.execute(nb)))  # which raises if a cell does


def test_what_the_command_says_to_install_is_what_the_lessons_look_for():
    assert {*course.NEEDS.split()} == {"jupyterlab", *(PACKAGES.get(module, module) for _, module in NEEDS)}


def test_the_notebooks_extra_has_every_package_of_the_lessons():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extra = {re.match(r"[\w-]+", line)[0] for line in project["optional-dependencies"]["notebooks"]}
    core = {"minilora", "IPython", *(re.match(r"[\w-]+", line)[0] for line in project["dependencies"])}
    assert {*course.NEEDS.split()} <= extra
    for name in build.LESSONS:
        code = [ast.parse(c.source) for c in build.notebook(name).cells if c.cell_type == "code"]
        assert {PACKAGES.get(module, module) for module in needs(name)} <= extra, name
        nodes = [node for tree in code for node in ast.walk(tree)]
        imported = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        imported |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
        outside = {module.partition(".")[0] for module in imported} - sys.stdlib_module_names - core
        assert outside <= {*needs(name)}, name


@pytest.mark.parametrize("module", ["gguf", "tokenizers"])
def test_without_its_packages_the_smollm2_cells_are_skipped(module, capsys):
    names = {"missing": [module]}
    (name,) = (name for name in build.LESSONS if tagged(build.notebook(name), "smollm2"))
    for cell in tagged(build.notebook(name), "smollm2"):
        exec(cell.source, names)
    assert capsys.readouterr().out == f"left out, for it needs {module}\n"


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


def test_a_check_writes_nothing_and_a_build_the_list_of_lessons_too(tmp_path, monkeypatch):
    name = build.LESSONS[0]
    shutil.copytree(build.HERE / "solutions", tmp_path / "solutions")
    (tmp_path / f"{name}.ipynb").write_text(build.written(stored(name)), encoding="utf-8")
    monkeypatch.setattr(build, "HERE", tmp_path)
    monkeypatch.setattr(build, "execute", lambda nb: stored(name))
    monkeypatch.setattr(build, "lacking", lambda nbs: [])
    monkeypatch.setattr(course, "DATA", {})

    def files():
        return {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}

    before = files()
    assert build.main(["--check", name]) == 0
    assert files() == before
    assert build.main([name]) == 0
    assert files() == before | {"README.md": course.readme().encode()}


@pytest.mark.slow
@pytest.mark.parametrize("name", build.LESSONS)
def test_a_lesson_runs_again_to_the_same_outputs(name):
    done = run(BUILD, "--check", name)
    assert done.returncode == 0, done.stdout + done.stderr
