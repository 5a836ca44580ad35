// GAE with rates per sequence or per step, truncated steps, and a factor of its own for the
// returns.
//
// One block walks a sequence from its end, tile by tile, and carries the state: value and advantage
// of the step behind. Some steps map it to a state that is affine in it. A thread composes its own
// steps, a warp its threads; the states behind the warps of a tile then follow one from another. A
// warp's steps are counted from the start of the sequence, so the number of warps changes no bit.
// Everything is fp64.
#include "advantages.cuh"

namespace rk::cuda {
namespace {

// The most warps of a block.
#ifdef RK_EMULATED
constexpr int kMostWarps = 2;
#else
constexpr int kMostWarps = 16;
#endif
constexpr int kThreads = kMostWarps * kWarp;

// What a step needs of the one behind it; `other` is the advantage of the chain of the returns.
struct State {
  double value, advantage, other;
};

// A -> per_advantage A + per_value V + rest.
struct Line {
  double per_value, per_advantage, rest;
};

// The map of some steps from the state behind them to the state ahead of them.
struct Map {
  double value;
  Line advantage, other;
  // kExists: it is not the identity. kEnds: nothing of the state behind passes.
  unsigned flags;
};
constexpr unsigned kExists = 1, kEnds = 2;

__device__ __forceinline__ Map identity() { return {0.0, {}, {}, 0}; }

__device__ __forceinline__ double apply(const Line& line, const State& behind, double advantage) {
  return ::fma(line.per_advantage, advantage, ::fma(line.per_value, behind.value, line.rest));
}
template <bool kDecoupled>
__device__ __forceinline__ State apply(const Map& map, const State& behind) {
  if (!(map.flags & kExists)) return behind;
  State state{map.value, map.advantage.rest, map.other.rest};
  if (!(map.flags & kEnds)) {
    state.advantage = apply(map.advantage, behind, behind.advantage);
    if (kDecoupled) state.other = apply(map.other, behind, behind.other);
  }
  return state;
}

__device__ __forceinline__ Line compose(const Line& ahead, double value, const Line& behind) {
  return {ahead.per_advantage * behind.per_value, ahead.per_advantage * behind.per_advantage,
          ::fma(ahead.per_advantage, behind.rest, ::fma(ahead.per_value, value, ahead.rest))};
}
template <bool kDecoupled>
__device__ __forceinline__ Map compose(const Map& ahead, const Map& behind) {
  if (!(ahead.flags & kExists)) return behind;
  if (!(behind.flags & kExists) || ahead.flags & kEnds) return ahead;
  Map map = ahead;
  map.flags |= behind.flags;
  map.advantage = compose(ahead.advantage, behind.value, behind.advantage);
  if (kDecoupled) map.other = compose(ahead.other, behind.value, behind.other);
  return map;
}

__device__ __forceinline__ double lane_behind(double x, int behind) {
  return __shfl_down_sync(0xffffffffu, x, behind);
}
__device__ __forceinline__ Line lane_behind(const Line& line, int behind) {
  return {lane_behind(line.per_value, behind), lane_behind(line.per_advantage, behind),
          lane_behind(line.rest, behind)};
}
// What the lane `behind` places further on holds; the identity beyond the last lane.
template <bool kDecoupled>
__device__ __forceinline__ Map lane_behind(const Map& map, int behind) {
  Map found = identity();
  found.value = lane_behind(map.value, behind);
  found.advantage = lane_behind(map.advantage, behind);
  if (kDecoupled) found.other = lane_behind(map.other, behind);
  found.flags = __shfl_down_sync(0xffffffffu, map.flags, behind);
  return static_cast<int>(threadIdx.x) % kWarp + behind < kWarp ? found : identity();
}

struct Shared {
  Map totals[kMostWarps];
  int last[kMostWarps];
};

// A rate that a sequence keeps, or one per step.
struct Rate {
  double number;
  bool per_step;

  __device__ __forceinline__ static double checked(float x) {
    return x >= 0.0f && x <= 1.0f ? static_cast<double>(x)
                                  : static_cast<double>(__uint_as_float(0x7fc00000u));
  }
  __device__ __forceinline__ Rate(const Tensor& rates, bool per_step_, double number_,
                                  int64_t sequence)
      : number(number_), per_step(rates.given && per_step_) {
    if (rates.given && !per_step) number = checked(load_float(rates, sequence * rates.stride1));
  }
  __device__ __forceinline__ double at(float own) const { return per_step ? checked(own) : number; }
};

// A thread's steps, with their own rates, and the maps that they make.
template <bool kDecoupled>
struct Steps : OwnSteps {
  // Bit j: nothing behind step j passes.
  unsigned ends;
  float after[kSteps], gammas[kSteps], lams[kSteps], value_lams[kSteps];

