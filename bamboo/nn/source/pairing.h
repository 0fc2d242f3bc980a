// Every pair of a full neighbour list once.
#pragma once

#include <cstdint>
#include <vector>

namespace {

// Edges p, receiver[p] <- sender[p], have vectors vec (n_edges, 3) and are sorted by receiver. Finds for every edge the
// edge that runs the other way (several images of a pair differ in their vector) and keeps one of the two: its number
// in kept, its sender in other, both (n_edges / 2), and in first (n_atoms + 1) where the kept edges of a receiver begin.
// Returns false if the edges are not sorted or one has no counterpart.
template <class T>
bool pair_up(int64_t n_atoms, int64_t n_edges, const int64_t *receiver, const int64_t *sender, const T *vec,
             int64_t *first, int64_t *other, int64_t *kept) {
    constexpr T SAME = T(1e-6);  // Å^2, far below the distance between two images
    std::vector<int64_t> row(n_atoms + 1, 0);
    for (int64_t p = 0; p < n_edges; ++p) {
        if (p && receiver[p] < receiver[p - 1]) return false;
        ++row[receiver[p] + 1];
    }
    for (int64_t i = 0; i < n_atoms; ++i) row[i + 1] += row[i];
    std::vector<bool> taken(n_edges, false);
    int64_t count = 0, atom = 0;
    first[0] = 0;
    for (int64_t p = 0; p < n_edges; ++p) {
        const int64_t i = receiver[p], j = sender[p];
        while (atom < i) first[++atom] = count;
        if (taken[p]) continue;
        int64_t back = row[j];
        for (; back < row[j + 1]; ++back) {
            if (sender[back] != i || back == p || taken[back]) continue;
            const T x = vec[3 * p] + vec[3 * back], y = vec[3 * p + 1] + vec[3 * back + 1];
            const T z = vec[3 * p + 2] + vec[3 * back + 2];
            if (x * x + y * y + z * z < SAME) break;
        }
        if (back == row[j + 1]) return false;
        taken[p] = taken[back] = true;
        kept[count] = p;
        other[count++] = j;
    }
    while (atom < n_atoms) first[++atom] = count;
    return true;
}

}  // namespace
