// logit_grads.py's ops on the CPU.
#include "rows.h"

namespace mwpb {
namespace {

Tensor ce_grad(const Tensor& logits, const Tensor& labels) {
  return row_gradients(logits, labels, []<class A>(int64_t, Row<A>& row, int64_t y) {
    row.exponentiate(row.largest());
    const A scale = A(1) / row.sum;
    row.fill([=, e = row.e](int64_t j) { return e[j] * scale; });
    row.e[y] -= A(1);
    return true;
  });
}

Tensor kl_grad(const Tensor& logits, const Tensor& target_logits) {
  Tensor out = torch::stable::new_empty(logits, {logits.size(0), logits.size(1)});
  dispatch_float(logits.scalar_type(), "logits", [&](auto tag) {
    using T = decltype(tag);
    using A = compute_t<T>;
    T* to = mutable_data<T>(out);
    for_pairs<T>(logits, target_logits, [&](int64_t i, Row<A>& row, Row<A>& target) {
      row.exponentiate(row.largest());
      target.exponentiate(target.largest());
      const A scale = A(1) / row.sum, target_scale = A(1) / target.sum;
      row.fill([=, e = row.e, t = target.e](int64_t j) { return e[j] * scale - t[j] * target_scale; });
      row.store(to + i * row.classes);
    });
  });
  return out;
}

Tensor cw_grad(const Tensor& logits, const Tensor& labels, double confidence) {
  return row_gradients(logits, labels, [=]<class A>(int64_t, Row<A>& row, int64_t y) {
    const A best = row.largest_besides(y), gap = row.z[y] - best;
    if (gap != gap || row.poisoned()) return false;
    row.fill([](int64_t) { return A(0); });
    if (gap + A(confidence) > A(0)) {
      row.e[row.find(best, y)] = A(1);
      row.e[y] = A(-1);
    }
    return true;
  });
}

Tensor dlr_grad(const Tensor& logits, const Tensor& labels) {
  return row_gradients(logits, labels, []<class A>(int64_t, Row<A>& row, int64_t y) {
    if (row.poisoned()) return false;
    const A own = row.z[y];
    A value[3];
    int64_t index[3];
    // Where fewer than three logits are finite an index may repeat: the gradient is then 0 or undefined.
    for (int k = 0; k < 3; ++k) {
      value[k] = row.largest();
      index[k] = row.find(value[k], -1);
      row.z[index[k]] = row.kLow;
    }
    const int second = index[0] == y;
    const A slope = A(1) / (value[0] - value[2] + A(1e-12));
    const A ratio = (own - value[second]) * slope;
    if (!(ratio - ratio == A(0))) return false;
    row.fill([](int64_t) { return A(0); });
    row.e[index[second]] += slope;
    row.e[y] -= slope;
    row.e[index[0]] += ratio * slope;
    row.e[index[2]] -= ratio * slope;
    return true;
  });
}

}  // namespace
}  // namespace mwpb

STABLE_TORCH_LIBRARY_IMPL(mwpb, CPU, m) {
  m.impl("ce_grad", TORCH_BOX(&mwpb::ce_grad));
  m.impl("kl_grad", TORCH_BOX(&mwpb::kl_grad));
  m.impl("cw_grad", TORCH_BOX(&mwpb::cw_grad));
  m.impl("dlr_grad", TORCH_BOX(&mwpb::dlr_grad));
}
