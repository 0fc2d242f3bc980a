// The exponential and the logistic function, and sums over heads of four channels, in vectors of 64 bytes.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

namespace {

// e^x, relative error of a few units in the last place, in operations that the compiler vectorises: x = n ln 2 + r with
// |r| <= ln 2 / 2, a Taylor series in r, and 2^n from the bits of n. Clamped where the result would leave the range.
inline float exponential(float x) {
    x = std::min(std::max(x, -87.0f), 88.0f);
    const float n = std::floor(x * 1.44269504f + 0.5f);
    const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    float sum = 1.0f / 5040.0f;
    for (const float term : {1.0f / 720.0f, 1.0f / 120.0f, 1.0f / 24.0f, 1.0f / 6.0f, 0.5f, 1.0f, 1.0f}) sum = sum * r + term;
    const int32_t bits = (int32_t(n) + 127) << 23;
    float power;
    std::memcpy(&power, &bits, sizeof(power));
    return sum * power;
}
inline double exponential(double x) {
    x = std::min(std::max(x, -708.0), 709.0);
    const double n = std::floor(x * 1.4426950408889634 + 0.5);
    const double r = (x - n * 6.93145751953125e-1) - n * 1.42860682030941723212e-6;
    double sum = 1.0 / 6227020800.0;
    for (const double divisor : {479001600.0, 39916800.0, 3628800.0, 362880.0, 40320.0, 5040.0, 720.0, 120.0, 24.0, 6.0, 2.0,
                                 1.0, 1.0})
        sum = sum * r + 1.0 / divisor;
    const int64_t bits = (int64_t(n) + 1023) << 52;
    double power;
    std::memcpy(&power, &bits, sizeof(power));
    return sum * power;
}

template <class T> inline T logistic(T s) { return T(1) / (T(1) + exponential(-s)); }

// Derivatives of silu(s) = s l with l = logistic(s).
template <class T> inline T silu_slope(T s, T l) { return l * (T(1) + s * (T(1) - l)); }
template <class T> inline T silu_bend(T s, T l) { return l * (T(1) - l) * (T(2) + s * (T(1) - T(2) * l)); }

// sum[h] = x[4 h] + .. + x[4 h + 3] and x[4 h + d] = sum[h]; n, the length of x, is a multiple of 64.
#if defined(__GNUC__) && !defined(__clang__)
template <class T> struct Shuffle {
    static constexpr int LANES = 64 / sizeof(T);
    typedef T Vector __attribute__((vector_size(64), may_alias));
    typedef std::conditional_t<sizeof(T) == 4, int32_t, int64_t> Integer;
    typedef Integer Integers __attribute__((vector_size(64)));

    // sums of neighbouring lanes of a and b
    static inline Vector sum_twos(Vector a, Vector b) {
        Integers even = {}, odd = {};
        for (int lane = 0; lane < LANES; ++lane) {
            even[lane] = 2 * lane;
            odd[lane] = 2 * lane + 1;
        }
        return __builtin_shuffle(a, b, even) + __builtin_shuffle(a, b, odd);
    }
    // lane -> lane / 4 + quarter * LANES / 4
    static inline Vector spread(Vector a, int quarter) {
        Integers from = {};
        for (int lane = 0; lane < LANES; ++lane) from[lane] = lane / 4 + quarter * LANES / 4;
        return __builtin_shuffle(a, from);
    }
};
template <class T> inline void sum_fours(const T *x, T *sum, int n) {
    using S = Shuffle<T>;
    const auto *from = reinterpret_cast<const typename S::Vector *>(x);
    for (int v = 0; v < n / S::LANES; v += 4)
        *reinterpret_cast<typename S::Vector *>(sum + v / 4 * S::LANES) =
            S::sum_twos(S::sum_twos(from[v], from[v + 1]), S::sum_twos(from[v + 2], from[v + 3]));
}
template <class T> inline void spread_fours(const T *sum, T *x, int n) {
    using S = Shuffle<T>;
    for (int v = 0; v < n / S::LANES; ++v)
        reinterpret_cast<typename S::Vector *>(x)[v] =
            S::spread(reinterpret_cast<const typename S::Vector *>(sum)[v / 4], v % 4);
}
#else
template <class T> inline void sum_fours(const T *x, T *sum, int n) {
    for (int h = 0; h < n / 4; ++h) sum[h] = x[4 * h] + x[4 * h + 1] + x[4 * h + 2] + x[4 * h + 3];
}
template <class T> inline void spread_fours(const T *sum, T *x, int n) {
    for (int c = 0; c < n; ++c) x[c] = sum[c / 4];
}
#endif

}  // namespace
