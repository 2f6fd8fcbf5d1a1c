// Rows of logits, one sample each, seen as blocks of 16 values so that the class loop vectorises for any C.
#pragma once

#include "common.h"
#include "vecmath.h"

namespace mwpb {

constexpr int kBlock = 16;

// Calls f(base, values, count) for every block of a row; values past the end hold `pad`.
template <class T, class F> inline void for_blocks(const T* row, int64_t stride, int64_t classes, compute_t<T> pad, F&& f) {
  using A = compute_t<T>;
  alignas(64) A values[kBlock];
  for (int64_t base = 0; base < classes; base += kBlock) {
    int count = int(std::min<int64_t>(kBlock, classes - base));
    if (count == kBlock && stride == 1) {
      for (int j = 0; j < kBlock; ++j) values[j] = widen(row[base + j]);
    } else {
      for (int j = 0; j < kBlock; ++j) values[j] = pad;
      for (int j = 0; j < count; ++j) values[j] = widen(row[(base + j) * stride]);
    }
    f(base, values, count);
  }
}

// The parts of a softmax over one row: its maximum and the sum of exp(z - maximum). NaN in, NaN out.
template <class A> struct Softmax {
  A maximum, sum;
  A probability(A z) const { return vexp(z - maximum) / sum; }
  A log_probability(A z) const { return (z - maximum) - std::log(sum); }
};

template <class T> inline Softmax<compute_t<T>> softmax_of(const T* row, int64_t stride, int64_t classes) {
  using A = compute_t<T>;
  const A low = -std::numeric_limits<A>::infinity();
  alignas(64) A top[kBlock], total[kBlock];
  for (int j = 0; j < kBlock; ++j) top[j] = low, total[j] = 0;
  for_blocks(row, stride, classes, low, [&](int64_t, const A* v, int) {
    for (int j = 0; j < kBlock; ++j) top[j] = v[j] > top[j] ? v[j] : top[j];
  });
  A maximum = low;
  for (int j = 0; j < kBlock; ++j) maximum = top[j] > maximum ? top[j] : maximum;
  for_blocks(row, stride, classes, low, [&](int64_t, const A* v, int) {
    for (int j = 0; j < kBlock; ++j) total[j] += vexp(v[j] - maximum);
  });
  A sum = 0;
  for (int j = 0; j < kBlock; ++j) sum += total[j];
  return {maximum, sum};
}

// The first class other than y with the largest logit.
template <class T> inline int64_t runner_up(const T* row, int64_t stride, int64_t classes, int64_t y) {
  int64_t best = y == 0 ? 1 : 0;
  auto value = widen(row[best * stride]);
  for (int64_t j = best + 1; j < classes; ++j) {
    auto v = widen(row[j * stride]);
    if (j != y && v > value) best = j, value = v;
  }
  return best;
}

// A (B, C) tensor of logits with its labels, and the loop over its rows.
struct Rows {
  Rows(const Tensor& logits, const Tensor& labels)
      : batch(logits.size(0)), classes(logits.size(1)), row_stride(logits.stride(0)), stride(logits.stride(1)),
        labels_(data<int64_t>(labels)), label_stride_(labels.stride(0)) {}

  int64_t label(int64_t i) const { return labels_[i * label_stride_]; }
  bool valid(int64_t y) const { return y >= 0 && y < classes; }

  // f(i, row, y) for every row i; y outside [0, C) is the callee's to answer with NaN.
  template <class T, class F> void for_rows(const T* logits, F&& f) const {
    parallel(batch, classes * 16, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) f(i, logits + i * row_stride, label(i));
    });
  }

  int64_t batch, classes, row_stride, stride;

 private:
  const int64_t* labels_;
  int64_t label_stride_;
};

inline ScalarType result_type(const Tensor& logits) {
  return logits.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

}  // namespace mwpb
