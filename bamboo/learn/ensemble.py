"""Several models that differ in their seed: what they say together of a liquid, and how far they are apart.

Knowledge distillation trains one student on the mean. The mean of energies has a meaning only where all count from one
zero, so the reference energies of every teacher are first refitted to the same quantum labels (``put_on_one_zero``);
what their energies then differ by in a liquid is a real disagreement.

A model may have a hole, a bond that breaks at no cost, say, and its own dynamics falls into it. The others know better
(``majority``): they outvote it, and the student learns there what the model did not know.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from bamboo.errors import InputError
from bamboo.evaluator import Evaluator
from bamboo.forcefield import ForceField
from bamboo.learn.samples import make_samples, shift_references
from bamboo.quantum.dataset import STRING_BYTES, Frame, round_positions
from bamboo.quantum.labels import Labels
from bamboo.system import Batch, System

ENSEMBLE = "ensemble of "  # begins the level of the mean labels; they hold everything, dispersion included
MOST_APART = 1.0  # eV/Å, of a force component from the median; sound models of liquids differ by a fifth of it
SPREAD = "spread of "  # begins the level of a file of standard deviations


@dataclass(frozen=True, eq=False)
class EnsembleLabels:
    """What N models say of frames.

    mean      frames with the mean of energy, forces, virial, charges as labels; without those that find no majority
    spread    the same frames with the standard deviations (N - 1 in the denominator), component by component
    pressure  (n_given, N) eV/Å^3, trace(virial) / (3 V) of each model: the potential part
    agrees    (n_given, N) whether a model is of the majority, over which mean and spread are taken
    """

    mean: list[Frame]
    spread: list[Frame]
    pressure: np.ndarray
    agrees: np.ndarray

    @property
    def has_majority(self) -> np.ndarray:
        """Return which of the given frames are labelled, (n_given,)."""
        return _is_majority(self.agrees)


def put_on_one_zero(models: Sequence[ForceField], frames: Sequence[Frame]) -> None:
    """Refit the reference energies of every model, in place, to the total energies of the same labelled frames."""
    for force_field in models:
        shift_references(force_field, make_samples(force_field, frames))


def ensemble_labels(
    models: Mapping[str, Evaluator], systems: Sequence[System], *, trajectories: Sequence[str], temperature_K: float
) -> EnsembleLabels:
    """Evaluate every model on every system and return the mean and the spread.

    models        name -> model; their names go into the level of the labels
    systems       periodic boxes; their positions are rounded to what files hold before they are evaluated
    trajectories  the run each system came from
    Raises InputError for fewer than two models, which have no spread.
    """
    if len(models) < 2:
        raise InputError(f"{len(models)} model given, expected two or more: one has no spread.")
    names = ", ".join(models)
    mean, spread, pressure, agrees = [], [], [], []
    for system, trajectory in zip(systems, trajectories, strict=True):
        rounded = replace(system, positions=round_positions(system.positions))
        outputs = [model.evaluate(Batch.from_systems([rounded])) for model in models.values()]
        values: dict[str, np.ndarray] = {
            "energy": np.array([float(output.energy) for output in outputs]),
            "forces": np.stack([output.forces.cpu().numpy() for output in outputs]),
            "virial": np.stack([output.virial[0].cpu().numpy() for output in outputs]),
            "charges": np.stack([output.charges.cpu().numpy() for output in outputs]),
        }
        common: dict[str, Any] = {
            "system": rounded, "kind": "periodic", "sampling": "liquid",
            "trajectory": trajectory, "temperature_K": temperature_K,
        }  # fmt: skip
        agree = majority(values["forces"])
        agrees.append(agree)
        if _is_majority(agree):
            averages = {name: value[agree].mean(axis=0) for name, value in values.items()}
            deviations = {name: value[agree].std(axis=0, ddof=1) for name, value in values.items()}
            mean.append(Frame(labels=_labels(ENSEMBLE + names, averages), **common))
            spread.append(Frame(labels=_labels(SPREAD + names, deviations), **common))
        pressure.append(np.trace(values["virial"], axis1=1, axis2=2) / (3.0 * rounded.volume))
    shape = (-1, len(models))
    return EnsembleLabels(mean, spread, np.array(pressure).reshape(shape), np.array(agrees, dtype=bool).reshape(shape))


def majority(forces: np.ndarray) -> np.ndarray:
    """Return which of N models, forces (N, n_atoms, 3), are nowhere further than ``MOST_APART`` from the median."""
    within: np.ndarray = np.abs(forces - np.median(forces, axis=0)).max(axis=(1, 2)) <= MOST_APART
    return within


def _is_majority(agrees: np.ndarray) -> np.ndarray:
    return np.asarray((agrees.sum(axis=-1) >= 2) & (2 * agrees.sum(axis=-1) > agrees.shape[-1]))


def _labels(level: str, values: dict[str, np.ndarray]) -> Labels:
    cut = level.encode()[:STRING_BYTES].decode(errors="ignore")  # provenance names all teachers, however many
    return Labels(level=cut, energy=float(values["energy"]), **{k: v for k, v in values.items() if k != "energy"})


def rms_spread(labels: EnsembleLabels) -> dict[str, float]:
    """Return root mean squares over labelled frames: forces per component [eV/Å], energy per atom, pressure [eV/Å^3].

    0 where there is no such frame.
    """
    kept = labels.has_majority
    if not kept.any():
        return dict.fromkeys(("forces", "energy_per_atom", "pressure"), 0.0)
    forces = np.concatenate([frame.labels.forces.ravel() for frame in labels.spread if frame.labels.forces is not None])
    energies = np.array([frame.labels.energy / frame.system.n_atoms for frame in labels.spread])
    pressures = np.nanstd(np.where(labels.agrees, labels.pressure, np.nan)[kept], axis=1, ddof=1)
    spreads = {"forces": forces, "energy_per_atom": energies, "pressure": pressures}
    return {name: float(np.sqrt(np.mean(np.square(values)))) for name, values in spreads.items()}
