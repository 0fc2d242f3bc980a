"""Binding curves, shells, rotations, dipoles of models and levels of theory side by side, from labelled probes.

The probes (``bamboo.quantum.probes``) are rigid or given geometries, so every source is asked the same question:

    pair      E(A B) - E(A) - E(B), against the distance
    shell     E(Li S_n) - E(Li S_(n-1)) - E(S), the n-th solvent binding to lithium (geometries as given)
    rotation  E(angle) - E(0)

and for the charges, whose potential the liquid feels from afar. Levels without dispersion get that of a new model.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from bamboo import units
from bamboo.checkpoint import load
from bamboo.errors import InputError
from bamboo.evaluator import Evaluator
from bamboo.forcefield import ForceField
from bamboo.neighbors import all_cluster_pairs
from bamboo.quantum.dataset import Frame, read_frames
from bamboo.quantum.esp import potential_points
from bamboo.quantum.labels import Labels
from bamboo.system import Batch, System
from bamboo.terms.d3_table import fill_d3_table
from bamboo.terms.dispersion import Dispersion, DispersionConfig

Curve = dict[float, float]  # coordinate -> kcal/mol
CLOSEST_LITHIUM, CLOSEST = 1.6, 2.3  # Å, pairs closer than this are not compared
WIDTH = 18  # of a column


def compare(models: Sequence[str], files: Sequence[Path], *, figure: Path) -> str:
    """Return the tables of all curves and charges, and draw the curves.

    models  of the zoo, or files
    files   labelled probes (HDF5), one level of theory each; the first is the reference and says which probes count
    """
    probes = [read_frames(path) for path in files]
    names = [_level(frames) or str(path) for path, frames in zip(files, probes, strict=True)]
    answers = {name: answers_of_labels(frames) for name, frames in zip(names, probes, strict=True)}
    answers |= {model: answers_of_model(load(model), probes[0], name=model) for model in models}
    found = {name: curves(answer) for name, answer in answers.items()}
    plot(found, figure)
    systems = {_name(frame): frame.system for frame in probes[0]}
    return f"{curve_table(found, names[0])}\n\n{charge_table(answers, systems, reference=names[0])}"


def _level(frames: Sequence[Frame]) -> str:
    """Return the level of probes as the tables call it; '' without probes."""
    if not frames:
        return ""
    labels = frames[0].labels
    return labels.level if labels.contains_dispersion else f"{labels.level.partition(',')[0]} + D3-CSO"


def answers_of_labels(frames: Sequence[Frame], dispersion: DispersionConfig = DispersionConfig()) -> dict[str, Labels]:
    """Return the labels of each probe by its name, with dispersion where the level has none."""
    term = Dispersion(dispersion)
    fill_d3_table(term)
    return {
        _name(frame): frame.labels
        if frame.labels.contains_dispersion
        else replace(frame.labels, energy=frame.labels.energy + _dispersion_energy(term, frame.system))
        for frame in frames
    }


def _dispersion_energy(term: Dispersion, system: System) -> float:
    """Return the dispersion energy of a cluster [eV]."""
    batch = Batch.from_systems([system])
    i, j = all_cluster_pairs(batch).index
    distance = (batch.positions[i] - batch.positions[j]).norm(dim=-1)
    return float(term(distance, batch.numbers[i], batch.numbers[j]).sum())


def answers_of_model(force_field: ForceField, frames: Sequence[Frame], *, name: str) -> dict[str, Labels]:
    """Return what a model predicts for each probe; ``name`` of the model becomes the level."""
    evaluator = Evaluator(force_field)

    def answer(system: System) -> Labels:
        output = evaluator.evaluate(Batch.from_systems([system]))
        return Labels(
            level=name,
            energy=float(output.energy),
            charges=output.charges.double().numpy(),
            dipole=output.dipole[0].double().numpy(),
        )

    return {_name(frame): answer(frame.system) for frame in frames}


def _name(frame: Frame) -> str:
    """Return what and where: ``pair:EC+Li:tilted/2.00``."""
    what, _, rest = frame.trajectory.partition("/")
    return f"{what}/{rest.partition('/')[0]}"


def curves(answers: Mapping[str, Labels]) -> dict[str, Curve]:
    """Return relative energies [kcal/mol] of every curve; points whose parts are missing are left out."""
    found: dict[str, Curve] = {}
    for name, labels in answers.items():
        what, _, coordinate = name.partition("/")
        kind, _, who = what.partition(":")
        if kind == "pair":
            parts = [f"monomer:{part}/0" for part in who.partition(":")[0].split("+")]
        elif kind == "shell":
            solvent, count = who.partition("+")[2], int(coordinate)
            parts = [f"monomer:{solvent}/0", f"{what}/{count - 1}" if count > 1 else "monomer:Li/0"]
        elif kind == "rotation":
            parts = [f"{what}/0"]
        else:
            continue
        if all(part in answers for part in parts):
            value = labels.energy - sum(answers[part].energy for part in parts)
            found.setdefault(what, {})[float(coordinate)] = value / units.KCAL_PER_MOL
    return {what: dict(sorted(curve.items())) for what, curve in sorted(found.items())}


def compared(what: str, coordinate: float) -> bool:
    """Tell whether a point counts: inside the repulsive wall all sources differ by much more than matters."""
    kind, _, who = what.partition(":")
    return kind != "pair" or coordinate >= (CLOSEST_LITHIUM if "Li" in who else CLOSEST)


def curve_table(sources: Mapping[str, Mapping[str, Curve]], reference: str) -> str:
    """Return, per curve, its lowest value by the reference and how far every other source is from it.

    Points of pairs below 1.6 Å (with Li+) and 2.3 Å (without) are drawn but not compared.
    """
    others = _others(sources, reference)
    lines = [f"{'curve (kcal/mol)':<30s}{'points':>7s}{'lowest':>8s}" + _titles(others)]
    for what, truth in sources[reference].items():
        counted = [x for x in truth if compared(what, x)]
        row = f"{what:<30s}{len(counted):>7d}{min(truth.values()):>8.1f}"
        for name in others:
            curve = sources[name].get(what, {})
            gaps = np.array([curve[x] - truth[x] for x in counted if x in curve])
            row += f"{'-':>{WIDTH}s}"
            if len(gaps):
                text = f"{np.sqrt(np.mean(gaps**2)):.2f} {gaps[np.abs(gaps).argmax()]:+.2f}"
                row = row[:-WIDTH] + f"{text:>{WIDTH}s}"
        lines.append(row)
    return "\n".join([*lines, f"(RMS and largest deviation from {reference})"])


def charge_table(sources: Mapping[str, Mapping[str, Labels]], systems: Mapping[str, System], *, reference: str) -> str:
    """Return, per group of probes, RMS deviations of dipole, charges and potential from the reference.

    dipole     D, length of the difference; clusters with a total charge included, same origin
    charges    e, per atom
    potential  kcal/mol/e, of the charges at the points where charges are fitted (``bamboo.quantum.esp``)
    """
    others = _others(sources, reference)
    lines = [f"{'dipole D, charges e, potential':<37s}{'probes':>8s}" + _titles(others)]
    groups: dict[str, list[str]] = {}
    for name, labels in sources[reference].items():
        if labels.charges is not None and labels.dipole is not None:
            groups.setdefault(name if name.startswith("monomer") else name.partition("/")[0], []).append(name)
    for group, names in sorted(groups.items()):
        row = f"{group:<37s}{len(names):>8d}"
        for other in others:
            known = [name for name in names if name in sources[other]]
            gaps = [_charge_gaps(systems[n], sources[other][n], sources[reference][n]) for n in known]
            squares = np.array([gap for gap in gaps if gap is not None])
            text = " ".join(f"{value:.2f}" for value in np.sqrt(squares.mean(axis=0))) if len(squares) else "-"
            row += f"{text:>{WIDTH}s}"
        lines.append(row)
    return "\n".join([*lines, f"(RMS deviations from {reference})"])


def _charge_gaps(system: System, labels: Labels, truth: Labels) -> tuple[float, float, float] | None:
    """Return mean squares of the differences of dipole [D^2], charges [e^2] and potential [(kcal/mol/e)^2]."""
    if labels.charges is None or labels.dipole is None or truth.charges is None or truth.dipole is None:
        return None
    dipole = (labels.dipole - truth.dipole) / units.DEBYE
    charges = labels.charges - truth.charges
    points = potential_points(system.numbers, system.positions)
    inverse = 1.0 / np.linalg.norm(points[:, None] - system.positions, axis=2)
    potential = units.COULOMB_CONSTANT * (inverse @ charges) / units.KCAL_PER_MOL
    return float(dipole @ dipole), float(np.mean(charges**2)), float(np.mean(potential**2))


def _others(sources: Mapping[str, object], reference: str) -> list[str]:
    if reference not in sources:
        raise InputError(f"The reference '{reference}' is not among {', '.join(sources)}.")
    return [name for name in sources if name != reference]


def _titles(names: Sequence[str]) -> str:
    return "".join(f"{name[: WIDTH - 1]:>{WIDTH}s}" for name in names)


def plot(sources: Mapping[str, Mapping[str, Curve]], path: Path) -> None:
    """Draw every curve of every source into one picture."""
    from matplotlib.figure import Figure

    names = sorted({what for source in sources.values() for what in source})
    columns = 4
    rows = -(-len(names) // columns)
    figure = Figure(figsize=(3.4 * columns, 2.7 * rows), layout="constrained")
    for index, what in enumerate(names):
        axes = figure.add_subplot(rows, columns, index + 1)
        for label, source in sources.items():
            curve = source.get(what, {})
            axes.plot(list(curve), list(curve.values()), marker="o", markersize=3, linewidth=1, label=label)
        axes.set_title(what, fontsize=9)
        kind = what.partition(":")[0]
        axes.set_xlabel({"pair": "distance / Å", "shell": "number of solvents", "rotation": "angle / degrees"}[kind])
        axes.set_ylabel("kcal/mol")
    figure.legend(
        *figure.axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=len(sources), fontsize=9
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
