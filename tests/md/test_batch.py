"""Batch scripts, run under bash with stand-ins for the batch system and for bamboo-md."""

import os
import runpy
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from typer.testing import CliRunner

from bamboo.errors import InputError
from md import cli
from md.batch import CUDA_GB, MEMORY_MARGIN, Job, job_name, memory_estimate_GB, pbs_script, slurm_script
from md.config import load_config
from md.model import BYTES_AT_REST, BYTES_PER_ATOM

JOB = Job(time_s=86400.0, cpus=4, gpus=0, memory_GB=2.5)
COMMAND = ["run", "my liquid's.yaml", "--folder", "my runs/x"]
# notes its arguments, then does what the test asks
PROGRAM = """#!/bin/bash
printf '%s|' "$@" >> called; echo >> called
{0}
"""
NOTE = '#!/bin/bash\necho "$(basename "$0") $*" >> queue\n'


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder whose name needs quotes, with programs that only take notes."""
    folder = tmp_path / "it's a $folder"
    (folder / "bin").mkdir(parents=True)
    for name in ("scontrol", "qsub", "sbatch"):
        write(folder / "bin" / name, NOTE)
    return folder


def write(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


def slurm(place: Path, does: str, *, members: Sequence[str] | None = None, job: Job = JOB) -> Path:
    write(place / "bin/bamboo-md", PROGRAM.format(does))
    path, folder, programs = place / "a b.slurm", Path("my runs/x"), place / "bin"
    path.write_text(slurm_script(COMMAND, job, script=path, folder=folder, programs=programs, members=members))
    return path


def start(script: Path) -> "subprocess.Popen[str]":
    (script.parent / "ready").unlink(missing_ok=True)
    env = {**os.environ, "SLURM_JOB_ID": "77", "SLURM_ARRAY_JOB_ID": "77", "SLURM_ARRAY_TASK_ID": "3"}
    pipe = subprocess.PIPE
    return subprocess.Popen(["bash", str(script)], cwd="/", env=env, stdout=pipe, stderr=pipe, text=True)


def finish(process: "subprocess.Popen[str]") -> tuple[int, str]:
    out, err = process.communicate(timeout=30)
    return process.returncode, out + err


def queue(script: Path) -> list[str]:
    notes = script.parent / "queue"
    return notes.read_text().splitlines() if notes.exists() else []


def wait_for(path: Path) -> None:
    end = time.monotonic() + 30.0
    while not path.exists():
        assert time.monotonic() < end, f"{path} did not come"
        time.sleep(0.01)


@pytest.mark.parametrize(("code", "requeued", "ends"), [(75, True, 0), (0, False, 0), (4, False, 4), (137, False, 137)])
def test_only_a_checkpoint_goes_back_to_the_queue(place: Path, code: int, requeued: bool, ends: int) -> None:
    script = slurm(place, f"exit {code}")
    assert finish(start(script))[0] == ends
    assert queue(script) == (["scontrol requeue 77"] if requeued else [])
    assert (place / "called").read_text() == "run|my liquid's.yaml|--folder|my runs/x|\n"


def test_the_second_job_finishes_what_the_first_began(place: Path) -> None:
    script = slurm(place, "[ -e half ] && exit 0; touch half; exit 75")
    assert [finish(start(script))[0] for _ in range(2)] == [0, 0]
    assert queue(script) == ["scontrol requeue 77"]


def test_a_task_of_an_array_requeues_itself_alone(place: Path) -> None:
    """The number of the array alone would stand for all its tasks."""
    script = slurm(place, "exit 75", members=list("abcd"))
    assert "#SBATCH --array=0-3\n" in script.read_text()
    assert finish(start(script))[0] == 0
    assert queue(script) == ["scontrol requeue 77_3"]
    assert (place / "called").read_text() == "run|my liquid's.yaml|--folder|my runs/x|3|\n"


def test_without_the_right_to_requeue_the_user_is_told(place: Path) -> None:
    write(place / "bin/scontrol", "#!/bin/bash\nexit 1\n")
    code, output = finish(start(slurm(place, "exit 75")))
    assert code == 75
    assert "continue with:  sbatch 'a b.slurm'" in output


# bash is no stand-in here: a second signal in the middle of its answer to the first spoils its exit code
ANSWERS = f"""exec {shlex.quote(sys.executable)} -c '
import os, signal, time

def answer(number, _):
    signal.signal(number, signal.SIG_IGN)
    with open("heard", "a") as file:
        file.write(signal.Signals(number).name[3:])
    time.sleep(0.2)
    os._exit(75)

