// Reverse scans: GAE, discounted returns, PPO's shaped rewards.
//
// A sequence is walked from its end in blocks that stay in the first-level cache: load and convert,
// differences r + gamma V' - V in vectors, the recurrence, results in vectors. The recurrence is a
// chain of one multiply-add per step whatever the sequence's length, so several sequences are
// walked together to hide its latency; each keeps its own order of operations, so its bits do not
// depend on the others. Differences and the recurrence are in double: a chain of 10^5 additions in
// fp32 is not accurate, and double costs the same.
#pragma once

namespace rk {
namespace {
namespace scan {

constexpr int64_t kBlockTokens = 128;
// Sequences walked together, and the work below which sequences are not handed out one by one.
constexpr int kTogether = 4;
constexpr int64_t kItemTokens = 16384;

inline double multiply_add(double a, double b, double c) {
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
  return __builtin_fma(a, b, c);
#else
  return a * b + c;
#endif
}

// Selections by 0 or 1 in the bits: compilers turn a conditional on floats into a branch, which
// masks mispredict, or leave the loop scalar.
inline double keep_or(uint8_t keep, double x, double other) {
  uint64_t a, b;
  memcpy(&a, &x, 8);
  memcpy(&b, &other, 8);
  const uint64_t m = -static_cast<uint64_t>(keep);
  a = (a & m) | (b & ~m);
  memcpy(&x, &a, 8);
  return x;
}
inline float keep_or_zero(uint8_t keep, float x) {
  uint32_t a;
  memcpy(&a, &x, 4);
  a &= -static_cast<uint32_t>(keep);
  memcpy(&x, &a, 4);
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

// Tokens [t, t + n) of row i as fp32: where they lie if they can be read there, else copied.
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

// Tokens [t, t + n) of row i as 0 or 1; `missing` where there is no tensor. Returns how many are 1.
inline int64_t load_flags(const Tensor& x, int64_t i, int64_t t, int64_t n, uint8_t missing,
                          uint8_t* out) {
  if (!x.data) {
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

// One sequence: where the walk stands, and the block in work.
struct Walk {
  int64_t row = 0, start = 0, left = 0, sequence = 0;
  // Of the step behind the block.
  float next_value = 0.0f;
  double advantage = 0.0;
  bool scored = true, plain = false;
  // The block's n tokens from t, of which `kept` are kept and `steps` (n or none) are walked.
  int64_t t = 0, n = 0, kept = 0, steps = 0;
  const float* rewards = nullptr;
  const float* values = nullptr;
  uint8_t keep[kBlockTokens], done[kBlockTokens];
  // One value more than the block has: the next step's.
  float rewards_buffer[kBlockTokens], values_buffer[kBlockTokens + 1], other[kBlockTokens];
  // A_t = delta_t + decay_t A_{t+1}; decay is filled with the constant while `plain`.
  double delta[kBlockTokens], decay[kBlockTokens];
};

inline float sequence_scalar(const Tensor& x, int64_t s) {
  return load_scalar(x.data, x.dtype, s * x.stride1);
}

inline void begin_walk(const GaeArgs& a, int64_t sequence, Walk& w) {
  w.sequence = sequence;
  if (a.offsets.data) {
    w.start = load_label(a.offsets, 0, sequence);
    w.left = load_label(a.offsets, 0, sequence + 1) - w.start;
  } else {
    w.row = sequence;
    w.left = a.cols;
  }
  const float bootstrap = a.bootstrap.data ? sequence_scalar(a.bootstrap, sequence) : 0.0f;
  if (a.values.data)
    w.next_value = bootstrap;
  else
    w.advantage = bootstrap;
  w.scored = !a.scores.data;
}

// -kl_coef * KL per token into the walk's buffer, plus the score at the last kept token.
inline const float* shaped_rewards(const GaeArgs& a, Walk& w) {
  if (a.ref_logprobs.data && a.kl_coef != 0.0) {
    const float* p = load_tokens(a.logprobs, w.row, w.t, w.n, w.rewards_buffer);
    const float* q = load_tokens(a.ref_logprobs, w.row, w.t, w.n, w.other);
    switch (a.kl_estimator) {
      case kK2: kl_rewards<kK2>(p, q, w.n, a.kl_coef, w.rewards_buffer); break;
      case kK3: kl_rewards<kK3>(p, q, w.n, a.kl_coef, w.rewards_buffer); break;
      case kAbs: kl_rewards<kAbs>(p, q, w.n, a.kl_coef, w.rewards_buffer); break;
      default: kl_rewards<kK1>(p, q, w.n, a.kl_coef, w.rewards_buffer); break;
    }
  } else {
    memset(w.rewards_buffer, 0, sizeof w.rewards_buffer);
  }
  if (!w.scored && w.kept > 0) {
    int64_t last = w.n - 1;
    while (!w.keep[last]) --last;
    w.rewards_buffer[last] +=
        clipped_score(sequence_scalar(a.scores, w.sequence), static_cast<float>(a.reward_clip));
    w.scored = true;
  }
  return w.rewards_buffer;
}

// Differences of a block in which "carry" skips tokens: they see the next kept value, and a skipped
// step is A = 1 * A - 0, which leaves every bit of A.
inline void skip_masked(const GaeArgs& a, Walk& w) {
  const float* r = w.rewards;
  const float* v = w.values;
  uint32_t ahead;
  memcpy(&ahead, &w.next_value, 4);
  for (int64_t k = w.n - 1; k >= 0; --k) {
    memcpy(w.other + k, &ahead, 4);
    uint32_t here = 0;
    if (v) memcpy(&here, v + k, 4);
    ahead = w.keep[k] ? here : ahead;
  }
  memcpy(&w.next_value, &ahead, 4);
  for (int64_t k = 0; k < w.n; ++k) {
    double d = r[k];
    if (v) d = d + a.gamma * w.other[k] - v[k];
    w.delta[k] = keep_or(w.keep[k], d, -0.0);
  }
}

// Loads the block before the last one and forms its differences.
template <bool kDones>
inline void prepare_block(const GaeArgs& a, double decay, Walk& w) {
  w.n = w.left < kBlockTokens ? w.left : kBlockTokens;
  w.left -= w.n;
  w.t = w.start + w.left;
  w.steps = 0;
  if (w.n == 0) return;
  w.kept = load_flags(a.mask, w.row, w.t, w.n, 1, w.keep);
  if (w.kept == 0 && a.carry) return;
  w.steps = w.n;
  w.rewards = a.rewards.data ? load_tokens(a.rewards, w.row, w.t, w.n, w.rewards_buffer)
                             : shaped_rewards(a, w);
  if (a.values.data) {
    w.values = load_tokens(a.values, w.row, w.t, w.n, w.values_buffer);
    if (w.values != w.values_buffer)
      memcpy(w.values_buffer, w.values, sizeof(float) * static_cast<size_t>(w.n));
    w.values_buffer[w.n] = w.next_value;
    w.values = w.values_buffer;
  }
  const bool skipping = w.kept < w.n && a.carry;
  if (w.kept < w.n && !a.carry) {
    for (int64_t k = 0; k < w.n; ++k) w.rewards_buffer[k] = keep_or_zero(w.keep[k], w.rewards[k]);
    w.rewards = w.rewards_buffer;
    for (int64_t k = 0; k < w.n && w.values; ++k)
      w.values_buffer[k] = keep_or_zero(w.keep[k], w.values_buffer[k]);
  }
  const float* r = w.rewards;
  const float* v = w.values;
  if (skipping) {
    skip_masked(a, w);
  } else if (!v) {
    for (int64_t k = 0; k < w.n; ++k) w.delta[k] = r[k];
  } else {
    for (int64_t k = 0; k < w.n; ++k) w.delta[k] = r[k] + a.gamma * v[k + 1] - v[k];
    w.next_value = v[0];
  }
  if (skipping || !w.plain) {
    for (int64_t k = 0; k < kBlockTokens; ++k) w.decay[k] = decay;
    w.plain = !skipping;
  }
  if (skipping)
    for (int64_t k = 0; k < w.n; ++k) w.decay[k] = keep_or(w.keep[k], decay, 1.0);
  if (kDones) {
    load_flags(a.dones, w.row, w.t, w.n, 0, w.done);
    for (int64_t k = 0; k < w.n; ++k) {
      // "carry" does not see a masked step, nor its flag.
      if (skipping) w.done[k] &= w.keep[k];
      const double cut = v ? static_cast<double>(r[k]) - v[k] : r[k];
      w.delta[k] = keep_or(w.done[k], cut, w.delta[k]);
    }
  }
}

template <bool kDones>
inline double step(double delta, double decay, uint8_t done, double ahead) {
  return multiply_add(decay, kDones && done ? 0.0 : ahead, delta);
}

// The recurrence over the walks' blocks, last step first; A replaces delta.
template <int U, bool kDones>
inline void recur(Walk* walks) {
  int64_t common = kBlockTokens;
  double a[U];
  double* delta[U];
  const double* decay[U];
  const uint8_t* done[U];
  for (int u = 0; u < U; ++u) {
    Walk& w = walks[u];
    a[u] = w.advantage;
    delta[u] = w.delta + w.steps;
    decay[u] = w.decay + w.steps;
    done[u] = w.done + w.steps;
    if (w.steps < common) common = w.steps;
  }
  for (int64_t j = -1; j >= -common; --j)
    for (int u = 0; u < U; ++u)
      delta[u][j] = a[u] = step<kDones>(delta[u][j], decay[u][j], done[u][j], a[u]);
  for (int u = 0; u < U; ++u) {
    for (int64_t j = -common - 1; j >= -walks[u].steps; --j)
      delta[u][j] = a[u] = step<kDones>(delta[u][j], decay[u][j], done[u][j], a[u]);
    walks[u].advantage = a[u];
  }
}

// Writes per-step results to the block's tokens, 0 where masked.
template <class F>
inline void write_tokens(const Walk& w, float* out, const F& result) {
  if (w.kept == w.n) {
    for (int64_t k = 0; k < w.n; ++k) out[k] = static_cast<float>(result(k));
  } else if (w.kept == 0) {
    memset(out, 0, sizeof(float) * static_cast<size_t>(w.n));
  } else {
    for (int64_t k = 0; k < w.n; ++k)
      out[k] = keep_or_zero(w.keep[k], static_cast<float>(result(k)));
  }
}

inline void finish_block(const GaeArgs& a, const Walk& w) {
  const int64_t at = w.row * a.cols + w.t;
  if (a.advantages) write_tokens(w, a.advantages + at, [&](int64_t k) { return w.delta[k]; });
  if (!w.values) {
    write_tokens(w, a.returns + at, [&](int64_t k) { return w.delta[k]; });
  } else {
    write_tokens(w, a.returns + at, [&](int64_t k) { return w.delta[k] + w.values[k]; });
  }
  if (a.shaped) write_tokens(w, a.shaped + at, [&](int64_t k) { return w.rewards[k]; });
}

// Sequences [begin, end) of the order of work, U at a time.
template <int U, bool kDones>
void walk_sequences(const GaeArgs& a, int64_t begin, int64_t end) {
  const double decay = a.values.data ? a.gamma * a.lam : a.gamma;
  for (int64_t first = begin; first < end; first += U) {
    Walk walks[U];
    for (int u = 0; u < U && first + u < end; ++u)
      begin_walk(a, a.offsets.data ? a.plan[first + u] : first + u, walks[u]);
    for (bool more = true; more;) {
      more = false;
      for (int u = 0; u < U; ++u) prepare_block<kDones>(a, decay, walks[u]);
      recur<U, kDones>(walks);
      for (int u = 0; u < U; ++u) {
        if (walks[u].n > 0) finish_block(a, walks[u]);
        more |= walks[u].left > 0;
      }
    }
  }
}

inline int64_t length(const GaeArgs& a, int64_t s) {
  return load_label(a.offsets, 0, s + 1) - load_label(a.offsets, 0, s);
}

// Classes of similar length: two bits behind the leading one.
inline int length_class(int64_t n) {
  if (n < 4) return static_cast<int>(n);
  const int top = 63 - __builtin_clzll(static_cast<unsigned long long>(n));
  return 4 * (top - 1) + static_cast<int>((n >> (top - 2)) & 3);
}

// Fills plan[0, sequences) with the sequences, longest class first, and plan[sequences, ...] with
// the starts of items of about kItemTokens, whole groups of `together`. Returns the item count.
inline int64_t plan_packed(const GaeArgs& a, int together) {
  constexpr int kClasses = 4 * 63;
  int64_t starts[kClasses] = {};
  for (int64_t s = 0; s < a.sequences; ++s) ++starts[length_class(length(a, s))];
  int64_t before = 0;
  for (int c = kClasses - 1; c >= 0; --c) {
    const int64_t count = starts[c];
    starts[c] = before;
    before += count;
  }
  for (int64_t s = 0; s < a.sequences; ++s) a.plan[starts[length_class(length(a, s))]++] = s;
  int64_t* items = a.plan + a.sequences;
  int64_t count = 0, tokens = kItemTokens;
  for (int64_t k = 0; k < a.sequences; ++k) {
    if (k % together == 0 && tokens >= kItemTokens) {
      items[count++] = k;
      tokens = 0;
    }
    tokens += length(a, a.plan[k]);
  }
  items[count] = a.sequences;
  return count;
}

template <int U>
void run(const GaeArgs& a) {
  const auto walk = a.dones.data ? walk_sequences<U, true> : walk_sequences<U, false>;
  if (a.offsets.data) {
    const int64_t items = plan_packed(a, U);
    const int64_t* starts = a.plan + a.sequences;
    parallel_for(items, a.exec.threads, [&](int64_t i) { walk(a, starts[i], starts[i + 1]); });
    return;
  }
  const int64_t size = U * (kItemTokens / (U * a.cols) + 1);
  parallel_for((a.rows + size - 1) / size, a.exec.threads, [&](int64_t i) {
    walk(a, i * size, (i + 1) * size < a.rows ? (i + 1) * size : a.rows);
  });
}

}  // namespace scan
}  // namespace
}  // namespace rk
