// Products of packed weights: the loops of packed_rows.h for AVX-512, AVX2 and any processor.
//
// Weights are expanded in registers, and multiplied with int8 activations (int8, int4) or floats
// (bf16). AVX-512 multiplies unsigned codes, so bias times the activations' sum is taken off.
#include "packed.h"

#include <atomic>
#include <cstdlib>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace packed {
namespace {

constexpr Layout kStoredTwoOfFour = static_cast<Layout>(3);  // places turned into a bitmap
constexpr size_t kTileBytes = 64 * 1024;

inline uint32_t bits_of(float value) { uint32_t bits; std::memcpy(&bits, &value, 4); return bits; }
inline float float_of(uint32_t bits) { float value; std::memcpy(&value, &bits, 4); return value; }

struct Buffer {
  uint8_t* bytes = nullptr;
  size_t size = 0;
  ~Buffer() { std::free(bytes); }
  void reserve(size_t wanted) {
    if (wanted <= size) return;
    std::free(bytes);
    size = (wanted + 4095) / 4096 * 4096;
    bytes = static_cast<uint8_t*>(std::aligned_alloc(64, size));
    if (!bytes) std::abort();  // of 64 KiB
  }
};

Buffer& tile_of_thread() { static thread_local Buffer buffer; return buffer; }

// For each byte of a mask: which of the values behind it goes where; and for each byte of places
// (two groups of four), the mask. 128 has `pshufb` write zero.
struct Tables {
  uint8_t bytes[256][8], halves[256][16], masks[256];
  bool ascending[256];  // places that are in order
  Tables() {
    for (int mask = 0; mask < 256; ++mask) {
      int next = 0;
      for (int bit = 0; bit < 8; ++bit) {
        const bool kept = mask >> bit & 1;
        bytes[mask][bit] = static_cast<uint8_t>(kept ? next : 128);
        halves[mask][2 * bit] = static_cast<uint8_t>(kept ? 2 * next : 128);
        halves[mask][2 * bit + 1] = static_cast<uint8_t>(kept ? 2 * next + 1 : 128);
        next += kept;
      }
      const int a = mask & 3, b = mask >> 2 & 3, c = mask >> 4 & 3, d = mask >> 6;
      ascending[mask] = a < b && c < d;
      masks[mask] = static_cast<uint8_t>(1 << a | 1 << b | 16 << c | 16 << d);
    }
  }
};
const Tables kTables;

inline uint64_t bitmap_of(uint64_t places) {
  uint64_t mask = 0;
  for (int at = 0; at < 64; at += 8)
    mask |= static_cast<uint64_t>(kTables.masks[places >> at & 255]) << at;
  return mask;
}

// Where a row is read: its next mask and values.
struct Cursor {
  const uint64_t* mask;
  const uint8_t* data;
  Cursor(const Matrix& m, size_t row) {
    row -= m.first;
    mask = m.masks ? m.masks + row * m.chunks : nullptr;
    data = m.data + (m.offsets ? m.offsets[row] : row * m.stride);
  }
};

template <Values V>
inline size_t bytes_of(size_t values) {
  return V == kInt8 ? values : V == kInt4 ? (values + 1) / 2 : 2 * values;
}

template <Layout L>
inline uint64_t next_mask(Cursor& at) {
  return L == kBitmap ? *at.mask++ : bitmap_of(*at.mask++);
}

// Signed codes or bf16 of 64 columns in memory: what portable code and AVX2 expand from.
template <Values V, Layout L>
inline void plain_chunk(Cursor& at, int8_t* to) {
  constexpr int bias = V == kInt8 ? 128 : 8;
  if constexpr (L == kDense) {
    for (size_t column = 0; column < kChunk; ++column) {
      const uint8_t byte = V == kInt8 ? at.data[column] : at.data[column % 32];
      const int code = V == kInt8 ? byte : column < 32 ? byte & 15 : byte >> 4;
      to[column] = static_cast<int8_t>(code - bias);
    }
    at.data += bytes_of<V>(kChunk);
  } else {
    const uint64_t mask = next_mask<L == kBitmap ? kBitmap : kTwoOfFour>(at);
    size_t next = 0;
    for (size_t column = 0; column < kChunk; ++column) {
      to[column] = 0;
      if (!(mask >> column & 1)) continue;
      const int code = V == kInt8 ? at.data[next] : at.data[next / 2] >> next % 2 * 4 & 15;
      to[column] = static_cast<int8_t>(code - bias), ++next;
    }
    at.data += bytes_of<V>(next);
  }
}

template <Layout L>
inline void plain_halves(Cursor& at, uint16_t* to) {
  const uint64_t mask = L == kDense ? ~uint64_t{0} : next_mask<L == kDense ? kBitmap : L>(at);
  for (size_t column = 0; column < kChunk; ++column) {
    to[column] = 0;
    if (!(mask >> column & 1)) continue;
    std::memcpy(to + column, at.data, 2), at.data += 2;
  }
}

namespace portable {

constexpr size_t kOrder = 0;

struct Codes { int8_t weight[kChunk]; };
struct Halves { uint16_t bits[kChunk]; };

template <Values V, Layout L>
inline Codes decode(Cursor& at) { Codes codes; plain_chunk<V, L>(at, codes.weight); return codes; }

template <Layout L>
inline Halves halves(Cursor& at) { Halves found; plain_halves<L>(at, found.bits); return found; }

template <bool>
struct Sum {
  int32_t low = 0, high = 0;
  void start(const int32_t*) {}
  void add(const Codes& codes, const int8_t* x) {
    for (size_t at = 0; at < kChunk / 2; ++at) {
      low += codes.weight[at] * x[at];
      high += codes.weight[at + kChunk / 2] * x[at + kChunk / 2];
    }
  }
};

struct Total {
  float sum = 0;
  template <bool B>
  void add(const Sum<B>& part, float low, float high, const float* scales) {
    sum += static_cast<float>(part.low) * (low * scales[0]);
    sum += static_cast<float>(part.high) * (high * scales[kLanes / 2]);
  }
  float value() const { return sum; }
};

struct FloatTotal {
  float sum[kLanes] = {};
  void add(const Halves& weights, const float* x) {
    for (size_t at = 0; at < kChunk; ++at)
      sum[at % kLanes] += float_of(static_cast<uint32_t>(weights.bits[at]) << 16) * x[at];
  }
  float value() const { float all = 0; for (float one : sum) all += one; return all; }
};

inline void store(const Codes& codes, uint8_t* to) {
  for (size_t at = 0; at < kChunk; ++at) to[at] = static_cast<uint8_t>(codes.weight[at] + 128);
}
inline void store(const Halves& weights, uint8_t* to) { std::memcpy(to, weights.bits, 2 * kChunk); }

#include "packed_rows.h"

}  // namespace portable

#if defined(__x86_64__)
#if defined(__clang__)
#define PACKED_FOR(set) _Pragma(PACKED_TEXT(clang attribute push(__attribute__((target(set))), apply_to = function)))
#define PACKED_END _Pragma("clang attribute pop")
#else
#define PACKED_FOR(set) _Pragma("GCC push_options") _Pragma(PACKED_TEXT(GCC target(set)))
#define PACKED_END _Pragma("GCC pop_options")
#endif
#define PACKED_TEXT(...) #__VA_ARGS__

#include "packed_avx2.h"

#include "packed_avx512.h"
#endif

struct Set {
  const char* name;
  bool (*here)();
  void (*prepare)(const Matrix&, const float*, size_t, const Prepared&);
  void (*rows)(const Matrix&, const Prepared&, size_t, size_t, size_t, float*);
};

const Set kSets[] = {  // the best first
#if defined(__x86_64__)
    {"avx512", [] {
       return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
              __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
              __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vbmi2") &&
              __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("bmi2");
     }, avx512::prepare_tokens, avx512::rows},
    {"avx2", [] {
       return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
              __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("popcnt");
     }, avx2::prepare_tokens, avx2::rows},
#endif
    {"portable", [] { return true; }, portable::prepare_tokens, portable::rows}};

// The best set that is here, from the one of this name on; without a name, or another, from all.
const Set* best(const char* most) {
  bool allowed = true;
  for (const Set& set : kSets) allowed = allowed && !(most && !std::strcmp(most, set.name));
  for (const Set& set : kSets) {
    allowed = allowed || !std::strcmp(most, set.name);
    if (allowed && set.here()) return &set;
  }
  return nullptr;  // not reached: the last one is everywhere
}

std::atomic<const Set*>& chosen() {
  static std::atomic<const Set*> found{best(std::getenv("PRUNE_EXPORT_INSTRUCTIONS"))};
  return found;
}

}  // namespace

const char* instructions() { return chosen().load()->name; }

void use(const char* most) { chosen() = best(most); }

void prepare(const Matrix& matrix, const float* x, size_t tokens, const Prepared& to) {
  chosen().load()->prepare(matrix, x, tokens, to);
}

void multiply(const Matrix& matrix, const Prepared& x, size_t tokens, size_t first, size_t last,
              float* y) {
  chosen().load()->rows(matrix, x, tokens, first, last, y);
}

}  // namespace packed
