// Token log-probability and entropy of rows of logits, and their gradient.
//
// A row is read once from memory, in blocks that fit the L1 cache: first the block's maximum, then
// the sums of e = exp((x - m) / T) and e * (x - m). While one block is summed, the maximum of the
// next is taken, so that memory is always busy. Each sum has four accumulators within a block and a
// double across the blocks of a span; spans are added in order. With fewer rows than threads, these
// share the spans of a row. Boundaries depend only on the vocabulary, so a row's bits depend
// neither on its batch nor on threads.
#pragma once

namespace rk {
namespace {

constexpr int64_t kBlock = 4096;
constexpr int64_t kSpan = 4 * kBlock;
constexpr int kUnroll = 4;

// The reduction of a row or a span of it: maximum of the logits, sum of e, sum of e * (x - m), sum
// of e * e; and the largest logit before the options, with the start of the first block that has
// it.
struct RowSums {
  float m = -__builtin_inff();
  double s = 0.0;
  double t = 0.0;
  double q = 0.0;
  float top = -__builtin_inff();
  int64_t top_block = 0;
};

template <class E>
inline float block_max(const typename E::Storage* x, int64_t n) {
  const float lowest = -__builtin_inff();
  Vec m[kUnroll];
  for (auto& v : m) v = splat(lowest);
  int64_t i = 0;
  for (; i + kUnroll * kLanes <= n; i += kUnroll * kLanes)
    for (int u = 0; u < kUnroll; ++u) m[u] = max(m[u], E::load(x + i + u * kLanes));
  for (; i + kLanes <= n; i += kLanes) m[0] = max(m[0], E::load(x + i));
  if (i < n) m[1] = max(m[1], load_partial<E>(x + i, static_cast<int>(n - i), lowest));
  return reduce_max(max(max(m[0], m[1]), max(m[2], m[3])));
}

template <class E>
inline bool has_nan(const typename E::Storage* x, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const float v = E::get(x + i);
    if (v != v) return true;
  }
  return false;
}

// Constants of the sums over a row.
template <bool kChange>
struct SumsOptions {
  LogitOptions<kChange> logits;
  Vec rate, lowest;
};

// Adds a block of n logits to the sums, whose reference point is r.m. With kNext, returns the
// maximum of the next full block.
template <class E, bool kChange, bool kEntropy, bool kSquares, bool kNext>
inline float add_block(RowSums& r, const typename E::Storage* p, int64_t n,
                       const SumsOptions<kChange>& o) {
  const Vec m = splat(r.m);
  Vec s[kUnroll], t[kUnroll], q[kUnroll], next[kUnroll];
  for (int u = 0; u < kUnroll; ++u) {
    s[u] = t[u] = q[u] = splat(0.0f);
    next[u] = splat(-__builtin_inff());
  }
  const auto accumulate = [&](int u, Vec z) {
    const Vec d = max(o.lowest, sub(z, m));
    const Vec e = exp_scaled(d, o.rate);
    s[u] = add(s[u], e);
    if constexpr (kEntropy) t[u] = fma(e, d, t[u]);
    if constexpr (kSquares) {
      // Squares of smaller ones are no normal floats, and slow; the row's sum is 1 at least.
      const Vec normal = max(splat(1e-18f), e);
      q[u] = fma(normal, normal, q[u]);
    }
  };
  int64_t i = 0;
  for (; i + kUnroll * kLanes <= n; i += kUnroll * kLanes) {
    prefetch_ahead<E, kUnroll>(p + i + kBlock);
    for (int u = 0; u < kUnroll; ++u) {
      accumulate(u, o.logits.values(E::load(p + i + u * kLanes)));
      if constexpr (kNext) next[u] = max(next[u], E::load(p + kBlock + i + u * kLanes));
    }
  }
  for (; i < n; i += kLanes) {
    const int left = n - i < kLanes ? static_cast<int>(n - i) : kLanes;
    Vec z = left == kLanes ? E::load(p + i) : load_partial<E>(p + i, left, 0.0f);
    z = o.logits.values(z);
    // Lanes past the end are -inf; their e is below the resolution of a sum that holds exp(0).
    if (left < kLanes) z = keep_first(z, left, -__builtin_inff());
    accumulate(0, z);
  }
  r.s += reduce_add(add(add(s[0], s[1]), add(s[2], s[3])));
  if constexpr (kEntropy) r.t += reduce_add(add(add(t[0], t[1]), add(t[2], t[3])));
  if constexpr (kSquares) r.q += reduce_add(add(add(q[0], q[1]), add(q[2], q[3])));
  return reduce_max(max(max(next[0], next[1]), max(next[2], next[3])));
}

// Moves the reference point of the sums up to m, if it is lower: scales every e by exp(m - m') and
// lowers every (x - m).
inline void raise_to(RowSums& r, float m, double inv_t) {
  if (!(m > r.m)) return;
  if (r.s != 0.0) {
    const double shift = static_cast<double>(r.m) - m;
    const double scale = exp(shift * inv_t);
    r.t = scale * (r.t + r.s * shift);
    r.s *= scale;
    r.q *= scale * scale;
  }
  r.m = m;
}

// Adds the sums of the span after it.
inline void add_span(RowSums& r, RowSums span, double inv_t) {
  if (span.top > r.top) r.top = span.top, r.top_block = span.top_block;
  raise_to(r, span.m, inv_t);
  raise_to(span, r.m, inv_t);
  r.s += span.s;
  r.t += span.t;
  r.q += span.q;
}

// The sums of logits [begin, end) of a row.
template <class E, bool kChange, bool kEntropy, bool kSquares>
inline RowSums span_sums(const typename E::Storage* x, int64_t begin, int64_t end,
                         const SumsOptions<kChange>& options, double inv_t) {
  RowSums r;
  float next = 0.0f;
  bool known = false;
  for (int64_t start = begin; start < end; start += kBlock) {
    const typename E::Storage* p = x + start;
    const int64_t n = end - start < kBlock ? end - start : kBlock;
    const float top = known ? next : block_max<E>(p, n);
    if (top > r.top) r.top = top, r.top_block = start;
    const float bm = options.logits.value(top);
    known = false;
    if (bm == -__builtin_inff()) {
      // A block of only -inf adds nothing, unless the maximum has hidden a NaN.
      if (has_nan<E>(p, n)) r.s = __builtin_nan("");
      continue;
    }
    raise_to(r, bm, inv_t);
    known = end - start >= 2 * kBlock;
    if (known)
      next = add_block<E, kChange, kEntropy, kSquares, true>(r, p, n, options);
    else
      add_block<E, kChange, kEntropy, kSquares, false>(r, p, n, options);
  }
  return r;
}

inline int64_t span_count(int64_t vocab) { return (vocab + kSpan - 1) / kSpan; }

// Whether a team shares the spans of a row.
inline bool shares_row(int64_t vocab, int32_t threads) {
  return threads > 1 && vocab > kSpan && !in_team();
}

// Threads that take rows: one, if all of them end a row's spans sooner than each its own row.
inline int32_t threads_of_rows(int64_t rows, int64_t vocab, int32_t threads) {
  const int64_t spans = span_count(vocab);
  return rows * ((spans + threads - 1) / threads) < spans && rows < threads ? 1 : threads;
}

template <class E, bool kChange, bool kEntropy, bool kSquares>
inline RowSums row_sums(const typename E::Storage* x, int64_t vocab,
                        const LogitOptions<kChange>& logits, double inv_t, int32_t threads) {
  const SumsOptions<kChange> options{logits, splat(static_cast<float>(inv_t * kLog2e)),
                                     splat(static_cast<float>(kExpMin / inv_t))};
  const auto span = [&](int64_t i) {
    const int64_t begin = i * kSpan;
    const int64_t end = vocab - begin < kSpan ? vocab : begin + kSpan;
    return span_sums<E, kChange, kEntropy, kSquares>(x, begin, end, options, inv_t);
  };
  RowSums r;
  const int64_t spans = span_count(vocab);
  if (shares_row(vocab, threads)) {
    const Scratch<RowSums> found(spans);
    if (found.data != nullptr) {
      parallel_for(spans, threads, [&](int64_t i) { found[i] = span(i); });
      for (int64_t i = 0; i < spans; ++i) add_span(r, found[i], inv_t);
      return r;
    }
  }
  for (int64_t i = 0; i < spans; ++i) add_span(r, span(i), inv_t);
  return r;
}

// The first of the largest logits of a row with these sums; the first NaN if there is one.
template <class E>
inline int64_t row_argmax(const typename E::Storage* x, int64_t vocab, const RowSums& r) {
  if (r.s != r.s) {
    for (int64_t i = 0; i < vocab; ++i)
      if (const float v = E::get(x + i); v != v) return i;
  }
  constexpr int64_t kStep = 16 * kLanes;
  int64_t start = r.top_block;
  while (start + kStep < vocab && block_max<E>(x + start, kStep) != r.top) start += kStep;
  for (int64_t i = start; i < vocab; ++i)
    if (E::get(x + i) == r.top) return i;
  return 0;
}

// Finds bad data before a label is used as an index and before anything is written.
template <class Args>
inline Status check_tokens(const Args& a) {
  for (int64_t i = 0; i < a.rows; ++i) {
    for (int64_t j = 0; j < a.cols; ++j) {
      const int64_t y = load_label(a.labels, i, j);
      if (y == a.options.ignore_index) continue;
      const bool elsewhere = y == kLabelElsewhere && a.options.ignore_index == kShardIgnored;
      if ((y < 0 || y >= a.vocab) && !elsewhere) return {kLabelOutOfRange, i * a.cols + j};
      const double t = row_temperature(a, i, j);
      if (!good_temperature(t)) return {kBadTemperature, i * a.cols + j};
    }
  }
  return {};
}

// Without further labels a row has no more to do.
struct NoMore {
  template <class... Row>
  void operator()(const Row&...) const {}
};

// more(x, logits, r, inv_t) is called for a row that is not ignored: its logits, their options,
// their sums, and 1 / T.
template <class E, bool kChange, bool kEntropy, bool kSquares = false, class More = NoMore>
void logprobs_row(const LogprobsArgs& a, int64_t row, const More& more = {}) {
  const int64_t i = row / a.cols, j = row % a.cols;
  float* logprob = static_cast<float*>(a.logprobs.data) + row;
  const bool wanted = kEntropy && (!kSquares || a.entropy.given);
  float* entropy = wanted ? static_cast<float*>(a.entropy.data) + row : nullptr;
  float* collision = kSquares ? static_cast<float*>(a.collision.data) + row : nullptr;
  int64_t* argmax = a.argmax.given ? static_cast<int64_t*>(a.argmax.data) + row : nullptr;
  float* stats = a.stats == nullptr ? nullptr : a.stats + 3 * row;
  const int64_t label = load_label(a.labels, i, j);
  if (label == a.options.ignore_index) {
    *logprob = 0.0f;
    if (wanted) *entropy = 0.0f;
    if (kSquares) *collision = 0.0f;
    if (argmax != nullptr) *argmax = -1;
    if (stats != nullptr) stats[0] = 0.0f, stats[1] = 1.0f, stats[2] = 0.0f;
    return;
  }
  const double inv_t = 1.0 / row_temperature(a, i, j);
  const LogitOptions<kChange> logits(a.options);
  const auto* x = row_at<E>(a.logits, i, j);
  const RowSums r =
      row_sums<E, kChange, kEntropy, kSquares>(x, a.vocab, logits, inv_t, a.exec.threads);
  more(x, logits, r, inv_t);
  const float xy = logits.value(label == kLabelElsewhere ? __builtin_nanf("") : E::get(x + label));
  const bool empty = r.m == -__builtin_inff();
  const bool hidden_nan = r.s != r.s;
  *logprob =
      empty ? __builtin_nanf("") : static_cast<float>(logprob_from_stats(xy, r.m, r.s, inv_t));
  if (argmax != nullptr) *argmax = row_argmax<E>(x, a.vocab, r);
  if constexpr (kSquares)
    *collision = empty ? __builtin_nanf("") : static_cast<float>(r.q / (r.s * r.s));
  if (!kEntropy && stats == nullptr) return;
  const double mean = r.t / r.s * inv_t;
  if (stats != nullptr) {
    // A NaN among only -inf must not make a vocabulary shard look empty.
    stats[0] = empty && hidden_nan ? __builtin_nanf("") : r.m;
    stats[1] = empty ? __builtin_nanf("") : static_cast<float>(r.s);
    stats[2] = empty ? __builtin_nanf("") : static_cast<float>(mean);
  }
  if (wanted) *entropy = empty ? __builtin_nanf("") : static_cast<float>(log(r.s) - mean);
}

// dz_j = p_j (l - g - h (log p_j + H) + 2 c (p_j - C)) / T, plus g / T at the label, where C is the
// sum of the squared p; p = exp((x - m) / T) / s.
// log p_j + H is computed as (x_j - m) / T minus its mean, which does not cancel at large or small
// temperatures.
template <class E, bool kChange, bool kEntropy, bool kSquares = false>
void logprobs_backward_row(const LogprobsBackwardArgs& a, int64_t row) {
  using S = typename E::Storage;
  const int64_t i = row / a.cols, j = row % a.cols;
  const auto upstream = [&](const Tensor& g) { return upstream_at(g, i, j); };
  const float g = upstream(a.grad_logprobs);
  const float h = kEntropy ? upstream(a.grad_entropy) : 0.0f;
  const double of_lse = upstream(a.grad_lse);
  const double c = kSquares ? 2.0 * upstream(a.grad_collision) : 0.0;
  const int64_t label = load_label(a.labels, i, j);
  S* out = row_at<E>(a.grad_logits, i, j);
  if (label == a.options.ignore_index || (g == 0.0f && h == 0.0f && of_lse == 0.0 && c == 0.0)) {
    memset(out, 0, sizeof(S) * static_cast<size_t>(a.vocab));
    return;
  }
  const S* x = row_at<E>(a.logits, i, j);
  const double inv_t = 1.0 / row_temperature(a, i, j);
  const float* stats = a.stats + 3 * row;
  const double s = stats[1], mean = stats[2];
  const LogitOptions<kChange> logits(a.options);
  const float raw_label = label == kLabelElsewhere ? 0.0f : E::get(x + label);
  const float xy = logits.value(raw_label);
  const double logprob = logprob_from_stats(xy, stats[0], s, inv_t);

  const Vec m = splat(stats[0]);
  const Vec rate = splat(static_cast<float>(inv_t * kLog2e));
  const Vec lowest = splat(static_cast<float>(kExpMin / inv_t));
  // The square's part, e * a2 * (e - mass), cancels no more than p - C does.
  const double collision = kSquares ? upstream(a.collision) : 0.0f;
  const Vec a2 = splat(static_cast<float>(c / (s * s) * inv_t));
  const Vec mass = splat(static_cast<float>(collision * s));
  // dz = e * (a0 + a1 * (x - m) / T): the entropy term is linear in log p.
  const Vec a0 = splat(static_cast<float>((-(g - of_lse) + h * mean) / s * inv_t));
  const Vec a1 = splat(static_cast<float>(-h / s * inv_t)),
            over_t = splat(static_cast<float>(inv_t));
  const auto gradient = [&](Vec raw) {
    const Logits x = logits(raw);
    const Vec d = sub(x.z, m);
    const Vec near = max(lowest, d), e = exp_scaled(near, rate);
    Vec dz;
    if constexpr (kSquares)
      dz = mul(e, fma(a2, sub(e, mass), fma(a1, mul(near, over_t), a0)));
    else
      dz = kEntropy ? mul(e, fma(a1, mul(near, over_t), a0)) : mul(e, a0);
    if constexpr (kChange) dz = mul(dz, x.slope);
    return select_less(d, lowest, splat(0.0f), dz);
  };
  const auto columns = [&](int64_t k, int64_t end) {
    for (; k + kUnroll * kLanes <= end; k += kUnroll * kLanes) {
      prefetch_ahead<E, kUnroll>(x + k);
      prefetch_ahead<E, kUnroll, true>(out + k);
      Vec dz[kUnroll];
      for (int u = 0; u < kUnroll; ++u) dz[u] = gradient(E::load(x + k + u * kLanes));
      for (int u = 0; u < kUnroll; ++u) E::store(out + k + u * kLanes, dz[u]);
    }
    for (; k < end; k += kLanes) {
      const int n = end - k < kLanes ? static_cast<int>(end - k) : kLanes;
      store_partial<E>(out + k, gradient(load_partial<E>(x + k, n, 0.0f)), n);
    }
  };
  if (shares_row(a.vocab, a.exec.threads)) {
    parallel_for(span_count(a.vocab), a.exec.threads, [&](int64_t i) {
      const int64_t begin = i * kSpan;
      columns(begin, a.vocab - begin < kSpan ? a.vocab : begin + kSpan);
    });
  } else {
    columns(0, a.vocab);
  }
  if (label == kLabelElsewhere) return;
  const double distance = (static_cast<double>(xy) - stats[0]) * inv_t;
  double at_label = label_gradient(logprob, distance, mean, g, h, inv_t);
  if (of_lse != 0.0 || c != 0.0)
    at_label += further_label_gradient(logprob, collision, of_lse, 0.5 * c) * inv_t;
  E::set(out + label, static_cast<float>(at_label / logits.inverse_slope(raw_label)));
}

template <class E, bool kChange, bool kEntropy>
struct LogprobsForward {
  static void row(const LogprobsArgs& a, int64_t r) { logprobs_row<E, kChange, kEntropy>(a, r); }
};
template <class E, bool kChange, bool kEntropy>
struct LogprobsBackward {
  static void row(const LogprobsBackwardArgs& a, int64_t r) {
    logprobs_backward_row<E, kChange, kEntropy>(a, r);
  }
};

template <class E, bool kChange, bool>
struct SquaresForward {
  static void row(const LogprobsArgs& a, int64_t r) { logprobs_row<E, kChange, true, true>(a, r); }
};
template <class E, bool kChange, bool>
struct SquaresBackward {
  static void row(const LogprobsBackwardArgs& a, int64_t r) {
    logprobs_backward_row<E, kChange, true, true>(a, r);
  }
};

Status token_logprobs(const LogprobsArgs& a) {
  const Status status = check_tokens(a);
  if (status.code != kOk) return status;
  const auto row =
      a.collision.given
          ? pick<SquaresForward, LogprobsArgs>(a.logits.dtype, a.options, true)
          : pick<LogprobsForward, LogprobsArgs>(a.logits.dtype, a.options, a.entropy.given);
  const int64_t rows = a.rows * a.cols;
  parallel_for(rows, threads_of_rows(rows, a.vocab, a.exec.threads), [&](int64_t r) { row(a, r); });
  return {};
}

Status token_logprobs_backward(const LogprobsBackwardArgs& a) {
  const Status status = check_tokens(a);
  if (status.code != kOk) return status;
  const bool in_place = a.grad_logits.data == a.logits.data;
  const auto row = a.grad_collision.given ? pick<SquaresBackward, LogprobsBackwardArgs>(
                                                a.logits.dtype, a.options, true)
                                          : pick<LogprobsBackward, LogprobsBackwardArgs>(
                                                a.logits.dtype, a.options, a.grad_entropy.given);
  const int32_t threads = threads_of_rows(a.rows * a.cols, a.vocab, a.exec.threads);
  for_gradient_rows(a, in_place ? nullptr : a.grad_logits.data, threads, row);
  return {};
}

}  // namespace
}  // namespace rk
