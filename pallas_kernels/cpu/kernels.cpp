// The library: what XLA and `pallas_kernels.cpu.library` call.

#include "fp8_matmul.h"
#include "paged_attention.h"

XLA_FFI_DEFINE_HANDLER_SYMBOL(llama_jax_fp8_matmul, matmul,
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
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<int64_t>("instructions"));

// The number of the best instructions here, up to the limit that this sets.
extern "C" int64_t llama_jax_instructions(int64_t most) {
  limit.store(most);
  return best_instructions();
}
