//! Sixteen lanes on aarch64: four NEON registers. NEON is part of the baseline there; byte products
//! (`usdot`) came with Armv8.6 (I8MM: Graviton 3, Apple M2 and what followed).

use super::{Kernel, Products, Simd};
use std::arch::aarch64::*;
use std::arch::asm;

/// # Safety
/// That of [`Kernel::run`]; NEON is always there.
pub unsafe fn run_neon<K: Kernel>(kernel: K) -> K::Output {
    unsafe { kernel.run::<Neon<false>>() }
}

/// # Safety
/// The processor must have I8MM.
#[target_feature(enable = "i8mm")]
pub unsafe fn run_neon_i8mm<K: Kernel>(kernel: K) -> K::Output {
    unsafe { kernel.run::<Neon<true>>() }
}

/// `I8MM`: whether `usdot` may be used.
#[derive(Clone, Copy)]
pub struct Neon<const I8MM: bool>;

type V = [float32x4_t; 4];
type I = [uint32x4_t; 4];

#[inline(always)]
fn map<A: Copy, B>(a: [A; 4], f: impl Fn(A) -> B) -> [B; 4] {
    [f(a[0]), f(a[1]), f(a[2]), f(a[3])]
}

#[inline(always)]
fn map2<A: Copy, B: Copy, C>(a: [A; 4], b: [B; 4], f: impl Fn(A, B) -> C) -> [C; 4] {
    [f(a[0], b[0]), f(a[1], b[1]), f(a[2], b[2]), f(a[3], b[3])]
}

/// Sixteen bytes as sixteen words, in order.
#[inline(always)]
unsafe fn widen_u8(bytes: uint8x16_t) -> I {
    unsafe {
        let (low, high) = (vmovl_u8(vget_low_u8(bytes)), vmovl_high_u8(bytes));
        [
            vmovl_u16(vget_low_u16(low)),
            vmovl_high_u16(low),
            vmovl_u16(vget_low_u16(high)),
            vmovl_high_u16(high),
        ]
    }
}

// SAFETY: NEON only, which every aarch64 has, and `usdot` where `run_neon_i8mm` enables it.
unsafe impl<const I8MM: bool> Simd for Neon<I8MM> {
    type V = V;
    type I = I;
    // Of 32 registers 24 accumulators, 4 of a weight vector, 1 broadcast.
    const TILE_ROWS: usize = 6;
    const TILE_PANELS: usize = 1;
    const PRODUCTS: Products = match I8MM {
        true => Products::Bytes,
        false => Products::None,
    };
    const HALVES: bool = false;
    const CODE_ROWS: usize = 3;
    const HALF_ROWS: usize = 3;

