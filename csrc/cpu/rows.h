// Rows of logits: their options, labels and temperatures.
#pragma once

namespace rk {
namespace {

// Logits after the options, before the temperature divides them, and the slope of this map.
struct Logits {
  Vec z, slope;
};

// One logit, with the bits that `values` gives it in a block.
template <class Values>
inline float value_alone(float x, const Values& values) {
  float lanes[kLanes];
  store(lanes, values(splat(x)));
  return lanes[0];
}

// Applies RowOptions to logits; without kChange (RowOptions::change_logits) logits stay unchanged.
template <bool kChange>
struct LogitOptions {
  float cap;
  Vec caps, inv_caps;

  explicit LogitOptions(const RowOptions& o)
      : cap(static_cast<float>(o.softcap)),
        caps(splat(cap)),
        inv_caps(splat(kChange ? 1.0f / cap : 0.0f)) {}

  Vec values(Vec x) const {
    if constexpr (!kChange) return x;
    return mul(caps, tanh(mul(x, inv_caps)));
  }
  Logits operator()(Vec x) const {
    if constexpr (!kChange) return {x, splat(1.0f)};
    const TanhSlope th = tanh_slope(mul(x, inv_caps));
    return {mul(caps, th.value), th.slope};
  }

  // For one logit: its value, with the bits of a block, and in double the inverse of its slope.
  float value(float x) const {
    if constexpr (!kChange) return x;
    return value_alone(x, [&](Vec block) { return values(block); });
  }
  double inverse_slope(float x) const {
    if constexpr (!kChange) return 1.0;
    // The slope is 1 / cosh^2; 1 - tanh^2 would cancel near the cap.
    const double ch = cosh(static_cast<double>(x) / cap);
    return ch * ch;
  }
};

inline int64_t load_label(const Tensor& labels, int64_t i, int64_t j) {
  const int64_t at = i * labels.stride0 + j * labels.stride1;
  return labels.dtype == kInt32 ? static_cast<const int32_t*>(labels.data)[at]
                                : static_cast<const int64_t*>(labels.data)[at];
}

template <class Args>
inline double row_temperature(const Args& a, int64_t i, int64_t j) {
  const Tensor& t = a.temperatures;
  if (!t.given) return a.options.temperature;
  return static_cast<const float*>(t.data)[i * t.stride0 + j * t.stride1];
}

// The row of logits, or of their gradient, of token (i, j).
template <class E>
inline typename E::Storage* row_at(const Tensor& t, int64_t i, int64_t j) {
  return static_cast<typename E::Storage*>(t.data) + i * t.stride0 + j * t.stride1;
}

// What token (i, j) has in an fp32 tensor; 0 without the tensor.
inline float upstream_at(const Tensor& g, int64_t i, int64_t j) {
  return g.given ? static_cast<const float*>(g.data)[i * g.stride0 + j * g.stride1] : 0.0f;
}

// Calls row(a, r) for every row r, on a team of `threads`; each writes a row of `grad_logits`.
// `fresh` is their memory if nobody has written to it yet, else null.
template <class Args, class Row>
inline void for_gradient_rows(const Args& a, void* fresh, int32_t threads, const Row& row) {
  const int64_t row_bytes = a.vocab * dtype_size(a.grad_logits.dtype);
  const FreshPages pages(fresh, a.rows * a.cols * row_bytes);
  parallel_for(a.rows * a.cols, threads, [&](int64_t r) {
    pages.prepare(r * row_bytes, row_bytes);
    row(a, r);
  });
}

template <class Args, class Row>
inline void for_gradient_rows(const Args& a, void* fresh, const Row& row) {
  for_gradient_rows(a, fresh, a.exec.threads, row);
}

// Picks the instantiation for a dtype, for options that change logits, and for a flag.
template <template <class, bool, bool> class F, class Args>
inline auto pick(int32_t dtype, const RowOptions& options, bool entropy)
    -> void (*)(const Args&, int64_t) {
  return for_dtype(dtype, [&](auto e) -> void (*)(const Args&, int64_t) {
    using E = decltype(e);
    if (options.change_logits()) return entropy ? F<E, true, true>::row : F<E, true, false>::row;
    return entropy ? F<E, false, true>::row : F<E, false, false>::row;
  });
}

}  // namespace
}  // namespace rk
