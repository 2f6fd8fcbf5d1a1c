// margin.py's ops on the CPU.
#include "rows.h"

namespace mwpb {
namespace {

template <class A> Vec<A> margin_of(const Rows<A>& rows, IntVec<A> y) {
  const auto [own, best, other] = rows.compare(y);
  const IntVec<A> right = own > best;
  const Vec<A> top = select(right, own, best);
  const Vec<A> sum = rows.sum_of([&](int64_t c) { return vexp_decay(rows.z[c] - top); });
  const Vec<A> lead = A(1) - vexp_decay(select(right, best, own) - top);
  return select(right, lead, -lead) / sum;
}

Tensor margin(const Tensor& logits, const Tensor& labels) {
  return row_values(logits, labels, []<class A>(Rows<A>& rows, IntVec<A> y) { return margin_of(rows, y); });
}

Tensor margin_radius(const Tensor& logits, const Tensor& labels, double eps, double alpha) {
  return row_values(logits, labels, [=]<class A>(Rows<A>& rows, IntVec<A> y) {
    return vexp(A(alpha) * margin_of(rows, y)) * A(eps);
  });
}

// Two sums over the classes at once.
template <class A> struct Spread {
  Spread& operator+=(const Spread& other) {
    sum += other.sum, squares += other.squares;
    return *this;
  }

  Vec<A> sum{}, squares{};
};

Tensor deviation_radius(const Tensor& logits, const Tensor& labels, double eps, double alpha) {
  return row_values(logits, labels, [=]<class A>(Rows<A>& rows, IntVec<A> y) {
    const auto [own, best, other] = rows.compare(y);
    const Vec<A> top = select(own > best, own, best), mine = vexp_decay(own - top);
    const Spread<A> found = rows.sum_of([&](int64_t c) {
      const Vec<A> e = vexp_decay(rows.z[c] - top), apart = e - mine;
      return Spread<A>{e, apart * apart};
    });
    const Vec<A> deviation = square_root(found.squares / A(rows.classes - 1)) / found.sum;
    return vexp(A(alpha) * deviation) * A(eps);
  });
}

Tensor standardised_radius(const Tensor& logits, const Tensor& labels, double eps, double alpha) {
  return row_values(logits, labels, [=]<class A>(Rows<A>& rows, IntVec<A> y) {
    rows.softmax();
    const A count = A(rows.classes), mean = A(1) / count;
    Vec<A> distance{};
    const Vec<A> squares = rows.sum_of([&](int64_t c) {
      const Vec<A> d = rows.e[c] - mean;
      distance = select(y == IntOf<A>(c), d, distance);
      return d * d;
    });
    const Vec<A> deviation = square_root(squares / count);
    return vexp(A(alpha) * select(deviation == A(0), Vec<A>{}, distance / deviation)) * A(eps);
  });
}

Tensor margin_backward(const Tensor& grad, const Tensor& logits, const Tensor& labels) {
  const Column column(grad);
  return row_gradients(logits, labels, [=]<class A>(Rows<A>& rows, IntVec<A> y) {
    const auto [own, best, other] = rows.softmax_compare(y);
    const Vec<A> g = rows.load_values(column);
    const Vec<A> p_own = rows.probability(own), p_other = rows.probability(best), m = p_own - p_other;
    const Vec<A> rest = rows.rest_besides(y, other);
    return rows.by_class(y, g * (p_own * (rest + A(2) * p_other)), other, g * (-p_other * (rest + A(2) * p_own)),
                         [=, e = rows.e](int64_t c) { return g * -(e[c] * m); });
  });
}

}  // namespace
}  // namespace mwpb

STABLE_TORCH_LIBRARY_IMPL(mwpb, CPU, m) {
  m.impl("margin", TORCH_BOX(&mwpb::margin));
  m.impl("margin_radius", TORCH_BOX(&mwpb::margin_radius));
  m.impl("deviation_radius", TORCH_BOX(&mwpb::deviation_radius));
  m.impl("standardised_radius", TORCH_BOX(&mwpb::standardised_radius));
  m.impl("margin_backward", TORCH_BOX(&mwpb::margin_backward));
}
