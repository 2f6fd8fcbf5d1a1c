// boosted.py's ops on the CPU.
#include "rows.h"

namespace mwpb {
namespace {

// Of 1.0001 + 1e-12 - p_r = (1 - p_r) + kRest only the sum of the other probabilities is exact near p_r = 1.
constexpr double kRest = 1.00000001e-4;

Tensor boosted_ce(const Tensor& logits, const Tensor& labels) {
  return row_values(logits, labels, []<class A>(Rows<A>& rows, IntVec<A> y) {
    const auto [own, best, other] = rows.compare(y);
    const Vec<A> top = select(own > best, own, best);
    const auto [sum, rest] = rows.sum_of([&, other = other](int64_t c) {
      const Vec<A> e = vexp_decay(rows.z[c] - top);
      return Two{e, select(other == IntOf<A>(c), Vec<A>{}, e)};
    });
    return vlog(sum) - (own - top) - vlog(rest / sum + A(kRest));
  });
}

Tensor boosted_ce_backward(const Tensor& grad, const Tensor& logits, const Tensor& labels) {
  const Column column(grad);
  return row_gradients(logits, labels, [=]<class A>(Rows<A>& rows, IntVec<A> y) {
    const auto [own, best, other] = rows.softmax_compare(y);
    const Vec<A> g = rows.load_values(column);
    const Vec<A> p_own = rows.probability(own), p_other = rows.probability(best);
    const Vec<A> rest = rows.rest_besides(y, other), w = p_other / (p_own + rest + A(kRest));
    return rows.by_class(y, g * (-(p_other + rest) - w * p_own), other, g * (p_other + w * (p_own + rest)),
                         [=, e = rows.e](int64_t c) { return g * (e[c] * (A(1) - w)); });
  });
}

}  // namespace
}  // namespace mwpb

STABLE_TORCH_LIBRARY_IMPL(mwpb, CPU, m) {
  m.impl("boosted_ce", TORCH_BOX(&mwpb::boosted_ce));
  m.impl("boosted_ce_backward", TORCH_BOX(&mwpb::boosted_ce_backward));
}
