// Who is near whom: images of the atoms, and the two pair lists, valid for a whole skin.
//
// A periodic box is surrounded by copies of itself as far as the longest list reaches; a pair is an atom and an image.
// So boxes of any shape and size, also smaller than the cutoff, need no further care.
#pragma once

#include <algorithm>
#include <array>
#include <numeric>
#include <vector>

#include "lanes.h"

namespace bamboo {

// Rows of a list: the images near atom i are image[start[i]] ... image[start[i + 1] - 1].
struct List {
    std::vector<int64_t> start;
    std::vector<int32_t> image;
};

// Cells are row vectors: r = fraction . cell.
using Cell = std::array<std::array<double, 3>, 3>;

inline std::array<double, 3> cross(const std::array<double, 3>& a, const std::array<double, 3>& b) {
    return {a[1] * b[2] - a[2] * b[1], a[2] * b[0] - a[0] * b[2], a[0] * b[1] - a[1] * b[0]};
}
inline double dot(const std::array<double, 3>& a, const std::array<double, 3>& b) {
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2];
}
// columns of the inverse: inverse[d] . r = fraction d
inline Cell inverse_of(const Cell& cell, double& volume) {
    const double determinant = dot(cell[0], cross(cell[1], cell[2]));
    volume = std::abs(determinant);
    Cell columns = {cross(cell[1], cell[2]), cross(cell[2], cell[0]), cross(cell[0], cell[1])};
    for (auto& column : columns)
        for (double& value : column) value /= determinant;
    return columns;
}

class Neighborhood {
  public:
    std::vector<int32_t> order;  // internal atom -> atom of the caller; neighbours in space are neighbours in memory
    std::vector<int32_t> owner;  // image -> internal atom
    std::vector<std::array<int32_t, 3>> shift;  // image -> cell vectors to add to the caller's position
    std::vector<int32_t> home;   // internal atom -> its image inside the cell
    List edges;                  // full: both directions
    List dispersion;             // half: each pair once
    int32_t n_images() const { return int32_t(owner.size()); }

    void build(int32_t n, const double* positions, const Cell& cell, bool periodic, double edge_reach,
               double dispersion_reach, int threads);

  private:
    void place(int32_t n, const double* positions, Cell cell, bool periodic, double reach);
    void choose_bins(int32_t n, bool periodic, double reach, const std::array<double, 3>& margin);
    void add_images(int32_t atom, const std::array<double, 3>& fraction, bool periodic,
                    const std::array<double, 3>& margin);
    void sort_images();
    std::array<int32_t, 3> place_of(int32_t bin) const {
        return {bin / (bins_[1] * bins_[2]), bin / bins_[2] % bins_[1], bin % bins_[2]};
    }
    void search(double edge_reach, double dispersion_reach, int threads);
    void append(int32_t at, int32_t begin, int32_t end, double reach, std::vector<double>& square,
                std::vector<int32_t>& to) const;

    struct Found {  // by one thread
        std::vector<int32_t> edges, dispersion;
        std::vector<double> square;
    };
    struct Image {
        int32_t bin, atom;
        std::array<int32_t, 3> shift;  // relative to the wrapped position
    };
    std::vector<Image> images_;
    std::vector<std::array<double, 3>> wrapped_;
    std::vector<std::array<int32_t, 3>> wrap_;
    Cell cell_;
    std::array<int32_t, 3> inner_, border_, bins_;  // bins within the cell, beyond each face, in all
    std::array<double, 3> bins_per_length_;         // perpendicular to the faces
    std::vector<int32_t> bin_start_;
    std::vector<double> x_, y_, z_;
    std::vector<Found> found_;
};

inline void Neighborhood::build(int32_t n, const double* positions, const Cell& cell, bool periodic, double edge_reach,
                                double dispersion_reach, int threads) {
    place(n, positions, cell, periodic, std::max(edge_reach, dispersion_reach));
    sort_images();
    search(edge_reach, dispersion_reach, threads);
}

// Wrap the atoms and list every image within reach of the cell.
inline void Neighborhood::place(int32_t n, const double* positions, Cell cell, bool periodic, double reach) {
    std::array<double, 3> origin = {0, 0, 0}, margin;
    if (!periodic) {  // the bounding box serves as a cell without copies
        for (int d = 0; d < 3; ++d) {
            double low = positions[d], high = positions[d];
            for (int32_t i = 0; i < n; ++i) {
                low = std::min(low, positions[3 * i + d]);
                high = std::max(high, positions[3 * i + d]);
            }
            origin[d] = low - 0.01;
            cell[d] = {0, 0, 0};
            cell[d][d] = high - low + 0.02;
        }
    }
    double volume;
    const Cell inverse = inverse_of(cell, volume);
    for (int d = 0; d < 3; ++d) margin[d] = reach * std::sqrt(dot(inverse[d], inverse[d]));
    choose_bins(n, periodic, reach, margin);
    cell_ = cell;
    wrapped_.resize(n);
    wrap_.resize(n);
    images_.clear();
    for (int32_t i = 0; i < n; ++i) {
        std::array<double, 3> r, fraction;
        for (int d = 0; d < 3; ++d) r[d] = positions[3 * i + d] - origin[d];
        for (int d = 0; d < 3; ++d) {
            fraction[d] = dot(inverse[d], r);
            const double whole = periodic ? std::floor(fraction[d]) : 0.0;
            wrap_[i][d] = int32_t(whole);
            fraction[d] -= whole;
        }
        for (int d = 0; d < 3; ++d) {
            wrapped_[i][d] = r[d];
            for (int e = 0; e < 3; ++e) wrapped_[i][d] -= wrap_[i][e] * cell[e][d];
        }
        add_images(i, fraction, periodic, margin);
    }
}

