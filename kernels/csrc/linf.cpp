// linf.py's op on the CPU.
#include "strided.h"

namespace mwpb {
namespace {

// -1, 0 or 1; 0 for NaN, as torch.sign.
template <class A, class G> inline A sign(G g) {
  auto v = widen(g);
  return A(v > 0) - A(v < 0);
}
// Of 16 bits, whose conversion to float takes longer than the rest of the step.
template <class A> inline A sign_of_bits(int bits, int infinity) {
  int magnitude = bits & 0x7FFF;
  A one = (bits & 0x8000) ? A(-1) : A(1);
  return magnitude == 0 || magnitude > infinity ? A(0) : one;
}
template <class A> inline A sign(Half g) { return sign_of_bits<A>(g.x, 0x7C00); }
template <class A> inline A sign(BFloat16 g) { return sign_of_bits<A>(g.x, 0x7F80); }

template <class T, class G>
void step(Tensor& x_adv, const Tensor& grad, const Tensor& x, const Tensor& radius, const Tensor& step_size, T lo, T hi) {
  Pieces<3> pieces({&x_adv, &grad, &x});
  T* to = mutable_data<T>(x_adv);
  const G* gradient = data<G>(grad);
  const T* centre = data<T>(x);
  pieces.for_pieces(2, [&](int64_t i, int64_t p) {
    const T r = data<T>(radius)[i * radius.stride(0)];
    const T s = data<T>(step_size)[i * step_size.stride(0)];
    pieces.runs(i, p, [&](const Offsets<3>& at, int64_t count, const Offsets<3>& stride) {
      T* a = to + at[0];
      const G* g = gradient + at[1];
      const T* c = centre + at[2];
      elements<3>(count, stride, [=](int64_t ia, int64_t ig, int64_t ic) {
        T moved = a[ia] + s * sign<T>(g[ig]);
        a[ia] = clamp_between(clamp_between(moved, T(c[ic] - r), T(c[ic] + r)), lo, hi);
      });
    });
  });
}

void linf_step_(Tensor x_adv, Tensor grad, Tensor x, Tensor radius, Tensor step_size, double lo, double hi) {
  dispatch_image(x_adv, {&x, &radius, &step_size}, [&](auto image) {
    using T = decltype(image);
    dispatch_float(grad.scalar_type(), "grad", [&](auto tag) {
      step<T, decltype(tag)>(x_adv, grad, x, radius, step_size, T(lo), T(hi));
    });
  });
}

}  // namespace
}  // namespace mwpb

STABLE_TORCH_LIBRARY_IMPL(mwpb, CPU, m) { m.impl("linf_step_", TORCH_BOX(&mwpb::linf_step_)); }
