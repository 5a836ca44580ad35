// gae, discounted_returns, ppo_advantages: tiles of sequences scanned side by side.
//
// All that a step gets from behind is u = gamma V + gamma lam A, the next value and advantage. It
// hands on p u + q with p = gamma lam, q = gamma V + gamma lam (r - V) of its own; a done step
// cuts, one that "carry" skips is the identity, which leaves every bit of u. So a step needs
// nothing of its neighbours, and maps compose in any grouping. All in fp64: bits of the results
// hardly depend on that grouping, and a long chain loses nothing.
//
// Tiles are counted from the start of each sequence. Launches: scan alone where every row is one
// tile; else aggregate before it, which finds the map of each tile, and scan composes those behind
// its own. No block waits for another one. Rows of one short tile share a block.
#include "../advantages_math.h"
#include "../policy_math.h"
#include "slots.cuh"

namespace rk::cuda {
namespace {

// Steps of a thread; warps of a middle tile, whose square is those of a whole one. Short tests
// shall cross the emulator's tiles.
#ifdef RK_EMULATED
constexpr int kSteps = 2, kMiddle = 2;
#else
constexpr int kSteps = 8, kMiddle = 4;
#endif
constexpr int kWarps = kMiddle * kMiddle, kScanThreads = kWarps * kWarp;
constexpr int kChunk = kWarp * kSteps, kScanTile = kWarps * kChunk;

// u behind some steps -> u ahead of them: p u + q, q alone where p is kCut.
struct Map {
  double p, q;
};
constexpr double kCut = -1.0;

__device__ __forceinline__ double apply(const Map& map, double u) {
  return map.p < 0.0 ? map.q : ::fma(map.p, u, map.q);
}
__device__ __forceinline__ Map compose(const Map& ahead, const Map& behind) {
  const bool cut = ahead.p < 0.0 || behind.p < 0.0;
  return {cut ? kCut : ahead.p * behind.p, apply(ahead, behind.q)};
}
__device__ __forceinline__ Map identity() { return {1.0, -0.0}; }

// What `behind` lanes on this warp holds; the identity beyond the last one.
__device__ __forceinline__ Map lane_behind(const Map& map, int behind) {
  const Map found{__shfl_down_sync(0xffffffffu, map.p, behind),
                  __shfl_down_sync(0xffffffffu, map.q, behind)};
  return static_cast<int>(threadIdx.x) % kWarp + behind < kWarp ? found : identity();
}

// The map of the lanes behind this one; that of the whole warp goes to `totals`.
__device__ __forceinline__ Map scan_warp(Map map, Map* totals) {
#pragma unroll
  for (int behind = 1; behind < kWarp; behind *= 2) map = compose(map, lane_behind(map, behind));
  if (threadIdx.x % kWarp == 0) totals[threadIdx.x / kWarp] = map;
  return lane_behind(map, 1);
}

// Of all warps of a block.
__device__ __forceinline__ Map total_of(const Map* totals) {
  Map map = identity();
  for (int w = kWarps - 1; w >= 0; --w) map = compose(totals[w], map);
  return map;
}

// A tile: its map without and with the sequence's score, and whether a token of it is kept.
struct Aggregate {
  Map map;
  double scored, kept;
};

struct Larger {
  __device__ __forceinline__ int operator()(int a, int b) const { return a > b ? a : b; }
};

enum : uint8_t { kKept = 1, kExists = 2, kDone = 4 };

// The tokens of a block's tiles. Loaded side by side, then read by the thread that owns them; the
// padding keeps the banks of its neighbours apart.
struct Staged {
  float rewards[kScanTile + kScanTile / kWarp], values[kScanTile + kScanTile / kWarp];
  uint8_t flags[kScanTile];
  Map totals[kWarps];
  int last[kWarps];

  static __device__ __forceinline__ int at(int i) { return i + i / kWarp; }
};

// The tile of a group of kGroup warps, and what it has to do with it.
template <int kGroup>
struct Group {
  static constexpr int kThreads = kGroup * kWarp;
  TokenTile tile;
  // This group's first token in Staged, and this thread's number in the group.
  int base, own;

  __device__ __forceinline__ Group(const LossTokens& t, int64_t slots, int64_t first_slot) {
    const int group = threadIdx.x / kThreads;
    own = threadIdx.x % kThreads;
    base = group * kGroup * kChunk;
    const int64_t slot = first_slot + group;
    tile = slot_tile<kScanTile>(t, slot < slots ? slot : 0);
    if (slot >= slots) tile.count = 0;
  }

  // Of the tile's token number `own`.
  __device__ __forceinline__ int64_t offset(const Tensor& t) const {
    const int64_t first = tile.begin + tile.k * kScanTile + own;
    return tile.sequence * t.stride0 + first * t.stride1;
  }
  __device__ __forceinline__ bool has(int j) const { return j * kThreads + own < tile.count; }

