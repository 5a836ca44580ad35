// token_logprobs over a support: the tokens that the sampler kept, a list per token.
//
// One warp computes an entry's product with the weight; one block computes what follows from a
// token's list. The head's gradients are weighted sums of gathered rows: a thread owns columns and
// adds the entries in order. Bits of an entry or a list do not depend on its neighbours. Bad data
// makes its token NaN; a bad indptr makes all tokens NaN.
#include "rows.cuh"

namespace rk::cuda {
namespace {

constexpr int kCheckThreads = 1024, kProductThreads = 256, kListThreads = 128, kSumThreads = 128;
// Entries whose sum is taken by itself before it joins the sum of a list, and those in flight.
constexpr int kTerms = 128, kAhead = 4;
// Pairs of 16 bytes that a lane of a product has in flight.
constexpr int kPairs = 2;

// Entries [begin, end) of list i, inside [0, entries) whatever `starts` says.
struct List {
  int64_t begin, end;
};
__device__ __forceinline__ List list_at(const Tensor& starts, int64_t i, int64_t entries) {
  int64_t begin = load_integer(starts, i * starts.stride1);
  int64_t end = load_integer(starts, (i + 1) * starts.stride1);
  begin = begin < 0 ? 0 : (begin > entries ? entries : begin);
  end = end < begin ? begin : (end > entries ? entries : end);
  return {begin, end};
}
__device__ __forceinline__ int64_t kept_token(const Support& s, int64_t entry) {
  return load_integer(s.indices, entry * s.indices.stride1);
}

// exp(rate d), exactly 0 below the normal floats.
__device__ __forceinline__ float weight_of(float d, float rate) {
  return d * rate < kLowest ? 0.0f : exp2_fast(d * (rate * kLog2e));
}

// 0, or NaN if indptr does not lead from 0 to the number of entries without decreasing; one block.
__global__ void __launch_bounds__(kCheckThreads)
    check_kernel(const Support s, int64_t tokens, float* poison) {
  __shared__ int shared[kCheckThreads / kWarp];
  int wrong = 0;
  for (int64_t i = threadIdx.x; i <= tokens; i += kCheckThreads) {
    const int64_t at = load_integer(s.indptr, i * s.indptr.stride1);
    const int64_t before = i > 0 ? load_integer(s.indptr, (i - 1) * s.indptr.stride1) : 0;
    wrong += at < before || (i == 0 && at != 0) || (i == tokens && at != s.entries) ? 1 : 0;
  }
  wrong = block_reduce<kCheckThreads>(wrong, Sum{}, shared);
  if (threadIdx.x == 0) *poison = wrong ? __builtin_nanf("") : 0.0f;
}

// Whether every row of `t` starts at a multiple of 16 bytes.
bool rows_aligned(const Tensor& t, int64_t rows, int64_t cols) {
  const int64_t size = element_size(t.dtype);
  return reinterpret_cast<uintptr_t>(t.data) % 16 == 0 &&
         (rows == 1 || t.stride0 * size % 16 == 0) && (cols == 1 || t.stride1 * size % 16 == 0);
}

// 16 bytes of a row from `column`; 0 beyond its end.
template <class E>
__device__ __forceinline__ Pack<E> load_columns(const typename E::Storage* row, int64_t column,
                                                int64_t width, bool aligned) {
  Pack<E> x{};
  if (aligned && column + kWidth<E> <= width) {
    x.load(row + column);
  } else {
#pragma unroll
    for (int w = 0; w < kWidth<E>; ++w)
      if (column + w < width) x.set(w, row[column + w]);
  }
  return x;
}

// Raw logits of the entries; a warp to each.
template <class E>
__global__ void __launch_bounds__(kProductThreads)
    products_kernel(const SupportArgs a, bool aligned) {
  const int64_t entry =
      static_cast<int64_t>(blockIdx.x) * (kProductThreads / kWarp) + threadIdx.x / kWarp;
  if (entry >= a.support.entries) return;
  // The token: the first whose list ends behind the entry.
  int64_t low = 0, high = a.rows * a.cols;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (load_integer(a.support.indptr, (middle + 1) * a.support.indptr.stride1) <= entry)
      low = middle + 1;
    else
      high = middle;
  }
  const int64_t id = kept_token(a.support, entry);
  // Entries of ignored tokens are not read. An id outside the vocabulary has no row.
  if (low >= a.rows * a.cols || row_label(a, low) == a.options.ignore_index || id < 0 ||
      id >= a.vocab)
    return;
  using S = typename E::Storage;
  const S* x = static_cast<const S*>(a.logits.data) + token_at(a.logits, low, a.cols);
  const S* y = static_cast<const S*>(a.weight.data) + id * a.weight.stride1;
  float sum = 0.0f;
  const auto add = [&](const Pack<E>& p, const Pack<E>& q) {
#pragma unroll
    for (int w = 0; w < kWidth<E>; ++w) sum = fmaf(p.get(w), q.get(w), sum);
  };
  constexpr int kStep = kWarp * kWidth<E>;
  int64_t c = threadIdx.x % kWarp * kWidth<E>;
  // All loads of an iteration in flight.
  if (aligned) {
    for (; c + (kPairs - 1) * kStep + kWidth<E> <= a.width; c += kPairs * kStep) {
      Pack<E> p[kPairs], q[kPairs];
#pragma unroll
      for (int k = 0; k < kPairs; ++k) p[k].load(x + c + k * kStep), q[k].load(y + c + k * kStep);
#pragma unroll
      for (int k = 0; k < kPairs; ++k) add(p[k], q[k]);
    }
  }
  for (; c < a.width; c += kStep)
    add(load_columns<E>(x, c, a.width, aligned), load_columns<E>(y, c, a.width, aligned));
  sum = warp_reduce(sum, Sum{});
  if (threadIdx.x % kWarp != 0) return;
  if (a.bias.given) sum += static_cast<const float*>(a.bias.data)[id * a.bias.stride1];
  a.kept[entry] = sum;
}

// Log-probability, entropy and statistics of a token; without a weight also its kept logits.
template <class E>
__global__ void __launch_bounds__(kListThreads)
    rows_kernel(const SupportArgs a, const float* poison) {
  constexpr int kWarps = kListThreads / kWarp;
  __shared__ float tops[kWarps], owns[kWarps];
  __shared__ int wrongs[kWarps];
  __shared__ double sums[2][kWarps];
  const int64_t row = blockIdx.x, label = row_label(a, row);
  float m = 0.0f, s = 1.0f, mean = 0.0f, logprob = 0.0f, entropy = 0.0f;
  if (label != a.options.ignore_index) {
    const double temperature = row_temperature(a, row), rate = 1.0 / temperature;
    const float rate32 = static_cast<float>(rate);
    const LogitOptions options(a.options);
    const List list = list_at(a.support.indptr, row, a.support.entries);
    const auto* x =
        static_cast<const typename E::Storage*>(a.logits.data) + token_at(a.logits, row, a.cols);
    const float minus_inf = -__builtin_inff();
    float own = minus_inf;
    int wrong = 0;
    m = minus_inf;
    for (int64_t e = list.begin + threadIdx.x; e < list.end; e += kListThreads) {
      const int64_t id = kept_token(a.support, e);
      const bool known = id >= 0 && id < a.vocab;
      wrong += known ? 0 : 1;
      float z = minus_inf;
      if (!a.weight.given)
        a.kept[e] = z = known ? E::get(x[id]) : minus_inf;
      else if (known)
        z = a.kept[e];
      z = options(z).z;
      m = fmaxf(m, z);
      if (id == label) own = fmaxf(own, z);
    }
    m = block_reduce<kListThreads>(m, Max{}, tops);
    own = block_reduce<kListThreads>(own, Max{}, owns);
    wrong = block_reduce<kListThreads>(wrong, Sum{}, wrongs);
    double total = 0.0, weighted = 0.0;
    for (int64_t e = list.begin + threadIdx.x; e < list.end; e += kListThreads) {
      const float d = options(a.kept[e]).z - m;
      const float weight = weight_of(d, rate32);
      total += weight;
      weighted += weight == 0.0f ? 0.0 : static_cast<double>(weight) * d;
    }
    total = block_reduce<kListThreads>(total, Sum{}, sums[0]);
    weighted = block_reduce<kListThreads>(weighted, Sum{}, sums[1]);
    // The token is NaN if its label or a kept token id is outside the vocabulary, if its
    // temperature is bad, if indptr is, or if no token was kept.
    const bool good = label >= 0 && label < a.vocab && good_temperature(temperature) &&
                      wrong == 0 && m > minus_inf;
    const float nan = good ? *poison : __builtin_nanf("");
    s = static_cast<float>(total) + nan;
    // A label that was not kept is at -inf.
    logprob = static_cast<float>(logprob_from_stats(own, m, total, rate)) + nan;
    mean = static_cast<float>(weighted * rate / total) + nan;
    entropy = static_cast<float>(log(total) - weighted * rate / total) + nan;
  }
  if (threadIdx.x != 0) return;
  static_cast<float*>(a.logprobs.data)[row] = logprob;
  if (a.entropy.given) static_cast<float*>(a.entropy.data)[row] = entropy;
  float* stats = a.stats + 3 * row;
  stats[0] = m, stats[1] = s, stats[2] = mean;
}

// Gradient of a token's kept logits; also into its row of `grad_logits`, of zeros, if there is one.
__global__ void __launch_bounds__(kListThreads) gradient_kernel(const SupportBackwardArgs a) {
  __shared__ float owns[kListThreads / kWarp];
  const int64_t row = blockIdx.x, label = row_label(a, row);
  const float g = upstream_at(a.grad_logprobs, row, a.cols);
  const float h = upstream_at(a.grad_entropy, row, a.cols);
  const List list = list_at(a.support.indptr, row, a.support.entries);
  if (label == a.options.ignore_index || (g == 0.0f && h == 0.0f)) {
    for (int64_t e = list.begin + threadIdx.x; e < list.end; e += kListThreads) a.dz[e] = 0.0f;
    return;
  }
  const double rate = 1.0 / row_temperature(a, row);
  const float rate32 = static_cast<float>(rate);
  const LogitOptions options(a.options);
  const float* stats = a.stats + 3 * row;
  const float m = stats[0];
  const double s = stats[1], mean = stats[2];
  // dz = e (a0 + a1 (z - m) / T): the entropy's part is linear in log p.
  const double each = rate / s;
  const float a0 = static_cast<float>((-g + h * mean) * each);
  const float a1 = static_cast<float>(-h * each);
  float own = -__builtin_inff();
  for (int64_t e = list.begin + threadIdx.x; e < list.end; e += kListThreads)
    if (kept_token(a.support, e) == label) own = fmaxf(own, a.kept[e]);
  own = block_reduce<kListThreads>(own, Max{}, owns);
  const Logit at_own = options(own);
  const double distance = (static_cast<double>(at_own.z) - m) * rate;
  const double logprob = logprob_from_stats(at_own.z, m, s, rate);
  const float at_label =
      static_cast<float>(label_gradient(logprob, distance, mean, g, h, rate) * at_own.slope);
  for (int64_t e = list.begin + threadIdx.x; e < list.end; e += kListThreads) {
    const int64_t id = kept_token(a.support, e);
    const bool known = id >= 0 && id < a.vocab;
    float value = 0.0f;
    if (known) {
      const Logit at = options(a.kept[e]);
      const float d = at.z - m;
      value = weight_of(d, rate32) * (h != 0.0f ? fmaf(a1, d * rate32, a0) : a0) * at.slope;
      // Exactly zero, also at -inf, where e d would be NaN.
      if (d * rate32 < kLowest) value = 0.0f;
      if (id == label) value = at_label;
    }
    a.dz[e] = value;
    if (known && a.grad_logits.given)
      store_float(a.grad_logits, token_at(a.grad_logits, row, a.cols) + id, value);
  }
}

// Columns of one row of `out`: the sum of dz times rows of `source` over a list of entries.
struct RowSums {
  Tensor source;
  Divisor cols;
  int64_t limit, width, entries;
  // List i is starts[i] to starts[i + 1], in `order` if `sorted`; `rows` is the row of each entry.
  Tensor starts;
  bool sorted;
  const int64_t* order;
  Tensor rows;
  const float* dz;
  Tensor out, bias;
};

// Entries of a list, their factors, and where their rows start in the source.
template <class S>
struct Terms {
  float factors[kAhead];
  const S* rows[kAhead];

