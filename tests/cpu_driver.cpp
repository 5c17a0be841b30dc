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

XLA_FFI_Error* fail_with(XLA_FFI_Error_Create_Args* args) {
  fail(args->message);
  return nullptr;
}

// Attributes of 64 bits.
struct Attributes {
  XLA_FFI_ByteSpan names[3] = {{"scale_rows", 10}, {"scale_columns", 13}, {"is_rounded", 10}};
  int64_t values[3];
  XLA_FFI_Scalar scalars[3];
  XLA_FFI_AttrType types[3];
  XLA_FFI_ByteSpan* name_pointers[3];
  void* pointers[3];

  Attributes(int64_t scale_rows, int64_t scale_columns) : values{scale_rows, scale_columns, 0} {
    for (int i = 0; i < 3; i++) {
      scalars[i] = {XLA_FFI_DataType_S64, &values[i]};
      types[i] = XLA_FFI_AttrType_SCALAR, name_pointers[i] = &names[i], pointers[i] = &scalars[i];
    }
  }
};

// The last array is the result.
void call(const XLA_FFI_Api& api, int64_t kind, int64_t scale_rows, int64_t scale_columns,
          std::vector<Array>& arrays) {
  XLA_FFI_Handler* const kernels[] = {fp8_matmul_cpu, paged_attention_cpu, logit_stats_cpu};
  std::vector<void*> operands, results{&arrays.back().buffer};
  for (size_t i = 0; i + 1 < arrays.size(); i++) operands.push_back(&arrays[i].buffer);
  int64_t rows = 0;
  XLA_FFI_Buffer of_rows[4];
  if (kind == 2) {
    rows = arrays.back().shape[1];
    results.clear();
    for (int i = 0; i < 4; i++) {
      const auto type = i == 1 ? XLA_FFI_DataType_S32 : XLA_FFI_DataType_F32;
      char* row = arrays.back().data.data() + i * rows * 4;
      of_rows[i] = {XLA_FFI_Buffer_STRUCT_SIZE, nullptr, type, row, 1, &rows};
      results.push_back(&of_rows[i]);
    }
  }
  Attributes attributes(scale_rows, scale_columns);
  XLA_FFI_CallFrame frame{};
  frame.api = &api, frame.stage = XLA_FFI_ExecutionStage_EXECUTE;
  frame.args.size = int64_t(operands.size()), frame.args.args = operands.data();
  frame.rets.size = int64_t(results.size()), frame.rets.rets = results.data();
  frame.attrs = {XLA_FFI_Attrs_STRUCT_SIZE, nullptr, 3, attributes.types, attributes.name_pointers,
                 attributes.pointers};
  kernels[kind](&frame);
}

}  // namespace

int main() {
  XLA_FFI_Api api{};
  api.XLA_FFI_ThreadPool_NumThreads = count_threads, api.XLA_FFI_ThreadPool_Schedule = schedule;
  api.XLA_FFI_Error_Create = fail_with;
#if defined(__aarch64__)
  ExactDenormals::set(FLUSH_DENORMALS);  // as XLA's threads do
#endif
  for (int64_t kind; fread(&kind, sizeof(kind), 1, stdin) == 1;) {
    const int64_t scale_rows = read_number(), scale_columns = read_number();
    std::vector<Array> arrays(read_number() + 1);
    for (Array& array : arrays) array.read();
    Array& result = arrays.back();
    const bool has_halves = result.buffer.dtype == XLA_FFI_DataType_BF16;
    result.data.resize(Operand{&result.buffer}.size() * (has_halves ? 2 : 4));
    result.buffer.data = result.data.data();
    call(api, kind, scale_rows, scale_columns, arrays);
    fwrite(result.data.data(), 1, result.data.size(), stdout);
  }
  for (std::thread& thread : threads) thread.join();
#if defined(__aarch64__)
  if (ExactDenormals::get() != FLUSH_DENORMALS) fail("the treatment of denormals has changed");
#endif
}
