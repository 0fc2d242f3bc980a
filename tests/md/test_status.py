"""Status of runs: states, also with a lock that is really held; progress and time left from what a run writes."""

import fcntl
import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from typer.testing import CliRunner

from bamboo.errors import InputError
from md import cli
from md.config import load_config
from md.engine.reporters import ProgressReport
from md.run_folder import RunFolder
from md.status import contents, find_runs, is_locked, run_status, status_table

CONFIG = """\
electrolyte: {}
temperature: {}
stages:
  - {{kind: minimise, steps: 30}}
  - {{kind: nvt, name: warm-up, time: 1 ps, timestep: 0.5 fs}}
  - {{kind: npt, time: 8 ps, timestep: 2 fs}}
"""  # 2000 + 4000 steps


def make_run(folder: Path, *, electrolyte: str = "DMC", temperature: str = "300 K") -> RunFolder:
    source = folder.parent / f"{folder.name}.yaml"
    source.parent.mkdir(parents=True, exist_ok=True)
    source.write_text(CONFIG.format(electrolyte, temperature))
    RunFolder(folder).write_config(load_config(source))
    RunFolder(folder).update_manifest(model={"name": "toy"})
    return RunFolder(folder)


def write_steps(folder: Path, stage: str, steps: list[int], *, torn: str = "") -> None:
    (folder / "stages" / stage).mkdir(parents=True, exist_ok=True)
    lines = "".join(f"{step},0.0,0,300.0\n" for step in steps)
    (folder / "stages" / stage / "thermo.csv").write_text(f"step,time_ps,replica,temperature_K\n{lines}{torn}")


def write_checkpoint(folder: Path, slot: str, *, serial: int, stage: int, step: int) -> None:
    (folder / "restart").mkdir(exist_ok=True)
    header = {"serial": serial, "info": {"stage": stage}, "state": {"step": step}}
    (folder / "restart" / f"{slot}.json").write_text(json.dumps(header))


def progress_line(stage: str, *, ns_per_day: float) -> str:
    report = ProgressReport(stage, 100, 4000, 0.2, 300.0, 1.0, 1.05, ns_per_day, 390.0)
    return report.line() + "\n"


def test_a_run_that_has_just_begun(tmp_path: Path) -> None:
    make_run(tmp_path / "a")
    status = run_status(tmp_path / "a")
    assert (status.state, status.stage, status.progress, status.eta_s) == ("interrupted", "preparation", 0.0, None)
    assert status.electrolyte == "DMC, 300 K"
    with pytest.raises(InputError, match="not the folder of a run"):
        run_status(tmp_path)


def test_progress_counts_steps_of_whole_lines_and_of_checkpoints(tmp_path: Path) -> None:
    make_run(tmp_path / "a")
    write_steps(tmp_path / "a", "02-warm-up", [0, 500, 1000], torn="1500")
    assert run_status(tmp_path / "a").progress == pytest.approx(1000 / 6000)
    # 1999 is the last multiple of a stride that does not divide 2000; the checkpoint tells that the stage is complete
    write_checkpoint(tmp_path / "a", "a", serial=1, stage=0, step=0)
    write_checkpoint(tmp_path / "a", "b", serial=2, stage=1, step=2000)
    status = run_status(tmp_path / "a")
    assert status.stage == "02-warm-up" and status.progress == pytest.approx(2000 / 6000)
    write_steps(tmp_path / "a", "03-npt", [0, 1000])
    (tmp_path / "a/restart/a.json").write_text("{")  # in the middle of a replacement
    status = run_status(tmp_path / "a")
    assert status.stage == "03-npt" and status.progress == pytest.approx(3000 / 6000)


def test_a_lock_that_another_process_holds_means_running(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a")
    write_steps(tmp_path / "a", "02-warm-up", [0, 2000])
    write_steps(tmp_path / "a", "03-npt", [0, 1000])
    # 1.728 ns/day of 2 fs steps: 10 steps/s, 3000 steps left
    lines = progress_line("02-warm-up", ns_per_day=99.0) + "noise\n" + progress_line("03-npt", ns_per_day=1.728)
    run.log.write_text(lines + "volume set to 1\n")
    code = "import sys; from pathlib import Path; from md.run_folder import RunFolder\n" \
           "with RunFolder(Path(sys.argv[1])).locked(): print('held', flush=True); sys.stdin.read()"  # fmt: skip
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "a")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdin is not None and holder.stdout is not None
    try:
        assert holder.stdout.readline() == "held\n"
        status = run_status(tmp_path / "a")
        assert is_locked(tmp_path / "a") and status.state == "running"
        assert status.eta_s == pytest.approx(300.0, rel=0.005)  # the log rounds
        assert "5 min" in status_table([status])
    finally:
        holder.stdin.close()
        holder.wait(timeout=60)
        holder.stdout.close()
    status = run_status(tmp_path / "a")
    assert status.state == "interrupted" and status.eta_s is None and not is_locked(tmp_path / "a")


