// The extension `_cpu`: takes tensors, returns a status. It selects the instruction set and
// releases the GIL for work that takes longer than microseconds.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <vector>

#ifdef RK_HAVE_X86_LEVELS
#include <cpuid.h>
#endif
#ifdef _OPENMP
#include <omp.h>
#endif

#include "bind/advantages.h"
#include "bind/arguments.h"
#include "bind/kl.h"
#include "bind/logprobs.h"
#include "bind/mismatch.h"
#include "bind/policy.h"
#include "bind/support.h"
#include "bind/value.h"
#include "cpu/kernels.h"
#include "cpu/memory.h"
#include "cpu/parallel.h"
#include "cpu/memory_transpose.h"

namespace py = pybind11;

namespace rk {
namespace {

std::vector<const Kernels*> supported_kernels() {
  std::vector<const Kernels*> found{&kernels_baseline};
#ifdef RK_HAVE_X86_LEVELS
  __builtin_cpu_init();
  // F16C through cpuid, because Clang's __builtin_cpu_supports lacks it.
  unsigned a, b, c, d;
  const bool f16c = __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
  if (f16c && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    found.push_back(&kernels_avx2);
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
      found.push_back(&kernels_avx512);
  }
#endif
  return found;
}

const Kernels* active = supported_kernels().back();

std::vector<std::string> isa_names() {
  std::vector<std::string> names;
  for (const Kernels* k : supported_kernels()) names.emplace_back(k->isa);
  return names;
}

void select_isa(const std::string& name) {
  for (const Kernels* k : supported_kernels()) {
    if (name == k->isa) {
      active = k;
      return;
    }
  }
  throw std::invalid_argument("instruction set '" + name +
                              "' is not supported by this CPU or build");
}

}  // namespace
}  // namespace rk

PYBIND11_MODULE(_cpu, m) {
  using namespace rk;
  m.doc() =
      "CPU kernels of rlhf_kernels. Does not check its arguments: call it through "
      "rlhf_kernels.kernels.native.";
  m.def("isa_names", &isa_names,
        "Instruction sets that this CPU and this build support, best last.");
  m.def("isa", [] { return std::string(active->isa); }, "The instruction set in use.");
  m.def("select_isa", &select_isa, "Use a supported instruction set by name.");
  m.def(
      "prepare_pages",
      [](uintptr_t data, int64_t bytes, int32_t threads) {
        constexpr int64_t kItem = 2 << 20;
        const FreshPages pages(reinterpret_cast<void*>(data), bytes);
        const py::gil_scoped_release release;
        parallel_for((bytes + kItem - 1) / kItem, threads, [&](int64_t i) {
          pages.prepare(i * kItem, bytes - i * kItem < kItem ? bytes - i * kItem : kItem);
        });
      },
      "Pre-faults the pages of a fresh buffer that will be written completely.");
  m.def(
      "transpose",
      [](In x, Out out, int32_t threads) {
        if ((x.cols > 1 && x.stride1 != 1) || (out.cols > 1 && out.stride1 != 1))
          throw std::invalid_argument("transpose: rows must have unit strides");
        const py::gil_scoped_release release;
        transpose(static_cast<const uint16_t*>(x.data), x.stride0, static_cast<uint16_t*>(out.data),
                  out.stride0, x.rows, x.cols, threads);
      },
      "out [m, n] = x [n, m] transposed, of bfloat16 or float16 with unit strides along rows.");
  m.def("freed_pages_leave", &freed_pages_leave, py::arg("devices") = "/sys/bus/virtio/devices",
        "Whether a hypervisor takes back the pages that this machine frees.");
  m.def("learn_torch", &TensorView::learn_torch,
        "Takes torch's types of tensors, and the code in abi_types.h of each of its dtypes.");
  m.def("plain", &plain, "See bind/arguments.h.");
  // See module_cuda.cpp.
  m.attr("gpu") = false;
  m.attr("emulated") = false;
#ifdef _OPENMP
  m.attr("openmp") = _OPENMP;
#else
  m.attr("openmp") = 0;
#endif

  const auto table = []() -> const Kernels& { return *active; };
  bind_logprobs(m, table);
  bind_support(m, table);
  bind_kl(m, table);
  bind_policy(m, table);
  bind_value(m, table);
  bind_mismatch(m, table);
  bind_advantages(m, table);
}
