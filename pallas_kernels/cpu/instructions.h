// The instruction sets, least to best: each a namespace that says what its registers are and what
// they can do, and then includes the loops. INSTRUCTIONS is the number of the one to compile, whose
// loops are named by the activations that they take: `for_bfloat16` and `for_float32`.

#pragma once

#include "common.h"

// As `pallas_kernels.cpu.compiler` numbers them.
#define PORTABLE 1
#define AVX2 2
#define AVX2_AMD 3
#define AVX512 4
#define AVX512_BF16 5
#define AMX 6
#define NEON 7

namespace {

// Vectors of FLOATS numbers, as wide as registers are: compilers compare wider ones number by
// number.
#if INSTRUCTIONS == AVX512 || INSTRUCTIONS == AVX512_BF16 || INSTRUCTIONS == AMX
constexpr int FLOATS = 16;
#elif INSTRUCTIONS == AVX2 || INSTRUCTIONS == AVX2_AMD
constexpr int FLOATS = 8;
#else
constexpr int FLOATS = 4;
#endif
typedef float Floats __attribute__((vector_size(FLOATS * 4)));
typedef int32_t Words __attribute__((vector_size(FLOATS * 4)));
typedef uint16_t Halves __attribute__((vector_size(FLOATS * 2)));

#if INSTRUCTIONS == PORTABLE
namespace portable {
#define TARGET
using Activation = float;
typedef float Sum __attribute__((vector_size(16)));
typedef int32_t Bits __attribute__((vector_size(16)));
using Part = Sum;
constexpr int COLUMNS = 8, PARTS = 2, REGISTERS = 16, SUMS = 4, MOST_ROWS = 4;
constexpr int64_t PADDING = 0;
constexpr float UNIT = 1;
constexpr bool UPCASTS_IN_TILES = false;
constexpr Arrange<Activation> ARRANGE = nullptr;
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
template <int COUNT>
ALWAYS_INLINE void totals(const Sum (&s)[COUNT], float (&to)[COUNT]) {
  UNROLL for (int i = 0; i < COUNT; i++) to[i] = (s[i][0] + s[i][2]) + (s[i][1] + s[i][3]);
}
#include "results.inc"
#include "tiles.inc"
#include "attention.inc"
#include "rows.inc"
#undef TARGET
}  // namespace portable
namespace for_bfloat16 = portable;
namespace for_float32 = portable;
#endif

#if INSTRUCTIONS == AVX2 || INSTRUCTIONS == AVX2_AMD
namespace avx2 {
#define TARGET __attribute__((target("avx2,fma,f16c")))
using Activation = float;
using Sum = __m256;
using Part = __m256;
constexpr int COLUMNS = 16, PARTS = 2, REGISTERS = 16, SUMS = 12, MOST_ROWS = 4;
constexpr int64_t PADDING = 0;
constexpr float UNIT = 256;
constexpr bool UPCASTS_IN_TILES = false;
constexpr Arrange<Activation> ARRANGE = nullptr;
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
template <int COUNT>
TARGET ALWAYS_INLINE void totals(const Sum (&s)[COUNT], float (&to)[COUNT]) {
  static_assert(COUNT % 4 == 0);
  UNROLL for (int i = 0; i < COUNT; i += 4) {
    const Sum halves =
        _mm256_hadd_ps(_mm256_hadd_ps(s[i], s[i + 1]), _mm256_hadd_ps(s[i + 2], s[i + 3]));
    _mm_storeu_ps(to + i, _mm_add_ps(_mm256_castps256_ps128(halves),
                                     _mm256_extractf128_ps(halves, 1)));
  }
}
#include "results.inc"
#include "tiles.inc"
#include "attention.inc"
#include "rows.inc"
#undef TARGET
}  // namespace avx2
#endif

#if INSTRUCTIONS == AVX2
namespace for_bfloat16 = avx2;
namespace for_float32 = avx2;
#endif

#if INSTRUCTIONS == AVX2_AMD
// AMD's processors multiply denormal numbers as fast as others. So a code's seven bits of exponent
// and mantissa, moved into a float32, can be multiplied: they are its value / 2^120, of denormal
// codes too. Two or three instructions upcast eight codes; by float16 it takes four or five.
namespace avx2_amd {
#define TARGET __attribute__((target("avx2,fma,f16c")))
using Activation = float;
using Sum = __m256;
using Part = __m256;
constexpr int COLUMNS = 32, PARTS = 4, REGISTERS = 16, SUMS = 12, MOST_ROWS = 4;
constexpr int64_t PADDING = 0;
constexpr float UNIT = 1;  // `arrange` makes up for 2^120
constexpr bool UPCASTS_IN_TILES = true;

// Operand v has the columns v, 4 + v, 8 + v ... 28 + v: the bytes v of eight words of codes.
TARGET ALWAYS_INLINE Part part(const uint8_t* from, int v) {
  const __m256i codes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  const __m256i signs_and_codes = _mm256_srai_epi32(_mm256_slli_epi32(codes, 24 - 8 * v), 4);
  return _mm256_castsi256_ps(_mm256_and_si256(signs_and_codes, _mm256_set1_epi32(0x87f00000)));
}
TARGET ALWAYS_INLINE Part part(const uint16_t* from, int v) {
  const Part first = _mm256_loadu_ps(reinterpret_cast<const float*>(from));
  const Part second = _mm256_loadu_ps(reinterpret_cast<const float*>(from + 16));
  // Columns 0 and 1, 4 and 5 ... or 2 and 3, 6 and 7 ...
  const Part some = v < 2 ? _mm256_shuffle_ps(first, second, 0x88)
                          : _mm256_shuffle_ps(first, second, 0xdd);
  const __m256i pairs = _mm256_permute4x64_epi64(_mm256_castps_si256(some), 0xd8);
  return _mm256_castsi256_ps(v % 2 ? _mm256_and_si256(pairs, _mm256_set1_epi32(0xffff0000))
                                   : _mm256_slli_epi32(pairs, 16));
}
TARGET ALWAYS_INLINE Part load(const float* from) { return _mm256_loadu_ps(from); }
template <class Code>
TARGET ALWAYS_INLINE void load(const Code* from, Part (&to)[PARTS]) {
  UNROLL for (int v = 0; v < PARTS; v++) to[v] = part(from, v);
}
TARGET ALWAYS_INLINE void store(const Part (&from)[PARTS], float* to) {
  UNROLL for (int v = 0; v < PARTS; v++) _mm256_storeu_ps(to + 8 * v, from[v]);
}
// Puts columns in the order of operands. For codes, all values are multiplied by one power of 2, so
// that the largest becomes 2^120 or a little more. Returns what this leaves to do for sums. (The
// power is 2^127 at most, the largest there is, so rows of values below 2^-7 stay smaller.)
TARGET float arrange(float* row, int64_t columns, Format weight_format) {
  float factor = 1, to_undo = 1;
  if (weight_format == Format::codes) {
    __m256i largest = _mm256_setzero_si256();
    for (int64_t column = 0; column < columns; column += 8) {
      const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(row + column));
      largest = _mm256_max_epi32(largest, _mm256_and_si256(bits, _mm256_set1_epi32(INT32_MAX)));
    }
    int32_t lanes[8], exponent = 127 - 7;
    memcpy(lanes, &largest, sizeof(lanes));
    for (const int32_t bits : lanes) exponent = int32_t(at_least(exponent, bits >> 23));
    exponent = int32_t(at_most(exponent, 254));  // of infinity it is 255
    const int32_t bits = exponent << 23, other_bits = (127 + 127 + 120 - exponent) << 23;
    memcpy(&to_undo, &bits, sizeof(to_undo));
    memcpy(&factor, &other_bits, sizeof(factor));
  }
  for (float* to = row; to < row + columns; to += COLUMNS) {
    Part a[PARTS];
    UNROLL for (int i = 0; i < PARTS; i++) a[i] = load(to + 8 * i) * factor;
    // Columns 4 i to 4 i + 3 and 16 + 4 i to 16 + 4 i + 3, four rows to be transposed twice.
    const Part b[] = {_mm256_permute2f128_ps(a[0], a[2], 0x20),
                      _mm256_permute2f128_ps(a[0], a[2], 0x31),
                      _mm256_permute2f128_ps(a[1], a[3], 0x20),
                      _mm256_permute2f128_ps(a[1], a[3], 0x31)};
    const Part low = _mm256_unpacklo_ps(b[0], b[1]), high = _mm256_unpackhi_ps(b[0], b[1]);
    const Part low2 = _mm256_unpacklo_ps(b[2], b[3]), high2 = _mm256_unpackhi_ps(b[2], b[3]);
    const Part parts[] = {_mm256_shuffle_ps(low, low2, 0x44), _mm256_shuffle_ps(low, low2, 0xee),
                          _mm256_shuffle_ps(high, high2, 0x44),
                          _mm256_shuffle_ps(high, high2, 0xee)};
    store(parts, to);
  }
  return to_undo;
}
constexpr Arrange<Activation> ARRANGE = arrange;
using avx2::add_scaled;
using avx2::multiply_add;
using avx2::totals;
using avx2::zero;
#include "results.inc"
#include "tiles.inc"
#undef TARGET
}  // namespace avx2_amd
namespace for_bfloat16 = avx2_amd;
namespace for_float32 = avx2;
#endif