  // Those from `first` on, before `end`. Each load is in flight with its likes: no branch between.
  __device__ __forceinline__ Terms(const RowSums& a, int64_t first, int64_t end) {
    int64_t entries[kAhead], of[kAhead];
#pragma unroll
    for (int k = 0; k < kAhead; ++k) entries[k] = first + k < end ? first + k : end - 1;
    if (a.sorted) {
#pragma unroll
      for (int k = 0; k < kAhead; ++k) entries[k] = a.order[entries[k]];
    }
    load_integers(a.rows, entries, of);
#pragma unroll
    for (int k = 0; k < kAhead; ++k) factors[k] = a.dz[entries[k]];
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      // An entry with a factor of 0 may have an id outside the vocabulary: no row to read.
      const bool there = first + k < end && of[k] >= 0 && of[k] < a.limit;
      const uint32_t row = there ? static_cast<uint32_t>(of[k]) : 0u;
      const uint32_t high = a.cols.quotient(row), low = row - high * a.cols.divisor;
      rows[k] =
          static_cast<const S*>(a.source.data) + high * a.source.stride0 + low * a.source.stride1;
      // The product of this zero and 0, added to a sum, changes no bit of any.
      if (!there || factors[k] == 0.0f) factors[k] = -0.0f;
    }
  }
  __device__ __forceinline__ bool reads(int k) const { return factors[k] != 0.0f; }