// Bins about a third of the reach wide, fewer in nearly empty boxes; margin: reach as a fraction of the cell's heights.
inline void Neighborhood::choose_bins(int32_t n, bool periodic, double reach, const std::array<double, 3>& margin) {
    for (int d = 0; d < 3; ++d) inner_[d] = int32_t(std::clamp(std::floor(3.0 / margin[d]), 1.0, 1024.0));
    while (int64_t(inner_[0]) * inner_[1] * inner_[2] > std::max<int64_t>(4096, n)) {
        int32_t& largest = *std::max_element(inner_.begin(), inner_.end());
        largest = (largest + 1) / 2;
    }
    for (int d = 0; d < 3; ++d) {
        bins_per_length_[d] = margin[d] / reach * inner_[d];
        border_[d] = periodic ? int32_t(std::ceil(margin[d] * inner_[d])) : 0;
        bins_[d] = inner_[d] + 2 * border_[d];
    }
}

inline void Neighborhood::add_images(int32_t atom, const std::array<double, 3>& fraction, bool periodic,
                                     const std::array<double, 3>& margin) {
    std::array<int32_t, 3> s, copies;
    for (int d = 0; d < 3; ++d) copies[d] = periodic ? int32_t(std::ceil(margin[d])) : 0;
    auto far = [&](int d) { return periodic && std::abs(fraction[d] + s[d] - 0.5) > 0.5 + margin[d]; };
    auto bin = [&](int d) {
        const int32_t inside = std::clamp(int32_t(fraction[d] * inner_[d]), 0, inner_[d] - 1);
        return std::clamp(inside + s[d] * inner_[d] + border_[d], 0, bins_[d] - 1);
    };
    for (s[0] = -copies[0]; s[0] <= copies[0]; ++s[0]) {
        if (far(0)) continue;
        for (s[1] = -copies[1]; s[1] <= copies[1]; ++s[1]) {
            if (far(1)) continue;
            for (s[2] = -copies[2]; s[2] <= copies[2]; ++s[2])
                if (!far(2)) images_.push_back({(bin(0) * bins_[1] + bin(1)) * bins_[2] + bin(2), atom, s});
        }
    }
}

// interleave the bits of a bin's three indices: Morton's space-filling curve
inline uint64_t morton(const std::array<int32_t, 3>& bin) {
    const uint32_t a = bin[0], b = bin[1], c = bin[2];
    uint64_t code = 0;
    for (int bit = 0; bit < 20; ++bit)
        code |= (uint64_t(a >> bit & 1) << 2 | uint64_t(b >> bit & 1) << 1 | uint64_t(c >> bit & 1)) << (3 * bit);
    return code;
}

// Order the atoms along the curve, the images by bin, and lay the images' coordinates side by side.
inline void Neighborhood::sort_images() {
    const int32_t n = int32_t(wrapped_.size());
    std::vector<uint64_t> code(n);
    for (const Image& image : images_)
        if (image.shift == std::array<int32_t, 3>{0, 0, 0})
            code[image.atom] = morton(place_of(image.bin));
    order.resize(n);
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) { return code[a] < code[b]; });
    std::vector<int32_t> internal(n);
    for (int32_t i = 0; i < n; ++i) internal[order[i]] = i;

    bin_start_.assign(size_t(bins_[0]) * bins_[1] * bins_[2] + 1, 0);
    for (const Image& image : images_) ++bin_start_[image.bin + 1];
    std::partial_sum(bin_start_.begin(), bin_start_.end(), bin_start_.begin());
    std::vector<int32_t> next(bin_start_.begin(), bin_start_.end() - 1);
    const size_t count = images_.size();
    owner.resize(count);
    shift.resize(count);
    x_.resize(count);
    y_.resize(count);
    z_.resize(count);
    home.resize(n);
    for (const Image& image : images_) {
        const int32_t at = next[image.bin]++, atom = image.atom;
        owner[at] = internal[atom];
        std::array<double, 3> r = wrapped_[atom];
        for (int d = 0; d < 3; ++d) {
            shift[at][d] = image.shift[d] - wrap_[atom][d];
            for (int e = 0; e < 3; ++e) r[d] += image.shift[e] * cell_[e][d];
        }
        x_[at] = r[0];
        y_[at] = r[1];
        z_[at] = r[2];
        if (image.shift == std::array<int32_t, 3>{0, 0, 0}) home[internal[atom]] = at;
    }
}

