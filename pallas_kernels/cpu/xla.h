// What the kernels need of XLA's foreign function interface, by its C API: the headers of the C++
// one, and what they instantiate, take a compiler two seconds for each library.

#pragma once

#include <cstdint>
#include <cstring>

#include "xla/ffi/api/c_api.h"

namespace {

// An operand or a result.
struct Operand {
  const XLA_FFI_Buffer* buffer;

  XLA_FFI_DataType type() const { return buffer->dtype; }
  int64_t rank() const { return buffer->rank; }
  int64_t operator[](int64_t axis) const { return buffer->dims[axis]; }
  int64_t size() const {
    int64_t size = 1;
    for (int64_t axis = 0; axis < rank(); axis++) size *= buffer->dims[axis];
    return size;
  }
  template <class T>
  T* data() const {
    return static_cast<T*>(buffer->data);
  }
  bool has(XLA_FFI_DataType type, int64_t size) const {
    return buffer->dtype == type && this->size() == size;
  }
};

// A call of a kernel by XLA.
struct Call {
  const XLA_FFI_CallFrame* frame;

  int64_t num_operands() const { return frame->args.size; }
  int64_t num_results() const { return frame->rets.size; }
  Operand operand(int64_t i) const {
    return {static_cast<const XLA_FFI_Buffer*>(frame->args.args[i])};
  }
  Operand result(int64_t i) const {
    return {static_cast<const XLA_FFI_Buffer*>(frame->rets.rets[i])};
  }

  // An int64 or a boolean; 0 if there is no such attribute.
  int64_t attribute(const char* name) const {
    const XLA_FFI_Attrs& all = frame->attrs;
    for (int64_t i = 0; i < all.size; i++) {
      const XLA_FFI_ByteSpan& found = *all.names[i];
      if (all.types[i] != XLA_FFI_AttrType_SCALAR || found.len != strlen(name) ||
          memcmp(found.ptr, name, found.len))
        continue;
      const auto* scalar = static_cast<const XLA_FFI_Scalar*>(all.attrs[i]);
      if (scalar->dtype == XLA_FFI_DataType_S64) return *static_cast<const int64_t*>(scalar->value);
      if (scalar->dtype == XLA_FFI_DataType_PRED) return *static_cast<const bool*>(scalar->value);
    }
    return 0;
  }

  XLA_FFI_Error* error(XLA_FFI_Error_Code code, const char* message) const {
    XLA_FFI_Error_Create_Args args{XLA_FFI_Error_Create_Args_STRUCT_SIZE, nullptr, message, code};
    return frame->api->XLA_FFI_Error_Create(&args);
  }

  // Of XLA's own pool.
  int64_t num_threads() const {
    int64_t count = 1;
    XLA_FFI_ThreadPool_NumThreads_Args args{XLA_FFI_ThreadPool_NumThreads_Args_STRUCT_SIZE, nullptr,
                                            frame->ctx, &count};
    return is_done(frame->api->XLA_FFI_ThreadPool_NumThreads(&args)) ? count : 1;
  }

  // Runs a copy of `work` on one of these threads, at once if that is not possible.
  template <class Work>
  void schedule(const Work& work) const {
    const auto run = [](void* data) {
      Work* copy = static_cast<Work*>(data);
      (*copy)();
      delete copy;
    };
    Work* copy = new Work(work);
    XLA_FFI_ThreadPool_Schedule_Args args{XLA_FFI_ThreadPool_Schedule_Args_STRUCT_SIZE, nullptr,
                                          frame->ctx, run, copy};
    if (!is_done(frame->api->XLA_FFI_ThreadPool_Schedule(&args))) run(copy);
  }

 private:
  bool is_done(XLA_FFI_Error* error) const {
    if (!error) return true;
    XLA_FFI_Error_Destroy_Args args{XLA_FFI_Error_Destroy_Args_STRUCT_SIZE, nullptr, error};
    frame->api->XLA_FFI_Error_Destroy(&args);
    return false;
  }
};

// What XLA calls: the kernel, unless XLA asks, as it does once, for which version of the interface it
// was compiled.
inline XLA_FFI_Error* handle(const XLA_FFI_CallFrame* frame,
                             XLA_FFI_Error* (*kernel)(const Call&)) {
  if (frame->extension_start && frame->extension_start->type == XLA_FFI_Extension_Metadata) {
    XLA_FFI_Metadata& about =
        *reinterpret_cast<XLA_FFI_Metadata_Extension*>(frame->extension_start)->metadata;
    about.api_version = {XLA_FFI_Api_Version_STRUCT_SIZE, nullptr, XLA_FFI_API_MAJOR,
                         XLA_FFI_API_MINOR};
    about.traits = 0;
    about.state_type_id = XLA_FFI_UNKNOWN_TYPE_ID;
    return nullptr;
  }
  return kernel({frame});
}

}  // namespace
