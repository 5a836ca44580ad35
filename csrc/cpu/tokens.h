// Shared by the losses over tokens: the sequences of a batch, their division into work items,
// blocks of tokens widened to fp32, and the weight of each sequence in the aggregate.
//
// Sequences are cut at fixed distances from their start, so the arithmetic of a token does not
// depend on the place of its sequence, packed or padded. Sums are fp32 within a block, double
// across blocks, and combined in the order of the sequences.
#pragma once

namespace rk {
namespace {

// 32 fp32 additions per lane for every vector width, so that narrow vectors are as accurate.
constexpr int64_t kTokenBlock = 32 * kLanes;
constexpr int64_t kPieceTokens = 16384;
// Work items group pieces to at least this many tokens.
constexpr int64_t kItemTokens = 8192;

// A vector with the operators that exp_math.h names.
struct Lanes {
  Vec v;
  Lanes() = default;
  Lanes(Vec x) : v(x) {}
  explicit Lanes(float x) : v(splat(x)) {}
};
inline Lanes operator+(Lanes a, Lanes b) { return add(a.v, b.v); }
inline Lanes operator-(Lanes a, Lanes b) { return sub(a.v, b.v); }
inline Lanes operator*(Lanes a, Lanes b) { return mul(a.v, b.v); }
inline Lanes operator/(Lanes a, Lanes b) { return div(a.v, b.v); }
inline Lanes operator-(Lanes a) { return mul(splat(-1.0f), a.v); }
inline Lanes fma(Lanes a, Lanes b, Lanes c) { return fma(a.v, b.v, c.v); }
inline Lanes max(Lanes a, Lanes b) { return max(a.v, b.v); }
inline Lanes min(Lanes a, Lanes b) { return min(a.v, b.v); }
inline Lanes abs(Lanes a) { return abs(a.v); }
inline Lanes scale2(Lanes x, Lanes n) { return scale2(x.v, n.v); }
inline Lanes exponent(Lanes x) { return exponent(x.v); }
inline Lanes select_less(Lanes a, Lanes b, Lanes yes, Lanes no) {
  return select_less(a.v, b.v, yes.v, no.v);
}

// Memory for the plan and the partial sums. std::vector is avoided: its instantiations are shared
// between translation units, and the baseline must not run one compiled for AVX-512.
template <class T>
struct Scratch {
  T* data;
  explicit Scratch(int64_t count)
      : data(static_cast<T*>(calloc(static_cast<size_t>(count > 0 ? count : 1), sizeof(T)))) {}
  ~Scratch() { free(data); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  T& operator[](int64_t i) const { return data[i]; }
};

inline int64_t offset_at(const LossTokens& t, int64_t i) {
  const int64_t at = i * t.offsets.stride1;
  return t.offsets.dtype == kInt32 ? static_cast<const int32_t*>(t.offsets.data)[at]
                                   : static_cast<const int64_t*>(t.offsets.data)[at];
}
inline int64_t sequence_begin(const LossTokens& t, int64_t s) {
  return t.offsets.given ? offset_at(t, s) : 0;
}
inline int64_t sequence_length(const LossTokens& t, int64_t s) {
  return t.offsets.given ? offset_at(t, s + 1) - offset_at(t, s) : t.cols;
}
// The element offset of token j of sequence s in a tensor.
inline int64_t token_at(const LossTokens& t, const Tensor& x, int64_t s, int64_t j) {
  return s * x.stride0 + (sequence_begin(t, s) + j) * x.stride1;
}

inline Status check_offsets(const LossTokens& t) {
  if (!t.offsets.given) return {};
  for (int64_t i = 0; i <= t.sequences; ++i) {
    const int64_t entry = offset_at(t, i), low = i ? offset_at(t, i - 1) : 0;
    if (entry < low || entry > (i ? t.cols : 0) || (i == t.sequences && entry != t.cols))
      return {kBadOffsets, i};
  }
  return {};
}

struct Piece {
  int64_t sequence, begin, length;
};

// All pieces of the sequences in order, and the first piece of each work item.
struct Plan {
  int64_t pieces = 0, items = 0;
  Scratch<Piece> piece;
  Scratch<int64_t> first;