 private:
  // Numbers `places` of a tensor.
  template <class T>
  static __device__ __forceinline__ void load_as(const Tensor& t, const int64_t (&places)[kAhead],
                                                 int64_t (&x)[kAhead]) {
#pragma unroll
    for (int k = 0; k < kAhead; ++k) x[k] = static_cast<const T*>(t.data)[places[k] * t.stride1];
  }
  static __device__ __forceinline__ void load_integers(const Tensor& t,
                                                       const int64_t (&places)[kAhead],
                                                       int64_t (&x)[kAhead]) {
    switch (t.dtype) {
      case kInt64: return load_as<int64_t>(t, places, x);
      case kInt32: return load_as<int32_t>(t, places, x);
      default: return load_as<uint8_t>(t, places, x);
    }
  }
};

template <class E>
__global__ void __launch_bounds__(kSumThreads, 4)
    sums_kernel(const RowSums a, uint32_t blocks, bool aligned) {
  using S = typename E::Storage;
  __shared__ double shared[kSumThreads / kWarp];
  const int64_t i = blockIdx.x / blocks;
  const uint32_t block = blockIdx.x % blocks;
  const int64_t column = (static_cast<int64_t>(block) * kSumThreads + threadIdx.x) * kWidth<E>;
  const List list = list_at(a.starts, i, a.entries);
  if (a.out.given) {
    const bool whole = aligned && column + kWidth<E> <= a.width;
    float total[kWidth<E>] = {};
    for (int64_t first = list.begin; first < list.end; first += kTerms) {
      const int64_t end = first + kTerms < list.end ? first + kTerms : list.end;
      float sum[kWidth<E>] = {};
      for (int64_t j = first; j < end; j += kAhead) {
        const Terms<S> of(a, j, end);
        Pack<E> terms[kAhead] = {};
        if (whole) {
#pragma unroll
          for (int k = 0; k < kAhead; ++k)
            if (of.reads(k)) terms[k].load(of.rows[k] + column);
        } else {
#pragma unroll
          for (int k = 0; k < kAhead; ++k)
            if (of.reads(k)) terms[k] = load_columns<E>(of.rows[k], column, a.width, false);
        }
#pragma unroll
        for (int k = 0; k < kAhead; ++k)
#pragma unroll
          for (int w = 0; w < kWidth<E>; ++w) sum[w] = fmaf(of.factors[k], terms[k].get(w), sum[w]);
      }
#pragma unroll
      for (int w = 0; w < kWidth<E>; ++w) total[w] += sum[w];
    }
    S* out = static_cast<S*>(a.out.data) + i * a.width + column;
    if (column + kWidth<E> <= a.width && misaligned(out) == 0) {
      Pack<E> pack;
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        float both[kPerWord<E>];
#pragma unroll
        for (int h = 0; h < kPerWord<E>; ++h) both[h] = total[w * kPerWord<E> + h];
        pack.words[w] = E::word(both);
      }
      pack.store(out);
    } else {
#pragma unroll
      for (int w = 0; w < kWidth<E>; ++w)
        if (column + w < a.width) out[w] = E::put(total[w]);
    }
  }
  if (!a.bias.given || block != 0) return;
  double sum = 0.0;
  for (int64_t j = list.begin + threadIdx.x; j < list.end; j += kSumThreads)
    sum += a.dz[a.sorted ? a.order[j] : j];
  sum = block_reduce<kSumThreads>(sum, Sum{}, shared);
  if (threadIdx.x == 0) static_cast<float*>(a.bias.data)[i] = static_cast<float>(sum);
}

