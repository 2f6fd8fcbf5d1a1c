// logit_grads.py's ops on the CPU.
#include "rows.h"

namespace mwpb {
namespace {

Tensor ce_grad(const Tensor& logits, const Tensor& labels) {
  return row_gradients(logits, labels, []<class A>(Rows<A>& rows, IntVec<A> y) {
    rows.softmax();
    return [=, e = rows.e](int64_t c) { return e[c] - one_at<A>(y, c); };
  });
}

Tensor kl_grad(const Tensor& logits, const Tensor& target_logits) {
  Tensor out = torch::stable::new_empty(logits, {logits.size(0), logits.size(1)});
  dispatch_float(logits.scalar_type(), "logits", [&](auto tag) {
    using T = decltype(tag);
    using A = compute_t<T>;
    T* to = mutable_data<T>(out);
    for_pairs<T>(logits, target_logits, [&](Rows<A>& rows, Rows<A>& target) {
      rows.softmax();
      target.softmax();
      rows.fill([&](int64_t c) { return rows.e[c] - target.e[c]; });
      rows.store(to);
    });
  });
  return out;
}

Tensor cw_grad(const Tensor& logits, const Tensor& labels, double confidence) {
  return row_gradients(logits, labels, [=]<class A>(Rows<A>& rows, IntVec<A> y) {
    const auto found = rows.compare(y);
    const Vec<A> gap = found.own - found.best;
    const Vec<A> active = select(gap + A(confidence) > A(0), splat<Vec<A>>(A(1)), Vec<A>{});
    const Vec<A> undefined = select(rows.poisoned() | (gap != gap), splat<Vec<A>>(rows.kNaN), Vec<A>{});
    return [=, other = found.other](int64_t c) {
      return active * (one_at<A>(other, c) - one_at<A>(y, c)) + undefined;
    };
  });
}

Tensor dlr_grad(const Tensor& logits, const Tensor& labels) {
  return row_gradients(logits, labels, []<class A>(Rows<A>& rows, IntVec<A> y) {
    // The logit of class y, and the three largest in order, the first class first among equals. Where fewer than
    // three are finite a class may repeat: the gradient is then 0 or undefined.
    Vec<A> own, value[3];
    IntVec<A> index[3];
    for (int h = 0; h < rows.kParts; ++h) {  // there are not registers for more at once
      using V = Native<A>;
      using I = IntOf<V>;
      V mine{}, v[3] = {splat<V>(rows.kLow), splat<V>(rows.kLow), splat<V>(rows.kLow)};
      I i[3] = {};
      const I label = part<I>(y, h);
      for (int64_t c = 0; c < rows.classes; ++c) {
        const V logit = part<V>(rows.z[c], h);
        const I at = I{} + IntOf<A>(c);
        mine = select(label == at, logit, mine);
        for (int k = 2; k >= 0; --k) {
          const I larger = logit > v[k];
          v[k] = select(larger, logit, v[k]);
          i[k] = select(larger, at, i[k]);
          if (k == 0) continue;
          const I moves = logit > v[k - 1];  // and pushes the one before into this place
          v[k] = select(moves, v[k - 1], v[k]);
          i[k] = select(moves, i[k - 1], i[k]);
        }
      }
      part<V>(own, h) = mine;
      for (int k = 0; k < 3; ++k) part<V>(value[k], h) = v[k], part<I>(index[k], h) = i[k];
    }
    const IntVec<A> first = index[0] == y;
    const Vec<A> slope = A(1) / (value[0] - value[2] + A(1e-12));
    const Vec<A> ratio = (own - select(first, value[1], value[0])) * slope;
    const Vec<A> undefined = select(rows.poisoned(), splat<Vec<A>>(rows.kNaN), ratio - ratio);
    const IntVec<A> other = select(first, index[1], index[0]), top = index[0], third = index[2];
    return [=](int64_t c) {
      return slope * (one_at<A>(other, c) - one_at<A>(y, c)) +
             ratio * slope * (one_at<A>(top, c) - one_at<A>(third, c)) + undefined;
    };
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
