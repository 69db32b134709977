// The tensor cores' matrix product.
#pragma once

#include "memory.cuh"

// D[16][8] += A[16][16] · B[16][8], bfloat16 into float32, one warp. With g = lane / 4 and t = 2 (lane % 4):
//   a[0] = A[g][t, t+1]   a[1] = A[g+8][t, t+1]   a[2] = A[g][t+8, t+9]   a[3] = A[g+8][t+8, t+9]
//   b[0] = B[t, t+1][g]   b[1] = B[t+8, t+9][g]
//   d[0..2] = D[g][t, t+1]   d[2..4] = D[g+8][t, t+1]
__device__ __forceinline__ void mma_16x8x16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#ifdef PODIUM_EMULATE
    const uint32_t b[2] = {b0, b1};
    emulate::mma_bf16(d, a, b);
#else
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#endif
}
