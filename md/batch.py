"""Scripts for batch systems: a run or a sweep as jobs that end in a checkpoint and return to the queue by themselves.

A run answers SIGUSR1 with a checkpoint and exit code 75. The scripts have it sent ``LEAD_S`` ahead of the time limit,
by Slurm itself or, under PBS, by ``timeout``. bash answers signals only while it waits, so the run is a background
process. Code 75 sends the job back to the queue; so does a death by that signal where nothing answered it (packing,
analysis), if a checkpoint was written since the job began: without that it would come back for ever. SIGTERM, which
cancels, ends the job.
"""

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bamboo.errors import InputError
from md.composition import realise
from md.config import RunConfig
from md.model import load_model, memory_needed

LEAD_S = 120  # between the signal and the time limit; a run looks for signals every 20 steps
MEMORY_MARGIN = 1.5  # times the estimate of a run, whose analysis needs some as well
CUDA_GB = 4.0  # of the host, taken by CUDA's libraries


@dataclass(frozen=True)
class Job:
    """What a job asks for: time [s], processors, GPUs, memory [GB], queue, account, further lines for the script."""

    time_s: float
    cpus: int
    gpus: int
    memory_GB: float
    partition: str | None = None
    account: str | None = None
    extra: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.time_s < 2 * LEAD_S:
            raise InputError(
                f"--time is {self.time_s:g} s, expected at least {2 * LEAD_S} s: {LEAD_S} s go to the end."
            )
        for name in ("partition", "account"):
            value = getattr(self, name)
            if value is not None and not re.fullmatch(r"[\w.,:@/+-]+", value):
                raise InputError(f"--{name} {value!r}: expected a name without blanks.")
        for line in self.extra:
            if not line.isprintable() or not line.strip():
                raise InputError(f"--extra {line!r}: expected one line such as '--constraint=a100'.")

    @property
    def clock(self) -> str:
        """The time as hours:minutes:seconds."""
        minutes, seconds = divmod(round(self.time_s), 60)
        return f"{minutes // 60:02d}:{minutes % 60:02d}:{seconds:02d}"

    @property
    def megabytes(self) -> int:
        return max(1, round(1000 * self.memory_GB))


def memory_estimate_GB(config: RunConfig, *, gpus: int = 0) -> float:
    """Return the memory a job of this run should ask for [GB]: 1.5 times ``md.model.memory_needed`` on the CPU.

    On a GPU its atoms take no memory of the host, but the estimate stays, plus 4 GB for CUDA: asking for too little
    kills a job. Raises InputError where nothing is known of the model's engine.
    """
    conditions = config.each_condition().values()
    n_atoms = sum(c.build.replicas * realise(c.what(), n_atoms=c.build.atoms).n_atoms for c in conditions)
    on_cpu = config.model.model_copy(update={"device": "cpu"})  # where jobs are submitted there may be no GPU
    model = load_model(config.model_copy(update={"model": on_cpu}))
    needed = memory_needed(model.evaluator, n_atoms * len(config.model_names))
    if needed is None:
        raise InputError("The memory of this run is not known. Give --memory, in GB.")
    return MEMORY_MARGIN * needed / 1.0e9 + (CUDA_GB if gpus else 0.0)


def slurm_script(
    command: Sequence[str],
    job: Job,
    *,
    script: Path,
    folder: Path,
    programs: Path,
    members: Sequence[str] | None = None,
) -> str:
    """Return a script for sbatch.

    command   of bamboo-md, without that word, relative to the folder of the script; its last word of an array is left
              to the script: the number of the task, from 0
    folder    where the run keeps its files
    programs  folder of the program bamboo-md
    members   of an array: the folder of each task, in ``folder``
    """
    name = job_name(script)
    lines = [
        f"--job-name={name}",
        f"--output={name}-{'%j' if members is None else '%A_%a'}.out",
        "--open-mode=append",
        "--requeue",
        f"--signal=B:USR1@{LEAD_S}",
        f"--time={job.clock}",
        "--nodes=1",
        "--ntasks=1",
        f"--cpus-per-task={job.cpus}",
        f"--mem={job.megabytes}M",
        *([f"--gres=gpu:{job.gpus}"] if job.gpus else []),
        *([f"--array=0-{len(members) - 1}"] if members is not None else []),
        *([f"--partition={job.partition}"] if job.partition else []),
        *([f"--account={job.account}"] if job.account else []),
        *job.extra,
    ]
    member = "" if members is None else ' "$SLURM_ARRAY_TASK_ID"'
    own_folder = f"folder={shlex.quote(str(folder))}"
    if members is not None:  # the checkpoints of other tasks are no reason to return to the queue
        every = " ".join(shlex.quote(str(folder / name)) for name in members)
        own_folder = f"folders=({every})\nfolder=${{folders[$SLURM_ARRAY_TASK_ID]}}"
    # one task of an array may have the number of the array: requeueing that number would requeue all tasks
    task = '"$SLURM_JOB_ID"' if members is None else '"${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"'
    return _script(
        [f"#SBATCH {line}" for line in lines],
        f"bamboo-md {shlex.join(command)}{member}",
        job,
        script=script,
        own_folder=own_folder,
        programs=programs,
        submit=submit_command(script, system="slurm"),
        requeue=f"scontrol requeue {task}",
    )


