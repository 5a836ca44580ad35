// Rows of logits cut into tiles, a warp to each.
//
// The tiles depend on the vocabulary and the dtype alone, and a lane owns the same columns of a
// tile wherever the row lies in memory: so a row's bits do not depend on the batch around it, and a
// few rows fill the device as many do. A warp reads its tile once, into registers, 16 bytes at a
// time, and waits for no other warp.
#pragma once
#include "common.cuh"

namespace rk::cuda {
namespace {

constexpr int kRowThreads = 256, kRowWarps = kRowThreads / kWarp;
// Threads of a kernel that has a warp, or a thread, per row.
constexpr int kCombineThreads = 128;
// The row of this warp.
__device__ __forceinline__ int64_t row_of_warp() {
  return static_cast<int64_t>(blockIdx.x) * (kCombineThreads / kWarp) + threadIdx.x / kWarp;
}

// n / d for n below 2^31 by a multiplication, exact (Granlund and Montgomery, 1994).
struct Divisor {
  uint32_t divisor, factor;
  int shift;

  explicit Divisor(int64_t d) : divisor(static_cast<uint32_t>(d > 1 ? d : 1)), shift(0) {
    while ((uint64_t{1} << shift) < divisor) ++shift;
    factor = static_cast<uint32_t>(((uint64_t{1} << (31 + shift)) + divisor - 1) / divisor);
  }
  __device__ __forceinline__ uint32_t quotient(uint32_t n) const {
    return static_cast<uint32_t>((static_cast<uint64_t>(n * 2) * factor) >> 32) >> shift;
  }
};

// The tiles of a batch of rows, for a kernel's arguments.
struct RowTiles {
  Divisor tiles, cols;
  uint32_t total;

  RowTiles(int64_t rows, int64_t columns, int64_t tiles_of_row)
      : tiles(tiles_of_row), cols(columns), total(grid_size(rows * columns * tiles_of_row)) {}
  int64_t blocks() const { return ceil_div(total, kRowWarps); }
};

// Columns of a tile of kSlots 16-byte loads a lane.
__host__ __device__ constexpr int tile_columns(int slots, int64_t element_size) {
  return slots * kWarp * static_cast<int>(16 / element_size);
}

// A warp's tile: number `id` of all, `index` of token `token`, which is `row`, `col` of its grid.
struct Tile {
  uint32_t id, token, index, row, col;

