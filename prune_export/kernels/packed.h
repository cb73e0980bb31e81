// Products of packed weights with float activations: the format, and what the bindings call.
//
// A packed matrix is one block of bytes, little endian, each part on a multiple of 64 bytes:
//
//   header   64 bytes: magic "PEPACKED", u32 version, u32 rows (outputs), u32 columns (inputs),
//            u32 values, u32 layout, u32 group, u64 bytes in all, u32 CRC-32 of all behind the
//            header, the rest zero
//   scales   f32 [rows][groups], one for each `group` columns of a row; none for bf16
//   offsets  u32 [rows + 1], where a row's values start; layout bitmap only
//   masks    u64 [rows][chunks], of each chunk of 64 columns: bitmap, the columns that are stored;
//            two of four, two bits for the place of each stored value among its four
//   values   chunk by chunk, then 64 bytes of zero, so that whole registers may be read
//
// Values: int8 is stored as code + 128, int4 as code + 8, and a weight is code x scale; bf16 as it
// is. A dense chunk has 64 values, in int4 columns 0 to 31 in the low halves of 32 bytes and 32 to
// 63 in the high ones. Otherwise a chunk has its kept values only, in int4 two to a byte, low half
// first, and a last half byte is filled up.
#pragma once

#include <cstddef>
#include <cstdint>

namespace packed {

enum Values : uint32_t { kInt8 = 0, kInt4 = 1, kBf16 = 2 };
enum Layout : uint32_t { kDense = 0, kBitmap = 1, kTwoOfFour = 2 };

constexpr size_t kChunk = 64;        // columns of one mask
constexpr size_t kLanes = 16;        // running sums of a row
constexpr size_t kFewTokens = 8;     // above, tiles are unpacked
constexpr size_t kMostColumns = 1u << 22, kMostRows = 1u << 26;

struct Matrix {
  size_t rows = 0, columns = 0;
  size_t first = 0;                  // the row that masks, offsets and data begin with
  Values values = kInt8;
  Layout layout = kDense;
  size_t group = 0;                  // columns that share a scale; 0 for bf16
  size_t chunks = 0, groups = 0;
  size_t step_chunks = 0, steps = 0; // a step: a group, or a chunk where groups are smaller
  int bias = 0;                      // what is added to a stored code
  size_t stride = 0;                 // bytes of a row's values, where rows are alike
  const float* scales = nullptr;
  const uint32_t* offsets = nullptr;
  const uint64_t* masks = nullptr;
  const uint8_t* data = nullptr;
};

// Activations as kernels read them. Integers: int8 codes with a scale for each group of a token.
struct Prepared {
  int8_t* codes = nullptr;           // [tokens][chunks * 64]
  int32_t* starts = nullptr;         // [tokens][steps][16]: minus bias times the sums of codes
  float* scales = nullptr;           // [tokens][steps][16]
  float* floats = nullptr;           // bf16: [tokens][chunks * 64]
};

// Reads and checks a packed matrix; gives what is wrong with it, or null. `bytes` is on 64 bytes.
const char* read(const uint8_t* bytes, size_t size, Matrix* found);

// Bytes of what `prepare` fills, on a multiple of 64.
size_t prepared_bytes(const Matrix& matrix, size_t tokens);
Prepared prepared_at(const Matrix& matrix, size_t tokens, void* buffer);

// Quantizes or reorders activations x [tokens][columns].
void prepare(const Matrix& matrix, const float* x, size_t tokens, const Prepared& to);

// Computes y [tokens][rows] for the rows first to last. Activations that are not finite give NaN.
void multiply(const Matrix& matrix, const Prepared& x, size_t tokens, size_t first, size_t last,
              float* y);

// The instruction set that is used: the best one here, no better than PRUNE_EXPORT_INSTRUCTIONS or
// than `use` says: "avx512", "avx2" or "portable".
const char* instructions();
void use(const char* most);

uint32_t crc32(const uint8_t* bytes, size_t size);

}  // namespace packed
