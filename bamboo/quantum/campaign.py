"""Sampling campaigns that survive being stopped: many independent jobs, a few worker processes, one growing dataset.

``bamboo-md data sample`` makes and labels structures, ``bamboo-md data label`` labels given ones.
Run the same command again to continue: finished jobs are skipped. Sampling jobs come in a shuffled order, structures in
that of their file, so whatever is finished at any moment is a balanced sample. A folder holds ``shard-NNN.h5``,
``finished.jsonl`` and ``conformers.npz``.
"""

import hashlib
import json
import multiprocessing
import os
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from bamboo.errors import InputError, suggest
from bamboo.files import held
from bamboo.quantum.compositions import NAMES
from bamboo.quantum.conformers import Library, build_library
from bamboo.quantum.dataset import Frame, append_frames, count_table, read_frames, read_provenance, write_frames
from bamboo.quantum.dft import DFTLabeller
from bamboo.quantum.labels import Labels
from bamboo.quantum.sampling import RECIPES, Outcome, label_structure
from bamboo.quantum.xtb import label_xtb
from bamboo.system import System

# Trajectories per recipe: about 13 500 small frames, 600 of 300 large clusters and 200 of periodic boxes.
PLAN = {
    "dynamics": 360, "anion": 100, "compressed": 90, "scan": 140, "distorted": 80, "rotated": 40, "isolated": 60,
    "large": 150, "periodic": 100,
}  # fmt: skip
MAX_SHARD_BYTES = 4_000_000
RECORD = "finished.jsonl"  # of a folder: a line for each job
LICENCE = "CC0-1.0"


@dataclass(frozen=True)
class Method:
    """A method that labels given structures: what makes a labeller, which program it needs, and what it is."""

    make: Callable[[], Callable[[System], Labels]]
    program: str
    description: str
    periodic: bool


METHODS = {
    "gfn2": Method(lambda: label_xtb, "tblite", "GFN2-xTB, doi 10.1021/acs.jctc.8b01176", periodic=True),
    "dft": Method(DFTLabeller, "pyscf", "B3LYP/def2-SVPD, density fitting, charges from the potential", periodic=False),
}


@dataclass(frozen=True, eq=False)
class Structure:
    """A structure to label, with what a ``Frame`` says about it."""

    system: System
    kind: str
    sampling: str
    temperature_K: float = float("nan")


@dataclass(frozen=True, eq=False)
class Job:
    """One trajectory: a recipe to run, or structures to label in the given order."""

    name: str
    recipe: str
    structures: tuple[Structure, ...] = ()
    method: str = "gfn2"


def plan_jobs(plan: Mapping[str, int], *, seed: int) -> list[Job]:
    """List the jobs of a plan in a random order that depends on the seed alone."""
    unknown = set(plan) - set(RECIPES)
    if unknown:
        raise InputError(f"Unknown recipe {sorted(unknown)}, expected some of {', '.join(RECIPES)}.")
    jobs = [Job(f"{recipe}-{seed}-{k:05d}", recipe) for recipe, count in plan.items() for k in range(count)]
    return [jobs[k] for k in np.random.default_rng(seed).permutation(len(jobs))]


def structure_jobs(path: str | Path, *, method: str = "gfn2") -> list[Job]:
    """List jobs that label the structures of an extended-XYZ file or of a dataset (.h5), in the order of the file.

    A dataset gives one job per trajectory, whose split is kept. An extended-XYZ file gives one job per structure;
    structures of one run share a split. Read from each comment line, all optional: ``charge`` (total, e; default 0),
    ``kind`` (default periodic or large), ``sampling`` (default liquid), ``trajectory`` (name of the run; default the
    file's), ``temperature_K``. A column ``molecule`` is kept.
    """
    if method not in METHODS:
        raise InputError(f"Unknown method '{method}'.{suggest(method, METHODS)} Expected: {', '.join(METHODS)}.")
    if find_spec(METHODS[method].program) is None:
        raise InputError(f"Method '{method}' needs {METHODS[method].program}. Run: pip install 'bamboo-md[qm]'")
    groups = _dataset_structures(path) if Path(path).suffix == ".h5" else _extxyz_structures(path)
    if any(structure.system.pbc for group in groups.values() for structure in group) and not METHODS[method].periodic:
        raise InputError(f"{path}: method '{method}' cannot label periodic structures; select clusters first.")
    if not groups:
        raise InputError(f"{path}: no structures to label.")
    return [Job(name, "label", tuple(group), method) for name, group in groups.items()]


