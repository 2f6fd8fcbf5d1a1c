// philox.py's counter-based random numbers: Philox 4x32-10 (Salmon, Moraes, Dror and Shaw, SC 2011).
//
// The counter is (group, index low, index high, stream), the key the seed. Element 4 * group + w of a sample
// takes word w. Needs no PyTorch header, so that a test can compile it alone.
#pragma once

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

// A round multiplies 32 by 32 bits, so its vectors have 64-bit lanes that each hold a word (with anything in the
// upper half); compilers do not find the instruction by themselves.
constexpr int kCounters = kVectorBytes / 4;  // counters of a block: two LongWords, packed into one Words for each word
constexpr int kDraws = 4 * kCounters;         // numbers that they give
constexpr int kBlocks = 2;                    // blocks computed together, to hide the rounds' latency
constexpr int kAtOnce = kBlocks * kDraws;     // numbers that those give

inline uint64_t multiply_words(uint64_t a, uint32_t m) { return (a & 0xFFFFFFFFu) * m; }
#if defined(__AVX512F__)
inline LongWords multiply_words(LongWords a, uint32_t m) { return LongWords(_mm512_maskz_mul_epu32(0xFF, __m512i(a), _mm512_set1_epi64(m))); }
#elif defined(__AVX2__)
inline LongWords multiply_words(LongWords a, uint32_t m) { return LongWords(_mm256_mul_epu32(__m256i(a), _mm256_set1_epi64x(m))); }
#elif defined(__SSE2__)
inline LongWords multiply_words(LongWords a, uint32_t m) { return LongWords(_mm_mul_epu32(__m128i(a), _mm_set1_epi64x(m))); }
#else
inline LongWords multiply_words(LongWords a, uint32_t m) { return (a & 0xFFFFFFFFu) * m; }
#endif

inline uint32_t low_word(int64_t v) { return uint32_t(uint64_t(v)); }
inline uint32_t high_word(int64_t v) { return uint32_t(uint64_t(v) >> 32); }

