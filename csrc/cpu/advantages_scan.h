// Reverse scans: GAE, discounted returns, PPO's shaped rewards.
//
// A sequence is processed from its end in windows of tokens that fit the L1 cache. The steps of the
// recurrence are the kept tokens with "carry" and all tokens with "zero". They are grouped into
// vectors that are counted from the sequence's end or from a `done`. So the arithmetic of a step
// does not depend on the place of its sequence, on padding or packing, or on masked tokens between.
#pragma once

namespace rk {
namespace {
namespace scan {

constexpr int64_t kBlockTokens = 128;
// Tokens that a thread takes at a time.
constexpr int64_t kItemTokens = 16384;

// x where keep is 1, else other; branchless like keep_or_zero in vec.h, for doubles.
inline double keep_or(uint8_t keep, double x, double other) {
  uint64_t a, b;
  memcpy(&a, &x, 8);
  memcpy(&b, &other, 8);
  const uint64_t m = -static_cast<uint64_t>(keep);
  a = (a & m) | (b & ~m);
  memcpy(&x, &a, 8);
  return x;
}

template <class E>
inline void copy_tokens(const Tensor& x, int64_t at, int64_t n, float* out) {
  const auto* p = static_cast<const typename E::Storage*>(x.data) + at;
  int64_t k = 0;
  if (x.stride1 == 1)
    for (; k + kLanes <= n; k += kLanes) store(out + k, E::load(p + k));
  for (; k < n; ++k) out[k] = E::get(p + k * x.stride1);
}

inline void copy_tokens(const Tensor& x, int64_t at, int64_t n, float* out) {
  switch (x.dtype) {
    case kBFloat16: return copy_tokens<BF16>(x, at, n, out);
    case kFloat16: return copy_tokens<F16>(x, at, n, out);
    default: return copy_tokens<F32>(x, at, n, out);
  }
}

// Tokens [t, t + n) of row i as fp32: a pointer to them if contiguous fp32, else a copy in buffer.
inline const float* load_tokens(const Tensor& x, int64_t i, int64_t t, int64_t n, float* buffer) {
  const int64_t at = i * x.stride0 + t * x.stride1;
  if (x.dtype == kFloat32 && x.stride1 == 1) return static_cast<const float*>(x.data) + at;
  copy_tokens(x, at, n, buffer);
  return buffer;
}

template <class T>
inline void copy_flags(const void* data, int64_t at, int64_t stride, int64_t n, uint8_t* out) {
  const T* p = static_cast<const T*>(data) + at;
  if (stride == 1) {
    for (int64_t k = 0; k < n; ++k) out[k] = p[k] != 0;
  } else {
    for (int64_t k = 0; k < n; ++k) out[k] = p[k * stride] != 0;
  }
}

// Tokens [t, t + n) of row i as 0 or 1; all are `missing` without a tensor. Returns the number of
// ones.
inline int64_t load_flags(const Tensor& x, int64_t i, int64_t t, int64_t n, uint8_t missing,
                          uint8_t* out) {
  if (!x.given) {
    memset(out, missing, static_cast<size_t>(n));
    return missing * n;
  }
  const int64_t at = i * x.stride0 + t * x.stride1;
  switch (x.dtype) {
    case kInt64: copy_flags<int64_t>(x.data, at, x.stride1, n, out); break;
    case kInt32: copy_flags<int32_t>(x.data, at, x.stride1, n, out); break;
    default: copy_flags<uint8_t>(x.data, at, x.stride1, n, out); break;
  }
  int32_t count = 0;
  for (int64_t k = 0; k < n; ++k) count += out[k];
  return count;
}

template <int32_t kEstimator>
inline void kl_rewards(const float* p, const float* q, int64_t n, double coef, float* out) {
  for (int64_t k = 0; k < n; ++k)
    out[k] = static_cast<float>(-coef * kl_estimate(p[k] - q[k], kEstimator));
}

// The state of the walk through one sequence, from its end to its start.
struct Walk {
  int64_t sequence, row, start;
  // Tokens not yet reached; they precede the last window.
  int64_t left;
  // The step after the pending ones. Pending steps have their results, but do not fill a vector.
  Next next;
  int64_t pending;
  float pending_rewards[kDoubles], pending_values[kDoubles];
  bool scored;
};

// A window of n tokens from `begin`, counted from the sequence's start, and its steps.
struct Window {
  int64_t begin, n, kept, steps;
  uint8_t keep[kBlockTokens], done[kBlockTokens];
  // One vector longer, because compress and expand access whole vectors.
  float rewards[kBlockTokens + kLanes], values[kBlockTokens + kLanes], other[kBlockTokens];
  float advantages[kBlockTokens + kLanes], returns[kBlockTokens + kLanes];

