// The rows of an image and its locations, tile by tile, and the products of both: what is loaded of an image's grid
// serves all of its rows that run, and what comes next is fetched meanwhile. Names and shapes: native.cpp.

#pragma once

#include <algorithm>
#include <cstdint>
#include <new>
#include <type_traits>

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

#include "numbers.h"

namespace {

constexpr int64_t ROWS = 5;  // of an image, handled together
constexpr int64_t TILE = 4;  // neighbouring locations handled together

// Locations of a tile whose sums for R rows fit the vector registers, which are twice as many where they are widest.
template <int R>
constexpr int LOCATIONS = VECTOR_BYTES < 64 && R > 2 ? TILE / 2 : TILE;

// Memory of n numbers, not initialised. It begins at a cache line, which a vector would else straddle.
template <class W>
class Scratch {
 public:
  explicit Scratch(int64_t n) : begin(static_cast<W*>(::operator new(n * sizeof(W), LINE))) {}
  ~Scratch() { ::operator delete(begin, LINE); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  W* get() const { return begin; }
  W& operator[](int64_t i) const { return begin[i]; }

 private:
  static constexpr std::align_val_t LINE = std::align_val_t(64);
  W* begin;
};

// Calls f(integral_constant<int, n>) for n = 1 .. MOST, so that loops over so many are unrolled.
template <int MOST, class F>
void with_constant(int64_t n, F f) {
  if (n == MOST)
    f(std::integral_constant<int, MOST>());
  else if constexpr (MOST > 1)
    with_constant<MOST - 1>(n, f);
}

// The rows of image b that take part, and its locations that are real.
struct Image {
  const int64_t* row;
  int64_t k, real;

