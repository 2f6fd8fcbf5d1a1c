// exp, log, sine and cosine of numbers, vectors and pairs of them. The ranges are reduced as in Cephes (Moshier), whose
// polynomials sine and cosine have; those of exp and log are minimax, a degree lower. Errors are below 2 ulp on the
// ranges used here. Doubles take the C library's functions.
#pragma once

#include <limits>

#include "vectors.h"

namespace mwpb {

// exp(x) = mantissa * 2^exponent for x in [-87.4, 88.8]; a NaN gives one, and what is outside anything.
template <class V> struct SplitExp {
  V mantissa;
  BitsOf<V> exponent;
};
template <class V> inline SplitExp<V> split_exp(V x) {
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const V shifted = fused(x, 1.44269504088896341f, magic), n = shifted - magic;
  V r = fused(n, -0.693359375f, x);
  r = fused(n, 2.12194440e-4f, r);
  V p = fused(r, 1.3814540580e-3f, 8.3687454462e-3f);
  p = fused(p, r, 4.1668388993e-2f);
  p = fused(p, r, 1.6666521132e-1f);
  p = fused(p, r, 4.9999994040e-1f);
  p = fused(p, r, 1.0f);
  return {fused(p, r, 1.0f), bits_as<BitsOf<V>>(shifted) - bits_as<uint32_t>(magic)};
}

// exp(x); 0 below -87.3 (the smallest normal number), infinity above 88.7, NaN for NaN.
template <class V> inline V vexp(V x) {
  if constexpr (std::is_same_v<Of<V>, double>) {
    return map(x, [](double v) { return std::exp(v); });
  } else {
    const auto [mantissa, exponent] = split_exp(x);
    // 2^n as two factors, so that n = 128 overflows to infinity and not into the sign
    const auto half = bits_as<BitsOf<V>>(bits_as<IntOf<V>>(exponent) >> 1);
    const V y = mantissa * bits_as<V>((half + 127u) << 23) * bits_as<V>((exponent - half + 127u) << 23);
    const V finite = select(x > 88.72283f, splat<V>(std::numeric_limits<float>::infinity()), y);
    return select(x < -87.33654f, V{}, finite);
  }
}

// The same for x <= 0, in fewer steps.
template <class V> inline V vexp_decay(V x) {
  if constexpr (std::is_same_v<Of<V>, double>) {
    return vexp(x);
  } else {
    const auto [mantissa, exponent] = split_exp(x);
    return select(x < -87.33654f, V{}, mantissa * bits_as<V>((exponent + 127u) << 23));
  }
}

// ln(x) for normal numbers x > 0.
template <class V> inline V vlog_normal(V x) {
  // x = m * 2^k with m in [sqrt(1/2), sqrt(2))
  const auto bits = bits_as<BitsOf<V>>(x);
  const auto e = bits_as<IntOf<V>>(bits - bits_as<uint32_t>(0.707106781186547524f)) >> 23;
  const V m = bits_as<V>(bits - (bits_as<BitsOf<V>>(e) << 23)) - 1.0f;
  V p = fused(m, -7.6345004141e-2f, 1.2761579454e-1f);
  p = fused(p, m, -1.3160182536e-1f);
  p = fused(p, m, 1.4201757312e-1f);
  p = fused(p, m, -1.6623356938e-1f);
  p = fused(p, m, 2.0001226664e-1f);
  p = fused(p, m, -2.5000819564e-1f);
  p = fused(p, m, 3.3333331347e-1f);
  p = fused(p, m, -0.5f);
  return fused(number<V>(e), 0.693147181f, fused(m * m, p, m));
}

// ln(x) for x >= 0: -infinity at 0, infinity at infinity, NaN for NaN; subnormal numbers count as 0.
template <class V> inline V vlog(V x) {
  if constexpr (std::is_same_v<Of<V>, double>) {
    return map(x, [](double v) { return std::log(v); });
  } else {
    const V y = select(x < 1.17549435e-38f, splat<V>(-std::numeric_limits<float>::infinity()), vlog_normal(x));
    return select(x < std::numeric_limits<float>::infinity(), y, x + x);  // infinity and NaN
  }
}

// Sine and cosine of 2^-32nds of a turn, a multiple of 256 of them.
template <class V> inline void vsincos_turn(BitsOf<V> parts, V* sine, V* cosine) {
  const auto quarter = parts + 0x20000000u;  // the nearest quarter turn in its upper two bits
  const V x = number<V>(bits_as<IntOf<V>>(parts << 2)) * 0x1.921fb6p-32f, z = x * x;  // x in [-pi/4, pi/4]
  V s = fused(z, -1.9515295891e-4f, 8.3321608736e-3f);
  s = fused(s, z, -1.6666654611e-1f);
  s = fused(s * z, x, x);
  V c = fused(z, 2.443315711809948e-5f, -1.388731625493765e-3f);
  c = fused(c, z, 4.166664568298827e-2f);
  c = fused(c, z, -0.5f);
  c = fused(c, z, 1.0f);
  const auto odd = (quarter & 0x40000000u) != 0u;
  *sine = bits_as<V>(bits_as<BitsOf<V>>(select(odd, c, s)) ^ (quarter & 0x80000000u));
  *cosine = bits_as<V>(bits_as<BitsOf<V>>(select(odd, s, c)) ^ ((quarter + 0x40000000u) & 0x80000000u));
}

}  // namespace mwpb
