"""From many cheap labels and a few good ones to many good ones: models of the two levels of theory lift the many.

``base`` was trained on the cheap labels; each of ``tuned`` started from base and went on with the good labels, with a
seed of its own. For any frame

    E_lifted = E_cheap - E_base + <E_tuned>,        forces and virial likewise, charges and dipole of <tuned>:

the large set keeps what base cannot explain of it, and gains what tuned have learnt; the mean <> over them leaves out
much of what each has invented where good labels are few. Levels of theory differ in their
charges and thus in their long-range electrostatics, and beyond that at short range only; each model brings its own
electrostatics, so that the difference of the two is right from afar as well. Dispersion is subtracted from labels that
contain it and is in no label of a level that contains none (``Labels.contains_dispersion``).

What base cannot explain is small where the cheap label is sound. Where it is large, the label is not worth keeping:
GFN2-xTB spreads an electron over two separated ions, which leaves residual forces of 4-7 kcal/mol/Å, while a tuned
model alone is within 1 kcal/mol/Å of B3LYP for the same frames.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bamboo.forcefield import ForceField
from bamboo.learn.samples import make_sample, unpack
from bamboo.quantum.dataset import Frame
from bamboo.quantum.labels import Labels

LIFTED = "; lifted"  # ends the level of a lifted label
UNEXPLAINED, UNEXPLAINED_SHARE = 0.13, 0.1  # eV/Å and of the RMS force: frames beyond both are left out


def predict(force_field: ForceField, frame: Frame, *, level: str) -> Labels:
    """Return what a model expects a frame's label of a level to be; virial of boxes, dipole of clusters."""
    periodic = frame.system.pbc
    nothing = Labels(level, 0.0, np.zeros_like(frame.system.positions), virial=np.zeros((3, 3)) if periodic else None)
    fixed = make_sample(force_field, replace(frame, labels=nothing))  # minus what no weight contributes
    output = force_field(*unpack(fixed), fixed_terms=False)
    return Labels(
        level,
        energy=float(output.energy) - float(fixed.energy),
        forces=(output.forces - fixed.forces).numpy(),
        charges=output.charges.numpy(),
        dipole=None if periodic else output.dipole[0].numpy(),
        virial=(output.virial - fixed.virial)[0].numpy() if periodic else None,
    )


def lift_frames(
    base: ForceField,
    tuned: Sequence[ForceField],
    cheap: Sequence[Frame],
    *,
    level: str,
    progress: Callable[[int, int], None] | None = None,
) -> list[Frame]:
    """Return cheap frames with lifted labels, without those whose forces ``base`` does not explain.

    level  of the labels that ``tuned`` learnt from; the lifted ones are marked as such
    """
    lifted = []
    for index, frame in enumerate(cheap):
        if progress is not None:
            progress(index + 1, len(cheap))
        label = frame.labels
        low = predict(base, frame, level=label.level)
        high = _mean([predict(model, frame, level=level) for model in tuned])
        if label.forces is not None and low.forces is not None and _unexplained(label.forces, low.forces):
            continue
        labels = replace(
            high,
            level=level + LIFTED,
            energy=label.energy - low.energy + high.energy,
            forces=_shifted(label.forces, low.forces, high.forces),
            virial=_shifted(label.virial, low.virial, high.virial),
        )
        lifted.append(replace(frame, labels=labels))
    return lifted


def _mean(labels: Sequence[Labels]) -> Labels:
    """Return the mean of labels of one frame and level."""

    def mean(name: str) -> Any:
        values = [getattr(label, name) for label in labels]
        return None if values[0] is None else np.mean(values, axis=0)

    return replace(labels[0], **{name: mean(name) for name in ("energy", "forces", "virial", "charges", "dipole")})


def _unexplained(label: NDArray[np.float64], prediction: NDArray[np.float64]) -> bool:
    residual, size = np.sqrt(np.mean((label - prediction) ** 2)), np.sqrt(np.mean(label**2))
    return bool(residual > max(UNEXPLAINED, UNEXPLAINED_SHARE * size))


def _shifted(
    label: NDArray[np.float64] | None, low: NDArray[np.float64] | None, high: NDArray[np.float64] | None
) -> NDArray[np.float64] | None:
    """Return label - low + high, nothing where there is no label."""
    return None if label is None or low is None or high is None else label - low + high
