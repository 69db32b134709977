// out = epilogue(x · weightᵀ + bias) for many rows: bound by tensor cores, at prefill.
//
// Arguments and epilogues: matmul.cuh.
//
// A block is 128 outputs and 64 rows, the grid (rows, outputs). Of the eight warps, two share the outputs and four the
// inputs, as in matmul_skinny.cu and with its order of additions, so that a row has the bits here that it has there: which
// of the two is launched may depend on the number of rows. A warp multiplies 64 outputs by 64 rows, which it keeps in 128
// registers; of every 128 inputs it takes the 32 of its slice, two steps of mma, sixteen ldmatrix for 64 products.
//
// Steps of 128 inputs go through a ring of STAGES in shared memory, 48 KB each (32 of codes): three, or of bfloat16 two
// where a multiprocessor has no more (sm_89). Blocks with the same outputs follow each other, so that weights are read once
// from memory and for further rows from the second-level cache.

#include "matmul.cuh"

constexpr unsigned OUTPUTS = 128;
constexpr unsigned ROWS = 64;
constexpr unsigned OUTPUT_TILES = 4;  // of a warp, 16 outputs each
constexpr unsigned ROW_TILES = ROWS / 8;
// Floats between two rows of sums: lanes of a warp write to different banks.
constexpr unsigned SUM_STRIDE = OUTPUTS + 4;

template <unsigned Stages, class Weights>
__device__ __forceinline__ void multiply(Global<const bf16> x, Weights weight, Global<const float> bias, unsigned rows,
                                         unsigned out_features, unsigned stride, unsigned epilogue, float cap,
                                         unsigned width, Global<float> out) {
    constexpr unsigned WEIGHT_BYTES = Weights::OUTPUT_BYTES * OUTPUTS, STAGE = WEIGHT_BYTES + ROWS * ROW_BYTES;
    const unsigned first_output = blockIdx.y * OUTPUTS, first_row = blockIdx.x * ROWS;
    const unsigned lane = lane_index(), half = warp_index() % 2, slice = warp_index() / 2;
    const unsigned steps = (stride + STEP - 1) / STEP;
    const Shared<unsigned char> ring = shared_memory<unsigned char>();

    launch_dependents();
    wait_for_predecessor();
    const auto fetch_step = [&](unsigned step) {
        const Shared<unsigned char> stage = ring + step % Stages * STAGE;
        if (step < steps) {
            weight.template fetch_step<OUTPUTS>(stage, first_output, out_features, stride, step);
            fetch<ROWS>(stage + WEIGHT_BYTES, x, first_row, rows, stride, step);
        }
        commit_copies();
    };
    for (unsigned step = 0; step < Stages - 1; ++step) fetch_step(step);

    float sums[OUTPUT_TILES][ROW_TILES][4] = {};
    for (unsigned step = 0; step < steps; ++step) {
        wait_for_copies<static_cast<int>(Stages) - 2>();
        __syncthreads();
        fetch_step(step + Stages - 1);
        const Shared<unsigned char> stage = ring + step % Stages * STAGE;
        Fragment fragments[OUTPUT_TILES];
#pragma unroll
        for (unsigned tile = 0; tile < OUTPUT_TILES; ++tile)
            weight.template load<OUTPUTS>(fragments[tile], stage, half * 64 + tile * 16, slice);
#pragma unroll
        for (unsigned row_tile = 0; row_tile < ROW_TILES; ++row_tile) {
            uint32_t b[4];
            // Keeps the compiler from having the sums of more blocks at hand than there are registers.
            if (Weights::SUMS_OF_BLOCKS && row_tile % 2 == 0) __syncwarp();
            load_rows(b, stage + WEIGHT_BYTES, row_tile * 8, slice);
#pragma unroll
            for (unsigned tile = 0; tile < OUTPUT_TILES; ++tile)
                weight.accumulate(sums[tile][row_tile], fragments[tile], b);
        }
    }

    // The slices add their sums to the ring's memory, one after the other.
    wait_for_copies<0>();
    __syncthreads();
    const Shared<float> all = shared_memory<float>();
    for (unsigned turn = 0; turn < SLICES; ++turn) {
        if (slice == turn) {
#pragma unroll
            for (unsigned tile = 0; tile < OUTPUT_TILES; ++tile)
#pragma unroll
                for (unsigned row_tile = 0; row_tile < ROW_TILES; ++row_tile)
#pragma unroll
                    for (unsigned i = 0; i < 4; ++i) {
                        const unsigned output = half * 64 + tile * 16 + lane / 4 + i / 2 * 8;
                        const unsigned at = (row_tile * 8 + lane % 4 * 2 + i % 2) * SUM_STRIDE + output;
                        float before = 0.0f;
                        if (turn > 0) before = all[at];
                        all[at] = before + sums[tile][row_tile][i];
                    }
        }
        __syncthreads();
    }
    const auto sum_of = [&](unsigned row, unsigned output) {
        const float sum = all[row * SUM_STRIDE + output];
        return weight.scaled(sum, first_output + output);
    };
    finish<OUTPUTS, ROWS>(sum_of, blockIdx.y, blockIdx.x, bias, rows, epilogue, cap, width, out);
}

#define MATMUL_TILED(NAME, STAGES, WEIGHT, ...)                                                                         \
    extern "C" __global__ void __launch_bounds__(THREADS, 1)                                                             \
        NAME(Global<const bf16> x, __VA_ARGS__, Global<const float> bias, unsigned rows, unsigned out_features,         \
             unsigned stride, unsigned epilogue, float cap, unsigned width, Global<float> out) {                        \
        multiply<STAGES>(x, WEIGHT, bias, rows, out_features, stride, epilogue, cap, width, out);                       \
    }                                                                                                                   \
    KERNEL(NAME)

MATMUL_TILED(matmul_tiled_2, 2, Bf16{weight}, Global<const bf16> weight)
MATMUL_TILED(matmul_tiled_3, 3, Bf16{weight}, Global<const bf16> weight)
MATMUL_TILED(matmul_tiled_int8, 3, (Int8{codes, scales}), Global<const signed char> codes, Global<const __half> scales)
MATMUL_TILED(matmul_tiled_fp8, 3, (Fp8{codes, scales}), Global<const unsigned char> codes, Global<const float> scales)
