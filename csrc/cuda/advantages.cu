// gae, discounted_returns, ppo_advantages: tiles of sequences scanned side by side.
//
// A step receives u = gamma V + gamma lam A, of the next value and advantage, from the step behind
// it. It passes on p u + q, with p = gamma lam and q = gamma V + gamma lam (r - V) of its own. A
// done step cuts; a step that "carry" skips is the identity, which keeps every bit of u. So a step
// needs nothing else of its neighbours, and the maps compose in any grouping. Everything is fp64:
// bits of the results hardly depend on the grouping, and a long chain loses nothing.
//
// Tiles are counted from the start of each sequence. Where every row is one tile, `scan` is the
// only launch. Otherwise `aggregate` runs first and finds the map of each tile; `scan` composes the
// maps behind its own tile. No block waits for another. Rows of one short tile share a block.
#include "advantages.cuh"

namespace rk::cuda {
namespace {

// Warps of a middle tile and of a whole one.
#ifdef RK_EMULATED
constexpr int kMiddle = 1, kWarps = 2;
#else
constexpr int kMiddle = 4, kWarps = 16;
#endif
constexpr int kScanThreads = kWarps * kWarp, kScanTile = kWarps * kChunk;

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

// What the lane `behind` places further on holds; the identity beyond the last lane.
__device__ __forceinline__ Map lane_behind(const Map& map, int behind) {
  const Map found{__shfl_down_sync(0xffffffffu, map.p, behind),
                  __shfl_down_sync(0xffffffffu, map.q, behind)};
  return static_cast<int>(threadIdx.x) % kWarp + behind < kWarp ? found : identity();
}

// The map of the lanes behind this one; the whole warp's map goes to `totals`.
__device__ __forceinline__ Map scan_warp(Map map, Map* totals) {
#pragma unroll
  for (int behind = 1; behind < kWarp; behind *= 2) map = compose(map, lane_behind(map, behind));
  if (threadIdx.x % kWarp == 0) totals[threadIdx.x / kWarp] = map;
  return lane_behind(map, 1);
}

// The same over all warps of a block.
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

// What the warps of a block tell one another: each one's map, and a position in its tile.
struct Shared {
  Map totals[kWarps];
  int last[kWarps];
};

// The tile of a group of kGroup warps, and this thread's steps of it.
template <int kGroup>
struct Group {
  static constexpr int kThreads = kGroup * kWarp;
  TokenTile tile;
  // This thread's first step in the tile.
  int own;

  __device__ __forceinline__ Group(const LossTokens& t, int64_t slots, int64_t first_slot)
      : own(static_cast<int>(threadIdx.x) % kThreads * kSteps) {
    const int64_t slot = first_slot + threadIdx.x / kThreads;
    tile = slot_tile<kScanTile>(t, slot < slots ? slot : 0);
    if (slot >= slots) tile.count = 0;
  }
  // The last position that the group put into shared.last; call it after a barrier.
  __device__ __forceinline__ int last(const Shared& shared) const {
    int found = -1;
    const int first = threadIdx.x / kThreads * kGroup;
    for (int w = first; w < first + kGroup; ++w) found = Larger{}(found, shared.last[w]);
    return found;
  }
};

// A thread's steps and the maps that they make.
struct Steps : OwnSteps {
  // Bit j: step j is the last of its episode.
  unsigned done;

