"""The native messages and edge features against the plain ones: values, first and second derivatives."""

import pytest
import torch

from bamboo.nn import fused
from bamboo.nn.get import Edges, GraphEquivariantTransformer, NetworkConfig, messages

native = pytest.mark.skipif(not fused.available(), reason="no native library: built without a C++ compiler")
SIZES = [(64, 16), (8, 2), (12, 4), (6, 1)]  # channels, heads; the first is compiled for its size


def random_edges(n_atoms: int, n_edges: int, *, seed: int) -> torch.Tensor:
    """Return edges sorted by receiver: several images of one pair, an atom with itself, atoms 1 and 3 alone."""
    generator = torch.Generator().manual_seed(seed)
    index = torch.randint(n_atoms, (2, n_edges), generator=generator)
    index[(index == 1) | (index == 3)] = 0
    return index[:, torch.argsort(index[0], stable=True)]


def inputs(n_atoms: int, n_edges: int, channels: int, *, seed: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Return qkv, e, f, u that require gradients."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(n_atoms, 3 * channels), (n_edges, channels), (n_edges,), (n_edges, 3)]
    return [(0.5 * torch.randn(shape, generator=generator, dtype=dtype)).requires_grad_() for shape in shapes]


def evaluate(tensors: list[torch.Tensor], edge_index: torch.Tensor, heads: int, *, native: bool) -> list[torch.Tensor]:
    """Return m, M, the gradient of a scalar of them, and the gradient of a scalar of that gradient."""
    qkv, e, f, u = tensors
    graph = None
    if native:
        graph = fused.graph_of(edge_index, len(qkv), channels=e.shape[1], heads=heads, differential=False)
        assert graph is not None
    edges = Edges(edge_index[0], edge_index[1], e, f, u, graph)
    m, M = messages(qkv, edges, heads=heads, differential=False)
    first = torch.autograd.grad((m.cos() * 2.0).sum() + M.sin().sum(), tensors, create_graph=True)
    second = torch.autograd.grad(sum(tensor.sin().sum() for tensor in first), tensors)
    return [m, M, *first, *second]


def largest_deviation(got: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """Return the largest difference relative to the largest entry of each tensor."""
    return max(
        float((a - b).detach().abs().max() / b.detach().abs().max().clamp(min=1e-30)) if a.numel() else 0.0
        for a, b in zip(got, expected, strict=True)
    )


@native
@pytest.mark.parametrize(("channels", "heads"), SIZES)
@pytest.mark.parametrize(("n_atoms", "n_edges"), [(9, 60), (4, 0), (1, 3), (40, 700)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-4)])
def test_native_messages_equal_the_plain_ones(channels, heads, n_atoms, n_edges, dtype, tolerance):
    edge_index = random_edges(n_atoms, n_edges, seed=1) if n_atoms > 1 else torch.zeros(2, n_edges, dtype=torch.int64)
    tensors = inputs(n_atoms, n_edges, channels, seed=2, dtype=dtype)
    got = evaluate(tensors, edge_index, heads, native=True)
    assert largest_deviation(got, evaluate(tensors, edge_index, heads, native=False)) < tolerance


@native
def test_native_messages_pass_gradcheck_and_gradgradcheck():
    edge_index = random_edges(4, 6, seed=3)
    tensors = inputs(4, 6, 4, seed=4, dtype=torch.float64)
    graph = fused.graph_of(edge_index, 4, channels=4, heads=2, differential=False)
    assert graph is not None
    assert torch.autograd.gradcheck(lambda *x: fused.messages(*x, graph), tensors)
    assert torch.autograd.gradgradcheck(lambda *x: fused.messages(*x, graph), tensors)


@native
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_native_messages_are_the_same_bits_every_time_and_right_on_any_number_of_threads(threads):
    edge_index = random_edges(40, 4000, seed=5)  # enough for four threads
    tensors = inputs(40, 4000, 8, seed=6, dtype=torch.float64)
    reference = evaluate(tensors, edge_index, 2, native=False)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        runs = [evaluate(tensors, edge_index, 2, native=True) for _ in range(3)]
    finally:
        torch.set_num_threads(before)
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))
    assert largest_deviation(runs[0], reference) < 1e-12


@native
def test_large_logits_do_not_overflow():
    edge_index = random_edges(9, 60, seed=7)
    tensors = inputs(9, 60, 64, seed=8, dtype=torch.float32)
    tensors[0] = (tensors[0].detach() * 100.0).requires_grad_()  # logits of +-1e4: exp(1e4) is infinite
    got = evaluate(tensors, edge_index, 16, native=True)
    assert all(torch.isfinite(tensor).all() for tensor in got)


def network_derivatives(attention: str = "get") -> list[torch.Tensor]:
    """Return a network's output, its gradient in the edge vectors, and the gradient of a loss on both in everything."""
    torch.manual_seed(9)
    network = GraphEquivariantTransformer(NetworkConfig(channels=16, heads=4, n_radial=8, attention=attention)).double()
    edge_index = random_edges(7, 40, seed=10)
    edge_vec = (torch.randn(40, 3, dtype=torch.float64) * 2.0).requires_grad_()  # some beyond the cutoff
    h = network(torch.randn(7, 16, dtype=torch.float64), edge_vec, edge_index)
    (gradient,) = torch.autograd.grad(h.square().sum(), edge_vec, create_graph=True)
    loss = h.sin().sum() + gradient.square().sum()
    return [h, gradient, *torch.autograd.grad(loss, [edge_vec, *network.parameters()])]


@native
@pytest.mark.parametrize("attention", ["get", "gedt"])
def test_training_gradients_of_a_network_do_not_depend_on_the_library(attention):
    got = network_derivatives(attention)
    with fused.plain():
        assert fused.graph_of(torch.zeros(2, 1).long(), 1, channels=16, heads=4, differential=False) is None
        expected = network_derivatives(attention)
    assert largest_deviation(got, expected) < 1e-11


def test_without_the_library_plain_torch_does_the_work(monkeypatch):
    expected = network_derivatives()
    monkeypatch.setattr(fused, "_library", lambda: None)
    assert fused.graph_of(torch.zeros(2, 1).long(), 1, channels=16, heads=4, differential=False) is None
    assert largest_deviation(network_derivatives(), expected) < 1e-11


@native
def test_unsorted_edges_fall_back_to_plain_torch():
    edge_index = torch.tensor([[1, 0], [0, 1]])
    assert fused.graph_of(edge_index, 2, channels=16, heads=4, differential=False) is None
    assert fused.graph_of(edge_index.flip(1), 2, channels=16, heads=4, differential=False) is not None