for number in (signal.SIGUSR1, signal.SIGTERM):
    signal.signal(number, answer)
open("ready", "w").close()
while True:
    time.sleep(1.0)
'"""


@pytest.mark.parametrize("name", ["USR1", "TERM"])
def test_signals_reach_the_run_and_the_script_waits_for_it(place: Path, name: str) -> None:
    """USR1 comes ahead of the limit: on to the next job. TERM cancels: the checkpoint is written, that is all."""
    script = slurm(place, ANSWERS)
    process = start(script)
    wait_for(place / "ready")
    process.send_signal(getattr(signal, f"SIG{name}"))
    time.sleep(0.05)
    process.send_signal(getattr(signal, f"SIG{name}"))  # batch systems repeat themselves
    code, _ = finish(process)
    assert (place / "heard").read_text().split()[0] == name
    assert (code, queue(script)) == ((0, ["scontrol requeue 77"]) if name == "USR1" else (75, []))


@pytest.mark.parametrize("checkpoint", [True, False])
def test_a_limit_during_the_analysis_is_no_endless_loop(place: Path, checkpoint: bool) -> None:
    """Nothing answers the signal then; the next job makes sense only if this one has moved the dynamics on."""
    (place / "my runs/x/restart").mkdir(parents=True)
    old = place / "my runs/x/restart/a.json"
    old.touch()
    os.utime(old, (0.0, 0.0))
    makes = "touch 'my runs/x/restart/b.json'; " if checkpoint else ""
    script = slurm(place, f"{makes}touch ready; exec sleep 20")
    process = start(script)
    wait_for(place / "ready")
    time.sleep(0.1)
    process.send_signal(signal.SIGUSR1)
    code, _ = finish(process)
    assert (code, queue(script)) == ((0, ["scontrol requeue 77"]) if checkpoint else (128 + signal.SIGUSR1, []))


@pytest.mark.parametrize("own", [True, False])
def test_a_task_of_an_array_looks_at_its_own_checkpoints(place: Path, own: bool) -> None:
    """Another member's checkpoint would send a task that never comes further back to the queue for ever."""
    restart = place / "my runs/x" / ("it's d" if own else "c") / "restart"
    restart.mkdir(parents=True)
    does = f"touch {shlex.quote(str(restart / 'a.json'))} ready; exec sleep 20"
    script = slurm(place, does, members=["a", "b", "c", "it's d"])
    process = start(script)  # the task with number 3
    wait_for(place / "ready")
    time.sleep(0.1)
    process.send_signal(signal.SIGUSR1)
    code, _ = finish(process)
    assert (code, queue(script)) == ((0, ["scontrol requeue 77_3"]) if own else (128 + signal.SIGUSR1, []))


def test_pbs_has_a_timer_and_submits_again(place: Path) -> None:
    write(place / "bin/bamboo-md", PROGRAM.format(ANSWERS))
    path = place / "a b.pbs"
    text = pbs_script(COMMAND, JOB, script=path, folder=Path("my runs/x"), programs=place / "bin")
    assert "--signal=USR1 86280 bamboo-md" in text
    path.write_text(text.replace("USR1 86280", "USR1 1"))
    assert finish(start(path))[0] == 0
    assert queue(path) == ["qsub a b.pbs"]
    assert (place / "heard").read_text().split()[0] == "USR1"


def test_directives_say_what_was_asked_and_bash_can_read_them(place: Path) -> None:
    job = Job(5400.0, 16, 2, 12.0, partition="gpu", account="p_1234", extra=("--constraint=a100", "--mail-type=END"))
    script = slurm(place, "exit 0", job=job)
    lines = script.read_text().splitlines()
    expected = {
        *("--job-name=a-b", "--output=a-b-%j.out", "--open-mode=append", "--requeue", "--signal=B:USR1@120"),
        *("--time=01:30:00", "--nodes=1", "--ntasks=1", "--cpus-per-task=16", "--mem=12000M", "--gres=gpu:2"),
        *("--partition=gpu", "--account=p_1234", "--constraint=a100", "--mail-type=END"),
    }
    assert {line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH")} == expected
    assert lines[0] == "#!/bin/bash" and lines[1].startswith("#SBATCH")  # directives end at the first command
    pbs = pbs_script(COMMAND, job, script=place / "b.pbs", folder=Path("x"), programs=place)
    assert (
        "#PBS -l select=1:ncpus=16:ngpus=2:mem=12000mb\n#PBS -l walltime=01:30:00\n#PBS -q gpu\n#PBS -A p_1234" in pbs
    )
    for text in (script.read_text(), pbs):
        subprocess.run(["bash", "-n"], input=text, text=True, check=True)
    assert job_name(Path("1 m LiPF6.slurm")) == "run-1-m-LiPF6"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"time_s": 100.0}, "--time is 100 s"),
        ({"partition": "a b"}, "--partition 'a b'"),
        ({"account": "x\n#SBATCH --mem=1"}, "--account"),
        ({"extra": ("--a\nrm -rf x",)}, "--extra"),
    ],
)
def test_what_would_break_a_script_is_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Job(**{"time_s": 3600.0, "cpus": 1, "gpus": 0, "memory_GB": 1.0} | settings)  # type: ignore[arg-type]


