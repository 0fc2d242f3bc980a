"""The native messages and edge features against the plain ones: values, first and second derivatives."""

from dataclasses import replace

import pytest
import torch

from bamboo.nn import fused
from bamboo.nn.get import Edges, GraphEquivariantTransformer, NetworkConfig, messages

native = pytest.mark.skipif(not fused.available(), reason="no native library: built without a C++ compiler")
SIZES = [(64, 16), (8, 2), (12, 4), (6, 1)]  # channels, heads; the first is compiled for its size


def full_list(n_atoms: int, n_pairs: int, *, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return edge_index and edge_vec of a full list sorted by receiver, some vectors longer than the cutoff.

    It holds several images of one pair and images of an atom with itself; atoms 1 and 3 are alone.
    """
    generator = torch.Generator().manual_seed(seed)
    index = torch.randint(n_atoms, (2, n_pairs), generator=generator)
    if n_atoms > 3:
        index[(index == 1) | (index == 3)] = 0
    vec = 2.0 * torch.randn(n_pairs, 3, generator=generator, dtype=torch.float64)
    index, vec = torch.cat([index, index.flip(0)], dim=1), torch.cat([vec, -vec])
    order = torch.randperm(2 * n_pairs, generator=generator)
    order = order[torch.argsort(index[0, order], stable=True)]
    return index[:, order], vec[order]


def pairs_of(
    edge_index: torch.Tensor, edge_vec: torch.Tensor, n_atoms: int, *, channels: int, heads: int
) -> fused.Pairs:
    config = NetworkConfig(channels=channels, heads=heads)
    pairs = fused.pairs_of(edge_index, edge_vec, n_atoms=n_atoms, config=config)
    assert pairs is not None
    return pairs


def inputs(n_atoms: int, n_pairs: int, channels: int, *, seed: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Return qkv, and e, f, u of each pair, that require gradients."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(n_atoms, 3 * channels), (n_pairs, channels), (n_pairs,), (n_pairs, 3)]
    return [(0.5 * torch.randn(shape, generator=generator, dtype=dtype)).requires_grad_() for shape in shapes]


def evaluate(tensors: list[torch.Tensor], pairs: fused.Pairs, *, native: bool) -> list[torch.Tensor]:
    """Return m, M, the gradient of a scalar of them, and the gradient of a scalar of that gradient."""
    qkv, e, f, u = tensors
    i = torch.repeat_interleave(torch.arange(len(qkv)), pairs.first.diff())
    j = pairs.other
    if native:
        edges = Edges(i, j, e, f, u, pairs)
    else:
        edges = Edges(torch.cat([i, j]), torch.cat([j, i]), torch.cat([e, e]), torch.cat([f, f]), torch.cat([u, -u]))
    m, M = messages(qkv, edges, heads=pairs.heads, differential=False)
    first = torch.autograd.grad((m.cos() * 2.0).sum() + M.sin().sum(), tensors, create_graph=True)
    second = torch.autograd.grad(sum(tensor.sin().sum() for tensor in first), tensors)
    return [m, M, *first, *second]


def largest_deviation(got: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """Return the largest difference relative to the largest entry of each tensor (or 0.1: some vanish)."""
    return max(
        float((a - b).detach().abs().max() / b.detach().abs().max().clamp(min=0.1)) if a.numel() else 0.0
        for a, b in zip(got, expected, strict=True)
    )


@native
@pytest.mark.parametrize(("n_atoms", "n_pairs"), [(9, 60), (40, 700), (1, 3), (4, 0)])
def test_every_edge_finds_its_counterpart(n_atoms, n_pairs):
    index, vec = full_list(n_atoms, n_pairs, seed=1)
    pairs = pairs_of(index, vec, n_atoms, channels=8, heads=2)
    assert len(pairs.kept) == n_pairs
    receiver = torch.repeat_interleave(torch.arange(n_atoms), pairs.first.diff())
    assert torch.equal(receiver, index[0, pairs.kept])
    assert torch.equal(pairs.other, index[1, pairs.kept])
    both = torch.cat([vec[pairs.kept], -vec[pairs.kept]])  # the kept edges and their counterparts are all edges
    rows = torch.cat([torch.cat([receiver, pairs.other])[:, None].double(), both], dim=1)
    every = torch.cat([index[0][:, None].double(), vec], dim=1)
    assert sorted(rows.tolist()) == sorted(every.tolist())


@native
@pytest.mark.parametrize(("channels", "heads"), SIZES)
@pytest.mark.parametrize(("n_atoms", "n_pairs"), [(9, 60), (4, 0), (1, 3), (40, 700)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-4)])
def test_native_messages_equal_the_plain_ones(channels, heads, n_atoms, n_pairs, dtype, tolerance):
    pairs = pairs_of(*full_list(n_atoms, n_pairs, seed=1), n_atoms, channels=channels, heads=heads)
    tensors = inputs(n_atoms, n_pairs, channels, seed=2, dtype=dtype)
    got = evaluate(tensors, pairs, native=True)
    assert largest_deviation(got, evaluate(tensors, pairs, native=False)) < tolerance


@native
def test_native_messages_pass_gradcheck_and_gradgradcheck():
    pairs = pairs_of(*full_list(4, 5, seed=3), 4, channels=4, heads=2)
    tensors = inputs(4, 5, 4, seed=4, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda *x: fused.messages(*x, pairs, vectors=True), tensors)
    assert torch.autograd.gradgradcheck(lambda *x: fused.messages(*x, pairs, vectors=True), tensors)


@native
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_native_messages_are_the_same_bits_every_time_and_right_on_any_number_of_threads(threads):
    pairs = pairs_of(*full_list(40, 4000, seed=5), 40, channels=8, heads=2)  # enough for four threads
    tensors = inputs(40, 4000, 8, seed=6, dtype=torch.float64)
    reference = evaluate(tensors, pairs, native=False)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        runs = [evaluate(tensors, pairs, native=True) for _ in range(3)]
    finally:
        torch.set_num_threads(before)
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))
    assert largest_deviation(runs[0], reference) < 1e-12


@native
def test_large_logits_do_not_overflow():
    pairs = pairs_of(*full_list(9, 60, seed=7), 9, channels=64, heads=16)
    tensors = inputs(9, 60, 64, seed=8, dtype=torch.float32)
    tensors[0] = (tensors[0].detach() * 200.0).requires_grad_()  # logits of +-1e4: exp(1e4) is infinite
    got = evaluate(tensors, pairs, native=True)
    assert all(torch.isfinite(tensor).all() for tensor in got)
    assert largest_deviation(got[:2], evaluate(tensors, pairs, native=False)[:2]) < 1e-5


@native
@pytest.mark.parametrize("rows", [1, 7])
def test_native_layer_norm_equals_torch(rows):
    generator = torch.Generator().manual_seed(12)
    norm = torch.nn.LayerNorm(8).double()
    x, gamma, beta = (torch.randn(shape, generator=generator).double() for shape in [(rows, 8), (8,), (8,)])
    x[0] = 0.1 + 1e-3 * x[0]  # epsilon matters where the numbers of a row are close

    def derivatives(evaluate):
        norm.weight.data, norm.bias.data = gamma, beta
        inputs = [x.clone().requires_grad_(), norm.weight, norm.bias]
        y = evaluate(inputs[0])
        first = torch.autograd.grad(y.sin().sum(), inputs, create_graph=True)
        return [y, *first, *torch.autograd.grad(sum(tensor.cos().sum() for tensor in first), inputs)]

    assert largest_deviation(derivatives(lambda x: fused.layer_norm(x, norm)), derivatives(norm)) < 1e-11


@native
@pytest.mark.parametrize("parts", [2, 3])
def test_native_update_passes_gradcheck_and_gradgradcheck(parts):
    generator = torch.Generator().manual_seed(13)
    out, mixed = (torch.randn(shape, generator=generator).double() for shape in [(3, parts * 2), (3, 3, parts * 2)])
    inputs = (out.requires_grad_(), mixed.requires_grad_())

    def used(out: torch.Tensor, mixed: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return fused.update(out, mixed, channels=2)[: parts - 1]

    u1, u2, *u3 = mixed.split(2, dim=-1)
    *o1, o2, o3 = out.split(2, dim=-1)
    expected = [(u1 * u2).sum(1) * o2 + o3, *(u * o[:, None] for u, o in zip(u3, o1, strict=True))]
    assert largest_deviation(list(used(*inputs)), expected) < 1e-14
    assert torch.autograd.gradcheck(used, inputs)
    assert torch.autograd.gradgradcheck(used, inputs)


def network_derivatives(attention: str = "get") -> list[torch.Tensor]:
    """Return a network's output, its gradient in the positions, and the gradient of a loss on both in everything."""
    torch.manual_seed(9)
    config = NetworkConfig(channels=16, heads=4, n_radial=8, attention=attention)
    network = GraphEquivariantTransformer(config).double()
    edge_index, shift = full_list(7, 40, seed=10)
    positions = torch.randn(7, 3, dtype=torch.float64).requires_grad_()
    edge_vec = positions[edge_index[1]] - positions[edge_index[0]] + shift
    h = network(torch.randn(7, 16, dtype=torch.float64), edge_vec, edge_index)
    (gradient,) = torch.autograd.grad(h.square().sum(), positions, create_graph=True)
    loss = h.sin().sum() + gradient.square().sum()
    return [h, gradient, *torch.autograd.grad(loss, [positions, *network.parameters()])]


@native
@pytest.mark.parametrize("attention", ["get", "gedt"])
def test_training_gradients_of_a_network_do_not_depend_on_the_library(attention):
    got = network_derivatives(attention)
    with fused.plain():
        expected = network_derivatives(attention)
    assert largest_deviation(got, expected) < 1e-11


def test_without_the_library_plain_torch_does_the_work(monkeypatch):
    expected = network_derivatives()
    monkeypatch.setattr(fused, "_library", lambda: None)
    assert fused.pairs_of(*full_list(4, 5, seed=1), n_atoms=4, config=NetworkConfig()) is None
    assert largest_deviation(network_derivatives(), expected) < 1e-11


@native
def test_what_the_library_cannot_do_is_left_to_plain_torch():
    index, vec = full_list(5, 20, seed=11)
    config = NetworkConfig(channels=16, heads=4)
    assert fused.pairs_of(index, vec, n_atoms=5, config=config) is not None
    assert fused.pairs_of(index.flip(1), vec.flip(0), n_atoms=5, config=config) is None  # not sorted
    assert fused.pairs_of(index[:, 1:], vec[1:], n_atoms=5, config=config) is None  # an edge without counterpart
    assert fused.pairs_of(index, vec.abs(), n_atoms=5, config=config) is None  # no opposite vectors
    assert fused.pairs_of(index, vec, n_atoms=5, config=replace(config, attention="gedt")) is None
    with fused.plain():
        assert fused.pairs_of(index, vec, n_atoms=5, config=config) is None