  Image(int64_t b, int64_t n, int64_t L, const int64_t* ptr, const int64_t* rows, const int64_t* regions)
      : row(rows + ptr[b]),
        k(std::lower_bound(row, rows + ptr[b + 1], n) - row),
        real(regions ? regions[b] : L) {}
};

// Calls f(d, row) for the pairs from the d-th number on of rows [P, width] that are so far apart, to which `row` [P]
// points, zeros behind their ends; fetches those of the next tile.
template <int P, class T, class F>
INLINE inline void for_pairs(int64_t width, int64_t apart, const T* rows, F f) {
  constexpr int64_t N = PAIR<Wide<T>>;
  const T* row[P];
  int64_t d = 0;
  for (; d + N <= width; d += N) {
    for (int p = 0; p < P; ++p) fetch<N>(row[p] = rows + p * apart + d, TILE * apart);
    f(d, row);
  }
  if (d == width) return;
  T last[P][N] = {};
  for (int p = 0; p < P; ++p) row[p] = last[p], std::copy_n(rows + p * apart + d, width - d, last[p]);
  f(d, row);
}

// Calls f(R, j) for blocks of R rows from the j-th of k, all about as large.
template <class F>
void for_rows(int64_t k, F f) {
  const int64_t blocks = (k + ROWS - 1) / ROWS;
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t j = block * k / blocks;
    with_constant<ROWS>((block + 1) * k / blocks - j, [&](auto R) { f(R, j); });
  }
}

// Calls f(R, P, j, l) for R of k rows from the j-th and P of so many locations from the l-th, tile by tile.
template <class F>
void for_tiles(int64_t k, int64_t locations, F f) {
  for (int64_t begin = 0; begin < locations; begin += TILE)
    for_rows(k, [&](auto R, int64_t j) {
      constexpr int P = LOCATIONS<R>;
      const int64_t end = std::min(begin + TILE, locations);
      int64_t l = begin;
      for (; l + P <= end; l += P) f(R, std::integral_constant<int, P>(), j, l);
      for (; l < end; ++l) f(R, std::integral_constant<int, 1>(), j, l);
    });
}

// out[r][d] += sum over p of weight[r][p] grid[p apart + d] for R rows, as pairs [R, whole], and P locations.
template <int R, int P, class T>
void add_tile(int64_t D, int64_t apart, int64_t whole, const T* grid, const Wide<T>* const* weight, Wide<T>* out) {
  using W = Wide<T>;
  W w[P][R];
  for (int p = 0; p < P; ++p)
    for (int r = 0; r < R; ++r) w[p][r] = weight[r][p];
  for_pairs<P>(D, apart, grid, [&](int64_t d, const T* const* row) INLINE {
    for (int i = 0; i < 2; ++i) {
      Vector<W> sum[R];
      for (int r = 0; r < R; ++r) sum[r] = load(out + r * whole + d + i * VECTOR<W>);
      for (int p = 0; p < P; ++p) {
        const Vector<W> g = load_half(row[p], i);
        for (int r = 0; r < R; ++r) sum[r] += w[p][r] * g;
      }
      for (int r = 0; r < R; ++r) store(sum[r], out + r * whole + d + i * VECTOR<W>);
    }
  });
}

// out[j][d] = sum over l of weight[row[j] L + l] grid[l D + d] for the rows of an image, as pairs [k, whole]: the grid
// streams by once.
template <class T>
void weighted_sums(const Image& image, int64_t L, int64_t D, int64_t whole, const T* grid, const Wide<T>* weight,
                   Wide<T>* out) {
  std::fill_n(out, image.k * whole, Wide<T>(0));
  for_tiles(image.k, image.real, [&](auto R, auto P, int64_t j, int64_t l) {
    const Wide<T>* w[R];
    for (int64_t r = 0; r < R; ++r) w[r] = weight + image.row[j + r] * L + l;
    add_tile<R, P>(D, D, whole, grid + l * D, w, out + j * whole);
  });
}

// sum[r][p] += the products of the pairs at g[p] and x + r whole.
template <int R, int P, class T>
INLINE inline void add_products(const T* const* g, const T* x, int64_t whole, Vector<Wide<T>> (&sum)[R][P]) {
  using W = Wide<T>;
#if defined(__AVX512BF16__)
  if constexpr (std::is_same_v<T, bf16>) {  // has an instruction, in which they are summed as float
    __m512bh mine[R];
    for (int r = 0; r < R; ++r) keep(mine[r] = (__m512bh)_mm512_loadu_si512(x + r * whole));
    for (int p = 0; p < P; ++p) {
      const __m512bh other = (__m512bh)_mm512_loadu_si512(g[p]);
      for (int r = 0; r < R; ++r) sum[r][p] = _mm512_dpbf16_ps(sum[r][p], other, mine[r]);
    }
    return;
  }
#endif
  for (int i = 0; i < 2; ++i) {
    Vector<W> mine[R];
    for (int r = 0; r < R; ++r) keep(mine[r] = load_half(x + r * whole, i));
    for (int p = 0; p < P; ++p) {
      const Vector<W> other = load_half(g[p], i);
      for (int r = 0; r < R; ++r) sum[r][p] += other * mine[r];
    }
  }
}

// out[r][p] += grid[p D ...] . x[r whole ...] for R rows and P locations.
template <int R, int P, class T>
void dot_tile(int64_t D, int64_t whole, const T* grid, const T* x, Wide<T>* const* out) {
  Vector<Wide<T>> sum[R][P] = {};
  for_pairs<P>(D, D, grid, [&](int64_t d, const T* const* row) INLINE { add_products<R, P>(row, x + d, whole, sum); });
  for (int r = 0; r < R; ++r)
    for (int p = 0; p < P; ++p) out[r][p] += sum_of<Wide<T>>(sum[r][p]);
}

// out[row[j] L + l] += grid[l D ...] . x[j whole ...] for the rows of an image: the grid streams by once.
template <class T>
void dot_products(const Image& image, int64_t L, int64_t D, int64_t whole, const T* grid, const T* x, Wide<T>* out) {
  for_tiles(image.k, image.real, [&](auto R, auto P, int64_t j, int64_t l) {
    Wide<T>* to[R];
    for (int64_t r = 0; r < R; ++r) to[r] = out + image.row[j + r] * L + l;
    dot_tile<R, P>(D, whole, grid + l * D, x + j * whole, to);
  });
}

}  // namespace
