// Particle mesh (P3M) for charges that change at every step: one pass gives energy, potential, field and virial.
//
// E = 1/2 sum_k G(k) |S(k)|^2 with S the Fourier transform of the charges spread by B-splines of order ORDER, and
// G(k) = (4 pi k_e / V) exp(-k^2 / 4 alpha^2) / k^2 * c0(k0) c1(k1) c2(k2),  c = [sinc^p / sum_aliases sinc^2p]^2,
// the influence function that makes the energy error smallest (Ballenegger, Cerda, Holm, JCTC 8, 936 (2012); its alias
// sum over the Gaussian is dropped: it is below 1e-6 for meshes finer than 0.4 / alpha). c depends on the mesh alone,
// so the virial is exact: dG/dstrain acts on k and V only. Forces are the gradient of the mesh energy.
#pragma once

#include <complex>

#include "lists.h"

namespace bamboo {

class Mesh {
  public:
    static constexpr int ORDER = 8;

    std::array<int32_t, 3> size = {0, 0, 0};  // nodes along each cell vector
    double alpha = 0, strength = 0;           // splitting [1/A], k_e

    void locate(int32_t n, const double* positions, const Cell& cell, int threads);
    void spread(const double* charges, double* nodes, int threads) const;
    // multiplies the half spectrum (size0, size1, size2/2 + 1) by G; returns the energy and fills the virial
    double convolve(std::complex<double>* spectrum, const std::array<const double*, 3>& c, double* virial,
                    int threads) const;
    // potential (n,) and its gradient (n, 3) from the transformed-back mesh
    void gather(const double* nodes, double* potential, double* gradient, int threads) const;
    double volume() const { return volume_; }

  private:
    using V = Lanes<double, ORDER>;
    struct Site {
        int32_t first[3];  // lowest node of the stencil, before wrapping
        double weight[3][ORDER], slope[3][ORDER];
    };
    Buffer<Site> sites_;
    int32_t n_ = 0;
    Cell inverse_ = {};
    double volume_ = 0;
};

// Cardinal B-spline of order p at w + p - 1, ..., w + 1, w: the weights of p neighbouring nodes, and their derivative
inline void bspline(double w, double* weight, double* slope) {
    constexpr int p = Mesh::ORDER;
    double m[p] = {};  // m[k] = M_q(w + k)
    m[0] = w;
    m[1] = 1.0 - w;
    for (int q = 3; q <= p; ++q) {
        if (q == p)
            for (int k = 0; k < p; ++k) slope[p - 1 - k] = (k < p - 1 ? m[k] : 0.0) - (k > 0 ? m[k - 1] : 0.0);
        for (int k = q - 1; k >= 0; --k) {
            const double x = w + k, here = k < q - 1 ? m[k] : 0.0, before = k > 0 ? m[k - 1] : 0.0;
            m[k] = (x * here + (q - x) * before) / (q - 1);
        }
    }
    for (int k = 0; k < p; ++k) weight[p - 1 - k] = m[k];
}

inline void Mesh::locate(int32_t n, const double* positions, const Cell& cell, int threads) {
    n_ = n;
    inverse_ = inverse_of(cell, volume_);
    sites_.reserve(n);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int32_t i = 0; i < n; ++i) {
        Site& site = sites_[i];
        const std::array<double, 3> r = {positions[3 * i], positions[3 * i + 1], positions[3 * i + 2]};
        for (int d = 0; d < 3; ++d) {
            const double fraction = dot(inverse_[d], r), u = (fraction - std::floor(fraction)) * size[d];
            const int32_t below = int32_t(u);
            site.first[d] = below - ORDER + 1;
            bspline(u - below, site.weight[d], site.slope[d]);
        }
    }
}

inline int32_t wrapped(int32_t node, int32_t size) {
    node %= size;
    return node < 0 ? node + size : node;
}

// Each thread owns a range of planes and adds what falls into them, atom after atom: the same sums on any thread.
inline void Mesh::spread(const double* charges, double* nodes, int threads) const {
    const size_t plane = size_t(size[1]) * size[2];
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int thread = 0; thread < threads; ++thread) {
        const int32_t begin = size[0] * thread / threads, end = size[0] * (thread + 1) / threads;
        std::fill(nodes + begin * plane, nodes + end * plane, 0.0);
        for (int32_t i = 0; i < n_; ++i) {
            const Site& site = sites_[i];
            const V::vector weight = V::load(site.weight[2]);
            const int32_t first = wrapped(site.first[2], size[2]);
            for (int a = 0; a < ORDER; ++a) {
                const int32_t node = wrapped(site.first[0] + a, size[0]);
                if (node < begin || node >= end) continue;
                for (int b = 0; b < ORDER; ++b) {
                    double* line = nodes + node * plane + size_t(wrapped(site.first[1] + b, size[1])) * size[2];
                    const double factor = charges[i] * site.weight[0][a] * site.weight[1][b];
                    if (first + ORDER <= size[2]) V::store(line + first, V::load(line + first) + factor * weight);
                    else
                        for (int c = 0; c < ORDER; ++c) line[wrapped(first + c, size[2])] += factor * site.weight[2][c];
                }
            }
        }
    }
}

