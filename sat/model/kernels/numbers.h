// The numbers of native.cpp: narrow and wide types, and functions that do not keep a loop from being vectorised.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

constexpr int64_t LANES = 16;  // numbers of a vector register, in float

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