#if INSTRUCTIONS == AVX512 || INSTRUCTIONS == AVX512_BF16 || INSTRUCTIONS == AMX
namespace avx512 {
#define TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")))
using Activation = float;
using Sum = __m512;
using Part = __m512;
constexpr int COLUMNS = 16, PARTS = 1, REGISTERS = 32, SUMS = 24, MOST_ROWS = 4;
constexpr int64_t PADDING = 64;
constexpr float UNIT = 256;
constexpr bool UPCASTS_IN_TILES = false;
constexpr Arrange<Activation> ARRANGE = nullptr;
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
// Where two registers are to become one, what stays where it is gets blended, so that only one of
// two operands has to be moved: moves share their unit with products.
// Quarters [a0, a1, a2, a3] and b: [a0 + a2, a1 + a3, b0 + b2, b1 + b3].
TARGET ALWAYS_INLINE Sum quarters_by_two(Sum a, Sum b) {
  return _mm512_add_ps(_mm512_mask_mov_ps(a, 0xff00, b), _mm512_shuffle_f32x4(a, b, 0x4e));
}
// Of four registers a quarter each, in which four lanes are left to be added.
TARGET ALWAYS_INLINE Sum quarters(Sum a, Sum b, Sum c, Sum d) {
  const Sum ac = quarters_by_two(a, c), bd = quarters_by_two(b, d);
  const Sum moved = _mm512_mask_mov_ps(bd, 0xf0f0, ac);
  return _mm512_add_ps(_mm512_mask_mov_ps(ac, 0xf0f0, bd),
                       _mm512_shuffle_f32x4(moved, moved, 0xb1));
}
// The same for the lanes of each quarter.
TARGET ALWAYS_INLINE Sum lanes_by_two(Sum a, Sum b) {
  return _mm512_add_ps(_mm512_mask_mov_ps(a, 0xcccc, b), _mm512_shuffle_ps(a, b, 0x4e));
}
TARGET ALWAYS_INLINE Sum lanes(Sum a, Sum b, Sum c, Sum d) {
  const Sum ac = lanes_by_two(a, c), bd = lanes_by_two(b, d);
  const Sum moved = _mm512_mask_mov_ps(bd, 0xaaaa, ac);
  return _mm512_add_ps(_mm512_mask_mov_ps(ac, 0xaaaa, bd), _mm512_permute_ps(moved, 0xb1));
}
template <int COUNT>
TARGET ALWAYS_INLINE void totals(const Sum (&s)[COUNT], float (&to)[COUNT]) {
  static_assert(COUNT % 8 == 0);
  constexpr int BY_16 = COUNT / 16 * 16;
  UNROLL for (int i = 0; i < BY_16; i += 16) {
    Sum four[4];
    UNROLL for (int j = 0; j < 4; j++)
      four[j] = quarters(s[i + j], s[i + j + 4], s[i + j + 8], s[i + j + 12]);
    _mm512_storeu_ps(to + i, lanes(four[0], four[1], four[2], four[3]));
  }
  if constexpr (BY_16 < COUNT) {
    Sum two[2];
    UNROLL for (int j = 0; j < 2; j++)
      two[j] = quarters(s[BY_16 + j], s[BY_16 + j + 2], s[BY_16 + j + 4], s[BY_16 + j + 6]);
    const Sum pairs = lanes_by_two(two[0], two[1]);
    const Sum twice = _mm512_add_ps(pairs, _mm512_permute_ps(pairs, 0xb1));
    _mm256_storeu_ps(to + BY_16, _mm512_castps512_ps256(_mm512_maskz_compress_ps(0x5555, twice)));
  }
}
#include "results.inc"
#include "tiles.inc"
#include "attention.inc"
#include "rows.inc"
#undef TARGET
}  // namespace avx512
#endif

