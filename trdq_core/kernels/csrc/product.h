// The integer product: activation blocks times panels of 64 columns, spread over a team of threads.
#pragma once

#include "abi.h"
#include "runtime.h"

namespace trdq {
namespace {

struct Product {
  PanelTask task;  // of the whole problem; columns and rows hold the totals
  const uint8_t* packed;
  int bits;
  const int8_t* group_scale;  // columns x groups
  int64_t group_size;
};

Product make_product(const trdq_weight& w) {
  PanelTask task = {};
  task.depth = w.in_features;
  task.lda = ceil_div(w.in_features, 4) * 4;
  task.columns = w.out_features;
  task.w_scale = w.scale;
  task.w_zero = w.zero_point;
  task.column_sum = w.column_sum;
  task.bias = w.bias;
  task.y = w.y;
  task.ldy = w.ldy;
  return {task, static_cast<const uint8_t*>(w.data), w.bits, w.group_scale, w.group_size};
}

bool product_fits(const Product& p) {
  const PanelTask& all = p.task;
  if (all.lda % 4 != 0 || all.lda < all.depth || all.lda >= all.depth + 4) return false;
  if (all.depth <= 0 || all.depth > kMaxDepth || (p.bits != 8 && p.bits != 4)) return false;
  if (p.group_scale == nullptr) return true;
  return p.bits == 4 && p.group_size > 0 && p.group_size % 8 == 0 && all.depth % p.group_size == 0;
}

int64_t groups(const Product& p) { return p.group_scale == nullptr ? 0 : p.task.depth / p.group_size; }

// Scales of 64 columns turned to [groups][64], then the panel's nibbles to bytes. memory: see unpacked_bytes.
const int8_t* unpack_panel(const Product& p, int64_t panel, uint8_t* memory) {
  const int64_t k8 = ceil_div(p.task.depth, 8), count = groups(p);
  int8_t* w = reinterpret_cast<int8_t*>(memory);
  uint8_t* scales = nullptr;
  if (count > 0) {
    scales = memory + k8 * 8 * kPanel;
    const int64_t columns = std::min(kPanel, p.task.columns - panel * kPanel);
    std::memset(scales, 1, count * kPanel);
    for (int64_t n = 0; n < columns; n++) {
      const int8_t* from = p.group_scale + (panel * kPanel + n) * count;
      for (int64_t g = 0; g < count; g++) scales[g * kPanel + n] = static_cast<uint8_t>(from[g]);
    }
  }
  panel_ops().unpack(p.packed + panel * k8 * 4 * kPanel, scales, k8, count > 0 ? p.group_size / 8 : k8, w);
  return w;
}

size_t unpacked_bytes(const Product& p) { return (ceil_div(p.task.depth, 8) * 8 + groups(p)) * kPanel; }

PanelTask cut(const PanelTask& all, int64_t first, int64_t rows, int64_t panel, const int8_t* w, void* memory) {
  PanelTask task = all;
  const int64_t n = panel * kPanel;
  task.a += first * all.lda;
  task.rows = rows;
  task.a_scale += first;
  task.a_zero += first;
  task.a_sum += first;
  task.w = w;
  task.columns = std::min(kPanel, all.columns - n);
  task.w_scale += n;
  if (task.w_zero != nullptr) task.w_zero += n;
  task.column_sum += n;
  if (task.bias != nullptr) task.bias += n;
  task.y += first * all.ldy + n;
  task.residual.first_row += first;
  if (task.residual.added != nullptr) task.residual.added += n;
  if (task.residual.gate != nullptr) task.residual.gate += n;
  task.memory = memory;
  return task;
}

int64_t block_rows(const PanelTask& all, int64_t panels, int threads) {
  int64_t rows = std::max<int64_t>(kBlockBytes / all.lda, 48);
  // Few panels and many threads: cut the rows finer until every thread has about two tasks.
  while (rows > 4 * kTileRows && panels * ceil_div(all.rows, rows) < 2 * threads) rows /= 2;
  return ceil_div(rows, kTileRows) * kTileRows;
}

int run_product(const Product& p, int threads) {
  Region region;
  const PanelTask& all = p.task;
  const int64_t panels = ceil_div(all.columns, kPanel);
  threads = team(threads, all.rows * all.columns * all.depth, kProductGrain, panels * ceil_div(all.rows, kTileRows));
  const int64_t rows = std::min(block_rows(all, panels, threads), all.rows), blocks = ceil_div(all.rows, rows);
  const PanelOps& ops = panel_ops();
  const size_t panel_bytes = p.bits == 4 ? (unpacked_bytes(p) + 63) / 64 * 64 : 0;
  const size_t bytes = panel_bytes + ops.product_bytes(rows, all.lda);
  int status = kOk;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    uint8_t* memory = bytes == 0 ? nullptr : static_cast<uint8_t*>(panel_scratch.reserve(bytes));
    const bool ready = bytes == 0 || memory != nullptr;
    int64_t held = -1;  // the panel whose bytes `memory` holds
#pragma omp for schedule(dynamic, 1)
    for (int64_t index = 0; index < panels * blocks; index++) {
      Stopwatch watch(region);
      const int64_t panel = index / blocks, first = index % blocks * rows;
      if (!ready) {
#pragma omp atomic write
        status = kNoMemory;
        continue;
      }
      const int8_t* w = reinterpret_cast<const int8_t*>(p.packed) + panel * all.lda * kPanel;
      if (p.bits == 4) w = held == panel ? reinterpret_cast<int8_t*>(memory) : unpack_panel(p, panel, memory);
      held = panel;
      ops.product(cut(all, first, std::min(rows, all.rows - first), panel, w, memory + panel_bytes));
      watch.add(kMultiply);
    }
  }
  return status;
}

}  // namespace
}  // namespace trdq
