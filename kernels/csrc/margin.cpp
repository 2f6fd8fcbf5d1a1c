// margin.py's ops on the CPU.
#include "rows.h"

namespace mwpb {
namespace {

template <class A> A margin_of(Row<A>& row, int64_t y) {
  A other = row.largest_besides(y);
  row.exponentiate(row.z[y] > other ? row.z[y] : other);
  return (row.e[y] - vexp(other - row.maximum)) / row.sum;
}

Tensor margin(const Tensor& logits, const Tensor& labels) {
  return row_values(logits, labels, [](auto& row, int64_t y) { return margin_of(row, y); });
}

Tensor margin_radius(const Tensor& logits, const Tensor& labels, double eps, double alpha) {
  return row_values(logits, labels, [=]<class A>(Row<A>& row, int64_t y) {
    return vexp(A(alpha) * margin_of(row, y)) * A(eps);
  });
}

Tensor deviation_radius(const Tensor& logits, const Tensor& labels, double eps, double alpha) {
  return row_values(logits, labels, [=]<class A>(Row<A>& row, int64_t y) {
    row.exponentiate(row.largest());
    const A mean = A(1) / A(row.classes), scale = A(1) / row.sum;
    A distance = row.e[y] * scale - mean;
    row.fill([=, e = row.e](int64_t j) {
      A d = e[j] * scale - mean;
      return d * d;
    });
    std::fill(row.e + row.classes, row.e + row.padded, A(0));
    A deviation = std::sqrt(row.total() / A(row.classes));
    A score = deviation == A(0) ? A(0) : distance / deviation;
    return vexp(A(alpha) * score) * A(eps);
  });
}

Tensor margin_backward(const Tensor& grad, const Tensor& logits, const Tensor& labels) {
  const int64_t grad_stride = grad.stride(0);
  return row_gradients(logits, labels, [&]<class A>(int64_t i, Row<A>& row, int64_t y) {
    const int64_t other = row.exponentiate_with_runner_up(y);
    const A scale = A(1) / row.sum, g = data<A>(grad)[i * grad_stride];
    const A p_own = row.e[y] * scale, p_other = row.e[other] * scale, m = p_own - p_other;
    const A rest = row.rest_besides(y, other);
    row.fill([=, e = row.e](int64_t j) { return g * -(e[j] * scale * m); });
    row.e[y] = g * (p_own * (rest + A(2) * p_other));
    row.e[other] = g * (-p_other * (rest + A(2) * p_own));
    return true;
  });
}

}  // namespace
}  // namespace mwpb

STABLE_TORCH_LIBRARY_IMPL(mwpb, CPU, m) {
  m.impl("margin", TORCH_BOX(&mwpb::margin));
  m.impl("margin_radius", TORCH_BOX(&mwpb::margin_radius));
  m.impl("deviation_radius", TORCH_BOX(&mwpb::deviation_radius));
  m.impl("margin_backward", TORCH_BOX(&mwpb::margin_backward));
}
