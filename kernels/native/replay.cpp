// Replays the tapes of tape.py: allocates and launches what Python took down, and is a node of
// autograd while it does. docs/performance.md says what it saves.

#include <dlfcn.h>

#include <array>
#include <cstring>
#include <mutex>
#include <optional>
#include <string>
#include <unordered_map>
#include <vector>

#include <torch/csrc/autograd/functions/basic_ops.h>
#include <torch/extension.h>
#include <torch/version.h>

namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// Of what Python passes here; the same number stands in extension.py.
constexpr int kVersion = 2;
constexpr uint64_t kAlignment = 16;
constexpr size_t kMostArguments = 64;

// ---- CUDA's driver, without its headers: the same file is compiled with and without CUDA.

using LaunchKernel = int (*)(
    void*, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void*, void**,
    void**);

struct Driver {
  LaunchKernel launch = nullptr;
  int (*current_context)(void**) = nullptr;
  int (*device_of)(int*, int) = nullptr;
  int (*retain_primary)(void**, int) = nullptr;
  int (*make_current)(void*) = nullptr;
  int (*parameter_info)(void*, size_t, size_t*, size_t*) = nullptr;

  template <typename Function>
  void find(void* library, const char* name, Function& function) {
    function = reinterpret_cast<Function>(dlsym(library, name));
    TORCH_CHECK(function, "libcuda.so.1 has no ", name);
  }

  Driver() {
    void* library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_GLOBAL);
    if (!library) {
      return;
    }
    find(library, "cuLaunchKernel", launch);
    find(library, "cuCtxGetCurrent", current_context);
    find(library, "cuDeviceGet", device_of);
    find(library, "cuDevicePrimaryCtxRetain", retain_primary);
    find(library, "cuCtxSetCurrent", make_current);
    parameter_info = reinterpret_cast<decltype(parameter_info)>(
        dlsym(library, "cuFuncGetParamInfo"));
  }
};

Driver& driver() {
  static Driver found;
  return found;
}

void check(int code, const std::string& what) {
  TORCH_CHECK(code == 0, what, ": CUDA error ", code);
}

// A thread of autograd may not have made a context current yet.
void ensure_context(const c10::Device& device) {
  if (!driver().current_context) {
    return;
  }
  void* context = nullptr;
  check(driver().current_context(&context), "cuCtxGetCurrent");
  if (context) {
    return;
  }
  int ordinal = 0;
  check(driver().device_of(&ordinal, device.index()), "cuDeviceGet");
  check(driver().retain_primary(&context, ordinal), "cuDevicePrimaryCtxRetain");
  check(driver().make_current(context), "cuCtxSetCurrent");
}

// Why there is no launching by the driver that is there; empty without one, and without obstacle.
std::string obstacle() {
  const bool old = driver().launch && !driver().parameter_info;
  return old ? "needs cuFuncGetParamInfo, which CUDA's driver has since 12.4" : "";
}

// Sizes in bytes of a kernel's parameters.
std::vector<size_t> parameters_of(uint64_t function) {
  TORCH_CHECK(driver().parameter_info, "no driver of CUDA 12.4 or later");
  std::vector<size_t> sizes;
  size_t offset = 0, size = 0;
  while (driver().parameter_info(
             reinterpret_cast<void*>(function), sizes.size(), &offset, &size) == 0) {
    sizes.push_back(size);
  }
  return sizes;
}

// Tests launch by a function of their own.
void launch_by(uint64_t address) {
  driver().launch = reinterpret_cast<LaunchKernel>(address);
}

// ---- Tapes.

// What a kernel is given: the address of ``slot`` plus ``bits``, or, of no slot, the bits.
struct Argument {
  int64_t slot;
  uint64_t bits;
};

struct Launch {
  std::string name;
  uint64_t function;
  std::array<unsigned, 3> grid;
  unsigned threads, shared;
  std::vector<Argument> arguments;
};

struct Allocation {
  std::vector<int64_t> sizes;
  at::ScalarType dtype;
};

// A slot, or where there are strides a view of it; slot -1 is nothing.
struct Result {
  int64_t slot = -1;
  std::vector<int64_t> sizes, strides;
  int64_t offset = 0;
};

using AllocationTuple = std::tuple<std::vector<int64_t>, at::ScalarType>;
using LaunchTuple = std::tuple<
    std::string, uint64_t, std::array<unsigned, 3>, unsigned, unsigned,
    std::vector<std::pair<int64_t, uint64_t>>>;
using ResultTuple =
    std::tuple<int64_t, std::vector<int64_t>, std::vector<int64_t>, int64_t>;

