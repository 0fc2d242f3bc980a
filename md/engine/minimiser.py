"""Relaxation of a packed box before dynamics."""

from dataclasses import dataclass, replace

import torch

from bamboo.errors import InputError
from md.engine.state import Evaluator, MDState

# the published constants of FIRE; the time unit is that of unit masses, in which 0.1 is a careful first step
FIRST_STEP, LARGEST_STEP = 0.1, 1.0
PATIENCE, GROWTH, CUT = 5, 1.1, 0.5
MIXING, MIXING_DECAY = 0.1, 0.99
# eV/Å; the largest of a few hundred atoms of a liquid at room temperature is no smaller. Further downhill, ions that no
# solvent screens yet crowd around each other: two Li+ drew one F out of PF6-
LIQUID_FORCE = 2.0


@dataclass(frozen=True)
class Relaxation:
    """What ``minimise`` reached: per replica the largest force on an atom, eV/Å, and the energy, eV, both (R,)."""

    n_steps: int
    max_force: torch.Tensor
    energy: torch.Tensor
    converged: bool


def minimise(
    state: MDState,
    evaluator: Evaluator,
    *,
    max_steps: int = 200,
    force_tolerance: float = LIQUID_FORCE,
    max_displacement: float = 0.1,
) -> Relaxation:
    """Move atoms downhill in fixed cells with FIRE until no force exceeds the tolerance, or max_steps are done.

    Bitzek et al., Phys. Rev. Lett. 97, 170201 (2006), each replica with its own step and mixing. No atom moves farther
    than max_displacement [Å] in a step, so that overlaps of a packed box part gently. force_tolerance in eV/Å.
    Positions, energies and forces of the state change; momenta stay.
    """
    if not (max_steps > 0 and force_tolerance > 0.0 and max_displacement > 0.0):
        raise InputError("minimise: max_steps, force_tolerance and max_displacement must be positive.")
    state.evaluate(evaluator)
    velocity = torch.zeros_like(state.momenta)
    step = torch.full_like(state.energy, FIRST_STEP)
    mixing = torch.full_like(state.energy, MIXING)
    downhill = torch.zeros_like(state.energy)  # steps since the last uphill one
    for n_steps in range(max_steps):
        largest = largest_norm(state, state.forces)
        if bool((largest < force_tolerance).all()):
            return Relaxation(n_steps, largest, state.energy, converged=True)
        falls = state.sum_by_replica((state.forces * velocity).sum(dim=1)) > 0.0
        downhill = torch.where(falls, downhill + 1.0, 0.0)
        grows = downhill > PATIENCE
        step = torch.where(falls, torch.where(grows, (step * GROWTH).clamp(max=LARGEST_STEP), step), step * CUT)
        speed = norm(state, velocity) / norm(state, state.forces).clamp(min=1.0e-300)
        keep, add = torch.where(falls, 1.0 - mixing, 0.0), torch.where(falls, mixing * speed, 0.0)
        velocity = state.per_atom(keep)[:, None] * velocity + state.per_atom(add)[:, None] * state.forces
        mixing = torch.where(falls, torch.where(grows, mixing * MIXING_DECAY, mixing), MIXING)
        velocity = velocity + state.per_atom(step)[:, None] * state.forces
        move = state.per_atom(step)[:, None] * velocity
        shrink = (max_displacement / largest_norm(state, move).clamp(min=1.0e-300)).clamp(max=1.0)
        positions = state.batch.positions + state.per_atom(shrink)[:, None] * move
        state.batch = replace(state.batch, positions=positions)
        state.evaluate(evaluator)
    largest = largest_norm(state, state.forces)
    return Relaxation(max_steps, largest, state.energy, converged=bool((largest < force_tolerance).all()))


def norm(state: MDState, vectors: torch.Tensor) -> torch.Tensor:
    """Euclidean norm of all components of each replica: (n_atoms, 3) -> (R,)."""
    return state.sum_by_replica((vectors**2).sum(dim=1)).sqrt()


def largest_norm(state: MDState, vectors: torch.Tensor) -> torch.Tensor:
    """Largest norm among the vectors of each replica: (n_atoms, 3) -> (R,)."""
    zeros = torch.zeros_like(state.energy)
    return zeros.scatter_reduce(0, state.batch.system_index, vectors.norm(dim=1), reduce="amax")
