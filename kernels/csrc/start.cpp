// start.py's ops on the CPU.
#include "noise.h"

namespace mwpb {
namespace {

Tensor gaussian_start(Tensor x, double sigma, Tensor seed, Tensor index, double lo, double hi) {
  Tensor out = torch::stable::empty_like(x);
  dispatch_image(x, {}, [&](auto tag) {
    using T = decltype(tag);
    NoiseLoop<T> loop(out, x, seed, index, lo, hi);
    loop.for_boxes([&](const auto& box, int64_t, T* noise) {
      loop.draw(box, kStreamGaussian, noise, [](auto&&... to) { fill_normal<T>(to...); });
      loop.add(box, noise, T(sigma));
    });
  });
  return out;
}

Tensor uniform_start(Tensor x, Tensor radius, Tensor seed, Tensor index, double lo, double hi) {
  Tensor out = torch::stable::empty_like(x);
  dispatch_image(x, {&radius}, [&](auto tag) {
    using T = decltype(tag);
    NoiseLoop<T> loop(out, x, seed, index, lo, hi);
    const T* r = data<T>(radius);
    loop.for_boxes([&](const auto& box, int64_t, T* noise) {
      loop.draw(box, kStreamUniform, noise, [](auto&&... to) { fill_symmetric<T>(to...); });
      loop.add(box, noise, r[box.sample * radius.stride(0)]);
    });
  });
  return out;
}

}  // namespace
}  // namespace mwpb

STABLE_TORCH_LIBRARY_IMPL(mwpb, CPU, m) {
  m.impl("gaussian_start", TORCH_BOX(&mwpb::gaussian_start));
  m.impl("uniform_start", TORCH_BOX(&mwpb::uniform_start));
}
