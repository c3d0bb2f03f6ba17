// Memory, copies, generators and the device guard of "sim".
#include "sim.h"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <c10/core/GradMode.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/core/impl/alloc_cpu.h>

#include <cstdlib>
#include <deque>
#include <map>
#include <mutex>

namespace sim {
namespace {

int64_t number(const char* name, int64_t otherwise) {
  const char* text = std::getenv(name);
  return text && *text ? std::atoll(text) : otherwise;
}

thread_local c10::DeviceIndex current = 0;
std::mutex guarded;

// --- memory ---

struct Block {
  void* place;
  size_t bytes;
  c10::DeviceIndex device;
};

struct Used {
  int64_t now = 0, peak = 0, all = 0, freed = 0;
};
// Never destroyed: tensors of Python's modules outlive the statics of a library.
std::map<c10::DeviceIndex, Used>& used() {
  static auto* map = new std::map<c10::DeviceIndex, Used>;
  return *map;
}

void release(void* context) {
  auto* block = static_cast<Block*>(context);
  {
    std::lock_guard<std::mutex> lock(guarded);
    used()[block->device].now -= block->bytes;
    used()[block->device].freed += block->bytes;
  }
  c10::free_cpu(block->place);
  delete block;
}

// Fresh memory is NaN in every floating type, and -1 in every integer: nothing may count on zeros. SIM_MEMORY bytes a
// device, without end unless set.
struct Memory final : c10::DeviceAllocator {
  c10::DataPtr allocate(size_t bytes) override {
    static const int64_t most = number("SIM_MEMORY", 0);
    const auto device = current;
    {
      std::lock_guard<std::mutex> lock(guarded);
      auto& here = used()[device];
      TORCH_CHECK_WITH(
          OutOfMemoryError, most == 0 || here.now + int64_t(bytes) <= most,
          "sim out of memory. Tried to allocate ", bytes, " bytes. Device ", int(device), " has a total capacity of ",
          most, " bytes of which ", most - here.now, " bytes are free.");
      here.now += bytes;
      here.all += bytes;
      here.peak = std::max(here.peak, here.now);
    }
    void* place = c10::alloc_cpu(bytes);
    if (place) std::memset(place, 0xff, bytes);
    return {place, new Block{place, bytes, device}, &release, c10::Device(kSim, device)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }
  void copy_data(void* to, const void* from, std::size_t bytes) const override { std::memcpy(to, from, bytes); }
  bool initialized() override { return true; }
  void emptyCache(c10::MempoolId_t) override {}
  void recordStream(const c10::DataPtr&, c10::Stream) override {}
  c10::CachingDeviceAllocator::DeviceStats getDeviceStats(c10::DeviceIndex device) override {
    std::lock_guard<std::mutex> lock(guarded);
    c10::CachingDeviceAllocator::DeviceStats stats;
    const auto& here = used()[device];
    for (auto* of : {&stats.allocated_bytes, &stats.reserved_bytes, &stats.active_bytes, &stats.requested_bytes}) {
      auto& total = (*of)[0];
      total.current = here.now, total.peak = here.peak, total.allocated = here.all, total.freed = here.freed;
    }
    return stats;
  }
  void resetAccumulatedStats(c10::DeviceIndex device) override {
    std::lock_guard<std::mutex> lock(guarded);
    used()[device].all = used()[device].freed = 0;
  }
  void resetPeakStats(c10::DeviceIndex device) override {
    std::lock_guard<std::mutex> lock(guarded);
    used()[device].peak = used()[device].now;
  }
};
Memory memory;
REGISTER_ALLOCATOR(kSim, &memory);

// --- pinned memory of the host ---

std::map<const char*, size_t>& pinned() {
  static auto* map = new std::map<const char*, size_t>;
  return *map;
}

void unpin(void* place) {
  {
    std::lock_guard<std::mutex> lock(guarded);
    pinned().erase(static_cast<const char*>(place));
  }
  c10::free_cpu(place);
}

struct Pinned final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* place = c10::alloc_cpu(bytes);
    if (place) {
      std::lock_guard<std::mutex> lock(guarded);
      pinned()[static_cast<const char*>(place)] = bytes;
    }
    return {place, place, &unpin, c10::Device(c10::kCPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &unpin; }
  void copy_data(void* to, const void* from, std::size_t bytes) const override { std::memcpy(to, from, bytes); }
};
Pinned pinned_memory;

// --- copies under way ---

struct Late {
  at::Tensor kept, place;
  bool arrives;  // else `place` must still hold what was copied from it
};
std::deque<Late>& under_way() {
  static auto* late = new std::deque<Late>;
  return *late;
}
std::recursive_mutex copying;

bool overlap(const at::Tensor& one, const at::Tensor& other) {
  const auto range = [](const at::Tensor& tensor) {
    const auto* begin = static_cast<const char*>(tensor.const_data_ptr());
    return std::pair(begin, begin + at::detail::computeStorageNbytes(tensor.sizes(), tensor.strides(), tensor.element_size()));
  };
  const auto [begin, end] = range(one);
  const auto [other_begin, other_end] = range(other);
  return begin < other_end && other_begin < end;
}

void require_still(const Late& late) {
  const auto same = late.place.eq(late.kept).logical_or(late.place.ne(late.place).logical_and(late.kept.ne(late.kept)));
  TORCH_CHECK(same.all().item<bool>(), "sim: pinned memory was written while a copy of it to the device was under way");
}

void poison(const at::Tensor& tensor) {
  c10::AutoGradMode no(false);
  if (tensor.is_floating_point()) {
    tensor.fill_(std::numeric_limits<double>::quiet_NaN());
  } else if (tensor.scalar_type() == at::kBool) {
    tensor.logical_not_();
  } else if (!tensor.is_complex()) {
    tensor.fill_(tensor.element_size() == 1 ? 0x7a : tensor.element_size() == 2 ? 0x7a7a : 0x7a7a7a7a);
  }
}

// --- generators ---

// The processor's generator under the device's name: one of the processor itself is refused, as on a GPU.
struct Generator final : c10::GeneratorImpl {
  explicit Generator(c10::DeviceIndex index, at::Generator inner)
      : c10::GeneratorImpl({kSim, index}, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1)), inner(std::move(inner)) {}
  void set_current_seed(uint64_t seed) override { inner.set_current_seed(seed); }
  void set_offset(uint64_t offset) override { inner.set_offset(offset); }
  uint64_t get_offset() const override { return inner.get_offset(); }
  uint64_t current_seed() const override { return inner.current_seed(); }
  uint64_t seed() override { return inner.seed(); }
  void set_state(const c10::TensorImpl& state) override { inner.unsafeGetGeneratorImpl()->set_state(state); }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override {
    return inner.unsafeGetGeneratorImpl()->get_state();
  }
  Generator* clone_impl() const override { return new Generator(device_.index(), inner.clone()); }
  mutable at::Generator inner;
};

at::Generator fresh(c10::DeviceIndex index) {
  return at::make_generator<Generator>(index, at::detail::createCPUGenerator());
}

const at::Generator& default_generator(c10::DeviceIndex index) {
  static auto* all = new std::map<c10::DeviceIndex, at::Generator>;
  std::lock_guard<std::mutex> lock(guarded);
  if (index < 0) index = current;
  auto found = all->find(index);
  return found != all->end() ? found->second : all->emplace(index, fresh(index)).first->second;
}

// --- what torch asks ---

struct Guard final : c10::impl::DeviceGuardImplInterface {
  static constexpr c10::DeviceType static_type = kSim;
  c10::DeviceType type() const override { return kSim; }
  c10::Device exchangeDevice(c10::Device device) const override { return {kSim, exchange_device(device.index())}; }
  c10::Device getDevice() const override { return {kSim, current}; }
  void setDevice(c10::Device device) const override { exchange_device(device.index()); }
  void uncheckedSetDevice(c10::Device device) const noexcept override {
    if (device.index() >= 0) current = device.index();
  }
  c10::Stream getStream(c10::Device device) const override { return c10::Stream(c10::Stream::DEFAULT, whole(device)); }
  c10::Stream getDefaultStream(c10::Device device) const override { return getStream(device); }
  c10::Stream getNewStream(c10::Device device, int) const override { return getStream(device); }
  c10::Stream getStreamFromGlobalPool(c10::Device device, bool) const override { return getStream(device); }
  c10::Stream exchangeStream(c10::Stream stream) const override { return stream; }
  c10::DeviceIndex deviceCount() const noexcept override { return devices(); }
  void record(void** event, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {
    *event = reinterpret_cast<void*>(1);
  }
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const c10::DeviceIndex) const noexcept override {}
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override { synchronise(); }
  void synchronizeEvent(void*) const override { synchronise(); }
  void synchronizeDevice(const c10::DeviceIndex) const override { synchronise(); }

