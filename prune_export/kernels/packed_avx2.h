// Rows with AVX2: bitmaps are expanded by tables, eight weights at a time; part of packed.cpp.

PACKED_FOR("avx2,fma,bmi,bmi2,popcnt")
namespace avx2 {

constexpr size_t kOrder = 0;

struct Codes { __m256i low, high; };             // signed
struct Halves { __m128i eight[8]; };

// Eight signed codes behind the first `next`, spread over a mask's places; zero elsewhere.
template <Values V>
inline __m128i eight(const uint8_t* from, size_t next, unsigned mask) {
  __m128i codes;
  if constexpr (V == kInt8) {
    codes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from + next));
    codes = _mm_xor_si128(codes, _mm_set1_epi8(-128));
  } else {
    uint64_t word;
    std::memcpy(&word, from + next / 2, 8);
    word = _pdep_u64(word >> next % 2 * 4, 0x0F0F0F0F0F0F0F0Full);
    codes = _mm_sub_epi8(_mm_cvtsi64_si128(static_cast<long long>(word)), _mm_set1_epi8(8));
  }
  const auto* places = reinterpret_cast<const __m128i*>(kTables.bytes[mask]);
  return _mm_shuffle_epi8(codes, _mm_loadl_epi64(places));
}

template <Values V>
inline __m256i expanded(const uint8_t* from, size_t& next, uint32_t mask) {
  __m128i part[4];
  for (auto& one : part) {
    one = eight<V>(from, next, mask & 255);
    next += static_cast<size_t>(_mm_popcnt_u32(mask & 255)), mask >>= 8;
  }
  return _mm256_set_m128i(_mm_unpacklo_epi64(part[2], part[3]), _mm_unpacklo_epi64(part[0], part[1]));
}

template <Values V, Layout L>
inline Codes decode(Cursor& at) {
  const auto* from = reinterpret_cast<const __m256i*>(at.data);
  if constexpr (L == kDense && V == kInt8) {
    const __m256i flip = _mm256_set1_epi8(-128);
    at.data += kChunk;
    return {_mm256_xor_si256(_mm256_loadu_si256(from), flip),
            _mm256_xor_si256(_mm256_loadu_si256(from + 1), flip)};
  } else if constexpr (L == kDense) {
    const __m256i both = _mm256_loadu_si256(from), four = _mm256_set1_epi8(15),
                  eight = _mm256_set1_epi8(8);
    at.data += kChunk / 2;
    return {_mm256_sub_epi8(_mm256_and_si256(both, four), eight),
            _mm256_sub_epi8(_mm256_and_si256(_mm256_srli_epi16(both, 4), four), eight)};
  } else {
    const uint64_t mask = next_mask<L == kBitmap ? kBitmap : kTwoOfFour>(at);
    size_t next = 0;
    const __m256i low = expanded<V>(at.data, next, static_cast<uint32_t>(mask));
    const Codes codes{low, expanded<V>(at.data, next, static_cast<uint32_t>(mask >> 32))};
    at.data += bytes_of<V>(next);
    return codes;
  }
}

template <Layout L>
inline Halves halves(Cursor& at) {
  Halves found;
  uint64_t mask = L == kDense ? 0 : next_mask<L == kDense ? kBitmap : L>(at);
  for (auto& eight : found.eight) {
    eight = _mm_loadu_si128(reinterpret_cast<const __m128i*>(at.data));
    if constexpr (L == kDense) {
      at.data += 16;
    } else {
      const auto* places = reinterpret_cast<const __m128i*>(kTables.halves[mask & 255]);
      eight = _mm_shuffle_epi8(eight, _mm_loadu_si128(places));
      at.data += 2 * _mm_popcnt_u32(mask & 255), mask >>= 8;
    }
  }
  return found;
}

inline __m256i dot(__m256i sum, __m256i weight, const int8_t* x) {
  const __m256i other = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x));
  // |w| <= 128 and |x| <= 127, so that two products fit 16 bits.
  const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(weight), _mm256_sign_epi8(other, weight));
  return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}

template <bool>
struct Sum {
  __m256i low, high;
  void start(const int32_t*) { low = high = _mm256_setzero_si256(); }
  void add(const Codes& codes, const int8_t* x) {
    low = dot(low, codes.low, x), high = dot(high, codes.high, x + kChunk / 2);
  }
};

struct Total {  // constructors are written out: implicit ones would not have the instruction set
  __m256 sum;
  Total() : sum(_mm256_setzero_ps()) {}
  template <bool B>
  void add(const Sum<B>& part, float low, float high, const float* scales) {
    const __m256 a = _mm256_mul_ps(_mm256_set1_ps(low), _mm256_loadu_ps(scales));
    const __m256 b = _mm256_mul_ps(_mm256_set1_ps(high), _mm256_loadu_ps(scales + kLanes / 2));
    sum = _mm256_fmadd_ps(_mm256_cvtepi32_ps(part.low), a, sum);
    sum = _mm256_fmadd_ps(_mm256_cvtepi32_ps(part.high), b, sum);
  }
  float value() const {
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(sum), _mm256_extractf128_ps(sum, 1));
    four = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
  }
};

struct FloatTotal {
  Total even, odd;
  FloatTotal() {}
  void add(const Halves& weights, const float* x) {
    for (int at = 0; at < 8; ++at) {
      const __m256i wide = _mm256_slli_epi32(_mm256_cvtepu16_epi32(weights.eight[at]), 16);
      Total& to = at % 2 ? odd : even;
      to.sum = _mm256_fmadd_ps(_mm256_castsi256_ps(wide), _mm256_loadu_ps(x + 8 * at), to.sum);
    }
  }
  float value() const { return even.value() + odd.value(); }
};

inline void store(const Codes& codes, uint8_t* to) {
  const __m256i add = _mm256_set1_epi8(-128);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_xor_si256(codes.low, add));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to) + 1, _mm256_xor_si256(codes.high, add));
}
inline void store(const Halves& weights, uint8_t* to) { std::memcpy(to, weights.eight, 2 * kChunk); }

#include "packed_rows.h"

}  // namespace avx2
PACKED_END
