// Operators of "sim": each checks where its tensors are, as a GPU's does, and then is the processor's.
#include "sim.h"

#include <ATen/EmptyTensor.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/native/Resize.h>
#include <ATen/ops/_local_scalar_dense_native.h>
#include <ATen/ops/unfold_native.h>
#include <c10/core/DeviceGuard.h>
#include <torch/extension.h>
#include <torch/library.h>

namespace {
using sim::host;
using sim::kSim;
using Sizes = c10::IntArrayRef;

int64_t run = 0;
thread_local bool inside = false;
struct Inside {
  bool before = std::exchange(inside, true);
  ~Inside() { inside = before; }
};

const c10::DispatchKeySet kKeys(c10::DispatchKey::PrivateUse1);

c10::DeviceGuard on(std::optional<at::Device> device) {
  const auto index = device && device->has_index() ? device->index() : sim::current_device();
  return c10::DeviceGuard(c10::Device(kSim, index));
}

at::Tensor empty(Sizes size, std::optional<at::ScalarType> type, std::optional<at::Layout>,
                 std::optional<at::Device> device, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  const auto guard = on(device);
  return at::detail::empty_generic(size, sim::allocator(), kKeys, c10::dtype_or_default(type), format);
}

at::Tensor empty_strided(Sizes size, Sizes stride, std::optional<at::ScalarType> type, std::optional<at::Layout>,
                         std::optional<at::Device> device, std::optional<bool>) {
  const auto guard = on(device);
  return at::detail::empty_strided_generic(size, stride, sim::allocator(), kKeys, c10::dtype_or_default(type));
}

at::Tensor copy_from(const at::Tensor& from, const at::Tensor& to, bool non_blocking) {
  c10::AutoGradMode no(false);
  const bool crosses = from.is_privateuseone() != to.is_privateuseone();
  if (crosses && !inside) {
    if (!non_blocking) {
      sim::synchronise();
    } else if (to.is_cpu()) {
      sim::copy_late(from, to);
      return to;
    } else if (sim::is_pinned(from.data_ptr())) {
      sim::copy_pinned(from, to);
      return to;
    }
  }
  host(to).copy_(host(from));
  return to;
}

at::Tensor copy_from_and_resize(const at::Tensor& from, const at::Tensor& to) {
  if (from.sizes() != to.sizes()) to.resize_(from.sizes());
  return copy_from(from, to, false);
}

const at::Tensor& resize(const at::Tensor& tensor, c10::SymIntArrayRef size, std::optional<at::MemoryFormat>) {
  const auto guard = on(tensor.device());
  const auto sizes = C10_AS_INTARRAYREF_SLOW(size);
  at::native::resize_impl_cpu_(tensor.unsafeGetTensorImpl(), sizes, std::nullopt);
  return tensor;
}

at::Tensor& set_source(at::Tensor& tensor, at::Storage storage, int64_t offset, Sizes size, Sizes stride) {
  tensor.unsafeGetTensorImpl()->set_storage_keep_dtype(std::move(storage));
  at::native::resize_impl_cpu_(
      tensor.unsafeGetTensorImpl(), size, stride.empty() ? std::nullopt : std::optional<Sizes>(stride));
  tensor.unsafeGetTensorImpl()->set_storage_offset(offset);
  return tensor;
}

at::Scalar local_scalar(const at::Tensor& tensor) {
  sim::synchronise();
  return at::native::_local_scalar_dense_cpu(host(tensor));
}

// The cell of torch's LSTM, which has a kernel of its own on every device but the processor.
std::tuple<at::Tensor, at::Tensor, at::Tensor> lstm_cell(
    const at::Tensor& from_input, const at::Tensor& from_hidden, const at::Tensor& cell,
    const std::optional<at::Tensor>& input_bias, const std::optional<at::Tensor>& hidden_bias) {
  auto gates = host(from_input) + host(from_hidden);
  if (input_bias && input_bias->defined()) gates = gates + host(*input_bias);
  if (hidden_bias && hidden_bias->defined()) gates = gates + host(*hidden_bias);
  const auto parts = gates.chunk(4, 1);
  const auto in = parts[0].sigmoid(), forget = parts[1].sigmoid(), now = parts[2].tanh(), out = parts[3].sigmoid();
  const auto next = forget * host(cell) + in * now;
  const auto hidden = out * next.tanh();
  const auto device = from_input.device();
  Inside copies;
  return {hidden.to(device), next.to(device), at::cat({in, forget, now, out}, 1).to(device)};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> lstm_cell_backward(
    const std::optional<at::Tensor>& of_hidden, const std::optional<at::Tensor>& of_cell, const at::Tensor& cell,
    const at::Tensor& next, const at::Tensor& workspace, bool has_bias) {
  const auto parts = host(workspace).chunk(4, 1);
  const auto in = parts[0], forget = parts[1], now = parts[2], out = parts[3];
  const auto squashed = host(next).tanh();
  const auto hidden = of_hidden && of_hidden->defined() ? host(*of_hidden) : at::zeros_like(squashed);
  auto through = of_cell && of_cell->defined() ? host(*of_cell) : at::zeros_like(squashed);
  through = through + hidden * out * (1 - squashed * squashed);
  const auto gates = at::cat(
      {through * now * in * (1 - in), through * host(cell) * forget * (1 - forget), through * in * (1 - now * now),
       hidden * squashed * out * (1 - out)}, 1);
  const auto device = workspace.device();
  Inside copies;
  return {gates.to(device), (through * forget).to(device), has_bias ? gates.sum(0).to(device) : at::Tensor()};
}

at::Tensor moved(const at::Tensor& tensor) {
  if (!tensor.defined()) return tensor;
  auto there = at::empty_strided(tensor.sizes(), tensor.strides(), tensor.options().device(c10::Device(kSim, sim::current_device())));
  host(there).copy_(tensor);
  return there;
}

// The processor's kernel on the memory of the device's tensors; new results are moved there.
void on_same_memory(const c10::OperatorHandle& op, torch::jit::Stack* stack, size_t first) {
  const auto& schema = op.schema();
  std::vector<c10::IValue> given(stack->begin() + first, stack->end());
  for (size_t i = first; i < stack->size(); ++i) {
    auto& argument = (*stack)[i];
    if (argument.isTensor()) {
      argument = host(argument.toTensor());
    } else if (argument.isTensorList()) {
      c10::List<at::Tensor> hosts;
      for (const auto& tensor : argument.toTensorVector()) hosts.push_back(host(tensor));
      argument = hosts;
    } else if (argument.isOptionalTensorList()) {
      c10::List<std::optional<at::Tensor>> hosts;
      for (const auto& tensor : argument.toOptionalTensorVector()) {
        hosts.push_back(tensor ? std::optional<at::Tensor>(host(*tensor)) : std::nullopt);
      }
      argument = hosts;
    } else if (argument.isDevice()) {
      argument = c10::Device(c10::kCPU);
    }
  }
  op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);
  const auto results = stack->size() - schema.returns().size();
  for (size_t i = 0; i < schema.returns().size(); ++i) {
    auto& result = (*stack)[results + i];
    const auto* alias = schema.returns()[i].alias_info();
    if (alias && alias->isWrite()) {
      for (size_t j = 0; j < given.size(); ++j) {
        const auto* of = schema.arguments()[j].alias_info();
        if (of && *of == *alias) result = given[j];
      }
    } else if (result.isTensor()) {
      result = moved(result.toTensor());
    } else if (result.isTensorList()) {
      c10::List<at::Tensor> there;
      for (const auto& tensor : result.toTensorVector()) there.push_back(moved(tensor));
      result = there;
    }
  }
}

// Every other operator.
void fallback(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  ++run;
  const auto& schema = op.schema();
  const auto first = stack->size() - schema.arguments().size();
  std::optional<at::Device> device;
  bool of_processor = false;
  // A fused optimizer's kernel reads its counts of steps by their addresses: numbers, too, must be on the device.
  const bool by_address = schema.name().rfind("aten::_fused_adam", 0) == 0;
  const auto look = [&](const at::Tensor& tensor) {
    if (!tensor.defined()) return;
    if (tensor.is_privateuseone()) {
      TORCH_CHECK(
          !device || *device == tensor.device(), schema.name(), ": expected all tensors to be on the same device, but "
          "found at least two devices, ", device.value_or(tensor.device()), " and ", tensor.device());
      device = tensor.device();
    } else if ((by_address || tensor.dim() > 0) && !tensor.unsafeGetTensorImpl()->is_wrapped_number()) {
      of_processor = true;
    }
  };
  for (size_t i = first; i < stack->size(); ++i) {
    const auto& argument = (*stack)[i];
    if (argument.isTensor()) look(argument.toTensor());
    if (argument.isTensorList()) for (const auto& tensor : argument.toTensorVector()) look(tensor);
    // Indices may lie on the processor: a list of optional tensors is not looked at.
    if (argument.isDevice() && !device) device = argument.toDevice();
  }
  TORCH_CHECK(
      !(device && of_processor), schema.name(), ": expected all tensors to be on the same device, but found at least two "
      "devices, ", device.value_or(at::Device(at::kCPU)), " and cpu");
  const auto guard = on(device);
  for (size_t i = 0; i < schema.arguments().size(); ++i) {
    const auto type = schema.arguments()[i].type();
    const auto plain = type->kind() == c10::TypeKind::OptionalType ? type->castRaw<c10::OptionalType>()->getElementType() : type;
    if (plain->kind() != c10::TypeKind::GeneratorType) continue;
    auto& given = (*stack)[first + i];
    given = sim::processor_generator(given.isNone() ? std::nullopt : given.toOptional<at::Generator>(), sim::current_device());
  }
  Inside copies;
  const auto& arguments = schema.arguments();
  if (std::any_of(arguments.begin(), arguments.end(), [](const auto& argument) { return argument.is_out(); })) {
    at::native::cpu_fallback(op, stack);  // what it is written to may have to grow
  } else {
    on_same_memory(op, stack, first);
  }
}

// `tensor.data = value` across devices, in place as between the processor and CUDA: a module that is moved keeps its
// parameters, and who holds one holds it still.
struct Become : c10::TensorImpl {
  static void run(const at::Tensor& tensor, const at::Tensor& value) {
    auto* impl = tensor.unsafeGetTensorImpl();
    copy_tensor_metadata(value.unsafeGetTensorImpl(), impl, impl->version_counter(), impl->allow_tensor_metadata_change());
    if (auto* meta = torch::autograd::impl::get_autograd_meta(tensor)) meta->grad_accumulator_.reset();
  }
};
}  // namespace