template <class E>
void enqueue_sums(const Exec& exec, const RowSums& a, int64_t lists) {
  const int64_t columns = kSumThreads * kWidth<E>;
  // At least one block per row: the bias has a gradient even if the rows have no columns.
  const int64_t blocks = a.out.given && a.width > 0 ? ceil_div(a.width, columns) : 1;
  const bool aligned = a.out.given && rows_aligned(a.source, 2, 2);
  RK_ENQUEUE(exec, lists * blocks, kSumThreads, sums_kernel<E>, a, static_cast<uint32_t>(blocks),
             aligned);
}

}  // namespace

int64_t support_logprobs_scratch() { return 16; }

Status support_logprobs(const SupportArgs& a) {
  const OnDevice guard(a.exec);
  const int64_t tokens = a.rows * a.cols;
  auto* poison = static_cast<float*>(a.exec.scratch);
  RK_ENQUEUE(a.exec, 1, kCheckThreads, check_kernel, a.support, tokens, poison);
  for_dtype(a.logits.dtype, [&](auto element) {
    using E = decltype(element);
    const bool aligned =
        rows_aligned(a.logits, a.rows, a.cols) && rows_aligned(a.weight, 1, a.vocab);
    if (a.weight.given)
      RK_ENQUEUE(a.exec, ceil_div(a.support.entries, kProductThreads / kWarp), kProductThreads,
                 products_kernel<E>, a, aligned);
    RK_ENQUEUE(a.exec, tokens, kListThreads, rows_kernel<E>, a, poison);
  });
  return {};
}

