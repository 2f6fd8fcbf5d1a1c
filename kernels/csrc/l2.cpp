// l2.py's op on the CPU. Norms are summed in a type that squares of the operands neither over- nor underflow.
#include "strided.h"

#include <type_traits>

namespace mwpb {
namespace {

template <class A> using sum_t = std::conditional_t<std::is_same_v<A, double>, long double, double>;

// step_size * grad / |grad| is grad * scale * factor: a power of two first, since 1 / |grad| alone may overflow.
template <class A> struct Move {
  template <class S> static Move from(S squares, S step_size) {
    S norm = std::sqrt(squares);
    if (norm == 0) return {1, A(step_size * 0)};
    if (!std::isfinite(norm)) return {1, std::numeric_limits<A>::quiet_NaN()};
    int exponent = std::clamp(-int(std::ilogb(norm)), 1 - std::numeric_limits<A>::max_exponent, std::numeric_limits<A>::max_exponent - 1);
    S scale = std::ldexp(S(1), exponent);
    return {A(scale), A(step_size / (norm * scale))};
  }
  A scale, factor;
};

// The move as it is where it stays inside the ball, else the difference from x times factor.
template <class T> struct Projection {
  template <class S> static Projection from(S squares, S radius) {
    S norm = std::sqrt(squares);
    if (!std::isfinite(norm)) return {false, std::numeric_limits<T>::quiet_NaN()};
    return {norm <= radius, T(radius / (norm == 0 ? S(1) : norm))};
  }
  bool inside;
  T factor;
};

template <class T, class G> class Step {
  using A = std::conditional_t<std::is_same_v<G, double>, double, T>;
  using S = sum_t<A>;

 public:
  Step(const Tensor& x_adv, const Tensor& grad, const Tensor& x, const Tensor& radius, const Tensor& step_size, double lo, double hi)
      : pieces_({&x_adv, &grad, &x}), x_adv_(mutable_data<T>(x_adv)), grad_(data<G>(grad)), x_(data<T>(x)),
        radius_(data<T>(radius)), radius_stride_(radius.stride(0)), step_(data<T>(step_size)),
        step_stride_(step_size.stride(0)), lo_(T(lo)), hi_(T(hi)) {}

  void run() const {
    if (pieces_.empty()) return;
    // A sample at a time, which stays in cache from one pass to the next: on one thread each where samples are
    // many and small, on all threads together else. Neither the cut nor the sums depend on the choice.
    const int64_t count = pieces_.count;
    if (count == 1 || (pieces_.nest.elements <= kLarge && pieces_.batch >= int64_t(torch::stable::get_num_threads()))) {
      pieces_.for_samples(6, [&](int64_t i) {
        sample(i, [=](auto&& piece) {
          for (int64_t p = 0; p < count; ++p) piece(p);
        });
      });
      return;
    }
    for (int64_t i = 0; i < pieces_.batch; ++i)
      sample(i, [=](auto&& piece) {
        parallel(count, 2 * kPiece, [&](int64_t begin, int64_t end) {
          for (int64_t p = begin; p < end; ++p) piece(p);
        });
      });
  }

 private:
  static constexpr int64_t kLarge = int64_t(1) << 18;

  // The three passes over a sample; each(f) calls f(p) for all its pieces.
  template <class Each> void sample(int64_t i, Each&& each) const {
    S few[8];
    std::vector<S> many(pieces_.count > 8 ? pieces_.count : 0);
    S* partial = pieces_.count > 8 ? many.data() : few;
    auto total = [&] {
      S sum = 0;
      for (int64_t p = 0; p < pieces_.count; ++p) sum += partial[p];
      return sum;
    };
    each([&](int64_t p) { partial[p] = grad_squares(i, p); });
    const auto move = Move<A>::from(total(), S(step_[i * step_stride_]));
    each([&](int64_t p) { partial[p] = delta_squares(i, p, move); });
    const auto projection = Projection<T>::from(total(), S(radius_[i * radius_stride_]));
    each([&](int64_t p) { write(i, p, move, projection); });
  }

  static T moved(T a, G g, Move<A> move) { return a + T(A(widen(g)) * move.scale * move.factor); }

  S grad_squares(int64_t i, int64_t p) const {
    S sum = 0;
    pieces_.runs(i, p, [&](const Offsets<3>& at, int64_t count, const Offsets<3>& stride) {
      const G* g = grad_ + at[1];
      if (stride[1] == 1) {
        sum += sum_squares<S>(count, [=](int64_t e) { return S(widen(g[e])); });
      } else {
        sum += sum_squares<S>(count, [=, s = stride[1]](int64_t e) { return S(widen(g[e * s])); });
      }
    });
    return sum;
  }

  S delta_squares(int64_t i, int64_t p, Move<A> move) const {
    S sum = 0;
    pieces_.runs(i, p, [&](const Offsets<3>& at, int64_t count, const Offsets<3>& stride) {
      const T* a = x_adv_ + at[0];
      const G* g = grad_ + at[1];
      const T* c = x_ + at[2];
      if (unit<3>(stride)) {
        sum += sum_squares<S>(count, [=](int64_t e) { return S(T(moved(a[e], g[e], move) - c[e])); });
      } else {
        sum += sum_squares<S>(count, [=](int64_t e) {
          return S(T(moved(a[e * stride[0]], g[e * stride[1]], move) - c[e * stride[2]]));
        });
      }
    });
    return sum;
  }

  void write(int64_t i, int64_t p, Move<A> move, Projection<T> projection) const {
    const T lo = lo_, hi = hi_;
    pieces_.runs(i, p, [&](const Offsets<3>& at, int64_t count, const Offsets<3>& stride) {
      T* a = x_adv_ + at[0];
      const G* g = grad_ + at[1];
      const T* c = x_ + at[2];
      elements<3>(count, stride, [=](int64_t ia, int64_t ig, int64_t ic) {
        T there = moved(a[ia], g[ig], move);
        T back = c[ic] + (there - c[ic]) * projection.factor;
        a[ia] = clamp_between(projection.inside ? there : back, lo, hi);
      });
    });
  }

  Pieces<3> pieces_;
  T* x_adv_;
  const G* grad_;
  const T* x_;
  const T* radius_;
  int64_t radius_stride_;
  const T* step_;
  int64_t step_stride_;
  T lo_, hi_;
};

void l2_step_(Tensor x_adv, Tensor grad, Tensor x, Tensor radius, Tensor step_size, double lo, double hi) {
  dispatch_image(x_adv, {&x, &radius, &step_size}, [&](auto image) {
    dispatch_float(grad.scalar_type(), "grad", [&](auto tag) {
      Step<decltype(image), decltype(tag)>(x_adv, grad, x, radius, step_size, lo, hi).run();
    });
  });
}

}  // namespace
}  // namespace mwpb

STABLE_TORCH_LIBRARY_IMPL(mwpb, CPU, m) { m.impl("l2_step_", TORCH_BOX(&mwpb::l2_step_)); }
