// The instruction sets, least to best: each a namespace that says what its registers are and what
// they can do, and then includes the loops.

#pragma once

#include "common.h"

namespace {

namespace portable {
#define TARGET
using Activation = float;
typedef float Sum __attribute__((vector_size(16)));
typedef int32_t Bits __attribute__((vector_size(16)));
using Part = Sum;
constexpr int COLUMNS = 8, PARTS = 2, REGISTERS = 16, SUMS = 4, MOST_ROWS = 4;
constexpr int64_t PADDING = 0;
constexpr float UNIT = 1;
ALWAYS_INLINE Part upcast(const uint8_t* from) {
  typedef uint8_t Codes __attribute__((vector_size(4)));
  Codes codes;
  memcpy(&codes, from, 4);
  const Bits bits = __builtin_convertvector(codes, Bits), magnitude = bits & 127;
  const Bits normal = (magnitude << 20) + (120 << 23);
  // A denormal code counts 2^-9.
  const Part denormal = __builtin_convertvector(magnitude, Part) * 0x1p-9f;
  const Bits is_denormal = magnitude < 8;
  return (Part)((is_denormal & (Bits)denormal) | (~is_denormal & normal) | (bits & 128) << 24);
}
ALWAYS_INLINE void load(const uint8_t* from, Part (&to)[PARTS]) {
  to[0] = upcast(from);
  to[1] = upcast(from + 4);
}
ALWAYS_INLINE void load(const uint16_t* from, Part (&to)[PARTS]) {
  typedef uint16_t Halves __attribute__((vector_size(8)));
  for (int v = 0; v < PARTS; v++) {
    Halves halves;
    memcpy(&halves, from + 4 * v, 8);
    to[v] = (Part)(__builtin_convertvector(halves, Bits) << 16);
  }
}
ALWAYS_INLINE Part load(const float* from) {
  Part to;
  memcpy(&to, from, sizeof(to));
  return to;
}
ALWAYS_INLINE void store(const Part (&from)[PARTS], float* to) { memcpy(to, from, sizeof(from)); }
ALWAYS_INLINE Sum zero() { return Sum{}; }
ALWAYS_INLINE Sum multiply_add(Part a, Part b, Sum c) { return a * b + c; }
ALWAYS_INLINE Sum add_scaled(Sum sum, float scale, Sum to) { return sum * scale + to; }
constexpr int TOTALS = 1;
ALWAYS_INLINE void totals(const Sum (&s)[TOTALS], float* to) {
  to[0] = (s[0][0] + s[0][2]) + (s[0][1] + s[0][3]);
}
#include "tiles.inc"
#include "attention.inc"
#undef TARGET
}  // namespace portable

#if defined(__x86_64__)

namespace avx2 {
#define TARGET __attribute__((target("avx2,fma,f16c")))
using Activation = float;
using Sum = __m256;
using Part = __m256;
constexpr int COLUMNS = 16, PARTS = 2, REGISTERS = 16, SUMS = 12, MOST_ROWS = 4;
constexpr int64_t PADDING = 0;
constexpr float UNIT = 256;
// A code's seven bits of exponent and mantissa, moved into a float16, are its value / 256, of
// denormal codes too.
TARGET ALWAYS_INLINE void load(const uint8_t* from, Part (&to)[PARTS]) {
  const __m128i codes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  const __m256i shifted = _mm256_slli_epi16(_mm256_cvtepi8_epi16(codes), 7);
  const __m256i halves = _mm256_and_si256(shifted, _mm256_set1_epi16(int16_t(0xbfff)));
  to[0] = _mm256_cvtph_ps(_mm256_castsi256_si128(halves));
  to[1] = _mm256_cvtph_ps(_mm256_extracti128_si256(halves, 1));
}
TARGET ALWAYS_INLINE void load(const uint16_t* from, Part (&to)[PARTS]) {
  for (int v = 0; v < PARTS; v++) {
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + 8 * v));
    to[v] = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
  }
}
TARGET ALWAYS_INLINE Part load(const float* from) { return _mm256_loadu_ps(from); }
TARGET ALWAYS_INLINE void store(const Part (&from)[PARTS], float* to) {
  _mm256_storeu_ps(to, from[0]);
  _mm256_storeu_ps(to + 8, from[1]);
}
TARGET ALWAYS_INLINE Sum zero() { return _mm256_setzero_ps(); }
TARGET ALWAYS_INLINE Sum multiply_add(Part a, Part b, Sum c) { return _mm256_fmadd_ps(a, b, c); }
TARGET ALWAYS_INLINE Sum add_scaled(Sum sum, float scale, Sum to) {
  return _mm256_fmadd_ps(sum, _mm256_set1_ps(scale), to);
}
constexpr int TOTALS = 1;
TARGET ALWAYS_INLINE void totals(const Sum (&s)[TOTALS], float* to) {
  __m128 four = _mm_add_ps(_mm256_castps256_ps128(s[0]), _mm256_extractf128_ps(s[0], 1));
  four = _mm_add_ps(four, _mm_movehl_ps(four, four));
  to[0] = _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
}
#include "tiles.inc"
#include "attention.inc"
#undef TARGET
}  // namespace avx2

