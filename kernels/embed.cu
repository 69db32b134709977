// out[row] = table[tokens[row]] · scale
//
//   table   [vocab_size, stride] bfloat16, stride a multiple of 8
//   tokens  [rows]
//   out     [rows, width] float32: the residual stream
//
// A block is one row; a thread moves eight numbers at a time where rows of out are whole eights. Bound by memory: 6 bytes
// a number.

#include "memory.cuh"

constexpr unsigned THREADS = 128;

extern "C" __global__ void __launch_bounds__(THREADS)
    embed(Global<const bf16> table, Global<const unsigned> tokens, float scale, unsigned width, unsigned stride,
          Global<float> out) {
    launch_dependents();
    wait_for_predecessor();
    const size_t row = blockIdx.x;
    const Global<const bf16> numbers_of_token = table + size_t{tokens[row]} * stride;
    if (width % 8 != 0) {
        for (unsigned i = threadIdx.x; i < width; i += THREADS)
            out[row * width + i] = __bfloat162float(numbers_of_token[i]) * scale;
        return;
    }
    const auto from = view<const uint4>(numbers_of_token);
    const auto to = view<float4>(out + row * width);
    for (unsigned i = threadIdx.x; i < width / 8; i += THREADS) {
        const uint4 numbers = from[i];
        const float2 a = to_float2(numbers.x), b = to_float2(numbers.y);
        const float2 c = to_float2(numbers.z), d = to_float2(numbers.w);
        to[2 * i] = make_float4(a.x * scale, a.y * scale, b.x * scale, b.y * scale);
        to[2 * i + 1] = make_float4(c.x * scale, c.y * scale, d.x * scale, d.y * scale);
    }
}
KERNEL(embed)
