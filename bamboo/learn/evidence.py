"""Binding curves, shells and rotations of models and levels of theory side by side, from labelled probes.

The probes (``bamboo.quantum.probes``) are rigid or given geometries, so every source is asked the same question:

    pair      E(A B) - E(A) - E(B), against the distance
    shell     E(Li S_n) - E(Li S_(n-1)) - E(S), the n-th solvent binding to lithium (geometries as given)
    rotation  E(angle) - E(0)
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from bamboo import units
from bamboo.errors import InputError
from bamboo.evaluator import Evaluator
from bamboo.forcefield import ForceField
from bamboo.quantum.dataset import Frame
from bamboo.system import Batch, System

Curve = dict[float, float]  # coordinate -> kcal/mol


def energies_of_labels(frames: Sequence[Frame]) -> dict[str, float]:
    """Return the labelled energy of each probe [eV]."""
    return {_name(frame): frame.labels.energy for frame in frames}


def energies_of_model(force_field: ForceField, frames: Sequence[Frame]) -> dict[str, float]:
    """Return the energy of each probe by a model [eV]."""
    evaluator = Evaluator(force_field)

    def energy(system: System) -> float:
        return float(evaluator.evaluate(Batch.from_systems([system])).energy)

    return {_name(frame): energy(frame.system) for frame in frames}


def _name(frame: Frame) -> str:
    """Return what and where: ``pair:EC+Li:tilted/2.00``."""
    what, _, rest = frame.trajectory.partition("/")
    return f"{what}/{rest.partition('/')[0]}"


def curves(energies: Mapping[str, float]) -> dict[str, Curve]:
    """Return relative energies [kcal/mol] of every curve; points whose parts are missing are left out."""
    found: dict[str, Curve] = {}
    for name, energy in energies.items():
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
        if all(part in energies for part in parts):
            value = energy - sum(energies[part] for part in parts)
            found.setdefault(what, {})[float(coordinate)] = value / units.KCAL_PER_MOL
    return {what: dict(sorted(curve.items())) for what, curve in sorted(found.items())}


def evidence_table(sources: Mapping[str, Mapping[str, Curve]], reference: str) -> str:
    """Return, per curve, its lowest value by the reference and the RMS deviation of every other source from it."""
    if reference not in sources:
        raise InputError(f"The reference '{reference}' is not among {', '.join(sources)}.")
    others = [name for name in sources if name != reference]
    lines = [f"{'curve (kcal/mol)':<24s}{'points':>7s}{'lowest':>9s}" + "".join(f"{name[:16]:>18s}" for name in others)]
    for what, truth in sources[reference].items():
        row = f"{what:<24s}{len(truth):>7d}{min(truth.values()):>9.1f}"
        for name in others:
            curve = sources[name].get(what, {})
            gaps = np.array([curve[x] - truth[x] for x in truth if x in curve])
            row += f"{'-':>18s}" if not len(gaps) else f"{np.sqrt(np.mean(gaps**2)):>11.2f}{gaps.mean():>+7.2f}"
        lines.append(row)
    return "\n".join([*lines, f"(RMS and mean deviation from {reference})"])


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
        if index == 0:
            axes.legend(fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
