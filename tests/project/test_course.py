"""`minilora lessons` writes the course anywhere, from a checkout or a wheel, and says how to open it."""

import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import nbformat
import pytest

from minilora import cli
from minilora.course import lessons as course
from minilora.errors import StorageError
from notebooks import BUILD, ROOT, build, numbered, run, tagged, title

FILES = {
    "README.md",
    *(f"{name}.ipynb" for name in course.lessons()),
    *(f"solutions/{name}.md" for name in course.lessons()),
    *course.DATA,
}


@pytest.fixture(scope="module")
def copies(tmp_path_factory):
    """The lessons, in a folder outside of the repository."""
    folder = tmp_path_factory.mktemp("anywhere") / "lessons of mine"
    course.write(folder)
    return folder


def below(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_the_folder_has_every_lesson_its_solutions_and_its_data(copies):
    assert below(copies) == FILES
    for name in course.lessons():
        nb = nbformat.read(copies / f"{name}.ipynb", 4)
        nbformat.validate(nb)
        assert [c.source for c in nb.cells] == [c.source for c in build.notebook(name).cells]
        assert not any(c.get("outputs") or c.get("execution_count") for c in nb.cells)
        assert not tagged(nb, "claims")
        for target in re.findall(r"\]\(((?!https?:)[^)]+)\)", "\n".join(c.source for c in nb.cells)):
            shown = {f"attachment:{file}" for cell in nb.cells for file in cell.get("attachments", ())}
            assert target in shown or (copies / target).exists(), target


def test_the_list_of_lessons_is_current_and_every_link_leads_to_a_file(copies):
    text = (BUILD.parent / "README.md").read_text(encoding="utf-8")
    assert text == course.readme(), "python notebooks/build.py NAME"
    assert (copies / "README.md").read_text(encoding="utf-8") == text
    for target in re.findall(r"\]\(([^)]+)\)", text):
        assert (copies / target).exists(), target
    rows = [line[2:-2].split(" | ") for line in text.splitlines() if line.startswith("| ")][2:]
    for name, (lesson, see, needs) in zip(course.lessons(), rows, strict=True):
        number = name.partition("_")[0]
        assert lesson == f"{number}. [{title(name)}]({name}.ipynb)"
        assert see.endswith((".", "?"))
        assert f"**What you will see.** {see}" in " ".join(build.notebook(name).cells[0].source.split())
        earlier = re.findall(r"\[(\d+)\]\(\1_\w+\.ipynb\)", needs)
        assert needs == "–" if not earlier else all(int(other) < int(number) for other in earlier)
        assert len(earlier) == needs.count("(")


@pytest.mark.parametrize(
    ("see", "first"),
    [
        ("A rank of 1.5 %\n# is few. And more.", "A rank of 1.5 % is few."),
        ("Which rank? A low one.", "Which rank?"),
        ("One only.", "One only."),
        ("Without an end", "Without an end"),
    ],
)
@pytest.mark.parametrize("more", ["", "\n#\n# **Contents.** [A](5_a.ipynb)."])
def test_what_a_lesson_says_first_is_read_from_its_source(see, first, more, monkeypatch):
    need = "**What you need.** [B](2_b.ipynb), and [C\n# d](3_c.ipynb)"
    text = f"# %% [markdown]\n# # Of ranks\n#\n# **What you will see.** {see}\n#\n# {need}{more}\n"
    monkeypatch.setattr(course, "source", lambda name: text)
    assert course.opening("any") == ("Of ranks", first, ["2_b", "3_c"])


def test_a_written_lesson_names_its_kernel_as_the_kernel_does():
    """Else JupyterLab writes it into the notebook, which then looks changed as soon as it is opened."""
    kernel = pytest.importorskip("ipykernel.ipkernel")
    name = course.lessons()[0]
    assert course.notebook(name)["metadata"]["language_info"] == kernel.IPythonKernel.language_info
    assert course.notebook(name)["metadata"]["kernelspec"]["name"] == "python3"


def test_the_command_says_how_to_open_what_it_wrote(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["lessons"]) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"{len(course.lessons())} lessons without outputs")
    install, start = said.splitlines()[-2:]
    assert install.startswith(f"to open them: {sys.executable} -m pip install jupyterlab ")
    assert start == f"then: {sys.executable} -m jupyterlab lessons"
    assert below(tmp_path / "lessons") == FILES
    monkeypatch.setattr(sys, "executable", "/a venv/python")
    assert cli.main(["lessons", "a b"]) == 0
    install, start = capsys.readouterr().out.splitlines()[-2:]
    assert shlex.split(install)[3:] == ["/a venv/python", "-m", "pip", "install", *course.NEEDS.split()]
    assert shlex.split(start)[1:] == ["/a venv/python", "-m", "jupyterlab", "a b"]


