// x @ weight.T for weights of float8_e4m3fn codes, or bfloat16, as custom calls of XLA: one returns
// products, the other what has to be known of logits to score tokens.
//
// Codes are upcast in registers, so that a weight costs one byte of memory traffic. The work is
// divided by rows of the weight over XLA's own threads.

#include <algorithm>
#include <string>

#include "instructions.h"

namespace {

// x as the loops read it: in place if its type is theirs and nothing is needed behind its rows.
template <class Activation>
struct Copy {
  std::unique_ptr<void, void (*)(void*)> memory{nullptr, free};
  Rows<Activation> rows{nullptr, 0};
  std::vector<float> factors;  // of sums, if rows were arranged

  // False if there is no memory.
  bool make(ffi::ThreadPool& pool, const void* x, Format format, const Product& p,
            Arrange<Activation> arrange) {
    const bool is_same = (format == Format::bfloat16) == (sizeof(Activation) == 2);
    rows = {static_cast<const Activation*>(x), p.k};
    if (is_same && p.k % MAX_COLUMNS == 0 && !arrange) return true;
    rows.stride = round_up(p.k, MAX_COLUMNS);
    memory.reset(aligned_alloc(64, p.m * rows.stride * sizeof(Activation)));
    Activation* to = static_cast<Activation*>(memory.get());
    if (!to) return false;
    if (arrange) factors.resize(p.m);
    in_parallel(pool, (p.m + COPIED_ROWS - 1) / COPIED_ROWS, [&](int64_t part) {
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
};

// Some rows of a product's weights, with all rows of x.
template <class Activation>
using Loops = void (*)(const Product&, const Rows<Activation>&, int64_t begin, int64_t end);

template <class Activation, class LaneStats>
using StatsLoops = void (*)(const Product&, const Rows<Activation>&, int64_t begin, int64_t end,
                            const LogitStats&, LaneStats*, PartialStats*);

ffi::Error no_memory() {
  return ffi::Error(ffi::ErrorCode::kResourceExhausted, "no memory for a copy of x");
}

template <class Activation>
ffi::Error multiply(ffi::ThreadPool& pool, std::vector<Product>& products, const void* x,
                    Format format, Arrange<Activation> arrange, Loops<Activation> of_codes,
                    Loops<Activation> of_bfloat16) {
  Copy<Activation> copy;
  if (!copy.make(pool, x, format, products[0], arrange)) return no_memory();
  for (Product& p : products) p.row_factors = copy.factors.data();
  struct Chunk {
    const Product& product;
    int64_t begin, end;
  };
  std::vector<Chunk> chunks;
  for (const Product& p : products) {
    // For many rows of x, gate and up are upcast at once; for few, shorter runs were read slower.
    const int64_t at_once = p.m > FEW_ROWS ? p.count : 1;
    const int64_t row_bytes = p.k * (p.weight_format == Format::codes ? 1 : 2);
    const int64_t fitting = CHUNK_BYTES / at_once / row_bytes / CHUNK_ROWS * CHUNK_ROWS;
    const int64_t rows = at_most(MAX_CHUNK_ROWS, at_least(CHUNK_ROWS, fitting));
    for (int64_t begin = 0, end; begin < p.n; begin = end) {
      const bool is_near_end = &p == &products.back() && p.n - begin <= NEAR_END * rows;
      const int64_t some = is_near_end ? at_least(CHUNK_ROWS / 2, rows / 2) : rows;
      end = p.n - begin < some + MIN_ROWS ? p.n : begin + some;
      chunks.push_back({p, begin, end});
    }
  }
  in_parallel(pool, int64_t(chunks.size()), [&](int64_t i) {
    const Chunk& c = chunks[i];
    const auto loops = c.product.weight_format == Format::codes ? of_codes : of_bfloat16;
    loops(c.product, copy.rows, c.begin, c.end);
  });
  return ffi::Error::Success();
}

// The segments of tokens of the only weight, and what is known of them together. The first of equal
// logits in different segments is that of the first segment.
template <class Activation, class LaneStats>
ffi::Error find_stats(ffi::ThreadPool& pool, Product& p, const void* x, Format format,
                      const LogitStats& stats, Arrange<Activation> arrange,
                      StatsLoops<Activation, LaneStats> of_codes,
                      StatsLoops<Activation, LaneStats> of_bfloat16) {
  Copy<Activation> copy;
  const int64_t count = at_least(1, p.n / SEGMENT_TOKENS);  // the last one takes the rest
  std::vector<PartialStats> parts(count * p.m);
  if (!copy.make(pool, x, format, p, arrange)) return no_memory();
  p.row_factors = copy.factors.data();
  std::fill_n(stats.target_logits, p.m, -INFINITY);
  const auto loops = p.weight_format == Format::codes ? of_codes : of_bfloat16;
  in_parallel(pool, count, [&](int64_t i) {
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
  return ffi::Error::Success();
}

// Reads x, a weight and its scales. False if they are not what is understood here.
// scale_rows, scale_columns: how much of the weight one scale is for.
bool read(const ffi::AnyBuffer& x, const ffi::AnyBuffer& w, const ffi::AnyBuffer& scale,
          int64_t scale_rows, int64_t scale_columns, int which, Product& p) {
  if (x.dimensions().size() != 2 || w.dimensions().size() != 2 || scale_rows <= 0 ||
      (scale_rows & (scale_rows - 1)) || scale_columns <= 0)
    return false;
  const auto x_type = x.element_type();
  const int64_t n = w.dimensions()[0];
  const auto format =
      w.element_type() == ffi::DataType::BF16 ? Format::bfloat16 : Format::codes;
  const bool has_scales = scale.element_count();
  p.m = x.dimensions()[0], p.k = x.dimensions()[1];
  const int64_t run_columns = has_scales ? scale_columns : p.k;
  const int64_t runs = has_scales ? (p.k + scale_columns - 1) / scale_columns : 1;
  const int64_t scales = has_scales ? (n + scale_rows - 1) / scale_rows * runs : 0;
  const bool is_alike = which == 0 || (n == p.n && format == p.weight_format && runs == p.runs &&
                                       has_scales == (p.weights[0].scale != nullptr));
  p.n = n, p.weight_format = format, p.row_shift = __builtin_ctzll(scale_rows);
  p.runs = runs, p.run_columns = run_columns;
  p.weights[which] = {w.untyped_data(),
                      has_scales ? static_cast<const float*>(scale.untyped_data()) : nullptr};
  return is_alike && (x_type == ffi::DataType::BF16 || x_type == ffi::DataType::F32) &&
         p.m > 0 && p.k > 0 && n >= MIN_ROWS && w.element_count() == size_t(n * p.k) &&
         (format == Format::bfloat16 || w.size_bytes() == w.element_count()) &&
         scale.element_type() == ffi::DataType::F32 && scale.element_count() == size_t(scales) &&
         (runs == 1 || (format == Format::codes && run_columns % MAX_COLUMNS == 0));
}

Format format_of(const ffi::AnyBuffer& x) {
  return x.element_type() == ffi::DataType::BF16 ? Format::bfloat16 : Format::float32;
}

ffi::Error not_understood(const char* name) {
  return ffi::Error(ffi::ErrorCode::kInvalidArgument,
                    std::string(name) + ": operands are not what is understood here");
}

// operands: a weight and its scales for each result, or two of both for the only one, gate and up.
ffi::Error matmul(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::RemainingArgs operands,
                  ffi::RemainingRets results, int64_t scale_rows, int64_t scale_columns) {
  std::vector<Product> products;
  const int64_t weights = operands.size() / 2;
  const bool is_gated = weights == 2 && results.size() == 1;
  bool is_valid = operands.size() % 2 == 0 && results.size() &&
                  (is_gated || results.size() == size_t(weights));
  for (size_t i = 0; is_valid && i < results.size(); i++) {
    const auto y = results.get<ffi::AnyBuffer>(i);
    Product p{};
    p.count = is_gated ? 2 : 1;
    p.y = (*y)->untyped_data(), p.y_format = format_of(**y);
    for (int which = 0; is_valid && which < p.count; which++)
      is_valid = read(x, *operands.get<ffi::AnyBuffer>(2 * (i + which)),
                      *operands.get<ffi::AnyBuffer>(2 * (i + which) + 1), scale_rows, scale_columns,
                      which, p);
    is_valid = is_valid && (*y)->element_count() == size_t(p.m * p.n) &&
               (products.empty() || p.weight_format == products[0].weight_format) &&
               (p.y_format == Format::bfloat16 || (*y)->element_type() == ffi::DataType::F32);
    products.push_back(p);
  }
  if (!is_valid) return not_understood("fp8_matmul_cpu");
  const Format format = format_of(x);
#define WITH(set) \
  multiply<set::Activation>(pool, products, x.untyped_data(), format, set::ARRANGE, \
                            set::products<uint8_t>, set::products<uint16_t>)
  return format == Format::bfloat16 ? WITH(for_bfloat16) : WITH(for_float32);
#undef WITH
}

// is_rounded: whether logits are rounded to bfloat16 first.
ffi::Error logit_stats(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer weight,
                       ffi::AnyBuffer scale, ffi::Buffer<ffi::S32> targets,
                       ffi::ResultBuffer<ffi::F32> target_logits,
                       ffi::ResultBuffer<ffi::S32> top_tokens,
                       ffi::ResultBuffer<ffi::F32> top_logits,
                       ffi::ResultBuffer<ffi::F32> logsumexp, int64_t scale_rows,
                       int64_t scale_columns, bool is_rounded) {
  Product p{};
  p.count = 1, p.y_format = is_rounded ? Format::bfloat16 : Format::float32;
  if (!read(x, weight, scale, scale_rows, scale_columns, 0, p))
    return not_understood("logit_stats_cpu");
  const size_t m = p.m;
  if (targets.element_count() != m || target_logits->element_count() != m ||
      top_tokens->element_count() != m || top_logits->element_count() != m ||
      logsumexp->element_count() != m)
    return not_understood("logit_stats_cpu");
  const LogitStats stats{targets.typed_data(), target_logits->typed_data(),
                         top_logits->typed_data(), logsumexp->typed_data(),
                         top_tokens->typed_data()};
  const Format format = format_of(x);
#define WITH(set)                                                                 \
  find_stats<set::Activation, set::LaneStats>(pool, p, x.untyped_data(), format, stats, \
                                              set::ARRANGE, set::logit_stats<uint8_t>, \
                                              set::logit_stats<uint16_t>)
  return format == Format::bfloat16 ? WITH(for_bfloat16) : WITH(for_float32);
#undef WITH
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(fp8_matmul_cpu, matmul,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .RemainingArgs()
                                  .RemainingRets()
                                  .Attr<int64_t>("scale_rows")
                                  .Attr<int64_t>("scale_columns"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(logit_stats_cpu, logit_stats,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<int64_t>("scale_rows")
                                  .Attr<int64_t>("scale_columns")
                                  .Attr<bool>("is_rounded"));
