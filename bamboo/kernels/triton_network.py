"""The transformer on a GPU: messages and their backward pass in Triton, the matrices of single atoms in torch.

Rows of neighbours as in ``triton_pairs.py``. A program works on A atoms and takes B neighbours of each at a time; its
tiles are (P, H, S, D): P = A B pairs of atom and lane, heads, logits of a head (1, or 2 in GEDT), channels of a logit.
F = H S D channels, in the order in which the network stores them. The lanes of an atom are added up last. Nothing
of size (n_edges, F) is ever stored: the backward pass computes messages again.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch.nn.functional import linear, silu

from bamboo.forcefield import ForceField
from bamboo.kernels.device_lists import Rows
from bamboo.kernels.native import FEATURE_TABLE

INTERPRETED = bool(triton.knobs.runtime.interpret)  # TRITON_INTERPRET=1: no GPU, numpy does the work

PI = tl.constexpr(3.141592653589793)


@triton.jit
def envelope(r, CUTOFF: tl.constexpr):
    """Return f = (cos(pi r / r_c) + 1) / 2 and its derivative."""
    phase = r * (PI / CUTOFF)
    return 0.5 * (tl.cos(phase) + 1.0), (-0.5 * PI / CUTOFF) * tl.sin(phase)


@triton.jit
def feature(table, interval, t, channel, F: tl.constexpr, DEGREE: tl.constexpr):
    """Return e(r) (P, H, S, D) and its derivative in t, from the polynomial of the interval; highest power first."""
    at = table + interval[:, None, None, None] * ((DEGREE + 1) * F) + channel
    t = t[:, None, None, None]
    value = tl.load(at)
    slope = tl.full(value.shape, 0.0, value.dtype)
    for power in tl.static_range(1, DEGREE + 1):
        slope = slope * t + value
        value = value * t + tl.load(at + power * F)
    return value, slope


@triton.jit
def silu_and_slope(x):
    """Return x sigmoid(x) and its derivative."""
    s = 1.0 / (1.0 + tl.exp(-x))
    return x * s, s * (1.0 + x * (1.0 - s))


@triton.jit
def store_sum(to, stride: tl.constexpr, n_atoms, lanes, A: tl.constexpr, B: tl.constexpr):
    """Add the lanes (P, H, S, D) of each atom up and store F numbers per atom, rows a stride apart."""
    F: tl.constexpr = lanes.shape[1] * lanes.shape[2] * lanes.shape[3]
    atom, channel = tl.program_id(0) * A + tl.arange(0, A)[:, None], tl.arange(0, F)[None, :]
    tl.store(to + atom * stride + channel, tl.sum(tl.reshape(lanes, (A, B, F)), 1), mask=atom < n_atoms)


@triton.jit
def messages_kernel(
    qkv, start, kept, sender, interval, place, table, scalar, vector, n_atoms,
    CUTOFF: tl.constexpr, INTERVALS: tl.constexpr, DEGREE: tl.constexpr, H: tl.constexpr, S: tl.constexpr,
    D: tl.constexpr, VECTORS: tl.constexpr, A: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """m_i = sum_j v_j e_ij a_ij and, with VECTORS, M_i = sum_j (v_j e_ij) (x) u_ij; a_ij = SiLU(q_i . k_j) f(r_ij).

    qkv (n, 3 F) holds q | k | v; scalar (n, F) receives m, vector (n, 3, F) M. GEDT: a = (SiLU(l_1) - SiLU(l_2)) f.
    """
    F: tl.constexpr = H * S * D
    pair = tl.arange(0, A * B)
    atom, lane = tl.program_id(0) * A + pair // B, pair % B
    inside = atom < n_atoms
    head, half = tl.arange(0, H)[None, :, None, None], tl.arange(0, S)[None, None, :, None]
    channel = (head * S + half) * D + tl.arange(0, D)[None, None, None, :]
    row, own = atom[:, None, None, None], inside[:, None, None, None]
    sign = 1.0 - 2.0 * tl.arange(0, S)[None, None, :].to(qkv.dtype.element_ty)
    q = tl.load(qkv + row * (3 * F) + channel, mask=own, other=0.0)
    first = tl.load(start + atom, mask=inside, other=0)
    count = tl.load(kept + atom, mask=inside, other=0)
    zero = tl.full(q.shape, 0.0, q.dtype)
    m, mx, my, mz = zero, zero, zero, zero
    for block in range(0, tl.max(count, 0), B):
        here, slot = block + lane < count, first + block + lane
        j = tl.load(sender + slot, mask=here, other=0)[:, None, None, None]
        of_table = tl.load(interval + slot, mask=here, other=0)
        t = tl.load(place + 4 * slot + 3, mask=here, other=0.0)
        f, _ = envelope((of_table + t) * (CUTOFF / INTERVALS), CUTOFF)
        e, _ = feature(table, of_table, t, channel, F, DEGREE)
        known = here[:, None, None, None]
        k_j = tl.load(qkv + j * (3 * F) + F + channel, mask=known, other=0.0)
        v_j = tl.load(qkv + j * (3 * F) + 2 * F + channel, mask=known, other=0.0)
        activated, _ = silu_and_slope(tl.sum(q * k_j, 3))
        a = tl.sum(sign * activated, 2) * f[:, None]
        carried = v_j * e
        m += carried * a[:, :, None, None]
        if VECTORS:
            mx += carried * tl.load(place + 4 * slot, mask=here, other=0.0)[:, None, None, None]
            my += carried * tl.load(place + 4 * slot + 1, mask=here, other=0.0)[:, None, None, None]
            mz += carried * tl.load(place + 4 * slot + 2, mask=here, other=0.0)[:, None, None, None]
    store_sum(scalar, F, n_atoms, m, A, B)
    if VECTORS:
        store_sum(vector, 3 * F, n_atoms, mx, A, B)
        store_sum(vector + F, 3 * F, n_atoms, my, A, B)
        store_sum(vector + 2 * F, 3 * F, n_atoms, mz, A, B)


@triton.jit
def message_gradient(q, k, v, dm, dmx, dmy, dmz, ux, uy, uz, e, e_slope, f, f_slope, sign):
    """Derivatives of one message, m = v e a and M = (v e) (x) u with a = sum_S sign SiLU(q . k) f.

    Takes dm = dE/dm and dmx, dmy, dmz = dE/dM; returns dE/d(q . k) (P, H, S), dE/d(v e) (P, H, S, D), and per edge (P,)
    dE/dr and the three dE/du.
    """
    activated, activated_slope = silu_and_slope(tl.sum(q * k, 3))
    raw = tl.sum(sign * activated, 2)
    carried = v * e
    da = tl.sum(tl.sum(carried * dm, 3), 2)
    d_logit = sign * activated_slope * (da * f[:, None])[:, :, None]
    d_carried = dm * (raw * f[:, None])[:, :, None, None]
    d_carried += dmx * ux[:, None, None, None] + dmy * uy[:, None, None, None] + dmz * uz[:, None, None, None]
    flat: tl.constexpr = (v.shape[0], v.shape[1] * v.shape[2] * v.shape[3])
    along = tl.sum(tl.reshape(d_carried * v * e_slope, flat), 1) + tl.sum(raw * da, 1) * f_slope
    gx = tl.sum(tl.reshape(carried * dmx, flat), 1)
    gy = tl.sum(tl.reshape(carried * dmy, flat), 1)
    gz = tl.sum(tl.reshape(carried * dmz, flat), 1)
    return d_logit, d_carried, along, gx, gy, gz


@triton.jit
def messages_backward_kernel(
    qkv, start, kept, sender, interval, place, table, d_scalar, d_vector, d_qkv, gradient, n_atoms,
    CUTOFF: tl.constexpr, INTERVALS: tl.constexpr, DEGREE: tl.constexpr, H: tl.constexpr, S: tl.constexpr,
    D: tl.constexpr, VECTORS: tl.constexpr, A: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """Backward of ``messages_kernel``: d_qkv (n, 3 F), and dE/du, dE/dr added to gradient (4) of each edge.

    The row of i holds what i receives from j, and by the symmetry of the list what it sends to j, with -u for u: both
    give their share of the gradient, the first dE/dq_i, the second dE/dk_i and dE/dv_i.
    """
    F: tl.constexpr = H * S * D
    kind = qkv.dtype.element_ty
    pair = tl.arange(0, A * B)
    atom, lane = tl.program_id(0) * A + pair // B, pair % B
    inside = atom < n_atoms
    head, half = tl.arange(0, H)[None, :, None, None], tl.arange(0, S)[None, None, :, None]
    channel = (head * S + half) * D + tl.arange(0, D)[None, None, None, :]
    row, own = atom[:, None, None, None], inside[:, None, None, None]
    sign = 1.0 - 2.0 * tl.arange(0, S)[None, None, :].to(kind)
    q = tl.load(qkv + row * (3 * F) + channel, mask=own, other=0.0)
    k = tl.load(qkv + row * (3 * F) + F + channel, mask=own, other=0.0)
    v = tl.load(qkv + row * (3 * F) + 2 * F + channel, mask=own, other=0.0)
    dm = tl.load(d_scalar + row * F + channel, mask=own, other=0.0)
    zero = tl.full(q.shape, 0.0, q.dtype)
    dmx, dmy, dmz = zero, zero, zero
    if VECTORS:
        dmx = tl.load(d_vector + row * (3 * F) + channel, mask=own, other=0.0)
        dmy = tl.load(d_vector + row * (3 * F) + F + channel, mask=own, other=0.0)
        dmz = tl.load(d_vector + row * (3 * F) + 2 * F + channel, mask=own, other=0.0)
    first = tl.load(start + atom, mask=inside, other=0)
    count = tl.load(kept + atom, mask=inside, other=0)
    dq, dk, dv = zero, zero, zero
    for block in range(0, tl.max(count, 0), B):
        here, slot = block + lane < count, first + block + lane
        j, known = tl.load(sender + slot, mask=here, other=0)[:, None, None, None], here[:, None, None, None]
        of_table = tl.load(interval + slot, mask=here, other=0)
        ux = tl.load(place + 4 * slot, mask=here, other=0.0)
        uy = tl.load(place + 4 * slot + 1, mask=here, other=0.0)
        uz = tl.load(place + 4 * slot + 2, mask=here, other=0.0)
        t = tl.load(place + 4 * slot + 3, mask=here, other=0.0)
        f, f_slope = envelope((of_table + t) * (CUTOFF / INTERVALS), CUTOFF)
        e, e_slope = feature(table, of_table, t, channel, F, DEGREE)
        e_slope *= INTERVALS / CUTOFF
        q_j = tl.load(qkv + j * (3 * F) + channel, mask=known, other=0.0)
        k_j = tl.load(qkv + j * (3 * F) + F + channel, mask=known, other=0.0)
        v_j = tl.load(qkv + j * (3 * F) + 2 * F + channel, mask=known, other=0.0)
        dm_j = tl.load(d_scalar + j * F + channel, mask=known, other=0.0)
        dmx_j, dmy_j, dmz_j = zero, zero, zero
        if VECTORS:
            dmx_j = tl.load(d_vector + j * (3 * F) + channel, mask=known, other=0.0)
            dmy_j = tl.load(d_vector + j * (3 * F) + F + channel, mask=known, other=0.0)
            dmz_j = tl.load(d_vector + j * (3 * F) + 2 * F + channel, mask=known, other=0.0)
        d_logit, _, along, gx, gy, gz = message_gradient(  # i receives
            q, k_j, v_j, dm, dmx, dmy, dmz, ux, uy, uz, e, e_slope, f, f_slope, sign
        )
        dq += d_logit[:, :, :, None] * k_j
        d_logit, d_carried, along_out, gx_out, gy_out, gz_out = message_gradient(  # i sends
            q_j, k, v, dm_j, dmx_j, dmy_j, dmz_j, -ux, -uy, -uz, e, e_slope, f, f_slope, sign
        )
        dk += tl.where(known, d_logit[:, :, :, None] * q_j, 0.0)
        dv += tl.where(known, d_carried * e, 0.0)
        at = gradient + 4 * slot
        tl.store(at, tl.load(at, mask=here) + gx - gx_out, mask=here)
        tl.store(at + 1, tl.load(at + 1, mask=here) + gy - gy_out, mask=here)
        tl.store(at + 2, tl.load(at + 2, mask=here) + gz - gz_out, mask=here)
        tl.store(at + 3, tl.load(at + 3, mask=here) + along + along_out, mask=here)
    store_sum(d_qkv, 3 * F, n_atoms, dq, A, B)
    store_sum(d_qkv + F, 3 * F, n_atoms, dk, A, B)
    store_sum(d_qkv + 2 * F, 3 * F, n_atoms, dv, A, B)


def launch(kernel: Any, n_atoms: int, *arrays: torch.Tensor | None, lanes: int, warps: int, **settings: Any) -> None:
    """Launch a kernel over all atoms: on a GPU one atom and so many lanes of neighbours for a program of so many warps.

    The interpreter is quickest with as many atoms and neighbours at a time as possible.
    """
    atoms, lanes = (triton.next_power_of_2(min(n_atoms, 32)), 64) if INTERPRETED else (1, lanes)
    kernel[(triton.cdiv(n_atoms, atoms),)](*arrays, n_atoms, A=atoms, B=lanes, num_warps=warps, **settings)


@dataclass(frozen=True)
class Edges:
    """The edges i <- j within the cutoff, filled by ``triton_pairs.edges_kernel``.

    start (n + 1,) and kept (n,) int32, where a row begins and how many edges it has; sender (edges,) and interval
    (edges,) int32; place (edges, 4); gradient (edges, 4) receives dE/du and dE/dr.
    """

    start: torch.Tensor
    kept: torch.Tensor
    sender: torch.Tensor
    interval: torch.Tensor
    place: torch.Tensor
    gradient: torch.Tensor

    @classmethod
    def empty(cls, rows: Rows, dtype: torch.dtype) -> "Edges":
        """Make room for as many edges as there are neighbours in the list."""
        whole = (torch.empty_like(rows.start[1:]), torch.empty_like(rows.index), torch.empty_like(rows.index))
        real = (rows.index.new_empty(rows.capacity, 4, dtype=dtype) for _ in range(2))
        return cls(rows.start, *whole, *real)


class _Layer:
    """One layer of the transformer (``nn/get.py``): forward, and backward with what forward left behind."""

    LANES, WARPS = 4, 4  # compiled for F = 64, the backward kernel then keeps all its numbers in registers

    def __init__(self, layer: Any, table: torch.Tensor, settings: dict[str, Any]) -> None:
        self.norm, self.out, self.mix, self.gate = layer.norm, layer.out, layer.mix, layer.gate
        self.qkv_weight, self.qkv_bias = (
            layer._parts_together(tensor).detach().contiguous() for tensor in (layer.qkv.weight, layer.qkv.bias)
        )
        self.table, self.writes_vectors = table, layer.writes_vectors
        self.settings = settings | {"VECTORS": layer.writes_vectors}

    def forward(
        self, h: torch.Tensor, v: torch.Tensor | None, edges: Edges
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """h (n, F), v (n, 3, F) -> the same after this layer; equations in ``nn.get.Layer``."""
        n_atoms, channels = h.shape
        self.h = h
        y, self.mean, self.rstd = torch.native_layer_norm(
            h, (channels,), self.norm.weight, self.norm.bias, self.norm.eps
        )
        self.qkv = linear(y, self.qkv_weight, self.qkv_bias)
        scalar = torch.empty_like(h)
        vector = h.new_empty(n_atoms, 3, channels) if self.writes_vectors else None
        self._launch(messages_kernel, edges, scalar, vector)
        if self.gate is not None:
            self.gated = linear(scalar, self.gate.weight)
            scalar = silu(self.gated) + scalar
        out = linear(scalar, self.out.weight, self.out.bias)
        if self.mix is None or v is None:
            return h + out, vector
        *self.o1, self.o2, o3 = out.split(channels, dim=1)
        self.u1, self.u2, *self.u3 = linear(v, self.mix.weight).split(channels, dim=2)
        self.s = (self.u1 * self.u2).sum(1)
        h = h + self.s * self.o2 + o3
        return h, None if vector is None else v + self.u3[0] * self.o1[0][:, None, :] + vector

    def backward(
        self, dh: torch.Tensor, dv: torch.Tensor | None, edges: Edges
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """dE/dh, dE/dv after this layer -> the same before it; adds the gradient of the edges."""
        d_vector, d_out = dv, dh
        if self.mix is not None:
            ds = self.o2 * dh
            d_mixed = [ds[:, None, :] * self.u2, ds[:, None, :] * self.u1]
            parts = [self.s * dh, dh]
            if dv is not None:
                parts.insert(0, (dv * self.u3[0]).sum(1))
                d_mixed.append(dv * self.o1[0][:, None, :])
            d_out = torch.cat(parts, dim=1)
            through = torch.cat(d_mixed, dim=2) @ self.mix.weight
            dv = through if dv is None else dv + through
        d_scalar = d_out @ self.out.weight
        if self.gate is not None:
            d_scalar = d_scalar + torch.ops.aten.silu_backward(d_scalar, self.gated) @ self.gate.weight
        d_qkv = torch.empty_like(self.qkv)
        self._launch(messages_backward_kernel, edges, d_scalar, d_vector, d_qkv, edges.gradient)
        dy = d_qkv @ self.qkv_weight
        through, _, _ = torch.ops.aten.native_layer_norm_backward(
            dy, self.h, self.norm.normalized_shape, self.mean, self.rstd, self.norm.weight, self.norm.bias,
            (True, False, False),
        )  # fmt: skip
        return dh + through, dv

    def _launch(self, kernel: Any, edges: Edges, *arrays: torch.Tensor | None) -> None:
        launch(
            kernel, len(self.h), self.qkv, edges.start, edges.kept, edges.sender, edges.interval, edges.place,
            self.table, *arrays, lanes=self.LANES, warps=self.WARPS, **self.settings,
        )  # fmt: skip


class Network:
    """Embedding, layers and heads of a force field, with the radial table (intervals, degree + 1, F)."""

    def __init__(self, force_field: ForceField, feature_table: torch.Tensor) -> None:
        config = force_field.config.network
        halves = 2 if config.attention == "gedt" else 1
        intervals, degree = FEATURE_TABLE[force_field.dtype]
        settings = {
            "CUTOFF": config.cutoff, "INTERVALS": intervals, "DEGREE": degree, "H": config.heads, "S": halves,
            "D": config.channels // config.heads // halves,
        }  # fmt: skip
        self.embedding = force_field.embedding.weight
        table = feature_table.to(self.embedding).contiguous()
        self.layers = [_Layer(layer, table, settings) for layer in force_field.network.layers]
        self.heads = (force_field.energy_head, force_field.charge_head)

    def forward(self, numbers: torch.Tensor, edges: Edges) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what the heads say of each atom, energy and charge, (n,); keep their gradients for ``backward``."""
        h, v = self.embedding[numbers], None
        for layer in self.layers:
            h, v = layer.forward(h, v, edges)
        (energy, self._energy_gradient), (charge, self._charge_gradient) = (_head(head, h) for head in self.heads)
        return energy, charge

    def backward(self, charge_adjoint: torch.Tensor, edges: Edges) -> None:
        """Add dE/du, dE/dr to ``edges.gradient``; charge_adjoint (n,) = dE/d(charge head), energy counts as it is."""
        dh = self._energy_gradient + charge_adjoint[:, None] * self._charge_gradient
        dv = None
        for layer in reversed(self.layers):
            dh, dv = layer.backward(dh, dv, edges)


def _head(head: Any, h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return F -> F/2 -> F/2 -> 1 with SiLU between, (n,), and its gradient in h, (n, F)."""
    first, second, last = head[0], head[2], head[4]
    z1 = linear(h, first.weight, first.bias)
    z2 = linear(silu(z1), second.weight, second.bias)
    value = linear(silu(z2), last.weight, last.bias)
    d2 = torch.ops.aten.silu_backward(last.weight.expand_as(z2), z2)
    d1 = torch.ops.aten.silu_backward(d2 @ second.weight, z1)
    return value[:, 0], d1 @ first.weight
