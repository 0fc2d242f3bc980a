"""The graph equivariant transformer (GET) and its differential variant (GEDT).

Gong et al., Nature Machine Intelligence 7, 543 (2025). Every atom carries F scalars h and F vectors v. A layer reads
the scalars of the neighbours, weighs them with an attention without softmax (so that sums stay local and the energy
extensive), and lets scalars and vectors of one atom talk to each other. Only scalars of neighbours are read.

Continuity: edge features are SiLU(W phi(r)) without bias and the attention carries the envelope, so that every message
and its derivative vanish at the cutoff. A bias, or an activation with act(0) != 0, would break that.
"""

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.functional import silu

from bamboo.errors import InputError
from bamboo.nn import fused
from bamboo.nn.radial import RadialBasis, cosine_envelope, safe_norm


@dataclass(frozen=True)
class NetworkConfig:
    """Size and kind of the network.

    channels   F, scalars (and vectors) per atom
    heads      attention heads; each sees channels / heads channels
    layers     message-passing layers; the receptive field is layers * cutoff
    n_radial   K, radial basis functions
    cutoff     Å
    attention  "get": a = SiLU(q.k) f;  "gedt": a = (SiLU(q1.k1) - SiLU(q2.k2)) f over halves of q and k
    """

    channels: int = 64
    heads: int = 16
    layers: int = 3
    n_radial: int = 32
    cutoff: float = 5.0
    attention: str = "get"

    def __post_init__(self) -> None:
        if self.attention not in ("get", "gedt"):
            raise InputError(f"network.attention is '{self.attention}', expected 'get' or 'gedt'.")
        width = 2 * self.heads if self.attention == "gedt" else self.heads
        if min(self.channels, self.heads, self.n_radial) < 1 or self.channels % width:
            raise InputError(f"network.channels = {self.channels} must be a positive multiple of {width}.")
        if self.layers < 2:
            raise InputError(f"network.layers = {self.layers}, expected at least 2.")
        if not self.cutoff > 0:
            raise InputError(f"network.cutoff = {self.cutoff} Å, expected a positive length.")


@dataclass(frozen=True)
class Edges:
    """Everything a layer needs to know about the edges, computed once for all layers.

    i, j (n_edges,) receiver and sender; feature (n_edges, F); envelope (n_edges,); direction (n_edges, 3), length 1;
    pairs, where the native library does the messages: the arrays then hold one row per pair instead of one per edge.
    """

    i: torch.Tensor
    j: torch.Tensor
    feature: torch.Tensor
    envelope: torch.Tensor
    direction: torch.Tensor
    pairs: fused.Pairs | None = None


