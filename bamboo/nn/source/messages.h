// Messages of the graph equivariant transformer, their gradient, and the gradient of that gradient, for training.
//
// A pair of neighbours i, j is listed once, in row i: pairs first[i] .. first[i + 1] - 1, other[] names j. It carries two
// messages: to i from j along u, and to j from i along -u. With attention heads of D channels (<.> is the sum over the
// channels of a head), receiver a and sender b:
//
//     s = <q_a k_b>      att = silu(s) f      w = v_b e          m_a = sum_b w att        M_a = sum_b w (x) u
//
// One row of qkv is q | k | v of an atom, 3 F numbers; e is (n_pairs, F), f (n_pairs), u (n_pairs, 3), m (n, F),
// M (n, 3, F). Everything per pair is recomputed from these rows and lives in registers or the first-level cache.
// Every thread adds to rows of its own, which are then added in the order of the threads: no atomics, the same bits on
// every run.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <vector>

#include "functions.h"

namespace {

constexpr int MAX_CHANNELS = 512;

struct Pairs {
    int64_t n_atoms;
    const int64_t *first, *other;
    int channels, per_head, threads;
};

// Rows of one thread, and the range of atoms that they and their neighbours span.
struct Part {
    int64_t begin, end, low, high;
};

inline std::vector<Part> divide(const Pairs &pairs) {
    std::vector<Part> parts;
    const int64_t n_pairs = pairs.first[pairs.n_atoms], count = std::max(1, pairs.threads);
    int64_t atom = 0;
    for (int64_t t = 0; t < count; ++t) {
        Part part{atom, atom, atom, atom};
        while (atom < pairs.n_atoms && (t + 1 == count || pairs.first[atom + 1] * count <= n_pairs * (t + 1))) ++atom;
        part.end = part.high = atom;
        for (int64_t p = pairs.first[part.begin]; p < pairs.first[part.end]; ++p) {
            part.low = std::min(part.low, pairs.other[p]);
            part.high = std::max(part.high, pairs.other[p] + 1);
        }
        if (part.begin < part.end) parts.push_back(part);
    }
    return parts;
}

// An output with one row of `width` numbers for each atom.
template <class T> struct Rows {
    T *data;
    int width;
    int64_t low;
    T *operator[](int64_t atom) const { return data + (atom - low) * width; }
};

// Sets the outputs to what body(part, rows) adds to the rows of its part, summed over the parts.
template <class T, size_t N, class Body>
void accumulate(const Pairs &pairs, const std::array<Rows<T>, N> &outputs, Body body) {
    const std::vector<Part> parts = divide(pairs);
    for (const Rows<T> &output : outputs) std::fill_n(output.data, pairs.n_atoms * output.width, T(0));
    if (parts.size() == 1) return body(parts[0], outputs);
    std::vector<std::vector<T>> memory(parts.size() * N);
#pragma omp parallel num_threads(pairs.threads)
    {
#pragma omp for schedule(static, 1)
        for (int64_t t = 0; t < int64_t(parts.size()); ++t) {
            std::array<Rows<T>, N> own = outputs;
            for (size_t n = 0; n < N; ++n) {
                memory[t * N + n].assign((parts[t].high - parts[t].low) * own[n].width, T(0));
                own[n] = {memory[t * N + n].data(), own[n].width, parts[t].low};
            }
            body(parts[t], own);
        }
#pragma omp for schedule(static)
        for (int64_t atom = 0; atom < pairs.n_atoms; ++atom)
            for (size_t t = 0; t < parts.size(); ++t)
                for (size_t n = 0; n < N && parts[t].low <= atom && atom < parts[t].high; ++n) {
                    const T *from = memory[t * N + n].data() + (atom - parts[t].low) * outputs[n].width;
                    for (int c = 0; c < outputs[n].width; ++c) outputs[n][atom][c] += from[c];
                }
    }
}

// F and D are the channels and the channels of one head where known at compile time, else 0. Without VECTORS there is no
// M (the last layer has no use for it): M, G and M-dot are not touched.
template <class T, int F, int D, bool VECTORS> struct Messages {
    static constexpr int CHANNELS = F ? F : MAX_CHANNELS, HEADS = F ? F / D : MAX_CHANNELS;
    using Channels = T[CHANNELS];
    using PerHead = T[HEADS];
    Pairs pairs;
    const T *qkv, *e, *f, *u;

    int channels() const { return F ? F : pairs.channels; }
    int heads() const { return F ? F / D : pairs.channels / pairs.per_head; }

    // Sum over the channels of each head, and a number per head handed to all its channels.
    void sum_heads(const T *x, T *sum) const {
        if constexpr (D == 4) return sum_fours(x, sum, F);
        const int d = pairs.per_head;
        for (int h = 0; h < heads(); ++h) {
            sum[h] = T(0);
            for (int c = 0; c < d; ++c) sum[h] += x[h * d + c];
        }
    }
    void spread_heads(const T *sum, T *x) const {
        if constexpr (D == 4) return spread_fours(sum, x, F);
        const int d = pairs.per_head;
        for (int c = 0; c < channels(); ++c) x[c] = sum[c / d];
    }

    void forward(T *m, T *M) const {
        const int n = channels();
        accumulate<T, 2>(pairs, {{{m, n, 0}, {M, VECTORS ? 3 * n : 0, 0}}}, [&](const Part &part, const auto &out) {
            for (int64_t i = part.begin; i < part.end; ++i)
                for (int64_t p = pairs.first[i]; p < pairs.first[i + 1]; ++p) {
                    const int64_t j = pairs.other[p];
                    forward(i, j, p, T(1), out[0][i], out[1][i]);
                    forward(j, i, p, T(-1), out[0][j], out[1][j]);
                }
        });
    }

    void forward(int64_t a, int64_t b, int64_t p, T sign, T *m, T *M) const {
        const int n = channels();
        const T *q = qkv + a * 3 * n, *k = qkv + b * 3 * n + n, *v = k + n, *edge = e + p * n;
        const T ux = sign * u[3 * p], uy = sign * u[3 * p + 1], uz = sign * u[3 * p + 2];
        alignas(64) Channels product, attention;
        alignas(64) PerHead s;
#pragma omp simd
        for (int c = 0; c < n; ++c) product[c] = q[c] * k[c];
        sum_heads(product, s);
#pragma omp simd
        for (int h = 0; h < heads(); ++h) s[h] *= f[p] * logistic(s[h]);
        spread_heads(s, attention);
#pragma omp simd
        for (int c = 0; c < n; ++c) {
            const T w = v[c] * edge[c];
            m[c] += w * attention[c];
            if (VECTORS) {
                M[c] += w * ux;
                M[n + c] += w * uy;
                M[2 * n + c] += w * uz;
            }
        }
    }

    // Gradient of S = sum_a g_a . m_a + G_a . M_a with respect to qkv, e, f and u.
    //     dS/dw = g att + G.u      dS/datt = <g w>
    void backward(const T *g, const T *G, T *d_qkv, T *d_e, T *d_f, T *d_u) const {
        const int n = channels();
        accumulate<T, 1>(pairs, {{{d_qkv, 3 * n, 0}}}, [&](const Part &part, const auto &out) {
            for (int64_t i = part.begin; i < part.end; ++i)
                for (int64_t p = pairs.first[i]; p < pairs.first[i + 1]; ++p) {
                    const int64_t j = pairs.other[p];
                    T fu[4] = {};
                    std::fill_n(d_e + p * n, n, T(0));
                    backward(i, j, p, T(1), g, G, out[0][i], out[0][j], d_e + p * n, fu);
                    backward(j, i, p, T(-1), g, G, out[0][j], out[0][i], d_e + p * n, fu);
                    d_f[p] = fu[0];
                    std::copy_n(fu + 1, 3, d_u + 3 * p);
                }
        });
    }

    void backward(int64_t a, int64_t b, int64_t p, T sign, const T *all_g, const T *all_G, T *d_a, T *d_b, T *de,
                  T *fu) const {
        const int n = channels();
        const T *q = qkv + a * 3 * n, *k = qkv + b * 3 * n + n, *v = k + n, *edge = e + p * n;
        const T *g = all_g + a * n, *x = all_G + a * 3 * n, *y = x + n, *z = y + n;
        const T ux = sign * u[3 * p], uy = sign * u[3 * p + 1], uz = sign * u[3 * p + 2], fade = f[p];
        T *dq = d_a, *dk = d_b + n, *dv = dk + n;
        alignas(64) Channels product, g_w, attention, ds;
        alignas(64) PerHead s, on_a;
#pragma omp simd
        for (int c = 0; c < n; ++c) {
            product[c] = q[c] * k[c];
            g_w[c] = g[c] * v[c] * edge[c];
        }
        sum_heads(product, s);
        sum_heads(g_w, on_a);
        T df = 0, dx = 0, dy = 0, dz = 0;
#pragma omp simd reduction(+ : df)
        for (int h = 0; h < heads(); ++h) {
            const T l = logistic(s[h]), act = s[h] * l;
            df += on_a[h] * act;
            on_a[h] *= fade * silu_slope(s[h], l);
            s[h] = act * fade;
        }
        spread_heads(s, attention);
        spread_heads(on_a, ds);
#pragma omp simd reduction(+ : dx, dy, dz)
        for (int c = 0; c < n; ++c) {
            const T w = v[c] * edge[c], from_M = VECTORS ? x[c] * ux + y[c] * uy + z[c] * uz : T(0);
            const T dw = g[c] * attention[c] + from_M;
            dq[c] += ds[c] * k[c];
            dk[c] += ds[c] * q[c];
            dv[c] += dw * edge[c];
            de[c] += dw * v[c];
            if (VECTORS) {
                dx += x[c] * w;
                dy += y[c] * w;
                dz += z[c] * w;
            }
        }
        fu[0] += df;
        fu[1] += sign * dx;
        fu[2] += sign * dy;
        fu[3] += sign * dz;
    }

    // A direction in the space of (qkv, e, f, u).
    struct Along {
        const T *qkv, *e, *f, *u;
    };

    // Gradient of P = t . dS/d(qkv, e, f, u), the derivative of S along t; a dot marks derivatives along t. With respect
    // to g and G it is m-dot and M-dot.
    //     w. = v. e + v e.      att. = silu' s. f + silu f.
    //     P = <g w.> att + <g w> att. + w. G.u + w G.u.
    void second(const T *g, const T *G, const Along &t, T *m_dot, T *M_dot, T *d_qkv, T *d_e, T *d_f, T *d_u) const {
        const int n = channels();
        const std::array<Rows<T>, 3> outputs{{{d_qkv, 3 * n, 0}, {m_dot, n, 0}, {M_dot, VECTORS ? 3 * n : 0, 0}}};
        accumulate<T, 3>(pairs, outputs, [&](const Part &part, const auto &out) {
            for (int64_t i = part.begin; i < part.end; ++i)
                for (int64_t p = pairs.first[i]; p < pairs.first[i + 1]; ++p) {
                    const int64_t j = pairs.other[p];
                    T fu[4] = {};
                    std::fill_n(d_e + p * n, n, T(0));
                    second(i, j, p, T(1), g, G, t, out[0][i], out[0][j], out[1][i], out[2][i], d_e + p * n, fu);
                    second(j, i, p, T(-1), g, G, t, out[0][j], out[0][i], out[1][j], out[2][j], d_e + p * n, fu);
                    d_f[p] = fu[0];
                    std::copy_n(fu + 1, 3, d_u + 3 * p);
                }
        });
    }

    void second(int64_t a, int64_t b, int64_t p, T sign, const T *all_g, const T *all_G, const Along &t, T *d_a, T *d_b,
                T *m, T *M, T *de, T *fu) const {
        const int n = channels();
        const T *q = qkv + a * 3 * n, *k = qkv + b * 3 * n + n, *v = k + n, *edge = e + p * n;
        const T *tq = t.qkv + a * 3 * n, *tk = t.qkv + b * 3 * n + n, *tv = tk + n, *te = t.e + p * n;
        const T *g = all_g + a * n, *x = all_G + a * 3 * n, *y = x + n, *z = y + n;
        const T ux = sign * u[3 * p], uy = sign * u[3 * p + 1], uz = sign * u[3 * p + 2], fade = f[p];
        const T tx = sign * t.u[3 * p], ty = sign * t.u[3 * p + 1], tz = sign * t.u[3 * p + 2], t_fade = t.f[p];
        T *dq = d_a, *dk = d_b + n, *dv = dk + n;
        alignas(64) Channels product, product_dot, g_w, g_w_dot, attention, attention_dot, on_s, on_s_dot;
        alignas(64) PerHead s, s_dot, on_a_dot, on_a;
#pragma omp simd
        for (int c = 0; c < n; ++c) {
            product[c] = q[c] * k[c];
            product_dot[c] = tq[c] * k[c] + q[c] * tk[c];
            g_w[c] = g[c] * v[c] * edge[c];
            g_w_dot[c] = g[c] * (tv[c] * edge[c] + v[c] * te[c]);
        }
        sum_heads(product, s);
        sum_heads(product_dot, s_dot);
        sum_heads(g_w, on_a_dot);
        sum_heads(g_w_dot, on_a);
        T df = 0, dx = 0, dy = 0, dz = 0;
#pragma omp simd reduction(+ : df)
        for (int h = 0; h < heads(); ++h) {
            const T l = logistic(s[h]), act = s[h] * l, slope = silu_slope(s[h], l), bend = silu_bend(s[h], l);
            df += on_a[h] * act + on_a_dot[h] * slope * s_dot[h];
            on_a[h] = on_a[h] * fade * slope + on_a_dot[h] * (fade * bend * s_dot[h] + slope * t_fade);  // now dP/ds
            on_a_dot[h] *= fade * slope;                                                                 // dP/ds-dot
            s_dot[h] = slope * s_dot[h] * fade + act * t_fade;
            s[h] = act * fade;
        }
        spread_heads(s, attention);
        spread_heads(s_dot, attention_dot);
        spread_heads(on_a, on_s);
        spread_heads(on_a_dot, on_s_dot);
#pragma omp simd reduction(+ : dx, dy, dz)
        for (int c = 0; c < n; ++c) {
            const T w = v[c] * edge[c], w_dot = tv[c] * edge[c] + v[c] * te[c];
            T on_w_dot = g[c] * attention[c], on_w = g[c] * attention_dot[c];
            m[c] += w_dot * attention[c] + w * attention_dot[c];
            if (VECTORS) {
                on_w_dot += x[c] * ux + y[c] * uy + z[c] * uz;
                on_w += x[c] * tx + y[c] * ty + z[c] * tz;
                M[c] += w_dot * ux + w * tx;
                M[n + c] += w_dot * uy + w * ty;
                M[2 * n + c] += w_dot * uz + w * tz;
                dx += x[c] * w_dot;
                dy += y[c] * w_dot;
                dz += z[c] * w_dot;
            }
            dq[c] += on_s[c] * k[c] + on_s_dot[c] * tk[c];
            dk[c] += on_s[c] * q[c] + on_s_dot[c] * tq[c];
            dv[c] += on_w_dot * te[c] + on_w * edge[c];
            de[c] += on_w_dot * tv[c] + on_w * v[c];
        }
        fu[0] += df;
        fu[1] += sign * dx;
        fu[2] += sign * dy;
        fu[3] += sign * dz;
    }
};

}  // namespace
