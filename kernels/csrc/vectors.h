// Vectors of the processor's width as the compiler's own types, and pairs of them: two independent chains of
// operations fill each other's waits. What is written with the functions below takes a number, a vector or a pair.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace mwpb {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

typedef float Floats __attribute__((vector_size(kVectorBytes)));
typedef double Doubles __attribute__((vector_size(kVectorBytes)));
typedef int32_t Ints __attribute__((vector_size(kVectorBytes)));
typedef int64_t Longs __attribute__((vector_size(kVectorBytes)));
typedef uint32_t Words __attribute__((vector_size(kVectorBytes)));
typedef uint64_t LongWords __attribute__((vector_size(kVectorBytes)));

// pairs -------------------------------------------------------------------------------------------------------
template <class V> struct Two {
  V a, b;
};
template <class V> Two(V, V) -> Two<V>;

#define MWPB_PAIRWISE(op)                                                                                   \
  template <class V, class W> inline auto operator op(Two<V> x, Two<W> y) { return Two{x.a op y.a, x.b op y.b}; } \
  template <class V, class S> requires std::is_arithmetic_v<S>                                              \
  inline auto operator op(Two<V> x, S s) { return Two{x.a op s, x.b op s}; }                                \
  template <class V, class S> requires std::is_arithmetic_v<S>                                              \
  inline auto operator op(S s, Two<V> x) { return Two{s op x.a, s op x.b}; }
MWPB_PAIRWISE(+)
MWPB_PAIRWISE(-)
MWPB_PAIRWISE(*)
MWPB_PAIRWISE(/)
MWPB_PAIRWISE(<)
MWPB_PAIRWISE(>)
MWPB_PAIRWISE(==)
MWPB_PAIRWISE(!=)
MWPB_PAIRWISE(&)
MWPB_PAIRWISE(|)
MWPB_PAIRWISE(^)
MWPB_PAIRWISE(<<)
MWPB_PAIRWISE(>>)
#undef MWPB_PAIRWISE
template <class V> inline Two<V> operator-(Two<V> x) { return {-x.a, -x.b}; }
template <class V> inline Two<V> operator~(Two<V> x) { return {~x.a, ~x.b}; }
template <class V> inline Two<V>& operator+=(Two<V>& x, Two<V> y) { return x = x + y; }
template <class V> inline Two<V>& operator|=(Two<V>& x, Two<V> y) { return x = x | y; }

// The h-th vector V of a pair, or of a pair of pairs.
template <class V, class W> inline auto& part(W& x, int64_t h) {
  return reinterpret_cast<std::conditional_t<std::is_const_v<W>, const V, V>*>(&x)[h];
}

// types -------------------------------------------------------------------------------------------------------
// Of a number, vector or pair: what it holds, and the same with signed and with unsigned integers instead.
template <class V> struct Kind;
template <> struct Kind<float> { using Of = float; using Int = int32_t; using Bits = uint32_t; };
template <> struct Kind<double> { using Of = double; using Int = int64_t; using Bits = uint64_t; };
template <> struct Kind<uint32_t> { using Of = uint32_t; using Int = int32_t; using Bits = uint32_t; };
template <> struct Kind<Floats> { using Of = float; using Int = Ints; using Bits = Words; };
template <> struct Kind<Doubles> { using Of = double; using Int = Longs; using Bits = LongWords; };
template <> struct Kind<Words> { using Of = uint32_t; using Int = Ints; using Bits = Words; };
template <class V> struct Kind<Two<V>> {
  using Of = typename Kind<V>::Of;
  using Int = Two<typename Kind<V>::Int>;
  using Bits = Two<typename Kind<V>::Bits>;
};
template <class V> using Of = typename Kind<V>::Of;
template <class V> using IntOf = typename Kind<V>::Int;
template <class V> using BitsOf = typename Kind<V>::Bits;

// functions ---------------------------------------------------------------------------------------------------
template <class V> inline V splat(Of<V> v) { return v - V{}; }

template <class M, class X> inline X select(M mask, X yes, X no) { return mask ? yes : no; }
template <class M, class X> inline Two<X> select(Two<M> mask, Two<X> yes, Two<X> no) {
  return {select(mask.a, yes.a, no.a), select(mask.b, yes.b, no.b)};
}

// The same bits as another type.
template <class W, class V> inline W bits_as(V x) {
  static_assert(sizeof(W) == sizeof(V));
  W out;
  std::memcpy(&out, &x, sizeof(out));
  return out;
}
template <class W, class V> inline W bits_as(Two<V> x) {
  return {bits_as<decltype(W::a)>(x.a), bits_as<decltype(W::a)>(x.b)};
}

// Integers as floating-point numbers.
template <class V, class I> inline V number(I x) {
  if constexpr (std::is_arithmetic_v<V>) {
    return V(x);
  } else {
    return __builtin_convertvector(x, V);
  }
}
template <class V, class I> inline V number(Two<I> x) {
  return {number<decltype(V::a)>(x.a), number<decltype(V::a)>(x.b)};
}

// a * b + c, rounded once where the processor can.
inline float fuse(float a, float b, float c) {
#if defined(__FMA__)
  return __builtin_fmaf(a, b, c);
#else
  return a * b + c;
#endif
}
inline Floats fuse(Floats a, Floats b, Floats c) {
#if defined(__AVX512F__)
  return Floats(_mm512_fmadd_ps(__m512(a), __m512(b), __m512(c)));
#elif defined(__FMA__)
  return Floats(_mm256_fmadd_ps(__m256(a), __m256(b), __m256(c)));
#else
  return a * b + c;
#endif
}
template <class V> inline Two<V> fuse(Two<V> a, Two<V> b, Two<V> c) { return {fuse(a.a, b.a, c.a), fuse(a.b, b.b, c.b)}; }
template <class V, class B, class C> inline V fused(V a, B b, C c) {
  auto whole = [](auto v) {
    if constexpr (std::is_same_v<decltype(v), V>) {
      return v;
    } else {
      return splat<V>(v);
    }
  };
  return fuse(a, whole(b), whole(c));
}

// f of every number: a loop that the compiler vectorises.
template <class V, class F> inline V map(V x, F&& f) {
  constexpr int count = sizeof(V) / sizeof(Of<V>);
  alignas(V) Of<V> lane[count];
  std::memcpy(lane, &x, sizeof(x));
#pragma GCC ivdep
  for (int j = 0; j < count; ++j) lane[j] = f(lane[j]);
  std::memcpy(&x, lane, sizeof(x));
  return x;
}
template <class V, class F> inline Two<V> map(Two<V> x, F&& f) { return {map(x.a, f), map(x.b, f)}; }

template <class V> inline V square_root(V x) {
  return map(x, [](Of<V> v) { return std::sqrt(v); });
}

// The lanes `k` of a and b, counted through both.
template <size_t... k, class V> inline V shuffle(V a, V b) {
#if __has_builtin(__builtin_shufflevector)
  return __builtin_shufflevector(a, b, int(k)...);
#else  // GCC 11
  return __builtin_shuffle(a, b, decltype(a < b){k...});
#endif
}

}  // namespace mwpb