  // Numbers of `t` where a bit of `wanted` is set, all loads in flight; else 0.
  __device__ __forceinline__ void load(const Tensor& t, unsigned wanted, float (&x)[kSteps]) const {
    switch (t.dtype) {
      case kFloat32: return load_as<F32>(t, wanted, x);
      case kBFloat16: return load_as<BF16>(t, wanted, x);
      default: return load_as<F16>(t, wanted, x);
    }
  }
  template <class E>
  __device__ __forceinline__ void load_as(const Tensor& t, unsigned wanted,
                                          float (&x)[kSteps]) const {
    const auto* p = static_cast<const typename E::Storage*>(t.data) + offset(t);
#pragma unroll
    for (int j = 0; j < kSteps; ++j)
      x[j] = wanted >> j & 1 ? E::get(p[j * kThreads * t.stride1]) : 0.0f;
  }
  // The bits of `wanted` under which `t` is not 0.
  __device__ __forceinline__ unsigned load_flags(const Tensor& t, unsigned wanted) const {
    const int64_t at = offset(t);
    unsigned found = 0;
#pragma unroll
    for (int j = 0; j < kSteps; ++j)
      if (wanted >> j & 1 && load_integer(t, at + j * kThreads * t.stride1) != 0) found |= 1u << j;
    return found;
  }

  // Loads the tile. Rewards are without the score, whose place, the last kept token, goes to
  // shared.last, warp by warp: -1 if there is none.
  __device__ __forceinline__ void stage(const GaeArgs& a, Staged& shared) const {
    unsigned inside = 0;
#pragma unroll
    for (int j = 0; j < kSteps; ++j) inside |= has(j) ? 1u << j : 0u;
    const unsigned kept = a.mask.given ? load_flags(a.mask, inside) : inside;
    const unsigned exists = a.carry ? kept : inside;
    const unsigned done = a.dones.given ? load_flags(a.dones, exists) : 0u;
    float rewards[kSteps] = {}, values[kSteps] = {};
    if (a.values.given) load(a.values, kept, values);
    if (!a.scores.given) {
      load(a.rewards, kept, rewards);
    } else if (a.ref_logprobs.given && a.kl_coef != 0.0) {
      float ref[kSteps];
      load(a.logprobs, kept, rewards);
      load(a.ref_logprobs, kept, ref);
#pragma unroll
      for (int j = 0; j < kSteps; ++j) {
        const float kl = kl_penalty_term(rewards[j] - ref[j], a.kl_estimator).value;
        rewards[j] = kept >> j & 1 ? static_cast<float>(-a.kl_coef * kl) : 0.0f;
      }
    }
    int last = -1;
#pragma unroll
    for (int j = 0; j < kSteps; ++j) {
      const int i = j * kThreads + own, at = Staged::at(base + i);
      shared.rewards[at] = rewards[j];
      shared.values[at] = values[j];
      shared.flags[base + i] =
          static_cast<uint8_t>((kept >> j & 1 ? kKept : 0) | (exists >> j & 1 ? kExists : 0) |
                               (done >> j & 1 ? kDone : 0));
      if (kept >> j & 1) last = i;
    }
    if (a.scores.given) {
      last = warp_reduce(last, Larger{});
      if (threadIdx.x % kWarp == 0) shared.last[threadIdx.x / kWarp] = last;
    }
  }

