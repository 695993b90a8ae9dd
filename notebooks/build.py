"""Make the lessons: notebooks/src/NAME.py -> notebooks/NAME.ipynb, executed, the same bytes every time.

    python notebooks/build.py                build all of them, and their list, README.md
    python notebooks/build.py --check        execute again, compare with what is stored; exit 1 if it differs

`minilora lessons DIR` writes copies to work in; minilora/course/lessons.py says what a source is. Its tags:
exercise is a stub to be filled in, and check the cell after it, which sees the student's answer and no other
(the answers that it accepts and refuses are in solutions/NAME.md); first (src/first.py is put above it);
claims (see below); corpus (the outputs need the fetched texts); smollm2 (they need its weights); unkept (the
outputs are not kept: they hold random names, or depend on what is installed); rounding (rounding errors are
shown); trained (what is printed was computed from trained weights).

Claims are code that is executed with the lesson and not shown in it: `says("a residual of {:.3f}", x)` and
`holds("most of them", 2 * x > y)`. The words, with the numbers that came out, must stand in the lesson's
text or in its solutions; tests/project/test_notebooks.py lets no number stand there that no claim has said.

What is compared: text must be equal, but each number that was trained may be off by one in its last digit,
since processors add in different orders. A figure is compared if the same matplotlib drew it, but for a few
pixels. Where rounding errors are what is shown, only the words count.
"""

import argparse
import base64
import html
import json
import os
import re
import sys
import tempfile
from hashlib import sha256
from pathlib import Path

import matplotlib
import nbformat
import numpy as np

from minilora.course import lessons as course

HERE = Path(__file__).resolve().parent
LESSONS = course.lessons()
NUMBER = re.compile(r"[-+]?\d[\d,]*(?:\.(?P<decimals>\d+))?(?:e(?P<power>[-+]\d+))?")
FIGURE = re.compile(r'<img alt="(?P<says>[^"]*)" [^>]*src="data:image/png;base64,(?P<png>[^"]*)"')
PIXELS = 0.02  # the share of pixels that may differ
CLAIMS = """
import json
from pathlib import Path

LESSONS = Path.cwd()


def says(words, *values):
    print(json.dumps([words, words.format(*values), True]))


def holds(words, condition):
    print(json.dumps([words, words, bool(condition)]))
"""


def notebook(name, claims=False):
    """The lesson without outputs; with its claims, if they are to be executed."""
    text, first = course.source(name), course.source("first")
    cells = [cell for cell in course.cells(text) if claims or "claims" not in cell.tags]
    nb = nbformat.from_dict(course.document([course.Cell(False, ["claims"], CLAIMS)] * claims + cells))
    about = {"matplotlib": matplotlib.__version__, "source": sha256((text + first).encode()).hexdigest()}
    nb.metadata = nbformat.from_dict({"kernelspec": course.KERNEL, "minilora": about})
    return nb


def title(name):
    """The title of a lesson."""
    return course.opening(name).title


def tags_of(cell):
    """The tags of a cell."""
    return cell.metadata.get("tags", [])


def execute(nb, folder=HERE):
    """Run all cells in a fresh kernel, begun in a folder, and drop what differs from run to run.

    The claims go from the cells into the metadata: what each says, and with which numbers.
    """
    from nbclient import NotebookClient

    with tempfile.TemporaryDirectory() as profile:
        os.environ |= {f"{library}_NUM_THREADS": "1" for library in ("OPENBLAS", "OMP", "MKL")}
        os.environ["IPYTHONDIR"] = profile  # one order of summation, and nobody's startup files
        NotebookClient(
            nb, timeout=1800, kernel_name="python3", record_timing=False, store_widget_state=False,
            extra_arguments=["--log-level=ERROR"],
            resources={"metadata": {"path": str(folder)}},
        ).execute()  # fmt: skip
    nb.metadata.pop("language_info", None)  # holds the patch version of Python
    nb.metadata.pop("widgets", None)
    claimed, count = [], 0
    for cell in nb.cells:
        cell.metadata.pop("execution", None)
        if "claims" in tags_of(cell):
            lines = "".join(output["text"] for output in cell.outputs).splitlines()
            claimed += [{"tags": tags_of(cell)[1:], "claim": json.loads(line)} for line in lines]
        elif cell.cell_type == "code":
            cell.execution_count = count = count + 1
            cell.outputs = [] if "unkept" in tags_of(cell) else tidy(cell.outputs)
    nb.cells = [cell for cell in nb.cells if "claims" not in tags_of(cell)]
    for number, cell in enumerate(nb.cells, 1):
        cell.id = f"cell-{number:02}"
    nb.metadata["minilora"]["claims"] = claimed
    return nb


