"""Synthetic trajectories whose transport coefficients and distributions are known in closed form."""

from collections.abc import Callable

import numpy as np
import pytest

from md.trajectory import Ensemble, Topology, Trajectory


@pytest.fixture
def make_trajectory() -> Callable[..., Trajectory]:
    """Return a function that wraps tracks of single-atom molecules, (n_frames, n_molecules, 3) Å, in a trajectory."""

    def make(
        positions: np.ndarray,
        names: list[str],
        *,
        charges: list[float] | None = None,
        masses: list[float] | None = None,
        interval_ps: float = 1.0,
        cell: np.ndarray | None = None,
        ensemble: Ensemble | None = None,
    ) -> Trajectory:
        elements = {"Li": 3, "F": 9, "O": 8, "water": 8, "C": 6, "Ar": 18}
        n = len(names)
        topology = Topology(
            numbers=np.array([elements.get(name, 6) for name in names]),
            masses=np.ones(n) if masses is None else np.array(masses),
            molecule=np.arange(n),
            molecule_names=tuple(names),
            molecule_charges=np.zeros(n) if charges is None else np.array(charges),
        )
        return Trajectory.from_arrays(
            positions,
            topology,
            time_ps=interval_ps * np.arange(len(positions)),
            cells=30.0 * np.eye(3) if cell is None else cell,
            ensemble=ensemble or Ensemble("nvt", "svr", thermostat_time_ps=1.0),
        )

    return make
