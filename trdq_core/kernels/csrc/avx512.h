// The kernels for x86-64 CPUs with AVX512 (F, BW, VL, DQ) and VNNI. Compiled always, run only where the CPU has them.
#pragma once

#include "avx512_base.h"
#include "avx512_float.h"
#include "portable.h"

#ifdef TRDQ_X86
namespace trdq {
namespace avx512 {

// ---- rows -----------------------------------------------------------------------------------------------------

TRDQ_AVX512 inline void scale(const float* x, const float* factor, float* y, int64_t n) {
  for (int64_t i = 0; i < n; i += 16) {
    const __mmask16 mask = tail_mask(n - i);
    _mm512_mask_storeu_ps(y + i, mask, _mm512_maskz_loadu_ps(mask, x + i) * _mm512_maskz_loadu_ps(mask, factor + i));
  }
}

// By inserts: the CPU's own gathers are slower, and so is moving one channel at a time.
TRDQ_AVX512 inline void gather(const float* x, const int32_t* index, const float* factor, float* y, int64_t n) {
  int64_t i = 0;
  for (; i + 4 <= n; i += 4) {
    __m128 v = _mm_load_ss(x + index[i]);
    v = _mm_insert_ps(v, _mm_load_ss(x + index[i + 1]), 0x10);
    v = _mm_insert_ps(v, _mm_load_ss(x + index[i + 2]), 0x20);
    v = _mm_insert_ps(v, _mm_load_ss(x + index[i + 3]), 0x30);
    _mm_storeu_ps(y + i, factor == nullptr ? v : _mm_mul_ps(v, _mm_loadu_ps(factor + i)));
  }
  portable::gather(x, index + i, factor == nullptr ? nullptr : factor + i, y + i, n - i);
}

// Panels outermost: one panel (16 KiB at n = 128) stays in the first-level cache for every block and row of the tile.
TRDQ_AVX512 inline void rotate(const float* x, float* y, int64_t rows, int64_t width, const Rotation& rotation,
                               const int32_t* index) {
  if (rotation.panel != kRotationPanel) return portable::rotate(x, y, rows, width, rotation, index);
  const int64_t size = rotation.size;
  for (int64_t start = 0; start < size; start += kRotationPanel) {
    const Dense dense = {rotation.data + start * size, size, kRotationPanel, nullptr};
    for (int64_t block = 0; block < width; block += size) {
      float* to = y + block + start;
      if (index != nullptr) {
        dense_rows<2, true>(x, width, rows, index + block, dense, to, width);
      } else {
        dense_rows<2, false>(x + block, width, rows, nullptr, dense, to, width);
      }
    }
  }
}

// Four butterfly levels inside one register, lane pairs at distance 1, 2, 4 and 8: partner + sign * own, where the upper
// lane of a pair has sign -1 and so gets (lower - upper).
TRDQ_INLINE __m512 hadamard16(__m512 v) {
  const __m512 one = _mm512_set1_ps(1.0f), minus = _mm512_set1_ps(-1.0f);
  v = _mm512_fmadd_ps(v, _mm512_mask_mov_ps(one, 0xAAAA, minus), _mm512_permute_ps(v, 0xB1));
  v = _mm512_fmadd_ps(v, _mm512_mask_mov_ps(one, 0xCCCC, minus), _mm512_permute_ps(v, 0x4E));
  v = _mm512_fmadd_ps(v, _mm512_mask_mov_ps(one, 0xF0F0, minus), _mm512_shuffle_f32x4(v, v, 0xB1));
  return _mm512_fmadd_ps(v, _mm512_mask_mov_ps(one, 0xFF00, minus), _mm512_shuffle_f32x4(v, v, 0x4E));
}

// One block of 16 * kVectors channels, held in registers from load to store.
template <int kVectors>
TRDQ_AVX512 inline void hadamard_blocks(const float* x, float* y, int64_t n) {
  const __m512 norm = _mm512_set1_ps(1.0f / std::sqrt(16.0f * kVectors));
  for (const float* end = x + n; x < end; x += 16 * kVectors, y += 16 * kVectors) {
    __m512 v[kVectors];
#pragma GCC unroll 16
    for (int i = 0; i < kVectors; i++) v[i] = hadamard16(_mm512_mul_ps(_mm512_loadu_ps(x + 16 * i), norm));
#pragma GCC unroll 4
    for (int half = 1; half < kVectors; half *= 2) {
#pragma GCC unroll 16
      for (int i = 0; i < kVectors; i++) {
        if (i & half) continue;
        const __m512 a = v[i], b = v[i + half];
        v[i] = _mm512_add_ps(a, b);
        v[i + half] = _mm512_sub_ps(a, b);
      }
    }
#pragma GCC unroll 16
    for (int i = 0; i < kVectors; i++) _mm512_storeu_ps(y + 16 * i, v[i]);
  }
}

inline void hadamard(const float* x, float* y, int64_t n, int64_t block) {
  switch (block) {
    case 32: return hadamard_blocks<2>(x, y, n);
    case 64: return hadamard_blocks<4>(x, y, n);
    case 128: return hadamard_blocks<8>(x, y, n);
    default: return hadamard_blocks<16>(x, y, n);
  }
}

TRDQ_AVX512 inline void range(const float* x, int64_t n, float* low, float* high) {
  // Masked-off lanes read as 0, which the range holds anyway. Four accumulators hide the latency of max.
  __m512 lo[4], hi[4];
  for (int j = 0; j < 4; j++) lo[j] = hi[j] = _mm512_setzero_ps();
  int64_t i = 0;
  for (; i + 64 <= n; i += 64) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
      const __m512 v = _mm512_loadu_ps(x + i + 16 * j);
      lo[j] = _mm512_min_ps(v, lo[j]);
      hi[j] = _mm512_max_ps(v, hi[j]);
    }
  }
  for (; i < n; i += 16) {
    const __m512 v = _mm512_maskz_loadu_ps(tail_mask(n - i), x + i);
    lo[0] = _mm512_min_ps(v, lo[0]);
    hi[0] = _mm512_max_ps(v, hi[0]);
  }
  *low = _mm512_reduce_min_ps(_mm512_min_ps(_mm512_min_ps(lo[0], lo[1]), _mm512_min_ps(lo[2], lo[3])));
  *high = _mm512_reduce_max_ps(_mm512_max_ps(_mm512_max_ps(hi[0], hi[1]), _mm512_max_ps(hi[2], hi[3])));
}