RUN = "electrolyte: DMC\nbuild: {atoms: 1200, replicas: 3}\ntemperature: [280 K, 300 K]\n"


def test_memory_is_that_of_all_boxes(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(RUN)
    config = load_config(tmp_path / "run.yaml")
    expected = MEMORY_MARGIN * (BYTES_AT_REST + 1200 * 3 * 2 * BYTES_PER_ATOM["native"]) / 1.0e9
    assert memory_estimate_GB(config) == pytest.approx(expected)
    on_gpu = config.model_copy(update={"model": config.model.model_copy(update={"device": "cuda"})})
    assert memory_estimate_GB(on_gpu, gpus=1) == pytest.approx(expected + CUDA_GB)  # also where there is no GPU


def test_submit_writes_a_script_that_runs_from_anywhere(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    monkeypatch.setattr("sys.executable", str(place / "bin/python"))
    write(place / "bin/bamboo-md", PROGRAM.format("exit 75"))
    (place / "my liquid.yaml").write_text(RUN)
    for system, back in (("slurm", "scontrol requeue 77"), ("pbs", "qsub my liquid.pbs")):
        arguments = ["submit", "my liquid.yaml", f"--{system}", "--time", "90 min", "--memory", "3", "--extra", "-x 1"]
        result = CliRunner().invoke(cli.app, arguments)
        assert result.exit_code == 0, result.stderr
        command = result.stdout.strip().split("submit it with:  ")[1]
        assert shlex.split(command) == ["sbatch" if system == "slurm" else "qsub", f"my liquid.{system}"]
        assert finish(start(place / f"my liquid.{system}"))[0] == 0
        assert queue(place / "x")[-1] == back
        assert (place / "called").read_text().splitlines()[-1] == "run|my liquid.yaml|--folder|runs/my liquid|"


def test_submit_refuses_what_cannot_be_meant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text(RUN)

    def message(*arguments: str) -> str:
        result = CliRunner().invoke(cli.app, ["submit", "run.yaml", "--memory", "1", *arguments])
        assert result.exit_code == 2
        return result.stderr

    assert "--slurm or --pbs" in message()
    assert "--slurm or --pbs" in message("--slurm", "--pbs")
    assert "--time: unknown unit" in message("--slurm", "--time", "24 x")
    (tmp_path / "run.yaml").write_text("electrolyte: XYZ\n")
    assert "run.yaml:1" in message("--slurm")
    assert not list(tmp_path.glob("*.slurm"))


def test_submit_keeps_a_script_that_was_edited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text(RUN)
    script = tmp_path / "run.slurm"
    for _ in range(2):  # the second finds what it would write
        result = CliRunner().invoke(cli.app, ["submit", "run.yaml", "--slurm", "--memory", "1"])
        assert result.exit_code == 0, result.stderr
    edited = script.read_text() + "echo by hand\n"
    script.write_text(edited)
    result = CliRunner().invoke(cli.app, ["submit", "run.yaml", "--slurm", "--memory", "1"])
    assert (result.exit_code, script.read_text()) == (2, edited)
    assert "run.slurm: exists already" in result.stderr and "remove it" in result.stderr


def test_the_example_writes_a_script_for_all_its_members(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(Path(__file__).parents[2] / "examples/7_batch_job.py"))
    text = (tmp_path / "7_batch_job.slurm").read_text()
    assert "#SBATCH --array=0-26\n" in text and "--job-name=run-7-batch-job\n" in text
    subprocess.run(["bash", "-n"], input=text, text=True, check=True)
    assert " 13  1-m-LiPF6-in-EC-DMC-30-70-wt-298K-seed2\n" in capsys.readouterr().out