  __device__ __forceinline__ Steps(const GaeArgs& a, const TokenTile& tile, int own)
      : OwnSteps(a, tile, tile.begin + tile.k * kScanTile, own) {
    done = a.dones.given ? flags(a.dones, exists) : 0u;
    load_rewards(a, a.values.given);
  }
  // Whether every step is there, counts, and hands on what is behind it.
  __device__ __forceinline__ bool plain() const { return kept == kAll && done == 0; }
  // The map of step j alone.
  __device__ __forceinline__ double offers(int j, double gamma, double decay) const {
    return ::fma(decay, surplus(j), gamma * values[j]);
  }
  __device__ __forceinline__ Map step(int j, double gamma, double decay) const {
    if (!(exists >> j & 1)) return identity();
    return {done >> j & 1 ? kCut : decay, offers(j, gamma, decay)};
  }
  // The map of all steps.
  __device__ __forceinline__ Map map(double gamma, double decay) const {
    Map all = identity();
    if (plain()) {
#pragma unroll
      for (int j = kSteps - 1; j >= 0; --j)
        all = {decay * all.p, ::fma(decay, all.q, offers(j, gamma, decay))};
    } else {
#pragma unroll
      for (int j = kSteps - 1; j >= 0; --j) all = compose(step(j, gamma, decay), all);
    }
    return all;
  }
  // Advantages and returns from u behind the last step, in the places of rewards and values.
  __device__ __forceinline__ void finish(double u, double gamma, double decay) {
    if (plain()) {
#pragma unroll
      for (int j = kSteps - 1; j >= 0; --j) {
        const double advantage = surplus(j) + u, value = values[j];
        u = ::fma(decay, u, offers(j, gamma, decay));
        rewards[j] = static_cast<float>(advantage);
        values[j] = static_cast<float>(advantage + value);
      }
    } else {
#pragma unroll
      for (int j = kSteps - 1; j >= 0; --j) {
        const Map own = step(j, gamma, decay);
        const double advantage = surplus(j) + (own.p < 0.0 ? 0.0 : u), value = values[j];
        u = apply(own, u);
        rewards[j] = kept >> j & 1 ? static_cast<float>(advantage) : 0.0f;
        values[j] = kept >> j & 1 ? static_cast<float>(advantage + value) : 0.0f;
      }
    }
  }
};

// Each warp's last unmasked step of the tile to shared.last, -1 if it has none.
__device__ __forceinline__ void find_last_kept(const Steps& steps, int own, Shared& shared) {
  const int step = steps.last_kept();
  const int last = warp_reduce(step >= 0 ? own + step : -1, Larger{});
  if (threadIdx.x % kWarp == 0) shared.last[threadIdx.x / kWarp] = last;
}

__device__ __forceinline__ double decay_of(const GaeArgs& a) {
  return a.values.given ? a.gamma * a.lam : a.gamma;
}

// The maps of tiles that have others before them. Packed, a last block checks the offsets.
__global__ void __launch_bounds__(kScanThreads, 2)
    aggregate_kernel(const GaeArgs a, const LossTokens t, int64_t slots, Aggregate* aggregates,
                     int32_t* bad) {
  __shared__ Shared shared;
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
  Steps steps(a, group.tile, group.own);
  const double decay = decay_of(a);
  scan_warp(steps.map(a.gamma, decay), shared.totals);
  if (a.scores.given) find_last_kept(steps, group.own, shared);
  __syncthreads();
  Aggregate out{total_of(shared.totals), 0.0, 0.0};
  if (a.scores.given) {
    // Whether a token of a later tile is kept is not known yet: then the score is not here.
    const int last = group.last(shared);
    if (last >= 0) steps.add_score(last - group.own, score_of(a, group.tile.sequence));
    __syncthreads();
    scan_warp(steps.map(a.gamma, decay), shared.totals);
    __syncthreads();
    out.scored = total_of(shared.totals).q;
    out.kept = last >= 0 ? 1.0 : 0.0;
  }
  if (threadIdx.x == 0) aggregates[blockIdx.x] = out;
}

// What lies behind a tile: u, and whether it holds an unmasked token of the sequence.
struct Behind {
  double u;
  bool kept;
};

// Composes the `count` tiles from `aggregates`, as many at a time as the block has threads, counted
// from the nearest one: masked tiles at the end then change no bit.
__device__ __forceinline__ Behind look_behind(const Aggregate* aggregates, int64_t count,
                                              bool scored, double u, Shared& shared) {
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
  __shared__ Shared shared;
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
  // Rows of one tile are always scanned: other rows share the barriers of their block.
  if (kGroup == kWarps && tile.count == 0) return;
  Steps steps(a, tile, group.own);
  double u = 0.0;
  if (a.bootstrap.given && tile.count > 0)
    u = a.gamma * load_float(a.bootstrap, tile.sequence * a.bootstrap.stride1);
  bool scored = a.scores.given && tile.count > 0;
  if (kGroup == kWarps && tile.k + 1 < tile.tiles) {
    const Behind behind =
        look_behind(aggregates + first_slot + 1, tile.tiles - 1 - tile.k, scored, u, shared);
    u = behind.u;
    scored &= !behind.kept;
  }
  if (a.scores.given) {
    find_last_kept(steps, group.own, shared);
    __syncthreads();
    const int last = scored ? group.last(shared) : -1;
    if (last >= 0) steps.add_score(last - group.own, score_of(a, tile.sequence));
  }
  const int64_t place = steps.place(t);
  if (a.scores.given) steps.store(a.shaped + place, steps.rewards);
  const double decay = decay_of(a);
  const Map near = scan_warp(steps.map(a.gamma, decay), shared.totals);
  __syncthreads();
  const int warp = threadIdx.x / kWarp;
  for (int w = warp / kGroup * kGroup + kGroup - 1; w > warp; --w) u = apply(shared.totals[w], u);
  steps.finish(apply(near, u), a.gamma, decay);
  if (a.values.given) steps.store(a.advantages + place, steps.rewards);
  steps.store(a.returns + place, steps.values);
}

int64_t scan_slots(int64_t sequences, int64_t cols, bool packed) {
  return token_slots<kScanTile>(sequences, cols, packed);
}
// The scratch of a scan: whether the offsets are bad, then the aggregates. Nothing where one block
// scans each whole sequence.
constexpr int64_t kHeader = 16;
int64_t scan_bytes(int64_t sequences, int64_t cols, bool packed) {
  if (!packed && cols <= kScanTile) return 0;
  return kHeader + scan_slots(sequences, cols, packed) * sizeof(Aggregate);
}

}  // namespace

int64_t gae_scratch(int64_t sequences, int64_t cols, bool packed, bool whiten) {
  const int64_t tokens = packed ? cols : sequences * cols;
  return scan_bytes(sequences, cols, packed) + (whiten ? whiten_scratch(tokens) : 0);
}

Status gae(const GaeArgs& a) {
  const OnDevice guard(a.exec);
  const bool packed = a.offsets.given;
  const LossTokens t{a.sequences, a.cols, a.offsets, a.mask};
  const int64_t slots = scan_slots(a.sequences, a.cols, packed);
  auto* scratch = static_cast<char*>(a.exec.scratch);
  const int64_t bytes = scan_bytes(a.sequences, a.cols, packed);
  auto* bad = packed ? reinterpret_cast<int32_t*>(scratch) : nullptr;
  auto* aggregates = bytes > 0 ? reinterpret_cast<Aggregate*>(scratch + kHeader) : nullptr;
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
  if (a.whiten) enqueue_whitening(whitening_args(a), scratch + bytes);
  return {};
}

}  // namespace rk::cuda
