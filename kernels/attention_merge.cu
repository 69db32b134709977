// Puts a row's attention together from its parts: those of its group's prefix, then those of its own tokens.
//
//   rows    [gridDim.x]: where the parts of a row are; one without parts is left alone
//   parts, totals   as attention_prefix.cu and attention_suffix.cu left them
//   out     [rows, heads · head_dim] float32
//
//   out = Σ 2^(highest[p] - highest) · totals[p] / Σ 2^(highest[p] - highest) · sum[p]
//
// A warp is one query head of one row. Parts are added in their order. Bound by memory: 4 · head_dim bytes a part and
// head, most of it from the second-level cache.

#include "attention_tile.cuh"

constexpr unsigned WARPS = 4;
constexpr unsigned PER_LANE = 256 / WARP_SIZE;

struct MergedRow {
    unsigned row;
    unsigned prefix_slot, prefix_step, prefix_parts;  // the slot of the first part, and how far apart they are
    unsigned own_slot, own_parts;                     // side by side
    unsigned padding[2];
};

extern "C" __global__ void __launch_bounds__(WARPS* WARP_SIZE)
    attention_merge(Global<const MergedRow> rows, Global<const Part> parts, Global<const float> totals, unsigned heads,
                    unsigned head_dim, Global<float> out) {
    launch_dependents();
    wait_for_predecessor();
    const MergedRow merged = rows[blockIdx.x];
    const unsigned head = blockIdx.y * WARPS + warp_index(), lane = lane_index();
    if (head >= heads || merged.own_parts == 0) return;
    const unsigned count = merged.prefix_parts + merged.own_parts;
    const auto place_of = [&](unsigned part) {
        const unsigned slot = part < merged.prefix_parts ? merged.prefix_slot + part * merged.prefix_step
                                                         : merged.own_slot + part - merged.prefix_parts;
        return size_t{slot} * heads + head;
    };
    float highest = -INFINITY;
    for (unsigned part = 0; part < count; ++part) highest = fmaxf(highest, parts[place_of(part)].highest);
    float sum = 0.0f, results[PER_LANE] = {};
    for (unsigned p = 0; p < count; ++p) {
        const size_t place = place_of(p);
        const Part part = parts[place];
        if (part.highest == -INFINITY) continue;  // out of the window
        const float weight = exp2f(part.highest - highest);
        sum += weight * part.sum;
#pragma unroll
        for (unsigned n = 0; n < PER_LANE; ++n) {
            const unsigned at = n * WARP_SIZE + lane;
            if (at < head_dim) results[n] += weight * totals[place * head_dim + at];
        }
    }
    const Global<float> to = out + (size_t{merged.row} * heads + head) * head_dim;
#pragma unroll
    for (unsigned n = 0; n < PER_LANE; ++n) {
        const unsigned at = n * WARP_SIZE + lane;
        if (at < head_dim) to[at] = results[n] / sum;
    }
}
KERNEL(attention_merge)
