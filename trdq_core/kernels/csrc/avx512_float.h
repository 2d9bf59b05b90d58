// Floating-point kernels for AVX512: products with dense panels, and the functions of one row that need exponentials.
#pragma once

#include "avx512_base.h"
#include "portable.h"

#ifdef TRDQ_X86
namespace trdq {
namespace avx512 {

// A panel [depth][kRotationPanel] of which the first `columns` columns are wanted.
struct Dense {
  const float* panel;
  int64_t depth;
  int64_t columns;
  const float* factor;  // one for each row, or null
};

// kVectors: 16-column halves of the panel that are computed. With an index, column k of x is column index[k].
template <int kRows, int kVectors, bool kIndexed>
TRDQ_INLINE void dense_tile(const float* x, int64_t ldx, const int32_t* index, const Dense& dense, int64_t row, float* y,
                            int64_t ldy) {
  __m512 acc[kRows][kVectors];
#pragma GCC unroll 12
  for (int r = 0; r < kRows; r++) {
#pragma GCC unroll 2
    for (int j = 0; j < kVectors; j++) acc[r][j] = _mm512_setzero_ps();
  }
  const float* panel = dense.panel;
  for (int64_t k = 0; k < dense.depth; k++, panel += kRotationPanel) {
    const float* at = x + (kIndexed ? index[k] : k);
    __m512 m[kVectors];
#pragma GCC unroll 2
    for (int j = 0; j < kVectors; j++) m[j] = _mm512_loadu_ps(panel + 16 * j);
#pragma GCC unroll 12
    for (int r = 0; r < kRows; r++) {
      const __m512 v = _mm512_set1_ps(at[r * ldx]);
#pragma GCC unroll 2
      for (int j = 0; j < kVectors; j++) acc[r][j] = _mm512_fmadd_ps(v, m[j], acc[r][j]);
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < kRows; r++) {
    const __m512 factor = _mm512_set1_ps(dense.factor == nullptr ? 1.0f : dense.factor[row + r]);
#pragma GCC unroll 2
    for (int j = 0; j < kVectors; j++) {
      _mm512_mask_storeu_ps(y + r * ldy + 16 * j, tail_mask(dense.columns - 16 * j), _mm512_mul_ps(acc[r][j], factor));
    }
  }
}

template <int kVectors, bool kIndexed>
TRDQ_INLINE void dense_rows(const float* x, int64_t ldx, int64_t rows, const int32_t* index, const Dense& dense,
                            float* y, int64_t ldy) {
  int64_t r = 0;
  for (; r + 12 <= rows; r += 12) dense_tile<12, kVectors, kIndexed>(x + r * ldx, ldx, index, dense, r, y + r * ldy, ldy);
  for (; r + 6 <= rows; r += 6) dense_tile<6, kVectors, kIndexed>(x + r * ldx, ldx, index, dense, r, y + r * ldy, ldy);
  for (; r + 2 <= rows; r += 2) dense_tile<2, kVectors, kIndexed>(x + r * ldx, ldx, index, dense, r, y + r * ldy, ldy);
  for (; r < rows; r++) dense_tile<1, kVectors, kIndexed>(x + r * ldx, ldx, index, dense, r, y + r * ldy, ldy);
}

TRDQ_AVX512 inline void multiply(const float* x, int64_t ldx, int64_t rows, const float* panel, int64_t depth,
                                 int64_t columns, const float* factor, float* y, int64_t ldy) {
  const Dense dense = {panel, depth, columns, factor};
  if (columns > 16) return dense_rows<2, false>(x, ldx, rows, nullptr, dense, y, ldy);
  dense_rows<1, false>(x, ldx, rows, nullptr, dense, y, ldy);
}

// e^x to about one unit in the last place; 0 far below, NaN for NaN: min and max return their second operand there. Polynomial of Cephes on |x - n ln 2| <= ln 2 / 2.
TRDQ_INLINE __m512 exponential(__m512 x) {
  x = _mm512_min_ps(_mm512_set1_ps(88.0f), _mm512_max_ps(_mm512_set1_ps(-104.0f), x));
  const __m512 whole = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), _MM_FROUND_TO_NEAREST_INT);
  __m512 r = _mm512_fnmadd_ps(whole, _mm512_set1_ps(0.693359375f), x);
  r = _mm512_fmadd_ps(whole, _mm512_set1_ps(2.12194440e-4f), r);
  __m512 p = _mm512_set1_ps(1.9875691500e-4f);
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.3981999507e-3f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(8.3334519073e-3f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(4.1665795894e-2f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.6666665459e-1f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.0000001201e-1f));
  p = _mm512_fmadd_ps(_mm512_mul_ps(p, r), r, _mm512_add_ps(r, _mm512_set1_ps(1.0f)));
  return _mm512_scalef_ps(p, whole);
}

TRDQ_AVX512 inline void gelu(const float* x, float* y, int64_t n) {
  const __m512 one = _mm512_set1_ps(1.0f);
  for (int64_t i = 0; i < n; i += 16) {
    const __mmask16 mask = tail_mask(n - i);
    const __m512 v = _mm512_maskz_loadu_ps(mask, x + i);
    const __m512 cubic = _mm512_fmadd_ps(_mm512_mul_ps(v, v), _mm512_set1_ps(0.044715f), one);
    const __m512 slope = _mm512_mul_ps(_mm512_mul_ps(v, cubic), _mm512_set1_ps(-1.5957691216f));
    _mm512_mask_storeu_ps(y + i, mask, _mm512_div_ps(v, _mm512_add_ps(one, exponential(slope))));
  }
}

TRDQ_INLINE float sum_of(const float* x, int64_t n) {
  __m512 sums[4] = {};
  int64_t i = 0;
  for (; i + 64 <= n; i += 64) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) sums[j] = _mm512_add_ps(sums[j], _mm512_loadu_ps(x + i + 16 * j));
  }
  for (; i < n; i += 16) sums[0] = _mm512_add_ps(sums[0], _mm512_maskz_loadu_ps(tail_mask(n - i), x + i));
  return _mm512_reduce_add_ps(_mm512_add_ps(_mm512_add_ps(sums[0], sums[1]), _mm512_add_ps(sums[2], sums[3])));
}

