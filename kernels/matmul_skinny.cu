// out = epilogue(x · weightᵀ + bias) for few rows: bound by reading the weights, which are read once for up to 128 rows.
//
// Arguments and epilogues: matmul.cuh.
//
// A block is 32 outputs and ROWS rows, the grid (outputs, rows). Weights are the left side of mma (16 outputs), rows the
// right side (8 rows), so that a single row wastes arithmetic, of which there is plenty, and no memory traffic. Steps of
// 128 inputs go through a ring of STAGES in shared memory; its first weights are on their way before the kernel that
// computes x has ended. Of the eight warps, two share the outputs and four the inputs: warp (o, s) takes inputs
// 32 s .. 32 s + 32 of each step, and the four sums are added in the order of s. So the order of additions depends
// neither on the number of rows nor on ROWS: a row has the same bits in any batch.

#include "matmul.cuh"

constexpr unsigned OUTPUTS = 32;
// Floats between two rows of partial sums: lanes of a warp write to different banks.
constexpr unsigned PARTIAL_STRIDE = OUTPUTS + 4;

template <unsigned Rows, unsigned Stages, class Weights>
__device__ __forceinline__ void multiply(Global<const bf16> x, Weights weight, Global<const float> bias, unsigned rows,
                                         unsigned out_features, unsigned stride, unsigned epilogue, float cap,
                                         unsigned width, Global<float> out) {
    constexpr unsigned TILES = Rows / 8;
    constexpr unsigned WEIGHT_BYTES = Weights::OUTPUT_BYTES * OUTPUTS, STAGE = WEIGHT_BYTES + Rows * ROW_BYTES;
    const unsigned first_output = blockIdx.x * OUTPUTS, first_row = blockIdx.y * Rows;
    const unsigned lane = lane_index(), half = warp_index() % 2, slice = warp_index() / 2;
    const unsigned steps = (stride + STEP - 1) / STEP;
    const Shared<unsigned char> ring = shared_memory<unsigned char>();

    launch_dependents();
    for (unsigned step = 0; step < Stages - 1 && step < steps; ++step)
        weight.template fetch_step<OUTPUTS>(ring + step * STAGE, first_output, out_features, stride, step);
    wait_for_predecessor();
    for (unsigned step = 0; step < Stages - 1; ++step) {
        if (step < steps) fetch<Rows>(ring + (step * STAGE + WEIGHT_BYTES), x, first_row, rows, stride, step);
        commit_copies();
    }

    float sums[TILES][4] = {};
    for (unsigned step = 0; step < steps; ++step) {
        wait_for_copies<static_cast<int>(Stages) - 2>();
        __syncthreads();
        const unsigned next = step + Stages - 1;
        if (next < steps) {
            const Shared<unsigned char> stage = ring + next % Stages * STAGE;
            weight.template fetch_step<OUTPUTS>(stage, first_output, out_features, stride, next);
            fetch<Rows>(stage + WEIGHT_BYTES, x, first_row, rows, stride, next);
        }
        commit_copies();

        const Shared<unsigned char> stage = ring + step % Stages * STAGE;
        Fragment fragment;
        weight.template load<OUTPUTS>(fragment, stage, half * 16, slice);
#pragma unroll
        for (unsigned tile = 0; tile < TILES; ++tile) {
            uint32_t b[4];
            load_rows(b, stage + WEIGHT_BYTES, tile * 8, slice);
            weight.accumulate(sums[tile], fragment, b);
        }
    }

    // The four slices' sums meet in the ring's memory.
    wait_for_copies<0>();
    __syncthreads();
    const Shared<float> partial = shared_memory<float>();
#pragma unroll
    for (unsigned tile = 0; tile < TILES; ++tile)
#pragma unroll
        for (unsigned i = 0; i < 4; ++i) {
            const unsigned output = half * 16 + lane / 4 + i / 2 * 8, row = tile * 8 + lane % 4 * 2 + i % 2;
            partial[(slice * Rows + row) * PARTIAL_STRIDE + output] = sums[tile][i];
        }
    __syncthreads();
    const auto sum_of = [&](unsigned row, unsigned output) {
        float sum = 0.0f;
#pragma unroll
        for (unsigned s = 0; s < SLICES; ++s) {
            const float part = partial[(s * Rows + row) * PARTIAL_STRIDE + output];
            sum += part;
        }
        return weight.scaled(sum, first_output + output);
    };
    finish<OUTPUTS, Rows>(sum_of, blockIdx.x, blockIdx.y, bias, rows, epilogue, cap, width, out);
}

#define MATMUL_SKINNY(NAME, ROWS, STAGES, WEIGHT, ...)                                                          \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                               \
        NAME(Global<const bf16> x, __VA_ARGS__, Global<const float> bias, unsigned rows, unsigned out_features,         \
             unsigned stride, unsigned epilogue, float cap, unsigned width, Global<float> out) {                        \
        multiply<ROWS, STAGES>(x, WEIGHT, bias, rows, out_features, stride, epilogue, cap, width, out);                 \
    }                                                                                                                   \
    KERNEL(NAME)

#define MATMUL_SKINNY_BF16(ROWS, STAGES) \
    MATMUL_SKINNY(matmul_skinny_##ROWS, ROWS, STAGES, Bf16{weight}, Global<const bf16> weight)
#define MATMUL_SKINNY_INT8(ROWS, STAGES)                                              \
    MATMUL_SKINNY(matmul_skinny_int8_##ROWS, ROWS, STAGES, (Int8{codes, scales}),     \
                  Global<const signed char> codes, Global<const __half> scales)
#define MATMUL_SKINNY_FP8(ROWS, STAGES)                                               \
    MATMUL_SKINNY(matmul_skinny_fp8_##ROWS, ROWS, STAGES, (Fp8{codes, scales}),       \
                  Global<const unsigned char> codes, Global<const float> scales)

MATMUL_SKINNY_BF16(8, 6)
MATMUL_SKINNY_BF16(16, 6)
MATMUL_SKINNY_BF16(32, 5)
MATMUL_SKINNY_BF16(64, 4)
// Two stages, for the shared memory of sm_89; two blocks on a multiprocessor hide each other's waits.
MATMUL_SKINNY_BF16(128, 2)

// Codes are half as many bytes a step: more steps are on their way.
MATMUL_SKINNY_INT8(8, 8)
MATMUL_SKINNY_INT8(16, 8)
MATMUL_SKINNY_INT8(32, 6)
MATMUL_SKINNY_INT8(64, 3)  // with four, registers spill on sm_80
MATMUL_SKINNY_INT8(128, 2)

MATMUL_SKINNY_FP8(8, 8)
MATMUL_SKINNY_FP8(16, 8)
MATMUL_SKINNY_FP8(32, 6)
MATMUL_SKINNY_FP8(64, 4)
MATMUL_SKINNY_FP8(128, 2)
