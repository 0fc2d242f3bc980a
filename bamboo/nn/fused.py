"""Edge features, messages and their first and second derivative by the native library, for training on a CPU.

Training on forces differentiates twice. Plain torch writes some forty arrays of (n_edges, F) for the messages of one
layer on the way there and back; ``source/messages.h`` keeps what belongs to an edge in registers and does the forward
pass, its gradient, and the gradient of that gradient in one loop over the edges each. The two edges between a pair of
atoms differ in the sign of their vector only: everything that belongs to an edge is computed once for the pair. Edge
features depend on the distance alone, so ``source/edges.h`` computes them together with their derivative e'(r).

The results are those of the plain torch in ``bamboo.nn.get``, which stays the definition and takes over wherever
``pairs_of`` returns None.
"""

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from bamboo.nn.radial import RadialBasis

if TYPE_CHECKING:
    from bamboo.nn.get import NetworkConfig

Tensor = torch.Tensor
MAX_CHANNELS = 512  # of the native library
_enabled = True


@cache
def _library() -> ctypes.CDLL | None:
    """Return the native library that the installation built beside this file, or None where there was no compiler."""
    for suffix in EXTENSION_SUFFIXES:
        path = Path(__file__).with_name("_fused" + suffix)
        if path.exists():
            return ctypes.CDLL(str(path))
    return None


def available() -> bool:
    """Tell whether the native library was built."""
    return _library() is not None


@contextmanager
def plain() -> Iterator[None]:
    """Compute in plain torch inside this context, native library or not."""
    global _enabled
    before, _enabled = _enabled, False
    try:
        yield
    finally:
        _enabled = before


