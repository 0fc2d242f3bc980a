// What a layer does to each atom apart from matrix products: the layer norm, and scalars and vectors that talk to each
// other. Each with its gradient, and the derivative of that gradient; a dot marks derivatives along a direction t.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

namespace {

// y = gamma xhat + beta,  xhat = (x - mean x) / sigma,  sigma^2 = mean (x - mean x)^2 + epsilon; rows of n numbers.
template <class T> struct Norm {
    int64_t rows;
    int n, threads;
    double epsilon;
    const T *x, *gamma, *beta;

    // xhat of one row; returns 1 / sigma
    T standardise(int64_t row, T *xhat) const {
        const T *from = x + row * n;
        T mean = 0, square = 0;
#pragma omp simd reduction(+ : mean)
        for (int c = 0; c < n; ++c) mean += from[c];
        mean /= n;
#pragma omp simd reduction(+ : square)
        for (int c = 0; c < n; ++c) square += (from[c] - mean) * (from[c] - mean);
        const T inverse = T(1) / std::sqrt(square / n + T(epsilon));
#pragma omp simd
        for (int c = 0; c < n; ++c) xhat[c] = (from[c] - mean) * inverse;
        return inverse;
    }
    // (p - mean p - xhat mean(p xhat)) / sigma: xhat-dot for p = x-dot, and the gradient of sum p xhat
    void project(const T *p, const T *xhat, T inverse, T *out) const {
        T mean = 0, along = 0;
#pragma omp simd reduction(+ : mean, along)
        for (int c = 0; c < n; ++c) {
            mean += p[c];
            along += p[c] * xhat[c];
        }
        mean /= n;
        along /= n;
#pragma omp simd
        for (int c = 0; c < n; ++c) out[c] = (p[c] - mean - xhat[c] * along) * inverse;
    }

    void forward(T *y) const {
#pragma omp parallel num_threads(threads)
        {
            std::vector<T> xhat(n);
#pragma omp for schedule(static)
            for (int64_t row = 0; row < rows; ++row) {
                standardise(row, xhat.data());
                for (int c = 0; c < n; ++c) y[row * n + c] = gamma[c] * xhat[c] + beta[c];
            }
        }
    }

    // Gradient of S = sum g y.
    void backward(const T *g, T *d_x, T *d_gamma, T *d_beta) const {
        std::fill_n(d_gamma, n, T(0));
        std::fill_n(d_beta, n, T(0));
        std::vector<T> xhat(n), p(n);
        for (int64_t row = 0; row < rows; ++row) {
            const T inverse = standardise(row, xhat.data()), *gr = g + row * n;
            for (int c = 0; c < n; ++c) {
                d_gamma[c] += gr[c] * xhat[c];
                d_beta[c] += gr[c];
                p[c] = gr[c] * gamma[c];
            }
            project(p.data(), xhat.data(), inverse, d_x + row * n);
        }
    }

    // Gradient of P = sum g y-dot; with respect to g it is y-dot = t_gamma xhat + gamma xhat-dot + t_beta.
    // With p = g gamma, c = t_x - mean t_x, k = mean(p xhat), m = mean(c xhat):
    //     d sum(p xhat-dot) / dx = -(xhat (mean(p c) - 3 m k) + k c + m (p - mean p)) / sigma^2
    void second(const T *g, const T *t_x, const T *t_gamma, const T *t_beta, T *y_dot, T *d_x, T *d_gamma,
                T *d_beta) const {
        std::fill_n(d_gamma, n, T(0));
        std::fill_n(d_beta, n, T(0));
        std::vector<T> xhat(n), xhat_dot(n), p(n), on_xhat(n);
        for (int64_t row = 0; row < rows; ++row) {
            const T inverse = standardise(row, xhat.data()), *gr = g + row * n, *tr = t_x + row * n;
            T *dx = d_x + row * n;
            project(tr, xhat.data(), inverse, xhat_dot.data());
            T mean_p = 0, mean_t = 0, k = 0, m = 0, pt = 0;
#pragma omp simd reduction(+ : mean_p, mean_t, k, m, pt)
            for (int c = 0; c < n; ++c) {
                y_dot[row * n + c] = t_gamma[c] * xhat[c] + gamma[c] * xhat_dot[c] + t_beta[c];
                d_gamma[c] += gr[c] * xhat_dot[c];
                on_xhat[c] = gr[c] * t_gamma[c];
                p[c] = gr[c] * gamma[c];
                mean_p += p[c];
                mean_t += tr[c];
                k += p[c] * xhat[c];
                m += tr[c] * xhat[c];
                pt += p[c] * tr[c];
            }
            mean_p /= n, mean_t /= n, k /= n, m /= n, pt /= n;  // mean(t xhat) = m: mean xhat = 0
            const T factor = pt - mean_p * mean_t - 3 * m * k, square = inverse * inverse;
            project(on_xhat.data(), xhat.data(), inverse, dx);
#pragma omp simd
            for (int c = 0; c < n; ++c)
                dx[c] -= (xhat[c] * factor + k * (tr[c] - mean_t) + m * (p[c] - mean_p)) * square;
        }
    }
};

// What o = o1 | o2 | o3 and the vectors U = U1 | U2 | U3 of an atom add to its scalars and vectors:
//     a = (sum_xyz U1 * U2) * o2 + o3        b = U3 * o1
// The last layer has o = o2 | o3, U = U1 | U2 and no b. o is (rows, parts F), U (rows, 3, parts F), parts 3 or 2.
template <class T> struct Update {
    int64_t rows;
    int n, parts, threads;
    const T *o, *u;

    // Where the parts of one atom lie in arrays shaped like o, and in one direction of arrays shaped like U.
    const T *o1(const T *all, int64_t row) const { return all + row * parts * n; }
    const T *o2(const T *all, int64_t row) const { return all + ((row + 1) * parts - 2) * n; }
    const T *o3(const T *all, int64_t row) const { return all + ((row + 1) * parts - 1) * n; }
    const T *u_of(const T *all, int64_t row, int x) const { return all + (row * 3 + x) * parts * n; }

    // out = sum_xyz of p * q, where p and q are n channels that begin `first` and `second` after those of u1
    void dot(const T *all_p, int first, const T *all_q, int second, int64_t row, T *out) const {
        std::fill_n(out, n, T(0));
        for (int x = 0; x < 3; ++x) {
            const T *p = u_of(all_p, row, x) + first, *q = u_of(all_q, row, x) + second;
#pragma omp simd
            for (int c = 0; c < n; ++c) out[c] += p[c] * q[c];
        }
    }

    void forward(T *a, T *b) const {
#pragma omp parallel for schedule(static) num_threads(threads)
        for (int64_t row = 0; row < rows; ++row) {
            const T *out1 = o1(o, row), *out2 = o2(o, row), *out3 = o3(o, row);
            T *to = a + row * n;
            dot(u, 0, u, n, row, to);
#pragma omp simd
            for (int c = 0; c < n; ++c) to[c] = to[c] * out2[c] + out3[c];
            for (int x = 0; parts == 3 && x < 3; ++x) {
                const T *u3 = u_of(u, row, x) + 2 * n;
                T *turned = b + (row * 3 + x) * n;
#pragma omp simd
                for (int c = 0; c < n; ++c) turned[c] = u3[c] * out1[c];
            }
        }
    }

    // Gradient of S = sum g a + G b.
    void backward(const T *all_g, const T *all_G, T *d_o, T *d_u) const {
#pragma omp parallel for schedule(static) num_threads(threads)
        for (int64_t row = 0; row < rows; ++row) {
            const T *g = all_g + row * n, *out1 = o1(o, row), *out2 = o2(o, row);
            T *d1 = d_o + row * parts * n, *d2 = d1 + (parts - 2) * n, *d3 = d2 + n;
            dot(u, 0, u, n, row, d2);
#pragma omp simd
            for (int c = 0; c < n; ++c) {
                d2[c] *= g[c];
                d3[c] = g[c];
            }
            if (parts == 3) std::fill_n(d1, n, T(0));
            for (int x = 0; x < 3; ++x) {
                const T *u1 = u_of(u, row, x), *u2 = u1 + n, *u3 = u2 + n, *G = all_G + (row * 3 + x) * n;
                T *du1 = d_u + (row * 3 + x) * parts * n, *du2 = du1 + n, *du3 = du2 + n;
#pragma omp simd
                for (int c = 0; c < n; ++c) {
                    du1[c] = g[c] * out2[c] * u2[c];
                    du2[c] = g[c] * out2[c] * u1[c];
                }
                if (parts == 3)
#pragma omp simd
                    for (int c = 0; c < n; ++c) {
                        d1[c] += G[c] * u3[c];
                        du3[c] = G[c] * out1[c];
                    }
            }
        }
    }

    // Gradient of P = sum g a-dot + G b-dot along (t_o, t_u); with respect to g and G it is a-dot and b-dot.
    void second(const T *all_g, const T *all_G, const T *t_o, const T *t_u, T *a_dot, T *b_dot, T *d_o, T *d_u) const {
#pragma omp parallel num_threads(threads)
        {
            std::vector<T> s(n), s_dot(n);
#pragma omp for schedule(static)
            for (int64_t row = 0; row < rows; ++row) {
                const T *g = all_g + row * n, *out1 = o1(o, row), *out2 = o2(o, row);
                const T *t1 = o1(t_o, row), *t2 = o2(t_o, row), *t3 = o3(t_o, row);
                T *d1 = d_o + row * parts * n, *d2 = d1 + (parts - 2) * n, *d3 = d2 + n, *change = a_dot + row * n;
                dot(u, 0, u, n, row, s.data());
                dot(t_u, 0, u, n, row, s_dot.data());
                dot(u, 0, t_u, n, row, d2);
#pragma omp simd
                for (int c = 0; c < n; ++c) {
                    const T both = s_dot[c] + d2[c];
                    change[c] = both * out2[c] + s[c] * t2[c] + t3[c];
                    d2[c] = g[c] * both;
                    d3[c] = T(0);
                }
                if (parts == 3) std::fill_n(d1, n, T(0));
                for (int x = 0; x < 3; ++x) {
                    const T *u1 = u_of(u, row, x), *u2 = u1 + n, *u3 = u2 + n, *G = all_G + (row * 3 + x) * n;
                    const T *tu1 = u_of(t_u, row, x), *tu2 = tu1 + n, *tu3 = tu2 + n;
                    T *du1 = d_u + (row * 3 + x) * parts * n, *du2 = du1 + n, *du3 = du2 + n;
#pragma omp simd
                    for (int c = 0; c < n; ++c) {
                        du1[c] = g[c] * (tu2[c] * out2[c] + u2[c] * t2[c]);
                        du2[c] = g[c] * (tu1[c] * out2[c] + u1[c] * t2[c]);
                    }
                    T *turned = b_dot + (row * 3 + x) * n;
                    if (parts == 3)
#pragma omp simd
                        for (int c = 0; c < n; ++c) {
                            turned[c] = tu3[c] * out1[c] + u3[c] * t1[c];
                            d1[c] += G[c] * tu3[c];
                            du3[c] = G[c] * t1[c];
                        }
                }
            }
        }
    }
};

}  // namespace
