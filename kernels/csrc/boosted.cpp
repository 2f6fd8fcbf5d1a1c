// boosted.py's ops on the CPU.
#include "rows.h"

namespace mwpb {
namespace {

// Of 1.0001 + 1e-12 - p_r = (1 - p_r) + kRest only the sum of the other probabilities is exact near p_r = 1.
constexpr double kRest = 1.00000001e-4;

// Exponentiates the row and finds its runner-up class r.
template <class A> struct RunnerUp {
  RunnerUp(Row<A>& row, int64_t y) {
    const A largest = row.largest_besides(y);
    index = row.find(largest, y);
    row.exponentiate(row.z[y] > largest ? row.z[y] : largest);
    scale = A(1) / row.sum;
    const A own = row.e[index];
    row.e[index] = 0;
    rest = row.total() * scale;
    row.e[index] = own;
  }
  int64_t index;
  A rest, scale;  // 1 - p_r, and 1 / sum
};

Tensor boosted_ce(const Tensor& logits, const Tensor& labels) {
  return row_values(logits, labels, []<class A>(Row<A>& row, int64_t y) {
    const RunnerUp<A> other(row, y);
    return vlog(row.sum) - (row.z[y] - row.maximum) - vlog(other.rest + A(kRest));
  });
}

Tensor boosted_ce_backward(const Tensor& grad, const Tensor& logits, const Tensor& labels) {
  const int64_t grad_stride = grad.stride(0);
  return row_gradients(logits, labels, [&]<class A>(int64_t i, Row<A>& row, int64_t y) {
    const RunnerUp<A> other(row, y);
    const A g = data<A>(grad)[i * grad_stride], own = row.e[y], scale = other.scale;
    const A p = row.e[other.index] * scale, w = p / (other.rest + A(kRest));
    row.fill([=, e = row.e](int64_t j) { return g * (e[j] * scale * (A(1) - w)); });
    row.e[y] = g * (own * scale * (A(1) - w) - A(1));
    row.e[other.index] = g * (p + w * other.rest);
    return true;
  });
}

}  // namespace
}  // namespace mwpb

STABLE_TORCH_LIBRARY_IMPL(mwpb, CPU, m) {
  m.impl("boosted_ce", TORCH_BOX(&mwpb::boosted_ce));
  m.impl("boosted_ce_backward", TORCH_BOX(&mwpb::boosted_ce_backward));
}
