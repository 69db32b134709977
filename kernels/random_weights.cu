// Weights for benchmarks, made where they lie: no model's file is needed to time its shapes.
//
//   random_bf16   [2 · pairs] bfloat16, uniform in [-amplitude, amplitude)
//   random_codes  [4 · words] bytes, uniform; of e4m3 (is_fp8) without its NaN
//
// A number follows from its place and the seed. Bound by memory: each is written once.

#include "memory.cuh"

constexpr unsigned THREADS = 256;

// PCG's output permutation of a linear congruential step.
__device__ __forceinline__ uint32_t hash(uint32_t x) {
    x = x * 747796405u + 2891336453u;
    x = ((x >> ((x >> 28) + 4)) ^ x) * 277803737u;
    return (x >> 22) ^ x;
}

extern "C" __global__ void __launch_bounds__(THREADS)
    random_bf16(unsigned pairs, unsigned seed, float amplitude, Global<uint32_t> out) {
    launch_dependents();
    wait_for_predecessor();
    for (unsigned i = blockIdx.x * THREADS + threadIdx.x; i < pairs; i += gridDim.x * THREADS) {
        const uint32_t bits = hash(i ^ seed);
        const float x = static_cast<float>(bits & 0xFFFFu) * 0x1p-15f - 1.0f;
        const float y = static_cast<float>(bits >> 16) * 0x1p-15f - 1.0f;
        out[i] = pack_bf16(x * amplitude, y * amplitude);
    }
}
KERNEL(random_bf16)

extern "C" __global__ void __launch_bounds__(THREADS)
    random_codes(unsigned words, unsigned seed, unsigned is_fp8, Global<uint32_t> out) {
    launch_dependents();
    wait_for_predecessor();
    for (unsigned i = blockIdx.x * THREADS + threadIdx.x; i < words; i += gridDim.x * THREADS) {
        uint32_t bits = hash(i ^ seed);
        // A byte of 0x7F or 0xFF loses its lowest bit: adding one to its lower seven carries into the eighth.
        if (is_fp8 != 0) bits &= ~((((bits & 0x7F7F7F7Fu) + 0x01010101u) & 0x80808080u) >> 7);
        out[i] = bits;
    }
}
KERNEL(random_codes)
