"""A run that cannot fit is refused in one sentence before anything is packed."""

from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from typer.testing import CliRunner

from bamboo.errors import InputError
from md import cli
from md.model import check_memory, memory_needed

NATIVE = SimpleNamespace(engine="native", device="cpu")


def test_memory_grows_with_atoms_and_is_unknown_for_other_engines() -> None:
    small, large = memory_needed(NATIVE, 1000), memory_needed(NATIVE, 101_000)
    assert small is not None and large is not None
    assert large - small == pytest.approx(2.8e9)
    assert memory_needed(NATIVE, 100_000) < 6.0e9  # what the documentation promises
    assert memory_needed(SimpleNamespace(evaluate=None), 1000) is None
    assert memory_needed(SimpleNamespace(engine="triton", device="cuda"), 1000) is None


def test_too_large_a_run_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1.0e9))
    check_memory(NATIVE, 10_000)
    with pytest.raises(InputError, match=r"20000 atoms need about 1\.2 GB of memory, 1\.0 GB are free"):
        check_memory(NATIVE, 20_000)
    monkeypatch.chdir(tmp_path)
    Path("big.yaml").write_text("electrolyte: 1 m LiPF6 in EC:DMC 30:70 wt\nbuild: {atoms: 90000}\n")
    for command in ("check", "run"):
        result = CliRunner().invoke(cli.app, [command, "big.yaml"])
        assert result.exit_code == 2 and "GB of memory" in result.output
    assert not Path("runs").exists() or not list(Path("runs/big").glob("*"))
