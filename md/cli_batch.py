"""``bamboo-md submit``, ``sweep``, ``collect``: many runs, on this machine or through a batch system."""

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from bamboo.errors import InputError
from bamboo.files import write_text
from md.command import reported


def register(app: typer.Typer) -> None:
    """Add the commands to ``bamboo-md``."""
    for command in (submit, sweep, collect):
        app.command()(command)


@reported
def submit(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file of a run or of a sweep.")],
    slurm: Annotated[bool, typer.Option("--slurm", help="Write a script for sbatch; an array job of a sweep.")] = False,
    pbs: Annotated[bool, typer.Option("--pbs", help="Write a script for qsub.")] = False,
    folder: Annotated[Path | None, typer.Option(help="Where results go; default: runs/<name of the file>.")] = None,
    time: Annotated[str, typer.Option(help="Limit of one job; the run continues in the next: '24 h'.")] = "24 h",
    cpus: Annotated[int, typer.Option(min=1, help="Processors of one job.")] = 8,
    gpus: Annotated[int, typer.Option(min=0, help="GPUs of one job.")] = 0,
    memory: Annotated[float | None, typer.Option(min=0.1, help="Memory of one job in GB; default: estimated.")] = None,
    partition: Annotated[str | None, typer.Option(help="Partition or queue.")] = None,
    account: Annotated[str | None, typer.Option(help="Account to charge.")] = None,
    extra: Annotated[
        list[str] | None, typer.Option(help="Further line for the batch system, '--constraint=a100'.")
    ] = None,
) -> None:
    """Write a batch script that runs a file, saves itself before the time limit and requeues until it is done.

    Give --slurm or --pbs.
    """
    from md.batch import Job, memory_estimate_GB, pbs_script, slurm_script, submit_command
    from md.config import is_sweep, load_config
    from md.quantities import parse_quantity
    from md.sweep import load_sweep

    if slurm == pbs:
        raise InputError("Say for which batch system: --slurm or --pbs.")
    try:
        time_s = parse_quantity(time, dimension="wall time")
    except InputError as error:
        raise InputError(f"--time: {error}") from None
    target = folder or Path("runs") / config.stem
    command = ["run", str(config), "--folder", str(target)]
    members = None
    if is_sweep(config):
        if pbs:
            raise InputError(f"{config} is a sweep, whose array job is written for Slurm only: give --slurm.")
        whole = load_sweep(config)
        configs = list(whole.one_of_each().values())
        members = list(whole.members())
        command = ["sweep", str(config), "--folder", str(target), "--member"]
    else:
        configs = [load_config(config)]
    memory = memory or max(memory_estimate_GB(one, gpus=gpus) for one in configs)
    job = Job(time_s, cpus, gpus, memory, partition=partition, account=account, extra=tuple(extra or ()))
    system = "slurm" if slurm else "pbs"
    script = Path(f"{config.stem}.{system}")
    where = {"script": script, "folder": target, "programs": Path(sys.executable).parent}
    text = slurm_script(command, job, members=members, **where) if slurm else pbs_script(command, job, **where)
    if script.exists() and script.read_text(encoding="utf-8", errors="replace") != text:
        raise InputError(f"{script}: exists already, and says something else. Rename or remove it to write it anew.")
    write_text(script, text)
    script.chmod(0o755)
    tasks = f", {len(members)} members" if members else ""
    print(f"wrote {script}{tasks}; submit it with:  {submit_command(script, system=system)}")


@reported
def sweep(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file of a sweep.")],
    folder: Annotated[Path | None, typer.Option(help="Where results go; default: runs/<name of the file>.")] = None,
    processes: Annotated[
        int | None, typer.Option(min=1, help="Runs at a time; default: one for each processor, one on a GPU.")
    ] = None,
    member: Annotated[int | None, typer.Option(min=0, help="Run this member alone, counted from 0.")] = None,
) -> None:
    """Run every composition, temperature and seed of a file; the same command continues what is not finished.

    Every combination is a run of its own, for many processors or an array job (``submit``). A few small boxes are
    faster as lists in the file of one run, which advances them together.
    """
    from md.run_folder import RunFolder
    from md.sweep import load_sweep, members_of, run_members, summary

    target = folder or Path("runs") / config.stem
    members = members_of(load_sweep(config), target)
    if member is not None:
        if member >= len(members):
            raise InputError(f"--member {member}: there are {len(members)}, counted from 0.")
        members = members[member : member + 1]
        run_members(members, processes=1, say=_say)
    else:
        with RunFolder(target).locked():
            run_members(members, processes=processes, say=_say)
    text, code = summary(members)
    print(text, file=sys.stderr if code else sys.stdout)
    if not code:
        print(f"Next:  bamboo-md collect {shlex.quote(str(target))}")
    raise typer.Exit(code)


@reported
def collect(
    source: Annotated[Path, typer.Argument(metavar="SOURCE", help="Folder of runs, or YAML file of a sweep.")],
    folder: Annotated[Path | None, typer.Option(help="YAML file: where its results are, as for sweep.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of the table.")] = False,
) -> None:
    """Put the results of many runs in one table and draw trends: against concentration, Arrhenius lines.

    Seeds are averaged by their numbers of independent samples; seeds that scatter widen the error bar.
    """
    import json

    from md.collect import collect as read
    from md.collect import table, to_csv
    from md.collect_figures import write_figures

    collection = read(source, folder=folder)
    target = (source if source.is_dir() else folder or Path("runs") / source.stem) / "collected"
    figures = write_figures(collection, target)
    write_text(target / "table.csv", to_csv(collection.rows()))
    if as_json:
        files = [str(path) for path in (target / "table.csv", *figures)]
        content = {"table": collection.rows(), "without_results": collection.missing, "files": files}
        print(json.dumps(content, indent=2, ensure_ascii=False))
    else:
        print(table(collection))
        print(f"wrote {target / 'table.csv'} and {len(figures)} figures")


def _say(line: str) -> None:
    print(line, flush=True)
