// Runs a kernel over a grid with Metal's threadgroup and simdgroup semantics, one fiber per thread.
//
// A fiber runs until it meets a barrier or a SIMD-group operation. A simdgroup runs until all of its lanes wait at a
// threadgroup barrier or have returned; then the next simdgroup runs. The order of threadgroups, simdgroups and lanes is
// a permutation drawn from the seed, so a result that depends on the order differs between seeds.
//
// In a checked build the compiler reports every memory access (-fsanitize=thread) and every undefined integer operation
// (-fsanitize=shift,bounds,...) to the functions at the end of this file. They find the buffer, count its bytes, and
// keep shadow memory: who wrote and read each byte since the last barrier.

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#ifndef _XOPEN_SOURCE
#define _XOPEN_SOURCE 700
#endif
#include <dlfcn.h>
#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <cmath>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <string>
#include <vector>

#include "runtime.h"

namespace {

constexpr uint32_t kSimdWidth = 32;
constexpr uint32_t kMaxThreads = 1024;
constexpr size_t kStackBytes = 64 * 1024;
constexpr size_t kPage = 4096;
constexpr size_t kGuard = 16 * kPage;  // between device buffers
constexpr uint32_t kThreadgroupGuard = 256;  // between threadgroup arrays, bytes
constexpr uint32_t kThreadgroupArena = 128 * 1024;
constexpr uint32_t kPermutations = 64;

enum class Wait : uint8_t { ready, simd, barrier, done };

struct Fiber {
  ucontext_t context;
  jmp_buf jump;
  bool started = false;
  Wait state = Wait::done;
  VqThreadIds ids{};
  // the rendezvous at which this fiber waits
  int site = 0, operation = 0, type = 0;
  uint32_t argument = 0;
  uint64_t bits = 0;
};

struct Access {  // one remembered access to a byte
  uint32_t group = 0, epoch = 0, simd_epoch = 0;
  uint16_t thread = 0;
  uint8_t many = 0, atomic = 0;
};

struct Shadow {
  Access write, read, other_read;  // other_read: by another simdgroup than read
  uint32_t initialised = 0;        // threadgroup memory: serial of the group that wrote it; device: 0 or 1
};

struct Array {  // one threadgroup array of the running group
  const char* name;
  uint32_t offset, nbytes;
};

struct Epochs {
  uint32_t group = 1;
  std::vector<uint32_t> simd;
};

struct DeviceBuffer {
  uint8_t* data = nullptr;
  VqBuffer* outside = nullptr;
  std::vector<Shadow> shadow;
  std::vector<uint64_t> touched;
};

struct Machine {
  std::vector<Fiber> fibers;
  uint8_t* stacks = nullptr;
  size_t n_stacks = 0;
  jmp_buf scheduler;
  Fiber* current = nullptr;

  bool checked = false, faulted = false;
  uint64_t random_state = 0;
  VqReport* report = nullptr;
  VqKernel kernel = nullptr;
  void** arguments = nullptr;
  const void* module_base = nullptr;

  uint32_t n_threads = 0, serial = 0;
  Epochs threadgroup_epochs, device_epochs;
  uint8_t* arena = nullptr;
  uint32_t arena_used = 0;
  std::vector<Array> arrays;
  std::vector<Shadow> arena_shadow;

  uint8_t* device_arena = nullptr;
  size_t device_bytes = 0;
  std::vector<DeviceBuffer> buffers;
  std::vector<int16_t> page_owner;