def tidy(outputs):
    """The outputs with what was printed in one piece, and each figure's sentence for its plain text."""
    whole = []
    for output in outputs:
        if whole and output.get("name") and output.get("name") == whole[-1].get("name"):
            whole[-1]["text"] += output["text"]  # it came in pieces, by chance
            continue
        data = output.get("data", {})
        if found := FIGURE.search(data.get("text/html", "")):
            data["text/plain"] = html.unescape(found["says"])
        whole.append(output)
    return whole


def prose(nb):
    """The text of a lesson and the sentences of its figures, in one line."""
    text = "\n".join(cell.source for cell in nb.cells if cell.cell_type == "markdown")
    return plain(" ".join([text, *pictured(nb)]))


def plain(text):
    """Markdown in one line, without blocks of code, headings' signs and tags, and where links lead."""
    text = re.sub(r"```.*?```", " ", text, flags=re.S)
    return " ".join(re.sub(r"(?m)^#+ |</?\w+>|\]\([^)]*\)", " ", text).split())


def pictured(nb):
    """The sentences of a lesson's figures."""
    for cell in nb.cells:
        for output in cell.get("outputs", []):
            if FIGURE.search(output.get("data", {}).get("text/html", "")):
                yield output["data"]["text/plain"]


def solutions(name):
    """The text of a lesson's solutions, in one line."""
    text = (HERE / "solutions" / f"{name}.md").read_text(encoding="utf-8")
    return plain(re.sub(r"(?m)^(#|- `).*$", " ", text))  # headings, wrong answers


def unsaid(nb, name):
    """The claims that do not hold, or whose words with the numbers that came out are not in the text."""
    text = f"{prose(nb)} {solutions(name)}"
    for words, said, holds in (row["claim"] for row in nb.metadata["minilora"]["claims"]):
        if not holds:
            yield f"it does not hold: {words}"
        elif " ".join(said.split()) not in text:
            yield f"the text does not say: {said}"


def written(nb):
    """The notebook as the text of its file."""
    nbformat.validate(nb)
    return nbformat.writes(nb) + "\n"


def lacking(nbs):
    """The tags whose cells need what cannot be had; the rest is fetched now, and no lesson speaks of it."""
    from minilora.data import corpora
    from minilora.errors import StorageError
    from minilora.formats import huggingface

    used = {tag for nb in nbs for cell in nb.cells for tag in tags_of(cell)}
    for tag, fetch in (("corpus", lambda: corpora.corpus("folio")), ("smollm2", huggingface.smollm2)):
        try:
            if tag in used:
                fetch()
        except StorageError as e:
            print(f"what {tag} needs is not there: {e}", file=sys.stderr)
            yield tag


def differences(old, new, missing):
    """What is different in two executions of one lesson, in words, but for cells with a tag in `missing`."""
    if [cell.source for cell in old.cells] != [cell.source for cell in new.cells]:
        yield "its cells are not those of src/; build it again"
        return
    stored, now = old.metadata["minilora"], new.metadata["minilora"]
    drawn = stored["matplotlib"] == now["matplotlib"]
    rows, again = ([row for row in nb["claims"] if not missing & {*row["tags"]}] for nb in (stored, now))
    if [row["claim"][0] for row in rows] != [row["claim"][0] for row in again]:
        yield "its claims are not those of src/; build it again"
        return
    for row, other in zip(rows, again, strict=True):
        (_, was, _), (_, says, holds) = row["claim"], other["claim"]
        close = "trained" in row["tags"] and all(map(neighbours, *map(NUMBER.finditer, (was, says))))
        if not holds or (was != says and not close):
            yield f"the text says: {was}\nand now: {says}, which {'holds' if holds else 'does not hold'}"
    for a, b in zip(old.cells, new.cells, strict=True):
        tags = tags_of(a)
        if a.cell_type == "code" and not missing & {*tags}:
            if len(a.outputs) != len(b.outputs):
                yield f"{a.id}: {len(a.outputs)} outputs are stored, {len(b.outputs)} came now"
                continue
            for x, y in zip(a.outputs, b.outputs, strict=True):
                figures = [FIGURE.search(o.get("data", {}).get("text/html", "")) for o in (x, y)]
                if all(figures):
                    if drawn and not alike(*figures, "rounding" in tags):
                        yield f"{a.id}: the figure is another"
                elif x != y and not near(x, y, tags):
                    yield f"{a.id}: stored is\n{shown(x)}\nand now it is\n{shown(y)}"


