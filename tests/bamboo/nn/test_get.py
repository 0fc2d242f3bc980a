"""The transformer against its equations, written atom by atom in numpy."""

import numpy as np
import pytest
import torch

from bamboo.errors import InputError
from bamboo.nn.get import GraphEquivariantTransformer, NetworkConfig, mlp
from bamboo.nn.radial import RadialBasis, cosine_envelope, safe_norm


def silu(x):
    return x / (1.0 + np.exp(-x))


def numbers_of(module):
    return {name: tensor.detach().numpy() for name, tensor in module.state_dict().items()}


def layer_by_hand(weights, config, h, v, pairs, *, first, last):
    """One layer: attention without softmax, scalar and vector messages, mixing on the atom."""
    n_atoms, width, head = len(h), config.channels, config.channels // config.heads
    centred = h - h.mean(1, keepdims=True)
    y = centred / np.sqrt((centred**2).mean(1, keepdims=True) + 1e-5) * weights["norm.weight"] + weights["norm.bias"]
    qkv = (y @ weights["qkv.weight"].T + weights["qkv.bias"]).reshape(n_atoms, config.heads, 3, head)
    q, k, value = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
    scalar, vector = np.zeros((n_atoms, width)), np.zeros((n_atoms, 3, width))
    for i, j, envelope, feature, direction in pairs:
        product = q[i] * k[j]
        if config.attention == "gedt":
            half = head // 2
            attention = silu(product[:, :half].sum(1)) - silu(product[:, half:].sum(1))
        else:
            attention = silu(product.sum(1))
        carried = value[j].reshape(-1) * feature
        scalar[i] += carried * np.repeat(attention * envelope, head)
        vector[i] += direction[:, None] * carried[None]
    if config.attention == "gedt":
        scalar = silu(scalar @ weights["gate.weight"].T) + scalar
    out = scalar @ weights["out.weight"].T + weights["out.bias"]
    if first:
        return h + out, vector
    mixed = v @ weights["mix.weight"].T
    u = np.split(mixed, 2 if last else 3, axis=-1)
    o = np.split(out, 2 if last else 3, axis=-1)
    s = (u[0] * u[1]).sum(1)
    if last:
        return h + s * o[0] + o[1], None
    return h + s * o[1] + o[2], v + u[2] * o[0][:, None] + vector


@pytest.mark.parametrize("layers", [2, 3, 4])
@pytest.mark.parametrize("attention", ["get", "gedt"])
def test_network_equals_its_equations(attention, layers):
    torch.manual_seed(1)
    config = NetworkConfig(channels=16, heads=4, layers=layers, n_radial=6, cutoff=4.0, attention=attention)
    network = GraphEquivariantTransformer(config).double()
    n_atoms = 7
    h = torch.randn(n_atoms, config.channels, dtype=torch.float64)
    positions = 4.5 * torch.rand(n_atoms, 3, dtype=torch.float64)
    i, j = torch.nonzero((torch.cdist(positions, positions) < config.cutoff).fill_diagonal_(False)).T
    assert 10 < len(i) < n_atoms * (n_atoms - 1)
    edge_vec = positions[j] - positions[i]
    result = network(h, edge_vec, torch.stack([i, j])).detach().numpy()

    weights = numbers_of(network)
    r = np.linalg.norm(edge_vec.numpy(), axis=1)
    envelope = (np.cos(np.pi * r / config.cutoff) + 1) / 2
    means, betas = weights["radial.means"], weights["radial.betas"]
    basis = envelope[:, None] * np.exp(-betas * (np.exp(-5 * r / config.cutoff)[:, None] - means) ** 2)
    feature = silu(basis @ weights["edge.weight"].T)
    direction = edge_vec.numpy() / r[:, None]
    pairs = list(zip(i.tolist(), j.tolist(), envelope, feature, direction, strict=True))
    expected, v = h.numpy(), None
    for index, layer in enumerate(network.layers):
        expected, v = layer_by_hand(
            numbers_of(layer), config, expected, v, pairs, first=index == 0, last=index == layers - 1
        )
    np.testing.assert_allclose(result, expected, rtol=1e-10, atol=1e-10)
    assert np.abs(expected - h.numpy()).max() > 0.1


def test_initial_radial_basis():
    """Gong et al. 2025: means evenly from exp(-5) to 1, beta = (2/K (1 - exp(-5)))^-2."""
    basis = RadialBasis(32, 5.0)
    assert basis.means.tolist() == pytest.approx(np.linspace(np.exp(-5), 1, 32).tolist(), rel=1e-6)
    assert basis.betas.tolist() == pytest.approx([(2 / 32 * (1 - np.exp(-5))) ** -2] * 32, rel=1e-6)


def test_envelope():
    r = torch.tensor([0.0, 2.5, 5.0, 7.0], dtype=torch.float64)
    assert cosine_envelope(r, 5.0).tolist() == pytest.approx([1.0, 0.5, 0.0, 0.0], abs=1e-15)


def test_norm_and_its_gradient_at_zero():
    vector = torch.tensor([[3.0, 0.0, 4.0], [0.0, 0.0, 0.0]], requires_grad=True)
    norm = safe_norm(vector)
    (gradient,) = torch.autograd.grad(norm.sum(), vector)
    assert norm.tolist() == [5.0, 0.0]
    assert gradient.flatten().tolist() == pytest.approx([0.6, 0.0, 0.8, 0.0, 0.0, 0.0])


def test_head_has_the_published_shape():
    shapes = [tuple(layer.weight.shape) for layer in mlp(64) if hasattr(layer, "weight")]
    assert shapes == [(32, 64), (32, 32), (1, 32)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attention": "softmax"}, "attention"),
        ({"channels": 30}, "channels"),
        ({"channels": 16, "attention": "gedt"}, "channels"),
        ({"heads": 0}, "channels"),
        ({"layers": 1}, "layers"),
        ({"cutoff": 0.0}, "cutoff"),
    ],
)
def test_impossible_networks_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        NetworkConfig(**options)