struct Tape : torch::CustomClassHolder {
  size_t num_inputs;
  std::vector<Allocation> allocations;
  std::vector<Launch> launches;
  std::vector<Result> results;

  Tape(
      size_t inputs,
      const std::vector<AllocationTuple>& allocated,
      const std::vector<LaunchTuple>& launched,
      const std::vector<ResultTuple>& returned)
      : num_inputs(inputs) {
    for (const auto& [sizes, dtype] : allocated) {
      allocations.push_back({sizes, dtype});
    }
    for (const auto& [name, function, grid, threads, shared, given] : launched) {
      Launch launch{name, function, grid, threads, shared, {}};
      TORCH_CHECK(given.size() <= kMostArguments, name, " has ", given.size(), " arguments");
      for (const auto& [slot, bits] : given) {
        launch.arguments.push_back({slot, bits});
      }
      launches.push_back(std::move(launch));
    }
    for (const auto& [slot, sizes, strides, offset] : returned) {
      results.push_back({slot, sizes, strides, offset});
    }
  }

  // Inputs, then what was allocated, after all launches.
  std::vector<at::Tensor> run(
      std::vector<at::Tensor> slots, const c10::Device& device, uint64_t stream) const {
    at::AutoDispatchBelowADInplaceOrView guard;
    TORCH_INTERNAL_ASSERT(slots.size() == num_inputs);
    for (const auto& allocation : allocations) {
      slots.push_back(at::empty(
          allocation.sizes, at::TensorOptions().dtype(allocation.dtype).device(device)));
    }
    ensure_context(device);
    std::array<uint64_t, kMostArguments> values;
    std::array<void*, kMostArguments> parameters;
    for (const auto& launch : launches) {
      for (size_t i = 0; i < launch.arguments.size(); ++i) {
        const auto& argument = launch.arguments[i];
        values[i] = argument.bits;
        if (argument.slot >= 0) {
          values[i] += reinterpret_cast<uint64_t>(slots[argument.slot].data_ptr());
        }
        parameters[i] = &values[i];
      }
      const auto& grid = launch.grid;
      const int code = driver().launch(
          reinterpret_cast<void*>(launch.function), grid[0], grid[1], grid[2], launch.threads, 1,
          1, launch.shared, reinterpret_cast<void*>(stream), parameters.data(), nullptr);
      check(code, launch.name);
    }
    return slots;
  }

  at::Tensor result(const std::vector<at::Tensor>& slots, size_t index) const {
    const auto& found = results[index];
    if (found.slot < 0) {
      return {};
    }
    const auto& slot = slots[found.slot];
    if (found.strides.empty()) {
      return slot;
    }
    at::AutoDispatchBelowADInplaceOrView guard;
    return slot.as_strided(found.sizes, found.strides, found.offset);
  }
};

bool aligned(const at::Tensor& tensor) {
  return reinterpret_cast<uint64_t>(tensor.data_ptr()) % kAlignment == 0;
}

// ---- One kind of call, forward and backward.

struct Program : torch::CustomClassHolder {
  std::string name;
  c10::intrusive_ptr<Tape> forward;
  // Which operands there are; and the saved tensors, operands first.
  std::vector<bool> given, saved;
  // Operands that are parameters: whose gradients may be a pass of their own.
  std::vector<size_t> parameters;
  size_t num_results;
  // Results: which one gets zeros for a gradient that it has not, which one has none; -1 for none.
  int64_t filled, unused;
  // Operands: the branch and its bias, whose gradient is a sum of the branch's; -1 for none.
  int64_t branch, bias;
  // (key, trains, main_grad, saved, gradients of the results) to those of the operands, where no
  // tape has been added for the key.
  py::object fallback;

  Program(
      std::string name_, c10::intrusive_ptr<Tape> tape, std::vector<bool> given_,
      std::vector<size_t> parameters_, size_t results, int64_t filled_, int64_t unused_,
      int64_t branch_, int64_t bias_, py::object fallback_)
      : name(std::move(name_)),
        forward(std::move(tape)),
        given(std::move(given_)),
        saved(given),
        parameters(std::move(parameters_)),
        num_results(results),
        filled(filled_),
        unused(unused_),
        branch(branch_),
        bias(bias_),
        fallback(std::move(fallback_)) {
    for (size_t i = num_results; i < forward->results.size(); ++i) {
      saved.push_back(forward->results[i].slot >= 0);
    }
  }

  ~Program() override {
    // The last owner may be a node that autograd lets go of in a thread of its own.
    if (Py_IsInitialized()) {
      const py::gil_scoped_acquire gil;
      fallback = py::object();
    } else {
      fallback.release();
    }
  }

