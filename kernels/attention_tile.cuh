// Sixteen queries a warp against runs of keys and values, on tensor cores: what the attention kernels share.
//
// A query is one head of one row; the heads that share a kv head stand side by side, so that a key is read once for all
// of them. Keys and values are fetched KEYS at a time into a ring of two stages, zeros where there is none. Queries and
// probabilities are rounded to bfloat16; scores, maxima, sums and results are float32 (online softmax, in powers of two).
//
// A query's numbers depend on its own keys and on where the run begins, never on the other queries of its tile: blocks of
// keys are counted from the run's first, and one of which a query sees nothing changes nothing of it.
#pragma once

#include "mma.cuh"
#include "pages.cuh"

constexpr unsigned QUERIES = 16;  // of a warp
constexpr unsigned STAGES = 2;
constexpr float LOG2_E = 1.4426950408889634f;

// How scores become what the softmax takes.
struct Scoring {
    float scale, cap;  // cap · tanh(score / cap); 0: as they are
    __device__ __forceinline__ float operator()(float product) const {
        const float score = product * scale;
        return (cap != 0.0f ? cap * tanhf(score / cap) : score) * LOG2_E;
    }
};

// Numbers between two keys in shared memory: an odd number of sixteen bytes, so that ldmatrix meets each bank once.
template <unsigned Dim>
constexpr unsigned KEY_STRIDE = Dim + 8;

// The layer and kv head that a block works on, and where its keys lie.
template <unsigned Dim, unsigned Threads, unsigned Keys>
struct KeyRing {
    static constexpr unsigned STAGE = 2 * Keys * KEY_STRIDE<Dim>;

    Global<const Global<bf16>> pages;  // of the run's first token and on
    size_t layer_offset;
    unsigned kv_head, tokens;  // that there are

    static __device__ __forceinline__ Shared<bf16> keys(unsigned step) {
        return shared_memory<bf16>() + step % STAGES * STAGE;
    }
    static __device__ __forceinline__ Shared<bf16> values(unsigned step) {
        return keys(step) + Keys * KEY_STRIDE<Dim>;
    }

    // Begins to copy tokens first .. first + Keys of the run.
    __device__ __forceinline__ void fetch(unsigned step, unsigned first) const {
        constexpr unsigned CHUNKS = Dim / 8;
        for (unsigned i = threadIdx.x; i < Keys * CHUNKS; i += Threads) {
            const unsigned key = i / CHUNKS, chunk = i % CHUNKS, token = first + key;
            const unsigned at = key * KEY_STRIDE<Dim> + chunk * 8;
            const bool exists = token < tokens;
            const Global<bf16> page = pages[(exists ? token : 0) / PAGE_LEN];
            const unsigned inside = token % PAGE_LEN * Dim + chunk * 8;
            copy_async_or_zero<bf16>(keys(step) + at, keys_of(page, layer_offset, kv_head, Dim) + inside, exists ? 16 : 0);
            copy_async_or_zero<bf16>(values(step) + at, values_of(page, layer_offset, kv_head, Dim) + inside,
                                     exists ? 16 : 0);
        }
    }
};

// Sixteen queries: lane l has rows l / 4 and l / 4 + 8 of everything.
template <unsigned Dim, unsigned Keys>
struct QueryTile {
    uint32_t queries[Dim / 16][4];
    float totals[Dim / 8][4] = {};
    float highest[2] = {-INFINITY, -INFINITY};
    float sums[2] = {};  // this lane's share

    // `rows`: the two queries' numbers, null where there is none.
    __device__ __forceinline__ void load(const Global<const float> (&rows)[2], unsigned head_dim) {
        const unsigned t = 2 * (lane_index() % 4);
#pragma unroll
        for (unsigned step = 0; step < Dim / 16; ++step)
#pragma unroll
            for (unsigned i = 0; i < 4; ++i) {
                const Global<const float> row = rows[i % 2];
                const unsigned at = step * 16 + i / 2 * 8 + t;
                const bool exists = row != nullptr && at < head_dim;
                queries[step][i] = exists ? pack_bf16(row[at], row[at + 1]) : 0;
            }
    }

