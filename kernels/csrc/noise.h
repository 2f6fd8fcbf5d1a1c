// The loop of the start points: counter-based noise in the logical order of each sample, added in any layout.
#pragma once

#include "philox.h"
#include "strided.h"

namespace mwpb {

// Samples cut into boxes of consecutive elements, in logical order, so that a box's noise fits in cache. The
// boxes follow one another across the outer dimensions: in a channels-last tensor they share their memory.
class NoiseLoop {
 public:
  // A box of a sample: its first element and their number, its place in out and x, and the loop over it with
  // the noise as third operand.
  struct Box {
    int64_t first, count;
    Offsets<3> at;
    Nest<3> nest;
  };

  NoiseLoop(const Tensor& out, const Tensor& x, const Tensor& seed, const Tensor& index)
      : sample_(std::array<const Tensor*, 2>{&out, &x}), batch_(x.size(0)), stride_{out.stride(0), x.stride(0)}, seed_(scalar_int64(seed)),
        index_(data<int64_t>(index)), index_stride_(index.stride(0)) {
    const auto& dims = sample_.dims;
    inner_ = sample_.elements;
    if (inner_ == 0) return;
    do {
      inner_ /= dims[level_].size;
    } while (inner_ > kPiece && ++level_ < dims.size());
    rows_ = std::min(dims[level_].size, std::max<int64_t>(1, kPiece / inner_));
    across_ = (dims[level_].size + rows_ - 1) / rows_;
    boxes_ = sample_.elements / inner_ / dims[level_].size * across_;
  }

  int64_t batch() const { return batch_; }
  int64_t boxes() const { return boxes_; }  // of each sample
  int64_t elements() const { return sample_.elements; }
  int64_t seed() const { return seed_; }
  int64_t index(int64_t i) const { return index_[i * index_stride_]; }

  Box box(int64_t i, int64_t b) const {
    const auto& dims = sample_.dims;
    int64_t outers = boxes_ / across_, begin = b / outers * rows_, outer = b % outers;
    int64_t rows = std::min(rows_, dims[level_].size - begin);
    const int64_t first = (outer * dims[level_].size + begin) * inner_;
    Offsets<3> at{i * stride_[0], i * stride_[1], 0};
    for (int k = 0; k < 2; ++k) at[k] += begin * dims[level_].stride[k];
    for (size_t d = level_; d-- > 0; outer /= dims[d].size)
      for (int k = 0; k < 2; ++k) at[k] += outer % dims[d].size * dims[d].stride[k];
    std::vector<Nest<3>::Dim> own;
    int64_t step = inner_;
    for (size_t d = level_; d < dims.size(); ++d) {
      if (d > level_) step /= dims[d].size;
      own.push_back({d == level_ ? rows : dims[d].size, {dims[d].stride[0], dims[d].stride[1], step}});
    }
    return {first, rows * inner_, at, Nest<3>(std::move(own)).in_memory_order()};
  }

  // f(i, b, scratch) for every box of every sample, over the threads.
  template <class T, class F> void for_boxes(F&& f) const {
    run<T>(batch_ * boxes_, rows_ * inner_, [&](int64_t item, T* scratch) { f(item / boxes_, item % boxes_, scratch); });
  }

  // f(i, scratch) for every sample, over the threads.
  template <class T, class F> void for_samples(F&& f) const { run<T>(batch_, sample_.elements, f); }

  // The noise of a box, in scratch: uniform in [-1, 1), or standard normal.
  template <class T> const T* symmetric(int64_t i, const Box& box, uint32_t stream, T* scratch) const {
    fill_symmetric(uint32_t(box.first / 4), groups(box), index(i), seed_, stream, scratch);
    return scratch + box.first % 4;
  }
  template <class T> const T* normal(int64_t i, const Box& box, uint32_t stream, T* scratch) const {
    fill_normal(uint32_t(box.first / 4), groups(box), index(i), seed_, stream, scratch);
    return scratch + box.first % 4;
  }

 private:
  static int64_t groups(const Box& box) { return (box.first % 4 + box.count + 3) / 4; }

  template <class T, class F> void run(int64_t items, int64_t size, F&& f) const {
    if (sample_.elements == 0) return;
    parallel(items, 4 * size, [&](int64_t begin, int64_t end) {
      std::vector<T> scratch(kPiece + 2 * kDraws);
      for (int64_t item = begin; item < end; ++item) f(item, scratch.data());
    });
  }

  Nest<2> sample_;
  int64_t batch_;
  Offsets<2> stride_;
  int64_t seed_;
  const int64_t* index_;
  int64_t index_stride_;
  size_t level_ = 0;  // the dimension that is cut, into `across_` ranges of `rows_`, of `inner_` elements each
  int64_t inner_ = 0, rows_ = 0, across_ = 0, boxes_ = 0;
};

// out = clamp(x + scale * noise, lo, hi) over a box.
template <class T>
inline void add_noise(const NoiseLoop::Box& box, T* out, const T* x, const T* noise, T scale, T lo, T hi) {
  box.nest.runs(box.at, [&](const Offsets<3>& at, int64_t count, const Offsets<3>& stride) {
    T* o = out + at[0];
    const T* c = x + at[1];
    const T* z = noise + at[2];
    elements<3>(count, stride, [=](int64_t io, int64_t ic, int64_t iz) {
      o[io] = clamp_between(T(c[ic] + scale * z[iz]), lo, hi);
    });
  });
}

}  // namespace mwpb