int64_t sim::operators_run() { return run; }

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>()); }

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("_copy_from", copy_from);
  m.impl("_copy_from_and_resize", copy_from_and_resize);
  m.impl("resize_", resize);
  m.impl("set_.source_Storage_storage_offset", set_source);
  m.impl("_local_scalar_dense", local_scalar);
  m.impl("_thnn_fused_lstm_cell", lstm_cell);
  m.impl("_thnn_fused_lstm_cell_backward_impl", lstm_cell_backward);
  m.impl("as_strided", [](const at::Tensor& t, Sizes size, Sizes stride, std::optional<int64_t> offset) {
    return at::native::as_strided_tensorimpl(t, size, stride, offset);
  });
  m.impl("unfold", [](const at::Tensor& t, int64_t dim, int64_t size, int64_t step) { return at::native::unfold(t, dim, size, step); });
  m.impl("record_stream", [](at::Tensor&, c10::Stream) {});
  m.impl("view", [](const at::Tensor& t, c10::SymIntArrayRef size) { return at::native::view(t, C10_AS_INTARRAYREF_SLOW(size)); });
  m.impl("_reshape_alias", [](const at::Tensor& t, c10::SymIntArrayRef size, c10::SymIntArrayRef stride) {
    return at::native::_reshape_alias(t, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride));
  });
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("register", &sim::register_hooks);
  m.def("synchronise", &sim::synchronise);
  m.def("become", &Become::run);
  m.def("operators_run", &sim::operators_run);
  m.def("device_count", [] { return int(sim::devices()); });
  m.def("current_device", [] { return int(sim::current_device()); });
  m.def("exchange_device", [](int index) { return int(sim::exchange_device(c10::DeviceIndex(index))); });
  m.def("default_generator", [](int index) { return at::globalContext().defaultGenerator(c10::Device(kSim, c10::DeviceIndex(index))); });
}