  void add_backward(uint64_t key, c10::intrusive_ptr<Tape> tape) {
    const std::lock_guard<std::mutex> lock(mutex_);
    backward_[key] = std::move(tape);
  }

  c10::intrusive_ptr<Tape> backward_of(uint64_t key) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = backward_.find(key);
    return found == backward_.end() ? c10::intrusive_ptr<Tape>() : found->second;
  }

 private:
  std::mutex mutex_;
  std::unordered_map<uint64_t, c10::intrusive_ptr<Tape>> backward_;
};

struct Call {
  c10::intrusive_ptr<Program> program;
  at::Tensor main_grad;
  uint64_t stream;
};

variable_list defined_of(const std::vector<at::Tensor>& tensors) {
  variable_list defined;
  for (const auto& tensor : tensors) {
    if (tensor.defined()) {
      defined.push_back(tensor);
    }
  }
  return defined;
}

// The inverse, where ``present`` says which are defined.
std::vector<at::Tensor> spread(at::TensorList defined, const std::vector<bool>& present) {
  std::vector<at::Tensor> tensors(present.size());
  size_t next = 0;
  for (size_t i = 0; i < present.size(); ++i) {
    if (present[i]) {
      tensors[i] = defined[next++];
    }
  }
  return tensors;
}

py::object to_python(const at::Tensor& tensor) {
  return tensor.defined() ? py::cast(tensor) : py::object(py::none());
}

py::list to_python(const std::vector<at::Tensor>& tensors) {
  py::list list;
  for (const auto& tensor : tensors) {
    list.append(to_python(tensor));
  }
  return list;
}

at::Tensor tensor_of(const py::handle& object) {
  return object.is_none() ? at::Tensor() : object.cast<at::Tensor>();
}

std::vector<at::Tensor> tensors_of(const py::sequence& sequence) {
  std::vector<at::Tensor> tensors;
  for (const auto& item : sequence) {
    tensors.push_back(tensor_of(item));
  }
  return tensors;
}

// Gradients that cannot be differentiated again: to try is an error, and no gradient of zero.
variable_list once_differentiable(const variable_list& gradients) {
  variable_list leaves;
  for (const auto& gradient : defined_of(gradients)) {
    leaves.push_back(gradient.detach().set_requires_grad(true));
  }
  torch::autograd::DelayedError error(
      "trying to differentiate twice through a hyper-connection, which has first gradients only",
      static_cast<int64_t>(leaves.size()));
  std::vector<bool> present;
  for (const auto& gradient : gradients) {
    present.push_back(gradient.defined());
  }
  return spread(error.apply(std::move(leaves)), present);
}

struct HyperConnection : torch::autograd::Function<HyperConnection> {
  // ``operands``: those that there are.
  static variable_list forward(
      AutogradContext* context, const Call& call, at::TensorList operands) {
    const auto& program = *call.program;
    const auto inputs = spread(operands, program.given);
    const auto slots = program.forward->run(inputs, operands.front().device(), call.stream);
    bool trains = false;
    for (const auto index : program.parameters) {
      trains = trains || (inputs[index].defined() && inputs[index].requires_grad());
    }
    auto saved = inputs;
    for (size_t i = program.num_results; i < program.forward->results.size(); ++i) {
      saved.push_back(program.forward->result(slots, i));
    }
    context->save_for_backward(defined_of(saved));
    context->set_materialize_grads(false);
    auto& data = context->saved_data;
    data["program"] = c10::IValue::make_capsule(call.program);
    data["trains"] = trains;
    data["stream"] = static_cast<int64_t>(call.stream);
    // Not among the saved tensors, which other backward passes must not change.
    data["main_grad"] = call.main_grad;
    variable_list results;
    for (size_t i = 0; i < program.num_results; ++i) {
      const auto result = program.forward->result(slots, i);
      if (!result.defined()) {
        continue;
      }
      if (static_cast<int64_t>(i) == program.unused) {
        context->mark_non_differentiable({result});
      }
      results.push_back(result);
    }
    return results;
  }

