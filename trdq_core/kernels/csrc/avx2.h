// The kernels for x86-64 CPUs with AVX2 and FMA but without AVX512-VNNI. Most row operations are the plain ones compiled
// for wider registers; the rotation and the product are written out, because compilers do not find them.
#pragma once

#include "common.h"
#include "portable.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>

#define TRDQ_AVX2 __attribute__((target("avx2,fma")))

namespace trdq {
namespace avx2 {

inline bool supported() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

TRDQ_AVX2 inline void scale(const float* x, const float* factor, float* y, int64_t n) {
  portable::scale(x, factor, y, n);
}

TRDQ_AVX2 inline void gather(const float* x, const int32_t* index, const float* factor, float* y, int64_t n) {
  portable::gather(x, index, factor, y, n);
}

// Rows times half a panel: 6 x 2 accumulators of 8 columns. With an index, column k of x is column index[k].
template <int kRows>
TRDQ_AVX2 inline void rotate_tile(const float* x, const int32_t* index, float* y, int64_t width, const float* matrix,
                                  int64_t size) {
  __m256 acc[kRows][2];
#pragma GCC unroll 6
  for (int r = 0; r < kRows; r++) acc[r][0] = acc[r][1] = _mm256_setzero_ps();
  for (int64_t k = 0; k < size; k++, matrix += kRotationPanel) {
    const int64_t at = index == nullptr ? k : index[k];
    const __m256 m0 = _mm256_loadu_ps(matrix), m1 = _mm256_loadu_ps(matrix + 8);
#pragma GCC unroll 6
    for (int r = 0; r < kRows; r++) {
      const __m256 v = _mm256_set1_ps(x[r * width + at]);
      acc[r][0] = _mm256_fmadd_ps(v, m0, acc[r][0]);
      acc[r][1] = _mm256_fmadd_ps(v, m1, acc[r][1]);
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < kRows; r++) {
    _mm256_storeu_ps(y + r * width, acc[r][0]);
    _mm256_storeu_ps(y + r * width + 8, acc[r][1]);
  }
}

TRDQ_AVX2 inline void rotate(const float* x, float* y, int64_t rows, int64_t width, const Rotation& rotation,
                             const int32_t* index) {
  if (rotation.panel != kRotationPanel) return portable::rotate(x, y, rows, width, rotation, index);
  const int64_t size = rotation.size;
  for (int64_t start = 0; start < size; start += 16) {
    const float* matrix = rotation.data + start / kRotationPanel * kRotationPanel * size + start % kRotationPanel;
    for (int64_t block = 0; block < width; block += size) {
      const float* from = index == nullptr ? x + block : x;
      const int32_t* columns = index == nullptr ? nullptr : index + block;
      float* to = y + block + start;
      int64_t r = 0;
      for (; r + 6 <= rows; r += 6) rotate_tile<6>(from + r * width, columns, to + r * width, width, matrix, size);
      for (; r < rows; r++) rotate_tile<1>(from + r * width, columns, to + r * width, width, matrix, size);
    }
  }
}

TRDQ_AVX2 inline void hadamard(const float* x, float* y, int64_t n, int64_t block) {
  portable::hadamard(x, y, n, block);
}

TRDQ_AVX2 inline void range(const float* x, int64_t n, float* low, float* high) { portable::range(x, n, low, high); }

TRDQ_AVX2 inline int32_t quantize(const float* x, int64_t n, const Grid& grid, uint8_t* q) {
  return portable::quantize(x, n, grid, q);
}

TRDQ_AVX2 inline void gelu(const float* x, float* y, int64_t n) { portable::gelu(x, y, n); }

TRDQ_AVX2 inline void modulated_norm(const float* x, const float* scale, const float* shift, float epsilon, float* y,
                                     int64_t n) {
  portable::modulated_norm(x, scale, shift, epsilon, y, n);
}

TRDQ_AVX2 inline float exponentials(float* x, int64_t n) { return portable::exponentials(x, n); }

template <int kRows>
TRDQ_AVX2 inline void multiply_tile(const float* x, int64_t ldx, const float* panel, int64_t depth, const float* factor,
                                    float (*sums)[kRotationPanel]) {
  for (int64_t half = 0; half < kRotationPanel; half += 16) {
    __m256 acc[kRows][2];
#pragma GCC unroll 6
    for (int r = 0; r < kRows; r++) acc[r][0] = acc[r][1] = _mm256_setzero_ps();
    for (int64_t k = 0; k < depth; k++) {
      const float* row = panel + k * kRotationPanel + half;
      const __m256 m0 = _mm256_loadu_ps(row), m1 = _mm256_loadu_ps(row + 8);
#pragma GCC unroll 6
      for (int r = 0; r < kRows; r++) {
        const __m256 v = _mm256_set1_ps(x[r * ldx + k]);
        acc[r][0] = _mm256_fmadd_ps(v, m0, acc[r][0]);
        acc[r][1] = _mm256_fmadd_ps(v, m1, acc[r][1]);
      }
    }
#pragma GCC unroll 6
    for (int r = 0; r < kRows; r++) {
      const __m256 f = _mm256_set1_ps(factor == nullptr ? 1.0f : factor[r]);
      _mm256_storeu_ps(sums[r] + half, _mm256_mul_ps(acc[r][0], f));
      _mm256_storeu_ps(sums[r] + half + 8, _mm256_mul_ps(acc[r][1], f));
    }
  }
}

template <int kRows>
TRDQ_AVX2 inline void multiply_rows(const float* x, int64_t ldx, const float* panel, int64_t depth, int64_t columns,
                                    const float* factor, float* y, int64_t ldy) {
  float sums[kRows][kRotationPanel];
  multiply_tile<kRows>(x, ldx, panel, depth, factor, sums);
  for (int r = 0; r < kRows; r++) std::memcpy(y + r * ldy, sums[r], columns * sizeof(float));
}

TRDQ_AVX2 inline void multiply(const float* x, int64_t ldx, int64_t rows, const float* panel, int64_t depth,
                               int64_t columns, const float* factor, float* y, int64_t ldy) {
  int64_t r = 0;
  const auto factors = [&] { return factor == nullptr ? nullptr : factor + r; };
  for (; r + 6 <= rows; r += 6) {
    multiply_rows<6>(x + r * ldx, ldx, panel, depth, columns, factors(), y + r * ldy, ldy);
  }
  for (; r < rows; r++) multiply_rows<1>(x + r * ldx, ldx, panel, depth, columns, factors(), y + r * ldy, ldy);
}

constexpr int64_t kChunk = 8;  // columns per pass over k: two registers of four columns

// acc += pairs of a times pairs of w. By name and in one piece: written with intrinsics, gcc 12 starts all products of a
// step before it adds the first, and spills the accumulators.
TRDQ_AVX2 inline __attribute__((always_inline)) void multiply_add(__m256i& acc, __m256i a, __m256i w) {
  __m256i pairs;
  asm("vpmaddwd %3, %2, %1\n\tvpaddd %1, %0, %0" : "+x"(acc), "=&x"(pairs) : "x"(a), "x"(w));
}

// Everything is widened to 16 bits first: the byte product of AVX2 adds pairs with saturation at 2^15, which 8-bit
// levels exceed. w is [lda/4][8][4]; acc[r][h] holds, for each of four columns, the sums over even and odd pairs of k.
template <int kRows>
TRDQ_AVX2 inline void chunk_tile(const int16_t* a, int64_t lda, const int16_t* w, int32_t (*sums)[kChunk]) {
  __m256i acc[kRows][2];
#pragma GCC unroll 6
  for (int r = 0; r < kRows; r++) acc[r][0] = acc[r][1] = _mm256_setzero_si256();
  for (int64_t k = 0; k < lda; k += 4, w += 4 * kChunk) {
    const __m256i w0 = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w));
    const __m256i w1 = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w + 16));
#pragma GCC unroll 6
    for (int r = 0; r < kRows; r++) {
      int64_t quad;
      std::memcpy(&quad, a + r * lda + k, sizeof quad);
      const __m256i values = _mm256_set1_epi64x(quad);
      multiply_add(acc[r][0], values, w0);
      multiply_add(acc[r][1], values, w1);
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < kRows; r++) {
    // hadd works inside 128-bit halves: columns 0 1 4 5 2 3 6 7 come out, so the middle quarters change places.
    const __m256i mixed = _mm256_hadd_epi32(acc[r][0], acc[r][1]);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(sums[r]), _mm256_permute4x64_epi64(mixed, 0xD8));
  }
}

