"""What every command of ``bamboo-md`` shares: exceptions become messages and exit codes."""

import functools
import os
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn, ParamSpec

import typer

from bamboo.errors import BambooError, InputError

P = ParamSpec("P")
INTERRUPTED, BUG = 130, 1


def reported(function: Callable[P, None]) -> Callable[P, None]:
    """Turn exceptions into messages and exit codes: one line for the user, the traceback in a file."""

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            function(*args, **kwargs)
        except BambooError as error:
            _leave(str(error), error.exit_code)
        except KeyboardInterrupt as error:
            _leave(f"Interrupted. {error}".strip(), INTERRUPTED)
        except typer.Exit:
            raise
        except OSError as error:  # full disk, no permission: the machine's matter, not a bug
            _leave(f"{error.filename or 'output'}: {error.strerror or error}", InputError.exit_code)
        except Exception as error:
            what = str(error).splitlines()[0][:200] if str(error) else "no message"
            _leave(f"Internal error, a bug in bamboo-md: {type(error).__name__}: {what}. {_keep_traceback()}", BUG)

    return wrapper


def _keep_traceback() -> str:
    """Write the traceback where no file is overwritten, or print it where nothing can be written; say where it is."""
    try:
        with open(f"bamboo-md-error-{os.getpid()}.log", "x", encoding="utf-8") as file:
            file.write(traceback.format_exc())
            return f"Details: {file.name}"
    except OSError:
        traceback.print_exc()
        return "Details above."


def _leave(message: str, code: int) -> NoReturn:
    print(message, file=sys.stderr)
    raise typer.Exit(code)
