// token_logprobs with several labels per token: a row is summed once, and each label's logit is
// read beside it; the gradient is that of a row without a label, with the labels' own columns on
// top.
#pragma once

namespace rk {
namespace {

// The labels of one token.
struct OwnLabels {
  const Tensor& t;
  int64_t at, count, ignore_index, vocab;

  template <class Args>
  OwnLabels(const Args& a, int64_t row)
      : t(a.labels),
        at(row / a.rows.cols * a.labels.stride0 + row % a.rows.cols * a.labels.stride1),
        count(a.count),
        ignore_index(a.ignore_index),
        vocab(a.rows.vocab) {}

  int64_t operator[](int64_t k) const {
    return t.dtype == kInt32 ? static_cast<const int32_t*>(t.data)[at + k]
                             : static_cast<const int64_t*>(t.data)[at + k];
  }
  bool elsewhere(int64_t y) const { return y == kLabelElsewhere && ignore_index == kShardIgnored; }
  // Whether it has a column here.
  bool has_column(int64_t y) const { return y != ignore_index && y >= 0 && y < vocab; }
};

// check_tokens for several labels; the position of a label counts all labels.
template <class Args>
inline Status check_many(const Args& a) {
  const auto& rows = a.rows;
  for (int64_t row = 0; row < rows.rows * rows.cols; ++row) {
    const OwnLabels labels(a, row);
    bool kept = false;
    for (int64_t k = 0; k < a.count; ++k) {
      const int64_t y = labels[k];
      if (y == a.ignore_index) continue;
      if (!labels.has_column(y) && !labels.elsewhere(y))
        return {kLabelOutOfRange, row * a.count + k};
      kept = true;
    }
    if (kept && !good_temperature(row_temperature(rows, row / rows.cols, row % rows.cols)))
      return {kBadTemperature, row};
  }
  return {};
}

template <class E, bool kChange, bool kEntropy, bool kSquares = false>
void many_row(const ManyLabelsArgs& a, int64_t row) {
  const OwnLabels labels(a, row);
  float* out = a.of_labels + row * a.count;
  for (int64_t k = 0; k < a.count; ++k) out[k] = 0.0f;
  const auto each = [&](const auto* x, const auto& logits, const RowSums& r, double inv_t) {
    const bool empty = r.m == -__builtin_inff();
    for (int64_t k = 0; k < a.count; ++k) {
      const int64_t y = labels[k];
      if (y == a.ignore_index) continue;
      const float xy = logits.value(labels.has_column(y) ? E::get(x + y) : __builtin_nanf(""));
      out[k] =
          empty ? __builtin_nanf("") : static_cast<float>(logprob_from_stats(xy, r.m, r.s, inv_t));
    }
  };
  logprobs_row<E, kChange, kEntropy, kSquares>(a.rows, row, each);
}

// Upstream gradients of the labels in `g`, those of equal labels summed in the first of them.
inline void merge_equal(const OwnLabels& labels, double* g) {
  // A label whose bit is set may have come before.
  constexpr int64_t kBits = 4096;
  uint64_t seen[kBits / 64] = {};
  for (int64_t k = 0; k < labels.count; ++k) {
    const int64_t y = labels[k];
    if (!labels.has_column(y)) continue;
    uint64_t& word = seen[y % kBits / 64];
    const uint64_t bit = uint64_t{1} << (y % 64);
    if (word & bit) {
      int64_t first = 0;
      while (labels[first] != y) ++first;
      if (first < k) g[first] += g[k];
    }
    word |= bit;
  }
}

// The gradients at the labels' columns of a row with these upstream gradients into `g`; those of
// equal labels are right in the first of them.
template <class E, bool kChange>
inline void gradients_at_labels(const ManyLabelsBackwardArgs& a, int64_t row, double* g) {
  const LogprobsBackwardArgs& rows = a.rows;
  const int64_t i = row / rows.cols, j = row % rows.cols;
  const OwnLabels labels(a, row);
  const auto* given = row_at<F32>(a.grad_of_labels, i, j);
  for (int64_t k = 0; k < a.count; ++k) g[k] = a.grad_of_labels.given ? given[k] : 0.0f;
  merge_equal(labels, g);
  const double total = upstream_at(rows.grad_logprobs, i, j);
  const float h = upstream_at(rows.grad_entropy, i, j);
  const double of_lse = upstream_at(rows.grad_lse, i, j);
  const double of_collision = upstream_at(rows.grad_collision, i, j);
  const double collision = upstream_at(rows.collision, i, j);
  const bool others = total != 0.0 || h != 0.0f || of_lse != 0.0 || of_collision != 0.0;
  const double inv_t = 1.0 / row_temperature(rows, i, j);
  const float* stats = rows.stats + 3 * row;
  const LogitOptions<kChange> logits(rows.options);
  const auto* x = row_at<E>(rows.logits, i, j);
  for (int64_t k = 0; k < a.count; ++k) {
    const int64_t y = labels[k];
    if (!labels.has_column(y)) continue;
    if (g[k] == 0.0 && !others) continue;
    const float raw = E::get(x + y), xy = logits.value(raw);
    const double logprob = logprob_from_stats(xy, stats[0], stats[1], inv_t);
    const double distance = (static_cast<double>(xy) - stats[0]) * inv_t;
    double dz = label_gradient(logprob, distance, stats[2], g[k], h, inv_t);
    if (of_lse != 0.0 || of_collision != 0.0)
      dz += further_label_gradient(logprob, collision, of_lse, of_collision) * inv_t;
    if (total != g[k]) dz += other_labels_gradient(logprob, total - g[k]) * inv_t;
    g[k] = dz / logits.inverse_slope(raw);
  }
}

template <class E, bool kChange, bool kEntropy, bool kSquares = false>
void many_backward_row(const ManyLabelsBackwardArgs& a, int64_t row) {
  const LogprobsBackwardArgs& rows = a.rows;
  const int64_t i = row / rows.cols, j = row % rows.cols;
  const bool ignored = load_label(rows.labels, i, j) == rows.options.ignore_index;
  double* g = static_cast<double*>(rows.exec.scratch) + row * a.count;
  // Before the gradient may overwrite the logits.
  if (!ignored) gradients_at_labels<E, kChange>(a, row, g);
  logprobs_backward_row<E, kChange, kEntropy, kSquares>(rows, row);
  if (ignored) return;
  const OwnLabels labels(a, row);
  auto* out = row_at<E>(rows.grad_logits, i, j);
  // Of equal labels the first has the last word.
  for (int64_t k = a.count; k-- > 0;)
    if (const int64_t y = labels[k]; labels.has_column(y))
      E::set(out + y, static_cast<float>(g[k]));
}

template <class E, bool kChange, bool kEntropy>
struct ManyForward {
  static void row(const ManyLabelsArgs& a, int64_t r) { many_row<E, kChange, kEntropy>(a, r); }
};
template <class E, bool kChange, bool>
struct ManySquaresForward {
  static void row(const ManyLabelsArgs& a, int64_t r) { many_row<E, kChange, true, true>(a, r); }
};
template <class E, bool kChange, bool kEntropy>
struct ManyBackward {
  static void row(const ManyLabelsBackwardArgs& a, int64_t r) {
    many_backward_row<E, kChange, kEntropy>(a, r);
  }
};
template <class E, bool kChange, bool>
struct ManySquaresBackward {
  static void row(const ManyLabelsBackwardArgs& a, int64_t r) {
    many_backward_row<E, kChange, true, true>(a, r);
  }
};

Status many_logprobs(const ManyLabelsArgs& a) {
  const Status status = check_many(a);
  if (status.code != kOk) return status;
  const LogprobsArgs& rows = a.rows;
  const int32_t dtype = rows.logits.dtype;
  const auto row = rows.collision.given
                       ? pick<ManySquaresForward, ManyLabelsArgs>(dtype, rows.options, true)
                       : pick<ManyForward, ManyLabelsArgs>(dtype, rows.options, rows.entropy.given);
  const int64_t count = rows.rows * rows.cols;
  parallel_for(count, threads_of_rows(count, rows.vocab, rows.exec.threads),
               [&](int64_t r) { row(a, r); });
  return {};
}

Status many_logprobs_backward(const ManyLabelsBackwardArgs& given) {
  const Status status = check_many(given);
  if (status.code != kOk) return status;
  const Scratch<double> work(given.rows.rows * given.rows.cols * given.count);
  if (!work.data) return {kOutOfMemory, -1};
  ManyLabelsBackwardArgs a = given;
  a.rows.exec.scratch = work.data;
  const LogprobsBackwardArgs& rows = a.rows;
  const int32_t dtype = rows.logits.dtype;
  const bool in_place = rows.grad_logits.data == rows.logits.data;
  const auto row = rows.grad_collision.given ? pick<ManySquaresBackward, ManyLabelsBackwardArgs>(
                                                   dtype, rows.options, true)
                                             : pick<ManyBackward, ManyLabelsBackwardArgs>(
                                                   dtype, rows.options, rows.grad_entropy.given);
  const int32_t threads = threads_of_rows(rows.rows * rows.cols, rows.vocab, rows.exec.threads);
  for_gradient_rows(rows, in_place ? nullptr : rows.grad_logits.data, threads,
                    [&](const LogprobsBackwardArgs&, int64_t r) { row(a, r); });
  return {};
}

}  // namespace
}  // namespace rk
