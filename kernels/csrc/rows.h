// What the ops over rows of logits share: a function of every block of rows, and the results that it gives.
#pragma once

#include "block.h"

namespace mwpb {

inline ScalarType result_type(const Tensor& logits) {
  return logits.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// f(rows) for every block.
template <class T, class F> void for_rows(const Tensor& logits, F&& f) {
  const Matrix<T> matrix(logits);
  parallel(matrix.batch, matrix.classes + 4, [&](int64_t begin, int64_t end) {
    Rows<compute_t<T>> rows(matrix.classes);
    for (int64_t i = begin; i < end; i += rows.kRows) {
      rows.load(matrix, i, end);
      f(rows);
    }
  });
}

// f(p, q) for every pair of blocks.
template <class T, class F> void for_pairs(const Tensor& first, const Tensor& second, F&& f) {
  const Matrix<T> a(first), b(second);
  parallel(a.batch, 2 * a.classes + 8, [&](int64_t begin, int64_t end) {
    Rows<compute_t<T>> p(a.classes), q(a.classes);
    for (int64_t i = begin; i < end; i += p.kRows) {
      p.load(a, i, end);
      q.load(b, i, end);
      f(p, q);
    }
  });
}

// (B,) values f(rows).
template <class F> Tensor row_values(const Tensor& logits, F&& f) {
  Tensor out = torch::stable::new_empty(logits, {logits.size(0)}, result_type(logits));
  dispatch_float(logits.scalar_type(), "logits", [&](auto tag) {
    using A = compute_t<decltype(tag)>;
    A* to = mutable_data<A>(out);
    for_rows<decltype(tag)>(logits, [&](Rows<A>& rows) { rows.store(to, f(rows)); });
  });
  return out;
}

// (B,) values f(rows, y); y = -1 and NaN where the label is outside [0, C).
template <class F> Tensor row_values(const Tensor& logits, const Tensor& labels, F&& f) {
  const Column column(labels);
  return row_values(logits, [&]<class A>(Rows<A>& rows) {
    const IntVec<A> y = rows.load_labels(column);
    return select(y < 0, splat<Vec<A>>(rows.kNaN), f(rows, y));
  });
}

// (B, C) gradients: f(rows, y) returns them as a function of the class; NaN where the label is outside [0, C).
template <class F> Tensor row_gradients(const Tensor& logits, const Tensor& labels, F&& f) {
  Tensor out = torch::stable::new_empty(logits, {logits.size(0), logits.size(1)});
  const Column column(labels);
  dispatch_float(logits.scalar_type(), "logits", [&](auto tag) {
    using T = decltype(tag);
    using A = compute_t<T>;
    T* to = mutable_data<T>(out);
    for_rows<T>(logits, [&](Rows<A>& rows) {
      const IntVec<A> y = rows.load_labels(column);
      const auto gradient = f(rows, y);
      rows.fill([&](int64_t c) { return select(y < 0, splat<Vec<A>>(rows.kNaN), gradient(c)); });
      rows.store(to);
    });
  });
  return out;
}

}  // namespace mwpb
