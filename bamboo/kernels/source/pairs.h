// Energies that are sums over pairs: damped Coulomb, D3-CSO dispersion, short-range repulsion.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "network.h"

namespace bamboo {

// The listed neighbours of one atom that are within the cutoff.
struct Found {
    std::vector<int32_t> image;
    std::vector<double> x, y, z, r, f, slope;
    void reserve(size_t count) {
        if (count <= image.size()) return;
        image.resize(2 * count);
        for (std::vector<double>* values : {&x, &y, &z, &r, &f, &slope}) values->resize(2 * count);
    }
};

// f(r) = (cos(pi r / r_c) + 1) / 2 = cos^2 y and f'(r) = -(pi / r_c) sin y cos y, with y = pi r / (2 r_c) <= pi / 2
inline void envelope(int32_t count, double cutoff, const double* r, double* f, double* slope) {
    using V = Lanes<double, 8>;
    for (int32_t k = 0; k < count; k += 8) {
        const V::vector y = V::load(r + k) * (M_PI / (2.0 * cutoff));
        const V::vector sine = V::sine(y), cosine = V::sine(M_PI / 2.0 - y);
        V::store(f + k, cosine * cosine);
        V::store(slope + k, (-M_PI / cutoff) * sine * cosine);
    }
}

// One function of the distance and its derivative; polynomials of degree 5 on equal intervals of [0, cutoff].
struct PairTable {
    static constexpr int DEGREE = 5;
    double inverse_width = 0;
    int intervals = 0;
    std::vector<double> coefficients;  // (intervals, 6), highest power first

    void prepare(const std::vector<double>& values, double cutoff) {
        coefficients = values;
        intervals = int(values.size() / (DEGREE + 1));
        inverse_width = intervals / cutoff;
    }
    BAMBOO_INLINE void evaluate(double r, double& value, double& slope) const {
        const double x = r * inverse_width;
        const int interval = std::min(int(x), intervals - 1);
        const double* c = coefficients.data() + size_t(interval) * (DEGREE + 1);
        const double t = x - interval;
        double p = c[0], dp = 0;
        for (int power = 1; power <= DEGREE; ++power) {
            dp = dp * t + p;
            p = p * t + c[power];
        }
        value = p;
        slope = dp * inverse_width;
    }
};

// k_e / (r0 (1 + softplus_beta((r - r0) / r0))) and its derivative; beyond beta x = 20 it is k_e / r
struct DampedCoulomb {
    double strength, contact, sharpness;
    void evaluate(double r, double& value, double& slope) const {
        const double x = (r - contact) / contact, scaled = sharpness * x;
        const double softplus = scaled > 20.0 ? x : std::log1p(std::exp(scaled)) / sharpness;
        const double sigmoid = scaled > 20.0 ? 1.0 : 1.0 / (1.0 + std::exp(-scaled));
        value = strength / (contact * (1.0 + softplus));
        slope = -value * sigmoid / (contact * (1.0 + softplus));
    }
};

// Forces, virial (-dE/dstrain) and energies collected by one thread.
struct Collected {
    double virial[9] = {};
    double dispersion = 0, repulsion = 0;
    Buffer<double> force;  // (n, 4); the fourth is nothing
};

// E = -C6 / (r^6 + a4^6) (s6 + a1 / (1 + exp(k (r - a2 R)))), switched or shifted at the cutoff, and the ZBL wall.
template <typename real>
class FixedPairs {
  public:
    double cutoff = 0;

    void prepare(const Parameters& p) {
        cutoff = p.number("dispersion.cutoff");
        s6 = real(p.number("dispersion.s6"));
        a1 = real(p.number("dispersion.a1"));
        steepness = real(p.number("dispersion.steepness"));
        damping6 = real(std::pow(p.number("dispersion.damping_length"), 6));
        smooth = p.count("dispersion.smooth") != 0;
        start = p.number("dispersion.switch_start") * cutoff;
        repulsion = p.count("repulsion") != 0;
        covalent_radius = p.array("repulsion.covalent_radius");
        screening_weight = p.array("repulsion.screening_weight");
        screening_decay = p.array("repulsion.screening_decay");
        screening_length = p.number("repulsion.screening_length");
        inner = p.number("repulsion.inner");
        outer = p.number("repulsion.outer");
        coulomb = p.number("coulomb.strength");
        const std::vector<double>&c6_of = p.array("dispersion.c6"), &radius = p.array("dispersion.radius");
        for (int a = 0; a < ELEMENTS; ++a)
            for (int b = 0; b < ELEMENTS; ++b) {
                c6.push_back(real(std::sqrt(c6_of.at(a) * c6_of.at(b))));
                onset.push_back(real(p.number("dispersion.a2") * radius.at(a * ELEMENTS + b)));
                wall.push_back(real(repulsion ? outer * (covalent_radius.at(a) + covalent_radius.at(b)) : 0.0));
            }
    }

    // One row of the half list: atom i (its image `home`) and `count` images. Coordinates and atomic numbers are those
    // of the images; forces are added to the owners in `out`.
    void row(int32_t i, int32_t home, const int32_t* images, int64_t count, const int32_t* owner, const int32_t* number,
             const real* x, const real* y, const real* z, Collected& out) const;

  private:
    static constexpr int W = WIDTH<real>;
    using V = Lanes<real, W>;
    using vec = typename V::vector;

    vec dispersion(vec r, vec strength, vec onset, vec& slope) const;
    void repel(int number_i, int number_j, double r, double& energy, double& slope) const;

