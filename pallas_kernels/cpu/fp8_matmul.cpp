// x @ weight.T for weights of float8_e4m3fn codes, or bfloat16, as a custom call of XLA on a CPU.
//
// Codes are widened in registers, so that a weight costs one byte of memory traffic. The work is
// divided by rows of the weight over XLA's own threads. tiles.inc has the loops; here stand what
// the instruction sets are, the division over threads, and what XLA calls.

#include <atomic>
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <vector>

#include "xla/ffi/api/ffi.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

namespace ffi = xla::ffi;

#define ALWAYS_INLINE inline __attribute__((always_inline))
#define NEVER_INLINE __attribute__((noinline))
#if defined(__clang__)
#define UNROLL _Pragma("unroll")
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif

enum class Format { codes, bfloat16, float32 };

// y [m, n] = x [m, k] @ weight [n, k].T. A scale belongs to 2^`row_shift` rows of the weight and
// `run_columns` of its columns, the last ones perhaps fewer; `runs` scales lie beside each other.
// Without scales `scale` is null and there is one run.
struct Product {
  int64_t m, n, k;
  const void* w;
  Format weight;
  const float* scale;
  int64_t row_shift, run_columns, runs;
  float* y;

  float scale_of(int64_t row, int64_t run) const { return scale[(row >> row_shift) * runs + run]; }
};

// Rows of x; behind each, up to a multiple of MAX_COLUMNS, lie zeros.
template <class T>
struct Rows {
  const T* data;
  int64_t stride;
};

// Of all instruction sets, the most columns of a step, and the most rows of a weight in a tile.
constexpr int64_t MAX_COLUMNS = 64, MIN_ROWS = 8;
// Of all whose activations are float32, the most columns of a step: heads are multiples of it.
constexpr int64_t HEAD_GRANULE = 16;
// For more rows of x, weights are widened once for all of them.
constexpr int64_t FEW_ROWS = 16;
// Of widened weights, and of x beside them: both stay in a core's level-2 cache.
constexpr int64_t PANEL_BYTES = 256 << 10;
// Of the weight, that a thread takes at a time: its rows a multiple of those of most tiles.
constexpr int64_t CHUNK_BYTES = 128 << 10, CHUNK_ROWS = 24;
// Where `__builtin_prefetch` puts what it fetches. From memory into level 1 a core reads half as
// fast.
constexpr int LEVEL_1 = 3, LEVEL_2 = 2, LINE = 64;
// Of x, that a thread copies at a time.
constexpr int64_t COPIED_ROWS = 32;

