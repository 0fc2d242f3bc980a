"""The damping length of dispersion, fitted once so that a level without dispersion plus D3-CSO gives known curves.

a4 minimises sum_x (E_level(x) + E_dispersion(x; a4) - E_reference(x))^2 over the points of pair curves that both levels
have and that ``bamboo.learn.evidence`` compares, E the interaction energies.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar

from bamboo import units
from bamboo.errors import InputError
from bamboo.learn.evidence import Curve, answers_of_labels, compared, curves
from bamboo.quantum.dataset import Frame
from bamboo.terms.dispersion import DispersionConfig

RANGE = (5.0 * units.BOHR, 9.0 * units.BOHR)  # Å; the original and the published model have 6.25 and 7.75 bohr


@dataclass(frozen=True)
class DampingFit:
    """damping_length Å; rms kcal/mol, what is left over the n_points points; curves as they come out."""

    damping_length: float
    rms: float
    n_points: int
    curves: dict[str, Curve]


def fit_damping(frames: Sequence[Frame], reference: Sequence[Frame]) -> DampingFit:
    """Fit the damping length to probes of pairs.

    frames     labels of a level without dispersion, with the monomers of the pairs
    reference  labels of the better level, of the same names

    Raises InputError where the two share no curve, or a level of ``frames`` contains dispersion.
    """
    if any(frame.labels.contains_dispersion for frame in frames):
        raise InputError("The labels to which dispersion is added contain it already.")
    truth = curves(answers_of_labels(reference))

    def gaps(length: float) -> tuple[NDArray[np.float64], dict[str, Curve]]:
        found = curves(answers_of_labels(frames, DispersionConfig(damping_length=length)))
        return np.array(
            [
                found[what][x] - value
                for what, curve in truth.items()
                for x, value in curve.items()
                if x in found.get(what, {}) and compared(what, x)
            ]
        ), found

    if not len(gaps(RANGE[0])[0]):
        raise InputError("The two files have no point of a pair curve in common.")
    best = minimize_scalar(lambda length: float(np.mean(gaps(length)[0] ** 2)), bounds=RANGE, method="bounded")
    left, found = gaps(float(best.x))
    return DampingFit(float(best.x), float(np.sqrt(np.mean(left**2))), len(left), found)