TRDQ_AVX512 inline void modulated_norm(const float* x, const float* scale, const float* shift, float epsilon, float* y,
                                       int64_t n) {
  const __m512 mean = _mm512_set1_ps(sum_of(x, n) / static_cast<float>(n)), one = _mm512_set1_ps(1.0f);
  __m512 squares[2] = {};
  for (int64_t i = 0, j = 0; i < n; i += 16, j ^= 1) {
    const __mmask16 mask = tail_mask(n - i);
    const __m512 centred = _mm512_maskz_sub_ps(mask, _mm512_maskz_loadu_ps(mask, x + i), mean);
    squares[j] = _mm512_fmadd_ps(centred, centred, squares[j]);
  }
  const float variance = _mm512_reduce_add_ps(_mm512_add_ps(squares[0], squares[1])) / static_cast<float>(n);
  const __m512 inverse = _mm512_set1_ps(1.0f / std::sqrt(variance + epsilon));
  for (int64_t i = 0; i < n; i += 16) {
    const __mmask16 mask = tail_mask(n - i);
    const __m512 normal = _mm512_mul_ps(_mm512_sub_ps(_mm512_maskz_loadu_ps(mask, x + i), mean), inverse);
    const __m512 factor = _mm512_add_ps(one, _mm512_maskz_loadu_ps(mask, scale + i));
    _mm512_mask_storeu_ps(y + i, mask, _mm512_fmadd_ps(normal, factor, _mm512_maskz_loadu_ps(mask, shift + i)));
  }
}

TRDQ_AVX512 inline float exponentials(float* x, int64_t n) {
  const __m512 least = _mm512_set1_ps(-INFINITY);
  __m512 tops[2] = {least, least};
  for (int64_t i = 0, j = 0; i < n; i += 16, j ^= 1) {
    tops[j] = _mm512_max_ps(tops[j], _mm512_mask_loadu_ps(least, tail_mask(n - i), x + i));
  }
  const float largest = _mm512_reduce_max_ps(_mm512_max_ps(tops[0], tops[1]));
  if (portable::hidden(x, n, largest)) {
    std::memset(x, 0, n * sizeof(float));
    return 0.0f;
  }
  const __m512 top = _mm512_set1_ps(largest);
  __m512 sums[2] = {};
  for (int64_t i = 0, j = 0; i < n; i += 16, j ^= 1) {
    const __mmask16 mask = tail_mask(n - i);
    const __m512 e = exponential(_mm512_sub_ps(_mm512_maskz_loadu_ps(mask, x + i), top));
    _mm512_mask_storeu_ps(x + i, mask, e);
    sums[j] = _mm512_mask_add_ps(sums[j], mask, sums[j], e);
  }
  return _mm512_reduce_add_ps(_mm512_add_ps(sums[0], sums[1]));
}

