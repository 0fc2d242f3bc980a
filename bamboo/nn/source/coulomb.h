// Coulomb energies of pairs, with the gradient in charges and pair vectors, and the gradient of that gradient.
//
//     E_system = weight_system sum_p q_i q_j K(r_p),    K(r) = k_e / (r0 (1 + softplus(x))) - k_e erf(alpha r) / r,
//     x = (r - r0) / r0,    softplus(x) = log(1 + exp(beta x)) / beta
//
// The second term is the long-range part of a periodic box; alpha = 0 for clusters. No pairs beyond the cutoff.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

namespace {

template <class T> struct Coulomb {
    int64_t n_atoms, n_pairs, n_systems;
    const int64_t *i, *j, *system;  // of a pair; system of an atom
    const double *weight;           // of a system
    double strength, contact, sharpness, alpha, cutoff;
    const T *q, *vec;

    struct Kernel {
        T value, slope, bend, inverse;  // K, K', K'', 1 / r
    };
    Kernel at(int64_t p) const {
        const T *d = vec + 3 * p, r = std::sqrt(d[0] * d[0] + d[1] * d[1] + d[2] * d[2]);
        if (r >= T(cutoff)) return {};
        const T inverse = r > 0 ? T(1) / r : T(0), r0 = T(contact), x = (r - r0) / r0, y = T(sharpness) * x;
        T soft = x, rise = 1, bend = 0;  // softplus and its derivatives where it is x to rounding
        if (y < T(20)) {
            const T power = std::exp(y);
            soft = std::log1p(power) / T(sharpness);
            rise = power / (T(1) + power);
            bend = T(sharpness) * rise * (T(1) - rise);
        }
        const T k = T(strength), length = r0 * (T(1) + soft);
        Kernel kernel{k / length, -k * rise / (length * length),
                      k * (T(2) * rise * rise / length - bend / r0) / (length * length), inverse};
        if (alpha > 0) {
            const T a = T(alpha), erf = std::erf(a * r) * inverse;
            const T gauss = a * T(M_2_SQRTPI) * std::exp(-a * a * r * r);
            kernel.value -= k * erf;
            kernel.slope -= k * (gauss - erf) * inverse;
            kernel.bend -= T(2) * k * ((erf - gauss) * inverse * inverse - a * a * gauss);
        }
        return kernel;
    }

    void forward(T *energy) const {
        std::fill_n(energy, n_systems, T(0));
        for (int64_t p = 0; p < n_pairs; ++p) {
            const int64_t in = system[i[p]];
            if (weight[in] != 0) energy[in] += T(weight[in]) * q[i[p]] * q[j[p]] * at(p).value;
        }
    }

    // Gradient of S = sum g E.
    void backward(const T *g, T *d_q, T *d_vec) const {
        std::fill_n(d_q, n_atoms, T(0));
        std::fill_n(d_vec, 3 * n_pairs, T(0));
        for (int64_t p = 0; p < n_pairs; ++p) {
            const T scale = T(weight[system[i[p]]]) * g[system[i[p]]];
            if (scale == 0) continue;
            const Kernel kernel = at(p);
            d_q[i[p]] += scale * q[j[p]] * kernel.value;
            d_q[j[p]] += scale * q[i[p]] * kernel.value;
            for (int c = 0; c < 3; ++c)
                d_vec[3 * p + c] = scale * q[i[p]] * q[j[p]] * kernel.slope * kernel.inverse * vec[3 * p + c];
        }
    }

    // Gradient of P = sum g E-dot, the derivative of S along (t_q, t_vec); with respect to g it is E-dot.
    void second(const T *g, const T *t_q, const T *t_vec, T *energy_dot, T *d_q, T *d_vec) const {
        std::fill_n(energy_dot, n_systems, T(0));
        std::fill_n(d_q, n_atoms, T(0));
        std::fill_n(d_vec, 3 * n_pairs, T(0));
        for (int64_t p = 0; p < n_pairs; ++p) {
            const int64_t a = i[p], b = j[p], in = system[a];
            if (weight[in] == 0) continue;
            const Kernel kernel = at(p);
            const T *d = vec + 3 * p, *t = t_vec + 3 * p, scale = T(weight[in]) * g[in];
            const T r_dot = (d[0] * t[0] + d[1] * t[1] + d[2] * t[2]) * kernel.inverse;
            const T product = q[a] * q[b], product_dot = t_q[a] * q[b] + q[a] * t_q[b];
            energy_dot[in] += T(weight[in]) * (product_dot * kernel.value + product * kernel.slope * r_dot);
            d_q[a] += scale * (t_q[b] * kernel.value + q[b] * kernel.slope * r_dot);
            d_q[b] += scale * (t_q[a] * kernel.value + q[a] * kernel.slope * r_dot);
            const T along_d = product_dot * kernel.slope + product * r_dot * (kernel.bend - kernel.slope * kernel.inverse);
            for (int c = 0; c < 3; ++c)
                d_vec[3 * p + c] = scale * kernel.inverse * (along_d * d[c] + product * kernel.slope * t[c]);
        }
    }
};

}  // namespace
