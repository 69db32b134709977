// What the matrix products share: out = epilogue(x · weightᵀ + bias), a row's bits the same in each of them.
//
//   x       [rows, stride] bfloat16 (norm.cu makes them), zeros from in_features on
//   weight  out_features outputs of stride inputs, in one of the forms of weights.cuh, zeros from in_features on
//   bias    [out_features] float32, or null
//   out     [rows, width] float32
//
// Epilogues: store; add to what is there; activation(gate) · up; cap · tanh(x / cap). For the gated ones weight holds
// sixteen gates, then their sixteen ups, and so on, and bias all gates, then all ups (`width` each).
//
// The order of additions: inputs are taken 128 at a time. Slice s, one of four, is the sum over inputs 32 s .. 32 s + 32 of
// every 128, in their order, sixteen a step; the four are added in the order of s. Weights are the left side of mma (16
// outputs), rows the right (8).
#pragma once

#include "weights.cuh"

// Of a row of x in a stage.
constexpr unsigned ROW_BYTES = STEP * sizeof(bf16);

enum Epilogue : unsigned { STORE, ADD, GATED_SILU, GATED_GELU, SOFTCAP };

// Eight rows of a slice's 32 inputs as mma takes them.
__device__ __forceinline__ void load_rows(uint32_t (&b)[4], Shared<unsigned char> stage, unsigned first, unsigned slice) {
    const unsigned lane = lane_index();
    load_matrices(b, stage + place_of<ROW_BYTES>(first + lane % 8, slice * 4 + lane / 8));
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
