"""Who does the work of an evaluation: the engines, one interface, and the choice among them."""

import importlib.metadata
import importlib.util
import logging
from functools import cache
from typing import Protocol

import torch

from bamboo.errors import InputError
from bamboo.forcefield import ForceField, ForceFieldOutput
from bamboo.kernels.native import EngineUnavailableError, NativeEngine, library
from bamboo.neighbors import Neighbors, find_neighbors, trim
from bamboo.nn.radial import safe_norm
from bamboo.system import Batch

ENGINES = ("auto", "reference", "native", "triton")


class Engine(Protocol):
    """Evaluates one force field; keeps its own neighbour lists, and is told when to build them."""

    name: str

    @property
    def layout(self) -> int | None:
        """A number for where lists and buffers lie, for captured graphs; None where an evaluation needs the host."""

    def rebuild(self, batch: Batch, skin: float) -> None:
        """Build the lists; they must hold while no atom moves more than half the skin [Å]."""

    def evaluate(self, batch: Batch) -> tuple[ForceFieldOutput, torch.Tensor]:
        """Return the output and the closest pair within the network's cutoff.

        The pair is (distance [Å], i, j), float64 on the device; j = -1 where there is none.
        """

    def reset(self) -> None:
        """Forget everything that depends on the past."""


class ReferenceEngine:
    """Plain torch on any device: ``ForceField.forward`` and autograd."""

    name = "reference"
    layout = None

    def __init__(self, force_field: ForceField) -> None:
        self.force_field = force_field
        self.cutoffs = (force_field.config.network.cutoff, force_field.config.dispersion.cutoff)
        self._neighbors: Neighbors | None = None

    def reset(self) -> None:
        self._neighbors = None

    def rebuild(self, batch: Batch, skin: float) -> None:
        self._neighbors = find_neighbors(batch, *self.cutoffs, skin=skin)

    def evaluate(self, batch: Batch) -> tuple[ForceFieldOutput, torch.Tensor]:
        if self._neighbors is None:
            raise RuntimeError("rebuild comes before evaluate")
        neighbors = trim(self._neighbors, batch, *self.cutoffs)
        closest = batch.positions.new_tensor([torch.inf, -1.0, -1.0])
        if neighbors.edges.index.shape[1]:
            vectors = neighbors.edges.vectors(batch.positions, batch.cell, system_index=batch.system_index)
            distance = safe_norm(vectors)
            edge = distance.argmin(keepdim=True)
            closest = torch.cat([distance[edge].double(), neighbors.edges.index[:, edge].flatten().double()]).detach()
        output: ForceFieldOutput = self.force_field(batch, neighbors)
        return output, closest


@cache
def _warn_once(line: str) -> None:
    logging.getLogger("bamboo").warning(line)


def native_status() -> str:
    """Return "" where the native library is at hand, else one line that says why not."""
    try:
        library()
    except EngineUnavailableError as error:
        return str(error)
    return ""


def triton_status(device: torch.device | str = "cuda") -> str:
    """Return "" where the Triton engine works on the device, else one line that says why not."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: pip install bamboo-md[gpu]"
    from bamboo.kernels.triton_network import INTERPRETED

    if torch.device(device).type != "cuda":
        if not INTERPRETED:
            return "it needs a CUDA device"
        major, minor = importlib.metadata.version("triton").split(".")[:2]
        return "" if (int(major), int(minor)) >= (3, 7) else "the interpreter of Triton before 3.7 fails with NumPy"
    if not torch.cuda.is_available():
        return "PyTorch finds no CUDA device"
    return "TRITON_INTERPRET is set, and the interpreter works on the CPU" if INTERPRETED else ""


def _triton(force_field: ForceField, device: torch.device) -> Engine:
    if reason := triton_status(device):
        raise EngineUnavailableError(reason)
    from bamboo.kernels.triton_engine import TritonEngine

    return TritonEngine(force_field)


def _native(force_field: ForceField, device: torch.device) -> Engine:
    if device.type != "cpu":
        raise EngineUnavailableError(f"it works on the CPU only, but the device is {device}")
    return NativeEngine(force_field)


def choose(force_field: ForceField, name: str = "auto", *, device: torch.device) -> Engine:
    """Return the engine of that name; "auto" takes the fastest at hand and says in one line what is lost if it is slow.

    Raises InputError for an unknown name, or one that cannot work here.
    """
    if name not in ENGINES:
        raise InputError(f"engine is '{name}', expected one of {', '.join(ENGINES)}.")
    if name == "reference":
        return ReferenceEngine(force_field)
    fastest = "native" if device.type == "cpu" else "triton"
    try:
        return {"native": _native, "triton": _triton}[fastest if name == "auto" else name](force_field, device)
    except EngineUnavailableError as error:
        if name != "auto":
            raise InputError(f"engine '{name}' cannot be used: {error}.") from error
        _warn_once(f"{fastest.capitalize()} engine not used: {error}. The reference engine is about ten times slower.")
        return ReferenceEngine(force_field)
