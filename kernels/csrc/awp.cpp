// awp.py's ops on the CPU: all tensors in one pass over the threads, cut into pieces whatever their sizes.
#include "strided.h"

namespace mwpb {
namespace {

using Tensors = std::vector<Tensor>;

// N tensors of equal shape as one loop nest, and where its pieces stand among those of all tensors.
template <int N> struct Item {
  Item(const std::array<const Tensor*, N>& operands, int64_t before) : nest(dims(operands)), first(before) {
    nest.in_memory_order();
    type = operands[0]->scalar_type();
    pieces = nest.elements == 0 ? 0 : std::min(nest.dims[0].size, (nest.elements + kPiece - 1) / kPiece);
  }

  // f(offsets, count, strides) for the runs of piece p.
  template <class F> void runs(int64_t p, F&& f) const {
    const int64_t size = nest.dims[0].size, share = size / pieces, rest = size % pieces;
    nest.runs({}, share * p + std::min(p, rest), share * (p + 1) + std::min(p + 1, rest), f);
  }

  Nest<N> nest;
  int64_t first, pieces;
  ScalarType type;

 private:
  static std::vector<typename Nest<N>::Dim> dims(const std::array<const Tensor*, N>& operands) {
    std::vector<typename Nest<N>::Dim> found;
    for (int64_t d = 0; d < operands[0]->dim(); ++d) {
      typename Nest<N>::Dim dim{operands[0]->size(d), {}};
      for (int k = 0; k < N; ++k) dim.stride[k] = operands[k]->stride(d);
      found.push_back(dim);
    }
    return found;
  }
};

template <int N> struct Items {
  explicit Items(const std::array<const Tensors*, N>& lists) {
    for (size_t t = 0; t < lists[0]->size(); ++t) {
      std::array<const Tensor*, N> operands;
      for (int k = 0; k < N; ++k) operands[k] = &(*lists[k])[t];
      items.emplace_back(operands, pieces);
      pieces += items.back().pieces;
      elements += items.back().nest.elements;
    }
  }

  // f(t, p, tag) for piece p of tensor t, over the threads; tag has the tensor's element type.
  template <class F> void for_pieces(F&& f) const {
    if (pieces == 0) return;
    parallel(pieces, elements / pieces, [&](int64_t begin, int64_t end) {
      auto item = std::upper_bound(items.begin(), items.end(), begin, [](int64_t i, const Item<N>& b) { return i < b.first; });
      for (int64_t i = begin, t = item - items.begin() - 1; i < end; ++i) {
        while (i >= items[t].first + items[t].pieces) ++t;
        if (items[t].type == ScalarType::Double) {
          f(t, i - items[t].first, double{});
        } else {
          f(t, i - items[t].first, float{});
        }
      }
    });
  }

  std::vector<Item<N>> items;
  int64_t pieces = 0, elements = 0;
};

// In double: no overflow or underflow of float's squares, and no loss in long sums.
template <class T> double sum_of_squares(const T* values, int64_t count, int64_t stride) {
  constexpr int kLanes = 16;
  alignas(64) double lanes[kLanes] = {};
  int64_t i = 0;
  if (stride == 1) {
    for (; i + kLanes <= count; i += kLanes) {
      for (int j = 0; j < kLanes; ++j) lanes[j] += double(values[i + j]) * double(values[i + j]);
    }
  }
  double sum = 0;
  for (; i < count; ++i) sum += double(values[i * stride]) * double(values[i * stride]);
  for (double lane : lanes) sum += lane;
  return sum;
}

void awp_perturb_(Tensors params, Tensors perturbations, Tensors directions, double gamma, double eps) {
  struct Squares {
    double weight = 0, direction = 0;
  };
  Items<3> all({&params, &perturbations, &directions});
  std::vector<Squares> partial(static_cast<size_t>(all.pieces));
  all.for_pieces([&](int64_t t, int64_t p, auto tag) {
    using T = decltype(tag);
    Squares& squares = partial[size_t(all.items[t].first + p)];
    all.items[t].runs(p, [&](const Offsets<3>& at, int64_t count, const Offsets<3>& stride) {
      squares.weight += sum_of_squares(data<T>(params[t]) + at[0], count, stride[0]);
      squares.direction += sum_of_squares(data<T>(directions[t]) + at[2], count, stride[2]);
    });
  });
  std::vector<double> scales;
  for (const auto& item : all.items) {
    Squares total;
    for (int64_t p = 0; p < item.pieces; ++p) {
      total.weight += partial[size_t(item.first + p)].weight;
      total.direction += partial[size_t(item.first + p)].direction;
    }
    const double norm = std::sqrt(total.direction);
    scales.push_back(norm == 0 ? 0.0 : gamma * std::sqrt(total.weight) / (norm + eps));
  }
  all.for_pieces([&](int64_t t, int64_t p, auto tag) {
    using T = decltype(tag);
    const T scale = T(scales[t]);
    all.items[t].runs(p, [&](const Offsets<3>& at, int64_t count, const Offsets<3>& stride) {
      T* w = mutable_data<T>(params[t]) + at[0];
      T* v = mutable_data<T>(perturbations[t]) + at[1];
      const T* d = data<T>(directions[t]) + at[2];
      elements<3>(count, stride, [=](int64_t iw, int64_t iv, int64_t id) {
        const T step = scale * d[id];
        v[iv] = step;
        w[iw] += step;
      });
    });
  });
}

void awp_restore_(Tensors params, Tensors perturbations) {
  Items<2> all({&params, &perturbations});
  all.for_pieces([&](int64_t t, int64_t p, auto tag) {
    using T = decltype(tag);
    all.items[t].runs(p, [&](const Offsets<2>& at, int64_t count, const Offsets<2>& stride) {
      T* w = mutable_data<T>(params[t]) + at[0];
      const T* v = data<T>(perturbations[t]) + at[1];
      elements<2>(count, stride, [=](int64_t iw, int64_t iv) { w[iw] -= v[iv]; });
    });
  });
}

}  // namespace
}  // namespace mwpb

STABLE_TORCH_LIBRARY_IMPL(mwpb, CPU, m) {
  m.impl("awp_perturb_", TORCH_BOX(&mwpb::awp_perturb_));
  m.impl("awp_restore_", TORCH_BOX(&mwpb::awp_restore_));
}
