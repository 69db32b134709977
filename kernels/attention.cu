// out = softmax(scale · q · keysᵀ) · values for each row and query head: the plain form, which the others are held against.
//
//   qkv     [rows, (heads + 2 · kv_heads) · head_dim] float32, of which the queries are read
//   pages   addresses of pages (pages.cuh)
//   spans   [rows]: x, y: where in `pages` the prefix begins, and its tokens; z, w: the same of the row's own tokens,
//           its own the last of them; with w = 0 the row is left alone
//   cap     scores become cap · tanh(score / cap); 0: they stay
//   window  a row sees that many tokens, its own the last; 0: all
//   out     [rows, heads · head_dim] float32
//
// A warp is one query head of one row. It takes 32 keys at a time, counted from the start of the prefix and of the own
// tokens: a lane computes one key's score, then all lanes add up the values, each for its own coordinates; the running
// maximum and sum are the online softmax's. Keys and values are read once for each head: bound by the caches at best.

#include "pages.cuh"
#include "reduce.cuh"

constexpr unsigned WARPS = 4;
constexpr unsigned MAX_HEAD_DIM = 512;
constexpr unsigned PER_LANE = MAX_HEAD_DIM / WARP_SIZE;

extern "C" __global__ void __launch_bounds__(WARPS* WARP_SIZE, 1)
    attention(Global<const float> qkv, Global<const Global<bf16>> pages, Global<const uint4> spans, float scale,
              float cap, unsigned window, unsigned heads, unsigned kv_heads, unsigned head_dim, unsigned head_stride,
              unsigned long long layer_offset, Global<float> out) {
    launch_dependents();
    wait_for_predecessor();
    const unsigned row = blockIdx.x, lane = lane_index(), head = blockIdx.y * WARPS + warp_index();
    const uint4 span = spans[row];
    if (head >= heads || span.w == 0) return;
    const unsigned kv_head = head / (heads / kv_heads);
    const Shared<float> query = shared_memory<float>() + warp_index() * (head_stride + WARP_SIZE);
    const Shared<float> weights = query + head_stride;
    const Global<const float> from = qkv + (size_t{row} * (heads + 2 * kv_heads) + head) * head_dim;
    for (unsigned i = lane; i < head_stride; i += WARP_SIZE) query[i] = i < head_dim ? from[i] * scale : 0.0f;
    __syncwarp();

    const unsigned visible = span.y + span.w;
    const unsigned first_visible = window != 0 && visible > window ? visible - window : 0;
    float maximum = -INFINITY, sum = 0.0f;
    float totals[PER_LANE] = {};
    for (unsigned part = 0; part < 2; ++part) {
        const unsigned table = part == 0 ? span.x : span.z, tokens = part == 0 ? span.y : span.w;
        const unsigned position = part == 0 ? 0 : span.y;
        const unsigned skipped = first_visible > position ? first_visible - position : 0;
        if (skipped >= tokens) continue;  // so that each block below has a key that is seen
        for (unsigned first = skipped / WARP_SIZE * WARP_SIZE; first < tokens; first += WARP_SIZE) {
            const unsigned token = first + lane;
            float score = -INFINITY;
            if (token >= skipped && token < tokens) {
                const Global<bf16> page = pages[table + token / PAGE_LEN];
                const auto key = view<const uint4>(keys_of(page, layer_offset, kv_head, head_stride) +
                                                    token % PAGE_LEN * head_stride);
                score = 0.0f;
                for (unsigned i = 0; i < head_stride / 8; ++i) {
                    const uint4 numbers = key[i];
                    const uint32_t pairs[4] = {numbers.x, numbers.y, numbers.z, numbers.w};
#pragma unroll
                    for (unsigned pair = 0; pair < 4; ++pair) {
                        const float2 k = to_float2(pairs[pair]);
                        const float low = query[i * 8 + pair * 2], high = query[i * 8 + pair * 2 + 1];
                        score = fmaf(low, k.x, score);
                        score = fmaf(high, k.y, score);
                    }
                }
                if (cap != 0.0f) score = cap * tanhf(score / cap);
            }
            // One of the 32 is seen, so the maximum is finite.
            const float highest = fmaxf(maximum, warp_max(score));
            const float weight = expf(score - highest), shrink = expf(maximum - highest);
            maximum = highest;
            sum = sum * shrink + warp_sum(weight);
            weights[lane] = weight;
            __syncwarp();
#pragma unroll
            for (unsigned n = 0; n < PER_LANE; ++n) totals[n] *= shrink;
            const unsigned begin = skipped > first ? skipped - first : 0;
            const unsigned end = tokens - first < WARP_SIZE ? tokens - first : WARP_SIZE;
            for (unsigned i = begin; i < end; ++i) {
                const Global<bf16> page = pages[table + (first + i) / PAGE_LEN];
                const Global<bf16> value = values_of(page, layer_offset, kv_head, head_stride) +
                                           (first + i) % PAGE_LEN * head_stride;
                const float weight_of_key = weights[i];
#pragma unroll
                for (unsigned n = 0; n < PER_LANE; ++n) {
                    const unsigned at = n * WARP_SIZE + lane;
                    if (at < head_dim) totals[n] = fmaf(weight_of_key, __bfloat162float(value[at]), totals[n]);
                }
            }
            __syncwarp();
        }
    }
#pragma unroll
    for (unsigned n = 0; n < PER_LANE; ++n) {
        const unsigned at = n * WARP_SIZE + lane;
        if (at < head_dim) out[(size_t{row} * heads + head) * head_dim + at] = totals[n] / sum;
    }
}
KERNEL(attention)
