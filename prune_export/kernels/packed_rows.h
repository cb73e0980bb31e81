// The loops over rows, compiled once for each instruction set; no include guard, as it is included
// in the namespace of each. That namespace gives:
//
//   Codes, decode<V, L>(Cursor&)        64 int8 or int4 weights of a row, the cursor moved on
//   Sum                                 start(starts), add(codes, x), in whole numbers
//   Total                               add(sum, low, high, scales), value()
//   Halves, halves<L>(Cursor&)          64 bf16 weights
//   FloatTotal                          add(halves, x), value()
//   store(codes, to), store(halves, to) a row of a dense tile
//   kOrder                              how many floats stand together: see `order`

template <Values V, Layout L, int M>
void whole_rows(const Matrix& m, const Prepared& a, size_t token, size_t first, size_t last,
                float* y) {
  const size_t width = m.chunks * kChunk, lanes = m.steps * kLanes;
  for (size_t row = first; row < last; ++row) {
    Cursor at(m, row);
    Total total[M];
    size_t chunk = 0;
    for (size_t step = 0; step < m.steps; ++step) {
      using Part = Sum<L == kTwoOfFour>;
      Part sum[M];
      for (int t = 0; t < M; ++t) sum[t].start(a.starts + (token + t) * lanes + step * kLanes);
      const size_t end = chunk + m.step_chunks < m.chunks ? chunk + m.step_chunks : m.chunks;
      for (; chunk < end; ++chunk) {
        const auto codes = decode<V, L>(at);
        for (int t = 0; t < M; ++t) sum[t].add(codes, a.codes + (token + t) * width + chunk * kChunk);
      }
      const float *scale = m.scales + row * m.groups, *low, *high;
      if (m.group >= kChunk) {
        low = high = scale + step;
      } else {
        low = scale + 2 * step;
        high = 2 * step + 1 < m.groups ? low + 1 : low;
      }
      for (int t = 0; t < M; ++t)
        total[t].add(sum[t], *low, *high, a.scales + (token + t) * lanes + step * kLanes);
    }
    for (int t = 0; t < M; ++t) y[(token + t) * m.rows + row] = total[t].value();
  }
}

template <Layout L, int M>
void float_rows(const Matrix& m, const Prepared& a, size_t token, size_t first, size_t last,
                float* y) {
  const size_t width = m.chunks * kChunk;
  for (size_t row = first; row < last; ++row) {
    Cursor at(m, row);
    FloatTotal total[M];
    for (size_t chunk = 0; chunk < m.chunks; ++chunk) {
      const auto weights = halves<L>(at);
      for (int t = 0; t < M; ++t)
        total[t].add(weights, a.floats + (token + t) * width + chunk * kChunk);
    }
    for (int t = 0; t < M; ++t) y[(token + t) * m.rows + row] = total[t].value();
  }
}

template <Values V, Layout L>
void few_tokens(const Matrix& m, const Prepared& a, size_t token, size_t count, size_t first,
                size_t last, float* y) {
  while (count) {
    const size_t taken = count >= 8 ? 8 : count >= 4 ? 4 : count >= 2 ? 2 : 1;
#define PACKED_TOKENS(M)                                                    \
  if constexpr (V == kBf16) float_rows<L, M>(m, a, token, first, last, y);  \
  else whole_rows<V, L, M>(m, a, token, first, last, y)
    if (taken == 8) { PACKED_TOKENS(8); }
    else if (taken == 4) { PACKED_TOKENS(4); }
    else if (taken == 2) { PACKED_TOKENS(2); }
    else { PACKED_TOKENS(1); }
#undef PACKED_TOKENS
    token += taken, count -= taken;
  }
}

// Unpacks a row to a dense one of int8 or bf16.
template <Values V, Layout L>
void unpack(const Matrix& m, size_t row, uint8_t* to) {
  Cursor at(m, row);
  for (size_t chunk = 0; chunk < m.chunks; ++chunk) {
    if constexpr (V == kBf16) {
      store(halves<L>(at), to + chunk * kChunk * 2);
    } else {
      store(decode<V, L == kTwoOfFour ? kStoredTwoOfFour : L>(at), to + chunk * kChunk);
    }
  }
}

template <Values V, Layout L>
void rows_of(const Matrix& m, const Prepared& a, size_t tokens, size_t first, size_t last, float* y) {
  if (tokens <= kFewTokens) return few_tokens<V, L>(m, a, 0, tokens, first, last, y);
  constexpr Values kTile = V == kBf16 ? kBf16 : kInt8;
  const size_t width = m.chunks * kChunk * (V == kBf16 ? 2 : 1);
  const size_t tall = width < kTileBytes ? kTileBytes / width : 1;
  Buffer& tile = tile_of_thread();
  if (L != kDense || V == kInt4) tile.reserve(tall * width);
  for (size_t row = first; row < last; row += tall) {
    const size_t end = row + tall < last ? row + tall : last;
    Matrix part = m;
    if (L != kDense || V == kInt4) {
      for (size_t one = row; one < end; ++one) unpack<V, L>(m, one, tile.bytes + (one - row) * width);
      part.values = kTile, part.layout = kDense, part.stride = width;
      part.data = tile.bytes, part.first = row;
      part.offsets = nullptr, part.masks = nullptr;
    }
    few_tokens<kTile, kDense>(part, a, 0, tokens, row, end, y);
  }
}

