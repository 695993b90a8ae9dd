"""The site: every page, figure and public name is on it, its links lead somewhere, and it stays at home."""

import base64
import functools
import hashlib
import http.server
import inspect
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import threading
import urllib.parse
from collections import defaultdict
from html.parser import HTMLParser
from itertools import chain
from pathlib import Path

import pytest
import website

import minilora as ml
from minilora import cli

ROOT = Path(__file__).parents[2]
AXE = "axe-core@4.14.1"
DIGEST = "FHfa+lmNjQZfJz1q8wKqIDwC6DExcHt/pkjNQb09a3NPjCKg2rhu5qb2S4r76ASyFNNtuFooJpZe37OgudVGtQ=="  # sha512
(LESSON,) = (f"{path[:-6]}.html" for path in website.found("notebooks/*_one_equation.ipynb"))
READ = ("index.html", LESSON, "gallery.html", "api/minilora.html", "docs/claims.html")


@pytest.fixture(scope="module")
def pages():
    """Every page as Markdown; figures have the captions of the pages that show them."""
    return website.pages({})


def test_every_page_is_in_the_navigation_once(pages):
    trees = [re.findall(r"^```{toctree}\n(.*?)```", page, re.M | re.S) for page in pages.values()]
    listed = re.findall(r"^/?(\S+\.(?:md|ipynb))$", "\n".join(chain(*trees)), re.M)
    assert sorted([*listed, "index.md"]) == sorted(pages)
    own = website.found("*.md", "docs/*.md", "benchmarks/*.md", "benchmarks/*/*.md", "notebooks/*.ipynb")
    assert {*own} - {"README.md"} <= pages.keys()


def test_a_page_that_no_section_names_comes_last(monkeypatch):
    found = website.found
    monkeypatch.setattr(website, "found", lambda *some: [*found(*some), "docs/new.md"])
    assert website.menu()["More"][-1] == "docs/new.md"


def test_every_figure_is_in_the_gallery_with_the_command_that_draws_it(pages):
    shown = re.findall(r"^```{figure} (\S+)$.*?^`([^`]+)`$", pages["gallery.md"], re.M | re.S)
    files = website.found("figures/**/*.png", "benchmarks/results/*.png")
    assert sorted(figure for figure, _ in shown) == sorted(files)
    for figure, command in shown:
        program, *arguments = shlex.split(command)
        if program == "minilora":
            cli.parser().parse_args(arguments)  # else SystemExit
        else:
            assert (program, (ROOT / arguments[0]).exists()) == ("python", True), figure


def test_a_figure_that_nothing_draws_is_named(monkeypatch):
    monkeypatch.setattr(website, "found", lambda *patterns: ["figures/other/new.png"])
    with pytest.raises(ValueError, match=r"figures/other/new\.png: there is no figures/other/MANIFEST\.json"):
        website.commands.__wrapped__()


def test_every_public_name_is_in_the_reference(pages):
    every = "".join(page for path, page in pages.items() if path.startswith("api/"))
    there = re.findall(r"^\.\. auto(\w+):: minilora\.([\w.]+)$", every, re.M)
    names = {name: getattr(ml, name) for name in ml.__all__}
    paths = {n: t.__name__.removeprefix("minilora.") if inspect.ismodule(t) else n for n, t in names.items()}
    assert sorted(path for _, path in there) == sorted(paths.values())
    for name, path in paths.items():
        assert f"`{name} <minilora.{path}>`" in pages["api.md"]


def test_the_start_page_is_the_readme(pages):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert all(line in pages["index.md"] for line in readme.splitlines())


def test_the_experiment_on_its_page_runs_and_is_not_run_twice(tmp_path):
    code = re.search(r"```python\n(.*?)```", (ROOT / "docs/your_experiment.md").read_text(), re.S)[1]
    (tmp_path / "alpha.py").write_text(code)
    command = [sys.executable, "alpha.py"]
    run = functools.partial(subprocess.run, command, cwd=tmp_path, capture_output=True, text=True, check=True)
    printed = run().stdout
    rows = (tmp_path / "runs/alpha/rows.jsonl").read_bytes()
    assert len(printed.splitlines()) == len(rows.splitlines()) == 6
    assert run().stdout == printed
    assert (tmp_path / "runs/alpha/rows.jsonl").read_bytes() == rows


