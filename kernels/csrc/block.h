// Rows of logits in blocks, one row a lane of four vectors: maxima, sums and exponentials over the classes are then
// whole vector operations, whatever the number of classes, and no row's value depends on its neighbours.
#pragma once

#include <memory>

#include "transpose.h"

namespace mwpb {

// rows --------------------------------------------------------------------------------------------------------
// The rows of a (B, C) tensor.
template <class T> struct Matrix {
  explicit Matrix(const Tensor& logits)
      : batch(logits.size(0)), classes(logits.size(1)), row_stride(logits.stride(0)), stride(logits.stride(1)),
        values(data<T>(logits)) {}

  int64_t batch, classes, row_stride, stride;
  const T* values;
};

// A (B,) tensor.
struct Column {
  explicit Column(const Tensor& t) : values(t.const_data_ptr()), stride(t.stride(0)) {}

  const void* values;
  int64_t stride;
};

// A block of rows from the first-th on: z[c] are their logits for class c, e[c] is working memory.
template <class A> struct Rows {
  using Values = Vec<A>;
  using Ints = IntVec<A>;
  using Int = IntOf<A>;
  static constexpr int kLanes = kVectorBytes / sizeof(A);
  static constexpr int kRows = sizeof(Values) / sizeof(A);
  static constexpr int kParts = kRows / kLanes;
  static constexpr A kLow = -std::numeric_limits<A>::infinity();
  static constexpr A kNaN = std::numeric_limits<A>::quiet_NaN();

  explicit Rows(int64_t n)
      : classes(n), padded((n + kLanes - 1) / kLanes * kLanes), memory_(new Values[3 * padded]), z(memory_.get()),
        e(z + padded), staged_(reinterpret_cast<A*>(e + padded)) {}
  Rows(const Rows&) = delete;

  // Loads rows `begin` to `end`, or as many of them as there are lanes; the lanes that remain are 0.
  template <class T> void load(const Matrix<T>& from, int64_t begin, int64_t end) {
    first = begin, left = end - begin, count = std::min<int64_t>(kRows, left);
    const T* values = from.values + first * from.row_stride;
    if constexpr (std::is_same_v<T, A>) {
      // as they lie, where the last row's padding still lies inside the tensor
      const int64_t reach = (from.batch - 1 - first) * from.row_stride + classes;
      if (from.stride == 1 && count == kRows && (kRows - 1) * from.row_stride + padded <= reach)
        return load_tiles(values, from.row_stride);
    }
    if (from.stride == 1 && from.row_stride == classes) {
      for (int64_t k = 0; k < count * classes; ++k) staged_[k] = widen(values[k]);
    } else {
      for (int64_t i = 0; i < count; ++i)
        for (int64_t c = 0; c < classes; ++c)
          staged_[i * classes + c] = widen(values[i * from.row_stride + c * from.stride]);
    }
    std::fill(staged_ + count * classes, staged_ + kRows * classes, A(0));
    load_tiles(staged_, classes);
  }

  // Writes e to the rows of a contiguous matrix.
  template <class T> void store(T* matrix) {
    T* to = matrix + first * classes;
    if constexpr (std::is_same_v<T, A>) {
      // at once, where the last row's padding falls on rows that are written later
      if ((kRows - 1) * classes + padded <= left * classes) return store_tiles(to);
    }
    store_tiles(staged_);
    for (int64_t k = 0; k < count * classes; ++k) to[k] = narrow<T>(staged_[k]);
  }
  // Writes one value a row.
  void store(A* vector, Values values) const {
    if (count == kRows) {
      std::memcpy(vector + first, &values, sizeof(values));
    } else {
      std::memcpy(vector + first, &values, count * sizeof(A));
    }
  }

  // One value a row.
  Values load_values(const Column& from) const {
    Values out;
    std::memcpy(&out, Lanes<A>(*this, from).lane, sizeof(out));
    return out;
  }
  // One class a row, -1 where it is outside [0, C).
  Ints load_labels(const Column& from) const {
    const Lanes<int64_t> label(*this, from);
    alignas(Ints) Int lane[kRows];
    for (int i = 0; i < kRows; ++i) lane[i] = label.lane[i] >= 0 && label.lane[i] < classes ? Int(label.lane[i]) : Int(-1);
    Ints y;
    std::memcpy(&y, lane, sizeof(y));
    return y;
  }

  // e[c] = f(c) for every class.
  template <class F> void fill(F&& f) {
    for (int64_t c = 0; c < classes; ++c) e[c] = f(c);
  }

  // The sum of f(c) over the classes, in order and in partial sums so that its error hardly grows with their number.
  template <class F> auto sum_of(F&& f) const {
    decltype(f(int64_t(0))) total{};
    for (int64_t base = 0; base < classes; base += 16) {
      decltype(total) part{};
      for (int64_t c = base; c < std::min(base + 16, classes); ++c) part += f(c);
      total += part;
    }
    return total;
  }

  // Ignores NaN.
  Values largest() const {
    Values best = splat<Values>(kLow);
    for (int64_t c = 0; c < classes; ++c) best = select(z[c] > best, z[c], best);
    return best;
  }

  struct Pair {
    Values own, best;  // the logit of class y, and the largest of the others, NaN ignored
    Ints other;        // the first class that has it
  };
  Pair compare(Ints y) const {
    Pair found{Values{}, splat<Values>(kLow), select(y == 0, Ints{} + 1, Ints{})};
    for (int64_t c = 0; c < classes; ++c) {
      const Ints mine = y == Int(c);
      const Values rival = select(mine, splat<Values>(kLow), z[c]);
      const Ints better = rival > found.best;
      found.own = select(mine, z[c], found.own);
      found.best = select(better, rival, found.best);
      found.other = select(better, Ints{} + Int(c), found.other);
    }
    return found;
  }

  // Whether a logit is NaN or +infinity.
  Ints poisoned() const {
    Ints bad{};
    for (int64_t c = 0; c < classes; ++c) bad |= ~(z[c] < -kLow);
    return bad;
  }

  // e = exp(z - maximum) and sum, their sum, where the largest logit is known: NaN for a row with NaN or +infinity,
  // or of -infinity only.
  void exponentials(Values largest) {
    maximum = largest;
    sum = sum_of([&](int64_t c) { return e[c] = vexp_decay(z[c] - largest); });
  }
  void exponentials() { exponentials(largest()); }
  // e = softmax(z).
  void softmax(Values largest) {
    exponentials(largest);
    const Values scale = A(1) / sum;
    fill([&](int64_t c) { return e[c] * scale; });
  }
  void softmax() { softmax(largest()); }

  // Takes the softmax and compares class y with the others.
  Pair softmax_compare(Ints y) {
    const Pair found = compare(y);
    softmax(select(found.own > found.best, found.own, found.best));
    return found;
  }
  // The sum of e but for two classes: of the softmax what 1 - p would have lost the digits of.
  Values rest_besides(Ints first, Ints second) const {
    return sum_of([&](int64_t c) {
      return select(first == Int(c), Values{}, select(second == Int(c), Values{}, e[c]));
    });
  }
  // A function of the class: `own` for class y, `its` for class other, f(c) for the others.
  template <class F> auto by_class(Ints y, Values own, Ints other, Values its, F f) const {
    return [=](int64_t c) { return select(y == Int(c), own, select(other == Int(c), its, f(c))); };
  }
  // The softmax of a logit of each row.
  Values probability(Values logit) const { return vexp_decay(logit - maximum) * (A(1) / sum); }

  const int64_t classes, padded;
  int64_t first = 0, count = 0, left = 0;  // `left` rows from the first on are the caller's, `count` of them loaded
  Values maximum{}, sum{};

 private:
  // A column's numbers X of these rows, 0 in lanes without a row.
  template <class X> struct Lanes {
    Lanes(const Rows& rows, const Column& column) {
      const X* from = static_cast<const X*>(column.values) + rows.first * column.stride;
      if (column.stride == 1 && rows.count == kRows) {
        std::memcpy(lane, from, sizeof(lane));
      } else {
        for (int64_t i = 0; i < kRows; ++i) lane[i] = i < rows.count ? from[i * column.stride] : X(0);
      }
    }

    alignas(kVectorBytes) X lane[kRows];
  };

  // Tiles of as many rows and classes as a vector has lanes. Of z and e they are the h-th vectors.
  void load_tiles(const A* from, int64_t row_stride) {
    auto* const parts = reinterpret_cast<Native<A>*>(z);
    for (int64_t base = 0; base < padded; base += kLanes) {
      const A* row = from + base;
      for (int h = 0; h < kParts; ++h) {
        Native<A> tile[kLanes];
        for (int i = 0; i < kLanes; ++i, row += row_stride) std::memcpy(&tile[i], row, sizeof(tile[i]));
        transpose(tile);
        Native<A>* to = parts + kParts * base + h;
        for (int j = 0; j < kLanes; ++j, to += kParts) *to = tile[j];
      }
    }
  }
  // A tile's padding falls on the next rows' first classes, which are written after it.
  void store_tiles(A* to) const {
    const auto* const parts = reinterpret_cast<const Native<A>*>(e);
    for (int64_t base = padded - kLanes; base >= 0; base -= kLanes) {
      A* row = to + base;
      for (int h = 0; h < kParts; ++h) {
        Native<A> tile[kLanes];
        const Native<A>* from = parts + kParts * base + h;
        for (int j = 0; j < kLanes; ++j, from += kParts) tile[j] = *from;
        transpose(tile);
        for (int i = 0; i < kLanes; ++i, row += classes) std::memcpy(row, &tile[i], sizeof(tile[i]));
      }
    }
  }

  std::unique_ptr<Values[]> memory_;

 public:
  Values* const z;
  Values* const e;

 private:
  A* const staged_;  // the rows one after the other, with room for a vector that begins at the last class
};

}  // namespace mwpb
