"""Guards stop a simulation that has left physical ground, early and with the reason."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import ase
import ase.io
import numpy as np
import torch
import vesin
from ase.data import chemical_symbols

from bamboo.errors import GuardError
from bamboo.structure.packing import BOND_SCALE, bond_graph
from bamboo.system import System
from md.engine.state import Evaluator, MDState, PerReplica

CAUSE_BLOWUP = "timestep too long, overlapping start, or a force field outside its training domain"


@dataclass(frozen=True)
class Violation:
    """What is wrong in which replica (None: unknown), and the likely cause; phrases for a message.

    ``atoms`` are those concerned, counted within the replica; their frame marks them.
    """

    replica: int | None
    what: str
    cause: str
    atoms: tuple[int, ...] = ()


class Guard(Protocol):
    """Looks at the state every ``stride`` steps, and before every checkpoint."""

    @property
    def stride(self) -> int: ...

    def check(self, state: MDState) -> Violation | None: ...


@dataclass(frozen=True, kw_only=True)
class MaximumTemperature:
    """The kinetic temperature stays below factor x temperature_K (the highest the thermostat aims at, one or (R,))."""

    temperature_K: PerReplica
    factor: float = 3.0
    stride: int = 10

    def check(self, state: MDState) -> Violation | None:
        temperature = state.temperature_K()
        limit = torch.zeros_like(temperature) + self.factor * self.temperature_K
        replica = int((temperature / limit).argmax())
        if bool(temperature[replica] <= limit[replica]):
            return None
        what = f"temperature {float(temperature[replica]):.0f} K is above {float(limit[replica]):.0f} K"
        return Violation(replica, what, CAUSE_BLOWUP)


@dataclass(frozen=True, kw_only=True)
class DensityRange:
    """The density of every box stays inside a range [g/cm^3]; clusters are not looked at."""

    minimum_g_cm3: float = 0.3
    maximum_g_cm3: float = 2.5
    stride: int = 10

    def check(self, state: MDState) -> Violation | None:
        for replica, density in enumerate(state.density_g_cm3.tolist()):
            if density < self.minimum_g_cm3:
                cause = "the liquid evaporates: attraction too weak for this mixture, or the start too dilute"
                return Violation(replica, f"density {density:.3g} g/cm3 is below {self.minimum_g_cm3:g} g/cm3", cause)
            if density > self.maximum_g_cm3:
                cause = "the box collapses: repulsion too weak, or the pressure too high"
                return Violation(replica, f"density {density:.3g} g/cm3 is above {self.maximum_g_cm3:g} g/cm3", cause)
        return None


@dataclass(frozen=True, kw_only=True)
class MinimumDistance:
    """No two atoms come closer than a distance [Å], periodic images included."""

    distance: float = 0.6
    stride: int = 100

    def check(self, state: MDState) -> Violation | None:
        neighbors = vesin.NeighborList(cutoff=self.distance, full_list=False)
        for replica, system in enumerate(state.systems()):
            i, j, d = neighbors.compute(
                points=system.positions, box=system.cell, periodic=system.pbc, quantities="ijd", copy=True
            )
            if len(d):
                k = int(np.argmin(d))
                pair = f"{_atom(system, int(i[k]))} and {_atom(system, int(j[k]))}"
                what = f"{pair} are {d[k]:.2f} Å apart, less than {self.distance:g} Å"
                return Violation(replica, what, CAUSE_BLOWUP, (int(i[k]), int(j[k])))
        return None


@dataclass(frozen=True, kw_only=True)
class IntactMolecules:
    """The covalent bonds (``bond_graph``: covalent radii) stay those of the systems the run was built from.

    A bond counts as broken beyond 1.6 times the sum of radii and a new one as formed below 1.1 times: between the two,
    where hot bonds vibrate, nothing is decided.
    """

    systems: Sequence[System]
    stride: int = 1000
    broken_scale: float = 1.6
    formed_scale: float = 1.1

    def check(self, state: MDState) -> Violation | None:
        for replica, (start, system) in enumerate(zip(self.systems, state.systems(), strict=True)):
            expected = _bonds(start)
            broken = expected - _bonds(system, scale=self.broken_scale)
            formed = _bonds(system, scale=self.formed_scale) - expected
            if broken or formed:
                i, j = min(broken or formed)
                pair = f"{_atom(system, i)} - {_atom(system, j)}"
                what = f"bond {pair} has {'broken' if broken else 'formed'} ({len(broken) + len(formed)} bonds changed)"
                return Violation(replica, what, "chemistry outside the training domain, or too hot a run", (i, j))
        return None


@dataclass(frozen=True, kw_only=True)
class CommitteeAgreement:
    """The models of a committee agree on the force on every atom.

    s_i = sqrt(sum_m |F_i^m - <F_i>|^2 / (M - 1)) over the M models, that of the run among them, stays below a limit
    for all atoms. Models trained alike from different seeds part where their data end (Zhang et al., Phys. Rev. Mater.
    3, 023804 (2019), who label frames between 0.05 and 0.35 eV/Å of the same with 1 / M, and discard those above).

    others  evaluators of the other models
    limit   eV/Å
    """

    others: Sequence[Evaluator]
    limit: float = 1.0
    stride: int = 100

    def deviations(self, state: MDState) -> torch.Tensor:
        """Return s_i, (n_atoms,) eV/Å."""
        forces = [state.forces]
        for evaluator in self.others:
            theirs = evaluator.evaluate(state.batch).forces.detach().to(state.device)
            forces.append(state.without_net(theirs) if state.centre_of_mass_fixed else theirs)
        return torch.stack(forces).var(dim=0).sum(dim=1).sqrt()

    def check(self, state: MDState) -> Violation | None:
        deviation, atom = self.deviations(state).max(dim=0)
        if float(deviation) <= self.limit:
            return None
        replica = int(state.batch.system_index[atom])
        index = int(atom) - int((state.batch.system_index < replica).sum())
        name = f"{chemical_symbols[int(state.batch.numbers[atom])]}{index}"
        what = f"the models disagree on the force on {name} by {float(deviation):.2f} eV/Å, more than {self.limit:g}"
        cause = "a structure unlike those the models were trained on: label the frame and train again"
        return Violation(replica, what, cause, (index,))


def check_guards(state: MDState, guards: Iterable[Guard]) -> Violation | None:
    """Return the first violation; that all numbers are finite is looked at before any guard."""
    for name in ("energy", "forces", "momenta", "positions", "cell"):
        tensor = getattr(state.batch, name) if name in ("positions", "cell") else getattr(state, name)
        finite = torch.isfinite(tensor)
        if not bool(finite.all()):
            first = int((~finite).nonzero()[0, 0])
            replica = first if name in ("energy", "cell") else int(state.batch.system_index[first])
            return Violation(replica, f"{name} is not finite", CAUSE_BLOWUP)
    return next((violation for guard in guards if (violation := guard.check(state))), None)


def guard_error(
    violation: Violation, state: MDState, *, stage: str, frame_folder: Path | None, restart_folder: Path | None
) -> GuardError:
    """Write the offending replica (all where unknown) to blowup.extxyz and compose the message."""
    where = f"{stage} stopped at {state.time_fs / 1000.0:.4g} ps (step {state.step})"
    if state.n_replicas > 1 and violation.replica is not None:
        where += f", replica {violation.replica}"
    message = f"{where}: {violation.what}. Likely cause: {violation.cause}."
    if restart_folder is not None:
        message += f" Last good state: {restart_folder}."
    if frame_folder is not None:
        frame_folder.mkdir(parents=True, exist_ok=True)
        path = frame_folder / "blowup.extxyz"
        replicas = range(state.n_replicas) if violation.replica is None else [violation.replica]
        ase.io.write(path, [_frame(state, replica, marked=violation.atoms) for replica in replicas], format="extxyz")
        message += f" Frame: {path}."
    return GuardError(message)


def _frame(state: MDState, replica: int, *, marked: Sequence[int]) -> ase.Atoms:
    """One replica as ASE structure, non-finite numbers included, with forces and momenta [ASE units].

    The array ``offending`` is True for the marked atoms.
    """
    chosen = state.batch.system_index == replica
    host = {name: getattr(state.batch, name)[chosen].cpu().numpy() for name in ("numbers", "positions")}
    pbc = bool(state.batch.pbc[replica])
    cell = state.batch.cell[replica].cpu().numpy() if pbc else None
    atoms = ase.Atoms(host["numbers"], host["positions"], cell=cell, pbc=pbc)
    atoms.info["step"] = state.step
    atoms.arrays["momenta"] = state.momenta[chosen].cpu().numpy()
    atoms.arrays["md_forces"] = state.forces[chosen].cpu().numpy()
    atoms.arrays["offending"] = np.isin(np.arange(len(atoms)), marked)
    return atoms


def _bonds(system: System, *, scale: float = BOND_SCALE) -> set[tuple[int, int]]:
    return {(int(i), int(j)) for i, j in bond_graph(system, scale=scale)}


def _atom(system: System, index: int) -> str:
    return f"{chemical_symbols[system.numbers[index]]}{index}"
