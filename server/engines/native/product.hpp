// Vectors of float32, and products of matrices whose sums stay in registers.

#pragma once

#include <algorithm>
#include <cstddef>

#ifdef __AVX512F__
constexpr int LANES = 16, WIDE = 4;  // of 32 registers
#else
constexpr int LANES = 8, WIDE = 2;  // of 16 registers
#endif
constexpr int PANEL = LANES * WIDE;  // columns that are computed together

extern "C" const int lanes = LANES;
extern "C" const int panel = PANEL;

typedef float Vector __attribute__((vector_size(LANES * 4), aligned(4), may_alias));

static inline Vector load(const float* from) { return *reinterpret_cast<const Vector*>(from); }
static inline void store(float* to, Vector value) { *reinterpret_cast<Vector*>(to) = value; }
// What is not a number stays so, as in torch.
static inline Vector relu(Vector value) { return value < 0.0f ? Vector{} : value; }

struct Left {  // rows of the left matrix: `taps` stretches of `depth` numbers each, at these offsets
  const float* data;
  ptrdiff_t stride;
  const ptrdiff_t* offsets;
  int taps, depth;
};

struct Right {  // its rows lie `stride` apart
  const float* data;
  ptrdiff_t stride;
};

struct Result {
  float* data;
  ptrdiff_t stride;
};

// Rows that are computed together with W vectors of columns: so many sums, and what they are made of, fit in registers.
constexpr int rows_with(int w) { return LANES == 8 ? 6 : w == 4 ? 6 : w == 3 ? 8 : 12; }

// c[R][W vectors] = a · b.
template <int R, int W>
static void multiply(const Left& a, const Right& b, const Result& c) {
  Vector sum[R][W];
  for (auto& row : sum)
    for (Vector& each : row) each = Vector{};
  const float* right = b.data;
  for (int tap = 0; tap < a.taps; tap++) {
    const float* row = a.data + a.offsets[tap];
    for (int k = 0; k < a.depth; k++, right += b.stride)
      for (int r = 0; r < R; r++)
        for (int w = 0; w < W; w++) sum[r][w] += row[r * a.stride + k] * load(right + w * LANES);
  }
  for (int r = 0; r < R; r++)
    for (int w = 0; w < W; w++) store(c.data + r * c.stride + w * LANES, sum[r][w]);
}

template <int R, int W>
static void multiply_last(int rows, const Left& a, const Right& b, const Result& c) {
  if (rows == R) return multiply<R, W>(a, b, c);
  if constexpr (R > 1) multiply_last<R - 1, W>(rows, a, b, c);
}

template <int W>
struct Columns {
  static constexpr int vectors = W;
};

// Calls done(Columns<W>, results, rows) for the rows that are computed together, while they are in the first-level cache.
template <int W, class Done>
static void multiply_rows(int rows, Left a, const Right& b, Result c, const Done& done) {
  constexpr int R = rows_with(W);
  for (; rows > 0; rows -= R, a.data += R * a.stride, c.data += R * c.stride) {
    if (rows >= R)
      multiply<R, W>(a, b, c);
    else
      multiply_last<R - 1, W>(rows, a, b, c);
    done(Columns<W>(), c.data, std::min(rows, R));
  }
}

// The same for `width` columns, a multiple of LANES and at most PANEL.
template <int W = WIDE, class Done>
static void multiply_columns(int width, int rows, const Left& a, const Right& b, const Result& c, const Done& done) {
  if (width == W * LANES) return multiply_rows<W>(rows, a, b, c, done);
  if constexpr (W > 1) multiply_columns<W - 1>(width, rows, a, b, c, done);
}
