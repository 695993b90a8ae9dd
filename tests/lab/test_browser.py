"""The lab in Chromium."""

import re
import time

import driven
import pytest
from driven import ASSETS, ROOT

from minilora.lab import planted, site

FILES = ROOT / "tests/fixtures/lora_files"
ONE = FILES / "kohya_sdscripts/sd15_linear/sd15_linear.safetensors"
pytestmark = pytest.mark.browser
SOON = 30  # seconds: three times what benchmarks/lab.py finds, since other programs may share the cores
AXE = "() => axe.run().then(found => found.violations.map(v => `${v.id}: ${v.nodes.map(n => n.html)}`))"
ASK = "url => fetch(url).then(() => 'sent', () => 'refused')"
MISS = """([kind, file]) => {
  const dataTransfer = new DataTransfer();
  file ? dataTransfer.items.add(new File(["x"], "x")) : dataTransfer.setData("text/plain", "x");
  return !document.body.dispatchEvent(new DragEvent(kind, {dataTransfer, bubbles: true, cancelable: true}));
}"""  # whether the page keeps the browser from what it would do
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
    assert not page.is_visible("#read-results")  # of the adapter before it


def test_the_adapter_that_was_trained_is_opened(page):
    assert page.inner_text("#read-error")
    page.click("#reuse")
    page.locator("#read-says", has_text="the adapter trained above: LoRA of rank 8 beside 21").wait_for()
    assert page.inner_text("#read-error") == ""
    assert page.is_visible("#read-results")


def test_the_same_file_can_be_chosen_again(page):
    for said in ("trained above", "LoRA of rank"):
        page.locator("#read-says", has_text=said).wait_for()
        page.evaluate("() => { document.getElementById('read-says').textContent = '' }")
        page.set_input_files("#files", ONE)
    page.locator("#read-says", has_text="LoRA of rank").wait_for()


def test_a_file_is_dropped_and_a_folder_is_refused(page):
    driven.drop(page, ONE.parent, "#drop")
    said = f"{ONE.parent.name}: cannot be read; drop the files in the folder, not the folder"
    page.locator("#read-error", has_text=said).wait_for()
    driven.drop(page, ONE, "#drop")
    page.locator("#read-says", has_text="LoRA of rank").wait_for()


def test_files_that_miss_the_box_do_not_replace_the_page(page):
    for kind in ("dragover", "drop"):
        assert [page.evaluate(MISS, [kind, file]) for file in (True, False)] == [True, False]


def test_files_dropped_before_python_runs_are_not_forgotten_in_silence(browser, folder):
    with driven.opened(browser, folder) as page:
        assert "Loading Python" in page.inner_text("#status")
        for place in ("#drop", "#files"):
            driven.drop(page, ONE, place)
            page.locator("#read-says", has_text="still loading").wait_for()
        driven.ready(page)
        assert page.url == page.home
        assert page.inner_text("#read-says") == ""


def test_a_page_opened_as_a_file_says_what_to_do(browser, folder):
    alone = browser.new_page()
    alone.goto((folder / "index.html").as_uri())
    assert "python3 -m http.server" in alone.inner_text("#status")
    alone.close()


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


def test_a_double_click_begins_a_training_and_stops_it(page):
    page.select_option("#text", "recipes")
    page.dblclick("#train")
    page.locator("#learn-says", has_text="Stopped before the first step.").wait_for(timeout=60_000)
    assert page.is_enabled("#train")


def test_enter_begins_no_second_training_and_no_second_search(page):
    panels = (("train", "stop", "learn", "prompt"), ("search", "halt", "find", "pairs"))
    for begin, end, says, field in panels:
        page.click(f"#{begin}")
        page.locator(f"#{says}-says", has_text=re.compile("Step 1|Training with")).wait_for(timeout=60_000)
        page.press(f"#{field}", "Enter")
        assert "writes" not in page.inner_text(f"#{says}-says")
        page.click(f"#{end}")
        page.locator(f"#{says}-says", has_text=re.compile("Done|Stopped")).wait_for(timeout=60_000)


def test_an_error_that_nobody_expected_is_said_in_its_panel(page):
    page.workers[0].evaluate("() => { self.kept = lab; lab = {answer() { throw Error('it broke') }} }")
    try:
        for begin, panel in (("train", "learn"), ("search", "find"), ("reuse", "read")):
            page.click(f"#{begin}")
            page.locator(f"#{panel}-error", has_text="does not work here: it broke").wait_for()
            assert page.inner_text(f"#{panel}-says") == ""
            assert page.is_enabled(f"#{begin}")
        assert "Ready" in page.inner_text("#status")
    finally:
        page.workers[0].evaluate("() => { lab = self.kept }")


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
