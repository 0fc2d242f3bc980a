"""Coulomb energies of pairs by the native library against plain torch, and their derivatives."""

import pytest
import torch

from bamboo.nn import fused
from bamboo.terms import electrostatics

native = pytest.mark.skipif(not fused.available(), reason="no native library: built without a C++ compiler")


def pairs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return charges, pair vectors from contact to beyond the cutoff, ends and systems; one atom has no pair."""
    generator = torch.Generator().manual_seed(1)
    system_index = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2])
    ends = torch.tensor([[0, 0, 1, 3, 5, 5, 6, 5], [1, 2, 2, 4, 6, 5, 5, 6]])  # images of a pair and of an atom itself
    direction = torch.nn.functional.normalize(torch.randn(8, 3, generator=generator).double(), dim=1)
    length = torch.tensor([0.3, 1.9, 2.3, 3.0, 4.4, 4.7, 5.3, 9.0]).double()
    return torch.randn(8, generator=generator).double(), direction * length[:, None], ends, system_index


def derivatives(cutoff: float | None) -> list[torch.Tensor]:
    """Return the energies, the gradient of a scalar of them, and the gradient of a scalar of that."""
    charges, vectors, ends, system_index = pairs()
    inputs = [charges.requires_grad_(), vectors.requires_grad_()]
    weight = torch.tensor([0.5, 0.0, 1.0]).double()
    energy = electrostatics.pair_sum(*inputs, ends, system_index=system_index, weight=weight, cutoff=cutoff)
    first = torch.autograd.grad(energy.square().sum(), inputs, create_graph=True)
    return [energy, *first, *torch.autograd.grad(sum(tensor.sin().sum() for tensor in first), inputs)]


@native
@pytest.mark.parametrize("cutoff", [None, 5.0])
def test_native_pair_sums_equal_the_plain_ones(cutoff):
    got = derivatives(cutoff)
    with fused.plain():
        expected = derivatives(cutoff)
    for ours, theirs in zip(got, expected, strict=True):
        assert float((ours - theirs).detach().abs().max()) < 1e-12 * float(theirs.detach().abs().max())
    assert float(expected[0].detach()[1]) == 0.0  # weight 0


@native
@pytest.mark.parametrize("cutoff", [None, 5.0])
def test_derivatives_are_those_of_the_energy(cutoff):
    charges, vectors, ends, system_index = pairs()
    weight = torch.tensor([0.5, 0.0, 1.0]).double()

    def energy(q: torch.Tensor, d: torch.Tensor) -> torch.Tensor:
        return electrostatics.pair_sum(q, d, ends, system_index=system_index, weight=weight, cutoff=cutoff)

    inputs = (charges.requires_grad_(), vectors.requires_grad_())
    assert torch.autograd.gradcheck(energy, inputs)
    assert torch.autograd.gradgradcheck(energy, inputs)


@native
def test_atoms_on_top_of_each_other_feel_no_force():
    charges, vectors = torch.tensor([1.0, -1.0]).double(), torch.zeros(1, 3).double().requires_grad_()
    energy = electrostatics.pair_sum(
        charges,
        vectors,
        torch.tensor([[0], [1]]),
        system_index=torch.zeros(2).long(),
        weight=torch.ones(1).double(),
        cutoff=None,
    )
    assert torch.isfinite(energy).all()
    assert torch.equal(torch.autograd.grad(energy.sum(), vectors)[0], torch.zeros(1, 3).double())
