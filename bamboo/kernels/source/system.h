// One system from positions to energy, charges, forces and virial.
#pragma once

#include "mesh.h"
#include "network.h"
#include "pairs.h"

namespace bamboo {

template <typename real>
struct Model {
    Network<real> network;
    FixedPairs<real> fixed;
    PairTable real_space;   // Coulomb of unit charges in a periodic box, without the long-range part [eV]
    DampedCoulomb damped;   // Coulomb of unit charges in a cluster
    double cutoff = 0, charge_limit = 0, alpha = 0;
    std::vector<double> chi_square, hardness, reference_charge;  // by atomic number

    void prepare(const Parameters& p) {
        cutoff = p.number("cutoff");
        charge_limit = p.number("charge_limit");
        alpha = p.number("coulomb.alpha");
        chi_square = p.array("chi_square");
        hardness = p.array("hardness");
        reference_charge = p.array("reference_charge");
        network.prepare(p);
        fixed.prepare(p);
        real_space.prepare(p.array("coulomb.real_space"), cutoff);
        damped = {p.number("coulomb.strength"), p.number("coulomb.contact"), p.number("coulomb.sharpness")};
    }
};

// energies [eV] and the raw charge [e]
struct Totals {
    double network, electrostatic, electronegativity, dispersion, repulsion, raw_charge;
};

template <typename real>
class System {
  public:
    explicit System(const Model<real>& model) : model_(model) {}

    void build(int32_t n, const int32_t* numbers, const double* positions, const Cell& cell, bool periodic, double skin,
               int threads);
    // Edges, network and charges. closest: distance and two atoms of the nearest pair (distance < 0: no pair).
    void forward(const double* positions, const Cell& cell, double total_charge, double* closest, int threads);
    Mesh& mesh() { return mesh_; }
    void spread(double* nodes, int threads);
    double convolve(std::complex<double>* spectrum, const std::array<const double*, 3>& influence, int threads) {
        return mesh_energy_ = mesh_.convolve(spectrum, influence, mesh_virial_, threads);
    }
    // Everything else; nodes: the potential on the mesh, null for a cluster. full: charges respond to the positions.
    void backward(const double* nodes, bool full, Totals& totals, double* charges, double* forces, double* virial,
                  double* dipole, int threads);

  private:
    void place_images(const double* positions, int threads);
    void find_edges(double* closest, int threads);
    void charges_from_network(double total_charge);
    void coulomb_of_box(int threads);
    void coulomb_of_cluster(int threads);
    double add_mesh(const double* nodes, int threads);
    void edge_forces(int threads);
    void dispersion_forces(int threads);
    int32_t first_row(const List& list, int thread, int threads) const;

    const Model<real>& model_;
    Neighborhood near_;
    int32_t n_ = 0;
    bool periodic_ = false;
    Cell cell_ = {};
    double total_charge_ = 0;
    std::vector<int32_t> numbers_, image_number_, home_;  // internal atoms; images; internal atom -> image
    Buffer<double> position_, image_;                     // (n, 3) internal order; (n_images, 3)
    Buffer<real> x_, y_, z_;                              // images relative to a common origin
    // edges within the cutoff; row i starts at near_.edges.start[i]
    Graph<real> graph_;
    Buffer<int32_t> row_count_;
    Buffer<Edge<real>> edges_;
    Buffer<double> distance_, unit_energy_, unit_slope_;  // r, and Coulomb of unit charges and its derivative
    Buffer<real> geometry_;                               // (edges, 4)
    Activations<real> activations_;
    Buffer<real> charge_adjoint_;
    Buffer<double> raw_, charge_, potential_, mesh_potential_, mesh_gradient_;
    std::vector<Collected> collected_;
    Mesh mesh_;
    double mesh_energy_ = 0, mesh_virial_[9] = {};
};

template <typename real>
void System<real>::build(int32_t n, const int32_t* numbers, const double* positions, const Cell& cell, bool periodic,
                         double skin, int threads) {
    n_ = n;
    periodic_ = periodic;
    const double dispersion_reach = model_.fixed.cutoff > 0 ? model_.fixed.cutoff + skin : 0.0;
    near_.build(n, positions, cell, periodic, model_.cutoff + skin, dispersion_reach, threads);
    numbers_.resize(n);
    for (int32_t i = 0; i < n; ++i) numbers_[i] = numbers[near_.order[i]];
    image_number_.resize(near_.n_images());
    for (int32_t k = 0; k < near_.n_images(); ++k) image_number_[k] = numbers_[near_.owner[k]];
    home_ = near_.home;
    const size_t capacity = near_.edges.image.size();
    edges_.reserve(capacity);
    distance_.reserve(capacity);
    geometry_.reserve(4 * capacity);
    if (periodic) {
        unit_energy_.reserve(capacity);
        unit_slope_.reserve(capacity);
    }
    for (Buffer<double>* buffer : {&raw_, &charge_, &potential_, &mesh_potential_}) buffer->reserve(n);
    position_.reserve(3 * size_t(n));
    mesh_gradient_.reserve(3 * size_t(n));
    charge_adjoint_.reserve(n);
    row_count_.reserve(n);
    graph_ = {n, numbers_.data(), near_.edges.start.data(), row_count_.data(), edges_.data()};
}

template <typename real>
void System<real>::place_images(const double* positions, int threads) {
    double origin[3] = {0, 0, 0};
    for (int32_t i = 0; i < n_; ++i)
        for (int x = 0; x < 3; ++x) position_[3 * i + x] = positions[3 * size_t(near_.order[i]) + x];
    const int32_t count = near_.n_images();
    image_.reserve(3 * size_t(count));
    for (Buffer<real>* buffer : {&x_, &y_, &z_}) buffer->reserve(count);
    auto image_at = [&](int32_t k, int x) {
        double at = position_[3 * size_t(near_.owner[k]) + x];
        for (int d = 0; d < 3; ++d) at += near_.shift[k][d] * cell_[d][x];
        return at;
    };
    for (int x = 0; x < 3; ++x) origin[x] = image_at(home_[0], x);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int32_t k = 0; k < count; ++k) {
        for (int x = 0; x < 3; ++x) image_[3 * size_t(k) + x] = image_at(k, x);
        x_[k] = real(image_[3 * size_t(k)] - origin[0]);
        y_[k] = real(image_[3 * size_t(k) + 1] - origin[1]);
        z_[k] = real(image_[3 * size_t(k) + 2] - origin[2]);
    }
}

