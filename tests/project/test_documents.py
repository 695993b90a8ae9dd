"""Documents keep step with the code: links, files, modules, stages, tiers, and what programs write."""

import functools
import io
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import conftest
import pytest
import wings

import minilora as ml
from minilora import cli

ROOT = Path(__file__).parents[2]
FOLDERS = (".", "docs", "benchmarks", "benchmarks/results")
PAGES = sorted(page for folder in FOLDERS for page in (ROOT / folder).glob("*.md"))
DOCUMENTS = [page for page in PAGES if page.parent in (ROOT, ROOT / "docs")]
CI = (ROOT / ".ci/run").read_text(encoding="utf-8")


def named(path):
    return path.relative_to(ROOT).as_posix()


def anchors(page):
    """What a heading of a page can be linked by, as forges make it."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_every_link_leads_to_a_file_and_a_heading(page):
    for target in re.findall(r"\]\(((?!https?:)[^)\s]+)\)", page.read_text(encoding="utf-8")):
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target


@pytest.mark.parametrize("page", DOCUMENTS, ids=named)
def test_every_named_program_and_test_exists(page):
    """`python FILE`, `pytest FILE` and `FOLDER/FILE.py`, from the root or below minilora/."""
    text = page.read_text(encoding="utf-8")
    paths = re.findall(r"(?:python|pytest) ([\w./]+\.py)\b", text)
    paths += re.findall(r"`((?:[\w.]+/)+\w+\.(?:py|sh))`", text)
    for path in paths:
        assert (ROOT / path).exists() or (ROOT / "minilora" / path).exists(), path


def commands(page):
    """The commands of minilora on a page, or in a lesson: in blocks, and in a line if they have options."""
    text = page.read_text(encoding="utf-8")
    for language, block in re.findall(r"^```(\w*)\n(.*?)^```$", text, re.M | re.S):
        yield from () if language else re.findall(r"(?:^|&& |bin/)minilora ([^\n&|]*)", block, re.M)
    yield from re.findall(r"`minilora ([^`|]* --[^`|]*)`", text)


@pytest.mark.parametrize("page", [*DOCUMENTS, *sorted(ROOT.glob("notebooks/src/*.py"))], ids=named)
def test_every_command_is_understood(page):
    for command in commands(page):
        cli.parser().parse_args(shlex.split(command, comments=True))  # else SystemExit


def test_the_first_commands_for_an_adapter_work_in_each_of_three_worlds(tmp_path, monkeypatch, capsys):
    """On files that the tools wrote, under the names in the document."""
    files, block = ROOT / "tests/fixtures/lora_files", (ROOT / "docs/adapters.md").read_text(encoding="utf-8")
    commands = [shlex.split(line, comments=True)[1:] for line in block.split("```")[1].strip().splitlines()]
    (image,) = (files / "kohya_sdscripts/sd15_conv").glob("*.safetensors")
    monkeypatch.chdir(tmp_path)
    shutil.copytree(files / "peft/plain", "my-peft-folder")
    shutil.copy(image, "my-style.safetensors")
    shutil.copytree(files / "mlx/lora_default", "my-mlx-folder")
    Path("BASE").mkdir()
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    Path("BASE/config.json").write_text(json.dumps({"model_type": "llama"} | heads))
    assert [cli.main(command) for command in commands] == [0, 0, 0]
    assert [command[1].partition(".")[0] for command in commands] == [
        "my-peft-folder",
        "my-style",
        "my-mlx-folder",
    ]
    assert ml.open_adapter("my-lora.gguf", heads=(4, 2)).pairs
    assert "suggested rank" in capsys.readouterr().out


def test_commands_are_found():
    assert [command.split()[0] for command in commands(ROOT / "README.md")] == ["sweep", "lessons"]
    found = {command.split()[0] for page in DOCUMENTS for command in commands(page)}
    assert {"sweep", "train", "inspect", "compress", "extract", "merge", "params", "modules"} <= found


@pytest.mark.parametrize("page", DOCUMENTS, ids=named)
def test_every_name_of_the_api_is_there(page):
    for path in re.findall(r"\bml((?:\.[a-zA-Z_]+)+)\(?", page.read_text(encoding="utf-8")):
        functools.reduce(getattr, path[1:].split("."), ml)


@pytest.fixture(scope="module")
def graph():
    """What imports what."""
    return wings.edges()


def test_the_diagram_and_the_file_list_match_the_code(graph):
    """If not: python docs/wings.py."""
    assert f"imports sha256:{wings.digest(graph)}<" in (ROOT / "docs/wings.svg").read_text(encoding="utf-8")
    assert (ROOT / "docs/modules.md").read_text(encoding="utf-8") == wings.table()


@pytest.fixture(scope="module")
def diagram(graph):
    """The picture of the wings."""
    return wings.draw(graph)


def test_no_name_in_the_diagram_has_a_subscript(diagram):
    """An underscore in bold is the beginning of one, unless it is escaped."""
    labels = [text.get_text() for text in diagram.axes[0].texts]
    bold = [label.split("$")[1] for label in labels if "$" in label]
    assert any(r"lora\_files" in name for name in bold)
    assert not [name for name in bold if re.search(r"(?<!\\)_", name)]


def test_every_box_is_inside_the_diagram(diagram):
    diagram.draw_without_rendering()
    for text in diagram.axes[0].texts:
        box = text.get_bbox_patch().get_window_extent()
        assert diagram.bbox.x0 <= box.x0, text.get_text()
        assert box.x1 <= diagram.bbox.x1, text.get_text()
        assert diagram.bbox.y0 <= box.y0, text.get_text()
        assert box.y1 <= diagram.bbox.y1, text.get_text()


def test_no_line_of_the_diagram_runs_behind_a_third_box(diagram):
    """If one does, give `wings.place` more slots or another sweep."""
    diagram.draw_without_rendering()
    axes = diagram.axes[0]
    boxes = [text.get_bbox_patch().get_window_extent() for text in axes.texts]
    for line in axes.lines:
        ends = axes.transData.transform(line.get_xydata())
        behind = [
            box
            for box in boxes
            if line.get_path().transformed(axes.transData).intersects_bbox(box, filled=False)
        ]
        third = [box for box in behind if not any(box.contains(*end) for end in ends)]
        assert len(behind) == 2, (line.get_xydata(), third)


def test_the_list_of_files_has_every_module():
    listed = re.findall(r"\]\(\.\./(minilora/[\w/]*(?:\.py|/))\)", wings.table())
    files = {named(file) for file in (ROOT / "minilora").rglob("*.py")}
    every = {
        name.removesuffix("__init__.py") for name in files - {"minilora/__init__.py", "minilora/__main__.py"}
    }
    assert len(listed) == len({*listed})
    assert {*listed} == every


def test_an_arrow_is_omitted_only_if_a_longer_path_implies_it(graph):
    arrows = wings.arrows(graph)
    drawn = {node: {b for a, b in arrows if a == node} for node in graph}
    assert all(wings.below(drawn, node) == wings.below(graph, node) for node in graph)
    assert sum(map(len, drawn.values())) < sum(map(len, graph.values()))


def test_circular_imports_are_named():
    with pytest.raises(ValueError, match="in a circle: b -> c -> b"):
        wings.levels({"a": {"b"}, "b": {"c"}, "c": {"b"}})


def test_the_diagram_is_reproducible(graph, diagram):
    def page(figure):
        stream = io.BytesIO()
        figure.savefig(stream, format="png", metadata={"Software": None})
        return stream.getvalue()

    assert page(diagram) == page(wings.draw(graph))


def test_the_modules_in_the_changelog_exist():
    table = re.findall(r"^\| (?:out of )?`\w+` \| (.*) \|$", (ROOT / "CHANGELOG.md").read_text(), re.M)
    names = {name for cell in table for name in re.findall(r"`([\w.]+)`", cell)}
    assert names
    assert names <= wings.files().keys()


def test_decisions_are_numbered_consecutively():
    text = (ROOT / "docs/decisions.md").read_text(encoding="utf-8")
    numbers = [int(n) for n in re.findall(r"^\*\*(\d+)\. ", text, re.M)]
    assert numbers == list(range(1, len(numbers) + 1))


def test_the_workflow_runs_every_stage_once():
    stages = re.search(r"^stages=\((.*)\)$", CI, re.M)[1].split()
    assert stages == re.findall(r"^(\w+)\(\) \{ # (?!REQUIREMENT)", CI, re.M)
    jobs = re.findall(r"stage: \[(.*)\]", (ROOT / ".github/workflows/ci.yml").read_text())
    assert sorted(stage for job in jobs for stage in job.split(", ")) == sorted(stages)


def test_an_unknown_stage_is_refused():
    done = subprocess.run([ROOT / ".ci/run", "lint", "tset"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "tset is not a stage; there are main tests" in done.stderr


def test_the_tiers_match_pyproject_and_the_quick_tier_exists(pytestconfig):
    tiers = {line.partition(":")[0] for line in pytestconfig.getini("markers") if ": " in line}
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    said = set(re.findall(r"^\| (\w+) \| `pytest", text, re.M))
    assert said - {"everyday"} <= tiers
    assert {"quick", "slow", "parity", "smollm2", "site"} <= said
    for name in conftest.CORE:
        assert (conftest.TESTS / name).exists(), name


# ---- benchmarks/house.py


TOP = """
from .low import Box, helper
from . import low