namespace avx512 {
#define TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")))
using Activation = float;
using Sum = __m512;
using Part = __m512;
constexpr int COLUMNS = 16, PARTS = 1, REGISTERS = 32, SUMS = 24, MOST_ROWS = 4;
constexpr int64_t PADDING = 64;
constexpr float UNIT = 256;
TARGET ALWAYS_INLINE void load(const uint8_t* from, Part (&to)[PARTS]) {
  const __m128i codes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  const __m256i shifted = _mm256_slli_epi16(_mm256_cvtepi8_epi16(codes), 7);
  to[0] = _mm512_cvtph_ps(_mm256_and_si256(shifted, _mm256_set1_epi16(int16_t(0xbfff))));
}
TARGET ALWAYS_INLINE void load(const uint16_t* from, Part (&to)[PARTS]) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  to[0] = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
TARGET ALWAYS_INLINE Part load(const float* from) { return _mm512_loadu_ps(from); }
TARGET ALWAYS_INLINE void store(const Part (&from)[PARTS], float* to) {
  _mm512_storeu_ps(to, from[0]);
}
TARGET ALWAYS_INLINE Sum zero() { return _mm512_setzero_ps(); }
TARGET ALWAYS_INLINE Sum multiply_add(Part a, Part b, Sum c) { return _mm512_fmadd_ps(a, b, c); }
TARGET ALWAYS_INLINE Sum add_scaled(Sum sum, float scale, Sum to) {
  return _mm512_fmadd_ps(sum, _mm512_set1_ps(scale), to);
}
// [a, b, c, d]: a quarter of the result each, the sums of four lanes each.
TARGET ALWAYS_INLINE Sum quarters(Sum a, Sum b, Sum c, Sum d) {
  const Sum ab =
      _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
  const Sum cd =
      _mm512_add_ps(_mm512_shuffle_f32x4(c, d, 0x44), _mm512_shuffle_f32x4(c, d, 0xee));
  return _mm512_add_ps(_mm512_shuffle_f32x4(ab, cd, 0x88), _mm512_shuffle_f32x4(ab, cd, 0xdd));
}
TARGET ALWAYS_INLINE Sum halves(Sum a, Sum b) {
  return _mm512_add_ps(_mm512_shuffle_ps(a, b, 0x44), _mm512_shuffle_ps(a, b, 0xee));
}
// The lanes of 16 registers are added together, by halves: 45 instructions for 16 results.
constexpr int TOTALS = 16;
TARGET ALWAYS_INLINE void totals(const Sum (&s)[TOTALS], float* to) {
  const Sum ab = halves(quarters(s[0], s[4], s[8], s[12]), quarters(s[1], s[5], s[9], s[13]));
  const Sum cd = halves(quarters(s[2], s[6], s[10], s[14]), quarters(s[3], s[7], s[11], s[15]));
  _mm512_storeu_ps(
      to, _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x88), _mm512_shuffle_ps(ab, cd, 0xdd)));
}
#include "tiles.inc"
#include "attention.inc"
#undef TARGET
}  // namespace avx512

