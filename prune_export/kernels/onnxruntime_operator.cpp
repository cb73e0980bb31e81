// ONNX Runtime's operator `PackedMatMul` of the domain `prune_export`: y = x W^T for a packed W.
//
// Inputs: x float [..., in], and W uint8 [bytes], a constant. ONNX Runtime's C interface is a table
// of functions that only ever grows at its end, so the few that are called are named here by their
// places in it (as of version 16, ONNX Runtime 1.16), and its headers are not needed.
#include "packed.h"

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace {

constexpr uint32_t kVersion = 16;  // the first with all that is used
constexpr int kFloat = 1, kUint8 = 2, kFail = 1, kInvalid = 2;  // of the runtime's enumerations

enum Place {
  kCreateStatus = 0, kCreateCustomOpDomain = 26, kCustomOpDomainAdd = 27, kAddCustomOpDomain = 28,
  kGetTensorMutableData = 51, kGetDimensionsCount = 61, kGetDimensions = 62,
  kGetTensorShapeElementCount = 64, kGetTensorTypeAndShape = 65, kContextGetInput = 90,
  kContextGetOutput = 91, kReleaseTensorTypeAndShapeInfo = 99, kInfoGetConstantInput = 249,
  kContextParallelFor = 274,
};

using Status = void*;
using Function = void (*)();

struct Base {
  const Function* (*get)(uint32_t version);
  const char* (*version)();
};

const Function* table = nullptr;
std::atomic<uint64_t> calls{0};

template <typename Result, typename... Given>
Result call(Place place, Given... given) {
  return reinterpret_cast<Result (*)(Given...)>(table[place])(given...);
}

Status failed(int code, const char* message) {
  return call<Status>(kCreateStatus, code, message);
}

// The weights, in pages of 2 MiB where the system has them: fewer places to look up.
struct Weights {
  uint8_t* bytes = nullptr;
  packed::Matrix matrix;
  ~Weights() { std::free(bytes); }
};

struct Info { void* held = nullptr; ~Info() { if (held) call<void>(kReleaseTensorTypeAndShapeInfo, held); } };

Status create(const void*, const void*, const void* info, void** kernel) {
  int constant = 0;
  const void* value = nullptr;
  if (Status wrong = call<Status>(kInfoGetConstantInput, info, size_t{1}, &constant, &value)) return wrong;
  if (!constant || !value) return failed(kInvalid, "PackedMatMul: its weights are not a constant");
  Info shape;
  size_t size = 0;
  void* data = nullptr;
  if (Status wrong = call<Status>(kGetTensorTypeAndShape, value, &shape.held)) return wrong;
  if (Status wrong = call<Status>(kGetTensorShapeElementCount, const_cast<const void*>(shape.held), &size)) return wrong;
  if (Status wrong = call<Status>(kGetTensorMutableData, const_cast<void*>(value), &data)) return wrong;
  constexpr size_t kPage = size_t{1} << 21;
  const size_t unit = size >= kPage ? kPage : 64;
  auto* made = new (std::nothrow) Weights;
  if (made) made->bytes = static_cast<uint8_t*>(std::aligned_alloc(unit, (size + unit - 1) / unit * unit));
  if (!made || !made->bytes) {
    delete made;
    return failed(kFail, "PackedMatMul: there is not enough memory for its weights");
  }
#if defined(MADV_HUGEPAGE)
  if (unit == kPage) madvise(made->bytes, (size + unit - 1) / unit * unit, MADV_HUGEPAGE);
#endif
  std::memcpy(made->bytes, data, size);
  if (const char* wrong = packed::read(made->bytes, size, &made->matrix)) {
    char message[160] = "PackedMatMul: its weights cannot be used: ";
    std::strncat(message, wrong, sizeof message - std::strlen(message) - 1);
    delete made;
    return failed(kInvalid, message);
  }
  *kernel = made;
  return nullptr;
}

struct Job {
  const packed::Matrix* matrix;
  packed::Prepared x;
  size_t tokens, rows;  // rows of each part
  float* y;
};

void part(void* given, size_t number) {
  const auto& job = *static_cast<const Job*>(given);
  const size_t first = number * job.rows, last = first + job.rows;
  packed::multiply(*job.matrix, job.x, job.tokens, first,
                   last < job.matrix->rows ? last : job.matrix->rows, job.y);
}

struct Scratch {
  void* bytes = nullptr;
  size_t size = 0;
  ~Scratch() { std::free(bytes); }
};

Status compute(void* kernel, void* context) {
  calls.fetch_add(1, std::memory_order_relaxed);
  const packed::Matrix& matrix = static_cast<const Weights*>(kernel)->matrix;
  const void* input = nullptr;
  void *x = nullptr, *output = nullptr, *y = nullptr;
  Info shape;
  size_t rank = 0;
  int64_t sizes[16];
  if (Status wrong = call<Status>(kContextGetInput, const_cast<const void*>(context), size_t{0}, &input)) return wrong;
  if (Status wrong = call<Status>(kGetTensorTypeAndShape, input, &shape.held)) return wrong;
  const void* held = shape.held;
  if (Status wrong = call<Status>(kGetDimensionsCount, held, &rank)) return wrong;
  if (rank < 1 || rank > 16) return failed(kInvalid, "PackedMatMul: x has no dimension, or too many");
  if (Status wrong = call<Status>(kGetDimensions, held, &sizes[0], rank)) return wrong;
  if (sizes[rank - 1] != static_cast<int64_t>(matrix.columns))
    return failed(kInvalid, "PackedMatMul: x has another width than the weights have inputs");
  size_t tokens = 1;
  for (size_t at = 0; at + 1 < rank; ++at) tokens *= static_cast<size_t>(sizes[at]);
  sizes[rank - 1] = static_cast<int64_t>(matrix.rows);
  if (Status wrong = call<Status>(kContextGetOutput, context, size_t{0}, static_cast<const int64_t*>(sizes), rank, &output)) return wrong;
  if (!tokens || !matrix.rows) return nullptr;
  if (Status wrong = call<Status>(kGetTensorMutableData, const_cast<void*>(input), &x)) return wrong;
  if (Status wrong = call<Status>(kGetTensorMutableData, output, &y)) return wrong;

  static thread_local Scratch scratch;
  const size_t wanted = packed::prepared_bytes(matrix, tokens);
  if (wanted > scratch.size) {
    std::free(scratch.bytes);
    scratch.bytes = std::aligned_alloc(64, wanted);
    scratch.size = scratch.bytes ? wanted : 0;
    if (!scratch.bytes) return failed(kFail, "PackedMatMul: there is not enough memory");
  }
  Job job{&matrix, packed::prepared_at(matrix, tokens, scratch.bytes), tokens, 0, static_cast<float*>(y)};
  packed::prepare(matrix, static_cast<const float*>(x), tokens, job.x);
  // Parts of a quarter of a million products: smaller ones cost more to hand out than they save.
  job.rows = (size_t{1} << 18) / (matrix.columns * tokens) + 1;
  const size_t parts = (matrix.rows + job.rows - 1) / job.rows;
  if (parts == 1) {
    part(&job, 0);
    return nullptr;
  }
  return call<Status>(kContextParallelFor, const_cast<const void*>(context), &part, parts, size_t{0}, static_cast<void*>(&job));
}

// How the runtime describes an operator, up to version 16.
struct Operator {
  uint32_t version;
  void* (*create_old)(const Operator*, const void*, const void*);
  const char* (*name)(const Operator*);
  const char* (*provider)(const Operator*);
  int (*input_type)(const Operator*, size_t);
  size_t (*inputs)(const Operator*);
  int (*output_type)(const Operator*, size_t);
  size_t (*outputs)(const Operator*);
  void (*compute_old)(void*, void*);
  void (*destroy)(void*);
  int (*input_kind)(const Operator*, size_t);
  int (*output_kind)(const Operator*, size_t);
  int (*memory)(const Operator*, size_t);
  int (*variadic[4])(const Operator*);
  Status (*create)(const void*, const void*, const void*, void**);
  Status (*compute)(void*, void*);
  Status (*shapes)(const Operator*, void*);
  int (*first_version)(const Operator*);
  int (*last_version)(const Operator*);
};

const Operator kOperator = {
    kVersion,
    nullptr,
    [](const Operator*) { return "PackedMatMul"; },
    [](const Operator*) -> const char* { return "CPUExecutionProvider"; },
    [](const Operator*, size_t at) { return at == 0 ? kFloat : kUint8; },
    [](const Operator*) { return size_t{2}; },
    [](const Operator*, size_t) { return kFloat; },
    [](const Operator*) { return size_t{1}; },
    nullptr,
    [](void* kernel) { delete static_cast<Weights*>(kernel); },
    [](const Operator*, size_t) { return 0; },
    [](const Operator*, size_t) { return 0; },
    [](const Operator*, size_t) { return 0; },
    {[](const Operator*) { return 0; }, [](const Operator*) { return 0; },
     [](const Operator*) { return 0; }, [](const Operator*) { return 0; }},
    create,
    compute,
    nullptr,
    [](const Operator*) { return 1; },
    [](const Operator*) { return 0x7FFFFFFF; },
};

}  // namespace

extern "C" __attribute__((visibility("default"))) uint64_t prune_export_calls() { return calls.load(); }

// What the runtime calls when the library is registered with a session's options.
extern "C" __attribute__((visibility("default"))) Status RegisterCustomOps(void* options, const Base* base) {
  table = base->get(kVersion);
  if (!table) return nullptr;  // older than 1.16: the session then says that it has no such operator
  static void* domain = nullptr;
  if (!domain) {
    void* made = nullptr;
    if (Status wrong = call<Status>(kCreateCustomOpDomain, "prune_export", &made)) return wrong;
    if (Status wrong = call<Status>(kCustomOpDomainAdd, made, &kOperator)) return wrong;
    domain = made;
  }
  return call<Status>(kAddCustomOpDomain, options, domain);
}
