// The policy loss, its metrics and its gradient: a count of the mask, then one pass over the
// tokens. A sequence-level ratio or weight needs the sequence's sums first (one more pass). The
// gradient through a sequence's ratio needs its slope afterwards (a pass over the gradient only).
#pragma once

namespace rk {
namespace {

// Values of a sequence that its tokens share.
struct SequenceRatio {
  Ratio<float> ratio;
  float w, distance;
  bool inside;
};

struct PolicyBlock {
  const float *mask, *logprobs, *old, *advantages, *ref, *rollout, *entropy, *weights;
  float *grad, *grad_entropy;
};

// How much of a loss its code knows. Plain: ratio per token and only the four inputs that every
// loss has; without the other branches all sums stay in registers. Usual: all but weights and what
// has_further_options. Full: everything.
enum class Extent { kPlain, kUsual, kFull };

// Adds n tokens to the sums. For a sequence-level ratio, returns the sum of their slopes w.r.t. the
// log-ratio.
template <int kObjective, Extent kExtent>
double policy_block(const PolicyConfig& config, const PolicyBlock& b, int64_t n,
                    const SequenceRatio& q, double weight, PolicySums& sums) {
  using V = Lanes;
  constexpr bool kPlain = kExtent == Extent::kPlain, kFull = kExtent == Extent::kFull;
  // A local copy: the compiler knows that no store to a gradient changes it.
  const PolicyConfig c = config;
  // With coefficient 0 the KL is only a metric; 0 * NaN would be NaN.
  const bool weighs_kl = c.kl_coef != 0.0f;
  const V zero(0.0f), kl_coef(c.kl_coef), token_weight(static_cast<float>(weight));
  const bool token_ratio = kPlain || c.ratio_level == kTokenRatio;
  const bool pooled = !kPlain && pools_slopes(c);
  const bool token_correction = !corrects_by_sequence(c);
  const bool with_ref = !kPlain && b.ref, with_rollout = !kPlain && b.rollout;
  const bool with_entropy = !kPlain && b.entropy;
  const Ratio<V> sequence{V(q.ratio.r), V(q.ratio.em1), V(q.ratio.em1mx), V(q.ratio.log)};
  V pg = zero, kl = zero, low = zero, high = zero, dual = zero, r = zero, rr = zero, x_sum = zero;
  V k3 = zero, x_ref = zero, k3_ref = zero, entropy = zero, w_sum = zero, slope = zero;
  V gate_low = zero, gate_high = zero, bonus = zero, r_min(3.0e38f), r_max(-3.0e38f);
  for (int64_t i = 0; i < n; i += kLanes) {
    prefetch_ahead<F32, 1>(b.logprobs + i);
    prefetch_ahead<F32, 1>(b.old + i);
    prefetch_ahead<F32, 1>(b.advantages + i);
    if (b.grad) prefetch_ahead<F32, 1, true>(b.grad + i);
    const V m = load(b.mask + i);
    // Selected here, so that NaN at masked tokens is gone; later code may multiply by the mask.
    const auto kept = [&](const float* p) { return select_less(zero, m, load(p + i), zero); };
    const V logprob = kept(b.logprobs), old = kept(b.old), a = kept(b.advantages);
    const V x = logprob - old;
    const Ratio<V> own = policy_ratio(x, c);
    const Ratio<V> ratio = token_ratio ? own : sequence;
    V w(1.0f);
    if (with_rollout) {
      w = token_correction ? correction_weight(log_weight(old, kept(b.rollout)), c) : V(q.w);
      w_sum = fma(w, m, w_sum);
      if (c.correction_level == kNoCorrection) w = V(1.0f);
    }
    V objective_logprob = logprob;
    if constexpr (kFull) {
      if (c.gate != kNoGate) {
        const V rollout = with_rollout ? kept(b.rollout) : zero;
        const GateTerm<V> gate =
            drop_token(objective_logprob, w, old, rollout, with_rollout, a, V(q.distance), c);
        gate_low = fma(gate.low, m, gate_low);
        gate_high = fma(gate.high, m, gate_high);
      }
    }
    PolicyTerm<V> t = policy_objective<kObjective>(ratio, objective_logprob, a, w, c);
    if constexpr (kObjective == kPenalty) t.loss = t.loss * m, t.ratio = t.ratio * m;
    V own_weight(1.0f);
    if constexpr (kFull) {
      if (b.weights) own_weight = kept(b.weights);
    }
    const auto weighed = [&](V x) { return kFull ? x * own_weight : x; };
    pg = pg + weighed(t.loss);
    if constexpr (kObjective == kClip || kObjective == kCispo) {
      low = fma(t.low, m, low);
      high = fma(t.high, m, high);
      if constexpr (kObjective == kClip) dual = dual + t.dual;
    }
    if constexpr (kFull && kObjective == kPenalty) {
      if (clips_tokens(c)) {
        const TokenClip<V> cut = token_clip(x, a, c);
        low = fma(cut.low, m, low);
        high = fma(cut.high, m, high);
      }
    }
    if (with_ref) {
      const V d = logprob - kept(b.ref);
      KlTerm<V> k = policy_kl(d, c);
      if constexpr (kFull) {
        const KlWeightSlopes<V> s = weigh_kl(k, ratio.r, c);
        if (weighs_kl) {
          t.ratio = fma(kl_coef, s.ratio, t.ratio);
          t.direct = fma(kl_coef, s.direct, t.direct);
        }
      } else if (c.kl_weight == kRatioKlWeight) {
        k.value = k.value * ratio.r;
        k.slope = k.slope * ratio.r;
        if (weighs_kl) t.ratio = fma(kl_coef, k.value, t.ratio);
      }
      kl = kl + weighed(k.value);
      if (weighs_kl) t.direct = fma(kl_coef, k.slope, t.direct);
      x_ref = x_ref + d;
      k3_ref = k3_ref + k.k3;
    }
    if (with_entropy) {
      const V h = kept(b.entropy);
      entropy = entropy + h;
      if constexpr (kFull) bonus = bonus + weighed(h);
    }
    r = fma(ratio.r, m, r);
    rr = fma(ratio.r * ratio.r, m, rr);
    r_min = select_less(zero, m, min(r_min, ratio.r), r_min);
    r_max = select_less(zero, m, max(r_max, ratio.r), r_max);
    x_sum = x_sum + x;
    k3 = k3 + own.em1mx;
    if (token_ratio) t.ratio = inside_clamp(x, t.ratio, c);
    if (pooled) slope = slope + weighed(t.ratio);
    if (b.grad) {
      V g = t.direct;
      if (token_ratio || (!pooled && q.inside)) g = g + t.ratio;
      store(b.grad + i, select_less(zero, m, weighed(g * token_weight), zero).v);
    }
    if (with_entropy && b.grad_entropy) {
      const V h = weighed(V(-c.entropy_coef) * token_weight);
      store(b.grad_entropy + i, select_less(zero, m, h, zero).v);
    }
  }
  sums.pg += weight * reduce_add(pg.v);
  sums.k3 += reduce_add(k3.v);
  sums.x += reduce_add(x_sum.v);
  sums.r += reduce_add(r.v);
  sums.rr += reduce_add(rr.v);
  sums.low += reduce_add(low.v);
  sums.high += reduce_add(high.v);
  sums.dual += reduce_add(dual.v);
  sums.r_min = min(lane_min(r_min), sums.r_min);
  sums.r_max = max(reduce_max(r_max.v), sums.r_max);
  if (with_ref) {
    sums.kl += weight * reduce_add(kl.v);
    sums.x_ref += reduce_add(x_ref.v);
    sums.k3_ref += reduce_add(k3_ref.v);
  }
  if (with_rollout) sums.w += reduce_add(w_sum.v);
  if constexpr (kFull) {
    sums.gate_low += reduce_add(gate_low.v);
    sums.gate_high += reduce_add(gate_high.v);
  }
  if (with_entropy) {
    const double h = reduce_add(entropy.v);
    sums.entropy += h;
    sums.bonus += weight * (kFull ? reduce_add(bonus.v) : h);
  }
  return reduce_add(slope.v);
}

using PolicyBlockFunction = double (*)(const PolicyConfig&, const PolicyBlock&, int64_t,
                                       const SequenceRatio&, double, PolicySums&);
template <Extent kExtent>
PolicyBlockFunction policy_block_of(int32_t objective) {
  switch (objective) {
    case kPenalty: return policy_block<kPenalty, kExtent>;
    case kReinforce: return policy_block<kReinforce, kExtent>;
    case kCispo: return policy_block<kCispo, kExtent>;
    case kSapo: return policy_block<kSapo, kExtent>;
    default: return policy_block<kClip, kExtent>;
  }
}
inline PolicyBlockFunction policy_block_function(const PolicyArgs& a) {
  if (a.weights.given || has_further_options(a.config))
    return policy_block_of<Extent::kFull>(a.config.objective);
  const bool more = a.ref_logprobs.given || a.rollout_logprobs.given || a.entropy.given;
  if (!more && a.config.ratio_level == kTokenRatio)
    return policy_block_of<Extent::kPlain>(a.config.objective);
  return policy_block_of<Extent::kUsual>(a.config.objective);
}

// What policy_count sums beside the tokens.
struct PolicyCounts {
  bool ratios, weights, distances, clips;
};

// Counts the tokens of one piece; also sums logprob - old, clipped if a config does so, log_weight
// and how far a gate by sequences finds them from its anchor.
inline void policy_count(const PolicyArgs& a, const Piece& p, const PolicyCounts& wanted,
                         SequenceSums& out) {
  const LossTokens& t = a.tokens;
  const bool against_rollout = gates_against_rollout(a.config, a.rollout_logprobs.given);
  alignas(64) float logprobs[kTokenBlock], old[kTokenBlock], rollout[kTokenBlock];
  alignas(64) float advantages[kTokenBlock];
  for_blocks(t, p, [&](int64_t begin, int64_t n, const float* mask, int64_t count) {
    out.tokens += static_cast<double>(count);
    if (count == 0) return;
    const auto block = [&](const Tensor& x, float* buffer) {
      return read_block(x, token_at(t, x, p.sequence, begin), n, buffer);
    };
    const auto add = [&](double& sum, const auto& term) {
      Lanes s(0.0f);
      for (int64_t i = 0; i < n; i += kLanes)
        s = s + select_less(Lanes(0.0f), Lanes(load(mask + i)), term(i), Lanes(0.0f));
      sum += reduce_add(s.v);
    };
    if (!wanted.ratios && !wanted.weights && !wanted.distances) return;
    const float *x = nullptr, *y = block(a.old_logprobs, old), *z = y;
    if (wanted.ratios || wanted.distances) x = block(a.logprobs, logprobs);
    if (wanted.weights || (wanted.distances && against_rollout))
      z = block(a.rollout_logprobs, rollout);
    if (wanted.clips) {
      const float* gains = block(a.advantages, advantages);
      add(out.log_ratio, [&](int64_t i) {
        return clipped_log_ratio(Lanes(load(x + i)) - Lanes(load(y + i)), Lanes(load(gains + i)),
                                 a.config.clip_low, a.config.clip_high);
      });
    } else if (wanted.ratios)
      add(out.log_ratio, [&](int64_t i) { return Lanes(load(x + i)) - Lanes(load(y + i)); });
    if (wanted.weights)
      add(out.log_weight,
          [&](int64_t i) { return log_weight(Lanes(load(y + i)), Lanes(load(z + i))); });
    if (wanted.distances)
      add(out.distance, [&](int64_t i) {
        const Lanes anchor = gate_anchor(Lanes(load(y + i)), Lanes(load(z + i)), against_rollout);
        return log_weight(anchor, Lanes(load(x + i)));
      });
  });
}

inline SequenceRatio sequence_ratio(const PolicyArgs& a, const SequenceSums& s) {
  const PolicyConfig& c = a.config;
  SequenceRatio q{};
  const float x = s.tokens > 0.0 ? static_cast<float>(s.log_ratio / s.tokens) : 0.0f;
  q.ratio = policy_ratio(x, c);
  q.distance = s.tokens > 0.0 ? static_cast<float>(s.distance / s.tokens) : 0.0f;
  q.inside = inside_clamp(x, 1.0f, c) != 0.0f;
  const bool mean = c.correction_level == kGeometricCorrection && s.tokens > 0.0;
  q.w = correction_weight(static_cast<float>(mean ? s.log_weight / s.tokens : s.log_weight), c);
  return q;
}

// Adds `share`, a token's share of its sequence's slope, to the gradient of the unmasked tokens,
// but for those that the sequence's ratio has clipped.
inline void add_pooled(const PolicyArgs& a, const Piece& p, float share) {
  const LossTokens& t = a.tokens;
  const Tensor& g = a.grad_logprobs;
  const bool clips = clips_tokens(a.config);
  alignas(64) float buffer[kTokenBlock], inputs[3][kTokenBlock];
  for_blocks(t, p, [&](int64_t begin, int64_t n, const float* mask, int64_t count) {
    if (count == 0) return;
    const int64_t at = token_at(t, g, p.sequence, begin);
    const float* from = read_block(g, at, n, buffer);
    float* to = result_block(g, at, n, buffer);
    const auto block = [&](const Tensor& x, int i) {
      return clips ? read_block(x, token_at(t, x, p.sequence, begin), n, inputs[i]) : nullptr;
    };
    const float *logprobs = block(a.logprobs, 0), *old = block(a.old_logprobs, 1);
    const float* advantages = block(a.advantages, 2);
    for (int64_t i = 0; i < n; i += kLanes) {
      const Lanes x = load(from + i);
      Lanes own(share);
      if (clips)
        own = unclipped_share(Lanes(load(logprobs + i)) - Lanes(load(old + i)),
                              Lanes(load(advantages + i)), own, a.config);
      store(to + i, select_less(Lanes(0.0f), Lanes(load(mask + i)), x + own, x).v);
    }
    write_block(g, at, n, buffer);
  });
}

Status policy_loss(const PolicyArgs& a) {
  const LossTokens& t = a.tokens;
  const PolicyConfig& c = a.config;
  const Status status = check_offsets(t);
  if (status.code != kOk) return status;
  const Plan plan(t);
  if (!plan.ok()) return {kOutOfMemory, -1};
  const Scratch<SequenceSums> piece_sums(plan.pieces), sequences(t.sequences);
  const Scratch<PolicySums> partial(plan.items);
  if (!piece_sums.data || !sequences.data || !partial.data) return {kOutOfMemory, -1};

  const PolicyCounts wanted{c.ratio_level != kTokenRatio, corrects_by_sequence(c),
                            c.gate == kOpsmGate, clips_tokens(c)};
  const bool counted = wanted.ratios || wanted.weights || wanted.distances ||
                       c.aggregation == kSeqMeanTokenMean || a.divisor == 0.0;
  if (counted) {
    plan.for_pieces(a.exec.threads, [&](int64_t p, int64_t) {
      policy_count(a, plan.piece[p], wanted, piece_sums[p]);
    });
    add_pieces(plan, piece_sums, sequences);
  }
  const double divisor = loss_divisor(t, c.aggregation, a.divisor, sequences);
  const PolicyBlockFunction block_function = policy_block_function(a);

  for (int64_t i = 0; i < plan.items; ++i) partial[i].r_min = 3.0e38f, partial[i].r_max = -3.0e38f;
  plan.for_pieces(a.exec.threads, [&](int64_t index, int64_t item) {
    const Piece& p = plan.piece[index];
    const SequenceRatio q = sequence_ratio(a, sequences[p.sequence]);
    const double weight = sequence_weight(c.aggregation, divisor, sequences[p.sequence].tokens);
    alignas(64) float buffers[9][kTokenBlock];
    for_blocks(t, p, [&](int64_t begin, int64_t n, const float* mask, int64_t count) {
      const auto at = [&](const Tensor& x) { return token_at(t, x, p.sequence, begin); };
      if (count == 0) {
        zero_block(a.grad_logprobs, at(a.grad_logprobs), n);
        zero_block(a.grad_entropy, at(a.grad_entropy), n);
        return;
      }
      const auto in = [&](const Tensor& x, int i) { return read_block(x, at(x), n, buffers[i]); };
      const auto out = [&](const Tensor& x, int i) {
        return result_block(x, at(x), n, buffers[i]);
      };
      const PolicyBlock block{mask,
                              in(a.logprobs, 0),
                              in(a.old_logprobs, 1),
                              in(a.advantages, 2),
                              in(a.ref_logprobs, 3),
                              in(a.rollout_logprobs, 4),
                              in(a.entropy, 5),
                              in(a.weights, 8),
                              out(a.grad_logprobs, 6),
                              out(a.grad_entropy, 7)};
      partial[item].tokens += static_cast<double>(count);
      piece_sums[index].slope += block_function(c, block, n, q, weight, partial[item]);
      write_block(a.grad_logprobs, at(a.grad_logprobs), n, buffers[6]);
      write_block(a.grad_entropy, at(a.grad_entropy), n, buffers[7]);
    });
  });

  if (pools_slopes(c) && a.grad_logprobs.given) {
    for (int64_t p = 0; p < plan.pieces; ++p)
      sequences[plan.piece[p].sequence].slope += piece_sums[p].slope;
    plan.for_pieces(a.exec.threads, [&](int64_t index, int64_t) {
      const Piece& p = plan.piece[index];
      const SequenceSums& s = sequences[p.sequence];
      if (s.tokens == 0.0 || s.slope == 0.0 || !sequence_ratio(a, s).inside) return;
      const double weight = sequence_weight(c.aggregation, divisor, s.tokens);
      add_pooled(a, p, static_cast<float>(weight * s.slope / s.tokens));
    });
  }

  PolicySums sums{};
  sums.r_min = 3.0e38f, sums.r_max = -3.0e38f;
  for (int64_t i = 0; i < plan.items; ++i) {
    const PolicySums& s = partial[i];
    sums.pg += s.pg, sums.kl += s.kl, sums.bonus += s.bonus;
    sums.low += s.low, sums.high += s.high, sums.dual += s.dual;
    sums.r += s.r, sums.rr += s.rr, sums.x += s.x, sums.k3 += s.k3;
    sums.x_ref += s.x_ref, sums.k3_ref += s.k3_ref;
    sums.entropy += s.entropy, sums.w += s.w, sums.tokens += s.tokens;
    sums.gate_low += s.gate_low, sums.gate_high += s.gate_high;
    sums.r_min = min(s.r_min, sums.r_min), sums.r_max = max(s.r_max, sums.r_max);
  }
  if (!a.rollout_logprobs.given) sums.w = sums.tokens;
  *a.metrics = policy_metrics(c, sums, kNoFault);
  *a.loss = a.metrics->loss;
  return {};
}

}  // namespace
}  // namespace rk
