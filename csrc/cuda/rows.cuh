// What the operations on rows of logits share: the options of a row, and the sums of its tiles.
#pragma once
#include "tiles.cuh"

namespace rk::cuda {
namespace {

// ---- Options of rows ----------------------------------------------------------------------------

// A logit as the options make it, before the temperature divides it, and the slope of that.
struct Logit {
  float z, slope;
};

// A label's logit as RowOptions change it, by kernels that have no variant for options that do.
struct LogitOptions {
  bool change;
  float cap;

  __device__ __forceinline__ explicit LogitOptions(const RowOptions& o)
      : change(o.change_logits()), cap(static_cast<float>(o.softcap)) {}
  __device__ __forceinline__ Logit operator()(float x) const {
    if (!change) return {x, 1.0f};
    const TanhParts p = tanh_parts(x / cap);
    return {cap * p.value, p.slope};
  }
};

// Logits under a cap at a third of the cost, for all columns of a row. Where |x| is small beside
// the cap they come from tanh's series; elsewhere they are within two roundings of the cap. Within
// that error they keep the order of the logits.
struct LogitValues {
  float cap, rate2, near, third, fifth;

  explicit LogitValues(const RowOptions& o) : cap(static_cast<float>(o.softcap)) {
    const double u = o.softcap > 0.0 ? 1.0 / o.softcap : 0.0;
    rate2 = static_cast<float>(-2.0 * 1.4426950408889634 * u);
    near = 0.1f * cap;
    third = static_cast<float>(u * u / -3.0);
    fifth = static_cast<float>(u * u * (u * u) * 2.0 / 15.0);
  }
  __device__ __forceinline__ float operator()(float x) const {
    // tanh(u) = 2 / (1 + exp(-2 u)) - 1
    const float far = fmaf(2.0f * cap, reciprocal_fast(1.0f + exp2_fast(x * rate2)), -cap);
    const float x2 = x * x;
    return fabsf(x) < near ? fmaf(x2 * x, fmaf(x2, fifth, third), x) : far;
  }
  // The slope is 1 - tanh(u)^2 = 4 e / (1 + e)^2, e = exp(-2 |u|), which cancels at no end.
  __device__ __forceinline__ Logit with_slope(float x) const {
    const float e = exp2_fast(fabsf(x) * rate2), r = reciprocal_fast(1.0f + e), er = e * r;
    const float far = copysignf(fmaf(-2.0f * cap, er, cap), x), x2 = x * x;
    return {fabsf(x) < near ? fmaf(x2 * x, fmaf(x2, fifth, third), x) : far, 4.0f * er * r};
  }
};

// By how much rounding may move a logit under these options out of the order of the logits.
__device__ __forceinline__ float order_slack(const RowOptions& o) {
  return static_cast<float>(o.softcap) * 0x1p-20f;
}

template <class Args>
__device__ __forceinline__ double row_temperature(const Args& a, int64_t row) {
  if (!a.temperatures.given) return a.options.temperature;
  return static_cast<const float*>(a.temperatures.data)[token_at(a.temperatures, row, a.cols)];
}

// What row `row` has in an fp32 tensor; 0 without the tensor.
__device__ __forceinline__ float upstream_at(const Tensor& g, int64_t row, int64_t cols) {
  return g.given ? static_cast<const float*>(g.data)[token_at(g, row, cols)] : 0.0f;
}

template <class Args>
__device__ __forceinline__ int64_t row_label(const Args& a, int64_t row) {
  return load_integer(a.labels, token_at(a.labels, row, a.cols));
}

// ---- Sums of tiles ------------------------------------------------------------------------------

// Maximum m, s = sum of e = exp((x - m) / T), t = sum of e (x - m) / T and q = sum of e e, where it
// is wanted, over some columns.
template <class T>
struct Sums {
  float m;
  T s, t, q = 0;
};

}  // namespace
}  // namespace rk::cuda
