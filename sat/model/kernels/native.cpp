// The parts of the training step that are no matrix product: attention with its gradients, and the LSTM cell.
//
// Compiled on first use by native.py with -march=native and called through ctypes: plain pointers, no PyTorch headers,
// so building takes seconds. Inner loops are written for the compiler's vectoriser. Every image (or row) belongs to one
// thread and sums run in a fixed order, so results do not depend on the number of threads.
//
// Where `regions` is no null pointer, only the first regions[b] of the L locations of image b are real: the others get no
// attention, pass no gradient and are not looked at.
//
// B images, L locations, D features, A attention width, H LSTM width. T is the type of the matrix products (float,
// double or bf16), W the type of sums (float, or double for double). Rows of an image: rows[ptr[b]] ..
// rows[ptr[b + 1] - 1], ascending; those below n take part. The tanh score uses
// tanh(p + q) = 1 - 2 / (1 + exp(2p) exp(2q)): `projection` then holds exp(2p), so that no exponential is left in the
// inner loop.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>
#include <vector>

#include "numbers.h"

namespace {

template <class W>
inline W bounded_exp2x(W x) {  // finite and non-zero, so that products of two never give inf * 0
  return exponential(2 * std::min(std::max(x, W(-40)), W(40)));
}

// The query of one row in the form that the inner loops want.
template <bool TANH, class T>
void prepare_query(int64_t A, const T* query, Wide<T>* out) {
#pragma omp simd
  for (int64_t a = 0; a < A; ++a) out[a] = TANH ? bounded_exp2x(wide(query[a])) : wide(query[a]);
}

template <bool TANH, class W>
inline W activation(W p, W q) {
  return TANH ? 1 - 2 / (1 + p * q) : std::max(p + q, W(0));
}

template <bool TANH, class W>
inline W slope(W p, W q) {
  if (!TANH) return p + q > 0 ? W(1) : W(0);
  W y = 1 - 2 / (1 + p * q);
  return 1 - y * y;
}

int64_t count_below(const int64_t* begin, const int64_t* end, int64_t n) {
  return std::lower_bound(begin, end, n) - begin;
}

constexpr int64_t TILE = 4;     // rows, or neighbouring locations, handled together
constexpr int64_t STRIP = 512;  // features of a tile that stay in the first-level cache

// Calls f(integral_constant<int, n>) for n = 1 .. TILE, so that the loops over a tile are unrolled.
template <class F>
void with_constant(int64_t n, F f) {
  if (n == 4) f(std::integral_constant<int, 4>());
  if (n == 3) f(std::integral_constant<int, 3>());
  if (n == 2) f(std::integral_constant<int, 2>());
  if (n == 1) f(std::integral_constant<int, 1>());
}

// out[j][d] = sum over l < real of weight[row[j] L + l] grid[l D + d] for k rows: the grid streams by once.
template <class T>
void weighted_sums(int64_t k, int64_t real, int64_t L, int64_t D, const T* grid, const Wide<T>* weight,
                   const int64_t* row, Wide<T>* out) {
  std::fill_n(out, k * D, Wide<T>(0));
  for (int64_t l = 0; l < real; l += TILE)
    with_constant(std::min(TILE, real - l), [=](auto count) {
      constexpr int P = decltype(count)::value;
      for (int64_t begin = 0; begin < D; begin += STRIP)
        for (int64_t j = 0; j < k; ++j) {
          const int64_t end = std::min(begin + STRIP, D);
          const Wide<T>* w = weight + row[j] * L + l;
#pragma omp simd
          for (int64_t d = begin; d < end; ++d) {
            Wide<T> sum = out[j * D + d];
            for (int p = 0; p < P; ++p) sum += w[p] * wide(grid[(l + p) * D + d]);
            out[j * D + d] = sum;
          }
        }
    });
}

// out[r][p] += grid[p D ...] . x[r D ...] for a tile of R rows and P locations.
template <int R, int P, class T>
void dot_tile(int64_t D, const T* grid, const Wide<T>* x, Wide<T>* const* out) {
  Wide<T> sum[R][P][LANES] = {};
  int64_t d = 0;
  for (; d + LANES <= D; d += LANES)
    for (int p = 0; p < P; ++p)
      for (int r = 0; r < R; ++r)
#pragma omp simd
        for (int64_t i = 0; i < LANES; ++i) sum[r][p][i] += wide(grid[p * D + d + i]) * x[r * D + d + i];
  for (int r = 0; r < R; ++r)
    for (int p = 0; p < P; ++p) {
      Wide<T> total = 0;
      for (int64_t i = 0; i < LANES; ++i) total += sum[r][p][i];
      for (int64_t i = d; i < D; ++i) total += wide(grid[p * D + i]) * x[r * D + i];
      out[r][p] += total;
    }
}

// out[row[j] L + l] += grid[l D ...] . x[j D ...] for k rows and l < real: the grid streams by once.
template <class T>
void dot_products(int64_t k, int64_t real, int64_t L, int64_t D, const T* grid, const Wide<T>* x, const int64_t* row,
                  Wide<T>* out) {
  for (int64_t l = 0; l < real; l += TILE)
    for (int64_t j = 0; j < k; j += TILE) {
      const int64_t rows = std::min(TILE, k - j), locations = std::min(TILE, real - l);
      Wide<T>* to[TILE];
      for (int64_t r = 0; r < rows; ++r) to[r] = out + row[j + r] * L + l;
      with_constant(rows, [&](auto R) {
        with_constant(locations, [&](auto P) {
          dot_tile<decltype(R)::value, decltype(P)::value>(D, grid + l * D, x + j * D, to);
        });
      });
    }
}

template <bool TANH, class T>
void attend(int64_t n, int64_t B, int64_t L, int64_t A, int64_t D, const int64_t* ptr, const int64_t* rows,
            const int64_t* regions, const T* grid, const T* projection, const T* query, int64_t query_stride,
            const T* score, Wide<T>* alpha, T* context, int64_t threads) {
  using W = Wide<T>;
#pragma omp parallel for schedule(dynamic) num_threads(threads)
  for (int64_t b = 0; b < B; ++b) {
    const int64_t* row = rows + ptr[b];
    const int64_t k = count_below(row, rows + ptr[b + 1], n), real = regions ? regions[b] : L;
    if (!k) continue;
    std::vector<W> q(k * A), u(A), sums(k * D);
    for (int64_t a = 0; a < A; ++a) u[a] = wide(score[a]);
    for (int64_t j = 0; j < k; ++j) prepare_query<TANH>(A, query + row[j] * query_stride, &q[j * A]);

    for (int64_t l = 0; l < real; ++l) {
      const T* p = projection + (b * L + l) * A;
      for (int64_t j = 0; j < k; ++j) {
        const W* qj = &q[j * A];
        W e = 0;
#pragma omp simd reduction(+ : e)
        for (int64_t a = 0; a < A; ++a) e += u[a] * activation<TANH>(wide(p[a]), qj[a]);
        alpha[row[j] * L + l] = e;
      }
    }
    for (int64_t j = 0; j < k; ++j) {
      W* e = alpha + row[j] * L;
      const W top = *std::max_element(e, e + real);
      W sum = 0;
#pragma omp simd reduction(+ : sum)
      for (int64_t l = 0; l < real; ++l) sum += e[l] = exponential(e[l] - top);
      for (int64_t l = 0; l < real; ++l) e[l] /= sum;
      std::fill(e + real, e + L, W(0));
    }
    weighted_sums(k, real, L, D, grid + b * L * D, alpha, row, sums.data());
    for (int64_t j = 0; j < k; ++j)
      for (int64_t d = 0; d < D; ++d) narrow(sums[j * D + d], context[row[j] * D + d]);
  }
}

// From d context and d alpha (of the regulariser) to d score and d query of the rows of one step.
template <bool TANH, class T>
void attend_backward(int64_t n, int64_t B, int64_t L, int64_t A, int64_t D, const int64_t* ptr, const int64_t* rows,
                     const int64_t* regions, const T* grid, const T* projection, const T* query, int64_t query_stride,
                     const T* score, const Wide<T>* alpha, const T* grad_context, const Wide<T>* grad_alpha, Wide<T>* grad_scores,
                     T* grad_query, int64_t grad_query_stride, int64_t threads) {
  using W = Wide<T>;
#pragma omp parallel for schedule(dynamic) num_threads(threads)
  for (int64_t b = 0; b < B; ++b) {
    const int64_t* row = rows + ptr[b];
    const int64_t k = count_below(row, rows + ptr[b + 1], n), real = regions ? regions[b] : L;
    if (!k) continue;
    std::vector<W> x(k * D), q(k * A), u(A), sum(k * A, W(0));
    for (int64_t a = 0; a < A; ++a) u[a] = wide(score[a]);
    for (int64_t j = 0; j < k; ++j) {
      prepare_query<TANH>(A, query + row[j] * query_stride, &q[j * A]);
      for (int64_t d = 0; d < D; ++d) x[j * D + d] = wide(grad_context[row[j] * D + d]);
      std::copy_n(grad_alpha + row[j] * L, real, grad_scores + row[j] * L);
      std::fill(grad_scores + row[j] * L + real, grad_scores + (row[j] + 1) * L, W(0));
    }
    dot_products(k, real, L, D, grid + b * L * D, x.data(), row, grad_scores);
    for (int64_t j = 0; j < k; ++j) {  // softmax: d e = alpha (d alpha - sum alpha d alpha)
      const W* al = alpha + row[j] * L;
      W* g = grad_scores + row[j] * L;
      W mean = 0;
      for (int64_t l = 0; l < real; ++l) mean += al[l] * g[l];
      for (int64_t l = 0; l < real; ++l) g[l] = al[l] * (g[l] - mean);
    }
    for (int64_t l = 0; l < real; ++l) {
      const T* p = projection + (b * L + l) * A;
      for (int64_t j = 0; j < k; ++j) {
        const W g = grad_scores[row[j] * L + l];
        const W* qj = &q[j * A];
        W* s = &sum[j * A];
#pragma omp simd
        for (int64_t a = 0; a < A; ++a) s[a] += g * slope<TANH>(wide(p[a]), qj[a]);
      }
    }
    for (int64_t j = 0; j < k; ++j)
      for (int64_t a = 0; a < A; ++a) narrow(sum[j * A + a] * u[a], grad_query[row[j] * grad_query_stride + a]);
  }
}

// After the time loop, all words at once (rows are packed words here): d projection [B, L, A] and, per image, d score
// [B, A].
template <bool TANH, class T>
void attend_backward_shared(int64_t B, int64_t L, int64_t A, const int64_t* ptr, const int64_t* rows,
                            const int64_t* regions, const T* projection, const T* query, int64_t query_stride, const T* score,
                            const Wide<T>* grad_scores, T* grad_projection, Wide<T>* grad_score, int64_t threads) {
  using W = Wide<T>;
#pragma omp parallel for schedule(dynamic) num_threads(threads)
  for (int64_t b = 0; b < B; ++b) {
    const int64_t* row = rows + ptr[b];
    const int64_t k = ptr[b + 1] - ptr[b], real = regions ? regions[b] : L;
    std::vector<W> q(k * A), p(A), sum(A), grad_u(A, W(0));
    for (int64_t j = 0; j < k; ++j) prepare_query<TANH>(A, query + row[j] * query_stride, &q[j * A]);
    for (int64_t l = 0; l < real; ++l) {
      for (int64_t a = 0; a < A; ++a) p[a] = wide(projection[(b * L + l) * A + a]), sum[a] = 0;
      for (int64_t j = 0; j < k; ++j) {
        const W g = grad_scores[row[j] * L + l];
        const W* qj = &q[j * A];
#pragma omp simd
        for (int64_t a = 0; a < A; ++a) {
          sum[a] += g * slope<TANH>(p[a], qj[a]);
          grad_u[a] += g * activation<TANH>(p[a], qj[a]);
        }
      }
      for (int64_t a = 0; a < A; ++a) narrow(sum[a] * wide(score[a]), grad_projection[(b * L + l) * A + a]);
    }
    for (int64_t i = (b * L + real) * A; i < (b + 1) * L * A; ++i) narrow(W(0), grad_projection[i]);
    std::copy(grad_u.begin(), grad_u.end(), grad_score + b * A);
  }
}

// gates [n, 4H] (input, forget, cell, output) = state + word + context parts; leaves their activations in `state`.
template <class T>
void cell(int64_t n, int64_t H, T* state, int64_t state_stride, const T* word, const T* context,
          const Wide<T>* c_before, Wide<T>* c, T* h, int64_t threads) {
  using W = Wide<T>;
#pragma omp parallel for num_threads(threads)
  for (int64_t r = 0; r < n; ++r) {
    T* s = state + r * state_stride;
    const T *w = word + r * 4 * H, *x = context + r * 4 * H;
#pragma omp simd
    for (int64_t j = 0; j < H; ++j) {
      const W i = sigmoid(wide(s[j]) + wide(w[j]) + wide(x[j]));
      const W f = sigmoid(wide(s[H + j]) + wide(w[H + j]) + wide(x[H + j]));
      const W g = tanh_by_exp(wide(s[2 * H + j]) + wide(w[2 * H + j]) + wide(x[2 * H + j]));
      const W o = sigmoid(wide(s[3 * H + j]) + wide(w[3 * H + j]) + wide(x[3 * H + j]));
      const W now = f * c_before[r * H + j] + i * g;
      c[r * H + j] = now;
      narrow(o * tanh_by_exp(now), h[r * H + j]);
      narrow(i, s[j]);
      narrow(f, s[H + j]);
      narrow(g, s[2 * H + j]);
      narrow(o, s[3 * H + j]);
    }
  }
}

// From d h and d c of this step (grad_c: in place to that of the step before) to d gates before their non-linearities.
template <class T>
void cell_backward(int64_t n, int64_t H, const T* activations, int64_t stride, const Wide<T>* c_before,
                   const Wide<T>* c, const Wide<T>* grad_h, Wide<T>* grad_c, T* grad_gates, int64_t grad_stride,
                   int64_t threads) {
  using W = Wide<T>;
#pragma omp parallel for num_threads(threads)
  for (int64_t r = 0; r < n; ++r) {
    const T* s = activations + r * stride;
    T* out = grad_gates + r * grad_stride;
#pragma omp simd
    for (int64_t j = 0; j < H; ++j) {
      const W i = wide(s[j]), f = wide(s[H + j]), g = wide(s[2 * H + j]), o = wide(s[3 * H + j]);
      const W y = tanh_by_exp(c[r * H + j]), dh = grad_h[r * H + j];
      const W dc = grad_c[r * H + j] + dh * o * (1 - y * y);
      narrow(dc * g * i * (1 - i), out[j]);
      narrow(dc * c_before[r * H + j] * f * (1 - f), out[H + j]);
      narrow(dc * i * (1 - g * g), out[2 * H + j]);
      narrow(dh * y * o * (1 - o), out[3 * H + j]);
      grad_c[r * H + j] = dc * f;
    }
  }
}

// Softmax cross-entropy of each row of logits [n, V] + bias against its target: nll, whether the target is the most
// probable, the summed log-probabilities (for label smoothing); logits become d loss / d logits = p - (1 - s) onehot -
// s / V.
template <class T>
void cross_entropy(int64_t n, int64_t V, T* logits, const Wide<T>* bias, const int64_t* targets, double smoothing,
                   Wide<T>* nll, Wide<T>* sum_log_p, bool* correct, int64_t threads) {
  using W = Wide<T>;
#pragma omp parallel for num_threads(threads)
  for (int64_t r = 0; r < n; ++r) {
    T* row = logits + r * V;
    std::vector<W> x(V);
    W top = -std::numeric_limits<W>::infinity(), total = 0, sum = 0;
#pragma omp simd reduction(max : top) reduction(+ : total)
    for (int64_t v = 0; v < V; ++v) {
      x[v] = wide(row[v]) + bias[v];
      top = std::max(top, x[v]);
      total += x[v];
    }
    const W target = x[targets[r]];
#pragma omp simd reduction(+ : sum)
    for (int64_t v = 0; v < V; ++v) sum += x[v] = exponential(x[v] - top);
    const W log_sum = top + std::log(sum), share = W(smoothing) / V;
#pragma omp simd
    for (int64_t v = 0; v < V; ++v) narrow(x[v] / sum - share, row[v]);
    narrow(x[targets[r]] / sum - share - (1 - W(smoothing)), row[targets[r]]);
    nll[r] = log_sum - target;
    sum_log_p[r] = total - V * log_sum;
    correct[r] = target >= top;
  }
}

// The random integer of 16 bits of an element of a row: those of `random_integers` in torch_kernels.py.
inline uint32_t mixed(uint32_t low, uint32_t high, uint32_t count) {
  uint32_t x = low + count * 0x9e3779b9u;
  x = ((x ^ (x >> 16)) * 0x7feb352du) ^ high;
  x = (x ^ (x >> 15)) * 0x846ca68bu;
  return x ^ (x >> 16);
}

// out [n, width] = x with each element dropped whose random integer is below `threshold`, the others scaled.
template <class T>
void dropout(int64_t n, int64_t width, const int64_t* keys, int64_t threshold, double scale, const T* x, T* out,
             int64_t threads) {
  using W = Wide<T>;
  const W kept = W(scale), none = 0;
  const uint32_t least = uint32_t(threshold);
  const int64_t whole = width / (2 * LANES) * (2 * LANES);
#pragma omp parallel for num_threads(threads)
  for (int64_t r = 0; r < n; ++r) {
    const uint32_t low = uint32_t(keys[r]), high = uint32_t(uint64_t(keys[r]) >> 32);
    const T* from = x + r * width;
    T* to = out + r * width;
    for (int64_t begin = 0; begin < whole; begin += 2 * LANES) {
      const uint32_t first = uint32_t(begin / 2);
#pragma omp simd
      for (int64_t l = 0; l < LANES; ++l) {
        const uint32_t bits = mixed(low, high, first + uint32_t(l));
        narrow(wide(from[begin + l]) * ((bits & 0xffff) < least ? none : kept), to[begin + l]);
        narrow(wide(from[begin + LANES + l]) * ((bits >> 16) < least ? none : kept), to[begin + LANES + l]);
      }
    }
    for (int64_t e = whole; e < width; ++e) {
      const uint32_t bits = mixed(low, high, uint32_t(whole / 2 + (e - whole) % LANES));
      const uint32_t mine = e - whole < LANES ? bits & 0xffff : bits >> 16;
      narrow(wide(from[e]) * (mine < least ? none : kept), to[e]);
    }
  }
}

}  // namespace

// Looked up by native.py: pointers to the instances, so that no parameter list is written twice.
#define EXPORT(NAME, T)                                                               \
  extern "C" {                                                                        \
  void* attend_tanh_##NAME = (void*)attend<true, T>;                                  \
  void* attend_relu_##NAME = (void*)attend<false, T>;                                 \
  void* attend_backward_tanh_##NAME = (void*)attend_backward<true, T>;                \
  void* attend_backward_relu_##NAME = (void*)attend_backward<false, T>;               \
  void* attend_backward_shared_tanh_##NAME = (void*)attend_backward_shared<true, T>;  \
  void* attend_backward_shared_relu_##NAME = (void*)attend_backward_shared<false, T>; \
  void* cell_##NAME = (void*)cell<T>;                                                 \
  void* cell_backward_##NAME = (void*)cell_backward<T>;                               \
  void* cross_entropy_##NAME = (void*)cross_entropy<T>;                               \
  void* dropout_##NAME = (void*)dropout<T>;                                           \
  }

EXPORT(float32, float)
EXPORT(float64, double)
EXPORT(bfloat16, bf16)
