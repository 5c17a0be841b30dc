// x @ weight.T for weights of float8_e4m3fn codes, or bfloat16, as custom calls of XLA: one returns
// products, the other what has to be known of logits to score tokens.
//
// Codes are upcast in registers, so that a weight costs one byte of memory traffic. The work is
// divided by rows of the weight over XLA's own threads.

#include <algorithm>
#include <optional>

#include "instructions.h"

namespace {

// x as the loops read it: in place if its type is theirs and nothing is needed behind its rows.
template <class Activation>
struct Copy {
  std::optional<Scratch> memory;
  Rows<Activation> rows{nullptr, 0};
  std::vector<float> factors;  // of sums, if rows were arranged

  // False if there is no memory.
  bool make(const Call& call, const void* x, Format format, const Product& p,
            Arrange<Activation> arrange, Pack<Activation> pack) {
    if (pack) return make_packed(call, static_cast<const Activation*>(x), p, pack);
    const bool is_same = (format == Format::bfloat16) == (sizeof(Activation) == 2);
    rows = {static_cast<const Activation*>(x), p.k};
    if (is_same && p.k % MAX_COLUMNS == 0 && !arrange) return true;
    rows.stride = round_up(p.k, MAX_COLUMNS);
    memory.emplace(p.m * rows.stride * sizeof(Activation));
    Activation* to = static_cast<Activation*>(memory->data());
    if (!to) return false;
    if (arrange) factors.resize(p.m);
    in_parallel(call, (p.m + COPIED_ROWS - 1) / COPIED_ROWS, [&](int64_t part) {
      for (int64_t i = part * COPIED_ROWS; i < at_most(p.m, (part + 1) * COPIED_ROWS); i++) {
        Activation* row = to + i * rows.stride;
        if (is_same)
          memcpy(row, static_cast<const Activation*>(x) + i * p.k, p.k * sizeof(Activation));
        else
          for (int64_t j = 0; j < p.k; j++)
            row[j] = Activation(from_bfloat16(static_cast<const uint16_t*>(x)[i * p.k + j]));
        memset(row + p.k, 0, (rows.stride - p.k) * sizeof(Activation));
        if (arrange) factors[i] = arrange(row, rows.stride, p.weight_format);
      }
    });
    rows.data = to;
    return true;
  }

