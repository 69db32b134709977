// Causal attention of a prompt's rows over the prompt so far.
//
//   qkv, pages, scale, cap, window   as in attention_prefix.cu
//   jobs    [gridDim.x]: 64 queries of consecutive rows of one sequence
//   out     [rows, heads · head_dim] float32
//
// Blocks are (job, kv head), four warps of sixteen queries; queries are (row, head) pairs, the heads of a kv head side by
// side, so that a block of a model with 4 heads a kv head is 16 rows. Keys are taken in blocks counted from the prompt's
// first token, so that a row has the same bits in whatever chunks its prompt is prefilled. Bound by tensor cores for long
// prompts: 4 · head_dim operations a query and key.

#include "attention_tile.cuh"

constexpr unsigned WARPS = 4;
constexpr unsigned THREADS = WARPS * WARP_SIZE;

struct PrefillJob {
    unsigned first_row, rows;  // of the sequence in this batch
    unsigned tile;             // which 64 of their queries
    unsigned table;            // where in `pages` the sequence begins
    unsigned start;            // tokens before the first row
    unsigned padding[3];
};

template <unsigned Dim, unsigned Keys>
__device__ __forceinline__ void attend_prefill(Global<const float> qkv, Global<const Global<bf16>> pages,
                                               Global<const PrefillJob> jobs, float scale, float cap, unsigned window,
                                               unsigned heads, unsigned kv_heads, unsigned head_dim,
                                               unsigned long long layer_offset, Global<float> out) {
    launch_dependents();
    wait_for_predecessor();
    const PrefillJob job = jobs[blockIdx.x];
    const unsigned kv_head = blockIdx.y, group = heads / kv_heads;
    const unsigned first_of_block = job.tile * WARPS * QUERIES;
    const unsigned first_query = first_of_block + warp_index() * QUERIES + lane_index() / 4;
    Global<const float> queries[2] = {};
    Global<float> results[2] = {};
    int from[2] = {}, to[2] = {};
#pragma unroll
    for (unsigned i = 0; i < 2; ++i) {
        const unsigned query = first_query + i * 8, row = query / group, head = kv_head * group + query % group;
        if (row >= job.rows) continue;
        queries[i] = qkv + (size_t{job.first_row + row} * (heads + 2 * kv_heads) + head) * head_dim;
        results[i] = out + (size_t{job.first_row + row} * heads + head) * head_dim;
        const unsigned visible = job.start + row + 1;
        from[i] = static_cast<int>(window != 0 && visible > window ? visible - window : 0);
        to[i] = static_cast<int>(visible);
    }
    // What some query of the block sees.
    const unsigned last_query = first_of_block + WARPS * QUERIES - 1;
    const unsigned last_row = last_query / group < job.rows ? last_query / group : job.rows - 1;
    const unsigned end = job.start + last_row + 1, first_end = job.start + first_of_block / group + 1;
    const unsigned begin = window != 0 && first_end > window ? (first_end - window) / Keys * Keys : 0;

    QueryTile<Dim, Keys> tile;
    tile.load(queries, head_dim);
    const KeyRing<Dim, THREADS, Keys> ring{pages + job.table, layer_offset, kv_head, end};
    attend_run(tile, ring, begin, end, from, to, Scoring{scale, cap});
    tile.finish_sums();
#pragma unroll
    for (unsigned i = 0; i < 2; ++i)
        if (queries[i] != nullptr) tile.store(i, results[i], head_dim, 1.0f / tile.sums[i]);
}

#define ATTENTION_PREFILL(DIM, KEYS)                                                                                      \
    extern "C" __global__ void __launch_bounds__(THREADS, 1) attention_prefill_##DIM(                                        \
        Global<const float> qkv, Global<const Global<bf16>> pages, Global<const PrefillJob> jobs, float scale, float cap, \
        unsigned window, unsigned heads, unsigned kv_heads, unsigned head_dim, unsigned long long layer_offset,           \
        Global<float> out) {                                                                                              \
        attend_prefill<DIM, KEYS>(qkv, pages, jobs, scale, cap, window, heads, kv_heads, head_dim, layer_offset, out);    \
    }                                                                                                                     \
    KERNEL(attention_prefill_##DIM)

FOR_EACH_HEAD_SIZE(ATTENTION_PREFILL)
