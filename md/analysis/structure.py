"""Radial distribution functions, coordination numbers and ion pairing.

Distances count every periodic image within the range, so a range beyond half the box is as valid as one below.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil, pi

import numpy as np
from ase.data import chemical_symbols
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter1d
from scipy.spatial import cKDTree

from bamboo.errors import InputError
from md.analysis.estimate import Estimate, no_value
from md.analysis.statistics import MIN_EFFECTIVE_SAMPLES, series_mean
from md.trajectory import Trajectory

Floats = NDArray[np.float64]
Indices = NDArray[np.int64]
LIGANDS = ("N", "O", "F", "Cl", "Br", "I")  # elements that bind a cation
BIN_WIDTH = 0.05  # Å
NEAREST_SHELL = 3.5  # Å; a g(r) that first exceeds 1 beyond has no contact shell
DEEPEST_MINIMUM = 0.5  # to which g(r) must fall behind its first peak to end a shell
NO_SHELL = "no shell of neighbours"
MOST_FRAMES = 500  # neighbouring frames add little to a structure


@dataclass(frozen=True, eq=False)
class RadialDistribution:
    """g(r) over bins centred at ``r`` [Å] and the running coordination number up to their outer edges.

    coordination(r) = 4 pi rho_b int_0^r g(s) s^2 ds = mean number of ``second`` atoms within r of a ``first`` atom.
    """

    r: Floats
    g: Floats
    coordination: Floats

    def first_minimum(self) -> float | None:
        """Return the end of the first shell [Å], or None where there is no shell in contact with the centre.

        The minimum of the smoothed g between its first peak and its next rise above 1; the middle where it is flat.
        """
        smooth = gaussian_filter1d(self.g, 2.0, mode="nearest")
        dense = np.concatenate([smooth > 1.0, [True]])  # closed by a rise at the end of the range
        peak = int(np.argmax(dense))
        if peak == len(smooth) or self.r[peak] > NEAREST_SHELL or dense[peak:].all():
            return None
        start = peak + int(np.argmin(dense[peak:]))
        gap = smooth[start : start + int(np.argmax(dense[start:]))]
        if gap.min() > DEEPEST_MINIMUM:
            return None
        return float(self.r[start + np.flatnonzero(gap <= gap.min() + 0.02)].mean())


def pair_distances(first: Floats, second: Floats, *, cell: Floats, r_max: float) -> tuple[Indices, Indices, Floats]:
    """Return (i, j, distance) of all pairs closer than ``r_max``, over all periodic images of ``second``.

    first (n, 3), second (m, 3), cell (3, 3) in Å; positions need not be wrapped. A pair appears once per image. An atom
    present in both lists meets itself at distance 0.
    """
    inverse = np.linalg.inv(cell)
    reach = r_max * np.linalg.norm(inverse, axis=0)  # r_max in units of the spacing between cell faces
    wrapped_first = (first @ inverse) % 1.0 @ cell
    fractional = (second @ inverse) % 1.0
    spans = [np.arange(-ceil(x), ceil(x) + 1) for x in reach]
    shifts = np.stack(np.meshgrid(*spans, indexing="ij"), axis=-1).reshape(-1, 1, 3)
    images = fractional + shifts  # (n_shifts, m, 3)
    near = ((images > -reach - 1.0e-9) & (images < 1.0 + reach + 1.0e-9)).all(axis=-1)
    which = np.broadcast_to(np.arange(len(second)), near.shape)[near]
    pairs = cKDTree(wrapped_first).sparse_distance_matrix(
        cKDTree(images[near] @ cell), r_max, output_type="ndarray"
    )  # fmt: skip
    return pairs["i"].astype(np.int64), which[pairs["j"]].astype(np.int64), pairs["v"]


def radial_distribution(
    trajectory: Trajectory, first: Indices, *, second: Indices, r_max: float = 10.0, intermolecular: bool = True
) -> RadialDistribution:
    """Return g(r) of ``second`` atoms around ``first`` atoms (indices, see ``Topology.select``) up to r_max [Å].

    g(r) = <pairs in the shell> / (n_first rho_second 4 pi r^2 dr), exact shell volumes, the density of each frame. An
    atom does not meet itself; ``intermolecular`` also leaves out the atoms of its own molecule (not their images).
    """
    edges = np.arange(0.0, r_max + 0.5 * BIN_WIDTH, BIN_WIDTH)
    volumes = 4.0 / 3.0 * pi * np.diff(edges**3)
    molecule = trajectory.topology.molecule
    g, counts, n_frames = np.zeros(len(volumes)), np.zeros(len(volumes)), 0
    for positions, cell in _frames(trajectory):
        i, j, distance = pair_distances(positions[first], positions[second], cell=cell, r_max=float(edges[-1]))
        own = molecule[first[i]] == molecule[second[j]] if intermolecular else first[i] == second[j]
        # unwrapped molecules are whole: what lies at the direct distance is the same molecule, not its image
        direct = np.linalg.norm(positions[first[i[own]]] - positions[second[j[own]]], axis=1)
        keep = ~own
        keep[own] = np.abs(direct - distance[own]) > 1.0e-6
        pairs = np.histogram(distance[keep], edges)[0]
        counts += pairs
        g += pairs * abs(np.linalg.det(cell)) / (len(first) * len(second) * volumes)
        n_frames += 1
    return RadialDistribution(
        r=0.5 * (edges[1:] + edges[:-1]), g=g / n_frames, coordination=np.cumsum(counts) / (n_frames * len(first))
    )


def coordination_numbers(trajectory: Trajectory, *, centre: str = "Li", ligand: str = "O") -> dict[str, Estimate]:
    """Return how many ``ligand`` atoms of each species surround a ``centre`` atom (element symbols).

    "coordination_Li_O_EC", ..., and their sum "coordination_Li_O": atoms within the first minimum of the g(r) of the
    ligand element over all species. No value where that g(r) shows no shell.
    """
    topology = trajectory.topology
    centres, ligands = topology.select(element=centre), topology.select(element=ligand)
    base, method = f"coordination_{centre}_{ligand}", "neighbours within the first minimum of g(r)"
    cutoff = radial_distribution(trajectory, centres, second=ligands, r_max=8.0).first_minimum()
    owner = topology.molecule[ligands]
    members = {name: np.isin(owner, index) for name, index in topology.species.items()}
    names = [base, *(f"{base}_{name}" for name, member in members.items() if member.any())]
    if cutoff is None:
        reason = (
            f"{NO_SHELL}: the g(r) of {ligand} around {centre} has no peak within {NEAREST_SHELL:g} Å that ends in a "
            f"minimum below {DEEPEST_MINIMUM:g}"
        )
        return {name: no_value(reason, unit="", method=method) for name in names}
    series: dict[str, list[float]] = {name: [] for name in names}
    for positions, cell in _frames(trajectory):
        i, j, _ = pair_distances(positions[centres], positions[ligands], cell=cell, r_max=cutoff)
        j = j[topology.molecule[centres[i]] != owner[j]]
        series[base].append(len(j) / len(centres))
        for name, member in members.items():
            if member.any():
                series[f"{base}_{name}"].append(member[j].sum() / len(centres))
    method = f"{method}, {cutoff:.2f} Å"
    return {name: _mean_over_frames(values, method) for name, values in series.items()}


def ion_pairing(trajectory: Trajectory, *, cation: str = "Li") -> dict[str, Estimate]:
    """Return the fractions of cations that are free, in contact pairs, or in aggregates; they add up to 1.

    "ion_pairing_separated" no anion in the first shell (solvent-separated and free ions)
    "ion_pairing_contact"   exactly one anion, which touches no other cation
    "ion_pairing_aggregate" all others

    cation: name of the species, whose molecules must be single atoms. An anion touches a cation when one of its N, O
    or halogen atoms lies within the first minimum of the g(r) of that element of that species. An element without
    a first shell does not bind; with none binding, every cation is separated.
    """
    topology = trajectory.topology
    cations = topology.select(species=cation)
    charges, n_molecules = topology.molecule_charges, len(topology.species[cation])
    if len(cations) != n_molecules or not (charges[topology.molecule[cations]] > 0.0).all():
        raise InputError(f"'{cation}' is not a species of single positive ions.")
    anions = [name for name, index in topology.species.items() if charges[index[0]] < 0.0]
    if not anions:
        raise InputError("There are no anions: ion pairing is defined for electrolytes.")
    shells = [shell for name in anions for shell in binding_shells(trajectory, cations, name)]
    series: dict[str, list[float]] = {"separated": [], "contact": [], "aggregate": []}
    for positions, cell in _frames(trajectory):
        contacts = set()
        for atoms, cutoff in shells:
            i, j, _ = pair_distances(positions[cations], positions[atoms], cell=cell, r_max=cutoff)
            contacts |= set(zip(i.tolist(), topology.molecule[atoms[j]].tolist(), strict=True))
        pairs = np.array(sorted(contacts), dtype=np.int64).reshape(-1, 2)
        partners = np.bincount(pairs[:, 0], minlength=len(cations))
        shared = np.bincount(pairs[:, 1], minlength=len(topology.molecule_names))
        lonely = pairs[(partners[pairs[:, 0]] == 1) & (shared[pairs[:, 1]] == 1)]
        free, contact = int((partners == 0).sum()), len(lonely)
        for name, count in zip(series, (free, contact, len(cations) - free - contact), strict=True):
            series[name].append(count / len(cations))
    text = ", ".join(f"{cutoff:.2f} Å" for _, cutoff in shells) or "no binding element"
    method = f"anion contacts within the first minimum of g(r): {text}"
    return {f"ion_pairing_{name}": _mean_over_frames(values, method) for name, values in series.items()}


def binding_shells(trajectory: Trajectory, cations: Indices, species: str) -> list[tuple[Indices, float]]:
    """Atoms and first-shell cutoff of every binding element of an anion species."""
    topology = trajectory.topology
    atoms = topology.select(species=species)
    shells = []
    for number in np.unique(topology.numbers[atoms]):
        if chemical_symbols[number] in LIGANDS:
            chosen = atoms[topology.numbers[atoms] == number]
            cutoff = radial_distribution(trajectory, cations, second=chosen, r_max=8.0).first_minimum()
            if cutoff is not None:
                shells.append((chosen, cutoff))
    return shells


def _frames(trajectory: Trajectory) -> Iterator[tuple[Floats, Floats]]:
    """Positions (n_atoms, 3) and cell of at most ``MOST_FRAMES`` evenly spaced frames."""
    if trajectory.cells is None:
        raise InputError("The trajectory has no cell: distribution functions need a periodic box.")
    stride = max(1, -(-trajectory.n_frames // MOST_FRAMES))
    for frames, block in trajectory.blocks(stride=stride):
        yield from zip(block, trajectory.cells[frames], strict=True)


def _mean_over_frames(values: list[float], method: str) -> Estimate:
    mean = series_mean(values)
    if not mean.is_converged:
        reason = (
            f"not converged: {mean.n_effective:.1f} independent samples, needed are {MIN_EFFECTIVE_SAMPLES:.0f}; "
            f"mean so far {mean.value:.3g}"
        )
        return no_value(reason, unit="", method=method, n_effective=mean.n_effective)
    return Estimate(mean.value, mean.stderr, "", mean.n_effective, method)
