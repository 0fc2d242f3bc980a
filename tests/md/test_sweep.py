"""Sweeps with real processes: killed, stopped, broken, and always continued to the same end."""

import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from typer.testing import CliRunner

from bamboo.errors import InputError
from md import cli, sweep
from md.config import load_config
from md.run_folder import RunFolder
from md.sweep import load_sweep, members_of, run_members, summary

SWEEP = """\
run:
  molecules: {{argon: "[Ar]"}}
  composition: {{counts: {{argon: 40}}}}
  model: {0}
  properties: []
  guards: {{broken_bonds: ignore}}
  build: {{density: 1.2 g/cm3}}
  stages:
    - {{kind: nvt, time: 40 fs, thermostat: langevin, timestep: 2 fs}}
    - {{kind: npt, time: 120 fs, timestep: 2 fs}}
  output: {{trajectory_every: 20 fs, thermo_every: 4 fs, transport_every: 4 fs}}
  checkpoint: {{every: 0.02 s}}
temperatures: [90 K, 120 K]
seeds: [1, 2]
"""
POPEN = subprocess.Popen
NAMES = ["90K-seed1", "90K-seed2", "120K-seed1", "120K-seed2"]
CHILD = """
import os, sys
os.setsid()
os.dup2(os.open({1!r}, os.O_WRONLY | os.O_APPEND), 1)
os.dup2(os.open({2!r}, os.O_WRONLY | os.O_APPEND), 2)
import torch
torch.set_num_threads(1)
sys.argv = {0!r}
from md.cli import main
main()
"""


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory, argon_model: Callable[..., Path]) -> str:
    """Four tiny runs of argon."""
    return SWEEP.format(argon_model(tmp_path_factory.mktemp("model") / "argon.safetensors"))


def write(folder: Path, text: str) -> Path:
    (folder / "sweep.yaml").write_text(text)
    return folder / "sweep.yaml"


class Forked:
    """Stands for subprocess.Popen: the same command in a process of its own that has done its imports already."""

    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["md.workflows", "md.figures", "torch._dynamo"])

    def __init__(self, command: Sequence[str], *, stdout: Any, stderr: Any, **_: Any) -> None:
        assert list(command[:5]) == [sys.executable, "-P", "-m", "md.cli", "run"]
        text = CHILD.format(["bamboo-md", *command[4:]], stdout.name, stderr.name)
        self.process = self.server.Process(target=exec, args=(text, {}))
        self.process.start()
        self.pid = self.process.pid

    def poll(self) -> int | None:
        return self.process.exitcode

    def send_signal(self, number: int) -> None:
        assert self.pid is not None
        os.kill(self.pid, number)


class Chaos(threading.Thread):
    """Kills ``n_kills`` processes at random moments of their dynamics, seeded; with ``stop`` the last is the sweep."""

    def __init__(self, *, seed: int, n_kills: int, stop: bool) -> None:
        super().__init__(daemon=True)
        self.random, self.n_kills, self.stop = random.Random(seed), n_kills, stop
        self.marked: list[tuple[int, Path, Forked]] = []  # to be killed at so many lines of thermo.csv
        self.killed: list[str] = []

    def popen(self, command: Sequence[str], **options: Any) -> Forked:
        child = Forked(command, **options)
        self.marked.append((self.random.randrange(1, 30), Path(command[-1]), child))
        return child

    def run(self) -> None:
        while len(self.killed) < self.n_kills:
            time.sleep(0.005)
            for marked in list(self.marked):
                lines, folder, child = marked
                if sum(len(path.read_text().splitlines()) for path in folder.glob("stages/*/thermo.csv")) >= lines:
                    self.marked.remove(marked)
                    last = self.stop and len(self.killed) == self.n_kills - 1
                    os.kill(os.getpid(), signal.SIGTERM) if last else child.send_signal(signal.SIGKILL)
                    self.killed.append("sweep" if last else folder.name)
                    break


def contents(folder: Path) -> dict[str, np.ndarray]:
    """Everything that the dynamics of a run wrote."""
    arrays = {}
    for path in sorted(folder.glob("stages/*/*.h5")):
        with h5py.File(path) as file:
            for name in ("coordinates", "step", "potential_energy", "pressure", "volume", "time"):
                if name in file:
                    arrays[f"{path.parent.name}/{path.name}/{name}"] = file[name][:]
    return arrays


