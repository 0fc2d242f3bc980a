// The exponential and the logistic function, in operations that the compiler vectorises.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

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

}  // namespace
