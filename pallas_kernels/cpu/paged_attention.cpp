// Attention of queries over pages of keys and values, as a custom call of XLA.
//
// The work is divided by sequences, kv heads and blocks of queries over XLA's own threads.

#include "instructions.h"

namespace {

// Which numbers an operand holds, if the kernels know them.
bool format_of(Operand operand, Format& format) {
  switch (operand.type()) {
    case XLA_FFI_DataType_F32: format = Format::float32; return true;
    case XLA_FFI_DataType_BF16: format = Format::bfloat16; return true;
    case XLA_FFI_DataType_S8:
    case XLA_FFI_DataType_F8E4M3FN: format = Format::codes; return true;
    default: return false;
  }
}

// Operands: q, k, v, page_table, cached_lens, kv_lens, k_scale and v_scale, as in `Attention`.
bool read(const Call& call, Attention& a) {
  if (call.num_operands() != 8 || call.num_results() != 1) return false;
  const Operand q = call.operand(0), k = call.operand(1), v = call.operand(2);
  const Operand page_table = call.operand(3), cached_lens = call.operand(4);
  const Operand kv_lens = call.operand(5), k_scale = call.operand(6), v_scale = call.operand(7);
  const Operand y = call.result(0);
  if (q.rank() != 4 || k.rank() != 4 || page_table.rank() != 2 || q.size() == 0 || k.size() == 0)
    return false;
  a.batch = q[0], a.tokens = q[1], a.heads = q[2], a.head_dim = q[3];
  a.pages = k[0], a.page_size = k[1], a.kv_heads = k[2], a.pages_per_row = page_table[1];
  a.q = q.data<void>(), a.k = k.data<void>(), a.v = v.data<void>(), a.y = y.data<void>();
  a.page_table = page_table.data<int32_t>();
  a.cached_lens = cached_lens.data<int32_t>(), a.kv_lens = kv_lens.data<int32_t>();
  if (!k_scale.has(XLA_FFI_DataType_F32, 1) || !v_scale.has(XLA_FFI_DataType_F32, 1)) return false;
  a.k_scale = *k_scale.data<float>(), a.v_scale = *v_scale.data<float>();
  return format_of(q, a.q_format) && format_of(k, a.kv_format) && a.q_format != Format::codes &&
         v.has(k.type(), k.size()) && y.has(q.type(), q.size()) && a.heads % a.kv_heads == 0 &&
         k[3] == a.head_dim && a.head_dim % HEAD_GRANULE == 0 &&
         page_table.has(XLA_FFI_DataType_S32, a.batch * a.pages_per_row) &&
         cached_lens.has(XLA_FFI_DataType_S32, a.batch) &&
         kv_lens.has(XLA_FFI_DataType_S32, a.batch);
}

XLA_FFI_Error* attention(const Call& call) {
  Attention a{};
  if (!read(call, a))
    return call.error(XLA_FFI_Error_Code_INVALID_ARGUMENT,
                      "paged_attention_cpu: operands are not understood here");
  a.softmax_scale = 1 / std::sqrt(float(a.head_dim));

  using Loop = void (*)(const Attention&, int64_t, int64_t, int64_t);
  const Loop attend = a.kv_format == Format::codes      ? for_float32::attend<uint8_t>
                      : a.kv_format == Format::bfloat16 ? for_float32::attend<uint16_t>
                                                        : for_float32::attend<float>;
  constexpr int64_t queries = for_float32::QUERIES;
  const int64_t blocks = (a.tokens * (a.heads / a.kv_heads) + queries - 1) / queries;
  // The last blocks, which see most keys, come first.
  in_parallel(call, a.batch * a.kv_heads * blocks, [&](int64_t i) {
    const int64_t block = blocks - 1 - i / (a.batch * a.kv_heads);
    attend(a, i / a.kv_heads % a.batch, i % a.kv_heads, block * queries);
  });
  return nullptr;
}

}  // namespace

extern "C" XLA_FFI_Error* paged_attention_cpu(XLA_FFI_CallFrame* frame) {
  return handle(frame, attention);
}
