// Where keys and values lie. A page holds 16 tokens in every layer, bfloat16:
//
//   [layers][kv_heads][key, value][16 tokens][head_stride]      head_stride: head_dim rounded up to 16, zeros behind
//
// so the keys of a page, a layer and a kv head are one run of 16 · head_stride numbers, and the values the next. Kernels
// are given pages by address, and a layer as its offset in numbers.
#pragma once

#include "memory.cuh"

constexpr unsigned PAGE_LEN = 16;

// The key of the page's first token; those of the other tokens are `head_stride` apart.
template <class T>
__device__ __forceinline__ Global<T> keys_of(Global<T> page, size_t layer_offset, unsigned kv_head, unsigned head_stride) {
    return page + (layer_offset + size_t{kv_head} * (2 * PAGE_LEN) * head_stride);
}

template <class T>
__device__ __forceinline__ Global<T> values_of(Global<T> page, size_t layer_offset, unsigned kv_head, unsigned head_stride) {
    return keys_of(page, layer_offset, kv_head, head_stride) + PAGE_LEN * head_stride;
}