def entry():
    helper()
    own()
    low.last()
    raise Box(1)

def own():
    Box(2).open()
"""
LOW = """
class Box:
    def __init__(self, n):
        self.fill()

    def fill(self):
        pass

    def open(self):
        pass

def helper():
    pass

def last():
    helper()
"""
SOURCE = {"__init__.py": "from .top import entry", "top.py": TOP, "low.py": LOW}


@pytest.fixture
def house(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import house

    return house


def test_the_reading_walk_visits_each_definition_once_and_counts_moves(house, tmp_path):
    for name, text in SOURCE.items():
        (tmp_path / name).write_text(text)
    built = house.House(tmp_path)
    way = ["entry", "helper", "own", "Box", "Box.__init__", "Box.fill", "last"]
    assert [name for _, name in built.walk(built.entry("entry"), set())] == way
    assert built.moves("entry") == (3, 1)  # to helper, back up to own, down to Box


@pytest.mark.slow
def test_a_revision_is_compared_with_the_work_tree(house):
    if not (ROOT / ".git").exists():
        pytest.skip("no git repository")
    command = [sys.executable, "benchmarks/house.py", "HEAD"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    head, _, *lines = (line[2:-2].split(" | ") for line in done.stdout.splitlines())
    assert head[1:] == ["HEAD", "now"]
    counts = {name: [int(n.replace(",", "")) for n in numbers] for name, *numbers in lines}
    assert all(all(some) for name, some in counts.items() if "climbs" not in name)
    assert all(
        a < b for a, b in zip(counts["lines of the lesson"], counts["lines of the package"], strict=True)
    )
    assert {f"moves to follow `{entry}`" for entry in house.ENTRIES} < counts.keys()
