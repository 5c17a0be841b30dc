// What all kernels share: operands, numbers, memory, and work on XLA's own threads.

#pragma once

#include <atomic>
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <vector>

#include "xla.h"

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace {

#define ALWAYS_INLINE inline __attribute__((always_inline))
#define NEVER_INLINE __attribute__((noinline))
#if defined(__clang__)
#define UNROLL _Pragma("unroll")
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif

enum class Format { codes, bfloat16, float32 };

struct Weight {
  const void* data;
  const float* scale;  // null where there is none
};

// y [m, n] = x [m, k] @ weight [n, k].T, plus a residual [m, n] of y's format if there is one; of two
// weights, gate and up, silu(x @ gate.T) times x @ up.T. A scale belongs to 2^`row_shift` rows of the weight and `run_columns` of its columns, the
// last ones perhaps fewer; `runs` scales lie beside each other. Without scales there is one run.
struct Product {
  int64_t m, n, k;
  Weight weights[2];
  int count;  // of weights
  Format weight_format;
  int64_t row_shift, run_columns, runs;
  void* y;
  Format y_format;  // float32 or bfloat16
  const void* residual;  // null where there is none
  const float* row_factors;  // of sums, for each row of x, where it was arranged

  float scale_of(int which, int64_t row, int64_t run) const {
    return weights[which].scale[(row >> row_shift) * runs + run];
  }
};

// What is known of each row of logits, x @ weight.T: that of its target, which is -infinity unless
// there is such a token; the largest, and its token, the first of several; and log(sum(e^logit)).
struct LogitStats {
  const int32_t* targets;
  float *target_logits, *top_logits, *logsumexp;
  int32_t* top_tokens;
};

// The same of a segment of tokens. total: the sum of e^(logit - largest).
struct PartialStats {
  float largest, total;
  int32_t token;
};

// Rows of x; behind each, up to a multiple of MAX_COLUMNS, lie zeros.
template <class T>
struct Rows {
  const T* data;
  int64_t stride;
};

// Changes a copy of a row of x, with zeros behind it, to what an instruction set multiplies with
// weights of a format. Returns what its sums have to be multiplied by. Null where x is taken as it
// is.
template <class T>
using Arrange = float (*)(T* row, int64_t columns, Format weight_format);

// Arranges at most PACKED_ROWS rows of x, [rows, columns], as an instruction set wants to have them,
// together. Null where x is taken by rows. width: how many rows there are to be, the others zeros.
template <class T>
using Pack = void (*)(const T* x, int64_t rows, int64_t width, int64_t columns,
                      Format weight_format, T* to);
constexpr int64_t PACKED_ROWS = 16;

// Of all instruction sets, the most columns of a step, and the most rows of a weight in a tile.
constexpr int64_t MAX_COLUMNS = 64, MIN_ROWS = 8;
// Of all that attention is compiled for, the most columns of a step: heads are multiples of it.
constexpr int64_t HEAD_GRANULE = 16;
// For more rows of x, they are taken by blocks, and weights are upcast once for all of them unless
// the instruction set upcasts in tiles.
constexpr int64_t FEW_ROWS = 16;
// Of upcast weights, and of x beside them: both stay in a core's level-2 cache. The more weights,
// the fewer times all of x passes by.
constexpr int64_t PANEL_BYTES = 416 << 10, X_BYTES = 96 << 10;
// Of the weight, that a thread takes at a time: its rows a multiple of those of most tiles, `unit`.
// for_many: of all weights together, for more than FEW_ROWS rows of x; 0 for as many as for few.
constexpr int64_t CHUNK_BYTES = 128 << 10, MAX_CHUNK_ROWS = 960;
struct ChunkRows {
  int64_t unit, for_many;
};
// The last chunks, in place of so many, are half as large, so that no thread waits long for another.
constexpr int64_t NEAR_END = 4;
// Where `__builtin_prefetch` puts what it fetches. From memory into level 1 a core reads half as
// fast.
constexpr int LEVEL_1 = 3, LEVEL_2 = 2, LINE = 64, PAGE = 4096;
// Of logits, whose sums are added up alone, in order.
constexpr int64_t SEGMENT_TOKENS = 480;
// Of x, that a thread copies at a time.
constexpr int64_t COPIED_ROWS = 32;

constexpr int64_t at_least(int64_t least, int64_t value) { return value < least ? least : value; }
constexpr int64_t at_most(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t round_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

inline void pause() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("isb");  // ARM's `yield` takes no time
#endif
}

// Memory of this thread, for as long as it lives: fresh memory would have to be paged in.
enum Buffer { PANEL, LANES };
template <Buffer>
void* thread_buffer(size_t bytes) {
  thread_local std::vector<char> buffer;
  if (buffer.size() < bytes + 64) buffer.resize(bytes + 64);
  return reinterpret_cast<void*>(round_up(reinterpret_cast<intptr_t>(buffer.data()), 64));
}

// Memory for a copy of x, kept for later calls: fresh memory would have to be paged in. As many blocks
// exist as calls have been at work at once.
class Scratch {
 public:
  // The memory is null if there is none.
  explicit Scratch(size_t bytes) {
    {
      const std::lock_guard<std::mutex> lock(mutex());
      if (!kept().empty()) block_ = std::move(kept().back()), kept().pop_back();
    }
    if (block_.bytes >= bytes) return;
    block_ = {};
    block_.memory.reset(aligned_alloc(PAGE, round_up(bytes, PAGE)));
    block_.bytes = block_.memory ? bytes : 0;
  }
  ~Scratch() {
    const std::lock_guard<std::mutex> lock(mutex());
    if (block_.memory) kept().push_back(std::move(block_));
  }
  Scratch(const Scratch&) = delete;
  void* data() const { return block_.memory.get(); }

 private:
  struct Block {
    std::unique_ptr<void, void (*)(void*)> memory{nullptr, free};
    size_t bytes = 0;
  };
  Block block_;
  // Never destroyed: threads of XLA may outlive what is static.
  static std::vector<Block>& kept() {
    static auto* blocks = new std::vector<Block>;
    return *blocks;
  }
  static std::mutex& mutex() {
    static auto* mutex = new std::mutex;
    return *mutex;
  }
};

inline float from_bfloat16(uint16_t bits) {
  uint32_t wide = uint32_t(bits) << 16;
  float value;
  memcpy(&value, &wide, 4);
  return value;
}

constexpr float LOWEST = -0x1.fffffep127f;

// Four rows of four numbers become columns.
ALWAYS_INLINE void transpose(const float* from, int64_t from_stride, float* to, int64_t to_stride) {
  typedef float Four __attribute__((vector_size(16)));
#if defined(__clang__)
#define PICK(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
  typedef int32_t Lanes __attribute__((vector_size(16)));
#define PICK(a, b, ...) __builtin_shuffle(a, b, (Lanes){__VA_ARGS__})
#endif
  Four rows[4];
  for (int i = 0; i < 4; i++) memcpy(&rows[i], from + i * from_stride, sizeof(Four));
  const Four low = PICK(rows[0], rows[1], 0, 4, 1, 5), high = PICK(rows[0], rows[1], 2, 6, 3, 7);
  const Four low2 = PICK(rows[2], rows[3], 0, 4, 1, 5), high2 = PICK(rows[2], rows[3], 2, 6, 3, 7);
  const Four columns[4] = {PICK(low, low2, 0, 1, 4, 5), PICK(low, low2, 2, 3, 6, 7),
                           PICK(high, high2, 0, 1, 4, 5), PICK(high, high2, 2, 3, 6, 7)};
#undef PICK
  for (int i = 0; i < 4; i++) memcpy(to + i * to_stride, &columns[i], sizeof(Four));
}

// Queries [batch, tokens, heads, head_dim] over pages of keys and values, each [pages, page_size,
// kv_heads, head_dim]; see `paged_attention`.
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
  // Where the key of a position lies. A page that does not exist reads as the last one.
  int64_t key(int64_t sequence, int64_t kv_head, int64_t position) const {
    const int64_t page = page_table[sequence * pages_per_row + position / page_size];
    const int64_t there = at_least(0, at_most(page, pages - 1));
    return ((there * page_size + position % page_size) * kv_heads + kv_head) * head_dim;
  }
};