    real s6, a1, steepness, damping6;
    double start;
    bool smooth = true, repulsion = false;
    std::vector<real> c6, onset, wall;  // (ELEMENTS, ELEMENTS): C6, a2 R, reach of the repulsion
    std::vector<double> covalent_radius, screening_weight, screening_decay;
    double screening_length, inner, outer, coulomb;
};

// k_e Z_i Z_j / r phi(r / a) (1 - S((r / R - 0.6) / 0.3)) and its derivative
template <typename real>
void FixedPairs<real>::repel(int number_i, int number_j, double r, double& energy, double& slope) const {
    const double reduced = r / (covalent_radius[number_i] + covalent_radius[number_j]);
    const double scale = (std::pow(number_i, 0.23) + std::pow(number_j, 0.23)) / screening_length;
    double screening = 0, screening_slope = 0;
    for (size_t k = 0; k < screening_weight.size(); ++k) {
        const double part = screening_weight[k] * std::exp(-screening_decay[k] * r * scale);
        screening += part;
        screening_slope -= screening_decay[k] * scale * part;
    }
    const double t = std::clamp((reduced - inner) / (outer - inner), 0.0, 1.0);
    const double off = 1.0 - t * t * t * (t * (6.0 * t - 15.0) + 10.0);
    const double off_slope = -30.0 * t * t * (t - 1.0) * (t - 1.0) * reduced / r / (outer - inner);
    const double bare = coulomb * number_i * number_j / r;
    energy = bare * screening * off;
    slope = bare * (screening_slope * off + screening * off_slope - screening * off / r);
}

// Dispersion energy at r, with C6 = strength and a2 R = onset; slope receives (dE/dr) / r.
template <typename real>
BAMBOO_INLINE typename FixedPairs<real>::vec FixedPairs<real>::dispersion(vec r, vec strength, vec onset,
                                                                          vec& slope) const {
    const real tail6 = real(1.0 / std::pow(cutoff, 6)), range = real(1.0 / (cutoff - start));
    const vec r2 = r * r, r4 = r2 * r2, inverse = real(1) / (r4 * r2 + damping6);
    const vec sigmoid = V::sigmoid((onset - r) * steepness), damping = s6 + a1 * sigmoid;
    const vec energy = -strength * inverse * damping;
    slope = strength * inverse *
            (real(6) * r4 * inverse * damping + a1 * steepness * sigmoid * (real(1) - sigmoid) / r);
    if (!smooth) return energy + strength * tail6;
    vec t = (r - real(start)) * range;
    t = t > real(0) ? t : vec{};
    t = t < real(1) ? t : V::all(1);
    const vec off = real(1) - t * t * t * (t * (real(6) * t - real(15)) + real(10));
    slope = slope * off - energy * (real(30) * range) * t * t * (t - real(1)) * (t - real(1)) / r;
    return energy * off;
}

template <typename real>
void FixedPairs<real>::row(int32_t i, int32_t home, const int32_t* images, int64_t count, const int32_t* owner,
                           const int32_t* number, const real* x, const real* y, const real* z, Collected& out) const {
    const size_t row = size_t(number[home]) * ELEMENTS;
    const real edge = real(cutoff);
    vec energy_sum = {}, force_i[3] = {}, virial[6] = {};
    for (int64_t at = 0; at < count; at += W) {
        const int lanes = int(std::min<int64_t>(W, count - at));
        alignas(64) real dx[W], dy[W], dz[W], c6_lane[W], onset_lane[W], wall_lane[W], distance[W], factor[W];
        for (int l = 0; l < W; ++l) {
            const int32_t image = images[at + std::min(l, lanes - 1)];
            const size_t pair = row + number[image];
            dx[l] = x[image] - x[home];
            dy[l] = y[image] - y[home];
            dz[l] = z[image] - z[home];
            c6_lane[l] = l < lanes ? c6[pair] : real(0);
            onset_lane[l] = onset[pair];
            wall_lane[l] = l < lanes ? wall[pair] : real(0);
        }
        for (int l = 0; l < W; ++l) distance[l] = std::sqrt(dx[l] * dx[l] + dy[l] * dy[l] + dz[l] * dz[l]);
        const vec r = V::load(distance), u[3] = {V::load(dx), V::load(dy), V::load(dz)};
        const vec strength = r < edge ? V::load(c6_lane) : vec{};
        vec slope;
        const vec energy = dispersion(r, strength, V::load(onset_lane), slope);
        energy_sum += energy;
        V::store(factor, slope);
        if (repulsion)
            for (int l = 0; l < lanes; ++l)
                if (distance[l] < wall_lane[l]) {
                    double wall_energy, wall_slope;
                    repel(number[home], number[images[at + l]], distance[l], wall_energy, wall_slope);
                    out.repulsion += wall_energy;
                    factor[l] += real(wall_slope / distance[l]);
                }
        slope = V::load(factor);
        for (int d = 0; d < 3; ++d) force_i[d] += slope * u[d];
        int component = 0;
        for (int a = 0; a < 3; ++a)
            for (int b = a; b < 3; ++b) virial[component++] += slope * u[a] * u[b];
        for (int l = 0; l < lanes; ++l) {
            double* f = out.force.data() + 4 * size_t(owner[images[at + l]]);
            f[0] -= double(factor[l] * dx[l]);
            f[1] -= double(factor[l] * dy[l]);
            f[2] -= double(factor[l] * dz[l]);
        }
    }
    out.dispersion += double(V::sum(energy_sum));
    for (int d = 0; d < 3; ++d) out.force[4 * size_t(i) + d] += double(V::sum(force_i[d]));
    int component = 0;
    for (int a = 0; a < 3; ++a)
        for (int b = a; b < 3; ++b) {
            const double value = double(V::sum(virial[component++]));
            out.virial[3 * a + b] -= value;
            if (a != b) out.virial[3 * b + a] -= value;
        }
}

}  // namespace bamboo
