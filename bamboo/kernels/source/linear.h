// Products of a few rows with a small matrix: y = x A (+ b).
#pragma once

#include <vector>

#include "lanes.h"

namespace bamboo {

// A matrix of shape (inputs, outputs) stored in panels of COLUMNS outputs, padded with zeros, with an optional bias.
template <typename real>
class Matrix {
  public:
    static constexpr int W = WIDTH<real>;
    static constexpr int VECTORS = VECTOR_BYTES == 64 ? 4 : 2;  // per tile row; a tile fills the registers
    static constexpr int COLUMNS = VECTORS * W, ROWS = VECTOR_BYTES == 64 ? 6 : 5;
    using V = Lanes<real, W>;
    using vector = typename V::vector;

    // weight(out, in) gives the elements of torch's Linear layer
    template <typename Weight>
    void pack(int inputs, int outputs, Weight weight) {
        inputs_ = inputs;
        outputs_ = outputs;
        panels_ = (outputs + COLUMNS - 1) / COLUMNS;
        real* to = data_.zeros(size_t(panels_) * inputs * COLUMNS);
        for (int panel = 0; panel < panels_; ++panel)
            for (int in = 0; in < inputs; ++in)
                for (int column = 0; column < COLUMNS; ++column, ++to)
                    if (panel * COLUMNS + column < outputs) *to = real(weight(panel * COLUMNS + column, in));
        bias_.zeros(size_t(panels_) * COLUMNS);
    }
    template <typename Bias>
    void set_bias(Bias bias) {
        for (int out = 0; out < outputs_; ++out) bias_[out] = real(bias(out));
    }
    int outputs() const { return outputs_; }

    // y (rows, outputs) = x (rows, inputs) A + b, or += where ADD; strides count numbers
    template <bool ADD = false>
    void apply(int rows, const real* x, int x_stride, real* y, int y_stride) const {
        for (int panel = 0; panel < panels_; ++panel) {
            const int columns = outputs_ - panel * COLUMNS;
            int row = 0;
            for (; row + ROWS <= rows; row += ROWS)
                tile<ROWS, ADD>(panel, columns, x + row * x_stride, x_stride, y + row * y_stride, y_stride);
            switch (rows - row) {  // the few rows left over
                case 5: tile<5, ADD>(panel, columns, x + row * x_stride, x_stride, y + row * y_stride, y_stride); break;
                case 4: tile<4, ADD>(panel, columns, x + row * x_stride, x_stride, y + row * y_stride, y_stride); break;
                case 3: tile<3, ADD>(panel, columns, x + row * x_stride, x_stride, y + row * y_stride, y_stride); break;
                case 2: tile<2, ADD>(panel, columns, x + row * x_stride, x_stride, y + row * y_stride, y_stride); break;
                case 1: tile<1, ADD>(panel, columns, x + row * x_stride, x_stride, y + row * y_stride, y_stride); break;
                default: break;
            }
        }
    }

  private:
    template <int R, bool ADD>
    void tile(int panel, int columns, const real* x, int x_stride, real* y, int y_stride) const {
        const real* a = data_.data() + size_t(panel) * inputs_ * COLUMNS;
        vector sum[R][VECTORS];
        for (int r = 0; r < R; ++r)
            for (int v = 0; v < VECTORS; ++v) sum[r][v] = V::load(bias_.data() + panel * COLUMNS + v * W);
        for (int in = 0; in < inputs_; ++in, a += COLUMNS) {
            vector column[VECTORS];
            for (int v = 0; v < VECTORS; ++v) column[v] = V::load(a + v * W);
            for (int r = 0; r < R; ++r) {
                const real factor = x[r * x_stride + in];
                for (int v = 0; v < VECTORS; ++v) sum[r][v] += factor * column[v];
            }
        }
        real* to = y + panel * COLUMNS;
        if (columns >= COLUMNS) {
            for (int r = 0; r < R; ++r)
                for (int v = 0; v < VECTORS; ++v) {
                    real* at = to + r * y_stride + v * W;
                    V::store(at, ADD ? V::load(at) + sum[r][v] : sum[r][v]);
                }
            return;
        }
        for (int r = 0; r < R; ++r) {
            real values[COLUMNS];
            for (int v = 0; v < VECTORS; ++v) V::store(values + v * W, sum[r][v]);
            for (int c = 0; c < columns; ++c) to[r * y_stride + c] = (ADD ? to[r * y_stride + c] : real(0)) + values[c];
        }
    }

    int inputs_ = 0, outputs_ = 0, panels_ = 0;
    Buffer<real> data_, bias_;
};

}  // namespace bamboo
