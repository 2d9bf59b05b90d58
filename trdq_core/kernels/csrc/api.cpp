// The C ABI of the TR-DQ CPU kernels, called by ctypes from trdq_core/kernels/calls.py.
//
// Every entry returns a Status. Thread counts are arguments: the caller passes torch.get_num_threads(), and a team of
// that size is the one torch's own regions keep warm, because both use the same libgomp.
#include "attention.h"
#include "product.h"
#include "rows.h"

namespace trdq {
namespace {

Levels levels_in(void* memory, int64_t rows, int64_t stride) {
  float* scale = static_cast<float*>(memory);
  int32_t* row_sum = reinterpret_cast<int32_t*>(scale + 2 * rows);
  return {reinterpret_cast<uint8_t*>(row_sum + rows), stride, scale, scale + rows, row_sum};
}

Request make_request(const trdq_rows& rows) {
  return {rows.bits, rows.symmetric != 0, rows.static_scale, rows.static_zero, rows.clip};
}

// Quantizes kLevelBytes of levels at a time and multiplies them with every weight: they never leave the cache, and
// nothing is allocated.
int quantize_and_multiply(const trdq_rows& input, const trdq_weight* weights, int64_t count,
                          const trdq_residual* residual, int threads) {
  const int64_t lda = ceil_div(input.width, 4) * 4;
  const int64_t rows = std::min(input.tokens, std::max<int64_t>(kLevelBytes / lda, 16 * kTileRows));
  void* memory = level_scratch.reserve(rows * (lda + 2 * sizeof(float) + sizeof(int32_t)));
  if (memory == nullptr) return kNoMemory;
  const Levels levels = levels_in(memory, rows, lda);
  const Stages stages = make_stages(input);
  for (int64_t first = 0; first < input.tokens; first += rows) {
    const int64_t present = std::min(rows, input.tokens - first);
    int status = quantize(stages, input.x + first * input.width, first, present, input.width, make_request(input),
                          levels, threads);
    int64_t column = 0;  // where the weight's columns begin among those of all weights
    for (int64_t i = 0; i < count && status == kOk; column += weights[i].out_features, i++) {
      Product p = make_product(weights[i]);
      if (p.task.columns == 0) continue;
      p.task.a = levels.values;
      p.task.a_scale = levels.scale;
      p.task.a_zero = levels.zero_point;
      p.task.a_sum = levels.row_sum;
      p.task.rows = present;
      p.task.y += first * p.task.ldy;
      if (residual != nullptr) {
        const float* gate = residual->gate == nullptr ? nullptr : residual->gate + column;
        p.task.residual = {residual->added + column, residual->ld_added, gate, residual->ld_gate, residual->item_rows,
                           first};
      }
      status = run_product(p, threads);
    }
    if (status != kOk) return status;
  }
  return kOk;
}

}  // namespace
}  // namespace trdq

#define TRDQ_EXPORT __attribute__((visibility("default")))

extern "C" {

TRDQ_EXPORT int trdq_abi_version() { return trdq::kAbiVersion; }

// The path that runs: 0 portable, 1 AVX2, 2 AVX512-VNNI.
TRDQ_EXPORT int trdq_path() { return trdq::path(); }

// For tests: no faster path than this from now on. Not to be called while another thread computes.
TRDQ_EXPORT int trdq_limit_path(int highest) {
  trdq::highest_path = highest;
  return trdq::kOk;
}

// From now on the phases are timed, from zero, or no longer.
TRDQ_EXPORT int trdq_measure(int on) {
  for (auto& time : trdq::phase_time) time = 0;
  trdq::measuring = on != 0;
  return trdq::kOk;
}

// Nanoseconds of wall time of each phase since then, in the order of `Phase`.
TRDQ_EXPORT int trdq_phases(int64_t* nanoseconds) {
  for (int i = 0; i < trdq::kPhases; i++) nanoseconds[i] = trdq::phase_time[i];
  return trdq::kOk;
}

// Runs what the unit can do at most, on registers alone, in every thread; operations[0] tells how many that were: 0 where
// there is no such loop. unit 0: float32 multiply-add, 1: 8-bit dot products.
TRDQ_EXPORT int trdq_peak(int unit, int64_t rounds, int threads, int64_t* operations) {
  int64_t each = 0;
#pragma omp parallel num_threads(threads) reduction(max : each)
  each = trdq::peak_ops().run(unit, rounds);
  operations[0] = each * threads;
  return trdq::kOk;
}

// y = T(x), tokens x width, contiguous.
TRDQ_EXPORT int trdq_transform(const trdq_rows* rows, float* y, int threads) {
  const int64_t width = rows->width;
  return trdq::for_each_tile(trdq::make_stages(*rows), rows->x, 0, rows->tokens, width, threads,
                             [=](int64_t first, int64_t count, const float* t) {
                               std::memcpy(y + first * width, t, count * width * sizeof(float));
                             });
}

// Levels of T(x), one grid per token, or one for all of them where static_scale and static_zero are given.
TRDQ_EXPORT int trdq_quantize(const trdq_rows* rows, uint8_t* values, float* scale, float* zero_point, int32_t* row_sum,
                              int threads) {
  return trdq::quantize(trdq::make_stages(*rows), rows->x, 0, rows->tokens, rows->width, trdq::make_request(*rows),
                        {values, rows->width, scale, zero_point, row_sum}, threads);
}

// y (tokens x out_features) from levels. values has leading dimension in_features rounded up to a multiple of 4; what
// lies past in_features must be 0.
TRDQ_EXPORT int trdq_linear(const uint8_t* values, const float* scale, const float* zero_point, const int32_t* row_sum,
                            int64_t tokens, const trdq_weight* weight, int threads) {
  trdq::Product product = trdq::make_product(*weight);
  if (!trdq::product_fits(product)) return trdq::kBadArgument;
  if (tokens == 0 || weight->out_features == 0) return trdq::kOk;
  product.task.a = values;
  product.task.rows = tokens;
  product.task.a_scale = scale;
  product.task.a_zero = zero_point;
  product.task.a_sum = row_sum;
  return trdq::run_product(product, threads);
}

// The two above in one, for some weights that read the same rows. The residual, if any, has the columns of all products.
TRDQ_EXPORT int trdq_linears_from_float(const trdq_rows* rows, const trdq_weight* weights, int64_t count,
                                        const trdq_residual* residual, int threads) {
  for (int64_t i = 0; i < count; i++) {
    if (weights[i].in_features != rows->width) return trdq::kBadArgument;
    if (!trdq::product_fits(trdq::make_product(weights[i]))) return trdq::kBadArgument;
  }
  if (residual != nullptr && residual->gate != nullptr && residual->item_rows <= 0) return trdq::kBadArgument;
  if (rows->tokens == 0) return trdq::kOk;
  return trdq::quantize_and_multiply(*rows, weights, count, residual, threads);
}

// softmax(factor * Q K^T + mask) V for every item and head.
TRDQ_EXPORT int trdq_attend(const trdq_attention* attention, int threads) { return trdq::attend(*attention, threads); }

}  // extern "C"
