"""The page as it is written: whole, of itself, and in step with the Python that it asks."""

import inspect
import json
import re
import shlex
import subprocess
import sys
import zipfile
from itertools import pairwise
from pathlib import Path

import pytest
from pages import WHEEL, Page, stand_in, wheel

from minilora.errors import ConfigError, FormatError, StorageError
from minilora.lab import lab, learning, planted, reading, site

ROOT = Path(__file__).parents[2]
JS = {path.name: path.read_text() for path in site.PAGE.glob("*.js")}
PYTHON = "".join(inspect.getsource(module) for module in (lab, learning, planted, reading))
ABOUT = {"file_name": WHEEL, "sha256": "0", "depends": []}
CONTROLS = ("input", "select", "textarea")


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    out = tmp_path_factory.mktemp("site") / "lab"
    return out, site.write(out)


@pytest.fixture(scope="module")
def page(written):
    return Page((written[0] / "index.html").read_text())


# ---- the folder


def test_a_page_is_written_that_loads_pyodide_from_its_cdn(written):
    out, told = written
    names = {"index.html", "lab.css", "lab.js", "draw.js", "worker.js", "minilora.zip"}
    assert {path.name for path in out.iterdir()} == names
    assert (told.files, told.pyodide) == (6, site.PYODIDE)
    assert told.bytes == sum(path.stat().st_size for path in out.iterdir()) < 3_000_000
    assert "python3 -m http.server" in str(told)
    assert f"six static files, about {told.bytes / 1e6:.0f} MB" in (ROOT / "docs/lab.md").read_text()


def test_the_command_that_opens_it_can_be_pasted(tmp_path):
    out = tmp_path / "my lab's"
    command = shlex.split(str(site.write(out)).splitlines()[1].partition(": ")[2])
    assert command[command.index("-d") + 1] == str(out)


def test_pyodide_is_copied_from_a_folder_and_nothing_else_is(tmp_path):
    files = stand_in(tmp_path / "there")
    (tmp_path / "there" / "more").write_text("which is not needed")
    told = site.write(tmp_path / "out", str(tmp_path / "there"))
    assert {path.name: path.read_bytes() for path in (tmp_path / "out/pyodide").iterdir()} == files
    assert told.pyodide == "pyodide/"
    text = (tmp_path / "out/index.html").read_text()
    assert 'content="pyodide/"' in text
    assert "https:" not in text


def test_a_package_comes_with_all_that_it_needs_whatever_way_its_name_is_written(tmp_path):
    files = stand_in(tmp_path / "there", packages=("a", "b-c", "d.e", "f"), depends=["B_c"])
    found = site.distribution(str(tmp_path / "there"), ("pyodide.mjs",), ("A", "d-e"))
    assert {path.name for path in found} == {"pyodide.mjs", *map(wheel, ("a", "b-c", "d.e"))} < {*files}


@pytest.mark.parametrize("name", [*site.CORE, WHEEL])
def test_a_missing_file_of_pyodide_is_named(name, tmp_path):
    stand_in(tmp_path / "there")
    (tmp_path / "there" / name).unlink()
    with pytest.raises(StorageError, match=f"{re.escape(name)}: is missing"):
        site.write(tmp_path / "out", str(tmp_path / "there"))
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


