// Rows of logits, one sample each, copied into padded memory so that every loop runs over whole vectors.
#pragma once

#include <vector>

#include "common.h"
#include "vecmath.h"

namespace mwpb {

constexpr int kLanes = 16;

// Folds lane[0] .. lane[2 * width - 1] across the lanes by f.
template <int width, class A, class F> inline A fold_lanes(A* lane, F&& f) {
  for (int j = 0; j < width; ++j) lane[j] = f(lane[j], lane[j + width]);
  if constexpr (width > 1) {
    return fold_lanes<width / 2>(lane, f);
  } else {
    return lane[0];
  }
}

// Folds `padded` values, a multiple of kLanes, by f: lane by lane, then across the lanes.
template <class A, class F> inline A fold(const A* v, int64_t padded, F&& f) {
  alignas(64) A lane[kLanes];
  for (int j = 0; j < kLanes; ++j) lane[j] = v[j];
  for (int64_t base = kLanes; base < padded; base += kLanes)
    for (int j = 0; j < kLanes; ++j) lane[j] = f(lane[j], v[base + j]);
  return fold_lanes<kLanes / 2>(lane, f);
}

template <class T> inline T narrow(compute_t<T> v) { return T(v); }
#if defined(__F16C__) || defined(__AVX512F__)
template <> inline Half narrow<Half>(float v) {
  _Float16 h = _Float16(v);
  Half out;
  std::memcpy(&out.x, &h, 2);
  return out;
}
#endif

// One row: z are the logits, once loaded -infinity past the last class; e is working memory of the same size.
template <class A> struct Row {
  static constexpr A kLow = -std::numeric_limits<A>::infinity();

  explicit Row(int64_t n)
      : classes(n), padded((n + kLanes - 1) / kLanes * kLanes), memory_(2 * padded / kLanes), z(memory_.data()->lane),
        e(z + padded) {}
  Row(const Row&) = delete;

  template <class T> void load(const T* from, int64_t stride) {
    for (int j = 0; j < kLanes; ++j) z[padded - kLanes + j] = kLow;
    if (stride == 1) {
      copy(from, z, [](T v) { return widen(v); });
    } else {
      for (int64_t j = 0; j < classes; ++j) z[j] = widen(from[j * stride]);
    }
  }

  // Writes e as the result.
  template <class T> void store(T* to) const {
    copy(e, to, [](A v) { return narrow<T>(v); });
  }

  // to[j] = f(j) for every class and for the padding; to is z or e.
  template <class F> void write(A* to, F&& f) const {
    for (int64_t base = 0; base < padded; base += kLanes) {
#pragma GCC ivdep
      for (int j = 0; j < kLanes; ++j) to[base + j] = f(base + j);
    }
  }
  template <class F> void fill(F&& f) {
    write(e, f);
  }

  // Ignores NaN.
  A largest() const {
    return fold(z, padded, [](A a, A b) { return b > a ? b : a; });
  }
  A largest_besides(int64_t y) {
    A own = z[y];
    z[y] = kLow;
    A best = largest();
    z[y] = own;
    return best;
  }

  // The first class other than y whose logit is `value`.
  int64_t find(A value, int64_t y) const {
    for (int64_t base = 0; base < padded; base += kLanes) {
      int hit = 0;
      for (int j = 0; j < kLanes; ++j) hit |= z[base + j] == value;
      for (int j = 0; hit && j < kLanes; ++j)
        if (z[base + j] == value && base + j != y) return base + j;
    }
    return y == 0 ? 1 : 0;  // a row of NaN: its result is NaN whatever the class
  }

  // Whether a logit is NaN or +infinity.
  bool poisoned() const {
    int bad = 0;
    for (int64_t base = 0; base < padded; base += kLanes)
      for (int j = 0; j < kLanes; ++j) bad |= !(z[base + j] < -kLow);
    return bad;
  }

  // e = exp(z - maximum), 0 in the padding, and its sum: NaN for a row with NaN or +infinity, or of -infinity only.
  void exponentiate(A largest) {
    maximum = largest;
    fill([=, v = z](int64_t j) { return vexp(v[j] - largest); });
    sum = total();
  }

  A sum_of(const A* values) const {
    return fold(values, padded, [](A a, A b) { return a + b; });
  }
  A total() const { return sum_of(e); }

  // Exponentiates the row and returns its runner-up class.
  int64_t exponentiate_with_runner_up(int64_t y) {
    const A best = largest_besides(y);
    const int64_t other = find(best, y);
    exponentiate(z[y] > best ? z[y] : best);
    return other;
  }
  // The sum of the probabilities but for two classes, whose e becomes 0: where 1 - p would lose its digits.
  A rest_besides(int64_t first, int64_t second) {
    e[first] = e[second] = 0;
    return total() / sum;
  }

  int64_t classes, padded;
  A maximum = 0, sum = 0;

 private:
  template <class From, class To, class F> void copy(const From* __restrict from, To* __restrict to, F&& f) const {
    for (int64_t j = 0; j < classes; ++j) to[j] = f(from[j]);
  }

  struct alignas(64) Lanes {
    A lane[kLanes];
  };
  std::vector<Lanes> memory_;

 public:
  A* const z;
  A* const e;
};

// The rows of a (B, C) tensor.
template <class T> struct Matrix {
  explicit Matrix(const Tensor& logits)
      : batch(logits.size(0)), classes(logits.size(1)), row_stride(logits.stride(0)), stride(logits.stride(1)),
        values(data<T>(logits)) {}

  void load(int64_t i, Row<compute_t<T>>& row) const { row.load(values + i * row_stride, stride); }

  int64_t batch, classes, row_stride, stride;
  const T* values;
};

inline ScalarType result_type(const Tensor& logits) {
  return logits.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// f(i, row, y) for every row, with y = -1 for a label outside [0, C).
template <class T, class F> void for_rows(const Tensor& logits, const Tensor& labels, F&& f) {
  Matrix<T> matrix(logits);
  const int64_t* y = data<int64_t>(labels);
  const int64_t y_stride = labels.stride(0);
  parallel(matrix.batch, 2 * matrix.classes + 16, [&](int64_t begin, int64_t end) {
    Row<compute_t<T>> row(matrix.classes);
    for (int64_t i = begin; i < end; ++i) {
      int64_t label = y[i * y_stride];
      matrix.load(i, row);
      f(i, row, label >= 0 && label < matrix.classes ? label : -1);
    }
  });
}

// f(i, p, q) for every pair of rows.
template <class T, class F> void for_pairs(const Tensor& first, const Tensor& second, F&& f) {
  Matrix<T> a(first), b(second);
  parallel(a.batch, 4 * a.classes + 32, [&](int64_t begin, int64_t end) {
    Row<compute_t<T>> p(a.classes), q(a.classes);
    for (int64_t i = begin; i < end; ++i) {
      a.load(i, p);
      b.load(i, q);
      f(i, p, q);
    }
  });
}

// (B,) values f(row, y); NaN where the label is outside [0, C).
template <class F> Tensor row_values(const Tensor& logits, const Tensor& labels, F&& f) {
  Tensor out = torch::stable::new_empty(logits, {logits.size(0)}, result_type(logits));
  dispatch_float(logits.scalar_type(), "logits", [&](auto tag) {
    using T = decltype(tag);
    using A = compute_t<T>;
    A* to = mutable_data<A>(out);
    for_rows<T>(logits, labels, [&](int64_t i, Row<A>& row, int64_t y) {
      to[i] = y < 0 ? std::numeric_limits<A>::quiet_NaN() : A(f(row, y));
    });
  });
  return out;
}

// (B, C) gradients: f(i, row, y) leaves row i's in row.e and says whether it is defined; NaN where it is not.
template <class F> Tensor row_gradients(const Tensor& logits, const Tensor& labels, F&& f) {
  Tensor out = torch::stable::new_empty(logits, {logits.size(0), logits.size(1)});
  dispatch_float(logits.scalar_type(), "logits", [&](auto tag) {
    using T = decltype(tag);
    using A = compute_t<T>;
    T* to = mutable_data<T>(out);
    for_rows<T>(logits, labels, [&](int64_t i, Row<A>& row, int64_t y) {
      if (y < 0 || !f(i, row, y)) row.fill([](int64_t) { return std::numeric_limits<A>::quiet_NaN(); });
      row.store(to + i * row.classes);
    });
  });
  return out;
}

}  // namespace mwpb