def test_a_folder_is_replaced_only_on_request_and_only_if_it_holds_lessons(tmp_path, capsys):
    folder, other = tmp_path / "lessons", tmp_path / "other"
    course.write(folder)
    answer = folder / f"{course.lessons()[0]}.ipynb"
    answer.write_text("an answer")
    (folder / ".ipynb_checkpoints").mkdir()
    (folder / ".ipynb_checkpoints" / "1-checkpoint.ipynb").write_text("JupyterLab's")
    assert cli.main(["lessons", str(folder)]) == 4
    assert "is there already" in capsys.readouterr().err
    assert answer.read_text() == "an answer"
    assert cli.main(["lessons", str(folder), "--overwrite"]) == 0
    assert below(folder) == FILES
    for strange in ("mine.ipynb", "solutions/mine.md", "adapter_config.json"):
        (folder / strange).write_text("mine")
        with pytest.raises(StorageError, match=rf"only the folder of the lessons .* holds '{strange}'"):
            course.write(folder, overwrite=True)
        (folder / strange).unlink()
    other.mkdir()
    (other / "rows.jsonl").write_text("mine")
    with pytest.raises(StorageError, match=r"only the folder of the lessons .* is not one"):
        course.write(other, overwrite=True)
    assert below(other) == {"rows.jsonl"}


def test_lessons_are_in_the_order_of_their_numbers_and_each_has_solutions():
    numbers = [int(name.partition("_")[0]) for name in course.lessons()]
    assert numbers == list(range(1, len(numbers) + 1))
    assert {path.stem for path in (BUILD.parent / "solutions").iterdir()} == {*course.lessons()}
    assert {path.stem for path in BUILD.parent.glob("*.ipynb")} == {*course.lessons()}


