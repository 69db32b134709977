// Sums and maxima over a warp and a block, in an order that depends on nothing but the block's size.
#pragma once

#include "device.cuh"

__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
    for (int bits = WARP_SIZE / 2; bits > 0; bits /= 2) value += __shfl_xor_sync(EVERY_LANE, value, bits);
    return value;
}

__device__ __forceinline__ float warp_max(float value) {
#pragma unroll
    for (int bits = WARP_SIZE / 2; bits > 0; bits /= 2) value = fmaxf(value, __shfl_xor_sync(EVERY_LANE, value, bits));
    return value;
}

// The same sum in every thread. `partial` has room for a number a warp and is free again when this returns.
template <unsigned Threads>
__device__ __forceinline__ float block_sum(float value, Shared<float> partial) {
    static_assert(Threads % WARP_SIZE == 0 && Threads <= 1024, "whole warps");
    value = warp_sum(value);
    if (lane_index() == 0) partial[warp_index()] = value;
    __syncthreads();
    float sum = 0.0f;
#pragma unroll
    for (unsigned warp = 0; warp < Threads / WARP_SIZE; ++warp) sum += partial[warp];
    __syncthreads();
    return sum;
}

// The same largest number in every thread; NaN is passed over.
template <unsigned Threads>
__device__ __forceinline__ float block_max(float value, Shared<float> partial) {
    static_assert(Threads % WARP_SIZE == 0 && Threads <= 1024, "whole warps");
    value = warp_max(value);
    if (lane_index() == 0) partial[warp_index()] = value;
    __syncthreads();
    float highest = -INFINITY;
#pragma unroll
    for (unsigned warp = 0; warp < Threads / WARP_SIZE; ++warp) {
        const float of_warp = partial[warp];
        highest = fmaxf(highest, of_warp);
    }
    __syncthreads();
    return highest;
}