def test_a_sweep_killed_again_and_again_ends_as_if_undisturbed(
    settings: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Members are killed at random moments, the sweep is told to end; every number is that of a quiet sweep."""
    config = load_sweep(write(tmp_path, settings))
    quiet, rough = (members_of(config, tmp_path / name) for name in ("quiet", "rough"))
    said: list[str] = []
    monkeypatch.setattr(sweep, "POLL_S", 0.01)
    killed: list[str] = []
    for seed, n_kills, stop, code in ((1, 2, False, 137), (2, 2, True, 137), (3, 0, False, 0)):
        chaos = Chaos(seed=seed, n_kills=n_kills, stop=stop)
        monkeypatch.setattr(sweep.subprocess, "Popen", chaos.popen)
        chaos.start()
        run_members(rough, processes=2, say=said.append)
        chaos.join(timeout=60)
        killed += chaos.killed
        assert summary(rough)[1] == code, said
    assert len(killed) == 4 and "sweep" in killed
    assert f"{killed[0]}: ended by SIGKILL, perhaps for lack of memory" in said
    run_members(quiet, processes=2, say=said.append)
    assert [member.name for member in quiet] == NAMES
    for one, other in zip(quiet, rough, strict=True):
        assert one.is_finished and other.is_finished, said
        expected, found = contents(one.folder), contents(other.folder)
        assert len(expected) >= 10 and expected.keys() == found.keys()
        for name, array in expected.items():
            np.testing.assert_array_equal(found[name], array, err_msg=f"{one.name} {name}")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "rough").rglob("*.h5")}
    run_members(rough, say=said.append)  # nothing is left to do, and nothing is done
    assert before == {path: path.stat().st_mtime_ns for path in before}
    assert "4 members, 4 finished before" in said[-1]
    longer = load_sweep(write(tmp_path, settings.replace("time: 120 fs", "time: 160 fs")))
    assert not any(member.is_finished for member in members_of(longer, tmp_path / "rough"))


def test_the_signal_before_the_limit_ends_a_task_in_a_checkpoint_and_the_next_continues(
    settings: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The array script with the real program: USR1 to bash, to the sweep, to the run, and back to the queue."""
    write(tmp_path, settings.replace("time: 120 fs", "time: 3 ps"))
    monkeypatch.chdir(tmp_path)
    other = CliRunner().invoke(cli.app, ["submit", "sweep.yaml", "--pbs", "--memory", "1"])
    assert (other.exit_code, "for Slurm only" in other.stderr) == (2, True)
    result = CliRunner().invoke(cli.app, ["submit", "sweep.yaml", "--slurm", "--cpus", "1", "--memory", "1"])
    assert result.exit_code == 0, result.stderr
    assert "4 members; submit it with:  sbatch sweep.slurm" in result.stdout
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/scontrol").write_text(f'#!/bin/bash\necho "$*" >> {tmp_path}/queue\n')
    (tmp_path / "bin/scontrol").chmod(0o755)
    env = {**os.environ, "SLURM_JOB_ID": "8", "SLURM_ARRAY_JOB_ID": "5", "SLURM_ARRAY_TASK_ID": "2"}
    env |= {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "SLURM_CPUS_PER_TASK": "1"}
    job = subprocess.Popen(["bash", "sweep.slurm"], cwd=tmp_path, env=env, stdout=subprocess.PIPE, text=True)
    member = tmp_path / "runs/sweep/120K-seed1"
    while not (member / "stages/02-npt/thermo.csv").exists():
        assert job.poll() is None
        time.sleep(0.02)
    job.send_signal(signal.SIGUSR1)
    out, _ = job.communicate(timeout=120)
    assert (job.returncode, (tmp_path / "queue").read_text()) == (0, "requeue 5_2\n"), out
    assert "02-npt stopped at step" in json.loads((member / "outcome.json").read_text())["reason"]
    assert sorted(path.name for path in (tmp_path / "runs/sweep").iterdir()) == ["120K-seed1"]
    reached = len((member / "stages/02-npt/thermo.csv").read_text().splitlines())
    assert 1 < reached < 752
    (one,) = [m for m in members_of(load_sweep(tmp_path / "sweep.yaml"), tmp_path / "runs/sweep") if m.folder == member]
    assert summary([one])[1] == 75


def test_a_model_trained_anew_makes_another_run(
    settings: str, tmp_path: Path, argon_model: Callable[..., Path]
) -> None:
    model = argon_model(tmp_path / "own.safetensors")
    file = write(tmp_path, SWEEP.format(model))
    before = [member.settings for member in members_of(load_sweep(file), tmp_path)]
    assert before == [member.settings for member in members_of(load_sweep(file), tmp_path)]
    argon_model(model, seed=3)
    after = [member.settings for member in members_of(load_sweep(file), tmp_path)]
    assert len(set(before + after)) == 2 * len(before)


def test_an_error_in_the_sweep_ends_its_processes(settings: str, tmp_path: Path) -> None:
    member = members_of(load_sweep(write(tmp_path, settings)), tmp_path)[0]
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    with pytest.raises(RuntimeError, match="a bug"), sweep._ended_with_us([sweep.Process(member, child)]):
        raise RuntimeError("a bug")
    assert child.wait(timeout=20) == -signal.SIGTERM


QUICK = """\
run: {electrolyte: DMC, build: {atoms: 100}}
temperatures: [280 K, 300 K, 320 K]
"""


def quick(monkeypatch: pytest.MonkeyPatch, does: str) -> list["subprocess.Popen[bytes]"]:
    """Let members be bash scripts instead of runs: $1 is the name of the member; return those that start."""
    children: list[subprocess.Popen[bytes]] = []

    def popen(command: Sequence[str], **options: Any) -> "subprocess.Popen[bytes]":
        children.append(POPEN(["bash", "-c", does, "member", Path(command[-1]).name], **options))
        return children[-1]

    monkeypatch.setattr(sweep.subprocess, "Popen", popen)
    monkeypatch.setattr(sweep, "POLL_S", 0.01)
    return children


def invoke(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(cli.app, ["sweep", "sweep.yaml", *arguments])
    return result.exit_code, result.stdout + result.stderr


def test_one_that_fails_does_not_stop_the_others_and_its_reason_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path, QUICK)
    children = quick(monkeypatch, "[ $1 = DMC-280K-seed1 ] || exit 0; printf 'the box\\n boils' >&2; exit 4")
    code, text = invoke("--processes", "1")
    assert code == 4 and len(children) == 3
    assert "2 of 3 members are finished" in text
    assert "DMC-280K-seed1 failed (code 4): the box boils" in text
    children.clear()
    quick(monkeypatch, "exit 0")
    code, text = invoke()
    assert code == 0 and "3 members, 2 finished before" in text and "3 of 3 members are finished" in text


@pytest.mark.parametrize(("given", "expected"), [("SIGUSR1", "USR1"), ("SIGTERM", "TERM"), ("SIGINT", "TERM")])
def test_signals_are_handed_on_once_and_no_further_member_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str, expected: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path, QUICK)
    traps = "; ".join(f"trap 'echo {name} >> $1; sleep 0.1; exit 75' {name}" for name in ("USR1", "TERM", "INT"))
    children = quick(monkeypatch, f"{traps}; touch ready; while true; do sleep 0.01; done")

    def send() -> None:
        while not (tmp_path / "ready").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), getattr(signal, given))

    threading.Thread(target=send, daemon=True).start()
    code, text = invoke("--processes", "1")
    assert (code, len(children)) == (75, 1), text
    assert "0 of 3 members are finished\n  3 interrupted or not begun" in text
    assert [path.read_text() for path in tmp_path.glob("DMC-*")] == [f"{expected}\n"]