constexpr int64_t at_least(int64_t least, int64_t value) { return value < least ? least : value; }
constexpr int64_t at_most(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t round_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

inline void pause() {
#if defined(__x86_64__)
  _mm_pause();
#endif
}

// Memory of this thread, for as long as it lives: fresh memory would have to be paged in.
void* panel_buffer(size_t bytes) {
  thread_local std::vector<char> buffer;
  if (buffer.size() < bytes + 64) buffer.resize(bytes + 64);
  return reinterpret_cast<void*>(round_up(reinterpret_cast<intptr_t>(buffer.data()), 64));
}

inline float from_bfloat16(uint16_t bits) {
  uint32_t wide = uint32_t(bits) << 16;
  float value;
  memcpy(&value, &wide, 4);
  return value;
}

inline uint16_t to_bfloat16(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  if (value != value) return uint16_t(bits >> 16 | 0x40);
  return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// Queries [batch, tokens, heads, head_dim] over pages [pages, page_size, kv_heads, head_dim] of keys
// and values; see `paged_attention`.
struct Attention {
  int64_t batch, tokens, heads, head_dim, pages, page_size, kv_heads, pages_per_row;
  const void *q, *k, *v;
  Format q_format, kv_format;
  const int32_t *page_table, *cached_lens, *kv_lens;
  float k_scale, v_scale, softmax_scale;
  void* y;

  float query(int64_t i) const {
    return q_format == Format::float32 ? static_cast<const float*>(q)[i]
                                       : from_bfloat16(static_cast<const uint16_t*>(q)[i]);
  }
  void put(int64_t i, float value) const {
    if (q_format == Format::float32)
      static_cast<float*>(y)[i] = value;
    else
      static_cast<uint16_t*>(y)[i] = to_bfloat16(value);
  }
  // Where the key of a position lies. A page that does not exist reads as the last one.
  int64_t key(int64_t sequence, int64_t kv_head, int64_t position) const {
    const int64_t page = page_table[sequence * pages_per_row + position / page_size];
    const int64_t there = at_least(0, at_most(page, pages - 1));
    return ((there * page_size + position % page_size) * kv_heads + kv_head) * head_dim;
  }
};

// The values of the codes 0 to 127, float8_e4m3fn; 127, NaN, which no weight has, reads as 480.
struct Magnitudes {
  float values[128];
  constexpr Magnitudes() : values() {
    for (int code = 0; code < 128; code++) {
      const int exponent = code >> 3, mantissa = code & 7;
      float value = exponent ? 8 + mantissa : mantissa;
      for (int e = exponent ? exponent : 1; e < 10; e++) value /= 2;
      for (int e = 10; e < exponent; e++) value *= 2;
      values[code] = value;
    }
  }
};
constexpr Magnitudes MAGNITUDES;

namespace portable {
#define TARGET
using Activation = float;
typedef float Sum __attribute__((vector_size(16)));
typedef int32_t Bits __attribute__((vector_size(16)));
using Part = Sum;
constexpr int COLUMNS = 8, PARTS = 2, REGISTERS = 16, SUMS = 4, MOST_ROWS = 4;
constexpr int64_t PADDING = 0;
constexpr float UNIT = 1;
ALWAYS_INLINE Part widened(const uint8_t* from) {
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
  to[0] = widened(from);
  to[1] = widened(from + 4);
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

// Denormal numbers count while it lives, and are rounded to nearest: XLA's threads flush them.
struct ExactDenormals {
#if defined(__x86_64__)
  const unsigned before = _mm_getcsr();
  ExactDenormals() { _mm_setcsr(0x1f80); }
  ~ExactDenormals() { _mm_setcsr(before); }
#endif
};

// work(0) to work(count - 1), on this thread and on those of the pool that have time. A thread
// that comes when nothing is left sees `State` alone, which lives until the last one has come.
template <class Work>
void in_parallel(ffi::ThreadPool& pool, int64_t count, const Work& work) {
  struct State {
    std::atomic<int64_t> next{0}, done{0};
    std::mutex mutex;
    std::condition_variable finished;
  };
  auto state = std::make_shared<State>();
  auto run = [state, count, work = &work] {
    const ExactDenormals scope;
    for (int64_t i; (i = state->next.fetch_add(1)) < count;) {
      (*work)(i);
      if (state->done.fetch_add(1) + 1 == count) {
        const std::lock_guard<std::mutex> lock(state->mutex);
        state->finished.notify_all();
      }
    }
  };
  const int64_t threads = at_most(pool.num_threads(), count);
  for (int64_t i = 1; i < threads; i++) pool.Schedule(decltype(run)(run));
  run();
  // What others have begun takes no longer than it takes to fall asleep.
  for (int i = 0; i < 20000 && state->done.load() < count; i++) pause();
  std::unique_lock<std::mutex> lock(state->mutex);
  state->finished.wait(lock, [&] { return state->done.load() == count; });
}

// x as the loops read it: in place if its type is theirs and nothing is needed behind its rows.
template <class Activation>
struct Copy {
  std::unique_ptr<void, void (*)(void*)> memory{nullptr, free};
  Rows<Activation> rows{nullptr, 0};

  // False if there is no memory.
  bool make(ffi::ThreadPool& pool, const void* x, Format format, int64_t m, int64_t k,
            int64_t padding) {
    const bool is_same = (format == Format::bfloat16) == (sizeof(Activation) == 2);
    rows = {static_cast<const Activation*>(x), k};
    if (is_same && k % MAX_COLUMNS == 0 && (padding == 0 || m <= FEW_ROWS)) return true;
    rows.stride = round_up(k, MAX_COLUMNS) + padding;
    memory.reset(aligned_alloc(64, m * rows.stride * sizeof(Activation)));
    Activation* to = static_cast<Activation*>(memory.get());
    if (!to) return false;
    in_parallel(pool, (m + COPIED_ROWS - 1) / COPIED_ROWS, [&](int64_t part) {
      for (int64_t i = part * COPIED_ROWS; i < at_most(m, (part + 1) * COPIED_ROWS); i++) {
        Activation* row = to + i * rows.stride;
        if (is_same)
          memcpy(row, static_cast<const Activation*>(x) + i * k, k * sizeof(Activation));
        else
          for (int64_t j = 0; j < k; j++)
            row[j] = Activation(from_bfloat16(static_cast<const uint16_t*>(x)[i * k + j]));
        memset(row + k, 0, (rows.stride - k) * sizeof(Activation));
      }
    });
    rows.data = to;
    return true;
  }
};

// Some rows of a product's weight, with all rows of x.
template <class Activation>
using Loops = void (*)(const Product&, const Rows<Activation>&, int64_t begin, int64_t end);

template <class Activation>
ffi::Error multiply(ffi::ThreadPool& pool, const std::vector<Product>& products, const void* x,
                    Format format, int64_t padding, Loops<Activation> of_codes,
                    Loops<Activation> of_bfloat16) {
  Copy<Activation> copy;
  if (!copy.make(pool, x, format, products[0].m, products[0].k, padding))
    return ffi::Error(ffi::ErrorCode::kResourceExhausted, "no memory for a copy of x");
  struct Chunk {
    const Product& product;
    int64_t begin, end;
  };
  std::vector<Chunk> chunks;
  for (const Product& p : products) {
    const int64_t row_bytes = p.k * (p.weight == Format::codes ? 1 : 2);
    const int64_t rows = at_least(CHUNK_ROWS, CHUNK_BYTES / row_bytes / CHUNK_ROWS * CHUNK_ROWS);
    for (int64_t begin = 0, end; begin < p.n; begin = end) {
      end = p.n - begin < rows + MIN_ROWS ? p.n : begin + rows;
      chunks.push_back({p, begin, end});
    }
  }
  in_parallel(pool, int64_t(chunks.size()), [&](int64_t i) {
    const Chunk& c = chunks[i];
    const auto loops = c.product.weight == Format::codes ? of_codes : of_bfloat16;
    loops(c.product, copy.rows, c.begin, c.end);
  });
  return ffi::Error::Success();
}

#define WITH(set)                                                                    \
  multiply<set::Activation>(pool, products, x.untyped_data(), format, set::PADDING,  \
                            set::rows_of_weight<uint8_t>, set::rows_of_weight<uint16_t>)

// operands: a weight and its scales for each result. scale_rows, scale_columns: how much of a
// weight one scale is for.
ffi::Error call(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::RemainingArgs operands,
                ffi::RemainingRets results, int64_t scale_rows, int64_t scale_columns,
                int64_t instructions) {
  std::vector<Product> products;
  const bool in_bf16 = x.element_type() == ffi::DataType::BF16;
  const Format format = in_bf16 ? Format::bfloat16 : Format::float32;
  bool is_valid = x.dimensions().size() == 2 && operands.size() == 2 * results.size() &&
                  results.size() && scale_rows > 0 && (scale_rows & (scale_rows - 1)) == 0 &&
                  scale_columns > 0 &&
                  (in_bf16 || x.element_type() == ffi::DataType::F32);
  for (size_t i = 0; is_valid && i < results.size(); i++) {
    const auto w = operands.get<ffi::AnyBuffer>(2 * i), s = operands.get<ffi::AnyBuffer>(2 * i + 1);
    const auto y = results.get<ffi::AnyBuffer>(i);
    Product p{};
    p.m = x.dimensions()[0], p.k = x.dimensions()[1];
    p.n = w->dimensions().size() == 2 ? w->dimensions()[0] : 0;
    p.w = w->untyped_data();
    p.weight = w->element_type() == ffi::DataType::BF16 ? Format::bfloat16 : Format::codes;
    p.y = static_cast<float*>((*y)->untyped_data());
    p.runs = 1, p.run_columns = p.k;
    int64_t scales = 0;
    if (s->element_count()) {
      p.scale = static_cast<const float*>(s->untyped_data());
      p.row_shift = __builtin_ctzll(scale_rows), p.run_columns = scale_columns;
      p.runs = (p.k + scale_columns - 1) / scale_columns;
      scales = (p.n + scale_rows - 1) / scale_rows * p.runs;
    }
    is_valid = p.n >= MIN_ROWS && p.m > 0 && p.k > 0 && w->element_count() == size_t(p.n * p.k) &&
               s->element_count() == size_t(scales) && s->element_type() == ffi::DataType::F32 &&
               (*y)->element_count() == size_t(p.m * p.n) &&
               (*y)->element_type() == ffi::DataType::F32 &&
               (p.weight == Format::bfloat16 || w->size_bytes() == w->element_count()) &&
               (p.runs == 1 || p.run_columns % MAX_COLUMNS == 0);
    products.push_back(p);
  }
  const Instructions best = best_instructions();
  if (!is_valid || instructions < BEST || instructions > best)
    return ffi::Error(ffi::ErrorCode::kInvalidArgument,
                      "fp8_matmul_cpu: operands or instructions are not what is understood here");
  switch (instructions == BEST ? best : instructions) {
#if defined(__x86_64__)
    case AVX512_BF16: return in_bf16 ? WITH(avx512_bf16) : WITH(avx512);
    case AVX512: return WITH(avx512);
    case AVX2: return WITH(avx2);
#endif
    default: return WITH(portable);
  }
}

// Which numbers a buffer holds, if the kernels know them.
bool format_of(ffi::AnyBuffer buffer, Format& format) {
  switch (buffer.element_type()) {
    case ffi::DataType::F32: format = Format::float32; return true;
    case ffi::DataType::BF16: format = Format::bfloat16; return true;
    case ffi::DataType::S8:
    case ffi::DataType::F8E4M3FN: format = Format::codes; return true;
    default: return false;
  }
}

ffi::Error attention(ffi::ThreadPool pool, ffi::AnyBuffer q, ffi::AnyBuffer k, ffi::AnyBuffer v,
                     ffi::Buffer<ffi::S32> page_table, ffi::Buffer<ffi::S32> cached_lens,
                     ffi::Buffer<ffi::S32> kv_lens, ffi::Buffer<ffi::F32> scales,
                     ffi::Result<ffi::AnyBuffer> y, int64_t instructions) {
  Attention a{};
  const auto of_q = q.dimensions(), of_k = k.dimensions(), of_table = page_table.dimensions();
  bool is_valid = of_q.size() == 4 && of_k.size() == 4 && of_table.size() == 2 &&
                  format_of(q, a.q_format) && format_of(k, a.kv_format) &&
                  a.q_format != Format::codes && v.element_type() == k.element_type() &&
                  v.element_count() == k.element_count() && y->element_type() == q.element_type() &&
                  y->element_count() == q.element_count() && scales.element_count() == 2;
  const Instructions best = best_instructions();
  is_valid = is_valid && instructions >= BEST && instructions <= best;
  if (is_valid) {
    a.batch = of_q[0], a.tokens = of_q[1], a.heads = of_q[2], a.head_dim = of_q[3];
    a.pages = of_k[0], a.page_size = of_k[1], a.kv_heads = of_k[2];
    a.pages_per_row = of_table[1];
    is_valid = q.element_count() > 0 && k.element_count() > 0 && a.heads % a.kv_heads == 0 &&
               of_k[3] == a.head_dim && a.head_dim % HEAD_GRANULE == 0 && of_table[0] == a.batch &&
               cached_lens.element_count() == size_t(a.batch) &&
               kv_lens.element_count() == size_t(a.batch);
  }
  if (!is_valid)
    return ffi::Error(ffi::ErrorCode::kInvalidArgument,
                      "paged_attention_cpu: operands or instructions are not what is understood here");
  a.q = q.untyped_data(), a.k = k.untyped_data(), a.v = v.untyped_data(), a.y = y->untyped_data();
  a.page_table = page_table.typed_data();
  a.cached_lens = cached_lens.typed_data(), a.kv_lens = kv_lens.typed_data();
  a.k_scale = scales.typed_data()[0], a.v_scale = scales.typed_data()[1];
  a.softmax_scale = 1 / std::sqrt(float(a.head_dim));

  using Loop = void (*)(const Attention&, int64_t, int64_t, int64_t);
  const auto of = [&](Loop codes, Loop bfloat16, Loop float32) {
    return a.kv_format == Format::codes      ? codes
           : a.kv_format == Format::bfloat16 ? bfloat16
                                             : float32;
  };
#define ATTEND(set) of(set::attend<uint8_t>, set::attend<uint16_t>, set::attend<float>)
  Loop attend = ATTEND(portable);
  int64_t queries = portable::QUERIES;
#if defined(__x86_64__)
  const int64_t which = instructions == BEST ? best : instructions;
  if (which >= AVX512)
    attend = ATTEND(avx512);
  else if (which == AVX2)
    attend = ATTEND(avx2);
#endif
  const int64_t blocks = (a.tokens * (a.heads / a.kv_heads) + queries - 1) / queries;
  // The last blocks, which see most keys, come first.
  in_parallel(pool, a.batch * a.kv_heads * blocks, [&](int64_t i) {
    const int64_t block = blocks - 1 - i / (a.batch * a.kv_heads);
    attend(a, i / a.kv_heads % a.batch, i % a.kv_heads, block * queries);
  });
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(llama_jax_fp8_matmul, call,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .RemainingArgs()
                                  .RemainingRets()
                                  .Attr<int64_t>("scale_rows")
                                  .Attr<int64_t>("scale_columns")
                                  .Attr<int64_t>("instructions"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(llama_jax_paged_attention, attention,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<int64_t>("instructions"));

// The number of the best instructions here, up to the limit that this sets.
extern "C" int64_t llama_jax_instructions(int64_t most) {
  limit.store(most);
  return best_instructions();
}
