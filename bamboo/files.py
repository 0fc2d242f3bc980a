"""Files that are old or new as a whole, never half, and locks that end with their process."""

import fcntl
import hashlib
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bamboo.errors import InputError, LockedError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield the draft of a file, which replaces it when the block ends; after an error the file is as it was.

    The draft has the ending of the file and a name of this process: several may write the same file at once.
    """
    draft = path.with_name(f".{os.getpid()}-{path.name}")
    draft.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield draft
        with open(draft, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_text(path: Path, text: str) -> None:
    """Replace a text file."""
    with replacing(path) as draft:
        draft.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Any) -> None:
    """Replace a JSON file."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file as hexadecimal text."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def held(path: Path, *, what: str) -> Iterator[None]:
    """Hold a lock file; raises LockedError where another process does. It is free when this process ends, however."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+") as file:
        for patience in (0.05, 0.1, 0.0):  # s: `status` looks at the lock by holding it for an instant
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if patience:
                    time.sleep(patience)
            except OSError as error:
                raise InputError(f"{path}: this file system has no locks ({error.strerror}). Choose another.") from None
        else:
            file.seek(0)
            owner = file.read().strip() or "unknown"
            raise LockedError(
                f"{what}: another run (process {owner}) works in this folder. Wait for it or choose another."
            )
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield
