"""``bamboo-md data``: frames sampled, labelled, merged, selected, lifted, imported; nothing heavy is imported early."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from bamboo.errors import InputError
from md.command import reported

data_app = typer.Typer(help="Quantum data for training.", no_args_is_help=True)

Workers = Annotated[int, typer.Option(min=1, help="Processes, each with one thread.")]
Folder = Annotated[Path, typer.Argument(help="Where frames go; the same command again continues.")]
Files = Annotated[list[Path], typer.Argument(help="HDF5 files of frames.")]


class Method(StrEnum):
    """Who labels."""

    gfn2 = "gfn2"
    dft = "dft"


@data_app.command("info")
@reported
def data_info(file: Annotated[Path, typer.Argument(help="HDF5 file of frames.")]) -> None:
    """Print provenance and counts of a data file."""
    from bamboo.quantum.dataset import count_table, read_frames, read_provenance

    for name, value in read_provenance(file).items():
        print(f"{name}: {value}")
    print(count_table(read_frames(file)))


@data_app.command("merge")
@reported
def data_merge(
    sources: Annotated[list[Path], typer.Argument(help="HDF5 files of frames, or folders of campaigns.")],
    output: Annotated[Path, typer.Option(help="File to write.")],
) -> None:
    """Merge data files; trajectories that appear twice are refused."""
    from bamboo.quantum.campaign import shards
    from bamboo.quantum.dataset import count_table, merge_files

    files = [file for source in sources for file in (shards(source) if source.is_dir() else [source])]
    print(count_table(merge_files(files, output)))


@data_app.command("sample")
@reported
def data_sample(
    folder: Folder,
    workers: Workers = 1,
    seed: Annotated[int, typer.Option(min=0)] = 1,
    scale: Annotated[float, typer.Option(min=1.0e-6, help="Multiply the number of trajectories of the plan.")] = 1.0,
) -> None:
    """Sample clusters of electrolyte molecules and label them with GFN2-xTB (needs the extra `qm`)."""
    from bamboo.quantum.campaign import PLAN, plan_jobs, run_campaign, summary

    plan = {recipe: round(count * scale) for recipe, count in PLAN.items()}
    run_campaign(plan_jobs(plan, seed=seed), folder, workers=workers, seed=seed)
    print(summary(folder))


@data_app.command("label")
@reported
def data_label(
    structures: Annotated[Path, typer.Argument(help="Extended XYZ (charge=... in its comment lines) or HDF5 frames.")],
    folder: Folder,
    method: Annotated[Method, typer.Option(help="GFN2-xTB, or B3LYP/def2-SVPD for clusters.")] = Method.gfn2,
    workers: Workers = 1,
) -> None:
    """Label given structures (needs the extra `qm`)."""
    from bamboo.quantum.campaign import run_campaign, structure_jobs, summary

    jobs = structure_jobs(structures, method=method.value)
    run_campaign(jobs, folder, workers=workers, seed=1, library=False)
    print(summary(folder))


@data_app.command("select")
@reported
def data_select(
    sources: Files,
    output: Annotated[Path, typer.Option(help="File to write.")],
    count: Annotated[int, typer.Option(min=1, help="How many frames.")] = 400,
    atoms: Annotated[tuple[int, int], typer.Option(help="Smallest and largest cluster.")] = (6, 20),
    kind: Annotated[list[str] | None, typer.Option(help="Only these: lithium, anion, ion_pair, neutral.")] = None,
    committee: Annotated[
        list[str] | None, typer.Option(help="Models: where they differ most comes first, hot frames never.")
    ] = None,
    known: Annotated[list[Path] | None, typer.Option(help="Frames that need not be selected again.")] = None,
) -> None:
    """Select small clusters that deserve a label of a higher level."""
    from bamboo.checkpoint import load
    from bamboo.learn.evaluate import disagreement
    from bamboo.learn.fit import held_out_group
    from bamboo.quantum.dataset import count_table, read_frames, read_provenance, write_frames
    from bamboo.quantum.selection import SHARES, select_frames

    labelled = {frame.system.positions.tobytes() for path in known or [] for frame in read_frames(path)}
    frames = [frame for source in sources for frame in read_frames(source)]
    frames = [
        frame
        for frame in frames
        if atoms[0] <= frame.system.n_atoms <= atoms[1]
        and frame.kind in (kind or SHARES)
        and frame.system.positions.tobytes() not in labelled
    ]
    scores = None
    if committee:
        frames = [frame for frame in frames if held_out_group(frame) != "hot"]
        scores = disagreement([load(name) for name in committee], frames, progress=_tell)
    chosen = select_frames(frames, count=count, atoms=atoms, kinds=kind or (), scores=scores)
    origin = read_provenance(sources[0])
    write_frames(output, chosen, provenance={k: v for k, v in origin.items() if not k.startswith("format")})
    print(count_table(chosen))


@data_app.command("probes")
@reported
def data_probes(output: Annotated[Path, typer.Argument(help="Extended XYZ file to write, for `data label`.")]) -> None:
    """Write structures that show whether a level of theory or a model is right (needs the extra `qm`)."""
    import ase.io

    from bamboo.quantum.probes import probe_structures

    structures = list(probe_structures())
    ase.io.write(str(output), structures, format="extxyz")
    print(f"wrote {len(structures)} structures to {output}")


@data_app.command("lift")
@reported
def data_lift(
    base: Annotated[str, typer.Argument(help="Model of the zoo or file, trained on the cheap labels.")],
    sources: Files,
    tuned: Annotated[list[str], typer.Option(help="Model started from BASE and trained on good labels; repeatable.")],
    output: Annotated[Path, typer.Option(help="File to write.")],
) -> None:
    """Lift cheap labels to a better level: E - E_base + mean of E_tuned, without those that BASE does not explain."""
    from bamboo.checkpoint import describe, load
    from bamboo.learn.lift import LIFTED, lift_frames
    from bamboo.quantum.dataset import count_table, read_frames, write_frames

    names = ", ".join(tuned)
    cards = [describe(model)["card"] for model in tuned]
    levels = {level.removesuffix(LIFTED) for card in cards for level in card.get("levels", [])}
    if len(levels) != 1:
        raise InputError(f"{names}: cards name {len(levels)} levels of theory, expected the one of the good labels.")
    cheap = [frame for source in sources for frame in read_frames(source)]
    lifted = lift_frames(load(base), [load(model) for model in tuned], cheap, level=levels.pop(), progress=_tell)
    print(f"{len(cheap) - len(lifted)} of {len(cheap)} frames left out: {base} does not explain their forces")
    write_frames(output, lifted, provenance={"base": Path(base).name, "tuned": names})
    print(count_table(lifted))


@data_app.command("dimers")
@reported
def data_dimers(
    boxes: Annotated[Path, typer.Argument(help="Extended XYZ or HDF5 frames of periodic liquids.")],
    output: Annotated[Path, typer.Argument(help="Extended XYZ file to write, for `data label --method dft`.")],
    count: Annotated[int, typer.Option(min=1, help="How many pairs.")] = 60,
    seed: Annotated[int, typer.Option(min=0)] = 1,
) -> None:
    """Cut pairs of neighbouring neutral molecules out of liquids, each followed by its two molecules alone."""
    import ase.io

    from bamboo.learn.pairs import cut_dimers
    from bamboo.quantum.campaign import read_structures

    systems = [frame.system for frame in read_structures(boxes)]
    structures = []
    for number, system in enumerate(cut_dimers(systems, count, seed=seed)):
        structures.append(atoms := system.to_atoms())
        atoms.info |= {"charge": 0, "kind": "neutral", "trajectory": f"{output.stem}-{number // 3:04d}"}
    ase.io.write(str(output), structures, format="extxyz")
    print(f"wrote {count} pairs, {len(structures)} structures, to {output}")


@data_app.command("liquids")
@reported
def data_liquids(
    boxes: Annotated[Path, typer.Argument(help="Extended XYZ or HDF5 frames of periodic liquids.")],
    dimers: Annotated[Path, typer.Option(help="HDF5 file of labelled dimers and their molecules (`data dimers`).")],
    tuned: Annotated[str, typer.Option(help="Model of the zoo or file, tuned to clusters: labels single molecules.")],
    output: Annotated[Path, typer.Option(help="HDF5 file to write; the same command again continues.")],
) -> None:
    """Label liquids by their molecules and pairs, with GFN2-xTB and what dimers of a better level say beyond it."""
    from bamboo import units
    from bamboo.checkpoint import load
    from bamboo.learn.pairs import dimers_of, fit_difference, label_liquids
    from bamboo.quantum.campaign import read_structures
    from bamboo.quantum.dataset import count_table, read_frames
    from bamboo.quantum.xtb import label_xtb

    model, labelled = load(tuned), read_frames(dimers)
    known = dimers_of(labelled, model, label_xtb)
    difference = fit_difference(known, model.dispersion)
    left = difference.unexplained(known) / units.KCAL_PER_MOL
    print(f"{len(known)} dimers; forces on molecules beyond GFN2-xTB fitted within {left:.2f} kcal/mol/Å", flush=True)
    frames = label_liquids(
        read_structures(boxes), output, force_field=model, difference=difference, cheap=label_xtb,
        level=labelled[0].labels.level, progress=_tell,
    )  # fmt: skip
    print(count_table(frames))


def _tell(done: int, total: int) -> None:
    if done % 500 == 0 or done == total:
        print(f"{done}/{total} frames", flush=True)


@data_app.command("damping")
@reported
def data_damping(
    labels: Annotated[Path, typer.Argument(help="Probes labelled at a level without dispersion.")],
    reference: Annotated[Path, typer.Argument(help="The same pairs at a level that has it.")],
) -> None:
    """Fit the damping length of dispersion to curves of a better level."""
    from bamboo import units
    from bamboo.learn.damping import fit_damping
    from bamboo.learn.evidence import answers_of_labels, curve_table, curves
    from bamboo.quantum.dataset import read_frames

    known = read_frames(reference)
    fit = fit_damping(read_frames(labels), known)
    sources = {"reference": curves(answers_of_labels(known)), "with dispersion": fit.curves}
    print(curve_table(sources, "reference"))
    print(f"a4 = {fit.damping_length / units.BOHR:.2f} bohr: {fit.rms:.2f} kcal/mol over {fit.n_points} points")


@data_app.command("harvest")
@reported
def data_harvest(
    model: Annotated[str, typer.Argument(help="Model of the zoo or file that drives the dynamics.")],
    output: Annotated[Path, typer.Argument(help="Extended XYZ file to append structures to.")],
    boxes: Annotated[int, typer.Option(min=1, help="Number of random liquids.")] = 50,
    atoms: Annotated[int, typer.Option(min=50, help="Atoms per box.")] = 120,
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """Simulate random liquids with a model and keep structures worth labelling, failures included."""
    from bamboo.checkpoint import load
    from md.harvest import HarvestConfig
    from md.harvest import harvest as run_harvest

    written = run_harvest(load(model), HarvestConfig(n_boxes=boxes, n_atoms=atoms, seed=seed), output)
    print(f"wrote {written} structures to {output}")


@data_app.command("import")
@reported
def data_import(
    source: Annotated[Path, typer.Argument(help="Extended XYZ file with energies and forces.")],
    output: Annotated[Path, typer.Argument(help="HDF5 file to write.")],
    units: Annotated[str, typer.Option(help='"energy,length" or "energy,length,dipole", such as "kcal/mol,Å,Debye".')],
    level: Annotated[str, typer.Option(help='Name of the method, such as "B3LYP/def2-SVPD".')],
    key: Annotated[list[str] | None, typer.Option(help="What the file calls a quantity: energy=dft_energy.")] = None,
) -> None:
    """Import labelled frames from extended XYZ."""
    from bamboo.quantum.dataset import count_table, write_frames
    from bamboo.quantum.importers import import_extxyz

    names = dict(_assignment(text) for text in key or [])
    frames = import_extxyz(source, units=units, level=level, keys=names)
    write_frames(output, frames, provenance={"source": source.name, "units": units})
    print(count_table(frames))


def _assignment(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not (name and equals and value):
        raise InputError(f"--key {text}: expected quantity=name, for example energy=dft_energy.")
    return name, value