def alike(a, b, words_only):
    """Whether two figures show the same: the sentence but for its numbers, and nearly all pixels."""
    from io import BytesIO

    from matplotlib.image import imread

    words = [NUMBER.sub("#", html.unescape(figure["says"])) for figure in (a, b)]
    if words_only or words[0] != words[1]:
        return words[0] == words[1]
    p, q = (imread(BytesIO(base64.b64decode(figure["png"]))) for figure in (a, b))
    return p.shape == q.shape and (np.abs(p - q) > 0.1).any(-1).mean() <= PIXELS


def near(a, b, tags):
    """Whether two outputs print the same words, and numbers as near as their tags let one expect."""
    if {a.output_type, b.output_type} != {"stream"} or not {"rounding", "trained"} & {*tags}:
        return False
    texts = a["text"], b["text"]
    if len({" ".join(NUMBER.sub("#", text).split()) for text in texts}) > 1:
        return False
    return "rounding" in tags or all(map(neighbours, *(NUMBER.finditer(text) for text in texts)))


def neighbours(a, b):
    """Whether two printed numbers differ by one in the last digit of the coarser one, or not at all."""
    p, q = (float(n[0].replace(",", "")) for n in (a, b))
    unit = max(10.0 ** (int(n["power"] or 0) - len(n["decimals"] or "")) for n in (a, b))
    return abs(p - q) <= 1.01 * unit


def shown(output):
    """An output for the terminal."""
    return output.get("text") or json.dumps(output.get("data", output), ensure_ascii=False)[:2000]


def faults(nb):
    """What a lesson's outputs must not hold, in words."""
    for cell in nb.cells:
        if "execution" in cell.metadata:
            yield f"{cell.id}: holds times"
        for output in cell.get("outputs", []):
            said = json.dumps({k: v for k, v in output.get("data", {}).items() if k != "text/html"})
            said += output.get("text", "")
            if output.output_type == "error" or output.get("name") == "stderr":
                yield f"{cell.id}: {shown(output)}"
            if re.search(r"(?<![\w.)])/(home|root|tmp|work|usr|opt|Users|var|mnt)/|[A-Z]:\\\\", said):
                yield f"{cell.id}: names a path of this machine"
            if re.search(r"\bat 0x[0-9a-f]{6,}", said):
                yield f"{cell.id}: names an address in memory"


def main(argv=None):
    """Build, check or copy; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help=f"which lessons (default all: {', '.join(LESSONS)})")
    parser.add_argument("--check", action="store_true", help="compare with what is stored, change nothing")
    args = parser.parse_args(argv)
    names = [Path(name).stem for name in args.names] or list(LESSONS)
    if unknown := set(names) - set(LESSONS):
        parser.error(f"there is no lesson {min(unknown)!r}; there are {', '.join(LESSONS)}")
    for file, command in course.DATA.values():
        if not (HERE.parent / file).exists():
            print(f"{file} is missing; `{command}` makes it", file=sys.stderr)
            return 1
    nbs = {name: notebook(name, claims=True) for name in names}
    missing = set(lacking(nbs.values()))
    if missing and not args.check:
        return 1
    wrong = 0
    for name in names:
        path, nb = HERE / f"{name}.ipynb", execute(nbs[name])
        found = [] if missing else list(faults(nb))
        if args.check:
            found += differences(nbformat.read(path, 4), nb, missing)
        elif not (found := found + list(unsaid(nb, name))):
            path.write_text(written(nb), encoding="utf-8")
        for what in found:
            print(f"{name}: {what}", file=sys.stderr)
        wrong += bool(found)
        print(f"{name}: {'wrong' if found else 'as stored' if args.check else 'built'}")
    if not args.check:
        (HERE / "README.md").write_text(course.readme(), encoding="utf-8")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
