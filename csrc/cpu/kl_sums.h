// Sums over a pair of rows of logits, of which a divergence is made.
//
// P is the weighting distribution (policy for reverse, reference for forward), Q the other one:
// KL = sum P (log P - log Q) = t / s_P - (log s_P - log s_Q), t = sum e_P ((x_P - m_P) - (x_Q -
// m_Q)). The difference is taken element by element, so t is accurate where the two rows are close.
#pragma once

namespace rk {
namespace {

// The reduction of a pair of rows. P is the weighting distribution.
struct PairSums {
  RowSums p, q;    // p.t is the sum t; q.t is unused
  double u = 0.0;  // sum of e (x - m) of the policy, for its entropy
};

// A logit of one of the two rows, in fp32: capped, then scaled. Unchanged without kGeneral.
template <bool kGeneral>
struct PairLogit {
  LogitOptions<kGeneral> capped;
  float scale;

  PairLogit(double cap, double factor)
      : capped(RowOptions::of_cap(cap)), scale(static_cast<float>(factor)) {}

  Vec values(Vec x) const {
    if constexpr (!kGeneral) return x;
    if (capped.cap > 0.0f) x = capped.values(x);
    return mul(x, splat(scale));
  }
  // The slope leaves out the scale: that of the policy is 1.
  Logits operator()(Vec x) const {
    if (!kGeneral || !(capped.cap > 0.0f)) return {values(x), splat(1.0f)};
    const Logits z = capped(x);
    return {mul(z.z, splat(scale)), z.slope};
  }
  float value(float x) const {
    if constexpr (!kGeneral) return x;
    return value_alone(x, [&](Vec block) { return values(block); });
  }
};

// Those of the policy and of the reference.
template <bool kGeneral>
struct PairLogits {
  PairLogit<kGeneral> own, ref;

