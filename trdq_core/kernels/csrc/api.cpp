// The C ABI of the TR-DQ CPU kernels, called by ctypes from trdq_core/kernels/calls.py.
//
// Every entry returns a Status. Thread counts are arguments: the caller passes torch.get_num_threads(), and a team of
// that size is the one torch's own regions keep warm, because both use the same libgomp.
#include "product.h"
#include "rows.h"

namespace trdq {
namespace {

Levels levels_in(void* memory, int64_t rows, int64_t stride) {
  float* scale = static_cast<float*>(memory);
  int32_t* row_sum = reinterpret_cast<int32_t*>(scale + 2 * rows);
  return {reinterpret_cast<uint8_t*>(row_sum + rows), stride, scale, scale + rows, row_sum};
}

// Quantizes and multiplies kLevelBytes of levels at a time: they never leave the cache, and nothing is allocated.
int quantize_and_multiply(const Stages& stages, const float* x, const Request& request, Product p, int threads) {
  const int64_t tokens = p.task.rows, lda = p.task.lda;
  const int64_t rows = std::min(tokens, std::max<int64_t>(kLevelBytes / lda, 16 * kTileRows));
  void* memory = level_scratch.reserve(rows * (lda + 2 * sizeof(float) + sizeof(int32_t)));
  if (memory == nullptr) return kNoMemory;
  const Levels levels = levels_in(memory, rows, lda);
  p.task.a = levels.values;
  p.task.a_scale = levels.scale;
  p.task.a_zero = levels.zero_point;
  p.task.a_sum = levels.row_sum;
  float* y = p.task.y;
  for (int64_t first = 0; first < tokens; first += rows) {
    p.task.rows = std::min(rows, tokens - first);
    p.task.y = y + first * p.task.ldy;
    int status = quantize(stages, x + first * p.task.depth, p.task.rows, p.task.depth, request, levels, threads);
    if (status == kOk) status = run_product(p, threads);
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

// y = T(x); x and y are tokens x width, contiguous.
TRDQ_EXPORT int trdq_transform(const float* x, int64_t tokens, int64_t width, const float* inverse_scale, const float* rotation,
                   int64_t rotation_size, const int32_t* permutation, int64_t hadamard_block,
                   const float* second_rotation, int64_t second_size, float* y, int threads) {
  const auto stages = trdq::make_stages(inverse_scale, rotation, rotation_size, permutation, hadamard_block,
                                        second_rotation, second_size);
  return trdq::for_each_tile(stages, x, tokens, width, threads, [=](int64_t first, int64_t rows, const float* rows_of_t) {
    std::memcpy(y + first * width, rows_of_t, rows * width * sizeof(float));
  });
}

// Levels of T(x), one grid per token, or one for all of them where static_scale and static_zero are given.
TRDQ_EXPORT int trdq_quantize(const float* x, int64_t tokens, int64_t width, const float* inverse_scale,
                              const float* rotation, int64_t rotation_size, const int32_t* permutation,
                              int64_t hadamard_block, const float* second_rotation, int64_t second_size, int bits,
                              int symmetric, const float* static_scale, const float* static_zero, float clip,
                              uint8_t* values, float* scale, float* zero_point, int32_t* row_sum, int threads) {
  const auto stages = trdq::make_stages(inverse_scale, rotation, rotation_size, permutation, hadamard_block,
                                        second_rotation, second_size);
  return trdq::quantize(stages, x, tokens, width, {bits, symmetric != 0, static_scale, static_zero, clip},
                        {values, width, scale, zero_point, row_sum}, threads);
}

// y (tokens x out_features). values has leading dimension lda, a multiple of 4; what lies past in_features must be 0.
TRDQ_EXPORT int trdq_linear(const uint8_t* values, int64_t lda, const float* scale, const float* zero_point,
                            const int32_t* row_sum, int64_t tokens, int64_t in_features, int64_t out_features,
                            const void* weight, int bits, const int8_t* group_scale, int64_t group_size,
                            const float* weight_scale, const float* weight_zero, const float* column_sum,
                            const float* bias, float* y, int threads) {
  const trdq::Product product = {{values, tokens, lda, in_features, scale, zero_point, row_sum, nullptr, out_features,
                                  weight_scale, weight_zero, column_sum, bias, y, out_features, nullptr},
                                 static_cast<const uint8_t*>(weight), bits, group_scale, group_size};
  if (!trdq::product_fits(product)) return trdq::kBadArgument;
  if (tokens == 0 || out_features == 0) return trdq::kOk;
  return trdq::run_product(product, threads);
}

// The two above in one: y (tokens x out_features) from x (tokens x in_features).
TRDQ_EXPORT int trdq_linear_from_float(
    const float* x, int64_t tokens, int64_t in_features, const float* inverse_scale, const float* rotation,
    int64_t rotation_size, const int32_t* permutation, int64_t hadamard_block, const float* second_rotation,
    int64_t second_size, int bits, int symmetric, const float* static_scale, const float* static_zero, float clip,
    int64_t out_features, const void* weight, int weight_bits, const int8_t* group_scale, int64_t group_size,
    const float* weight_scale, const float* weight_zero, const float* column_sum, const float* bias, float* y,
    int threads) {
  const auto stages = trdq::make_stages(inverse_scale, rotation, rotation_size, permutation, hadamard_block,
                                        second_rotation, second_size);
  const trdq::Product product = {{nullptr, tokens, trdq::ceil_div(in_features, 4) * 4, in_features, nullptr, nullptr,
                                  nullptr, nullptr, out_features, weight_scale, weight_zero, column_sum, bias, y,
                                  out_features, nullptr},
                                 static_cast<const uint8_t*>(weight), weight_bits, group_scale, group_size};
  if (!trdq::product_fits(product)) return trdq::kBadArgument;
  if (tokens == 0 || out_features == 0) return trdq::kOk;
  return trdq::quantize_and_multiply(stages, x, {bits, symmetric != 0, static_scale, static_zero, clip}, product, threads);
}

}  // extern "C"
