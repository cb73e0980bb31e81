// What a test, a probe or a proof calls of the library by its C names.
#include "packed.h"

#include <cstdlib>
#include <cstring>

#define PACKED_API extern "C" __attribute__((visibility("default")))

PACKED_API const char* prune_export_instructions() { return packed::instructions(); }

// Uses no better instructions than these; gives those that are used from now on.
PACKED_API const char* prune_export_use(const char* most) {
  packed::use(most);
  return packed::instructions();
}

// Multiplies x [tokens][columns] into y [tokens][rows], in this thread, so many times; gives null,
// or what is wrong with the matrix. `bytes` need not be aligned.
PACKED_API const char* prune_export_multiply(const uint8_t* bytes, size_t size, const float* x,
                                             size_t tokens, size_t times, float* y) {
  auto* copy = static_cast<uint8_t*>(std::aligned_alloc(64, (size + 63) / 64 * 64));
  if (!copy) return "there is not enough memory";
  std::memcpy(copy, bytes, size);
  packed::Matrix matrix;
  const char* wrong = packed::read(copy, size, &matrix);
  void* buffer = wrong ? nullptr : std::aligned_alloc(64, packed::prepared_bytes(matrix, tokens));
  if (!wrong && !buffer) wrong = "there is not enough memory";
  if (!wrong) {
    const auto prepared = packed::prepared_at(matrix, tokens, buffer);
    for (size_t at = 0; at < times; ++at) {
      packed::prepare(matrix, x, tokens, prepared);
      packed::multiply(matrix, prepared, tokens, 0, matrix.rows, y);
    }
  }
  std::free(buffer);
  std::free(copy);
  return wrong;
}