// The edges within the cutoff: lengths and directions in double precision, then envelope and place in the tables.
template <typename real>
void System<real>::find_edges(double* closest, int threads) {
    const Table<real>& table = model_.network.table;
    const double cutoff = model_.cutoff, inverse_width = table.intervals / cutoff;
    std::vector<std::array<double, 3>> nearest(threads, {cutoff, -1, -1});
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int thread = 0; thread < threads; ++thread) {
        Found found;
        const int32_t end = first_row(near_.edges, thread + 1, threads);
        for (int32_t i = first_row(near_.edges, thread, threads); i < end; ++i) {
            const int64_t start = near_.edges.start[i], listed = near_.edges.start[i + 1] - start;
            found.reserve(size_t(listed) + 8);
            const double* r_i = &image_[3 * size_t(home_[i])];
            int32_t count = 0;
            for (int64_t k = start; k < start + listed; ++k) {  // append without branching
                const double* r_j = &image_[3 * size_t(near_.edges.image[k])];
                const double x = r_j[0] - r_i[0], y = r_j[1] - r_i[1], z = r_j[2] - r_i[2];
                const double square = x * x + y * y + z * z;
                found.image[count] = near_.edges.image[k];
                found.x[count] = x;
                found.y[count] = y;
                found.z[count] = z;
                found.r[count] = square;
                count += square < cutoff * cutoff;
            }
            row_count_[i] = count;
            for (int32_t k = 0; k < count; ++k) found.r[k] = std::sqrt(found.r[k]);
            envelope(count, cutoff, found.r.data(), found.f.data(), found.slope.data());
            for (int32_t k = 0; k < count; ++k) {
                const double r = found.r[k], inverse = 1.0 / std::max(r, 1e-12);
                const int32_t j = near_.owner[found.image[k]];
                const int32_t interval = std::min(int32_t(r * inverse_width), table.intervals - 1);
                const double ux = found.x[k] * inverse, uy = found.y[k] * inverse, uz = found.z[k] * inverse;
                edges_[start + k] = {j, interval, real(r * inverse_width - interval), real(found.f[k]),
                                     real(found.slope[k]), {real(ux), real(uy), real(uz)}};
                distance_[start + k] = r;
                if (r < nearest[thread][0]) nearest[thread] = {r, double(i), double(j)};
            }
            if (periodic_) {
#pragma omp simd
                for (int32_t k = 0; k < count; ++k)
                    model_.real_space.evaluate(found.r[k], unit_energy_[start + k], unit_slope_[start + k]);
            }
            std::memset(geometry_.data() + 4 * start, 0, 4 * size_t(count) * sizeof(real));
        }
    }
    const auto& best = *std::min_element(nearest.begin(), nearest.end());
    closest[0] = best[1] < 0 ? -1.0 : best[0];
    for (int atom = 1; atom < 3; ++atom) closest[atom] = best[1] < 0 ? -1.0 : near_.order[int32_t(best[atom])];
}

