// What the matrix products share: out = epilogue(x · weightᵀ + bias), a row's bits the same in each of them.
//
//   x       [rows, stride] bfloat16 (norm.cu makes them)
//   weight  [out_features, stride] bfloat16, stride a multiple of 8, zeros from in_features on
//   bias    [out_features] float32, or null
//   out     [rows, width] float32
//
// Epilogues: store; add to what is there; activation(gate) · up; cap · tanh(x / cap). For the gated ones weight holds
// sixteen gates, then their sixteen ups, and so on, and bias all gates, then all ups (`width` each).
//
// The order of additions: inputs are taken 128 at a time. Slice s, one of four, is the sum over inputs 32 s .. 32 s + 32 of
// every 128, in their order, sixteen a step; the four are added in the order of s. Weights are the left side of mma (16
// outputs), rows the right (8).
//
// In shared memory a row's 16 chunks of 16 bytes are permuted (chunk c of row r lies at c ^ r % 8), so that ldmatrix
// reads eight rows without bank conflicts.
#pragma once

#include "mma.cuh"

constexpr unsigned WARPS = 8;
constexpr unsigned THREADS = WARPS * WARP_SIZE;
constexpr unsigned SLICES = 4;
constexpr unsigned STEP = 128;
constexpr unsigned CHUNK = 8;
constexpr unsigned CHUNKS = STEP / CHUNK;

enum Epilogue : unsigned { STORE, ADD, GATED_SILU, GATED_GELU, SOFTCAP };

__device__ __forceinline__ unsigned place_of(unsigned row, unsigned chunk) {
    return row * STEP + (chunk ^ row % 8) * CHUNK;
}

// Begins to copy rows first .. first + Rows of a matrix, inputs step · STEP and on; zeros where it has none.
template <unsigned Rows>
__device__ __forceinline__ void fetch(Shared<bf16> tile, Global<const bf16> matrix, unsigned first, unsigned rows,
                                      unsigned stride, unsigned step) {
    for (unsigned i = threadIdx.x; i < Rows * CHUNKS; i += THREADS) {
        const unsigned row = i / CHUNKS, chunk = i % CHUNKS, input = step * STEP + chunk * CHUNK;
        const bool exists = first + row < rows && input < stride;
        const size_t at = exists ? size_t{first + row} * stride + input : 0;
        copy_async_or_zero<bf16>(tile + place_of(row, chunk), matrix + at, exists ? 16 : 0);
    }
}

__device__ __forceinline__ float silu(float x) { return x / (1.0f + expf(-x)); }
__device__ __forceinline__ float gelu(float x) {
    return 0.5f * x * (1.0f + tanhf(0.7978845608f * (x + 0.044715f * x * x * x)));
}

// Writes a block's results: the outputs of a block of Outputs weights, Rows rows; sum_of(row, output) counts within both.
template <unsigned Outputs, unsigned Rows, class SumOf>
__device__ __forceinline__ void finish(SumOf sum_of, unsigned block_of_outputs, unsigned block_of_rows,
                                       Global<const float> bias, unsigned rows, unsigned epilogue, float cap,
                                       unsigned width, Global<float> out) {
    const bool gated = epilogue == GATED_SILU || epilogue == GATED_GELU;
    const unsigned outputs = gated ? Outputs / 2 : Outputs, first = block_of_outputs * outputs;
    for (unsigned i = threadIdx.x; i < Rows * outputs; i += THREADS) {
        const unsigned row = block_of_rows * Rows + i / outputs, of_block = i % outputs, output = first + of_block;
        if (row >= rows || output >= width) continue;
        const size_t at = size_t{row} * width + output;
        const unsigned place = gated ? of_block / 16 * 32 + of_block % 16 : of_block;
        float value = sum_of(i / outputs, place);
        if (bias != nullptr) value += bias[output];
        if (gated) {
            float up = sum_of(i / outputs, place + 16);
            if (bias != nullptr) up += bias[width + output];
            value = (epilogue == GATED_SILU ? silu(value) : gelu(value)) * up;
        } else if (epilogue == ADD) {
            value += out[at];
        } else if (epilogue == SOFTCAP) {
            value = cap * tanhf(value / cap);
        }
        out[at] = value;
    }
}