#if INSTRUCTIONS == AVX512
namespace for_bfloat16 = avx512;
namespace for_float32 = avx512;
#endif

#if INSTRUCTIONS == AVX512_BF16 || INSTRUCTIONS == AMX
// The two bytes of each magnitude in bfloat16. It has to be looked up: instructions for bfloat16 read
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

// Eight codes each from four places become `low`, and those between them `high`.
#define TARGET __attribute__((target("avx512f,avx512bw,avx512vbmi")))
TARGET ALWAYS_INLINE void upcast(__m512i codes, __m512i& low, __m512i& high) {
  const __m512i lower_bytes = _mm512_permutex2var_epi8(
      _mm512_load_si512(BYTES.low), codes, _mm512_load_si512(BYTES.low + 64));
  const __m512i magnitude = _mm512_permutex2var_epi8(
      _mm512_load_si512(BYTES.high), codes, _mm512_load_si512(BYTES.high + 64));
  const __m512i upper_bytes = _mm512_ternarylogic_epi64(  // magnitude | (codes & sign)
      magnitude, codes, _mm512_set1_epi8(int8_t(0x80)), 0xf8);
  low = _mm512_unpacklo_epi8(lower_bytes, upper_bytes);
  high = _mm512_unpackhi_epi8(lower_bytes, upper_bytes);
}
#undef TARGET
#endif

