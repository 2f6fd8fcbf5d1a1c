// losses.py's ops on the CPU.
#include <tuple>

#include "rows.h"

namespace mwpb {
namespace {

// Whether a probability counts as 0: below the smallest normal number, as in the reference.
template <class A> IntVec<A> is_zero(Vec<A> p) { return p < std::numeric_limits<A>::min(); }

// q.z = log(q + floor), floor > 0; leaves the probabilities in q.e.
template <class A> void take_logs(Rows<A>& q, A floor) {
  q.softmax();
  for (int64_t c = 0; c < q.classes; ++c) q.z[c] = vlog(q.e[c] + floor);
}

template <bool Floored, class A> Vec<A> divergence(Rows<A>& p, Rows<A>& q, A floor) {
  p.exponentials();
  Vec<A> top_q{}, log_q{};
  if constexpr (Floored) {
    take_logs(q, floor);
  } else {
    q.exponentials();
    top_q = q.maximum, log_q = vlog(q.sum);
  }
  const Vec<A> scale = A(1) / p.sum, log_p = vlog(p.sum);
  return p.sum_of([&](int64_t c) {
    const Vec<A> probability = p.e[c] * scale, ratio = ((p.z[c] - p.maximum) - log_p) - ((q.z[c] - top_q) - log_q);
    return probability * select(is_zero<A>(probability), Vec<A>{}, ratio);
  });
}

// Leaves the gradients, g times those of the divergence, in p.e and q.e.
template <bool Floored, class A> void gradients(Rows<A>& p, Rows<A>& q, A floor, Vec<A> g) {
  p.softmax();
  if constexpr (Floored) {
    take_logs(q, floor);
  } else {
    q.softmax();
  }
  // Counted from the likeliest class: where it dominates, the ratio and the divergence nearly cancel.
  Vec<A> likeliest{};
  for (int64_t c = p.classes; c-- > 0;) likeliest = select(p.z[c] == p.maximum, q.z[c], likeliest);
  const Vec<A> kl = p.sum_of([&](int64_t c) {
    const Vec<A> relative = (p.z[c] - p.maximum) - (q.z[c] - likeliest);
    p.z[c] = select(is_zero<A>(p.e[c]), Vec<A>{}, relative);
    return p.e[c] * p.z[c];
  });
  const Vec<A> undefined = kl - kl;  // NaN where the divergence is infinite
  if constexpr (Floored) {
    const Vec<A> total = q.sum_of([&](int64_t c) { return q.z[c] = p.e[c] * (q.e[c] / (q.e[c] + floor)); });
    q.fill([&](int64_t c) { return g * (q.e[c] * total - q.z[c]); });
  } else {
    q.fill([&](int64_t c) { return g * (q.e[c] - p.e[c]); });
  }
  p.fill([&](int64_t c) {
    const Vec<A> d = p.e[c] * (p.z[c] - kl);
    return g * (select(is_zero<A>(p.e[c]), Vec<A>{}, d) + undefined);
  });
}

Tensor kl_div(const Tensor& logits_p, const Tensor& logits_q, double floor) {
  Tensor out = torch::stable::new_empty(logits_p, {logits_p.size(0)}, result_type(logits_p));
  dispatch_float(logits_p.scalar_type(), "logits", [&](auto tag) {
    using T = decltype(tag);
    using A = compute_t<T>;
    A* to = mutable_data<A>(out);
    for_pairs<T>(logits_p, logits_q, [&](Rows<A>& p, Rows<A>& q) {
      p.store(to, floor > 0 ? divergence<true>(p, q, A(floor)) : divergence<false>(p, q, A(0)));
    });
  });
  return out;
}

std::tuple<Tensor, Tensor> kl_div_backward(
    const Tensor& grad, const Tensor& logits_p, const Tensor& logits_q, double floor) {
  const Column column(grad);
  Tensor out_p = torch::stable::new_empty(logits_p, {logits_p.size(0), logits_p.size(1)});
  Tensor out_q = torch::stable::new_empty(logits_q, {logits_q.size(0), logits_q.size(1)});
  dispatch_float(logits_p.scalar_type(), "logits", [&](auto tag) {
    using T = decltype(tag);
    using A = compute_t<T>;
    T *to_p = mutable_data<T>(out_p), *to_q = mutable_data<T>(out_q);
    for_pairs<T>(logits_p, logits_q, [&](Rows<A>& p, Rows<A>& q) {
      const Vec<A> g = p.load_values(column);
      if (floor > 0) {
        gradients<true>(p, q, A(floor), g);
      } else {
        gradients<false>(p, q, A(0), g);
      }
      p.store(to_p);
      q.store(to_q);
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
