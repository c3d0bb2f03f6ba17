// A torch device named "sim": the memory is the host's and the operators are the processor's, the rules are a GPU's.
#pragma once

#include <ATen/ATen.h>
#include <c10/core/Device.h>

namespace sim {

constexpr auto kSim = c10::DeviceType::PrivateUse1;

// How many devices there are (SIM_DEVICES, 2 unless set); ranks of one machine get one each, as on a node of GPUs.
c10::DeviceIndex devices();
c10::DeviceIndex current_device();
// Makes `index` the current device of this thread and gives the one before.
c10::DeviceIndex exchange_device(c10::DeviceIndex index);

c10::Allocator* allocator();
bool is_pinned(const void* place);

// The same memory as a tensor of the processor. What is no tensor of the device is given back as it is.
at::Tensor host(const at::Tensor& tensor);

// Copies are done in the order in which they are asked for, as on one stream.
// A copy to the host that was not waited for: until the device is synchronised the host sees poison (NaN, or 0x7a…).
void copy_late(const at::Tensor& from, const at::Tensor& to);
// A copy from pinned memory that was not waited for: whoever writes that memory before a synchronisation is told so.
void copy_pinned(const at::Tensor& from, const at::Tensor& to);
// All copies arrive.
void synchronise();

// The generator behind one of the device; of its default one where there is none.
at::Generator processor_generator(const std::optional<at::Generator>& generator, c10::DeviceIndex index);

void register_hooks();
int64_t operators_run();
}  // namespace sim