def test_what_another_process_works_on_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    members = members_of(load_sweep(write(tmp_path, QUICK)), tmp_path)
    children, said = quick(monkeypatch, "exit 0"), []

    def say(line: str) -> None:
        said.append(line)
        if line == f"waiting for other processes that work on {members[0].name}":  # the others are done
            lock.__exit__(None, None, None)

    lock = RunFolder(members[0].folder).locked()
    lock.__enter__()
    run_members(members, processes=2, say=say)
    assert len(children) == 3
    assert [line.split(":")[0] for line in said if "finished" in line][1:] == [members[k].name for k in (1, 2, 0)]


def test_what_others_work_on_counts_as_a_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Members of a sweep that was killed may still be at work when it is started again."""
    members = members_of(load_sweep(write(tmp_path, QUICK)), tmp_path)
    children, begun = quick(monkeypatch, "exit 0"), list[int]()
    lock = RunFolder(members[2].folder).locked()

    def say(line: str) -> None:
        if line == f"waiting for other processes that work on {members[2].name}":
            begun.append(len(children))
            lock.__exit__(None, None, None)

    lock.__enter__()
    run_members(members, processes=1, say=say)
    assert (begun, len(children)) == ([0], 3)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent has ended")
def test_members_end_in_their_checkpoints_when_the_sweep_is_killed(settings: str, tmp_path: Path) -> None:
    file = write(tmp_path, settings.replace("time: 120 fs", "time: 100 ps"))
    command = [sys.executable, "-P", "-m", "md.cli", "sweep", str(file), "--folder", str(tmp_path / "runs")]
    parent = subprocess.Popen([*command, "--processes", "1"], stdout=subprocess.DEVNULL)
    member = members_of(load_sweep(file), tmp_path / "runs")[0]
    end = time.monotonic() + 200.0
    while not (member.folder / "stages/02-npt/thermo.csv").exists():
        assert parent.poll() is None and time.monotonic() < end
        time.sleep(0.05)
    parent.kill()
    parent.wait()
    while member.is_busy:
        assert time.monotonic() < end
        time.sleep(0.05)
    assert "02-npt stopped at step" in (member.folder / "errors.txt").read_text()


def test_every_process_has_its_share_whatever_is_left_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads decide the last digits of a trajectory: they must not depend on what is finished."""
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "6")
    members = members_of(load_sweep(write(tmp_path, QUICK)), tmp_path)
    does = "echo $OMP_NUM_THREADS $MKL_NUM_THREADS; ps -o sid= -p $$ | tr -d ' ' | grep -qx $$ && exit 0"
    for _ in range(2):
        quick(monkeypatch, does + "; exit 5")
        run_members(members, say=lambda line: None)
        assert {(member.folder / "output.txt").read_text() for member in members} == {"2 2\n"}
        (members[0].folder / "outcome.json").write_text("{")  # a damaged record is none
        (members[0].folder / "output.txt").write_text("")
        assert not members[0].is_finished and members[1].is_finished