def messages(
    qkv: torch.Tensor, edges: Edges, *, heads: int, differential: bool, vectors: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gather, attend and sum over the neighbours.

    m_i = sum_j v_j * e_ij * a_ij, (n, F), and M_i = sum_j (v_j * e_ij) (x) u_ij, (n, 3, F), with the attention
    a_ij = SiLU(sum_d q_i k_j) f(r_ij) per head; qkv (n, 3 F) is q | k | v, the channels of one head contiguous.
    Without vectors, as in the last layer, M is empty. The native library does the same where it can
    (``edges.pairs``); what follows is the definition.
    """
    if edges.pairs is not None:
        return fused.messages(qkv, edges.feature, edges.envelope, edges.direction, edges.pairs, vectors=vectors)
    q, k, v = qkv.chunk(3, dim=-1)
    n_atoms, channels = v.shape
    i, j = edges.i, edges.j
    product = q[i] * k[j]
    if differential:
        logits = product.view(-1, heads, 2, channels // heads // 2).sum(-1)
        attention = silu(logits[..., 0]) - silu(logits[..., 1])
    else:
        attention = silu(product.view(-1, heads, channels // heads).sum(-1))
    attention = attention * edges.envelope[:, None]  # (n_edges, heads)
    carried = v[j] * edges.feature  # (n_edges, F)
    weighed = (carried.view(-1, heads, channels // heads) * attention[..., None]).view(-1, channels)
    scalar = torch.zeros_like(v).index_add(0, i, weighed)
    if not vectors:
        return scalar, v.new_zeros(0)
    vector = v.new_zeros(n_atoms, 3, channels).index_add(0, i, carried[:, None, :] * edges.direction[:, :, None])
    return scalar, vector


class Layer(nn.Module):
    """One layer of the transformer; ``reads_vectors`` and ``writes_vectors`` tell first, middle and last layer apart.

    y = LayerNorm(h);  q, k, v = W_qkv y + b;  m, M = messages(q, k, v)
    (GEDT: m <- m + SiLU(W_g m))
    U1, U2, U3 = W_vec v;  s = sum_xyz U1 * U2;  o1, o2, o3 = W_o m + b
    h <- h + s * o2 + o3;  v <- v + U3 * o1 + M
    The first layer has v = 0 and needs o3 only; the last writes no vectors and needs neither U3 nor o1.
    """

    def __init__(self, config: NetworkConfig, *, reads_vectors: bool, writes_vectors: bool) -> None:
        super().__init__()
        channels = config.channels
        self.heads, self.differential = config.heads, config.attention == "gedt"
        self.reads_vectors, self.writes_vectors = reads_vectors, writes_vectors
        self.norm = nn.LayerNorm(channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        parts = 1 if not reads_vectors else 3 if writes_vectors else 2
        self.out = nn.Linear(channels, parts * channels)
        self.mix = nn.Linear(channels, parts * channels, bias=False) if reads_vectors else None
        self.gate = nn.Linear(channels, channels, bias=False) if self.differential else None

    def forward(
        self, h: torch.Tensor, v: torch.Tensor | None, edges: Edges
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the new scalars (n, F) and vectors (n, 3, F); the last layer returns no vectors."""
        weight, bias = (self._parts_together(tensor) for tensor in (self.qkv.weight, self.qkv.bias))
        y = self.norm(h) if edges.pairs is None else fused.layer_norm(h, self.norm)
        qkv = nn.functional.linear(y, weight, bias)
        scalar, vector = messages(
            qkv, edges, heads=self.heads, differential=self.differential, vectors=self.writes_vectors
        )
        if self.gate is not None:
            scalar = silu(self.gate(scalar)) + scalar
        out = self.out(scalar)
        if self.mix is None or v is None:
            return h + out, vector
        change, turn = self._update(out, self.mix(v), native=edges.pairs is not None)
        return h + change, v + turn + vector if self.writes_vectors else None

    def _update(self, out: torch.Tensor, mixed: torch.Tensor, *, native: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Return s * o2 + o3, (n, F), and U3 * o1, (n, 3, F); the last layer has no use for the second."""
        channels = self.norm.normalized_shape[0]
        if native:
            return fused.update(out, mixed, channels=channels)
        u1, u2, *u3 = mixed.split(channels, dim=-1)
        *o1, o2, o3 = out.split(channels, dim=-1)
        return (u1 * u2).sum(1) * o2 + o3, u3[0] * o1[0][:, None, :] if self.writes_vectors else mixed.new_zeros(0)

    def _parts_together(self, parameter: torch.Tensor) -> torch.Tensor:
        """Return the rows of W_qkv, stored q | k | v within each head, as all of q, all of k, all of v."""
        rows = parameter.view(self.heads, 3, -1, *parameter.shape[1:])
        return rows.transpose(0, 1).reshape(parameter.shape)


class GraphEquivariantTransformer(nn.Module):
    """Atomic numbers and edge vectors in, one invariant feature vector per atom out."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.config = config
        self.radial = RadialBasis(config.n_radial, config.cutoff)
        self.edge = nn.Linear(config.n_radial, config.channels, bias=False)
        last = config.layers - 1
        self.layers = nn.ModuleList(
            Layer(config, reads_vectors=index > 0, writes_vectors=index < last) for index in range(config.layers)
        )

    def forward(self, h: torch.Tensor, edge_vec: torch.Tensor, edge_index: torch.Tensor) -> torch.Tensor:
        """Return the scalars of the last layer, (n, F).

        h (n, F) element embedding; edge_vec (n_edges, 3) Å, r_j - r_i; edge_index (2, n_edges), i receives, j sends.
        """
        pairs = fused.pairs_of(edge_index, edge_vec, n_atoms=len(h), config=self.config)
        if pairs is not None:
            edge_vec = edge_vec.index_select(0, pairs.kept)
        distance = safe_norm(edge_vec)
        edges = Edges(
            i=edge_index[0],
            j=edge_index[1],
            feature=self.edge_feature(distance) if pairs is None else self._fused_edge_feature(distance),
            envelope=cosine_envelope(distance, self.config.cutoff),
            direction=edge_vec / distance[:, None],
            pairs=pairs,
        )
        v = None
        for layer in self.layers:
            h, v = layer(h, v, edges)
        return h

    def edge_feature(self, distance: torch.Tensor) -> torch.Tensor:
        """Return e(r) = SiLU(W phi(r)), (n_edges, F); it vanishes at the cutoff."""
        envelope = cosine_envelope(distance, self.config.cutoff)
        return silu(self.edge(self.radial(distance, envelope)))

    def _fused_edge_feature(self, distance: torch.Tensor) -> torch.Tensor:
        """Return ``edge_feature`` by the native library."""
        return fused.edge_features(
            distance, self.radial, self.edge.weight, cutoff=self.config.cutoff, plain=self.edge_feature
        )


def mlp(channels: int) -> nn.Sequential:
    """Return a head: F -> F/2 -> F/2 -> 1 with SiLU between."""
    half = channels // 2
    return nn.Sequential(nn.Linear(channels, half), nn.SiLU(), nn.Linear(half, half), nn.SiLU(), nn.Linear(half, 1))
