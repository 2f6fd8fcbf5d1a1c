// bias_add_relu.py's ops on the CPU.
#include "channels.h"

#include <optional>

namespace mwpb {
namespace {

// f(position) for each of them, over the threads.
template <class F> void for_positions(const Tensor& x, F&& f) {
  const int64_t channels = x.size(1);
  if (x.numel() == 0) return;
  parallel(x.numel() / channels, 4 * channels, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) f(p);
  });
}

void check_other(const Tensor& x, const std::optional<Tensor>& other) {
  if (other) STD_TORCH_CHECK(other->scalar_type() == x.scalar_type(), "operands must have one type");
}

Tensor bias_add_relu_(Tensor x, Tensor bias, std::optional<Tensor> skip) {
  check_other(x, skip);
  STD_TORCH_CHECK(bias.scalar_type() == (x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float), "bias must have the type of the sums");
  Tensor gate = gate_of(x);
  dispatch_float(x.scalar_type(), "x", [&](auto tag) {
    using T = decltype(tag);
    using A = compute_t<T>;
    const int64_t count = x.size(1), groups = (count + 7) / 8;
    std::vector<A> biases(static_cast<size_t>(count));
    for (int64_t c = 0; c < count; ++c) biases[size_t(c)] = data<A>(bias)[c * bias.stride(0)];
    const Positions to(x, 1), from(skip ? *skip : x, 1);
    const bool dense = to.step == 1 && from.step == 1;
    for_positions(x, [&, b = biases.data()](int64_t p) {
      T* v = mutable_data<T>(x) + to(p);
      const T* s = skip ? data<T>(*skip) + from(p) : nullptr;
      auto ended = [](A sum) { return narrow<T>(sum <= 0 ? A(0) : sum); };  // NaN stays
      if (s) {
        channels(count, dense, [=, i = to.step, j = from.step](int64_t c, auto d) {
          v[at(c, i, d)] = ended(widen(v[at(c, i, d)]) + b[c] + widen(s[at(c, j, d)]));
        });
      } else {
        channels(count, dense, [=, i = to.step](int64_t c, auto d) { v[at(c, i, d)] = ended(widen(v[at(c, i, d)]) + b[c]); });
      }
      uint8_t* bytes = mutable_data<uint8_t>(gate) + p * groups;
      for (int64_t k = 0; k < groups; ++k) {
        unsigned byte = 0;
        const int64_t last = std::min<int64_t>(8, count - 8 * k);
        for (int64_t j = 0; j < last; ++j) byte |= unsigned(!(widen(v[(8 * k + j) * to.step]) <= 0)) << j;
        bytes[k] = uint8_t(byte);
      }
    });
  });
  return gate;
}

Tensor gated_sum(Tensor a, std::optional<Tensor> b, Tensor gate) {
  check_other(a, b);
  STD_TORCH_CHECK(gate.scalar_type() == ScalarType::Byte, "gate must be uint8");
  Tensor out = torch::stable::empty_like(a);
  dispatch_float(a.scalar_type(), "a", [&](auto tag) {
    using T = decltype(tag);
    using A = compute_t<T>;
    const int64_t count = a.size(1);
    const Positions to(out, 1), first(a, 1), second(b ? *b : a, 1), byte(gate, gate.dim() - 1);
    const bool dense = to.step == 1 && first.step == 1 && second.step == 1 && byte.step == 1;
    for_positions(a, [&](int64_t p) {
      T* v = mutable_data<T>(out) + to(p);
      const T* x = data<T>(a) + first(p);
      const T* y = b ? data<T>(*b) + second(p) : nullptr;
      const uint8_t* g = data<uint8_t>(gate) + byte(p);
      auto passed = [=, n = byte.step](int64_t c, auto d, A sum) {
        return narrow<T>((g[at(c / 8, n, d)] >> (c % 8)) & 1 ? sum : A(0));
      };
      if (y) {
        channels(count, dense, [=, i = to.step, j = first.step, k = second.step](int64_t c, auto d) {
          v[at(c, i, d)] = passed(c, d, widen(x[at(c, j, d)]) + widen(y[at(c, k, d)]));
        });
      } else {
        channels(count, dense, [=, i = to.step, j = first.step](int64_t c, auto d) {
          v[at(c, i, d)] = passed(c, d, widen(x[at(c, j, d)]));
        });
      }
    });
  });
  return out;
}

}  // namespace
}  // namespace mwpb

STABLE_TORCH_LIBRARY_IMPL(mwpb, CPU, m) {
  m.impl("bias_add_relu_", TORCH_BOX(&mwpb::bias_add_relu_));
  m.impl("gated_sum", TORCH_BOX(&mwpb::gated_sum));
}
