// The part of CUDA C++ that the kernels use, for the host's compiler. The kernels include it through device.cuh.
#pragma once

#include <algorithm>
#include <atomic>
#include <tuple>

#include "pointers.h"
#include "runtime.h"
#include "types.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __restrict__
#define __launch_bounds__(...)
#define __align__(n) alignas(n)

#define threadIdx (::emulate::block.current->index)
#define blockIdx (::emulate::block.index)
#define blockDim (::emulate::block.block_size)
#define gridDim (::emulate::block.grid_size)
constexpr int warpSize = 32;

// Where it is called, for messages and to tell barriers apart.
#define PODIUM_HERE const char *file = __builtin_FILE(), int line = __builtin_LINE()

// Barriers

inline void __syncthreads(PODIUM_HERE) {
    emulate::block_barrier(emulate::Combine::none, 0, {"__syncthreads", file, line});
}
inline int __syncthreads_count(int value, PODIUM_HERE) {
    return emulate::block_barrier(emulate::Combine::count, value, {"__syncthreads_count", file, line});
}
inline int __syncthreads_and(int value, PODIUM_HERE) {
    return emulate::block_barrier(emulate::Combine::all, value, {"__syncthreads_and", file, line});
}
inline int __syncthreads_or(int value, PODIUM_HERE) {
    return emulate::block_barrier(emulate::Combine::any, value, {"__syncthreads_or", file, line});
}
inline void __syncwarp(unsigned mask = ~0u, PODIUM_HERE) { emulate::warp_barrier(mask, {"__syncwarp", file, line}); }
inline void __threadfence() { std::atomic_thread_fence(std::memory_order_seq_cst); }
inline void __threadfence_block() { std::atomic_thread_fence(std::memory_order_seq_cst); }

// Warp operations

namespace emulate {

template <class T>
struct Shuffle {
    T value, result;
    int source;  // lane; -1: its own
};
template <class T>
T shuffle(unsigned mask, T value, int source, Place place) {
    Shuffle<T> brought{value, value, source};
    warp_operation(mask, &brought, [](void* const* lanes, std::uint32_t arrived) {
        for (unsigned lane = 0; lane < WARP; ++lane) {
            if (!(arrived >> lane & 1)) continue;
            auto* mine = static_cast<Shuffle<T>*>(lanes[lane]);
            if (mine->source < 0) continue;
            if (!(arrived >> mine->source & 1)) fail("shuffle from lane %d, which takes no part in it", mine->source);
            mine->result = static_cast<const Shuffle<T>*>(lanes[mine->source])->value;
        }
    }, place);
    return brought.result;
}
inline int lane() { return static_cast<int>(block.current->lane); }

struct Vote {
    bool value;
    unsigned result;
};
inline unsigned ballot(unsigned mask, bool value, Place place) {
    Vote brought{value, 0};
    warp_operation(mask, &brought, [](void* const* lanes, std::uint32_t arrived) {
        unsigned result = 0;
        for (unsigned lane = 0; lane < WARP; ++lane)
            if (arrived >> lane & 1 && static_cast<const Vote*>(lanes[lane])->value) result |= 1u << lane;
        for (unsigned lane = 0; lane < WARP; ++lane)
            if (arrived >> lane & 1) static_cast<Vote*>(lanes[lane])->result = result;
    }, place);
    return brought.result;
}

}  // namespace emulate

template <class T>
T __shfl_sync(unsigned mask, T value, int lane, int width = 32, PODIUM_HERE) {
    const int source = (emulate::lane() & ~(width - 1)) | (lane & (width - 1));
    return emulate::shuffle(mask, value, source, {"__shfl_sync", file, line});
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32, PODIUM_HERE) {
    const int own = emulate::lane(), source = own ^ bits;
    return emulate::shuffle(mask, value, (source & ~(width - 1)) > (own & ~(width - 1)) ? -1 : source, {"__shfl_xor_sync", file, line});
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned by, int width = 32, PODIUM_HERE) {
    const int own = emulate::lane(), source = own + static_cast<int>(by);
    return emulate::shuffle(mask, value, source / width != own / width ? -1 : source, {"__shfl_down_sync", file, line});
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned by, int width = 32, PODIUM_HERE) {
    const int own = emulate::lane(), source = own - static_cast<int>(by);
    return emulate::shuffle(mask, value, source < (own & ~(width - 1)) ? -1 : source, {"__shfl_up_sync", file, line});
}
inline unsigned __ballot_sync(unsigned mask, int value, PODIUM_HERE) {
    return emulate::ballot(mask, value != 0, {"__ballot_sync", file, line});
}
inline int __any_sync(unsigned mask, int value, PODIUM_HERE) {
    return emulate::ballot(mask, value != 0, {"__any_sync", file, line}) != 0;
}
inline int __all_sync(unsigned mask, int value, PODIUM_HERE) {
    return emulate::ballot(mask, value == 0, {"__all_sync", file, line}) == 0;
}
// An approximation: the lanes that run together are known only to the hardware.
inline unsigned __activemask() { return 1u << emulate::lane(); }

// Atomics, on elements of either memory: atomicAdd(&counters[i], 1)

