// Positions with their channels: loops for operands (B, C, ...) of any strides, fastest where the channels lie side
// by side; and the gates of ReLUs, a bit for each channel of a position.
#pragma once

#include "common.h"
#include "transpose.h"

#include <vector>

namespace mwpb {

// Where the channels of a position begin, for operands (B, C, ...) or gates (B, ..., groups) of any strides: the
// positions are counted through all dimensions but that of the channels.
struct Positions {
  Positions(const Tensor& t, int64_t channels_at) : step(t.stride(channels_at)) {
    for (int64_t d = 0; d < t.dim(); ++d) {
      if (d == channels_at) continue;
      const int64_t n = t.size(d), s = t.stride(d);
      if (!sizes.empty() && strides.back() == s * n) {
        sizes.back() *= n, strides.back() = s;
      } else {
        sizes.push_back(n), strides.push_back(s);
      }
    }
  }

  int64_t operator()(int64_t position) const {
    int64_t at = 0;
    for (size_t d = sizes.size(); d-- > 0; position /= sizes[d]) at += position % sizes[d] * strides[d];
    return at;
  }

  std::vector<int64_t> sizes, strides;
  int64_t step;
};

// f(c) for every channel; told whether all steps are 1, so that the loop vectorises. `f` must not depend on other
// channels.
template <class F> void channels(int64_t count, bool dense, F&& f) {
  if (dense) {
#pragma GCC ivdep
    for (int64_t c = 0; c < count; ++c) f(c, std::true_type{});
  } else {
    for (int64_t c = 0; c < count; ++c) f(c, std::false_type{});
  }
}

template <class Dense> inline int64_t at(int64_t c, int64_t step, Dense) { return Dense::value ? c : c * step; }

inline Tensor gate_of(const Tensor& x) {
  std::vector<int64_t> sizes{x.size(0)};
  for (int64_t d = 2; d < x.dim(); ++d) sizes.push_back(x.size(d));
  sizes.push_back((x.size(1) + 7) / 8);
  return torch::stable::new_empty(x, sizes, ScalarType::Byte);
}

}  // namespace mwpb
