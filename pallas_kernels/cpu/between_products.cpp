// What a layer computes between its products, as custom calls of XLA: RMSNorm, rotary embedding with
// the new keys and values into their pages, and attention over those.
//
// The work is divided over XLA's own threads: by rows, and attention by sequences, kv heads and
// blocks of queries.

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

// work(row) for all rows, some at a time: another thread is worth waking for so many.
template <class Work>
void in_parts(const Call& call, int64_t rows, const Work& work) {
  constexpr int64_t AT_ONCE = 16;
  in_parallel(call, (rows + AT_ONCE - 1) / AT_ONCE, [&](int64_t part) {
    for (int64_t i = part * AT_ONCE; i < at_most(rows, (part + 1) * AT_ONCE); i++) work(i);
  });
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
  Loop attend = a.kv_format == Format::codes      ? for_float32::attend<uint8_t>
                : a.kv_format == Format::bfloat16 ? for_float32::attend<uint16_t>
                                                  : for_float32::attend<float>;
  constexpr int64_t queries = for_float32::QUERIES;
#if INSTRUCTIONS == AMX
  static_assert(queries == amx::QUERIES);
  if (a.q_format == Format::bfloat16 && a.kv_format != Format::float32)
    attend = a.kv_format == Format::codes ? amx::attend<uint8_t> : amx::attend<uint16_t>;
#endif
  const int64_t blocks = (a.tokens * (a.heads / a.kv_heads) + queries - 1) / queries;
  // The last blocks, which see most keys, come first.
  in_parallel(call, a.batch * a.kv_heads * blocks, [&](int64_t i) {
    const int64_t block = blocks - 1 - i / (a.batch * a.kv_heads);
    attend(a, i / a.kv_heads % a.batch, i % a.kv_heads, block * queries);
  });
  return nullptr;
}

// Operands: x and weight, of one type, and eps.
XLA_FFI_Error* rms_norm(const Call& call) {
  Norm a{};
  bool is_valid = call.num_operands() == 3 && call.num_results() == 1;
  if (is_valid) {
    const Operand x = call.operand(0), weight = call.operand(1), eps = call.operand(2);
    const Operand y = call.result(0);
    is_valid = x.rank() == 2 && x.size() && format_of(x, a.format) && a.format != Format::codes &&
               weight.has(x.type(), x[1]) && eps.has(XLA_FFI_DataType_F32, 1) &&
               y.has(x.type(), x.size());
    if (is_valid) {
      a.rows = x[0], a.columns = x[1];
      a.x = x.data<void>(), a.weight = weight.data<void>(), a.y = y.data<void>();
      a.eps = *eps.data<float>();
    }
  }
  if (!is_valid)
    return call.error(XLA_FFI_Error_Code_INVALID_ARGUMENT,
                      "rms_norm_cpu: operands are not understood here");
  in_parts(call, a.rows, [&](int64_t row) { for_float32::rms_norm(a, row); });
  return nullptr;
}

// Operands: q, k, v, cosines, sines, page_table, cached_lens, kv_lens, k_scale and v_scale, as in
// `RopeAndCache`, and the pages. Results: q, and the pages again, which must be in the same place.
bool read(const Call& call, RopeAndCache& a) {
  if (call.num_operands() != 12 || call.num_results() != 3) return false;
  const Operand q = call.operand(0), k = call.operand(1), v = call.operand(2);
  const Operand cosines = call.operand(3), sines = call.operand(4), page_table = call.operand(5);
  const Operand cached_lens = call.operand(6), kv_lens = call.operand(7);
  const Operand k_scale = call.operand(8), v_scale = call.operand(9);
  const Operand k_pages = call.operand(10), v_pages = call.operand(11), rotated_q = call.result(0);
  if (q.rank() != 3 || k.rank() != 3 || k_pages.rank() != 4 || page_table.rank() != 2 ||
      q.size() == 0 || k_pages.size() == 0 || page_table.size() == 0)
    return false;
  a.batch = page_table[0], a.pages_per_row = page_table[1], a.tokens = q[0] / a.batch;
  a.heads = q[1], a.head_dim = q[2];
  a.pages = k_pages[0], a.page_size = k_pages[1], a.kv_heads = k_pages[2];
  a.q = q.data<void>(), a.k = k.data<void>(), a.v = v.data<void>();
  a.cosines = cosines.data<float>(), a.sines = sines.data<float>();
  a.page_table = page_table.data<int32_t>();
  a.cached_lens = cached_lens.data<int32_t>(), a.kv_lens = kv_lens.data<int32_t>();
  a.k_scale = {k_scale.data<float>(), k_scale.rank() > 0};
  a.v_scale = {v_scale.data<float>(), v_scale.rank() > 0};
  a.rotated_q = rotated_q.data<void>();
  a.k_pages = call.result(1).data<void>(), a.v_pages = call.result(2).data<void>();
  const int64_t of_angles = q[0] * a.head_dim / 2, of_kv = q[0] * a.kv_heads * a.head_dim;
  for (const Operand scale : {k_scale, v_scale})
    if (!scale.has(XLA_FFI_DataType_F32, scale.rank() ? a.kv_heads : 1)) return false;
  for (int i = 0; i < 2; i++)
    if (call.operand(10 + i).data<void>() != call.result(1 + i).data<void>()) return false;
  return format_of(q, a.format) && a.format != Format::codes && format_of(k_pages, a.kv_format) &&
         q[0] == a.batch * a.tokens && k.has(q.type(), of_kv) && v.has(q.type(), of_kv) &&
         cosines.has(XLA_FFI_DataType_F32, of_angles) && sines.has(XLA_FFI_DataType_F32, of_angles) &&
         a.head_dim % 2 == 0 && a.heads % a.kv_heads == 0 && k_pages[3] == a.head_dim &&
         v_pages.has(k_pages.type(), k_pages.size()) &&
         call.result(1).has(k_pages.type(), k_pages.size()) &&
         call.result(2).has(k_pages.type(), k_pages.size()) &&
         rotated_q.has(q.type(), q.size()) &&
         page_table.has(XLA_FFI_DataType_S32, page_table.size()) &&
         cached_lens.has(XLA_FFI_DataType_S32, a.batch) &&
         kv_lens.has(XLA_FFI_DataType_S32, a.batch);
}

XLA_FFI_Error* rope_and_cache(const Call& call) {
  RopeAndCache a{};
  if (!read(call, a))
    return call.error(XLA_FFI_Error_Code_INVALID_ARGUMENT,
                      "rope_and_cache_cpu: operands are not understood here");
  in_parts(call, a.batch * a.tokens, [&](int64_t row) { for_float32::rope_and_cache(a, row); });
  return nullptr;
}

}  // namespace

extern "C" XLA_FFI_Error* paged_attention_cpu(XLA_FFI_CallFrame* frame) {
  return handle(frame, attention);
}
extern "C" XLA_FFI_Error* rms_norm_cpu(XLA_FFI_CallFrame* frame) { return handle(frame, rms_norm); }
extern "C" XLA_FFI_Error* rope_and_cache_cpu(XLA_FFI_CallFrame* frame) {
  return handle(frame, rope_and_cache);
}
