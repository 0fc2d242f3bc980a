"""Who does the work of an evaluation: the engines, one interface, and the choice among them."""

import logging
from functools import cache
from typing import Protocol

import torch

from bamboo.errors import InputError
from bamboo.forcefield import ForceField, ForceFieldOutput
from bamboo.kernels.native import ClosestPair, EngineUnavailableError, NativeEngine, library
from bamboo.neighbors import Neighbors, find_neighbors, trim
from bamboo.nn.radial import safe_norm
from bamboo.system import Batch

ENGINES = ("auto", "reference", "native")


class Engine(Protocol):
    """Evaluates one force field; keeps its own neighbour lists, and is told when to build them."""

    name: str

    def rebuild(self, batch: Batch, skin: float) -> None:
        """Build the lists; they must hold while no atom moves more than half the skin [Å]."""

    def evaluate(self, batch: Batch) -> tuple[ForceFieldOutput, ClosestPair]:
        """Return the output and the closest pair within the network's cutoff."""

    def reset(self) -> None:
        """Forget everything that depends on the past."""


class ReferenceEngine:
    """Plain torch on any device: ``ForceField.forward`` and autograd."""

    name = "reference"

    def __init__(self, force_field: ForceField) -> None:
        self.force_field = force_field
        self.cutoffs = (force_field.config.network.cutoff, force_field.config.dispersion.cutoff)
        self._neighbors: Neighbors | None = None

    def reset(self) -> None:
        self._neighbors = None

    def rebuild(self, batch: Batch, skin: float) -> None:
        self._neighbors = find_neighbors(batch, *self.cutoffs, skin=skin)

    def evaluate(self, batch: Batch) -> tuple[ForceFieldOutput, ClosestPair]:
        if self._neighbors is None:
            raise RuntimeError("rebuild comes before evaluate")
        neighbors = trim(self._neighbors, batch, *self.cutoffs)
        closest = ClosestPair()
        if neighbors.edges.index.shape[1]:
            vectors = neighbors.edges.vectors(batch.positions, batch.cell, system_index=batch.system_index)
            distance = safe_norm(vectors)
            edge = int(distance.argmin())
            closest = ClosestPair(float(distance[edge]), *neighbors.edges.index[:, edge].tolist())
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


def choose(force_field: ForceField, name: str = "auto", *, device: torch.device) -> Engine:
    """Return the engine of that name; "auto" takes the fastest at hand and says in one line what is lost if it is slow.

    Raises InputError for an unknown name, or one that cannot work here.
    """
    if name not in ENGINES:
        raise InputError(f"engine is '{name}', expected one of {', '.join(ENGINES)}.")
    if name == "reference" or (name == "auto" and device.type != "cpu"):
        return ReferenceEngine(force_field)
    if device.type != "cpu":
        raise InputError(f"engine 'native' works on the CPU only, but the device is {device}.")
    try:
        return NativeEngine(force_field)
    except EngineUnavailableError as error:
        if name == "native":
            raise InputError(f"engine 'native' cannot be used: {error}.") from error
        _warn_once(f"Native engine not used: {error}. The reference engine is about ten times slower.")
        return ReferenceEngine(force_field)
