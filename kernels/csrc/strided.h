// Element-wise loops over the samples of a batch, for operands of any strides.
//
// A Nest is the loop over the dimensions of one sample (dimension 0 counts the samples), shared by N operands.
// Dimensions that all operands can merge are merged, so operands of equal dense layout become one flat loop.
// A large sample is cut into pieces of bounded size. The cut depends on sizes alone and never on the number of
// threads, so neither do sums over pieces.
#pragma once

#include "common.h"

#include <array>
#include <vector>

namespace mwpb {

constexpr int64_t kPiece = 8192;  // elements: noise or a piece of each operand stays in the first-level cache

// Calls f(T{}) with the type of a batch of images; the other operands must have it too.
template <class F> void dispatch_image(const Tensor& x, std::initializer_list<const Tensor*> others, F&& f) {
  for (const Tensor* other : others)
    STD_TORCH_CHECK(other->scalar_type() == x.scalar_type(), "images and what is given per sample must have one type");
  if (x.scalar_type() == ScalarType::Float) return f(float{});
  if (x.scalar_type() == ScalarType::Double) return f(double{});
  STD_TORCH_CHECK(false, "images must be float32 or float64");
}

template <int N> using Offsets = std::array<int64_t, N>;

template <int N> struct Nest {
  struct Dim {
    int64_t size;
    Offsets<N> stride;
  };

  // The dimensions of a sample in their logical order, outermost first.
  explicit Nest(const std::array<const Tensor*, N>& operands) {
    const Tensor& first = *operands[0];
    for (int64_t d = 1; d < first.dim(); ++d) {
      Dim dim{first.size(d), {}};
      for (int k = 0; k < N; ++k) dim.stride[k] = operands[k]->stride(d);
      elements *= dim.size;
      dims.push_back(dim);
    }
    merge();
  }

  explicit Nest(std::vector<Dim> from) : dims(std::move(from)) {
    for (const Dim& dim : dims) elements *= dim.size;
    merge();
  }

  // The same elements in the order of operand 0's memory.
  Nest& in_memory_order() {
    std::stable_sort(dims.begin(), dims.end(), [](const Dim& a, const Dim& b) { return a.stride[0] > b.stride[0]; });
    merge();
    // where the operands disagree, a run of a few elements costs more than its overhead: take the longest
    if (dims.back().size < 8) {
      auto longest = std::max_element(dims.begin(), dims.end(), [](auto& a, auto& b) { return a.size < b.size; });
      std::rotate(longest, longest + 1, dims.end());
    }
    return *this;
  }

  // f(offsets, count, strides) for every innermost run whose outermost position lies in [begin, end).
  template <class F> void runs(Offsets<N> at, int64_t begin, int64_t end, F&& f) const { walk(0, begin, end, at, f); }
  template <class F> void runs(Offsets<N> at, F&& f) const { walk(0, 0, dims[0].size, at, f); }

  std::vector<Dim> dims;  // at least one
  int64_t elements = 1;

 private:
  void merge() {
    std::vector<Dim> merged;
    for (const Dim& dim : dims) {
      if (dim.size == 1) continue;
      bool fits = !merged.empty();
      for (int k = 0; fits && k < N; ++k) fits = merged.back().stride[k] == dim.stride[k] * dim.size;
      if (fits) {
        merged.back().size *= dim.size;
        merged.back().stride = dim.stride;
      } else {
        merged.push_back(dim);
      }
    }
    if (merged.empty()) merged.push_back({1, {}});
    dims = std::move(merged);
  }

  template <class F> void walk(size_t d, int64_t begin, int64_t end, Offsets<N> at, F& f) const {
    const Dim& dim = dims[d];
    for (int k = 0; k < N; ++k) at[k] += begin * dim.stride[k];
    if (d + 1 == dims.size()) {
      f(at, end - begin, dim.stride);
      return;
    }
    for (int64_t i = begin; i < end; ++i) {
      walk(d + 1, 0, dims[d + 1].size, at, f);
      for (int k = 0; k < N; ++k) at[k] += dim.stride[k];
    }
  }
};

// The batch of a tensor's samples, each cut into pieces along the outermost dimension of its nest.
template <int N> struct Pieces {
  Pieces(const std::array<const Tensor*, N>& operands) : nest(operands), batch(operands[0]->size(0)) {
    for (int k = 0; k < N; ++k) sample_stride[k] = operands[k]->stride(0);
    cut();
  }
  Pieces(Nest<N> sample, int64_t batch, const Offsets<N>& stride) : nest(std::move(sample)), batch(batch), sample_stride(stride) {
    cut();
  }

  bool empty() const { return batch == 0 || nest.elements == 0; }

  // f(offsets, count, strides) for the runs of piece p of sample i.
  template <class F> void runs(int64_t i, int64_t p, F&& f) const {
    Offsets<N> at;
    for (int k = 0; k < N; ++k) at[k] = i * sample_stride[k];
    const int64_t size = nest.dims[0].size;
    nest.runs(at, size / count * p + std::min(p, size % count), size / count * (p + 1) + std::min(p + 1, size % count), f);
  }

  // f(i, p) for every piece of every sample, over the threads.
  template <class F> void for_pieces(int64_t cost, F&& f) const {
    if (empty()) return;
    parallel(batch * count, cost * nest.elements / count, [&](int64_t begin, int64_t end) {
      for (int64_t item = begin; item < end; ++item) f(item / count, item % count);
    });
  }

  // f(i) for every sample, over the threads.
  template <class F> void for_samples(int64_t cost, F&& f) const {
    if (empty()) return;
    parallel(batch, cost * nest.elements, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) f(i);
    });
  }

  Nest<N> nest;
  int64_t batch, count;
  Offsets<N> sample_stride;

 private:
  void cut() {
    nest.in_memory_order();
    count = std::max<int64_t>(1, std::min(nest.dims[0].size, (nest.elements + kPiece - 1) / kPiece));
  }
};

