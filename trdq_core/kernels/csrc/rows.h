// The online transform and the quantization of activations: tiles of rows, spread over a team of threads.
#pragma once

#include "abi.h"
#include "runtime.h"

namespace trdq {
namespace {

// What comes before the transform.
enum Prologue : int { kNothing = 0, kGelu = 1, kModulatedNorm = 2 };

struct Stages {
  int prologue;
  float epsilon;        // of the norm
  const float* shift;   // items x width
  const float* factor;  // items x width; the norm is multiplied by 1 + factor
  int64_t item_rows;    // tokens of one item
  const float* inverse_scale;
  const float* gathered_scale;  // inverse_scale in the order behind the permutation, where the permutation applies it
  Rotation rotation;
  const int32_t* permutation;
  int64_t hadamard_block;
  Rotation second_rotation;

  bool empty() const {
    return prologue == kNothing && inverse_scale == nullptr && rotation.data == nullptr && permutation == nullptr && hadamard_block == 0 &&
           second_rotation.data == nullptr;
  }
};

Stages make_stages(const trdq_rows& rows) {
  return {rows.prologue,
          rows.epsilon,
          rows.shift,
          rows.factor,
          rows.item_rows,
          rows.inverse_scale,
          nullptr,
          {rows.rotation, rows.rotation == nullptr ? 0 : rows.rotation_size, 0},
          rows.permutation,
          rows.hadamard_block,
          {rows.second_rotation, rows.second_rotation == nullptr ? 0 : rows.second_size, 0}};
}

bool rotation_fits(const Rotation& rotation, int64_t width) {
  return rotation.data == nullptr || (rotation.size > 0 && width % rotation.size == 0);
}

bool prologue_fits(const Stages& stages, int64_t tokens) {
  if (stages.prologue == kNothing || stages.prologue == kGelu) return true;
  return stages.prologue == kModulatedNorm && stages.shift != nullptr && stages.factor != nullptr &&
         stages.item_rows > 0 && tokens % stages.item_rows == 0;
}

bool stages_fit(const Stages& stages, int64_t tokens, int64_t width) {
  if (!prologue_fits(stages, tokens)) return false;
  if (!rotation_fits(stages.rotation, width) || !rotation_fits(stages.second_rotation, width)) return false;
  const int64_t block = stages.hadamard_block;
  if (block != 0 && block != 32 && block != 64 && block != 128 && block != 256) return false;
  if (block != 0 && width % block != 0) return false;
  if (stages.permutation == nullptr) return true;
  // An index outside the row would read foreign memory; one pass over it costs less than a microsecond.
  uint32_t largest = 0;
  for (int64_t i = 0; i < width; i++) largest = std::max(largest, static_cast<uint32_t>(stages.permutation[i]));
  return largest < static_cast<uint64_t>(width);
}

int64_t packed_floats(const Rotation& rotation) { return rotation.data == nullptr ? 0 : rotation.size * rotation.size; }

// Row-major matrix -> column panels, so that the tile kernel reads it front to back and no two rows share a cache set.
Rotation pack_rotation(const Rotation& rotation, float* out) {
  if (rotation.data == nullptr) return rotation;
  const int64_t size = rotation.size, panel = size % kRotationPanel == 0 ? kRotationPanel : size;
  for (int64_t start = 0; start < size; start += panel) {
    for (int64_t k = 0; k < size; k++) {
      std::memcpy(out + (start * size + k * panel), rotation.data + k * size + start, panel * sizeof(float));
    }
  }
  return {out, size, panel};
}

// Packs the rotations, and the scale where nothing stands between it and a permutation that is a pass of its own.
bool prepare(Stages& stages, int64_t width) {
  const int64_t first = packed_floats(stages.rotation), second = packed_floats(stages.second_rotation);
  const bool pass = stages.hadamard_block != 0 || second == 0;
  const bool late = stages.inverse_scale != nullptr && stages.permutation != nullptr && first == 0 && pass;
  if (first + second == 0 && !late) return true;
  const int64_t floats = first + second + (late ? width : 0);
  float* memory = static_cast<float*>(rotation_scratch.reserve(floats * sizeof(float)));
  if (memory == nullptr) return false;
  if (late) {
    float* scale = memory + first + second;
    row_ops().gather(stages.inverse_scale, stages.permutation, nullptr, scale, width);
    stages.gathered_scale = scale;
  }
  stages.rotation = pack_rotation(stages.rotation, memory);
  stages.second_rotation = pack_rotation(stages.second_rotation, memory + first);
  return true;
}

void run_prologue(const Stages& stages, const float* x, int64_t first, int64_t rows, int64_t width, float* y) {
  const RowOps& ops = row_ops();
  if (stages.prologue == kGelu) return ops.gelu(x, y, rows * width);
  for (int64_t r = 0; r < rows; r++) {
    const int64_t item = (first + r) / stages.item_rows * width;
    ops.modulated_norm(x + r * width, stages.factor + item, stages.shift + item, stages.epsilon, y + r * width, width);
  }
}

// Returns where the transformed rows lie: x itself, a or b. a and b hold rows * width floats each. `first` is the number
// of the tile's first row in the whole input.
const float* transform_tile(const Stages& stages, const float* x, int64_t first, int64_t rows, int64_t width, float* a,
                            float* b, Stopwatch& watch) {
  const RowOps& ops = row_ops();
  const float* from = x;
  float* to = a;
  const auto done = [&] {
    from = to;
    to = to == a ? b : a;
  };
  if (stages.prologue != kNothing) {
    run_prologue(stages, from, first, rows, width, to);
    done();
    watch.add(kBefore);
  }
  if (stages.inverse_scale != nullptr && stages.gathered_scale == nullptr) {
    for (int64_t r = 0; r < rows; r++) ops.scale(from + r * width, stages.inverse_scale, to + r * width, width);
    done();
  }
  if (stages.rotation.data != nullptr) {
    ops.rotate(from, to, rows, width, stages.rotation, nullptr);
    done();
  }
  // A rotation right behind the permutation reads the channels in their new order by itself, as long as the tile is about
  // as large as the first-level cache; from wider rows a pass of its own is quicker.
  const bool near = rows * width * static_cast<int64_t>(sizeof(float)) <= kGatheredBytes;
  const bool gathered = near && stages.hadamard_block == 0 && stages.second_rotation.data != nullptr;
  if (stages.permutation != nullptr && !gathered) {
    for (int64_t r = 0; r < rows; r++) {
      ops.gather(from + r * width, stages.permutation, stages.gathered_scale, to + r * width, width);
    }
    done();
  }
  if (stages.hadamard_block != 0) {
    ops.hadamard(from, to, rows * width, stages.hadamard_block);
    done();
  }
  if (stages.second_rotation.data != nullptr) {
    ops.rotate(from, to, rows, width, stages.second_rotation, gathered ? stages.permutation : nullptr);
    done();
  }
  watch.add(kTransform);
  return from;
}

int64_t tile_rows(const Stages& stages, int64_t tokens, int64_t width, int threads) {
  const bool rotates = stages.rotation.data != nullptr || stages.second_rotation.data != nullptr;
  // A rotation wants many rows for each panel of its matrix; everything else goes row by row and wants a tile that
  // stays in the first-level cache.
  int64_t rows = (rotates ? kRotatedTileBytes : kTileBytes) / (width * static_cast<int64_t>(sizeof(float)));
  if (rotates) rows = std::max<int64_t>(rows / 12 * 12, 6);
  return std::max<int64_t>(std::min({rows, int64_t{24}, ceil_div(tokens, threads)}), 1);
}

int64_t transform_work(const Stages& stages, int64_t tokens, int64_t width) {
  const int64_t rotations = stages.rotation.size + stages.second_rotation.size;
  return tokens * width * (1 + rotations / 16 + (stages.prologue == kNothing ? 0 : 2));
}

// Calls sink(first_row, rows, transformed rows) for every tile of the `tokens` rows at x, tiles spread over the team. x is
// row `begin` of the whole input.
template <typename Sink>
int for_each_tile(Stages stages, const float* x, int64_t begin, int64_t tokens, int64_t width, int threads,
                  const Sink& sink) {
  if (!stages_fit(stages, begin + tokens, width)) return kBadArgument;
  if (tokens == 0 || width == 0) return kOk;
  Region region;
  if (!prepare(stages, width)) return kNoMemory;
  threads = team(threads, transform_work(stages, tokens, width), kQuantizeGrain, tokens);
  const int64_t rows = tile_rows(stages, tokens, width, threads), tiles = ceil_div(tokens, rows);
  const size_t floats = stages.empty() ? 0 : static_cast<size_t>(rows * ((width + 15) / 16 * 16));
  int status = kOk;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    float* memory = floats == 0 ? nullptr : static_cast<float*>(tile_scratch.reserve(2 * floats * sizeof(float)));
    const bool ready = floats == 0 || memory != nullptr;
#pragma omp for schedule(dynamic, 1)
    for (int64_t tile = 0; tile < tiles; tile++) {
      const int64_t first = tile * rows, count = std::min(rows, tokens - first);
      if (ready) {
        Stopwatch watch(region);
        const float* from = x + first * width;
        sink(first, count, transform_tile(stages, from, begin + first, count, width, memory, memory + floats, watch));
        watch.add(kQuantize);
      } else {
#pragma omp atomic write
        status = kNoMemory;
      }
    }
  }
  return status;
}

Grid fixed_grid(float scale, float zero_point, int bits, bool symmetric) {
  const int32_t half = (1 << (bits - 1)) - 1;
  const int32_t high = symmetric ? 128 + half : (1 << bits) - 1;
  // Written so that a NaN ends at the lower bound.
  const int32_t zero = zero_point > 0.0f ? static_cast<int32_t>(std::min(zero_point, 255.0f)) : 0;
  return {scale, zero, symmetric ? 128 - half : 0, high};
}

// The range is that of the row times `clip`; what lies outside saturates.
Grid row_grid(const float* x, int64_t width, int bits, bool symmetric, float clip) {
  float low, high;
  row_ops().range(x, width, &low, &high);
  low *= clip;
  high *= clip;
  if (symmetric) {
    const float absmax = std::max(std::max(-low, high), 1e-12f);
    return fixed_grid(absmax / static_cast<float>((1 << (bits - 1)) - 1), 128.0f, bits, true);
  }
  const float levels = static_cast<float>((1 << bits) - 1);
  const float scale = std::max(high - low, 1e-12f) / levels;
  return fixed_grid(scale, std::min(std::nearbyint(-low / scale), levels), bits, false);
}

struct Levels {
  uint8_t* values;  // tokens x stride
  int64_t stride;   // at least width; bytes past width are set to 0
  float* scale;
  float* zero_point;
  int32_t* row_sum;
};

struct Request {
  int bits;
  bool symmetric;
  const float* static_scale;  // one element, or null for a grid per token
  const float* static_zero;
  float clip;  // of a grid per token
};

int quantize(const Stages& stages, const float* x, int64_t begin, int64_t tokens, int64_t width,
             const Request& request, const Levels& out, int threads) {
  if (request.bits < 2 || request.bits > 8) return kBadArgument;
  return for_each_tile(stages, x, begin, tokens, width, threads, [&](int64_t first, int64_t rows, const float* t) {
    for (int64_t r = 0; r < rows; r++) {
      const int64_t token = first + r;
      const float* row = t + r * width;
      uint8_t* values = out.values + token * out.stride;
      const Grid grid = request.static_scale != nullptr
                            ? fixed_grid(*request.static_scale, *request.static_zero, request.bits, request.symmetric)
                            : row_grid(row, width, request.bits, request.symmetric, request.clip);
      out.row_sum[token] = row_ops().quantize(row, width, grid, values);
      std::memset(values + width, 0, out.stride - width);
      out.scale[token] = grid.scale;
      out.zero_point[token] = static_cast<float>(grid.zero_point);
    }
  });
}

}  // namespace
}  // namespace trdq
