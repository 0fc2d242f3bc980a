"""Charges add up exactly and stay bounded."""

import torch

from bamboo.terms.charges import bound, neutralise, system_sum


def test_each_system_carries_its_total_charge():
    torch.manual_seed(0)
    system_index = torch.tensor([0] * 5 + [1] * 1 + [2] * 40)
    total = torch.tensor([1.0, -2.0, 0.0], dtype=torch.float64)
    raw = 3.0 * torch.randn(46, dtype=torch.float64)
    charges = neutralise(raw, total, system_index)
    sums = torch.stack([charges[system_index == k].sum() for k in range(3)])
    assert torch.allclose(sums, total, rtol=0, atol=1e-13)
    for k in range(3):  # the same shift for every atom of a system
        shift = (charges - raw)[system_index == k]
        assert float(shift.max() - shift.min()) < 1e-14


def test_bound_is_the_identity_for_small_charges_and_never_exceeds_the_limit():
    charge = torch.tensor([-50.0, -1e-3, 0.0, 1e-3, 1.0, 50.0], dtype=torch.float64)
    bounded = bound(charge, 2.0)
    assert float(bounded.abs().max()) <= 2.0
    # tanh(x) = x - x^3 / 3: off by (1e-3)^3 / 12
    assert abs(float(bounded[3]) - 1e-3) < 1e-10
    assert float(bounded[4]) == 2.0 * torch.tanh(torch.tensor(0.5, dtype=torch.float64))
    assert torch.equal(bounded, -bound(-charge, 2.0))


def test_system_sum_keeps_trailing_axes():
    values = torch.arange(12.0).view(4, 3)
    sums = system_sum(values, torch.tensor([0, 0, 2, 2]), 3)
    assert torch.equal(sums, torch.tensor([[3.0, 5.0, 7.0], [0.0, 0.0, 0.0], [15.0, 17.0, 19.0]]))