#if INSTRUCTIONS == AVX512_BF16
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
constexpr bool UPCASTS_IN_TILES = false;
constexpr Arrange<Activation> ARRANGE = nullptr;
TARGET ALWAYS_INLINE void load(const uint8_t* from, Part (&to)[PARTS]) {
  // So ordered, results are in order.
  const __m512i order = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);
  upcast(_mm512_permutexvar_epi64(order, _mm512_loadu_si512(from)), to[0], to[1]);
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
#include "results.inc"
#include "tiles.inc"
#undef TARGET
}  // namespace avx512_bf16
namespace for_bfloat16 = avx512_bf16;
namespace for_float32 = avx512;
#endif

#if INSTRUCTIONS == AMX
namespace amx {
#define TARGET                                                                     \
  __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512bf16," \
                        "avx2,fma,f16c,gfni,amx-tile,amx-bf16")))
using Activation = uint16_t;
using Part = __m512i;
constexpr int COLUMNS = 64, PARTS = 2;
constexpr float UNIT = 1;
constexpr Arrange<Activation> ARRANGE = nullptr;
// The bytes of codes that are not denormal in bfloat16 are products over bits: the lower one is moved
// by four, and of the upper one 60 is added to three bits, whose highest one therefore becomes its own
// place and, inverted, the four below it. Denormal codes and 0 are looked up beside that, since a
// branch for them would often be mispredicted. A table of all codes takes Intel's processors longer.
struct Constants {
  // A byte for each bit of a result, from the highest one: which bits of a code are added to be it.
  __m512i lower = _mm512_set1_epi64(0x0000000001020408);
  __m512i upper = _mm512_set1_epi64(0x1020404040404080);
  __m512i exponent = _mm512_set1_epi8(0x78), sign = _mm512_set1_epi8(int8_t(0x80));
  __m512i low = _mm512_load_si512(BYTES.low), high = _mm512_load_si512(BYTES.high);
  // Once in registers, they stay there.
  TARGET ALWAYS_INLINE Constants() {
    asm("" : "+v"(lower), "+v"(upper), "+v"(exponent), "+v"(sign), "+v"(low), "+v"(high));
  }
};
TARGET ALWAYS_INLINE void load(const uint8_t* from, const Constants& constants,
                               Part (&to)[PARTS]) {
  const __m512i codes = _mm512_loadu_si512(from);
  const __mmask64 is_small = _mm512_testn_epi8_mask(codes, constants.exponent);
  const __m512i lower = _mm512_mask_permutexvar_epi8(
      _mm512_gf2p8affine_epi64_epi8(codes, constants.lower, 0), is_small, codes, constants.low);
  const __m512i magnitude = _mm512_mask_permutexvar_epi8(
      _mm512_gf2p8affine_epi64_epi8(codes, constants.upper, 0x3c), is_small, codes, constants.high);
  const __m512i upper = _mm512_ternarylogic_epi64(  // magnitude | (codes & sign)
      magnitude, codes, constants.sign, 0xf8);
  to[0] = _mm512_unpacklo_epi8(lower, upper);
  to[1] = _mm512_unpackhi_epi8(lower, upper);
}
TARGET ALWAYS_INLINE void load(const uint16_t* from, const Constants&, Part (&to)[PARTS]) {
  to[0] = _mm512_loadu_si512(from), to[1] = _mm512_loadu_si512(from + 32);
}
#include "results.inc"
#include "amx.inc"
#include "amx_attention.inc"
#undef TARGET
}  // namespace amx
namespace for_bfloat16 = amx;
namespace for_float32 = avx512;
#endif

