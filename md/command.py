"""What every command of ``bamboo-md`` shares: exceptions become messages and exit codes."""

import functools
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn, ParamSpec

import typer

from bamboo.errors import BambooError, InputError

P = ParamSpec("P")
INTERRUPTED, BUG = 130, 1


def reported(function: Callable[P, None]) -> Callable[P, None]:
    """Turn exceptions into messages and exit codes: one line for the user, the traceback in error.log."""

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
            Path("error.log").write_text(traceback.format_exc(), encoding="utf-8")
            what = str(error).splitlines()[0][:200] if str(error) else "no message"
            _leave(f"Internal error, a bug in bamboo-md: {type(error).__name__}: {what}. Details: error.log", BUG)

    return wrapper


def _leave(message: str, code: int) -> NoReturn:
    print(message, file=sys.stderr)
    raise typer.Exit(code)