// q~ = q_ub tanh((MLP + q0) / q_ub);  q = q~ + (Q - sum q~) / N
template <typename real>
void System<real>::charges_from_network(double total_charge) {
    total_charge_ = total_charge;
    double sum = 0;
    for (int32_t i = 0; i < n_; ++i) {
        const double free = double(activations_.charge[i]) + model_.reference_charge[numbers_[i]];
        raw_[i] = model_.charge_limit * std::tanh(free / model_.charge_limit);
        sum += raw_[i];
    }
    for (int32_t i = 0; i < n_; ++i) charge_[i] = raw_[i] + (total_charge - sum) / n_;
}

template <typename real>
void System<real>::forward(const double* positions, const Cell& cell, double total_charge, double* closest,
                           int threads) {
    cell_ = cell;
    place_images(positions, threads);
    find_edges(closest, threads);
    model_.network.forward(graph_, activations_, threads);
    charges_from_network(total_charge);
}

template <typename real>
void System<real>::spread(double* nodes, int threads) {
    mesh_.alpha = model_.alpha;
    mesh_.strength = model_.damped.strength;
    mesh_.locate(n_, position_.data(), cell_, threads);
    mesh_.spread(charge_.data(), nodes, threads);
}

// Potential of the real-space part at every atom: phi_i = sum_j q_j (damped(r) - erf(alpha r) / r)
template <typename real>
void System<real>::coulomb_of_box(int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int32_t i = 0; i < n_; ++i) {
        const int64_t start = near_.edges.start[i];
        double potential = 0;
        for (int64_t k = start; k < start + row_count_[i]; ++k) potential += charge_[edges_[k].j] * unit_energy_[k];
        potential_[i] = potential;
    }
}

// All pairs of a cluster: potential, forces at fixed charges, virial.
template <typename real>
void System<real>::coulomb_of_cluster(int threads) {
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int thread = 0; thread < threads; ++thread) {
        Collected& out = collected_[thread];
        for (int32_t i = int64_t(n_) * thread / threads; i < int64_t(n_) * (thread + 1) / threads; ++i) {
            potential_[i] = 0;
            for (int32_t j = 0; j < n_; ++j) {
                if (j == i) continue;
                double vector[3], square = 0, value, slope;
                for (int x = 0; x < 3; ++x) {
                    vector[x] = position_[3 * size_t(j) + x] - position_[3 * size_t(i) + x];
                    square += vector[x] * vector[x];
                }
                const double r = std::sqrt(square);
                model_.damped.evaluate(r, value, slope);
                potential_[i] += charge_[j] * value;
                const double factor = charge_[i] * charge_[j] * slope / r;
                for (int a = 0; a < 3; ++a) {
                    out.force[4 * size_t(i) + a] += factor * vector[a];
                    for (int b = 0; b < 3; ++b) out.virial[3 * a + b] -= 0.5 * factor * vector[a] * vector[b];
                }
            }
        }
    }
}

// Reciprocal part with self term and neutralising background: adds to potential, forces, virial; returns the energy.
template <typename real>
double System<real>::add_mesh(const double* nodes, int threads) {
    mesh_.gather(nodes, mesh_potential_.data(), mesh_gradient_.data(), threads);
    const double k_e = model_.damped.strength, self = k_e * model_.alpha / std::sqrt(M_PI);
    const double background = k_e * M_PI / (2.0 * mesh_.volume() * model_.alpha * model_.alpha);
    Collected& out = collected_[0];
    double total = 0, squares = 0;
    for (int32_t i = 0; i < n_; ++i) {
        total += charge_[i];
        squares += charge_[i] * charge_[i];
    }
    for (int32_t i = 0; i < n_; ++i) {
        potential_[i] += mesh_potential_[i] - 2.0 * self * charge_[i] - 2.0 * background * total;
        for (int x = 0; x < 3; ++x) out.force[4 * size_t(i) + x] -= charge_[i] * mesh_gradient_[3 * size_t(i) + x];
    }
    for (int k = 0; k < 9; ++k) out.virial[k] += mesh_virial_[k] - (k % 4 == 0 ? background * total * total : 0.0);
    return mesh_energy_ - self * squares - background * total * total;
}

