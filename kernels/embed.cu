// out[row] = table[tokens[row]] · scale
//
//   table   [vocab_size, width] bfloat16, width a multiple of 8
//   tokens  [rows]
//   out     [rows, width] float32: the residual stream
//
// A block is one row; a thread moves eight numbers at a time. Bound by memory: 6 bytes a number.

#include "memory.cuh"

constexpr unsigned THREADS = 128;

extern "C" __global__ void __launch_bounds__(THREADS)
    embed(Global<const bf16> table, Global<const unsigned> tokens, float scale, unsigned width, Global<float> out) {
    launch_dependents();
    wait_for_predecessor();
    const size_t row = blockIdx.x;
    const auto from = view<const bf16x8>(table + size_t{tokens[row]} * width);
    const auto to = view<float4>(out + row * width);
    for (unsigned i = threadIdx.x; i < width / 8; i += THREADS) {
        const bf16x8 numbers = from[i];
        const float2 a = to_float2(numbers.pairs[0]), b = to_float2(numbers.pairs[1]);
        const float2 c = to_float2(numbers.pairs[2]), d = to_float2(numbers.pairs[3]);
        to[2 * i] = make_float4(a.x * scale, a.y * scale, b.x * scale, b.y * scale);
        to[2 * i + 1] = make_float4(c.x * scale, c.y * scale, d.x * scale, d.y * scale);
    }
}
KERNEL(embed)
