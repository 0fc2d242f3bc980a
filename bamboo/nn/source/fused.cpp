// Library behind bamboo/nn/fused.py. Every function has one plain C form for float32 and one for float64: sizes, settings
// and arrays, in the order in which the functions below take them.

// Loops are vectorised: sums may be reordered, and no number here is infinite unless the input is broken.
#pragma GCC optimize("associative-math", "no-signed-zeros", "finite-math-only")

#include "atoms.h"
#include "coulomb.h"
#include "edges.h"
#include "messages.h"
#include "pairing.h"

namespace {

template <class T> struct Call {
    const int64_t *sizes;
    const double *settings;
    void *const *arrays;

    int64_t size(int n) const { return sizes[n]; }
    T *operator[](int n) const { return static_cast<T *>(arrays[n]); }
    int64_t *index(int n) const { return static_cast<int64_t *>(arrays[n]); }
    double *doubles(int n) const { return static_cast<double *>(arrays[n]); }
};

template <class T> void pair_up(const Call<T> &a) {
    *a.index(6) = pair_up(a.size(0), a.size(1), a.index(0), a.index(1), a[2], a.index(3), a.index(4), a.index(5));
}

template <class T, bool VECTORS, class Body> void messages_of_size(const Call<T> &a, Body body) {
    const Pairs pairs{a.size(0), a.index(0), a.index(1), int(a.size(1)), int(a.size(2)), int(a.size(3))};
    if (pairs.channels == 64 && pairs.per_head == 4)
        body(Messages<T, 64, 4, VECTORS>{pairs, a[2], a[3], a[4], a[5]});
    else
        body(Messages<T, 0, 0, VECTORS>{pairs, a[2], a[3], a[4], a[5]});
}
template <class T, class Body> void messages_of(const Call<T> &a, Body body) {
    if (a.size(4))
        messages_of_size<T, true>(a, body);
    else
        messages_of_size<T, false>(a, body);
}
template <class T> void messages(const Call<T> &a) {
    messages_of(a, [&](const auto &messages) { messages.forward(a[6], a[7]); });
}
template <class T> void messages_backward(const Call<T> &a) {
    messages_of(a, [&](const auto &messages) { messages.backward(a[6], a[7], a[8], a[9], a[10], a[11]); });
}
template <class T> void messages_second(const Call<T> &a) {
    messages_of(a, [&](const auto &messages) {
        messages.second(a[6], a[7], {a[8], a[9], a[10], a[11]}, a[12], a[13], a[14], a[15], a[16], a[17]);
    });
}

template <class T> Norm<T> norm_of(const Call<T> &a) {
    return {a.size(0), int(a.size(1)), int(a.size(2)), a.settings[0], a[0], a[1], a[2]};
}
template <class T> void norm(const Call<T> &a) { norm_of(a).forward(a[3]); }
template <class T> void norm_backward(const Call<T> &a) { norm_of(a).backward(a[3], a[4], a[5], a[6]); }
template <class T> void norm_second(const Call<T> &a) {
    norm_of(a).second(a[3], a[4], a[5], a[6], a[7], a[8], a[9], a[10]);
}

template <class T> Update<T> update_of(const Call<T> &a) {
    return {a.size(0), int(a.size(1)), int(a.size(2)), int(a.size(3)), a[0], a[1]};
}
template <class T> void update(const Call<T> &a) { update_of(a).forward(a[2], a[3]); }
template <class T> void update_backward(const Call<T> &a) { update_of(a).backward(a[2], a[3], a[4], a[5]); }
template <class T> void update_second(const Call<T> &a) {
    update_of(a).second(a[2], a[3], a[4], a[5], a[6], a[7], a[8], a[9]);
}

template <class T> Basis<T> basis_of(const Call<T> &a) {
    return {a.size(0), int(a.size(1)), int(a.size(2)), a.settings[0], a.settings[1], a[0], a[1], a[2]};
}
template <class T> void basis(const Call<T> &a) { basis_of(a).forward(a[3]); }
template <class T> void basis_backward(const Call<T> &a) { basis_of(a).backward(a[3], a[4], a[5]); }
template <class T> void activate(const Call<T> &a) { activate(a.size(0), a.size(1), a[0], a[1]); }
template <class T> void activate_backward(const Call<T> &a) {
    activate_backward(a.size(0), a.size(1), a[0], a[1], a[2], a[3]);
}
template <class T> void contract(const Call<T> &a) { contract(a.size(0), a.size(1), a.size(2), a[0], a[1], a[2]); }
template <class T> void contract_backward(const Call<T> &a) {
    contract_backward(a.size(0), a.size(1), a.size(2), a[0], a[1], a[2], a[3], a[4]);
}

template <class T> Coulomb<T> coulomb_of(const Call<T> &a) {
    return {a.size(0),     a.size(1),     a.size(2),     a.index(0),    a.index(1),    a.index(2), a.doubles(3),
            a.settings[0], a.settings[1], a.settings[2], a.settings[3], a.settings[4], a[4],       a[5]};
}
template <class T> void coulomb(const Call<T> &a) { coulomb_of(a).forward(a[6]); }
template <class T> void coulomb_backward(const Call<T> &a) { coulomb_of(a).backward(a[6], a[7], a[8]); }
template <class T> void coulomb_second(const Call<T> &a) {
    coulomb_of(a).second(a[6], a[7], a[8], a[9], a[10], a[11]);
}

}  // namespace

#define C_FUNCTION(NAME, TYPE, T)                                                                                      \
    extern "C" __attribute__((visibility("default"))) void NAME##_##TYPE(const int64_t *sizes, const double *settings, \
                                                                         void *const *arrays) {                        \
        NAME(Call<T>{sizes, settings, arrays});                                                                        \
    }
#define EXPORT(NAME) C_FUNCTION(NAME, float32, float) C_FUNCTION(NAME, float64, double)

EXPORT(pair_up)
EXPORT(messages)
EXPORT(messages_backward)
EXPORT(messages_second)
EXPORT(norm)
EXPORT(norm_backward)
EXPORT(norm_second)
EXPORT(update)
EXPORT(update_backward)
EXPORT(update_second)
EXPORT(coulomb)
EXPORT(coulomb_backward)
EXPORT(coulomb_second)
EXPORT(basis)
EXPORT(basis_backward)
EXPORT(activate)
EXPORT(activate_backward)
EXPORT(contract)
EXPORT(contract_backward)
