// Calls the CPU's kernels without XLA, so that an emulator can run them (tests/test_cpu_neon.py).
//
// Reads calls from standard input, and writes their results to standard output. All integers have
// 64 bits. A call is: its kernel's place in KERNELS, the attributes of NAMES, the numbers of operands
// and of results, and both. An operand is: XLA's number of its dtype, its rank, its shape, the number
// of its bytes, and these. A result has in place of the last two: the number of an operand in whose
// memory it is, or -1.

#include <cstdio>
#include <string>
#include <thread>

#include "../pallas_kernels/cpu/fp8_matmul.cpp"
#include "../pallas_kernels/cpu/between_products.cpp"

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

XLA_FFI_Handler* const KERNELS[] = {fp8_matmul_cpu, logit_stats_cpu, paged_attention_cpu,
                                    rms_norm_cpu, rope_and_cache_cpu};
const char* const NAMES[] = {"scale_rows", "scale_columns", "has_residual"};
constexpr int ATTRIBUTES = sizeof(NAMES) / sizeof(*NAMES);

struct Array {
  std::vector<int64_t> shape;
  std::vector<char> data;
  XLA_FFI_Buffer buffer{};

  void read_type() {
    buffer.dtype = XLA_FFI_DataType(read_number());
    shape.resize(read_number());
    for (int64_t& size : shape) size = read_number();
    buffer.rank = int64_t(shape.size()), buffer.dims = shape.data();
  }

  void read() {
    read_type();
    data.resize(read_number());
    if (fread(data.data(), 1, data.size(), stdin) != data.size()) fail("an array ends too early");
    buffer.data = data.data();
  }

  void make(const std::vector<Array>& operands) {
    read_type();
    const int64_t place = read_number();
    if (place < 0) data.resize(bytes());
    buffer.data = place < 0 ? data.data() : operands.at(place).buffer.data;
  }

  size_t bytes() const {
    const auto type = buffer.dtype;
    const bool is_one = type == XLA_FFI_DataType_S8 || type == XLA_FFI_DataType_F8E4M3FN;
    return Operand{&buffer}.size() * (is_one ? 1 : type == XLA_FFI_DataType_BF16 ? 2 : 4);
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

void call(const XLA_FFI_Api& api, int64_t kernel, int64_t (&values)[ATTRIBUTES],
          std::vector<Array>& operands, std::vector<Array>& results) {
  XLA_FFI_ByteSpan names[ATTRIBUTES];
  XLA_FFI_Scalar scalars[ATTRIBUTES];
  XLA_FFI_AttrType types[ATTRIBUTES];
  XLA_FFI_ByteSpan* name_pointers[ATTRIBUTES];
  void* scalar_pointers[ATTRIBUTES];
  for (int i = 0; i < ATTRIBUTES; i++) {
    names[i] = {NAMES[i], strlen(NAMES[i])}, scalars[i] = {XLA_FFI_DataType_S64, &values[i]};
    types[i] = XLA_FFI_AttrType_SCALAR;
    name_pointers[i] = &names[i], scalar_pointers[i] = &scalars[i];
  }
  std::vector<void*> arguments, returned;
  for (Array& array : operands) arguments.push_back(&array.buffer);
  for (Array& array : results) returned.push_back(&array.buffer);
  XLA_FFI_CallFrame frame{};
  frame.api = &api, frame.stage = XLA_FFI_ExecutionStage_EXECUTE;
  frame.args.size = int64_t(arguments.size()), frame.args.args = arguments.data();
  frame.rets.size = int64_t(returned.size()), frame.rets.rets = returned.data();
  frame.attrs = {XLA_FFI_Attrs_STRUCT_SIZE, nullptr, ATTRIBUTES, types, name_pointers,
                 scalar_pointers};
  KERNELS[kernel](&frame);
}

}  // namespace

int main() {
  XLA_FFI_Api api{};
  api.XLA_FFI_ThreadPool_NumThreads = count_threads, api.XLA_FFI_ThreadPool_Schedule = schedule;
  api.XLA_FFI_Error_Create = fail_with;
#if defined(__aarch64__)
  ExactDenormals::set(FLUSH_DENORMALS);  // as XLA's threads do
#endif
  for (int64_t kernel; fread(&kernel, sizeof(kernel), 1, stdin) == 1;) {
    int64_t values[ATTRIBUTES];
    for (int64_t& value : values) value = read_number();
    std::vector<Array> operands(read_number()), results(read_number());
    for (Array& array : operands) array.read();
    for (Array& array : results) array.make(operands);
    call(api, kernel, values, operands, results);
    for (const Array& array : results) fwrite(array.buffer.data, 1, array.bytes(), stdout);
  }
  for (std::thread& thread : threads) thread.join();
#if defined(__aarch64__)
  if (ExactDenormals::get() != FLUSH_DENORMALS) fail("the treatment of denormals has changed");
#endif
}
