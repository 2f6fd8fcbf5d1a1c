// What test_philox.py calls of the headers, as a C library.
#include <array>
#include "philox.h"
using namespace mwpb;
// f of all x, in pairs of pairs of vectors and the last ones as single numbers.
template <size_t N, class F> void in_pairs(int64_t n, const float* x, std::array<float*, N> y, F f) {
  auto apply = [&]<class V>(int64_t i, V v) {
    std::memcpy(&v, x + i, sizeof v);
    const auto out = f(v);
    for (size_t k = 0; k < N; ++k) std::memcpy(y[k] + i, &out[k], sizeof v);
  };
  using Pair = Two<Two<Floats>>;
  constexpr int64_t step = sizeof(Pair) / sizeof(float);
  int64_t i = 0;
  for (; i + step <= n; i += step) apply(i, Pair{});
  for (; i < n; ++i) apply(i, 0.0f);
}
int32_t whole(float v) { return int32_t(v); }
Ints whole(Floats v) { return __builtin_convertvector(v, Ints); }
template <class V> auto whole(Two<V> v) { return Two{whole(v.a), whole(v.b)}; }
extern "C" {
void words(uint32_t group, int64_t index, int64_t seed, uint32_t stream, uint32_t* out) {
  uint32_t one[4], all[kBlocks][kDraws];
  philox4x32(group, index, seed, stream, one);
  std::memcpy(out, one, sizeof one);
  for (int at : {3, kAtOnce / 4 - 2}) {  // the counter's place
    Words blocks[kBlocks][4];
    Philox(index, seed, stream).blocks(group - at, blocks);
    for (auto& block : blocks) transpose(block);
    std::memcpy(all, blocks, sizeof all);
    out += 4;
    std::memcpy(out, all[4 * at / kDraws] + 4 * at % kDraws, sizeof one);
  }
}
void normals(int64_t groups, int64_t index, int64_t seed, uint32_t stream, float* out) {
  fill_normal(0, groups, index, seed, stream, out);
}
void exps(int64_t n, const float* x, float* y) {
  in_pairs<1>(n, x, {y}, [](auto v) { return std::array{vexp(v)}; });
}
void decays(int64_t n, const float* x, float* y) {
  in_pairs<1>(n, x, {y}, [](auto v) { return std::array{vexp_decay(v)}; });
}
void logs(int64_t n, const float* x, float* y) {
  in_pairs<1>(n, x, {y}, [](auto v) { return std::array{vlog(v)}; });
}
void turns(int64_t n, const float* x, float* s, float* c) {
  in_pairs<2>(n, x, {s, c}, []<class V>(V v) {
    std::array<V, 2> out;
    vsincos_turn(bits_as<BitsOf<V>>(whole(v * 0x1p24f)) << 8, &out[0], &out[1]);
    return out;
  });
}
}
