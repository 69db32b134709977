// The forms that weights have: in device memory, in a stage of shared memory, and in registers as mma takes them.
//
//   Bf16   numbers  [out_features, stride] bfloat16, stride a multiple of 8
//   Int8   codes    [out_features, stride] int8, stride a multiple of 16
//          scales   [steps, out_features rounded up to even, 4] float16: of inputs 32 b .. 32 b + 32 of each 128
//   Fp8    codes    [out_features, stride] e4m3, stride a multiple of 16
//          scales   [out_features] float32
//
// A weight is its number, or its code times its scale. Codes are widened to bfloat16, which holds them exactly, and
// multiplied as such. The scale of Int8 multiplies the sum of its 32 inputs, that of Fp8 the whole sum: so the product is
// that of the stored numbers, no rounding between.
//
// In each sixteen codes the inputs 0 1 8 9 2 3 10 11 4 5 12 13 6 7 14 15 follow each other: one ldmatrix, which moves
// pairs of bytes, gives a lane the four codes that it wants of each sixteen.
//
// A form's stage is a step of STEP inputs of a block's outputs. Within a row the chunks of 16 bytes are permuted (chunk c
// of row r lies at c ^ r % 8), so that ldmatrix reads eight rows without bank conflicts.
#pragma once

#include "mma.cuh"

constexpr unsigned WARPS = 8;
constexpr unsigned THREADS = WARPS * WARP_SIZE;
constexpr unsigned SLICES = 4;
constexpr unsigned STEP = 128;
constexpr unsigned BLOCK = STEP / SLICES;  // inputs of a slice, and of a scale of Int8
constexpr unsigned CHUNK_BYTES = 16;

// Bytes from a stage's begin to a chunk.
template <unsigned RowBytes>
__device__ __forceinline__ unsigned place_of(unsigned row, unsigned chunk) {
    return row * RowBytes + (chunk ^ row % 8) * CHUNK_BYTES;
}

// Begins to copy rows first .. first + Rows of a matrix, inputs step · STEP and on; zeros where it has none.
template <unsigned Rows, class T>
__device__ __forceinline__ void fetch(Shared<unsigned char> stage, Global<const T> matrix, unsigned first, unsigned rows,
                                      unsigned stride, unsigned step) {
    constexpr unsigned ROW_BYTES = STEP * sizeof(T), CHUNKS = ROW_BYTES / CHUNK_BYTES, CHUNK = CHUNK_BYTES / sizeof(T);
    for (unsigned i = threadIdx.x; i < Rows * CHUNKS; i += THREADS) {
        const unsigned row = i / CHUNKS, chunk = i % CHUNKS, input = step * STEP + chunk * CHUNK;
        const bool exists = first + row < rows && input < stride;
        const size_t at = exists ? size_t{first + row} * stride + input : 0;
        copy_async_or_zero<T>(view<T>(stage + place_of<ROW_BYTES>(row, chunk)), matrix + at, exists ? CHUNK_BYTES : 0);
    }
}

// a · b + c of two bfloat16 each, rounded once; subnormal numbers are kept.
__device__ __forceinline__ uint32_t fma_bf16x2(uint32_t a, uint32_t b, uint32_t c) {
#ifdef PODIUM_EMULATE
    const float2 x = to_float2(a), y = to_float2(b), z = to_float2(c);
    return pack_bf16(std::fma(x.x, y.x, z.x), std::fma(x.y, y.y, z.y));
#else
    uint32_t d;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
#endif
}

// Four bytes as two pairs of bfloat16. With its lower seven bits as the fraction of 128, and its sign as that which makes
// 256 of 128, the difference of the two is the code.
__device__ __forceinline__ void widen_int8(uint32_t codes, uint32_t& low, uint32_t& high) {
    const auto pair = [](uint32_t bytes) {
        const uint32_t fraction = (bytes & 0x007F007Fu) | 0x43004300u, sign = (bytes & 0x00800080u) | 0x43004300u;
        return fma_bf16x2(sign, 0xBF80BF80u, fraction);
    };
    low = pair(__byte_perm(codes, 0, 0x4140));
    high = pair(__byte_perm(codes, 0, 0x4342));
}

// The same of e4m3 without NaN: exponent and fraction moved to their places in bfloat16, where they mean 2⁻¹²⁰ of it.
__device__ __forceinline__ void widen_fp8(uint32_t codes, uint32_t& low, uint32_t& high) {
    const auto pair = [](uint32_t bytes) {
        return fma_bf16x2((bytes & 0x80008000u) | (bytes & 0x7F007F00u) >> 4, 0x7B807B80u, 0x80008000u);
    };
    low = pair(__byte_perm(codes, 0, 0x1404));
    high = pair(__byte_perm(codes, 0, 0x3424));
}

// Sixteen outputs of a slice's 32 inputs: the left side of two products, and what their sum is to be multiplied by for
// outputs lane / 4 and lane / 4 + 8.
struct Fragment {
    uint32_t a[2][4];
    float scale[2];
};

// sum += fragment · b
__device__ __forceinline__ void multiply_add(float (&sum)[4], const Fragment& fragment, const uint32_t (&b)[4]) {
    mma_16x8x16(sum, fragment.a[0], b[0], b[1]);
    mma_16x8x16(sum, fragment.a[1], b[2], b[3]);
}