def test_names_are_readable_and_do_not_depend_on_the_others(tmp_path: Path) -> None:
    text = "run: {pressure: 2 bar}\nelectrolytes: [0.5 m LiPF6 in EC:DMC 30:70 wt, DMC]\nseeds: [7]\n"
    config = load_sweep(write(tmp_path, text))
    members = config.members()
    assert list(members) == ["0.5-m-LiPF6-in-EC-DMC-30-70-wt-298.15K-seed7", "DMC-298.15K-seed7"]
    one = members["DMC-298.15K-seed7"]
    assert (one.electrolyte, one.temperature_K, one.build.seed) == ("DMC", 298.15, 7)
    assert one.target_pressure == config.run.target_pressure
    more = load_sweep(write(tmp_path, text.replace("[7]", "[6, 7]") + "temperatures: [298.15 K, 310 K]\n"))
    assert set(members) < set(more.members()) and len(more.members()) == 8
    assert load_sweep(write(tmp_path, "run: {composition: {counts: {DMC: 6}}}\n")).members().keys() == {"298.15K-seed1"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("run: {}\n", "sweep.yaml:1: run: no composition"),
        ("run: {electrolyte: DMC}\nelectrolytes: [EC]\n", "sweep.yaml:2: electrolytes: given here and as `run.elec"),
        ("run: {electrolyte: DMC, temperature: 9 K}\ntemperatures: [8 K]\n", "temperatures: given here and as"),
        ("run: {electrolyte: DMC, build: {seed: 2}}\nseeds: [3]\n", "seeds: given here and as `run.build.seed`"),
        ("run: {electrolyte: [DMC, EC]}\n", "run: a list is a batch inside one run"),
        ("run: {electrolyte: DMC}\nseeds: [3, 4, 3]\n", "sweep.yaml:2: seeds.2: is in the list already"),
        ("run: {electrolyte: DMC, build: {replicas: 3}}\nseeds: [1, 3]\n", "seeds: 3 replicas take as many seeds"),
        ("run: {electrolyte: DMC, tmperature: 3 K}\n", "run.tmperature: unknown key 'tmperature'. Did you mean"),
        ("run: {electrolyte: DMC}\ntemperatures: [280]\n", "temperatures.0: 280 has no unit"),
        ("run: {}\nelectrolytes: [1 m LiPF6 in XC]\n", "sweep.yaml:2: electrolytes.0: Unknown solvent 'XC'"),
        ("run: {electrolyte: DMC}\nseeds: {0}\n".replace("{0}", str(list(range(1001)))), "seeds: expected a shorter"),
        ("run: {electrolyte: DMC}\nTemperatures: []\n", "Did you mean 'temperatures'"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        load_sweep(write(tmp_path, text))
    assert message in str(caught.value)


def test_what_a_run_would_refuse_is_refused_before_any_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = QUICK.replace("DMC,", "DMC, stages: [{kind: nvt, time: 1 ps, volume: mean}],")
    members = members_of(load_sweep(write(tmp_path, text)), tmp_path)
    children = quick(monkeypatch, "exit 0")
    with pytest.raises(InputError, match="the mean volume needs an npt stage"):
        run_members(members)
    assert not children


def test_a_member_can_be_run_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path, QUICK)
    quick(monkeypatch, "echo $1 >> ran; exit 75")
    assert invoke("--member", "1")[0] == 75
    quick(monkeypatch, "echo $1 >> ran; kill -USR1 $$")
    assert invoke("--member", "1")[0] == 128 + signal.SIGUSR1  # for the script to judge
    assert (tmp_path / "ran").read_text() == 2 * "DMC-300K-seed1\n"
    assert load_config(tmp_path / "runs/sweep/DMC-300K-seed1/member.yaml").temperature_K == 300.0
    assert invoke("--member", "3") == (2, "--member 3: there are 3, counted from 0.\n")
