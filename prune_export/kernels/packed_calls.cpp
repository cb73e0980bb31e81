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

// A matrix that was read and checked, with room for the activations of some tokens.
struct Held {
  uint8_t* bytes = nullptr;
  void* room = nullptr;
  size_t tokens = 0;
  packed::Matrix matrix;
  ~Held() { std::free(bytes), std::free(room); }
};

// Copies and reads a matrix for at most so many tokens; null, and `wrong` says why, if it cannot be.
PACKED_API void* prune_export_hold(const uint8_t* bytes, size_t size, size_t tokens, const char** wrong) {
  auto* held = new Held;
  held->bytes = static_cast<uint8_t*>(std::aligned_alloc(64, (size + 63) / 64 * 64 + 64));
  *wrong = "there is not enough memory";
  if (held->bytes) {
    if (size) std::memcpy(held->bytes, bytes, size);
    *wrong = packed::read(held->bytes, size, &held->matrix);
  }
  if (!*wrong) {
    held->tokens = tokens;
    held->room = std::aligned_alloc(64, packed::prepared_bytes(held->matrix, tokens));
    if (!held->room) *wrong = "there is not enough memory";
  }
  if (!*wrong) return held;
  delete held;
  return nullptr;
}

PACKED_API void prune_export_release(void* held) { delete static_cast<Held*>(held); }

// Multiplies x [tokens][columns] into y [tokens][rows], in this thread.
PACKED_API void prune_export_multiply(void* given, const float* x, size_t tokens, float* y) {
  const auto& held = *static_cast<Held*>(given);
  const auto prepared = packed::prepared_at(held.matrix, tokens, held.room);
  packed::prepare(held.matrix, x, tokens, prepared);
  packed::multiply(held.matrix, prepared, tokens, 0, held.matrix.rows, y);
}

// Reads bytes as fast as they come, for the rate of memory; gives their sum by words of eight.
PACKED_API uint64_t prune_export_read(const uint8_t* bytes, size_t size) {
  uint64_t sums[8] = {};
  for (size_t at = 0; at + 64 <= size; at += 64) {
    uint64_t words[8];
    std::memcpy(words, bytes + at, 64);
    for (int word = 0; word < 8; ++word) sums[word] += words[word];
  }
  uint64_t all = 0;
  for (uint64_t sum : sums) all += sum;
  return all;
}
