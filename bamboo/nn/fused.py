"""The network of a force field, but for its matrix products, by the native library: for training on a CPU.

Training on forces differentiates twice. Plain torch writes some forty arrays of (n_edges, F) for the messages of one
layer on the way there and back; ``source/messages.h`` keeps what belongs to an edge in registers and does the forward
pass, its gradient, and the gradient of that gradient in one loop over the edges each. The two edges between a pair of
atoms differ in the sign of their vector only: everything that belongs to an edge is computed once for the pair. Edge
features depend on the distance alone, so ``source/edges.h`` computes them together with their derivative e'(r).

The results are those of the plain torch in ``bamboo.nn.get``, which stays the definition and takes over wherever
``pairs_of`` returns None.
"""

import ctypes
from collections.abc import Callable, Iterator, Sequence
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


def ready(tensor: Tensor) -> bool:
    """Tell whether the native library works on this tensor: built, not switched off, on the CPU."""
    return _enabled and tensor.device.type == "cpu" and available()


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


def _call(
    name: str, sizes: Sequence[int], arrays: Sequence[Tensor], *, dtype: torch.dtype, settings: Sequence[float] = ()
) -> None:
    """Run one function of the native library on contiguous arrays; floating ones are of the given dtype."""
    function = getattr(_library(), f"{name}_{str(dtype).removeprefix('torch.')}")
    function(
        (ctypes.c_int64 * len(sizes))(*sizes),
        (ctypes.c_double * len(settings))(*settings),
        (ctypes.c_void_p * len(arrays))(*(array.data_ptr() for array in arrays)),
    )