inline void Mesh::gather(const double* nodes, double* potential, double* gradient, int threads) const {
    const size_t plane = size_t(size[1]) * size[2];
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int32_t i = 0; i < n_; ++i) {
        const Site& site = sites_[i];
        const int32_t first = wrapped(site.first[2], size[2]);
        V::vector value = {}, du[2] = {};  // not yet multiplied by the weights along the third axis
        for (int a = 0; a < ORDER; ++a) {
            const double* at = nodes + wrapped(site.first[0] + a, size[0]) * plane;
            for (int b = 0; b < ORDER; ++b) {
                const double* line = at + size_t(wrapped(site.first[1] + b, size[1])) * size[2];
                V::vector at_nodes;
                if (first + ORDER <= size[2]) at_nodes = V::load(line + first);
                else
                    for (int c = 0; c < ORDER; ++c) at_nodes[c] = line[wrapped(first + c, size[2])];
                value += (site.weight[0][a] * site.weight[1][b]) * at_nodes;
                du[0] += (site.slope[0][a] * site.weight[1][b]) * at_nodes;
                du[1] += (site.weight[0][a] * site.slope[1][b]) * at_nodes;
            }
        }
        const V::vector weight = V::load(site.weight[2]);
        const V::vector weight_slope = V::load(site.slope[2]);
        const double slope[3] = {V::sum(du[0] * weight), V::sum(du[1] * weight), V::sum(value * weight_slope)};
        potential[i] = V::sum(value * weight);
        for (int x = 0; x < 3; ++x) {
            gradient[3 * i + x] = 0;
            for (int d = 0; d < 3; ++d) gradient[3 * i + x] += slope[d] * size[d] * inverse_[d][x];
        }
    }
}

inline double Mesh::convolve(std::complex<double>* spectrum, const std::array<const double*, 3>& c, double* virial,
                             int threads) const {
    const int32_t half = size[2] / 2 + 1;
    std::vector<std::array<double, 7>> partial(size[0]);  // energy and virial of each plane, added in order
#pragma omp parallel num_threads(threads)
    {
        std::vector<double> exponent(half + ORDER);
#pragma omp for schedule(static)
        for (int32_t k0 = 0; k0 < size[0]; ++k0) {
            std::array<double, 7> sum = {};
            const double m0 = k0 <= size[0] / 2 ? k0 : k0 - size[0];
            for (int32_t k1 = 0; k1 < size[1]; ++k1) {
                const double m1 = k1 <= size[1] / 2 ? k1 : k1 - size[1];
                auto wave = [&](int32_t m2) {
                    std::array<double, 3> k;
                    for (int x = 0; x < 3; ++x)
                        k[x] = 2.0 * M_PI * (m0 * inverse_[0][x] + m1 * inverse_[1][x] + m2 * inverse_[2][x]);
                    return k;
                };
                for (int32_t m2 = 0; m2 < half; ++m2) {
                    const std::array<double, 3> k = wave(m2);
                    exponent[m2] = -dot(k, k) / (4.0 * alpha * alpha);
                }
                for (int32_t m2 = 0; m2 < half; m2 += ORDER)
                    V::store(&exponent[m2], V::exponential(V::load(&exponent[m2])));
                std::complex<double>* line = spectrum + (size_t(k0) * size[1] + k1) * half;
                const double factor = 4.0 * M_PI * strength / volume_ * c[0][k0] * c[1][k1];
                for (int32_t m2 = 0; m2 < half; ++m2) {
                    const std::array<double, 3> k = wave(m2);
                    const double square = dot(k, k);
                    // the last waves of an even mesh are their own aliases, of no definite direction: left out
                    const bool edge = 2 * k0 == size[0] || 2 * k1 == size[1] || 2 * m2 == size[2];
                    const double G = square > 0 && !edge ? factor * c[2][m2] * exponent[m2] / square : 0.0;
                    const double both = m2 == 0 ? 0.5 : 1.0;  // every k with m2 > 0 stands for -k as well
                    const double energy = both * G * std::norm(line[m2]);
                    const double stretch = square > 0 ? 2.0 * energy * (1.0 / square + 0.25 / (alpha * alpha)) : 0.0;
                    sum[0] += energy;
                    int component = 1;
                    for (int x = 0; x < 3; ++x)
                        for (int y = x; y < 3; ++y) sum[component++] -= stretch * k[x] * k[y];
                    line[m2] *= G;
                }
            }
            partial[k0] = sum;
        }
    }
    std::array<double, 7> total = {};
    for (const auto& sum : partial)
        for (int component = 0; component < 7; ++component) total[component] += sum[component];
    int component = 1;
    for (int x = 0; x < 3; ++x)
        for (int y = x; y < 3; ++y) {
            virial[3 * x + y] = total[component++] + (x == y ? total[0] : 0.0);
            virial[3 * y + x] = virial[3 * x + y];
        }
    return total[0];
}

}  // namespace bamboo