TRDQ_AVX512 inline int32_t probabilities(const float* x, int64_t n, uint8_t* levels) {
  const __m512 least = _mm512_set1_ps(-INFINITY);
  __m512 tops[2] = {least, least};
  for (int64_t i = 0, j = 0; i < n; i += 16, j ^= 1) {
    tops[j] = _mm512_max_ps(tops[j], _mm512_mask_loadu_ps(least, tail_mask(n - i), x + i));
  }
  const float largest = _mm512_reduce_max_ps(_mm512_max_ps(tops[0], tops[1]));
  if (portable::hidden(x, n, largest)) {
    std::memset(levels, 0, n);
    return 0;
  }
  const __m512 top = _mm512_set1_ps(largest);
  __m512i sum = _mm512_setzero_si512();
  __mmask16 lost = 0;
  for (int64_t i = 0; i < n; i += 16) {
    const __mmask16 mask = tail_mask(n - i);
    const __m512 e = exponential(_mm512_sub_ps(_mm512_maskz_loadu_ps(mask, x + i), top));
    const __m512i level = _mm512_cvtps_epi32(_mm512_mul_ps(e, _mm512_set1_ps(255.0f)));
    _mm_mask_storeu_epi8(levels + i, mask, _mm512_cvtepi32_epi8(level));
    sum = _mm512_mask_add_epi32(sum, mask, sum, level);
    lost |= _mm512_mask_cmp_ps_mask(mask, e, e, _CMP_UNORD_Q);
  }
  return lost != 0 ? -1 : _mm512_reduce_add_epi32(sum);
}

// Sixteen columns of four keys at a time: four rows of levels become one register of quads.
TRDQ_AVX512 inline void pack_values(const float* v, int64_t ldv, int64_t keys, int64_t width, float* scale,
                                    int8_t* panels) {
  const int64_t quads = (keys + 3) / 4;
  const __m512i byte = _mm512_set1_epi32(255);
  for (int64_t c = 0; c < (width + 63) / 64 * 64; c += 16) {
    const __mmask16 mask = tail_mask(width - c);
    __m512 top = _mm512_set1_ps(1e-12f);
    __mmask16 lost = 0;
    for (int64_t key = 0; key < keys; key++) {
      const __m512 size = _mm512_abs_ps(_mm512_maskz_loadu_ps(mask, v + key * ldv + c));
      top = _mm512_max_ps(size, top);
      lost |= _mm512_cmp_ps_mask(size, _mm512_set1_ps(INFINITY), _CMP_NLT_UQ);
    }
    top = _mm512_mask_mov_ps(_mm512_div_ps(top, _mm512_set1_ps(127.0f)), lost, _mm512_set1_ps(NAN));
    _mm512_mask_storeu_ps(scale + c, mask, top);
    int8_t* to = panels + (c / kPanel * quads * kPanel + c % kPanel) * 4;
    for (int64_t quad = 0; quad < quads; quad++) {
      __m512i packed = _mm512_setzero_si512();
      for (int64_t i = std::min<int64_t>(4, keys - 4 * quad) - 1; i >= 0; i--) {
        const __m512 x = _mm512_maskz_loadu_ps(mask, v + (4 * quad + i) * ldv + c);
        const __m512i level = _mm512_and_si512(_mm512_cvtps_epi32(_mm512_div_ps(x, top)), byte);
        packed = _mm512_or_si512(_mm512_slli_epi32(packed, 8), level);
      }
      _mm512_storeu_si512(to + quad * 4 * kPanel, packed);
    }
  }
}

// A tile of 16 x 16 words: pairs, quads and halves of registers change places.
TRDQ_INLINE void transpose16(__m512i (&r)[16]) {
  __m512i t[16];
#pragma GCC unroll 8
  for (int i = 0; i < 8; i++) {
    t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    const __m512i a = _mm512_shuffle_i32x4(r[i], r[4 + i], 0x88), b = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0x88);
    const __m512i c = _mm512_shuffle_i32x4(r[i], r[4 + i], 0xdd), d = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0xdd);
    t[i] = _mm512_shuffle_i32x4(a, b, 0x88);
    t[4 + i] = _mm512_shuffle_i32x4(c, d, 0x88);
    t[8 + i] = _mm512_shuffle_i32x4(a, b, 0xdd);
    t[12 + i] = _mm512_shuffle_i32x4(c, d, 0xdd);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; i++) r[i] = t[i];
}

// Words, not numbers: see portable.h.
TRDQ_AVX512 inline void transpose(const float* x, int64_t ldx, int64_t rows, int64_t width, float* panel,
                                  int64_t columns) {
  for (int64_t row = 0; row < columns; row += 16) {
    for (int64_t c = 0; c < width; c += 16) {
      __m512i tile[16];
      const __mmask16 mask = tail_mask(width - c);
#pragma GCC unroll 16
      for (int64_t i = 0; i < 16; i++) {
        tile[i] = _mm512_maskz_loadu_epi32(row + i < rows ? mask : static_cast<__mmask16>(0), x + (row + i) * ldx + c);
      }
      transpose16(tile);
      for (int64_t i = 0; i < std::min<int64_t>(16, width - c); i++) {
        _mm512_storeu_si512(panel + (c + i) * columns + row, tile[i]);
      }
    }
  }
}

}  // namespace avx512
}  // namespace trdq
#endif  // x86-64