def pbs_script(command: Sequence[str], job: Job, *, script: Path, folder: Path, programs: Path) -> str:
    """Return a script for qsub (PBS Professional, OpenPBS); see ``slurm_script``."""
    gpus = f":ngpus={job.gpus}" if job.gpus else ""
    lines = [
        f"-N {job_name(script)[:15]}",
        "-j oe",
        f"-l select=1:ncpus={job.cpus}{gpus}:mem={job.megabytes}mb",
        f"-l walltime={job.clock}",
        *([f"-q {job.partition}"] if job.partition else []),
        *([f"-A {job.account}"] if job.account else []),
        *job.extra,
    ]
    timer = f"timeout --preserve-status --signal=USR1 {round(job.time_s) - LEAD_S}"
    submit = submit_command(script, system="pbs")
    return _script(
        [f"#PBS {line}" for line in lines],
        f"{timer} bamboo-md {shlex.join(command)}",
        job,
        script=script,
        own_folder=f"folder={shlex.quote(str(folder))}",
        programs=programs,
        submit=submit,
        requeue=submit,
    )


def submit_command(script: Path, *, system: str) -> str:
    """Return what to type to submit a script."""
    return shlex.join(["sbatch" if system == "slurm" else "qsub", script.name])


def job_name(script: Path) -> str:
    """Return a name that every batch system takes: letters, digits and -, the first a letter."""
    name = re.sub(r"[^A-Za-z0-9-]+", "-", script.stem).strip("-")
    return name if name[:1].isalpha() else f"run-{name}".strip("-")


def _script(
    directives: Sequence[str],
    command: str,
    job: Job,
    *,
    script: Path,
    own_folder: str,
    programs: Path,
    submit: str,
    requeue: str,
) -> str:
    first = "\n".join(directives)
    where = shlex.quote(str(script.resolve().parent))
    return f"""\
#!/bin/bash
{first}
#
# Submit it from its folder:  {submit}
# {LEAD_S} s before the time limit the run writes a checkpoint and the job returns to the queue, until the run is done.

cd {where} || exit 2
export PATH={shlex.quote(str(programs))}:"$PATH" OMP_NUM_THREADS={job.cpus} MKL_NUM_THREADS={job.cpus}

begun=$(date +%s) signals=0 last=none run=
forward() {{ signals=$((signals + 1)) last=$1; [ -z "$run" ] || kill -s "$1" "$run" 2>/dev/null; }}
trap 'forward USR1' USR1
trap 'forward TERM' TERM

{command} &
run=$!
code=0
heard=-1
while [ "$heard" -ne "$signals" ]; do  # a signal ends the waiting, not the run
    heard=$signals
    wait "$run"
    code=$?
done

{own_folder}
checkpointed() {{ [ -n "$(find "$folder" -path '*/restart/*' -newermt "@$begun" 2>/dev/null)" ]; }}
if [ "$code" -eq "$((128 + $(kill -l USR1)))" ] && checkpointed; then
    code=75  # the limit came while nothing answered the signal, during the analysis: the next job begins there
fi
if [ "$code" -eq 75 ] && [ "$last" != TERM ]; then
    echo "$(date): continues in the next job"
    {requeue} && exit 0
    echo "could not return to the queue; continue with:  {submit}" >&2
fi
exit "$code"
"""
