//! Sixteen lanes of float32, the unit in which every CPU kernel is written.
//!
//! A kernel is a type with a generic body ([`Kernel::run`]); [`Isa::dispatch`] compiles the body once
//! for each instruction set and picks one at run time. Lanes are always sixteen, so a kernel reads
//! the same on AVX-512 (one register), AVX2 (two), NEON (four) and everywhere else (an array that
//! the compiler maps to whatever the target has).

// `Simd` says once what all of its methods ask for.
#![allow(clippy::missing_safety_doc)]

#[cfg(target_arch = "aarch64")]
mod neon;
mod portable;
#[cfg(target_arch = "x86_64")]
mod x86;

pub use portable::Portable;

/// Lanes of a vector; also the columns of a weight panel and the keys of a KV page.
pub const LANES: usize = 16;

/// Sixteen lanes of float32 (`V`) and of 32-bit integers (`I`).
///
/// # Safety
/// Methods may execute instructions of the set that the implementor stands for: call them only from
/// a [`Kernel`] that [`Isa::dispatch`] runs. Pointers need no alignment and must cover sixteen
/// elements.
pub unsafe trait Simd: Copy + Send + Sync + 'static {
    type V: Copy;
    type I: Copy;

    /// Rows and panels of the register tile: `TILE_ROWS × TILE_PANELS` accumulators, as many as the
    /// registers hold beside one weight vector a panel and one broadcast.
    const TILE_ROWS: usize;
    const TILE_PANELS: usize;
    /// Which integer products pay.
    const PRODUCTS: Products;
    /// Whether products of sixteen bits ([`Simd::dot2`]) are faster than those of float32.
    const HALVES: bool;
    /// Rows of the register tile of products of codes,
    const CODE_ROWS: usize;
    /// and of halves: each result has a sum of integers, and one of float32 in memory.
    const HALF_ROWS: usize;

    /// Runs a kernel as a function of its own, compiled for this instruction set: for what is large
    /// and called from several places.
    unsafe fn call<K: Kernel>(kernel: K) -> K::Output;

    /// Asks for the cache line of an address that will be read soon; any address will do.
    unsafe fn prefetch(p: *const u8);
    /// The same into the second-level cache, for what the first has no room for yet.
    #[inline(always)]
    unsafe fn prefetch_far(p: *const u8) {
        unsafe { Self::prefetch(p) }
    }

    unsafe fn splat(x: f32) -> Self::V;
    unsafe fn load(p: *const f32) -> Self::V;
    unsafe fn store(p: *mut f32, v: Self::V);
    /// The same past the caches, where there is such a store; `p` is aligned to a cache line. Other threads see
    /// it after [`Simd::end_streams`].
    #[inline(always)]
    unsafe fn stream(p: *mut f32, v: Self::V) {
        unsafe { Self::store(p, v) }
    }
    #[inline(always)]
    unsafe fn end_streams() {}
    unsafe fn load_bf16(p: *const u16) -> Self::V;
    unsafe fn load_f16(p: *const u16) -> Self::V;
    unsafe fn load_i8(p: *const i8) -> Self::V;
    unsafe fn load_u8(p: *const u8) -> Self::V;

    unsafe fn add(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn sub(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn mul(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn div(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn max(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn min(a: Self::V, b: Self::V) -> Self::V;
    /// `a · b + c`, rounded once where the instruction set can.
    unsafe fn fma(a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    unsafe fn bits(a: Self::V) -> Self::I;
    unsafe fn from_bits(a: Self::I) -> Self::V;

    unsafe fn load_u32(p: *const u32) -> Self::I;
    unsafe fn shift_right(a: Self::I, bits: u32) -> Self::I;
    unsafe fn shift_left(a: Self::I, bits: u32) -> Self::I;
    unsafe fn and(a: Self::I, mask: u32) -> Self::I;
    unsafe fn or(a: Self::I, b: Self::I) -> Self::I;
    /// Of signed integers; exact below 2^24.
    unsafe fn to_f32(a: Self::I) -> Self::V;
    /// To the nearest integer, ties to even; unspecified beyond 32 bits and for NaN.
    unsafe fn to_i32(a: Self::V) -> Self::I;
    /// Stores the lowest byte of each lane.
    unsafe fn store_low_bytes(p: *mut u8, a: Self::I);
    /// Stores the lower half of each lane, which must be in the range of a signed one.
    #[inline(always)]
    unsafe fn store_low_halves(p: *mut u16, a: Self::I) {
        let mut lanes = [0u32; LANES];
        unsafe {
            Self::store_u32(lanes.as_mut_ptr(), a);
            for (i, lane) in lanes.into_iter().enumerate() {
                *p.add(i) = lane as u16;
            }
        }
    }
    unsafe fn splat_i32(x: i32) -> Self::I;
    /// Wraps around.
    unsafe fn add_i32(a: Self::I, b: Self::I) -> Self::I;
    unsafe fn store_u32(p: *mut u32, a: Self::I);

    /// `sum + Σ u·s` over the four bytes of each lane, those of `u` unsigned, those of `s` signed.
    #[inline(always)]
    unsafe fn dot4(sum: Self::I, u: Self::I, s: Self::I) -> Self::I {
        unsafe { dot4_by_lanes::<Self>(sum, u, s) }
    }

    /// `sum + Σ a·b` over the two signed halves of each lane.
    #[inline(always)]
    unsafe fn dot2(sum: Self::I, a: Self::I, b: Self::I) -> Self::I {
        let mut lanes = [[0u32; LANES]; 3];
        unsafe {
            for (lanes, v) in lanes.iter_mut().zip([sum, a, b]) {
                Self::store_u32(lanes.as_mut_ptr(), v);
            }
            let [sums, a, b] = &mut lanes;
            for ((sum, a), b) in sums.iter_mut().zip(a).zip(b) {
                let product =
                    |shift: u32| i32::from((*a >> shift) as i16) * i32::from((*b >> shift) as i16);
                *sum = sum.wrapping_add((product(0).wrapping_add(product(16))) as u32);
            }
            Self::load_u32(lanes[0].as_ptr())
        }
    }

    /// The upper byte of both halves of each lane, as halves.
    #[inline(always)]
    unsafe fn upper_bytes(a: Self::I) -> Self::I {
        unsafe { Self::and(Self::shift_right(a, 8), 0x00ff_00ff) }
    }

    /// `a - b` in both halves of each lane.
    #[inline(always)]
    unsafe fn sub_halves(a: Self::I, b: Self::I) -> Self::I {
        let mut lanes = [[0u32; LANES]; 2];
        unsafe {
            for (lanes, v) in lanes.iter_mut().zip([a, b]) {
                Self::store_u32(lanes.as_mut_ptr(), v);
            }
            let [a, b] = &mut lanes;
            for (a, b) in a.iter_mut().zip(b) {
                let half = |shift: u32| (*a >> shift).wrapping_sub(*b >> shift) & 0xffff;
                *a = half(0) | half(16) << 16;
            }
            Self::load_u32(lanes[0].as_ptr())
        }
    }

    /// Adds the lanes in a fixed tree: lane i with i + 8, then 4, 2, 1 apart.
    #[inline(always)]
    unsafe fn sum(v: Self::V) -> f32 {
        let mut lanes = [0.0f32; LANES];
        unsafe { Self::store(lanes.as_mut_ptr(), v) };
        let mut half = LANES / 2;
        while half > 0 {
            for i in 0..half {
                lanes[i] += lanes[i + half];
            }
            half /= 2;
        }
        lanes[0]
    }

    #[inline(always)]
    unsafe fn greatest(v: Self::V) -> f32 {
        let mut lanes = [0.0f32; LANES];
        unsafe { Self::store(lanes.as_mut_ptr(), v) };
        lanes.into_iter().fold(f32::NEG_INFINITY, f32::max)
    }

    /// eˣ to about one unit in the last place; 0 below -87.3, so that masked scores (-∞) vanish;
    /// arguments above 88 are treated as 88.
    #[inline(always)]
    unsafe fn exp(x: Self::V) -> Self::V {
        unsafe { Self::exp_up_to_88(Self::min(x, Self::splat(88.0))) }
    }

    /// The same of arguments that are not above 88.
    #[inline(always)]
    unsafe fn exp_up_to_88(x: Self::V) -> Self::V {
        // x = n·ln 2 + r with |r| ≤ ln 2 / 2; eʳ by a polynomial of degree 7 (Cephes' expf).
        // Adding 1.5 · 2²³ rounds to an integer and leaves it in the low bits.
        const ROUND: f32 = (3 << 22) as f32;
        // Down to here eʳ · 2ⁿ is a normal number.
        const LOWEST: f32 = -87.33;
        unsafe {
            let bounded = Self::max(x, Self::splat(LOWEST));
            let rounded = Self::fma(
                bounded,
                Self::splat(std::f32::consts::LOG2_E),
                Self::splat(ROUND),
            );
            let n = Self::sub(rounded, Self::splat(ROUND));
            let r = Self::fma(n, Self::splat(-0.693_359_4), bounded);
            let r = Self::fma(n, Self::splat(2.121_944_4e-4), r);
            let mut p = Self::splat(1.987_569_1e-4);
            for c in [
                1.398_199_9e-3,
                8.333_452e-3,
                4.166_579_6e-2,
                1.666_666_5e-1,
                0.5,
            ] {
                p = Self::fma(p, r, Self::splat(c));
            }
            let p = Self::fma(Self::mul(r, r), p, Self::add(r, Self::splat(1.0)));
            // n goes to the exponent.
            let exponent = Self::shift_left(Self::bits(rounded), 23);
            let y = Self::from_bits(Self::add_i32(Self::bits(p), exponent));
            Self::zero_below(x, LOWEST, y)
        }
    }

    /// `y` where `x ≥ bound`, else 0.
    unsafe fn zero_below(x: Self::V, bound: f32, y: Self::V) -> Self::V;

    /// `y` in the lanes `low..high`, else `other`.
    #[inline(always)]
    unsafe fn keep_lanes(y: Self::V, low: usize, high: usize, other: f32) -> Self::V {
        let mut lanes = [0.0f32; LANES];
        unsafe {
            Self::store(lanes.as_mut_ptr(), y);
            for (i, lane) in lanes.iter_mut().enumerate() {
                if i < low || i >= high {
                    *lane = other;
                }
            }
            Self::load(lanes.as_ptr())
        }
    }
}

/// [`Simd::dot4`] where there is no instruction for it.
#[inline(always)]
unsafe fn dot4_by_lanes<S: Simd>(sum: S::I, u: S::I, s: S::I) -> S::I {
    let mut lanes = [[0u32; LANES]; 3];
    unsafe {
        for (lanes, v) in lanes.iter_mut().zip([sum, u, s]) {
            S::store_u32(lanes.as_mut_ptr(), v);
        }
        let [sums, us, ss] = &mut lanes;
        for ((sum, u), s) in sums.iter_mut().zip(us).zip(ss) {
            let products = u.to_le_bytes().into_iter().zip(s.to_le_bytes());
            let dot: i32 = products
                .map(|(u, s)| i32::from(u) * i32::from(s as i8))
                .sum();
            *sum = sum.wrapping_add(dot as u32);
        }
        S::load_u32(lanes[0].as_ptr())
    }
}

/// How products of codes with activations of sixteen bits are computed in whole numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Products {
    /// Not at all: float32 is faster.
    None,
    /// Of bytes ([`Simd::dot4`]), the activation's two bytes apart.
    Bytes,
    /// Of sixteen bits ([`Simd::dot2`]).
    Halves,
}

/// A computation written once over [`Simd`].
pub trait Kernel {
    type Output;
    /// # Safety
    /// The processor must have the instructions of `S`. Implementations are `#[inline(always)]`, and
    /// so is what they call, for the body must be compiled with the features of its caller.
    unsafe fn run<S: Simd>(self) -> Self::Output;
}

/// The instruction set that kernels run with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Isa {
    /// AVX-512 with VNNI, as every server of this decade has it.
    #[cfg(target_arch = "x86_64")]
    Avx512,
    /// AVX2 with the 256-bit VNNI of client processors.
    #[cfg(target_arch = "x86_64")]
    AvxVnni,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    /// NEON with the byte products of I8MM.
    #[cfg(target_arch = "aarch64")]
    NeonI8mm,
    #[cfg(target_arch = "aarch64")]
    Neon,
    Portable,
}

impl Isa {
    /// All that this processor can run, best first.
    pub fn available() -> Vec<Isa> {
        let mut found = Vec::new();
        #[cfg(target_arch = "x86_64")]
        {
            let avx2 = is_x86_feature_detected!("avx2")
                && is_x86_feature_detected!("fma")
                && is_x86_feature_detected!("f16c");
            if avx2
                && is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512vl")
                && is_x86_feature_detected!("avx512dq")
                && is_x86_feature_detected!("avx512vnni")
            {
                found.push(Isa::Avx512);
            }
            if avx2 && is_x86_feature_detected!("avxvnni") {
                found.push(Isa::AvxVnni);
            }
            if avx2 {
                found.push(Isa::Avx2);
            }
        }
        #[cfg(target_arch = "aarch64")]
        {
            if std::arch::is_aarch64_feature_detected!("i8mm") {
                found.push(Isa::NeonI8mm);
            }
            found.push(Isa::Neon);
        }
        found.push(Isa::Portable);
        found
    }

    /// The best that this processor can run.
    pub fn best() -> Isa {
        Isa::available()[0]
    }

    pub fn name(self) -> &'static str {
        match self {
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => "avx512",
            #[cfg(target_arch = "x86_64")]
            Isa::AvxVnni => "avx-vnni",
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => "avx2",
            #[cfg(target_arch = "aarch64")]
            Isa::NeonI8mm => "neon-i8mm",
            #[cfg(target_arch = "aarch64")]
            Isa::Neon => "neon",
            Isa::Portable => "portable",
        }
    }

    /// Rows of the register tile of this instruction set.
    pub fn tile_rows(self) -> usize {
        self.dispatch(Constants).tile_rows
    }

    /// Whether integer products pay: see [`Simd::PRODUCTS`].
    pub fn has_integer_products(self) -> bool {
        self.dispatch(Constants).integer_products
    }

    /// Whether products of halves pay: see [`Simd::HALVES`].
    pub fn has_half_products(self) -> bool {
        self.dispatch(Constants).half_products
    }

    /// Rows of the register tile of products of codes.
    pub fn code_rows(self) -> usize {
        self.dispatch(Constants).code_rows
    }

    /// Rows of the register tile of products of halves.
    pub fn half_rows(self) -> usize {
        self.dispatch(Constants).half_rows
    }

    /// Runs a kernel, compiled for this instruction set.
    #[inline]
    pub fn dispatch<K: Kernel>(self, kernel: K) -> K::Output {
        // SAFETY: an `Isa` other than `Portable` is only made by `available`, which has asked the
        // processor for every feature that the function below enables.
        match self {
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => unsafe { x86::run_avx512(kernel) },
            #[cfg(target_arch = "x86_64")]
            Isa::AvxVnni => unsafe { x86::run_avx_vnni(kernel) },
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => unsafe { x86::run_avx2(kernel) },
            #[cfg(target_arch = "aarch64")]
            Isa::NeonI8mm => unsafe { neon::run_neon_i8mm(kernel) },
            #[cfg(target_arch = "aarch64")]
            Isa::Neon => unsafe { neon::run_neon(kernel) },
            Isa::Portable => unsafe { kernel.run::<Portable>() },
        }
    }
}

/// Constants of [`Simd`], asked for at run time.
struct Constants;

struct ConstantsOfSimd {
    tile_rows: usize,
    integer_products: bool,
    half_products: bool,
    code_rows: usize,
    half_rows: usize,
}

impl Kernel for Constants {
    type Output = ConstantsOfSimd;
    #[inline(always)]
    unsafe fn run<S: Simd>(self) -> ConstantsOfSimd {
        ConstantsOfSimd {
            tile_rows: S::TILE_ROWS,
            integer_products: !matches!(S::PRODUCTS, Products::None),
            half_products: S::HALVES,
            code_rows: S::CODE_ROWS,
            half_rows: S::HALF_ROWS,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Exp<'a>(&'a mut [f32]);
    impl Kernel for Exp<'_> {
        type Output = ();
        #[inline(always)]
        unsafe fn run<S: Simd>(self) {
            for chunk in self.0.chunks_exact_mut(LANES) {
                unsafe { S::store(chunk.as_mut_ptr(), S::exp(S::load(chunk.as_ptr()))) };
            }
        }
    }

    #[test]
    fn exp_agrees_with_float64_on_every_instruction_set() {
        for isa in Isa::available() {
            let x: Vec<f32> = (0..16 * 4096)
                .map(|i| -87.3 + i as f32 * (175.0 / 65536.0))
                .collect();
            let mut y = x.clone();
            isa.dispatch(Exp(&mut y));
            for (&x, &y) in x.iter().zip(&y) {
                let exact = f64::from(x).exp();
                // Two units in the last place: the argument reduction and the polynomial each give
                // less than one.
                assert!(
                    ((f64::from(y) - exact) / exact).abs() < 2.4e-7,
                    "{}: exp({x}) = {y}",
                    isa.name()
                );
            }
            let mut edge = [f32::NEG_INFINITY; LANES];
            edge[1] = -1000.0;
            edge[2] = 0.0;
            edge[3] = 1000.0;
            isa.dispatch(Exp(&mut edge));
            assert_eq!(edge[..3], [0.0, 0.0, 1.0], "{}", isa.name());
            assert!(edge[3].is_finite() && edge[3] > 1e38);
        }
    }

    struct Loads<'a>(&'a [u16; LANES], &'a [i8; LANES], &'a [u32; LANES]);
    impl Kernel for Loads<'_> {
        type Output = [[f32; LANES]; 6];
        #[inline(always)]
        unsafe fn run<S: Simd>(self) -> Self::Output {
            let mut out = [[0.0; LANES]; 6];
            unsafe {
                S::store(out[0].as_mut_ptr(), S::load_bf16(self.0.as_ptr()));
                S::store(out[1].as_mut_ptr(), S::load_f16(self.0.as_ptr()));
                S::store(out[2].as_mut_ptr(), S::load_i8(self.1.as_ptr()));
                S::store(out[3].as_mut_ptr(), S::load_u8(self.1.as_ptr().cast()));
                let words = S::load_u32(self.2.as_ptr());
                let nibble = S::and(S::shift_right(words, 12), 15);
                S::store(out[4].as_mut_ptr(), S::to_f32(nibble));
                let mixed = S::or(
                    S::and(words, 3),
                    S::shift_left(S::and(S::shift_right(words, 9), 1), 2),
                );
                S::store(out[5].as_mut_ptr(), S::to_f32(mixed));
            }
            out
        }
    }

    #[test]
    fn widening_loads_are_exact_on_every_instruction_set() {
        let halves: [u16; LANES] =
            std::array::from_fn(|i| 0x3b17u16.wrapping_mul(i as u16 + 1) & 0xbbff);
        let bytes: [i8; LANES] =
            std::array::from_fn(|i| (i as i8).wrapping_mul(37).wrapping_sub(100));
        let words: [u32; LANES] =
            std::array::from_fn(|i| 0x9e37_79b9u32.wrapping_mul(i as u32 + 1));
        for isa in Isa::available() {
            let [bf16, f16, i8s, u8s, nibbles, mixed] =
                isa.dispatch(Loads(&halves, &bytes, &words));
            for i in 0..LANES {
                assert_eq!(bf16[i], half::bf16::from_bits(halves[i]).to_f32());
                assert_eq!(f16[i], half::f16::from_bits(halves[i]).to_f32());
                assert_eq!(i8s[i], f32::from(bytes[i]));
                assert_eq!(u8s[i], f32::from(bytes[i] as u8));
                assert_eq!(nibbles[i], (words[i] >> 12 & 15) as f32);
                assert_eq!(mixed[i], (words[i] & 3 | (words[i] >> 9 & 1) << 2) as f32);
            }
        }
    }

    struct Dots<'a>([&'a [u32; LANES]; 3]);
    impl Kernel for Dots<'_> {
        /// Products of bytes and of halves, differences of halves, and their upper bytes.
        type Output = [[u32; LANES]; 4];
        #[inline(always)]
        unsafe fn run<S: Simd>(self) -> Self::Output {
            let mut out = [[0; LANES]; 4];
            unsafe {
                let [sum, u, s] = self.0.map(|lanes| S::load_u32(lanes.as_ptr()));
                S::store_u32(out[0].as_mut_ptr(), S::dot4(sum, u, s));
                S::store_u32(out[1].as_mut_ptr(), S::dot2(sum, u, s));
                S::store_u32(out[2].as_mut_ptr(), S::sub_halves(u, s));
                S::store_u32(out[3].as_mut_ptr(), S::upper_bytes(u));
            }
            out
        }
    }

    #[test]
    fn integer_products_are_exact_on_every_instruction_set() {
        let words = |factor: u32| -> [u32; LANES] {
            std::array::from_fn(|i| factor.wrapping_mul(i as u32 * 2 + 1))
        };
        let (sum, mut u, mut s) = (words(77), words(0x9e37_79b9), words(0x85eb_ca6b));
        // The largest products of both signs, which a saturating instruction would cut off.
        (u[0], s[0], u[1], s[1]) = (u32::MAX, 0x7f7f_7f7f, u32::MAX, 0x8080_8080);
        for isa in Isa::available() {
            let [dots, of_halves, differences, upper] = isa.dispatch(Dots([&sum, &u, &s]));
            for i in 0..LANES {
                let products = u[i].to_le_bytes().into_iter().zip(s[i].to_le_bytes());
                let dot: i32 = products
                    .map(|(u, s)| i32::from(u) * i32::from(s as i8))
                    .sum();
                assert_eq!(dots[i] as i32, sum[i] as i32 + dot, "{}", isa.name());
                let half = |word: u32, shift: u32| i32::from((word >> shift) as i16);
                let product = |shift: u32| half(u[i], shift).wrapping_mul(half(s[i], shift));
                let dot = product(0).wrapping_add(product(16));
                let expected = (sum[i] as i32).wrapping_add(dot);
                assert_eq!(of_halves[i] as i32, expected, "{}", isa.name());
                let difference = |shift: u32| half(u[i], shift).wrapping_sub(half(s[i], shift));
                let expected = difference(0) as u16 as u32 | (difference(16) as u32) << 16;
                assert_eq!(differences[i], expected, "{}", isa.name());
                let [_, low, _, high] = u[i].to_le_bytes().map(u32::from);
                assert_eq!(upper[i], low | high << 16, "{}", isa.name());
            }
        }
    }
}
