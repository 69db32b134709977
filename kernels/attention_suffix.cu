// The part of attention that is a candidate's own: a row's queries against a run of its own tokens, and, where the prefix
// is too short to be worth a launch of its own, against that too.
//
//   qkv, pages, scale, cap, window, parts, totals   as in attention_prefix.cu
//   jobs    [gridDim.x]: a row and a run of its tokens; without tokens (end = 0) there is nothing to do
//
// Blocks are (job, kv head, sixteen of its query heads), one warp each: few queries and many keys, so that tensor cores
// are used for one row in sixteen or four, and it does not matter: bound by memory, 4 · head_dim bytes a token and kv
// head.

#include "attention_tile.cuh"

constexpr unsigned THREADS = WARP_SIZE;

struct SuffixJob {
    unsigned row, slot;
    unsigned prefix_table, prefix;  // the prefix's tokens that belong to this job: all or none
    unsigned table, first, end;     // the run of own tokens, the row's the last that it sees
    unsigned hidden;                // tokens of the prefix that are not this job's
};

template <unsigned Dim, unsigned Keys>
__device__ __forceinline__ void attend_suffix(Global<const float> qkv, Global<const Global<bf16>> pages,
                                              Global<const SuffixJob> jobs, Global<const unsigned> positions, float scale,
                                              float cap, unsigned window, unsigned heads, unsigned kv_heads,
                                              unsigned head_dim, unsigned long long layer_offset, Global<Part> parts,
                                              Global<float> totals) {
    launch_dependents();
    wait_for_predecessor();
    const SuffixJob job = jobs[blockIdx.x];
    if (job.end == 0) return;
    const unsigned kv_head = blockIdx.y, group = heads / kv_heads;
    const unsigned visible = positions[job.row] + 1;
    const unsigned first_visible = window != 0 && visible > window ? visible - window : 0;
    Global<const float> queries[2] = {};
    size_t places[2] = {};
    int to_prefix[2] = {}, to_own[2] = {};
#pragma unroll
    for (unsigned i = 0; i < 2; ++i) {
        const unsigned of_group = blockIdx.z * QUERIES + lane_index() / 4 + i * 8, head = kv_head * group + of_group;
        if (of_group >= group) continue;
        queries[i] = qkv + (size_t{job.row} * (heads + 2 * kv_heads) + head) * head_dim;
        places[i] = size_t{job.slot} * heads + head;
        to_prefix[i] = static_cast<int>(job.prefix);
        to_own[i] = static_cast<int>(job.end);
    }
    QueryTile<Dim, Keys> tile;
    tile.load(queries, head_dim);
    const Scoring scoring{scale, cap};
    const unsigned before_own = job.prefix + job.hidden;
    if (job.prefix > 0) {
        const int from[2] = {static_cast<int>(first_visible), static_cast<int>(first_visible)};
        const KeyRing<Dim, THREADS, Keys> ring{pages + job.prefix_table, layer_offset, kv_head, job.prefix};
        attend_run(tile, ring, 0, job.prefix, from, to_prefix, scoring);
    }
    const unsigned first_own = first_visible > before_own ? first_visible - before_own : 0;
    const int from[2] = {static_cast<int>(first_own), static_cast<int>(first_own)};
    const KeyRing<Dim, THREADS, Keys> ring{pages + job.table, layer_offset, kv_head, job.end};
    attend_run(tile, ring, max(job.first, first_own / Keys * Keys), job.end, from, to_own, scoring);
    tile.finish_sums();
#pragma unroll
    for (unsigned i = 0; i < 2; ++i) {
        if (queries[i] == nullptr) continue;
        tile.store(i, totals + places[i] * head_dim, head_dim, 1.0f);
        if (lane_index() % 4 == 0) parts[places[i]] = {tile.highest[i], tile.sums[i]};
    }
}

// Fewer keys at a time than the others take: less shared memory, so that more warps fit beside each other.
#define ATTENTION_SUFFIX(DIM, KEYS)                                                                                   \
    extern "C" __global__ void __launch_bounds__(THREADS, 1) attention_suffix_##DIM(                                  \
        Global<const float> qkv, Global<const Global<bf16>> pages, Global<const SuffixJob> jobs,                      \
        Global<const unsigned> positions, float scale, float cap, unsigned window, unsigned heads, unsigned kv_heads, \
        unsigned head_dim, unsigned long long layer_offset, Global<Part> parts, Global<float> totals) {               \
        attend_suffix<DIM, (KEYS < 32 ? KEYS : 32)>(qkv, pages, jobs, positions, scale, cap, window, heads, kv_heads, head_dim,      \
                                     layer_offset, parts, totals);                                                    \
    }                                                                                                                 \
    KERNEL(attention_suffix_##DIM)

FOR_EACH_HEAD_SIZE(ATTENTION_SUFFIX)
