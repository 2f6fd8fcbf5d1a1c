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
    A largest = row.largest_besides(y);
    int64_t other = row.find(largest, y);
    row.exponentiate(row.z[y] > largest ? row.z[y] : largest);
    const A scale = A(1) / row.sum, g = data<A>(grad)[i * grad_stride];
    const A own_p = row.e[y] * scale, other_p = row.e[other] * scale, m = own_p - other_p;
    row.fill([=, e = row.e](int64_t j) { return g * -(e[j] * scale * m); });
    row.e[y] = g * (own_p - own_p * m);
    row.e[other] = g * (-other_p - other_p * m);
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