#if INSTRUCTIONS == NEON
// What every 64-bit ARM processor has.
namespace neon {
#define TARGET
using Activation = float;
using Sum = float32x4_t;
using Part = float32x4_t;
constexpr int COLUMNS = 8, PARTS = 2, REGISTERS = 32, SUMS = 16, MOST_ROWS = 8;
constexpr int64_t PADDING = 0;
constexpr float UNIT = 256;
constexpr bool UPCASTS_IN_TILES = false;
constexpr Arrange<Activation> ARRANGE = nullptr;
// By a shift into a float16, as with AVX2.
ALWAYS_INLINE void load(const uint8_t* from, Part (&to)[PARTS]) {
  const int16x8_t shifted = vshll_n_s8(vreinterpret_s8_u8(vld1_u8(from)), 7);
  const int16x8_t bits = vbicq_s16(shifted, vdupq_n_s16(0x4000));
  const float16x8_t halves = vreinterpretq_f16_s16(bits);
  to[0] = vcvt_f32_f16(vget_low_f16(halves));
  to[1] = vcvt_high_f32_f16(halves);
}
ALWAYS_INLINE void load(const uint16_t* from, Part (&to)[PARTS]) {
  const uint16x8_t bits = vld1q_u16(from), zeros = vdupq_n_u16(0);
  to[0] = vreinterpretq_f32_u16(vzip1q_u16(zeros, bits));
  to[1] = vreinterpretq_f32_u16(vzip2q_u16(zeros, bits));
}
ALWAYS_INLINE Part load(const float* from) { return vld1q_f32(from); }
ALWAYS_INLINE void store(const Part (&from)[PARTS], float* to) {
  vst1q_f32(to, from[0]);
  vst1q_f32(to + 4, from[1]);
}
ALWAYS_INLINE Sum zero() { return vdupq_n_f32(0); }
ALWAYS_INLINE Sum multiply_add(Part a, Part b, Sum c) { return vfmaq_f32(c, a, b); }
ALWAYS_INLINE Sum add_scaled(Sum sum, float scale, Sum to) { return vfmaq_n_f32(to, sum, scale); }
template <int COUNT>
ALWAYS_INLINE void totals(const Sum (&s)[COUNT], float (&to)[COUNT]) {
  static_assert(COUNT % 4 == 0);
  UNROLL for (int i = 0; i < COUNT; i += 4)
    vst1q_f32(to + i, vpaddq_f32(vpaddq_f32(s[i], s[i + 1]), vpaddq_f32(s[i + 2], s[i + 3])));
}
#include "results.inc"
#include "tiles.inc"
#include "attention.inc"
#include "rows.inc"
#undef TARGET
}  // namespace neon
namespace for_bfloat16 = neon;
namespace for_float32 = neon;
#endif

}  // namespace