// Forces along the edges: network (what atom i sends to j) and real-space Coulomb (half of each pair from each side).
template <typename real>
void System<real>::edge_forces(int threads) {
    using V = Lanes<double, 4>;  // x, y, z and nothing
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int thread = 0; thread < threads; ++thread) {
        Collected& out = collected_[thread];
        V::vector virial[3] = {};
        const int32_t end = first_row(near_.edges, thread + 1, threads);
        for (int32_t i = first_row(near_.edges, thread, threads); i < end; ++i) {
            const int64_t start = near_.edges.start[i];
            V::vector force = {};
            for (int64_t k = start; k < start + row_count_[i]; ++k) {
                const Edge<real>& edge = edges_[k];
                const real* g = geometry_.data() + 4 * k;  // of the edge j <- i, whose direction is -u
                const V::vector u = {edge.u[0], edge.u[1], edge.u[2], 0.0}, du = {g[1], g[2], g[3], 0.0};
                const double r = distance_[k], inverse = 1.0 / r;
                const double along = g[0] + (du[0] * u[0] + du[1] * u[1] + du[2] * u[2]) * inverse;
                const double coulomb = periodic_ ? 0.5 * charge_[i] * charge_[edge.j] * unit_slope_[k] : 0.0;
                const V::vector pull = (along + coulomb) * u - du * inverse;  // dE/d(r_j - r_i)
                double* force_j = out.force.data() + 4 * size_t(edge.j);
                force += pull;
                V::store(force_j, V::load(force_j) - pull);
                for (int x = 0; x < 3; ++x) virial[x] -= (r * u[x]) * pull;
            }
            double* force_i = out.force.data() + 4 * size_t(i);
            V::store(force_i, V::load(force_i) + force);
        }
        for (int x = 0; x < 3; ++x)
            for (int y = 0; y < 3; ++y) out.virial[3 * x + y] += virial[x][y];
    }
}

template <typename real>
void System<real>::dispersion_forces(int threads) {
    if (!(model_.fixed.cutoff > 0)) return;
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int thread = 0; thread < threads; ++thread) {
        const List& list = near_.dispersion;
        const int32_t end = first_row(list, thread + 1, threads);
        for (int32_t i = first_row(list, thread, threads); i < end; ++i)
            model_.fixed.row(i, home_[i], list.image.data() + list.start[i], list.start[i + 1] - list.start[i],
                             near_.owner.data(), image_number_.data(), x_.data(), y_.data(), z_.data(),
                             collected_[thread]);
    }
}

// Rows shared out so that every thread has about the same number of pairs.
template <typename real>
int32_t System<real>::first_row(const List& list, int thread, int threads) const {
    if (thread == threads) return n_;
    const int64_t target = list.start[n_] * thread / threads;
    return int32_t(std::lower_bound(list.start.begin(), list.start.end() - 1, target) - list.start.begin());
}

template <typename real>
void System<real>::backward(const double* nodes, bool full, Totals& totals, double* charges, double* forces,
                            double* virial, double* dipole, int threads) {
    if (int(collected_.size()) != threads) collected_ = std::vector<Collected>(threads);
    for (Collected& out : collected_) {
        out.force.zeros(4 * size_t(n_));
        std::fill(out.virial, out.virial + 9, 0.0);
        out.dispersion = out.repulsion = 0;
    }
    totals = {};
    if (periodic_) coulomb_of_box(threads);
    else coulomb_of_cluster(threads);
    for (int32_t i = 0; i < n_; ++i) totals.electrostatic += 0.5 * charge_[i] * potential_[i];
    if (nodes) totals.electrostatic += add_mesh(nodes, threads);

    // E_chi = sum chi^2 q + J^2 q^2;  dE/dq = phi + chi^2 + 2 J^2 q, then back through the shift and the bound
    double mean = 0;
    for (int32_t i = 0; i < n_; ++i) {
        const double q = charge_[i], chi2 = model_.chi_square[numbers_[i]], J = model_.hardness[numbers_[i]];
        totals.network += double(activations_.energy[i]);
        totals.electronegativity += chi2 * q + J * J * q * q;
        totals.raw_charge += raw_[i];
        potential_[i] += chi2 + 2.0 * J * J * q;
        mean += potential_[i] / n_;
    }
    for (int32_t i = 0; i < n_; ++i) {
        const double bounded = raw_[i] / model_.charge_limit;
        charge_adjoint_[i] = full ? real((potential_[i] - mean) * (1.0 - bounded * bounded)) : real(0);
    }
    model_.network.backward(graph_, activations_, charge_adjoint_.data(), geometry_.data(), threads);
    edge_forces(threads);
    dispersion_forces(threads);

    for (int32_t i = 0; i < n_; ++i) {
        const size_t caller = near_.order[i];
        charges[caller] = charge_[i];
        for (int x = 0; x < 3; ++x) {
            forces[3 * caller + x] = 0;
            for (const Collected& out : collected_) forces[3 * caller + x] += out.force[4 * size_t(i) + x];
            dipole[x] += charge_[i] * position_[3 * size_t(i) + x];
        }
    }
    for (const Collected& out : collected_) {
        for (int k = 0; k < 9; ++k) virial[k] += out.virial[k];
        totals.dispersion += out.dispersion;
        totals.repulsion += out.repulsion;
    }
}

}  // namespace bamboo
