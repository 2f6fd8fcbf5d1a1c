// l2_start.py's op on the CPU.
#include "noise.h"

namespace mwpb {
namespace {

Tensor l2_start(Tensor x, Tensor radius, Tensor seed, Tensor index, double lo, double hi) {
  Tensor out = torch::stable::empty_like(x);
  NoiseLoop loop(out, x, seed, index);
  dispatch_image(x, {&radius}, [&](auto tag) {
    using T = decltype(tag);
    T* to = mutable_data<T>(out);
    const T* from = data<T>(x);
    auto squares = [&](const NoiseLoop::Box& box, const T* noise) {
      return sum_squares<double>(box.count, [=](int64_t e) { return double(noise[e]); });
    };
    auto scale = [&](int64_t i, double norm2) {
      uint32_t words[4];
      philox4x32(0, loop.index(i), loop.seed(), kStreamL2Radius, words);
      double share = std::exp(std::log((double(words[0] >> 8) + 1) * 0x1p-24) / double(loop.elements()));
      return T(double(data<T>(radius)[i * radius.stride(0)]) * share / (norm2 == 0 ? 1.0 : std::sqrt(norm2)));
    };
    auto add = [&](const NoiseLoop::Box& box, const T* noise, T s) { add_noise<T>(box, to, from, noise, s, T(lo), T(hi)); };
    if (loop.boxes() == 1) {
      loop.for_samples<T>([&](int64_t i, T* scratch) {
        auto box = loop.box(i, 0);
        const T* noise = loop.normal(i, box, kStreamL2, scratch);
        add(box, noise, scale(i, squares(box, noise)));
      });
      return;
    }
    // The noise of a large sample is drawn twice, which costs less than memory for all of it.
    std::vector<double> partial(loop.batch() * loop.boxes());
    std::vector<T> scales(loop.batch());
    loop.for_boxes<T>([&](int64_t i, int64_t b, T* scratch) {
      auto box = loop.box(i, b);
      partial[i * loop.boxes() + b] = squares(box, loop.normal(i, box, kStreamL2, scratch));
    });
    for (int64_t i = 0; i < loop.batch() && loop.boxes(); ++i) {
      double sum = 0;
      for (int64_t b = 0; b < loop.boxes(); ++b) sum += partial[i * loop.boxes() + b];
      scales[i] = scale(i, sum);
    }
    loop.for_boxes<T>([&](int64_t i, int64_t b, T* scratch) {
      auto box = loop.box(i, b);
      add(box, loop.normal(i, box, kStreamL2, scratch), scales[i]);
    });
  });
  return out;
}

}  // namespace
}  // namespace mwpb

STABLE_TORCH_LIBRARY_IMPL(mwpb, CPU, m) { m.impl("l2_start", TORCH_BOX(&mwpb::l2_start)); }
