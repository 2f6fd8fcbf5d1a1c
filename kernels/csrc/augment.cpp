// augment.py's op on the CPU.
#include "common.h"
#include "philox.h"

#include <stdexcept>
#include <string>
#include <vector>

namespace mwpb {
namespace {

// v / 255 for every byte, correctly rounded, without a division: the product with the upper half of 1/255 is
// exact, so the sum alone rounds; the check below goes through all 256 values.
constexpr float kUpper = 0x1.01p-8f;
constexpr float kLower = float(1.0 / 255.0 - double(kUpper));

constexpr float unit(float v) { return v * kUpper + v * kLower; }

constexpr bool rounds_as_a_division() {
  for (int v = 0; v < 256; ++v) {
    if (unit(float(v)) != float(v) / 255.0f) return false;
  }
  return true;
}
static_assert(rounds_as_a_division());

// Rounding to the result's type, to nearest even, in a form that vectorises. It need only be right for v / 255:
// there is no NaN, and no number so small that it would be subnormal.
inline void narrow(float v, float* out) { *out = v; }
inline void narrow(float v, BFloat16* out) {
  uint32_t bits = bits_as<uint32_t>(v);
  out->x = uint16_t((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16);
}
inline void narrow(float v, Half* out) {
  uint32_t bits = bits_as<uint32_t>(v);
  uint32_t half = ((bits + 0x0FFFu + ((bits >> 13) & 1u)) >> 13) - (112u << 10);  // the bias shrinks by 112
  out->x = uint16_t(bits == 0 ? 0u : half);
}

// Positions up to size - 1 beyond either edge, mirrored about the edge pixel; always within the image.
int64_t mirrored(int64_t position, int64_t size) {
  return std::max<int64_t>((size - 1) - std::abs((size - 1) - std::abs(position)), 0);
}

// Copies and zeros of a few bytes, where calls of the library would cost more than the work.
inline void copy_bytes(uint8_t* to, const uint8_t* from, int64_t n) {
  constexpr int64_t step = 32;
  if (n < step) {
    for (int64_t i = 0; i < n; ++i) to[i] = from[i];
    return;
  }
  for (int64_t i = 0; i < n - step; i += step) std::memcpy(to + i, from + i, step);
  std::memcpy(to + n - step, from + n - step, step);
}

constexpr int64_t kSlack = 16;  // bytes past the end that the following may overwrite

inline void zero_bytes(uint8_t* to, int64_t n) {
  for (int64_t i = 0; i < n; i += kSlack) std::memset(to + i, 0, kSlack);
}

// `count` pixels of three channels, the first at `from` and the others before it, as far as five by five go.
// Returns how many were copied.
inline int64_t copy_mirrored(uint8_t* to, const uint8_t* from, int64_t count) {
  int64_t x = 0;
#if defined(__SSSE3__)
  const __m128i order = _mm_setr_epi8(13, 14, 15, 10, 11, 12, 7, 8, 9, 4, 5, 6, 1, 2, 3, 0);
  for (; x + 5 < count; x += 5) {  // a sixth pixel, so that byte 0 belongs to the row
    __m128i pixels = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from - 3 * x - 13));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + 3 * x), _mm_shuffle_epi8(pixels, order));
  }
#endif
  return x;
}

// Where one sample is cut, and the rows of its crop as packed bytes.
class Crop {
 public:
  Crop(const Tensor& images, int64_t pad, bool reflect, bool flip)
      : base_(data<uint8_t>(images)), channels_(images.size(1)), height_(images.size(2)), width_(images.size(3)),
        stride_n_(images.stride(0)), stride_c_(images.stride(1)), stride_h_(images.stride(2)),
        stride_w_(images.stride(3)), pad_(pad), reflect_(reflect), flip_(flip),
        packed_(stride_w_ == channels_ && (stride_c_ == 1 || channels_ == 1)) {}

  void start(int64_t index, int64_t seed) {
    uint32_t words[4];
    philox4x32(0, index, seed, kStreamCrop, words);
    const uint64_t span = uint64_t(2 * pad_ + 1);
    top_ = int64_t((words[0] * span) >> 32) - pad_;
    left_ = int64_t((words[1] * span) >> 32) - pad_;
    flipped_ = flip_ && (words[2] >> 31) != 0;
    image_ = base_ + index * stride_n_;
    // The columns that show the image itself; those before and after lie in the padding.
    const int64_t begin = std::clamp<int64_t>(-left_, 0, width_);
    const int64_t end = std::clamp<int64_t>(width_ - left_, begin, width_);
    begin_ = flipped_ ? width_ - end : begin;
    end_ = flipped_ ? width_ - begin : end;
  }

  // Asks for row `y` of an image ahead of its turn: images lie far apart, and waiting for them would take most
  // of the time.
  void prefetch(int64_t index, int64_t y) const {
    const uint8_t* row = base_ + index * stride_n_ + y * stride_h_;
    for (int64_t at = 0; packed_ && at < width_ * channels_; at += 64) __builtin_prefetch(row + at);
  }

