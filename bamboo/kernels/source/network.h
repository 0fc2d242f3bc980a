// The graph equivariant transformer on one system: energy, raw charges, and the backward pass through both.
//
// Every sum runs over the rows of one atom, so atoms are worked through in blocks, in any order and on any thread, with
// the same result. A block does everything that needs no other block at once: messages, node update, next q, k, v.
#pragma once

#include <algorithm>

#include "blocks.h"
#include "messages.h"

namespace bamboo {

constexpr int BLOCK = 24;  // atoms per block: its temporaries stay in the first-level cache

// The atoms of a system and their edges within the cutoff; row i starts at row_start[i].
template <typename real>
struct Graph {
    int32_t n_atoms = 0;
    const int32_t* numbers = nullptr;
    const int64_t* row_start = nullptr;
    const int32_t* row_count = nullptr;
    const Edge<real>* edges = nullptr;
    Row<real> row(int32_t i) const { return {edges + row_start[i], edges + row_start[i] + row_count[i]}; }
};

template <typename real>
class Network {
  public:
    Table<real> table;  // e(r) in stored channel order

    void prepare(const Parameters& parameters);
    // fills a.energy, a.charge and their gradients
    void forward(const Graph<real>& graph, Activations<real>& a, int threads) const;
    // charge_adjoint (n,) = dE/d(charge head); adds dE/dr, dE/du of every edge to geometry (4 per edge slot)
    void backward(const Graph<real>& graph, Activations<real>& a, const real* charge_adjoint, real* geometry,
                  int threads) const;

  private:
    struct Workspace {
        std::vector<real> m, M, y, z, work;
        explicit Workspace(int F)
            : m(BLOCK * F), M(BLOCK * 3 * F), y(BLOCK * 3 * F), z(BLOCK * 9 * F), work(BLOCK * 4 * F) {}
    };
    using Forward = void (*)(const LayerView<real>&, int32_t, Row<real>, real*, real*);
    using Backward = void (*)(const LayerView<real>&, int32_t, Row<real>, real*, real*);
    template <int L, int D, bool DIFFERENTIAL>
    bool choose(int lanes, int groups, bool differential);

    void prepare_layer(Layer<real>&, const Parameters&, const std::string& name, const ChannelOrder&);
    void prepare_elements();
    void node_forward(const Graph<real>&, Activations<real>&, int l, int begin, int end, Workspace&) const;
    void next_qkv(Activations<real>&, int l, int begin, int end, Workspace&) const;
    void node_backward(Activations<real>&, int l, int begin, int end, Workspace&) const;
    void qkv_backward(Activations<real>&, int l, int begin, int end, Workspace&) const;
    LayerView<real> view(const Graph<real>&, const Activations<real>&, int l) const;

