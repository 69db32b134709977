// What every kernel includes first. It lets one source be compiled by nvcc and, for the emulation, by the host's
// compiler as C++20 (kernels/emulate).
//
//   Global<T>                   T* into device memory            checked on each access under emulation
//   Shared<T>                   T* into dynamic shared memory    checked, and watched for races
//   view<U>(pointer)            reinterpret_cast<U*>
//   shared_memory<T>(bytes)     the block's dynamic shared memory, from a byte offset on
//   KERNEL(name)                after a kernel: the launcher finds it by this name
//
// Shared memory is always dynamic, and its elements have their type named (`float x = tile[i]`, not `auto`).
#pragma once

#ifdef PODIUM_EMULATE

#include "emulate/cuda.h"

#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

template <class T>
using Global = T*;
template <class T>
using Shared = T*;

template <class U, class T>
__device__ __forceinline__ U* view(T* pointer) {
    return reinterpret_cast<U*>(pointer);
}

template <class T>
__device__ __forceinline__ Shared<T> shared_memory(unsigned byte_offset = 0) {
    extern __shared__ __align__(128) unsigned char dynamic_shared_memory[];
    return reinterpret_cast<T*>(dynamic_shared_memory + byte_offset);
}

#define KERNEL(NAME)

#endif

using bf16 = __nv_bfloat16;
using bf16x2 = __nv_bfloat162;

constexpr unsigned WARP_SIZE = 32;
constexpr unsigned EVERY_LANE = 0xFFFFFFFFu;

__device__ __forceinline__ unsigned lane_index() { return threadIdx.x % WARP_SIZE; }
__device__ __forceinline__ unsigned warp_index() { return threadIdx.x / WARP_SIZE; }

// Programmatic dependent launch (sm_90 and later): a kernel may start while its predecessor drains, and does what does
// not depend on it (fetching weights) before it waits.

// Waits until the kernels before this one have ended and their writes are visible: the one before has waited for its own
// predecessor, and so on. Every thread of every kernel calls it, also one that has nothing to do; before it a kernel writes
// nothing, and reads nothing that they may be writing. The emulation reports what does not keep to that.
__device__ __forceinline__ void wait_for_predecessor() {
#ifdef PODIUM_EMULATE
    emulate::wait_for_predecessor();
#elif __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Lets the next kernel start where there is room.
__device__ __forceinline__ void launch_dependents() {
#if !defined(PODIUM_EMULATE) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}