def _threads(n_pairs: int) -> int:
    """Return how many threads to use: waking one costs as much as a thousand pairs."""
    return max(1, min(torch.get_num_threads(), n_pairs // 1000))


def _call(name: str, *arguments: Tensor | int | float) -> None:
    """Run one function of the native library; tensors are contiguous, of one floating type that stands last."""
    library = _library()
    floating = [item.dtype for item in arguments if isinstance(item, Tensor) and item.is_floating_point()]
    function = getattr(library, f"{name}_{str(floating[0]).removeprefix('torch.')}")
    converted: list[Any] = []
    for item in arguments:
        if isinstance(item, Tensor):
            converted.append(ctypes.c_void_p(item.data_ptr()))
        else:
            converted.append(ctypes.c_int64(item) if isinstance(item, int) else ctypes.c_double(item))
    function(*converted)


# --- messages ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pairs:
    """Each pair of neighbours once: of the two edges of a full list between two atoms, the one that is kept.

    kept (n_pairs,) its index in the full list; other (n_pairs,) its sender; the pairs of receiver i are
    first[i] .. first[i + 1] - 1; all int64. heads, number of attention heads.
    """

    kept: Tensor
    other: Tensor
    first: Tensor
    heads: int


def pairs_of(edge_index: Tensor, edge_vec: Tensor, *, n_atoms: int, config: "NetworkConfig") -> Pairs | None:
    """Return the pairs of a full list, or None if plain torch has to do the work.

    That is where there is no native library, off the CPU, for differential attention, and for edges that are not sorted
    by receiver or lack their counterpart. edge_index (2, n_edges) int64; edge_vec (n_edges, 3).
    """
    if not _enabled or config.attention != "get" or config.channels > MAX_CHANNELS:
        return None
    if edge_vec.device.type != "cpu" or not available():
        return None
    n_edges = edge_index.shape[1]
    first, found = edge_index.new_zeros(n_atoms + 1), edge_index.new_zeros(1)
    kept, other = edge_index.new_empty(n_edges), edge_index.new_empty(n_edges)
    receiver, sender = edge_index[0].contiguous(), edge_index[1].contiguous()
    _call("pair_up", n_atoms, n_edges, receiver, sender, edge_vec.detach().contiguous(), first, other, kept, found)
    return Pairs(kept[: n_edges // 2], other[: n_edges // 2], first, config.heads) if bool(found) else None


def messages(qkv: Tensor, feature: Tensor, envelope: Tensor, direction: Tensor, pairs: Pairs) -> tuple[Tensor, Tensor]:
    """Return m (n, F) and M (n, 3, F) of ``bamboo.nn.get.messages``, twice differentiable in all but the pairs.

    feature (n_pairs, F), envelope (n_pairs,), direction (n_pairs, 3), as seen from the receiver of the kept edge.
    """
    scalar, vector = _Messages.apply(qkv, feature, envelope, direction, pairs)  # type: ignore[no-untyped-call]
    return scalar, vector


def _call_messages(name: str, pairs: Pairs, qkv: Tensor, *tensors: Tensor) -> None:
    channels = qkv.shape[1] // 3
    sizes = (channels, channels // pairs.heads, _threads(len(pairs.other)))
    _call(name, len(qkv), pairs.first, pairs.other, *sizes, qkv, *tensors)


class _Messages(Function):
    """(qkv, e, f, u) -> (m, M)."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        *tensors, pairs = arguments
        inputs = [tensor.contiguous() for tensor in tensors]
        n_atoms, channels = len(inputs[0]), inputs[1].shape[1]
        scalar, vector = inputs[0].new_empty(n_atoms, channels), inputs[0].new_empty(n_atoms, 3, channels)
        _call_messages("messages", pairs, *inputs, scalar, vector)
        ctx.pairs = pairs
        ctx.save_for_backward(*tensors)
        return scalar, vector

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        gradient = _Gradient.apply(*upstream, *ctx.saved_tensors, ctx.pairs)  # type: ignore[no-untyped-call]
        return (*gradient, None)


class _Gradient(Function):
    """(g, G, qkv, e, f, u) -> gradient of sum g.m + G.M with respect to (qkv, e, f, u)."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, ...]:
        *tensors, pairs = arguments
        g, vector_g, *inputs = (tensor.contiguous() for tensor in tensors)
        gradient = tuple(torch.empty_like(tensor) for tensor in inputs)
        _call_messages("messages_backward", pairs, *inputs, g, vector_g, *gradient)
        ctx.pairs = pairs
        ctx.save_for_backward(*tensors)
        return gradient

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *along: Tensor) -> tuple[Tensor | None, ...]:
        g, vector_g, *inputs = (tensor.contiguous() for tensor in ctx.saved_tensors)
        on_upstream = (torch.empty_like(g), torch.empty_like(vector_g))
        on_inputs = tuple(torch.empty_like(tensor) for tensor in inputs)
        directions = (tensor.contiguous() for tensor in along)
        _call_messages("messages_second", ctx.pairs, *inputs, g, vector_g, *directions, *on_upstream, *on_inputs)
        return (*on_upstream, *on_inputs, None)


# --- edge features ----------------------------------------------------------------------------------------------------


def edge_features(
    distance: Tensor, radial: RadialBasis, weight: Tensor, *, cutoff: float, plain: Callable[[Tensor], Tensor]
) -> Tensor:
    """Return e(r) = SiLU(W phi(r)), (n_edges, F), twice differentiable in the distance (n_edges,) and the parameters.

    ``plain`` computes the same in plain torch; it is asked only for e''(r), which training never needs.
    """
    settings = (radial.decay, cutoff)
    value, slope = _Features.apply(distance.detach(), radial.means, radial.betas, weight, settings)  # type: ignore[no-untyped-call]
    attached: Tensor = _Attached.apply(value, slope, distance, plain)  # type: ignore[no-untyped-call]
    return attached


class _Features(Function):
    """(r, mu, beta, W) -> (e, e'), differentiable once, and in the parameters only."""

    @staticmethod
    def forward(ctx: Any, distance: Tensor, means: Tensor, betas: Tensor, weight: Tensor, settings: Any) -> Any:
        sizes = (len(distance), len(means), _threads(len(distance)))
        inputs = [tensor.contiguous() for tensor in (distance, means, betas)]
        phi = weight.new_empty(2, len(distance), len(means))
        _call("basis", *sizes, *settings, *inputs, phi)
        z = phi @ weight.T
        both = torch.empty_like(z)
        _call("activate", z[0].numel(), sizes[2], z, both)
        ctx.sizes, ctx.settings = sizes, settings
        ctx.save_for_backward(*inputs, weight, phi, z)
        return both[0], both[1]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor, g_slope: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, weight, phi, z = ctx.saved_tensors
        d_z = torch.empty_like(z)
        _call("activate_backward", z[0].numel(), ctx.sizes[2], z, g.contiguous(), g_slope.contiguous(), d_z)
        d_means, d_betas = torch.empty_like(inputs[1]), torch.empty_like(inputs[2])
        _call("basis_backward", *ctx.sizes, *ctx.settings, *inputs, d_z @ weight, d_means, d_betas)
        return None, d_means, d_betas, d_z.flatten(0, 1).T @ phi.flatten(0, 1), None


class _Attached(Function):
    """Hand e on and tell autograd that it depends on r with derivative e': de/dr = sum_c g_c e'_c for a gradient g."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, slope: Tensor, distance: Tensor, plain: Any) -> Tensor:
        ctx.plain = plain
        ctx.save_for_backward(slope, distance)
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        slope, distance = ctx.saved_tensors
        on_distance = _Contract.apply(g, slope)  # type: ignore[no-untyped-call]
        if distance.requires_grad and torch.is_grad_enabled():
            on_distance = on_distance + _Curvature.apply(distance, g.detach(), ctx.plain)  # type: ignore[no-untyped-call]
        return g, None, on_distance, None


class _Contract(Function):
    """(a, b) -> sum over the columns of a * b."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        a, b = a.contiguous(), b.contiguous()
        result = a.new_empty(len(a))
        ctx.save_for_backward(a, b)
        _call("contract", *a.shape, _threads(len(a)), a, b, result)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
        a, b = ctx.saved_tensors
        d_a, d_b = torch.empty_like(a), torch.empty_like(b)
        _call("contract_backward", *a.shape, _threads(len(a)), a, b, g.contiguous(), d_a, d_b)
        return d_a, d_b


class _Curvature(Function):
    """Zero, with derivative sum_c g_c e''_c in r: what ``_Features`` leaves out because it takes r as given.

    A node of its own, so that autograd visits it only where second derivatives with respect to positions are asked for.
    """

    @staticmethod
    def forward(ctx: Any, distance: Tensor, g: Tensor, plain: Any) -> Tensor:
        ctx.plain = plain
        ctx.save_for_backward(distance, g)
        return torch.zeros_like(distance)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, along: Tensor) -> tuple[Tensor | None, ...]:
        distance, g = ctx.saved_tensors
        with torch.enable_grad():
            r = distance.detach().requires_grad_()
            (slope,) = torch.autograd.grad((g * ctx.plain(r)).sum(), r, create_graph=True)
            (bend,) = torch.autograd.grad(slope.sum(), r)
        return along * bend, None, None
