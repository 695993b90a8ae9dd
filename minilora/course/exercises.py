"""What the lessons share: which packages are missing, and what checks of exercises are made of.

A check is a function that asserts, each assertion with a hint, and returns what the right answer shows.
"""

from collections.abc import Callable, Mapping
from importlib.util import find_spec
from numbers import Real
from typing import TypeVar

Answer = TypeVar("Answer")


PACKAGES = {"sklearn": "scikit-learn"}  # module -> package, where they have different names


def absent(*modules: str) -> list[str]:
    """Those of the modules that are not installed, which it prints."""
    missing = [name for name in modules if find_spec(name) is None]
    for name in missing:
        package = PACKAGES.get(name, name)
        print(
            f"not installed: {package}; install it and restart the kernel; what needs it below does not run"
        )
    return missing


def verdict(check: Callable[[], str]) -> None:
    """Print whether an answer is right, and if it is not, the hint. A wrong answer stops nothing."""
    try:
        print("right:", check())
    except AssertionError as e:
        print("not yet:", e)
    except Exception as e:  # of the answer itself
        print(f"not yet: your answer ends in {type(e).__name__}: {e}; look at the shapes and types in it")


def given(answer: Answer) -> Answer:
    """The answer, if there is one; AssertionError for the None of a stub, alone or in a pair."""
    parts = answer if isinstance(answer, tuple) else (answer,)
    missing = any(part is None for part in parts)
    assert not missing, "there is no answer yet: write it in place of None, and run both cells"
    return answer


def predicted(
    guess: object, value: float, hints: Mapping[float, str], otherwise: str, within: float = 0
) -> None:
    """AssertionError with a hint unless a guess is a number at most so far from what was computed.

    `hints` has those for the numbers that one thinks of first, `otherwise` the one for all others.
    """
    number = given(guess)
    assert isinstance(number, Real), f"{number!r} is not a number; expected one, such as 12.5"
    for wrong, hint in hints.items():
        assert abs(float(number) - wrong) > within, hint
    assert abs(float(number) - value) <= within, otherwise


def chosen(letter: object, right: str, hints: Mapping[str, str]) -> None:
    """AssertionError unless the letter is that of the right explanation; `hints` refute the others."""
    letters = sorted([right, *hints])
    assert given(letter) in letters, f"{letter!r} is no explanation; expected one of {', '.join(letters)}"
    assert letter == right, hints[str(letter)]