@dataclass(frozen=True)
class _Kernel:
    """A function of the native library that comes with its gradient, ``_backward``, and ``_second``.

    With S the sum of upstream gradients times outputs, ``_backward`` is the gradient of S in the inputs, ``_second``
    the gradient of (direction . dS/dinputs) in the upstream gradients and the inputs. Arrays are passed in the order
    index, inputs, upstream, direction, results. outputs, shapes of the outputs.
    """

    name: str
    sizes: tuple[int, ...]
    outputs: tuple[tuple[int, ...], ...]
    index: tuple[Tensor, ...] = ()
    settings: tuple[float, ...] = ()

    def run(self, which: str, given: Sequence[Tensor], results: Sequence[Tensor]) -> None:
        arrays = [*self.index, *(tensor.contiguous() for tensor in given), *results]
        _call(self.name + which, self.sizes, arrays, dtype=results[0].dtype, settings=self.settings)

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Return the outputs, twice differentiable in the inputs."""
        outputs: tuple[Tensor, ...] = _Value.apply(self, *inputs)  # type: ignore[no-untyped-call]
        return outputs


class _Value(Function):
    """inputs -> outputs of a kernel."""

    @staticmethod
    def forward(ctx: Any, kernel: _Kernel, *inputs: Tensor) -> tuple[Tensor, ...]:
        outputs = tuple(inputs[0].new_empty(shape) for shape in kernel.outputs)
        kernel.run("", inputs, outputs)
        ctx.kernel = kernel
        ctx.save_for_backward(*inputs)
        return outputs

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        return (None, *_Gradient.apply(ctx.kernel, *ctx.saved_tensors, *upstream))  # type: ignore[no-untyped-call]


class _Gradient(Function):
    """inputs, upstream gradients -> gradient of sum upstream . outputs in the inputs."""

    @staticmethod
    def forward(ctx: Any, kernel: _Kernel, *given: Tensor) -> tuple[Tensor, ...]:
        results = tuple(torch.empty_like(tensor) for tensor in given[: -len(kernel.outputs)])
        kernel.run("_backward", given, results)
        ctx.kernel = kernel
        ctx.save_for_backward(*given)
        return results

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *direction: Tensor) -> tuple[Tensor | None, ...]:
        kernel, given = ctx.kernel, ctx.saved_tensors
        on_inputs = tuple(torch.empty_like(tensor) for tensor in given[: -len(kernel.outputs)])
        on_upstream = tuple(torch.empty_like(tensor) for tensor in given[-len(kernel.outputs) :])
        kernel.run("_second", (*given, *direction), (*on_upstream, *on_inputs))
        return (None, *on_inputs, *on_upstream)


# --- atoms ------------------------------------------------------------------------------------------------------------


def layer_norm(x: Tensor, norm: torch.nn.LayerNorm) -> Tensor:
    """Return ``norm(x)`` for rows (n, F)."""
    sizes = (*x.shape, _threads(len(x)))
    (result,) = _Kernel("norm", sizes, (tuple(x.shape),), settings=(norm.eps,))(x, norm.weight, norm.bias)
    return result


def update(out: Tensor, mixed: Tensor, *, channels: int) -> tuple[Tensor, Tensor]:
    """Return (U1.U2) o2 + o3, (n, F), and U3 o1, (n, 3, F), from out (n, parts F) and mixed (n, 3, parts F).

    parts is 3, or 2 in the last layer, where the second result is empty.
    """
    n_atoms, parts = len(out), out.shape[1] // channels
    vectors = (n_atoms, 3, channels) if parts == 3 else (0,)
    kernel = _Kernel("update", (n_atoms, channels, parts, _threads(n_atoms)), ((n_atoms, channels), vectors))
    scalar, vector = kernel(out, mixed)
    return scalar, vector


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
    if not ready(edge_vec) or config.attention != "get" or config.channels > MAX_CHANNELS:
        return None
    n_edges = edge_index.shape[1]
    first, found = edge_index.new_zeros(n_atoms + 1), edge_index.new_zeros(1)
    kept, other = edge_index.new_empty(n_edges), edge_index.new_empty(n_edges)
    receiver, sender = edge_index[0].contiguous(), edge_index[1].contiguous()
    arrays = (receiver, sender, edge_vec.detach().contiguous(), first, other, kept, found)
    _call("pair_up", (n_atoms, n_edges), arrays, dtype=edge_vec.dtype)
    return Pairs(kept[: n_edges // 2], other[: n_edges // 2], first, config.heads) if bool(found) else None


def messages(
    qkv: Tensor, feature: Tensor, envelope: Tensor, direction: Tensor, pairs: Pairs, *, vectors: bool
) -> tuple[Tensor, Tensor]:
    """Return m (n, F) and M (n, 3, F) of ``bamboo.nn.get.messages``, twice differentiable in all but the pairs.

    feature (n_pairs, F), envelope (n_pairs,), direction (n_pairs, 3), as seen from the receiver of the kept edge;
    without vectors the second result is empty.
    """
    n_atoms, channels = len(qkv), feature.shape[1]
    sizes = (n_atoms, channels, channels // pairs.heads, _threads(len(pairs.other)), int(vectors))
    shapes = ((n_atoms, channels), (n_atoms, 3, channels) if vectors else (0,))
    scalar, vector = _Kernel("messages", sizes, shapes, (pairs.first, pairs.other))(qkv, feature, envelope, direction)
    return scalar, vector


# --- electrostatics ---------------------------------------------------------------------------------------------------


def coulomb(
    charges: Tensor, vectors: Tensor, ends: Tensor, *, system_index: Tensor, weight: Tensor, settings: tuple[float, ...]
) -> Tensor:
    """Return weight * sum q_i q_j K(r) of each system, (n_systems,), twice differentiable in charges and vectors.

    ends (2, n_pairs) and system_index (n_atoms,) int64; vectors (n_pairs, 3); weight (n_systems,); settings k_e, r0,
    beta, alpha and cutoff of ``bamboo.terms.electrostatics``: K is its damped pair energy minus erf(alpha r) / r.
    """
    sizes = (len(charges), len(vectors), len(weight))
    index = (*(end.contiguous() for end in ends), system_index.contiguous(), weight.double().contiguous())
    (energy,) = _Kernel("coulomb", sizes, ((len(weight),),), index, settings)(charges, vectors)
    return energy


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
        _call("basis", sizes, (*inputs, phi), dtype=phi.dtype, settings=settings)
        z = phi @ weight.T
        both = torch.empty_like(z)
        _call("activate", (z[0].numel(), sizes[2]), (z, both), dtype=z.dtype)
        ctx.sizes, ctx.settings = sizes, settings
        ctx.save_for_backward(*inputs, weight, phi, z)
        return both[0], both[1]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor, g_slope: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, weight, phi, z = ctx.saved_tensors
        d_z = torch.empty_like(z)
        arrays = (z, g.contiguous(), g_slope.contiguous(), d_z)
        _call("activate_backward", (z[0].numel(), ctx.sizes[2]), arrays, dtype=z.dtype)
        d_means, d_betas = torch.empty_like(inputs[1]), torch.empty_like(inputs[2])
        arrays = (*inputs, d_z @ weight, d_means, d_betas)
        _call("basis_backward", ctx.sizes, arrays, dtype=z.dtype, settings=ctx.settings)
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
        _call("contract", (*a.shape, _threads(len(a))), (a, b, result), dtype=a.dtype)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
        a, b = ctx.saved_tensors
        d_a, d_b = torch.empty_like(a), torch.empty_like(b)
        _call("contract_backward", (*a.shape, _threads(len(a))), (a, b, g.contiguous(), d_a, d_b), dtype=a.dtype)
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
