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
    const Vec<A> active = select(gap + A(confidence) > A(0), splat(A(1)), Vec<A>{});
    const Vec<A> undefined = select(rows.poisoned() | (gap != gap), splat(rows.kNaN), Vec<A>{});
    return [=, other = found.other](int64_t c) {
      return active * (one_at<A>(other, c) - one_at<A>(y, c)) + undefined;
    };
  });
}

Tensor dlr_grad(const Tensor& logits, const Tensor& labels) {
  return row_gradients(logits, labels, []<class A>(Rows<A>& rows, IntVec<A> y) {
    // The three largest logits in order, the first class first among equals. Where fewer than three are finite a
    // class may repeat: the gradient is then 0 or undefined.
    Vec<A> own{}, value[3] = {splat(rows.kLow), splat(rows.kLow), splat(rows.kLow)};
    IntVec<A> index[3] = {};
    for (int64_t c = 0; c < rows.classes; ++c) {
      const Vec<A> v = rows.z[c];
      const IntVec<A> at = IntVec<A>{} + IntOf<A>(c);
      own = select(y == at, v, own);
      for (int k = 2; k >= 0; --k) {
        const IntVec<A> larger = v > value[k];
        value[k] = select(larger, v, value[k]);
        index[k] = select(larger, at, index[k]);
        if (k == 0) continue;
        const IntVec<A> moves = v > value[k - 1];  // and pushes the one before into this place
        value[k] = select(moves, value[k - 1], value[k]);
        index[k] = select(moves, index[k - 1], index[k]);
      }
    }
    const IntVec<A> first = index[0] == y;
    const Vec<A> slope = A(1) / (value[0] - value[2] + A(1e-12));
    const Vec<A> ratio = (own - select(first, value[1], value[0])) * slope;
    const Vec<A> undefined = select(rows.poisoned(), splat(rows.kNaN), ratio - ratio);
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