def read_structures(path: str | Path) -> list[Frame]:
    """Return the frames of a dataset (.h5), or the structures of an extended-XYZ file as frames without labels."""
    if Path(path).suffix == ".h5":
        return read_frames(path)
    nothing = Labels(level="none", energy=float("nan"))
    return [
        Frame(one.system, nothing, one.kind, one.sampling, name, one.temperature_K)
        for name, (one,) in _extxyz_structures(path).items()
    ]


def _dataset_structures(path: str | Path) -> dict[str, list[Structure]]:
    groups: dict[str, list[Structure]] = {}
    for frame in read_frames(path):
        structure = Structure(frame.system, frame.kind, frame.sampling, frame.temperature_K)
        groups.setdefault(frame.trajectory, []).append(structure)
    return {f"{trajectory}/{_digest(members)}": members for trajectory, members in groups.items()}


def _extxyz_structures(path: str | Path) -> dict[str, list[Structure]]:
    from ase.io import iread

    groups = {}
    for atoms in iread(path, index=":", format="extxyz"):
        system, info = System.from_atoms(atoms), atoms.info
        structure = Structure(
            system,
            kind=str(info.get("kind", "periodic" if system.pbc else "large")),
            sampling=str(info.get("sampling", "liquid")),
            temperature_K=float(info.get("temperature_K", float("nan"))),
        )
        groups[f"{info.get('trajectory', Path(path).stem)}/{_digest([structure])}"] = [structure]
    return groups


def _digest(structures: Sequence[Structure]) -> str:
    """Tell one choice of structures of a trajectory from another, which is another job."""
    return hashlib.sha256(b"".join(each.system.positions.tobytes() for each in structures)).hexdigest()[:8]


def run_campaign(jobs: Sequence[Job], folder: str | Path, *, workers: int, seed: int, library: bool = True) -> None:
    """Run the jobs that are not finished yet and append what they give; prints progress and the time left."""
    folder = Path(folder)
    with held(folder / ".lock", what=str(folder)):
        _refuse_other_method(jobs, folder)
        _run(jobs, folder, workers=workers, seed=seed, library=library)


def _refuse_other_method(jobs: Sequence[Job], folder: Path) -> None:
    """Raise InputError where a folder holds labels of another method: names do not tell them apart."""
    for shard in shards(folder)[:1]:
        there, ours = read_provenance(shard).get("method", ""), {METHODS[job.method].description for job in jobs}
        if there and ours - {there}:
            raise InputError(f"{folder} holds labels of {there}. Choose another folder for those of another method.")


def _run(jobs: Sequence[Job], folder: Path, *, workers: int, seed: int, library: bool) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"  # inherited by the workers, which import the numerical libraries anew
    if library and not (folder / "conformers.npz").exists():
        print("building the library of conformers ...", flush=True)
        build_library(NAMES, seed=seed, n_starts=6).save(folder / "conformers.npz")
    done = finished_jobs(folder)
    remaining = [job for job in jobs if job.name not in done]
    print(f"{len(jobs)} jobs, {len(jobs) - len(remaining)} finished before, {workers} workers", flush=True)
    begin, n_frames = time.monotonic(), 0
    library_path = str(folder / "conformers.npz") if library else None
    with ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), initializer=_start_worker, initargs=(library_path, seed)
    ) as pool:
        futures = {pool.submit(_run_job, job): job for job in remaining}
        for n_done, future in enumerate(as_completed(futures), start=1):
            outcome, seconds = future.result()
            _record(folder, futures.pop(future), outcome, seconds)
            n_frames += len(outcome.frames)
            if n_done % 20 == 0 or n_done == len(remaining):
                minutes = (time.monotonic() - begin) / 60.0
                left = minutes / n_done * (len(remaining) - n_done)
                print(
                    f"{n_done}/{len(remaining)} jobs, {n_frames} frames, {minutes:.1f} min, {left:.1f} left", flush=True
                )


def shards(folder: Path) -> list[Path]:
    """Return the files that hold the frames of a campaign."""
    return sorted(folder.glob("shard-*.h5"))


