// Multiplies cases that a test wrote, then damaged ones of them, for sanitizers to watch.
//
//   fuzz CASES ANSWERS INSTRUCTIONS
//
// A case is u32 tokens, u32 columns, u64 bytes, the activations and the packed matrix. ANSWERS has
// the products of all cases. Then every matrix is cut off and changed in many ways, with a checksum
// that fits, and what is still accepted is multiplied with.
#include "packed.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

namespace {

uint64_t state = 1;
uint64_t next() { return state = state * 6364136223846793005u + 1442695040888963407u, state >> 33; }

struct Block {  // of exactly this size, so that any byte beside it is noticed
  uint8_t* bytes;
  explicit Block(size_t size) {
    void* made = nullptr;
    if (posix_memalign(&made, 64, size ? size : 1)) abort();
    bytes = static_cast<uint8_t*>(made);
  }
  Block(const Block&) = delete;
  ~Block() { free(bytes); }
};

bool multiply(const std::vector<uint8_t>& matrix, const std::vector<float>& x, size_t tokens,
              std::vector<float>* y) {
  Block copy(matrix.size());
  if (!matrix.empty()) memcpy(copy.bytes, matrix.data(), matrix.size());
  packed::Matrix read;
  if (packed::read(copy.bytes, matrix.size(), &read)) return false;
  if (read.columns * tokens > x.size() || read.rows > 4096) return false;
  Block held(packed::prepared_bytes(read, tokens));
  const auto prepared = packed::prepared_at(read, tokens, held.bytes);
  Block out(tokens * read.rows * 4);
  packed::prepare(read, x.data(), tokens, prepared);
  const size_t half = read.rows / 2;  // as two threads would
  packed::multiply(read, prepared, tokens, 0, half, reinterpret_cast<float*>(out.bytes));
  packed::multiply(read, prepared, tokens, half, read.rows, reinterpret_cast<float*>(out.bytes));
  const auto* found = reinterpret_cast<const float*>(out.bytes);
  y->assign(found, found + tokens * read.rows);
  return true;
}

void seal(std::vector<uint8_t>* matrix) {
  if (matrix->size() < 64) return;
  const uint32_t sum = packed::crc32(matrix->data() + 64, matrix->size() - 64);
  memcpy(matrix->data() + 40, &sum, 4);
}

}  // namespace

int main(int, char** given) {
  packed::use(given[3]);
  printf("%s", packed::instructions());
  FILE *cases = fopen(given[1], "rb"), *answers = fopen(given[2], "wb");
  uint32_t head[2];
  size_t right = 0, taken = 0, refused = 0;
  while (fread(head, 4, 2, cases) == 2) {
    uint64_t size;
    if (fread(&size, 8, 1, cases) != 1) return 1;
    std::vector<float> x(size_t{head[0]} * head[1]), y;
    std::vector<uint8_t> matrix(size);
    if (fread(x.data(), 4, x.size(), cases) != x.size()) return 1;
    if (fread(matrix.data(), 1, size, cases) != size) return 1;
    if (!multiply(matrix, x, head[0], &y)) return 2;
    fwrite(y.data(), 4, y.size(), answers), ++right;
    for (int at = 0; at < 60; ++at) {
      auto other = matrix;
      const uint64_t kind = next() % 4;
      if (kind == 0) {  // cut off, the header told of it or not
        other.resize(next() % size);
        const uint64_t left = other.size();
        if (left >= 40 && next() % 2) memcpy(other.data() + 32, &left, 8);
      } else if (kind == 1) {  // a number of the header
        const uint32_t number = static_cast<uint32_t>(next() % 3 ? next() % 300 : next());
        memcpy(other.data() + 8 + next() % 8 * 4, &number, 4);
      } else {  // any bytes
        for (uint64_t count = next() % 4 + 1; count; --count) other[64 + next() % (size - 64)] ^= 1 << next() % 8;
      }
      if (next() % 8) seal(&other);
      ++(multiply(other, x, head[0], &y) ? taken : refused);
    }
  }
  fclose(cases), fclose(answers);
  printf(" %zu %zu %zu\n", right, taken, refused);
}
