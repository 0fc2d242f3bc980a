"""Atomic charges: bounded, and adding up to the total charge of each system."""

import torch


def bound(charge: torch.Tensor, limit: float) -> torch.Tensor:
    """Return q_ub tanh(q / q_ub): charges stay within +-limit [e] however far the network extrapolates."""
    return limit * torch.tanh(charge / limit)


def system_sum(values: torch.Tensor, system_index: torch.Tensor, n_systems: int) -> torch.Tensor:
    """Return the sum of per-atom values over each system, (n_atoms, …) -> (n_systems, …)."""
    return values.new_zeros(n_systems, *values.shape[1:]).index_add(0, system_index, values)


def neutralise(raw: torch.Tensor, total_charge: torch.Tensor, system_index: torch.Tensor) -> torch.Tensor:
    """Return q_i = q~_i + (Q - sum q~) / N, so that each system carries exactly its total charge.

    The even shift is unphysical for ions far apart when it is large; training keeps it small (raw-charge loss term).
    """
    missing = total_charge - system_sum(raw, system_index, len(total_charge))
    size = torch.bincount(system_index, minlength=len(total_charge))
    return raw + (missing / size)[system_index]
