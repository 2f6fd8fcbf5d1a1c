// l2_start.py's op on the CPU.
#include "noise.h"

namespace mwpb {
namespace {

Tensor l2_start(Tensor x, Tensor radius, Tensor seed, Tensor index, double lo, double hi) {
  Tensor out = torch::stable::empty_like(x);
  dispatch_image(x, {&radius}, [&](auto tag) {
    using T = decltype(tag);
    NoiseLoop<T> loop(out, x, seed, index, lo, hi);
    auto scale = [&](int64_t i, double norm2) {
      uint32_t words[4];
      philox4x32(0, loop.index(i), loop.seed(), kStreamL2Radius, words);
      double share = std::exp(std::log((double(words[0] >> 8) + 1) * 0x1p-24) / double(loop.elements()));
      return T(double(data<T>(radius)[i * radius.stride(0)]) * share / (norm2 == 0 ? 1.0 : std::sqrt(norm2)));
    };
    auto normal = [](auto&&... to) { fill_normal<T>(to...); };
    if (loop.boxes() == 1) {
      loop.for_boxes([&](const auto& box, int64_t, T* noise) {
        loop.draw(box, kStreamL2, noise, normal);
        loop.add(box, noise, scale(box.sample, loop.squares(box, noise)));
      });
      return;
    }
    // The noise of a large sample is drawn twice, which costs less than memory for all of it.
    std::vector<double> partial(loop.batch() * loop.boxes());
    std::vector<T> scales(loop.batch());
    loop.for_boxes([&](const auto& box, int64_t b, T* noise) {
      loop.draw(box, kStreamL2, noise, normal, false);
      partial[box.sample * loop.boxes() + b] = loop.squares(box, noise);
    });
    for (int64_t i = 0; i < loop.batch() && loop.boxes(); ++i) {
      double sum = 0;
      for (int64_t b = 0; b < loop.boxes(); ++b) sum += partial[i * loop.boxes() + b];
      scales[i] = scale(i, sum);
    }
    loop.for_boxes([&](const auto& box, int64_t, T* noise) {
      loop.draw(box, kStreamL2, noise, normal);
      loop.add(box, noise, scales[box.sample]);
    });
  });
  return out;
}

}  // namespace
}  // namespace mwpb

STABLE_TORCH_LIBRARY_IMPL(mwpb, CPU, m) { m.impl("l2_start", TORCH_BOX(&mwpb::l2_start)); }
