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

template <class T>
inline void copy_rewards(const Tensor& x, int64_t begin, int64_t n, double* out) {
  const T* p = static_cast<const T*>(x.data) + begin * x.stride1;
  if (x.stride1 == 1)
    for (int64_t i = 0; i < n; ++i) out[i] = p[i];
  else
    for (int64_t i = 0; i < n; ++i) out[i] = p[i * x.stride1];
}

// Rewards [begin, begin + n) in double.
inline void load_rewards(const Tensor& x, int64_t begin, int64_t n, double* out) {
  if (x.dtype == kFloat64) return copy_rewards<double>(x, begin, n, out);
  if (x.dtype == kFloat32) return copy_rewards<float>(x, begin, n, out);
  for (int64_t i = 0; i < n; ++i) out[i] = load_scalar(x.data, x.dtype, (begin + i) * x.stride1);
}

// Groups whose statistics are computed side by side, and rewards of a work item, on its stack.
constexpr int64_t kGroupsAtOnce = 8, kItemRewards = 8192;

// Statistics of `lanes` groups: reward k of group l is at(l, k), for k in [0, n). The sums of a
// group are in the order of its members, whatever stands beside it.
template <int lanes, class F>
inline void group_statistics(int64_t n, const F& at, GroupStatistics* s) {
  const auto size = static_cast<double>(n);
  double first[lanes], mean[lanes], m2[lanes];
  for (int l = 0; l < lanes; ++l) first[l] = at(l, 0), mean[l] = m2[l] = 0.0;
  for (int64_t k = 0; k < n; ++k)
    for (int l = 0; l < lanes; ++l) mean[l] += at(l, k) - first[l];
  for (int l = 0; l < lanes; ++l) mean[l] = finite_mean(mean[l] / size);
  for (int64_t k = 0; k < n; ++k) {
    for (int l = 0; l < lanes; ++l) {
      const double d = at(l, k) - first[l] - mean[l];
      m2[l] += d * d;
    }
  }
  for (int l = 0; l < lanes; ++l) s[l] = {size, first[l], mean[l], sqrt(m2[l] / others_of(size))};
}

// The reward at index i after baseline and, if configured, scale.
inline double rescaled(const GroupAdvantagesArgs& a, const GroupStatistics& s, double reward,
                       int64_t i) {
  double greedy = 0.0;
  if (a.greedy.given) load_rewards(a.greedy, i, 1, &greedy);
  return group_advantage(reward, greedy, s, a.baseline, a.scale, a.eps);
}

// Groups [begin, end) of one size, which follow each other; `x` receives their advantages.
inline void equal_groups(const GroupAdvantagesArgs& a, int64_t begin, int64_t end, double* x) {
  const int64_t n = a.group_size, groups = end - begin;
  load_rewards(a.rewards, begin * n, groups * n, x);
  const auto rescale = [&](int64_t g, const GroupStatistics& s) {
    double* own = x + g * n;
    // The usual options in a loop without branches.
    if (a.baseline == kBaselineMean && a.scale == kScaleGroup && s.spread != 0.0) {
      for (int64_t k = 0; k < n; ++k) own[k] = (own[k] - s.first - s.mean) / (s.spread + a.eps);
    } else {
      for (int64_t k = 0; k < n; ++k) own[k] = rescaled(a, s, own[k], (begin + g) * n + k);
    }
  };
  GroupStatistics s[kGroupsAtOnce];
  int64_t g = 0;
  for (; g + kGroupsAtOnce <= groups; g += kGroupsAtOnce) {
    const double* own = x + g * n;
    group_statistics<kGroupsAtOnce>(n, [&](int l, int64_t k) { return own[l * n + k]; }, s);
    for (int64_t l = 0; l < kGroupsAtOnce; ++l) rescale(g + l, s[l]);
  }
  for (; g < groups; ++g) {
    group_statistics<1>(n, [&](int, int64_t k) { return x[g * n + k]; }, s);
    rescale(g, s[0]);
  }
}

// Groups of equal ids; `x` receives all advantages.
inline void groups_by_id(const GroupAdvantagesArgs& a, double* x) {
  load_rewards(a.rewards, 0, a.count, x);
  for (int64_t begin = 0, end = 0; begin < a.count; begin = end) {
    while (end < a.count && a.sorted_ids[end] == a.sorted_ids[begin]) ++end;
    const int64_t* member = a.order + begin;
    GroupStatistics s;
    group_statistics<1>(end - begin, [&](int, int64_t k) { return x[member[k]]; }, &s);
    for (int64_t k = 0; k < end - begin; ++k)
      x[member[k]] = rescaled(a, s, x[member[k]], member[k]);
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
  const int64_t n = a.group_size, groups = n > 0 ? a.count / n : 0;
  const int64_t at_once = n > 0 ? scan::kItemRewards / n / scan::kGroupsAtOnce : 0;
  if (at_once > 0 && a.scale != kScaleBatch) {
    const int64_t size = at_once * scan::kGroupsAtOnce;
    parallel_for((groups + size - 1) / size, a.exec.threads, [&](int64_t item) {
      const int64_t begin = item * size, end = begin + size < groups ? begin + size : groups;
      double x[scan::kItemRewards];
      scan::equal_groups(a, begin, end, x);
      for (int64_t i = 0; i < (end - begin) * n; ++i)
        a.out[begin * n + i] = static_cast<float>(x[i]);
    });
    return {};
  }
  const Scratch<double> work(a.count);
  if (!work.data) return {kOutOfMemory, -1};
  if (n == 0) {
    scan::groups_by_id(a, work.data);
  } else {
    parallel_for(groups, a.exec.threads,
                 [&](int64_t g) { scan::equal_groups(a, g, g + 1, work.data + g * n); });
  }
  if (a.scale == kScaleBatch && a.count > 0) scan::scale_by_batch(a, work.data);
  for (int64_t i = 0; i < a.count; ++i) a.out[i] = static_cast<float>(work[i]);
  return {};
}

}  // namespace
}  // namespace rk