  __device__ __forceinline__ explicit Tile(const RowTiles& t)
      : id(blockIdx.x * kRowWarps + threadIdx.x / kWarp) {
    token = t.tiles.quotient(id);
    index = id - token * t.tiles.divisor;
    row = t.cols.quotient(token);
    col = token - row * t.cols.divisor;
  }
  // Element offset of the token in `t`.
  __device__ __forceinline__ int64_t of(const Tensor& t) const {
    return row * t.stride0 + col * t.stride1;
  }
  template <class E>
  __device__ __forceinline__ const typename E::Storage* start(const Tensor& t) const {
    return static_cast<const typename E::Storage*>(t.data) + of(t);
  }
};

// Slot k of a lane holds the kWidth columns from (k * kWarp + lane) * kWidth: a warp reads 512
// bytes side by side.
template <class E>
__device__ __forceinline__ int slot_column(int slot) {
  return (slot * kWarp + static_cast<int>(threadIdx.x % kWarp)) * kWidth<E>;
}

// 16 bytes at p, which lies kWords whole words and `bits` bits behind a multiple of 16 bytes.
template <int kWords, class E>
__device__ __forceinline__ void load_shifted(const void* p, uint32_t bits, Pack<E>& x) {
  const char* before = static_cast<const char*>(p) - kWords * 4 - bits / 8;
  Pack<E> low, high;
  low.load(before);
  high.load(before + 16);
  uint32_t words[8];
#pragma unroll
  for (int i = 0; i < 4; ++i) words[i] = low.words[i], words[4 + i] = high.words[i];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint64_t pair = static_cast<uint64_t>(words[kWords + i + 1]) << 32 | words[kWords + i];
    x.words[i] = static_cast<uint32_t>(pair >> bits);
  }
}

// A lane's slots of the tile at x, behind which `left` columns of the row are left, the tile's own
// among them; `beyond` where there are none. The same slots whatever the address of x.
template <class E, int kSlots>
__device__ __forceinline__ void load_tile(const typename E::Storage* x, int64_t left, float beyond,
                                          Pack<E> (&slots)[kSlots]) {
  constexpr int kColumns = tile_columns(kSlots, sizeof(typename E::Storage));
  const uint32_t off = misaligned(x);
  if (off == 0 && left >= kColumns) {
    // All loads in flight at once.
#pragma unroll
    for (int k = 0; k < kSlots; ++k) slots[k].load(x + slot_column<E>(k));
    return;
  }
  if (left >= kColumns + kWidth<E>) {
    // Not at a multiple of 16 bytes, but what follows is the row's own.
    const uint32_t bits = off % 4 * 8;
    const auto shifted = [&](auto words) {
#pragma unroll
      for (int k = 0; k < kSlots; ++k)
        load_shifted<words.value>(x + slot_column<E>(k), bits, slots[k]);
    };
    if (off < 8)
      off < 4 ? shifted(std::integral_constant<int, 0>{})
              : shifted(std::integral_constant<int, 1>{});
    else
      off < 12 ? shifted(std::integral_constant<int, 2>{})
               : shifted(std::integral_constant<int, 3>{});
    return;
  }
#pragma unroll
  for (int k = 0; k < kSlots; ++k) {
    const int column = slot_column<E>(k);
    if (off == 0 && column + kWidth<E> <= left) {
      slots[k].load(x + column);
    } else {
#pragma unroll
      for (int w = 0; w < kWidth<E>; ++w)
        slots[k].set(w, column + w < left ? x[column + w] : E::put(beyond));
    }
  }
}

// Calls f(k, w, inside) for the columns of a lane's slots: whether column w of slot k is among the
// `left` of the row. Options may make what lies beyond the row finite, so it must stay out by its
// position.
template <class E, int kCount, class F>
__device__ __forceinline__ void for_columns(int64_t left, const F& f) {
  const auto each = [&](auto whole) {
#pragma unroll
    for (int k = 0; k < kCount; ++k)
#pragma unroll
      for (int w = 0; w < kWidth<E>; ++w) f(k, w, whole.value || slot_column<E>(k) + w < left);
  };
  if (left >= tile_columns(kCount, sizeof(typename E::Storage)))
    each(std::true_type{});
  else
    each(std::false_type{});
}

// Overwrites a lane's slots with f(k, w) for column w of slot k, which may read that column.
template <class E, int kCount, class F>
__device__ __forceinline__ void overwrite(Pack<E> (&slots)[kCount], const F& f) {
#pragma unroll
  for (int k = 0; k < kCount; ++k) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float x[kPerWord<E>];
#pragma unroll
      for (int w = 0; w < kPerWord<E>; ++w) x[w] = f(k, i * kPerWord<E> + w);
      slots[k].words[i] = E::word(x);
    }
  }
}

// Slots of a window with kLoads 16-byte loads of E a lane, for gradients O.
template <class E, class O, int kLoads>
constexpr int kWindowSlots = kLoads * kWidth<E> / kWidth<O>;

// The columns of a tile of gradients. These need no sum, so tiles may begin where 16 bytes do: up
// to kWidth - 1 columns before the row's first.
//
// The gradient's elements O may be narrower than the logits' E: a slot is then 16 bytes of the
// gradient and kParts times 16 bytes of logits.
template <class E, int kSlots, class O = E>
struct Window {
  using S = typename E::Storage;
  using R = typename O::Storage;
  static constexpr int kParts = kWidth<O> / kWidth<E>;
  static constexpr int kColumns = tile_columns(kSlots, sizeof(R));
  // The tile's first column in the row, which may be negative; the tile's columns inside the row.
  int64_t first;
  int begin, end;
  // Whether the rows of all tensors lie alike, for 16 bytes of one to be 16 bytes of another.
  bool together;

