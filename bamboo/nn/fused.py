"""The messages of a layer and their first and second derivative by the native library, for training on a CPU.

Training on forces differentiates twice. Plain torch writes some forty arrays of (n_edges, F) for the messages of one
layer on the way there and back; ``_messages.cpp`` keeps what belongs to an edge in registers and does the forward pass,
its gradient, and the gradient of that gradient in one loop over the edges each. The result is that of the plain
``bamboo.nn.get.messages``, which stays the definition and takes over wherever ``graph_of`` returns None.
"""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

import torch
from torch.autograd import Function
from torch.autograd.function import once_differentiable

MAX_CHANNELS = 512  # of the native library
_enabled = True


@cache
def _library() -> ctypes.CDLL | None:
    """Return the native library that the installation built beside this file, or None where there was no compiler."""
    for suffix in EXTENSION_SUFFIXES:
        path = Path(__file__).with_name("_messages" + suffix)
        if path.exists():
            return ctypes.CDLL(str(path))
    return None


def available() -> bool:
    """Tell whether the native library was built."""
    return _library() is not None


@contextmanager
def plain() -> Iterator[None]:
    """Compute messages in plain torch inside this context, native library or not."""
    global _enabled
    before, _enabled = _enabled, False
    try:
        yield
    finally:
        _enabled = before


@dataclass(frozen=True)
class Graph:
    """The edges as the native library wants them: those of receiver i are first[i] .. first[i + 1] - 1.

    first (n_atoms + 1,) and sender (n_edges,) int64, contiguous; heads, number of attention heads.
    """

    first: torch.Tensor
    sender: torch.Tensor
    heads: int


def graph_of(edge_index: torch.Tensor, n_atoms: int, *, channels: int, heads: int, differential: bool) -> Graph | None:
    """Return the graph for ``messages``, or None if plain torch has to do it.

    That is where there is no native library, off the CPU, for differential attention, and for edges that are not
    sorted by receiver. edge_index (2, n_edges) int64.
    """
    receiver = edge_index[0]
    if not _enabled or differential or channels > MAX_CHANNELS or receiver.device.type != "cpu" or not available():
        return None
    if bool((receiver[1:] < receiver[:-1]).any()):
        return None
    first = torch.searchsorted(receiver.contiguous(), torch.arange(n_atoms + 1))
    return Graph(first, edge_index[1].contiguous(), heads)


def messages(
    qkv: torch.Tensor, feature: torch.Tensor, envelope: torch.Tensor, direction: torch.Tensor, graph: Graph
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return m (n, F) and M (n, 3, F) of ``bamboo.nn.get.messages``, twice differentiable in all but the graph."""
    scalar, vector = _Messages.apply(qkv, feature, envelope, direction, graph)  # type: ignore[no-untyped-call]
    return scalar, vector


def _call(name: str, graph: Graph, *tensors: torch.Tensor) -> None:
    """Run one function of the native library on contiguous tensors of one dtype."""
    library = _library()
    assert library is not None
    channels = tensors[0].shape[1] // 3
    function = getattr(library, f"messages_{'f32' if tensors[0].dtype == torch.float32 else 'f64'}_{name}")
    function(
        ctypes.c_int64(len(tensors[0])),
        ctypes.c_void_p(graph.first.data_ptr()),
        ctypes.c_void_p(graph.sender.data_ptr()),
        ctypes.c_int(channels),
        ctypes.c_int(channels // graph.heads),
        ctypes.c_int(torch.get_num_threads()),
        *(ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors),
    )


class _Messages(Function):
    """(qkv, e, f, u) -> (m, M)."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
        *tensors, graph = arguments
        inputs = [tensor.contiguous() for tensor in tensors]
        n_atoms, channels = len(inputs[0]), inputs[1].shape[1]
        scalar, vector = inputs[0].new_empty(n_atoms, channels), inputs[0].new_empty(n_atoms, 3, channels)
        _call("forward", graph, *inputs, scalar, vector)
        ctx.graph = graph
        ctx.save_for_backward(*tensors)
        return scalar, vector

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gradient = _Gradient.apply(*upstream, *ctx.saved_tensors, ctx.graph)  # type: ignore[no-untyped-call]
        return (*gradient, None)


class _Gradient(Function):
    """(g, G, qkv, e, f, u) -> gradient of sum g.m + G.M with respect to (qkv, e, f, u)."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[torch.Tensor, ...]:
        *tensors, graph = arguments
        g, vector_g, *inputs = (tensor.contiguous() for tensor in tensors)
        gradient = (torch.zeros_like(inputs[0]), *(torch.empty_like(tensor) for tensor in inputs[1:]))
        _call("backward", graph, *inputs, g, vector_g, *gradient)
        ctx.graph = graph
        ctx.save_for_backward(*tensors)
        return gradient

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *along: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        g, vector_g, *inputs = (tensor.contiguous() for tensor in ctx.saved_tensors)
        on_upstream = (torch.empty_like(g), torch.empty_like(vector_g))
        on_inputs = (torch.zeros_like(inputs[0]), *(torch.empty_like(tensor) for tensor in inputs[1:]))
        directions = (tensor.contiguous() for tensor in along)
        _call("second", ctx.graph, *inputs, g, vector_g, *directions, *on_upstream, *on_inputs)
        return (*on_upstream, *on_inputs, None)
