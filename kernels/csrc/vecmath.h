// exp, log, sine and cosine that the compiler vectorises. Polynomials are Cephes' (Moshier), as published;
// errors are below 2 ulp on the ranges used here. Doubles take the C library's functions.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

namespace mwpb {

// The width of the processor's vectors.
#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

inline float fused(float a, float b, float c) {
#if defined(__FMA__)
  return __builtin_fmaf(a, b, c);
#else
  return a * b + c;
#endif
}

inline float bits_to_float(uint32_t bits) {
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}

inline uint32_t float_to_bits(float v) {
  uint32_t out;
  std::memcpy(&out, &v, 4);
  return out;
}

// exp(x) = mantissa * 2^exponent for x in [-87.4, 88.8]; a NaN gives one.
struct SplitExp {
  float mantissa;
  uint32_t exponent;
};
inline SplitExp split_exp(float x) {
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  float shifted = fused(x, 1.44269504088896341f, magic), n = shifted - magic;
  float r = fused(n, -0.693359375f, x);
  r = fused(n, 2.12194440e-4f, r);
  float p = 1.9875691500e-4f;
  p = fused(p, r, 1.3981999507e-3f);
  p = fused(p, r, 8.3334519073e-3f);
  p = fused(p, r, 4.1665795894e-2f);
  p = fused(p, r, 1.6666665459e-1f);
  p = fused(p, r, 5.0000001201e-1f);
  return {fused(p, r * r, r) + 1.0f, float_to_bits(shifted) - float_to_bits(magic)};
}

// exp(x); 0 below -87.3 (the smallest normal number), infinity above 88.7, NaN for NaN.
inline float vexp(float x) {
  // The bound on both sides keeps the exponent's shift defined whatever x is; a NaN passes both tests.
  float c = x > 88.8f ? 88.8f : x;
  SplitExp s = split_exp(c < -87.4f ? -87.4f : c);
  // 2^n as two factors, so that n = 128 overflows to infinity and not into the sign
  uint32_t half = uint32_t(int32_t(s.exponent) >> 1);
  float y = s.mantissa * bits_to_float((half + 127u) << 23) * bits_to_float((s.exponent - half + 127u) << 23);
  y = x < -87.33654f ? 0.0f : y;
  return x > 88.72283f ? std::numeric_limits<float>::infinity() : y;
}
inline double vexp(double x) { return std::exp(x); }

// The same for x <= 0, in fewer steps.
inline float vexp_decay(float x) {
  SplitExp s = split_exp(x < -87.4f ? -87.4f : x);
  float y = s.mantissa * bits_to_float((s.exponent + 127u) << 23);
  return x < -87.33654f ? 0.0f : y;
}
inline double vexp_decay(double x) { return std::exp(x); }

// ln(x) for normal numbers x > 0.
inline float vlog_normal(float x) {
  // x = m * 2^k with m in [sqrt(1/2), sqrt(2))
  uint32_t bits = float_to_bits(x);
  int32_t e = int32_t(bits - float_to_bits(0.707106781186547524f)) >> 23;
  float m = bits_to_float(bits - (uint32_t(e) << 23)) - 1.0f;
  float k = float(e);
  float z = m * m;
  float p = 7.0376836292e-2f;
  p = fused(p, m, -1.1514610310e-1f);
  p = fused(p, m, 1.1676998740e-1f);
  p = fused(p, m, -1.2420140846e-1f);
  p = fused(p, m, 1.4249322787e-1f);
  p = fused(p, m, -1.6668057665e-1f);
  p = fused(p, m, 2.0000714765e-1f);
  p = fused(p, m, -2.4999993993e-1f);
  p = fused(p, m, 3.3333331174e-1f);
  float y = p * m * z;
  y = fused(k, -2.12194440e-4f, y);
  y = fused(-0.5f, z, y);
  return fused(k, 0.693359375f, m + y);
}

// ln(x) for x >= 0: -infinity at 0, infinity at infinity, NaN for NaN; subnormal numbers count as 0.
inline float vlog(float x) {
  float y = vlog_normal(x);
  y = x < 1.17549435e-38f ? -std::numeric_limits<float>::infinity() : y;
  return x <= 3.4028235e38f ? y : x + x;  // infinity and NaN
}
inline double vlog(double x) { return std::log(x); }

// Sine and cosine of a / turn * 2 * pi for a in [0, turn), turn a power of two.
inline void vsincos_turns(float a, float* sine, float* cosine, float turn = 1.0f) {
  const float magic = 12582912.0f;
  float rounded = fused(a, 4.0f / turn, magic);
  uint32_t q = float_to_bits(rounded);  // its last bits count the quarter turns, 0..4
  float x = fused(rounded - magic, -0.25f * turn, a) * (6.28318530717958648f / turn);  // [-pi/4, pi/4]; the difference is exact
  float z = x * x;
  float s = -1.9515295891e-4f;
  s = fused(s, z, 8.3321608736e-3f);
  s = fused(s, z, -1.6666654611e-1f);
  s = fused(s * z, x, x);
  float c = 2.443315711809948e-5f;
  c = fused(c, z, -1.388731625493765e-3f);
  c = fused(c, z, 4.166664568298827e-2f);
  c = fused(c * z, z, fused(-0.5f, z, 1.0f));
  float first = (q & 1u) ? c : s;
  float second = (q & 1u) ? s : c;
  *sine = bits_to_float(float_to_bits(first) ^ (q << 30 & 0x80000000u));
  *cosine = bits_to_float(float_to_bits(second) ^ ((q + 1u) << 30 & 0x80000000u));
}

}  // namespace mwpb
