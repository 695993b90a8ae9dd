"""`python -m minilora` is `minilora`. Little is imported here, for a Ctrl-C during imports is no accident."""

import signal
import sys


def main() -> int:
    """The exit code of the command in sys.argv."""
    try:
        from .cli import main as command

        return command()
    except KeyboardInterrupt:
        return 130
    finally:  # what is left is the end of the interpreter
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, signal.SIG_DFL)


if __name__ == "__main__":
    sys.exit(main())
