"""`minilora lessons --lite` gives JupyterLite all that the lessons need in a browser.

tests/lab/test_lessons_site.py has JupyterLite build the site and runs a lesson in Chromium. Here it is
replaced, and what it would be given is looked at.
"""

import json
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile

import pytest
from pages import stand_in, wheel

from minilora import cli
from minilora.course import lessons, lite
from minilora.data import corpora
from minilora.errors import ConfigError, FormatError, StorageError
from minilora.lab import site
from notebooks import ROOT

BUILD = lite.build


def copy(source, out):
    """JupyterLite, which writes what it is given."""
    shutil.copytree(source, out, dirs_exist_ok=True)


def no_network():
    raise StorageError("texts not fetched: there is no network")


@pytest.fixture(autouse=True)
def tools(monkeypatch):
    monkeypatch.setattr(lite, "needed", lambda package, extra: None)
    monkeypatch.setattr(lite, "build", copy)
    monkeypatch.setattr(corpora, "fetch_texts", no_network)


@pytest.fixture
def there(tmp_path):
    """A folder that looks like Pyodide's, with more than is needed."""
    stand_in(tmp_path / "there", core=(*lite.CORE, "pyodide.mjs"), packages=(*lite.LOADED, "pandas"))
    return tmp_path / "there"


def below(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def settings(out):
    (plugin,) = json.loads((out / "jupyter-lite.json").read_text())["jupyter-config-data"][
        "litePluginSettings"
    ].values()
    return plugin


def test_all_lessons_and_their_solutions_are_in_it_and_a_lesson_begins_by_installing_the_package(tmp_path):
    told = lite.write_site(tmp_path / "out")
    content = tmp_path / "out/content"
    names = [f"{name}.ipynb" for name in lessons.lessons()]
    assert below(content) == {*names, *lessons.solutions(), "README.md"}
    for name in lessons.lessons():
        made, usual = json.loads((content / f"{name}.ipynb").read_text()), lessons.notebook(name)
        assert made["metadata"]["kernelspec"]["name"] == "python"  # as JupyterLite calls it
        for cell, other in zip(made["cells"], usual["cells"], strict=True):
            if "first" in cell["metadata"].get("tags", ()):
                install, *_, rest = cell["source"].partition(other["source"])[0].split("\n")
                assert (install.split()[:4], rest) == (["%pip", "install", "-q", "minilora"], "")
                assert ("scikit-learn" in install) == ("sklearn" in lessons.source(name))
                cell["source"] = cell["source"].removeprefix(lite.FIRST.format(also=install[24:]))
            assert cell == other
    for place, file in lessons.solutions().items():
        assert (content / place).read_bytes() == (ROOT / file).read_bytes()
    assert (told.out, told.pyodide) == (str(tmp_path / "out"), site.PYODIDE)
    assert told.files == len(below(tmp_path / "out"))
    assert told.bytes == sum((tmp_path / "out" / name).stat().st_size for name in below(tmp_path / "out"))


def test_the_texts_lie_where_the_kernel_looks_for_them_with_their_licences(tmp_path, monkeypatch, capsys):
    kept = tmp_path / "cache" / "texts-0123"
    kept.mkdir(parents=True)
    for name in corpora.MANIFEST:
        (kept / f"{name}.txt").write_text(name)
    (kept / "more.txt").write_text("which is not needed")
    monkeypatch.setattr(corpora, "fetch_texts", lambda: kept)
    lite.write_site(tmp_path / "out")
    texts = tmp_path / "out/content/texts-0123"
    assert below(texts) == {*(f"{name}.txt" for name in corpora.MANIFEST), "texts.md"}
    assert settings(tmp_path / "out")["loadPyodideOptions"]["env"] == {"MINILORA_CACHE": "/drive"}
    assert corpora.texts_folder(tmp_path).parent == tmp_path
    licences = (texts / "texts.md").read_text()
    for name, known in corpora.MANIFEST.items():
        (row,) = (line for line in licences.splitlines() if line.startswith(f"| {name}.txt |"))
        licence = re.search(r"CC-BY 2\.5|public domain|BSD-3", known.source)[0]
        assert licence in row
    assert "Redistributions in binary form must reproduce" in licences
    assert capsys.readouterr().err == ""


def test_without_the_texts_it_is_said_that_the_fallback_is_taken(tmp_path, capsys):
    lite.write_site(tmp_path / "out")
    said = "minilora: texts not fetched: there is no network; in the site the lessons use that of"
    assert capsys.readouterr().err.startswith(said)
    assert not list((tmp_path / "out/content").glob("texts*"))


def test_pip_installs_the_wheel_and_a_lesson_finds_its_data_from_there(tmp_path):
    name, data = lite.wheel()
    assert lite.wheel() == (name, data)
    (tmp_path / name).write_bytes(data)
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target"]
    subprocess.run([*pip, str(tmp_path / "site"), str(tmp_path / name)], check=True)
    first = "\n".join(line for line in lite.FIRST.splitlines() if not line.startswith("%"))
    data = [f"../{file}" for file, _ in lessons.DATA.values()]
    code = f"{first}\nprint(lessons.__file__, *map(os.path.exists, {data}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True,
                          check=True, env={"PYTHONPATH": str(tmp_path / "site")})  # fmt: skip
    file, *found = done.stdout.split()
    assert file == str(tmp_path / "site/minilora/course/lessons.py")
    assert found == ["True"] * len(lessons.DATA)