    // Takes Keys keys, of which query i sees those in from[i] .. to[i], counted from the first.
    __device__ __forceinline__ void attend(Shared<bf16> keys, Shared<bf16> values, const int (&from)[2],
                                           const int (&to)[2], const Scoring& scoring) {
        const unsigned lane = lane_index();
        const int t = static_cast<int>(2 * (lane % 4));
        float scores[Keys / 8][4] = {};
        const Shared<bf16> key = keys + (lane / 16 * 8 + lane % 8) * KEY_STRIDE<Dim> + lane / 8 % 2 * 8;
#pragma unroll
        for (unsigned step = 0; step < Dim / 16; ++step)
#pragma unroll
            for (unsigned pair = 0; pair < Keys / 16; ++pair) {
                uint32_t b[4];
                load_matrices(b, key + pair * 16 * KEY_STRIDE<Dim> + step * 16);
                mma_16x8x16(scores[2 * pair], queries[step], b[0], b[1]);
                mma_16x8x16(scores[2 * pair + 1], queries[step], b[2], b[3]);
            }

        float shrink[2], base[2];
#pragma unroll
        for (unsigned row = 0; row < 2; ++row) {
            float best = highest[row];
#pragma unroll
            for (unsigned tile = 0; tile < Keys / 8; ++tile)
#pragma unroll
                for (unsigned i = 0; i < 2; ++i) {
                    float& score = scores[tile][2 * row + i];
                    const int at = static_cast<int>(tile * 8 + i) + t;
                    score = at >= from[row] && at < to[row] ? scoring(score) : -INFINITY;
                    best = fmaxf(best, score);
                }
            best = fmaxf(best, __shfl_xor_sync(EVERY_LANE, best, 1));
            best = fmaxf(best, __shfl_xor_sync(EVERY_LANE, best, 2));
            // A query that has seen nothing yet: 2^(-∞ - 0) is 0.
            base[row] = best == -INFINITY ? 0.0f : best;
            shrink[row] = exp2f(highest[row] - base[row]);
            highest[row] = best;
            sums[row] *= shrink[row];
        }
#pragma unroll
        for (unsigned tile = 0; tile < Dim / 8; ++tile)
#pragma unroll
            for (unsigned i = 0; i < 4; ++i) totals[tile][i] *= shrink[i / 2];

        const Shared<bf16> value = values + lane % 16 * KEY_STRIDE<Dim> + lane / 16 * 8;
#pragma unroll
        for (unsigned pair = 0; pair < Keys / 16; ++pair) {
            uint32_t a[4];
#pragma unroll
            for (unsigned i = 0; i < 4; ++i) {
                float(&of_tile)[4] = scores[2 * pair + i / 2];
                const unsigned row = i % 2;
                const float low = exp2f(of_tile[2 * row] - base[row]), high = exp2f(of_tile[2 * row + 1] - base[row]);
                sums[row] += low + high;
                a[i] = pack_bf16(low, high);
            }
#pragma unroll
            for (unsigned tile = 0; tile < Dim / 16; ++tile) {
                uint32_t b[4];
                load_matrices_transposed(b, value + pair * 16 * KEY_STRIDE<Dim> + tile * 16);
                mma_16x8x16(totals[2 * tile], a, b[0], b[1]);
                mma_16x8x16(totals[2 * tile + 1], a, b[2], b[3]);
            }
        }
    }

    // The two queries' sums, the same in the four lanes that share them.
    __device__ __forceinline__ void finish_sums() {
#pragma unroll
        for (unsigned row = 0; row < 2; ++row) {
            sums[row] += __shfl_xor_sync(EVERY_LANE, sums[row], 1);
            sums[row] += __shfl_xor_sync(EVERY_LANE, sums[row], 2);
        }
    }

    // Writes query `row` times `factor` (0 or 1: of the lane's two).
    __device__ __forceinline__ void store(unsigned row, Global<float> out, unsigned head_dim, float factor) const {
        const unsigned t = 2 * (lane_index() % 4);
#pragma unroll
        for (unsigned tile = 0; tile < Dim / 8; ++tile) {
            const unsigned at = tile * 8 + t;
            if (at >= head_dim) continue;
            out[at] = totals[tile][2 * row] * factor;
            out[at + 1] = totals[tile][2 * row + 1] * factor;
        }
    }
};

// Runs a warp's queries over tokens begin .. end of a ring's run; from and to as the queries see them. `begin` is a
// multiple of Keys. The whole block takes part.
template <unsigned Dim, unsigned Threads, unsigned Keys>
__device__ __forceinline__ void attend_run(QueryTile<Dim, Keys>& tile, const KeyRing<Dim, Threads, Keys>& ring,
                                           unsigned begin, unsigned end, const int (&from)[2], const int (&to)[2],
                                           const Scoring& scoring) {
    const unsigned steps = end > begin ? (end - begin + Keys - 1) / Keys : 0;
    if (steps > 0) ring.fetch(0, begin);
    commit_copies();
    for (unsigned step = 0; step < steps; ++step) {
        if (step + 1 < steps) ring.fetch(step + 1, begin + (step + 1) * Keys);
        commit_copies();
        wait_for_copies<1>();
        __syncthreads();
        const int first = static_cast<int>(begin + step * Keys);
        const int low[2] = {from[0] - first, from[1] - first}, high[2] = {to[0] - first, to[1] - first};
        tile.attend(ring.keys(step), ring.values(step), low, high, scoring);
        __syncthreads();
    }
    wait_for_copies<0>();
}

// A part of a query's attention: Σ 2^(score - highest) · value, not divided by the sum of those powers. Part p of query
// head h lies at p · heads + h.
struct Part {
    float highest, sum;
};

// For the head sizes that the kernels are built for. Keys at a time: fewer for wide heads, for registers and memory.
#define FOR_EACH_HEAD_SIZE(KERNEL_OF_SIZE) \
    KERNEL_OF_SIZE(32, 64)                 \
    KERNEL_OF_SIZE(64, 64)                 \
    KERNEL_OF_SIZE(80, 64)                 \
    KERNEL_OF_SIZE(96, 64)                 \
    KERNEL_OF_SIZE(128, 64)                \
    KERNEL_OF_SIZE(256, 16)
