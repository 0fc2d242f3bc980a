"""How long neighbours stay: residence times of molecules and ions in the shell of a cation."""

from collections.abc import Sequence
from math import sqrt

import numpy as np
from numpy.typing import NDArray
from scipy.fft import irfft, next_fast_len, rfft

from bamboo.errors import InputError
from md.analysis.estimate import Estimate, format_time, no_value
from md.analysis.statistics import WINDOW, student_widening
from md.analysis.structure import NO_SHELL, binding_shells, pair_distances
from md.trajectory import Trajectory

N_GROUPS = 8  # of cations, left out one at a time for the error bar
LONGEST = 0.1  # of the trajectory: slower exchange is not resolved
FEWEST_FRAMES = 2.0  # within a residence time


def residence_times(trajectories: Sequence[Trajectory], *, cation: str) -> dict[str, Estimate]:
    """Return {"residence_time_Li_EC": tau in ps, ...} of every species around a monatomic cation.

    h(t) = 1 while a binding atom of a molecule is within the first minimum of g(r), p = <h> over all pairs,
    C(t) = (<h(0) h(t)> - p^2) / (p - p^2),  tau = integral_0^inf C(t) dt / (1 - p).
    A contact that is lost at a rate k has tau = 1/k, whatever the rate at which contacts form: C decays with the sum of
    the rates and p is their ratio. Brief excursions over the edge do not count (intermittent function; Impey, Madden,
    McDonald, J. Phys. Chem. 87, 5071 (1983)). The integral is cut where the analysis of correlated series cuts it;
    the error bar leaves out groups of cations. trajectories: replicas.
    """
    results = {}
    topology = trajectories[0].topology
    for name in topology.species:
        if name == cation:
            continue
        key, method = f"residence_time_{cation}_{name}", "intermittent contacts within the first minimum of g(r)"
        if not len(binding_shells(trajectories[0], topology.select(species=cation), name)):
            results[key] = no_value(f"{NO_SHELL}: {name} around {cation}", unit="ps", method=method)
        else:
            contacts = [_contacts(trajectory, cation, name) for trajectory in trajectories]
            results[key] = _residence(contacts, interval_ps=trajectories[0].interval_ps, method=method)
    return results


def _contacts(trajectory: Trajectory, cation: str, species: str) -> NDArray[np.bool_]:
    """Contacts of each cation with each molecule of a species in every frame, (n_cations, n_molecules, n_frames)."""
    topology = trajectory.topology
    centres = topology.select(species=cation)
    shells = binding_shells(trajectory, centres, species)
    n_molecules = len(topology.species[species])
    place = np.full(len(topology.molecule_names), -1)
    place[topology.species[species]] = np.arange(n_molecules)
    found = np.zeros((len(centres), n_molecules, trajectory.n_frames), dtype=bool)
    if trajectory.cells is None:
        raise InputError("The trajectory has no cell: residence times need a periodic box.")
    for frames, block in trajectory.blocks():
        for frame, positions in zip(range(frames.start, frames.stop), block, strict=True):
            for atoms, cutoff in shells:
                cell = trajectory.cells[frame]
                i, j, _ = pair_distances(positions[centres], positions[atoms], cell=cell, r_max=cutoff)
                found[i, place[topology.molecule[atoms[j]]], frame] = True
    return found


def _residence(contacts: list[NDArray[np.bool_]], *, interval_ps: float, method: str) -> Estimate:
    """Estimate from contacts (n_cations, n_molecules, n_frames) of each replica."""
    n_frames = min(found.shape[2] for found in contacts)
    every = np.concatenate([found[:, :, :n_frames] for found in contacts])
    products = np.stack([_products(found) for found in every])  # one row per cation
    occupied = every.mean(axis=(1, 2))
    groups = np.array_split(np.arange(len(every)), min(N_GROUPS, len(every)))
    tau = _time(products.mean(axis=0), float(occupied.mean()))
    length_ps = n_frames * interval_ps
    if not np.isfinite(tau) or tau > LONGEST * n_frames:
        reason = (
            f"not converged: contacts last longer than {format_time(LONGEST * length_ps)}, a tenth of the trajectory: "
            f"run at least {format_time(4.0 * length_ps)}"
        )
        return no_value(reason, unit="ps", method=method)
    if tau < FEWEST_FRAMES:
        reason = f"contacts last less than {format_time(FEWEST_FRAMES * interval_ps)}: write frames more often"
        return no_value(reason, unit="ps", method=method)
    if len(groups) < 3:
        return no_value("fewer than three cations: no error bar", unit="ps", method=method)
    without = [
        _time(np.delete(products, group, axis=0).mean(axis=0), float(np.delete(occupied, group).mean()))
        for group in groups
    ]
    n = len(groups)
    stderr = sqrt((n - 1) * float(np.var(without))) * student_widening(n - 1)
    return Estimate(tau * interval_ps, stderr * interval_ps, "ps", float(n), method)


def _products(contacts: NDArray[np.bool_]) -> NDArray[np.float64]:
    """<h(0) h(t)> of one cation, averaged over all its possible partners, (n_frames,)."""
    n_molecules, n_frames = contacts.shape
    ever = contacts[contacts.any(axis=1)].astype(np.float64)
    n_padded = next_fast_len(2 * n_frames, real=True)
    power = (np.abs(rfft(ever, n_padded, axis=1)) ** 2).sum(axis=0)
    result: NDArray[np.float64] = irfft(power, n_padded)[:n_frames] / np.arange(n_frames, 0, -1) / n_molecules
    return result


def _time(products: NDArray[np.float64], occupied: float) -> float:
    """Residence time in frames, infinite where the window does not close."""
    if not 0.0 < occupied < 1.0:
        return float("inf")
    correlation = (products - occupied**2) / (products[0] - occupied**2)
    tau = np.cumsum(correlation) - 0.5  # trapezoidal rule
    closed = np.flatnonzero(np.arange(len(tau)) >= WINDOW * tau)
    return float(tau[closed[0]]) / (1.0 - occupied) if len(closed) else float("inf")