Status support_backward(const SupportBackwardArgs& a) {
  const OnDevice guard(a.exec);
  RK_ENQUEUE(a.exec, a.rows * a.cols, kListThreads, gradient_kernel, a);
  return {};
}

Status support_head_backward(const SupportHeadArgs& a) {
  const OnDevice guard(a.exec);
  for_dtype(a.hidden.dtype, [&](auto element) {
    using E = decltype(element);
    if (a.grad_hidden.given)
      enqueue_sums<E>(
          a.exec,
          {a.weight, Divisor(a.vocab), a.vocab, a.width, a.support.entries, a.support.indptr, false,
           nullptr, a.support.indices, a.dz, a.grad_hidden, Tensor{}},
          a.rows * a.cols);
    if (a.grad_weight.given || a.grad_bias.given)
      enqueue_sums<E>(a.exec,
                      {a.hidden,
                       Divisor(a.cols),
                       a.rows * a.cols,
                       a.width,
                       a.support.entries,
                       {a.starts, kInt64, 0, 1},
                       true,
                       a.order,
                       {const_cast<int64_t*>(a.owner), kInt64, 0, 1},
                       a.dz,
                       a.grad_weight,
                       a.grad_bias},
                      a.vocab);
  });
  return {};
}

}  // namespace rk::cuda