    int F = 0;
    bool differential_ = false;
    std::vector<Layer<real>> layers_;
    Head<real> energy_head_, charge_head_;
    std::vector<real> embedding_, element_qkv_;  // (ELEMENTS, F), (ELEMENTS, 3 F)
    Forward forward_vectors_ = nullptr, forward_last_ = nullptr;
    Backward backward_first_ = nullptr, backward_middle_ = nullptr, backward_last_ = nullptr;
};

template <typename real>
template <int L, int D, bool DIFFERENTIAL>
bool Network<real>::choose(int lanes, int groups, bool differential) {
    if (lanes != L || groups != D || differential != DIFFERENTIAL) return false;
    using M = Messages<real, L, D, DIFFERENTIAL>;
    forward_vectors_ = M::template forward<true>;
    forward_last_ = M::template forward<false>;
    backward_first_ = M::template backward<true, false>;
    backward_middle_ = M::template backward<true, true>;
    backward_last_ = M::template backward<false, true>;
    return true;
}

template <typename real>
void Network<real>::prepare(const Parameters& parameters) {
    F = parameters.count("channels");
    differential_ = parameters.count("differential") != 0;
    const int heads = parameters.count("heads"), n_layers = parameters.count("layers");
    const int halves = differential_ ? 2 : 1, L = heads * halves, D = F / L;
    const bool known = choose<16, 4, false>(L, D, differential_) || choose<16, 4, true>(L, D, differential_) ||
                       choose<8, 4, false>(L, D, differential_) || choose<8, 4, true>(L, D, differential_) ||
                       choose<4, 4, false>(L, D, differential_) || choose<8, 2, true>(L, D, differential_) ||
                       choose<16, 8, false>(L, D, differential_) || choose<16, 8, true>(L, D, differential_);
    if (!known) throw std::runtime_error("no kernel for this number of channels and heads");
    const ChannelOrder order(F, heads, halves);
    layers_ = std::vector<Layer<real>>(n_layers);
    for (int l = 0; l < n_layers; ++l) {
        layers_[l].reads_vectors = l > 0;
        layers_[l].writes_vectors = l < n_layers - 1;
        prepare_layer(layers_[l], parameters, "network.layers." + std::to_string(l) + ".", order);
    }
    energy_head_.prepare(parameters, "energy_head", order.natural);
    charge_head_.prepare(parameters, "charge_head", order.natural);

    const std::vector<double>& features = parameters.array("feature_table");  // e(r)
    table.degree = FEATURE_DEGREE<real>;
    table.channels = F;
    table.intervals = int(features.size() / (size_t(table.degree + 1) * F));
    table.inverse_width = real(table.intervals / parameters.number("cutoff"));
    table.coefficients.resize(features.size());
    for (size_t row = 0; row < features.size() / F; ++row)
        for (int c = 0; c < F; ++c) table.coefficients[row * F + c] = real(features[row * F + order.value[c]]);
    embedding_ = converted<real>(parameters.array("embedding.weight"));
    prepare_elements();
}

template <typename real>
void Network<real>::prepare_layer(Layer<real>& layer, const Parameters& parameters, const std::string& name,
                                  const ChannelOrder& order) {
    layer.norm_weight = converted<real>(parameters.array(name + "norm.weight"));
    layer.norm_bias = converted<real>(parameters.array(name + "norm.bias"));
    layer.qkv.pack(parameters.array(name + "qkv.weight"), order.qkv, order.natural);
    layer.qkv.bias(parameters.array(name + "qkv.bias"), order.qkv);
    const std::vector<int>&h = order.natural, &v = order.value;
    const bool middle = layer.reads_vectors && layer.writes_vectors;
    const std::vector<int> o_order = middle ? joined({&v, &h, &h}) : layer.reads_vectors ? joined({&h, &h}) : h;
    const std::vector<int> U_order = middle ? joined({&h, &h, &v}) : joined({&h, &h});
    layer.out.pack(parameters.array(name + "out.weight"), o_order, v);
    layer.out.bias(parameters.array(name + "out.bias"), o_order);
    if (layer.reads_vectors) layer.mix.pack(parameters.array(name + "mix.weight"), U_order, v);
    if (differential_) layer.gate.pack(parameters.array(name + "gate.weight"), v, v);
}

// Before the first layer h is the embedding of the element, so its q, k, v are known once and for all.
template <typename real>
void Network<real>::prepare_elements() {
    Activations<real> elements;
    elements.layers = std::vector<typename Activations<real>::PerLayer>(1);
    auto& first = elements.layers[0];
    std::memcpy(elements.h.reserve(ELEMENTS * F), embedding_.data(), embedding_.size() * sizeof(real));
    first.qkv.reserve(ELEMENTS * 3 * F);
    first.normed.reserve(ELEMENTS * F);
    first.rstd.reserve(ELEMENTS);
    Workspace work(F);
    for (int begin = 0; begin < ELEMENTS; begin += BLOCK)
        next_qkv(elements, 0, begin, std::min(begin + BLOCK, ELEMENTS), work);
    element_qkv_.assign(first.qkv.data(), first.qkv.data() + ELEMENTS * 3 * F);
}

template <typename real>
LayerView<real> Network<real>::view(const Graph<real>& graph, const Activations<real>& a, int l) const {
    const auto& own = a.layers[l];
    return {&table, l == 0 ? element_qkv_.data() : own.qkv.data(), l == 0 ? graph.numbers : nullptr, own.dm.data(),
            own.dM.data()};
}

// y = LayerNorm(h);  [q|k|v] = W_qkv y + b of layer l
template <typename real>
void Network<real>::next_qkv(Activations<real>& a, int l, int begin, int end, Workspace& w) const {
    const Layer<real>& layer = layers_[l];
    for (int i = begin; i < end; ++i) {
        const real* h = a.h.data() + size_t(i) * F;
        real* normed = a.layers[l].normed.data() + size_t(i) * F;
        real mean = 0, variance = 0;
        for (int c = 0; c < F; ++c) mean += h[c];
        mean /= real(F);
        for (int c = 0; c < F; ++c) variance += (h[c] - mean) * (h[c] - mean);
        const real rstd = real(1) / std::sqrt(variance / real(F) + real(1e-5));
        a.layers[l].rstd[i] = rstd;
        real* y = w.y.data() + (i - begin) * F;
        for (int c = 0; c < F; ++c) {
            normed[c] = (h[c] - mean) * rstd;
            y[c] = normed[c] * layer.norm_weight[c] + layer.norm_bias[c];
        }
    }
    layer.qkv.forward.apply(end - begin, w.y.data(), F, a.layers[l].qkv.data() + size_t(begin) * 3 * F, 3 * F);
}

// m, M -> h, V:  [U1|U2|U3] = W_vec V;  s = sum_xyz U1 U2;  [o1|o2|o3] = W_o m + b;
// h <- h + s o2 + o3;  V <- V + U3 o1 + M
template <typename real>
void Network<real>::node_forward(const Graph<real>& graph, Activations<real>& a, int l, int begin, int end,
                                 Workspace& w) const {
    const Layer<real>& layer = layers_[l];
    auto& saved = a.layers[l];
    const int rows = end - begin, parts = layer.parts(), width = parts * F;
    const LayerView<real> seen = view(graph, a, l);
    for (int i = begin; i < end; ++i) {
        real *m = w.m.data() + (i - begin) * F, *M = w.M.data() + (i - begin) * 3 * F;
        if (!layer.reads_vectors) M = a.V.data() + size_t(i) * 3 * F;
        (layer.writes_vectors ? forward_vectors_ : forward_last_)(seen, i, graph.row(i), m, M);
    }
    if (differential_) {  // m <- SiLU(W_x m) + m
        real *gated = w.z.data(), *slope = saved.gate_slope.data() + size_t(begin) * F;
        layer.gate.forward.apply(rows, w.m.data(), F, gated, F);
        silu(rows * F, gated, slope);
        for (int k = 0; k < rows * F; ++k) w.m[k] += gated[k];
    }
    real* o = saved.o.data() + size_t(begin) * width;
    layer.out.forward.apply(rows, w.m.data(), F, o, width);
    if (!layer.reads_vectors) {
        for (int i = begin; i < end; ++i)
            for (int c = 0; c < F; ++c)
                a.h[size_t(i) * F + c] = embedding_[size_t(graph.numbers[i]) * F + c] + o[(i - begin) * F + c];
        return;
    }
    real* U = saved.U.data() + size_t(begin) * 3 * width;
    layer.mix.forward.apply(3 * rows, a.V.data() + size_t(begin) * 3 * F, F, U, width);
    for (int i = begin; i < end; ++i, o += width, U += 3 * width) {
        const real *o2 = o + (parts - 2) * F, *o3 = o2 + F;
        real* h = a.h.data() + size_t(i) * F;
#pragma omp simd
        for (int c = 0; c < F; ++c) {
            real s = 0;
            for (int x = 0; x < 3; ++x) s += U[x * width + c] * U[x * width + F + c];
            h[c] += s * o2[c] + o3[c];
        }
        if (!layer.writes_vectors) continue;
        real* V = a.V.data() + size_t(i) * 3 * F;
        const real* M = w.M.data() + (i - begin) * 3 * F;
        for (int x = 0; x < 3; ++x)
#pragma omp simd
            for (int c = 0; c < F; ++c) V[x * F + c] += U[x * width + 2 * F + c] * o[c] + M[x * F + c];
    }
}

// Backward of node_forward: reads dh and, where the layer writes vectors, dM = dE/dV after the layer;
// writes dm of this layer and dE/dV before it, which is dM of the layer below.
template <typename real>
void Network<real>::node_backward(Activations<real>& a, int l, int begin, int end, Workspace& w) const {
    const Layer<real>& layer = layers_[l];
    auto& saved = a.layers[l];
    const int rows = end - begin, parts = layer.parts(), width = parts * F;
    const real* dh = a.dh.data() + size_t(begin) * F;
    const real* d_o = dh;  // first layer: o3 alone
    if (layer.reads_vectors) {
        real* d_out = w.y.data();
        real* dU = w.z.data();
        d_o = d_out;
        for (int i = begin; i < end; ++i, d_out += width, dU += 3 * width, dh += F) {
            const real *o = saved.o.data() + size_t(i) * width, *o2 = o + (parts - 2) * F;
            const real* U = saved.U.data() + size_t(i) * 3 * width;
#pragma omp simd
            for (int c = 0; c < F; ++c) {
                real s = 0;
                for (int x = 0; x < 3; ++x) s += U[x * width + c] * U[x * width + F + c];
                d_out[(parts - 2) * F + c] = s * dh[c];
                d_out[(parts - 1) * F + c] = dh[c];
            }
            for (int x = 0; x < 3; ++x)
#pragma omp simd
                for (int c = 0; c < F; ++c) {
                    const real ds = o2[c] * dh[c];
                    dU[x * width + c] = ds * U[x * width + F + c];
                    dU[x * width + F + c] = ds * U[x * width + c];
                }
            if (!layer.writes_vectors) continue;
            const real* dV = saved.dM.data() + size_t(i) * 3 * F;
#pragma omp simd
            for (int c = 0; c < F; ++c) {
                real do1 = 0;
                for (int x = 0; x < 3; ++x) {
                    do1 += dV[x * F + c] * U[x * width + 2 * F + c];
                    dU[x * width + 2 * F + c] = dV[x * F + c] * o[c];
                }
                d_out[c] = do1;
            }
        }
        real* below = a.layers[l - 1].dM.data() + size_t(begin) * 3 * F;
        if (layer.writes_vectors) {
            std::memcpy(below, saved.dM.data() + size_t(begin) * 3 * F, size_t(rows) * 3 * F * sizeof(real));
            layer.mix.transposed.template apply<true>(3 * rows, w.z.data(), width, below, F);
        } else {
            layer.mix.transposed.apply(3 * rows, w.z.data(), width, below, F);
        }
    }
    real* dm = saved.dm.data() + size_t(begin) * F;
    layer.out.transposed.apply(rows, d_o, width, dm, F);
    if (differential_) {
        const real* slope = saved.gate_slope.data() + size_t(begin) * F;
        for (int k = 0; k < rows * F; ++k) w.m[k] = dm[k] * slope[k];
        layer.gate.transposed.template apply<true>(rows, w.m.data(), F, dm, F);
    }
}

// dq, dk, dv (in w.z) -> dh, through W_qkv and the LayerNorm of layer l
template <typename real>
void Network<real>::qkv_backward(Activations<real>& a, int l, int begin, int end, Workspace& w) const {
    const Layer<real>& layer = layers_[l];
    layer.qkv.transposed.apply(end - begin, w.z.data(), 3 * F, w.y.data(), F);
    for (int i = begin; i < end; ++i) {
        const real* normed = a.layers[l].normed.data() + size_t(i) * F;
        real *dy = w.y.data() + (i - begin) * F, *dh = a.dh.data() + size_t(i) * F;
        real mean = 0, projection = 0;
        for (int c = 0; c < F; ++c) {
            dy[c] *= layer.norm_weight[c];
            mean += dy[c];
            projection += dy[c] * normed[c];
        }
        mean /= real(F);
        projection /= real(F);
        for (int c = 0; c < F; ++c) dh[c] += a.layers[l].rstd[i] * (dy[c] - mean - normed[c] * projection);
    }
}

template <typename real>
void Network<real>::forward(const Graph<real>& graph, Activations<real>& a, int threads) const {
    a.reserve(layers_, graph.n_atoms, F, differential_);
    const int n = graph.n_atoms, n_layers = int(layers_.size()), blocks = (n + BLOCK - 1) / BLOCK;
#pragma omp parallel num_threads(threads)
    {
        Workspace work(F);
        for (int l = 0; l < n_layers; ++l) {
#pragma omp for schedule(dynamic)
            for (int block = 0; block < blocks; ++block) {
                const int begin = block * BLOCK, end = std::min(begin + BLOCK, n);
                node_forward(graph, a, l, begin, end, work);
                if (l + 1 < n_layers) {
                    next_qkv(a, l + 1, begin, end, work);
                    continue;
                }
                const size_t at = size_t(begin) * F;
                energy_head_.apply(end - begin, &a.h[at], &a.energy[begin], &a.energy_gradient[at], work.work.data());
                charge_head_.apply(end - begin, &a.h[at], &a.charge[begin], &a.charge_gradient[at], work.work.data());
            }
        }
    }
}

template <typename real>
void Network<real>::backward(const Graph<real>& graph, Activations<real>& a, const real* charge_adjoint,
                             real* geometry, int threads) const {
    const int n = graph.n_atoms, last = int(layers_.size()) - 1, blocks = (n + BLOCK - 1) / BLOCK;
#pragma omp parallel num_threads(threads)
    {
        Workspace work(F);
#pragma omp for schedule(dynamic)
        for (int block = 0; block < blocks; ++block) {
            const int begin = block * BLOCK, end = std::min(begin + BLOCK, n);
            for (int i = begin; i < end; ++i)
                for (int c = 0; c < F; ++c) {
                    const size_t k = size_t(i) * F + c;
                    a.dh[k] = a.energy_gradient[k] + charge_adjoint[i] * a.charge_gradient[k];
                }
            node_backward(a, last, begin, end, work);
        }
        for (int l = last; l >= 0; --l) {
            const LayerView<real> seen = view(graph, a, l);
            const Backward kernel = l == 0 ? backward_first_ : l == last ? backward_last_ : backward_middle_;
#pragma omp for schedule(dynamic)
            for (int block = 0; block < blocks; ++block) {
                const int begin = block * BLOCK, end = std::min(begin + BLOCK, n);
                for (int i = begin; i < end; ++i)
                    kernel(seen, i, graph.row(i), geometry + 4 * graph.row_start[i],
                           work.z.data() + (i - begin) * 3 * F);
                if (l == 0) continue;
                qkv_backward(a, l, begin, end, work);
                node_backward(a, l - 1, begin, end, work);
            }
        }
    }
}

}  // namespace bamboo
