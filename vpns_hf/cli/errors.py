"""End a program in one sentence where a user can put things right."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from io import TextIOWrapper

from safetensors import SafetensorError

from ..saved_files import printable

# Wrong arguments and data, files and the Hub, missing packages, a loss that diverges. Anything else is a bug.
EXPECTED_ERRORS = (ValueError, OSError, ImportError, FloatingPointError, SafetensorError)


@contextmanager
def exit_in_one_sentence(program: str) -> Iterator[None]:
    """Turn expected errors within a `with` block into one line on stderr and an exit code.

    Characters that the terminal cannot show are printed as escapes from then on, instead of ending the program.

    Args:
        program: name in front of the sentence.

    Raises:
        SystemExit: 2 for one of `EXPECTED_ERRORS`, 130 for Ctrl-C.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        yield
    except EXPECTED_ERRORS as error:
        print(f"{program}: {printable(' '.join(str(error).split()), 1000)}", file=sys.stderr)
        raise SystemExit(2) from error
    except KeyboardInterrupt as error:
        raise SystemExit(130) from error