  std::vector<uint8_t> permutations;  // kPermutations orders of the lanes of a simdgroup
};

Machine machine;

uint64_t next_random() {  // splitmix64
  uint64_t z = (machine.random_state += 0x9e3779b97f4a7c15ull);
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
  return z ^ (z >> 31);
}

template <typename T>
void shuffle(T* items, size_t n) {
  for (size_t i = n; i > 1; --i) std::swap(items[i - 1], items[next_random() % i]);
}

void leave_fiber() {
  Fiber* fiber = machine.current;
  if (_setjmp(fiber->jump) == 0) _longjmp(machine.scheduler, 1);
}

void record_fault(int kind, const void* pc, int line, const char* format, va_list arguments) {
  if (machine.faulted) return;
  machine.faulted = true;
  VqReport* report = machine.report;
  report->fault = kind;
  report->line = line;
  report->pc_offset = 0;
  if (pc) {
    Dl_info info;
    if (dladdr(const_cast<void*>(pc), &info))
      report->pc_offset = static_cast<const uint8_t*>(pc) - static_cast<const uint8_t*>(info.dli_fbase) - 1;
  }
  if (machine.current) {
    const VqThreadIds& ids = machine.current->ids;
    memcpy(report->group, ids.threadgroup_position_in_grid, sizeof report->group);
    memcpy(report->thread, ids.thread_position_in_threadgroup, sizeof report->thread);
  }
  vsnprintf(report->message, sizeof report->message, format, arguments);
}

// Called on a fiber: records the fault and never resumes it.
[[noreturn]] void fault(int kind, const void* pc, const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  record_fault(kind, pc, 0, format, arguments);
  va_end(arguments);
  _longjmp(machine.scheduler, 1);
}

// Called by the scheduler.
void scheduler_fault(int kind, int line, const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  record_fault(kind, nullptr, line, format, arguments);
  va_end(arguments);
}

void fiber_main() {
  for (;;) {
    machine.kernel(machine.arguments, &machine.current->ids);
    machine.current->state = Wait::done;
    leave_fiber();
  }
}

void enter_fiber(Fiber& fiber) {
  machine.current = &fiber;
  if (_setjmp(machine.scheduler) == 0) {
    if (fiber.started) _longjmp(fiber.jump, 1);
    fiber.started = true;
    setcontext(&fiber.context);
  }
}

bool prepare_fibers(uint32_t n) {
  if (!machine.stacks) {
    void* stacks = mmap(nullptr, kMaxThreads * kStackBytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (stacks == MAP_FAILED) return false;
    machine.stacks = static_cast<uint8_t*>(stacks);
  }
  if (machine.fibers.size() < n) {
    machine.fibers = std::vector<Fiber>(n);  // contexts hold pointers into themselves: build them in place
    machine.n_stacks = 0;
  }
  for (size_t i = machine.n_stacks; i < machine.fibers.size(); ++i) {
    Fiber& fiber = machine.fibers[i];
    fiber.started = false;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = machine.stacks + i * kStackBytes;
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, fiber_main, 0);
  }
  machine.n_stacks = machine.fibers.size();
  return true;
}

// ---- SIMD-group operations, computed once for the whole simdgroup when its lanes have met -------------------------

float as_float(uint64_t bits) {
  uint32_t word = static_cast<uint32_t>(bits);
  float value;
  memcpy(&value, &word, 4);
  return value;
}

uint64_t from_float(float value) {
  uint32_t word;
  memcpy(&word, &value, 4);
  return word;
}

uint64_t combine(int operation, int type, uint64_t a, uint64_t b) {
  if (type == VQ_FLOAT) {
    float x = as_float(a), y = as_float(b);
    switch (operation) {
      case VQ_SUM: return from_float(x + y);
      case VQ_PRODUCT: return from_float(x * y);
      case VQ_MAX: return from_float(fmaxf(x, y));
      case VQ_MIN: return from_float(fminf(x, y));
    }
  }
  uint32_t x = static_cast<uint32_t>(a), y = static_cast<uint32_t>(b);
  int32_t signed_x = static_cast<int32_t>(x), signed_y = static_cast<int32_t>(y);
  bool is_signed = type == VQ_INT;
  switch (operation) {
    case VQ_SUM: return x + y;
    case VQ_PRODUCT: return x * y;
    case VQ_MAX: return is_signed ? static_cast<uint32_t>(signed_x > signed_y ? signed_x : signed_y) : (x > y ? x : y);
    case VQ_MIN: return is_signed ? static_cast<uint32_t>(signed_x < signed_y ? signed_x : signed_y) : (x < y ? x : y);
    case VQ_AND: return x & y;
    case VQ_OR: return x | y;
    case VQ_XOR: return x ^ y;
  }
  return 0;
}

constexpr uint64_t kPoison = 0x7fc0dead7fc0deadull;  // a NaN in every float type; an absurd integer

// False where a lane reads from one that does not take part.
bool resolve_simd(Fiber* lanes, uint32_t n, const bool* active) {
  int operation = 0, type = 0;
  uint32_t first = kSimdWidth;
  uint64_t mask = 0;
  for (uint32_t i = 0; i < n; ++i)
    if (active[i]) {
      if (first == kSimdWidth) first = i;
      mask |= 1ull << i;
    }
  operation = lanes[first].operation;
  type = lanes[first].type;
  uint64_t values[kSimdWidth];
  for (uint32_t i = 0; i < n; ++i) values[i] = lanes[i].bits;
  auto from = [&](uint32_t source) { return source < n && active[source] ? values[source] : kPoison; };
  bool defined = true;
  if (operation <= VQ_XOR) {
    uint64_t total = values[first];
    for (uint32_t i = first + 1; i < n; ++i)
      if (active[i]) total = combine(operation, type, total, values[i]);
    for (uint32_t i = 0; i < n; ++i)
      if (active[i]) lanes[i].bits = total;
  } else if (operation == VQ_PREFIX_INCLUSIVE_SUM || operation == VQ_PREFIX_EXCLUSIVE_SUM) {
    uint64_t total = 0;  // the bits of zero in every type
    for (uint32_t i = 0; i < n; ++i)
      if (active[i]) {
        uint64_t before = total;
        total = combine(VQ_SUM, type, total, values[i]);
        lanes[i].bits = operation == VQ_PREFIX_INCLUSIVE_SUM ? total : before;
      }
  } else {
    for (uint32_t i = 0; i < n; ++i) {
      if (!active[i]) continue;
      uint32_t argument = lanes[i].argument;
      bool must_exist = true;
      uint32_t source = 0;
      switch (operation) {
        case VQ_SHUFFLE: source = argument; break;
        case VQ_SHUFFLE_XOR: source = i ^ argument; break;
        case VQ_SHUFFLE_DOWN: source = i + argument; must_exist = false; break;
        case VQ_SHUFFLE_UP: source = i >= argument ? i - argument : kSimdWidth; must_exist = false; break;
        case VQ_BROADCAST_FIRST: source = first; break;
        case VQ_BALLOT: lanes[i].bits = 0; continue;
      }
      lanes[i].bits = from(source);
      if (must_exist && !(source < n && active[source])) defined = false;
    }
    if (operation == VQ_BALLOT) {
      uint64_t votes = 0;
      for (uint32_t i = 0; i < n; ++i)
        if (active[i] && values[i]) votes |= 1ull << i;
      for (uint32_t i = 0; i < n; ++i)
        if (active[i]) lanes[i].bits = votes & mask;
    }
  }
  return defined;
}

void advance_epochs(uint32_t flags, int simdgroup) {  // simdgroup < 0: the whole threadgroup
  if (flags & VQ_MEM_THREADGROUP) {
    if (simdgroup < 0) ++machine.threadgroup_epochs.group;
    else ++machine.threadgroup_epochs.simd[simdgroup];
  }
  if (flags & VQ_MEM_DEVICE) {
    if (simdgroup < 0) ++machine.device_epochs.group;
    else ++machine.device_epochs.simd[simdgroup];
  }
}

// Runs one simdgroup until all of its lanes have returned or wait at a threadgroup barrier.
void run_simdgroup(uint32_t index) {
  uint32_t begin = index * kSimdWidth;
  uint32_t n = std::min(kSimdWidth, machine.n_threads - begin);
  Fiber* lanes = &machine.fibers[begin];
  for (;;) {
    const uint8_t* order = &machine.permutations[(next_random() % kPermutations) * kSimdWidth];
    for (uint32_t i = 0; i < kSimdWidth; ++i) {
      uint32_t lane = order[i];
      if (lane >= n || lanes[lane].state != Wait::ready) continue;
      enter_fiber(lanes[lane]);
      if (machine.faulted) return;
    }
    bool waiting[kSimdWidth] = {}, any = false, barrier = false, mixed = false;
    int first = -1;
    for (uint32_t i = 0; i < n; ++i) {
      if (lanes[i].state == Wait::barrier) barrier = true;
      if (lanes[i].state != Wait::simd) continue;
      any = true;
      if (first < 0) first = i;
      if (lanes[i].site != lanes[first].site || lanes[i].operation != lanes[first].operation) mixed = true;
      else waiting[i] = true;
    }
    if (!any) return;
    machine.current = &lanes[first];
    if (machine.checked && (mixed || barrier)) {
      scheduler_fault(VQ_DIVERGENT_SIMD, lanes[first].site,
                      "lanes of one simdgroup wait at different SIMD-group operations or barriers");
      return;
    }
    if (lanes[first].operation == VQ_SIMD_BARRIER) {
      bool all = true;
      for (uint32_t i = 0; i < n; ++i) all = all && waiting[i];
      if (machine.checked && !all) {
        scheduler_fault(VQ_DIVERGENT_BARRIER, lanes[first].site,
                        "a simdgroup_barrier that not every lane of the simdgroup reaches");
        return;
      }
      advance_epochs(lanes[first].argument, static_cast<int>(index));
    } else if (!resolve_simd(lanes, n, waiting) && machine.checked) {
      scheduler_fault(VQ_UNDEFINED, lanes[first].site, "a lane reads the value of one that does not take part");
      return;
    }
    for (uint32_t i = 0; i < n; ++i)
      if (waiting[i]) lanes[i].state = Wait::ready;
  }
}

void run_threadgroup(const VqLaunch& launch, const uint32_t position[3], const uint32_t groups[3]) {
  uint32_t size[3];
  for (int a = 0; a < 3; ++a)
    size[a] = std::min(launch.group[a], launch.grid[a] - position[a] * launch.group[a]);
  uint32_t n = machine.n_threads = size[0] * size[1] * size[2];
  uint32_t nominal = launch.group[0] * launch.group[1] * launch.group[2];
  uint32_t n_simdgroups = (n + kSimdWidth - 1) / kSimdWidth;
  ++machine.serial;
  machine.arrays.clear();
  machine.arena_used = kThreadgroupGuard;
  machine.threadgroup_epochs.simd.resize(kMaxThreads / kSimdWidth, 1);
  machine.device_epochs.simd.resize(kMaxThreads / kSimdWidth, 1);
  for (uint32_t i = 0; i < n; ++i) {
    Fiber& fiber = machine.fibers[i];
    VqThreadIds& ids = fiber.ids;
    uint32_t local[3] = {i % size[0], i / size[0] % size[1], i / (size[0] * size[1])};
    for (int a = 0; a < 3; ++a) {
      ids.thread_position_in_threadgroup[a] = local[a];
      ids.threadgroup_position_in_grid[a] = position[a];
      ids.thread_position_in_grid[a] = position[a] * launch.group[a] + local[a];
      ids.threads_per_threadgroup[a] = size[a];
      ids.dispatch_threads_per_threadgroup[a] = launch.group[a];
      ids.threadgroups_per_grid[a] = groups[a];
      ids.threads_per_grid[a] = ids.grid_size[a] = launch.grid[a];
      ids.grid_origin[a] = 0;
    }
    ids.thread_index_in_threadgroup = i;
    ids.thread_index_in_simdgroup = i % kSimdWidth;
    ids.simdgroup_index_in_threadgroup = i / kSimdWidth;
    ids.simdgroups_per_threadgroup = n_simdgroups;
    ids.dispatch_simdgroups_per_threadgroup = (nominal + kSimdWidth - 1) / kSimdWidth;
    ids.thread_index_in_quadgroup = i % 4;
    ids.quadgroup_index_in_threadgroup = i / 4;
    ids.quadgroups_per_threadgroup = (n + 3) / 4;
    ids.dispatch_quadgroups_per_threadgroup = (nominal + 3) / 4;
    ids.threads_per_simdgroup = ids.thread_execution_width = kSimdWidth;
    fiber.state = Wait::ready;
  }
  std::vector<uint8_t> order(n_simdgroups);
  std::iota(order.begin(), order.end(), 0);
  for (;;) {
    if (launch.seed) shuffle(order.data(), order.size());
    for (uint8_t simdgroup : order) {
      run_simdgroup(simdgroup);
      if (machine.faulted) return;
    }
    uint32_t n_done = 0;
    Fiber* first = nullptr;
    bool same = true;
    for (uint32_t i = 0; i < n; ++i) {
      Fiber& fiber = machine.fibers[i];
      if (fiber.state == Wait::done) ++n_done;
      else if (!first) first = &fiber;
      else if (fiber.site != first->site) same = false;
    }
    if (n_done == n) return;
    machine.current = first;
    if (n_done || !same) {
      scheduler_fault(VQ_DIVERGENT_BARRIER, first->site,
                      "a threadgroup_barrier that not every thread of the threadgroup reaches");
      return;
    }
    advance_epochs(first->argument, -1);
    for (uint32_t i = 0; i < n; ++i) machine.fibers[i].state = Wait::ready;
  }
}

// ---- Shadow memory ------------------------------------------------------------------------------------------------

bool is_threadgroup_memory(const uint8_t* address) {
  return address >= machine.arena && address < machine.arena + kThreadgroupArena;
}

struct Actor {
  Access access;
  bool device;
};

bool conflicts(const Access& past, const Actor& now) {
  if (past.group == 0) return false;
  const Access& a = now.access;
  if (past.atomic && a.atomic) return false;
  if (past.group != a.group) return now.device;
  if (past.thread == a.thread && !past.many) return false;
  if (past.epoch != a.epoch) return false;
  return past.thread / kSimdWidth != a.thread / kSimdWidth || past.simd_epoch == a.simd_epoch;
}

bool is_current(const Access& past, const Access& now) {
  return past.group == now.group && past.epoch == now.epoch;
}

void remember_read(Shadow& shadow, const Actor& now) {
  const Access& a = now.access;
  if (now.device && shadow.read.group && shadow.read.group != a.group) return;  // any later write conflicts already
  Access* slots[2] = {&shadow.read, &shadow.other_read};
  for (Access* slot : slots) {
    if (slot->group == 0 || !is_current(*slot, a)) { *slot = a; return; }
    if (slot->thread / kSimdWidth == a.thread / kSimdWidth) {
      if (slot->simd_epoch != a.simd_epoch) *slot = a;
      else if (slot->thread != a.thread) slot->many = 1;
      return;
    }
  }
  shadow.other_read.many = 1;
}

void touch(Shadow* shadow, uint32_t nbytes, bool is_write, bool atomic, bool device, const void* pc, const char* name) {
  const VqThreadIds& ids = machine.current->ids;
  const Epochs& epochs = device ? machine.device_epochs : machine.threadgroup_epochs;
  uint32_t simdgroup = ids.simdgroup_index_in_threadgroup;
  Actor now{{machine.serial, epochs.group, epochs.simd[simdgroup],
             static_cast<uint16_t>(ids.thread_index_in_threadgroup), 0, static_cast<uint8_t>(atomic)}, device};
  for (uint32_t i = 0; i < nbytes; ++i) {
    Shadow& byte = shadow[i];
    if (!is_write) {
      uint32_t wanted = device ? 1 : machine.serial;
      if (byte.initialised != wanted)
        fault(VQ_UNINITIALISED, pc, "read of uninitialised %s memory '%s'", device ? "device" : "threadgroup", name);
    }
    if (conflicts(byte.write, now))
      fault(VQ_RACE, pc, "data race on '%s': thread %u %s what thread %u%s wrote, no barrier between", name,
            now.access.thread, is_write ? "overwrites" : "reads", byte.write.thread,
            byte.write.group != machine.serial ? " of another threadgroup" : "");
    if (is_write) {
      for (const Access* past : {&byte.read, &byte.other_read})
        if (conflicts(*past, now))
          fault(VQ_RACE, pc, "data race on '%s': thread %u overwrites what thread %u%s read, no barrier between", name,
                now.access.thread, past->thread, past->group != machine.serial ? " of another threadgroup" : "");
      byte.write = now.access;
      byte.initialised = device ? 1 : machine.serial;
    } else {
      remember_read(byte, now);
    }
  }
}

void on_access(const void* pointer, uint32_t nbytes, bool is_write, bool atomic, const void* pc) {
  const uint8_t* address = static_cast<const uint8_t*>(pointer);
  if (address >= machine.stacks && address < machine.stacks + kMaxThreads * kStackBytes) return;
  if (!machine.report || machine.faulted) return;
  if (address >= machine.device_arena && address < machine.device_arena + machine.device_bytes) {
    size_t page = (address - machine.device_arena) / kPage;
    int owner = machine.page_owner[page];
    if (owner < 0)
      fault(VQ_OUT_OF_BOUNDS, pc, "%s outside of every buffer", is_write ? "write" : "read");
    DeviceBuffer& buffer = machine.buffers[owner];
    VqBuffer& outside = *buffer.outside;
    uint64_t offset = address - buffer.data;
    if (offset + nbytes > outside.nbytes)
      fault(VQ_OUT_OF_BOUNDS, pc, "%s of %u bytes at byte %llu of '%s', which has %llu", is_write ? "write" : "read",
            nbytes, static_cast<unsigned long long>(offset), outside.name,
            static_cast<unsigned long long>(outside.nbytes));
    if (is_write && !outside.writable) fault(VQ_OUT_OF_BOUNDS, pc, "write to the input '%s'", outside.name);
    if (is_write) {
      outside.bytes_written += nbytes;
    } else {
      outside.bytes_read += nbytes;
      for (uint32_t i = 0; i < nbytes; ++i) buffer.touched[(offset + i) / 64] |= 1ull << ((offset + i) % 64);
    }
    if (outside.writable) touch(&buffer.shadow[offset], nbytes, is_write, atomic, true, pc, outside.name);
    return;
  }
  if (is_threadgroup_memory(address)) {
    uint32_t offset = static_cast<uint32_t>(address - machine.arena);
    for (const Array& array : machine.arrays) {
      if (offset < array.offset || offset >= array.offset + array.nbytes) continue;
      if (offset + nbytes > array.offset + array.nbytes) break;
      (is_write ? machine.report->threadgroup_bytes_written : machine.report->threadgroup_bytes_read) += nbytes;
      touch(&machine.arena_shadow[offset], nbytes, is_write, atomic, false, pc, array.name);
      return;
    }
    const char* nearest = "?";
    for (const Array& array : machine.arrays)
      if (array.offset <= offset + kThreadgroupGuard) nearest = array.name;
    fault(VQ_OUT_OF_BOUNDS, pc, "%s outside of threadgroup memory near '%s'", is_write ? "write" : "read", nearest);
  }
  Dl_info info;  // a constant table of the kernel's own module is not device memory
  if (!is_write && dladdr(address, &info) && info.dli_fbase == machine.module_base) return;
  fault(VQ_OUT_OF_BOUNDS, pc, "%s far outside of every buffer", is_write ? "write" : "read");
}

bool place_buffers(VqBuffer* buffers, uint32_t n) {
  size_t total = kGuard;
  auto padded = [](uint64_t nbytes) { return (nbytes + kPage - 1) / kPage * kPage + kGuard; };
  for (uint32_t i = 0; i < n; ++i) total += padded(buffers[i].nbytes);
  if (machine.device_arena) munmap(machine.device_arena, machine.device_bytes);
  machine.device_arena = nullptr;
  void* arena = mmap(nullptr, total, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (arena == MAP_FAILED) return false;
  machine.device_arena = static_cast<uint8_t*>(arena);
  machine.device_bytes = total;
  machine.page_owner.assign(total / kPage, -1);
  machine.buffers.assign(n, DeviceBuffer{});
  size_t offset = kGuard;
  for (uint32_t i = 0; i < n; ++i) {
    DeviceBuffer& buffer = machine.buffers[i];
    buffer.data = machine.device_arena + offset;
    buffer.outside = &buffers[i];
    memcpy(buffer.data, buffers[i].data, buffers[i].nbytes);
    buffer.touched.assign(buffers[i].nbytes / 64 + 1, 0);
    if (buffers[i].writable) {
      buffer.shadow.assign(buffers[i].nbytes, Shadow{});
      for (Shadow& byte : buffer.shadow) byte.initialised = buffers[i].initialised ? 1 : 0;
    }
    size_t pages = (buffers[i].nbytes + kPage - 1) / kPage;
    for (size_t p = 0; p < pages; ++p) machine.page_owner[offset / kPage + p] = static_cast<int16_t>(i);
    offset += padded(buffers[i].nbytes);
  }
  return true;
}

void collect_buffers() {
  for (DeviceBuffer& buffer : machine.buffers) {
    uint64_t unique = 0;
    for (uint64_t word : buffer.touched) unique += static_cast<uint64_t>(__builtin_popcountll(word));
    buffer.outside->unique_bytes_read = unique;
    if (!buffer.outside->writable) continue;
    memcpy(buffer.outside->data, buffer.data, buffer.outside->nbytes);
    uint64_t written = 0;
    for (const Shadow& byte : buffer.shadow) written += byte.initialised != 0;
    buffer.outside->bytes_initialised = written;
  }
}

}  // namespace

extern "C" {

int vq_launch(const VqLaunch* launch, VqKernel kernel, VqBuffer* buffers, uint32_t n_buffers, VqReport* report) {
  uint32_t n = launch->group[0] * launch->group[1] * launch->group[2];
  if (n == 0 || n > kMaxThreads) return 1;
  machine.report = report;
  machine.kernel = kernel;
  machine.checked = launch->checked;
  machine.faulted = false;
  machine.current = nullptr;
  machine.random_state = launch->seed;
  Dl_info info;
  machine.module_base = dladdr(reinterpret_cast<void*>(kernel), &info) ? info.dli_fbase : nullptr;
  if (!prepare_fibers(n)) return 2;
  if (!machine.arena) {
    machine.arena = static_cast<uint8_t*>(aligned_alloc(kPage, kThreadgroupArena));
    machine.arena_shadow.resize(kThreadgroupArena);
  }
  memset(machine.arena, 0xff, kThreadgroupArena);  // NaN in every float type: a stray read shows in fast builds too
  std::vector<void*> arguments(n_buffers);
  if (machine.checked) {
    if (!place_buffers(buffers, n_buffers)) return 2;
    for (uint32_t i = 0; i < n_buffers; ++i) arguments[i] = machine.buffers[i].data;
  } else {
    for (uint32_t i = 0; i < n_buffers; ++i) arguments[i] = buffers[i].data;
  }
  machine.arguments = arguments.data();
  machine.permutations.resize(kPermutations * kSimdWidth);
  for (uint32_t p = 0; p < kPermutations; ++p) {
    uint8_t* order = &machine.permutations[p * kSimdWidth];
    std::iota(order, order + kSimdWidth, 0);
    if (launch->seed) shuffle(order, kSimdWidth);
  }
  uint32_t groups[3];
  for (int a = 0; a < 3; ++a) groups[a] = (launch->grid[a] + launch->group[a] - 1) / launch->group[a];
  std::vector<uint32_t> order(static_cast<size_t>(groups[0]) * groups[1] * groups[2]);
  std::iota(order.begin(), order.end(), 0u);
  if (launch->seed) shuffle(order.data(), order.size());
  for (uint32_t index : order) {
    uint32_t position[3] = {index % groups[0], index / groups[0] % groups[1], index / (groups[0] * groups[1])};
    run_threadgroup(*launch, position, groups);
    if (machine.faulted) break;
  }
  if (machine.checked) collect_buffers();
  if (machine.faulted) machine.n_stacks = 0;  // abandoned fibers are never resumed: build them anew
  machine.report = nullptr;
  machine.current = nullptr;
  return 0;
}

void* vq_threadgroup_array(const char* name, uint32_t nbytes, uint32_t alignment) {
  for (const Array& array : machine.arrays)
    if (strcmp(array.name, name) == 0) {
      if (array.nbytes != nbytes)
        fault(VQ_UNDEFINED, __builtin_return_address(0), "threads disagree on the size of '%s'", name);
      return machine.arena + array.offset;
    }
  uint32_t guard = machine.checked ? kThreadgroupGuard : 0;
  uint32_t offset = (machine.arena_used + alignment - 1) / alignment * alignment;
  uint32_t used = static_cast<uint32_t>(machine.report->threadgroup_limit);
  uint32_t total = nbytes;
  for (const Array& array : machine.arrays) total += array.nbytes;
  if (total > used)
    fault(VQ_OUT_OF_BOUNDS, __builtin_return_address(0), "%u bytes of threadgroup memory with '%s': the limit is %u",
          total, name, used);
  machine.arrays.push_back({name, offset, nbytes});
  machine.arena_used = offset + nbytes + guard;
  if (total > machine.report->threadgroup_bytes) machine.report->threadgroup_bytes = total;
  return machine.arena + offset;
}

void vq_threadgroup_barrier(uint32_t flags, int site) {
  Fiber* fiber = machine.current;
  fiber->state = Wait::barrier;
  fiber->site = site;
  fiber->argument = flags;
  leave_fiber();
}

uint64_t vq_simd(int operation, int type, uint64_t bits, uint32_t argument, int site) {
  Fiber* fiber = machine.current;
  fiber->state = Wait::simd;
  fiber->operation = operation;
  fiber->type = type;
  fiber->bits = bits;
  fiber->argument = argument;
  fiber->site = site;
  leave_fiber();
  return fiber->bits;
}

void vq_atomic_access(const void* pointer, uint32_t nbytes, int reads, int writes) {
  if (!machine.checked) return;
  if (reads) on_access(pointer, nbytes, false, true, __builtin_return_address(0));
  if (writes) on_access(pointer, nbytes, true, true, __builtin_return_address(0));
}

// ---- Called by code built with -fsanitize=thread ------------------------------------------------------------------

void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}

#define VQ_ACCESS(n)                                                                                             \
  void __tsan_read##n(void* p) { on_access(p, n, false, false, __builtin_return_address(0)); }                   \
  void __tsan_write##n(void* p) { on_access(p, n, true, false, __builtin_return_address(0)); }                   \
  void __tsan_unaligned_read##n(void* p) { on_access(p, n, false, false, __builtin_return_address(0)); }         \
  void __tsan_unaligned_write##n(void* p) { on_access(p, n, true, false, __builtin_return_address(0)); }         \
  void __tsan_volatile_read##n(void* p) { on_access(p, n, false, false, __builtin_return_address(0)); }          \
  void __tsan_volatile_write##n(void* p) { on_access(p, n, true, false, __builtin_return_address(0)); }
VQ_ACCESS(1)
VQ_ACCESS(2)
VQ_ACCESS(4)
VQ_ACCESS(8)
VQ_ACCESS(16)
#undef VQ_ACCESS

void __tsan_read_range(void* p, unsigned long n) { on_access(p, n, false, false, __builtin_return_address(0)); }
void __tsan_write_range(void* p, unsigned long n) { on_access(p, n, true, false, __builtin_return_address(0)); }

void* __tsan_memcpy(void* to, const void* from, unsigned long n) {
  on_access(from, n, false, false, __builtin_return_address(0));
  on_access(to, n, true, false, __builtin_return_address(0));
  return memcpy(to, from, n);
}
void* __tsan_memset(void* to, int value, unsigned long n) {
  on_access(to, n, true, false, __builtin_return_address(0));
  return memset(to, value, n);
}
void* __tsan_memmove(void* to, const void* from, unsigned long n) {
  on_access(from, n, false, false, __builtin_return_address(0));
  on_access(to, n, true, false, __builtin_return_address(0));
  return memmove(to, from, n);
}

// ---- Called by code built with -fsanitize=shift,bounds,... --------------------------------------------------------

#define VQ_UNDEFINED_BEHAVIOUR(name, what, ...)                                     \
  void __ubsan_handle_##name(__VA_ARGS__) {                                         \
    if (machine.report && !machine.faulted && machine.current)                      \
      fault(VQ_UNDEFINED, __builtin_return_address(0), what);                       \
  }
VQ_UNDEFINED_BEHAVIOUR(shift_out_of_bounds, "shift by the width of the type or more", void*, void*, void*)
VQ_UNDEFINED_BEHAVIOUR(out_of_bounds, "index outside of a fixed-size array", void*, void*)
VQ_UNDEFINED_BEHAVIOUR(divrem_overflow, "division by zero", void*, void*, void*)
VQ_UNDEFINED_BEHAVIOUR(add_overflow, "signed overflow in an addition", void*, void*, void*)
VQ_UNDEFINED_BEHAVIOUR(sub_overflow, "signed overflow in a subtraction", void*, void*, void*)
VQ_UNDEFINED_BEHAVIOUR(mul_overflow, "signed overflow in a multiplication", void*, void*, void*)
VQ_UNDEFINED_BEHAVIOUR(negate_overflow, "signed overflow in a negation", void*, void*)
VQ_UNDEFINED_BEHAVIOUR(float_cast_overflow, "a float outside of the integer type's range", void*, void*)
#undef VQ_UNDEFINED_BEHAVIOUR

}  // extern "C"
