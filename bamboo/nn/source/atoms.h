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

    // parts of one atom: o1, o2, o3 and U1, U2, U3 of direction x; without o1 and U3 those alias o2 and U2, unused
    struct Atom {
        const T *o1, *o2, *o3, *u1, *u2, *u3;
        int stride;
    };
    Atom at(const T *all_o, const T *all_u, int64_t row) const {
        const T *from = all_o + row * parts * n, *vector = all_u + row * 3 * parts * n;
        return {from, from + (parts - 2) * n, from + (parts - 1) * n, vector, vector + n, vector + (parts - 1) * n, parts * n};
    }

    void forward(T *a, T *b) const {
#pragma omp parallel for schedule(static) num_threads(threads)
        for (int64_t row = 0; row < rows; ++row) {
            const Atom i = at(o, u, row);
            T *to = a + row * n;
#pragma omp simd
            for (int c = 0; c < n; ++c) {
                T s = 0;
                for (int x = 0; x < 3; ++x) s += i.u1[x * i.stride + c] * i.u2[x * i.stride + c];
                to[c] = s * i.o2[c] + i.o3[c];
            }
            for (int x = 0; parts == 3 && x < 3; ++x)
#pragma omp simd
                for (int c = 0; c < n; ++c) b[(row * 3 + x) * n + c] = i.u3[x * i.stride + c] * i.o1[c];
        }
    }

    // Gradient of S = sum g a + G b.
    void backward(const T *g, const T *G, T *d_o, T *d_u) const {
#pragma omp parallel for schedule(static) num_threads(threads)
        for (int64_t row = 0; row < rows; ++row) {
            const Atom i = at(o, u, row);
            const T *gr = g + row * n, *Gr = G + row * 3 * n;
            T *d1 = d_o + row * parts * n, *d2 = d1 + (parts - 2) * n, *d3 = d2 + n, *du = d_u + row * 3 * parts * n;
#pragma omp simd
            for (int c = 0; c < n; ++c) {
                T s = 0;
                for (int x = 0; x < 3; ++x) {
                    const T u1 = i.u1[x * i.stride + c], u2 = i.u2[x * i.stride + c];
                    s += u1 * u2;
                    du[x * i.stride + c] = gr[c] * i.o2[c] * u2;
                    du[x * i.stride + n + c] = gr[c] * i.o2[c] * u1;
                }
                d2[c] = gr[c] * s;
                d3[c] = gr[c];
            }
            if (parts == 3)
#pragma omp simd
                for (int c = 0; c < n; ++c) {
                    T sum = 0;
                    for (int x = 0; x < 3; ++x) {
                        sum += Gr[x * n + c] * i.u3[x * i.stride + c];
                        du[x * i.stride + 2 * n + c] = Gr[x * n + c] * i.o1[c];
                    }
                    d1[c] = sum;
                }
        }
    }

    // Gradient of P = sum g a-dot + G b-dot along (t_o, t_u); with respect to g and G it is a-dot and b-dot.
    void second(const T *g, const T *G, const T *t_o, const T *t_u, T *a_dot, T *b_dot, T *d_o, T *d_u) const {
#pragma omp parallel for schedule(static) num_threads(threads)
        for (int64_t row = 0; row < rows; ++row) {
            const Atom i = at(o, u, row), t = at(t_o, t_u, row);
            const T *gr = g + row * n, *Gr = G + row * 3 * n;
            T *d1 = d_o + row * parts * n, *d2 = d1 + (parts - 2) * n, *d3 = d2 + n, *du = d_u + row * 3 * parts * n;
#pragma omp simd
            for (int c = 0; c < n; ++c) {
                T s = 0, s_dot = 0;
                for (int x = 0; x < 3; ++x) {
                    const T u1 = i.u1[x * i.stride + c], u2 = i.u2[x * i.stride + c];
                    const T t1 = t.u1[x * i.stride + c], t2 = t.u2[x * i.stride + c];
                    s += u1 * u2;
                    s_dot += t1 * u2 + u1 * t2;
                    du[x * i.stride + c] = gr[c] * (t2 * i.o2[c] + u2 * t.o2[c]);
                    du[x * i.stride + n + c] = gr[c] * (t1 * i.o2[c] + u1 * t.o2[c]);
                }
                a_dot[row * n + c] = s_dot * i.o2[c] + s * t.o2[c] + t.o3[c];
                d2[c] = gr[c] * s_dot;
                d3[c] = T(0);
            }
            if (parts == 3)
#pragma omp simd
                for (int c = 0; c < n; ++c) {
                    T sum = 0;
                    for (int x = 0; x < 3; ++x) {
                        const T u3 = i.u3[x * i.stride + c], t3 = t.u3[x * i.stride + c];
                        b_dot[(row * 3 + x) * n + c] = t3 * i.o1[c] + u3 * t.o1[c];
                        sum += Gr[x * n + c] * t3;
                        du[x * i.stride + 2 * n + c] = Gr[x * n + c] * t.o1[c];
                    }
                    d1[c] = sum;
                }
        }
    }
};

}  // namespace
