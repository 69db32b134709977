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

template <unsigned Rows, unsigned Stages>
__device__ __forceinline__ void multiply(Global<const bf16> x, Global<const bf16> weight, Global<const float> bias,
                                         unsigned rows, unsigned out_features, unsigned stride, unsigned epilogue,
                                         float cap, unsigned width, Global<float> out) {
    constexpr unsigned TILES = Rows / 8;
    constexpr unsigned STAGE = (OUTPUTS + Rows) * STEP;
    const unsigned first_output = blockIdx.x * OUTPUTS, first_row = blockIdx.y * Rows;
    const unsigned lane = lane_index(), half = warp_index() % 2, slice = warp_index() / 2;
    const unsigned steps = (stride + STEP - 1) / STEP;
    const Shared<bf16> ring = shared_memory<bf16>();

    launch_dependents();
    for (unsigned step = 0; step < Stages - 1 && step < steps; ++step)
        fetch<OUTPUTS>(ring + step * STAGE, weight, first_output, out_features, stride, step);
    wait_for_predecessor();
    for (unsigned step = 0; step < Stages - 1; ++step) {
        if (step < steps) fetch<Rows>(ring + (step * STAGE + OUTPUTS * STEP), x, first_row, rows, stride, step);
        commit_copies();
    }

    float sums[TILES][4] = {};
    for (unsigned step = 0; step < steps; ++step) {
        wait_for_copies<static_cast<int>(Stages) - 2>();
        __syncthreads();
        const unsigned next = step + Stages - 1;
        if (next < steps) {
            const Shared<bf16> stage = ring + next % Stages * STAGE;
            fetch<OUTPUTS>(stage, weight, first_output, out_features, stride, next);
            fetch<Rows>(stage + OUTPUTS * STEP, x, first_row, rows, stride, next);
        }
        commit_copies();

        const Shared<bf16> weights = ring + step % Stages * STAGE, inputs = weights + OUTPUTS * STEP;
        uint32_t a[2][4];
#pragma unroll
        for (unsigned k = 0; k < 2; ++k)
            load_matrices(a[k], weights + place_of(half * 16 + lane % 16, slice * 4 + k * 2 + lane / 16));
#pragma unroll
        for (unsigned tile = 0; tile < TILES; ++tile) {
            uint32_t b[4];
            load_matrices(b, inputs + place_of(tile * 8 + lane % 8, slice * 4 + lane / 8));
            mma_16x8x16(sums[tile], a[0], b[0], b[1]);
            mma_16x8x16(sums[tile], a[1], b[2], b[3]);
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
        return sum;
    };
    finish<OUTPUTS, Rows>(sum_of, blockIdx.x, blockIdx.y, bias, rows, epilogue, cap, width, out);
}

#define MATMUL_SKINNY(ROWS, STAGES)                                                                                     \
    extern "C" __global__ void __launch_bounds__(THREADS) matmul_skinny_##ROWS(                                         \
        Global<const bf16> x, Global<const bf16> weight, Global<const float> bias, unsigned rows, unsigned out_features, \
        unsigned stride, unsigned epilogue, float cap, unsigned width, Global<float> out) {                             \
        multiply<ROWS, STAGES>(x, weight, bias, rows, out_features, stride, epilogue, cap, width, out);                 \
    }                                                                                                                   \
    KERNEL(matmul_skinny_##ROWS)

MATMUL_SKINNY(8, 6)
MATMUL_SKINNY(16, 6)
MATMUL_SKINNY(32, 5)
MATMUL_SKINNY(64, 4)
// Two stages, for the shared memory of sm_89; two blocks on a multiprocessor hide each other's waits.
MATMUL_SKINNY(128, 2)
