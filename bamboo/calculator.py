"""The ASE calculator."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase import Atoms
from ase.calculators.calculator import Calculator, all_changes
from ase.stress import full_3x3_to_voigt_6_stress

from bamboo import checkpoint
from bamboo.errors import InputError
from bamboo.evaluator import Evaluator, best_device
from bamboo.system import Batch, System

DTYPES = {"float32": torch.float32, "float64": torch.float64}


class BambooCalculator(Calculator):
    """Energy, forces, stress, charges and dipole of clusters and periodic boxes.

    model            zoo name ("default", "gfn2", …) or path of a model file
    device           "auto" (a GPU where there is one), "cpu", "cuda", …
    dtype            precision of the network, "float32" or "float64"; physical terms are always float64
    charge_response  None (as the model file says), "full" or "frozen"
    skin, engine     as in ``Evaluator``

    The total charge is read from ``atoms.info["charge"]`` (0 where absent). ``results`` holds, in ASE's units:
    energy, free_energy [eV]; forces (n, 3) [eV/Å]; stress (6,) Voigt [eV/Å^3], periodic only; charges (n,) [e];
    dipole (3,) [e Å] about the origin, clusters only; terms {name: eV}, adding up to the energy.

    Raises UnknownElementError, or InputError for partly periodic, empty, overlapping or not finite structures.
    """

    implemented_properties = [  # noqa: RUF012 (ASE's declaration)
        "energy", "free_energy", "forces", "stress", "charges", "dipole", "terms",
    ]  # fmt: skip

    def __init__(
        self,
        model: str | Path = "default",
        *,
        device: str = "auto",
        dtype: str = "float32",
        charge_response: str | None = None,
        skin: float = 1.0,
        engine: str = "auto",
        **ase_options: Any,
    ) -> None:
        super().__init__(**ase_options)  # type: ignore[no-untyped-call]
        if dtype not in DTYPES:
            raise InputError(f"dtype is '{dtype}', expected one of {', '.join(DTYPES)}.")
        if device == "auto":
            device = best_device()
        force_field = checkpoint.load(model, dtype=DTYPES[dtype], charge_response=charge_response)
        self.evaluator = Evaluator(force_field, skin=skin, device=device, engine=engine)

    def check_state(self, atoms: Atoms, tol: float = 1e-15) -> list[str]:
        """Report what changed since the last call; a changed total charge counts as changed charges."""
        changes: list[str] = super().check_state(atoms, tol=tol)  # type: ignore[no-untyped-call]
        if self.atoms is not None and not np.array_equal(
            atoms.info.get("charge", 0.0), self.atoms.info.get("charge", 0.0)
        ):
            changes.append("initial_charges")
        return changes

    def calculate(
        self,
        atoms: Atoms | None = None,
        properties: list[str] | None = None,
        system_changes: list[str] = all_changes,
    ) -> None:
        """Fill ``results``; called by ASE."""
        super().calculate(atoms, properties or ["energy"], system_changes)  # type: ignore[no-untyped-call]
        if self.atoms is None:
            raise InputError("The calculator has no atoms.")
        system = System.from_atoms(self.atoms)
        output = self.evaluator.evaluate(Batch.from_systems([system], device=self.evaluator.device))
        energy = float(output.energy[0])
        self.results = {
            "energy": energy,
            "free_energy": energy,
            "forces": output.forces.cpu().numpy(),
            "charges": output.charges.cpu().numpy(),
            "terms": {name: float(value[0]) for name, value in output.terms.items()},
        }
        if system.pbc:
            stress = -output.virial[0].cpu().numpy() / system.volume
            self.results["stress"] = full_3x3_to_voigt_6_stress(stress)
        else:
            self.results["dipole"] = output.dipole[0].cpu().numpy()
