"""How far models are apart in the pressure of the same frames of a liquid, where sampling does not blur it.

    python docs/compare_on_frames.py RUN/sample/traj.h5 MODEL MODEL [...]

prints the mean molecular pressure [bar] of every model, without its kinetic part, and its spread over models.
"""

import sys
from pathlib import Path

import numpy as np

from bamboo import checkpoint, units
from bamboo.learn.align import molecular_pressure
from md.liquid import frames

N_FRAMES = 8


def main(trajectory: str, *models: str) -> None:
    """Print one line for each model and one for all."""
    path = Path(trajectory)
    systems = frames(path.parent.parent, path.parent.name)
    systems = [systems[k] for k in np.linspace(0, len(systems) - 1, N_FRAMES).astype(int)]
    means = []
    for model in models:
        pressure = molecular_pressure(checkpoint.load(model), systems) / units.BAR
        means.append(float(pressure.mean()))
        print(f"{model}: {means[-1]:.0f} bar")
    print(f"standard deviation over {len(means)} models: {np.std(means, ddof=1):.0f} bar")


if __name__ == "__main__":
    main(*sys.argv[1:])
