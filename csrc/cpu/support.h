// token_logprobs over a support, the list of token ids that the sampler kept for each token.
//
// The kept logits of a token, gathered or computed by products, are contiguous in fp32; the kernels
// of logprobs.h process them as a row. Gradients of the head are weighted sums of rows: rows of the
// weight for a hidden state, hidden states for a row of the weight. One thread computes each sum,
// in the order of its entries.
#pragma once

namespace rk {
namespace {

inline int64_t load_index(const Tensor& t, int64_t i) {
  return t.dtype == kInt32 ? static_cast<const int32_t*>(t.data)[i * t.stride1]
                           : static_cast<const int64_t*>(t.data)[i * t.stride1];
}

struct Range {
  int64_t begin, end;
};
inline Range entries_of(const Support& s, int64_t token) {
  return {load_index(s.indptr, token), load_index(s.indptr, token + 1)};
}

inline Status check_indptr(const Support& s, int64_t tokens) {
  int64_t before = 0;
  for (int64_t n = 0; n <= tokens; ++n) {
    const int64_t at = load_index(s.indptr, n);
    if (at < before || (n == 0 && at != 0) || at > s.entries || (n == tokens && at != s.entries))
      return {kBadIndptr, n};
    before = at;
  }
  return {};
}

// Checks the token ids of one token. `seen` has one bit per token id and is all zero before and
// after; it is null where token ids are known to be distinct.
inline Status check_token_ids(const Support& s, Range range, int64_t vocab, uint64_t* seen) {
  for (int64_t e = range.begin; e < range.end; ++e) {
    const int64_t v = load_index(s.indices, e);
    if (v < 0 || v >= vocab) return {kIndexOutOfRange, e};
    if (!seen) continue;
    const uint64_t bit = uint64_t{1} << (v % 64);
    if (seen[v / 64] & bit) return {kIndexRepeated, e};
    seen[v / 64] |= bit;
  }
  if (seen)
    for (int64_t e = range.begin; e < range.end; ++e) seen[load_index(s.indices, e) / 64] = 0;
  return {};
}

// Finds bad data before it is used as an index. Entries of ignored tokens are not read.
template <class Args>
inline Status check_support(const Args& a, uint64_t* seen) {
  Status status = check_tokens(a);
  if (status.code == kOk) status = check_indptr(a.support, a.rows * a.cols);
  for (int64_t token = 0; token < a.rows * a.cols && status.code == kOk; ++token) {
    if (load_label(a.labels, token / a.cols, token % a.cols) == a.options.ignore_index) continue;
    status = check_token_ids(a.support, entries_of(a.support, token), a.vocab, seen);
  }
  return status;
}

// Products of R rows with x, with separate sums, while the next R rows are prefetched. The bits of
// a product do not depend on the other rows.
template <class E, int R>
inline void products(const typename E::Storage* x, const typename E::Storage* const* w,
                     const typename E::Storage* const* next, int64_t n, float* out) {
  Vec even[R], odd[R];
  for (int r = 0; r < R; ++r) even[r] = odd[r] = splat(0.0f);
  int64_t h = 0;
  for (; h + 2 * kLanes <= n; h += 2 * kLanes) {
    const Vec x0 = E::load(x + h), x1 = E::load(x + h + kLanes);
    for (int r = 0; r < R; ++r) {
      prefetch<E, 2>(next[r] + h);
      even[r] = fma(E::load(w[r] + h), x0, even[r]);
      odd[r] = fma(E::load(w[r] + h + kLanes), x1, odd[r]);
    }
  }
  for (; h < n; h += kLanes) {
    const int left = n - h < kLanes ? static_cast<int>(n - h) : kLanes;
    const Vec part = load_partial<E>(x + h, left, 0.0f);
    for (int r = 0; r < R; ++r) even[r] = fma(load_partial<E>(w[r] + h, left, 0.0f), part, even[r]);
  }
  for (int r = 0; r < R; ++r) out[r] = static_cast<float>(reduce_add(add(even[r], odd[r])));
}

// Writes the products of a token's hidden state with rows of the weight to kept[begin, end).
template <class E>
void project_entries(const SupportArgs& a, const typename E::Storage* x, Range range) {
  using S = typename E::Storage;
  constexpr int kRows = 4;
  const auto row = [&](int64_t e) {
    // Past the end the last row is prefetched again, to no effect.
    const int64_t entry = e < range.end ? e : range.end - 1;
    return row_at<E>(a.weight, 0, load_index(a.support.indices, entry));
  };
  const S *w[kRows], *next[kRows];
  if (range.begin < range.end)
    for (int r = 0; r < kRows; ++r) w[r] = row(range.begin + r);
  int64_t e = range.begin;
  for (; e + kRows <= range.end; e += kRows) {
    for (int r = 0; r < kRows; ++r) next[r] = row(e + kRows + r);
    products<E, kRows>(x, w, next, a.width, a.kept + e);
    for (int r = 0; r < kRows; ++r) w[r] = next[r];
  }
  for (int r = 0; e < range.end; ++e, ++r) products<E, 1>(x, w + r, w + r, a.width, a.kept + e);
}

// Writes the raw logits of a token's entries to kept[begin, end).
template <class E>
void keep_logits(const SupportArgs& a, int64_t i, int64_t j, Range range) {
  const auto index = [&](int64_t e) { return load_index(a.support.indices, e); };
  if (!a.weight.given) {
    const auto* x = row_at<E>(a.logits, i, j);
    for (int64_t e = range.begin; e < range.end; ++e) a.kept[e] = E::get(x + index(e));
    return;
  }
  // With width 0 neither operand has memory.
  if (a.width == 0)
    for (int64_t e = range.begin; e < range.end; ++e) a.kept[e] = 0.0f;
  else
    project_entries<E>(a, row_at<E>(a.logits, i, j), range);
  if (!a.bias.given) return;
  const auto* bias = static_cast<const float*>(a.bias.data);
  for (int64_t e = range.begin; e < range.end; ++e) a.kept[e] += bias[index(e) * a.bias.stride1];
}

// The position of the label among a token's entries.
inline int64_t label_entry(const Support& s, Range range, int64_t label) {
  for (int64_t e = range.begin; e < range.end; ++e)
    if (load_index(s.indices, e) == label) return e - range.begin;
  return kLabelElsewhere;
}

// Presents one token's kept logits as a row of logits, in a grid of one token.
template <class Args>
inline Args one_row(int64_t n, const float* kept, const int64_t* label, RowOptions options,
                    double temperature) {
  Args row{};
  row.rows = row.cols = 1;
  row.vocab = n;
  row.logits = {const_cast<float*>(kept), kFloat32, 0, 0};
  row.labels = {const_cast<int64_t*>(label), kInt64, 0, 0};
  row.options = options;
  row.options.temperature = temperature;
  // Differs from every position of an entry and from kLabelElsewhere.
  row.options.ignore_index = -1;
  return row;
}

template <class E, bool kChange, bool kEntropy>
void support_row(const SupportArgs& a, int64_t token) {
  const int64_t i = token / a.cols, j = token % a.cols;
  float* logprob = static_cast<float*>(a.logprobs.data) + token;
  float* entropy = kEntropy ? static_cast<float*>(a.entropy.data) + token : nullptr;
  float* stats = a.stats + 3 * token;
  const int64_t label = load_label(a.labels, i, j);
  if (label == a.options.ignore_index) {
    *logprob = 0.0f;
    if (kEntropy) *entropy = 0.0f;
    stats[0] = 0.0f, stats[1] = 1.0f, stats[2] = 0.0f;
    return;
  }
  const Range range = entries_of(a.support, token);
  keep_logits<E>(a, i, j, range);
  const int64_t entry = label_entry(a.support, range, label);
  auto row = one_row<LogprobsArgs>(range.end - range.begin, a.kept + range.begin, &entry, a.options,
                                   row_temperature(a, i, j));
  row.logprobs.data = logprob;
  row.entropy.data = entropy;
  row.stats = stats;
  logprobs_row<F32, kChange, kEntropy>(row, 0);
  // The logit of a label that was not kept is -inf.
  if (entry == kLabelElsewhere && stats[1] == stats[1]) *logprob = -__builtin_inff();
}

template <bool kChange, bool kEntropy>
void support_gradient(const SupportBackwardArgs& a, int64_t token, Range range) {
  const int64_t i = token / a.cols, j = token % a.cols;
  const int64_t label = load_label(a.labels, i, j), n = range.end - range.begin;
  float g = upstream_at(a.grad_logprobs, i, j), h = upstream_at(a.grad_entropy, i, j);
  if (label == a.options.ignore_index || n == 0 || (g == 0.0f && h == 0.0f)) {
    // If all supports are empty, dz has no memory, and memset does not accept null.
    if (n > 0) memset(a.dz + range.begin, 0, sizeof(float) * static_cast<size_t>(n));
    return;
  }
  const int64_t entry = label_entry(a.support, range, label);
  auto row = one_row<LogprobsBackwardArgs>(n, a.kept + range.begin, &entry, a.options,
                                           row_temperature(a, i, j));
  row.stats = a.stats + 3 * token;
  row.grad_logprobs = {&g, kFloat32, 0, 0, true};
  row.grad_entropy = {&h, kFloat32, 0, 0, true};
  row.grad_logits = {a.dz + range.begin, kFloat32, 0, 0};
  logprobs_backward_row<F32, kChange, kEntropy>(row, 0);
}

template <class E, bool kChange, bool kEntropy>
void support_backward_row(const SupportBackwardArgs& a, int64_t token) {
  const Range range = entries_of(a.support, token);
  support_gradient<kChange, kEntropy>(a, token, range);
  if (!a.grad_logits.given) return;
  auto* out = row_at<E>(a.grad_logits, token / a.cols, token % a.cols);
  memset(out, 0, sizeof *out * static_cast<size_t>(a.vocab));
  for (int64_t e = range.begin; e < range.end; ++e)
    // A token with zero gradient may be ignored, and then its entries were not checked.
    if (a.dz[e] != 0.0f) E::set(out + load_index(a.support.indices, e), a.dz[e]);
}

template <class E, bool kChange, bool kEntropy>
struct SupportForward {
  static void row(const SupportArgs& a, int64_t r) { support_row<E, kChange, kEntropy>(a, r); }
};
template <class E, bool kChange, bool kEntropy>
struct SupportBackward {
  static void row(const SupportBackwardArgs& a, int64_t r) {
    support_backward_row<E, kChange, kEntropy>(a, r);
  }
};

Status support_logprobs(const SupportArgs& a) {
  const Scratch<uint64_t> seen((a.vocab + 63) / 64);
  if (!seen.data) return {kOutOfMemory, -1};
  const Status status = check_support(a, seen.data);
  if (status.code != kOk) return status;
  const auto row = pick<SupportForward, SupportArgs>(a.logits.dtype, a.options, a.entropy.given);
  parallel_for(a.rows * a.cols, a.exec.threads, [&](int64_t r) { row(a, r); });
  return {};
}

Status support_backward(const SupportBackwardArgs& a) {
  const Status status = check_support(a, nullptr);
  if (status.code != kOk) return status;
  const auto row = pick<SupportBackward, SupportBackwardArgs>(a.grad_logits.dtype, a.options,
                                                              a.grad_entropy.given);
  for_gradient_rows(a, a.grad_logits.data, row);
  return {};
}

// A term of a sum: factor * row.
template <class E>
struct Term {
  const typename E::Storage* row;
  float factor;
};

// out[0, width) = sum over entries of factor * row, in order, as a sum of partial sums of kTerms
// terms. So a token id kept by thousands of tokens rounds no worse than one kept by a few. Rows
// with factor 0 are not read. kVecs vectors of a sum stay in registers over all rows.
template <class E, class At>
inline void sum_rows(Range range, int64_t width, typename E::Storage* out, const At& at) {
  constexpr int kVecs = 8, kAhead = 4, kTerms = 128;
  for (int64_t h = 0; h < width; h += kVecs * kLanes) {
    Vec total[kVecs];
    for (auto& v : total) v = splat(0.0f);
    const bool whole = h + kVecs * kLanes <= width;
    for (int64_t first = range.begin; first < range.end; first += kTerms) {
      Vec sum[kVecs];
      for (auto& v : sum) v = splat(0.0f);
      const int64_t end = first + kTerms < range.end ? first + kTerms : range.end;
      for (int64_t e = first; e < end; ++e) {
        if (e + kAhead < range.end) {
          const Term<E> later = at(e + kAhead);
          if (later.factor != 0.0f) prefetch<E, kVecs>(later.row + h);
        }
        const Term<E> term = at(e);
        if (term.factor == 0.0f) continue;
        const Vec factor = splat(term.factor);
        if (whole) {
          for (int u = 0; u < kVecs; ++u)
            sum[u] = fma(factor, E::load(term.row + h + u * kLanes), sum[u]);
          continue;
        }
        for (int u = 0; u < kVecs && h + u * kLanes < width; ++u) {
          const int64_t left = width - h - u * kLanes;
          const auto* p = term.row + h + u * kLanes;
          const Vec x =
              left >= kLanes ? E::load(p) : load_partial<E>(p, static_cast<int>(left), 0.0f);
          sum[u] = fma(factor, x, sum[u]);
        }
      }
      for (int u = 0; u < kVecs; ++u) total[u] = add(total[u], sum[u]);
    }
    for (int u = 0; u < kVecs && h + u * kLanes < width; ++u) {
      const int64_t left = width - h - u * kLanes;
      if (left >= kLanes)
        E::store(out + h + u * kLanes, total[u]);
      else
        store_partial<E>(out + h + u * kLanes, total[u], static_cast<int>(left));
    }
  }
}

template <class E>
void hidden_gradient(const SupportHeadArgs& a, int64_t token) {
  auto* out = static_cast<typename E::Storage*>(a.grad_hidden.data) + token * a.width;
  sum_rows<E>(entries_of(a.support, token), a.width, out, [&](int64_t e) {
    const float factor = a.dz[e];
    // An entry with factor 0 may have an unchecked index.
    if (factor == 0.0f) return Term<E>{nullptr, 0.0f};
    return Term<E>{row_at<E>(a.weight, 0, load_index(a.support.indices, e)), factor};
  });
}

template <class E>
void weight_gradient(const SupportHeadArgs& a, int64_t token_id) {
  const Range range{a.starts[token_id], a.starts[token_id + 1]};
  if (a.grad_weight.given) {
    auto* out = static_cast<typename E::Storage*>(a.grad_weight.data) + token_id * a.width;
    sum_rows<E>(range, a.width, out, [&](int64_t u) {
      const SupportUse& use = a.uses[u];
      return Term<E>{row_at<E>(a.hidden, use.token / a.cols, use.token % a.cols), use.dz};
    });
  }
  if (a.grad_bias.given) {
    double sum = 0.0;
    for (int64_t u = range.begin; u < range.end; ++u) sum += a.uses[u].dz;
    static_cast<float*>(a.grad_bias.data)[token_id] = static_cast<float>(sum);
  }
}

// Groups the entries with a gradient by token id, in token order, by a counting sort.
inline void sort_uses(const SupportHeadArgs& a) {
  for (int64_t v = 0; v <= a.vocab; ++v) a.starts[v] = 0;
  const auto index = [&](int64_t e) { return load_index(a.support.indices, e); };
  for (int64_t e = 0; e < a.support.entries; ++e)
    if (a.dz[e] != 0.0f) ++a.starts[index(e)];
  int64_t total = 0;
  for (int64_t v = 0; v <= a.vocab; ++v) {
    const int64_t count = a.starts[v];
    a.starts[v] = total;
    total += count;
  }
  // Filling advances each start to its end, which is the start of the next token id.
  for (int64_t token = 0; token < a.rows * a.cols; ++token) {
    const Range range = entries_of(a.support, token);
    for (int64_t e = range.begin; e < range.end; ++e)
      if (a.dz[e] != 0.0f) a.uses[a.starts[index(e)]++] = {token, a.dz[e]};
  }
  memmove(a.starts + 1, a.starts, sizeof(int64_t) * static_cast<size_t>(a.vocab));
  a.starts[0] = 0;
}

// Must follow support_backward, which checks the support and writes `dz`.
Status support_head_backward(const SupportHeadArgs& a) {
  const auto each = [&](auto element) {
    using E = decltype(element);
    if (a.grad_hidden.given)
      parallel_for(a.rows * a.cols, a.exec.threads, [&](int64_t n) { hidden_gradient<E>(a, n); });
    if (!a.grad_weight.given && !a.grad_bias.given) return;
    sort_uses(a);
    const int64_t row_bytes = a.width * dtype_size(a.grad_weight.dtype);
    const FreshPages pages(a.grad_weight.data, a.vocab * row_bytes);
    // No token uses most rows of the weight; these rows only cost writing zeros.
    constexpr int64_t kRows = 16;
    parallel_for((a.vocab + kRows - 1) / kRows, a.exec.threads, [&](int64_t chunk) {
      const int64_t end = (chunk + 1) * kRows < a.vocab ? (chunk + 1) * kRows : a.vocab;
      pages.prepare(chunk * kRows * row_bytes, (end - chunk * kRows) * row_bytes);
      for (int64_t v = chunk * kRows; v < end; ++v) weight_gradient<E>(a, v);
    });
  };
  for_dtype(a.hidden.dtype, each);
  return {};
}

}  // namespace
}  // namespace rk