TRDQ_AVX512 inline int32_t quantize(const float* x, int64_t n, const Grid& grid, uint8_t* q) {
  const __m512 scale = _mm512_set1_ps(grid.scale);
  const __m512 low = _mm512_set1_ps(static_cast<float>(grid.low - grid.zero_point));
  const __m512 high = _mm512_set1_ps(static_cast<float>(grid.high - grid.zero_point));
  const __m512i zero_point = _mm512_set1_epi32(grid.zero_point);
  __m512i sum = _mm512_setzero_si512();
  for (int64_t i = 0; i < n; i += 16) {
    const __mmask16 mask = tail_mask(n - i);
    // A true division, not a product with 1 / scale: the levels are then bit-equal to the reference's, and memory is
    // what limits this loop. The clip comes before the conversion, which turns anything beyond int32 into INT_MIN;
    // max returns `low` for a NaN.
    __m512 v = _mm512_div_ps(_mm512_maskz_loadu_ps(mask, x + i), scale);
    v = _mm512_min_ps(_mm512_max_ps(v, low), high);
    const __m512i level = _mm512_add_epi32(_mm512_cvtps_epi32(v), zero_point);
    sum = _mm512_mask_add_epi32(sum, mask, sum, level);
    _mm_mask_storeu_epi8(q + i, mask, _mm512_cvtepi32_epi8(level));
  }
  return _mm512_reduce_add_epi32(sum);
}

// ---- panels ---------------------------------------------------------------------------------------------------

