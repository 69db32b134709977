// What Hopper (sm_90a) has beside: barriers in shared memory that count bytes, copies of whole tiles by the tensor memory
// accelerator, and products of a warpgroup from shared memory.
#pragma once

#include "memory.cuh"

// Describes a matrix of bfloat16 in device memory to the copies below: 128 bytes, made by the driver
// (cuTensorMapEncodeTiled), or by the emulation in a layout of its own.
struct alignas(64) TensorMap {
    uint64_t opaque[16];
};

// A barrier in shared memory, eight bytes.
using Mbarrier = uint64_t;

#ifndef PODIUM_EMULATE
__device__ __forceinline__ uint32_t shared_address(Shared<Mbarrier> barrier) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(barrier));
}
#endif

// By one thread, before others use it: `arrivals` that end a phase.
__device__ __forceinline__ void mbarrier_init(Shared<Mbarrier> barrier, unsigned arrivals) {
#ifdef PODIUM_EMULATE
    emulate::mbarrier_init(barrier.offset(), arrivals);
#else
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
#endif
}

// After mbarrier_init, in the thread that called it: the asynchronous copies see it too.
__device__ __forceinline__ void fence_mbarrier_init() {
#ifndef PODIUM_EMULATE
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

__device__ __forceinline__ void mbarrier_arrive(Shared<Mbarrier> barrier) {
#ifdef PODIUM_EMULATE
    emulate::mbarrier_arrive(barrier.offset(), 0);
#else
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
#endif
}

// Arrives, and has the phase wait for so many bytes of copies beside.
__device__ __forceinline__ void mbarrier_arrive_expect(Shared<Mbarrier> barrier, unsigned bytes) {
#ifdef PODIUM_EMULATE
    emulate::mbarrier_arrive(barrier.offset(), bytes);
#else
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
                 : "memory");
#endif
}

// Waits for the phase of that parity (0, 1, 0, … from the first on) to end.
__device__ __forceinline__ void mbarrier_wait(Shared<Mbarrier> barrier, unsigned parity) {
#ifdef PODIUM_EMULATE
    emulate::mbarrier_wait(barrier.offset(), parity, {"mbarrier_wait", __FILE__, __LINE__});
#else
    uint32_t done = 0;
    while (done == 0) {
        asm volatile(
            "{\n"
            ".reg .pred p;\n"
            "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
            "selp.u32 %0, 1, 0, p;\n"
            "}"
            : "=r"(done)
            : "r"(shared_address(barrier)), "r"(parity)
            : "memory");
    }
#endif
}

// By a thread, before its first copy by `map`, which the host wrote: what it wrote last is seen, not what was cached of that
// address before.
__device__ __forceinline__ void fence_tensor_map([[maybe_unused]] Global<const TensorMap> map) {
#ifndef PODIUM_EMULATE
    asm volatile("fence.proxy.tensormap::generic.acquire.sys [%0], 128;" ::"l"(map) : "memory");
#endif
}

// By one thread: begins to copy the box of `map` whose first number is (column, row) to shared memory, aligned to 1024
// bytes, in the layout of 128-byte swizzle; zeros where the matrix has none. `barrier` counts the bytes.
__device__ __forceinline__ void copy_tile(Shared<bf16> to, Global<const TensorMap> map, unsigned column, unsigned row,
                                          Shared<Mbarrier> barrier) {
#ifdef PODIUM_EMULATE
    emulate::copy_tile(to.offset(), map.address(), column, row, barrier.offset());
#else
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(
            static_cast<uint32_t>(__cvta_generic_to_shared(to))),
        "l"(map), "r"(column), "r"(row), "r"(shared_address(barrier))
        : "memory");
#endif
}

// A tile of rows of 64 bfloat16 (128 bytes, swizzled by 128), as the products read it: its address in units of sixteen
// bytes, the distance of 1024 between groups of eight rows, and the kind of swizzle. The distance along a row is not used.
// Within a row one goes on by adding bytes to the address: the swizzle follows from address bits.
__device__ __forceinline__ uint64_t tile_descriptor(Shared<bf16> tile) {
#ifdef PODIUM_EMULATE
    const uint32_t address = tile.offset();
#else
    const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(tile));
#endif
    constexpr uint64_t LEADING = 1, STRIDE = 1024 >> 4, SWIZZLE_128 = 1;
    return uint64_t{(address & 0x3FFFF) >> 4} | LEADING << 16 | STRIDE << 32 | SWIZZLE_128 << 62;
}

// Before the first product that reads registers (its sums) or shared memory that this warpgroup wrote.
__device__ __forceinline__ void wgmma_fence() {
#ifndef PODIUM_EMULATE
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}
__device__ __forceinline__ void wgmma_commit() {
#ifdef PODIUM_EMULATE
    emulate::wgmma_commit();
#else
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}
// Waits for all groups of products but the `Pending` latest.
template <int Pending>
__device__ __forceinline__ void wgmma_wait() {
#ifdef PODIUM_EMULATE
    emulate::wgmma_wait(Pending, {"wgmma_wait", __FILE__, __LINE__});
#else
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(Pending) : "memory");
#endif
}

// D[64][128] += A[64][16] · B[128][16]ᵀ, both of shared memory, by a warpgroup (four warps, the first a multiple of four);
// `first` sets D instead. With g = lane / 4 and t = 2 (lane % 4), of warp w of the four:
//   d[4 j .. 4 j + 2] = D[16 w + g][8 j + t, +1]   d[4 j + 2 .. 4 j + 4] = D[16 w + g + 8][8 j + t, +1]
// It is asynchronous: d and the tiles are not to be touched before wgmma_wait.
__device__ __forceinline__ void wgmma_64x128x16(float (&d)[64], uint64_t a, uint64_t b, bool first) {
#ifdef PODIUM_EMULATE
    emulate::wgmma_bf16(d, a, b, first);
#else
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        "setp.ne.b32 p, %66, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {"
            "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
            "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
            "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
            "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
        "%64, %65, p, 1, 1, 0, 0;\n"
        "}"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]),
              "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]),
              "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]),
              "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]),
              "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]),
              "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]),
              "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]),
              "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63])
        : "l"(a), "l"(b), "r"(first ? 0 : 1));
#endif
}
