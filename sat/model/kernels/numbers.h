// The numbers of native.cpp: narrow and wide types, and functions that do not keep a loop from being vectorised.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

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
template <class W>
struct VectorOf {
  typedef W type __attribute__((vector_size(VECTOR_BYTES)));
};
template <class W>
using Vector = typename VectorOf<W>::type;
template <class W>
constexpr int64_t VECTOR = VECTOR_BYTES / sizeof(W);

template <class T>
inline Vector<Wide<T>> load(const T* from) {
  typedef uint16_t Half __attribute__((vector_size(VECTOR_BYTES / 2)));
  typedef uint32_t Whole __attribute__((vector_size(VECTOR_BYTES)));
  Vector<Wide<T>> result;
  if constexpr (std::is_same_v<T, bf16>) {
    Half bits;
    std::memcpy(&bits, from, sizeof bits);
    const Whole shifted = __builtin_convertvector(bits, Whole) << 16;
    std::memcpy(&result, &shifted, sizeof result);
  } else {
    std::memcpy(&result, from, sizeof result);
  }
  return result;
}

template <class W>
inline void store(Vector<W> x, W* to) {
  std::memcpy(to, &x, sizeof x);
}

template <class W>
inline int64_t padded(int64_t n) {  // to whole vectors
  return (n + VECTOR<W> - 1) / VECTOR<W> * VECTOR<W>;
}

// exp to about one unit in the last place, without a library call that would keep loops from being vectorised:
// x = n ln 2 + r, exp(x) = 2^n times a polynomial in r (Cephes). Saturates at exp(+-87); NaN stays NaN.
inline float exponential(float x) {
  x = std::min(std::max(x, -87.0f), 87.0f);
  const float n = (x * 1.44269504f + 12582912.0f) - 12582912.0f;  // adding 1.5 * 2^23 rounds to a whole number
  const float r = x - n * 0.693359375f + n * 2.12194440e-4f;
  float y = 1.9875691500e-4f;
  y = y * r + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  y = y * r * r + r + 1;
  const int32_t bits = (int32_t(n) + 127) << 23;
  float power;
  std::memcpy(&power, &bits, 4);
  return y * power;
}
inline double exponential(double x) { return std::exp(x); }

template <class W>
inline W sigmoid(W x) {
  return 1 / (1 + exponential(-x));
}

template <class W>
inline W tanh_by_exp(W x) {  // absolute error of one rounding
  return 1 - 2 / (1 + exponential(2 * x));
}

}  // namespace
