//! Sixteen lanes on x86-64: one AVX-512 register, or two AVX2 registers.

use super::{Kernel, LANES, Products, Simd};
use std::arch::asm;
use std::arch::x86_64::*;

/// # Safety
/// The processor must have the enabled features.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
pub unsafe fn run_avx512<K: Kernel>(kernel: K) -> K::Output {
    unsafe { kernel.run::<Avx512>() }
}

/// # Safety
/// The processor must have the enabled features.
#[target_feature(enable = "avx2,fma,f16c")]
pub unsafe fn run_avx2<K: Kernel>(kernel: K) -> K::Output {
    unsafe { kernel.run::<Avx2<false>>() }
}

/// # Safety
/// The processor must have the enabled features.
#[target_feature(enable = "avxvnni,avx2,fma,f16c")]
pub unsafe fn run_avx_vnni<K: Kernel>(kernel: K) -> K::Output {
    unsafe { kernel.run::<Avx2<true>>() }
}

#[derive(Clone, Copy)]
pub struct Avx512;

// SAFETY: AVX-512 F, BW, VL, DQ, VNNI and F16C instructions only, which `run_avx512` enables.
unsafe impl Simd for Avx512 {
    type V = __m512;
    type I = __m512i;
    // 24 accumulators, 2 weights; the broadcast is a memory operand of the multiply-add.
    const TILE_ROWS: usize = 12;
    const TILE_PANELS: usize = 2;
    const PRODUCTS: Products = Products::Bytes;
    const HALVES: bool = true;
    const CODE_ROWS: usize = 6;
    const HALF_ROWS: usize = 6;

