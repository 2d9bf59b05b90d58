// Attention of one item and head at a time: scores and probabilities of a block of rows never leave the cache.
//
// float32: K^T and V are copied into column panels once for each item and head, then blocks of query rows are multiplied.
// int8: Q and K have one scale a token (K after taking the mean key away, which no softmax sees), V one a channel, and
// probabilities are levels of 1/255 of the row's largest; both products are those of the quantized linears. Method of
// SageAttention (arXiv 2410.02367), with 8-bit probabilities.
#pragma once

#include <limits>

#include "abi.h"
#include "runtime.h"

namespace trdq {
namespace {

constexpr int64_t kScoreBytes = 256 * 1024;  // of one block of scores
constexpr int64_t kHeadRows = 48;            // most rows of a block: four register tiles

int64_t rounded(int64_t n, int64_t step) { return ceil_div(n, step) * step; }

// Cuts one allocation into aligned parts.
class Parts {
 public:
  explicit Parts(void* memory) : at_(static_cast<uint8_t*>(memory)) {}
  template <typename T>
  T* take(int64_t count) {
    T* part = reinterpret_cast<T*>(at_ + used_);
    used_ += rounded(count * sizeof(T), 64);
    return part;
  }
  int64_t used() const { return used_; }

 private:
  uint8_t* at_;
  int64_t used_ = 0;
};

// What one thread holds: operands of one head, and one block of rows.
struct HeadMemory {
  float *keys, *values, *scores, *factors;                 // float32
  uint8_t *q, *p;                                          // levels
  int8_t *k_panels, *v_panels;                             // [quads][64][4]
  float *q_scale, *q_zero, *p_zero, *k_scale, *k_sum, *v_scale, *mean;
  int32_t* row_sum;
  void* product;
};

int64_t lay_out(const trdq_attention& a, int64_t rows, void* memory, HeadMemory& m) {
  Parts parts(memory);
  const int64_t keys = rounded(a.keys, kPanel), width = rounded(a.width, kPanel);
  m = {};
  m.scores = parts.take<float>(rows * keys);
  m.factors = parts.take<float>(rows);
  m.keys = parts.take<float>(keys * rounded(a.width, 16) + 64);  // int8: one centred row and levels, while they are packed
  if (a.bits == 0) {
    m.values = parts.take<float>(width * a.keys);
    return parts.used();
  }
  const int64_t depth = rounded(a.width, 4);
  m.q = parts.take<uint8_t>(rows * depth);
  m.p = parts.take<uint8_t>(rows * rounded(a.keys, 4));
  m.k_panels = parts.take<int8_t>(keys * depth);
  m.v_panels = parts.take<int8_t>(width * rounded(a.keys, 4));
  m.q_scale = parts.take<float>(rows);
  m.q_zero = parts.take<float>(rows);
  m.p_zero = parts.take<float>(rows);
  m.k_scale = parts.take<float>(keys);
  m.k_sum = parts.take<float>(keys);
  m.v_scale = parts.take<float>(width);
  m.mean = parts.take<float>(width);
  m.row_sum = parts.take<int32_t>(std::max(rows, keys));
  m.product = parts.take<uint8_t>(panel_ops().product_bytes(rows, std::max(depth, rounded(a.keys, 4))));
  return parts.used();
}

struct Head {
  const float *q, *k, *v, *mask;
  float* y;
};

Head head_of(const trdq_attention& a, int64_t item, int64_t head) {
  const auto at = [&](const trdq_heads& heads) { return heads.data + item * heads.item_stride + head * a.width; };
  const float* mask = a.mask == nullptr ? nullptr : a.mask + item * a.mask_item + head * a.mask_head;
  return {at(a.q), at(a.k), at(a.v), mask, at(a.y)};
}

// ---- float32 ----------------------------------------------------------------------------------------------------

void pack_head(const trdq_attention& a, const Head& head, const HeadMemory& m) {
  const HeadOps& ops = head_ops();
  for (int64_t key = 0; key < a.keys; key += kRotationPanel) {
    const int64_t count = std::min(kRotationPanel, a.keys - key);
    ops.transpose(head.k + key * a.k.row_stride, a.k.row_stride, count, a.width, m.keys + key * a.width, kRotationPanel);
  }
  for (int64_t start = 0; start < a.width; start += kRotationPanel) {
    const int64_t count = std::min(kRotationPanel, a.width - start);
    for (int64_t key = 0; key < a.keys; key++) {
      float* to = m.values + start * a.keys + key * kRotationPanel;
      std::memcpy(to, head.v + key * a.v.row_stride + start, count * sizeof(float));
      std::fill(to + count, to + kRotationPanel, 0.0f);
    }
  }
}

void add_mask(const trdq_attention& a, const Head& head, int64_t first, int64_t rows, float* scores, int64_t ld) {
  if (head.mask == nullptr) return;
  for (int64_t r = 0; r < rows; r++) {
    const float* mask = head.mask + (first + r) * a.mask_row;
    for (int64_t j = 0; j < a.keys; j++) scores[r * ld + j] += mask[j];
  }
}

void attend_rows(const trdq_attention& a, const Head& head, int64_t first, int64_t rows, const HeadMemory& m) {
  const RowOps& ops = row_ops();
  const int64_t ld = rounded(a.keys, kPanel);
  std::fill(m.factors, m.factors + rows, a.factor);
  for (int64_t key = 0; key < a.keys; key += kRotationPanel) {
    ops.multiply(head.q + first * a.q.row_stride, a.q.row_stride, rows, m.keys + key * a.width, a.width, kRotationPanel,
                 m.factors, m.scores + key, ld);
  }
  add_mask(a, head, first, rows, m.scores, ld);
  for (int64_t r = 0; r < rows; r++) {
    const float sum = ops.exponentials(m.scores + r * ld, a.keys);
    m.factors[r] = sum == 0.0f ? 0.0f : 1.0f / sum;  // 0: the row sees no key, and becomes 0 as in torch
  }
  for (int64_t start = 0; start < a.width; start += kRotationPanel) {
    ops.multiply(m.scores, ld, rows, m.values + start * a.keys, a.keys, std::min(kRotationPanel, a.width - start),
                 m.factors, head.y + first * a.y.row_stride + start, a.y.row_stride);
  }
}

// ---- int8 -------------------------------------------------------------------------------------------------------

// Symmetric levels of one row, stored + 128; returns their scale: NaN where the row is not finite, so that no score of it
// looks like a number.
float quantize_row(const float* x, int64_t n, int64_t padded, uint8_t* levels, int32_t* sum) {
  float low, high;
  row_ops().range(x, n, &low, &high);
  uint32_t lost = 0;
  for (int64_t i = 0; i < n; i++) lost |= !(std::fabs(x[i]) <= std::numeric_limits<float>::max());
  if (lost != 0) {
    *sum = static_cast<int32_t>(128 * n);
    std::memset(levels, 128, padded);
    return std::numeric_limits<float>::quiet_NaN();
  }
  const float scale = std::max(std::max(-low, high), 1e-12f) / 127.0f;
  *sum = row_ops().quantize(x, n, {scale, 128, 1, 255}, levels);
  std::memset(levels + n, 128, padded - n);
  return scale;
}

void pack_head_int8(const trdq_attention& a, const Head& head, const HeadMemory& m) {
  const HeadOps& ops = head_ops();
  const int64_t depth = rounded(a.width, 4);
  std::fill(m.mean, m.mean + a.width, 0.0f);
  for (int64_t key = 0; key < a.keys; key++) {
    for (int64_t c = 0; c < a.width; c++) m.mean[c] += head.k[key * a.k.row_stride + c];
  }
  for (int64_t c = 0; c < a.width; c++) m.mean[c] /= static_cast<float>(a.keys);
  for (int64_t start = 0; start < a.keys; start += kPanel) {
    const int64_t count = std::min(kPanel, a.keys - start);
    float* centred = m.keys;
    uint8_t* rows = reinterpret_cast<uint8_t*>(m.keys + rounded(a.width, 16));
    for (int64_t key = 0; key < count; key++) {
      const float* from = head.k + (start + key) * a.k.row_stride;
      for (int64_t c = 0; c < a.width; c++) centred[c] = from[c] - m.mean[c];
      int32_t sum;
      m.k_scale[start + key] = a.factor * quantize_row(centred, a.width, depth, rows + key * depth, &sum);
      m.k_sum[start + key] = static_cast<float>(sum - 128 * a.width);
    }
    for (int64_t i = 0; i < count * depth; i++) rows[i] ^= 128;
    ops.transpose(reinterpret_cast<const float*>(rows), depth / 4, count, depth / 4,
                  reinterpret_cast<float*>(m.k_panels + start * depth), kPanel);
  }
  ops.pack_values(head.v, a.v.row_stride, a.keys, a.width, m.v_scale, m.v_panels);
}

void attend_rows_int8(const trdq_attention& a, const Head& head, int64_t first, int64_t rows, const HeadMemory& m) {
  const int64_t ld = rounded(a.keys, kPanel), depth = rounded(a.width, 4), quads = rounded(a.keys, 4);
  for (int64_t r = 0; r < rows; r++) {
    const float* from = head.q + (first + r) * a.q.row_stride;
    m.q_scale[r] = quantize_row(from, a.width, depth, m.q + r * depth, &m.row_sum[r]);
    m.q_zero[r] = 128.0f;
    m.p_zero[r] = 0.0f;
  }
  for (int64_t key = 0; key < a.keys; key += kPanel) {
    panel_ops().product({m.q, rows, depth, a.width, m.q_scale, m.q_zero, m.row_sum, m.k_panels + key * depth,
                         std::min(kPanel, a.keys - key), m.k_scale + key, nullptr, m.k_sum + key, nullptr,
                         m.scores + key, ld, m.product, {}});
  }
  add_mask(a, head, first, rows, m.scores, ld);
  for (int64_t r = 0; r < rows; r++) {
    const int32_t sum = head_ops().probabilities(m.scores + r * ld, a.keys, m.p + r * quads);
    std::memset(m.p + r * quads + a.keys, 0, quads - a.keys);
    m.factors[r] = sum > 0 ? 1.0f / static_cast<float>(sum) : sum == 0 ? 0.0f : std::numeric_limits<float>::quiet_NaN();
  }
  for (int64_t start = 0; start < a.width; start += kPanel) {
    panel_ops().product({m.p, rows, quads, a.keys, m.factors, m.p_zero, m.row_sum, m.v_panels + start * quads,
                         std::min(kPanel, a.width - start), m.v_scale + start, nullptr, m.v_scale + start, nullptr,
                         head.y + first * a.y.row_stride + start, a.y.row_stride, m.product, {}});
  }
}

// ---- both -------------------------------------------------------------------------------------------------------

bool attention_fits(const trdq_attention& a) {
  if (a.items < 0 || a.heads < 0 || a.rows < 0 || a.keys <= 0 || a.width <= 0) return false;
  return a.bits == 0 || (a.bits == 8 && a.keys <= kMaxDepth && a.width <= kMaxDepth);
}

int attend(const trdq_attention& a, int threads) {
  if (!attention_fits(a)) return kBadArgument;
  const int64_t pairs = a.items * a.heads;
  if (pairs == 0 || a.rows == 0) return kOk;
  Region region;
  const int64_t by_cache = kScoreBytes / (rounded(a.keys, kPanel) * static_cast<int64_t>(sizeof(float))) / 12 * 12;
  const int64_t rows = std::min(std::clamp<int64_t>(by_cache, 12, kHeadRows), a.rows);
  const int64_t blocks = ceil_div(a.rows, rows);
  // Each part of a head packs its operands again, so a head is cut only if there are too few of them.
  const int64_t cuts = std::min(blocks, ceil_div(2 * threads, pairs)), tasks = pairs * cuts;
  threads = team(threads, pairs * a.rows * a.keys * a.width, kProductGrain, tasks);
  int status = kOk;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    HeadMemory m;
    void* memory = head_scratch.reserve(lay_out(a, rows, nullptr, m));
    lay_out(a, rows, memory, m);
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < tasks; task++) {
      if (memory == nullptr) {
#pragma omp atomic write
        status = kNoMemory;
        continue;
      }
      Stopwatch watch(region);
      const int64_t pair = task / cuts, cut = task % cuts;
      const Head head = head_of(a, pair / a.heads, pair % a.heads);
      a.bits == 0 ? pack_head(a, head, m) : pack_head_int8(a, head, m);
      for (int64_t block = cut * blocks / cuts; block < (cut + 1) * blocks / cuts; block++) {
        const int64_t first = block * rows, count = std::min(rows, a.rows - first);
        a.bits == 0 ? attend_rows(a, head, first, count, m) : attend_rows_int8(a, head, first, count, m);
      }
      watch.add(kAttend);
    }
  }
  return status;
}

}  // namespace
}  // namespace trdq