def test_without_lessons_the_error_says_what_is_missing(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(course, "__file__", str(tmp_path / "minilora" / "course" / "lessons.py"))
    assert cli.main(["lessons", str(tmp_path / "out")]) == 4
    assert "has no lessons; expected those of a wheel" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# ---- an installed package


def test_the_wheel_has_all_that_the_lessons_are_made_of():
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    shipped = {"notebooks/src", "notebooks/solutions", f"{course.PICTURES}/MANIFEST.json"}
    shipped |= {file for file, _ in course.DATA.values()}
    for name in course.lessons():
        pictures = re.findall(r"\(attachment:([\w.]+)\)", course.source(name))
        shipped |= {f"{course.PICTURES}/{file}" for file in pictures}
    assert wheel["force-include"] == {file: f"minilora/course/{file}" for file in shipped}


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder with the package as its wheel installs it."""
    pytest.importorskip("hatchling", reason="hatchling builds the wheel; pip install hatchling")
    place = tmp_path_factory.mktemp("wheel")
    code = f"from hatchling.build import build_wheel; print(build_wheel({str(place)!r}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    with zipfile.ZipFile(place / done.stdout.split()[-1]) as wheel:
        wheel.extractall(place / "site")
    return place / "site"


def elsewhere(installed, *arguments, cwd):
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return subprocess.run(
        [sys.executable, *map(str, arguments)], env=env | {"PYTHONPATH": str(installed)}, cwd=cwd,
        capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_an_installed_package_writes_the_same_lessons_and_one_runs(installed, copies, tmp_path):
    done = elsewhere(installed, "-m", "minilora", "lessons", "mine", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    for file in FILES:
        assert (tmp_path / "mine" / file).read_bytes() == (copies / file).read_bytes(), file
    name = numbered("merging_costs_nothing")  # which needs no text
    code = [c.source for c in nbformat.read(tmp_path / "mine" / f"{name}.ipynb", 4).cells
            if c.cell_type == "code"]  # fmt: skip
    show = "import minilora; print(minilora.__file__)"
    done = elsewhere(installed, "-c", "\n".join([*code, show]), cwd=tmp_path / "mine")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("not yet: there is no answer yet") == 3
    assert Path(done.stdout.split()[-1]).is_relative_to(installed)


# ---- the data that lessons read


def rows_of(name):
    """Where a lesson finds rows of experiments -> how many there are."""
    text = course.source(name)
    return {
        place: len((ROOT / file).read_text().splitlines())
        for place, (file, _) in course.DATA.items()
        if place.endswith("/rows.jsonl") and re.search(rf'"{Path(place).parent}[/"]', text)
    }


READERS = [name for name in course.lessons() if rows_of(name)]


def test_every_file_is_read_by_a_lesson_and_there():
    assert {place for name in READERS for place in rows_of(name)} | {"rows.jsonl", "serving.json"} == {
        *course.DATA
    }
    text = "\n".join(map(course.source, course.lessons()))
    assert all(f'"{place}"' in text for place in ("rows.jsonl", "serving.json"))
    assert all((ROOT / file).exists() for file, _ in course.DATA.values())


def test_the_rows_of_the_sweep_are_found_from_a_copy(copies):
    nb = nbformat.read(copies / f"{numbered('which_rank')}.ipynb", 4)
    code = [c.source for c in nb.cells if c.cell_type == "code"]
    places = next(i for i, source in enumerate(code) if "rows.jsonl" in source)
    done = run("-c", "\n".join([*code[: places + 1], "print(len(rows))"]), cwd=copies)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) == len((ROOT / "figures/rows.jsonl").read_text().splitlines())


@pytest.mark.parametrize("name", READERS)
def test_the_rows_of_experiments_are_found_from_a_copy(name, copies):
    nb = nbformat.read(copies / f"{name}.ipynb", 4)
    (imports,) = tagged(nb, "imports")
    (where,) = (line for c in nb.cells for line in c.source.split("\n") if line.startswith("FIGURES = "))
    want = rows_of(name)
    names = [str(Path(place).parent) for place in want]
    said = f"print([len(questions.measured(name, FIGURES)[0]) for name in {names!r}])"
    rest = "from minilora.experiments import questions", where, said
    done = run("-c", "\n".join([imports.source, *rest]), cwd=copies)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == list(want.values())


def test_without_a_file_nothing_is_built_and_the_command_that_makes_it_is_named(monkeypatch, capsys):
    monkeypatch.setitem(course.DATA, "rows.jsonl", ("figures/gone.jsonl", "minilora sweep"))
    assert build.main([course.lessons()[0]]) == 1
    assert capsys.readouterr().err == "figures/gone.jsonl is missing; `minilora sweep` makes it\n"


def test_the_readme_says_how_to_open_the_lessons_and_in_which_order():
    readme = (ROOT / "README.md").read_text()
    links = re.findall(r"\[(.*?)\]\(notebooks/(\w+)\.ipynb\)", readme)
    assert [name for _, name in links] == list(course.lessons())
    for text, name in links:
        assert title(name) == text
    assert 'pip install -e ".[notebooks]" && .venv/bin/minilora lessons && .venv/bin/jupyter lab' in readme


STUDENT = """
import sys
sys.path.insert(0, sys.argv[1])
import build, nbformat
from pathlib import Path
path, store = map(Path, sys.argv[2:])
nb, old = nbformat.read(path, 4), nbformat.read(store, 4)
for some in (nb, old):  # SmolLM2 takes long
    some.cells = [c for c in some.cells if "smollm2" not in build.tags_of(c)]
nb.metadata["minilora"] = {"matplotlib": build.matplotlib.__version__}
build.execute(nb, path.parent)
old.metadata["minilora"]["claims"] = nb.metadata["minilora"]["claims"]  # none: they do not go along
missing = set(build.lacking([old]))
print(*build.faults(nb), *build.differences(old, nb, missing))
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", course.lessons())
def test_a_copy_runs_anywhere_with_the_stored_outputs(name, copies):
    copy, store = (folder / f"{name}.ipynb" for folder in (copies, BUILD.parent))
    done = run("-c", STUDENT, BUILD.parent, copy, store, cwd="/")
    assert (done.returncode, done.stdout) == (0, "\n"), done.stdout + done.stderr
