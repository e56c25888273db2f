// Attention over locations and its gradients, image by image. Names and shapes: native.cpp.
//
// The tanh score uses tanh(p + q) = 1 - 2 r with r = 1 / (1 + exp(2p) exp(2q)): `projection` then holds exp(2p), so
// that no exponential is left in the inner loop. Softmax takes no notice of what is the same for all locations: the
// inner loop sums -2 u r alone, and for the ReLU, which is max(p, -q) + q, only u max(p, -q).

#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "numbers.h"
#include "tiles.h"

namespace {

// The query of one row in the form that the inner loops want, as pairs.
template <bool TANH, class T>
void prepare_query(int64_t A, const T* query, Wide<T>* out) {
  using W = Wide<T>;
  for (int64_t a = 0; a < A; a += PAIR<W>) {
    Pair<W> x = load_pair(query + a, A - a);
    for (auto& half : x.half) half = TANH ? exponential(2 * clamped<W>(half, 40)) : -half;  // not 0: never inf * 0
    store_pair(x, out + a);
  }
}

// r of the tanh score at p and q, or for the ReLU max(p, -q) = relu(p + q) - q, where `q` holds -q.
template <bool TANH, class W>
inline Vector<W> unit(Vector<W> p, Vector<W> q) {
  const Vector<W> one = Vector<W>{} + W(1);
  if constexpr (TANH)
    return one / (one + p * q);
  else
    return p > q ? p : q;
}

// What a unit counts in the score, and in its gradient: d act = SLOPE * slope.
template <bool TANH, class W>
constexpr W HEIGHT = TANH ? -2 : 1;
template <bool TANH, class W>
constexpr W SLOPE = TANH ? 4 : 1;

// `sum` + grad * slope.
template <bool TANH, class W>
inline Vector<W> with_slope(Vector<W> sum, W grad, Vector<W> p, Vector<W> q) {
  if constexpr (TANH) {
    const Vector<W> r = unit<TANH, W>(p, q);
    return sum + grad * (r - r * r);
  } else {
    return p > q ? sum + grad : sum;
  }
}

// out[r][p] = sum over a of u[a] unit(projection[p A + a], q[r whole + a]) for R rows and P locations.
template <bool TANH, int R, int P, class T>
void scores(int64_t A, int64_t whole, const T* projection, const Wide<T>* q, const Wide<T>* u, Wide<T>* const* out) {
  using W = Wide<T>;
  Vector<W> sum[R][P] = {};
  for_pairs<P>(A, A, projection, [&](int64_t a, const T* const* row) INLINE {
    for (int i = 0; i < 2; ++i) {
      const int64_t from = a + i * VECTOR<W>;
      Vector<W> x[P];
      for (int p = 0; p < P; ++p) x[p] = load_half(row[p], i);
      for (int r = 0; r < R; ++r)
        for (int p = 0; p < P; ++p) sum[r][p] += load(u + from) * unit<TANH, W>(x[p], load(q + r * whole + from));
    }
  });
  for (int r = 0; r < R; ++r)
    for (int p = 0; p < P; ++p) out[r][p] = HEIGHT<TANH, W> * sum_of<W>(sum[r][p]);
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

// From d alpha to d e = alpha (d alpha - sum alpha d alpha), in place.
template <class W>
void softmax_backward(int64_t real, const W* alpha, W* grad) {
  W mean = 0;
#pragma omp simd reduction(+ : mean)
  for (int64_t l = 0; l < real; ++l) mean += alpha[l] * grad[l];
  for (int64_t l = 0; l < real; ++l) grad[l] = alpha[l] * (grad[l] - mean);
}

// A row of the context, from its pairs, and behind its gate of width G (0: none) the gated one; the gate's activation
// stays in it.
template <class T>
void open_gate(int64_t D, int64_t G, const Wide<T>* sums, T* context, T* gate, const T* bias, T* gated) {
  using W = Wide<T>;
  Vector<W> one = {};
  if (G == 1) {
    const W opened = sigmoid(wide(gate[0]) + wide(bias[0]));
    narrow(opened, gate[0]);
    one += opened;
  }
  Pair<W> opened = {{one, one}};
  for (int64_t d = 0; d < D; d += PAIR<W>) {
    Pair<W> z = load_pair(sums + d);
    store_pair(z, context + d, D - d);
    if (!G) continue;
    if (G > 1) {
      const Pair<W> argument = load_pair(gate + d, D - d), more = load_pair(bias + d, D - d);
      for (int i = 0; i < 2; ++i) opened.half[i] = sigmoid(argument.half[i] + more.half[i]);
      store_pair(opened, gate + d, D - d);
    }
    for (int i = 0; i < 2; ++i) z.half[i] *= opened.half[i];
    store_pair(z, gated + d, D - d);
  }
}

template <bool TANH, class T>
void attend(int64_t n, int64_t B, int64_t L, int64_t A, int64_t D, const int64_t* ptr, const int64_t* rows,
            const int64_t* regions, const T* grid, const T* projection, const T* query, int64_t query_stride,
            const T* score, Wide<T>* alpha, T* context, int64_t G, T* gate, int64_t gate_stride, const T* bias,
            T* gated, int64_t threads) {
  using W = Wide<T>;
  const int64_t whole = padded<W>(A), features = padded<W>(D);
#pragma omp parallel for schedule(dynamic) num_threads(threads)
  for (int64_t b = 0; b < B; ++b) {
    const Image image(b, n, L, ptr, rows, regions);
    if (!image.k) continue;
    Scratch<W> q(image.k * whole), u(whole), sums(image.k * features);
    for (int64_t a = 0; a < A; a += PAIR<W>) store_pair(load_pair(score + a, A - a), &u[a]);
    for (int64_t j = 0; j < image.k; ++j)
      prepare_query<TANH>(A, query + image.row[j] * query_stride, &q[j * whole]);
    for_tiles(image.k, image.real, [&](auto R, auto P, int64_t j, int64_t l) {
      W* to[R];
      for (int64_t r = 0; r < R; ++r) to[r] = alpha + image.row[j + r] * L + l;
      scores<TANH, R, P>(A, whole, projection + (b * L + l) * A, &q[j * whole], u.get(), to);
    });
    for (int64_t j = 0; j < image.k; ++j) softmax(L, image.real, alpha + image.row[j] * L);
    weighted_sums(image, L, D, features, grid + b * L * D, alpha, sums.get());
    for (int64_t j = 0; j < image.k; ++j) {
      const int64_t r = image.row[j];
      open_gate(D, G, &sums[j * features], context + r * D, gate + r * gate_stride, bias, gated + r * D);
    }
  }
}

// sum[r whole + a] += sum over p of grad[r][p] slope(projection[p A + a], q[r whole + a]) for R rows and P locations.
template <bool TANH, int R, int P, class T>
void add_slopes(int64_t A, int64_t whole, const T* projection, const Wide<T>* q, const Wide<T>* const* grad,
                Wide<T>* sum) {
  using W = Wide<T>;
  W weight[R][P];
  for (int r = 0; r < R; ++r) std::copy_n(grad[r], P, weight[r]);
  for_pairs<P>(A, A, projection, [&](int64_t a, const T* const* row) INLINE {
    for (int i = 0; i < 2; ++i) {
      Vector<W> x[P];
      for (int p = 0; p < P; ++p) x[p] = load_half(row[p], i);
      for (int r = 0; r < R; ++r) {
        const int64_t from = r * whole + a + i * VECTOR<W>;
        Vector<W> total = load(sum + from);
        for (int p = 0; p < P; ++p) total = with_slope<TANH, W>(total, weight[r][p], x[p], load(q + from));
        store(total, sum + from);
      }
    }
  });
}

// A gradient [A] from its sum of slopes, as pairs: times the score vector.
template <bool TANH, class T>
void behind_slope(int64_t A, const Wide<T>* sum, const T* score, T* out) {
  using W = Wide<T>;
  for (int64_t a = 0; a < A; a += PAIR<W>) {
    Pair<W> grad = load_pair(sum + a);
    const Pair<W> u = load_pair(score + a, A - a);
    for (int i = 0; i < 2; ++i) grad.half[i] *= SLOPE<TANH, W> * u.half[i];
    store_pair(grad, out + a, A - a);
  }
}

// From d context and d alpha (of the regulariser) to d score and d query of the rows of one step.
template <bool TANH, class T>
void attend_backward(int64_t n, int64_t B, int64_t L, int64_t A, int64_t D, const int64_t* ptr, const int64_t* rows,
                     const int64_t* regions, const T* grid, const T* projection, const T* query, int64_t query_stride,
                     const T* score, const Wide<T>* alpha, const T* grad_context, const Wide<T>* grad_alpha,
                     Wide<T>* grad_scores, T* grad_query, int64_t grad_query_stride, int64_t threads) {
  using W = Wide<T>;
  const int64_t whole = padded<W>(A), features = padded<W>(D);
#pragma omp parallel for schedule(dynamic) num_threads(threads)
  for (int64_t b = 0; b < B; ++b) {
    const Image image(b, n, L, ptr, rows, regions);
    const int64_t *row = image.row, k = image.k, real = image.real;
    if (!k) continue;
    Scratch<W> q(k * whole), sum(k * whole);
    Scratch<T> x(k * features);
    std::fill_n(sum.get(), k * whole, W(0));
    for (int64_t j = 0; j < k; ++j) {
      prepare_query<TANH>(A, query + row[j] * query_stride, &q[j * whole]);
      std::fill(std::copy_n(grad_context + row[j] * D, D, &x[j * features]), &x[(j + 1) * features], T());
      std::copy_n(grad_alpha + row[j] * L, real, grad_scores + row[j] * L);
      std::fill(grad_scores + row[j] * L + real, grad_scores + (row[j] + 1) * L, W(0));
    }
    dot_products(image, L, D, features, grid + b * L * D, x.get(), grad_scores);
    for (int64_t j = 0; j < k; ++j) softmax_backward(real, alpha + row[j] * L, grad_scores + row[j] * L);
    for_tiles(image.k, image.real, [&](auto R, auto P, int64_t j, int64_t l) {
      const W* from[R];
      for (int64_t r = 0; r < R; ++r) from[r] = grad_scores + row[j + r] * L + l;
      add_slopes<TANH, R, P>(A, whole, projection + (b * L + l) * A, &q[j * whole], from, &sum[j * whole]);
    });
    for (int64_t j = 0; j < k; ++j)
      behind_slope<TANH>(A, &sum[j * whole], score, grad_query + row[j] * grad_query_stride);
  }
}

// Over k words with their q [whole / VECTOR, k, VECTOR] and grad [k, P]: of_p [P, whole] = sum of grad * slope, and
// of_u [whole] += sum of grad * unit, of P locations.
template <bool TANH, int P, class T>
void shared_tile(int64_t k, int64_t A, int64_t whole, const T* projection, const Wide<T>* q, const Wide<T>* grad,
                 Wide<T>* of_p, Wide<T>* of_u) {
  using W = Wide<T>;
  for_pairs<P>(A, A, projection, [&](int64_t a, const T* const* row) INLINE {
    for (int64_t i = 0, from = a; i < 2; ++i, from += VECTOR<W>) {
      Vector<W> x[P], sum[P] = {}, units[P] = {};  // a sum for each location, so that none waits for the one before
      for (int p = 0; p < P; ++p) x[p] = load_half(row[p], i);
      for (int64_t j = 0; j < k; ++j) {
        const Vector<W> mine = load(q + from * k + j * VECTOR<W>);
        for (int p = 0; p < P; ++p) {
          sum[p] = with_slope<TANH, W>(sum[p], grad[j * P + p], x[p], mine);
          units[p] += grad[j * P + p] * unit<TANH, W>(x[p], mine);
        }
      }
      for (int p = 0; p < P; ++p) store(sum[p], of_p + p * whole + from);
      for (int p = 1; p < P; ++p) units[0] += units[p];
      store(load(of_u + from) + units[0], of_u + from);
    }
  });
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
    Scratch<W> q(k * whole), one(whole), sum(TILE * whole), grad(k * TILE), of_u(whole);
    std::fill_n(of_u.get(), whole, W(0));
    W total = 0;
    for (int64_t j = 0; j < k; ++j) {  // q [whole / V, k, V]
      prepare_query<TANH>(A, query + row[j] * query_stride, one.get());
      for (int64_t a = 0; a < whole; a += V) std::copy_n(&one[a], V, &q[a * k + j * V]);
      W mine = 0;
#pragma omp simd reduction(+ : mine)
      for (int64_t l = 0; l < real; ++l) mine += grad_scores[row[j] * L + l];
      total += mine;
      if (!TANH)
        for (int64_t a = 0; a < whole; ++a) of_u[a] -= mine * one[a];  // what the units leave out
    }
    for (int64_t l = 0; l < real; l += TILE)
      with_constant<TILE>(std::min(TILE, real - l), [&](auto P) {
        const int64_t begin = (b * L + l) * A;
        for (int64_t j = 0; j < k; ++j) std::copy_n(grad_scores + row[j] * L + l, P, &grad[j * P]);
        shared_tile<TANH, P>(k, A, whole, projection + begin, q.get(), grad.get(), sum.get(), of_u.get());
        for (int64_t i = 0; i < P; ++i) behind_slope<TANH>(A, &sum[i * whole], score, grad_projection + begin + i * A);
      });
    for (int64_t i = (b * L + real) * A; i < (b + 1) * L * A; ++i) narrow(W(0), grad_projection[i]);
    for (int64_t a = 0; a < A; ++a)
      grad_score[b * A + a] = (TANH ? total : W(0)) + HEIGHT<TANH, W> * of_u[place_in_pairs<T>(a)];
  }
}

}  // namespace
