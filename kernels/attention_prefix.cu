// The part of attention that candidates share: all queries of a group against a run of its prefix, one matrix product.
//
//   qkv     [rows, (heads + 2 · kv_heads) · head_dim] float32, of which the queries are read
//   pages   addresses of pages (pages.cuh)
//   jobs    [gridDim.x]: 64 queries of a group and a run of its prefix; without rows there is nothing to do
//   window  a row sees that many tokens, its own the last; 0: all. positions: [rows], where each row stands
//   parts, totals   [slots, heads], [slots, heads, head_dim]: what comes of each query (attention_tile.cuh)
//
// Blocks are (job, kv head), four warps of sixteen queries. Queries are (row, head) pairs, the heads of a kv head side by
// side: with 4 heads a kv head, eight candidates make two warps busy, and a hundred fill seven blocks, which find the
// run's keys in the second-level cache after the first has read them. A prefix is cut into runs by its length alone
// (src/backend/cuda/attention_plan.rs).
//
// Bound by memory: 4 · head_dim bytes a token and kv head, once a step.

#include "attention_tile.cuh"

constexpr unsigned WARPS = 4;
constexpr unsigned THREADS = WARPS * WARP_SIZE;

struct PrefixJob {
    unsigned first_row, rows;  // of the group
    unsigned tile;             // which 64 of its queries
    unsigned table;            // where in `pages` the prefix begins
    unsigned first, end;       // tokens of the run
    unsigned slot;             // of the group's first row in parts
    unsigned padding;
};

template <unsigned Dim, unsigned Keys>
__device__ __forceinline__ void attend_prefix(Global<const float> qkv, Global<const Global<bf16>> pages,
                                              Global<const PrefixJob> jobs, Global<const unsigned> positions, float scale,
                                              float cap, unsigned window, unsigned heads, unsigned kv_heads,
                                              unsigned head_dim, unsigned long long layer_offset, Global<Part> parts,
                                              Global<float> totals) {
    launch_dependents();
    wait_for_predecessor();
    const PrefixJob job = jobs[blockIdx.x];
    const unsigned kv_head = blockIdx.y, group = heads / kv_heads;
    const unsigned first_query = (job.tile * WARPS + warp_index()) * QUERIES + lane_index() / 4;
    // Where a query's part goes: worked out anew at the end, which takes fewer registers than to keep it.
    const auto place_of = [&](const PrefixJob& of_job, unsigned query) {
        return size_t{of_job.slot + query / group} * heads + kv_head * group + query % group;
    };
    Global<const float> queries[2] = {};
    int from[2], to[2];
    bool sees = false;
#pragma unroll
    for (unsigned i = 0; i < 2; ++i) {
        const unsigned query = first_query + i * 8, row = query / group, head = kv_head * group + query % group;
        from[i] = to[i] = 0;
        if (row >= job.rows) continue;
        queries[i] = qkv + (size_t{job.first_row + row} * (heads + 2 * kv_heads) + head) * head_dim;
        const unsigned visible = positions[job.first_row + row] + 1;
        from[i] = static_cast<int>(window != 0 && visible > window ? visible - window : 0);
        to[i] = static_cast<int>(job.end);
        sees = sees || from[i] < to[i];
        parts[place_of(job, query)] = {-INFINITY, 0.0f};  // unless the run is in the window
    }
    if (!__syncthreads_or(sees)) return;
    QueryTile<Dim, Keys> tile;
    tile.load(queries, head_dim);
    const KeyRing<Dim, THREADS, Keys> ring{pages + job.table, layer_offset, kv_head, job.end};
    attend_run(tile, ring, job.first, job.end, from, to, Scoring{scale, cap});
    tile.finish_sums();
    const PrefixJob again = jobs[blockIdx.x];
#pragma unroll
    for (unsigned i = 0; i < 2; ++i) {
        const unsigned query = (again.tile * WARPS + warp_index()) * QUERIES + lane_index() / 4 + i * 8;
        if (query / group >= again.rows) continue;
        const size_t place = place_of(again, query);
        tile.store(i, totals + place * head_dim, head_dim, 1.0f);
        if (lane_index() % 4 == 0) parts[place] = {tile.highest[i], tile.sums[i]};
    }
}

#define ATTENTION_PREFIX(DIM, KEYS)                                                                                        \
    extern "C" __global__ void __launch_bounds__(THREADS, 1) attention_prefix_##DIM(                                          \
        Global<const float> qkv, Global<const Global<bf16>> pages, Global<const PrefixJob> jobs,                           \
        Global<const unsigned> positions, float scale, float cap, unsigned window, unsigned heads, unsigned kv_heads,      \
        unsigned head_dim, unsigned long long layer_offset, Global<Part> parts, Global<float> totals) {                    \
        attend_prefix<DIM, KEYS>(qkv, pages, jobs, positions, scale, cap, window, heads, kv_heads, head_dim, layer_offset, \
                                 parts, totals);                                                                           \
    }                                                                                                                      \
    KERNEL(attention_prefix_##DIM)

FOR_EACH_HEAD_SIZE(ATTENTION_PREFIX)
