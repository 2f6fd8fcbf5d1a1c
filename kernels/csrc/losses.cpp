// losses.py's ops on the CPU.
#include <tuple>

#include "rows.h"

namespace mwpb {
namespace {

// What KL(p || q) and its gradients need of class j; p and q have been exponentiated.
template <class A> struct Divergence {
  Divergence(const Row<A>& p, const Row<A>& q, double floor_)
      : zp(p.z), zq(q.z), ep(p.e), eq(q.e), scale_p(A(1) / p.sum), scale_q(A(1) / q.sum), top_p(p.maximum),
        top_q(q.maximum), log_p(vlog(p.sum)), log_q(vlog(q.sum)), floor(A(floor_)) {}

  A p(int64_t j) const { return ep[j] * scale_p; }
  A q(int64_t j) const { return eq[j] * scale_q; }
  // 0 below the smallest normal number, as in the reference
  bool zero(int64_t j) const { return p(j) < std::numeric_limits<A>::min(); }
  // log(q + floor), but for the normalisation where floor is 0
  A other(int64_t j) const { return floor > A(0) ? vlog(q(j) + floor) : zq[j]; }
  A term(int64_t j) const {
    A log_q_j = floor > A(0) ? vlog(q(j) + floor) : (zq[j] - top_q) - log_q;
    A ratio = ((zp[j] - top_p) - log_p) - log_q_j;
    return zero(j) ? A(0) : p(j) * ratio;
  }
  // log(p / (q + floor)) counted from the likeliest class, whose other() is given: where it dominates, the
  // ratio and the divergence nearly cancel
  A relative(int64_t j, A likeliest) const {
    A ratio = (zp[j] - top_p) - (other(j) - likeliest);
    return zero(j) ? A(0) : ratio;
  }
  // p times the derivative of log(q + floor) by log q
  A weight(int64_t j) const { return floor > A(0) ? p(j) * (q(j) / (q(j) + floor)) : p(j); }

  const A *zp, *zq, *ep, *eq;
  A scale_p, scale_q, top_p, top_q, log_p, log_q, floor;
};

template <class A> Divergence<A> divergence(Row<A>& p, Row<A>& q, double floor) {
  p.exponentiate(p.largest());
  q.exponentiate(q.largest());
  return {p, q, floor};
}

Tensor kl_div(const Tensor& logits_p, const Tensor& logits_q, double floor) {
  Tensor out = torch::stable::new_empty(logits_p, {logits_p.size(0)}, result_type(logits_p));
  dispatch_float(logits_p.scalar_type(), "logits", [&](auto tag) {
    using T = decltype(tag);
    using A = compute_t<T>;
    A* to = mutable_data<A>(out);
    for_pairs<T>(logits_p, logits_q, [&](int64_t i, Row<A>& p, Row<A>& q) {
      const auto d = divergence(p, q, floor);
      to[i] = sum_of(p.padded, [d](int64_t j) { return d.term(j); });
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
    const A* gradient = data<A>(grad);
    for_pairs<T>(logits_p, logits_q, [&](int64_t i, Row<A>& p, Row<A>& q) {
      const auto d = divergence(p, q, floor);
      const A g = gradient[i * grad_stride];
      const A likeliest = d.other(p.find(p.maximum, -1));
      const A kl = sum_of(p.padded, [=](int64_t j) { return d.p(j) * d.relative(j, likeliest); });
      const A total = floor > 0 ? sum_of(p.padded, [d](int64_t j) { return d.weight(j); }) : A(1);
      const A undefined = kl - kl;  // NaN where the divergence is infinite
      for (int64_t base = 0; base < p.padded; base += kLanes) {
#pragma GCC ivdep
        for (int lane = 0; lane < kLanes; ++lane) {
          const int64_t j = base + lane;
          const A by_p = g * ((d.zero(j) ? A(0) : d.p(j) * (d.relative(j, likeliest) - kl)) + undefined);
          const A by_q = g * (d.q(j) * total - d.weight(j));
          p.e[j] = by_p;
          q.e[j] = by_q;
        }
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