  // The group's last kept token, -1 if none; behind a barrier.
  __device__ __forceinline__ int last_kept(const Staged& shared) const {
    int last = -1;
    const int first = threadIdx.x / kThreads * kGroup;
    for (int w = first; w < first + kGroup; ++w) last = Larger{}(last, shared.last[w]);
    return last;
  }
};

__device__ __forceinline__ float score_of(const GaeArgs& a, int64_t sequence) {
  return clipped_score(load_float(a.scores, sequence * a.scores.stride1),
                       static_cast<float>(a.reward_clip));
}

// Of the step in Staged at `i`, with `score` added to its reward.
__device__ __forceinline__ Map step_at(const Staged& shared, int i, double gamma, double decay,
                                       float score) {
  const uint8_t flags = shared.flags[i];
  if (!(flags & kExists)) return identity();
  const float r = shared.rewards[Staged::at(i)] + score;
  const double v = shared.values[Staged::at(i)];
  return {flags & kDone ? kCut : decay, ::fma(decay, r - v, gamma * v)};
}

// Of this thread's steps; `score` belongs to the step in Staged at `scored`.
__device__ __forceinline__ Map own_steps(const Staged& shared, double gamma, double decay,
                                         int scored, float score) {
  const int first = threadIdx.x * kSteps;
  Map map = identity();
  for (int i = first + kSteps - 1; i >= first; --i)
    map = compose(step_at(shared, i, gamma, decay, i == scored ? score : 0.0f), map);
  return map;
}

__device__ __forceinline__ double decay_of(const GaeArgs& a) {
  return a.values.given ? a.gamma * a.lam : a.gamma;
}

// The maps of tiles that have others before them. Packed, a last block checks the offsets.
__global__ void __launch_bounds__(kScanThreads, 2)
    aggregate_kernel(const GaeArgs a, const LossTokens t, int64_t slots, Aggregate* aggregates,
                     int32_t* bad) {
  __shared__ Staged shared;
  if (blockIdx.x == slots) {
    const int wrong = warp_reduce(wrong_offsets<kScanThreads>(t) ? 1 : 0, Larger{});
    if (threadIdx.x % kWarp == 0) shared.last[threadIdx.x / kWarp] = wrong;
    __syncthreads();
    int any = 0;
    for (int w = 0; w < kWarps; ++w) any |= shared.last[w];
    if (threadIdx.x == 0) *bad = any;
    return;
  }
  const Group<kWarps> group(t, slots, blockIdx.x);
  if (group.tile.k <= 0 || group.tile.count == 0) return;
  group.stage(a, shared);
  __syncthreads();
  const double decay = decay_of(a);
  scan_warp(own_steps(shared, a.gamma, decay, -1, 0.0f), shared.totals);
  __syncthreads();
  Aggregate out{total_of(shared.totals), 0.0, 0.0};
  if (a.scores.given) {
    // Whether a token of a later tile is kept is not known yet: then the score is not here.
    const int last = group.last_kept(shared);
    const float score = last >= 0 ? score_of(a, group.tile.sequence) : 0.0f;
    __syncthreads();
    scan_warp(own_steps(shared, a.gamma, decay, last, score), shared.totals);
    __syncthreads();
    out.scored = total_of(shared.totals).q;
    out.kept = last >= 0 ? 1.0 : 0.0;
  }
  if (threadIdx.x == 0) aggregates[blockIdx.x] = out;
}

// What is behind a tile: u, and whether a token of its sequence is kept there.
struct Behind {
  double u;
  bool kept;
};

// Composes the `count` tiles from `aggregates`, as many at a time as the block has threads, counted
// from the nearest one: masked tiles at the end then change no bit.
__device__ __forceinline__ Behind look_behind(const Aggregate* aggregates, int64_t count,
                                              bool scored, double u, Staged& shared) {
  Behind behind{u, false};
  for (int64_t group = (count - 1) / kScanThreads; group >= 0; --group) {
    const int64_t i = group * kScanThreads + threadIdx.x;
    Aggregate own{identity(), -0.0, 0.0};
    if (i < count) own = aggregates[i];
    if (scored) {
      // The score belongs to the last tile with a kept token.
      const int last = warp_reduce(own.kept != 0.0 ? static_cast<int>(threadIdx.x) : -1, Larger{});
      if (threadIdx.x % kWarp == 0) shared.last[threadIdx.x / kWarp] = last;
      __syncthreads();
      int farthest = -1;
      for (int w = 0; w < kWarps; ++w) farthest = Larger{}(farthest, shared.last[w]);
      if (!behind.kept && static_cast<int>(threadIdx.x) == farthest) own.map.q = own.scored;
      behind.kept |= farthest >= 0;
    }
    scan_warp(own.map, shared.totals);
    __syncthreads();
    for (int w = kWarps - 1; w >= 0; --w) behind.u = apply(shared.totals[w], behind.u);
    __syncthreads();
  }
  return behind;
}

// Results of kWarps / kGroup tiles.
template <int kGroup>
__global__ void __launch_bounds__(kScanThreads, 2)
    scan_kernel(const GaeArgs a, const LossTokens t, int64_t slots, const Aggregate* aggregates,
                const int32_t* bad) {
  __shared__ Staged shared;
  constexpr int kThreads = Group<kGroup>::kThreads;
  const int64_t first_slot = static_cast<int64_t>(blockIdx.x) * (kWarps / kGroup);
  if (bad && *bad) {
    // Sequences mean nothing: NaN for all tokens, in plain tiles.
    const int64_t first = first_slot * kScanTile;
    for (int64_t i = first + threadIdx.x; i < first + kScanTile && i < a.cols; i += kScanThreads) {
      const float nan = __uint_as_float(0x7fc00000u);
      if (a.values.given) a.advantages[i] = nan;
      a.returns[i] = nan;
      if (a.scores.given) a.shaped[i] = nan;
    }
    return;
  }
  const Group<kGroup> group(t, slots, first_slot);
  const TokenTile& tile = group.tile;
  // Rows of one tile are scanned in any case: their blocks' barriers are for several.
  if (kGroup == kWarps && tile.count == 0) return;
  double u = 0.0;
  if (a.bootstrap.given && tile.count > 0)
    u = a.gamma * load_float(a.bootstrap, tile.sequence * a.bootstrap.stride1);
  bool scored = a.scores.given && tile.count > 0;
  // Before the tile is staged: that would have to wait for it.
  if (kGroup == kWarps && tile.k + 1 < tile.tiles) {
    const Behind behind =
        look_behind(aggregates + first_slot + 1, tile.tiles - 1 - tile.k, scored, u, shared);
    u = behind.u;
    scored &= !behind.kept;
  }
  group.stage(a, shared);
  __syncthreads();
  int last = -1;
  float score = 0.0f;
  if (scored && (last = group.last_kept(shared)) >= 0) {
    last += group.base;
    score = score_of(a, tile.sequence);
  }
  const int64_t place =
      (t.offsets.given ? 0 : tile.sequence * a.cols) + tile.begin + tile.k * kScanTile + group.own;
  if (a.scores.given) {
#pragma unroll
    for (int j = 0; j < kSteps; ++j) {
      const int i = group.base + j * kThreads + group.own;
      if (group.has(j))
        a.shaped[place + j * kThreads] = shared.rewards[Staged::at(i)] + (i == last ? score : 0.0f);
    }
  }
  const double decay = decay_of(a);
  const Map near = scan_warp(own_steps(shared, a.gamma, decay, last, score), shared.totals);
  __syncthreads();
  const int warp = threadIdx.x / kWarp;
  for (int w = warp / kGroup * kGroup + kGroup - 1; w > warp; --w) u = apply(shared.totals[w], u);
  u = apply(near, u);
  // The results take the places of rewards and values, which are this thread's alone.
  const int first = threadIdx.x * kSteps;
  for (int i = first + kSteps - 1; i >= first; --i) {
    const Map step = step_at(shared, i, a.gamma, decay, i == last ? score : 0.0f);
    float& r = shared.rewards[Staged::at(i)];
    float& v = shared.values[Staged::at(i)];
    const double reward = r + (i == last ? score : 0.0f), value = v;
    const double advantage = reward - value + (step.p < 0.0 ? 0.0 : u);
    const bool kept = shared.flags[i] & kKept;
    r = kept ? static_cast<float>(advantage) : 0.0f;
    v = kept ? static_cast<float>(advantage + value) : 0.0f;
    u = apply(step, u);
  }
  __syncthreads();
#pragma unroll
  for (int j = 0; j < kSteps; ++j) {
    const int i = Staged::at(group.base + j * kThreads + group.own);
    if (!group.has(j)) continue;
    if (a.values.given) a.advantages[place + j * kThreads] = shared.rewards[i];
    a.returns[place + j * kThreads] = shared.values[i];
  }
}

int64_t scan_slots(int64_t sequences, int64_t cols, bool packed) {
  return token_slots<kScanTile>(sequences, cols, packed);
}
// In front of the aggregates: whether the offsets are bad.
constexpr int64_t kHeader = 16;

}  // namespace

int64_t gae_scratch(int64_t sequences, int64_t cols, bool packed) {
  if (!packed && cols <= kScanTile) return 0;
  return kHeader + scan_slots(sequences, cols, packed) * sizeof(Aggregate);
}

Status gae(const GaeArgs& a) {
  const OnDevice guard(a.exec);
  const bool packed = a.offsets.given;
  const LossTokens t{a.sequences, a.cols, a.offsets, a.mask};
  const int64_t slots = scan_slots(a.sequences, a.cols, packed);
  auto* scratch = static_cast<char*>(a.exec.scratch);
  auto* bad = packed ? reinterpret_cast<int32_t*>(scratch) : nullptr;
  auto* aggregates = scratch ? reinterpret_cast<Aggregate*>(scratch + kHeader) : nullptr;
  if (aggregates)
    RK_ENQUEUE(a.exec, slots + packed, kScanThreads, aggregate_kernel, a, t, slots, aggregates,
               bad);
  const auto scan = [&](auto group) {
    RK_ENQUEUE(a.exec, ceil_div(slots, kWarps / group.value), kScanThreads,
               scan_kernel<group.value>, a, t, slots, aggregates, bad);
  };
  if (!packed && a.cols <= kChunk)
    scan(std::integral_constant<int, 1>{});
  else if (!packed && a.cols <= kMiddle * kChunk)
    scan(std::integral_constant<int, kMiddle>{});
  else
    scan(std::integral_constant<int, kWarps>{});
  if (!a.whiten) return {};
  return whiten({a.rows,
                 a.cols,
                 {a.advantages, kFloat32, a.cols, 1, true},
                 a.mask,
                 true,
                 true,
                 a.whiten_eps,
                 a.moments,
                 a.advantages,
                 a.exec});
}

}  // namespace rk::cuda