template <int kRows>
TRDQ_AVX2 inline void chunk_rows(const PanelTask& task, int64_t row, int64_t first, const int16_t* a, const int16_t* w) {
  int32_t sums[kRows][kChunk];
  chunk_tile<kRows>(a + row * task.lda, task.lda, w, sums);
  const int64_t count = std::min(kChunk, task.columns - first);
  for (int r = 0; r < kRows; r++) portable::store_columns(task, row + r, first, count, sums[r]);
}

// The activations are widened once, the weights eight columns at a time, so that those stay in the first-level cache
// for every row of the block.
TRDQ_AVX2 inline void product(const PanelTask& task) {
  int16_t* a = static_cast<int16_t*>(task.memory);
  int16_t* w = a + task.rows * task.lda;
  for (int64_t i = 0; i < task.rows * task.lda; i++) a[i] = task.a[i];
  for (int64_t first = 0; first < task.columns; first += kChunk) {
    for (int64_t k = 0; k < task.lda / 4; k++) {
      const int8_t* from = task.w + (k * kPanel + first) * 4;
      for (int64_t i = 0; i < 4 * kChunk; i++) w[k * 4 * kChunk + i] = from[i];
    }
    int64_t row = 0;
    for (; row + 6 <= task.rows; row += 6) chunk_rows<6>(task, row, first, a, w);
    for (; row + 2 <= task.rows; row += 2) chunk_rows<2>(task, row, first, a, w);
    for (; row < task.rows; row++) chunk_rows<1>(task, row, first, a, w);
  }
}

