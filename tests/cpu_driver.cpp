// Calls the CPU's kernels without XLA, so that an emulator can run them (tests/test_cpu_neon.py).
//
// Reads calls from standard input, and writes their results to standard output. All integers have
// 64 bits. A call is: 0 for a product, 1 for attention or 2 for what is known of logits, scale_rows and
// scale_columns, the number of arrays, and the arrays, the last of which is for the result. An array
// is: XLA's number of its dtype, its rank, its shape, the number of its bytes, and these; the result
// has none. What is known of logits are four rows of one result; tokens are integers there.

#include <cstdio>
#include <string>
#include <thread>

#include "../pallas_kernels/cpu/fp8_matmul.cpp"
#include "../pallas_kernels/cpu/paged_attention.cpp"

namespace {

constexpr uint64_t FLUSH_DENORMALS = 1 << 24;

void fail(const std::string& why) {
  fprintf(stderr, "%s\n", why.c_str());
  exit(1);
}

int64_t read_number() {
  int64_t value;
  if (fread(&value, sizeof(value), 1, stdin) != 1) fail("the call ends too early");
  return value;
}

struct Array {
  std::vector<int64_t> shape;
  std::vector<char> data;
  XLA_FFI_Buffer buffer{};

  void read() {
    buffer.dtype = XLA_FFI_DataType(read_number());
    shape.resize(read_number());
    for (int64_t& size : shape) size = read_number();
    data.resize(read_number());
    if (fread(data.data(), 1, data.size(), stdin) != data.size()) fail("an array ends too early");
    buffer.rank = int64_t(shape.size()), buffer.dims = shape.data(), buffer.data = data.data();
  }
};

// What is used of XLA: two threads.
std::vector<std::thread> threads;

XLA_FFI_Error* count_threads(XLA_FFI_ThreadPool_NumThreads_Args* args) {
  *args->num_threads = 2;
  return nullptr;
}

XLA_FFI_Error* schedule(XLA_FFI_ThreadPool_Schedule_Args* args) {
  threads.emplace_back(args->task, args->data);
  return nullptr;
}

ffi::Error call(ffi::ThreadPool pool, int64_t kind, int64_t scale_rows, int64_t scale_columns,
                std::vector<Array>& arrays) {
  std::vector<void*> buffers;
  for (Array& array : arrays) buffers.push_back(&array.buffer);
  const auto any = [&](size_t i) { return ffi::AnyBuffer(&arrays.at(i).buffer); };
  if (kind == 0) {
    std::vector<XLA_FFI_ArgType> types(buffers.size(), XLA_FFI_ArgType_BUFFER);
    XLA_FFI_RetType type = XLA_FFI_RetType_BUFFER;
    const XLA_FFI_Args args{XLA_FFI_Args_STRUCT_SIZE, nullptr, int64_t(buffers.size()) - 1,
                            types.data(), buffers.data()};
    const XLA_FFI_Rets rets{XLA_FFI_Rets_STRUCT_SIZE, nullptr, 1, &type, &buffers.back()};
    return matmul(pool, any(0), ffi::RemainingArgs(&args, 1), ffi::RemainingRets(&rets, 0),
                  scale_rows, scale_columns);
  }
  if (kind == 2) {
    const int64_t m = arrays[0].shape[0];
    std::vector<Array> rows(4);
    for (int i = 0; i < 4; i++) {
      rows[i].shape = {m};
      rows[i].buffer = {XLA_FFI_Buffer_STRUCT_SIZE, nullptr, XLA_FFI_DataType_F32,
                        arrays.back().data.data() + i * m * 4, 1, rows[i].shape.data()};
    }
    rows[1].buffer.dtype = XLA_FFI_DataType_S32;
    const auto floats = [&](size_t i) {
      return ffi::Result<ffi::Buffer<ffi::F32>>(ffi::Buffer<ffi::F32>(&rows[i].buffer));
    };
    return logit_stats(pool, any(0), any(1), any(2), ffi::Buffer<ffi::S32>(&arrays[3].buffer),
                       floats(0),
                       ffi::Result<ffi::Buffer<ffi::S32>>(ffi::Buffer<ffi::S32>(&rows[1].buffer)),
                       floats(2), floats(3), scale_rows, scale_columns, false);
  }
  const auto ints = [&](size_t i) { return ffi::Buffer<ffi::S32>(&arrays.at(i).buffer); };
  const auto floats = [&](size_t i) { return ffi::Buffer<ffi::F32>(&arrays.at(i).buffer); };
  return attention(pool, any(0), any(1), any(2), ints(3), ints(4), ints(5), floats(6), floats(7),
                   ffi::Result<ffi::AnyBuffer>(any(8)));
}

}  // namespace

int main() {
  XLA_FFI_Api api{};
  api.XLA_FFI_ThreadPool_NumThreads = count_threads, api.XLA_FFI_ThreadPool_Schedule = schedule;
  ffi::DiagnosticEngine diagnostic;
  const auto pool = ffi::CtxDecoding<ffi::ThreadPool>::Decode(&api, nullptr, diagnostic);
#if defined(__aarch64__)
  ExactDenormals::set(FLUSH_DENORMALS);  // as XLA's threads do
#endif
  for (int64_t kind; fread(&kind, sizeof(kind), 1, stdin) == 1;) {
    const int64_t scale_rows = read_number(), scale_columns = read_number();
    std::vector<Array> arrays(read_number() + 1);
    for (Array& array : arrays) array.read();
    Array& result = arrays.back();
    const ffi::AnyBuffer y(&result.buffer);
    result.data.resize(y.size_bytes());
    result.buffer.data = result.data.data();
    const ffi::Error error = call(*pool, kind, scale_rows, scale_columns, arrays);
    if (error.failure()) fail(error.message());
    fwrite(result.data.data(), 1, result.data.size(), stdout);
  }
  for (std::thread& thread : threads) thread.join();
#if defined(__aarch64__)
  if (ExactDenormals::get() != FLUSH_DENORMALS) fail("the treatment of denormals has changed");
#endif
}
