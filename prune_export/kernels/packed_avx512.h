// Rows with AVX-512 (VBMI2 expands bitmaps, VNNI multiplies); part of packed.cpp.

PACKED_FOR("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512vbmi2,avx512vnni,avx2,fma,bmi,bmi2,popcnt")
namespace avx512 {

constexpr size_t kOrder = 16;
constexpr int kAhead = 1024;  // bytes that are fetched ahead

struct Codes { __m512i weight; };                  // unsigned: code plus bias
struct Places { __m256i weight, place, bias; };    // kept codes, their columns, and what was added
struct Halves { __m512i low, high; };

inline void fetch(const uint8_t* from) {
  _mm_prefetch(reinterpret_cast<const char*>(from) + kAhead, _MM_HINT_T0);
}

template <Values V, Layout L>
inline auto decode(Cursor& at) {
  fetch(at.data);
  if constexpr (L == kDense && V == kInt8) {
    const Codes codes{_mm512_loadu_si512(at.data)};
    at.data += kChunk;
    return codes;
  } else if constexpr (L == kDense) {
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at.data));
    const __m512i shifts = _mm512_set_epi64(4, 4, 4, 4, 0, 0, 0, 0);
    const __m512i both = _mm512_srlv_epi64(_mm512_broadcast_i64x4(half), shifts);
    at.data += kChunk / 2;
    return Codes{_mm512_and_si512(both, _mm512_set1_epi8(15))};
  } else if constexpr (L == kTwoOfFour) {
    const __m256i control = _mm256_set_epi8(62, 60, 58, 56, 54, 52, 50, 48, 46, 44, 42, 40, 38, 36,
        34, 32, 30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
    const __m256i fours = _mm256_set_epi8(60, 60, 56, 56, 52, 52, 48, 48, 44, 44, 40, 40, 36, 36,
        32, 32, 28, 28, 24, 24, 20, 20, 16, 16, 12, 12, 8, 8, 4, 4, 0, 0);
    const __m256i all = _mm256_set1_epi64x(static_cast<long long>(*at.mask++));
    const __m256i two = _mm256_and_si256(_mm256_multishift_epi64_epi8(control, all), _mm256_set1_epi8(3));
    __m256i weight;
    if constexpr (V == kInt8) {
      weight = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at.data));
    } else {
      const __m256i wide = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at.data)));
      weight = _mm256_and_si256(_mm256_or_si256(wide, _mm256_slli_epi16(wide, 4)), _mm256_set1_epi16(0x0F0F));
    }
    at.data += bytes_of<V>(kChunk / 2);
    return Places{weight, _mm256_or_si256(two, fours), _mm256_set1_epi8(V == kInt8 ? -128 : 8)};
  } else {
    const uint64_t mask = next_mask<L == kBitmap ? kBitmap : kTwoOfFour>(at);
    __m512i packed;
    if constexpr (V == kInt8) {
      packed = _mm512_loadu_si512(at.data);
    } else {
      const __m512i wide = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at.data)));
      packed = _mm512_and_si512(_mm512_or_si512(wide, _mm512_slli_epi16(wide, 4)), _mm512_set1_epi16(0x0F0F));
    }
    at.data += bytes_of<V>(static_cast<size_t>(_mm_popcnt_u64(mask)));
    const __m512i zero = _mm512_set1_epi8(V == kInt8 ? -128 : 8);
    return Codes{_mm512_mask_expand_epi8(zero, mask, packed)};
  }
}

template <Layout L>
inline Halves halves(Cursor& at) {
  fetch(at.data);
  if constexpr (L == kDense) {
    const Halves found{_mm512_loadu_si512(at.data), _mm512_loadu_si512(at.data + kChunk)};
    at.data += 2 * kChunk;
    return found;
  } else {
    const uint64_t mask = next_mask<L>(at);
    const auto low = static_cast<__mmask32>(mask), high = static_cast<__mmask32>(mask >> 32);
    const __m512i first = _mm512_maskz_expand_epi16(low, _mm512_loadu_si512(at.data));
    at.data += 2 * _mm_popcnt_u32(low);
    const __m512i second = _mm512_maskz_expand_epi16(high, _mm512_loadu_si512(at.data));
    at.data += 2 * _mm_popcnt_u32(high);
    return {first, second};
  }
}

template <bool Sparse>
struct Sum {
  __m512i sum;
  void start(const int32_t* from) { sum = _mm512_loadu_si512(from); }
  void add(const Codes& codes, const int8_t* x) {
    sum = _mm512_dpbusd_epi32(sum, codes.weight, _mm512_loadu_si512(x));
  }
};

template <>
struct Sum<true> {  // of two of four: kept codes times their activations; the bias by those
  __m256i sum, chosen;
  void start(const int32_t*) { sum = chosen = _mm256_setzero_si256(); }
  void add(const Places& codes, const int8_t* x) {
    const __m256i at = _mm512_castsi512_si256(_mm512_permutexvar_epi8(
        _mm512_castsi256_si512(codes.place), _mm512_loadu_si512(x)));
    sum = _mm256_dpbusd_epi32(sum, codes.weight, at);
    chosen = _mm256_dpbusd_epi32(chosen, codes.bias, at);
  }
};

struct Total {
  __m512 sum;
  Total() : sum(_mm512_setzero_ps()) {}
  void add(const Sum<false>& part, float low, float high, const float* scales) {
    const __m512 weight = _mm512_insertf32x8(_mm512_set1_ps(low), _mm256_set1_ps(high), 1);
    const __m512 scale = _mm512_mul_ps(weight, _mm512_loadu_ps(scales));
    sum = _mm512_fmadd_ps(_mm512_cvtepi32_ps(part.sum), scale, sum);
  }
  void add(const Sum<true>& part, float weight, float, const float* scales) {
    const __m256 scale = _mm256_mul_ps(_mm256_set1_ps(weight), _mm256_loadu_ps(scales));
    const __m256i whole = _mm256_sub_epi32(part.sum, part.chosen);
    const __m256 more = _mm256_mul_ps(_mm256_cvtepi32_ps(whole), scale);
    sum = _mm512_add_ps(sum, _mm512_zextps256_ps512(more));
  }
  float value() const { return _mm512_reduce_add_ps(sum); }
};

struct FloatTotal {
  __m512 even, odd;
  FloatTotal() : even(_mm512_setzero_ps()), odd(_mm512_setzero_ps()) {}
  void add(const Halves& weights, const float* x) {
    part(weights.low, x), part(weights.high, x + kChunk / 2);
  }
  void part(__m512i pairs, const float* x) {
    const __m512i top = _mm512_and_si512(pairs, _mm512_set1_epi32(static_cast<int>(0xFFFF0000u)));
    const __m512 first = _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
    even = _mm512_fmadd_ps(first, _mm512_loadu_ps(x), even);
    odd = _mm512_fmadd_ps(_mm512_castsi512_ps(top), _mm512_loadu_ps(x + kLanes), odd);
  }
  float value() const { return _mm512_reduce_add_ps(_mm512_add_ps(even, odd)); }
};

inline void store(const Codes& codes, uint8_t* to) { _mm512_storeu_si512(to, codes.weight); }
inline void store(const Halves& weights, uint8_t* to) {
  _mm512_storeu_si512(to, weights.low), _mm512_storeu_si512(to + kChunk, weights.high);
}

#include "packed_rows.h"

}  // namespace avx512
PACKED_END
