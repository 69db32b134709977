// RMSNorm of rows: norm(x) = x · weight / sqrt(mean(x²) + epsilon), in float32.
//
//   norm_rows  out[row] = norm(x[row]) in bfloat16, what a matrix product takes; rows of out are `stride` numbers
//              apart, zeros from `width` on; with `rows`, out[i] = norm(x[rows[i]])
//   round_rows out[row] = x[row] in bfloat16, laid out the same
//   norm_add   residual[row] += norm(x[row])
//
//   x, residual   [rows, width] float32
//   weight        [width] float32
//
// A block is one row, read twice: the second time from the first-level cache. Bound by latency at decode (a row is some
// KB), by memory at prefill.

#include "memory.cuh"
#include "reduce.cuh"

constexpr unsigned THREADS = 256;

// What x[row] is multiplied by before the weight.
__device__ __forceinline__ float scale_of(Global<const float> row, unsigned width, float epsilon) {
    float sum = 0.0f;
    for (unsigned i = threadIdx.x; i < width; i += THREADS) {
        const float x = row[i];
        sum += x * x;
    }
    sum = block_sum<THREADS>(sum, shared_memory<float>());
    return 1.0f / sqrtf(sum / static_cast<float>(width) + epsilon);
}

extern "C" __global__ void __launch_bounds__(THREADS)
    norm_rows(Global<const float> x, Global<const unsigned> rows, Global<const float> weight, float epsilon,
              unsigned width, unsigned stride, Global<bf16> out) {
    launch_dependents();
    wait_for_predecessor();
    const Global<const float> from = x + size_t{rows != nullptr ? rows[blockIdx.x] : blockIdx.x} * width;
    const Global<bf16> to = out + size_t{blockIdx.x} * stride;
    const float scale = scale_of(from, width, epsilon);
    for (unsigned i = threadIdx.x; i < stride; i += THREADS)
        to[i] = __float2bfloat16_rn(i < width ? from[i] * scale * weight[i] : 0.0f);
}
KERNEL(norm_rows)

extern "C" __global__ void __launch_bounds__(THREADS)
    round_rows(Global<const float> x, unsigned width, unsigned stride, Global<bf16> out) {
    launch_dependents();
    wait_for_predecessor();
    const Global<const float> from = x + size_t{blockIdx.x} * width;
    const Global<bf16> to = out + size_t{blockIdx.x} * stride;
    for (unsigned i = threadIdx.x; i < stride; i += THREADS) to[i] = __float2bfloat16_rn(i < width ? from[i] : 0.0f);
}
KERNEL(round_rows)

extern "C" __global__ void __launch_bounds__(THREADS)
    norm_add(Global<const float> x, Global<const float> weight, float epsilon, unsigned width, Global<float> residual) {
    launch_dependents();
    wait_for_predecessor();
    const Global<const float> from = x + size_t{blockIdx.x} * width;
    const Global<float> to = residual + size_t{blockIdx.x} * width;
    const float scale = scale_of(from, width, epsilon);
    for (unsigned i = threadIdx.x; i < width; i += THREADS) to[i] += from[i] * scale * weight[i];
}
KERNEL(norm_add)
