// The structures that cross the C ABI; their twins in Python are in trdq_core/kernels/structures.py.
#pragma once

#include <cstdint>

extern "C" {

// Rows of activations, what is done to them before they are quantized, and their grid.
struct trdq_rows {
  const float* x;  // tokens x width, contiguous
  int64_t tokens;
  int64_t width;
  int prologue;  // 0 nothing, 1 GELU (tanh), 2 layer norm and modulation
  float epsilon;
  const float* shift;
  const float* factor;
  int64_t item_rows;
  const float* inverse_scale;
  const float* rotation;
  int64_t rotation_size;
  const int32_t* permutation;
  int64_t hadamard_block;
  const float* second_rotation;
  int64_t second_size;
  int bits;
  int symmetric;
  const float* static_scale;  // null: a grid for each token
  const float* static_zero;
  float clip;
};

// One packed weight and where its product goes.
struct trdq_weight {
  int64_t in_features;
  int64_t out_features;
  const void* data;
  int bits;
  const int8_t* group_scale;
  int64_t group_size;
  const float* scale;
  const float* zero_point;
  const float* column_sum;
  const float* bias;
  float* y;
  int64_t ldy;
};

// y = added + gate * product, for the products of all weights side by side; see Residual in common.h.
struct trdq_residual {
  const float* added;
  int64_t ld_added;
  const float* gate;
  int64_t ld_gate;
  int64_t item_rows;
};

// Queries, keys, values and output of an attention: item i, row r, head h, channel c lies at
// i * item_stride + r * row_stride + h * width + c.
struct trdq_heads {
  float* data;
  int64_t item_stride;
  int64_t row_stride;
};

struct trdq_attention {
  trdq_heads q, k, v, y;
  int64_t items, heads, rows, keys, width;
  const float* mask;  // added to the scores: item x head x row x key, or null; a stride of 0 repeats
  int64_t mask_item, mask_head, mask_row;
  float factor;  // of the scores
  int bits;      // 0: float32 products; 8: int8 products
};

}  // extern "C"