  // Window `index` of rows that start at `out`, `x` and `y`.
  __device__ __forceinline__ Window(uint32_t index, int64_t vocab, const void* out, const void* x,
                                    const void* y) {
    const int before = static_cast<int>(misaligned(out) / sizeof(R));
    first = static_cast<int64_t>(index) * kColumns - before;
    begin = index == 0 ? before : 0;
    const int64_t left = vocab - first;
    end = left < kColumns ? static_cast<int>(left) : kColumns;
    together = alike(out, x) && alike(out, y);
  }
  // Applies change(slots of x, slots of y), which overwrites the slots of x, and stores those to
  // `out`. Slots that cannot be moved 16 bytes at a time go column by column.
  template <class Change>
  __device__ __forceinline__ void map(const S* x, const S* y, R* out, const Change& change) const {
    x += first, y += first, out += first;
    if (together && begin == 0 && end == kColumns) {
      Pack<E> own[kSlots * kParts], other[kSlots * kParts];
#pragma unroll
      for (int k = 0; k < kSlots; ++k) load(x + slot_column<O>(k), own + k * kParts);
#pragma unroll
      for (int k = 0; k < kSlots; ++k) load(y + slot_column<O>(k), other + k * kParts);
      change(own, other);
#pragma unroll
      for (int k = 0; k < kSlots; ++k) store(own + k * kParts, out + slot_column<O>(k));
      return;
    }
#pragma unroll 1
    for (int k = 0; k < kSlots; ++k) {
      const int column = slot_column<O>(k);
      const bool whole = together && column >= begin && column + kWidth<O> <= end;
      Pack<E> own[kParts] = {}, other[kParts] = {};
      if (whole) {
        load(x + column, own);
        load(y + column, other);
      } else {
        by_column(column, [&](int w) {
          own[w / kWidth<E>].set(w % kWidth<E>, x[column + w]);
          other[w / kWidth<E>].set(w % kWidth<E>, y[column + w]);
        });
      }
      change(own, other);
      if (whole)
        store(own, out + column);
      else
        by_column(column, [&](int w) { out[column + w] = result(own, w); });
    }
  }
  // Stores zeros to `out`.
  __device__ __forceinline__ void clear(R* out) const {
    out += first;
    const Pack<O> zero{};
#pragma unroll
    for (int k = 0; k < kSlots; ++k) {
      const int column = slot_column<O>(k);
      if (together && column >= begin && column + kWidth<O> <= end)
        zero.store(out + column);
      else
        by_column(column, [&](int w) { out[column + w] = R(0); });
    }
  }

 private:
  // Whether columns of x begin 16 bytes where those of `out` do.
  static __device__ __forceinline__ bool alike(const void* out, const void* x) {
    const uintptr_t a = reinterpret_cast<uintptr_t>(out), b = reinterpret_cast<uintptr_t>(x);
    if constexpr (kParts == 1)
      return ((a ^ b) & 15) == 0;
    else
      return ((b - (a & 15) * kParts) & 15) == 0;
  }
  // A slot's logits, and its gradients as O.
  static __device__ __forceinline__ void load(const S* x, Pack<E>* slot) {
#pragma unroll
    for (int i = 0; i < kParts; ++i) slot[i].load(x + i * kWidth<E>);
  }
  static __device__ __forceinline__ void store(const Pack<E>* slot, R* out) {
    if constexpr (kParts == 1) {
      slot[0].store(out);
    } else {
      Pack<O> narrow;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float both[2] = {slot[i / 2].get(i % 2 * 2), slot[i / 2].get(i % 2 * 2 + 1)};
        narrow.words[i] = O::word(both);
      }
      narrow.store(out);
    }
  }
  static __device__ __forceinline__ R result(const Pack<E>* slot, int w) {
    if constexpr (kParts == 1)
      return slot[0].item(w);
    else
      return O::put(slot[w / kWidth<E>].get(w % kWidth<E>));
  }
  // f(w) for the columns of a slot that are inside the row.
  template <class F>
  __device__ __forceinline__ void by_column(int column, const F& f) const {
#pragma unroll
    for (int w = 0; w < kWidth<O>; ++w)
      if (column + w >= begin && column + w < end) f(w);
  }
};

