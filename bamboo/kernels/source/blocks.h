// What the network is made of besides messages: parameters by name, linear layers, heads, what is kept per atom.
#pragma once

#include <initializer_list>
#include <map>
#include <stdexcept>
#include <string>

#include "linear.h"

namespace bamboo {

constexpr int ELEMENTS = 87;  // rows of tables that are indexed by atomic number

// Named arrays of a model file.
class Parameters {
  public:
    void set(const char* name, const double* values, int64_t count) { values_[name].assign(values, values + count); }
    const std::vector<double>& array(const std::string& name) const {
        const auto found = values_.find(name);
        if (found == values_.end()) throw std::runtime_error("parameter '" + name + "' is missing");
        return found->second;
    }
    double number(const std::string& name) const { return array(name).at(0); }
    int count(const std::string& name) const { return int(number(name)); }

  private:
    std::map<std::string, std::vector<double>> values_;
};

template <typename real>
std::vector<real> converted(const std::vector<double>& values) {
    return std::vector<real>(values.begin(), values.end());
}

// Stored channel -> channel of the model file, heads innermost (messages.h).
struct ChannelOrder {
    std::vector<int> natural, query, value, qkv;

    ChannelOrder(int channels, int heads, int halves) : natural(channels), query(channels), value(channels) {
        const int per_head = channels / heads, lanes = heads * halves;
        for (int stored = 0; stored < channels; ++stored) {
            const int d = stored / lanes, half = stored % lanes / heads, head = stored % heads;
            natural[stored] = stored;
            query[stored] = head * per_head + half * (per_head / halves) + d;
            value[stored] = head * per_head + d * halves + half;
        }
        int part = 0;  // in the file q, k, v of one head are contiguous
        for (const std::vector<int>* order : {&query, &query, &value}) {
            for (int channel : *order)
                qkv.push_back(channel / per_head * 3 * per_head + part * per_head + channel % per_head);
            ++part;
        }
    }
};

// The orders of several groups of F outputs, one after the other.
inline std::vector<int> joined(std::initializer_list<const std::vector<int>*> orders) {
    std::vector<int> all;
    for (const std::vector<int>* order : orders) {
        const int offset = int(all.size());
        for (int channel : *order) all.push_back(offset + channel);
    }
    return all;
}

// A linear layer, forward and transposed.
template <typename real>
struct Linear {
    Matrix<real> forward, transposed;
    // out_order, in_order: stored channel -> channel of the model file
    void pack(const std::vector<double>& weight, const std::vector<int>& out_order, const std::vector<int>& in_order) {
        const int outputs = int(out_order.size()), inputs = int(in_order.size());
        if (weight.size() != size_t(outputs) * inputs) throw std::runtime_error("a weight has an unexpected size");
        auto element = [&](int out, int in) { return weight[size_t(out_order[out]) * inputs + in_order[in]]; };
        forward.pack(inputs, outputs, element);
        transposed.pack(outputs, inputs, [&](int out, int in) { return element(in, out); });
    }
    void bias(const std::vector<double>& values, const std::vector<int>& out_order) {
        forward.set_bias([&](int out) { return values.at(out_order[out]); });
    }
};

// A head F -> F/2 -> F/2 -> 1 with SiLU between.
template <typename real>
struct Head {
    Linear<real> first, second;
    std::vector<real> last;
    real last_bias = 0;

    void prepare(const Parameters& parameters, const std::string& name, const std::vector<int>& channels) {
        std::vector<int> half(channels.begin(), channels.begin() + channels.size() / 2);
        first.pack(parameters.array(name + ".0.weight"), half, channels);
        first.bias(parameters.array(name + ".0.bias"), half);
        second.pack(parameters.array(name + ".2.weight"), half, half);
        second.bias(parameters.array(name + ".2.bias"), half);
        last = converted<real>(parameters.array(name + ".4.weight"));
        last_bias = real(parameters.number(name + ".4.bias"));
    }

    // value (rows,) and its gradient (rows, F) for x (rows, F); work holds 4 * rows * F numbers
    void apply(int rows, const real* x, real* value, real* gradient, real* work) const {
        const int half = int(last.size()), channels = 2 * half, count = rows * half;
        real *a = work, *a_slope = a + count, *b = a_slope + count, *b_slope = b + count;
        first.forward.apply(rows, x, channels, a, half);
        silu(count, a, a_slope);
        second.forward.apply(rows, a, half, b, half);
        silu(count, b, b_slope);
        for (int row = 0; row < rows; ++row) {
            real sum = last_bias;
            for (int c = 0; c < half; ++c) {
                sum += b[row * half + c] * last[c];
                b[row * half + c] = last[c] * b_slope[row * half + c];
            }
            value[row] = sum;
        }
        second.transposed.apply(rows, b, half, a, half);
        for (int k = 0; k < count; ++k) a[k] *= a_slope[k];
        first.transposed.apply(rows, a, half, gradient, channels);
    }
};

template <typename real>
struct Layer {
    bool reads_vectors = false, writes_vectors = false;
    std::vector<real> norm_weight, norm_bias;
    Linear<real> qkv, out, mix, gate;
    int parts() const { return !reads_vectors ? 1 : writes_vectors ? 3 : 2; }
};

// Numbers per atom that the backward pass needs, and the adjoints; one set per system.
template <typename real>
struct Activations {
    struct PerLayer {
        Buffer<real> qkv;          // (n, 3 F)
        Buffer<real> normed, rstd;  // (n, F), (n,)   LayerNorm before scale and bias
        Buffer<real> U;            // (n, 3, parts F)
        Buffer<real> o;            // (n, parts F)
        Buffer<real> gate_slope;   // (n, F)
        Buffer<real> dm, dM;       // (n, F), (n, 3, F)
    };
    std::vector<PerLayer> layers;
    Buffer<real> h, V;                              // (n, F), (n, 3, F)
    Buffer<real> energy, charge;                    // (n,)    outputs of the two heads
    Buffer<real> energy_gradient, charge_gradient;  // (n, F)  with respect to the last h
    Buffer<real> dh;                                // (n, F)

    void reserve(const std::vector<Layer<real>>& of, size_t n, int F, bool gated);
};

template <typename real>
void Activations<real>::reserve(const std::vector<Layer<real>>& of, size_t n, int F, bool gated) {
    if (layers.size() != of.size()) layers = std::vector<PerLayer>(of.size());
    for (Buffer<real>* buffer : {&h, &dh, &energy_gradient, &charge_gradient}) buffer->reserve(n * F);
    for (Buffer<real>* buffer : {&energy, &charge}) buffer->reserve(n);
    V.reserve(n * 3 * F);
    for (size_t l = 0; l < of.size(); ++l) {
        PerLayer& saved = layers[l];
        const int width = of[l].parts() * F;
        saved.o.reserve(n * width);
        saved.dm.reserve(n * F);
        if (of[l].writes_vectors) saved.dM.reserve(n * 3 * F);
        if (gated) saved.gate_slope.reserve(n * F);
        if (l == 0) continue;  // its q, k, v belong to the elements, and no vectors come in
        saved.qkv.reserve(n * 3 * F);
        saved.normed.reserve(n * F);
        saved.rstd.reserve(n);
        saved.U.reserve(n * 3 * width);
    }
}

}  // namespace bamboo
