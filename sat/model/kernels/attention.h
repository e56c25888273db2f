// Attention over locations and its gradients, image by image. Names and shapes: native.cpp.
//
// The tanh score uses tanh(p + q) = 1 - 2 r with r = 1 / (1 + exp(2p) exp(2q)): `projection` then holds exp(2p), so
// that no exponential is left in the inner loop. Softmax takes no notice of the sum of the score vector, the same for
// all locations, so the inner loop sums -2 u r alone.

#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <type_traits>

#include "numbers.h"

namespace {

constexpr int64_t TILE = 4;      // neighbouring locations handled together
constexpr int64_t STRIP = 1024;  // features of a tile that stay in the first-level cache

template <class W>
using Scratch = std::unique_ptr<W[]>;  // of `new W[n]`: not initialised

// Calls f(integral_constant<int, n>) for n = 1 .. TILE, so that the loops over a tile are unrolled.
template <class F>
void with_constant(int64_t n, F f) {
  if (n == 4) f(std::integral_constant<int, 4>());
  if (n == 3) f(std::integral_constant<int, 3>());
  if (n == 2) f(std::integral_constant<int, 2>());
  if (n == 1) f(std::integral_constant<int, 1>());
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

// The query of one row in the form that the inner loops want, padded with zeros to `whole`.
template <bool TANH, class T>
void prepare_query(int64_t A, int64_t whole, const T* query, Wide<T>* out) {
  using W = Wide<T>;
#pragma omp simd
  for (int64_t a = 0; a < A; ++a) {
    const W x = wide(query[a]);
    out[a] = TANH ? exponential(2 * std::min(std::max(x, W(-40)), W(40))) : x;  // finite and not 0: never inf * 0
  }
  std::fill(out + A, out + whole, W(0));
}

// The projections [P, A] of P locations in `room` [P, whole], padded with zeros; returns that.
template <class T>
const Wide<T>* widened(int64_t P, int64_t A, int64_t whole, const T* projection, Wide<T>* room) {
  for (int64_t p = 0; p < P; ++p) {
    for (int64_t a = 0; a < A; ++a) room[p * whole + a] = wide(projection[p * A + a]);
    std::fill(room + p * whole + A, room + (p + 1) * whole, Wide<T>(0));
  }
  return room;
}

// From x = p of P locations to r of the tanh score, or to relu(p + q).
template <bool TANH, int P, class W>
inline void units(Vector<W> q, Vector<W>* x) {
  const Vector<W> zero = {}, one = zero + W(1);
  for (int i = 0; i < P; ++i) {
    if (TANH)
      x[i] = one / (one + x[i] * q);
    else
      x[i] = zero > x[i] + q ? zero : x[i] + q;
  }
}

// What a unit counts in the score, and in its gradient: d act = SLOPE * slope(unit).
template <bool TANH, class W>
constexpr W HEIGHT = TANH ? -2 : 1;
template <bool TANH, class W>
constexpr W SLOPE = TANH ? 4 : 1;

template <bool TANH, class W>
inline Vector<W> slope(Vector<W> unit) {
  return TANH ? unit - unit * unit : unit > 0 ? Vector<W>{} + W(1) : Vector<W>{};
}

// out[p] = sum over a of u[a] unit(p[p whole + a], q[a]) for P locations.
template <bool TANH, int P, class W>
void scores(int64_t whole, const W* p, const W* q, const W* u, W* out) {
  Vector<W> sum[P] = {};
  for (int64_t a = 0; a < whole; a += VECTOR<W>) {
    Vector<W> x[P];
    for (int i = 0; i < P; ++i) x[i] = load(p + i * whole + a);
    units<TANH, P, W>(load(q + a), x);
    for (int i = 0; i < P; ++i) sum[i] += load(u + a) * x[i];
  }
  for (int i = 0; i < P; ++i) {
    out[i] = 0;
    for (int64_t v = 0; v < VECTOR<W>; ++v) out[i] += sum[i][v];
  }
}

template <class W>
void softmax(int64_t L, int64_t real, W* e) {
  const W top = *std::max_element(e, e + real);
  W sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t l = 0; l < real; ++l) sum += e[l] = exponential(e[l] - top);
  for (int64_t l = 0; l < real; ++l) e[l] /= sum;
  std::fill(e + real, e + L, W(0));
}

// Calls f(R, P, j, l, d, length) for tiles of R rows from the j-th, P locations from l, `length` features from d.
template <class F>
void for_tiles(const Image& image, int64_t D, F f) {
  for (int64_t l = 0; l < image.real; l += TILE)
    for (int64_t d = 0; d < D; d += STRIP)
      with_constant(std::min(TILE, image.real - l), [&](auto P) {
        int64_t j = 0;
        for (; j + 2 <= image.k; j += 2) f(std::integral_constant<int, 2>(), P, j, l, d, std::min(STRIP, D - d));
        if (j < image.k) f(std::integral_constant<int, 1>(), P, j, l, d, std::min(STRIP, D - d));
      });
}

// From d alpha to d e = alpha (d alpha - sum alpha d alpha), in place.
template <class W>
void softmax_backward(int64_t real, const W* alpha, W* grad) {
  W mean = 0;
#pragma omp simd reduction(+ : mean)
  for (int64_t l = 0; l < real; ++l) mean += alpha[l] * grad[l];
  for (int64_t l = 0; l < real; ++l) grad[l] = alpha[l] * (grad[l] - mean);
}

// out[r][d] += sum over p of weight[r][p] grid[p D + d] for R rows, P locations and `length` features.
template <int R, int P, class T>
void add_tile(int64_t length, int64_t D, const T* grid, const Wide<T>* const* weight, Wide<T>* out) {
  using W = Wide<T>;
  W w[R][P];
  for (int r = 0; r < R; ++r) std::copy_n(weight[r], P, w[r]);
#pragma omp simd
  for (int64_t d = 0; d < length; ++d) {
    W sum[R];
    for (int r = 0; r < R; ++r) sum[r] = out[r * D + d];
    for (int p = 0; p < P; ++p)
      for (int r = 0; r < R; ++r) sum[r] += w[r][p] * wide(grid[p * D + d]);
    for (int r = 0; r < R; ++r) out[r * D + d] = sum[r];
  }
}

// out[j][d] = sum over l of weight[row[j] L + l] grid[l D + d] for the rows of an image: the grid streams by once.
template <class T>
void weighted_sums(const Image& image, int64_t L, int64_t D, const T* grid, const Wide<T>* weight, Wide<T>* out) {
  std::fill_n(out, image.k * D, Wide<T>(0));
  for_tiles(image, D, [&](auto R, auto P, int64_t j, int64_t l, int64_t d, int64_t length) {
    const Wide<T>* w[2];
    for (int64_t r = 0; r < R; ++r) w[r] = weight + image.row[j + r] * L + l;
    add_tile<decltype(R)::value, decltype(P)::value>(length, D, grid + l * D + d, w, out + j * D + d);
  });
}

// out[r][p] += grid[p D ...] . x[r D ...] for R rows, P locations and `length` features.
template <int R, int P, class T>
void dot_tile(int64_t length, int64_t D, const T* grid, const Wide<T>* x, Wide<T>* const* out) {
  using W = Wide<T>;
  constexpr int64_t V = VECTOR<W>, CHAINS = 3 - R;  // enough sums that none waits for the one before
  Vector<W> sum[CHAINS][R][P] = {};
  int64_t d = 0;
  for (; d + CHAINS * V <= length; d += CHAINS * V)
    for (int c = 0; c < CHAINS; ++c)
      for (int p = 0; p < P; ++p) {
        const Vector<W> g = load(grid + p * D + d + c * V);
        for (int r = 0; r < R; ++r) sum[c][r][p] += g * load(x + r * D + d + c * V);
      }
  for (int r = 0; r < R; ++r)
    for (int p = 0; p < P; ++p) {
      W total = 0;
      for (int c = 1; c < CHAINS; ++c) sum[0][r][p] += sum[c][r][p];
      for (int64_t i = 0; i < V; ++i) total += sum[0][r][p][i];
      for (int64_t i = d; i < length; ++i) total += wide(grid[p * D + i]) * x[r * D + i];
      out[r][p] += total;
    }
}

// out[row[j] L + l] += grid[l D ...] . x[j D ...] for the rows of an image: the grid streams by once.
template <class T>
void dot_products(const Image& image, int64_t L, int64_t D, const T* grid, const Wide<T>* x, Wide<T>* out) {
  for_tiles(image, D, [&](auto R, auto P, int64_t j, int64_t l, int64_t d, int64_t length) {
    Wide<T>* to[2];
    for (int64_t r = 0; r < R; ++r) to[r] = out + image.row[j + r] * L + l;
    dot_tile<decltype(R)::value, decltype(P)::value>(length, D, grid + l * D + d, x + j * D + d, to);
  });
}

// A row of the context and, behind its gate of width G (0: none), of the gated one; the gate's activation stays in it.
template <class T>
void open_gate(int64_t D, int64_t G, const Wide<T>* sums, T* context, T* gate, const T* bias, T* gated) {
  using W = Wide<T>;
  for (int64_t d = 0; d < D; ++d) narrow(sums[d], context[d]);
  if (G == 1) {
    const W opened = sigmoid(wide(gate[0]) + wide(bias[0]));
    narrow(opened, gate[0]);
    for (int64_t d = 0; d < D; ++d) narrow(sums[d] * opened, gated[d]);
  } else if (G) {
#pragma omp simd
    for (int64_t d = 0; d < D; ++d) {
      const W opened = sigmoid(wide(gate[d]) + wide(bias[d]));
      narrow(opened, gate[d]);
      narrow(sums[d] * opened, gated[d]);
    }
  }
}

template <bool TANH, class T>
void attend(int64_t n, int64_t B, int64_t L, int64_t A, int64_t D, const int64_t* ptr, const int64_t* rows,
            const int64_t* regions, const T* grid, const T* projection, const T* query, int64_t query_stride,
            const T* score, Wide<T>* alpha, T* context, int64_t G, T* gate, int64_t gate_stride, const T* bias,
            T* gated, int64_t threads) {
  using W = Wide<T>;
  const int64_t whole = padded<W>(A);
#pragma omp parallel for schedule(dynamic) num_threads(threads)
  for (int64_t b = 0; b < B; ++b) {
    const Image image(b, n, L, ptr, rows, regions);
    if (!image.k) continue;
    Scratch<W> q(new W[image.k * whole]), u(new W[whole]()), room(new W[TILE * whole]), sums(new W[image.k * D]);
    for (int64_t a = 0; a < A; ++a) u[a] = HEIGHT<TANH, W> * wide(score[a]);
    for (int64_t j = 0; j < image.k; ++j)
      prepare_query<TANH>(A, whole, query + image.row[j] * query_stride, &q[j * whole]);
    for (int64_t l = 0; l < image.real; l += TILE)
      with_constant(std::min(TILE, image.real - l), [&](auto count) {
        constexpr int P = decltype(count)::value;
        const W* p = widened(P, A, whole, projection + (b * L + l) * A, room.get());
        for (int64_t j = 0; j < image.k; ++j)
          scores<TANH, P>(whole, p, &q[j * whole], u.get(), alpha + image.row[j] * L + l);
      });
    for (int64_t j = 0; j < image.k; ++j) softmax(L, image.real, alpha + image.row[j] * L);
    weighted_sums(image, L, D, grid + b * L * D, alpha, sums.get());
    for (int64_t j = 0; j < image.k; ++j) {
      const int64_t r = image.row[j];
      open_gate(D, G, &sums[j * D], context + r * D, gate + r * gate_stride, bias, gated + r * D);
    }
  }
}

// sum[a] += sum over p of grad[p] slope(unit(p[p whole + a], q[a])) for P locations.
template <bool TANH, int P, class W>
void add_slopes(int64_t whole, const W* p, const W* q, const W* grad, W* sum) {
  for (int64_t a = 0; a < whole; a += VECTOR<W>) {
    Vector<W> x[P], total = load(sum + a);
    for (int i = 0; i < P; ++i) x[i] = load(p + i * whole + a);
    units<TANH, P, W>(load(q + a), x);
    for (int i = 0; i < P; ++i) total += grad[i] * slope<TANH, W>(x[i]);
    store(total, sum + a);
  }
}

// From d context and d alpha (of the regulariser) to d score and d query of the rows of one step.
template <bool TANH, class T>
void attend_backward(int64_t n, int64_t B, int64_t L, int64_t A, int64_t D, const int64_t* ptr, const int64_t* rows,
                     const int64_t* regions, const T* grid, const T* projection, const T* query, int64_t query_stride,
                     const T* score, const Wide<T>* alpha, const T* grad_context, const Wide<T>* grad_alpha,
                     Wide<T>* grad_scores, T* grad_query, int64_t grad_query_stride, int64_t threads) {
  using W = Wide<T>;
  const int64_t whole = padded<W>(A);
#pragma omp parallel for schedule(dynamic) num_threads(threads)
  for (int64_t b = 0; b < B; ++b) {
    const Image image(b, n, L, ptr, rows, regions);
    const int64_t *row = image.row, k = image.k, real = image.real;
    if (!k) continue;
    Scratch<W> x(new W[k * D]), q(new W[k * whole]), sum(new W[k * whole]()), room(new W[TILE * whole]);
    for (int64_t j = 0; j < k; ++j) {
      prepare_query<TANH>(A, whole, query + row[j] * query_stride, &q[j * whole]);
      for (int64_t d = 0; d < D; ++d) x[j * D + d] = wide(grad_context[row[j] * D + d]);
      std::copy_n(grad_alpha + row[j] * L, real, grad_scores + row[j] * L);
      std::fill(grad_scores + row[j] * L + real, grad_scores + (row[j] + 1) * L, W(0));
    }
    dot_products(image, L, D, grid + b * L * D, x.get(), grad_scores);
    for (int64_t j = 0; j < k; ++j) softmax_backward(real, alpha + row[j] * L, grad_scores + row[j] * L);
    for (int64_t l = 0; l < real; l += TILE)
      with_constant(std::min(TILE, real - l), [&](auto count) {
        constexpr int P = decltype(count)::value;
        const W* p = widened(P, A, whole, projection + (b * L + l) * A, room.get());
        for (int64_t j = 0; j < k; ++j)
          add_slopes<TANH, P>(whole, p, &q[j * whole], grad_scores + row[j] * L + l, &sum[j * whole]);
      });
    for (int64_t j = 0; j < k; ++j)
      for (int64_t a = 0; a < A; ++a)
        narrow(SLOPE<TANH, W> * sum[j * whole + a] * wide(score[a]), grad_query[row[j] * grad_query_stride + a]);
  }
}

// For VECTOR attention units of P locations, over k words with their q [k, VECTOR] and grad [k, P]: of_p [P, whole] =
// sum of grad * slope, and of_u += sum of grad * unit.
template <bool TANH, int P, class W>
void shared_tile(int64_t k, int64_t whole, const W* p, const W* q, const W* grad, W* of_p, W* of_u) {
  Vector<W> sum[P] = {}, units_sum = load(of_u);
  for (int64_t j = 0; j < k; ++j) {
    Vector<W> x[P];
    for (int i = 0; i < P; ++i) x[i] = load(p + i * whole);
    units<TANH, P, W>(load(q + j * VECTOR<W>), x);
    for (int i = 0; i < P; ++i) {
      sum[i] += grad[j * P + i] * slope<TANH, W>(x[i]);
      units_sum += grad[j * P + i] * x[i];
    }
  }
  for (int i = 0; i < P; ++i) store(sum[i], of_p + i * whole);
  store(units_sum, of_u);
}

// After the time loop, all words at once (rows are packed words here): d projection [B, L, A] and, per image, d score
// [B, A].
template <bool TANH, class T>
void attend_backward_shared(int64_t B, int64_t L, int64_t A, const int64_t* ptr, const int64_t* rows,
                            const int64_t* regions, const T* projection, const T* query, int64_t query_stride,
                            const T* score, const Wide<T>* grad_scores, T* grad_projection, Wide<T>* grad_score,
                            int64_t threads) {
  using W = Wide<T>;
  constexpr int64_t V = VECTOR<W>;
  const int64_t whole = padded<W>(A);
#pragma omp parallel for schedule(dynamic) num_threads(threads)
  for (int64_t b = 0; b < B; ++b) {
    const Image image(b, INT64_MAX, L, ptr, rows, regions);
    const int64_t *row = image.row, k = image.k, real = image.real;
    Scratch<W> q(new W[k * whole]), one(new W[whole]), room(new W[TILE * whole]), sum(new W[TILE * whole]);
    Scratch<W> grad(new W[k * TILE]), of_u(new W[whole]());
    for (int64_t j = 0; j < k; ++j) {  // q [whole / V, k, V]
      prepare_query<TANH>(A, whole, query + row[j] * query_stride, one.get());
      for (int64_t a = 0; a < whole; a += V) std::copy_n(&one[a], V, &q[a * k + j * V]);
    }
    W total = 0;
    for (int64_t l = 0; l < real; l += TILE)
      with_constant(std::min(TILE, real - l), [&](auto count) {
        constexpr int P = decltype(count)::value;
        const int64_t begin = (b * L + l) * A;
        const W* p = widened(P, A, whole, projection + begin, room.get());
        for (int64_t j = 0; j < k; ++j)
          for (int64_t i = 0; i < P; ++i) total += grad[j * P + i] = grad_scores[row[j] * L + l + i];
        for (int64_t a = 0; a < whole; a += V)
          shared_tile<TANH, P>(k, whole, p + a, &q[a * k], grad.get(), &sum[a], &of_u[a]);
        for (int64_t i = 0; i < P; ++i)
          for (int64_t a = 0; a < A; ++a)
            narrow(SLOPE<TANH, W> * sum[i * whole + a] * wide(score[a]), grad_projection[begin + i * A + a]);
      });
    for (int64_t i = (b * L + real) * A; i < (b + 1) * L * A; ++i) narrow(W(0), grad_projection[i]);
    for (int64_t a = 0; a < A; ++a) grad_score[b * A + a] = (TANH ? total : W(0)) + HEIGHT<TANH, W> * of_u[a];
  }
}

}  // namespace