def test_asking_leaves_the_lock_free(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a")
    with run.locked():
        assert is_locked(run.path)
    assert not is_locked(run.path)
    with run.locked():
        pass


def test_a_run_may_start_in_the_instant_in_which_its_lock_is_looked_at(tmp_path: Path) -> None:
    (tmp_path / ".lock").touch()
    file = open(tmp_path / ".lock")  # noqa: SIM115 (the timer closes it)
    fcntl.flock(file, fcntl.LOCK_SH)
    timer = threading.Timer(0.03, file.close)
    timer.start()
    with RunFolder(tmp_path).locked():
        assert file.closed
    timer.join()


def test_finished_and_stopped_runs(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a")
    write_checkpoint(tmp_path / "a", "a", serial=5, stage=2, step=3000)
    run.update_manifest(stopped="03-npt stopped at 6 ps: temperature 9000 K is above 900 K.")
    status = run_status(tmp_path / "a")
    assert status.state == "stopped by a guard" and status.reason in status_table([status])
    write_checkpoint(tmp_path / "a", "b", serial=6, stage=2, step=4000)
    run.update_manifest(stopped=None)
    assert run_status(tmp_path / "a").state == "interrupted"  # the analysis is missing
    run.properties.write_text("{}")
    status = run_status(tmp_path / "a")
    assert (status.state, status.progress, status.reason) == ("finished", 1.0, None)


def test_conditions_and_models_belong_to_their_run(tmp_path: Path) -> None:
    make_run(tmp_path / "runs/several", temperature="[300 K, 320 K]")
    RunFolder(tmp_path / "runs/several").update_manifest(conditions={"300K": {}, "320K": {}})
    make_run(tmp_path / "runs/several/300K")
    write_steps(tmp_path / "runs/several/300K", "02-warm-up", [0, 1200])
    make_run(tmp_path / "runs/deep/er/one", electrolyte="1 m LiPF6 in DMC")
    found = find_runs(tmp_path / "runs")
    assert [path.relative_to(tmp_path).as_posix() for path in found] == ["runs/deep/er/one", "runs/several"]
    several = run_status(found[1])
    assert several.progress == pytest.approx(0.2) and several.electrolyte == "DMC, 300, 320 K"
    with RunFolder(tmp_path / "runs/several").locked():
        assert run_status(tmp_path / "runs/several/300K").state == "running"
    with pytest.raises(InputError, match="no such folder"):
        find_runs(tmp_path / "nothing")


def test_what_a_run_is_of(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text("composition: {solvents: {EC: 1, DMC: 2}, basis: wt, salts: {LiPF6: 1 m}}\n")
    assert contents(load_config(tmp_path / "x.yaml")) == "1 EC 2 DMC + 1 mol/kg LiPF6, 298.15 K"


def test_the_command_prints_a_table_or_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "runs/a")
    table = CliRunner().invoke(cli.app, ["status"]).stdout
    assert table.splitlines()[0].split()[:3] == ["run", "electrolyte", "state"] and "runs/a" in table
    content = json.loads(CliRunner().invoke(cli.app, ["status", "--json"]).stdout)
    assert content[0]["folder"] == "runs/a" and content[0]["state"] == "interrupted" and content[0]["eta_s"] is None
    result = CliRunner().invoke(cli.app, ["init", "new.yaml"])
    assert result.exit_code == 2 and not (tmp_path / "new.yaml").exists()  # nobody to ask
    assert CliRunner().invoke(cli.app, ["init", "new.yaml", "--electrolyte", "DMC", "--atoms", "300"]).exit_code == 0
    assert load_config(tmp_path / "new.yaml").build.atoms == 300
    assert CliRunner().invoke(cli.app, ["init", "new.yaml", "--electrolyte", "EC"]).exit_code == 2
    assert load_config(tmp_path / "new.yaml").electrolyte == "DMC"
    page = CliRunner().invoke(cli.app, ["report", "runs/a", "--output", "a.html"])
    assert page.exit_code == 0 and (tmp_path / "a.html").exists()
    assert "gfn2" in json.loads(CliRunner().invoke(cli.app, ["model", "list", "--json"]).stdout)
