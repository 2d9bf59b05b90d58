// Shared types of the TR-DQ CPU kernels: what a set of row operations and of panel operations must offer.
//
// Nothing here knows of Python or torch. Every pointer is borrowed for the length of one call.
// Two implementations fill the tables below: portable.h (plain C++) and avx512.h (AVX512 + VNNI);
// api.cpp chooses between them at run time, so the library is built without -march.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>

namespace trdq {

// Columns of one weight panel. 64 int32 accumulators are four zmm registers.
constexpr int64_t kPanel = 64;
// Rows of one register tile of the integer product: 6 x 4 accumulators + 4 weights + 1 value = 29 of 32 registers.
constexpr int64_t kTileRows = 6;
// Columns of one panel of a packed rotation, and rows of its register tile: 12 x 2 accumulators.
constexpr int64_t kRotationPanel = 32;

// A dense n x n matrix applied as x_block @ matrix, stored as column panels [n/panel][n][panel].
struct Rotation {
  const float* data;
  int64_t size;
  int64_t panel;
};

// How many levels a row has and where its zero lies, in the stored (unsigned) domain.
struct Grid {
  float scale;
  int32_t zero_point;
  int32_t low;
  int32_t high;
};

struct RowOps {
  void (*scale)(const float* x, const float* factor, float* y, int64_t n);
  // y[i] = x[index[i]], times factor[i] where there are factors.
  void (*gather)(const float* x, const int32_t* index, const float* factor, float* y, int64_t n);
  // x and y: rows x width, both with leading dimension width; width is a multiple of rotation.size.
  // With an index, channel k of the input is x[index[k]]: a permutation in front of a rotation costs no pass of its own.
  void (*rotate)(const float* x, float* y, int64_t rows, int64_t width, const Rotation& rotation, const int32_t* index);
  // n is a multiple of block, block one of 32, 64, 128, 256; normalised.
  void (*hadamard)(const float* x, float* y, int64_t n, int64_t block);
  // Largest and smallest value of the row, zero included.
  void (*range)(const float* x, int64_t n, float* low, float* high);
  // Writes the levels and returns their sum.
  int32_t (*quantize)(const float* x, int64_t n, const Grid& grid, uint8_t* q);
  // x / (1 + exp(-2 sqrt(2 / pi) (x + 0.044715 x^3))), which is GELU with the tanh approximation.
  void (*gelu)(const float* x, float* y, int64_t n);
  // Layer norm of one row, then (1 + scale) * that + shift.
  void (*modulated_norm)(const float* x, const float* scale, const float* shift, float epsilon, float* y, int64_t n);
  // x = exp(x - max), in place; returns the sum: 0 where every x is -inf, NaN where one is NaN.
  float (*exponentials)(float* x, int64_t n);
  // y (rows x columns) = x (rows x depth) times one panel [depth][kRotationPanel]; columns 1..kRotationPanel. Each row
  // is multiplied by its factor where there are factors.
  void (*multiply)(const float* x, int64_t ldx, int64_t rows, const float* panel, int64_t depth, int64_t columns,
                   const float* factor, float* y, int64_t ldy);
};

// What is done with a product before it is stored: y = residual + gate * (product + bias), one gate for `item_rows` rows.
struct Residual {
  const float* added;  // rows x columns of the whole result, or null: nothing is done
  int64_t ld_added;
  const float* gate;  // items x columns, or null for 1
  int64_t ld_gate;
  int64_t item_rows;
  int64_t first_row;  // of this task in the whole problem
};

// What attention needs besides products.
struct HeadOps {
  // panel [width][columns] = x^T for x rows x width, rows <= columns; columns past `rows` become 0.
  void (*transpose)(const float* x, int64_t ldx, int64_t rows, int64_t width, float* panel, int64_t columns);
  // Levels round(255 exp(x - max)); returns their sum: 0 where every x is -inf, -1 where one is NaN.
  int32_t (*probabilities)(const float* x, int64_t n, uint8_t* levels);
  // Symmetric levels of each column of v (keys x width) as weight panels [ceil(keys / 4)][64][4], and their scales:
  // NaN for a column that is not finite.
  void (*pack_values)(const float* v, int64_t ldv, int64_t keys, int64_t width, float* scale, int8_t* panels);
};

struct PeakOps {
  // Keeps unit 0 (float32) or 1 (8 bits) busy for so many rounds; returns the operations done.
  int64_t (*run)(int unit, int64_t rounds);
};

// One activation block times one panel of 64 columns.
struct PanelTask {
  const uint8_t* a;  // rows x lda, lda a multiple of 4
  int64_t rows;
  int64_t lda;
  int64_t depth;           // in_features, before padding
  const float* a_scale;    // rows
  const float* a_zero;     // rows, integer-valued
  const int32_t* a_sum;    // rows
  const int8_t* w;         // [lda/4][64][4]
  int64_t columns;         // columns of this panel that exist, 1..64; vectors below hold that many
  const float* w_scale;
  const float* w_zero;     // integer-valued, or null
  const float* column_sum; // integer-valued
  const float* bias;       // or null
  float* y;
  int64_t ldy;
  void* memory;  // of this thread, PanelOps::product_bytes of it
  Residual residual;
};

struct PanelOps {
  void (*product)(const PanelTask& task);
  // Unpacks nibbles [k8][64][4] to bytes [2 * k8][64][4]; group_scale is [groups][64] (1..16) or null,
  // group8 the group's length in units of 8 channels.
  void (*unpack)(const uint8_t* packed, const uint8_t* group_scale, int64_t k8, int64_t group8, int8_t* w);
  // Bytes of memory that one product of rows x lda wants.
  size_t (*product_bytes)(int64_t rows, int64_t lda);
};

// Memory of one thread that survives between calls: a fresh mapping per call costs more than the small products.
class Scratch {
 public:
  ~Scratch() { std::free(data_); }
  // Returns at least `bytes` bytes aligned to 64, or null. Invalidates what was returned before.
  void* reserve(size_t bytes) {
    if (bytes <= size_) return data_;
    std::free(data_);
    size_ = (bytes + 4095) & ~size_t{4095};
    data_ = std::aligned_alloc(64, size_);
    if (data_ == nullptr) size_ = 0;
    return data_;
  }

 private:
  void* data_ = nullptr;
  size_t size_ = 0;
};

}  // namespace trdq
