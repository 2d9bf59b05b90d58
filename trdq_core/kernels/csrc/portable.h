// The kernels in plain C++: right everywhere, vectorised only as far as the compiler does it by itself.
#pragma once

#include "common.h"

// Inlined always, so that avx2.h can compile the same bodies for its own registers.
#define TRDQ_PLAIN inline __attribute__((always_inline))

namespace trdq {
namespace portable {

TRDQ_PLAIN void scale(const float* x, const float* factor, float* y, int64_t n) {
  for (int64_t i = 0; i < n; i++) y[i] = x[i] * factor[i];
}

TRDQ_PLAIN void gather(const float* x, const int32_t* index, const float* factor, float* y, int64_t n) {
  for (int64_t i = 0; i < n; i++) y[i] = factor == nullptr ? x[index[i]] : x[index[i]] * factor[i];
}

TRDQ_PLAIN void rotate(const float* x, float* y, int64_t rows, int64_t width, const Rotation& rotation,
                       const int32_t* index) {
  const int64_t size = rotation.size, panel = rotation.panel;
  for (int64_t row = 0; row < rows; row++) {
    for (int64_t start = 0; start < width; start += panel) {
      const int64_t block = start / size * size;
      const float* values = x + row * width;
      const float* matrix = rotation.data + (start - block) * size;
      float* out = y + row * width + start;
      std::fill(out, out + panel, 0.0f);
      for (int64_t k = 0; k < size; k++) {
        const float value = values[index == nullptr ? block + k : index[block + k]];
        for (int64_t j = 0; j < panel; j++) out[j] += value * matrix[k * panel + j];
      }
    }
  }
}

TRDQ_PLAIN void hadamard(const float* x, float* y, int64_t n, int64_t block) {
  const float norm = 1.0f / std::sqrt(static_cast<float>(block));
  for (int64_t i = 0; i < n; i++) y[i] = x[i] * norm;
  for (int64_t half = 1; half < block; half *= 2) {
    for (int64_t start = 0; start < n; start += 2 * half) {
      float *a = y + start, *b = a + half;
      for (int64_t i = 0; i < half; i++) {
        const float sum = a[i] + b[i], difference = a[i] - b[i];
        a[i] = sum;
        b[i] = difference;
      }
    }
  }
}

TRDQ_PLAIN void range(const float* x, int64_t n, float* low, float* high) {
  // Lanes of their own: a compiler may not reorder one running minimum, but sixteen are a register or two.
  constexpr int64_t kLanes = 16;
  float lo[kLanes] = {}, hi[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int64_t j = 0; j < kLanes; j++) {
      lo[j] = x[i + j] < lo[j] ? x[i + j] : lo[j];
      hi[j] = x[i + j] > hi[j] ? x[i + j] : hi[j];
    }
  }
  for (; i < n; i++) {
    lo[0] = x[i] < lo[0] ? x[i] : lo[0];
    hi[0] = x[i] > hi[0] ? x[i] : hi[0];
  }
  *low = *std::min_element(lo, lo + kLanes);
  *high = *std::max_element(hi, hi + kLanes);
}

TRDQ_PLAIN int32_t quantize(const float* x, int64_t n, const Grid& grid, uint8_t* q) {
  const float low = static_cast<float>(grid.low - grid.zero_point);
  const float high = static_cast<float>(grid.high - grid.zero_point);
  // Adding and taking away 1.5 * 2^23 rounds half to even without a library call; the clip before it keeps
  // the sum in range. A NaN fails both comparisons' "inside" test and becomes `low`.
  const float magic = 12582912.0f;
  int32_t sum = 0;
  for (int64_t i = 0; i < n; i++) {
    float v = x[i] / grid.scale;
    v = v > low ? v : low;
    v = v < high ? v : high;
    const int32_t level = static_cast<int32_t>((v + magic) - magic) + grid.zero_point;
    q[i] = static_cast<uint8_t>(level);
    sum += level;
  }
  return sum;
}

// e^x to about one unit in the last place, 0 below -87.3, NaN for NaN; written so that compilers find its vector form. Cephes' polynomial.
TRDQ_PLAIN float exponential(float x) {
  const float clipped = x > -87.3f ? (x < 88.0f ? x : 88.0f) : -87.3f, magic = 12582912.0f;
  const float whole = (clipped * 1.44269504f + magic) - magic;
  const float r = (clipped - whole * 0.693359375f) + whole * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const int32_t bits = (static_cast<int32_t>(whole) + 127) << 23;
  float power;
  std::memcpy(&power, &bits, sizeof power);
  return x > -87.3f ? p * power : x == x ? 0.0f : x;
}

TRDQ_PLAIN void gelu(const float* x, float* y, int64_t n) {
  for (int64_t i = 0; i < n; i++) {
    const float v = x[i];
    y[i] = v / (1.0f + exponential(-1.5957691216f * (v + 0.044715f * v * v * v)));
  }
}

TRDQ_PLAIN void modulated_norm(const float* x, const float* scale, const float* shift, float epsilon, float* y,
                               int64_t n) {
  double sum = 0.0, squares = 0.0;
  for (int64_t i = 0; i < n; i++) sum += x[i];
  const float mean = static_cast<float>(sum / static_cast<double>(n));
  for (int64_t i = 0; i < n; i++) squares += static_cast<double>(x[i] - mean) * (x[i] - mean);
  const float inverse = 1.0f / std::sqrt(static_cast<float>(squares / static_cast<double>(n)) + epsilon);
  for (int64_t i = 0; i < n; i++) y[i] = (x[i] - mean) * inverse * (1.0f + scale[i]) + shift[i];
}

// Whether a row whose largest number is `top` holds nothing but -inf. NaN is no largest number, so the row is looked at.
TRDQ_PLAIN bool hidden(const float* x, int64_t n, float top) {
  if (top != -INFINITY) return false;
  for (int64_t i = 0; i < n; i++) {
    if (x[i] != -INFINITY) return false;
  }
  return true;
}

TRDQ_PLAIN float exponentials(float* x, int64_t n) {
  const float top = *std::max_element(x, x + n);
  if (hidden(x, n, top)) {
    std::fill(x, x + n, 0.0f);
    return 0.0f;
  }
  for (int64_t i = 0; i < n; i++) x[i] = exponential(x[i] - top);
  float sum = 0.0f;
  for (int64_t i = 0; i < n; i++) sum += x[i];
  return sum;
}

TRDQ_PLAIN void multiply(const float* x, int64_t ldx, int64_t rows, const float* panel, int64_t depth, int64_t columns,
                         const float* factor, float* y, int64_t ldy) {
  for (int64_t row = 0; row < rows; row++) {
    float sums[kRotationPanel] = {};
    for (int64_t k = 0; k < depth; k++) {
      const float value = x[row * ldx + k];
      for (int64_t j = 0; j < kRotationPanel; j++) sums[j] += value * panel[k * kRotationPanel + j];
    }
    for (int64_t j = 0; j < columns; j++) y[row * ldy + j] = factor == nullptr ? sums[j] : sums[j] * factor[row];
  }
}

TRDQ_PLAIN float joined(const PanelTask& task, int64_t row, int64_t n, float value) {
  const Residual& residual = task.residual;
  if (residual.added == nullptr) return value;
  const int64_t whole = residual.first_row + row;
  if (residual.gate != nullptr) value *= residual.gate[whole / residual.item_rows * residual.ld_gate + n];
  return residual.added[whole * residual.ld_added + n] + value;
}

TRDQ_PLAIN void transpose(const float* x, int64_t ldx, int64_t rows, int64_t width, float* panel, int64_t columns) {
  // As 32-bit words: the levels of int8 attention come through here too, and must not be touched as numbers.
  for (int64_t c = 0; c < width; c++) {
    for (int64_t r = 0; r < rows; r++) std::memcpy(panel + c * columns + r, x + r * ldx + c, sizeof(float));
    std::memset(panel + c * columns + rows, 0, (columns - rows) * sizeof(float));
  }
}

TRDQ_PLAIN int32_t probabilities(const float* x, int64_t n, uint8_t* levels) {
  const float top = *std::max_element(x, x + n), magic = 12582912.0f;
  if (hidden(x, n, top)) {
    std::memset(levels, 0, n);
    return 0;
  }
  int32_t sum = 0, lost = 0;
  for (int64_t i = 0; i < n; i++) {
    const float e = exponential(x[i] - top);
    const int32_t level = static_cast<int32_t>((255.0f * (e == e ? e : 0.0f) + magic) - magic);
    levels[i] = static_cast<uint8_t>(level);
    sum += level;
    lost |= e != e;
  }
  return lost ? -1 : sum;
}

TRDQ_PLAIN void column_scales(const float* v, int64_t ldv, int64_t keys, int64_t width, float* scale) {
  std::fill(scale, scale + width, 1e-12f);
  for (int64_t key = 0; key < keys; key++) {
    for (int64_t c = 0; c < width; c++) {
      const float size = std::fabs(v[key * ldv + c]);
      // What is not finite makes a NaN, which then stays: it is less than nothing.
      scale[c] = scale[c] < size ? size : scale[c];
      scale[c] = size < INFINITY ? scale[c] : NAN;
    }
  }
  for (int64_t c = 0; c < width; c++) scale[c] /= 127.0f;
}

TRDQ_PLAIN void pack_values(const float* v, int64_t ldv, int64_t keys, int64_t width, float* scale, int8_t* panels) {
  column_scales(v, ldv, keys, width, scale);
  const int64_t quads = (keys + 3) / 4;
  const float magic = 12582912.0f;
  for (int64_t start = 0; start < width; start += kPanel) {
    int8_t* panel = panels + start * quads * 4;
    const int64_t count = std::min(kPanel, width - start);
    std::memset(panel, 0, quads * 4 * kPanel);
    for (int64_t key = 0; key < keys; key++) {
      for (int64_t c = 0; c < count; c++) {
        const float level = (v[key * ldv + start + c] / scale[start + c] + magic) - magic;
        panel[(key / 4 * kPanel + c) * 4 + key % 4] = static_cast<int8_t>(level == level ? static_cast<int32_t>(level) : 0);
      }
    }
  }
}

// Outputs of `count` columns of the panel, starting at `first`.
TRDQ_PLAIN void store_columns(const PanelTask& task, int64_t row, int64_t first, int64_t count, const int32_t* acc) {
  const int32_t zero = static_cast<int32_t>(task.a_zero[row]);
  // Unsigned arithmetic: the intermediate sums may wrap, the final value fits (see kMaxDepth).
  const uint32_t centred = static_cast<uint32_t>(task.a_sum[row]) - static_cast<uint32_t>(task.depth) * zero;
  for (int64_t i = 0; i < count; i++) {
    const int64_t n = first + i;
    const uint32_t column_sum = static_cast<uint32_t>(static_cast<int32_t>(task.column_sum[n]));
    uint32_t exact = static_cast<uint32_t>(acc[i]) - static_cast<uint32_t>(zero) * column_sum;
    if (task.w_zero != nullptr) exact -= centred * static_cast<uint32_t>(static_cast<int32_t>(task.w_zero[n]));
    const float value = static_cast<float>(static_cast<int32_t>(exact)) * task.w_scale[n] * task.a_scale[row];
    task.y[row * task.ldy + n] = joined(task, row, n, task.bias != nullptr ? value + task.bias[n] : value);
  }
}

TRDQ_PLAIN void product(const PanelTask& task) {
  for (int64_t row = 0; row < task.rows; row++) {
    int32_t acc[kPanel] = {};
    const uint8_t* a = task.a + row * task.lda;
    const int8_t* w = task.w;
    for (int64_t k = 0; k < task.lda; k += 4, w += 4 * kPanel) {
      for (int64_t n = 0; n < kPanel; n++) {
        for (int64_t i = 0; i < 4; i++) acc[n] += static_cast<int32_t>(a[k + i]) * w[4 * n + i];
      }
    }
    store_columns(task, row, 0, task.columns, acc);
  }
}

TRDQ_PLAIN void unpack(const uint8_t* packed, const uint8_t* group_scale, int64_t k8, int64_t group8, int8_t* w) {
  for (int64_t k = 0; k < k8; k++) {
    const uint8_t* scales = group_scale == nullptr ? nullptr : group_scale + k / group8 * kPanel;
    for (int64_t i = 0; i < 4 * kPanel; i++) {
      const int32_t factor = scales == nullptr ? 1 : scales[i / 4];
      const uint8_t pair = packed[k * 4 * kPanel + i];
      w[(2 * k) * 4 * kPanel + i] = static_cast<int8_t>(((pair & 15) - 8) * factor);
      w[(2 * k + 1) * 4 * kPanel + i] = static_cast<int8_t>(((pair >> 4) - 8) * factor);
    }
  }
}

constexpr RowOps kRowOps = {scale, gather,         rotate,       hadamard, range, quantize,
                            gelu,  modulated_norm, exponentials, multiply};
inline size_t product_bytes(int64_t, int64_t) { return 0; }

inline int64_t peak(int, int64_t) { return 0; }

constexpr PeakOps kPeakOps = {peak};
constexpr HeadOps kHeadOps = {transpose, probabilities, pack_values};
constexpr PanelOps kPanelOps = {product, unpack, product_bytes};

}  // namespace portable
}  // namespace trdq