namespace emulate {
template <class T, class F>
T atomic_update(T* at, F next) {
    std::atomic_ref<T> place(*at);
    T old = place.load();
    while (!place.compare_exchange_weak(old, next(old))) {}
    return old;
}
template <class T>
T* atomic_place(Shared<T> at) {
    return reinterpret_cast<T*>(shared_bytes(at.offset(), sizeof(T), alignof(T), Access::atomic));
}
template <class T>
T* atomic_place(T* at) {
    return at;
}
}  // namespace emulate

template <class P, class T>
auto atomicAdd(P at, T value) {
    return emulate::atomic_update(emulate::atomic_place(at), [&](auto old) { return static_cast<decltype(old)>(old + value); });
}
template <class P, class T>
auto atomicMax(P at, T value) {
    return emulate::atomic_update(emulate::atomic_place(at), [&](auto old) { return std::max<decltype(old)>(old, value); });
}
template <class P, class T>
auto atomicMin(P at, T value) {
    return emulate::atomic_update(emulate::atomic_place(at), [&](auto old) { return std::min<decltype(old)>(old, value); });
}
template <class P, class T>
auto atomicOr(P at, T value) {
    return emulate::atomic_update(emulate::atomic_place(at), [&](auto old) { return old | value; });
}
template <class P, class T>
auto atomicExch(P at, T value) {
    return emulate::atomic_update(emulate::atomic_place(at), [&](auto old) { return static_cast<decltype(old)>(value); });
}
template <class P, class T>
auto atomicCAS(P at, T compare, T value) {
    return emulate::atomic_update(emulate::atomic_place(at), [&](auto old) { return old == compare ? value : old; });
}
// Wraps to zero at `limit`: how blocks count themselves and leave the counter as they found it.
template <class P>
unsigned atomicInc(P at, unsigned limit) {
    return emulate::atomic_update(emulate::atomic_place(at), [&](unsigned old) { return old >= limit ? 0u : old + 1; });
}

// Arithmetic

using std::isnan;
using std::max;
using std::min;
inline float __fmaf_rn(float a, float b, float c) { return std::fmaf(a, b, c); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fdividef(float a, float b) { return a / b; }
inline float __fsqrt_rn(float a) { return std::sqrt(a); }
inline float rsqrtf(float a) { return 1.0f / std::sqrt(a); }
inline float __expf(float a) { return std::exp(a); }
inline float __logf(float a) { return std::log(a); }
inline float __uint2float_rn(unsigned a) { return static_cast<float>(a); }
inline unsigned __float_as_uint(float a) { return std::bit_cast<unsigned>(a); }
inline float __uint_as_float(unsigned a) { return std::bit_cast<float>(a); }
inline int __float_as_int(float a) { return std::bit_cast<int>(a); }
inline float __int_as_float(int a) { return std::bit_cast<float>(a); }
inline int __popc(unsigned a) { return std::popcount(a); }
inline int __popcll(unsigned long long a) { return std::popcount(a); }
inline int __clz(int a) { return std::countl_zero(static_cast<unsigned>(a)); }
inline int __ffs(int a) { return a == 0 ? 0 : std::countr_zero(static_cast<unsigned>(a)) + 1; }
// Four of the eight bytes of a and b, a digit of `selector` each.
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
    const std::uint64_t bytes = static_cast<std::uint64_t>(b) << 32 | a;
    unsigned result = 0;
    for (unsigned i = 0; i < 4; ++i)
        result |= static_cast<unsigned>(bytes >> 8 * (selector >> 4 * i & 7) & 0xFF) << 8 * i;
    return result;
}
inline unsigned __umulhi(unsigned a, unsigned b) {
    return static_cast<unsigned>(static_cast<std::uint64_t>(a) * b >> 32);
}
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
    return static_cast<unsigned long long>(static_cast<unsigned __int128>(a) * b >> 64);
}
inline unsigned long long __float2ull_rn(float a) { return static_cast<unsigned long long>(std::nearbyint(a)); }
inline float __saturatef(float a) { return std::isnan(a) ? 0.0f : std::clamp(a, 0.0f, 1.0f); }

// Makes a kernel known by its name.
namespace emulate {
template <auto Function>
struct Entry;
template <class... Parameters, void (*Function)(Parameters...)>
struct Entry<Function> {
    using Frame = std::tuple<std::remove_cv_t<Parameters>...>;
    static_assert(std::is_trivially_destructible_v<Frame> && sizeof(Frame) <= 4096);

    static void prepare(void* const* arguments, void* frame) {
        [&]<std::size_t... I>(std::index_sequence<I...>) {
            ::new (frame) Frame(*static_cast<const std::tuple_element_t<I, Frame>*>(arguments[I])...);
        }(std::index_sequence_for<Parameters...>{});
    }
    static void run(const void* frame) { std::apply(Function, *static_cast<const Frame*>(frame)); }
};
}  // namespace emulate

#define KERNEL(NAME)                                                                                              \
    static ::emulate::Kernel emulated_##NAME{#NAME, ::emulate::Entry<NAME>::prepare, ::emulate::Entry<NAME>::run, \
                                             nullptr};                                                            \
    static ::emulate::Registration registration_##NAME{emulated_##NAME};