// The instruction by name: gcc 12 spills the accumulators around the intrinsic, which costs more than half the speed.
TRDQ_INLINE void dot(__m512i& acc, __m512i a, __m512i w) { asm("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(a), "v"(w)); }

template <int kRows>
TRDQ_INLINE void accumulate(const uint8_t* a, int64_t lda, const int8_t* w, __m512i (&acc)[kRows][4]) {
  constexpr int64_t kAhead = 1024;  // bytes of weights fetched ahead: four steps of k
  for (int64_t k = 0; k < lda; k += 4, w += 4 * kPanel) {
    __m512i weights[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
      weights[j] = _mm512_loadu_si512(w + 64 * j);
      _mm_prefetch(reinterpret_cast<const char*>(w + kAhead + 64 * j), _MM_HINT_T0);
    }
#pragma GCC unroll 6
    for (int r = 0; r < kRows; r++) {
      int32_t quad;
      std::memcpy(&quad, a + r * lda + k, sizeof quad);
      const __m512i values = _mm512_set1_epi32(quad);
#pragma GCC unroll 4
      for (int j = 0; j < 4; j++) dot(acc[r][j], values, weights[j]);
    }
  }
}

// Where the gates of some rows and what is added to them lie; looked up once, since finding a row's item is a division.
template <int kRows>
struct Added {
  const float* gate[kRows];
  const float* added[kRows];
};

template <int kRows>
TRDQ_INLINE Added<kRows> find_added(const PanelTask& task, int64_t row) {
  Added<kRows> found;
  const Residual& residual = task.residual;
  for (int r = 0; r < kRows; r++) {
    const int64_t whole = residual.first_row + row + r;
    found.added[r] = residual.added + whole * residual.ld_added;
    found.gate[r] = residual.gate == nullptr ? nullptr : residual.gate + whole / residual.item_rows * residual.ld_gate;
  }
  return found;
}

// y = a_scale * w_scale * (acc - a_zero * column_sum - w_zero * (a_sum - depth * a_zero)) + bias, exact up to the
// bracket: the integer terms may wrap on the way, their sum fits (see kMaxDepth). Then gate and residual.
template <int kRows, bool kAdds>
TRDQ_INLINE void finish(const PanelTask& task, int64_t row, const __m512i (&acc)[kRows][4]) {
  Added<kRows> found;
  if (kAdds) found = find_added<kRows>(task, row);
#pragma GCC unroll 4
  for (int j = 0; j < 4; j++) {
    const __mmask16 mask = tail_mask(task.columns - 16 * j);
    const __m512i column_sum = _mm512_cvtps_epi32(_mm512_maskz_loadu_ps(mask, task.column_sum + 16 * j));
    const __m512 w_scale = _mm512_maskz_loadu_ps(mask, task.w_scale + 16 * j);
    const __m512 bias = task.bias ? _mm512_maskz_loadu_ps(mask, task.bias + 16 * j) : _mm512_setzero_ps();
#pragma GCC unroll 6
    for (int r = 0; r < kRows; r++) {
      const __m512i zero = _mm512_cvtps_epi32(_mm512_set1_ps(task.a_zero[row + r]));
      __m512i exact = _mm512_sub_epi32(acc[r][j], _mm512_mullo_epi32(zero, column_sum));
      if (task.w_zero != nullptr) {
        const __m512i w_zero = _mm512_cvtps_epi32(_mm512_maskz_loadu_ps(mask, task.w_zero + 16 * j));
        const __m512i depth = _mm512_set1_epi32(static_cast<int32_t>(task.depth));
        const __m512i centred = _mm512_sub_epi32(_mm512_set1_epi32(task.a_sum[row + r]), _mm512_mullo_epi32(depth, zero));
        exact = _mm512_sub_epi32(exact, _mm512_mullo_epi32(w_zero, centred));
      }
      const __m512 value = _mm512_mul_ps(_mm512_cvtepi32_ps(exact), w_scale);
      __m512 y = _mm512_fmadd_ps(value, _mm512_set1_ps(task.a_scale[row + r]), bias);
      if (kAdds) {
        if (found.gate[r] != nullptr) y = _mm512_mul_ps(y, _mm512_maskz_loadu_ps(mask, found.gate[r] + 16 * j));
        y = _mm512_add_ps(y, _mm512_maskz_loadu_ps(mask, found.added[r] + 16 * j));
      }
      _mm512_mask_storeu_ps(task.y + (row + r) * task.ldy + 16 * j, mask, y);
    }
  }
}

// Of what will be added to a tile: 256 bytes a row, at a stride that the hardware does not foresee. They arrive while the
// products are summed.
template <int kRows>
TRDQ_INLINE void fetch_added(const PanelTask& task, int64_t row) {
  const float* added = task.residual.added + (task.residual.first_row + row) * task.residual.ld_added;
  for (int r = 0; r < kRows; r++, added += task.residual.ld_added) {
    for (int j = 0; j < 4; j++) _mm_prefetch(reinterpret_cast<const char*>(added + 16 * j), _MM_HINT_T0);
  }
}

template <int kRows>
TRDQ_AVX512 inline void product_tile(const PanelTask& task, int64_t row) {
  if (task.residual.added != nullptr) fetch_added<kRows>(task, row);
  __m512i acc[kRows][4];
#pragma GCC unroll 6
  for (int r = 0; r < kRows; r++) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) acc[r][j] = _mm512_setzero_si512();
  }
  accumulate<kRows>(task.a + row * task.lda, task.lda, task.w, acc);
  if (task.residual.added == nullptr) return finish<kRows, false>(task, row, acc);
  finish<kRows, true>(task, row, acc);
}

