// Vectors of one number a row, and squares of them turned from rows to classes.
#pragma once

#include "common.h"
#include "vecmath.h"

namespace mwpb {

template <class A> using Native = std::conditional_t<std::is_same_v<A, double>, Doubles, Floats>;
template <class A> using Vec = Two<Two<Native<A>>>;
template <class A> using IntVec = IntOf<Vec<A>>;  // a class for every row, or a comparison's result

// 1 in the rows whose class is c, else 0.
template <class A> inline Vec<A> one_at(IntVec<A> y, int64_t c) {
  return select(y == IntOf<A>(c), splat<Vec<A>>(A(1)), Vec<A>{});
}

// Transposes the square that as many vectors as they have lanes form, by swapping ever larger blocks.
template <int step, class X, size_t... k> inline void swap_blocks(X& first, X& second, std::index_sequence<k...>) {
  constexpr int lanes = sizeof...(k);
  X a = first, b = second;
  first = shuffle<(k & step ? lanes + k - step : k)...>(a, b);
  second = shuffle<(k & step ? lanes + k : k + step)...>(a, b);
}
template <int lanes, int step = 1, class X> inline void transpose(X (&v)[lanes]) {
  if constexpr (step < lanes) {
#pragma GCC unroll 16
    for (int i = 0; i < lanes; ++i)
      if (!(i & step)) swap_blocks<step>(v[i], v[i + step], std::make_index_sequence<lanes>());
    transpose<lanes, 2 * step>(v);
  }
}

template <class T> inline T narrow(compute_t<T> v) { return T(v); }
#if defined(__F16C__)
template <> inline Half narrow<Half>(float v) {
  Half out;
  out.x = _cvtss_sh(v, _MM_FROUND_TO_NEAREST_INT);
  return out;
}
#endif

}  // namespace mwpb