  __device__ __forceinline__ Steps(const GeneralGaeArgs& general, const TokenTile& tile,
                                   int64_t tile_begin, int own)
      : OwnSteps(general.gae, tile, tile_begin, own) {
    const GaeArgs& a = general.gae;
    ends = a.dones.given ? flags(a.dones, exists) : 0u;
    const unsigned cut = general.truncated.given ? flags(general.truncated, exists) & ~ends : 0u;
    ends |= cut;
#pragma unroll
    for (int j = 0; j < kSteps; ++j) after[j] = gammas[j] = lams[j] = value_lams[j] = 0.0f;
    load_rewards(a, true);
    if (cut & kept) load(cut & kept, Numbers{general.cut_values, after});
    if (general.gamma_per_step) load(exists, Numbers{general.gammas, gammas});
    if (general.lam_per_step) load(exists, Numbers{general.lams, lams});
    if (kDecoupled && general.value_lam_per_step)
      load(exists, Numbers{general.value_lams, value_lams});
  }
  // The map of step j alone.
  __device__ __forceinline__ Map step(int j, const Rate& gamma, const Rate& lam,
                                      const Rate& value_lam) const {
    Map map = identity();
    if (!(exists >> j & 1)) return map;
    const double rate = gamma.at(gammas[j]), own = surplus(j);
    map.value = values[j];
    if (ends >> j & 1) {
      map.flags = kExists | kEnds;
      map.advantage.rest = map.other.rest = ::fma(rate, static_cast<double>(after[j]), own);
    } else {
      map.flags = kExists;
      map.advantage = {rate, rate * lam.at(lams[j]), own};
      if (kDecoupled) map.other = {rate, rate * value_lam.at(value_lams[j]), own};
    }
    return map;
  }
  // The map of all steps.
  __device__ __forceinline__ Map map(const Rate& gamma, const Rate& lam,
                                     const Rate& value_lam) const {
    Map all = identity();
#pragma unroll
    for (int j = kSteps - 1; j >= 0; --j)
      all = compose<kDecoupled>(step(j, gamma, lam, value_lam), all);
    return all;
  }
  // Advantages and returns from the state behind the last step, in the places of rewards and
  // values.
  __device__ __forceinline__ void finish(State state, const Rate& gamma, const Rate& lam,
                                         const Rate& value_lam) {
#pragma unroll
    for (int j = kSteps - 1; j >= 0; --j) {
      state = apply<kDecoupled>(step(j, gamma, lam, value_lam), state);
      const double value = values[j], other = kDecoupled ? state.other : state.advantage;
      rewards[j] = kept >> j & 1 ? static_cast<float>(state.advantage) : 0.0f;
      values[j] = kept >> j & 1 ? static_cast<float>(other + value) : 0.0f;
    }
  }
};

// The last kept position of a tile, -1 if there is none; for all threads.
__device__ __forceinline__ int last_of_tile(int own, int warps, Shared& shared) {
  const int last = warp_reduce(own, Larger{});
  if (threadIdx.x % kWarp == 0) shared.last[threadIdx.x / kWarp] = last;
  __syncthreads();
  int found = -1;
  for (int w = 0; w < warps; ++w) found = Larger{}(found, shared.last[w]);
  return found;
}

// Whether the offsets are bad.
__global__ void __launch_bounds__(kWarp) offsets_kernel(const LossTokens t, int32_t* bad) {
  const int wrong = warp_reduce(wrong_offsets<kWarp>(t) ? 1 : 0, Larger{});
  if (threadIdx.x == 0) *bad = wrong;
}

template <bool kDecoupled>
__global__ void __launch_bounds__(kThreads, 1)
    general_kernel(const GeneralGaeArgs general, const LossTokens t, int warps,
                   const int32_t* bad) {
  __shared__ Shared shared;
  const GaeArgs& a = general.gae;
  const int threads = warps * kWarp, warp = threadIdx.x / kWarp;
  if (bad && *bad) {
    // Sequences mean nothing: NaN for all tokens.
    for (int64_t i = blockIdx.x * static_cast<int64_t>(threads) + threadIdx.x; i < a.cols;
         i += a.sequences * threads) {
      const float nan = __uint_as_float(0x7fc00000u);
      a.advantages[i] = a.returns[i] = nan;
      if (a.scores.given) a.shaped[i] = nan;
    }
    return;
  }
  TokenTile tile{};
  tile.sequence = blockIdx.x;
  tile.length = t.cols;
  if (t.offsets.given) {
    tile.begin = offset_at(t.offsets, tile.sequence, t.cols);
    tile.length = offset_at(t.offsets, tile.sequence + 1, t.cols) - tile.begin;
  }
  const Rate gamma(general.gammas, general.gamma_per_step, a.gamma, tile.sequence);
  const Rate lam(general.lams, general.lam_per_step, a.lam, tile.sequence);
  const Rate value_lam(general.value_lams, general.value_lam_per_step, general.value_lam,
                       tile.sequence);
  State state{0.0, 0.0, 0.0};
  if (a.bootstrap.given) state.value = load_float(a.bootstrap, tile.sequence * a.bootstrap.stride1);
  bool scored = a.scores.given;
  const int size = warps * kChunk, own = static_cast<int>(threadIdx.x) * kSteps;
  tile.tiles = (tile.length + size - 1) / size;
  for (tile.k = tile.tiles - 1; tile.k >= 0; --tile.k) {
    const int64_t left = tile.length - tile.k * size;
    tile.count = left < size ? static_cast<int>(left) : size;
    Steps<kDecoupled> steps(general, tile, tile.begin + tile.k * size, own);
    if (scored) {
      const int step = steps.last_kept();
      const int last = last_of_tile(step >= 0 ? own + step : -1, warps, shared);
      if (last >= 0) {
        steps.add_score(last - own, score_of(a, tile.sequence));
        scored = false;
      }
    }
    const int64_t place = steps.place(t);
    if (a.scores.given) steps.store(a.shaped + place, steps.rewards);
    Map map = steps.map(gamma, lam, value_lam);
#pragma unroll
    for (int behind = 1; behind < kWarp; behind *= 2)
      map = compose<kDecoupled>(map, lane_behind<kDecoupled>(map, behind));
    if (threadIdx.x % kWarp == 0) shared.totals[warp] = map;
    const Map near = lane_behind<kDecoupled>(map, 1);
    __syncthreads();
    State behind = state;
    for (int w = warps - 1; w >= 0; --w) {
      if (w == warp) behind = state;
      state = apply<kDecoupled>(shared.totals[w], state);
    }
    // The next tile writes to `shared`.
    __syncthreads();
    steps.finish(apply<kDecoupled>(near, behind), gamma, lam, value_lam);
    steps.store(a.advantages + place, steps.rewards);
    steps.store(a.returns + place, steps.values);
  }
}

// Warps of a block for sequences of about `length` tokens.
int warps_for(int64_t length) {
  int warps = 1;
  while (warps < kMostWarps && warps * kChunk < length) warps *= 2;
  return warps;
}

// What precedes the moments in the scratch: whether the offsets are bad.
constexpr int64_t kHeader = 16;

}  // namespace

int64_t general_gae_scratch(int64_t sequences, int64_t cols, bool packed, bool whiten) {
  return (packed ? kHeader : 0) + (whiten ? whiten_scratch(packed ? cols : sequences * cols) : 0);
}

Status general_gae(const GeneralGaeArgs& general) {
  const GaeArgs& a = general.gae;
  const OnDevice guard(a.exec);
  const bool packed = a.offsets.given;
  const LossTokens t{a.sequences, a.cols, a.offsets, a.mask};
  auto* scratch = static_cast<char*>(a.exec.scratch);
  auto* bad = packed ? reinterpret_cast<int32_t*>(scratch) : nullptr;
  if (packed) RK_ENQUEUE(a.exec, 1, kWarp, offsets_kernel, t, bad);
  const int warps = warps_for(packed ? ceil_div(a.cols, a.sequences) : a.cols);
  if (general.decoupled)
    RK_ENQUEUE(a.exec, a.sequences, warps * kWarp, general_kernel<true>, general, t, warps, bad);
  else
    RK_ENQUEUE(a.exec, a.sequences, warps * kWarp, general_kernel<false>, general, t, warps, bad);
  if (a.whiten) enqueue_whitening(whitening_args(a), scratch + (packed ? kHeader : 0));
  return {};
}

}  // namespace rk::cuda
