// philox.py's counter-based random numbers: Philox 4x32-10 (Salmon, Moraes, Dror and Shaw, SC 2011).
//
// The counter is (group, index low, index high, stream), the key the seed. Element 4 * group + w of a sample
// takes word w. Needs no PyTorch header, so that a test can compile it alone.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "vecmath.h"

namespace mwpb {

enum Stream : uint32_t {
  kStreamCrop = 1,
  kStreamUniform = 2,
  kStreamGaussian = 3,
  kStreamL2 = 4,
  kStreamOrder = 5,
  kStreamL2Radius = 6,
};

constexpr int kCounters = 16;           // counters computed at once, one a vector lane
constexpr int kDraws = 4 * kCounters;   // numbers that they give

// Vectors of 64-bit lanes that each hold a 32-bit word (with anything in the upper half), since a round
// multiplies 32 by 32 bits. Compilers do not find this by themselves.
#if defined(__AVX512F__)
typedef uint64_t Lanes __attribute__((vector_size(64)));
inline Lanes multiply_words(Lanes a, uint32_t m) { return Lanes(_mm512_maskz_mul_epu32(0xFF, __m512i(a), _mm512_set1_epi64(m))); }
#elif defined(__AVX2__)
typedef uint64_t Lanes __attribute__((vector_size(32)));
inline Lanes multiply_words(Lanes a, uint32_t m) { return Lanes(_mm256_mul_epu32(__m256i(a), _mm256_set1_epi64x(m))); }
#elif defined(__SSE2__)
typedef uint64_t Lanes __attribute__((vector_size(16)));
inline Lanes multiply_words(Lanes a, uint32_t m) { return Lanes(_mm_mul_epu32(__m128i(a), _mm_set1_epi64x(m))); }
#else
typedef uint64_t Lanes;
inline Lanes multiply_words(Lanes a, uint32_t m) { return (a & 0xFFFFFFFFu) * m; }
#endif
constexpr int kLanes = sizeof(Lanes) / 8;
alignas(64) constexpr uint64_t kNumbers[kCounters] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

inline uint32_t low_word(int64_t v) { return uint32_t(uint64_t(v)); }
inline uint32_t high_word(int64_t v) { return uint32_t(uint64_t(v) >> 32); }

// Ten rounds on N independent counters, interleaved to hide the multiplications' latency.
template <class V, int N, class Multiply>
inline void philox_rounds(V (&c0)[N], V (&c1)[N], V (&c2)[N], V (&c3)[N], int64_t seed, Multiply&& multiply) {
  uint32_t k0 = low_word(seed), k1 = high_word(seed);
  for (int round = 0; round < 10; ++round) {
    for (int n = 0; n < N; ++n) {
      V p0 = multiply(c0[n], 0xD2511F53u), p1 = multiply(c2[n], 0xCD9E8D57u);
      c0[n] = (p1 >> 32) ^ c1[n] ^ uint64_t(k0);
      c2[n] = (p0 >> 32) ^ c3[n] ^ uint64_t(k1);
      c1[n] = p1;
      c3[n] = p0;
    }
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
}

// The four words of one group.
inline void philox4x32(uint32_t group, int64_t index, int64_t seed, uint32_t stream, uint32_t (&out)[4]) {
  uint64_t c0[1] = {group}, c1[1] = {low_word(index)}, c2[1] = {high_word(index)}, c3[1] = {stream};
  philox_rounds(c0, c1, c2, c3, seed, [](uint64_t a, uint32_t m) { return (a & 0xFFFFFFFFu) * m; });
  out[0] = uint32_t(c0[0]);
  out[1] = uint32_t(c1[0]);
  out[2] = uint32_t(c2[0]);
  out[3] = uint32_t(c3[0]);
}

// The words of kCounters consecutive groups: words[w][i] is word w of group + i.
inline void philox4x32_block(uint32_t group, int64_t index, int64_t seed, uint32_t stream, uint32_t (&words)[4][kCounters]) {
  constexpr int n = 2;
  for (int first = 0; first < kCounters; first += n * kLanes) {
    alignas(64) uint64_t lanes[n * kLanes];
    Lanes c[4][n];
    std::memcpy(c[0], kNumbers + first, sizeof lanes);
    for (int k = 0; k < n; ++k) {
      c[0][k] += uint64_t(group);
      c[1][k] = Lanes{} + uint64_t(low_word(index));
      c[2][k] = Lanes{} + uint64_t(high_word(index));
      c[3][k] = Lanes{} + uint64_t(stream);
    }
    philox_rounds(c[0], c[1], c[2], c[3], seed, [](Lanes a, uint32_t m) { return multiply_words(a, m); });
    for (int w = 0; w < 4; ++w) {
      std::memcpy(lanes, c[w], sizeof lanes);
      for (int i = 0; i < n * kLanes; ++i) words[w][first + i] = uint32_t(lanes[i]);
    }
  }
}

// A word as a multiple of 2^-24 in [0, 1): exact in every type.
template <class T> inline T uniform_word(uint32_t word) { return T(int32_t(word >> 8)) * T(0x1p-24); }

// Two standard normals from two words (Box and Muller, 1958).
inline void normal_words(uint32_t a, uint32_t b, float* first, float* second) {
  float r = std::sqrt(-2.0f * vlog(float(int32_t(a >> 8) + 1) * 0x1p-24f));
  float sine, cosine;
  vsincos_turns(uniform_word<float>(b), &sine, &cosine);
  *first = r * cosine;
  *second = r * sine;
}
inline void normal_words(uint32_t a, uint32_t b, double* first, double* second) {
  double r = std::sqrt(-2.0 * std::log(double(int32_t(a >> 8) + 1) * 0x1p-24));
  double angle = uniform_word<double>(b) * 6.283185307179586476925;
  *first = r * std::cos(angle);
  *second = r * std::sin(angle);
}

// From one array a word to the order of the elements. Not inlined: by itself it becomes a few permutations,
// merged into its callers GCC takes the vectors apart.
template <class T> __attribute__((noinline)) void interleave(const T (&numbers)[4][kCounters], T* out) {
  for (int i = 0; i < kCounters; ++i)
    for (int w = 0; w < 4; ++w) out[4 * i + w] = numbers[w][i];
}

// Fills out with the numbers of whole blocks of kCounters groups from `group` on, at least `groups` of them.
template <class T, class Draw>
inline void fill_draws(uint32_t group, int64_t groups, int64_t index, int64_t seed, uint32_t stream, T* out, Draw&& draw) {
  for (int64_t done = 0; done < groups; done += kCounters, out += kDraws) {
    alignas(64) uint32_t words[4][kCounters];
    alignas(64) T numbers[4][kCounters];
    philox4x32_block(group + uint32_t(done), index, seed, stream, words);
    for (int i = 0; i < kCounters; ++i) draw(words, numbers, i);
    interleave(numbers, out);
  }
}

// Uniform in [-1, 1), multiples of 2^-23: exact.
template <class T>
inline void fill_symmetric(uint32_t group, int64_t groups, int64_t index, int64_t seed, uint32_t stream, T* out) {
  fill_draws(group, groups, index, seed, stream, out, [](auto& words, auto& numbers, int i) {
    for (int w = 0; w < 4; ++w) numbers[w][i] = T(2) * uniform_word<T>(words[w][i]) - T(1);
  });
}

template <class T>
inline void fill_normal(uint32_t group, int64_t groups, int64_t index, int64_t seed, uint32_t stream, T* out) {
  fill_draws(group, groups, index, seed, stream, out, [](auto& words, auto& numbers, int i) {
    normal_words(words[0][i], words[1][i], &numbers[0][i], &numbers[1][i]);
    normal_words(words[2][i], words[3][i], &numbers[2][i], &numbers[3][i]);
  });
}

}  // namespace mwpb
