// Energy, forces and virial of R boxes of n atoms each: pairs with their nearest image, from tables in r^2, and the
// reciprocal part of Ewald's sum. Arrays are (R, n, 3), lengths (R, 3), energy (R,), virial (R, 3, 3); the results are
// added to what is there.
#include <algorithm>
#include <cmath>
#include <complex>
#include <vector>

using Complex = std::complex<double>;

// Pairs i < j nearer than reach: starts (R n + 1,), and where neighbours is given the j of each i in rising order.
extern "C" void find_pairs(int replicas, int n, const double* positions, const double* lengths, double reach,
                           int* starts, int* neighbours) {
    std::vector<double> own(3L * n), squared(n);
    starts[0] = 0;
    for (int replica = 0; replica < replicas; ++replica) {
        for (int i = 0; i < n; ++i)
            for (int a = 0; a < 3; ++a) own[static_cast<long>(a) * n + i] = positions[3L * (n * replica + i) + a];
        for (int i = 0; i < n; ++i) {
            std::fill(squared.begin() + i, squared.end(), 0.0);
            for (int a = 0; a < 3; ++a) {
                const double* x = own.data() + static_cast<long>(a) * n;
                const double length = lengths[3 * replica + a];
                for (int j = i + 1; j < n; ++j) {
                    const double raw = x[i] - x[j], gap = raw - length * std::nearbyint(raw / length);
                    squared[j] += gap * gap;
                }
            }
            int next = starts[n * replica + i];
            for (int j = i + 1; j < n; ++j) {
                if (squared[j] >= reach * reach) continue;
                if (neighbours) neighbours[next] = j;
                ++next;
            }
            starts[n * replica + i + 1] = next;
        }
    }
}

// table (3, size, 2): energy and -dE/dr / r at r^2 = lowest + step * index; its row is the sum of the two kinds.
// Neighbours beyond the cutoff are passed over, so the sums do not depend on when the list was made.
extern "C" void add_pairs(int replicas, int n, const double* positions, const int* kind, const double* lengths,
                          const int* starts, const int* neighbours, double cutoff, const double* table, int size,
                          double lowest, double step, double* energy, double* forces, double* virial) {
    for (int replica = 0; replica < replicas; ++replica) {
        const double* x = positions + 3L * n * replica;
        const double* length = lengths + 3 * replica;
        double* f = forces + 3L * n * replica;
        double total = 0.0, w[9] = {};
        for (int i = 0; i < n; ++i) {
            double own[3] = {};
            for (int slot = starts[n * replica + i]; slot < starts[n * replica + i + 1]; ++slot) {
                const int j = neighbours[slot];
                double d[3], squared = 0.0;
                for (int a = 0; a < 3; ++a) {
                    d[a] = x[3 * i + a] - x[3 * j + a];
                    d[a] -= length[a] * std::nearbyint(d[a] / length[a]);
                    squared += d[a] * d[a];
                }
                if (squared >= cutoff * cutoff) continue;
                const double place = std::fmin(std::fmax((squared - lowest) / step, 0.0), size - 1.001);
                const int index = static_cast<int>(place);
                const double share = place - index;
                const double* row = table + 2L * (static_cast<long>(kind[i] + kind[j]) * size + index);
                total += row[0] + share * (row[2] - row[0]);
                const double strength = row[1] + share * (row[3] - row[1]);
                for (int a = 0; a < 3; ++a) {
                    own[a] += strength * d[a];
                    f[3 * j + a] -= strength * d[a];
                    for (int b = 0; b < 3; ++b) w[3 * a + b] += strength * d[a] * d[b];
                }
            }
            for (int a = 0; a < 3; ++a) f[3 * i + a] += own[a];
        }
        energy[replica] += total;
        for (int k = 0; k < 9; ++k) virial[9 * replica + k] += w[k];
    }
}

// E = 2 pi k_e / V sum_{k != 0} exp(-k^2 / 4 alpha^2) / k^2 |S(k)|^2, one half of the wave vectors counted twice
extern "C" void add_waves(int replicas, int n, const double* positions, const double* charges, double length,
                          double alpha, double reach, double coulomb,
                          double* energy, double* forces, double* virial) {
    const double unit = 2.0 * M_PI / length, volume = length * length * length;
    const int top = static_cast<int>(reach / unit), width = 2 * top + 1;
    std::vector<Complex> waves(3L * width * n), plane(n), wave(n);
    for (int replica = 0; replica < replicas; ++replica) {
        const double* x = positions + 3L * n * replica;
        const double* q = charges + static_cast<long>(n) * replica;
        double* f = forces + 3L * n * replica;
        double* w = virial + 9 * replica;
        auto row = [&](int axis, int m) { return waves.data() + (static_cast<long>(axis) * width + m + top) * n; };
        for (int axis = 0; axis < 3; ++axis)
            for (int i = 0; i < n; ++i) {
                const Complex first = std::polar(1.0, unit * x[3 * i + axis]);
                Complex power = 1.0;
                for (int m = 0; m <= top; ++m, power *= first) {
                    row(axis, m)[i] = power;
                    row(axis, -m)[i] = std::conj(power);
                }
            }
        for (int a = 0; a <= top; ++a)
            for (int b = a ? -top : 0; b <= top; ++b) {
                for (int i = 0; i < n; ++i) plane[i] = q[i] * row(0, a)[i] * row(1, b)[i];
                for (int c = a || b ? -top : 1; c <= top; ++c) {
                    const double k[3] = {unit * a, unit * b, unit * c};
                    const double squared = k[0] * k[0] + k[1] * k[1] + k[2] * k[2];
                    if (squared >= reach * reach) continue;
                    Complex sum = 0.0;
                    for (int i = 0; i < n; ++i) sum += wave[i] = plane[i] * row(2, c)[i];
                    const double weight = 4.0 * M_PI * coulomb / volume * std::exp(-squared / (4.0 * alpha * alpha)) / squared;
                    const double part = weight * std::norm(sum);
                    const double shape = 2.0 * (1.0 / squared + 1.0 / (4.0 * alpha * alpha));
                    energy[replica] += part;
                    for (int d = 0; d < 3; ++d)
                        for (int e = 0; e < 3; ++e) w[3 * d + e] += part * ((d == e) - shape * k[d] * k[e]);
                    for (int i = 0; i < n; ++i) {
                        const double pull = 2.0 * weight * (wave[i].imag() * sum.real() - wave[i].real() * sum.imag());
                        for (int d = 0; d < 3; ++d) f[3 * i + d] += pull * k[d];
                    }
                }
            }
    }
}
