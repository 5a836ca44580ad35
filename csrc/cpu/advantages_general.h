// GAE with rates per sequence or per step, truncated steps, and a factor of its own for the
// returns.
//
// Rates that a sequence keeps go through the vectors of advantages_recurrence.h, grouped as in
// advantages_scan.h. Rates per step make a chain of single steps, which needs no grouping. So do
// truncated steps under "zero", where masked tokens at the end may hold a truncated one.
#pragma once

namespace rk {
namespace {
namespace scan {

// A rate in [0, 1]; NaN for any other number.
inline double checked_rate(float x) { return x >= 0.0f && x <= 1.0f ? x : NAN; }

// A rate of a sequence: the number, or its entry in a tensor of one rate per sequence.
inline double sequence_rate(const Tensor& x, bool per_step, double number, int64_t sequence) {
  return x.given && !per_step ? checked_rate(sequence_scalar(x, sequence)) : number;
}

struct GeneralWalk : Walk {
  // As `next.advantage`, for the chain of the returns.
  double other;
};

struct GeneralWindow : Window {
  uint8_t truncated[kBlockTokens];
  // The value after each step at which the recurrence restarts.
  float ends[kBlockTokens + kLanes];
  float buffer[kBlockTokens + kLanes];
  double gammas[kBlockTokens], lams[kBlockTokens], value_lams[kBlockTokens];
};

// Sets `done` and `ends` of each step. Returns the number of steps at which the recurrence
// restarts.
inline int64_t load_ends(const GeneralGaeArgs& a, const GeneralWalk& w, GeneralWindow& x) {
  const int64_t t = w.start + x.begin;
  int64_t count = 0, cut = 0;
  memset(x.done, 0, sizeof x.done);
  memset(x.truncated, 0, sizeof x.truncated);
  if (a.gae.dones.given) count = load_flags(a.gae.dones, w.row, t, x.n, 0, x.done);
  if (a.truncated.given) cut = load_flags(a.truncated, w.row, t, x.n, 0, x.truncated);
  if (count + cut == 0) return 0;
  const float* after = nullptr;
  if (cut > 0) after = load_tokens(a.cut_values, w.row, t, x.n, x.buffer);
  int64_t step = 0;
  count = 0;
  for (int64_t k = 0; k < x.n; ++k) {
    const bool exists = x.keep[k] || !x.skips();
    const bool truncated = x.truncated[k], ends = truncated || x.done[k];
    x.ends[step] = truncated && x.keep[k] && !x.done[k] ? after[k] : 0.0f;
    x.done[step] = ends;
    count += exists && ends;
    step += exists;
  }
  return count;
}

// `recur` with another factor for the returns; `other` is what `next.advantage` is for these.
inline void recur_decoupled(const Factors& f, const Factors& of_returns, const float* rewards,
                            const float* values, int64_t n, Next& next, double& other,
                            float* advantages, float* returns) {
  Recurrence<true> recurrence(f, next);
  Chain chain(of_returns, other);
  const auto run = [&](const float* r, const float* v, float* x, float* y) {
    Doubles own;
    const Doubles differences = recurrence.differences(r, v, own);
    store(x, recurrence.chain.steps(differences));
    store(y, add(chain.steps(differences), own));
  };
  int64_t k = n - kDoubles;
  for (; k >= 0; k -= kDoubles) run(rewards + k, values + k, advantages + k, returns + k);
  const int64_t rest = k + kDoubles;
  if (rest < n) {
    next = {recurrence.chain.advantage, values[rest]};
    other = chain.advantage;
  }
  if (rest > 0) {
    // As in `recur`: these steps come again with the next window.
    float r[kDoubles] = {}, v[kDoubles] = {}, x[kDoubles], y[kDoubles];
    const size_t bytes = sizeof(float) * static_cast<size_t>(rest);
    memcpy(r + kDoubles - rest, rewards, bytes);
    memcpy(v + kDoubles - rest, values, bytes);
    run(r, v, x, y);
    memcpy(advantages, x + kDoubles - rest, bytes);
    memcpy(returns, y + kDoubles - rest, bytes);
  }
}

// The factors of one sequence.
struct SequenceFactors {
  Factors advantages, returns;
  bool decoupled;

  SequenceFactors(const GeneralGaeArgs& a, int64_t sequence)
      : SequenceFactors(a, sequence_rate(a.gammas, a.gamma_per_step, a.gae.gamma, sequence),
                        sequence_rate(a.lams, a.lam_per_step, a.gae.lam, sequence),
                        sequence_rate(a.value_lams, a.value_lam_per_step, a.value_lam, sequence)) {}
  void recur(const float* rewards, const float* values, int64_t n, GeneralWalk& w,
             float* advantages_, float* returns_) const {
    if (decoupled)
      recur_decoupled(advantages, returns, rewards, values, n, w.next, w.other, advantages_,
                      returns_);
    else
      scan::recur<true>(advantages, rewards, values, n, w.next, advantages_, returns_);
  }

