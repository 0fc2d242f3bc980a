"""The force field of a run: loading it, describing it, timing it."""

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import psutil
import torch

from bamboo import checkpoint
from bamboo.errors import InputError
from bamboo.evaluator import Evaluator as ForceFieldEvaluator
from bamboo.evaluator import best_device
from bamboo.files import file_sha256
from bamboo.structure.molecules import canonical_smiles, molecule
from bamboo.system import System
from md.composition import molecules_of
from md.config import RunConfig
from md.engine.state import Evaluator, MDState

# bytes per atom of a liquid and of the program itself, measured up to 100 000 atoms (native) and 2000 (reference)
BYTES_PER_ATOM = {"native": 28_000.0, "reference": 270_000.0}
BYTES_AT_REST = 6.0e8


@dataclass(frozen=True)
class Model:
    """A force field ready to run, and what to write down about it."""

    evaluator: Evaluator
    description: str
    record: dict[str, Any]


def load_model(config: RunConfig) -> Model:
    """Load the force field of a configuration; raises ModelFileError and InputError."""
    device: str = config.model.device
    if device == "auto":
        device = best_device()
    elif device == "cuda" and not torch.cuda.is_available():
        raise InputError("model.device is cuda, but PyTorch finds no CUDA device. Use cpu or auto.")
    path = checkpoint.resolve(config.model.name)
    if not config.model.untrained:
        check_molecules(config)
    force_field = checkpoint.load(path, dtype=getattr(torch, config.model.dtype))
    evaluator = ForceFieldEvaluator(force_field, device=device)
    where = f"{device}, {torch.get_num_threads()} threads" if device == "cpu" else device
    description = (
        f"model {config.model.name} ({' '.join(force_field.elements)}; {config.model.dtype}; "
        f"engine {evaluator.engine}; {where})"
    )
    record = {
        "name": config.model.name,
        "file": str(path),
        "sha256": file_sha256(path),
        "engine": evaluator.engine,
        "device": device,
        "dtype": config.model.dtype,
    }
    return Model(evaluator, description, record)


def check_molecules(config: RunConfig) -> None:
    """Raise InputError for molecules that the data of the model did not hold, where its card says which it held."""
    known: dict[str, str] = checkpoint.describe(checkpoint.resolve(config.model.name))["card"].get("molecules", {})
    if not known:
        return
    held = {canonical_smiles(smiles) for smiles in known.values()}
    asked = {name for one in config.each_condition().values() for name in molecules_of(one.what())}
    if unknown := sorted(name for name in asked if canonical_smiles(molecule(name).smiles) not in held):
        raise InputError(
            f"The model {config.model.name} has never seen {', '.join(unknown)}; it knows {', '.join(known)}. Train "
            "a model on data of these molecules (examples/4_train.py). `model: {untrained: true}` runs it all the "
            "same, and nothing vouches for what comes out."
        )


def device_of(evaluator: Evaluator) -> torch.device:
    """Return the device an evaluator wants its batches on."""
    return torch.device(getattr(evaluator, "device", "cpu"))


def memory_needed(evaluator: Evaluator, n_atoms: int) -> float | None:
    """Return about how many bytes a run of so many atoms (all replicas) takes on the CPU; None where unknown."""
    per_atom = BYTES_PER_ATOM.get(getattr(evaluator, "engine", ""))
    on_cpu = device_of(evaluator).type == "cpu"
    return BYTES_AT_REST + per_atom * n_atoms if per_atom is not None and on_cpu else None


def check_memory(evaluator: Evaluator, n_atoms: int) -> None:
    """Raise InputError where a run would not fit in memory, before the system kills it."""
    needed, available = memory_needed(evaluator, n_atoms), float(psutil.virtual_memory().available)
    if needed is not None and needed > available:
        raise InputError(
            f"{n_atoms} atoms need about {needed / 1e9:.1f} GB of memory, {available / 1e9:.1f} GB are free. "
            "Lower build.atoms or build.replicas, or use a machine with more."
        )


def seconds_per_step(evaluator: Evaluator, system: System, *, repeats: int = 3) -> float:
    """Return the wall time of one evaluation [s], the smallest of a few."""
    state = MDState.from_systems([system], temperature_K=300.0, seed=0, device=device_of(evaluator))
    times = []
    for _ in range(repeats + 1):  # the first one builds neighbour lists and warms up
        begun = time.monotonic()
        state.evaluate(evaluator)
        if state.device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.monotonic() - begun)
    return float(np.min(times[1:]))
