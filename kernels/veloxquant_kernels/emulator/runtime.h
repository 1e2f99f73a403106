// The interface between a kernel's module, the runtime and ctypes. Plain C types only.
#pragma once
#include <stdint.h>

enum {  // SIMD-group operations; up to VQ_XOR a reduction
  VQ_SUM, VQ_PRODUCT, VQ_MAX, VQ_MIN, VQ_AND, VQ_OR, VQ_XOR,
  VQ_PREFIX_INCLUSIVE_SUM, VQ_PREFIX_EXCLUSIVE_SUM,
  VQ_SHUFFLE, VQ_SHUFFLE_XOR, VQ_SHUFFLE_DOWN, VQ_SHUFFLE_UP, VQ_BROADCAST_FIRST, VQ_BALLOT, VQ_SIMD_BARRIER
};
enum { VQ_FLOAT, VQ_INT, VQ_UINT };
enum { VQ_MEM_NONE = 0, VQ_MEM_DEVICE = 1, VQ_MEM_THREADGROUP = 2 };
enum {  // kinds of fault; emulator/run.py names them
  VQ_NO_FAULT, VQ_OUT_OF_BOUNDS, VQ_UNINITIALISED, VQ_RACE, VQ_DIVERGENT_BARRIER, VQ_DIVERGENT_SIMD, VQ_UNDEFINED
};

struct VqThreadIds {
  uint32_t thread_position_in_grid[3], thread_position_in_threadgroup[3], threadgroup_position_in_grid[3];
  uint32_t threads_per_threadgroup[3], dispatch_threads_per_threadgroup[3], threadgroups_per_grid[3];
  uint32_t threads_per_grid[3], grid_size[3], grid_origin[3];
  uint32_t thread_index_in_threadgroup, thread_index_in_simdgroup, simdgroup_index_in_threadgroup;
  uint32_t simdgroups_per_threadgroup, dispatch_simdgroups_per_threadgroup;
  uint32_t thread_index_in_quadgroup, quadgroup_index_in_threadgroup, quadgroups_per_threadgroup;
  uint32_t dispatch_quadgroups_per_threadgroup, threads_per_simdgroup, thread_execution_width;
};

struct VqLaunch {
  uint32_t grid[3], group[3];
  uint32_t checked;
  uint64_t seed;  // 0: the natural order
};

struct VqBuffer {
  void* data;
  const char* name;
  uint64_t nbytes;
  uint32_t writable, initialised;
  uint64_t bytes_read, bytes_written, unique_bytes_read, bytes_initialised;
};

struct VqReport {
  int32_t fault, line;
  uint64_t pc_offset;
  uint32_t group[3], thread[3];
  uint64_t threadgroup_limit, threadgroup_bytes;
  uint64_t threadgroup_bytes_read, threadgroup_bytes_written;
  char message[256];
};

typedef void (*VqKernel)(void* const* buffers, const struct VqThreadIds* ids);

extern "C" {
int vq_launch(const VqLaunch*, VqKernel, VqBuffer*, uint32_t n_buffers, VqReport*);
void* vq_threadgroup_array(const char* name, uint32_t nbytes, uint32_t alignment);
void vq_threadgroup_barrier(uint32_t flags, int site);
uint64_t vq_simd(int operation, int type, uint64_t bits, uint32_t argument, int site);
void vq_atomic_access(const void* pointer, uint32_t nbytes, int reads, int writes);
}
