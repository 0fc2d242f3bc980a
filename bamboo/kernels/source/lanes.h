// Short vectors, the functions needed on them, and memory for them.
//
// Lanes<real, L>::vector holds L numbers that are worked on at once. In the network a lane is an attention head.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <new>

namespace bamboo {

#define BAMBOO_INLINE inline __attribute__((always_inline))

template <typename real>
struct Bits;
template <>
struct Bits<float> {
    using integer = int32_t;
    static constexpr int mantissa = 23, exponential_degree = 7;
    static constexpr float round_magic = 12582912.0f, largest_exponent = 87.0f;  // 1.5 * 2^23
    static constexpr float ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f;
};
template <>
struct Bits<double> {
    using integer = int64_t;
    static constexpr int mantissa = 52, exponential_degree = 13;
    static constexpr double round_magic = 6755399441055744.0, largest_exponent = 700.0;  // 1.5 * 2^52
    static constexpr double ln2_high = 6.93145751953125e-1, ln2_low = 1.42860682030941723212e-6;
};

template <typename real, int L>
struct Lanes {
    typedef real vector __attribute__((vector_size(L * sizeof(real))));
    typedef real unaligned __attribute__((vector_size(L * sizeof(real)), aligned(sizeof(real)), may_alias));
    typedef typename Bits<real>::integer integers __attribute__((vector_size(L * sizeof(real))));

    static BAMBOO_INLINE vector load(const real* from) { return *reinterpret_cast<const unaligned*>(from); }
    static BAMBOO_INLINE void store(real* to, vector value) { *reinterpret_cast<unaligned*>(to) = value; }
    static BAMBOO_INLINE vector all(real value) { return vector{} + value; }

    static BAMBOO_INLINE real sum(vector value) {
        if constexpr (L > 4) {
            using Half = Lanes<real, L / 2>;
            typename Half::vector half[2];
            std::memcpy(half, &value, sizeof(value));
            return Half::sum(half[0] + half[1]);
        } else {
            real total = 0;
            for (int lane = 0; lane < L; ++lane) total += value[lane];
            return total;
        }
    }

    static constexpr real inverse_factorial(int k) { return k < 2 ? real(1) : inverse_factorial(k - 1) / real(k); }

    // e^x, relative error of a few units in the last place: x = n ln 2 + r, Taylor series in r, 2^n from the bits of n
    static BAMBOO_INLINE vector exponential(vector x) {
        constexpr real limit = Bits<real>::largest_exponent, magic = Bits<real>::round_magic;
        constexpr int degree = Bits<real>::exponential_degree;
        x = x < limit ? x : all(limit);
        x = x > -limit ? x : all(-limit);
        const vector shifted = x * real(1.44269504088896340736) + magic;
        const vector n = shifted - magic;
        const vector r = (x - n * Bits<real>::ln2_high) - n * Bits<real>::ln2_low;
        const vector r2 = r * r;  // even and odd powers apart: half as long a chain of dependent operations
        vector even = all(inverse_factorial(degree - 1)), odd = all(inverse_factorial(degree));
#pragma GCC unroll 8
        for (int k = degree - 2; k > 0; k -= 2) {
            odd = odd * r2 + inverse_factorial(k);
            even = even * r2 + inverse_factorial(k - 1);
        }
        const vector series = odd * r + even;
        return (vector)((integers)series + ((integers)shifted << Bits<real>::mantissa));  // casts keep the bits
    }

    // sin y for y in [0, pi / 2], Taylor series
    static BAMBOO_INLINE vector sine(vector y) {
        const vector y2 = y * y;
        vector series = all(inverse_factorial(19));
#pragma GCC unroll 9
        for (int k = 17; k > 0; k -= 2) series = inverse_factorial(k) - series * y2;
        return series * y;
    }

    static BAMBOO_INLINE vector sigmoid(vector x) { return real(1) / (real(1) + exponential(-x)); }
};

// widest vector of the processor, in numbers
#if defined(__AVX512F__)
constexpr int VECTOR_BYTES = 64;
#elif defined(__AVX__)
constexpr int VECTOR_BYTES = 32;
#else
constexpr int VECTOR_BYTES = 16;
#endif
template <typename real>
constexpr int WIDTH = VECTOR_BYTES / int(sizeof(real));

// silu(x) = x sigmoid(x), in place; slope (may be null) receives the derivative
template <typename real>
void silu(int64_t count, real* x, real* slope) {
    constexpr int W = WIDTH<real>;
    using V = Lanes<real, W>;
    int64_t k = 0;
    auto step = [&](real* at, real* slope_at) {
        const typename V::vector value = V::load(at), s = V::sigmoid(value);
        V::store(at, value * s);
        if (slope_at) V::store(slope_at, s * (real(1) + value * (real(1) - s)));
    };
    for (; k + W <= count; k += W) step(x + k, slope ? slope + k : nullptr);
    if (k < count) {
        real value[W] = {}, derivative[W] = {};
        std::memcpy(value, x + k, (count - k) * sizeof(real));
        step(value, derivative);
        std::memcpy(x + k, value, (count - k) * sizeof(real));
        if (slope) std::memcpy(slope + k, derivative, (count - k) * sizeof(real));
    }
}

// Memory that grows and never shrinks, aligned to cache lines; contents are lost when it grows.
template <typename T>
class Buffer {
  public:
    Buffer() = default;
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;
    ~Buffer() { release(); }

    T* reserve(size_t count) {
        if (count > capacity_) {
            release();
            const size_t larger = count + count / 16;
            data_ = static_cast<T*>(::operator new(larger * sizeof(T), std::align_val_t(64)));
            capacity_ = larger;
        }
        return data_;
    }
    T* zeros(size_t count) {
        std::memset(static_cast<void*>(reserve(count)), 0, count * sizeof(T));
        return data_;
    }
    T* data() { return data_; }
    const T* data() const { return data_; }
    T& operator[](size_t k) { return data_[k]; }
    const T& operator[](size_t k) const { return data_[k]; }

  private:
    void release() {
        if (data_) ::operator delete(static_cast<void*>(data_), std::align_val_t(64));
        data_ = nullptr;
        capacity_ = 0;
    }
    T* data_ = nullptr;
    size_t capacity_ = 0;
};

}  // namespace bamboo
