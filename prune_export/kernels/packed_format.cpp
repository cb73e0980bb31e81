// Reads packed matrices; refuses what is truncated, damaged or inconsistent before a kernel reads it.
#include "packed.h"

#include <cstring>

namespace packed {
namespace {

constexpr size_t kHeader = 64, kTail = 64;
constexpr uint32_t kVersion = 1;

size_t aligned(size_t bytes) { return (bytes + 63) / 64 * 64; }

uint32_t number(const uint8_t* bytes, size_t at) {
  uint32_t found;
  std::memcpy(&found, bytes + at, 4);
  return found;
}

size_t kept_bytes(Values values, size_t kept) {
  return values == kInt8 ? kept : values == kInt4 ? (kept + 1) / 2 : 2 * kept;
}

// Whether both pairs of places in a byte are in order.
bool in_order(unsigned byte) {
  return (byte & 3) < (byte >> 2 & 3) && (byte >> 4 & 3) < byte >> 6;
}

const char* consistent(const Matrix& m, size_t values_bytes) {
  if (m.layout == kTwoOfFour) {
    for (size_t at = 0; at < m.rows * m.chunks; ++at)
      for (int bit = 0; bit < 64; bit += 8)
        if (!in_order(m.masks[at] >> bit & 255)) return "places of two of four are not in order";
  }
  if (m.layout != kBitmap) return nullptr;
  if (m.offsets[0] != 0) return "the first row does not start at the first value";
  for (size_t row = 0; row < m.rows; ++row) {
    size_t held = 0;
    for (size_t chunk = 0; chunk < m.chunks; ++chunk)
      held += kept_bytes(m.values, __builtin_popcountll(m.masks[row * m.chunks + chunk]));
    if (m.offsets[row] + held != m.offsets[row + 1]) return "a row has another number of values than its mask";
  }
  return m.offsets[m.rows] == values_bytes ? nullptr : "it holds another number of values than its masks";
}

}  // namespace

uint32_t crc32(const uint8_t* bytes, size_t size) {
  static const auto tables = [] {
    struct { uint32_t at[8][256]; } made;
    for (uint32_t byte = 0; byte < 256; ++byte) {
      uint32_t rest = byte;
      for (int bit = 0; bit < 8; ++bit) rest = rest >> 1 ^ (rest & 1 ? 0xEDB88320u : 0);
      made.at[0][byte] = rest;
    }
    for (int table = 1; table < 8; ++table)
      for (int byte = 0; byte < 256; ++byte) {
        const uint32_t rest = made.at[table - 1][byte];
        made.at[table][byte] = rest >> 8 ^ made.at[0][rest & 255];
      }
    return made;
  }();
  const auto& t = tables.at;
  uint32_t rest = ~0u;
  for (; size >= 8; bytes += 8, size -= 8) {
    const uint32_t low = rest ^ number(bytes, 0), high = number(bytes, 4);
    rest = t[7][low & 255] ^ t[6][low >> 8 & 255] ^ t[5][low >> 16 & 255] ^ t[4][low >> 24] ^
           t[3][high & 255] ^ t[2][high >> 8 & 255] ^ t[1][high >> 16 & 255] ^ t[0][high >> 24];
  }
  for (; size; ++bytes, --size) rest = rest >> 8 ^ t[0][(rest ^ *bytes) & 255];
  return ~rest;
}

const char* read(const uint8_t* bytes, size_t size, Matrix* found) {
  if (size < kHeader || std::memcmp(bytes, "PEPACKED", 8)) return "it does not start with PEPACKED";
  if (number(bytes, 8) != kVersion) return "it has another version than 1";
  Matrix m;
  m.rows = number(bytes, 12), m.columns = number(bytes, 16);
  const uint32_t values = number(bytes, 20), layout = number(bytes, 24);
  m.group = number(bytes, 28);
  uint64_t total;
  std::memcpy(&total, bytes + 32, 8);
  if (total != size) return "it is cut off, or has bytes behind its end";
  if (values > kBf16 || layout > kTwoOfFour) return "its values or layout are not known";
  if (m.rows > kMostRows || m.columns < 1 || m.columns > kMostColumns) return "its size is not possible";
  m.values = static_cast<Values>(values), m.layout = static_cast<Layout>(layout);
  if (values == kBf16 ? m.group != 0 : m.group != 32 && (m.group % kChunk || !m.group || m.group > 1024))
    return "its group is not 32 or a multiple of 64 up to 1024";
  if (values != kBf16 && layout == kTwoOfFour && m.group == 32) return "two of four has groups of 64 or more";
  if (number(bytes, 40) != crc32(bytes + kHeader, size - kHeader)) return "it is damaged: its checksum differs";

  m.chunks = (m.columns + kChunk - 1) / kChunk;
  m.bias = values == kInt8 ? 128 : values == kInt4 ? 8 : 0;
  m.step_chunks = m.group > kChunk ? m.group / kChunk : 1;
  m.steps = (m.chunks + m.step_chunks - 1) / m.step_chunks;
  m.groups = m.group ? (m.columns + m.group - 1) / m.group : 0;
  m.stride = layout == kBitmap ? 0 : m.chunks * kept_bytes(m.values, layout == kDense ? kChunk : kChunk / 2);

  size_t at = kHeader;
  const auto part = [&](size_t count, size_t each) {
    const uint8_t* start = bytes + at;
    at += aligned(count * each);
    return at <= size ? start : nullptr;
  };
  const uint8_t* scales = part(m.rows * m.groups, 4);
  const uint8_t* offsets = part(layout == kBitmap ? m.rows + 1 : 0, 4);
  const uint8_t* masks = part(layout == kDense ? 0 : m.rows * m.chunks, 8);
  if (!scales || !offsets || !masks || size - at < kTail) return "it is shorter than its header says";
  m.scales = reinterpret_cast<const float*>(scales);
  if (layout == kBitmap) m.offsets = reinterpret_cast<const uint32_t*>(offsets);
  if (layout != kDense) m.masks = reinterpret_cast<const uint64_t*>(masks);
  m.data = bytes + at;
  const size_t held = size - at - kTail;
  if (layout != kBitmap && held != m.rows * m.stride) return "it holds another number of values than its size";
  if (const char* wrong = consistent(m, held)) return wrong;
  *found = m;
  return nullptr;
}

size_t prepared_bytes(const Matrix& m, size_t tokens) {
  if (!tokens) tokens = 1;
  if (m.values == kBf16) return tokens * m.chunks * kChunk * 4;
  return tokens * (m.chunks * kChunk + m.steps * kLanes * 8);
}

Prepared prepared_at(const Matrix& m, size_t tokens, void* buffer) {
  Prepared found;
  auto* bytes = static_cast<uint8_t*>(buffer);
  if (m.values == kBf16) {
    found.floats = reinterpret_cast<float*>(bytes);
    return found;
  }
  found.codes = reinterpret_cast<int8_t*>(bytes);
  bytes += tokens * m.chunks * kChunk;
  found.starts = reinterpret_cast<int32_t*>(bytes);
  found.scales = reinterpret_cast<float*>(bytes + tokens * m.steps * kLanes * 4);
  return found;
}

}  // namespace packed