    unsafe fn call<K: Kernel>(kernel: K) -> K::Output {
        unsafe {
            if I8MM {
                run_neon_i8mm(kernel)
            } else {
                run_neon(kernel)
            }
        }
    }
    #[inline(always)]
    unsafe fn prefetch(p: *const u8) {
        unsafe {
            asm!("prfm pldl1keep, [{}]", in(reg) p, options(nostack, readonly, preserves_flags))
        }
    }
    #[inline(always)]
    unsafe fn splat(x: f32) -> V {
        unsafe { [vdupq_n_f32(x); 4] }
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> V {
        unsafe { map([0, 4, 8, 12], |i| vld1q_f32(p.add(i))) }
    }
    #[inline(always)]
    unsafe fn store(p: *mut f32, v: V) {
        unsafe { map2([0, 4, 8, 12], v, |i, v| vst1q_f32(p.add(i), v)) };
    }
    #[inline(always)]
    unsafe fn load_bf16(p: *const u16) -> V {
        unsafe {
            map([0, 4, 8, 12], |i| {
                vreinterpretq_f32_u32(vshll_n_u16::<16>(vld1_u16(p.add(i))))
            })
        }
    }
    #[inline(always)]
    unsafe fn load_f16(p: *const u16) -> V {
        // `fcvtl` by its name: the intrinsic asks for the type `f16`, which is not stable.
        unsafe {
            map([0, 4, 8, 12], |i| {
                let halves = vld1_u16(p.add(i));
                let wide: float32x4_t;
                asm!("fcvtl {0:v}.4s, {1:v}.4h", out(vreg) wide, in(vreg) halves,
                    options(pure, nomem, nostack, preserves_flags));
                wide
            })
        }
    }
    #[inline(always)]
    unsafe fn load_i8(p: *const i8) -> V {
        unsafe {
            let bytes = vld1q_s8(p);
            let (low, high) = (vmovl_s8(vget_low_s8(bytes)), vmovl_high_s8(bytes));
            let words = [
                vmovl_s16(vget_low_s16(low)),
                vmovl_high_s16(low),
                vmovl_s16(vget_low_s16(high)),
                vmovl_high_s16(high),
            ];
            map(words, |words| vcvtq_f32_s32(words))
        }
    }
    #[inline(always)]
    unsafe fn load_u8(p: *const u8) -> V {
        unsafe { map(widen_u8(vld1q_u8(p)), |words| vcvtq_f32_u32(words)) }
    }
    #[inline(always)]
    unsafe fn add(a: V, b: V) -> V {
        unsafe { map2(a, b, |a, b| vaddq_f32(a, b)) }
    }
    #[inline(always)]
    unsafe fn sub(a: V, b: V) -> V {
        unsafe { map2(a, b, |a, b| vsubq_f32(a, b)) }
    }
    #[inline(always)]
    unsafe fn mul(a: V, b: V) -> V {
        unsafe { map2(a, b, |a, b| vmulq_f32(a, b)) }
    }
    #[inline(always)]
    unsafe fn div(a: V, b: V) -> V {
        unsafe { map2(a, b, |a, b| vdivq_f32(a, b)) }
    }
    #[inline(always)]
    unsafe fn max(a: V, b: V) -> V {
        unsafe { map2(a, b, |a, b| vbslq_f32(vcgtq_f32(a, b), a, b)) }
    }
    #[inline(always)]
    unsafe fn min(a: V, b: V) -> V {
        unsafe { map2(a, b, |a, b| vbslq_f32(vcltq_f32(a, b), a, b)) }
    }
    #[inline(always)]
    unsafe fn fma(a: V, b: V, c: V) -> V {
        unsafe {
            [
                vfmaq_f32(c[0], a[0], b[0]),
                vfmaq_f32(c[1], a[1], b[1]),
                vfmaq_f32(c[2], a[2], b[2]),
                vfmaq_f32(c[3], a[3], b[3]),
            ]
        }
    }
    #[inline(always)]
    unsafe fn bits(a: V) -> I {
        unsafe { map(a, |a| vreinterpretq_u32_f32(a)) }
    }
    #[inline(always)]
    unsafe fn from_bits(a: I) -> V {
        unsafe { map(a, |a| vreinterpretq_f32_u32(a)) }
    }
    #[inline(always)]
    unsafe fn load_u32(p: *const u32) -> I {
        unsafe { map([0, 4, 8, 12], |i| vld1q_u32(p.add(i))) }
    }
    #[inline(always)]
    unsafe fn shift_right(a: I, bits: u32) -> I {
        unsafe { map(a, |a| vshlq_u32(a, vdupq_n_s32(-(bits as i32)))) }
    }
    #[inline(always)]
    unsafe fn shift_left(a: I, bits: u32) -> I {
        unsafe { map(a, |a| vshlq_u32(a, vdupq_n_s32(bits as i32))) }
    }
    #[inline(always)]
    unsafe fn and(a: I, mask: u32) -> I {
        unsafe { map(a, |a| vandq_u32(a, vdupq_n_u32(mask))) }
    }
    #[inline(always)]
    unsafe fn or(a: I, b: I) -> I {
        unsafe { map2(a, b, |a, b| vorrq_u32(a, b)) }
    }
    #[inline(always)]
    unsafe fn to_f32(a: I) -> V {
        unsafe { map(a, |a| vcvtq_f32_s32(vreinterpretq_s32_u32(a))) }
    }
    #[inline(always)]
    unsafe fn to_i32(a: V) -> I {
        unsafe { map(a, |a| vreinterpretq_u32_s32(vcvtnq_s32_f32(a))) }
    }
    #[inline(always)]
    unsafe fn store_low_bytes(p: *mut u8, a: I) {
        unsafe {
            let low = vcombine_u16(vmovn_u32(a[0]), vmovn_u32(a[1]));
            let high = vcombine_u16(vmovn_u32(a[2]), vmovn_u32(a[3]));
            vst1q_u8(p, vcombine_u8(vmovn_u16(low), vmovn_u16(high)));
        }
    }
    #[inline(always)]
    unsafe fn splat_i32(x: i32) -> I {
        unsafe { [vdupq_n_u32(x as u32); 4] }
    }
    #[inline(always)]
    unsafe fn add_i32(a: I, b: I) -> I {
        unsafe { map2(a, b, |a, b| vaddq_u32(a, b)) }
    }
    #[inline(always)]
    unsafe fn store_u32(p: *mut u32, a: I) {
        unsafe { map2([0, 4, 8, 12], a, |i, a| vst1q_u32(p.add(i), a)) };
    }
    #[inline(always)]
    unsafe fn dot4(sum: I, u: I, s: I) -> I {
        if !I8MM {
            return unsafe { super::dot4_by_lanes::<Self>(sum, u, s) };
        }
        let mut sums = sum;
        for ((sum, u), s) in sums.iter_mut().zip(u).zip(s) {
            // By its name: the intrinsic is not stable.
            unsafe {
                asm!("usdot {0:v}.4s, {1:v}.16b, {2:v}.16b", inout(vreg) *sum, in(vreg) u, in(vreg) s,
                    options(pure, nomem, nostack, preserves_flags));
            }
        }
        sums
    }
    #[inline(always)]
    unsafe fn sum(v: V) -> f32 {
        // The same tree as everywhere: 8 apart, then 4, 2, 1.
        unsafe {
            let four = vaddq_f32(vaddq_f32(v[0], v[2]), vaddq_f32(v[1], v[3]));
            let two = vadd_f32(vget_low_f32(four), vget_high_f32(four));
            vget_lane_f32::<0>(two) + vget_lane_f32::<1>(two)
        }
    }
    #[inline(always)]
    unsafe fn greatest(v: V) -> f32 {
        unsafe { vmaxvq_f32(vmaxq_f32(vmaxq_f32(v[0], v[1]), vmaxq_f32(v[2], v[3]))) }
    }
    #[inline(always)]
    unsafe fn zero_below(x: V, bound: f32, y: V) -> V {
        unsafe {
            map2(x, y, |x, y| {
                let alive = vcgeq_f32(x, vdupq_n_f32(bound));
                vreinterpretq_f32_u32(vandq_u32(alive, vreinterpretq_u32_f32(y)))
            })
        }
    }
}