  explicit PairLogits(const PairOptions& o)
      : own(o.softcap, 1.0), ref(o.ref_softcap, o.ref_scale) {}
};

// What the sums of a pair of rows depend on. `own_p`: the policy is P.
template <bool kGeneral>
struct PairRow {
  double inv_t;
  PairLogit<kGeneral> p, q;
  bool own_p;
};

// Moves the reference point of a row's sums from r.m to m. Returns the factor that scales every e.
inline double rebase(RowSums& r, float m, double inv_t) {
  double scale = 1.0;
  if (r.s != 0.0) scale = exp((static_cast<double>(r.m) - m) * inv_t);
  r.s *= scale;
  r.m = m;
  return scale;
}

// Half a block of each row, so that both together fit the L1 cache.
constexpr int64_t kPairBlock = kBlock / 2;
constexpr int kPairUnroll = 2;

struct PairMax {
  float p, q;
};

// Adds a block of n pairs of logits to the sums. With kNext, returns the maxima of the next full
// block, as add_block does for one row.
template <class E, bool kGeneral, bool kNext>
inline PairMax add_pairs(PairSums& r, const typename E::Storage* xp, const typename E::Storage* xq,
                         int64_t n, const PairRow<kGeneral>& row, Vec rate, Vec lowest) {
  const float minus_inf = -__builtin_inff();
  const Vec zero = splat(0.0f);
  // A row of only -inf so far has no reference point yet; its sums are 0 with any.
  const Vec vp = splat(r.p.m == minus_inf ? 0.0f : r.p.m);
  const Vec vq = splat(r.q.m == minus_inf ? 0.0f : r.q.m);
  Vec sp[kPairUnroll], sq[kPairUnroll], t[kPairUnroll], own[kPairUnroll], next_p[kPairUnroll],
      next_q[kPairUnroll];
  for (int u = 0; u < kPairUnroll; ++u) {
    sp[u] = sq[u] = t[u] = own[u] = zero;
    next_p[u] = next_q[u] = splat(minus_inf);
  }
  const auto accumulate = [&](int u, Vec zp, Vec zq) {
    const Vec dp = sub(zp, vp), dq = sub(zq, vq);
    // Weights below the range of exp are exactly zero, so that a reference logit of -inf does not
    // give 0 * inf, and sums over only -inf stay 0.
    const Vec ep = select_less(dp, lowest, zero, exp_scaled(max(lowest, dp), rate));
    const Vec eq = select_less(dq, lowest, zero, exp_scaled(max(lowest, dq), rate));
    sp[u] = add(sp[u], ep);
    sq[u] = add(sq[u], eq);
    const Vec term = mul(ep, sub(dp, dq));
    t[u] = add(t[u], select_less(dp, lowest, zero, term));
    if constexpr (kGeneral) {
      const Vec d = row.own_p ? dp : dq;
      own[u] = add(own[u], select_less(d, lowest, zero, mul(row.own_p ? ep : eq, d)));
    }
  };
  int64_t i = 0;
  for (; i + kPairUnroll * kLanes <= n; i += kPairUnroll * kLanes) {
    prefetch_ahead<E, kPairUnroll>(xp + i + kPairBlock);
    prefetch_ahead<E, kPairUnroll>(xq + i + kPairBlock);
    for (int u = 0; u < kPairUnroll; ++u) {
      const int64_t k = i + u * kLanes;
      accumulate(u, row.p.values(E::load(xp + k)), row.q.values(E::load(xq + k)));
      if constexpr (kNext) {
        next_p[u] = max(next_p[u], E::load(xp + kPairBlock + k));
        next_q[u] = max(next_q[u], E::load(xq + kPairBlock + k));
      }
    }
  }
  for (; i < n; i += kLanes) {
    const int left = n - i < kLanes ? static_cast<int>(n - i) : kLanes;
    Vec zp = row.p.values(load_partial<E>(xp + i, left, minus_inf));
    Vec zq = row.q.values(load_partial<E>(xq + i, left, minus_inf));
    // A cap makes the lanes past the end finite.
    if (kGeneral && left < kLanes) {
      zp = keep_first(zp, left, minus_inf);
      zq = keep_first(zq, left, minus_inf);
    }
    accumulate(0, zp, zq);
  }
  r.p.s += reduce_add(add(sp[0], sp[1]));
  r.q.s += reduce_add(add(sq[0], sq[1]));
  r.p.t += reduce_add(add(t[0], t[1]));
  if constexpr (kGeneral) r.u += reduce_add(add(own[0], own[1]));
  return {reduce_max(max(next_p[0], next_p[1])), reduce_max(max(next_q[0], next_q[1]))};
}

template <class E, bool kGeneral>
inline PairSums pair_sums(const typename E::Storage* xp, const typename E::Storage* xq,
                          int64_t vocab, const PairRow<kGeneral>& row) {
  const double inv_t = row.inv_t;
  const float minus_inf = -__builtin_inff();
  PairSums r;
  const Vec rate = splat(static_cast<float>(inv_t * kLog2e));
  const Vec lowest = splat(static_cast<float>(kExpMin / inv_t));
  PairMax next{};
  bool known = false;
  for (int64_t start = 0; start < vocab; start += kPairBlock) {
    const int64_t n = vocab - start < kPairBlock ? vocab - start : kPairBlock;
    const float mp = row.p.value(known ? next.p : block_max<E>(xp + start, n));
    const float mq = row.q.value(known ? next.q : block_max<E>(xq + start, n));
    if (mp > r.p.m) {
      // The new maximum m' also lowers every x_P - m_P by m' - m.
      const double shift = static_cast<double>(r.p.m) - mp;
      const bool any = r.p.s != 0.0;
      const double scale = rebase(r.p, mp, inv_t);
      // Weights that underflow contribute 0, even if their terms were infinite.
      if (any) r.p.t = scale == 0.0 ? 0.0 : scale * r.p.t + r.p.s * shift;
      if (kGeneral && row.own_p && any) r.u = scale * r.u + r.p.s * shift;
    }
    if (mq > r.q.m) {
      // Raises every -(x_Q - m_Q) by m' - m; skipped while the reference has seen only -inf.
      if (r.p.s != 0.0 && r.q.m != minus_inf) r.p.t += r.p.s * (static_cast<double>(mq) - r.q.m);
      if constexpr (kGeneral) {
        const double shift = static_cast<double>(r.q.m) - mq;
        const bool any = r.q.s != 0.0;
        const double scale = rebase(r.q, mq, inv_t);
        if (!row.own_p && any) r.u = scale * r.u + r.q.s * shift;
      } else {
        rebase(r.q, mq, inv_t);
      }
    }
    if (mp == minus_inf && has_nan<E>(xp + start, n)) r.p.s = __builtin_nan("");
    if (mq == minus_inf && has_nan<E>(xq + start, n)) r.q.s = __builtin_nan("");
    known = vocab - start >= 2 * kPairBlock;
    if (known)
      next = add_pairs<E, kGeneral, true>(r, xp + start, xq + start, n, row, rate, lowest);
    else
      add_pairs<E, kGeneral, false>(r, xp + start, xq + start, n, row, rate, lowest);
  }
  return r;
}

}  // namespace
}  // namespace rk
