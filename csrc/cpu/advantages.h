// Advantages: the scans of advantages_scan.h and advantages_general.h, whitening and group
// baselines.
#pragma once

namespace rk {
namespace {
namespace scan {

// Whitening works on chunks of tokens in flat order, so its bits do not depend on strides.
constexpr int64_t kChunkTokens = 2048;

// Calls body(row, t, offset, n) for the pieces of rows that make up flat tokens [begin, begin + n).
template <class F>
inline void for_pieces(int64_t cols, int64_t begin, int64_t n, const F& body) {
  for (int64_t done = 0; done < n;) {
    const int64_t row = (begin + done) / cols, t = (begin + done) % cols;
    const int64_t piece = cols - t < n - done ? cols - t : n - done;
    body(row, t, done, piece);
    done += piece;
  }
}

struct Chunk {
  const float* x;
  int64_t kept;
  uint8_t keep[kChunkTokens];
  float buffer[kChunkTokens];

  Chunk(const WhitenArgs& a, int64_t begin, int64_t n) : x(buffer), kept(0) {
    for_pieces(a.cols, begin, n, [&](int64_t row, int64_t t, int64_t offset, int64_t piece) {
      const float* p = load_tokens(a.x, row, t, piece, buffer + offset);
      if (piece == n)
        x = p;
      else if (p != buffer + offset)
        memcpy(buffer + offset, p, sizeof(float) * static_cast<size_t>(piece));
      kept += load_flags(a.mask, row, t, piece, 1, keep + offset);
    });
  }
};

// Sum of f(k) over the kept tokens, by eight interleaved accumulators.
template <class F>
inline double sum_kept(const Chunk& c, int64_t n, const F& f) {
  double s[8] = {}, y[256];
  for (int64_t begin = 0; begin < n; begin += 256) {
    const int64_t m = n - begin < 256 ? n - begin : 256;
    for (int64_t k = 0; k < m; ++k) y[k] = keep_or(c.keep[begin + k], f(begin + k), 0.0);
    int64_t k = 0;
    for (; k + 8 <= m; k += 8)
      for (int u = 0; u < 8; ++u) s[u] += y[k + u];
    for (int u = 0; k < m; ++k, ++u) s[u] += y[k];
  }
  return ((s[0] + s[1]) + (s[2] + s[3])) + ((s[4] + s[5]) + (s[6] + s[7]));
}

template <class F>
inline void parallel_chunks(const WhitenArgs& a, const F& body) {
  const int64_t tokens = a.rows * a.cols;
  // Several chunks per item reduce the scheduling overhead.
  const int64_t size = 8 * kChunkTokens;
  parallel_for((tokens + size - 1) / size, a.exec.threads, [&](int64_t item) {
    for (int64_t c = item * 8; c < item * 8 + 8 && c * kChunkTokens < tokens; ++c) {
      const int64_t begin = c * kChunkTokens;
      body(c, begin, tokens - begin < kChunkTokens ? tokens - begin : kChunkTokens);
    }
  });
}

inline Status whiten_tokens(const WhitenArgs& a) {
  const Scratch<Moments> moments((a.rows * a.cols + kChunkTokens - 1) / kChunkTokens);
  if (!moments.data) return {kOutOfMemory, -1};
  parallel_chunks(a, [&](int64_t c, int64_t begin, int64_t n) {
    const Chunk chunk(a, begin, n);
    Moments m{0.0, 0.0, 0.0};
    if (chunk.kept > 0) {
      m.count = static_cast<double>(chunk.kept);
      m.mean =
          sum_kept(chunk, n, [&](int64_t k) { return static_cast<double>(chunk.x[k]); }) / m.count;
      m.m2 = sum_kept(chunk, n,
                      [&](int64_t k) { return (chunk.x[k] - m.mean) * (chunk.x[k] - m.mean); });
    }
    moments[c] = m;
  });
  Moments all{0.0, 0.0, 0.0};
  for (int64_t c = 0; c * kChunkTokens < a.rows * a.cols; ++c) all = merge_moments(all, moments[c]);
  const Whitening w = whitening(all, a.shift_mean, a.unbiased, a.eps);
  parallel_chunks(a, [&](int64_t, int64_t begin, int64_t n) {
    const Chunk chunk(a, begin, n);
    float* out = a.out + begin;
    for (int64_t k = 0; k < n; ++k) {
      const auto y = static_cast<float>((chunk.x[k] - w.mean) * w.scale + w.shift);
      out[k] = keep_or_zero(chunk.keep[k], y);
    }
  });
  return {};
}

inline double reward_at(const Tensor& x, int64_t i) {
  const int64_t at = i * x.stride1;
  return x.dtype == kFloat64 ? static_cast<const double*>(x.data)[at]
                             : load_scalar(x.data, x.dtype, at);
}

// The rewards of one group after baseline and, if configured, scale, into `work`. `member(k)` for k
// in [0, n) are its indices.
template <class F>
inline void group(const GroupAdvantagesArgs& a, int64_t n, const F& member, double* work) {
  GroupStatistics s{static_cast<double>(n), reward_at(a.rewards, member(0)), 0.0, 0.0};
  for (int64_t k = 0; k < n; ++k) s.mean += reward_at(a.rewards, member(k)) - s.first;
  s.mean = finite_mean(s.mean / s.n);
  double m2 = 0.0;
  for (int64_t k = 0; k < n; ++k) {
    const double d = reward_at(a.rewards, member(k)) - s.first - s.mean;
    m2 += d * d;
  }
  s.spread = sqrt(m2 / others_of(s.n));
  for (int64_t k = 0; k < n; ++k) {
    const int64_t i = member(k);
    const double greedy = a.greedy.given ? reward_at(a.greedy, i) : 0.0;
    work[i] = group_advantage(reward_at(a.rewards, i), greedy, s, a.baseline, a.scale, a.eps);
  }
}

inline void scale_by_batch(const GroupAdvantagesArgs& a, double* work) {
  // Advantages of equal rewards must be exactly 0.
  if (!zero_mean(a.baseline)) {
    const double first = work[0];
    double mean = 0.0;
    for (int64_t i = 0; i < a.count; ++i) mean += work[i] -= first;
    mean /= static_cast<double>(a.count);
    for (int64_t i = 0; i < a.count; ++i) work[i] -= mean;
  }
  double m2 = 0.0;
  for (int64_t i = 0; i < a.count; ++i) m2 += work[i] * work[i];
  const double spread = sqrt(m2 / (a.count > 1 ? static_cast<double>(a.count - 1) : 1.0));
  for (int64_t i = 0; i < a.count; ++i) work[i] = spread == 0.0 ? 0.0 : work[i] / (spread + a.eps);
}

}  // namespace scan

Status whiten(const WhitenArgs& a) { return scan::whiten_tokens(a); }

namespace scan {

// Runs `body` unless the offsets are bad or there are no tokens; then whitens if configured.
template <class F>
inline Status checked(const GaeArgs& a, const F& body) {
  if (a.offsets.given) {
    const Status status = check_offsets({a.sequences, a.cols, a.offsets, {}});
    if (status.code != kOk) return status;
  }
  if (a.rows * a.cols == 0) return {};
  body();
  return a.whiten ? whiten_tokens(whitening_args(a)) : Status{};
}

}  // namespace scan

Status gae(const GaeArgs& a) {
  return scan::checked(a, [&] {
    if (a.values.given)
      scan::run<true>(a);
    else
      scan::run<false>(a);
  });
}

Status general_gae(const GeneralGaeArgs& a) {
  return scan::checked(a.gae, [&] { scan::run_general(a); });
}

Status group_advantages(const GroupAdvantagesArgs& a) {
  const Scratch<double> work(a.count);
  if (!work.data) return {kOutOfMemory, -1};
  for (int64_t begin = 0, end = 0; begin < a.count; begin = end) {
    if (a.group_size == 0) {
      while (end < a.count && a.sorted_ids[end] == a.sorted_ids[begin]) ++end;
      scan::group(a, end - begin, [&](int64_t k) { return a.order[begin + k]; }, work.data);
    } else {
      end = begin + a.group_size;
      scan::group(a, end - begin, [&](int64_t k) { return begin + k; }, work.data);
    }
  }
  if (a.scale == kScaleBatch && a.count > 0) scan::scale_by_batch(a, work.data);
  for (int64_t i = 0; i < a.count; ++i) a.out[i] = static_cast<float>(work[i]);
  return {};
}

}  // namespace
}  // namespace rk