  explicit Plan(const LossTokens& t) : piece(bound(t)), first(bound(t) + 1) {
    if (!ok()) return;
    int64_t tokens = kItemTokens;
    for (int64_t s = 0; s < t.sequences; ++s) {
      const int64_t length = sequence_length(t, s);
      for (int64_t begin = 0; begin < length; begin += kPieceTokens) {
        const int64_t n = length - begin < kPieceTokens ? length - begin : kPieceTokens;
        if (tokens >= kItemTokens) first[items++] = pieces, tokens = 0;
        piece[pieces++] = {s, begin, n};
        tokens += n;
      }
    }
    first[items] = pieces;
  }
  bool ok() const { return piece.data && first.data; }
  static int64_t bound(const LossTokens& t) {
    const int64_t tokens = t.offsets.given ? t.cols : t.sequences * t.cols;
    return t.sequences + tokens / kPieceTokens + 1;
  }

  // Calls body(piece, item) for every piece. One thread takes the pieces of an item in order.
  template <class F>
  void for_pieces(int32_t threads, const F& body) const {
    parallel_for(items, threads, [&](int64_t item) {
      for (int64_t p = first[item]; p < first[item + 1]; ++p) body(p, item);
    });
  }
};

template <class E>
inline void widen(const typename E::Storage* p, int64_t stride, int64_t n, float* out) {
  int64_t i = 0;
  if (stride == 1) {
    for (; i + kLanes <= n; i += kLanes) store(out + i, E::load(p + i));
  } else if (stride == 0 && n > 0) {
    const float x = E::get(p);
    for (; i < n; ++i) out[i] = x;
  }
  for (; i < n; ++i) out[i] = E::get(p + i * stride);
}

inline int64_t whole_vectors(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

// n elements from `at` as floats: in place if they can be read in whole vectors, else a copy in
// `buffer`, padded with zeros to a whole vector.
inline const float* read_block(const Tensor& x, int64_t at, int64_t n, float* buffer) {
  if (!x.given) return nullptr;
  if (x.dtype == kFloat32 && x.stride1 == 1 && n % kLanes == 0)
    return static_cast<const float*>(x.data) + at;
  switch (x.dtype) {
    case kBFloat16:
      widen<BF16>(static_cast<const uint16_t*>(x.data) + at, x.stride1, n, buffer);
      break;
    case kFloat16:
      widen<F16>(static_cast<const uint16_t*>(x.data) + at, x.stride1, n, buffer);
      break;
    default: widen<F32>(static_cast<const float*>(x.data) + at, x.stride1, n, buffer);
  }
  for (int64_t i = n; i < whole_vectors(n); ++i) buffer[i] = 0.0f;
  return buffer;
}

template <class E>
inline void narrow(const float* p, int64_t n, typename E::Storage* out) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) E::store(out + i, load(p + i));
  for (; i < n; ++i) E::set(out + i, p[i]);
}

// The memory to compute a block of results in: in place if it can be written in whole vectors, else
// `buffer`, which write_block copies. Results are contiguous.
inline float* result_block(const Tensor& x, int64_t at, int64_t n, float* buffer) {
  if (!x.given) return nullptr;
  if (x.dtype == kFloat32 && n % kLanes == 0) return static_cast<float*>(x.data) + at;
  return buffer;
}
inline void write_block(const Tensor& x, int64_t at, int64_t n, const float* buffer) {
  if (!x.given || (x.dtype == kFloat32 && n % kLanes == 0)) return;
  switch (x.dtype) {
    case kBFloat16: narrow<BF16>(buffer, n, static_cast<uint16_t*>(x.data) + at); break;
    case kFloat16: narrow<F16>(buffer, n, static_cast<uint16_t*>(x.data) + at); break;
    default: narrow<F32>(buffer, n, static_cast<float*>(x.data) + at);
  }
}
inline void zero_block(const Tensor& x, int64_t at, int64_t n) {
  if (!x.given) return;
  const int64_t size = x.dtype == kFloat32 ? 4 : 2;
  memset(static_cast<char*>(x.data) + at * size, 0, static_cast<size_t>(n * size));
}

template <class T>
inline int64_t widen_mask(const T* p, int64_t stride, int64_t n, float* out) {
  int32_t count = 0;
  if (stride == 1) {
    for (int64_t i = 0; i < n; ++i) {
      const int32_t keep = p[i] != 0;
      out[i] = static_cast<float>(keep);
      count += keep;
    }
  } else {
    for (int64_t i = 0; i < n; ++i) {
      const int32_t keep = p[i * stride] != 0;
      out[i] = static_cast<float>(keep);
      count += keep;
    }
  }
  for (int64_t i = n; i < whole_vectors(n); ++i) out[i] = 0.0f;
  return count;
}

// Reads n <= kTokenBlock mask entries as 0 and 1; returns the number of ones. A bool may be any
// byte.
inline int64_t read_mask(const Tensor& x, int64_t at, int64_t n, float* out) {
  switch (x.dtype) {
    case kInt64: return widen_mask(static_cast<const int64_t*>(x.data) + at, x.stride1, n, out);
    case kInt32: return widen_mask(static_cast<const int32_t*>(x.data) + at, x.stride1, n, out);
    default: return widen_mask(static_cast<const uint8_t*>(x.data) + at, x.stride1, n, out);
  }
}

// Calls body(begin, n, mask, count) for the blocks of a piece. begin counts from the sequence's
// start; mask is 0 and 1, padded with zeros to a whole vector.
template <class F>
inline void for_blocks(const LossTokens& t, const Piece& p, const F& body) {
  alignas(64) float mask[kTokenBlock];
  for (int64_t i = 0; i < p.length; i += kTokenBlock) {
    const int64_t n = p.length - i < kTokenBlock ? p.length - i : kTokenBlock;
    const int64_t begin = p.begin + i;
    body(begin, n, mask, read_mask(t.mask, token_at(t, t.mask, p.sequence, begin), n, mask));
  }
}

// Number of unmasked tokens of a piece or a sequence, and sums over them.
struct SequenceSums {
  double tokens, log_ratio, log_weight, distance, slope;
};

inline void add_pieces(const Plan& plan, const Scratch<SequenceSums>& pieces,
                       const Scratch<SequenceSums>& sequences) {
  for (int64_t p = 0; p < plan.pieces; ++p) {
    SequenceSums& s = sequences[plan.piece[p].sequence];
    s.tokens += pieces[p].tokens;
    s.log_ratio += pieces[p].log_ratio;
    s.log_weight += pieces[p].log_weight;
    s.distance += pieces[p].distance;
  }
}

// The divisor of the aggregate: `divisor` if not 0, else the implied count, at least 1.
inline double loss_divisor(const LossTokens& t, int32_t aggregation, double divisor,
                           const Scratch<SequenceSums>& sequences) {
  if (divisor != 0.0) return divisor;
  double count = 0.0;
  for (int64_t s = 0; s < t.sequences; ++s) {
    const double n = sequences[s].tokens;
    count += aggregation == kTokenMean ? n : (n > 0.0 ? 1.0 : 0.0);
  }
  return count > 1.0 ? count : 1.0;
}

// The weight of each term of a sequence with `tokens` unmasked tokens.
inline double sequence_weight(int32_t aggregation, double divisor, double tokens) {
  return aggregation == kSeqMeanTokenMean ? 1.0 / (divisor * (tokens > 1.0 ? tokens : 1.0))
                                          : 1.0 / divisor;
}

inline float lane_min(Lanes x) {
  float v[kLanes];
  store(v, x.v);
  float r = v[0];
  for (int i = 1; i < kLanes; ++i) r = v[i] < r ? v[i] : r;
  return r;
}

}  // namespace
}  // namespace rk