// A fragment of codes.
template <class Widen>
__device__ __forceinline__ void load_codes(Fragment& fragment, Shared<unsigned char> stage, unsigned first, unsigned slice,
                                           Widen widen) {
    const unsigned lane = lane_index();
    uint32_t codes[4];
    load_matrices(codes, stage + place_of<STEP>(first + lane % 16, slice * 2 + lane / 16));
#pragma unroll
    for (unsigned i = 0; i < 4; ++i) widen(codes[i], fragment.a[i / 2][i % 2], fragment.a[i / 2][i % 2 + 2]);
}

struct Bf16 {
    Global<const bf16> numbers;

    static constexpr unsigned OUTPUT_BYTES = STEP * sizeof(bf16);  // of a stage
    static constexpr bool SUMS_OF_BLOCKS = false;                  // each multiplied by a scale of its own

    template <unsigned Outputs>
    __device__ __forceinline__ void fetch_step(Shared<unsigned char> stage, unsigned first, unsigned out_features,
                                               unsigned stride, unsigned step) const {
        fetch<Outputs>(stage, numbers, first, out_features, stride, step);
    }

    template <unsigned Outputs>
    __device__ __forceinline__ void load(Fragment& fragment, Shared<unsigned char> stage, unsigned first,
                                         unsigned slice) const {
        const unsigned lane = lane_index();
#pragma unroll
        for (unsigned k = 0; k < 2; ++k)
            load_matrices(fragment.a[k],
                          stage + place_of<STEP * sizeof(bf16)>(first + lane % 16, slice * 4 + k * 2 + lane / 16));
    }

    __device__ __forceinline__ void accumulate(float (&sum)[4], const Fragment& fragment, const uint32_t (&b)[4]) const {
        multiply_add(sum, fragment, b);
    }

    __device__ __forceinline__ float scaled(float sum, unsigned) const { return sum; }
};

struct Int8 {
    Global<const signed char> codes;
    Global<const __half> scales;

    static constexpr unsigned SCALES = STEP / BLOCK;
    static constexpr unsigned OUTPUT_BYTES = STEP + SCALES * sizeof(__half);
    static constexpr bool SUMS_OF_BLOCKS = true;

    template <unsigned Outputs>
    __device__ __forceinline__ void fetch_step(Shared<unsigned char> stage, unsigned first, unsigned out_features,
                                               unsigned stride, unsigned step) const {
        fetch<Outputs>(stage, codes, first, out_features, stride, step);
        constexpr unsigned CHUNK_OUTPUTS = CHUNK_BYTES / (SCALES * sizeof(__half));
        const Shared<unsigned char> stage_of_scales = stage + Outputs * STEP;
        for (unsigned i = threadIdx.x; i < Outputs / CHUNK_OUTPUTS; i += THREADS) {
            const unsigned output = first + i * CHUNK_OUTPUTS;
            const bool exists = output < out_features;
            const size_t at = exists ? (size_t{step} * (out_features + out_features % 2) + output) * SCALES : 0;
            copy_async_or_zero<__half>(view<__half>(stage_of_scales + i * CHUNK_BYTES), scales + at,
                                       exists ? CHUNK_BYTES : 0);
        }
    }

    template <unsigned Outputs>
    __device__ __forceinline__ void load(Fragment& fragment, Shared<unsigned char> stage, unsigned first,
                                         unsigned slice) const {
        load_codes(fragment, stage, first, slice, widen_int8);
        const auto scales_of_step = view<__half>(stage + Outputs * STEP);
#pragma unroll
        for (unsigned i = 0; i < 2; ++i) {
            const __half scale = scales_of_step[(first + lane_index() / 4 + 8 * i) * SCALES + slice];
            fragment.scale[i] = __half2float(scale);
        }
    }

    __device__ __forceinline__ void accumulate(float (&sum)[4], const Fragment& fragment, const uint32_t (&b)[4]) const {
        float of_block[4] = {};
        multiply_add(of_block, fragment, b);
#pragma unroll
        for (unsigned i = 0; i < 4; ++i) sum[i] = __fmaf_rn(of_block[i], fragment.scale[i / 2], sum[i]);
    }

    __device__ __forceinline__ float scaled(float sum, unsigned) const { return sum; }
};

struct Fp8 {
    Global<const unsigned char> codes;
    Global<const float> scales;

    static constexpr unsigned OUTPUT_BYTES = STEP;
    static constexpr bool SUMS_OF_BLOCKS = false;

    template <unsigned Outputs>
    __device__ __forceinline__ void fetch_step(Shared<unsigned char> stage, unsigned first, unsigned out_features,
                                               unsigned stride, unsigned step) const {
        fetch<Outputs>(stage, codes, first, out_features, stride, step);
    }

    template <unsigned Outputs>
    __device__ __forceinline__ void load(Fragment& fragment, Shared<unsigned char> stage, unsigned first,
                                         unsigned slice) const {
        load_codes(fragment, stage, first, slice, widen_fp8);
    }

    __device__ __forceinline__ void accumulate(float (&sum)[4], const Fragment& fragment, const uint32_t (&b)[4]) const {
        multiply_add(sum, fragment, b);
    }

    __device__ __forceinline__ float scaled(float sum, unsigned output) const { return sum * scales[output]; }
};
