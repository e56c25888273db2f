// The parts of the training step that are no matrix product: the LSTM cell, the context's gate, the loss, dropout, and
// attention, which is in attention.h; and products of a few rows, which are in few_rows.h.
//
// Compiled on first use by native.py with -march=native and called through ctypes: plain pointers, no PyTorch headers,
// so building takes seconds. Inner loops are written for the compiler's vectoriser or in its vectors. Every image (or
// row) belongs to one thread and sums run in a fixed order, so results do not depend on the number of threads.
//
// Where `regions` is no null pointer, only the first regions[b] of the L locations of image b are real: the others get no
// attention, pass no gradient and are not looked at.
//
// B images, L locations, D features, A attention width, H LSTM width. T is the type of the matrix products (float,
// double or bf16), W the type of sums (float, or double for double). Rows of an image: rows[ptr[b]] ..
// rows[ptr[b + 1] - 1], ascending; those below n take part.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "attention.h"
#include "few_rows.h"
#include "numbers.h"

namespace {

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

// From the gradient of the gated context, `grad` + `asked` (null: nothing is), to d context [n, D] and that of the
// gate's argument [n, G], G = 0 (no gate), 1 or D; `gate` holds its activations.
template <class T>
void gate_backward(int64_t n, int64_t D, int64_t G, const T* gate, int64_t gate_stride, T* grad_gate,
                   int64_t grad_gate_stride, const T* grad, const T* asked, const T* context, T* out, int64_t threads) {
  using W = Wide<T>;
#pragma omp parallel for num_threads(threads)
  for (int64_t r = 0; r < n; ++r) {
    const T *g = grad + r * D, *more = asked ? asked + r * D : nullptr, *z = context + r * D;
    const T* opened = gate + r * gate_stride;
    T *of_gate = grad_gate + r * grad_gate_stride, *to = out + r * D;
    const W one = G == 1 ? wide(opened[0]) : W(1);
    W sum = 0;
    if (G > 1) {
#pragma omp simd
      for (int64_t d = 0; d < D; ++d) {
        const W dy = more ? wide(g[d]) + wide(more[d]) : wide(g[d]), beta = wide(opened[d]);
        narrow(dy * wide(z[d]) * beta * (1 - beta), of_gate[d]);
        narrow(dy * beta, to[d]);
      }
      continue;
    }
#pragma omp simd reduction(+ : sum)
    for (int64_t d = 0; d < D; ++d) {
      const W dy = more ? wide(g[d]) + wide(more[d]) : wide(g[d]);
      sum += dy * wide(z[d]);
      narrow(dy * one, to[d]);
    }
    if (G) narrow(sum * one * (1 - one), of_gate[0]);
  }
}

// The greatest of n numbers, NaN left out. In vectors, as compilers do not make them of a maximum where NaN may be met.
template <class W>
W greatest(int64_t n, const W* x) {
  W result = std::numeric_limits<W>::lowest();
  Vector<W> top = Vector<W>{} + result;
  int64_t i = 0;
  for (; i + VECTOR<W> <= n; i += VECTOR<W>) top = load(x + i) > top ? load(x + i) : top;
  for (int64_t v = 0; v < VECTOR<W>; ++v) result = std::max(result, W(top[v]));
  for (; i < n; ++i) result = std::max(result, x[i]);
  return result;
}

// Softmax cross-entropy of each row of logits [n, V] + bias against its target: nll, whether the target is the most
// probable, the summed log-probabilities (for label smoothing); logits become d loss / d logits = p - (1 - s) onehot -
// s / V.
template <class T>
void cross_entropy(int64_t n, int64_t V, T* logits, const Wide<T>* bias, const int64_t* targets, double smoothing,
                   Wide<T>* nll, Wide<T>* sum_log_p, bool* correct, int64_t threads) {
  using W = Wide<T>;
  constexpr int64_t BLOCK = 512;
#pragma omp parallel for num_threads(threads)
  for (int64_t r = 0; r < n; ++r) {
    T* row = logits + r * V;
    Scratch<W> x(V);
    W total = 0, sum = 0;
#pragma omp simd reduction(+ : total)
    for (int64_t v = 0; v < V; ++v) total += x[v] = wide(row[v]) + bias[v];
    const W top = greatest(V, x.get()), target = x[targets[r]];
    for (int64_t begin = 0; begin < V; begin += BLOCK) {
      fetch<BLOCK>(row + begin, V);  // the next row's
#pragma omp simd reduction(+ : sum)
      for (int64_t v = begin; v < std::min(begin + BLOCK, V); ++v) sum += x[v] = exponential(x[v] - top);
    }
    const W log_sum = top + std::log(sum), share = W(smoothing) / V, scale = 1 / sum;
#pragma omp simd
    for (int64_t v = 0; v < V; ++v) narrow(x[v] * scale - share, row[v]);
    narrow(x[targets[r]] * scale - share - (1 - W(smoothing)), row[targets[r]]);
    nll[r] = log_sum - target;
    sum_log_p[r] = total - V * log_sum;
    correct[r] = target >= top;
  }
}

// Of each row of logits [n, V] the log-probabilities and ids [n, count] of the most probable words that are not among the
// `blocked`; of equal ones the lower ids count. They come in the order of their ids, -inf and 0 where there are no more,
// and are NaN where the row is not finite. Blocks without a better word than those found so far are passed over.
template <class W>
void best_words(int64_t n, int64_t V, int64_t count, const W* logits, int64_t blocks, const int64_t* blocked, W* values,
                int64_t* ids, int64_t threads) {
  constexpr int64_t BLOCK = 64;
  constexpr W NONE = -std::numeric_limits<W>::infinity();
#pragma omp parallel for num_threads(threads)
  for (int64_t r = 0; r < n; ++r) {
    const W* x = logits + r * V;
    W *value = values + r * count, sum = 0;
    int64_t *id = ids + r * count, found = 0;
    const W top = greatest(V, x);
#pragma omp simd reduction(+ : sum)
    for (int64_t v = 0; v < V; ++v) sum += exponential(x[v] - top);
    for (int64_t begin = 0; begin < V; begin += BLOCK) {
      const int64_t end = std::min(begin + BLOCK, V);
      if (found == count && !(greatest(end - begin, x + begin) > value[count - 1])) continue;
      for (int64_t v = begin; v < end; ++v) {
        if (found == count && !(x[v] > value[count - 1])) continue;
        if (std::find(blocked, blocked + blocks, v) != blocked + blocks) continue;
        int64_t place = found < count ? found++ : count - 1;
        for (; place && value[place - 1] < x[v]; --place) value[place] = value[place - 1], id[place] = id[place - 1];
        value[place] = x[v], id[place] = v;
      }
    }
    const bool finite = top > std::numeric_limits<W>::lowest() && std::isfinite(sum);
    const W log_sum = finite ? std::log(sum) : std::numeric_limits<W>::quiet_NaN();
    for (int64_t i = 0; i < found; ++i) {  // in order of the ids
      const W mine = value[i] - top - log_sum;
      const int64_t word = id[i];
      int64_t place = i;
      for (; place && id[place - 1] > word; --place) value[place] = value[place - 1], id[place] = id[place - 1];
      value[place] = mine, id[place] = word;
    }
    for (int64_t i = found; i < count; ++i) value[i] = NONE, id[i] = 0;
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
  void* gate_backward_##NAME = (void*)gate_backward<T>;                               \
  void* cross_entropy_##NAME = (void*)cross_entropy<T>;                               \
  void* dropout_##NAME = (void*)dropout<T>;                                           \
  void* few_rows_##NAME = (void*)few_rows<T>;                                         \
  void* few_rows_transposed_##NAME = (void*)few_rows_transposed<T>;                   \
  }

extern "C" {
void* best_words_float32 = (void*)best_words<float>;
}
EXPORT(float32, float)
EXPORT(float64, double)
EXPORT(bfloat16, bf16)
