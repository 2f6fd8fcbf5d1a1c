// margin.py's ops on the CPU.
#include "rows.h"

namespace mwpb {
namespace {

template <class T> compute_t<T> margin_of(const Rows& rows, const T* row, int64_t y) {
  using A = compute_t<T>;
  if (!rows.valid(y)) return std::numeric_limits<A>::quiet_NaN();
  auto softmax = softmax_of(row, rows.stride, rows.classes);
  int64_t r = runner_up(row, rows.stride, rows.classes, y);
  A own = vexp(widen(row[y * rows.stride]) - softmax.maximum);
  A other = vexp(widen(row[r * rows.stride]) - softmax.maximum);
  return (own - other) / softmax.sum;
}

template <class F> Tensor per_row(const Tensor& logits, const Tensor& labels, F&& f) {
  Rows rows(logits, labels);
  Tensor out = torch::stable::new_empty(logits, {rows.batch}, result_type(logits));
  dispatch_float(logits.scalar_type(), "logits", [&](auto tag) {
    using T = decltype(tag);
    auto* result = mutable_data<compute_t<T>>(out);
    rows.for_rows(data<T>(logits), [&](int64_t i, const T* row, int64_t y) { result[i] = f(rows, row, y); });
  });
  return out;
}

Tensor margin(const Tensor& logits, const Tensor& labels) {
  return per_row(logits, labels, [](const Rows& rows, auto* row, int64_t y) { return margin_of(rows, row, y); });
}

Tensor margin_radius(const Tensor& logits, const Tensor& labels, double eps, double alpha) {
  return per_row(logits, labels, [=](const Rows& rows, auto* row, int64_t y) {
    auto m = margin_of(rows, row, y);
    using A = decltype(m);
    return A(std::exp(A(alpha) * m) * A(eps));
  });
}

Tensor deviation_radius(const Tensor& logits, const Tensor& labels, double eps, double alpha) {
  return per_row(logits, labels, [=](const Rows& rows, auto* row, int64_t y) {
    auto softmax = softmax_of(row, rows.stride, rows.classes);
    using A = decltype(softmax.sum);
    if (!rows.valid(y)) return std::numeric_limits<A>::quiet_NaN();
    const A mean = A(1) / A(rows.classes);
    A squares = 0;
    for (int64_t j = 0; j < rows.classes; ++j) {
      A d = softmax.probability(widen(row[j * rows.stride])) - mean;
      squares += d * d;
    }
    A deviation = std::sqrt(squares / A(rows.classes));
    A distance = softmax.probability(widen(row[y * rows.stride])) - mean;
    A score = deviation == A(0) ? A(0) : distance / deviation;
    return A(std::exp(A(alpha) * score) * A(eps));
  });
}

Tensor margin_backward(const Tensor& grad, const Tensor& logits, const Tensor& labels) {
  Rows rows(logits, labels);
  Tensor out = torch::stable::new_empty(logits, {rows.batch, rows.classes});
  dispatch_float(logits.scalar_type(), "logits", [&](auto tag) {
    using T = decltype(tag);
    using A = compute_t<T>;
    T* result = mutable_data<T>(out);
    const A* g = data<A>(grad);
    rows.for_rows(data<T>(logits), [&](int64_t i, const T* row, int64_t y) {
      T* to = result + i * rows.classes;
      if (!rows.valid(y)) {
        std::fill(to, to + rows.classes, T(std::numeric_limits<float>::quiet_NaN()));
        return;
      }
      auto softmax = softmax_of(row, rows.stride, rows.classes);
      int64_t r = runner_up(row, rows.stride, rows.classes, y);
      A own = softmax.probability(widen(row[y * rows.stride]));
      A other = softmax.probability(widen(row[r * rows.stride]));
      A scale = g[i * grad.stride(0)];
      for (int64_t j = 0; j < rows.classes; ++j) {
        A p = softmax.probability(widen(row[j * rows.stride]));
        A d = (j == y ? own : A(0)) - (j == r ? other : A(0));
        to[j] = T(scale * (d - p * (own - other)));
      }
    });
  });
  return out;
}

}  // namespace
}  // namespace mwpb

STABLE_TORCH_LIBRARY_IMPL(mwpb, CPU, m) {
  m.impl("margin", TORCH_BOX(&mwpb::margin));
  m.impl("margin_radius", TORCH_BOX(&mwpb::margin_radius));
  m.impl("deviation_radius", TORCH_BOX(&mwpb::deviation_radius));
  m.impl("margin_backward", TORCH_BOX(&mwpb::margin_backward));
}
