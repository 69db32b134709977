// Statistics of a row of logits and weights of its tokens, bit for bit as src/backend/cpu/softmax.rs computes them: the
// same additions in the same order, no multiplication fused with an addition. A block works on one row.
#pragma once

#include "reduce.cuh"

using u64 = unsigned long long;

// Numbers that are added up in float32 before the sum goes over to float64: a warp's share at a time.
constexpr unsigned CHUNK = 1024;
// A weight of 1 as a mass.
constexpr float UNIT_MASS = 1099511627776.0f;  // 2⁴⁰

__device__ __forceinline__ unsigned chunks_of(unsigned count) { return (count + CHUNK - 1) / CHUNK; }

// e^x for x ≤ 0; 0 below -87, exactly 1 at 0. Intrinsics, for the compiler fuses what operators say.
__device__ __forceinline__ float exp_of(float x) {
    constexpr float LOWEST = -87.0f, LOG2_E = 1.44269504f, ROUND = 12582912.0f;
    constexpr float LN_2_HIGH = 0.6933594f, LN_2_LOW = -2.1219444e-4f;
    const float clamped = x > LOWEST ? x : LOWEST;
    const float shifted = __fadd_rn(__fmul_rn(clamped, LOG2_E), ROUND);
    const float n = __fsub_rn(shifted, ROUND);
    const float r = __fsub_rn(__fsub_rn(clamped, __fmul_rn(n, LN_2_HIGH)), __fmul_rn(n, LN_2_LOW));
    float polynomial = 1.9875691e-4f;
    polynomial = __fadd_rn(__fmul_rn(polynomial, r), 1.3981999e-3f);
    polynomial = __fadd_rn(__fmul_rn(polynomial, r), 8.333452e-3f);
    polynomial = __fadd_rn(__fmul_rn(polynomial, r), 4.1665796e-2f);
    polynomial = __fadd_rn(__fmul_rn(polynomial, r), 1.6666666e-1f);
    polynomial = __fadd_rn(__fmul_rn(polynomial, r), 0.5f);
    const float fraction = __fadd_rn(__fadd_rn(__fmul_rn(polynomial, __fmul_rn(r, r)), r), 1.0f);
    const float power = __uint_as_float((__float_as_uint(shifted) << 23) + __float_as_uint(1.0f));
    return x < LOWEST ? 0.0f : __fmul_rn(fraction, power);
}

// A weight in [0, 1] in fixed point, halves to even: sums of masses have no order.
__device__ __forceinline__ u64 mass_of(float weight) { return __float2ull_rn(__fmul_rn(weight, UNIT_MASS)); }

// Adds up number(i) for all i < count: chunks in float32 (lane l of a warp takes numbers l, l + 32, …; the lanes meet in
// halves), then the chunks in float64, one after the other. The same sum in every thread. `sums` has room for a float64 a
// chunk and one more, and is free again when this returns.
template <unsigned Threads, class Number>
__device__ __forceinline__ double sum_in_chunks(unsigned count, Shared<double> sums, Number number) {
    const unsigned chunks = chunks_of(count);
    for (unsigned chunk = warp_index(); chunk < chunks; chunk += Threads / WARP_SIZE) {
        const unsigned end = min(count, (chunk + 1) * CHUNK);
        float sum = 0.0f;
        for (unsigned i = chunk * CHUNK + lane_index(); i < end; i += WARP_SIZE) sum = __fadd_rn(sum, number(i));
        sum = warp_sum(sum);
        if (lane_index() == 0) sums[chunk + 1] = static_cast<double>(sum);
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        double total = 0.0;
        for (unsigned chunk = 0; chunk < chunks; ++chunk) {
            const double sum = sums[chunk + 1];
            total += sum;
        }
        sums[0] = total;
    }
    __syncthreads();
    const double total = sums[0];
    __syncthreads();
    return total;
}

// The largest logit that is not NaN (-∞ if there is none), and the sum, NaN if any logit is.
struct MaxAndSum {
    float max;
    double sum;
};
template <unsigned Threads>
__device__ __forceinline__ MaxAndSum max_and_sum(Global<const float> logits, unsigned count, Shared<double> sums) {
    float highest = -INFINITY;
    const double sum = sum_in_chunks<Threads>(count, sums, [&](unsigned i) {
        const float logit = logits[i];
        if (logit > highest) highest = logit;
        return logit;
    });
    return {block_max<Threads>(highest, view<float>(sums)), sum};
}

// Σ exp(logit - max)
template <unsigned Threads>
__device__ __forceinline__ double sum_of_exp(Global<const float> logits, unsigned count, float max, Shared<double> sums) {
    return sum_in_chunks<Threads>(count, sums, [&](unsigned i) { return exp_of(__fsub_rn(logits[i], max)); });
}
