// batch_norm_relu.py's ops on the CPU.
#include "channels.h"

#include <optional>
#include <tuple>

namespace mwpb {
namespace {

constexpr int64_t kBlock = 16384;  // elements of a block of rows
constexpr int64_t kFewRows = 32, kMostRows = 256, kMostBlocks = 4096;  // sums of more rows in float32 lose digits

// The rows (positions) of (B, C, ...) in blocks, whose sums are added up afterwards. The cut depends on sizes alone,
// and never on the number of threads.
struct Blocks {
  explicit Blocks(const Tensor& x) : channels(x.size(1)), rows(channels ? x.numel() / channels : 0) {
    const int64_t wanted = std::min(kMostRows, kBlock / std::max<int64_t>(1, channels));
    size = std::max<int64_t>({1, wanted, (rows + kMostBlocks - 1) / kMostBlocks});
    count = (rows + size - 1) / size;
  }

  // f(block, first row, row after the last) for each block, over the threads.
  template <class F> void run(F&& f) const {
    parallel(count, 4 * size * channels, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) f(b, b * size, std::min(rows, (b + 1) * size));
    });
  }

  int64_t length(int64_t block) const { return std::min(rows, (block + 1) * size) - block * size; }

  int64_t channels, rows, size, count;
};

template <class A> struct Vector : std::vector<A> {
  explicit Vector(const Tensor& t) : std::vector<A>(size_t(t.size(0))) {
    for (size_t c = 0; c < this->size(); ++c) (*this)[c] = data<A>(t)[int64_t(c) * t.stride(0)];
  }
};

// Mean, and sum of the squared distances from it, of each channel.
template <class T> void moments(const Tensor& x, std::vector<double>& mean, std::vector<double>& squares) {
  using A = compute_t<T>;
  const Blocks blocks(x);
  const Positions at_row(x, 1);
  const int64_t n = blocks.channels, step = at_row.step;
  // of each block: where it measures from, which is the mean of its first rows, the sum of the distances, and of their
  // squares, which few rows at a time are added up in float32
  std::vector<double> parts(size_t(3 * n * blocks.count));
  blocks.run([&](int64_t b, int64_t begin, int64_t end) {
    double* part = parts.data() + 3 * n * b;
    std::vector<A> few(size_t(3 * n));
    A *pivot = few.data(), *sum = pivot + n, *square = sum + n;
    const T* values = data<T>(x);
    const auto first = [&](int64_t i) { return values + at_row(end - begin < 4 ? begin : begin + i); };
    channels(n, step == 1, [=, v0 = first(0), v1 = first(1), v2 = first(2), v3 = first(3)](int64_t c, auto d) {
      const auto quarter = [=](const T* v) { return A(0.25) * widen(v[at(c, step, d)]); };
      pivot[c] = (quarter(v0) + quarter(v1)) + (quarter(v2) + quarter(v3));  // of equal values that value
    });
    for (int64_t c = 0; c < n; ++c) part[c] = pivot[c];
    for (int64_t from = begin; from < end; from += kFewRows) {
      const int64_t to = std::min(end, from + kFewRows);
      std::fill(sum, sum + 2 * n, A(0));
      int64_t p = from;
      for (; p + 4 <= to; p += 4) {  // by fours, since the sums are loaded and stored for each
        const T *v0 = values + at_row(p), *v1 = values + at_row(p + 1), *v2 = values + at_row(p + 2), *v3 = values + at_row(p + 3);
        channels(n, step == 1, [=](int64_t c, auto d) {
          const int64_t i = at(c, step, d);
          const A k = pivot[c], a0 = widen(v0[i]) - k, a1 = widen(v1[i]) - k, a2 = widen(v2[i]) - k, a3 = widen(v3[i]) - k;
          sum[c] += (a0 + a1) + (a2 + a3);
          square[c] += (a0 * a0 + a1 * a1) + (a2 * a2 + a3 * a3);
        });
      }
      for (; p < to; ++p) {
        channels(n, step == 1, [=, v = values + at_row(p)](int64_t c, auto d) {
          const A a = widen(v[at(c, step, d)]) - pivot[c];
          sum[c] += a, square[c] += a * a;
        });
      }
      for (int64_t i = 0; i < 2 * n; ++i) part[n + i] += sum[i];
    }
  });
  mean.assign(size_t(n), 0), squares.assign(size_t(n), 0);
  const auto own = [&](int64_t b, int64_t c) {
    const double* part = parts.data() + 3 * n * b + c;
    return part[0] + part[n] / double(blocks.length(b));
  };
  for (int64_t b = 0; b < blocks.count; ++b)
    for (int64_t c = 0; c < n; ++c) mean[size_t(c)] += double(blocks.length(b)) * own(b, c);
  for (double& m : mean) {
    m /= double(blocks.rows);
    if (!std::isfinite(m)) m = std::numeric_limits<double>::quiet_NaN();
  }
  for (int64_t b = 0; b < blocks.count; ++b) {
    for (int64_t c = 0; c < n; ++c) {
      const double* part = parts.data() + 3 * n * b + c;
      const double length = double(blocks.length(b)), sum = part[n], apart = own(b, c) - mean[size_t(c)];
      squares[size_t(c)] += std::max(0.0, part[2 * n] - sum * sum / length) + length * apart * apart;
    }
  }
}

