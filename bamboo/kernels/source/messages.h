// The messages of one layer, for one atom at a time: attention, sum over neighbours, and its hand-derived backward.
//
// Gong et al. (2025): a_ij = SiLU(sum_d q_i k_j) f(r_ij) per head;  m_i = sum_j v_j e_ij a_ij;
// M_i = sum_j (v_j e_ij) (x) u_ij.
// GEDT: two logits per head, a = (SiLU(l_1) - SiLU(l_2)) f.
//
// Channels are stored with the heads innermost: one vector of L lanes holds one channel of every head, D such vectors
// make all F = L D channels. For GEDT, L counts the two halves of every head: lane = half * heads + head.
#pragma once

#include <vector>

#include "lanes.h"

namespace bamboo {

// A function of the distance as a polynomial in t = r / width - interval on each interval, for `channels` functions
// side by side: coefficients (interval, degree + 1, channels), highest power first.
template <typename real>
struct Table {
    int degree = 0, channels = 0, intervals = 0;
    real inverse_width = 0;
    std::vector<real> coefficients;
    const real* at(int interval) const { return coefficients.data() + size_t(interval) * (degree + 1) * channels; }
};
template <typename real>
constexpr int FEATURE_DEGREE = sizeof(real) == 4 ? 4 : 9;

// A directed edge: the row's atom and one neighbour within the cutoff.
template <typename real>
struct Edge {
    int32_t j;             // the neighbour (a row of the feature arrays)
    int32_t interval;      // where in the table the distance lies,
    real t;                // and how far into the interval
    real f, slope;         // envelope f(r) and f'(r)
    real u[3];             // (r_j - r_i) / r
};

template <typename real>
struct Row {
    const Edge<real>* begin;
    const Edge<real>* end;
};

// What a layer reads of all atoms. Row r of `qkv` is [q | k | v]; for the first layer the rows are elements.
template <typename real>
struct LayerView {
    const Table<real>* table;
    const real* qkv;             // (rows, 3 F)
    const int32_t* row_of;       // atom -> row of qkv; null: the atom itself
    const real* dm;              // (n, F)     dE/dm, backward only
    const real* dM;              // (n, 3, F)  dE/dM, backward only
};

template <typename real, int L, int D, bool DIFFERENTIAL>
struct Messages {
    static constexpr int F = L * D;
    using V = Lanes<real, L>;
    using vec = typename V::vector;

    static BAMBOO_INLINE const real* qkv_of(const LayerView<real>& layer, int32_t atom) {
        return layer.qkv + size_t(3 * F) * (layer.row_of ? layer.row_of[atom] : atom);
    }

    // sum the lanes of the two halves of each head; GET has only one
    static BAMBOO_INLINE vec fold(vec x) {
        if constexpr (!DIFFERENTIAL) return x;
        typename Lanes<real, L / 2>::vector half[2];
        std::memcpy(half, &x, sizeof(x));
        half[0] = half[1] = half[0] + half[1];
        std::memcpy(&x, half, sizeof(x));
        return x;
    }
    // the second logit of a head counts negative
    static BAMBOO_INLINE vec signed_by_half(vec x) {
        if constexpr (!DIFFERENTIAL) return x;
        typename Lanes<real, L / 2>::vector half[2];
        std::memcpy(half, &x, sizeof(x));
        half[1] = -half[1];
        std::memcpy(&x, half, sizeof(x));
        return x;
    }

    static BAMBOO_INLINE vec logit(const real* q, const real* k) {
        vec sum = V::load(q) * V::load(k);
        for (int d = 1; d < D; ++d) sum += V::load(q + d * L) * V::load(k + d * L);
        return sum;
    }

    static BAMBOO_INLINE void feature(const Table<real>& table, const Edge<real>& edge, vec* e) {
        const real* c = table.at(edge.interval);
        for (int d = 0; d < D; ++d) e[d] = V::load(c + d * L);
        for (int power = 0; power < FEATURE_DEGREE<real>; ++power) {
            c += F;
            for (int d = 0; d < D; ++d) e[d] = e[d] * edge.t + V::load(c + d * L);
        }
    }
    static BAMBOO_INLINE void feature_and_slope(const Table<real>& table, const Edge<real>& edge, vec* e, vec* slope) {
        const real* c = table.at(edge.interval);
        for (int d = 0; d < D; ++d) {
            slope[d] = V::load(c + d * L);
            e[d] = slope[d] * edge.t + V::load(c + F + d * L);
        }
        for (int power = 2; power <= FEATURE_DEGREE<real>; ++power)
            for (int d = 0; d < D; ++d) {
                slope[d] = slope[d] * edge.t + e[d];
                e[d] = e[d] * edge.t + V::load(c + power * F + d * L);
            }
        for (int d = 0; d < D; ++d) slope[d] *= table.inverse_width;
    }