def test_the_wheel_needs_what_pyodide_has_and_the_package_says():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {*lite.NEEDS} < {re.match(r"[\w-]+", line)[0] for line in project["dependencies"]}
    assert {*lite.NEEDS} < {*lite.LOADED}
    extra = {re.match(r"[\w-]+", line)[0] for line in project["optional-dependencies"]["lite"]}
    assert extra >= {name.replace("_", "-") for name in lite.TOOLS if "server" not in name}


def test_an_installed_package_is_packed_again(tmp_path):
    name, data = lite.again("comm")
    assert re.fullmatch(r"comm-[\d.]+-py3-none-any\.whl", name)
    (tmp_path / name).write_bytes(data)
    with zipfile.ZipFile(tmp_path / name) as archive:
        names = archive.namelist()
    assert "comm/__init__.py" in names
    assert [n.partition("/")[2] for n in names if ".dist-info/" in n and n.endswith(("METADATA", "WHEEL"))]
    assert not [n for n in names if n.endswith(".pyc") or ".." in n]


def test_pyodide_is_at_its_address_or_copied_from_a_folder(tmp_path, there):
    lite.write_site(tmp_path / "far", "https://example.org/pyodide/")
    assert settings(tmp_path / "far")["pyodideUrl"] == "https://example.org/pyodide/pyodide.js"
    assert not (tmp_path / "far/static").exists()
    lite.write_site(tmp_path / "near", str(there))
    assert below(tmp_path / "near/static/pyodide") == {*lite.CORE, *map(wheel, lite.LOADED)}
    assert "pyodideUrl" not in settings(tmp_path / "near")  # JupyterLite finds it
    for out in ("far", "near"):
        assert settings(tmp_path / out)["disablePyPIFallback"] is True


def test_nothing_is_written_if_something_is_wrong(tmp_path, there, monkeypatch):
    def half(source, out):
        (out / "index.html").write_text("half")
        raise StorageError("JupyterLite failed")

    (tmp_path / "mine").mkdir()
    before = {path.name for path in tmp_path.iterdir()}
    with pytest.raises(StorageError, match="is there already"):
        lite.write_site(tmp_path / "mine")
    with pytest.raises(ConfigError, match="expected"):
        lite.write_site(tmp_path / "out", "http://example.org/")
    monkeypatch.setattr(lite, "build", half)
    with pytest.raises(StorageError, match="JupyterLite failed"):
        lite.write_site(tmp_path / "out")
    (there / wheel("ipython")).write_text("another")
    with pytest.raises(FormatError, match="its sha256 is not the one"):
        lite.write_site(tmp_path / "out", str(there))
    (there / "pyodide.js").unlink()
    with pytest.raises(StorageError, match=r"pyodide\.js: is missing"):
        lite.write_site(tmp_path / "out", str(there))
    assert {path.name for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    ("does", "said"),
    [("print('one\\ntwo'); exit(3)", "two"), ("import sys; print('why', file=sys.stderr); exit(3)", "why"),
     ("exit(3)", "3")],
)  # fmt: skip
def test_the_last_words_of_jupyterlite_are_told(does, said, tmp_path, monkeypatch):
    place = tmp_path / "tools"
    (place / "jupyterlite_core").mkdir(parents=True)
    (place / "jupyterlite_core/__init__.py").touch()
    (place / "jupyterlite_core/__main__.py").write_text(does)
    monkeypatch.setenv("PYTHONPATH", str(place))
    with pytest.raises(StorageError, match=rf"out: JupyterLite failed: {said}$"):
        BUILD(tmp_path, tmp_path / "out")


def test_without_the_extra_the_line_that_installs_it_is_told(tmp_path, monkeypatch, capsys):
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "jupyterlite_core", None)
    assert cli.main(["lessons", "--lite", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert 'jupyterlite_core is not installed; expected: pip install "minilora[lite]"' in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (["--lite", "--overwrite"], "--overwrite is for a folder of lessons; a site of --lite needs a new"),
        (["--pyodide", "p"], "--pyodide is for a site; expected --lite too"),
    ],
)
def test_options_that_would_do_nothing_are_refused(typed, said, tmp_path, capsys):
    assert cli.main(["lessons", str(tmp_path / "out"), *typed]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
