//! Sixteen lanes as an array: what every target without an implementation of its own runs.

use super::{Kernel, LANES, Products, Simd};

#[derive(Clone, Copy)]
pub struct Portable;

#[inline(always)]
fn map2(a: [f32; LANES], b: [f32; LANES], f: impl Fn(f32, f32) -> f32) -> [f32; LANES] {
    std::array::from_fn(|i| f(a[i], b[i]))
}

// SAFETY: plain Rust; every pointer is read or written for the sixteen elements that the caller
// promises.
unsafe impl Simd for Portable {
    type V = [f32; LANES];
    type I = [u32; LANES];
    // A tile of 4 rows leaves an instruction set with 32 registers of four lanes room to spare.
    const TILE_ROWS: usize = 4;
    const TILE_PANELS: usize = 1;
    const PRODUCTS: Products = Products::None;
    const HALVES: bool = false;
    const CODE_ROWS: usize = 2;
    const HALF_ROWS: usize = 2;

    unsafe fn call<K: Kernel>(kernel: K) -> K::Output {
        unsafe { kernel.run::<Portable>() }
    }
    #[inline(always)]
    unsafe fn prefetch(_: *const u8) {}
    #[inline(always)]
    unsafe fn splat(x: f32) -> Self::V {
        [x; LANES]
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> Self::V {
        unsafe { p.cast::<[f32; LANES]>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn store(p: *mut f32, v: Self::V) {
        unsafe { p.cast::<[f32; LANES]>().write_unaligned(v) }
    }
    #[inline(always)]
    unsafe fn load_bf16(p: *const u16) -> Self::V {
        let bits = unsafe { p.cast::<[u16; LANES]>().read_unaligned() };
        bits.map(|b| f32::from_bits(u32::from(b) << 16))
    }
    #[inline(always)]
    unsafe fn load_f16(p: *const u16) -> Self::V {
        let bits = unsafe { p.cast::<[u16; LANES]>().read_unaligned() };
        bits.map(|b| half::f16::from_bits(b).to_f32())
    }
    #[inline(always)]
    unsafe fn load_i8(p: *const i8) -> Self::V {
        unsafe { p.cast::<[i8; LANES]>().read_unaligned() }.map(f32::from)
    }
    #[inline(always)]
    unsafe fn load_u8(p: *const u8) -> Self::V {
        unsafe { p.cast::<[u8; LANES]>().read_unaligned() }.map(f32::from)
    }
    #[inline(always)]
    unsafe fn add(a: Self::V, b: Self::V) -> Self::V {
        map2(a, b, |a, b| a + b)
    }
    #[inline(always)]
    unsafe fn sub(a: Self::V, b: Self::V) -> Self::V {
        map2(a, b, |a, b| a - b)
    }
    #[inline(always)]
    unsafe fn mul(a: Self::V, b: Self::V) -> Self::V {
        map2(a, b, |a, b| a * b)
    }
    #[inline(always)]
    unsafe fn div(a: Self::V, b: Self::V) -> Self::V {
        map2(a, b, |a, b| a / b)
    }
    #[inline(always)]
    unsafe fn max(a: Self::V, b: Self::V) -> Self::V {
        map2(a, b, |a, b| if a > b { a } else { b })
    }
    #[inline(always)]
    unsafe fn min(a: Self::V, b: Self::V) -> Self::V {
        map2(a, b, |a, b| if a < b { a } else { b })
    }
    #[inline(always)]
    unsafe fn fma(a: Self::V, b: Self::V, c: Self::V) -> Self::V {
        // Without the instruction `mul_add` is a call into libm, a hundred times slower.
        std::array::from_fn(|i| {
            if cfg!(any(target_arch = "aarch64", target_feature = "fma")) {
                a[i].mul_add(b[i], c[i])
            } else {
                a[i] * b[i] + c[i]
            }
        })
    }
    #[inline(always)]
    unsafe fn bits(a: Self::V) -> Self::I {
        a.map(f32::to_bits)
    }
    #[inline(always)]
    unsafe fn from_bits(a: Self::I) -> Self::V {
        a.map(f32::from_bits)
    }
    #[inline(always)]
    unsafe fn load_u32(p: *const u32) -> Self::I {
        unsafe { p.cast::<[u32; LANES]>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn shift_right(a: Self::I, bits: u32) -> Self::I {
        a.map(|a| a >> bits)
    }
    #[inline(always)]
    unsafe fn shift_left(a: Self::I, bits: u32) -> Self::I {
        a.map(|a| a << bits)
    }
    #[inline(always)]
    unsafe fn and(a: Self::I, mask: u32) -> Self::I {
        a.map(|a| a & mask)
    }
    #[inline(always)]
    unsafe fn or(a: Self::I, b: Self::I) -> Self::I {
        std::array::from_fn(|i| a[i] | b[i])
    }
    #[inline(always)]
    unsafe fn to_f32(a: Self::I) -> Self::V {
        a.map(|a| a as i32 as f32)
    }
    #[inline(always)]
    unsafe fn to_i32(a: Self::V) -> Self::I {
        a.map(|a| a.round_ties_even() as i32 as u32)
    }
    #[inline(always)]
    unsafe fn store_low_bytes(p: *mut u8, a: Self::I) {
        unsafe { p.cast::<[u8; LANES]>().write_unaligned(a.map(|a| a as u8)) }
    }
    #[inline(always)]
    unsafe fn splat_i32(x: i32) -> Self::I {
        [x as u32; LANES]
    }
    #[inline(always)]
    unsafe fn add_i32(a: Self::I, b: Self::I) -> Self::I {
        std::array::from_fn(|i| a[i].wrapping_add(b[i]))
    }
    #[inline(always)]
    unsafe fn store_u32(p: *mut u32, a: Self::I) {
        unsafe { p.cast::<[u32; LANES]>().write_unaligned(a) }
    }
    #[inline(always)]
    unsafe fn zero_below(x: Self::V, bound: f32, y: Self::V) -> Self::V {
        map2(x, y, |x, y| if x >= bound { y } else { 0.0 })
    }
}
