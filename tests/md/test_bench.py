"""The benchmark measures what it says: boxes of the stated size and density, batches of every kind, known parts."""

import numpy as np
import pytest
from ase.data import atomic_masses
from typer.testing import CliRunner

from bamboo.units import GRAM_PER_CM3
from md import cli
from md.bench import DENSITY_G_CM3, Measurement, box, table, to_json, training_frames


def test_large_box_is_the_small_one_repeated() -> None:
    small, large = box(500), box(2000)
    assert abs(large.n_atoms - 2000) < 300 and large.n_atoms % small.n_atoms == 0
    for system in (small, large):
        volume = abs(np.linalg.det(system.cell))
        assert atomic_masses[system.numbers].sum() / volume / GRAM_PER_CM3 == pytest.approx(DENSITY_G_CM3, rel=1e-3)
    fractional = np.linalg.solve(large.cell.T, large.positions.T).T
    _, counts = np.unique(np.round(fractional % 1.0, 6), axis=0, return_counts=True)
    assert (counts == 1).all()  # no two atoms on one place


def test_training_batch_holds_clusters_and_a_box() -> None:
    frames = training_frames()
    assert sum(frame.system.pbc for frame in frames) == 1
    assert max(frame.system.n_atoms for frame in frames if not frame.system.pbc) > 90
    assert all(frame.labels.forces is not None and frame.labels.charges is not None for frame in frames)


def test_rows_are_readable_and_unknown_parts_refused() -> None:
    row = Measurement("md", "step against evaluation", 1.08, "x")
    assert "step against evaluation" in table([row]) and "1.08 x" in table([row])
    assert to_json([row]) == [{"part": "md", "what": "step against evaluation", "value": 1.08, "unit": "x"}]
    result = CliRunner().invoke(cli.app, ["bench", "speed"])
    assert result.exit_code == 2 and "Unknown part 'speed'" in result.output