// The tiles of a row's windows: rows that start behind a multiple of 16 bytes need more.
template <class E, class O, int kLoads>
int64_t window_tiles(int64_t vocab) {
  constexpr int64_t kSize = sizeof(typename O::Storage);
  if (vocab == 0) return 0;
  return ceil_div(vocab + 16 / kSize - 1, tile_columns(kWindowSlots<E, O, kLoads>, kSize));
}

// The largest logit of a warp's tile, -inf if there is no number.
template <class E, int kSlots>
__device__ __forceinline__ float tile_max(const Pack<E> (&slots)[kSlots]) {
  float lowest[kPerWord<E>];
#pragma unroll
  for (int w = 0; w < kPerWord<E>; ++w) lowest[w] = -__builtin_inff();
  Pack<E> top;
  // Two chains, so that one does not wait for its own last result.
  top.words[0] = top.words[1] = E::word(lowest);
#pragma unroll
  for (int k = 0; k < kSlots; ++k)
#pragma unroll
    for (int i = 0; i < 4; ++i) top.words[i % 2] = E::larger(top.words[i % 2], slots[k].words[i]);
  top.words[0] = E::larger(top.words[0], top.words[1]);
  float m = top.get(0);
  if constexpr (kPerWord<E> == 2) m = fmaxf(m, top.get(1));
  return warp_reduce(m, Max{});
}

// The largest and the least of a lane's logits; NaN if one is.
struct Ends {
  float most, least;
};
template <class E, int kSlots>
__device__ __forceinline__ Ends lane_ends(const Pack<E> (&slots)[kSlots]) {
  Pack<E> most, least;
  most.words[0] = least.words[0] = slots[0].words[0];
#pragma unroll
  for (int k = 0; k < kSlots; ++k) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      most.words[0] = E::larger_nan(most.words[0], slots[k].words[i]);
      least.words[0] = E::smaller_nan(least.words[0], slots[k].words[i]);
    }
  }
  Ends x{most.get(0), least.get(0)};
  if constexpr (kPerWord<E> == 2)
    x = {max_nan(x.most, most.get(1)), -max_nan(-x.least, -least.get(1))};
  return x;
}

// Logits below may be taken for it where they weigh nothing: then their distance to the maximum is
// finite, and products of it with their weight are 0.
template <class E>
__device__ __forceinline__ constexpr float floor_of() {
  return E::kLeast > -1.0e30f ? E::kLeast : -1.0e30f;
}
// Whether that holds for all logits below the floor, in a row or tile with the maximum m.
template <class E>
__device__ __forceinline__ bool floor_weighs_nothing(float m, float rate2) {
  return fabsf(m) < 1.0e30f && (floor_of<E>() - m) * rate2 < -130.0f;
}
// A lane's logits, none below the floor.
template <class E, int kSlots>
__device__ __forceinline__ void raise_to(float floor, Pack<E> (&slots)[kSlots]) {
  float both[kPerWord<E>];
#pragma unroll
  for (int w = 0; w < kPerWord<E>; ++w) both[w] = floor;
  const uint32_t word = E::word(both);
#pragma unroll
  for (int k = 0; k < kSlots; ++k)
#pragma unroll
    for (int i = 0; i < 4; ++i) slots[k].words[i] = E::larger_nan(word, slots[k].words[i]);
}

}  // namespace
}  // namespace rk::cuda
