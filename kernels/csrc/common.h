// What every native op shares: tensor access through PyTorch's stable ABI, element types, threads.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

namespace mwpb {

using torch::stable::Tensor;
using torch::headeronly::ScalarType;
using BFloat16 = c10::BFloat16;
using Half = c10::Half;

// The type in which values of T are computed: double for double, float for the others.
template <class T> struct ComputeType { using type = float; };
template <> struct ComputeType<double> { using type = double; };
template <class T> using compute_t = typename ComputeType<T>::type;

// Vectorisable widening: a bfloat16 is the upper half of a float.
inline float widen(float v) { return v; }
inline double widen(double v) { return v; }
inline float widen(BFloat16 v) {
  uint32_t bits = uint32_t(v.x) << 16;
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}
// By its bits, since GCC calls a library function for each value unless the processor computes in float16.
inline float widen(Half v) {
  uint32_t magnitude = uint32_t(v.x & 0x7FFF) << 13;
  uint32_t sign = uint32_t(v.x & 0x8000) << 16;
  uint32_t normal = magnitude + (112u << 23), special = magnitude + (224u << 23);  // infinities and NaN
  uint32_t shifted = magnitude + (113u << 23);
  float value;
  std::memcpy(&value, &shifted, 4);
  value -= 0x1p-14f;  // a subnormal number is this difference, exactly
  uint32_t subnormal;
  std::memcpy(&subnormal, &value, 4);
  uint32_t bits = magnitude < (1u << 23) ? subnormal : normal;
  bits = (magnitude >= (31u << 23) ? special : bits) | sign;
  std::memcpy(&value, &bits, 4);
  return value;
}

// Calls f(T{}) with the element type of a tensor of logits or gradients.
template <class F> void dispatch_float(ScalarType type, const char* what, F&& f) {
  switch (type) {
    case ScalarType::Float: return f(float{});
    case ScalarType::Double: return f(double{});
    case ScalarType::BFloat16: return f(BFloat16{});
    case ScalarType::Half: return f(Half{});
    default: STD_TORCH_CHECK(false, what, " must be float32, float64, bfloat16 or float16");
  }
}

// Splits [0, n) over PyTorch's threads; one piece costs about `cost` element operations per item.
template <class F> void parallel(int64_t n, int64_t cost, F&& f) {
  int64_t grain = std::max<int64_t>(1, 16384 / std::max<int64_t>(1, cost));
  if (n <= grain) {
    if (n > 0) f(int64_t(0), n);
    return;
  }
  torch::stable::parallel_for(0, n, grain, f);
}

inline int64_t scalar_int64(const Tensor& t) { return *static_cast<const int64_t*>(t.const_data_ptr()); }

template <class T> const T* data(const Tensor& t) { return static_cast<const T*>(t.const_data_ptr()); }
template <class T> T* mutable_data(const Tensor& t) { return static_cast<T*>(t.mutable_data_ptr()); }

}  // namespace mwpb