def test_a_site_is_replaced_as_a_whole_and_no_other_folder_is(tmp_path, monkeypatch, capsys):
    def build(files, site):
        for name in files.split():
            (site / name).parent.mkdir(exist_ok=True)
            (site / name).write_text(files)
        assert "bad" not in files, "a page is wrong"

    def made(files, folder="site"):
        monkeypatch.setattr(website, "build", functools.partial(build, files))
        monkeypatch.setattr(sys, "argv", ["website.py", "--out", str(tmp_path / folder)])
        website.main()

    def there():
        return sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.*"))

    made("objects.inv old.html _static/of.css")
    made("objects.inv docs/new.html")
    assert there() == ["site/docs/new.html", "site/objects.inv"]
    with pytest.raises(AssertionError, match="a page is wrong"):
        made("objects.inv bad.html")
    assert there() == ["site/docs/new.html", "site/objects.inv"]
    build("mine.html", tmp_path / "other")
    build("mine.txt", tmp_path / "site")
    for folder, said in (("other", "this is not one"), ("site", "this holds 'mine.txt'")):
        with pytest.raises(SystemExit):
            made("objects.inv", folder)
        assert f"{folder}: only the folder of a site is overwritten; {said}" in capsys.readouterr().err


# ---- the built site: pytest -m site


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site, built as the documents say."""
    pytest.importorskip("sphinx", reason="sphinx is not installed; the extra `docs` has it")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "docs/website.py", "--out", folder]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not folder.with_name("jupyter_execute").exists()
    return folder


class Page(HTMLParser):
    """The names in a page, where it links, and what it loads."""

    def __init__(self, file):
        super().__init__()
        self.names, self.links, self.loads = set(), [], []
        self.feed(file.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        """One element."""
        found = dict(attributes)
        self.names |= {found.get("id"), found.get("name")}
        self.links += [found[key] for key in ("href", "src") if found.get(key)]
        if tag not in ("a", "link") or found.get("rel") in ("stylesheet", "preload"):
            self.loads += [found[key] for key in ("href", "src") if found.get(key)]


@pytest.mark.site
def test_every_link_of_the_site_leads_somewhere_and_nothing_is_loaded_from_elsewhere(site):
    parsed = {file: Page(file) for file in site.rglob("*.html")}
    assert len(parsed) > 100
    wrong = defaultdict(set)
    for file, page in parsed.items():
        assert not [url for url in page.loads if re.match(r"(https?:)?//", url)], file
        for link in page.links:
            url = urllib.parse.urlsplit(link)
            if url.scheme or url.netloc:
                continue
            target = (file.parent / urllib.parse.unquote(url.path)).resolve() if url.path else file
            if not target.exists() or (url.fragment and url.fragment not in parsed[target].names):
                wrong[link].add(file.name)
    assert not wrong


@pytest.fixture(scope="module")
def address(site):
    """Where the site is served."""
    handler = functools.partial(type("Quiet", (http.server.SimpleHTTPRequestHandler,), {
        "log_message": lambda *what: None}), directory=site)  # fmt: skip
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.fixture(scope="module")
def axe(tmp_path_factory):
    """The source of axe, which finds what keeps people from reading a page."""
    folder = tmp_path_factory.mktemp("axe")
    if (
        not shutil.which("npm")
        or subprocess.run(
            ["npm", "pack", "--silent", AXE], cwd=folder, check=False, capture_output=True
        ).returncode
    ):
        pytest.skip(f"npm cannot fetch {AXE}")
    (file,) = folder.iterdir()
    assert base64.b64encode(hashlib.sha512(file.read_bytes()).digest()).decode() == DIGEST
    with tarfile.open(file) as archive:
        return archive.extractfile("package/axe.min.js").read().decode()


@pytest.fixture(scope="module")
def chromium():
    """Chromium, without a window."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="the extra `docs` has playwright")
    program = shutil.which("chromium")
    if not program:
        pytest.skip("there is no chromium; apt-get install chromium")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@pytest.mark.site
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("path", READ)
def test_a_page_opens_asks_nobody_and_has_nothing_that_axe_finds(address, chromium, axe, path, width, scheme):
    with chromium.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme) as context:
        page, asked, faults = context.new_page(), [], []
        page.on("request", lambda request: asked.append(request.url))
        page.on("console", lambda message: message.type == "error" and faults.append(message.text))
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.goto(address + path)
        page.wait_for_load_state("networkidle")
        assert not faults
        assert {url for url in asked if not url.startswith((address, "data:"))} == set()
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        formulas, wrong = page.locator(".math"), page.locator("mjx-merror, [data-mjx-error]")
        assert formulas.count() == page.locator("mjx-container").count()
        assert (wrong.count(), formulas.count() > 50) == (0, path == LESSON)
        page.evaluate(axe)
        found = page.evaluate("axe.run()")["violations"]
        assert not [(rule["id"], rule["nodes"][0]["html"], len(rule["nodes"])) for rule in found]
