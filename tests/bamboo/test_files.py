"""Files are old or new as a whole, whoever writes them, and locks tell of their owner."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bamboo.errors import InputError, LockedError
from bamboo.files import file_sha256, held, replacing, write_json

WRITER = """
import sys
from pathlib import Path
from bamboo.files import write_json
print("ready", flush=True)
sys.stdin.read(1)
for number in range(200):
    write_json(Path(sys.argv[1]), [sys.argv[2]] * 500)
"""


def test_an_error_leaves_the_old_file_and_no_draft(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file.txt"
    with replacing(path) as draft:
        draft.write_text("old")
    assert draft.suffix == ".txt"
    with pytest.raises(ValueError, match="stop"), replacing(path) as draft:
        draft.write_text("half")
        assert path.read_text() == "old"
        raise ValueError("stop")
    assert path.read_text() == "old" and [each.name for each in path.parent.iterdir()] == ["file.txt"]
    path.write_bytes(b"abc")  # FIPS 180-2, appendix B.1
    assert file_sha256(path) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_processes_that_write_one_file_do_not_meet(tmp_path: Path) -> None:
    path = tmp_path / "settings.json"
    command = [sys.executable, "-c", WRITER, str(path)]
    writers = [
        subprocess.Popen([*command, name], text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE) for name in "ab"
    ]
    for writer in writers:
        assert writer.stdout is not None and writer.stdout.readline() == "ready\n"
    for writer in writers:
        assert writer.stdin is not None
        writer.stdin.write("x")
        writer.stdin.flush()
    write_json(path, ["c"] * 500)
    while any(writer.poll() is None for writer in writers):
        assert len(set(json.loads(path.read_text()))) == 1  # whole, whoever wrote it last
    for writer in writers:
        writer.communicate()
    assert [writer.returncode for writer in writers] == [0, 0]
    assert [each.name for each in tmp_path.iterdir()] == ["settings.json"]


def test_a_lock_names_its_owner_and_ends_with_its_block(tmp_path: Path) -> None:
    taken = pytest.raises(LockedError, match=f"here: .*process {os.getpid()}")
    with held(tmp_path / ".lock", what="here"), taken, held(tmp_path / ".lock", what="here"):
        pytest.fail("held twice")
    with held(tmp_path / ".lock", what="here"):
        pass


def test_a_file_system_without_locks_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", refuse)
    with pytest.raises(InputError, match=r"no locks .Function not implemented"), held(tmp_path / "x", what="here"):
        pytest.fail("held")
