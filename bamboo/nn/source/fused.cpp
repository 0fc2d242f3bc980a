// Library behind bamboo/nn/fused.py: plain C functions, each for float and double.

// Loops are vectorised: sums may be reordered, and no number here is infinite unless the input is broken.
#pragma GCC optimize("associative-math", "no-signed-zeros", "finite-math-only")

#include "edges.h"
#include "messages.h"
#include "pairing.h"

#define EXPORT extern "C" __attribute__((visibility("default"))) void

#define PAIRS int64_t n_atoms, const int64_t *first, const int64_t *other, int64_t channels, int64_t per_head, int64_t threads
#define THE_PAIRS (Pairs{n_atoms, first, other, int(channels), int(per_head), int(threads)})

#define INSTANTIATE(T, NAME)                                                                                           \
    EXPORT pair_up_##NAME(int64_t n_atoms, int64_t n_edges, const int64_t *receiver, const int64_t *sender,            \
                          const T *vec, int64_t *first, int64_t *other, int64_t *kept, int64_t *found) {               \
        *found = pair_up(n_atoms, n_edges, receiver, sender, vec, first, other, kept);                                 \
    }                                                                                                                  \
    EXPORT messages_##NAME(PAIRS, const T *qkv, const T *e, const T *f, const T *u, T *m, T *M) {                      \
        choose(THE_PAIRS, qkv, e, f, u, [&](auto messages) { messages.forward(m, M); });                               \
    }                                                                                                                  \
    EXPORT messages_backward_##NAME(PAIRS, const T *qkv, const T *e, const T *f, const T *u, const T *g, const T *G,   \
                                    T *d_qkv, T *d_e, T *d_f, T *d_u) {                                                \
        choose(THE_PAIRS, qkv, e, f, u, [&](auto messages) { messages.backward(g, G, d_qkv, d_e, d_f, d_u); });        \
    }                                                                                                                  \
    EXPORT messages_second_##NAME(PAIRS, const T *qkv, const T *e, const T *f, const T *u, const T *g, const T *G,     \
                                  const T *t_qkv, const T *t_e, const T *t_f, const T *t_u, T *m_dot, T *M_dot,        \
                                  T *d_qkv, T *d_e, T *d_f, T *d_u) {                                                  \
        choose(THE_PAIRS, qkv, e, f, u, [&](auto messages) {                                                           \
            messages.second(g, G, {t_qkv, t_e, t_f, t_u}, m_dot, M_dot, d_qkv, d_e, d_f, d_u);                           \
        });                                                                                                            \
    }                                                                                                                  \
    EXPORT basis_##NAME(int64_t n_edges, int64_t n_radial, int64_t threads, double decay, double cutoff, const T *r,           \
                        const T *means, const T *betas, T *phi) {                                                      \
        Basis<T>{n_edges, int(n_radial), int(threads), decay, cutoff, r, means, betas}.forward(phi);                             \
    }                                                                                                                  \
    EXPORT basis_backward_##NAME(int64_t n_edges, int64_t n_radial, int64_t threads, double decay, double cutoff, const T *r,  \
                                 const T *means, const T *betas, const T *g, T *d_means, T *d_betas) {                 \
        Basis<T>{n_edges, int(n_radial), int(threads), decay, cutoff, r, means, betas}.backward(g, d_means, d_betas);            \
    }                                                                                                                  \
    EXPORT activate_##NAME(int64_t size, int64_t threads, const T *z, T *e) { activate(size, threads, z, e); }             \
    EXPORT activate_backward_##NAME(int64_t size, int64_t threads, const T *z, const T *g, const T *g_slope, T *d_z) {     \
        activate_backward(size, threads, z, g, g_slope, d_z);                                                          \
    }                                                                                                                  \
    EXPORT contract_##NAME(int64_t rows, int64_t columns, int64_t threads, const T *a, const T *b, T *out) {                   \
        contract(rows, columns, threads, a, b, out);                                                                   \
    }                                                                                                                  \
    EXPORT contract_backward_##NAME(int64_t rows, int64_t columns, int64_t threads, const T *a, const T *b, const T *g,        \
                                    T *d_a, T *d_b) {                                                                  \
        contract_backward(rows, columns, threads, a, b, g, d_a, d_b);                                                  \
    }

INSTANTIATE(float, float32)
INSTANTIATE(double, float64)
