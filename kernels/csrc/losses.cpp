// losses.py's ops on the CPU.
#include <tuple>

#include "rows.h"

namespace mwpb {
namespace {

// Leaves the probabilities in p.e and q.e; where Floored, floor > 0 and q.z becomes log(q + floor).
template <bool Floored, class A> void prepare(Row<A>& p, Row<A>& q, A floor) {
  p.exponentiate(p.largest());
  p.fill([e = p.e, scale = A(1) / p.sum](int64_t j) { return e[j] * scale; });
  q.exponentiate(q.largest());
  q.fill([e = q.e, scale = A(1) / q.sum](int64_t j) { return e[j] * scale; });
  if constexpr (Floored) q.write(q.z, [e = q.e, floor](int64_t j) { return vlog(e[j] + floor); });
}

// Whether a probability counts as 0: below the smallest normal number, as in the reference.
template <class A> bool is_zero(A p) { return p < std::numeric_limits<A>::min(); }

// ((zp - maximum) - log_p) - ((zq - top_q) - log_q) of class j; 0 where p is.
template <class A> auto log_ratio(const Row<A>& p, const Row<A>& q, A log_p, A top_q, A log_q) {
  return [=, zp = p.z, zq = q.z, e = p.e, top_p = p.maximum](int64_t j) {
    A ratio = ((zp[j] - top_p) - log_p) - ((zq[j] - top_q) - log_q);
    return is_zero(e[j]) ? A(0) : ratio;
  };
}

template <bool Floored, class A> A divergence(Row<A>& p, Row<A>& q, A floor) {
  prepare<Floored>(p, q, floor);
  const auto ratio = log_ratio(p, q, vlog(p.sum), Floored ? A(0) : q.maximum, Floored ? A(0) : vlog(q.sum));
  p.fill([=, e = p.e](int64_t j) { return e[j] * ratio(j); });
  return p.total();
}

// Leaves the gradients, g times those of the divergence, in p.e and q.e.
template <bool Floored, class A> void gradients(Row<A>& p, Row<A>& q, A floor, A g) {
  prepare<Floored>(p, q, floor);
  A *relative = p.z, *work = q.z, *ep = p.e, *eq = q.e;
  // Counted from the likeliest class: where it dominates, the ratio and the divergence nearly cancel.
  p.write(relative, log_ratio(p, q, A(0), q.z[p.find(p.maximum, -1)], A(0)));
  q.write(work, [=](int64_t j) { return ep[j] * relative[j]; });
  const A kl = q.sum_of(work);
  const A undefined = kl - kl;  // NaN where the divergence is infinite
  if constexpr (Floored) {
    q.write(work, [=](int64_t j) { return ep[j] * (eq[j] / (eq[j] + floor)); });
    const A total = q.sum_of(work);
    q.fill([=](int64_t j) { return g * (eq[j] * total - work[j]); });
  } else {
    q.fill([=](int64_t j) { return g * (eq[j] - ep[j]); });
  }
  p.fill([=](int64_t j) {
    A d = ep[j] * (relative[j] - kl);
    return g * ((is_zero(ep[j]) ? A(0) : d) + undefined);
  });
}

Tensor kl_div(const Tensor& logits_p, const Tensor& logits_q, double floor) {
  Tensor out = torch::stable::new_empty(logits_p, {logits_p.size(0)}, result_type(logits_p));
  dispatch_float(logits_p.scalar_type(), "logits", [&](auto tag) {
    using T = decltype(tag);
    using A = compute_t<T>;
    A* to = mutable_data<A>(out);
    for_pairs<T>(logits_p, logits_q, [&](int64_t i, Row<A>& p, Row<A>& q) {
      to[i] = floor > 0 ? divergence<true>(p, q, A(floor)) : divergence<false>(p, q, A(0));
    });
  });
  return out;
}

std::tuple<Tensor, Tensor> kl_div_backward(
    const Tensor& grad, const Tensor& logits_p, const Tensor& logits_q, double floor) {
  const int64_t grad_stride = grad.stride(0);
  Tensor out_p = torch::stable::new_empty(logits_p, {logits_p.size(0), logits_p.size(1)});
  Tensor out_q = torch::stable::new_empty(logits_q, {logits_q.size(0), logits_q.size(1)});
  dispatch_float(logits_p.scalar_type(), "logits", [&](auto tag) {
    using T = decltype(tag);
    using A = compute_t<T>;
    T *to_p = mutable_data<T>(out_p), *to_q = mutable_data<T>(out_q);
    const A* g = data<A>(grad);
    for_pairs<T>(logits_p, logits_q, [&](int64_t i, Row<A>& p, Row<A>& q) {
      if (floor > 0) {
        gradients<true>(p, q, A(floor), g[i * grad_stride]);
      } else {
        gradients<false>(p, q, A(0), g[i * grad_stride]);
      }
      p.store(to_p + i * p.classes);
      q.store(to_q + i * q.classes);
    });
  });
  return {out_p, out_q};
}

}  // namespace
}  // namespace mwpb

STABLE_TORCH_LIBRARY_IMPL(mwpb, CPU, m) {
  m.impl("kl_div", TORCH_BOX(&mwpb::kl_div));
  m.impl("kl_div_backward", TORCH_BOX(&mwpb::kl_div_backward));
}
