// out[row] = table[tokens[row]] · scale
//
//   table   [vocab_size, stride] in one of the forms of weights.cuh
//   tokens  [rows]
//   out     [rows, width] float32: the residual stream
//
// A block is one row. A thread moves eight numbers of bfloat16 at a time where rows of out are whole eights, or sixteen
// codes. Bound by memory: 6 bytes a number, 5 of codes.

#include "weights.cuh"

constexpr unsigned EMBED_THREADS = 128;

extern "C" __global__ void __launch_bounds__(EMBED_THREADS)
    embed(Global<const bf16> table, Global<const unsigned> tokens, float scale, unsigned width, unsigned stride,
          Global<float> out) {
    launch_dependents();
    wait_for_predecessor();
    const size_t row = blockIdx.x;
    const Global<const bf16> numbers_of_token = table + size_t{tokens[row]} * stride;
    if (width % 8 != 0) {
        for (unsigned i = threadIdx.x; i < width; i += EMBED_THREADS)
            out[row * width + i] = __bfloat162float(numbers_of_token[i]) * scale;
        return;
    }
    const auto from = view<const uint4>(numbers_of_token);
    const auto to = view<float4>(out + row * width);
    for (unsigned i = threadIdx.x; i < width / 8; i += EMBED_THREADS) {
        const uint4 numbers = from[i];
        const float2 a = to_float2(numbers.x), b = to_float2(numbers.y);
        const float2 c = to_float2(numbers.z), d = to_float2(numbers.w);
        to[2 * i] = make_float4(a.x * scale, a.y * scale, b.x * scale, b.y * scale);
        to[2 * i + 1] = make_float4(c.x * scale, c.y * scale, d.x * scale, d.y * scale);
    }
}
KERNEL(embed)

// Sixteen codes of a token at a time, each times what scale_of(chunk) gives.
template <class T, class Widen, class ScaleOf>
__device__ __forceinline__ void embed_codes(Global<const T> codes, Widen widen, ScaleOf scale_of, float scale,
                                            unsigned width, Global<float> out) {
    const auto chunks = view<const uint4>(codes);
    for (unsigned chunk = threadIdx.x; chunk < (width + 15) / 16; chunk += EMBED_THREADS) {
        const uint4 words = chunks[chunk];
        const uint32_t word[4] = {words.x, words.y, words.z, words.w};
        const float of_codes = scale_of(chunk);
        float numbers[16];
#pragma unroll
        for (unsigned i = 0; i < 4; ++i) {
            uint32_t pairs[2];
            widen(word[i], pairs[0], pairs[1]);
#pragma unroll
            for (unsigned half = 0; half < 2; ++half) {
                const float2 pair = to_float2(pairs[half]);
                numbers[half * 8 + i * 2] = pair.x * of_codes * scale;
                numbers[half * 8 + i * 2 + 1] = pair.y * of_codes * scale;
            }
        }
        if (width % 4 == 0) {
            const auto to = view<float4>(out + chunk * 16);
#pragma unroll
            for (unsigned i = 0; i < 4; ++i)
                if (chunk * 16 + i * 4 < width)
                    to[i] = make_float4(numbers[4 * i], numbers[4 * i + 1], numbers[4 * i + 2], numbers[4 * i + 3]);
        } else {
#pragma unroll
            for (unsigned i = 0; i < 16; ++i)
                if (chunk * 16 + i < width) out[chunk * 16 + i] = numbers[i];
        }
    }
}

extern "C" __global__ void __launch_bounds__(EMBED_THREADS)
    embed_int8(Global<const signed char> codes, Global<const __half> scales, Global<const unsigned> tokens, float scale,
               unsigned vocab_size, unsigned width, unsigned stride, Global<float> out) {
    launch_dependents();
    wait_for_predecessor();
    const size_t row = blockIdx.x, token = tokens[row], rows_of_scales = vocab_size + vocab_size % 2;
    const auto scale_of = [&](unsigned chunk) {
        const unsigned block = chunk / 2;
        return __half2float(scales[(block / 4 * rows_of_scales + token) * 4 + block % 4]);
    };
    embed_codes(codes + token * stride, widen_int8, scale_of, scale, width, out + row * width);
}
KERNEL(embed_int8)

extern "C" __global__ void __launch_bounds__(EMBED_THREADS)
    embed_fp8(Global<const unsigned char> codes, Global<const float> scales, Global<const unsigned> tokens, float scale,
              unsigned width, unsigned stride, Global<float> out) {
    launch_dependents();
    wait_for_predecessor();
    const size_t row = blockIdx.x, token = tokens[row];
    const float of_token = scales[token];
    embed_codes(codes + token * stride, widen_fp8, [&](unsigned) { return of_token; }, scale, width, out + row * width);
}
KERNEL(embed_fp8)
