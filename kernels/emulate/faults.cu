// One planted bug of each class that the emulation must report. Never launched but by its tests.

#include "../hopper.cuh"
#include "../mma.cuh"
#include "../reduce.cuh"

// A block of 64 threads, 64 floats of shared memory; `out` holds 64 floats.

__global__ void fault_none(Global<float> out) {
    wait_for_predecessor();
    const auto tile = shared_memory<float>();
    tile[threadIdx.x] = static_cast<float>(threadIdx.x);
    __syncthreads();
    const float neighbour = tile[(threadIdx.x + 1) % 64];
    __syncthreads();
    tile[threadIdx.x] = neighbour;
    __syncwarp();
    const float partner = tile[threadIdx.x ^ 1];
    __syncwarp();
    // The others' reads are over, though this reads before it writes.
    tile[threadIdx.x] -= neighbour - partner;
    out[threadIdx.x] = tile[threadIdx.x] + warp_sum(1.0f);
}
KERNEL(fault_none)

__global__ void fault_global_read(Global<const float> in, Global<float> out) {
    wait_for_predecessor();
    out[threadIdx.x] = in[threadIdx.x + 1];
}
KERNEL(fault_global_read)

__global__ void fault_global_write(Global<float> out) {
    wait_for_predecessor();
    (out - 1)[threadIdx.x] = 1.0f;
}
KERNEL(fault_global_write)

__global__ void fault_null(Global<float> out) {
    wait_for_predecessor();
    Global<const float> nothing = nullptr;
    out[threadIdx.x] = nothing[0];
}
KERNEL(fault_null)

__global__ void fault_misaligned(Global<float> out) {
    wait_for_predecessor();
    *view<float4>(out + 1) = make_float4(1, 2, 3, 4);
}
KERNEL(fault_misaligned)

__global__ void fault_shared_bounds(Global<float> out) {
    wait_for_predecessor();
    const auto tile = shared_memory<float>();
    tile[threadIdx.x + 1] = 1.0f;
    out[threadIdx.x] = 1.0f;
}
KERNEL(fault_shared_bounds)

__global__ void fault_missing_barrier(Global<float> out) {
    wait_for_predecessor();
    const auto tile = shared_memory<float>();
    tile[threadIdx.x] = 1.0f;
    out[threadIdx.x] = tile[63 - threadIdx.x];
}
KERNEL(fault_missing_barrier)

// A write where others may still be reading.
__global__ void fault_overwrite(Global<float> out) {
    wait_for_predecessor();
    const auto tile = shared_memory<float>();
    tile[threadIdx.x] = 1.0f;
    __syncthreads();
    out[threadIdx.x] = tile[63 - threadIdx.x];
    tile[threadIdx.x] = 2.0f;
}
KERNEL(fault_overwrite)

// A shuffle does not order memory within a warp.
__global__ void fault_missing_warp_barrier(Global<float> out) {
    wait_for_predecessor();
    const auto tile = shared_memory<float>();
    tile[threadIdx.x] = warp_sum(1.0f);
    out[threadIdx.x] = tile[threadIdx.x ^ 1];
}
KERNEL(fault_missing_warp_barrier)

__global__ void fault_divergent_barrier(Global<float> out) {
    wait_for_predecessor();
    if (threadIdx.x < 32) __syncthreads();
    out[threadIdx.x] = 1.0f;
}
KERNEL(fault_divergent_barrier)

__global__ void fault_two_barriers(Global<float> out) {
    wait_for_predecessor();
    if (threadIdx.x < 32) {
        __syncthreads();
    } else {
        __syncthreads();
    }
    out[threadIdx.x] = 1.0f;
}
KERNEL(fault_two_barriers)

__global__ void fault_divergent_warp(Global<float> out) {
    wait_for_predecessor();
    out[threadIdx.x] = threadIdx.x % 2 == 0 ? warp_sum(1.0f) : 0.0f;
}
KERNEL(fault_divergent_warp)

__global__ void fault_uninitialised_shared(Global<float> out) {
    wait_for_predecessor();
    const auto tile = shared_memory<float>();
    out[threadIdx.x] = tile[threadIdx.x];
}
KERNEL(fault_uninitialised_shared)

// The copy's group is awaited one too early.
__global__ void fault_copy_not_awaited(Global<const float> in, Global<float> out) {
    wait_for_predecessor();
    const auto tile = shared_memory<float>();
    if (threadIdx.x < 16) copy_async(tile + 4 * threadIdx.x, in + 4 * threadIdx.x);
    commit_copies();
    wait_for_copies<1>();
    __syncthreads();
    out[threadIdx.x] = tile[threadIdx.x];
}
KERNEL(fault_copy_not_awaited)

// Awaited, but another thread reads before the barrier.
__global__ void fault_copy_without_barrier(Global<const float> in, Global<float> out) {
    wait_for_predecessor();
    const auto tile = shared_memory<float>();
    if (threadIdx.x < 16) copy_async(tile + 4 * threadIdx.x, in + 4 * threadIdx.x);
    commit_copies();
    wait_for_copies<0>();
    out[threadIdx.x] = tile[threadIdx.x];
}
KERNEL(fault_copy_without_barrier)

