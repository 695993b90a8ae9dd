"""The lessons' site in Chromium: a lesson runs to its end there, on files of the site alone."""

import json
import time

import driven
import pytest

from minilora.course import lessons, lite
from minilora.data import corpora

pytestmark = pytest.mark.browser
LESSON = next(name for name in lessons.lessons() if name.endswith("merging_costs_nothing"))  # a short one
READY = """() => {
  const shown = window.jupyterapp?.shell.currentWidget;
  return shown?.sessionContext?.session?.kernel?.status === "idle" && shown.content.model?.cells.length > 1;
}"""
RUN = "() => { void jupyterapp.commands.execute('notebook:run-all-cells') }"
CELLS = "() => jupyterapp.shell.currentWidget.content.model.toJSON().cells"
ASK = """code => {
  const asked = jupyterapp.shell.currentWidget.sessionContext.session.kernel.requestExecute({code});
  let said = "";
  asked.onIOPub = ({content}) => { said += content.text ?? content.evalue ?? ""; };
  return asked.done.then(() => said);
}"""


@pytest.fixture(scope="module")
def folder(browser, tmp_path_factory):
    out = tmp_path_factory.mktemp("lessons") / "out"
    lite.write_site(out, str(driven.ASSETS / "pyodide"))
    settings = json.loads((out / "jupyter-lite.json").read_text())
    settings["jupyter-config-data"]["exposeAppInBrowser"] = True  # so that its state can be read
    (out / "jupyter-lite.json").write_text(json.dumps(settings))
    return out


@pytest.fixture(scope="module")
def page(browser, folder):
    with driven.opened(browser, folder, f"notebooks/index.html?path={LESSON}.ipynb") as page:
        page.wait_for_function(READY, timeout=180_000)
        yield page


def code_of(page):
    return [cell for cell in page.evaluate(CELLS) if cell["cell_type"] == "code"]


def test_a_lesson_runs_to_its_end(page):
    start, code = time.monotonic(), []
    page.evaluate(RUN)
    while not code or any(cell["execution_count"] is None for cell in code):
        assert time.monotonic() < start + 300, "it is still running"
        page.wait_for_timeout(500)
        code = code_of(page)
        assert "error" not in [output["output_type"] for cell in code for output in cell["outputs"]]
    print(f"{LESSON} took {time.monotonic() - start:.1f} s")
    said = "".join(output.get("text", "") for cell in code for output in cell["outputs"])
    exercises = sum("exercise" in cell["metadata"].get("tags", ()) for cell in code)
    assert said.count("not yet: there is no answer yet") == exercises > 0


def test_a_lesson_finds_its_data_and_the_texts(page, folder):
    places = [f"../{file}" for file, _ in lessons.DATA.values()]
    assert page.evaluate(ASK, f"print(*(len(open(place).read()) for place in {places}))").split() == [
        str(len((lessons.root() / file).read_text())) for file, _ in lessons.DATA.values()
    ]
    code = "from minilora.data import corpora; print(corpora.corpus_or_fallback('kjv').source)"
    said = page.evaluate(ASK, code).splitlines()[-1]
    here = (folder / "files" / corpora.texts_folder().name).exists()
    assert said == corpora.MANIFEST["kjv"].source if here else said.startswith("fallback: ")


def test_nothing_was_asked_of_another_place(page):
    assert page.asked
    here = page.home, "blob:", "data:", "attachment:"  # a picture in a notebook
    assert not [url for url in page.asked if not url.startswith(here)]
