"""The lab in Chromium, with Pyodide from the folder that `python tests/lab/fetch.py build/lab` makes.

Skipped where there is no Chromium, no Playwright or no such folder; with MINILORA_LAB=FOLDER an error.
"""

import os
import re
import time
from pathlib import Path

import driven
import pytest

from minilora.lab import planted, site

ROOT = Path(__file__).parents[2]
ASSETS = Path(os.environ.get("MINILORA_LAB", ROOT / "build/lab"))
FILES = ROOT / "tests/fixtures/lora_files"
THERE = {"Chromium": bool(driven.CHROMIUM), str(ASSETS): (ASSETS / "axe.min.js").exists()}
LACKS = [name for name, there in THERE.items() if not there]
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(bool(LACKS) and "MINILORA_LAB" not in os.environ, reason=f"{LACKS} is not here"),
]
SOON = 30  # seconds: three times what benchmarks/lab.py finds, since other programs may share the cores
AXE = "() => axe.run().then(found => found.violations.map(v => `${v.id}: ${v.nodes.map(n => n.html)}`))"
ASK = "url => fetch(url).then(() => 'sent', () => 'refused')"
RUN = """code => {
  python.globals.set("code", code);
  return python.runPython(`
import contextlib, io, os
os.makedirs("/paths"); os.chdir("/paths")
said = io.StringIO()
with contextlib.redirect_stdout(said):
    exec(code, {"__name__": "paths"})
said.getvalue()`);
}"""


@pytest.fixture(scope="module")
def browser():
    pytest.importorskip("playwright")
    assert not LACKS
    with driven.chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("lab") / "out"
    site.write(out, str(ASSETS / "pyodide"))
    return out


@pytest.fixture(scope="module")
def page(browser, folder):
    with driven.opened(browser, folder, viewport={"width": 1280, "height": 900}) as page:
        page.cold = driven.ready(page)
        yield page


def accessible(page):
    """axe finds nothing on the page as it is, and nothing of it is wider than the window."""
    page.evaluate((ASSETS / "axe.min.js").read_text() + "; () => undefined")
    assert page.evaluate(AXE) == []
    assert page.evaluate("() => document.documentElement.scrollWidth <= innerWidth")


def test_a_cold_start_takes_a_few_seconds(page):
    print(f"ready after {page.cold} s")
    assert page.cold < SOON


def test_a_training_is_seen_from_its_first_step_to_its_text(page):
    start = time.monotonic()
    page.click("#train")
    page.locator("#values path").first.wait_for(state="attached")
    print(f"a spectrum after {time.monotonic() - start:.1f} s")
    assert time.monotonic() - start < SOON
    page.locator("#learn-says", has_text="Done").wait_for(timeout=300_000)
    assert "My lord, " in page.inner_text("#before")
    assert re.search(r"\b(Add|Serve|Stir|Cook|cups?|minutes)\b", page.inner_text("#after"))
    assert page.inner_text("#merged") == page.inner_text("#after")
    assert len(page.locator("#times tr").all()) == 3
    assert page.locator("#values path").count() == 8
    assert page.evaluate("() => document.getElementById('delta').width") == 96
    page.select_option("#module", "model.layers.0.mlp.gate_proj")
    page.locator("#delta[height='256']").wait_for()
    print(page.inner_text("#pace"))


def test_the_spectrum_finds_the_pairs(page):
    page.focus("#pairs")
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    page.locator("#find-says", has_text="fall most after the first 2, and 2 pairs").wait_for(timeout=300_000)
    assert page.locator("#bars .bar:not(.rest)").count() == 2
    assert page.locator("#bars .bar").count() == planted.RANK
    assert page.locator("#letters .moved").count() == 4


@pytest.mark.parametrize(
    ("place", "names"),
    [
        ("kohya_sdscripts/sd15_linear", ["sd15_linear.safetensors"]),
        ("peft/plain", ["adapter_config.json", "adapter_model.safetensors"]),
        ("mlx/lora_default", ["adapter_config.json", "adapters.safetensors"]),
    ],
)
def test_files_are_opened_where_they_lie(page, place, names):
    page.set_input_files("#files", [FILES / place / name for name in names])
    said = f"{' and '.join(names)}: LoRA of rank"
    page.locator("#read-says", has_text=said).wait_for()
    assert page.inner_text("#read-error") == ""
    assert page.locator("#kinds tbody tr").count() > 1
    assert page.locator("#opened-energy path").count() == 2


def test_what_is_no_adapter_is_said_beside_the_file(page, tmp_path):
    (tmp_path / "holiday.jpg").write_bytes(b"\xff\xd8\xff")
    page.set_input_files("#files", tmp_path / "holiday.jpg")
    page.locator("#read-error", has_text="holiday.jpg: cannot be read as an adapter").wait_for()


def test_the_adapter_that_was_trained_is_opened(page):
    page.click("#reuse")
    page.locator("#read-says", has_text="the adapter trained above: LoRA of rank 8 beside 21").wait_for()


def test_a_training_can_be_stopped_and_another_begun_by_keyboard(page):
    page.focus("#train")
    page.keyboard.press("Enter")
    page.locator("#learn-says", has_text="Step 1 of").wait_for(timeout=60_000)
    assert page.evaluate("() => document.activeElement.id") == "stop"
    page.keyboard.press("Enter")
    page.locator("#learn-says", has_text="Done").wait_for(timeout=120_000)
    assert page.evaluate("() => document.activeElement.id") == "train"
    assert page.locator("#loss path").count() == 1


def test_a_text_that_is_too_short_is_said(page):
    page.click("summary")
    page.select_option("#text", "own")
    page.fill("#own", "too short")
    page.click("#train")
    page.locator("#learn-error", has_text="your text has 9 characters").wait_for()
    assert page.is_visible("#train")


def test_axe_finds_nothing_when_all_is_shown(page):
    accessible(page)


@pytest.mark.parametrize("colours", ["light", "dark"])
def test_axe_finds_nothing_on_a_phone(browser, folder, colours):
    with driven.opened(browser, folder, viewport={"width": 390, "height": 844}, color_scheme=colours,
                       reduced_motion="reduce") as phone:  # fmt: skip
        accessible(phone)
        driven.ready(phone)
        driven.trained(phone)
        accessible(phone)
        assert not phone.errors


def test_nothing_was_asked_of_another_place(page):
    assert page.asked
    assert not [url for url in page.asked if not url.startswith((page.home, "blob:", "data:"))]
    assert not page.errors


def test_nothing_can_be_sent_to_another_place(page):
    with driven.serving(driven.Elsewhere) as other:
        assert page.evaluate(ASK, f"{other.url}page") == "refused"
        assert page.workers[0].evaluate(ASK, f"{other.url}worker") == "refused"
        assert other.asked == []


def test_the_main_paths_run_in_pyodide(page):
    said = page.workers[0].evaluate(RUN, (ROOT / "tests/main_paths.py").read_text())
    assert said == "jobs is 2; this platform has no processes; expected 1\n"
