// scale_bias_relu.py's ops on the CPU.
#include "rows.h"
#include "strided.h"

namespace mwpb {
namespace {

// Loops over (to, from, channel) for tensors (B, C, ...): `to` in the order of its memory, the last an offset
// into a packed list of one value a channel.
struct ChannelLoop {
  ChannelLoop(const Tensor& to, const Tensor& from) : pieces(nest(to, from), to.size(0), {to.stride(0), from.stride(0), 0}) {}

  static Nest<3> nest(const Tensor& to, const Tensor& from) {
    std::vector<Nest<3>::Dim> dims;
    for (int64_t d = 1; d < to.dim(); ++d) dims.push_back({to.size(d), {to.stride(d), from.stride(d), d == 1}});
    return Nest<3>(std::move(dims));
  }

  // f(to, from, channel) at every element; f must not depend on other elements.
  template <class F> void run(F&& f) const {
    pieces.for_pieces(2, [&](int64_t i, int64_t p) {
      pieces.runs(i, p, [&](const Offsets<3>& at, int64_t count, const Offsets<3>& stride) {
        if (stride[0] == 1 && stride[1] == 1 && stride[2] == 0) {
#pragma GCC ivdep
          for (int64_t j = 0; j < count; ++j) f(at[0] + j, at[1] + j, at[2]);
        } else {
          elements<3>(count, stride, [&](int64_t a, int64_t b, int64_t c) { f(at[0] + a, at[1] + b, at[2] + c); });
        }
      });
    });
  }

  Pieces<3> pieces;
};

template <class A> std::vector<A> packed(const Tensor& values) {
  std::vector<A> out(static_cast<size_t>(values.size(0)));
  for (size_t c = 0; c < out.size(); ++c) out[c] = data<A>(values)[int64_t(c) * values.stride(0)];
  return out;
}

void check_channels(const Tensor& x, std::initializer_list<const Tensor*> values) {
  const auto type = x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  for (const Tensor* v : values)
    STD_TORCH_CHECK(v->scalar_type() == type && v->size(0) == x.size(1), "one value a channel, in the type of the sums");
}

Tensor scale_bias_relu(Tensor x, Tensor scale, Tensor bias) {
  check_channels(x, {&scale, &bias});
  Tensor out = torch::stable::empty_like(x);
  dispatch_float(x.scalar_type(), "x", [&](auto tag) {
    using T = decltype(tag);
    using A = compute_t<T>;
    const auto scales = packed<A>(scale), biases = packed<A>(bias);
    T* to = mutable_data<T>(out);
    const T* from = data<T>(x);
    ChannelLoop(out, x).run([=, s = scales.data(), b = biases.data()](int64_t i, int64_t j, int64_t c) {
      A v = widen(from[j]) * s[c] + b[c];
      to[i] = narrow<T>(v <= 0 ? A(0) : v);  // NaN stays
    });
  });
  return out;
}

Tensor scale_bias_relu_backward(Tensor grad, Tensor out, Tensor scale) {
  check_channels(out, {&scale});
  Tensor result = torch::stable::empty_like(out);
  // where `out` is dense, the result lies as it does and one offset serves both
  Tensor mask = out;
  for (int64_t d = 0; d < out.dim(); ++d)
    if (out.size(d) > 1 && out.stride(d) != result.stride(d)) {
      mask = torch::stable::empty_like(out);
      torch::stable::copy_(mask, out);
      break;
    }
  dispatch_float(out.scalar_type(), "out", [&](auto tag) {
    using T = decltype(tag);
    using A = compute_t<T>;
    const auto scales = packed<A>(scale);
    T* to = mutable_data<T>(result);
    const T* gradient = data<T>(grad);
    const T* value = data<T>(mask);
    ChannelLoop(result, grad).run([=, s = scales.data()](int64_t i, int64_t j, int64_t c) {
      A g = widen(gradient[j]) * s[c];
      to[i] = narrow<T>(widen(value[i]) <= 0 ? A(0) : g);
    });
  });
  return result;
}

}  // namespace
}  // namespace mwpb

STABLE_TORCH_LIBRARY_IMPL(mwpb, CPU, m) {
  m.impl("scale_bias_relu", TORCH_BOX(&mwpb::scale_bias_relu));
  m.impl("scale_bias_relu_backward", TORCH_BOX(&mwpb::scale_bias_relu_backward));
}
