// out = epilogue(x · weightᵀ + bias) for a prompt's rows, on Hopper: bound by tensor cores.
//
//   x       map of [any, stride] bfloat16, box 64 × 128 rows; the rows that go in are `rows`, from first_row on
//   weight  map of [out_features, stride] bfloat16, box 64 × 128 rows
//   out     [rows, width]: its first row is that of x's first_row
//   the rest, and epilogues: matmul.cuh
//
// A block is 128 outputs and 128 rows, the grid (rows, outputs). Of its three warpgroups the last loads: one of its threads
// has the tensor memory accelerator copy tiles of 64 inputs, 32 KB a stage, into a ring of STAGES. The other two multiply:
// each 64 outputs by 128 rows, 64 sums a thread. A stage's barrier `full` counts its bytes; `empty` counts the two
// warpgroups, which give a stage back when the products that read it have ended, one stage later.
//
// The order of additions is that of the inputs, sixteen a step: not that of matmul_skinny.cu. Whether a row goes through
// here must follow from its request alone.

// Compiled for sm_90a alone.

#include "hopper.cuh"
#include "matmul.cuh"

constexpr unsigned OUTPUTS = 128;
constexpr unsigned ROWS = 128;
constexpr unsigned TILE_INPUTS = 64;
constexpr unsigned STAGES = 6;
constexpr unsigned WARPGROUP = 128;
constexpr unsigned CONSUMERS = THREADS / WARPGROUP;
constexpr unsigned WEIGHT_TILE = OUTPUTS * TILE_INPUTS, ROW_TILE = ROWS * TILE_INPUTS, STAGE = WEIGHT_TILE + ROW_TILE;
constexpr unsigned STAGE_BYTES = STAGE * sizeof(bf16);
constexpr unsigned SUM_STRIDE = OUTPUTS + 4;

extern "C" __global__ void __launch_bounds__(THREADS + WARPGROUP, 1)
    matmul_wgmma(Global<const TensorMap> x, Global<const TensorMap> weight, Global<const float> bias,
                 unsigned first_row, unsigned rows, unsigned stride, unsigned epilogue, float cap, unsigned width,
                 Global<float> out) {
    const unsigned first_output = blockIdx.y * OUTPUTS, first_of_x = first_row + blockIdx.x * ROWS;
    const unsigned steps = (stride + TILE_INPUTS - 1) / TILE_INPUTS, warpgroup = threadIdx.x / WARPGROUP;
    const Shared<bf16> ring = shared_memory<bf16>();
    const auto full = shared_memory<Mbarrier>(STAGES * STAGE_BYTES), empty = full + STAGES;

    if (threadIdx.x == 0) {
        for (unsigned stage = 0; stage < STAGES; ++stage) {
            mbarrier_init(full + stage, 1);
            mbarrier_init(empty + stage, CONSUMERS);
        }
        fence_mbarrier_init();
    }
    launch_dependents();
    wait_for_predecessor();
    __syncthreads();

    float sums[ROWS / 8 * 4];
    if (warpgroup == CONSUMERS) {
        if (threadIdx.x == THREADS) {
            fence_tensor_map(x);
            fence_tensor_map(weight);
        }
        for (unsigned step = 0; step < steps && threadIdx.x == THREADS; ++step) {
            const unsigned stage = step % STAGES, turn = step / STAGES;
            // The first turn finds every stage empty: the phase before the first counts as ended.
            mbarrier_wait(empty + stage, (turn + 1) % 2);
            mbarrier_arrive_expect(full + stage, STAGE_BYTES);
            copy_tile(ring + stage * STAGE, weight, step * TILE_INPUTS, first_output, full + stage);
            copy_tile(ring + stage * STAGE + WEIGHT_TILE, x, step * TILE_INPUTS, first_of_x, full + stage);
        }
    } else {
        for (unsigned step = 0; step < steps; ++step) {
            const unsigned stage = step % STAGES;
            mbarrier_wait(full + stage, step / STAGES % 2);
            const Shared<bf16> weights = ring + (stage * STAGE + warpgroup * 64 * TILE_INPUTS);
            const Shared<bf16> inputs = ring + (stage * STAGE + WEIGHT_TILE);
            wgmma_fence();
#pragma unroll
            for (unsigned k = 0; k < TILE_INPUTS / 16; ++k)
                wgmma_64x128x16(sums, tile_descriptor(weights + k * 16), tile_descriptor(inputs + k * 16),
                                step == 0 && k == 0);
            wgmma_commit();
            wgmma_wait<1>();
            if (step > 0 && threadIdx.x % WARPGROUP == 0) mbarrier_arrive(empty + (step - 1) % STAGES);
        }
        wgmma_wait<0>();
    }

    // Every product has ended, and with them every copy: the sums take the ring's place.
    __syncthreads();
    const Shared<float> all = shared_memory<float>();
    if (warpgroup < CONSUMERS) {
#pragma unroll
        for (unsigned j = 0; j < ROWS / 8; ++j)
#pragma unroll
            for (unsigned i = 0; i < 4; ++i) {
                const unsigned lane = lane_index(), output = warp_index() * 16 + lane / 4 + i / 2 * 8;
                all[(j * 8 + lane % 4 * 2 + i % 2) * SUM_STRIDE + output] = sums[4 * j + i];
            }
    }
    __syncthreads();
    if (warpgroup == CONSUMERS) return;
    const auto sum_of = [&](unsigned row, unsigned output) {
        const float sum = all[row * SUM_STRIDE + output];
        return sum;
    };
    finish<OUTPUTS, ROWS>(sum_of, blockIdx.y, blockIdx.x, bias, rows, epilogue, cap, width, out);
}
KERNEL(matmul_wgmma)