  // Row `y` of the crop into `to`. Rows are filled in ascending order, so what the wide copies write past the
  // end of one is overwritten by the next.
  void fill(int64_t y, uint8_t* to) const {
    int64_t source = y + top_;
    if (reflect_) source = mirrored(source, height_);
    if (source < 0 || source >= height_) {
      zero_bytes(to, width_ * channels_);
      return;
    }
    const uint8_t* row = image_ + source * stride_h_;
    edge(row, 0, begin_, to);
    const uint8_t* from = row + column(begin_) * stride_w_;
    uint8_t* inner = to + begin_ * channels_;
    const int64_t count = end_ - begin_;
    if (!packed_) {
      const int64_t step = flipped_ ? -stride_w_ : stride_w_;
      for (int64_t c = 0; c < channels_; ++c) {
        for (int64_t x = 0; x < count; ++x) inner[x * channels_ + c] = from[x * step + c * stride_c_];
      }
    } else if (!flipped_) {
      copy_bytes(inner, from, count * channels_);
    } else if (channels_ == 1) {
      for (int64_t x = 0; x < count; ++x) inner[x] = from[-x];
    } else {
      int64_t x = channels_ == 3 ? copy_mirrored(inner, from, count) : 0;
      for (; x < count; ++x)
        for (int64_t c = 0; c < channels_; ++c) inner[x * channels_ + c] = from[c - x * channels_];
    }
    edge(row, end_, width_, to);
  }

 private:
  // The column of the image, before any reflection, that column x of the crop shows.
  int64_t column(int64_t x) const { return (flipped_ ? width_ - 1 - x : x) + left_; }

  void edge(const uint8_t* row, int64_t begin, int64_t end, uint8_t* to) const {
    if (!reflect_) {
      zero_bytes(to + begin * channels_, (end - begin) * channels_);
      return;
    }
    for (int64_t x = begin; x < end; ++x) {
      const uint8_t* from = row + mirrored(column(x), width_) * stride_w_;
      for (int64_t c = 0; c < channels_; ++c) to[x * channels_ + c] = from[c * stride_c_];
    }
  }

  const uint8_t* base_;
  int64_t channels_, height_, width_, stride_n_, stride_c_, stride_h_, stride_w_, pad_;
  bool reflect_, flip_, packed_;
  const uint8_t* image_ = nullptr;
  int64_t top_ = 0, left_ = 0, begin_ = 0, end_ = 0;
  bool flipped_ = false;
};

template <class T>
void crop_flip_into(T* out, const Tensor& images, const Tensor& index, int64_t seed, int64_t pad, bool reflect, bool flip) {
  const int64_t batch = index.size(0), height = images.size(2), row_size = images.size(1) * images.size(3);
  const int64_t* which = data<int64_t>(index);
  if (batch * height * row_size == 0) return;
  // A few rows are assembled as bytes, then converted together: short loops and reading what has only just
  // been written would each cost more than the work itself.
  const int64_t group = std::clamp<int64_t>(1024 / row_size, 1, height);
  // over rows and not over images, so that one large image occupies all threads too
  parallel(batch * height, row_size, [&](int64_t begin, int64_t end) {
    Crop crop(images, pad, reflect, flip);
    std::vector<uint8_t> bytes(size_t(group * row_size + kSlack));
    for (int64_t i = begin; i < end;) {
      const int64_t first = i % height, last = std::min(first + end - i, height);
      const int64_t sample = i / height;
      crop.start(which[sample * index.stride(0)], seed);
      const int64_t next = which[std::min(sample + 1, batch - 1) * index.stride(0)];
      for (int64_t y = first; y < last; y += group) {
        const int64_t rows = std::min(group, last - y);
        for (int64_t r = 0; r < rows; ++r) {
          crop.fill(y + r, bytes.data() + r * row_size);
          crop.prefetch(next, y + r);
        }
        const uint8_t* from = bytes.data();
        T* to = out + (i + y - first) * row_size;
        for (int64_t j = 0; j < rows * row_size; ++j) narrow(unit(float(from[j])), to + j);
      }
      i += last - first;
    }
  });
}

Tensor crop_flip(
    const Tensor& images, const Tensor& index, const Tensor& seed, int64_t pad, bool reflect, bool flip, ScalarType dtype) {
  const int64_t batch = index.size(0), count = images.size(0);
  const int64_t* which = data<int64_t>(index);
  for (int64_t i = 0; i < batch; ++i) {
    const int64_t n = which[i * index.stride(0)];
    if (n < 0 || n >= count) {
      throw std::runtime_error(
          "index " + std::to_string(n) + " is outside the data set's " + std::to_string(count) + " images");
    }
  }
  Tensor out = torch::stable::new_empty(images, {batch, images.size(2), images.size(3), images.size(1)}, dtype);
  dispatch_float(dtype, "dtype", [&](auto tag) {
    using T = decltype(tag);
    if constexpr (!std::is_same_v<T, double>) {
      crop_flip_into(mutable_data<T>(out), images, index, scalar_int64(seed), pad, reflect, flip);
    }
  });
  return torch::stable::transpose(torch::stable::transpose(out, 1, 3), 2, 3);
}

}  // namespace
}  // namespace mwpb

STABLE_TORCH_LIBRARY_IMPL(mwpb, CPU, m) {
  m.impl("crop_flip", TORCH_BOX(&mwpb::crop_flip));
}