void check_vectors(const Tensor& x, std::initializer_list<const Tensor*> vectors) {
  const auto type = x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  for (const Tensor* v : vectors)
    STD_TORCH_CHECK(v->scalar_type() == type && v->size(0) == x.size(1), "one value a channel, in the type of the sums");
}

template <class A> Tensor vector_of(const Tensor& x) {
  return torch::stable::new_empty(x, {x.size(1)}, std::is_same_v<A, double> ? ScalarType::Double : ScalarType::Float);
}

// 0 or 1 of eight channels from each byte of `flags` as the bits of a byte; flags: with zeros up to a multiple of 8.
inline void pack(const uint8_t* flags, int64_t groups, uint8_t* bytes) {
  for (int64_t k = 0; k < groups; ++k) {
    uint64_t word = 0;
    for (int j = 0; j < 8; ++j) word |= uint64_t(flags[8 * k + j]) << 8 * j;
    bytes[k] = uint8_t(word * 0x0102040810204080ull >> 56);
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> batch_norm_relu(
    Tensor x, Tensor weight, Tensor bias, Tensor running_mean, Tensor running_var, std::optional<Tensor> skip,
    double momentum, double eps) {
  check_vectors(x, {&weight, &bias, &running_mean, &running_var});
  if (skip) STD_TORCH_CHECK(skip->scalar_type() == x.scalar_type(), "operands must have one type");
  Tensor out = torch::stable::empty_like(x), gate = gate_of(x);
  std::optional<Tensor> kept[4];
  dispatch_float(x.scalar_type(), "x", [&](auto tag) {
    using T = decltype(tag);
    using A = compute_t<T>;
    for (auto& t : kept) t = vector_of<A>(x);
    const Blocks blocks(x);
    const int64_t n = blocks.channels, groups = (n + 7) / 8;
    std::vector<double> means, squares;
    moments<T>(x, means, squares);
    const Vector<A> weights(weight), biases(bias), mean_before(running_mean), var_before(running_var);
    std::vector<A> scales(static_cast<size_t>(n));
    A* to_kept[4];
    for (int i = 0; i < 4; ++i) to_kept[i] = mutable_data<A>(*kept[i]);
    for (int64_t c = 0; c < n; ++c) {
      const double count = double(blocks.rows), mean = means[size_t(c)], square = squares[size_t(c)];
      to_kept[0][c] = A(mean);
      to_kept[1][c] = A(1 / std::sqrt(square / count + eps));
      to_kept[2][c] = A((1 - momentum) * mean_before[size_t(c)] + momentum * mean);
      to_kept[3][c] = A((1 - momentum) * var_before[size_t(c)] + momentum * (square / (count - 1)));
      scales[size_t(c)] = to_kept[1][c] * weights[size_t(c)];
    }
    const Positions to(out, 1), from(x, 1), other(skip ? *skip : x, 1);
    const bool dense = to.step == 1 && from.step == 1 && other.step == 1;
    blocks.run([&](int64_t, int64_t begin, int64_t end) {
      std::vector<uint8_t> flags(static_cast<size_t>(8 * groups));
      uint8_t* f = flags.data();
      const A *m = to_kept[0], *s = scales.data(), *b = biases.data();
      for (int64_t p = begin; p < end; ++p) {
        T* v = mutable_data<T>(out) + to(p);
        const T* u = data<T>(x) + from(p);
        auto put = [=](int64_t c, T* place, A sum) {
          const T rounded = narrow<T>(sum <= 0 ? A(0) : sum);  // NaN stays
          *place = rounded;
          f[c] = !(widen(rounded) <= 0);
        };
        if (skip) {
          const T* w = data<T>(*skip) + other(p);
          channels(n, dense, [=, i = to.step, j = from.step, k = other.step](int64_t c, auto d) {
            put(c, v + at(c, i, d), (widen(u[at(c, j, d)]) - m[c]) * s[c] + b[c] + widen(w[at(c, k, d)]));
          });
        } else {
          channels(n, dense, [=, i = to.step, j = from.step](int64_t c, auto d) {
            put(c, v + at(c, i, d), (widen(u[at(c, j, d)]) - m[c]) * s[c] + b[c]);
          });
        }
        pack(f, groups, mutable_data<uint8_t>(gate) + p * groups);
      }
    });
  });
  return {out, *kept[0], *kept[1], gate, *kept[2], *kept[3]};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> batch_norm_relu_backward(
    Tensor grad, Tensor x, Tensor weight, Tensor mean, Tensor invstd, Tensor gate, bool skipped) {
  check_vectors(x, {&weight, &mean, &invstd});
  STD_TORCH_CHECK(grad.scalar_type() == x.scalar_type(), "operands must have one type");
  STD_TORCH_CHECK(gate.scalar_type() == ScalarType::Byte, "gate must be uint8");
  Tensor of_x = torch::stable::empty_like(x);
  Tensor of_skip = skipped ? torch::stable::empty_like(x) : torch::stable::new_empty(x, {0});
  std::optional<Tensor> of_weight, of_bias;
  dispatch_float(x.scalar_type(), "x", [&](auto tag) {
    using T = decltype(tag);
    using A = compute_t<T>;
    of_weight = vector_of<A>(x), of_bias = vector_of<A>(x);
    const Blocks blocks(x);
    const int64_t n = blocks.channels;
    const Vector<A> weights(weight), means(mean), stds(invstd);
    const Positions from(x, 1), behind(grad, 1), byte(gate, gate.dim() - 1), to(of_x, 1);
    // what has passed the gate of row p, into `row`
    const auto pass = [&](int64_t p, A* row) {
      const T* g = data<T>(grad) + behind(p);
      const uint8_t* bits = data<uint8_t>(gate) + byte(p);
      for (int64_t k = 0; 8 * k < n; ++k) {
        const unsigned open = bits[k * byte.step];
        channels(std::min<int64_t>(8, n - 8 * k), behind.step == 1, [=, first = g + 8 * k * behind.step, i = behind.step](int64_t c, auto d) {
          row[8 * k + c] = (open >> c) & 1 ? widen(first[at(c, i, d)]) : A(0);
        });
      }
    };
    std::vector<double> parts(size_t(2 * n * blocks.count));
    blocks.run([&](int64_t b, int64_t begin, int64_t end) {
      std::vector<A> few(size_t(2 * n)), passed(static_cast<size_t>(n));
      A *sum = few.data(), *moment = sum + n;
      const A *m = means.data(), *row = passed.data();
      for (int64_t p = begin; p < end; ++p) {
        pass(p, passed.data());
        channels(n, from.step == 1, [=, v = data<T>(x) + from(p), i = from.step](int64_t c, auto d) {
          sum[c] += row[c];
          moment[c] += row[c] * (widen(v[at(c, i, d)]) - m[c]);
        });
        if ((p + 1 - begin) % kFewRows != 0 && p + 1 < end) continue;
        for (int64_t i = 0; i < 2 * n; ++i) parts[size_t(2 * n * b + i)] += few[size_t(i)];
        std::fill(few.begin(), few.end(), A(0));
      }
    });
    std::vector<A> shares(size_t(2 * n)), scales(static_cast<size_t>(n));
    A *to_weight = mutable_data<A>(*of_weight), *to_bias = mutable_data<A>(*of_bias);
    for (int64_t c = 0; c < n; ++c) {
      double sum = 0, moment = 0;
      for (int64_t b = 0; b < blocks.count; ++b) sum += parts[size_t(2 * n * b + c)], moment += parts[size_t(2 * n * b + n + c)];
      moment *= stds[size_t(c)];
      to_bias[c] = A(sum), to_weight[c] = A(moment);
      shares[size_t(c)] = A(sum / double(blocks.rows));
      shares[size_t(n + c)] = A(moment / double(blocks.rows));
      scales[size_t(c)] = weights[size_t(c)] * stds[size_t(c)];
    }
    blocks.run([&](int64_t, int64_t begin, int64_t end) {
      std::vector<A> passed(static_cast<size_t>(n));
      const A *m = means.data(), *s = stds.data(), *h = shares.data(), *w = scales.data(), *row = passed.data();
      for (int64_t p = begin; p < end; ++p) {
        pass(p, passed.data());
        const T* v = data<T>(x) + from(p);
        channels(n, from.step == 1 && to.step == 1, [=, o = mutable_data<T>(of_x) + to(p), i = to.step, j = from.step](int64_t c, auto d) {
          const A normed = (widen(v[at(c, j, d)]) - m[c]) * s[c];
          o[at(c, i, d)] = narrow<T>((row[c] - h[c] - normed * h[n + c]) * w[c]);
        });
        if (skipped)
          channels(n, to.step == 1, [=, o = mutable_data<T>(of_skip) + to(p), i = to.step](int64_t c, auto d) {
            o[at(c, i, d)] = narrow<T>(row[c]);
          });
      }
    });
  });
  return {of_x, *of_weight, *of_bias, of_skip};
}

}  // namespace
}  // namespace mwpb

STABLE_TORCH_LIBRARY_IMPL(mwpb, CPU, m) {
  m.impl("batch_norm_relu", TORCH_BOX(&mwpb::batch_norm_relu));
  m.impl("batch_norm_relu_backward", TORCH_BOX(&mwpb::batch_norm_relu_backward));
}