void rows(const Matrix& m, const Prepared& a, size_t tokens, size_t first, size_t last, float* y) {
  switch (m.values * 3 + m.layout) {
    case kInt8 * 3 + kDense: return rows_of<kInt8, kDense>(m, a, tokens, first, last, y);
    case kInt8 * 3 + kBitmap: return rows_of<kInt8, kBitmap>(m, a, tokens, first, last, y);
    case kInt8 * 3 + kTwoOfFour: return rows_of<kInt8, kTwoOfFour>(m, a, tokens, first, last, y);
    case kInt4 * 3 + kDense: return rows_of<kInt4, kDense>(m, a, tokens, first, last, y);
    case kInt4 * 3 + kBitmap: return rows_of<kInt4, kBitmap>(m, a, tokens, first, last, y);
    case kInt4 * 3 + kTwoOfFour: return rows_of<kInt4, kTwoOfFour>(m, a, tokens, first, last, y);
    case kBf16 * 3 + kDense: return rows_of<kBf16, kDense>(m, a, tokens, first, last, y);
    case kBf16 * 3 + kBitmap: return rows_of<kBf16, kBitmap>(m, a, tokens, first, last, y);
    default: return rows_of<kBf16, kTwoOfFour>(m, a, tokens, first, last, y);
  }
}

// Where column `at` of a chunk stands among the floats: pairs of kOrder columns are taken apart.
inline size_t order(size_t at) {
  if constexpr (kOrder == 0) return at;
  else return at / (2 * kOrder) * (2 * kOrder) + at % 2 * kOrder + at % (2 * kOrder) / 2;
}

void prepare_tokens(const Matrix& m, const float* x, size_t tokens, const Prepared& to) {
  const size_t width = m.chunks * kChunk;
  for (size_t token = 0; token < tokens; ++token, x += m.columns) {
    if (m.values == kBf16) {
      float* floats = to.floats + token * width;
      for (size_t at = 0; at < width; ++at)
        floats[at / kChunk * kChunk + order(at % kChunk)] = at < m.columns ? x[at] : 0.0f;
      continue;
    }
    int8_t* codes = to.codes + token * width;
    const size_t step_lanes = m.group < kChunk ? kLanes / 2 : kLanes;
    for (size_t group = 0; group < m.groups; ++group) {
      const size_t from = group * m.group, end = from + m.group < m.columns ? from + m.group : m.columns;
      uint32_t largest = 0;  // of the bits without sign, which order as the magnitudes do
      for (size_t at = from; at < end; ++at) {
        const uint32_t bits = bits_of(x[at]) & 0x7FFFFFFFu;
        largest = largest > bits ? largest : bits;
      }
      const bool finite = largest < 0x7F800000u;
      const float most = finite ? float_of(largest) : 0.0f;
      const float scale = finite ? most / 127.0f : float_of(0x7FC00000u);
      const float inverse = scale > 1e-37f ? 1.0f / scale : 0.0f;  // below, all is rounded to zero
      for (size_t at = from; at < end; ++at) {
        const float value = finite ? x[at] * inverse : 0.0f;
        codes[at] = static_cast<int8_t>(static_cast<int32_t>(bits_of(value + 12582912.0f) - 0x4B400000u));
      }
      float* scales = to.scales + (token * m.steps) * kLanes + group * step_lanes;
      for (size_t lane = 0; lane < step_lanes; ++lane) scales[lane] = scale;
    }
    for (size_t at = m.columns; at < width; ++at) codes[at] = 0;
    if (m.group < kChunk && m.groups % 2) {  // the last chunk's second half has no columns
      float* last = to.scales + (token * m.steps) * kLanes + m.groups * step_lanes;
      for (size_t lane = 0; lane < step_lanes; ++lane) last[lane] = 0.0f;
    }
    int32_t* starts = to.starts + token * m.steps * kLanes;
    for (size_t at = 0; at < m.steps * kLanes; ++at) starts[at] = 0;
    for (size_t chunk = 0; chunk < m.chunks; ++chunk) {
      int32_t* start = starts + chunk / m.step_chunks * kLanes;
      const int8_t* four = codes + chunk * kChunk;
      for (size_t lane = 0; lane < kLanes; ++lane, four += 4)
        start[lane] -= m.bias * (four[0] + four[1] + four[2] + four[3]);
    }
  }
}