 private:
  static c10::Device whole(c10::Device device) { return {kSim, device.has_index() ? device.index() : current}; }
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return devices() > 0; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return devices(); }
  c10::DeviceIndex getCurrentDevice() const override { return current; }
  void setCurrentDevice(c10::DeviceIndex device) const override { exchange_device(device); }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex device) const override { return exchange_device(device); }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex device) const override { return exchange_device(device); }
  at::Allocator* getPinnedMemoryAllocator() const override { return &pinned_memory; }
  bool isPinnedPtr(const void* place) const override { return is_pinned(place); }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex index) const override { return default_generator(index); }
  at::Generator getNewGenerator(c10::DeviceIndex index) const override { return fresh(index < 0 ? current : index); }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t bytes) const override {
    auto place = memory.allocate(bytes);
    std::memcpy(place.get(), storage.data(), std::min(bytes, storage.nbytes()));
    const_cast<c10::Storage&>(storage).set_data_ptr_noswap(std::move(place));
    const_cast<c10::Storage&>(storage).set_nbytes(bytes);
  }
};
Hooks hooks;
}  // namespace

c10::DeviceIndex devices() {
  static const auto count = static_cast<c10::DeviceIndex>(number("SIM_DEVICES", 2));
  return count;
}
c10::DeviceIndex current_device() { return current; }
c10::DeviceIndex exchange_device(c10::DeviceIndex index) {
  const auto before = current;
  if (index >= 0) {
    TORCH_CHECK(index < devices(), "sim: invalid device ordinal ", int(index), ", there are ", int(devices()));
    current = index;
  }
  return before;
}
c10::Allocator* allocator() { return &memory; }

