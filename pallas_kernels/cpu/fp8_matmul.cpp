// x @ weight.T for weights of float8_e4m3fn codes, or bfloat16, as a custom call of XLA.
//
// Codes are upcast in registers, so that a weight costs one byte of memory traffic. The work is
// divided by rows of the weight over XLA's own threads.

#include "instructions.h"

namespace {

// x as the loops read it: in place if its type is theirs and nothing is needed behind its rows.
template <class Activation>
struct Copy {
  std::unique_ptr<void, void (*)(void*)> memory{nullptr, free};
  Rows<Activation> rows{nullptr, 0};

  // False if there is no memory.
  bool make(ffi::ThreadPool& pool, const void* x, Format format, int64_t m, int64_t k) {
    const bool is_same = (format == Format::bfloat16) == (sizeof(Activation) == 2);
    rows = {static_cast<const Activation*>(x), k};
    if (is_same && k % MAX_COLUMNS == 0) return true;
    rows.stride = round_up(k, MAX_COLUMNS);
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

// Some rows of a product's weights, with all rows of x.
template <class Activation>
using Loops = void (*)(const Product&, const Rows<Activation>&, int64_t begin, int64_t end);

template <class Activation>
ffi::Error multiply(ffi::ThreadPool& pool, const std::vector<Product>& products, const void* x,
                    Format format, Loops<Activation> of_codes, Loops<Activation> of_bfloat16) {
  Copy<Activation> copy;
  if (!copy.make(pool, x, format, products[0].m, products[0].k))
    return ffi::Error(ffi::ErrorCode::kResourceExhausted, "no memory for a copy of x");
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

#define WITH(set)                                                                    \
  multiply<set::Activation>(pool, products, x.untyped_data(), format,                \
                            set::rows_of_weight<uint8_t>, set::rows_of_weight<uint16_t>)

// operands: a weight and its scales for each result, or two of both for the only one, gate and up.
// scale_rows, scale_columns: how much of a weight one scale is for.
ffi::Error matmul(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::RemainingArgs operands,
                  ffi::RemainingRets results, int64_t scale_rows, int64_t scale_columns) {
  std::vector<Product> products;
  const bool in_bf16 = x.element_type() == ffi::DataType::BF16;
  const Format format = in_bf16 ? Format::bfloat16 : Format::float32;
  const int64_t weights = operands.size() / 2;
  const bool is_gated = weights == 2 && results.size() == 1;
  bool is_valid = x.dimensions().size() == 2 && operands.size() % 2 == 0 && results.size() &&
                  (is_gated || results.size() == size_t(weights)) && scale_rows > 0 &&
                  (scale_rows & (scale_rows - 1)) == 0 && scale_columns > 0 &&
                  (in_bf16 || x.element_type() == ffi::DataType::F32);
  for (size_t i = 0; is_valid && i < results.size(); i++) {
    const auto y = results.get<ffi::AnyBuffer>(i);
    Product p{};
    p.m = x.dimensions()[0], p.k = x.dimensions()[1];
    p.count = is_gated ? 2 : 1;
    p.row_shift = __builtin_ctzll(scale_rows), p.runs = 1, p.run_columns = p.k;
    p.y = (*y)->untyped_data();
    p.y_format = (*y)->element_type() == ffi::DataType::BF16 ? Format::bfloat16 : Format::float32;
    for (int which = 0; is_valid && which < p.count; which++) {
      const auto w = operands.get<ffi::AnyBuffer>(2 * (i + which));
      const auto s = operands.get<ffi::AnyBuffer>(2 * (i + which) + 1);
      const int64_t n = w->dimensions().size() == 2 ? w->dimensions()[0] : 0;
      const Format w_format =
          w->element_type() == ffi::DataType::BF16 ? Format::bfloat16 : Format::codes;
      is_valid = which == 0 || (n == p.n && w_format == p.weight_format &&
                                (s->element_count() > 0) == (p.weights[0].scale != nullptr));
      p.n = n, p.weight_format = w_format, p.weights[which].data = w->untyped_data();
      int64_t scales = 0;
      if (s->element_count()) {
        p.weights[which].scale = static_cast<const float*>(s->untyped_data());
        p.run_columns = scale_columns, p.runs = (p.k + scale_columns - 1) / scale_columns;
        scales = (p.n + scale_rows - 1) / scale_rows * p.runs;
      }
      is_valid = is_valid && w->element_count() == size_t(n * p.k) &&
                 s->element_count() == size_t(scales) && s->element_type() == ffi::DataType::F32 &&
                 (w_format == Format::bfloat16 || w->size_bytes() == w->element_count());
    }
    is_valid = is_valid && p.n >= MIN_ROWS && p.m > 0 && p.k > 0 &&
               (*y)->element_count() == size_t(p.m * p.n) &&
               (p.y_format == Format::bfloat16 || (*y)->element_type() == ffi::DataType::F32) &&
               (p.runs == 1 || (p.weight_format == Format::codes && p.run_columns % MAX_COLUMNS == 0));
    products.push_back(p);
  }
  if (!is_valid)
    return ffi::Error(ffi::ErrorCode::kInvalidArgument,
                      "fp8_matmul_cpu: operands are not what is understood here");
  return in_bf16 ? WITH(for_bfloat16) : WITH(for_float32);
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
