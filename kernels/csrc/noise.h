// The loop of the start points: counter-based noise in the logical order of each sample, added in any layout.
#pragma once

#include "philox.h"
#include "strided.h"

#include <memory>

namespace mwpb {

// Samples cut into boxes that fit in cache with their noise. A box is a range of a sample's logical order or,
// where a few channels lie innermost in memory, the same range of each, so that its memory is one range too.
template <class T> class NoiseLoop {
 public:
  // A box of sample i: its first element, its place in out and x, and the loop over it with the noise as third
  // operand.
  struct Box {
    int64_t sample, first;
    Offsets<3> at;
    const Nest<3>* nest;
  };

  NoiseLoop(const Tensor& out, const Tensor& x, const Tensor& seed, const Tensor& index, double lo, double hi)
      : sample_(std::array<const Tensor*, 2>{&out, &x}), batch_(x.size(0)), stride_{out.stride(0), x.stride(0)}, out_(mutable_data<T>(out)),
        x_(data<T>(x)), lo_(T(lo)), hi_(T(hi)), seed_(scalar_int64(seed)), index_(data<int64_t>(index)), index_stride_(index.stride(0)) {
    const auto& dims = sample_.dims;
    inner_ = sample_.elements;
    if (inner_ == 0) return;
    do {
      inner_ /= dims[level_].size;
    } while (inner_ > kPiece && ++level_ < dims.size());
    const int64_t size = dims[level_].size;
    if (level_ == 1 && dims[0].size <= kMostChannels && dims[0].stride[0] < dims[1].stride[0]) channels_ = dims[0].size;
    rows_ = std::min(size, std::max<int64_t>(1, kPiece / channels_ / inner_));
    if (rows_ < size && rows_ > kHead) rows_ -= rows_ % kHead;  // so that boxes end with a cache line
    across_ = (size + rows_ - 1) / rows_;
    outers_ = sample_.elements / inner_ / size / channels_;
    plane_ = sample_.elements / channels_;
    // room for what `fill` writes and what `add_dense` reads past the end
    pitch_ = (rows_ * inner_ + std::max<int64_t>(2 * kAtOnce, kTile) + kHead) / kHead * kHead;
    for (int64_t rows : {rows_, size - (across_ - 1) * rows_}) {
      std::vector<Nest<3>::Dim> own;
      if (channels_ > 1) own.push_back({channels_, {dims[0].stride[0], dims[0].stride[1], pitch_}});
      int64_t step = inner_;
      for (size_t d = level_; d < dims.size(); ++d) {
        if (d > level_) step /= dims[d].size;
        own.push_back({d == level_ ? rows : dims[d].size, {dims[d].stride[0], dims[d].stride[1], step}});
      }
      nests_.push_back(Nest<3>(std::move(own)).in_memory_order());
    }
    Offsets<2> span{1, 1};
    for (const auto& dim : nests_[0].dims)
      for (int k = 0; k < 2; ++k) span[k] += (dim.size - 1) * dim.stride[k];
    dense_ = span == Offsets<2>{nests_[0].elements, nests_[0].elements};
  }

  int64_t batch() const { return batch_; }
  int64_t boxes() const { return across_ * outers_; }  // of each sample
  int64_t elements() const { return sample_.elements; }
  int64_t seed() const { return seed_; }
  int64_t index(int64_t i) const { return index_[i * index_stride_]; }

  // f(box, b, scratch) for every box of every sample, over the threads. The ranges follow one another across
  // the outer dimensions, which may share their memory.
  template <class F> void for_boxes(F&& f) const {
    if (sample_.elements == 0) return;
    parallel(batch_ * boxes(), 4 * nests_[0].elements, [&](int64_t begin, int64_t end) {
      struct alignas(kLine) Line {
        T of[kHead];
      };
      const std::unique_ptr<Line[]> scratch(new Line[size_t(channels_ * pitch_ / kHead + 1)]);
      for (int64_t item = begin; item < end; ++item) f(box(item / boxes(), item % boxes()), item % boxes(), scratch[0].of);
    });
  }

  // Draws a box's noise into scratch by `fill`, one of philox.h's, and where `add` comes next, asks meanwhile for
  // the memory that it needs: otherwise drawing and waiting for memory would take turns.
  template <class Fill> void draw(const Box& box, uint32_t stream, T* scratch, Fill&& fill, bool adding = true) const {
    const int64_t count = box.nest->elements / channels_;
    // Beyond the box too: a prefetch does not fault, and the next box lies there. With step 0 it asks for the
    // same lines over and over, at little cost.
    auto ask = [o = out_ + box.at[0], c = x_ + box.at[1], step = adding && dense_ ? kAtOnce : 0]() mutable {
      for (int64_t e = 0; e < kAtOnce; e += kHead) {
        __builtin_prefetch(o + e, 1);
        __builtin_prefetch(c + e);
      }
      o += step;
      c += step;
    };
    for (int64_t k = 0; k < channels_; ++k) {
      const int64_t first = box.first + k * plane_;
      T* to = scratch + k * pitch_ + kHead - first % 4;
      fill(uint32_t(first / 4), (first % 4 + count + 3) / 4, index(box.sample), seed_, stream, to, ask);
    }
  }

  // The sum of the noise's squares.
  double squares(const Box& box, const T* scratch) const {
    constexpr int64_t few = 1024;  // whose sum loses next to nothing in T
    const int64_t count = box.nest->elements / channels_;
    double sum = 0;
    for (int64_t c = 0; c < channels_; ++c) {
      const T* noise = scratch + c * pitch_ + kHead;
      for (int64_t i = 0; i < count; i += few)
        sum += double(sum_squares<T>(std::min(few, count - i), [=](int64_t e) { return noise[i + e]; }));
    }
    return sum;
  }

  // out = clamp(x + scale * noise, lo, hi)
  void add(const Box& box, const T* noise, T scale) const {
    const auto& dims = box.nest->dims;
    T* o = out_ + box.at[0];
    const T* c = x_ + box.at[1];
    const T* z = noise + kHead;
    auto channels = [&](int64_t n) {
      return dims.size() == 2 && dims[0].size == n && dims[0].stride[0] == 1 && dims[0].stride[1] == 1 && dims[1].stride == Offsets<3>{n, n, 1};
    };
    if (dims.size() == 1 && unit<3>(dims[0].stride)) return add_dense<1>(dims[0].size, o, c, z, 0, scale);
    if (channels(3)) return add_dense<3>(dims[1].size, o, c, z, dims[0].stride[2], scale);
    if (channels(4)) return add_dense<4>(dims[1].size, o, c, z, dims[0].stride[2], scale);
    box.nest->runs({}, [&](const Offsets<3>& at, int64_t count, const Offsets<3>& stride) {
      add_run(count, stride, o + at[0], c + at[1], z + at[2], scale);
    });
  }

 private:
  static constexpr int64_t kMostChannels = 4;  // that a box holds
  static constexpr int64_t kTile = 128;  // elements of each channel that are interleaved at once
  static constexpr int64_t kLine = 64;  // bytes of a cache line
  static constexpr int64_t kHead = kLine / sizeof(T);  // elements of one; where in scratch a range's noise begins

  void add_run(int64_t count, const Offsets<3>& stride, T* o, const T* c, const T* z, T scale) const {
    mwpb::elements<3>(count, stride, [=, lo = lo_, hi = hi_](int64_t io, int64_t ic, int64_t iz) {
      o[io] = clamp_between(T(c[ic] + scale * z[iz]), lo, hi);
    });
  }

  // The same for C channels that lie next to each other in memory: their noise, `step` apart, is put in that
  // order before it is added.
  template <int C> void add_dense(int64_t count, T* o, const T* c, const T* z, int64_t step, T scale) const {
    for (int64_t i = 0; i < count; i += kTile, z += kTile, o += C * kTile, c += C * kTile) {
      alignas(kLine) T buffer[C * kTile];
      if (C > 1)
        for (int64_t j = 0; j < kTile; ++j)  // beyond the end too, as scratch allows
          for (int k = 0; k < C; ++k) buffer[C * j + k] = z[k * step + j];
      add_run(C * std::min(kTile, count - i), {1, 1, 1}, o, c, C > 1 ? buffer : z, scale);
    }
  }

  Box box(int64_t i, int64_t b) const {
    const int64_t range = b / outers_, begin = range * rows_;
    int64_t outer = b % outers_;
    Box box{i, outer * (plane_ / outers_) + begin * inner_, {i * stride_[0], i * stride_[1], 0}, &nests_[range == across_ - 1]};
    for (int k = 0; k < 2; ++k) box.at[k] += begin * sample_.dims[level_].stride[k];
    for (size_t d = level_; outers_ > 1 && d-- > 0; outer /= sample_.dims[d].size)
      for (int k = 0; k < 2; ++k) box.at[k] += outer % sample_.dims[d].size * sample_.dims[d].stride[k];
    return box;
  }

  Nest<2> sample_;
  int64_t batch_;
  Offsets<2> stride_;
  T* out_;
  const T* x_;
  T lo_, hi_;
  int64_t seed_;
  const int64_t* index_;
  int64_t index_stride_;
  size_t level_ = 0;      // the dimension that is cut, into `across_` ranges of `rows_`, of `inner_` elements each
  int64_t channels_ = 1;  // ranges of a box, `plane_` elements apart, `pitch_` in scratch
  int64_t inner_ = 0, rows_ = 0, across_ = 0, outers_ = 0, plane_ = 0, pitch_ = 0;
  std::vector<Nest<3>> nests_;  // of a box, and of the last
  bool dense_ = false;          // whether a box is one range of memory, in out and in x
};

}  // namespace mwpb