def finished_jobs(folder: Path) -> set[str]:
    """Return the names of finished jobs: those recorded, and those with stored frames (killed before recording)."""
    names = {str(entry["job"]) for entry in _entries(folder)}
    for shard in shards(folder):
        names |= {frame.trajectory for frame in read_frames(shard)}
    return names


def _entries(folder: Path) -> list[dict[str, Any]]:
    """Return what is recorded of finished jobs; a line that a kill cut short is no entry."""
    record, entries = folder / RECORD, list[dict[str, Any]]()
    for line in record.read_text(encoding="utf-8").splitlines() if record.exists() else ():
        with suppress(json.JSONDecodeError):  # the frames of such a job, if any, are in the shards
            entries.append(json.loads(line))
    return entries


def summary(folder: str | Path) -> str:
    """Return the table of counts of a campaign, with the structures dropped and the time spent per recipe."""
    folder = Path(folder)
    frames = [frame for shard in shards(folder) for frame in read_frames(shard)]
    lines = [
        count_table(frames),
        "",
        f"{'recipe':<12} {'jobs':>6} {'frames':>7} {'unconverged':>12} {'reacted':>8} {'rejected':>9} {'s/job':>7}",
    ]
    entries = _entries(folder)
    for recipe in sorted({entry["recipe"] for entry in entries}):
        rows = [entry for entry in entries if entry["recipe"] == recipe]
        frames_, bad, reacted, rejected, seconds = (
            sum(row[key] for row in rows) for key in ("frames", "unconverged", "reacted", "rejected", "seconds")
        )
        lines.append(
            f"{recipe:<12} {len(rows):>6} {frames_:>7} {bad:>12} {reacted:>8} {rejected:>9} {seconds / len(rows):>7.1f}"
        )
    return "\n".join(lines)


def provenance(method: str = "gfn2") -> dict[str, str]:
    """Return the attributes written with the data: what computed it, how it was called, under which licence."""
    programs = (METHODS[method].program, "ase", "rdkit", "packmol", "numpy", "h5py", "bamboo-md")
    return {
        "programs": ", ".join(f"{name} {version(name)}" for name in programs),
        "method": METHODS[method].description,
        "command": shlex.join(["bamboo-md", *sys.argv[1:3]]),
        "licence": LICENCE,
    }


_LIBRARY: Library | None = None
_SEED = 0


def _start_worker(library_path: str | None, seed: int) -> None:
    global _LIBRARY, _SEED
    os.nice(5)
    _LIBRARY = Library.load(library_path) if library_path else None
    _SEED = seed


def _run_job(job: Job) -> tuple[Outcome, float]:
    begin = time.monotonic()
    outcome = Outcome(job.name)
    digest = hashlib.sha256(job.name.encode()).digest()
    generator = np.random.default_rng([_SEED, int.from_bytes(digest[:8], "big")])
    try:
        if job.structures:
            label = METHODS[job.method].make()
            for structure in job.structures:
                label_structure(
                    structure.system,
                    outcome,
                    kind=structure.kind,
                    sampling=structure.sampling,
                    temperature_K=structure.temperature_K,
                    method=label,
                )
        elif _LIBRARY is not None:
            RECIPES[job.recipe](generator, _LIBRARY, outcome)
    except InputError as error:  # a composition that cannot be packed must not end the campaign
        print(f"{job.name}: {error}", file=sys.stderr, flush=True)
        outcome.rejected += 1
    return outcome, time.monotonic() - begin


def _record(folder: Path, job: Job, outcome: Outcome, seconds: float) -> None:
    """Append the frames to the newest shard (a new one when it is full), then note the job as finished."""
    if outcome.frames:
        files = shards(folder)
        if not files or files[-1].stat().st_size > MAX_SHARD_BYTES:
            write_frames(folder / f"shard-{len(files):03d}.h5", outcome.frames, provenance=provenance(job.method))
        else:
            append_frames(files[-1], outcome.frames)
    entry = {"job": job.name, "recipe": job.recipe, "frames": len(outcome.frames), "seconds": round(seconds, 2)}
    entry |= {"unconverged": outcome.unconverged, "reacted": outcome.reacted, "rejected": outcome.rejected}
    record = folder / RECORD
    cut_short = record.exists() and not record.read_bytes().endswith(b"\n")
    with open(record, "a", encoding="utf-8") as file:
        file.write("\n" * cut_short + json.dumps(entry) + "\n")