    // m (F,) and M (3, F) of atom i
    template <bool VECTORS>
    static void forward(const LayerView<real>& layer, int32_t i, Row<real> row, real* m_out, real* M_out) {
        const real* q = qkv_of(layer, i);
        vec m[D] = {}, M[3][D] = {};
        for (const Edge<real>* edge = row.begin; edge != row.end; ++edge) {
            const real *k = qkv_of(layer, edge->j) + F, *v = k + F;
            vec e[D];
            feature(*layer.table, *edge, e);
            const vec l = logit(q, k);
            const vec a = fold(signed_by_half(l * V::sigmoid(l))) * edge->f;
            for (int d = 0; d < D; ++d) {
                const vec carried = V::load(v + d * L) * e[d];
                m[d] += carried * a;
                if constexpr (VECTORS)
                    for (int x = 0; x < 3; ++x) M[x][d] += carried * edge->u[x];
            }
        }
        for (int d = 0; d < D; ++d) V::store(m_out + d * L, m[d]);
        if constexpr (VECTORS)
            for (int x = 0; x < 3; ++x)
                for (int d = 0; d < D; ++d) V::store(M_out + x * F + d * L, M[x][d]);
    }

    // Backward of atom i's share in the energy. As every edge has its reverse in the list, the row of i holds all that
    // atom i sends and all that it receives; so nothing is ever added to another atom's numbers.
    //
    // As sender (to j): adds [dE/dr, dE/du_x, dE/du_y, dE/du_z] of the edge j <- i, u = (r_i - r_j) / r, to `geometry`
    // (4 per edge), and collects dE/dk_i, dE/dv_i. As receiver (from j): collects dE/dq_i.
    // NODES false: only `geometry` (in the first layer q, k, v depend on the elements alone).
    template <bool VECTORS, bool NODES>
    static void backward(const LayerView<real>& layer, int32_t i, Row<real> row, real* geometry, real* dqkv) {
        const real *q = qkv_of(layer, i), *k = q + F, *v = k + F, *dm = layer.dm + size_t(F) * i;
        vec dq[D] = {}, dk[D] = {}, dv[D] = {};
        for (const Edge<real>* edge = row.begin; edge != row.end; ++edge, geometry += 4) {
            const int32_t j = edge->j;
            const real *q_j = qkv_of(layer, j), *k_j = q_j + F, *v_j = k_j + F, *dm_j = layer.dm + size_t(F) * j;
            const real* dM_j = VECTORS ? layer.dM + size_t(3 * F) * j : nullptr;
            vec e[D], e_slope[D];
            feature_and_slope(*layer.table, *edge, e, e_slope);

            // i sends to j: attention a and da = dE/da
            const vec l = logit(q_j, k), s = V::sigmoid(l);
            vec da = {};
            for (int d = 0; d < D; ++d) da += V::load(v + d * L) * e[d] * V::load(dm_j + d * L);
            da = fold(da);
            const vec a = fold(signed_by_half(l * s)) * edge->f;
            vec along_r = signed_by_half(l * s) * da * edge->slope;
            if constexpr (NODES) {
                const vec dl = signed_by_half(s * (real(1) + l * (real(1) - s))) * da * edge->f;
                for (int d = 0; d < D; ++d) dk[d] += dl * V::load(q_j + d * L);
            }
            vec du[3] = {};
            for (int d = 0; d < D; ++d) {  // carried = v_i e;  dcarried = dE/dcarried
                vec dcarried = V::load(dm_j + d * L) * a;
                const vec value = V::load(v + d * L);
                if constexpr (VECTORS) {
                    const vec carried = value * e[d];
                    for (int x = 0; x < 3; ++x) {
                        const vec dM = V::load(dM_j + x * F + d * L);
                        dcarried -= dM * edge->u[x];
                        du[x] += carried * dM;
                    }
                }
                along_r += dcarried * value * e_slope[d];
                if constexpr (NODES) dv[d] += dcarried * e[d];
            }
            geometry[0] += V::sum(along_r);
            if constexpr (VECTORS)
                for (int x = 0; x < 3; ++x) geometry[1 + x] += V::sum(du[x]);

            if constexpr (NODES) {  // i receives from j
                const vec l_in = logit(q, k_j), s_in = V::sigmoid(l_in);
                vec da_in = {};
                for (int d = 0; d < D; ++d) da_in += V::load(v_j + d * L) * e[d] * V::load(dm + d * L);
                const vec dl_in = signed_by_half(s_in * (real(1) + l_in * (real(1) - s_in))) * fold(da_in) * edge->f;
                for (int d = 0; d < D; ++d) dq[d] += dl_in * V::load(k_j + d * L);
            }
        }
        if constexpr (NODES)
            for (int d = 0; d < D; ++d) {
                V::store(dqkv + d * L, dq[d]);
                V::store(dqkv + F + d * L, dk[d]);
                V::store(dqkv + 2 * F + d * L, dv[d]);
            }
    }
};

}  // namespace bamboo