 private:
  // Blocks of rows lie one behind the other.
  bool make_packed(const Call& call, const Activation* x, const Product& p,
                   Pack<Activation> pack) {
    const int64_t width = at_most(p.m, PACKED_ROWS);
    rows.stride = round_up(p.k, MAX_COLUMNS);
    memory.emplace(round_up(p.m, width) * rows.stride * sizeof(Activation));
    Activation* to = static_cast<Activation*>(memory->data());
    if (!to) return false;
    rows.data = to;
    in_parallel(call, (p.m + width - 1) / width, [&](int64_t i) {
      const int64_t first = i * width;
      pack(x + first * p.k, at_most(width, p.m - first), width, p.k, p.weight_format,
           to + first * rows.stride);
    });
    return true;
  }
};

// Some rows of a product's weights, with all rows of x.
template <class Activation>
using Loops = void (*)(const Product&, const Rows<Activation>&, int64_t begin, int64_t end);

template <class Activation, class LaneStats>
using StatsLoops = void (*)(const Product&, const Rows<Activation>&, int64_t begin, int64_t end,
                            const LogitStats&, LaneStats*, PartialStats*);

XLA_FFI_Error* no_memory(const Call& call) {
  return call.error(XLA_FFI_Error_Code_RESOURCE_EXHAUSTED, "no memory for a copy of x");
}

template <class Activation>
XLA_FFI_Error* multiply(const Call& call, std::vector<Product>& products, const void* x,
                        Format format, Arrange<Activation> arrange, Pack<Activation> pack,
                        ChunkRows chunk_rows, Loops<Activation> of_codes,
                        Loops<Activation> of_bfloat16) {
  Copy<Activation> copy;
  if (!copy.make(call, x, format, products[0], arrange, pack)) return no_memory(call);
  for (Product& p : products) p.row_factors = copy.factors.data();
  struct Chunk {
    const Product& product;
    int64_t begin, end;
  };
  std::vector<Chunk> chunks;
  int64_t all_rows = 0;
  for (const Product& p : products) all_rows += p.n;
  const int64_t shares = NEAR_END * call.num_threads();
  for (const Product& p : products) {
    // For many rows of x, gate and up are upcast at once; for few, shorter runs were read slower.
    const int64_t at_once = p.m > FEW_ROWS ? p.count : 1;
    const int64_t row_bytes = p.k * (p.weight_format == Format::codes ? 1 : 2);
    const int64_t unit = chunk_rows.unit, fitting = CHUNK_BYTES / at_once / row_bytes / unit * unit;
    int64_t rows = at_most(MAX_CHUNK_ROWS, at_least(unit, fitting));
    if (p.m > FEW_ROWS && chunk_rows.for_many)
      rows = at_most(chunk_rows.for_many / at_once, round_up(all_rows / shares + 1, unit));
    for (int64_t begin = 0, end; begin < p.n; begin = end) {
      const bool is_near_end = &p == &products.back() && p.n - begin <= NEAR_END * rows;
      const int64_t some = is_near_end ? at_least(unit / 2, rows / 2) : rows;
      end = p.n - begin < some + MIN_ROWS ? p.n : begin + some;
      chunks.push_back({p, begin, end});
    }
  }
  in_parallel(call, int64_t(chunks.size()), [&](int64_t i) {
    const Chunk& c = chunks[i];
    const auto loops = c.product.weight_format == Format::codes ? of_codes : of_bfloat16;
    loops(c.product, copy.rows, c.begin, c.end);
  });
  return nullptr;
}

// The segments of tokens of the only weight, and what is known of them together. The first of equal
// logits in different segments is that of the first segment.
template <class Activation, class LaneStats>
XLA_FFI_Error* find_stats(const Call& call, Product& p, const void* x, Format format,
                          const LogitStats& stats, Arrange<Activation> arrange,
                          Pack<Activation> pack, StatsLoops<Activation, LaneStats> of_codes,
                          StatsLoops<Activation, LaneStats> of_bfloat16) {
  Copy<Activation> copy;
  const int64_t count = at_least(1, p.n / SEGMENT_TOKENS);  // the last one takes the rest
  std::vector<PartialStats> parts(count * p.m);
  if (!copy.make(call, x, format, p, arrange, pack)) return no_memory(call);
  p.row_factors = copy.factors.data();
  std::fill_n(stats.target_logits, p.m, -INFINITY);
  const auto loops = p.weight_format == Format::codes ? of_codes : of_bfloat16;
  in_parallel(call, count, [&](int64_t i) {
    const int64_t end = i + 1 < count ? (i + 1) * SEGMENT_TOKENS : p.n;
    auto* lanes = static_cast<LaneStats*>(thread_buffer<LANES>(p.m * sizeof(LaneStats)));
    loops(p, copy.rows, i * SEGMENT_TOKENS, end, stats, lanes, &parts[i * p.m]);
  });
  for (int64_t m = 0; m < p.m; m++) {
    PartialStats all{LOWEST, 0, 0};
    for (int64_t i = 0; i < count; i++)
      if (parts[i * p.m + m].largest > all.largest) all = parts[i * p.m + m];
    float total = 0;
    for (int64_t i = 0; i < count; i++) {
      const PartialStats& part = parts[i * p.m + m];
      total += part.total * std::exp(part.largest - all.largest);
    }
    stats.top_logits[m] = all.largest, stats.top_tokens[m] = all.token;
    stats.logsumexp[m] = all.largest + std::log(total);
  }
  return nullptr;
}

// Reads x, a weight and its scales. False if they are not what is understood here.
// scale_rows, scale_columns: how much of the weight one scale is for.
bool read(Operand x, Operand w, Operand scale, int64_t scale_rows, int64_t scale_columns, int which,
          Product& p) {
  if (x.rank() != 2 || w.rank() != 2 || scale_rows <= 0 || (scale_rows & (scale_rows - 1)) ||
      scale_columns <= 0)
    return false;
  const int64_t n = w[0], num_scales = scale.size();
  const auto format = w.type() == XLA_FFI_DataType_BF16 ? Format::bfloat16 : Format::codes;
  p.m = x[0], p.k = x[1];
  const int64_t run_columns = num_scales ? scale_columns : p.k;
  const int64_t runs = num_scales ? (p.k + scale_columns - 1) / scale_columns : 1;
  const int64_t expected = num_scales ? (n + scale_rows - 1) / scale_rows * runs : 0;
  const bool is_alike = which == 0 || (n == p.n && format == p.weight_format && runs == p.runs &&
                                       bool(num_scales) == bool(p.weights[0].scale));
  p.n = n, p.weight_format = format, p.row_shift = __builtin_ctzll(scale_rows);
  p.runs = runs, p.run_columns = run_columns;
  p.weights[which] = {w.data<void>(), num_scales ? scale.data<float>() : nullptr};
  return is_alike && (x.type() == XLA_FFI_DataType_BF16 || x.type() == XLA_FFI_DataType_F32) &&
         p.m > 0 && p.k > 0 && n >= MIN_ROWS && w[1] == p.k &&
         (format == Format::bfloat16 || w.type() == XLA_FFI_DataType_F8E4M3FN ||
          w.type() == XLA_FFI_DataType_S8) &&
         scale.has(XLA_FFI_DataType_F32, expected) &&
         (runs == 1 || (format == Format::codes && run_columns % MAX_COLUMNS == 0));
}

Format format_of(Operand x) {
  return x.type() == XLA_FFI_DataType_BF16 ? Format::bfloat16 : Format::float32;
}

// Operands: x, and a weight and its scales for each result, or two of both for the only one, gate
// and up. With one weight a residual may follow. has_residual: whether one does.
XLA_FFI_Error* matmul(const Call& call) {
  std::vector<Product> products;
  const int64_t has_residual = call.attribute("has_residual") != 0;
  const int64_t weights = (call.num_operands() - 1 - has_residual) / 2;
  const int64_t results = call.num_results();
  const bool is_gated = weights == 2 && results == 1;
  bool is_valid = call.num_operands() == 1 + 2 * weights + has_residual && results &&
                  (is_gated || results == weights) && (!has_residual || weights == 1);
  for (int64_t i = 0; is_valid && i < results; i++) {
    const Operand y = call.result(i);
    Product p{};
    p.count = is_gated ? 2 : 1;
    p.y = y.data<void>(), p.y_format = format_of(y);
    for (int which = 0; is_valid && which < p.count; which++) {
      const int64_t at = 1 + 2 * (i + which);
      is_valid = read(call.operand(0), call.operand(at), call.operand(at + 1),
                      call.attribute("scale_rows"), call.attribute("scale_columns"), which, p);
    }
    is_valid = is_valid && y.size() == p.m * p.n &&
               (products.empty() || p.weight_format == products[0].weight_format) &&
               (p.y_format == Format::bfloat16 || y.type() == XLA_FFI_DataType_F32);
    if (is_valid && has_residual) {
      const Operand residual = call.operand(3);
      p.residual = residual.data<void>();
      is_valid = residual.has(y.type(), y.size());
    }
    products.push_back(p);
  }
  if (!is_valid)
    return call.error(XLA_FFI_Error_Code_INVALID_ARGUMENT,
                      "fp8_matmul_cpu: operands are not what is understood here");
  const Operand x = call.operand(0);
  const Format format = format_of(x);
#define WITH(set)                                                                          \
  multiply<set::Activation>(call, products, x.data<void>(), format, set::ARRANGE, set::PACK, \
                            set::CHUNK_ROWS, set::products<uint8_t>, set::products<uint16_t>)
  return format == Format::bfloat16 ? WITH(for_bfloat16) : WITH(for_float32);
#undef WITH
}

// Operands: x, a weight, its scales, and targets. Results: as in `LogitStats`, the likeliest tokens
// second. is_rounded: whether logits are rounded to bfloat16 first.
XLA_FFI_Error* logit_stats(const Call& call) {
  Product p{};
  p.count = 1;
  p.y_format = call.attribute("is_rounded") ? Format::bfloat16 : Format::float32;
  bool is_valid = call.num_operands() == 4 && call.num_results() == 4 &&
                  read(call.operand(0), call.operand(1), call.operand(2),
                       call.attribute("scale_rows"), call.attribute("scale_columns"), 0, p) &&
                  call.operand(3).has(XLA_FFI_DataType_S32, p.m);
  for (int64_t i = 0; is_valid && i < 4; i++)
    is_valid = call.result(i).has(i == 1 ? XLA_FFI_DataType_S32 : XLA_FFI_DataType_F32, p.m);
  if (!is_valid)
    return call.error(XLA_FFI_Error_Code_INVALID_ARGUMENT,
                      "logit_stats_cpu: operands are not what is understood here");
  const LogitStats stats{call.operand(3).data<int32_t>(), call.result(0).data<float>(),
                         call.result(2).data<float>(), call.result(3).data<float>(),
                         call.result(1).data<int32_t>()};
  const Operand x = call.operand(0);
  const Format format = format_of(x);
#define WITH(set)                                                                       \
  find_stats<set::Activation, set::LaneStats>(call, p, x.data<void>(), format, stats,   \
                                              set::ARRANGE, set::PACK, set::logit_stats<uint8_t>, \
                                              set::logit_stats<uint16_t>)
  return format == Format::bfloat16 ? WITH(for_bfloat16) : WITH(for_float32);
#undef WITH
}

}  // namespace

extern "C" XLA_FFI_Error* fp8_matmul_cpu(XLA_FFI_CallFrame* frame) { return handle(frame, matmul); }
extern "C" XLA_FFI_Error* logit_stats_cpu(XLA_FFI_CallFrame* frame) {
  return handle(frame, logit_stats);
}
