// token_logprobs with several labels per token: the kernels of a row without a label, and beside
// them one that reads the labels' logits and one that writes their gradients. A warp to a row.
#include "logprobs.cuh"

namespace rk::cuda {
namespace {

// The labels of a row, a lane's every kWarp-th.
struct OwnLabels {
  const Tensor& t;
  int64_t at, ignore_index, vocab;

  template <class Args>
  __device__ __forceinline__ OwnLabels(const Args& a, int64_t row)
      : t(a.labels),
        at(token_at(a.labels, row, a.rows.cols)),
        ignore_index(a.ignore_index),
        vocab(a.rows.vocab) {}

  __device__ __forceinline__ int64_t operator[](int64_t k) const { return load_integer(t, at + k); }
  // Whether it has a column here.
  __device__ __forceinline__ bool has_column(int64_t y) const {
    return y != ignore_index && is_known(y, vocab);
  }
};

template <class Args>
__device__ __forceinline__ bool is_ignored(const Args& rows, int64_t row) {
  return row_label(rows, row) == rows.options.ignore_index;
}

// After the kernels of token_logprobs: the log-probability of each label from the sums of the
// tiles.
template <class E>
__global__ void __launch_bounds__(kCombineThreads)
    labels_kernel(const ManyLabelsArgs a, uint32_t tiles, const float4* partials) {
  const LogprobsArgs& rows = a.rows;
  const int64_t row = row_of_warp();
  if (row >= rows.rows * rows.cols) return;
  const int lane = threadIdx.x % kWarp;
  float* out = a.of_labels + row * a.count;
  if (is_ignored(rows, row)) {
    for (int64_t k = lane; k < a.count; k += kWarp) out[k] = 0.0f;
    return;
  }
  const double rate = 1.0 / row_temperature(rows, row);
  const Sums<double> r = combine_tiles(partials + row * tiles, tiles, static_cast<float>(rate));
  // A row that is poisoned has poisoned statistics.
  const float s = rows.stats[3 * row + 1], poison = s == s ? 0.0f : s;
  const OwnLabels labels(a, row);
  const auto* x = row_logits<E>(rows, row);
  const LogitOptions logits(rows.options);
  for (int64_t k = lane; k < a.count; k += kWarp) {
    const int64_t y = labels[k];
    float found = y == labels.ignore_index ? 0.0f : __builtin_nanf("");
    if (labels.has_column(y)) {
      const float z = logits(E::get(x[y])).z;
      found = static_cast<float>(logprob_from_stats(z, r.m, r.s, rate)) + poison;
    }
    out[k] = found;
  }
}

// Labels that are compared at a time, by their lower halves, with those of a warp's lanes.
constexpr int kCompared = 128;

// The sum of given[other] over the row's labels `other` that equal y, in order; 0 where y has no
// column. All lanes of a warp take part; `low` is the warp's own.
__device__ __forceinline__ double sum_of_equals(const OwnLabels& labels, int64_t count, int64_t y,
                                                const float* given, uint32_t* low) {
  const uint32_t own = static_cast<uint32_t>(y);
  double sum = 0.0;
  for (int64_t start = 0; start < count; start += kCompared) {
    const int64_t left = count - start;
    __syncwarp();
#pragma unroll
    for (int i = threadIdx.x % kWarp; i < kCompared; i += kWarp)
      low[i] = i < left ? static_cast<uint32_t>(labels[start + i]) : 0xffffffffu;
    __syncwarp();
    for (int first = 0; first < kCompared && first < left; first += kWarp) {
      uint32_t alike = 0;
#pragma unroll
      for (int i = 0; i < kWarp; i += 4) {
        const uint4 x = *reinterpret_cast<const uint4*>(low + first + i);
        alike |= x.x == own ? 1u << i : 0u;
        alike |= x.y == own ? 2u << i : 0u;
        alike |= x.z == own ? 4u << i : 0u;
        alike |= x.w == own ? 8u << i : 0u;
      }
      if (!labels.has_column(y)) alike = 0;
      for (; alike != 0; alike &= alike - 1) {
        const int64_t other = start + first + __ffs(static_cast<int>(alike)) - 1;
        if (other < count && labels[other] == y) sum += given[other];
      }
    }
  }
  return sum;
}

// Before the kernels of its backward: the gradient at each label's column into `work`. Equal labels
// all get that of the sum of their upstream gradients.
template <class E>
__global__ void __launch_bounds__(kCombineThreads, 8)
    label_gradients_kernel(const ManyLabelsBackwardArgs a, double* of_all) {
  alignas(16) __shared__ uint32_t low[kCombineThreads / kWarp][kCompared];
  const LogprobsBackwardArgs& rows = a.rows;
  const int64_t row = row_of_warp();
  if (row >= rows.rows * rows.cols || is_ignored(rows, row)) return;
  const OwnLabels labels(a, row);
  // Each lane's own sums first, into `work`: with all else that a row needs they would spill.
  double* work = of_all + row * a.count;
  const bool given = a.grad_of_labels.given;
  if (given) {
    const float* grads = static_cast<const float*>(a.grad_of_labels.data) +
                         token_at(a.grad_of_labels, row, rows.cols);
    for (int64_t first = 0; first < a.count; first += kWarp) {
      const int64_t k = first + threadIdx.x % kWarp;
      const int64_t y = k < a.count ? labels[k] : labels.ignore_index;
      const double sum = sum_of_equals(labels, a.count, y, grads, low[threadIdx.x / kWarp]);
      if (k < a.count) work[k] = sum;
    }
  }
  const auto upstream = [&](const Tensor& g) { return upstream_at(g, row, rows.cols); };
  const double total = upstream(rows.grad_logprobs);
  const float h = upstream(rows.grad_entropy), of_lse = upstream(rows.grad_lse);
  const float of_collision = upstream(rows.grad_collision);
  const bool others = total != 0.0 || h != 0.0f || of_lse != 0.0f || of_collision != 0.0f;
  const double rate = 1.0 / row_temperature(rows, row);
  const float* stats = rows.stats + 3 * row;
  const double m = stats[0], s = stats[1], mean = stats[2];
  const auto* x = row_logits<E>(rows, row);
  const LogitOptions logits(rows.options);
  for (int64_t k = threadIdx.x % kWarp; k < a.count; k += kWarp) {
    const int64_t y = labels[k];
    if (!labels.has_column(y)) continue;
    const double g = given ? work[k] : 0.0;
    double dz = 0.0;
    if (g != 0.0 || others) {
      const Logit own = logits(E::get(x[y]));
      const double logprob = logprob_from_stats(own.z, m, s, rate);
      const double distance = (static_cast<double>(own.z) - m) * rate;
      dz = label_gradient(logprob, distance, mean, g, h, rate);
      if (of_lse != 0.0f || of_collision != 0.0f)
        dz +=
            further_label_gradient(logprob, upstream(rows.collision), of_lse, of_collision) * rate;
      if (total != g) dz += other_labels_gradient(logprob, total - g) * rate;
      dz *= own.slope;
    }
    work[k] = dz;
  }
}

// After them: from `work` to the labels' columns.
template <class O>
__global__ void __launch_bounds__(kCombineThreads)
    scatter_kernel(const ManyLabelsBackwardArgs a, const double* work) {
  const LogprobsBackwardArgs& rows = a.rows;
  const int64_t row = row_of_warp();
  if (row >= rows.rows * rows.cols || is_ignored(rows, row)) return;
  const OwnLabels labels(a, row);
  auto* out = static_cast<typename O::Storage*>(rows.grad_logits.data) +
              token_at(rows.grad_logits, row, rows.cols);
  for (int64_t k = threadIdx.x % kWarp; k < a.count; k += kWarp) {
    const int64_t y = labels[k];
    if (labels.has_column(y)) out[y] = O::put(static_cast<float>(work[row * a.count + k]));
  }
}

}  // namespace

Status many_logprobs(const ManyLabelsArgs& a) {
  const LogprobsArgs& rows = a.rows;
  const Status status = token_logprobs(rows);
  if (status.code != kOk) return status;
  const OnDevice guard(rows.exec);
  const int64_t warps = ceil_div(rows.rows * rows.cols, kCombineThreads / kWarp);
  for_dtype(rows.logits.dtype, [&](auto element) {
    using E = decltype(element);
    const int64_t tiles = ceil_div(rows.vocab, tile_columns(kSlots, sizeof(typename E::Storage)));
    RK_ENQUEUE(rows.exec, warps, kCombineThreads, labels_kernel<E>, a, static_cast<uint32_t>(tiles),
               static_cast<const float4*>(rows.exec.scratch));
  });
  return {};
}

int64_t many_logprobs_backward_scratch(int64_t tokens, int64_t count) {
  return token_logprobs_backward_scratch(tokens) + tokens * count * sizeof(double);
}

Status many_logprobs_backward(const ManyLabelsBackwardArgs& a) {
  const LogprobsBackwardArgs& rows = a.rows;
  const OnDevice guard(rows.exec);
  // Behind the scratch of the tokens' own gradient.
  auto* work = reinterpret_cast<double*>(static_cast<char*>(rows.exec.scratch) +
                                         token_logprobs_backward_scratch(rows.rows * rows.cols));
  const int64_t warps = ceil_div(rows.rows * rows.cols, kCombineThreads / kWarp);
  for_dtype(rows.logits.dtype, [&](auto element) {
    RK_ENQUEUE(rows.exec, warps, kCombineThreads, label_gradients_kernel<decltype(element)>, a,
               work);
  });
  const Status status = token_logprobs_backward(rows);
  if (status.code != kOk) return status;
  for_dtype(rows.grad_logits.dtype, [&](auto result) {
    RK_ENQUEUE(rows.exec, warps, kCombineThreads, scatter_kernel<decltype(result)>, a, work);
  });
  return {};
}

}  // namespace rk::cuda