inline int64_t bytes_of(Format format) {
  return format == Format::codes ? 1 : format == Format::bfloat16 ? 2 : 4;
}

// y [rows, columns] = x / rms(x), rounded, times weight [columns]; all of one format, bfloat16 or
// float32.
struct Norm {
  int64_t rows, columns;
  const void *x, *weight;
  float eps;
  Format format;
  void* y;
};

// A scale for all kv heads, or one for each.
struct Scales {
  const float* data;
  bool are_per_head;

  float of(int64_t kv_head) const { return data[are_per_head ? kv_head : 0]; }
};

// q, k and v, [batch * tokens, heads or kv_heads, head_dim], of format bfloat16 or float32, of which q
// and k are rotated, and k and v stored in pages [pages, page_size, kv_heads, head_dim]; see
// `rope_and_cache`. cosines, sines: [batch * tokens, head_dim / 2].
struct RopeAndCache {
  int64_t batch, tokens, heads, head_dim, pages, page_size, kv_heads, pages_per_row;
  const void *q, *k, *v;
  Format format, kv_format;
  const float *cosines, *sines;
  const int32_t *page_table, *cached_lens, *kv_lens;
  Scales k_scale, v_scale;
  void *rotated_q, *k_pages, *v_pages;

  // Where a row's key and value belong, counted in tokens of all pages; -1 if they are not stored.
  int64_t place_of(int64_t row) const {
    const int64_t sequence = row / tokens;
    const int64_t position = cached_lens[sequence] + row % tokens;
    if (position < 0 || position >= kv_lens[sequence]) return -1;
    const int64_t column = at_most(position / page_size, pages_per_row - 1);
    const int64_t page = page_table[sequence * pages_per_row + column];
    return page < 0 || page >= pages ? -1 : page * page_size + position % page_size;
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

// Denormal numbers count while it lives, and are rounded to nearest: XLA's threads flush them.
struct ExactDenormals {
#if defined(__x86_64__)
  const unsigned before = _mm_getcsr();
  ExactDenormals() { _mm_setcsr(0x1f80); }
  ~ExactDenormals() { _mm_setcsr(before); }
#elif defined(__aarch64__)
  const uint64_t before = get();
  ExactDenormals() { set(0); }
  ~ExactDenormals() { set(before); }
  static uint64_t get() {
    uint64_t modes;
    asm volatile("mrs %0, fpcr" : "=r"(modes));
    return modes;
  }
  static void set(uint64_t modes) { asm volatile("msr fpcr, %0" : : "r"(modes)); }
#endif
};

// work(0) to work(count - 1), on this thread and on those of XLA's that have time. Each begins with a
// span of its own, in order, since a chunk of a weight prefetches the one behind it, and then helps
// others. A thread that comes when nothing is left sees `State` alone, which lives until the last one
// has come.
template <class Work>
void in_parallel(const Call& call, int64_t count, const Work& work) {
  struct alignas(LINE) Span {
    std::atomic<int64_t> next{0};
    int64_t end = 0;
  };
  struct State {
    std::vector<Span> spans;
    std::atomic<int64_t> done{0};
    std::mutex mutex;
    std::condition_variable finished;
    explicit State(int64_t threads) : spans(threads) {}
  };
  const int64_t threads = at_least(1, at_most(call.num_threads(), count));
  auto state = std::make_shared<State>(threads);
  for (int64_t i = 0; i < threads; i++) {
    state->spans[i].next = count * i / threads;
    state->spans[i].end = count * (i + 1) / threads;
  }
  auto run = [state, threads, count, work = &work](int64_t first) {
    const ExactDenormals scope;
    for (int64_t s = 0; s < threads; s++) {
      Span& span = state->spans[(first + s) % threads];
      for (int64_t i; (i = span.next.fetch_add(1)) < span.end;) {
        (*work)(i);
        if (state->done.fetch_add(1) + 1 == count) {
          const std::lock_guard<std::mutex> lock(state->mutex);
          state->finished.notify_all();
        }
      }
    }
  };
  for (int64_t i = 1; i < threads; i++) call.schedule([run, i] { run(i); });
  run(0);
  // What others have begun takes no longer than it takes to fall asleep.
  for (int i = 0; i < 20000 && state->done.load() < count; i++) pause();
  std::unique_lock<std::mutex> lock(state->mutex);
  state->finished.wait(lock, [&] { return state->done.load() == count; });
}

}  // namespace