bool is_pinned(const void* place) {
  std::lock_guard<std::mutex> lock(guarded);
  auto next = pinned().upper_bound(static_cast<const char*>(place));
  if (next == pinned().begin()) return false;
  --next;
  return static_cast<const char*>(place) < next->first + next->second;
}

at::Tensor host(const at::Tensor& tensor) {
  if (!tensor.defined() || !tensor.is_privateuseone()) return tensor;
  auto keep = tensor.storage();
  return at::from_blob(
      tensor.data_ptr(), tensor.sizes(), tensor.strides(), [keep](void*) {},
      tensor.options().device(at::kCPU).requires_grad(false));
}

void copy_late(const at::Tensor& from, const at::Tensor& to) {
  std::lock_guard<std::recursive_mutex> lock(copying);
  c10::AutoGradMode no(false);
  // What an earlier copy still had to read there it has read by then.
  auto& late = under_way();
  for (auto one = late.begin(); one != late.end();) {
    if (one->arrives || !overlap(one->place, to)) {
      ++one;
      continue;
    }
    // Where an earlier copy is still to arrive the host sees poison, and what it writes is lost.
    const bool hidden = std::any_of(late.begin(), one, [&](const Late& before) {
      return before.arrives && overlap(before.place, one->place);
    });
    if (!hidden) require_still(*one);
    one = late.erase(one);
  }
  late.push_back({host(from).clone(), to.detach(), true});
  poison(late.back().place);
}

void copy_pinned(const at::Tensor& from, const at::Tensor& to) {
  std::lock_guard<std::recursive_mutex> lock(copying);
  c10::AutoGradMode no(false);
  // What an earlier copy brings there is there by then; the host sees it after a synchronisation only.
  std::vector<at::Tensor> arrived;
  for (const auto& late : under_way()) {
    if (!late.arrives || !overlap(late.place, from)) continue;
    late.place.copy_(late.kept);
    arrived.push_back(late.place);
  }
  under_way().push_back({from.detach().clone(), from.detach(), false});
  host(to).copy_(from);
  for (const auto& place : arrived) poison(place);
}

void synchronise() {
  std::lock_guard<std::recursive_mutex> lock(copying);
  c10::AutoGradMode no(false);
  while (!under_way().empty()) {
    const auto late = under_way().front();
    under_way().pop_front();
    if (late.arrives) {
      late.place.copy_(late.kept);
    } else {
      require_still(late);
    }
  }
}

at::Generator processor_generator(const std::optional<at::Generator>& generator, c10::DeviceIndex index) {
  if (!generator || !generator->defined()) {
    return static_cast<Generator*>(default_generator(index).unsafeGetGeneratorImpl())->inner;
  }
  TORCH_CHECK(
      generator->device().type() == kSim, "Expected a 'sim' device type for generator but found '",
      generator->device().type(), "'");
  return static_cast<Generator*>(generator->unsafeGetGeneratorImpl())->inner;
}

void register_hooks() { at::RegisterPrivateUse1HooksInterface(&hooks); }
}  // namespace sim
