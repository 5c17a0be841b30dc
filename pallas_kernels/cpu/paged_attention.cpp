// Attention of queries over pages of keys and values, as a custom call of XLA.
//
// The work is divided by sequences, kv heads and blocks of queries over XLA's own threads.

#include "instructions.h"

namespace {

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
                     ffi::Buffer<ffi::S32> kv_lens, ffi::Buffer<ffi::F32> k_scale,
                     ffi::Buffer<ffi::F32> v_scale,
                     ffi::Result<ffi::AnyBuffer> y) {
  Attention a{};
  const auto of_q = q.dimensions(), of_k = k.dimensions(), of_table = page_table.dimensions();
  bool is_valid = of_q.size() == 4 && of_k.size() == 4 && of_table.size() == 2 &&
                  format_of(q, a.q_format) && format_of(k, a.kv_format) &&
                  a.q_format != Format::codes && v.element_type() == k.element_type() &&
                  v.element_count() == k.element_count() && y->element_type() == q.element_type() &&
                  y->element_count() == q.element_count() && k_scale.element_count() == 1 &&
                  v_scale.element_count() == 1;
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
                      "paged_attention_cpu: operands are not understood here");
  a.q = q.untyped_data(), a.k = k.untyped_data(), a.v = v.untyped_data(), a.y = y->untyped_data();
  a.page_table = page_table.typed_data();
  a.cached_lens = cached_lens.typed_data(), a.kv_lens = kv_lens.typed_data();
  a.k_scale = *k_scale.typed_data(), a.v_scale = *v_scale.typed_data();
  a.softmax_scale = 1 / std::sqrt(float(a.head_dim));

  using Loop = void (*)(const Attention&, int64_t, int64_t, int64_t);
  const Loop attend = a.kv_format == Format::codes      ? for_float32::attend<uint8_t>
                      : a.kv_format == Format::bfloat16 ? for_float32::attend<uint16_t>
                                                        : for_float32::attend<float>;
  constexpr int64_t queries = for_float32::QUERIES;
  const int64_t blocks = (a.tokens * (a.heads / a.kv_heads) + queries - 1) / queries;
  // The last blocks, which see most keys, come first.
  in_parallel(pool, a.batch * a.kv_heads * blocks, [&](int64_t i) {
    const int64_t block = blocks - 1 - i / (a.batch * a.kv_heads);
    attend(a, i / a.kv_heads % a.batch, i % a.kv_heads, block * queries);
  });
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(paged_attention_cpu, attention,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::AnyBuffer>());
