"""The native engine: the whole force field in C++ (``source/``), for CPUs.

One hand-derived backward pass gives forces, virial and the exact response of the charges; it equals autograd of the
reference to rounding. Radial features and the real-space Coulomb function are tabulated from the reference's own code.
"""

import ctypes
import weakref
from collections.abc import Callable
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bamboo import units
from bamboo.elements import COVALENT_RADII
from bamboo.errors import BambooError
from bamboo.forcefield import ForceField, ForceFieldOutput
from bamboo.kernels.mesh import MeshPlan
from bamboo.neighbors import check_density
from bamboo.nn.radial import cosine_envelope
from bamboo.system import Batch
from bamboo.terms import electrostatics, repulsion
from bamboo.terms.dispersion import ROWS, Dispersion

TERMS = ("network", "electrostatic", "electronegativity", "dispersion", "repulsion")
# intervals and degree of the polynomial tables: error below 1e-7 (float32) and 1e-12 (float64) of the largest value
FEATURE_TABLE = {torch.float32: (256, 4), torch.float64: (256, 9)}
COULOMB_TABLE = (1024, 5)
INTERFACE = 1  # of the library, source/native.cpp


class EngineUnavailableError(BambooError):
    """The engine cannot work here or for this model; the message is one line for the user."""


@cache
def library() -> ctypes.CDLL:
    """Return the loaded library; raises EngineUnavailableError with the reason."""
    folder = Path(__file__).parent
    found = [path for suffix in EXTENSION_SUFFIXES if (path := folder / f"_native{suffix}").exists()]
    if not found:
        raise EngineUnavailableError("it was not built: no C++ compiler was found when bamboo-md was installed")
    try:
        loaded = ctypes.CDLL(str(found[0]))
    except OSError as error:
        raise EngineUnavailableError(f"the library does not load: {error}") from error
    if not hasattr(loaded, "bamboo_interface") or loaded.bamboo_interface() != INTERFACE:
        raise EngineUnavailableError("it was built from other sources; reinstall bamboo-md")
    loaded.bamboo_missing_instructions.restype = ctypes.c_char_p
    missing = loaded.bamboo_missing_instructions().decode()
    if missing:
        raise EngineUnavailableError(
            f"it was built for a processor with {missing}; reinstall bamboo-md on this machine"
        )
    loaded.bamboo_message.restype = ctypes.c_char_p
    pointer, whole, number = ctypes.c_void_p, ctypes.c_int, ctypes.c_double
    signatures: dict[str, tuple[Any, list[Any]]] = {
        "model_new": (pointer, [whole]),
        "model_delete": (None, [pointer]),
        "model_set": (whole, [pointer, ctypes.c_char_p, pointer, ctypes.c_int64]),
        "model_prepare": (whole, [pointer]),
        "system_new": (pointer, [pointer]),
        "system_delete": (None, [pointer]),
        "system_build": (whole, [pointer, ctypes.c_int64, pointer, pointer, pointer, whole, number, whole]),
        "system_forward": (whole, [pointer, pointer, pointer, number, pointer, whole]),
        "system_spread": (whole, [pointer, pointer, pointer, whole]),
        "system_convolve": (whole, [pointer, *[pointer] * 4, whole]),
        "system_backward": (whole, [pointer, pointer, whole, *[pointer] * 5, whole]),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(loaded, f"bamboo_{name}")
        function.restype, function.argtypes = result, arguments
    return loaded


def _threads(n_atoms: int) -> int:
    """Return how many threads to use: torch's number, fewer for a small system, which does not repay waking them."""
    return max(1, min(torch.get_num_threads(), n_atoms // 48))


def _check(status: int) -> None:
    if status:
        raise EngineUnavailableError(library().bamboo_message().decode())


def piecewise_polynomial(
    function: Callable[[torch.Tensor], torch.Tensor], length: float, *, intervals: int, degree: int
) -> NDArray[np.float64]:
    """Return polynomials that interpolate a function of r at Chebyshev nodes on equal intervals of [0, length].

    function maps r (n,) to (n, channels) in float64; returns (intervals, degree + 1, channels), coefficients of
    t = r / width - interval in [0, 1], highest power first.
    """
    nodes = 0.5 - 0.5 * np.cos(np.pi * (np.arange(degree + 1) + 0.5) / (degree + 1))
    r = (np.arange(intervals)[:, None] + nodes) * (length / intervals)
    values = function(torch.from_numpy(r.ravel())).numpy().reshape(intervals, degree + 1, -1)
    solved: NDArray[np.float64] = np.linalg.solve(np.vander(nodes)[None], values)
    return solved


def tables(force_field: ForceField) -> dict[str, Any]:
    """Return the numbers an engine needs besides the tensors of the model file, by name."""
    config, network = force_field.config, force_field.network
    cutoff = config.network.cutoff
    weight, betas = network.edge.weight.detach().double().cpu(), network.radial.betas.detach().double().cpu()
    means = network.radial.means.detach().double().cpu()

    def feature(r: torch.Tensor) -> torch.Tensor:
        decayed = torch.exp(-network.radial.decay * r)[:, None]
        basis = cosine_envelope(r, cutoff)[:, None] * torch.exp(-betas * (decayed - means).square())
        return torch.nn.functional.silu(basis @ weight.T)

    def real_space(r: torch.Tensor) -> torch.Tensor:
        return electrostatics.real_space_energy(torch.ones_like(r), r, cutoff)[:, None]

    intervals, degree = FEATURE_TABLE[force_field.dtype]
    all_numbers = torch.arange(ROWS, device=force_field.known.device)
    with torch.no_grad():
        chi, hardness = force_field._electronegativity(force_field.embedding(all_numbers), all_numbers)
    shape = config.dispersion
    return {
        "channels": config.network.channels,
        "heads": config.network.heads,
        "layers": config.network.layers,
        "differential": config.network.attention == "gedt",
        "cutoff": cutoff,
        "feature_table": piecewise_polynomial(feature, cutoff, intervals=intervals, degree=degree),
        "charge_limit": config.charge_limit,
        "chi_square": chi.square().cpu(),
        "hardness": hardness.cpu(),
        "reference_charge": force_field.reference_charge.cpu(),
        "coulomb.real_space": piecewise_polynomial(
            real_space, cutoff, intervals=COULOMB_TABLE[0], degree=COULOMB_TABLE[1]
        ),
        "coulomb.alpha": electrostatics.splitting(cutoff),
        "coulomb.strength": units.COULOMB_CONSTANT,
        "coulomb.contact": electrostatics.CONTACT_LENGTH,
        "coulomb.sharpness": electrostatics.CONTACT_SHARPNESS,
        "dispersion.s6": shape.s6,
        "dispersion.a1": shape.a1,
        "dispersion.a2": shape.a2,
        "dispersion.steepness": shape.steepness,
        "dispersion.damping_length": shape.damping_length,
        "dispersion.cutoff": shape.cutoff,
        "dispersion.smooth": shape.smooth,
        "dispersion.switch_start": Dispersion.SWITCH_START,
        "dispersion.c6": force_field.dispersion.c6.cpu(),
        "dispersion.radius": force_field.dispersion.radius.cpu(),
        "repulsion": config.repulsion,
        "repulsion.covalent_radius": COVALENT_RADII[:ROWS],
        "repulsion.screening_weight": [weight for weight, _ in repulsion.SCREENING],
        "repulsion.screening_decay": [decay for _, decay in repulsion.SCREENING],
        "repulsion.screening_length": repulsion.SCREENING_LENGTH,
        "repulsion.inner": repulsion.INNER,
        "repulsion.outer": repulsion.OUTER,
    }


def fingerprint(force_field: ForceField) -> list[tuple[int, int]]:
    """Return what changes when a tensor of the model is changed in place or replaced."""
    tensors = (*force_field.parameters(), *force_field.buffers())
    return [(tensor.data_ptr(), tensor._version) for tensor in tensors]


class _Model:
    """A force field packed for the library."""

    def __init__(self, force_field: ForceField) -> None:
        native = library()
        self.handle = native.bamboo_model_new(int(force_field.dtype == torch.float64))
        weakref.finalize(self, native.bamboo_model_delete, self.handle)
        tensors = {name: tensor.detach().cpu() for name, tensor in force_field.state_dict().items()}
        for name, values in {**tensors, **tables(force_field)}.items():
            array = np.ascontiguousarray(values, dtype=np.float64)
            _check(native.bamboo_model_set(self.handle, name.encode(), array.ctypes.data, array.size))
        _check(native.bamboo_model_prepare(self.handle))


class _System:
    """Lists and buffers of one system of the batch."""

    def __init__(self, model: _Model) -> None:
        native = library()
        self.model = model  # keeps the handle alive
        self.handle = native.bamboo_system_new(model.handle)
        weakref.finalize(self, native.bamboo_system_delete, self.handle)
        self.mesh = MeshPlan()
        self.tail = 0.0  # eV Å^3: dispersion beyond the cutoff, times the volume
        self.reference = 0.0  # eV


class NativeEngine:
    """Evaluate a force field with the compiled library.

    Raises EngineUnavailableError where the library is missing or knows no kernel for the size of the network.
    """

    name = "native"
    layout = None

    def __init__(self, force_field: ForceField) -> None:
        self.force_field = force_field
        self._skin = 0.0
        self._pack()

    def _pack(self) -> None:
        self._packed = fingerprint(self.force_field)
        self._model = _Model(self.force_field)
        self._systems: list[_System] = []

    def reset(self) -> None:
        """Forget lists and meshes."""
        self._systems = []

    def rebuild(self, batch: Batch, skin: float) -> None:
        """Build the neighbour lists of every system; they hold while no atom moves more than half the skin [Å]."""
        if self._packed != fingerprint(self.force_field):
            self._pack()
        if len(self._systems) != batch.n_systems:
            self._systems = [_System(self._model) for _ in range(batch.n_systems)]
        self._skin = skin
        reach = max(self.force_field.config.network.cutoff, self.force_field.config.dispersion.cutoff) + skin
        for system, part in zip(self._systems, _split(batch), strict=True):
            system.tail = system.reference = 0.0
            numbers = torch.from_numpy(part.numbers)
            if part.pbc:
                check_density(len(part.numbers), part.cell, reach)
                one = torch.ones((), dtype=torch.float64)
                system.tail = float(self.force_field.dispersion.tail_energy(numbers, one))
            system.reference = float(self.force_field.reference_energy[numbers].sum())
            as_int32 = part.numbers.astype(np.int32)
            _check(
                library().bamboo_system_build(
                    system.handle, len(as_int32), as_int32.ctypes.data, part.positions.ctypes.data,
                    part.cell.ctypes.data, int(part.pbc), skin, _threads(len(as_int32)),
                )
            )  # fmt: skip

    def evaluate(self, batch: Batch) -> tuple[ForceFieldOutput, torch.Tensor]:
        """Return the output and the closest pair. Parameters that were changed (training) are packed anew."""
        if self._packed != fingerprint(self.force_field):
            self.rebuild(batch, self._skin)
        n_atoms, n_systems = batch.n_atoms, batch.n_systems
        forces, charges = np.empty((n_atoms, 3)), np.empty(n_atoms)
        virial, dipole = np.zeros((n_systems, 3, 3)), np.zeros((n_systems, 3))
        totals, tail, reference = np.zeros((n_systems, 6)), np.zeros(n_systems), np.zeros(n_systems)
        closest = np.array([np.inf, -1.0, -1.0])
        start = 0
        for index, (system, part) in enumerate(zip(self._systems, _split(batch), strict=True)):
            end = start + len(part.numbers)
            nearest = self._evaluate_one(
                system, part, totals[index], charges[start:end], forces[start:end], virial[index], dipole[index]
            )
            if 0.0 <= nearest[0] < closest[0]:  # negative where there is no pair
                closest = nearest + np.array([0.0, start, start])
            if part.pbc:
                tail[index] = system.tail / abs(np.linalg.det(part.cell))
                virial[index] += tail[index] * np.eye(3)
            reference[index] = system.reference
            start = end
        terms = {name: torch.from_numpy(totals[:, column].copy()) for column, name in enumerate(TERMS)}
        terms["dispersion"] += torch.from_numpy(tail)
        if not self.force_field.config.repulsion:
            del terms["repulsion"]
        terms["reference"] = torch.from_numpy(reference)
        energy = torch.stack(list(terms.values())).sum(0)
        output = ForceFieldOutput(
            energy=energy,
            forces=torch.from_numpy(forces),
            virial=torch.from_numpy(virial),
            charges=torch.from_numpy(charges),
            dipole=torch.from_numpy(dipole),
            raw_charge=torch.from_numpy(totals[:, 5].copy()),
            terms=terms,
        )
        return output, torch.from_numpy(closest)

    def _evaluate_one(
        self,
        system: _System,
        part: "_Part",
        totals: NDArray[np.float64],
        charges: NDArray[np.float64],
        forces: NDArray[np.float64],
        virial: NDArray[np.float64],
        dipole: NDArray[np.float64],
    ) -> NDArray[np.float64]:
        native, threads = library(), _threads(len(part.numbers))
        nearest = np.empty(3)
        _check(
            native.bamboo_system_forward(
                system.handle, part.positions.ctypes.data, part.cell.ctypes.data, part.total_charge,
                nearest.ctypes.data, threads,
            )
        )  # fmt: skip
        potential = None
        if part.pbc:
            mesh = system.mesh
            mesh.fit(part.cell)
            _check(native.bamboo_system_spread(system.handle, mesh.size.ctypes.data, mesh.nodes.data_ptr(), threads))
            spectrum = torch.fft.rfftn(mesh.nodes)
            influence = [factor.ctypes.data for factor in mesh.influence]
            _check(native.bamboo_system_convolve(system.handle, spectrum.data_ptr(), *influence, threads))
            potential = torch.fft.irfftn(spectrum, s=mesh.nodes.shape, norm="forward")
        full = self.force_field.config.charge_response == "full"
        _check(
            native.bamboo_system_backward(
                system.handle, None if potential is None else potential.data_ptr(), int(full), totals.ctypes.data,
                charges.ctypes.data, forces.ctypes.data, virial.ctypes.data, dipole.ctypes.data, threads,
            )
        )  # fmt: skip
        return nearest


class _Part:
    """One system of a batch as contiguous numpy arrays."""

    def __init__(self, numbers: Any, positions: Any, cell: Any, pbc: bool, total_charge: float) -> None:
        self.numbers: NDArray[np.int64] = np.ascontiguousarray(numbers)
        self.positions: NDArray[np.float64] = np.ascontiguousarray(positions)
        self.cell: NDArray[np.float64] = np.ascontiguousarray(cell)
        self.pbc, self.total_charge = pbc, total_charge


def _split(batch: Batch) -> list[_Part]:
    numbers, positions, cells = batch.numbers.numpy(), batch.positions.detach().numpy(), batch.cell.detach().numpy()
    bounds = np.searchsorted(batch.system_index.numpy(), np.arange(batch.n_systems + 1))
    return [
        _Part(numbers[start:end], positions[start:end], cell, periodic, charge)
        for start, end, cell, periodic, charge in zip(
            bounds[:-1], bounds[1:], cells, batch.pbc.tolist(), batch.total_charge.tolist(), strict=True
        )
    ]
