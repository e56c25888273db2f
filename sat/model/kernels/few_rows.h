// Products of a few rows with a matrix that is laid out as PyTorch has it and streams by once: what is made for many
// rows lays it out anew. Every column of the result belongs to one thread.

#pragma once

#include <algorithm>
#include <cstdint>

#include "numbers.h"
#include "tiles.h"

namespace {

// out [n, N] = x [n, K], whose rows are so far apart, times the transpose of `matrix` [N, K].
template <class T>
void few_rows_transposed(int64_t n, int64_t K, int64_t N, const T* x, int64_t apart, const T* matrix, T* out,
                         int64_t threads) {
  using W = Wide<T>;
  const int64_t whole = padded<W>(K), span = (N + threads - 1) / threads;
  Scratch<T> rows(n * whole);
  for (int64_t r = 0; r < n; ++r)
    std::fill(std::copy_n(x + r * apart, K, &rows[r * whole]), &rows[(r + 1) * whole], T());
#pragma omp parallel for num_threads(threads)
  for (int64_t begin = 0; begin < N; begin += span) {
    const int64_t count = std::min(span, N - begin);
    Scratch<W> sums(n * count);
    std::fill_n(sums.get(), n * count, W(0));
    for_tiles(n, count, [&](auto R, auto P, int64_t j, int64_t l) {
      W* to[R];
      for (int64_t r = 0; r < R; ++r) to[r] = &sums[(j + r) * count + l];
      dot_tile<R, P>(K, whole, matrix + (begin + l) * K, &rows[j * whole], to);
    });
    for (int64_t r = 0; r < n; ++r)
      for (int64_t i = 0; i < count; ++i) narrow(sums[r * count + i], out[r * N + begin + i]);
  }
}

// out [n, N] = x [n, K], whose rows are so far apart, times `matrix` [K, N].
template <class T>
void few_rows(int64_t n, int64_t K, int64_t N, const T* x, int64_t apart, const T* matrix, T* out, int64_t threads) {
  using W = Wide<T>;
  const int64_t span = padded<W>((N + threads - 1) / threads);
  Scratch<W> weights(n * K);
  for (int64_t r = 0; r < n; ++r)
    for (int64_t k = 0; k < K; ++k) weights[r * K + k] = wide(x[r * apart + k]);
#pragma omp parallel for num_threads(threads)
  for (int64_t begin = 0; begin < N; begin += span) {
    const int64_t count = std::min(span, N - begin);
    Scratch<W> sums(n * span);
    std::fill_n(sums.get(), n * span, W(0));
    for_tiles(n, K, [&](auto R, auto P, int64_t j, int64_t k) {
      const W* w[R];
      for (int64_t r = 0; r < R; ++r) w[r] = &weights[(j + r) * K + k];
      add_tile<R, P>(count, N, span, matrix + k * N + begin, w, &sums[j * span]);
    });
    for (int64_t r = 0; r < n; ++r)
      for (int64_t i = 0; i < count; i += PAIR<W>)
        store_pair(load_pair(&sums[r * span + i]), out + r * N + begin + i, count - i);
  }
}

}  // namespace