TRDQ_AVX512 inline void product(const PanelTask& task) {
  int64_t row = 0;
  for (; row + kTileRows <= task.rows; row += kTileRows) product_tile<kTileRows>(task, row);
  switch (task.rows - row) {
    case 5: return product_tile<5>(task, row);
    case 4: return product_tile<4>(task, row);
    case 3: return product_tile<3>(task, row);
    case 2: return product_tile<2>(task, row);
    case 1: return product_tile<1>(task, row);
    default: return;
  }
}

// Nibbles 0..15 stand for -8..7. A column's scale s (1..16) multiplies two nibbles in one 16-bit product without a
// carry, since 15 * 16 < 256; taking 8 * s from every byte then gives (nibble - 8) * s in -128..112.
TRDQ_INLINE void unpack_group(const uint8_t* packed, __m512i factor, __m512i offset, int64_t k8, int8_t* w) {
  const __m512i nibble = _mm512_set1_epi8(15);
  for (int64_t k = 0; k < k8; k++, packed += 4 * kPanel, w += 8 * kPanel) {
    const __m512i v = _mm512_loadu_si512(packed);
    const __m512i even = _mm512_mullo_epi16(_mm512_and_si512(v, nibble), factor);
    const __m512i odd = _mm512_mullo_epi16(_mm512_and_si512(_mm512_srli_epi16(v, 4), nibble), factor);
    _mm512_storeu_si512(w, _mm512_sub_epi8(even, offset));
    _mm512_storeu_si512(w + 4 * kPanel, _mm512_sub_epi8(odd, offset));
  }
}

TRDQ_AVX512 inline void unpack(const uint8_t* packed, const uint8_t* group_scale, int64_t k8, int64_t group8, int8_t* w) {
  for (int64_t k = 0; k < k8; k += group8) {
    for (int j = 0; j < 4; j++) {
      __m512i s = _mm512_set1_epi32(1);
      if (group_scale != nullptr) {
        const void* scales = group_scale + k / group8 * kPanel + 16 * j;
        s = _mm512_cvtepu8_epi32(_mm_loadu_si128(static_cast<const __m128i*>(scales)));
      }
      const __m512i factor = _mm512_or_si512(s, _mm512_slli_epi32(s, 16));
      const __m512i offset = _mm512_slli_epi16(_mm512_or_si512(factor, _mm512_slli_epi32(factor, 8)), 3);
      const int64_t count = std::min(group8, k8 - k);
      unpack_group(packed + k * 4 * kPanel + 64 * j, factor, offset, count, w + k * 8 * kPanel + 64 * j);
    }
  }
}

constexpr RowOps kRowOps = {scale, gather,         rotate,       hadamard, range, quantize,
                            gelu,  modulated_norm, exponentials, multiply};
// Twelve chains each, enough to hide the latency of the unit.
TRDQ_AVX512 inline int64_t peak(int unit, int64_t rounds) {
  __m512 f[12];
  __m512i q[12];
  const __m512 half = _mm512_set1_ps(0.5f);
  const __m512i ones = _mm512_set1_epi8(1);
#pragma GCC unroll 12
  for (int i = 0; i < 12; i++) f[i] = half, q[i] = ones;
  for (int64_t round = 0; round < rounds; round++) {
    if (unit == 0) {
#pragma GCC unroll 12
      for (int i = 0; i < 12; i++) f[i] = _mm512_fmadd_ps(f[i], half, half);
    } else {
#pragma GCC unroll 12
      for (int i = 0; i < 12; i++) dot(q[i], ones, ones);
    }
  }
#pragma GCC unroll 12
  for (int i = 0; i < 12; i++) asm volatile("" ::"v"(f[i]), "v"(q[i]));
  return rounds * 12 * (unit == 0 ? 32 : 128);
}

constexpr PeakOps kPeakOps = {peak};
constexpr HeadOps kHeadOps = {transpose, probabilities, pack_values};
constexpr PanelOps kPanelOps = {product, unpack, portable::product_bytes};

}  // namespace avx512
}  // namespace trdq
#endif  // x86-64