// Images are sorted by bin, the third direction innermost: the bins of one column within reach are one run of images.
inline void Neighborhood::search(double edge_reach, double dispersion_reach, int threads) {
    const int32_t n = int32_t(order.size());
    std::array<int32_t, 3> edge_range, dispersion_range;
    for (int d = 0; d < 3; ++d) {
        edge_range[d] = int32_t(std::ceil(edge_reach * bins_per_length_[d]));
        dispersion_range[d] = int32_t(std::ceil(dispersion_reach * bins_per_length_[d]));
    }
    for (List* list : {&edges, &dispersion}) list->start.assign(n + 1, 0);
    found_.resize(threads);
    auto first_row = [&](int thread) { return int32_t(int64_t(n) * thread / threads); };
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int thread = 0; thread < threads; ++thread) {  // each searches for a contiguous range of atoms
        Found& found = found_[thread];
        found.edges.clear();
        found.dispersion.clear();
        for (int32_t i = first_row(thread); i < first_row(thread + 1); ++i) {
            const int32_t at = home[i];
            const auto next_bin = std::upper_bound(bin_start_.begin(), bin_start_.end(), at);
            const auto [a, b, c] = place_of(int32_t(next_bin - bin_start_.begin()) - 1);
            auto visit = [&, a = a, b = b, c = c](const std::array<int32_t, 3>& range, auto action) {
                const int32_t low = std::max(c - range[2], 0), high = std::min(c + range[2], bins_[2] - 1);
                for (int32_t p = std::max(a - range[0], 0); p <= std::min(a + range[0], bins_[0] - 1); ++p)
                    for (int32_t q = std::max(b - range[1], 0); q <= std::min(b + range[1], bins_[1] - 1); ++q) {
                        const int32_t column = (p * bins_[1] + q) * bins_[2];
                        action(bin_start_[column + low], bin_start_[column + high + 1]);
                    }
            };
            const size_t edges_before = found.edges.size(), dispersion_before = found.dispersion.size();
            visit(edge_range, [&](int32_t begin, int32_t end) {
                const bool own = begin <= at && at < end;
                append(at, begin, own ? at : end, edge_reach, found.square, found.edges);
                if (own) append(at, at + 1, end, edge_reach, found.square, found.edges);
            });
            // each pair once: with the atom whose image comes first; the order is the same seen from any image
            visit(dispersion_range, [&](int32_t begin, int32_t end) {
                append(at, std::max(begin, at + 1), end, dispersion_reach, found.square, found.dispersion);
            });
            edges.start[i + 1] = int64_t(found.edges.size() - edges_before);
            dispersion.start[i + 1] = int64_t(found.dispersion.size() - dispersion_before);
        }
    }
    for (List* list : {&edges, &dispersion}) {
        std::partial_sum(list->start.begin(), list->start.end(), list->start.begin());
        list->image.resize(size_t(list->start[n]));
    }
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int thread = 0; thread < threads; ++thread) {
        const Found& found = found_[thread];
        const int32_t row = first_row(thread);
        std::copy(found.edges.begin(), found.edges.end(), edges.image.begin() + edges.start[row]);
        std::copy(found.dispersion.begin(), found.dispersion.end(), dispersion.image.begin() + dispersion.start[row]);
    }
}

// Append the images begin <= k < end that are within reach of image `at`.
inline void Neighborhood::append(int32_t at, int32_t begin, int32_t end, double reach, std::vector<double>& square,
                                 std::vector<int32_t>& to) const {
    const int32_t count = end - begin;
    if (count <= 0) return;
    if (square.size() < size_t(count)) square.resize(2 * size_t(count));
    const double x = x_[at], y = y_[at], z = z_[at], limit = reach * reach;
    const double *xs = x_.data() + begin, *ys = y_.data() + begin, *zs = z_.data() + begin;
    double* squares = square.data();
    for (int32_t k = 0; k < count; ++k) {
        const double dx = xs[k] - x, dy = ys[k] - y, dz = zs[k] - z;
        squares[k] = dx * dx + dy * dy + dz * dz;
    }
    const size_t before = to.size();
    if (to.capacity() < before + count) to.reserve(2 * (before + count));
    to.resize(before + count);
    int32_t *next = to.data() + before, *const first = next;
    for (int32_t k = 0; k < count; ++k) {
        *next = begin + k;
        next += squares[k] < limit;
    }
    to.resize(before + (next - first));
}

}  // namespace bamboo