__global__ void fault_none_copy(Global<const float> in, Global<float> out) {
    wait_for_predecessor();
    const auto tile = shared_memory<float>();
    if (threadIdx.x < 16) copy_async(tile + 4 * threadIdx.x, in + 4 * threadIdx.x);
    commit_copies();
    wait_for_copies<0>();
    __syncthreads();
    out[threadIdx.x] = tile[threadIdx.x];
}
KERNEL(fault_none_copy)

// The last thread to come wins: the result depends on the order, which the seed changes.
__global__ void fault_order(Global<float> out) {
    wait_for_predecessor();
    out[0] = static_cast<float>(threadIdx.x);
}
KERNEL(fault_order)

// What programmatic dependent launch forbids.
__global__ void fault_early_read(Global<const float> in, Global<float> out) {
    const float early = in[threadIdx.x];
    wait_for_predecessor();
    out[threadIdx.x] = early;
}
KERNEL(fault_early_read)

__global__ void fault_early_copy(Global<const float> in, Global<float> out) {
    const auto tile = shared_memory<float>();
    if (threadIdx.x < 16) copy_async(tile + 4 * threadIdx.x, in + 4 * threadIdx.x);
    wait_for_predecessor();
    commit_copies();
    wait_for_copies<0>();
    __syncthreads();
    out[threadIdx.x] = tile[threadIdx.x];
}
KERNEL(fault_early_copy)

__global__ void fault_early_write(Global<float> out) {
    out[threadIdx.x] = 1.0f;
    wait_for_predecessor();
}
KERNEL(fault_early_write)

__global__ void fault_never_waits(Global<float> out) {
    if (threadIdx.x == 63) return;
    wait_for_predecessor();
    out[threadIdx.x] = 1.0f;
}
KERNEL(fault_never_waits)

// A[16][16] in shared memory by rows; B[16][8] as [8][16], so that it is loaded like A. One warp.
__global__ void check_mma(Global<const bf16> a, Global<const bf16> b, Global<float> d) {
    wait_for_predecessor();
    const auto tile = shared_memory<bf16>();
    for (unsigned i = threadIdx.x; i < 384 / 8; i += 32)
        copy_async(tile + 8 * i, i < 32 ? a + 8 * i : b + 8 * (i - 32));
    commit_copies();
    wait_for_copies<0>();
    __syncthreads();
    const unsigned lane = lane_index();
    uint32_t left[4], right[4];
    // Matrices in the order of a[0..4]: rows 0-7 and 8-15, then the columns from 8 on.
    load_matrices(left, tile + (lane % 16) * 16 + lane / 16 * 8);
    // Matrices 0 and 1 are B's two halves along k; 2 and 3 are not used.
    load_matrices(right, tile + 256 + (lane % 8) * 16 + lane / 8 % 2 * 8);
    float sum[4] = {};
    mma_16x8x16(sum, left, right[0], right[1]);
    const unsigned row = lane / 4, column = 2 * (lane % 4);
    d[row * 8 + column] = sum[0];
    d[row * 8 + column + 1] = sum[1];
    d[(row + 8) * 8 + column] = sum[2];
    d[(row + 8) * 8 + column + 1] = sum[3];
}
KERNEL(check_mma)

// By hand against .trans: rows of [16][8] in memory, column-wise in registers.
__global__ void check_transposed(Global<const bf16> in, Global<unsigned> out) {
    wait_for_predecessor();
    const auto tile = shared_memory<bf16>();
    const unsigned lane = lane_index();
    for (unsigned i = lane; i < 256; i += 32) tile[i] = in[i];
    __syncwarp();
    uint32_t registers[4];
    load_matrices_transposed(registers, tile + lane * 8);
    for (unsigned i = 0; i < 4; ++i) out[4 * lane + i] = registers[i];
}
KERNEL(check_transposed)

// A tile of eight rows of 64 numbers, copied by the tensor memory accelerator: thread t of 64 reads the first number of
// chunk t % 8 of row t / 8, where the swizzle has put it; with `waits` = 0 too early.
__global__ void check_tile(Global<const TensorMap> map, unsigned waits, Global<float> out) {
    const auto tile = shared_memory<bf16>();
    const auto barrier = shared_memory<Mbarrier>(1024);
    wait_for_predecessor();
    if (threadIdx.x == 0) {
        mbarrier_init(barrier, 1);
        fence_mbarrier_init();
        mbarrier_arrive_expect(barrier, 1024);
        copy_tile(tile, map, 0, 0, barrier);
    }
    __syncthreads();
    if (waits != 0) mbarrier_wait(barrier, 0);
    const unsigned row = threadIdx.x / 8, chunk = threadIdx.x % 8;
    const bf16 number = tile[row * 64 + (chunk ^ row) * 8];
    out[threadIdx.x] = __bfloat162float(number);
}
KERNEL(check_tile)
