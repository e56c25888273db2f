// The numbers of native.cpp: narrow and wide types, and functions that do not keep a loop from being vectorised.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

// Of what is handed sums by reference: in a function of its own they would be in memory.
#define INLINE __attribute__((always_inline))

namespace {

constexpr int64_t LANES = 16;  // see `dropout`

struct bf16 {
  uint16_t bits;
};

inline float wide(float x) { return x; }
inline double wide(double x) { return x; }
inline float wide(bf16 x) {
  uint32_t bits = uint32_t(x.bits) << 16;
  float result;
  std::memcpy(&result, &bits, 4);
  return result;
}

inline void narrow(float x, float& out) { out = x; }
inline void narrow(double x, double& out) { out = x; }
inline void narrow(float x, bf16& out) {  // round to nearest even; NaN stays NaN
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  out.bits = x != x ? 0x7fc0 : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}

template <class T>
using Wide = decltype(wide(T()));

// What a vector register holds, and how much it holds.
#if defined(__AVX512F__)
constexpr int64_t VECTOR_BYTES = 64;
#elif defined(__AVX__)
constexpr int64_t VECTOR_BYTES = 32;
#else
constexpr int64_t VECTOR_BYTES = 16;
#endif
template <class W, int64_t BYTES = VECTOR_BYTES>
struct VectorOf {
  typedef W type __attribute__((vector_size(BYTES)));
};
template <class W>
struct VectorOf<W, sizeof(W)> {
  typedef W type;
};
template <class W>
using Vector = typename VectorOf<W>::type;
template <class W>
constexpr int64_t VECTOR = VECTOR_BYTES / sizeof(W);

template <class W>
inline Vector<W> load(const W* from) {
  Vector<W> result;
  std::memcpy(&result, from, sizeof result);
  return result;
}

template <class W>
inline void store(Vector<W> x, W* to) {
  std::memcpy(to, &x, sizeof x);
}

// Has x in a register: compilers would rather load it anew for each of its uses.
template <class V>
inline void keep([[maybe_unused]] V& x) {
#if defined(__AVX512F__)
  asm("" : "+v"(x));
#endif
}

// The sum of a vector's lanes, half by half: one by one, each addition would wait for the one before.
template <class W, int64_t BYTES = VECTOR_BYTES, class V>
inline W sum_of(V x) {
  if constexpr (BYTES == sizeof(W)) {
    return x;
  } else {
    typename VectorOf<W, BYTES / 2>::type half[2];
    std::memcpy(half, &x, sizeof half);
    return sum_of<W, BYTES / 2>(half[0] + half[1]);
  }
}

// Neighbouring numbers in two vectors. Of bf16 these are the even ones and the odd ones, which takes no shuffles: sums
// may come in any order, and `store_pair` puts them back into the first.
template <class W>
struct Pair {
  Vector<W> half[2];
};
template <class W>
constexpr int64_t PAIR = 2 * VECTOR<W>;

inline Vector<uint32_t> rounded(Vector<float> x) {  // as `narrow`, in the upper halves
  const Vector<uint32_t> nan = Vector<uint32_t>{} + 0x7fc00000;
  Vector<uint32_t> bits;
  std::memcpy(&bits, &x, sizeof bits);
  return x != x ? nan : bits + 0x7fff + ((bits >> 16) & 1);
}

template <class T>
inline Vector<Wide<T>> load_half(const T* from, int i) {
  if constexpr (std::is_same_v<T, bf16>) {
    Vector<uint32_t> bits;
    Vector<float> result;
    std::memcpy(&bits, from, sizeof bits);
    bits = i ? bits & 0xffff0000 : bits << 16;
    std::memcpy(&result, &bits, sizeof result);
    return result;
  } else {
    return load(from + i * VECTOR<T>);
  }
}

template <class T>
inline Pair<Wide<T>> load_pair(const T* from) {
  return {{load_half(from, 0), load_half(from, 1)}};
}

template <class T>
inline void store_pair(const Pair<Wide<T>>& x, T* to) {
  if constexpr (std::is_same_v<T, bf16>) {
    const Vector<uint32_t> bits = (rounded(x.half[0]) >> 16) | (rounded(x.half[1]) & 0xffff0000);
    std::memcpy(to, &bits, sizeof bits);
  } else {
    for (int i = 0; i < 2; ++i) store(x.half[i], to + i * VECTOR<T>);
  }
}

// Where the a-th of a row's numbers of type T is among its pairs.
template <class T>
inline int64_t place_in_pairs(int64_t a) {
  constexpr int64_t V = VECTOR<Wide<T>>;
  return std::is_same_v<T, bf16> ? a / (2 * V) * (2 * V) + a % 2 * V + a % (2 * V) / 2 : a;
}

// The same where only n numbers may be left: behind them are zeros.
template <class T>
inline Pair<Wide<T>> load_pair(const T* from, int64_t n) {
  if (n >= PAIR<Wide<T>>) return load_pair(from);
  T some[PAIR<Wide<T>>] = {};
  std::copy_n(from, n, some);
  return load_pair(some);
}

template <class T>
inline void store_pair(const Pair<Wide<T>>& x, T* to, int64_t n) {
  if (n >= PAIR<Wide<T>>) return store_pair(x, to);
  T some[PAIR<Wide<T>>];
  store_pair(x, some);
  std::copy_n(some, n, to);
}

template <class W>
inline int64_t padded(int64_t n) {  // to whole pairs
  return (n + PAIR<W> - 1) / PAIR<W> * PAIR<W>;
}

// Has N numbers that lie `ahead`, if need be behind the end, fetched into the second-level cache.
template <int64_t N, class T>
inline void fetch(const T* from, int64_t ahead) {
  for (int64_t byte = 0; byte < N * int64_t(sizeof(T)); byte += 64)
    __builtin_prefetch(reinterpret_cast<const char*>(from + ahead) + byte, 0, 2);
}

template <class W>
inline Vector<W> clamped(Vector<W> x, W most) {  // NaN stays NaN
  const Vector<W> top = Vector<W>{} + most;
  x = x < -top ? -top : x;
  return x > top ? top : x;
}

// exp to about one unit in the last place, without a library call that would keep loops from being vectorised:
// x = n ln 2 + r, exp(x) = 2^n times a polynomial in r (Cephes). Saturates at exp(+-87); NaN stays NaN. X is float with
// unsigned integers U, or vectors of both.
template <class X, class U>
inline X exponential_of(X x) {
  const X most = X{} + 87.0f, least = -most;
  x = x < least ? least : x;
  x = x > most ? most : x;
  const X shifted = x * 1.44269504f + 12582912.0f, n = shifted - 12582912.0f;  // 1.5 * 2^23 rounds to a whole number
  const X r = x - n * 0.693359375f + n * 2.12194440e-4f;
  X y = r * 1.9875691500e-4f + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  y = y * r * r + r + 1.0f;
  U bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  bits = (bits + 127) << 23;  // of what was added for rounding nothing is left
  X power;
  std::memcpy(&power, &bits, sizeof power);
  return y * power;
}
inline float exponential(float x) { return exponential_of<float, uint32_t>(x); }
inline double exponential(double x) { return std::exp(x); }
inline Vector<float> exponential(Vector<float> x) { return exponential_of<Vector<float>, Vector<uint32_t>>(x); }
inline Vector<double> exponential(Vector<double> x) {
  for (int64_t i = 0; i < VECTOR<double>; ++i) x[i] = std::exp(x[i]);
  return x;
}

// Of a number or a vector.
template <class X>
inline X sigmoid(X x) {
  return 1 / (1 + exponential(-x));
}

template <class X>
inline X tanh_by_exp(X x) {  // absolute error of one rounding
  return 1 - 2 / (1 + exponential(2 * x));
}

}  // namespace