 private:
  SequenceFactors(const GeneralGaeArgs& a, double gamma, double lam, double value_lam)
      : advantages(gamma, gamma * lam), returns(gamma, gamma * value_lam), decoupled(a.decoupled) {}
};

// A window's steps in vectors.
inline void recur_vectors(const GeneralGaeArgs& a, const SequenceFactors& f, GeneralWalk& w,
                          GeneralWindow& x, const float* r, const float* v, float* advantages,
                          float* returns) {
  const bool any_done = (a.gae.dones.given || a.truncated.given) && load_ends(a, w, x) > 0;
  recur_episodes<true>(
      w, x, any_done, r, v,
      [&](int64_t begin, int64_t n) {
        f.recur(r + begin, v + begin, n, w, advantages + begin, returns + begin);
      },
      [&](int64_t k) {
        w.next = {0.0, x.ends[k]};
        w.other = 0.0;
      });
}

// The rate of each step of a window.
inline void load_rates(const Tensor& rates, bool per_step, double number, const GeneralWalk& w,
                       GeneralWindow& x, double* out) {
  if (!rates.given || !per_step) {
    const double rate = sequence_rate(rates, per_step, number, w.sequence);
    for (int64_t k = 0; k < x.steps; ++k) out[k] = rate;
    return;
  }
  const float* found = load_tokens(rates, w.row, w.start + x.begin, x.n, x.other);
  if (x.skips()) {
    compress_tokens(found, x.keep, x.n, x.buffer);
    found = x.buffer;
  }
  for (int64_t k = 0; k < x.steps; ++k) out[k] = checked_rate(found[k]);
}

// A window's steps one by one, last step first.
inline void recur_singly(const GeneralGaeArgs& a, GeneralWalk& w, GeneralWindow& x, const float* r,
                         const float* v, float* advantages, float* returns) {
  const bool ends = (a.gae.dones.given || a.truncated.given) && load_ends(a, w, x) > 0;
  load_rates(a.gammas, a.gamma_per_step, a.gae.gamma, w, x, x.gammas);
  load_rates(a.lams, a.lam_per_step, a.gae.lam, w, x, x.lams);
  if (a.decoupled) load_rates(a.value_lams, a.value_lam_per_step, a.value_lam, w, x, x.value_lams);
  double advantage = w.next.advantage, other = w.other;
  float value = w.next.value;
  for (int64_t k = x.steps - 1; k >= 0; --k) {
    const bool end = ends && x.done[k];
    const double gamma = x.gammas[k], own = v[k];
    const double difference = multiply_add(gamma, end ? x.ends[k] : value, r[k]) - own;
    advantage = end ? difference : multiply_add(gamma * x.lams[k], advantage, difference);
    if (a.decoupled)
      other = end ? difference : multiply_add(gamma * x.value_lams[k], other, difference);
    value = v[k];
    advantages[k] = static_cast<float>(advantage);
    returns[k] = static_cast<float>((a.decoupled ? other : advantage) + own);
  }
  w.next = {advantage, value};
  w.other = other;
}

inline void walk_general(const GeneralGaeArgs& general, bool singly, int64_t sequence,
                         GeneralWalk& w, GeneralWindow& x) {
  const GaeArgs& a = general.gae;
  const SequenceFactors factors(general, sequence);
  begin_walk(a, sequence, w);
  w.other = 0.0;
  if (!singly || a.carry) skip_masked_end(a, w, x);
  walk_windows<true>(a, w, x,
                     [&](const float* r, const float* v, float* advantages, float* returns) {
                       if (singly)
                         recur_singly(general, w, x, r, v, advantages, returns);
                       else
                         recur_vectors(general, factors, w, x, r, v, advantages, returns);
                     });
}

void run_general(const GeneralGaeArgs& a) {
  const bool singly = a.gamma_per_step || a.lam_per_step || a.value_lam_per_step ||
                      (a.truncated.given && !a.gae.carry);
  for_sequences(a.gae, [&](int64_t begin, int64_t end) {
    GeneralWalk w;
    GeneralWindow window;
    for (int64_t s = end - 1; s >= begin; --s) walk_general(a, singly, s, w, window);
  });
}

}  // namespace scan
}  // namespace
}  // namespace rk
