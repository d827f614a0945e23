// `launch.quick` in one call into C++: is this a kind of call that went through all checks? Then make the output and
// start the kernel. Compiled on request by front.py; without it the same steps are taken in Python.
//
// Nothing is decided here. What a kind of call is (`plan`) and which kernel with which grid computes it (`way`) was
// worked out by launch.py; whatever is not on record is answered with None, and Python takes the long way.

#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>

#include <ATen/EmptyTensor.h>
#include <c10/core/Allocator.h>
#include <c10/core/GradMode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <array>
#include <cmath>
#include <map>
#include <optional>
#include <tuple>
#include <vector>

namespace {

// cuLaunchKernel(function, grid, block, shared bytes, stream, arguments, nullptr)
using Launch = int (*)(void*, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void*, void**, void**);

Launch launch_kernel = nullptr;
PyObject* current_stream = nullptr;  // device -> the stream as an integer
constexpr int64_t kHighestInt = 2147483647;
constexpr size_t kMostPlans = 32, kMostWays = 4096;  // what launch.py keeps
constexpr int kPointers = 7, kUnused = 4;

struct Kind {  // everything about a tensor but its address and its first size
  PyTypeObject* type;
  c10::DispatchKeySet keys;
  at::ScalarType dtype;
  c10::Device device;
  std::vector<int64_t> sizes, strides;
};

struct Way {  // a compiled kernel and its grid
  void* function;
  unsigned x, y, threads, shared;
};

struct Plan {
  int64_t number;
  bool shared;  // the offsets of queries and keys are one tensor
  std::vector<Kind> kinds;
  float scale;  // the default, times log2(e)
  std::map<std::tuple<int64_t, int64_t, int64_t, bool, PyObject*>, Way> ways;  // the last: a backend's name
};

std::vector<Plan> plans;
int64_t next_number = 0;

c10::DispatchKeySet keys_now(const at::Tensor& x) {  // modes, transforms and autocast show here
  const auto local = c10::impl::tls_local_dispatch_key_set();
  return (x.key_set() | local.included_) - local.excluded_;
}

bool wants_gradient(const at::Tensor& x) {
  return c10::GradMode::is_enabled() && x.requires_grad();
}

bool same(PyObject* object, const Kind& kind) {
  if (Py_TYPE(object) != kind.type) return false;
  const at::Tensor& x = THPVariable_Unpack(object);
  if (keys_now(x) != kind.keys || x.scalar_type() != kind.dtype || x.device() != kind.device) return false;
  if (x.dim() != static_cast<int64_t>(kind.sizes.size()) || wants_gradient(x)) return false;
  const auto sizes = x.sizes(), strides = x.strides();
  for (size_t i = 0; i < kind.sizes.size(); ++i) {
    if (strides[i] != kind.strides[i] || (i > 0 && sizes[i] != kind.sizes[i])) return false;
  }
  return true;
}

// plan(tensors, shared, scale) -> its number, or None
PyObject* add_plan(PyObject*, PyObject* args) {
  HANDLE_TH_ERRORS
  PyObject* tensors;
  int shared;
  float scale;
  if (!PyArg_ParseTuple(args, "O!pf", &PyTuple_Type, &tensors, &shared, &scale)) return nullptr;
  Plan plan{next_number, shared != 0, {}, scale, {}};
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(tensors); ++i) {
    PyObject* object = PyTuple_GET_ITEM(tensors, i);
    if (!THPVariable_Check(object)) Py_RETURN_NONE;
    const at::Tensor& x = THPVariable_Unpack(object);
    if (wants_gradient(x) || x.unsafeGetTensorImpl()->has_symbolic_sizes_strides()) Py_RETURN_NONE;
    Py_INCREF(Py_TYPE(object));  // a type that went away could leave its address to another
    plan.kinds.push_back({Py_TYPE(object), keys_now(x), x.scalar_type(), x.device(), x.sizes().vec(), x.strides().vec()});
  }
  if (plans.size() >= kMostPlans) plans.erase(plans.begin());
  plans.push_back(std::move(plan));
  return PyLong_FromLongLong(next_number++);
  END_HANDLE_TH_ERRORS
}

// way(number, max_q, max_k, images, equal, backend, function, x, y, threads, shared)
PyObject* add_way(PyObject*, PyObject* args) {
  long long number, max_q, max_k, images;
  unsigned long long function;
  int equal;
  PyObject* backend;
  Way way;
  if (!PyArg_ParseTuple(args, "LLLLpUKIIII", &number, &max_q, &max_k, &images, &equal, &backend, &function, &way.x,
                        &way.y, &way.threads, &way.shared)) return nullptr;
  Py_INCREF(backend);  // compared by address: names in a program's text are one object, others take the long way
  PyUnicode_InternInPlace(&backend);
  way.function = reinterpret_cast<void*>(function);
  for (auto& plan : plans) {
    if (plan.number != number) continue;
    if (plan.ways.size() >= kMostWays) plan.ways.clear();
    plan.ways[{max_q, max_k, images, equal != 0, backend}] = way;
  }
  Py_RETURN_NONE;
}

bool read_length(PyObject* object, int64_t& n) {  // a plain int from 1 to 2^31 - 1
  if (!PyLong_CheckExact(object)) return false;
  int overflow = 0;
  n = PyLong_AsLongLongAndOverflow(object, &overflow);
  return !overflow && n > 0 && n <= kHighestInt;
}