  static variable_list backward(AutogradContext* context, const variable_list& given) {
    const bool again = at::GradMode::is_enabled();
    const at::AutoGradMode no_grad(false);
    auto& data = context->saved_data;
    const auto program = c10::static_intrusive_pointer_cast<Program>(data["program"].toCapsule());
    const auto saved = spread(context->get_saved_variables(), program->saved);
    const auto main_grad = data["main_grad"].toTensor();
    const bool trains = data["trains"].toBool();
    uint64_t key = trains;
    bool fits = true;
    const auto grads = gradients_of_results(*program, given, saved.front().device());
    for (size_t i = 0; i < grads.size(); ++i) {
      key |= uint64_t(grads[i].defined()) << (i + 1);
      fits = fits && (!grads[i].defined() || aligned(grads[i]));
    }

    std::vector<at::Tensor> gradients;
    if (const auto tape = fits ? program->backward_of(key) : c10::intrusive_ptr<Tape>()) {
      auto inputs = saved;
      inputs.insert(inputs.end(), grads.begin(), grads.end());
      inputs.push_back(main_grad);
      const auto stream = static_cast<uint64_t>(data["stream"].toInt());
      const auto slots = tape->run(std::move(inputs), saved.front().device(), stream);
      for (size_t i = 0; i < program->given.size(); ++i) {
        gradients.push_back(tape->result(slots, i));
      }
    } else {
      const py::gil_scoped_acquire gil;
      gradients = tensors_of(program->fallback(
          key, trains, to_python(main_grad), to_python(saved), to_python(grads)));
    }
    if (program->bias >= 0 && program->given[program->bias]) {
      gradients[program->bias] = gradients[program->branch]
                                     .flatten(0, -2)
                                     .sum(0, /*keepdim=*/false, at::kFloat)
                                     .to(saved[program->bias].scalar_type());
    }

    // The first argument of ``forward`` is none that has a gradient.
    variable_list returned = {at::Tensor()};
    for (size_t i = 0; i < program->given.size(); ++i) {
      if (program->given[i]) {
        returned.push_back(gradients.at(i));
      }
    }
    return again ? once_differentiable(returned) : returned;
  }

 private:
  // By result: contiguous, and zeros where the tapes want some.
  static std::vector<at::Tensor> gradients_of_results(
      const Program& program, const variable_list& given, const c10::Device& device) {
    const auto& tape = *program.forward;
    std::vector<at::Tensor> grads(program.num_results);
    size_t next = 0;
    for (size_t i = 0; i < program.num_results; ++i) {
      const auto index = static_cast<int64_t>(i);
      const auto slot = tape.results[i].slot;
      if (slot < 0) {
        continue;
      }
      const auto& grad = given.at(next++);
      if (index == program.unused) {
        continue;
      }
      if (grad.defined()) {
        grads[i] = grad.contiguous();
      } else if (index == program.filled) {
        const auto& [sizes, dtype] =
            tape.allocations.at(slot - static_cast<int64_t>(tape.num_inputs));
        grads[i] = at::zeros(sizes, at::TensorOptions().dtype(dtype).device(device));
      }
    }
    return grads;
  }
};

// The results, None for what there is not; None instead of all of them where the tapes do not fit:
// they are of operands at multiples of 16 bytes.
py::object call(
    const c10::intrusive_ptr<Program>& program, uint64_t stream, const py::tuple& operands,
    const py::object& main_grad) {
  auto given = tensors_of(operands);
  TORCH_CHECK(given.size() == program->given.size(), program->name, ": ", given.size(), " operands");
  Call call{program, tensor_of(main_grad), stream};
  bool fits = !call.main_grad.defined() || aligned(call.main_grad);
  for (size_t i = 0; i < given.size(); ++i) {
    fits = fits && given[i].defined() == program->given[i] &&
        (!given[i].defined() || aligned(given[i]));
  }
  if (!fits) {
    return py::none();
  }
  // A list of tensors to ``apply``, whose vectors are not.
  const auto defined = defined_of(given);
  const auto results = HyperConnection::apply(call, at::TensorList(defined));
  py::tuple all(program->num_results);
  size_t next = 0;
  for (size_t i = 0; i < program->num_results; ++i) {
    const bool made = program->forward->results[i].slot >= 0;
    all[i] = made ? py::cast(results.at(next++)) : py::object(py::none());
  }
  return all;
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  module.attr("torch_version") = TORCH_VERSION;
  module.attr("version") = kVersion;
  module.def("obstacle", &obstacle);
  module.def("parameters_of", &parameters_of);
  module.def("launch_by", &launch_by);
  py::class_<Tape, c10::intrusive_ptr<Tape>>(module, "Tape")
      .def(py::init<
           size_t, const std::vector<AllocationTuple>&, const std::vector<LaunchTuple>&,
           const std::vector<ResultTuple>&>());
  py::class_<Program, c10::intrusive_ptr<Program>>(module, "Program")
      .def(py::init<
           std::string, c10::intrusive_ptr<Tape>, std::vector<bool>, std::vector<size_t>, size_t,
           int64_t, int64_t, int64_t, int64_t, py::object>())
      .def("add_backward", &Program::add_backward)
      .def("__call__", &call);
}
