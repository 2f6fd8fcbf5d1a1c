// start.py's ops on the CPU.
#include "noise.h"

namespace mwpb {
namespace {

Tensor gaussian_start(Tensor x, double sigma, Tensor seed, Tensor index, double lo, double hi) {
  Tensor out = torch::stable::empty_like(x);
  NoiseLoop loop(out, x, seed, index);
  dispatch_image(x, {}, [&](auto tag) {
    using T = decltype(tag);
    T* to = mutable_data<T>(out);
    const T* from = data<T>(x);
    loop.for_boxes<T>([&](int64_t i, int64_t b, T* scratch) {
      auto box = loop.box(i, b);
      add_noise<T>(box, to, from, loop.normal(i, box, kStreamGaussian, scratch), T(sigma), T(lo), T(hi));
    });
  });
  return out;
}

Tensor uniform_start(Tensor x, Tensor radius, Tensor seed, Tensor index, double lo, double hi) {
  Tensor out = torch::stable::empty_like(x);
  NoiseLoop loop(out, x, seed, index);
  dispatch_image(x, {&radius}, [&](auto tag) {
    using T = decltype(tag);
    T* to = mutable_data<T>(out);
    const T* from = data<T>(x);
    const T* r = data<T>(radius);
    loop.for_boxes<T>([&](int64_t i, int64_t b, T* scratch) {
      auto box = loop.box(i, b);
      const T* noise = loop.symmetric(i, box, kStreamUniform, scratch);
      add_noise<T>(box, to, from, noise, r[i * radius.stride(0)], T(lo), T(hi));
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