// attend(q, k, v, cu_q, cu_k, max_q, max_k, scale, backend) -> the output, or None
PyObject* attend(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  int64_t max_q, max_k;
  if (count != 9 || !read_length(args[5], max_q) || !read_length(args[6], max_k)) Py_RETURN_NONE;
  const bool shared = args[3] == args[4];
  Plan* plan = nullptr;
  for (auto& candidate : plans) {
    if (candidate.shared != shared) continue;
    size_t i = 0;
    while (i < candidate.kinds.size() && same(args[i], candidate.kinds[i])) ++i;
    if (i == candidate.kinds.size()) {
      plan = &candidate;
      break;
    }
  }
  if (plan == nullptr) Py_RETURN_NONE;

  const at::Tensor &q = THPVariable_Unpack(args[0]), &k = THPVariable_Unpack(args[1]), &v = THPVariable_Unpack(args[2]);
  const at::Tensor &cu_q = THPVariable_Unpack(args[3]), &cu_k = THPVariable_Unpack(args[4]);
  const int64_t total = q.size(0), total_k = k.size(0), images = cu_q.size(0) - 1;
  if (v.size(0) != total_k || cu_k.size(0) != images + 1 || total <= 0 || total > kHighestInt) Py_RETURN_NONE;
  const bool equal = total == images * max_q && total_k == images * max_k;
  const auto found = plan->ways.find({max_q, max_k, images, equal, args[8]});
  if (found == plan->ways.end()) Py_RETURN_NONE;
  const Way way = found->second;
  float scale = plan->scale;
  if (args[7] != Py_None) {
    if (!PyFloat_CheckExact(args[7])) Py_RETURN_NONE;
    const double given = PyFloat_AS_DOUBLE(args[7]);
    if (!(given > 0.0 && std::isfinite(given))) Py_RETURN_NONE;
    scale = static_cast<float>(given * 1.4426950408889634);
  }

  const c10::Device device = q.device();
  void* stream = nullptr;
  if (device.type() != at::kCPU) {
    const c10::impl::VirtualGuardImpl guard(device.type());
    if (guard.getDevice() != device) Py_RETURN_NONE;
    PyObject* number = PyLong_FromLong(device.index());
    PyObject* answer = number ? PyObject_CallOneArg(current_stream, number) : nullptr;
    Py_XDECREF(number);
    if (answer == nullptr) return nullptr;
    stream = PyLong_AsVoidPtr(answer);
    Py_DECREF(answer);
  }
  const auto backend = c10::DispatchKeySet(device.type() == at::kCPU ? c10::DispatchKey::CPU : c10::DispatchKey::CUDA);
  at::Tensor out = at::detail::empty_generic(
      {total, q.size(1), q.size(2)}, c10::GetAllocator(device.type()), backend, q.scalar_type(), std::nullopt);

  std::array<const void*, kPointers> pointers = {q.const_data_ptr(), k.const_data_ptr(), v.const_data_ptr(),
                                                 out.const_data_ptr(), out.const_data_ptr(), cu_q.const_data_ptr(),
                                                 cu_k.const_data_ptr()};
  uintptr_t bits = 0;
  for (const void* pointer : pointers) bits |= reinterpret_cast<uintptr_t>(pointer);
  if (bits & 15) Py_RETURN_NONE;  // kernels are compiled for addresses that are multiples of 16
  int lengths[] = {static_cast<int>(total), static_cast<int>(max_q), static_cast<int>(max_k)};
  std::array<void*, kUnused> unused = {};  // pointers to scratch memory that the kernel does not have
  std::array<void*, kPointers + 4 + kUnused> arguments;
  size_t n = 0;
  for (auto& pointer : pointers) arguments[n++] = &pointer;
  arguments[n++] = &scale;
  for (auto& length : lengths) arguments[n++] = &length;
  for (auto& pointer : unused) arguments[n++] = &pointer;
  int error;
  Py_BEGIN_ALLOW_THREADS;  // a full queue makes the driver wait
  error = launch_kernel(way.function, way.x, way.y, 1, way.threads, 1, 1, way.shared, stream, arguments.data(), nullptr);
  Py_END_ALLOW_THREADS;
  if (error != 0) {
    PyErr_Format(PyExc_RuntimeError, "cuLaunchKernel failed with error %d", error);
    return nullptr;
  }
  return THPVariable_Wrap(std::move(out));
  END_HANDLE_TH_ERRORS
}

// connect(address of cuLaunchKernel, function from device to stream)
PyObject* connect(PyObject*, PyObject* args) {
  unsigned long long address;
  PyObject* stream;
  if (!PyArg_ParseTuple(args, "KO", &address, &stream)) return nullptr;
  launch_kernel = reinterpret_cast<Launch>(address);
  Py_INCREF(stream);
  Py_XSETREF(current_stream, stream);
  Py_RETURN_NONE;
}

PyObject* forget(PyObject*, PyObject*) {
  plans.clear();
  Py_RETURN_NONE;
}

PyMethodDef methods[] = {
    {"attend", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(attend)), METH_FASTCALL, nullptr},
    {"plan", add_plan, METH_VARARGS, nullptr},
    {"way", add_way, METH_VARARGS, nullptr},
    {"connect", connect, METH_VARARGS, nullptr},
    {"forget", forget, METH_NOARGS, nullptr},
    {nullptr, nullptr, 0, nullptr},
};
PyModuleDef module = {PyModuleDef_HEAD_INIT, "front", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

#define JOINED(a, b) a##b
#define INIT_OF(name) JOINED(PyInit_, name)
PyMODINIT_FUNC INIT_OF(TORCH_EXTENSION_NAME)() { return PyModule_Create(&module); }
