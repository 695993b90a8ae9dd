"""On a terminal no message shares a line with a progress bar, and both say what pipes get."""

import os
import re
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minilora.session import Above

termios, pty, fcntl = (pytest.importorskip(name) for name in ("termios", "pty", "fcntl"))
ADAPTER = str(Path(__file__).parent / "fixtures/adapters/untied--q-and-v")
BAR = re.compile(r" *\d+%\|.*\[[\d:]+<.*\]")
NUMBER = re.compile(r"\d+(,\d+)*(\.\d+)?")


def screen(written):
    """The lines that a terminal shows: a carriage return goes back, and what comes then covers what was."""
    lines, at = [""], 0
    for c in written:
        if c == "\r":
            at = 0
        elif c == "\n":
            lines, at = [*lines, ""], 0
        else:
            lines[-1], at = lines[-1][:at].ljust(at) + c + lines[-1][at + 1 :], at + 1
    return [line.rstrip() for line in lines]


def on_terminal(*argv, cwd):
    """What a terminal of 80 columns shows of a command, and its exit code."""
    pid, fd = pty.fork()
    if pid == 0:
        os.chdir(cwd)
        os.execv(sys.executable, [sys.executable, "-m", "minilora", *argv])
    fcntl.ioctl(fd, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    written = b""
    while True:
        try:
            written += (more := os.read(fd, 1 << 16))
        except OSError:  # its end on Linux
            break
        if not more:
            break
    _, status = os.waitpid(pid, 0)
    return screen(written.decode().replace("\r\n", "\n")), os.waitstatus_to_exitcode(status)


def words(lines):
    """Lines without their numbers, of which times and speeds differ."""
    return [NUMBER.sub("#", line) for line in lines if line]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A text that can be learned, and nothing else."""
    place = tmp_path_factory.mktemp("terminal")
    (place / "text.txt").write_text("to be or not to be, that is the question. " * 400)
    return place


SMALL = ("--base", "base", "--data", "./text.txt")
COMMANDS = {
    "train": (
        "train",
        *SMALL,
        "--steps",
        "6",
        "--eval-every",
        "2",
        "--batch",
        "2",
        "--length",
        "16",
        "--out",
    ),
    "sweep": ("sweep", *SMALL, "--quick", "--ranks", "1", "--steps", "2", "--jobs", "1", "--out"),
    "inspect": ("inspect", ADAPTER, "--base", "base", "--out"),
    "compress": ("compress", ADAPTER, "--rank", "1"),
    "experiment": ("experiment", "cost", "--quick", "--jobs", "1", "--out"),
}


@pytest.mark.parametrize("command", [
    pytest.param(name, marks=[pytest.mark.slow] * (name in ("sweep", "experiment"))) for name in COMMANDS
])  # fmt: skip
def test_messages_and_bars_have_lines_of_their_own(command, folder):
    argv = COMMANDS[command]
    shown, code = on_terminal(*argv, f"a-{command}", cwd=folder)
    piped = subprocess.run([sys.executable, "-m", "minilora", *argv, f"b-{command}"], cwd=folder,
                           capture_output=True, text=True)  # fmt: skip
    assert code == piped.returncode
    bars = [line for line in shown if BAR.fullmatch(line)]
    assert all("100%" in bar for bar in bars)  # of the others nothing is left
    said = [line for line in shown if line not in bars]
    assert not any(re.search(r"\d+%\||\[\d\d:", line) for line in said)
    told = [
        line.replace("b-" + command, "a-" + command) for line in (piped.stderr + piped.stdout).splitlines()
    ]
    assert words(said) == words(line.rstrip() for line in told)
    assert len(bars) <= 1  # none where all was done at once
    assert bars or command not in ("train", "sweep")


@pytest.mark.slow
def test_a_finished_sweep_and_a_damaged_row(folder):
    """No bar where nothing is done; and the note on the row stands above the bar that does it again."""
    argv, rows = (*COMMANDS["sweep"], "again"), folder / "again/rows.jsonl"
    first, _ = on_terminal(*argv, cwd=folder)
    second, _ = on_terminal(*argv, cwd=folder)
    assert not any(re.search(r"runs/s|\[\d\d:", line) for line in second)
    assert [line for line in first if not BAR.fullmatch(line)] == second
    rows.write_text("{broken\n" + "".join(rows.read_text().splitlines(keepends=True)[1:]))
    third, _ = on_terminal(*argv, cwd=folder)
    bars = [i for i, line in enumerate(third) if BAR.fullmatch(line)]
    assert bars in ([1], [])  # one run may be over before a bar is shown
    note, *rest = (line for i, line in enumerate(third) if i not in bars)
    assert note.startswith("minilora: again/rows.jsonl: line 1 is skipped")
    assert rest == second


class Terminal:
    """What a bar and the streams beside it write."""

    def __init__(self):
        self.text, self.n = "", 1

    def write(self, text):
        self.text += text

    def flush(self):
        pass

    def clear(self):
        self.text += "\r" + " " * 7 + "\r"

    def refresh(self):
        self.text += "\r=bar==>"


@given(st.lists(st.text(alphabet="ab\n", max_size=5), max_size=8))
def test_however_a_message_is_written_its_lines_are_whole(pieces):
    terminal = Terminal()
    terminal.refresh()
    stream = Above(terminal, terminal)
    for piece in pieces:
        assert stream.write(piece) == len(piece)
    stream.end()
    shown, message = screen(terminal.text), "".join(pieces)
    lines = message.removesuffix("\n").split("\n") if message else []
    assert shown == [*lines, "=bar==>"]