namespace avx512_bf16 {
#define TARGET                                                                     \
  __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512bf16," \
                        "avx2,fma,f16c")))
using Activation = uint16_t;
using Sum = __m512;
using Part = __m512i;
constexpr int COLUMNS = 64, PARTS = 2, REGISTERS = 32, SUMS = 24, MOST_ROWS = 8;
constexpr int64_t PADDING = 64;
constexpr float UNIT = 1;

// The two bytes of each magnitude in bfloat16. It has to be looked up: these instructions read
// denormal numbers, which moved bits would be, as 0.
struct Bytes {
  alignas(64) uint8_t low[128], high[128];
  constexpr Bytes() : low(), high() {
    for (int code = 0; code < 128; code++) {
      float value = MAGNITUDES.values[code];
      int exponent = value ? 127 : 0;
      for (; value && value < 1; exponent--) value *= 2;
      for (; value >= 2; exponent++) value /= 2;
      const int mantissa = value ? int((value - 1) * 128) : 0;
      low[code] = uint8_t((exponent & 1) << 7 | mantissa);
      high[code] = uint8_t(exponent >> 1);
    }
  }
};
constexpr Bytes BYTES;

TARGET ALWAYS_INLINE void load(const uint8_t* from, Part (&to)[PARTS]) {
  // Unpacking takes eight bytes each from four places; so ordered, results are in order.
  const __m512i order = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);
  const __m512i codes = _mm512_permutexvar_epi64(order, _mm512_loadu_si512(from));
  const __m512i low = _mm512_permutex2var_epi8(
      _mm512_load_si512(BYTES.low), codes, _mm512_load_si512(BYTES.low + 64));
  const __m512i magnitude = _mm512_permutex2var_epi8(
      _mm512_load_si512(BYTES.high), codes, _mm512_load_si512(BYTES.high + 64));
  const __m512i high = _mm512_ternarylogic_epi64(  // magnitude | (codes & sign)
      magnitude, codes, _mm512_set1_epi8(int8_t(0x80)), 0xf8);
  to[0] = _mm512_unpacklo_epi8(low, high);
  to[1] = _mm512_unpackhi_epi8(low, high);
}
TARGET ALWAYS_INLINE Part load(const uint16_t* from) { return _mm512_loadu_si512(from); }
TARGET ALWAYS_INLINE void store(const Part (&from)[PARTS], uint16_t* to) {
  _mm512_storeu_si512(to, from[0]);
  _mm512_storeu_si512(to + 32, from[1]);
}
TARGET ALWAYS_INLINE Sum zero() { return _mm512_setzero_ps(); }
TARGET ALWAYS_INLINE Sum multiply_add(Part a, Part b, Sum c) {
  return _mm512_dpbf16_ps(c, (__m512bh)a, (__m512bh)b);
}
TARGET ALWAYS_INLINE Sum add_scaled(Sum sum, float scale, Sum to) {
  return _mm512_fmadd_ps(sum, _mm512_set1_ps(scale), to);
}
using avx512::totals;
using avx512::TOTALS;
#include "tiles.inc"
#undef TARGET
}  // namespace avx512_bf16

#endif  // __x86_64__

// From the least to the best, as `pallas_kernels.cpu.library` numbers them.
enum Instructions : int64_t { BEST, PORTABLE, AVX2, AVX512, AVX512_BF16 };

std::atomic<int64_t> limit{AVX512_BF16};

Instructions best_instructions() {
  Instructions best = PORTABLE;
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("f16c")) {
    best = AVX2;
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
      best = AVX512;
      if (__builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512bf16"))
        best = AVX512_BF16;
    }
  }
#endif
  return best <= limit.load() ? best : Instructions(limit.load());
}

}  // namespace