  bool skips() const { return steps < n; }
  // Whether some steps are masked tokens (only with "zero").
  bool zeros() const { return kept < steps; }
};

inline float sequence_scalar(const Tensor& x, int64_t s) {
  return load_scalar(x.data, x.dtype, s * x.stride1);
}

inline void begin_walk(const GaeArgs& a, int64_t sequence, Walk& w) {
  w.sequence = sequence;
  w.row = a.offsets.given ? 0 : sequence;
  w.start = a.offsets.given ? load_label(a.offsets, 0, sequence) : 0;
  w.left = a.offsets.given ? load_label(a.offsets, 0, sequence + 1) - w.start : a.cols;
  w.pending = 0;
  w.scored = !a.scores.given;
  const float bootstrap = a.bootstrap.given ? sequence_scalar(a.bootstrap, sequence) : 0.0f;
  w.next = a.values.given ? Next{0.0, bootstrap} : Next{bootstrap, 0.0f};
}

// Moves to the preceding window, which together with the pending steps fills a block.
inline void next_window(const GaeArgs& a, Walk& w, Window& x) {
  const int64_t most = kBlockTokens - w.pending;
  x.n = w.left < most ? w.left : most;
  w.left -= x.n;
  x.begin = w.left;
  x.kept = load_flags(a.mask, w.row, w.start + x.begin, x.n, 1, x.keep);
  x.steps = a.carry ? x.kept : x.n;
}

inline void zero_results(const GaeArgs& a, const Walk& w, const Window& x) {
  const int64_t at = w.row * a.cols + w.start + x.begin;
  const size_t bytes = sizeof(float) * static_cast<size_t>(x.n);
  if (a.values.given) memset(a.advantages + at, 0, bytes);
  memset(a.returns + at, 0, bytes);
  if (a.scores.given) memset(a.shaped + at, 0, bytes);
}

// Skips masked tokens at the end, so that the first window ends at the last kept token. With "zero"
// these tokens are steps; they are skipped only if nothing follows them, as they are then all zero
// and must not shift the grouping into vectors.
inline void skip_masked_end(const GaeArgs& a, Walk& w, Window& x) {
  const bool nothing_behind = w.next.advantage == 0.0 && w.next.value == 0.0f;
  if (!a.mask.given || !(a.carry || nothing_behind)) return;
  while (w.left > 0) {
    next_window(a, w, x);
    if (x.kept > 0) {
      int64_t last = x.n;
      while (!x.keep[last - 1]) --last;
      w.left += last;
      x.begin += last;
      x.n -= last;
    }
    zero_results(a, w, x);
    if (x.kept > 0) return;
  }
}

inline int64_t compress_tokens(const float* from, const uint8_t* keep, int64_t n, float* to) {
  int64_t k = 0, count = 0;
  for (; k + kLanes <= n; k += kLanes) count += compress(to + count, load(from + k), keep + k);
  for (; k < n; ++k) {
    to[count] = from[k];
    count += keep[k];
  }
  return count;
}

inline void expand_tokens(const float* from, const uint8_t* keep, int64_t n, float* to) {
  int64_t k = 0, count = 0;
  for (; k + kLanes <= n; k += kLanes) count += expand(from + count, keep + k, to + k);
  for (; k < n; ++k) {
    to[k] = keep_or_zero(keep[k], from[count]);
    count += keep[k];
  }
}

inline void zero_masked(const float* from, const uint8_t* keep, int64_t n, float* to) {
  for (int64_t k = 0; k < n; ++k) to[k] = keep_or_zero(keep[k], from[k]);
}

// A window's steps followed by the pending ones: in place if possible, else in the buffer.
inline const float* to_steps(const Walk& w, const Window& x, const float* tokens,
                             const float* pending, float* buffer) {
  if (x.skips()) {
    compress_tokens(tokens, x.keep, x.n, buffer);
  } else if (x.zeros()) {
    zero_masked(tokens, x.keep, x.n, buffer);
  } else if (w.pending == 0) {
    return tokens;
  } else if (tokens != buffer) {
    memcpy(buffer, tokens, sizeof(float) * static_cast<size_t>(x.n));
  }
  memcpy(buffer + x.steps, pending, sizeof(float) * static_cast<size_t>(w.pending));
  return buffer;
}

// Writes the results of a window's steps to its tokens.
inline void write_tokens(const Window& x, const float* steps, float* out) {
  if (x.skips())
    expand_tokens(steps, x.keep, x.n, out);
  else
    zero_masked(steps, x.keep, x.n, out);
}

// -kl_coef * KL per token, plus the sequence's score at its last kept token.
inline const float* shaped_rewards(const GaeArgs& a, Walk& w, Window& x) {
  if (a.ref_logprobs.given && a.kl_coef != 0.0) {
    const float* p = load_tokens(a.logprobs, w.row, w.start + x.begin, x.n, x.rewards);
    const float* q = load_tokens(a.ref_logprobs, w.row, w.start + x.begin, x.n, x.other);
    switch (a.kl_estimator) {
      case kK2: kl_rewards<kK2>(p, q, x.n, a.kl_coef, x.rewards); break;
      case kK3: kl_rewards<kK3>(p, q, x.n, a.kl_coef, x.rewards); break;
      case kAbs: kl_rewards<kAbs>(p, q, x.n, a.kl_coef, x.rewards); break;
      default: kl_rewards<kK1>(p, q, x.n, a.kl_coef, x.rewards); break;
    }
  } else {
    memset(x.rewards, 0, sizeof x.rewards);
  }
  if (!w.scored) {
    int64_t last = x.n - 1;
    while (!x.keep[last]) --last;
    x.rewards[last] +=
        clipped_score(sequence_scalar(a.scores, w.sequence), static_cast<float>(a.reward_clip));
    w.scored = true;
  }
  return x.rewards;
}

// Loads the `done` flag of each step. Returns the number of set flags.
inline int64_t load_dones(const GaeArgs& a, const Walk& w, Window& x) {
  int64_t count = load_flags(a.dones, w.row, w.start + x.begin, x.n, 0, x.done);
  if (count == 0 || !x.skips()) return count;
  int64_t steps = 0;
  count = 0;
  for (int64_t k = 0; k < x.n; ++k) {
    const uint8_t kept_done = x.done[k] & x.keep[k];
    count += kept_done;
    x.done[steps] = kept_done;
    steps += x.keep[k];
  }
  return count;
}

// The recurrence over a window's steps. It restarts at each done step, if there is one:
// recur(begin, n) computes the results of n steps, restart(k) sets what is behind step k. The steps
// that fill no vector are pending.
template <bool kValues, class Recur, class Restart>
inline void recur_episodes(Walk& w, const Window& x, bool any_done, const float* r, const float* v,
                           const Recur& recur, const Restart& restart) {
  int64_t end = x.steps + w.pending;
  if (any_done) {
    for (int64_t k = x.steps - 1; k >= 0; --k) {
      if (!x.done[k]) continue;
      const int64_t begin = k + 1;
      // Otherwise only pending steps remain, which have their results.
      if (begin < x.steps) recur(begin, end - begin);
      restart(k);
      end = begin;
    }
  }
  recur(0, end);
  w.pending = end % kDoubles;
  const size_t bytes = sizeof(float) * static_cast<size_t>(w.pending);
  memcpy(w.pending_rewards, r, bytes);
  if (kValues) memcpy(w.pending_values, v, bytes);
}

// Walks from `w` to the start of the sequence. window(rewards, values, advantages, returns)
// computes the results of the steps of window x; without kValues there are only returns.
template <bool kValues, class F>
inline void walk_windows(const GaeArgs& a, Walk& w, Window& x, const F& window) {
  while (w.left > 0) {
    next_window(a, w, x);
    if (x.steps == 0) {
      zero_results(a, w, x);
      continue;
    }
    const int64_t t = w.start + x.begin, at = w.row * a.cols + t;
    const float* rewards;
    if (a.scores.given) {
      // Without a kept token the score stays for an earlier window; all rewards are 0 then.
      rewards = x.kept > 0 ? shaped_rewards(a, w, x) : x.rewards;
      zero_masked(rewards, x.keep, x.n, a.shaped + at);
    } else {
      rewards = load_tokens(a.rewards, w.row, t, x.n, x.rewards);
    }
    const bool in_place = x.kept == x.n && w.pending == 0;
    const float* r = to_steps(w, x, rewards, w.pending_rewards, x.rewards);
    const float* v = nullptr;
    if (kValues)
      v = to_steps(w, x, load_tokens(a.values, w.row, t, x.n, x.values), w.pending_values,
                   x.values);
    float* advantages = in_place && kValues ? a.advantages + at : x.advantages;
    float* returns = in_place ? a.returns + at : x.returns;
    window(r, v, advantages, returns);
    if (in_place) continue;
    if (kValues) write_tokens(x, advantages, a.advantages + at);
    write_tokens(x, returns, a.returns + at);
  }
}

template <bool kValues>
inline void walk_sequence(const GaeArgs& a, const Factors& f, int64_t sequence, Walk& w,
                          Window& x) {
  begin_walk(a, sequence, w);
  skip_masked_end(a, w, x);
  walk_windows<kValues>(
      a, w, x, [&](const float* r, const float* v, float* advantages, float* returns) {
        const bool any_done = a.dones.given && load_dones(a, w, x) > 0;
        recur_episodes<kValues>(
            w, x, any_done, r, v,
            [&](int64_t begin, int64_t n) {
              recur<kValues>(f, r + begin, kValues ? v + begin : nullptr, n, w.next,
                             kValues ? advantages + begin : nullptr, returns + begin);
            },
            [&](int64_t) { w.next = {0.0, 0.0f}; });
      });
}

// The first sequence that begins at token `at` or later.
inline int64_t sequence_from(const GaeArgs& a, int64_t at) {
  int64_t low = 0, high = a.sequences;
  while (low < high) {
    const int64_t middle = low + (high - low) / 2;
    if (load_label(a.offsets, 0, middle) < at)
      low = middle + 1;
    else
      high = middle;
  }
  return low;
}

// Calls body(begin, end) on a team of threads, for ranges that make up all sequences.
template <class F>
void for_sequences(const GaeArgs& a, const F& body) {
  const int64_t rows = kItemTokens / a.cols + 1;
  const int64_t items =
      a.offsets.given ? (a.cols + kItemTokens - 1) / kItemTokens : (a.rows + rows - 1) / rows;
  parallel_for(items, a.exec.threads, [&](int64_t i) {
    // Last item first, as within a sequence, so that memory is read in one direction.
    const int64_t item = items - 1 - i;
    int64_t begin = item * rows, end = begin + rows < a.rows ? begin + rows : a.rows;
    if (a.offsets.given) {
      begin = sequence_from(a, item * kItemTokens);
      end = sequence_from(a, (item + 1) * kItemTokens);
    }
    body(begin, end);
  });
}

template <bool kValues>
void run(const GaeArgs& a) {
  const Factors factors(a.gamma, kValues ? a.gamma * a.lam : a.gamma);
  for_sequences(a, [&](int64_t begin, int64_t end) {
    Walk w;
    Window window;
    for (int64_t s = end - 1; s >= begin; --s) walk_sequence<kValues>(a, factors, s, w, window);
  });
}

}  // namespace scan
}  // namespace
}  // namespace rk
