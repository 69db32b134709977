// CUDA's vector and 16-bit types, rounding as the hardware does.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>

struct dim3 {
    unsigned x = 1, y = 1, z = 1;
};

#define PODIUM_VECTOR_TYPE(NAME, TYPE, ALIGN)                                                \
    struct alignas(ALIGN) NAME##2 { TYPE x, y; };                                            \
    struct alignas(2 * ALIGN) NAME##4 { TYPE x, y, z, w; };                                  \
    inline NAME##2 make_##NAME##2(TYPE x, TYPE y) { return {x, y}; }                         \
    inline NAME##4 make_##NAME##4(TYPE x, TYPE y, TYPE z, TYPE w) { return {x, y, z, w}; }

PODIUM_VECTOR_TYPE(float, float, 8)
PODIUM_VECTOR_TYPE(int, int, 8)
PODIUM_VECTOR_TYPE(uint, unsigned, 8)
#undef PODIUM_VECTOR_TYPE

// bfloat16: the upper half of a float32. Rounded to nearest even; any NaN becomes 0x7FFF.
struct __nv_bfloat16 {
    std::uint16_t bits;
};
struct alignas(4) __nv_bfloat162 {
    __nv_bfloat16 x, y;
};

inline float __bfloat162float(__nv_bfloat16 value) {
    return std::bit_cast<float>(static_cast<std::uint32_t>(value.bits) << 16);
}
inline __nv_bfloat16 __float2bfloat16_rn(float value) {
    const auto bits = std::bit_cast<std::uint32_t>(value);
    if ((bits & 0x7FFFFFFFu) > 0x7F800000u) return {0x7FFF};
    return {static_cast<std::uint16_t>((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16)};
}
inline __nv_bfloat16 __float2bfloat16(float value) { return __float2bfloat16_rn(value); }
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) {
    return {__float2bfloat16_rn(x), __float2bfloat16_rn(y)};
}
inline float2 __bfloat1622float2(__nv_bfloat162 pair) { return {__bfloat162float(pair.x), __bfloat162float(pair.y)}; }

// IEEE half precision, subnormals kept. Rounded to nearest even; any NaN becomes 0x7FFF.
struct __half {
    std::uint16_t bits;
};
struct alignas(4) __half2 {
    __half x, y;
};

inline float __half2float(__half value) {
    const std::uint32_t sign = static_cast<std::uint32_t>(value.bits & 0x8000u) << 16;
    const std::uint32_t exponent = (value.bits >> 10) & 31u, fraction = value.bits & 1023u;
    if (exponent == 31) return std::bit_cast<float>(sign | 0x7F800000u | fraction << 13);
    if (exponent == 0) {
        const float magnitude = static_cast<float>(fraction) * 0x1p-24f;
        return sign != 0 ? -magnitude : magnitude;
    }
    return std::bit_cast<float>(sign | (exponent + 112) << 23 | fraction << 13);
}
inline __half __float2half_rn(float value) {
    const auto bits = std::bit_cast<std::uint32_t>(value);
    const auto sign = static_cast<std::uint16_t>((bits >> 16) & 0x8000u);
    const std::uint32_t magnitude = bits & 0x7FFFFFFFu;
    if (magnitude > 0x7F800000u) return {0x7FFF};
    if (magnitude >= 0x477FF000u) return {static_cast<std::uint16_t>(sign | 0x7C00u)};  // 65520 and more
    if (magnitude < 0x38800000u) {
        // Subnormal: counted in units of 2⁻²⁴, rounded to even by the processor's own rounding.
        const float units = std::nearbyintf(std::bit_cast<float>(magnitude) * 0x1p24f);
        return {static_cast<std::uint16_t>(sign | static_cast<std::uint16_t>(units))};
    }
    const std::uint32_t rounded = magnitude + 0xFFFu + ((magnitude >> 13) & 1u);
    return {static_cast<std::uint16_t>(sign | ((rounded >> 13) - (112u << 10)))};
}
inline __half2 __floats2half2_rn(float x, float y) { return {__float2half_rn(x), __float2half_rn(y)}; }
inline float2 __half22float2(__half2 pair) { return {__half2float(pair.x), __half2float(pair.y)}; }
