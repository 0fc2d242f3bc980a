// Messages of the graph equivariant transformer, their derivative and the derivative of that derivative, for training.
//
// The edges i <- j of receiver i are rows first[i] .. first[i+1] - 1; sender[] names j. With one attention head of D
// channels (a sum over the channels of a head is written <.>):
//
//     s = <q_i k_j>      a = silu(s) f      w = v_j e_ij          m_i = sum_j w a        M_i = sum_j w (x) u
//
// One row of qkv is q | k | v of an atom, 3 F numbers; e is (n_edges, F), f (n_edges), u (n_edges, 3), m (n, F),
// M (n, 3, F). Everything per edge is recomputed from these rows and lives in registers or the first-level cache.
// Sums over receivers stay within one thread. Sums over senders go to a buffer of the thread that covers the senders
// it meets, and the buffers are added in the order of the threads: no atomics, the same bits on every run.

#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <vector>

#include <omp.h>

#include "functions.h"

namespace {

constexpr int MAX_CHANNELS = 512;

struct Graph {
    int64_t n_atoms;
    const int64_t *first, *sender;
    int channels, per_head, threads;
};

// Receivers of one thread, and the range of senders they meet.
struct Part {
    int64_t begin = 0, end = 0, low = 0, high = 0;
};

std::vector<Part> divide(const Graph &graph) {
    std::vector<Part> parts(std::max(1, graph.threads));
    const int64_t n_edges = graph.first[graph.n_atoms], count = parts.size();
    int64_t atom = 0;
    for (int64_t t = 0; t < count; ++t) {
        parts[t].begin = atom;
        while (atom < graph.n_atoms && (t + 1 == count || graph.first[atom + 1] * count <= n_edges * (t + 1))) ++atom;
        parts[t].end = atom;
        const auto [low, high] = std::minmax_element(
            graph.sender + graph.first[parts[t].begin], graph.sender + graph.first[parts[t].end]);
        if (low != graph.sender + graph.first[parts[t].end]) {
            parts[t].low = *low;
            parts[t].high = *high + 1;
        }
    }
    return parts;
}

// Runs body(part, buffer) on every part; buffer[(j - low) * width] collects what goes to sender j, and is then added to
// out + j * stride.
template <class T, class Body>
void over_senders(const Graph &graph, int width, T *out, int stride, Body body) {
    const std::vector<Part> parts = divide(graph);
    std::vector<std::vector<T>> buffers(parts.size());
#pragma omp parallel num_threads(graph.threads)
    {
#pragma omp for schedule(static, 1)
        for (int64_t t = 0; t < int64_t(parts.size()); ++t) {
            buffers[t].assign((parts[t].high - parts[t].low) * width, T(0));
            body(parts[t], buffers[t].data());
        }
#pragma omp for schedule(static)
        for (int64_t j = 0; j < graph.n_atoms; ++j)
            for (size_t t = 0; t < parts.size(); ++t)
                if (parts[t].low <= j && j < parts[t].high) {
                    const T *from = buffers[t].data() + (j - parts[t].low) * width;
                    for (int c = 0; c < width; ++c) out[j * stride + c] += from[c];
                }
    }
}

// x with the channels of every pair, or of every quadruple, exchanged: lane c gets lane c ^ STEP.
template <int STEP, class T> inline void add_partners(T *x, int channels) {
    constexpr int LANES = 64 / sizeof(T);
    typedef T Vector __attribute__((vector_size(64)));
    typedef std::conditional_t<sizeof(T) == 4, int32_t, int64_t> Integer;
    typedef Integer Integers __attribute__((vector_size(64)));
    Integers partner = {};
    for (int lane = 0; lane < LANES; ++lane) partner[lane] = lane ^ STEP;
    for (int c = 0; c < channels; c += LANES) {
        Vector &part = *reinterpret_cast<Vector *>(x + c);
        part += __builtin_shuffle(part, partner);
    }
}

// Replaces every channel by the sum over its head.
template <int D, class T> inline void head_sum(T *x, int channels, int per_head) {
    if constexpr (D == 4) {
        add_partners<1>(x, channels);
        add_partners<2>(x, channels);
        return;
    }
    const int d = D ? D : per_head;
    for (int h = 0; h < channels; h += d) {
        T sum = 0;
        for (int c = 0; c < d; ++c) sum += x[h + c];
        for (int c = 0; c < d; ++c) x[h + c] = sum;
    }
}

// F and D are the channels and the channels of one head where known at compile time, else 0.
template <class T, int F, int D> struct Messages {
    static constexpr int SIZE = F ? F : MAX_CHANNELS;
    Graph graph;
    const T *qkv, *e, *f, *u;

    int channels() const { return F ? F : graph.channels; }

    void forward(T *m, T *M) const {
        const int n = channels();
#pragma omp parallel for schedule(dynamic, 16) num_threads(graph.threads)
        for (int64_t i = 0; i < graph.n_atoms; ++i) {
            const T *q = qkv + i * 3 * n;
            alignas(64) T sum[SIZE] = {}, x[SIZE] = {}, y[SIZE] = {}, z[SIZE] = {};
            for (int64_t p = graph.first[i]; p < graph.first[i + 1]; ++p) {
                const T *k = qkv + graph.sender[p] * 3 * n + n, *v = k + n, *edge = e + p * n;
                const T fade = f[p], ux = u[3 * p], uy = u[3 * p + 1], uz = u[3 * p + 2];
                alignas(64) T s[SIZE];
#pragma omp simd
                for (int c = 0; c < n; ++c) s[c] = q[c] * k[c];
                head_sum<D>(s, n, graph.per_head);
#pragma omp simd
                for (int c = 0; c < n; ++c) {
                    const T w = v[c] * edge[c];
                    sum[c] += w * (fade * s[c] * logistic(s[c]));
                    x[c] += w * ux;
                    y[c] += w * uy;
                    z[c] += w * uz;
                }
            }
#pragma omp simd
            for (int c = 0; c < n; ++c) {
                m[i * n + c] = sum[c];
                M[i * 3 * n + c] = x[c];
                M[i * 3 * n + n + c] = y[c];
                M[i * 3 * n + 2 * n + c] = z[c];
            }
        }
    }

    // Gradient of S = sum_i g_i . m_i + G_i . M_i with respect to qkv, e, f and u; d_qkv comes in as zeros.
    //     dS/dw = g a + G.u      dS/da = <g w>
    void backward(const T *g, const T *G, T *d_qkv, T *d_e, T *d_f, T *d_u) const {
        const int n = channels();
        over_senders(graph, 2 * n, d_qkv + n, 3 * n, [&](const Part &part, T *to_senders) {
            for (int64_t i = part.begin; i < part.end; ++i) {
                const T *q = qkv + i * 3 * n, *gi = g + i * n, *x = G + i * 3 * n, *y = x + n, *z = y + n;
                alignas(64) T dq[SIZE] = {};
                for (int64_t p = graph.first[i]; p < graph.first[i + 1]; ++p) {
                    const int64_t j = graph.sender[p];
                    const T *k = qkv + j * 3 * n + n, *v = k + n, *edge = e + p * n;
                    T *dk = to_senders + (j - part.low) * 2 * n, *dv = dk + n, *de = d_e + p * n;
                    const T fade = f[p], ux = u[3 * p], uy = u[3 * p + 1], uz = u[3 * p + 2];
                    alignas(64) T s[SIZE], da[SIZE];
#pragma omp simd
                    for (int c = 0; c < n; ++c) {
                        s[c] = q[c] * k[c];
                        da[c] = gi[c] * v[c] * edge[c];
                    }
                    head_sum<D>(s, n, graph.per_head);
                    head_sum<D>(da, n, graph.per_head);
                    T df = 0, dx = 0, dy = 0, dz = 0;
#pragma omp simd reduction(+ : df, dx, dy, dz)
                    for (int c = 0; c < n; ++c) {
                        const T l = logistic(s[c]), act = s[c] * l, slope = silu_slope(s[c], l);
                        const T w = v[c] * edge[c];
                        const T dw = gi[c] * act * fade + x[c] * ux + y[c] * uy + z[c] * uz;
                        const T ds = da[c] * fade * slope;
                        dq[c] += ds * k[c];
                        dk[c] += ds * q[c];
                        dv[c] += dw * edge[c];
                        de[c] = dw * v[c];
                        df += gi[c] * w * act;
                        dx += x[c] * w;
                        dy += y[c] * w;
                        dz += z[c] * w;
                    }
                    d_f[p] = df;
                    d_u[3 * p] = dx;
                    d_u[3 * p + 1] = dy;
                    d_u[3 * p + 2] = dz;
                }
#pragma omp simd
                for (int c = 0; c < n; ++c) d_qkv[i * 3 * n + c] = dq[c];
            }
        });
    }

    // Gradient of P = t . dS/d(qkv, e, f, u), the directional derivative of S along t = (t_qkv, t_e, t_f, t_u); a dot
    // marks derivatives along t. With respect to g and G it is m-dot and M-dot; d_qkv comes in as zeros.
    //     w. = v. e + v e.      a. = silu' s. f + silu f.
    //     P = <g w.> a + <g w> a. + w. G.u + w G.u.
    void second(const T *g, const T *G, const T *t_qkv, const T *t_e, const T *t_f, const T *t_u, T *m_dot, T *M_dot,
                T *d_qkv, T *d_e, T *d_f, T *d_u) const {
        const int n = channels();
        over_senders(graph, 2 * n, d_qkv + n, 3 * n, [&](const Part &part, T *to_senders) {
            for (int64_t i = part.begin; i < part.end; ++i) {
                const T *q = qkv + i * 3 * n, *tq = t_qkv + i * 3 * n;
                const T *gi = g + i * n, *x = G + i * 3 * n, *y = x + n, *z = y + n;
                alignas(64) T dq[SIZE] = {}, sum[SIZE] = {}, sx[SIZE] = {}, sy[SIZE] = {}, sz[SIZE] = {};
                for (int64_t p = graph.first[i]; p < graph.first[i + 1]; ++p) {
                    const int64_t j = graph.sender[p];
                    const T *k = qkv + j * 3 * n + n, *v = k + n, *edge = e + p * n;
                    const T *tk = t_qkv + j * 3 * n + n, *tv = tk + n, *te = t_e + p * n;
                    T *dk = to_senders + (j - part.low) * 2 * n, *dv = dk + n, *de = d_e + p * n;
                    const T fade = f[p], ux = u[3 * p], uy = u[3 * p + 1], uz = u[3 * p + 2];
                    const T t_fade = t_f[p], tx = t_u[3 * p], ty = t_u[3 * p + 1], tz = t_u[3 * p + 2];
                    alignas(64) T s[SIZE], s_dot[SIZE], w[SIZE], w_dot[SIZE], gw[SIZE], gw_dot[SIZE];
#pragma omp simd
                    for (int c = 0; c < n; ++c) {
                        s[c] = q[c] * k[c];
                        s_dot[c] = tq[c] * k[c] + q[c] * tk[c];
                        w[c] = v[c] * edge[c];
                        w_dot[c] = tv[c] * edge[c] + v[c] * te[c];
                        gw[c] = gi[c] * w[c];
                        gw_dot[c] = gi[c] * w_dot[c];
                    }
                    T df = 0, dx = 0, dy = 0, dz = 0;
                    head_sum<D>(s, n, graph.per_head);
                    head_sum<D>(s_dot, n, graph.per_head);
                    alignas(64) T on_f[SIZE];  // summed over the head below, hence kept
#pragma omp simd
                    for (int c = 0; c < n; ++c) {
                        const T l = logistic(s[c]), slope = silu_slope(s[c], l);
                        on_f[c] = gw_dot[c] * s[c] * l + gw[c] * slope * s_dot[c];
                    }
                    head_sum<D>(gw, n, graph.per_head);
                    head_sum<D>(gw_dot, n, graph.per_head);
#pragma omp simd reduction(+ : df, dx, dy, dz)
                    for (int c = 0; c < n; ++c) {
                        const T l = logistic(s[c]), act = s[c] * l, slope = silu_slope(s[c], l);
                        const T bend = silu_bend(s[c], l);
                        const T a = act * fade, a_dot = slope * s_dot[c] * fade + act * t_fade;
                        const T on_w_dot = gi[c] * a + x[c] * ux + y[c] * uy + z[c] * uz;
                        const T on_w = gi[c] * a_dot + x[c] * tx + y[c] * ty + z[c] * tz;
                        const T on_s_dot = gw[c] * fade * slope;
                        const T on_s = gw_dot[c] * fade * slope + gw[c] * (fade * bend * s_dot[c] + slope * t_fade);
                        sum[c] += w_dot[c] * a + w[c] * a_dot;
                        sx[c] += w_dot[c] * ux + w[c] * tx;
                        sy[c] += w_dot[c] * uy + w[c] * ty;
                        sz[c] += w_dot[c] * uz + w[c] * tz;
                        dq[c] += on_s * k[c] + on_s_dot * tk[c];
                        dk[c] += on_s * q[c] + on_s_dot * tq[c];
                        dv[c] += on_w_dot * te[c] + on_w * edge[c];
                        de[c] = on_w_dot * tv[c] + on_w * v[c];
                        df += on_f[c];
                        dx += x[c] * w_dot[c];
                        dy += y[c] * w_dot[c];
                        dz += z[c] * w_dot[c];
                    }
                    d_f[p] = df;
                    d_u[3 * p] = dx;
                    d_u[3 * p + 1] = dy;
                    d_u[3 * p + 2] = dz;
                }
#pragma omp simd
                for (int c = 0; c < n; ++c) {
                    d_qkv[i * 3 * n + c] = dq[c];
                    m_dot[i * n + c] = sum[c];
                    M_dot[i * 3 * n + c] = sx[c];
                    M_dot[i * 3 * n + n + c] = sy[c];
                    M_dot[i * 3 * n + 2 * n + c] = sz[c];
                }
            }
        });
    }
};

template <class T, class Call>
void choose(const Graph &graph, const T *qkv, const T *e, const T *f, const T *u, Call call) {
    if (graph.channels == 64 && graph.per_head == 4)
        call(Messages<T, 64, 4>{graph, qkv, e, f, u});
    else
        call(Messages<T, 0, 0>{graph, qkv, e, f, u});
}

}  // namespace