@pytest.mark.parametrize(
    ("lock", "said"),
    [
        ({"packages": {}}, "does not say which file numpy is"), ({"packages": []}, "does not say"),
        ({"packages": {"numpy": {"file_name": WHEEL}}}, "does not say"), ({}, "does not say"),
        ({"packages": {"numpy": ABOUT}}, "its sha256 is not the one"),
        ({"packages": {"numpy": ABOUT | {"file_name": f"../{WHEEL}"}}}, "its sha256 is not the one"),
        ({"packages": {"numpy": ABOUT | {"depends": ["blas"]}}}, "does not say which file blas is"),
    ],
)  # fmt: skip
def test_another_numpy_is_refused(lock, said, tmp_path):
    stand_in(tmp_path / "there")
    (tmp_path / "there/pyodide-lock.json").write_text(json.dumps(lock))
    with pytest.raises(FormatError, match=said):
        site.write(tmp_path / "out", str(tmp_path / "there"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("address", [
    "http://example.org/", "https://example.org", "https://example.org/x", "ftp://example.org/",
    "https://example.org/?x/", "https://example.org/#/", "https://a b/", "https://x;script-src *.evil/",
    'https://example.org/"><script>/', "https:///x/",
])  # fmt: skip
def test_an_address_that_is_no_folder_is_refused(address, tmp_path):
    with pytest.raises(ConfigError, match="expected"):
        site.write(tmp_path / "out", address)
    assert not list(tmp_path.iterdir())


def test_what_is_there_is_kept(tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(StorageError, match="is there already"):
        site.write(tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_the_archive_is_the_package_and_the_same_each_time(written, tmp_path):
    assert (written[0] / "minilora.zip").read_bytes() == site.packed(site.package())
    with zipfile.ZipFile(written[0] / "minilora.zip") as archive:
        names = set(archive.namelist())
        archive.extractall(tmp_path)
    here = {p.relative_to(site.PACKAGE.parent).as_posix() for p in site.PACKAGE.rglob("*.py")}
    assert {name for name in names if name.endswith(".py")} == here
    assert "minilora/base/model.safetensors" in names
    assert not [name for name in names if "/page/" in name or "__pycache__" in name]
    code = 'from minilora.lab.lab import Lab; import minilora; print(*Lab().answer(\'{"do": "greet"}\'))'
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True,
                          check=True, env={"PYTHONPATH": str(tmp_path)})  # fmt: skip
    assert json.loads(done.stdout)["event"] == "ready"


# ---- the page


def test_the_page_runs_no_code_but_its_own(written, page):
    policy = next(m["content"] for m in page.all("meta") if m.get("http-equiv") == "Content-Security-Policy")
    rules = {rule.split()[0]: rule.split()[1:] for rule in policy.split("; ")}
    cdn = "https://cdn.jsdelivr.net"
    assert rules == {
        "default-src": ["'none'"], "script-src": ["'self'", "'wasm-unsafe-eval'", cdn],
        "worker-src": ["blob:"], "connect-src": ["'self'", cdn], "style-src": ["'self'"],
        "img-src": ["'self'", "data:"],
        "base-uri": ["'none'"], "form-action": ["'none'"],
    }  # fmt: skip
    for tag, attributes, _ in page.elements:
        assert not [name for name in attributes if name.startswith("on") or name == "style"], tag
        assert tag not in ("style", "iframe", "object", "base", "form") or "action" not in attributes
        assert tag != "script" or attributes["src"]
    for name, text in JS.items():
        bad = r"\beval\b|[rt]HTML\b|document\.write|https?://(?!www\.w3\.org)"
        assert not re.search(bad, text), name


def test_everything_the_page_refers_to_is_there(written, page):
    references = [a[name] for _, a, _ in page.elements for name in ("src", "href") if name in a]
    for reference in references:
        if reference.startswith("#"):
            assert reference[1:] in page.ids
        else:
            assert reference == "data:," or (written[0] / reference).is_file()
    for text in JS.values():
        for name in re.findall(r'from "\./([\w.]+)"|fetch\("([\w.]+)"\)|place\("([\w.]+)"\)', text):
            assert (written[0] / "".join(name)).is_file()


def test_every_id_is_unique_and_every_one_that_is_named_exists(page):
    assert len(page.ids) == len(set(page.ids))
    for _, attributes, _ in page.elements:
        for name in ("for", "aria-labelledby", "aria-describedby"):
            assert set(attributes.get(name, "").split()) <= set(page.ids)
    text = "".join(JS.values())
    used = set(re.findall(r'\$\("([\w-]+)"\)|\b(?:say|written|spelled)\("([\w-]+)"', text))
    named = {"".join(pair) for pair in used}
    lists = re.findall(r"for \(const id of \[(.*?)\]", text) + re.findall(r"const BUTTONS = \{(.*?)\}", text)
    named |= {name for found in lists for name in re.findall(r'"([\w-]+)"', found)}
    named |= {f"{panel}-{part}" for panel in ("learn", "find", "read") for part in ("says", "error")}
    assert named <= set(page.ids), named - set(page.ids)
    assert len(named) > 40


def test_every_control_has_a_label_and_every_picture_a_description(page):
    labels = {a["for"] for a in page.all("label") if "for" in a}
    for tag, attributes, parents in page.elements:
        if tag in CONTROLS:
            assert attributes.get("id") in labels or "label" in parents, attributes
        if tag == "button":
            assert attributes["type"] in ("button", "submit")
        if attributes.get("role") == "img":
            assert attributes["aria-labelledby"]
        if tag == "table":
            assert "id" in attributes or parents
    levels = [int(tag[1]) for tag, *_ in page.elements if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1 == levels.count(1)
    assert all(b <= a + 1 for a, b in pairwise(levels))


def test_the_page_says_what_the_package_has(page, written):
    text = (written[0] / "index.html").read_text()
    assert "its 344,736 numbers are frozen" in text
    recipes = learning.TEXTS["recipes"]().strip().split("\n\n")
    assert f">{len(recipes)} recipes<" in text
    assert not re.search(r"\{\w+\}", text)
    ranges = {a["id"]: (a["min"], a["max"]) for a in page.all("input") if a.get("type") == "range"}
    assert ranges["pairs"] == ("1", str(planted.MOST))
    assert f"LoRA of rank {planted.RANK} is not told" in text
    assert f"at least {learning.SHORTEST} characters" in text
    targets = [a["value"] for a in page.all("input") if a.get("name") == "target"]
    assert targets == ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    options = [a["value"] for a in page.all("option") if "value" in a]
    assert options == [*learning.TEXTS, "own"]


def test_the_page_says_how_long_it_takes_as_the_benchmark_found(written):
    assert learning.STEPS == 40
    whole = measured()["browser"]["whole"]
    assert 5 * round(whole / 5) == 15
    assert "It takes forty steps, some fifteen seconds" in (written[0] / "index.html").read_text()


def test_until_its_script_runs_the_page_says_what_to_do(written):
    status = re.search(r'<p id="status".*?</p>', (written[0] / "index.html").read_text())[0]
    assert "python3 -m http.server" in status
    start = JS["lab.js"].split("async function start() {")[1].lstrip()
    assert start.startswith('say("status", ')  # a browser runs no module from a file


# ---- the protocol


def measured():
    """Where -> what the benchmark found there."""
    rows = json.loads((ROOT / "benchmarks/results/lab.json").read_text())["rows"]
    return {row["where"]: row for row in rows}


def handlers():
    """Event -> the fields that the page reads of it."""
    body = JS["lab.js"].split("const show = {")[1].split("\n};")[0]
    return {name: set(re.findall(r"(?:^|, )(\w+)", fields))
            for name, fields in re.findall(r"^  (\w+)\(\{(.*?)\}\) \{", body, re.M)}  # fmt: skip


def emitted():
    """Event -> the fields that Python sends with it, as they stand in the source."""
    found = {}
    for start in re.finditer(r'\{\s*"event": "(\w+)"', PYTHON):
        depth, end = 0, start.start()
        for end in range(start.start(), len(PYTHON)):
            depth += (PYTHON[end] in "{[(") - (PYTHON[end] in "}])")
            if not depth:
                break
        found[start[1]] = set(re.findall(r'(?:[{,]|^)\s*"(\w+)": ', PYTHON[start.start() : end]))
    return found


def test_every_event_of_python_is_shown_with_fields_that_it_has():
    shown, sent = handlers(), emitted()
    assert shown.keys() == sent.keys() | {"failed", "over"}
    for name in sent:
        assert shown[name] <= sent[name], name
    for name, fields in (("failed", "event, do, says"), ("over", "event, do, stopped")):
        assert f'postMessage({{event: "{name}", ' in JS["worker.js"]
        assert shown[name] <= set(fields.split(", "))


def test_every_request_of_the_page_is_one_that_python_takes():
    asked = {}
    for do, rest in re.findall(r'ask\(\{do: "(\w+)"(.*?)\}\)', JS["lab.js"]):
        asked[do] = set(re.findall(r"(?:, )(\w+)", re.sub(r"\.\.\.config\(\)", "rank, alpha, targets", rest)))
    asked["read"] = asked["read"] - {"files"} | {"path"}  # where the worker puts the files
    asked["greet"] = set()
    assert '{do: "greet"}' in JS["worker.js"]
    del asked["stop"]
    assert asked == {name: set(inspect.signature(f).parameters) - {"lab"} for name, f in lab.DO.items()}
    long = set(json.loads(re.search(r"const LONG = (\[.*?\]);", JS["worker.js"])[1]))
    assert long == {"train", "find"}


def test_the_speed_that_the_page_tells_is_that_of_the_benchmark():
    told = json.loads((Path(learning.__file__).parent / "speed.json").read_text())
    assert told == {where: row["step"] for where, row in measured().items()}