template <int N> inline bool unit(const Offsets<N>& stride) {
  for (int64_t s : stride)
    if (s != 1) return false;
  return true;
}

// f(i_0, ..., i_(N-1)) at every element of a run; a loop of its own where all strides are 1, so that it
// vectorises. `f` must not depend on other elements of the run.
template <int N, class F> inline void elements(int64_t count, const Offsets<N>& stride, F&& f) {
  static_assert(N == 2 || N == 3);
  if (unit<N>(stride)) {
    if constexpr (N == 2) {
#pragma GCC ivdep
      for (int64_t i = 0; i < count; ++i) f(i, i);
    } else {
#pragma GCC ivdep
      for (int64_t i = 0; i < count; ++i) f(i, i, i);
    }
  } else {
    if constexpr (N == 2) {
#pragma GCC ivdep
      for (int64_t i = 0; i < count; ++i) f(i * stride[0], i * stride[1]);
    } else {
#pragma GCC ivdep
      for (int64_t i = 0; i < count; ++i) f(i * stride[0], i * stride[1], i * stride[2]);
    }
  }
}

// Sum of value(i)^2 over [0, count), always in the same order.
template <class S, class F> inline S sum_squares(int64_t count, F&& value) {
  constexpr int lanes = 16;
  S sums[lanes] = {};
  int64_t i = 0;
  for (; i + lanes <= count; i += lanes)
    for (int j = 0; j < lanes; ++j) {
      S v = value(i + j);
      sums[j] += v * v;
    }
  for (; i < count; ++i) {
    S v = value(i);
    sums[0] += v * v;
  }
  S sum = 0;
  for (S s : sums) sum += s;
  return sum;
}

// Clamps to [low, high] as torch.clamp does: high where low > high, NaN where anything is NaN.
template <class T> inline T clamp_between(T v, T low, T high) {
  v = v < low ? low : v;
  v = v > high ? high : v;
  return __builtin_isunordered(low, high) ? std::numeric_limits<T>::quiet_NaN() : v;
}

}  // namespace mwpb
