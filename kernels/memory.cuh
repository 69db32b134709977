// Sixteen bytes at a time: vectors of global memory, asynchronous copies into shared memory, ldmatrix.
#pragma once

#include "device.cuh"

// Two bfloat16 in a register, the first in the low half. What is loaded sixteen bytes at a time is a uint4 of such: a
// struct of CUDA's own pairs is loaded in four pieces.
__device__ __forceinline__ float2 to_float2(uint32_t pair) {
    return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xFFFF0000u));
}
__device__ __forceinline__ bf16x2 to_bf16x2(float x, float y) { return __floats2bfloat162_rn(x, y); }
// What mma takes: two bfloat16 in a register, the first in the low half.
__device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
#ifdef PODIUM_EMULATE
    return std::bit_cast<uint32_t>(__floats2bfloat162_rn(low, high));
#else
    const bf16x2 pair = __floats2bfloat162_rn(low, high);
    return reinterpret_cast<const uint32_t&>(pair);
#endif
}

// Reads what is read once (weights) past the first-level cache.
__device__ __forceinline__ uint4 load_streaming(Global<const uint4> from) {
#ifdef PODIUM_EMULATE
    return *from;
#else
    uint4 value;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
                 : "l"(from));
    return value;
#endif
}

#ifndef PODIUM_EMULATE
__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}
#endif

// Begins a copy of 16 bytes past the first-level cache. It is there after wait_for_copies; others see it after the
// block's barrier that follows.
template <class T>
__device__ __forceinline__ void copy_async(Shared<T> to, Global<const T> from) {
#ifdef PODIUM_EMULATE
    emulate::async_copy(to.offset(), from.address(), 16, 16);
#else
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to)), "l"(from) : "memory");
#endif
}

// The same of the first `bytes` bytes, zeros behind them; with 0, `from` is not read.
template <class T>
__device__ __forceinline__ void copy_async_or_zero(Shared<T> to, Global<const T> from, unsigned bytes) {
#ifdef PODIUM_EMULATE
    emulate::async_copy(to.offset(), from.address(), bytes, 16);
#else
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(bytes)
                 : "memory");
#endif
}

// Closes the group of copies that this thread has begun since the last.
__device__ __forceinline__ void commit_copies() {
#ifdef PODIUM_EMULATE
    emulate::async_commit();
#else
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits for all groups of this thread but the `Pending` latest.
template <int Pending>
__device__ __forceinline__ void wait_for_copies() {
#ifdef PODIUM_EMULATE
    emulate::async_wait(Pending);
#else
    asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
#endif
}

// Four 8×8 matrices of 16-bit numbers. Lane i holds the address of row i % 8 of matrix i / 8; lane l gets elements
// 2 (l % 4) and the next of row l / 4 of each, as mma takes them.
template <class T>
__device__ __forceinline__ void load_matrices(uint32_t (&registers)[4], Shared<T> row) {
#ifdef PODIUM_EMULATE
    emulate::load_matrices(registers, row.offset(), 4, false);
#else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
                 : "r"(shared_address(row))
                 : "memory");
#endif
}

// The same, transposed: lane l gets elements of column l / 4.
template <class T>
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&registers)[4], Shared<T> row) {
#ifdef PODIUM_EMULATE
    emulate::load_matrices(registers, row.offset(), 4, true);
#else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
                 : "r"(shared_address(row))
                 : "memory");
#endif
}
