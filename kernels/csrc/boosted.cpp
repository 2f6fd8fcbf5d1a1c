// boosted.py's ops on the CPU.
#include "rows.h"

namespace mwpb {
namespace {

// Of 1.0001 + 1e-12 - p_r = (1 - p_r) + kRest only the sum of the other probabilities is exact near p_r = 1.
constexpr double kRest = 1.00000001e-4;

Tensor boosted_ce(const Tensor& logits, const Tensor& labels) {
  return row_values(logits, labels, []<class A>(Row<A>& row, int64_t y) {
    const int64_t other = row.exponentiate_with_runner_up(y);
    const A rest = row.rest_besides(other, other);
    return vlog(row.sum) - (row.z[y] - row.maximum) - vlog(rest + A(kRest));
  });
}

Tensor boosted_ce_backward(const Tensor& grad, const Tensor& logits, const Tensor& labels) {
  const int64_t grad_stride = grad.stride(0);
  return row_gradients(logits, labels, [&]<class A>(int64_t i, Row<A>& row, int64_t y) {
    const int64_t other = row.exponentiate_with_runner_up(y);
    const A g = data<A>(grad)[i * grad_stride], scale = A(1) / row.sum;
    const A p_own = row.e[y] * scale, p_other = row.e[other] * scale;
    const A rest = row.rest_besides(y, other), w = p_other / (p_own + rest + A(kRest));
    row.fill([=, e = row.e](int64_t j) { return g * (e[j] * scale * (A(1) - w)); });
    row.e[y] = g * (-(p_other + rest) - w * p_own);
    row.e[other] = g * (p_other + w * (p_own + rest));
    return true;
  });
}

}  // namespace
}  // namespace mwpb

STABLE_TORCH_LIBRARY_IMPL(mwpb, CPU, m) {
  m.impl("boosted_ce", TORCH_BOX(&mwpb::boosted_ce));
  m.impl("boosted_ce_backward", TORCH_BOX(&mwpb::boosted_ce_backward));
}
