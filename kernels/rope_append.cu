// Readies a row's queries and appends its key and value to the cache.
//
//   qkv         [rows, (heads + 2 · kv_heads) · head_dim] float32, queries, keys and values of each head side by side;
//               queries are changed in place
//   query_norm, key_norm   [head_dim] float32, null where the model has none: RMSNorm of each head before the rotation
//   angles      [positions][cos × pairs | sin × pairs] float32: coordinate i is rotated with coordinate i + pairs
//   positions   [rows]
//   pages, slots   [rows]: the page and the place in it that the row's token has (pages.cuh); a row without a page is
//               left alone
//
// A warp is one head of one row; blocks are (row, four heads). Bound by latency at decode: a row is some KB.

#include "pages.cuh"
#include "reduce.cuh"

constexpr unsigned WARPS = 4;
// Of a head: 512 numbers, 16 a lane.
constexpr unsigned MAX_HEAD_DIM = 512;
constexpr unsigned PER_LANE = MAX_HEAD_DIM / WARP_SIZE;

extern "C" __global__ void __launch_bounds__(WARPS* WARP_SIZE)
    rope_append(Global<float> qkv, Global<const float> query_norm, Global<const float> key_norm, float epsilon,
                Global<const float> angles, Global<const unsigned> positions, Global<const Global<bf16>> pages,
                Global<const unsigned> slots, unsigned heads, unsigned kv_heads, unsigned head_dim, unsigned head_stride,
                unsigned pairs, unsigned long long layer_offset) {
    launch_dependents();
    wait_for_predecessor();
    const unsigned row = blockIdx.x, lane = lane_index();
    const unsigned head = blockIdx.y * WARPS + warp_index();
    if (head >= heads + 2 * kv_heads || pages[row] == nullptr) return;
    const bool is_query = head < heads, is_value = head >= heads + kv_heads;
    const Global<float> numbers = qkv + (size_t{row} * (heads + 2 * kv_heads) + head) * head_dim;

    // Coordinate i of the head is in lane i % 32, so that coordinate i + pairs may be in another; the rotation reads
    // both from memory instead.
    float scale = 1.0f;
    const Global<const float> weight = is_query ? query_norm : key_norm;
    const bool normed = !is_value && weight != nullptr;
    if (normed) {
        float sum = 0.0f;
        for (unsigned i = lane; i < head_dim; i += WARP_SIZE) sum += numbers[i] * numbers[i];
        scale = 1.0f / sqrtf(warp_sum(sum) / static_cast<float>(head_dim) + epsilon);
    }
    const auto normalised = [&](unsigned i) { return normed ? numbers[i] * scale * weight[i] : numbers[i]; };

    float result[PER_LANE];
    const Global<const float> cosines = angles + size_t{positions[row]} * 2 * pairs;
    const Global<const float> sines = cosines + pairs;
#pragma unroll
    for (unsigned n = 0; n < PER_LANE; ++n) {
        const unsigned i = n * WARP_SIZE + lane;
        if (i >= head_dim) break;
        const float x = normalised(i);
        if (is_value || i >= 2 * pairs) {
            result[n] = x;
        } else if (i < pairs) {
            result[n] = x * cosines[i] - normalised(i + pairs) * sines[i];
        } else {
            result[n] = x * cosines[i - pairs] + normalised(i - pairs) * sines[i - pairs];
        }
    }
    if (is_query) {
        __syncwarp();  // all have read what the others overwrite
#pragma unroll
        for (unsigned n = 0; n < PER_LANE; ++n) {
            const unsigned i = n * WARP_SIZE + lane;
            if (i < head_dim) numbers[i] = result[n];
        }
        return;
    }
    const unsigned kv_head = is_value ? head - heads - kv_heads : head - heads;
    const Global<bf16> page = pages[row];
    const Global<bf16> place = (is_value ? values_of(page, layer_offset, kv_head, head_stride)
                                         : keys_of(page, layer_offset, kv_head, head_stride)) +
                               slots[row] * head_stride;
#pragma unroll
    for (unsigned n = 0; n < PER_LANE; ++n) {
        const unsigned i = n * WARP_SIZE + lane;
        if (i < head_stride) place[i] = __float2bfloat16_rn(i < head_dim ? result[n] : 0.0f);
    }
}
KERNEL(rope_append)