// The random words of one sample. V is a vector of counters, or one counter as uint64_t.
class Philox {
 public:
  Philox(int64_t index, int64_t seed, uint32_t stream) {
    uint32_t k0 = low_word(seed), k1 = high_word(seed);
    for (auto& key : keys_) {
      key[0] = k0;
      key[1] = k1;
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
    // Of the first two rounds, half depends on what all groups share.
    const uint64_t p1 = multiply_words(uint64_t(high_word(index)), kM1);
    const uint64_t p0 = multiply_words((p1 >> 32) ^ low_word(index) ^ keys_[0][0], kM0);
    keys_[0][1] ^= stream;
    keys_[1][0] ^= uint32_t(p1);
    keys_[1][1] ^= p0 >> 32;
    second_ = uint32_t(p0);
  }

  // Ten rounds on N vectors by turns: from the groups in c[0] to the words in c[0..3].
  template <class V, int N> void rounds(V (&c)[4][N]) const {
    for (int n = 0; n < N; ++n) {
      const V p0 = multiply_words(c[0][n], kM0), p1 = multiply_words((p0 >> 32) ^ keys_[0][1], kM1);
      c[0][n] = (p1 >> 32) ^ keys_[1][0];
      c[1][n] = p1;
      c[2][n] = p0 ^ keys_[1][1];
      c[3][n] = V{} + second_;
    }
    for (int round = 2; round < 10; ++round) {
      for (int n = 0; n < N; ++n) {
        const V p0 = multiply_words(c[0][n], kM0), p1 = multiply_words(c[2][n], kM1);
        c[0][n] = (p1 >> 32) ^ c[1][n] ^ keys_[round][0];
        c[2][n] = (p0 >> 32) ^ c[3][n] ^ keys_[round][1];
        c[1][n] = p1;
        c[3][n] = p0;
      }
    }
  }

  // The words of kBlocks blocks of kCounters consecutive groups, each a vector for each of the four. Lane
  // 4 * k + j of a block is counter kCounters / 4 * j + k, which is what `transpose` puts in order.
  void blocks(uint32_t group, Words (&words)[kBlocks][4]) const {
    LongWords c[4][2 * kBlocks];
    for (int n = 0; n < 2 * kBlocks; ++n) {
      for (int i = 0; i < kCounters / 2; ++i) {
        const int lane = 2 * i + n % 2;
        c[0][n][i] = uint64_t(n / 2 * kCounters + kCounters / 4 * (lane % 4) + lane / 4);
      }
      c[0][n] += group;
    }
    rounds(c);
    for (int b = 0; b < kBlocks; ++b)
      for (int w = 0; w < 4; ++w) words[b][w] = Words((c[w][2 * b] & 0xFFFFFFFFu) | (c[w][2 * b + 1] << 32));
  }

 private:
  static constexpr uint32_t kM0 = 0xD2511F53u, kM1 = 0xCD9E8D57u;
  uint64_t keys_[10][2], second_;
};

// The four words of one group.
inline void philox4x32(uint32_t group, int64_t index, int64_t seed, uint32_t stream, uint32_t (&out)[4]) {
  uint64_t c[4][1] = {{group}};
  Philox(index, seed, stream).rounds(c);
  for (int w = 0; w < 4; ++w) out[w] = uint32_t(c[w][0]);
}

// In every 128 bits, the lower (half 0) or upper (half 1) lanes of a and b by turns: one instruction.
template <int half, class V, size_t... i> inline V by_turns(V a, V b, std::index_sequence<i...>) {
  constexpr size_t n = 16 / sizeof(a[0]);
  return V{(i % 2 ? b : a)[i / n * n + half * n / 2 + i % n / 2]...};
}
template <int half, class V> inline V by_turns(V a, V b) {
  return by_turns<half>(a, b, std::make_index_sequence<kVectorBytes / sizeof(a[0])>());
}

// In every 128 bits, the 4 x 4 words transposed: from a vector a word to the order of the elements.
inline void transpose(Words (&v)[4]) {
  const LongWords a = LongWords(by_turns<0>(v[0], v[1])), b = LongWords(by_turns<0>(v[2], v[3]));
  const LongWords c = LongWords(by_turns<1>(v[0], v[1])), d = LongWords(by_turns<1>(v[2], v[3]));
  v[0] = Words(by_turns<0>(a, b));
  v[1] = Words(by_turns<1>(a, b));
  v[2] = Words(by_turns<0>(c, d));
  v[3] = Words(by_turns<1>(c, d));
}

// A word as a multiple of 2^-24 in [0, 1): exact in every type.
template <class T> inline T uniform_word(uint32_t word) { return T(int32_t(word >> 8)) * T(0x1p-24); }

// Two standard normals from two words (Box and Muller, 1958); vectors or pairs of words give as many.
template <class W, class V> inline void normal_words(W a, W b, V* first, V* second) {
  const V share = bits_as<V>(bits_as<W>(number<V>(bits_as<IntOf<W>>((a >> 8) + 1u))) - (24u << 23));  // times 2^-24
  const V r = square_root(-2.0f * vlog_normal(share));
  V sine, cosine;
  vsincos_turn(b & 0xFFFFFF00u, &sine, &cosine);
  *first = r * cosine;
  *second = r * sine;
}
inline void normal_words(uint32_t a, uint32_t b, double* first, double* second) {
  double r = std::sqrt(-2.0 * std::log(double(int32_t(a >> 8) + 1) * 0x1p-24));
  double angle = uniform_word<double>(b) * 6.283185307179586476925;
  *first = r * std::cos(angle);
  *second = r * std::sin(angle);
}

struct Nothing {
  void operator()() const {}
};

// Fills out with the numbers of `groups` groups from `group` on, and up to kAtOnce - 1 more.
// draw(a, b, first, second) makes two numbers of two words, or as many of vectors or pairs of words; meanwhile() is
// called for every kAtOnce numbers.
template <class T, class Draw, class Meanwhile>
inline void fill_draws(uint32_t group, int64_t groups, int64_t index, int64_t seed, uint32_t stream, T* out, Draw&& draw, Meanwhile&& meanwhile) {
  const Philox philox(index, seed, stream);
  for (int64_t done = 0; done < groups; done += kBlocks * kCounters, out += kAtOnce) {
    meanwhile();
    Words blocks[kBlocks][4];
    philox.blocks(group + uint32_t(done), blocks);
    if constexpr (std::is_same_v<T, float>) {
      const auto& [b, c] = blocks;
      Two<Two<Floats>> first, second;
      draw(Two{Two{b[0], b[2]}, Two{c[0], c[2]}}, Two{Two{b[1], b[3]}, Two{c[1], c[3]}}, &first, &second);
      auto to_block = [](Words(&block)[4], Two<Floats> x, Two<Floats> y) {
        block[0] = Words(x.a), block[1] = Words(y.a), block[2] = Words(x.b), block[3] = Words(y.b);
        transpose(block);
      };
      to_block(blocks[0], first.a, second.a);
      to_block(blocks[1], first.b, second.b);
      std::memcpy(out, blocks, sizeof blocks);
    } else {
      alignas(kVectorBytes) uint32_t words[kAtOnce];
      for (auto& block : blocks) transpose(block);
      std::memcpy(words, blocks, sizeof blocks);
      for (int i = 0; i < kAtOnce; i += 2) draw(words[i], words[i + 1], out + i, out + i + 1);
    }
  }
}

// Uniform in [-1, 1), multiples of 2^-23: exact.
template <class T, class Meanwhile = Nothing>
inline void fill_symmetric(uint32_t group, int64_t groups, int64_t index, int64_t seed, uint32_t stream, T* out, Meanwhile&& meanwhile = {}) {
  auto number_of = []<class W, class V>(W word, V* to) { *to = number<V>(bits_as<IntOf<W>>(word >> 8)) * T(0x1p-23) - T(1); };
  auto draw = [=](auto a, auto b, auto* first, auto* second) { number_of(a, first), number_of(b, second); };
  fill_draws(group, groups, index, seed, stream, out, draw, meanwhile);
}

template <class T, class Meanwhile = Nothing>
inline void fill_normal(uint32_t group, int64_t groups, int64_t index, int64_t seed, uint32_t stream, T* out, Meanwhile&& meanwhile = {}) {
  auto draw = [](auto... words_and_numbers) { normal_words(words_and_numbers...); };
  fill_draws(group, groups, index, seed, stream, out, draw, meanwhile);
}

}  // namespace mwpb
