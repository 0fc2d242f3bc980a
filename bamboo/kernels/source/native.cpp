// The plain C interface of the native engine; every function is called through ctypes by native.py.
// Functions that can fail return 0 for success; bamboo_message() then tells why.

#include <memory>

#include "system.h"

#if defined(_WIN32)
#define EXPORT extern "C" __declspec(dllexport)
#else
#define EXPORT extern "C" __attribute__((visibility("default")))
#endif

namespace {

using namespace bamboo;

thread_local std::string message;

template <typename Action>
int guarded(Action action) {
    try {
        action();
        return 0;
    } catch (const std::exception& error) {
        message = error.what();
        return 1;
    }
}

// One precision or the other behind one handle.
struct AnyModel {
    Parameters parameters;
    bool double_precision = false;
    Model<float> single;
    Model<double> twice;
};
struct AnySystem {
    std::unique_ptr<System<float>> single;
    std::unique_ptr<System<double>> twice;
    template <typename Action>
    auto with(Action action) {
        return single ? action(*single) : action(*twice);
    }
};

Cell cell_from(const double* values) {
    Cell cell;
    for (int k = 0; k < 9; ++k) cell[k / 3][k % 3] = values[k];
    return cell;
}

}  // namespace

// Raised whenever a function below changes its arguments; native.py refuses a library of another age.
EXPORT int bamboo_interface() { return 1; }

EXPORT const char* bamboo_message() { return message.c_str(); }

// Empty where this processor has every instruction set that the library was built for, else the name of a missing one.
EXPORT const char* bamboo_missing_instructions() {
#if defined(__x86_64__) && defined(__GNUC__)
#if defined(__AVX512F__)
    if (!__builtin_cpu_supports("avx512f")) return "AVX-512";
#endif
#if defined(__AVX2__)
    if (!__builtin_cpu_supports("avx2")) return "AVX2";
#endif
#if defined(__FMA__)
    if (!__builtin_cpu_supports("fma")) return "FMA";
#endif
#endif
    return "";
}

EXPORT AnyModel* bamboo_model_new(int double_precision) {
    AnyModel* model = new (std::nothrow) AnyModel;
    if (model) model->double_precision = double_precision != 0;
    return model;
}
EXPORT void bamboo_model_delete(AnyModel* model) { delete model; }
EXPORT int bamboo_model_set(AnyModel* model, const char* name, const double* values, int64_t count) {
    return guarded([&] { model->parameters.set(name, values, count); });
}
EXPORT int bamboo_model_prepare(AnyModel* model) {
    return guarded([&] {
        if (model->double_precision) model->twice.prepare(model->parameters);
        else model->single.prepare(model->parameters);
    });
}

EXPORT AnySystem* bamboo_system_new(const AnyModel* model) {
    AnySystem* system = new (std::nothrow) AnySystem;
    if (!system) return nullptr;
    if (model->double_precision) system->twice = std::make_unique<System<double>>(model->twice);
    else system->single = std::make_unique<System<float>>(model->single);
    return system;
}
EXPORT void bamboo_system_delete(AnySystem* system) { delete system; }

EXPORT int bamboo_system_build(AnySystem* system, int64_t n, const int32_t* numbers, const double* positions,
                               const double* cell, int periodic, double skin, int threads) {
    return guarded([&] {
        system->with([&](auto& any) {
            any.build(int32_t(n), numbers, positions, cell_from(cell), periodic != 0, skin, threads);
        });
    });
}

EXPORT int bamboo_system_forward(AnySystem* system, const double* positions, const double* cell, double total_charge,
                                 double* closest, int threads) {
    return guarded([&] {
        system->with([&](auto& any) { any.forward(positions, cell_from(cell), total_charge, closest, threads); });
    });
}

EXPORT int bamboo_system_spread(AnySystem* system, const int32_t* size, double* nodes, int threads) {
    return guarded([&] {
        system->with([&](auto& any) {
            any.mesh().size = {size[0], size[1], size[2]};
            any.spread(nodes, threads);
        });
    });
}

// spectrum: complex numbers as pairs, (size0, size1, size2 / 2 + 1)
EXPORT int bamboo_system_convolve(AnySystem* system, double* spectrum, const double* c0, const double* c1,
                                  const double* c2, int threads) {
    return guarded([&] {
        system->with([&](auto& any) {
            any.convolve(reinterpret_cast<std::complex<double>*>(spectrum), {c0, c1, c2}, threads);
        });
    });
}

// totals: network, electrostatic, electronegativity, dispersion, repulsion [eV], raw charge [e]
EXPORT int bamboo_system_backward(AnySystem* system, const double* nodes, int full, double* totals, double* charges,
                                  double* forces, double* virial, double* dipole, int threads) {
    return guarded([&] {
        system->with([&](auto& any) {
            Totals sums;
            any.backward(nodes, full != 0, sums, charges, forces, virial, dipole, threads);
            std::memcpy(totals, &sums, sizeof(sums));
        });
    });
}