    #[inline(always)]
    unsafe fn call<K: Kernel>(kernel: K) -> K::Output {
        unsafe { run_avx512(kernel) }
    }
    #[inline(always)]
    unsafe fn prefetch(p: *const u8) {
        unsafe { _mm_prefetch::<_MM_HINT_T0>(p.cast()) }
    }
    #[inline(always)]
    unsafe fn prefetch_far(p: *const u8) {
        unsafe { _mm_prefetch::<_MM_HINT_T1>(p.cast()) }
    }
    #[inline(always)]
    unsafe fn splat(x: f32) -> __m512 {
        unsafe { _mm512_set1_ps(x) }
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> __m512 {
        unsafe { _mm512_loadu_ps(p) }
    }
    #[inline(always)]
    unsafe fn store(p: *mut f32, v: __m512) {
        unsafe { _mm512_storeu_ps(p, v) }
    }
    #[inline(always)]
    unsafe fn stream(p: *mut f32, v: __m512) {
        unsafe { _mm512_stream_ps(p, v) }
    }
    #[inline(always)]
    unsafe fn end_streams() {
        unsafe { _mm_sfence() }
    }
    #[inline(always)]
    unsafe fn load_bf16(p: *const u16) -> __m512 {
        unsafe {
            let wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(p.cast()));
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(wide))
        }
    }
    #[inline(always)]
    unsafe fn load_f16(p: *const u16) -> __m512 {
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(p.cast())) }
    }
    #[inline(always)]
    unsafe fn load_i8(p: *const i8) -> __m512 {
        unsafe { _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(p.cast()))) }
    }
    #[inline(always)]
    unsafe fn load_u8(p: *const u8) -> __m512 {
        unsafe { _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(p.cast()))) }
    }
    #[inline(always)]
    unsafe fn add(a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_add_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn sub(a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_sub_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn mul(a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_mul_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn div(a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_div_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn max(a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_max_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn min(a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_min_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn fma(a: __m512, b: __m512, c: __m512) -> __m512 {
        unsafe { _mm512_fmadd_ps(a, b, c) }
    }
    #[inline(always)]
    unsafe fn bits(a: __m512) -> __m512i {
        unsafe { _mm512_castps_si512(a) }
    }
    #[inline(always)]
    unsafe fn from_bits(a: __m512i) -> __m512 {
        unsafe { _mm512_castsi512_ps(a) }
    }
    #[inline(always)]
    unsafe fn load_u32(p: *const u32) -> __m512i {
        unsafe { _mm512_loadu_si512(p.cast()) }
    }
    #[inline(always)]
    unsafe fn shift_right(a: __m512i, bits: u32) -> __m512i {
        unsafe { _mm512_srl_epi32(a, _mm_cvtsi32_si128(bits as i32)) }
    }
    #[inline(always)]
    unsafe fn shift_left(a: __m512i, bits: u32) -> __m512i {
        unsafe { _mm512_sll_epi32(a, _mm_cvtsi32_si128(bits as i32)) }
    }
    #[inline(always)]
    unsafe fn and(a: __m512i, mask: u32) -> __m512i {
        unsafe { _mm512_and_si512(a, _mm512_set1_epi32(mask as i32)) }
    }
    #[inline(always)]
    unsafe fn or(a: __m512i, b: __m512i) -> __m512i {
        unsafe { _mm512_or_si512(a, b) }
    }
    #[inline(always)]
    unsafe fn to_f32(a: __m512i) -> __m512 {
        unsafe { _mm512_cvtepi32_ps(a) }
    }
    #[inline(always)]
    unsafe fn to_i32(a: __m512) -> __m512i {
        unsafe { _mm512_cvtps_epi32(a) }
    }
    #[inline(always)]
    unsafe fn store_low_bytes(p: *mut u8, a: __m512i) {
        unsafe { _mm_storeu_si128(p.cast(), _mm512_cvtepi32_epi8(a)) }
    }
    #[inline(always)]
    unsafe fn splat_i32(x: i32) -> __m512i {
        unsafe { _mm512_set1_epi32(x) }
    }
    #[inline(always)]
    unsafe fn add_i32(a: __m512i, b: __m512i) -> __m512i {
        unsafe { _mm512_add_epi32(a, b) }
    }
    #[inline(always)]
    unsafe fn store_u32(p: *mut u32, a: __m512i) {
        unsafe { _mm512_storeu_si512(p.cast(), a) }
    }
    #[inline(always)]
    unsafe fn dot4(sum: __m512i, u: __m512i, s: __m512i) -> __m512i {
        unsafe { dpbusd512(sum, u, s) }
    }
    #[inline(always)]
    unsafe fn store_low_halves(p: *mut u16, a: __m512i) {
        unsafe { _mm256_storeu_si256(p.cast(), _mm512_cvtepi32_epi16(a)) }
    }
    #[inline(always)]
    unsafe fn dot2(sum: __m512i, a: __m512i, b: __m512i) -> __m512i {
        unsafe { dpwssd512(sum, a, b) }
    }
    #[inline(always)]
    unsafe fn sub_halves(a: __m512i, b: __m512i) -> __m512i {
        unsafe { _mm512_sub_epi16(a, b) }
    }
    #[inline(always)]
    unsafe fn sum(v: __m512) -> f32 {
        unsafe {
            let eight = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps::<1>(v));
            sum8(eight)
        }
    }
    #[inline(always)]
    unsafe fn greatest(v: __m512) -> f32 {
        unsafe {
            let (low, high) = (_mm512_castps512_ps256(v), _mm512_extractf32x8_ps::<1>(v));
            greatest8(_mm256_max_ps(low, high))
        }
    }
    #[inline(always)]
    unsafe fn zero_below(x: __m512, bound: f32, y: __m512) -> __m512 {
        unsafe {
            _mm512_maskz_mov_ps(
                _mm512_cmp_ps_mask::<_CMP_GE_OQ>(x, _mm512_set1_ps(bound)),
                y,
            )
        }
    }
    #[inline(always)]
    unsafe fn keep_lanes(y: __m512, low: usize, high: usize, other: f32) -> __m512 {
        let mask = ((1u32 << high.min(LANES)) - 1) & !((1u32 << low.min(LANES)) - 1);
        unsafe { _mm512_mask_mov_ps(_mm512_set1_ps(other), mask as u16, y) }
    }
}

// Sums of products by hand. Of the intrinsics for halves the compiler makes trees of additions, to have
// shorter chains: more sums than there are registers, and two instructions for one. With those for bytes
// tiles take a tenth to a quarter longer.

macro_rules! sum_of_products {
    ($name:ident, $instruction:literal, $register:ident, $vector:ty, $features:literal, $run:literal) => {
        #[doc = concat!("# Safety\nAs [`", $run, "`].")]
        #[inline]
        #[target_feature(enable = $features)]
        unsafe fn $name(mut sum: $vector, a: $vector, b: $vector) -> $vector {
            // SAFETY: an instruction that the caller has made sure of, on registers alone.
            unsafe {
                asm!(concat!($instruction, " {}, {}, {}"), inout($register) sum, in($register) a,
                    in($register) b, options(pure, nomem, nostack, preserves_flags));
            }
            sum
        }
    };
}
sum_of_products!(
    dpwssd512,
    "vpdpwssd",
    zmm_reg,
    __m512i,
    "avx512f,avx512vnni",
    "run_avx512"
);
sum_of_products!(
    dpbusd512,
    "vpdpbusd",
    zmm_reg,
    __m512i,
    "avx512f,avx512vnni",
    "run_avx512"
);
sum_of_products!(
    dpwssd256,
    "{{vex}} vpdpwssd",
    ymm_reg,
    __m256i,
    "avx2,avxvnni",
    "run_avx_vnni"
);
sum_of_products!(
    dpbusd256,
    "{{vex}} vpdpbusd",
    ymm_reg,
    __m256i,
    "avx2,avxvnni",
    "run_avx_vnni"
);

/// # Safety
/// As [`run_avx2`].
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn madd_add(mut sum: __m256i, a: __m256i, b: __m256i) -> __m256i {
    // SAFETY: as above.
    unsafe {
        asm!("vpmaddwd {product}, {}, {}", "vpaddd {sum}, {sum}, {product}",
            in(ymm_reg) a, in(ymm_reg) b, sum = inout(ymm_reg) sum, product = out(ymm_reg) _,
            options(pure, nomem, nostack, preserves_flags));
    }
    sum
}

#[inline(always)]
unsafe fn sum8(eight: __m256) -> f32 {
    unsafe {
        let four = _mm_add_ps(
            _mm256_castps256_ps128(eight),
            _mm256_extractf128_ps::<1>(eight),
        );
        let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
        _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps::<1>(two, two)))
    }
}

#[inline(always)]
unsafe fn greatest8(eight: __m256) -> f32 {
    unsafe {
        let (low, high) = (
            _mm256_castps256_ps128(eight),
            _mm256_extractf128_ps::<1>(eight),
        );
        let four = _mm_max_ps(low, high);
        let two = _mm_max_ps(four, _mm_movehl_ps(four, four));
        _mm_cvtss_f32(_mm_max_ss(two, _mm_shuffle_ps::<1>(two, two)))
    }
}

/// AVX2, with the 256-bit byte products of VNNI or without.
#[derive(Clone, Copy)]
pub struct Avx2<const VNNI: bool>;

#[derive(Clone, Copy)]
pub struct Pair<T>(T, T);

macro_rules! both {
    ($f:ident, $a:expr) => {
        Pair($f($a.0), $f($a.1))
    };
    ($f:ident, $a:expr, $b:expr) => {
        Pair($f($a.0, $b.0), $f($a.1, $b.1))
    };
}

// SAFETY: AVX2, FMA and F16C instructions only, and AVX-VNNI's where `VNNI`, which `run_avx2` and
// `run_avx_vnni` enable.
unsafe impl<const VNNI: bool> Simd for Avx2<VNNI> {
    type V = Pair<__m256>;
    type I = Pair<__m256i>;
    // 6 rows × 2 registers = 12 accumulators, 2 weights, 1 broadcast, of 16.
    const TILE_ROWS: usize = 6;
    const TILE_PANELS: usize = 1;
    const PRODUCTS: Products = match VNNI {
        true => Products::Bytes,
        false => Products::Halves,
    };
    const HALVES: bool = true;
    // Without VNNI a product wants a register before it is added.
    const CODE_ROWS: usize = if VNNI { 6 } else { 5 };
    const HALF_ROWS: usize = if VNNI { 6 } else { 4 };

    #[inline(always)]
    unsafe fn call<K: Kernel>(kernel: K) -> K::Output {
        unsafe {
            if VNNI {
                run_avx_vnni(kernel)
            } else {
                run_avx2(kernel)
            }
        }
    }
    #[inline(always)]
    unsafe fn prefetch(p: *const u8) {
        unsafe { _mm_prefetch::<_MM_HINT_T0>(p.cast()) }
    }
    #[inline(always)]
    unsafe fn prefetch_far(p: *const u8) {
        unsafe { _mm_prefetch::<_MM_HINT_T1>(p.cast()) }
    }
    #[inline(always)]
    unsafe fn splat(x: f32) -> Self::V {
        let v = unsafe { _mm256_set1_ps(x) };
        Pair(v, v)
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> Self::V {
        unsafe { Pair(_mm256_loadu_ps(p), _mm256_loadu_ps(p.add(8))) }
    }
    #[inline(always)]
    unsafe fn store(p: *mut f32, v: Self::V) {
        unsafe {
            _mm256_storeu_ps(p, v.0);
            _mm256_storeu_ps(p.add(8), v.1);
        }
    }
    #[inline(always)]
    unsafe fn stream(p: *mut f32, v: Self::V) {
        unsafe {
            _mm256_stream_ps(p, v.0);
            _mm256_stream_ps(p.add(8), v.1);
        }
    }
    #[inline(always)]
    unsafe fn end_streams() {
        unsafe { _mm_sfence() }
    }
    #[inline(always)]
    unsafe fn load_bf16(p: *const u16) -> Self::V {
        unsafe {
            let low = _mm256_cvtepu16_epi32(_mm_loadu_si128(p.cast()));
            let high = _mm256_cvtepu16_epi32(_mm_loadu_si128(p.add(8).cast()));
            Pair(
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(low)),
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(high)),
            )
        }
    }
    #[inline(always)]
    unsafe fn load_f16(p: *const u16) -> Self::V {
        unsafe {
            Pair(
                _mm256_cvtph_ps(_mm_loadu_si128(p.cast())),
                _mm256_cvtph_ps(_mm_loadu_si128(p.add(8).cast())),
            )
        }
    }
    #[inline(always)]
    unsafe fn load_i8(p: *const i8) -> Self::V {
        unsafe {
            let bytes = _mm_loadu_si128(p.cast());
            let low = _mm256_cvtepi8_epi32(bytes);
            let high = _mm256_cvtepi8_epi32(_mm_srli_si128::<8>(bytes));
            Pair(_mm256_cvtepi32_ps(low), _mm256_cvtepi32_ps(high))
        }
    }
    #[inline(always)]
    unsafe fn load_u8(p: *const u8) -> Self::V {
        unsafe {
            let bytes = _mm_loadu_si128(p.cast());
            let low = _mm256_cvtepu8_epi32(bytes);
            let high = _mm256_cvtepu8_epi32(_mm_srli_si128::<8>(bytes));
            Pair(_mm256_cvtepi32_ps(low), _mm256_cvtepi32_ps(high))
        }
    }
    #[inline(always)]
    unsafe fn add(a: Self::V, b: Self::V) -> Self::V {
        unsafe { both!(_mm256_add_ps, a, b) }
    }
    #[inline(always)]
    unsafe fn sub(a: Self::V, b: Self::V) -> Self::V {
        unsafe { both!(_mm256_sub_ps, a, b) }
    }
    #[inline(always)]
    unsafe fn mul(a: Self::V, b: Self::V) -> Self::V {
        unsafe { both!(_mm256_mul_ps, a, b) }
    }
    #[inline(always)]
    unsafe fn div(a: Self::V, b: Self::V) -> Self::V {
        unsafe { both!(_mm256_div_ps, a, b) }
    }
    #[inline(always)]
    unsafe fn max(a: Self::V, b: Self::V) -> Self::V {
        unsafe { both!(_mm256_max_ps, a, b) }
    }
    #[inline(always)]
    unsafe fn min(a: Self::V, b: Self::V) -> Self::V {
        unsafe { both!(_mm256_min_ps, a, b) }
    }
    #[inline(always)]
    unsafe fn fma(a: Self::V, b: Self::V, c: Self::V) -> Self::V {
        unsafe {
            Pair(
                _mm256_fmadd_ps(a.0, b.0, c.0),
                _mm256_fmadd_ps(a.1, b.1, c.1),
            )
        }
    }
    #[inline(always)]
    unsafe fn bits(a: Self::V) -> Self::I {
        unsafe { both!(_mm256_castps_si256, a) }
    }
    #[inline(always)]
    unsafe fn from_bits(a: Self::I) -> Self::V {
        unsafe { both!(_mm256_castsi256_ps, a) }
    }
    #[inline(always)]
    unsafe fn load_u32(p: *const u32) -> Self::I {
        unsafe {
            Pair(
                _mm256_loadu_si256(p.cast()),
                _mm256_loadu_si256(p.add(8).cast()),
            )
        }
    }
    #[inline(always)]
    unsafe fn shift_right(a: Self::I, bits: u32) -> Self::I {
        unsafe {
            let bits = _mm_cvtsi32_si128(bits as i32);
            Pair(_mm256_srl_epi32(a.0, bits), _mm256_srl_epi32(a.1, bits))
        }
    }
    #[inline(always)]
    unsafe fn shift_left(a: Self::I, bits: u32) -> Self::I {
        unsafe {
            let bits = _mm_cvtsi32_si128(bits as i32);
            Pair(_mm256_sll_epi32(a.0, bits), _mm256_sll_epi32(a.1, bits))
        }
    }
    #[inline(always)]
    unsafe fn and(a: Self::I, mask: u32) -> Self::I {
        unsafe {
            let mask = _mm256_set1_epi32(mask as i32);
            Pair(_mm256_and_si256(a.0, mask), _mm256_and_si256(a.1, mask))
        }
    }
    #[inline(always)]
    unsafe fn or(a: Self::I, b: Self::I) -> Self::I {
        unsafe { both!(_mm256_or_si256, a, b) }
    }
    #[inline(always)]
    unsafe fn to_f32(a: Self::I) -> Self::V {
        unsafe { both!(_mm256_cvtepi32_ps, a) }
    }
    #[inline(always)]
    unsafe fn to_i32(a: Self::V) -> Self::I {
        unsafe { both!(_mm256_cvtps_epi32, a) }
    }
    #[inline(always)]
    unsafe fn store_low_bytes(p: *mut u8, a: Self::I) {
        unsafe {
            let a = Self::and(a, 255);
            // Packing works within halves of 128 bits: the middle quarters change places.
            let words = _mm256_packus_epi32(a.0, a.1);
            let words = _mm256_permute4x64_epi64::<0b11_01_10_00>(words);
            let (low, high) = (
                _mm256_castsi256_si128(words),
                _mm256_extracti128_si256::<1>(words),
            );
            _mm_storeu_si128(p.cast(), _mm_packus_epi16(low, high));
        }
    }
    #[inline(always)]
    unsafe fn splat_i32(x: i32) -> Self::I {
        let v = unsafe { _mm256_set1_epi32(x) };
        Pair(v, v)
    }
    #[inline(always)]
    unsafe fn add_i32(a: Self::I, b: Self::I) -> Self::I {
        unsafe { both!(_mm256_add_epi32, a, b) }
    }
    #[inline(always)]
    unsafe fn store_u32(p: *mut u32, a: Self::I) {
        unsafe {
            _mm256_storeu_si256(p.cast(), a.0);
            _mm256_storeu_si256(p.add(8).cast(), a.1);
        }
    }
    #[inline(always)]
    unsafe fn store_low_halves(p: *mut u16, a: Self::I) {
        unsafe {
            // Packing works within halves of 128 bits: the middle quarters change places.
            let halves = _mm256_packs_epi32(a.0, a.1);
            let halves = _mm256_permute4x64_epi64::<0b11_01_10_00>(halves);
            _mm256_storeu_si256(p.cast(), halves);
        }
    }
    #[inline(always)]
    unsafe fn dot4(sum: Self::I, u: Self::I, s: Self::I) -> Self::I {
        if !VNNI {
            return unsafe { super::dot4_by_lanes::<Self>(sum, u, s) };
        }
        unsafe { Pair(dpbusd256(sum.0, u.0, s.0), dpbusd256(sum.1, u.1, s.1)) }
    }
    #[inline(always)]
    unsafe fn dot2(sum: Self::I, a: Self::I, b: Self::I) -> Self::I {
        unsafe {
            match VNNI {
                true => Pair(dpwssd256(sum.0, a.0, b.0), dpwssd256(sum.1, a.1, b.1)),
                false => Pair(madd_add(sum.0, a.0, b.0), madd_add(sum.1, a.1, b.1)),
            }
        }
    }
    #[inline(always)]
    unsafe fn sub_halves(a: Self::I, b: Self::I) -> Self::I {
        unsafe { both!(_mm256_sub_epi16, a, b) }
    }
    #[inline(always)]
    unsafe fn upper_bytes(a: Self::I) -> Self::I {
        unsafe { Pair(_mm256_srli_epi16::<8>(a.0), _mm256_srli_epi16::<8>(a.1)) }
    }
    #[inline(always)]
    unsafe fn sum(v: Self::V) -> f32 {
        unsafe { sum8(_mm256_add_ps(v.0, v.1)) }
    }
    #[inline(always)]
    unsafe fn greatest(v: Self::V) -> f32 {
        unsafe { greatest8(_mm256_max_ps(v.0, v.1)) }
    }
    #[inline(always)]
    unsafe fn zero_below(x: Self::V, bound: f32, y: Self::V) -> Self::V {
        unsafe {
            let bound = _mm256_set1_ps(bound);
            Pair(
                _mm256_and_ps(_mm256_cmp_ps::<_CMP_GE_OQ>(x.0, bound), y.0),
                _mm256_and_ps(_mm256_cmp_ps::<_CMP_GE_OQ>(x.1, bound), y.1),
            )
        }
    }
}