TRDQ_AVX2 inline void unpack(const uint8_t* packed, const uint8_t* group_scale, int64_t k8, int64_t group8, int8_t* w) {
  portable::unpack(packed, group_scale, k8, group8, w);
}

constexpr RowOps kRowOps = {scale, gather,         rotate,       hadamard, range, quantize,
                            gelu,  modulated_norm, exponentials, multiply};
inline size_t product_bytes(int64_t rows, int64_t lda) { return (rows + kChunk) * lda * sizeof(int16_t); }

TRDQ_AVX2 inline void transpose(const float* x, int64_t ldx, int64_t rows, int64_t width, float* panel, int64_t columns) {
  portable::transpose(x, ldx, rows, width, panel, columns);
}

TRDQ_AVX2 inline int32_t probabilities(const float* x, int64_t n, uint8_t* levels) {
  return portable::probabilities(x, n, levels);
}

TRDQ_AVX2 inline void pack_values(const float* v, int64_t ldv, int64_t keys, int64_t width, float* scale,
                                  int8_t* panels) {
  portable::pack_values(v, ldv, keys, width, scale, panels);
}

// Twelve chains each, enough to hide the latency of the unit.
TRDQ_AVX2 inline int64_t peak(int unit, int64_t rounds) {
  __m256 f[12];
  __m256i q[12];
  const __m256 half = _mm256_set1_ps(0.5f);
  const __m256i ones = _mm256_set1_epi16(1);
#pragma GCC unroll 12
  for (int i = 0; i < 12; i++) f[i] = half, q[i] = ones;
  for (int64_t round = 0; round < rounds; round++) {
    if (unit == 0) {
#pragma GCC unroll 12
      for (int i = 0; i < 12; i++) f[i] = _mm256_fmadd_ps(f[i], half, half);
    } else {
#pragma GCC unroll 12
      for (int i = 0; i < 12; i++) multiply_add(q[i], ones, ones);
    }
  }
#pragma GCC unroll 12
  for (int i = 0; i < 12; i++) asm volatile("" ::"x"(f[i]), "x"(q[i]));
  return rounds * 12 * (unit == 0 ? 16 : 32);
}

constexpr PeakOps kPeakOps = {peak};
constexpr HeadOps kHeadOps = {transpose, probabilities, pack_values};
constexpr PanelOps kPanelOps = {product, unpack, product_bytes};

}  // namespace avx2
}  // namespace trdq
#endif  // x86-64
