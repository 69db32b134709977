// The most that mma.sync multiplies, from registers alone: what the kernels of attention and the matrix products are held
// against.
//
//   out  [blocks, 256] float32, so that nothing is left out
//
// A warp does SUMS products that do not wait for each other, `rounds` times: 4096 operations each. Numbers are those of
// the thread's index, so that they are no zeros.

#include "mma.cuh"

constexpr unsigned THREADS = 256;
constexpr unsigned SUMS = 8;

extern "C" __global__ void __launch_bounds__(THREADS) mma_peak(unsigned rounds, Global<float> out) {
    launch_dependents();
    wait_for_predecessor();
    const float x = static_cast<float>(threadIdx.x) * 0x1p-9f + 0.25f;
    const uint32_t a[4] = {pack_bf16(x, -x), pack_bf16(-x, x), pack_bf16(x, 1.0f), pack_bf16(-1.0f, -x)};
    const uint32_t b[2] = {pack_bf16(x, -1.0f), pack_bf16(-x, 1.0f)};
    float sums[SUMS][4] = {};
    for (unsigned round = 0; round < rounds; ++round) {
#pragma unroll
        for (unsigned i = 0; i < SUMS; ++i) mma_16x8x16(sums[i], a, b[0], b[1]);
    }
    float sum = 0.0f;
#pragma unroll
    for (unsigned i = 0; i < SUMS; ++i) sum += sums[i][0] + sums[i][1] + sums[i][2] + sums[i][3];
    out[blockIdx.x * THREADS + threadIdx.x] = sum;
}
KERNEL(mma_peak)
