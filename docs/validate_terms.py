"""Checks of the terms of the force field against constants of crystals, another program, and finite differences."""

import numpy as np
import torch
from validation_rows import Row, row

from bamboo import units
from bamboo.checkpoint import load
from bamboo.evaluator import Evaluator
from bamboo.neighbors import find_neighbors
from bamboo.structure.molecules import molecule
from bamboo.structure.packing import pack_box
from bamboo.system import Batch, System
from bamboo.terms import electrostatics
from bamboo.terms.dispersion import Dispersion, DispersionConfig

FCC = np.array([[0.0, 0.5, 0.5], [0.5, 0.0, 0.5], [0.5, 0.5, 0.0]])
# lattice and anion in units of the cubic cell, nearest distance / cubic cell, Madelung constant (Johnson and Templeton,
# J. Chem. Phys. 34, 2004 (1961))
CRYSTALS = {
    "NaCl": (FCC, (0.5, 0.5, 0.5), 0.5, 1.747564594633182),
    "CsCl": (np.eye(3), (0.5, 0.5, 0.5), 3**0.5 / 2, 1.76267477307099),
    "ZnS": (FCC, (0.25, 0.25, 0.25), 3**0.5 / 4, 1.63805505338879),
}


def terms() -> list[Row]:
    return [*madelung(), dispersion(), strain()]


def madelung(nearest: float = 4.0, cutoff: float = 5.0) -> list[Row]:
    """Madelung constants from the real-space and mesh parts, as the force field adds them up."""
    rows = []
    for name, (lattice, anion, share, exact) in CRYSTALS.items():
        edge = nearest / share
        positions = np.array([[0.0, 0.0, 0.0], anion]) * edge + 0.123
        batch = Batch.from_systems([System(np.ones(2, dtype=np.int64), positions, lattice * edge, pbc=True)])
        pairs = find_neighbors(batch, cutoff, 0.0).edges
        i, j = pairs.index
        q = torch.tensor([1.0, -1.0], dtype=torch.float64)
        distance = pairs.vectors(batch.positions, batch.cell, system_index=batch.system_index).norm(dim=1)
        real = 0.5 * electrostatics.real_space_energy(q[i] * q[j], distance, cutoff).sum()
        energy = float(real + electrostatics.reciprocal_energy(q, batch.positions, batch.cell[0], cutoff=cutoff))
        found = -energy * nearest / units.COULOMB_CONSTANT
        passed = abs(found / exact - 1.0) < 2.0e-5
        rows.append(row(f"Madelung constant of {name}", f"{found:.6f}", f"{exact:.6f}", passed=passed))
    return rows


def dispersion() -> Row:
    """Pair energies of two EC molecules with the coefficients of dftd3, against its own D3-CSO."""
    from dftd3 import interface

    ec, worst = molecule("EC"), 0.0
    ours = Dispersion(DispersionConfig(a1=0.86, damping_length=6.25 * units.BOHR))
    for separation in (2.0, 3.5, 5.0, 8.0):
        positions = np.vstack([ec.positions, ec.positions @ np.diag([1.0, -1.0, -1.0]) + [0.3, 0.2, separation]])
        model = interface.DispersionModel(np.tile(ec.numbers, 2), positions / units.BOHR)
        model.set_realspace_cutoff(1000.0, 0.0, 40.0)
        i, j = np.triu_indices(len(positions), k=1)
        distance = np.linalg.norm(positions[i] - positions[j], axis=1)

        def pairs(parameters, model=model, i=i, j=j):  # type: ignore[no-untyped-def]
            return 2.0 * model.get_pairwise_dispersion(parameters)["additive pairwise energy"][i, j] * units.HARTREE

        c6, c8 = (
            -pairs(interface.RationalDampingParam(s6=float(order == 6), s8=float(order == 8), s9=0.0, a1=0.0, a2=0.0))
            * distance**order
            for order in (6, 8)
        )
        oracle = pairs(interface.CSODampingParam(s6=1.0, s9=0.0, a1=0.86, a2=2.5, a4=6.25))
        found = ours.pair_energy(*(torch.from_numpy(array) for array in (distance, c6, np.sqrt(c8 / c6)))).numpy()
        worst = max(worst, float(np.abs(found / oracle - 1.0).max()))
    what = "D3-CSO pair energies of two EC at four distances, against dftd3"
    return row(what, f"within {worst:.0e}", "< 1e-6", passed=worst < 1.0e-6)


def strain(step: float = 1.0e-4) -> Row:
    """All nine elements of the virial of the shipped model against energies of strained boxes."""
    box = pack_box({"DMC": 3, "EC": 2, "Li": 1, "PF6": 1}, density_g_cm3=0.9, seed=2)
    evaluator = Evaluator(load("default", dtype=torch.float64))

    def strained(a: int, b: int, size: float) -> float:
        matrix = np.eye(3)
        matrix[a, b] += size
        moved = System(box.numbers, box.positions @ matrix, box.cell @ matrix, True, molecule=box.molecule)
        return float(evaluator.evaluate(Batch.from_systems([moved])).energy[0])

    virial = evaluator.evaluate(Batch.from_systems([box])).virial[0].numpy()
    numeric = np.array(
        [[-(strained(a, b, step) - strained(a, b, -step)) / (2 * step) for b in range(3)] for a in range(3)]
    )
    worst = float(np.abs(numeric - virial).max() / np.abs(virial).max())
    what = f"virial of the shipped model, largest element {np.abs(virial).max():.3g} eV, against finite strain"
    return row(what, f"within {worst:.0e} of it", "< 1e-5", passed=worst < 1.0e-5)
