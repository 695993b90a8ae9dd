"""`python -m minilora` is `minilora`. It imports little, so that Ctrl-C leaves no traceback."""

import signal
import sys


def main() -> int:
    """Run the command in sys.argv and return its exit code."""
    try:
        from .cli import main as command

        return command()
    except KeyboardInterrupt:
        return 130
    finally:  # only the interpreter's shutdown remains
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, signal.SIG_DFL)


if __name__ == "__main__":
    sys.exit(main())
