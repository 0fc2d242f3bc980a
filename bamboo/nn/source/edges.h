// What an edge knows of its length r: the radial basis and the edge features, with their derivative along r.
//
//     phi_k = f G_k    G_k = exp(-beta_k (x - mu_k)^2)    x = exp(-decay r)    f = (cos(pi r / r_c) + 1) / 2
//     z = W phi        e = silu(z)                        e' = silu'(z) z'
//
// Arrays with a leading 2 hold the value first and the derivative along r second; the matrix products with W are done
// outside.
#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

#include "functions.h"

namespace {

template <class T> struct Basis {
    int64_t n_edges;
    int n_radial, threads;
    double decay, cutoff;
    const T *r, *means, *betas;

    // Envelope, its slope, x and its slope at one distance.
    struct Point {
        T f, f_slope, x, x_slope;
    };
    Point at(int64_t p) const {
        const double wave = M_PI / cutoff, distance = std::min(double(r[p]), cutoff), x = std::exp(-decay * double(r[p]));
        return {T(0.5 * (std::cos(wave * distance) + 1.0)), T(-0.5 * wave * std::sin(wave * distance)), T(x), T(-decay * x)};
    }

    // phi (2, n_edges, n_radial)
    void forward(T *phi) const {
        T *slope = phi + n_edges * n_radial;
#pragma omp parallel for schedule(static) num_threads(threads)
        for (int64_t p = 0; p < n_edges; ++p) {
            const Point at_p = at(p);
#pragma omp simd
            for (int k = 0; k < n_radial; ++k) {
                const T d = at_p.x - means[k], gauss = exponential(-betas[k] * d * d);
                phi[p * n_radial + k] = at_p.f * gauss;
                slope[p * n_radial + k] = gauss * (at_p.f_slope - T(2) * betas[k] * d * at_p.x_slope * at_p.f);
            }
        }
    }

    // Gradient of sum g . phi with respect to mu and beta; g (2, n_edges, n_radial).
    void backward(const T *g, T *d_means, T *d_betas) const {
        const T *g_slope = g + n_edges * n_radial;
        std::vector<double> sums(size_t(2) * threads * n_radial, 0.0);
#pragma omp parallel for schedule(static, 1) num_threads(threads)
        for (int t = 0; t < threads; ++t) {
            std::vector<T> on_means(n_radial, T(0)), on_betas(n_radial, T(0));
            for (int64_t p = n_edges * t / threads; p < n_edges * (t + 1) / threads; ++p) {
                const Point at_p = at(p);
                T *mean = on_means.data(), *beta = on_betas.data();
#pragma omp simd
                for (int k = 0; k < n_radial; ++k) {
                    const T d = at_p.x - means[k], gauss = exponential(-betas[k] * d * d), twice = T(2) * betas[k] * d;
                    const T f = at_p.f, x_slope = at_p.x_slope, value = f * gauss;
                    const T slope = gauss * (at_p.f_slope - twice * x_slope * f);
                    const T on_value = g[p * n_radial + k], on_slope = g_slope[p * n_radial + k];
                    mean[k] += on_value * value * twice + on_slope * (slope * twice + T(2) * betas[k] * x_slope * value);
                    beta[k] -= on_value * value * d * d + on_slope * (slope * d * d + T(2) * d * x_slope * value);
                }
            }
            for (int k = 0; k < n_radial; ++k) {
                sums[size_t(2 * t) * n_radial + k] = on_means[k];
                sums[size_t(2 * t + 1) * n_radial + k] = on_betas[k];
            }
        }
        for (int k = 0; k < n_radial; ++k) {
            double mean = 0.0, beta = 0.0;
            for (int t = 0; t < threads; ++t) {
                mean += sums[size_t(2 * t) * n_radial + k];
                beta += sums[size_t(2 * t + 1) * n_radial + k];
            }
            d_means[k] = T(mean);
            d_betas[k] = T(beta);
        }
    }
};

// z (2, size) -> (e, e') (2, size)
template <class T> void activate(int64_t size, int threads, const T *z, T *e) {
#pragma omp parallel for simd schedule(static) num_threads(threads)
    for (int64_t c = 0; c < size; ++c) {
        const T l = logistic(z[c]);
        e[c] = z[c] * l;
        e[size + c] = silu_slope(z[c], l) * z[size + c];
    }
}

// Gradient of sum g . e + g_slope . e' with respect to (z, z').
template <class T> void activate_backward(int64_t size, int threads, const T *z, const T *g, const T *g_slope, T *d_z) {
#pragma omp parallel for simd schedule(static) num_threads(threads)
    for (int64_t c = 0; c < size; ++c) {
        const T l = logistic(z[c]), slope = silu_slope(z[c], l);
        d_z[c] = g[c] * slope + g_slope[c] * silu_bend(z[c], l) * z[size + c];
        d_z[size + c] = g_slope[c] * slope;
    }
}

// out_p = sum_c a_pc b_pc
template <class T> void contract(int64_t rows, int columns, int threads, const T *a, const T *b, T *out) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t p = 0; p < rows; ++p) {
        T sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int c = 0; c < columns; ++c) sum += a[p * columns + c] * b[p * columns + c];
        out[p] = sum;
    }
}

// Gradient of sum_p g_p out_p with respect to a and b.
template <class T>
void contract_backward(int64_t rows, int columns, int threads, const T *a, const T *b, const T *g, T *d_a, T *d_b) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t p = 0; p < rows; ++p)
#pragma omp simd
        for (int c = 0; c < columns; ++c) {
            d_a[p * columns + c] = g[p] * b[p * columns + c];
            d_b[p * columns + c] = g[p] * a[p * columns + c];
        }
}

}  // namespace
