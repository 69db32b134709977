//! The little vector arithmetic that rankers need: a matrix product over packed weights and a
//! softmax, written as plain loops over lanes of 16 and compiled once for each instruction set.
//!
//! [`dispatch`] runs a [`Kernel`] in the copy that fits this processor. The bits of a result never
//! depend on how the work was cut: every output is one chain of additions in the order of its
//! inputs, whatever the tile, the chunk of rows or the thread. They may differ between
//! processors with and without fused multiply-add.

/// Numbers that move together: one AVX-512 register, two of AVX, four of NEON or SSE.
pub(super) const LANES: usize = 16;

/// Rows are handed to [`matmul`] in multiples of this, zero-padded: every tile height divides it.
pub(super) const ROW_GROUP: usize = 8;

/// Numbers rounded up to whole lanes.
pub(super) const fn padded(len: usize) -> usize {
    len.next_multiple_of(LANES)
}

/// An instruction set. A value of it proves that this processor has it: only [`dispatch`] makes one.
pub(super) trait Isa: Copy {
    /// Fused multiply-add is one instruction.
    const FMA: bool;
    /// 16 float32 numbers in registers.
    type Lanes: Copy;

    fn splat(self, value: f32) -> Self::Lanes;
    fn load(self, from: &[f32; LANES]) -> Self::Lanes;
    fn store(self, lanes: Self::Lanes, to: &mut [f32; LANES]);
    fn add(self, a: Self::Lanes, b: Self::Lanes) -> Self::Lanes;
    /// The larger of both, lane by lane; either where one is not a number.
    fn max(self, a: Self::Lanes, b: Self::Lanes) -> Self::Lanes;
    /// a · b + c
    fn mul_add(self, a: Self::Lanes, b: Self::Lanes, c: Self::Lanes) -> Self::Lanes;

    /// [`product`] with the tile whose sums fit this set's registers.
    fn matmul(
        self,
        rows: usize,
        inner: usize,
        a: Rows<&[f32]>,
        b: PackedRows,
        out: Rows<&mut [f32]>,
        accumulate: bool,
    );
}

/// Work that is compiled for every instruction set. `run` must be `#[inline(always)]`, and so must
/// everything in it that is worth vectorising.
pub(super) trait Kernel {
    type Output;

    fn run<I: Isa>(self, isa: I) -> Self::Output;
}

/// Runs `kernel` in the copy compiled for the best instruction set that this processor has.
pub(super) fn dispatch<K: Kernel>(kernel: K) -> K::Output {
    #[cfg(target_arch = "x86_64")]
    {
        if is_x86_feature_detected!("avx512f") {
            // SAFETY: the processor has the feature that the function is compiled for.
            return unsafe { x86::avx512(kernel) };
        }
        if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
            // SAFETY: the processor has the features that the function is compiled for.
            return unsafe { x86::avx2(kernel) };
        }
    }
    kernel.run(Baseline)
}

/// What every processor of this architecture has: SSE2 or NEON, by the compiler's hand.
#[derive(Clone, Copy)]
struct Baseline;

impl Isa for Baseline {
    const FMA: bool = cfg!(target_arch = "aarch64");
    type Lanes = [f32; LANES];

    #[inline(always)]
    fn splat(self, value: f32) -> [f32; LANES] {
        [value; LANES]
    }

    #[inline(always)]
    fn load(self, from: &[f32; LANES]) -> [f32; LANES] {
        *from
    }

    #[inline(always)]
    fn store(self, lanes: [f32; LANES], to: &mut [f32; LANES]) {
        *to = lanes;
    }

    #[inline(always)]
    fn add(self, a: [f32; LANES], b: [f32; LANES]) -> [f32; LANES] {
        std::array::from_fn(|lane| a[lane] + b[lane])
    }

    #[inline(always)]
    fn max(self, a: [f32; LANES], b: [f32; LANES]) -> [f32; LANES] {
        std::array::from_fn(|lane| if a[lane] > b[lane] { a[lane] } else { b[lane] })
    }

    #[inline(always)]
    fn mul_add(self, a: [f32; LANES], b: [f32; LANES], c: [f32; LANES]) -> [f32; LANES] {
        std::array::from_fn(|lane| mul_add::<Self>(a[lane], b[lane], c[lane]))
    }

    #[inline(always)]
    fn matmul(
        self,
        rows: usize,
        inner: usize,
        a: Rows<&[f32]>,
        b: PackedRows,
        out: Rows<&mut [f32]>,
        accumulate: bool,
    ) {
        product::<Self, 2, 1>(self, rows, inner, a, b, out, accumulate);
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use super::*;

    /// Made only in [`avx512`], which runs only where AVX-512F is there: this is what makes the
    /// intrinsics below safe to call.
    #[derive(Clone, Copy)]
    pub(super) struct Avx512(());

    #[target_feature(enable = "avx512f")]
    pub(super) fn avx512<K: Kernel>(kernel: K) -> K::Output {
        kernel.run(Avx512(()))
    }

    impl Isa for Avx512 {
        const FMA: bool = true;
        type Lanes = __m512;

        #[inline(always)]
        fn splat(self, value: f32) -> __m512 {
            // SAFETY: `self` proves AVX-512F.
            unsafe { _mm512_set1_ps(value) }
        }

        #[inline(always)]
        fn load(self, from: &[f32; LANES]) -> __m512 {
            // SAFETY: `self` proves AVX-512F; 16 numbers are read from an array of 16.
            unsafe { _mm512_loadu_ps(from.as_ptr()) }
        }

        #[inline(always)]
        fn store(self, lanes: __m512, to: &mut [f32; LANES]) {
            // SAFETY: `self` proves AVX-512F; 16 numbers are written to an array of 16.
            unsafe { _mm512_storeu_ps(to.as_mut_ptr(), lanes) }
        }

        #[inline(always)]
        fn add(self, a: __m512, b: __m512) -> __m512 {
            // SAFETY: `self` proves AVX-512F.
            unsafe { _mm512_add_ps(a, b) }
        }

        #[inline(always)]
        fn max(self, a: __m512, b: __m512) -> __m512 {
            // SAFETY: `self` proves AVX-512F.
            unsafe { _mm512_max_ps(a, b) }
        }

        #[inline(always)]
        fn mul_add(self, a: __m512, b: __m512, c: __m512) -> __m512 {
            // SAFETY: `self` proves AVX-512F.
            unsafe { _mm512_fmadd_ps(a, b, c) }
        }

        /// 16 of 32 registers hold sums: twice what hides the latency of two units.
        #[inline(always)]
        fn matmul(
            self,
            rows: usize,
            inner: usize,
            a: Rows<&[f32]>,
            b: PackedRows,
            out: Rows<&mut [f32]>,
            accumulate: bool,
        ) {
            product::<Self, 8, 2>(self, rows, inner, a, b, out, accumulate);
        }
    }

    /// Made only in [`avx2`], which runs only where AVX2 and FMA are there: this is what makes the
    /// intrinsics below safe to call.
    #[derive(Clone, Copy)]
    pub(super) struct Avx2(());

    #[target_feature(enable = "avx2,fma")]
    pub(super) fn avx2<K: Kernel>(kernel: K) -> K::Output {
        kernel.run(Avx2(()))
    }

    impl Isa for Avx2 {
        const FMA: bool = true;
        type Lanes = (__m256, __m256);

        #[inline(always)]
        fn splat(self, value: f32) -> (__m256, __m256) {
            // SAFETY: `self` proves AVX2.
            let lanes = unsafe { _mm256_set1_ps(value) };
            (lanes, lanes)
        }

        #[inline(always)]
        fn load(self, from: &[f32; LANES]) -> (__m256, __m256) {
            // SAFETY: `self` proves AVX2; twice 8 numbers are read from an array of 16.
            unsafe {
                (
                    _mm256_loadu_ps(from.as_ptr()),
                    _mm256_loadu_ps(from.as_ptr().add(8)),
                )
            }
        }

        #[inline(always)]
        fn store(self, lanes: (__m256, __m256), to: &mut [f32; LANES]) {
            // SAFETY: `self` proves AVX2; twice 8 numbers are written to an array of 16.
            unsafe {
                _mm256_storeu_ps(to.as_mut_ptr(), lanes.0);
                _mm256_storeu_ps(to.as_mut_ptr().add(8), lanes.1);
            }
        }

        #[inline(always)]
        fn add(self, a: (__m256, __m256), b: (__m256, __m256)) -> (__m256, __m256) {
            // SAFETY: `self` proves AVX2.
            unsafe { (_mm256_add_ps(a.0, b.0), _mm256_add_ps(a.1, b.1)) }
        }

        #[inline(always)]
        fn max(self, a: (__m256, __m256), b: (__m256, __m256)) -> (__m256, __m256) {
            // SAFETY: `self` proves AVX2.
            unsafe { (_mm256_max_ps(a.0, b.0), _mm256_max_ps(a.1, b.1)) }
        }

        #[inline(always)]
        fn mul_add(
            self,
            a: (__m256, __m256),
            b: (__m256, __m256),
            c: (__m256, __m256),
        ) -> (__m256, __m256) {
            // SAFETY: `self` proves AVX2 and FMA.
            unsafe {
                (
                    _mm256_fmadd_ps(a.0, b.0, c.0),
                    _mm256_fmadd_ps(a.1, b.1, c.1),
                )
            }
        }

        /// 8 of 16 registers hold sums: just what hides the latency of two units.
        #[inline(always)]
        fn matmul(
            self,
            rows: usize,
            inner: usize,
            a: Rows<&[f32]>,
            b: PackedRows,
            out: Rows<&mut [f32]>,
            accumulate: bool,
        ) {
            product::<Self, 4, 1>(self, rows, inner, a, b, out, accumulate);
        }
    }
}

#[inline(always)]
pub(super) fn mul_add<I: Isa>(a: f32, b: f32, c: f32) -> f32 {
    if I::FMA { a.mul_add(b, c) } else { a * b + c }
}

/// A matrix [rows, columns] cut into panels of 16 columns, zero-padded; panel p holds rows one
/// after another, each as the 16 numbers of columns 16·p...
#[derive(Clone, Debug)]
pub(super) struct PackedMatrix {
    pub rows: usize,
    pub columns: usize,
    panels: Vec<[f32; LANES]>,
}

impl PackedMatrix {
    /// Packs the matrix whose element (row, column) is `at(row, column)`.
    pub fn from_fn(rows: usize, columns: usize, at: impl Fn(usize, usize) -> f32) -> Self {
        let mut panels = vec![[0.0; LANES]; columns.div_ceil(LANES) * rows];
        for (panel, packed) in panels.chunks_exact_mut(rows.max(1)).enumerate() {
            let first = panel * LANES;
            let width = LANES.min(columns - first);
            for (row, lanes) in packed.iter_mut().enumerate() {
                for (lane, value) in lanes[..width].iter_mut().enumerate() {
                    *value = at(row, first + lane);
                }
            }
        }
        PackedMatrix {
            rows,
            columns,
            panels,
        }
    }

    /// Packs a row-major matrix of `columns` columns.
    pub fn from_row_major(data: &[f32], columns: usize) -> Self {
        Self::from_fn(data.len() / columns, columns, |row, column| {
            data[row * columns + column]
        })
    }
}

/// One operand or result of a product: row r starts at `data[offset + r · stride]`.
#[derive(Clone, Copy)]
pub(super) struct Rows<T> {
    pub data: T,
    pub offset: usize,
    pub stride: usize,
}

/// The rows of a packed matrix from `first` on.
#[derive(Clone, Copy)]
pub(super) struct PackedRows<'a> {
    pub matrix: &'a PackedMatrix,
    pub first: usize,
}

/// `out[r, ·] (+)= a[r, ·] · b` for `rows` rows, a multiple of [`ROW_GROUP`], of `inner` numbers
/// each. `out` gets `padded(columns)` numbers a row, the last of which are zero (or stay what they
/// were where it is added to).
#[inline(always)]
fn product<I: Isa, const ROWS: usize, const PANELS: usize>(
    isa: I,
    rows: usize,
    inner: usize,
    a: Rows<&[f32]>,
    b: PackedRows,
    out: Rows<&mut [f32]>,
    accumulate: bool,
) {
    assert!(rows.is_multiple_of(ROW_GROUP) && b.first + inner <= b.matrix.rows);
    let Rows {
        data: out,
        offset,
        stride,
    } = out;
    let panels = b.matrix.columns.div_ceil(LANES);
    for row in (0..rows).step_by(ROWS) {
        let a: [&[f32]; ROWS] =
            std::array::from_fn(|r| &a.data[a.offset + (row + r) * a.stride..][..inner]);
        let out = &mut out[offset + row * stride..];
        let mut panel = 0;
        while panel + PANELS <= panels {
            tile::<I, ROWS, PANELS>(isa, inner, &a, b, panel, out, stride, accumulate);
            panel += PANELS;
        }
        while panel < panels {
            tile::<I, ROWS, 1>(isa, inner, &a, b, panel, out, stride, accumulate);
            panel += 1;
        }
    }
}

/// `ROWS` × `PANELS` · 16 outputs, whose sums stay in registers.
#[allow(
    clippy::too_many_arguments,
    reason = "a part of the loop above with a name"
)]
#[inline(always)]
fn tile<I: Isa, const ROWS: usize, const PANELS: usize>(
    isa: I,
    inner: usize,
    a: &[&[f32]; ROWS],
    b: PackedRows,
    panel: usize,
    out: &mut [f32],
    stride: usize,
    accumulate: bool,
) {
    let b: [&[[f32; LANES]]; PANELS] =
        std::array::from_fn(|p| &b.matrix.panels[(panel + p) * b.matrix.rows + b.first..][..inner]);
    assert!(a.iter().all(|a| a.len() == inner));
    let mut sums = [[isa.splat(0.0); PANELS]; ROWS];
    for k in 0..inner {
        let mut lanes = [isa.splat(0.0); PANELS];
        for p in 0..PANELS {
            // SAFETY: k < inner, the length of each slice of `b`. (Checked, the loop would branch
            // at every load.)
            lanes[p] = isa.load(unsafe { b[p].get_unchecked(k) });
        }
        for r in 0..ROWS {
            // SAFETY: k < inner, the length of each slice of `a`, as asserted above.
            let value = isa.splat(unsafe { *a[r].get_unchecked(k) });
            for p in 0..PANELS {
                sums[r][p] = isa.mul_add(value, lanes[p], sums[r][p]);
            }
        }
    }
    for (r, sums) in sums.iter().enumerate() {
        let out = &mut out[r * stride + panel * LANES..][..PANELS * LANES];
        for (sum, out) in sums.iter().zip(out.as_chunks_mut::<LANES>().0) {
            let total = if accumulate {
                isa.add(isa.load(out), *sum)
            } else {
                *sum
            };
            isa.store(total, out);
        }
    }
}

/// e^x to 2 units in the last place for -87 ≤ x ≤ 88; arguments beyond are taken as those bounds.
/// (Cody and Waite's reduction, the polynomial of Cephes' expf.)
#[inline(always)]
pub(super) fn exp<I: Isa>(x: f32) -> f32 {
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    // Adding 1.5 · 2^23 rounds to the nearest whole number, which then stands in the low bits.
    const ROUND: f32 = 12_582_912.0;
    let x = x.clamp(-87.0, 88.0);
    let shifted = mul_add::<I>(x, std::f32::consts::LOG2_E, ROUND);
    let whole = shifted - ROUND;
    let r = mul_add::<I>(whole, -LN2_HIGH, x);
    let r = mul_add::<I>(whole, -LN2_LOW, r);
    let mut p = 1.987_569_1e-4;
    for coefficient in [
        1.398_2e-3,
        8.333_452e-3,
        4.166_579_6e-2,
        1.666_666_6e-1,
        0.5,
    ] {
        p = mul_add::<I>(p, r, coefficient);
    }
    let fraction = mul_add::<I>(p, r * r, r) + 1.0;
    let exponent = shifted
        .to_bits()
        .wrapping_sub(ROUND.to_bits())
        .wrapping_add(127);
    fraction * f32::from_bits(exponent << 23)
}

/// `x += added`, as far as both go.
#[inline(always)]
pub(super) fn add(x: &mut [f32], added: &[f32]) {
    for (x, added) in x.iter_mut().zip(added) {
        *x += added;
    }
}

/// Sum of 16 lanes in a fixed tree.
#[inline(always)]
pub(super) fn sum_lanes(lanes: [f32; LANES]) -> f32 {
    let mut lanes = lanes;
    let mut width = LANES / 2;
    while width > 0 {
        for lane in 0..width {
            lanes[lane] += lanes[lane + width];
        }
        width /= 2;
    }
    lanes[0]
}

/// Sum of the numbers of `x`, which is whole lanes long.
#[inline(always)]
fn sum<I: Isa>(isa: I, x: &[f32]) -> f32 {
    let mut total = isa.splat(0.0);
    for chunk in x.as_chunks::<LANES>().0 {
        total = isa.add(total, isa.load(chunk));
    }
    let mut lanes = [0.0; LANES];
    isa.store(total, &mut lanes);
    sum_lanes(lanes)
}

/// Sum of the squares of `x - mean`.
#[inline(always)]
fn sum_of_squares<I: Isa>(isa: I, x: &[f32], mean: f32) -> f32 {
    let shift = isa.splat(-mean);
    let mut total = isa.splat(0.0);
    for chunk in x.as_chunks::<LANES>().0 {
        let centred = isa.add(isa.load(chunk), shift);
        total = isa.mul_add(centred, centred, total);
    }
    let mut lanes = [0.0; LANES];
    isa.store(total, &mut lanes);
    sum_lanes(lanes)
}

// Below, loops run over a whole row, not over the 16 lanes of a chunk (the compiler would unroll
// those before it vectorises), and without closures (which may stay functions of their own, compiled
// for the baseline).

/// Replaces the first `len` numbers of `row` by the softmax of `scale` times them. `row` is as long
/// as `padded(len)`; the padding is overwritten.
#[inline(always)]
pub(super) fn softmax<I: Isa>(isa: I, row: &mut [f32], len: usize, scale: f32) {
    row[len..].fill(f32::MIN);
    let mut largest = isa.splat(f32::MIN);
    for chunk in row.as_chunks::<LANES>().0 {
        largest = isa.max(largest, isa.load(chunk));
    }
    let mut lanes = [0.0; LANES];
    isa.store(largest, &mut lanes);
    let largest = lanes.iter().fold(f32::MIN, |a, &b| a.max(b));
    for value in row.iter_mut() {
        *value = exp::<I>((*value - largest) * scale);
    }
    let inverse = 1.0 / sum(isa, row);
    for value in row.iter_mut() {
        *value *= inverse;
    }
}

/// Layer normalisation of one row (Ba et al. 2016): `(x - mean) / √(variance + 1e-5) · gain + bias`.
/// The row is whole lanes long.
#[inline(always)]
pub(super) fn layer_norm<I: Isa>(isa: I, x: &[f32], gain: &[f32], bias: &[f32], out: &mut [f32]) {
    const EPSILON: f32 = 1e-5;
    let mean = sum(isa, x) / x.len() as f32;
    let squares = sum_of_squares(isa, x, mean);
    let inverse = 1.0 / (squares / x.len() as f32 + EPSILON).sqrt();
    for (((out, x), gain), bias) in out.iter_mut().zip(x).zip(gain).zip(bias) {
        *out = mul_add::<I>((x - mean) * inverse, *gain, *bias);
    }
}

/// The tanh approximation of GELU, as x · sigmoid(2u), u = √(2/π) · (x + 0.044715 · x³).
#[inline(always)]
pub(super) fn gelu<I: Isa>(x: f32) -> f32 {
    const TWICE_SQRT_2_OVER_PI: f32 = 1.595_769;
    let u = TWICE_SQRT_2_OVER_PI * x * mul_add::<I>(0.044715 * x, x, 1.0);
    x / (1.0 + exp::<I>(-u))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The results of every copy of a kernel that this processor can run.
    fn every_copy<K: Kernel + Copy>(kernel: K) -> Vec<K::Output> {
        let mut outputs = vec![dispatch(kernel), kernel.run(Baseline)];
        #[cfg(target_arch = "x86_64")]
        if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
            // SAFETY: the processor has the features that the function is compiled for.
            outputs.push(unsafe { x86::avx2(kernel) });
        }
        outputs
    }

    #[derive(Clone, Copy)]
    struct Matmul<'a> {
        rows: usize,
        a: &'a [f32],
        b: &'a PackedMatrix,
        accumulate: bool,
    }

    impl Kernel for Matmul<'_> {
        type Output = Vec<f32>;

        #[inline(always)]
        fn run<I: Isa>(self, isa: I) -> Vec<f32> {
            let stride = padded(self.b.columns);
            let mut out = vec![1.0; self.rows * stride];
            let inner = self.b.rows;
            let a = Rows {
                data: self.a,
                offset: 0,
                stride: inner,
            };
            let b = PackedRows {
                matrix: self.b,
                first: 0,
            };
            let to = Rows {
                data: &mut out[..],
                offset: 0,
                stride,
            };
            isa.matmul(self.rows, inner, a, b, to, self.accumulate);
            out
        }
    }

    /// Numbers in -1..1 that are the same every time.
    fn numbers(len: usize) -> Vec<f32> {
        let number = |i: u32| (i.wrapping_mul(2_654_435_761) >> 8) as f32 / 8_388_608.0 - 1.0;
        (0..len as u32).map(number).collect()
    }

    #[test]
    fn matmul_equals_the_plain_product() {
        for (inner, columns) in [(1, 1), (5, 16), (33, 40), (64, 64), (17, 101)] {
            let rows = 16;
            let (a, b) = (numbers(rows * inner), numbers(inner * columns));
            let packed = PackedMatrix::from_row_major(&b, columns);
            for accumulate in [false, true] {
                for out in every_copy(Matmul {
                    rows,
                    a: &a,
                    b: &packed,
                    accumulate,
                }) {
                    for (at, found) in out.iter().enumerate() {
                        let (row, column) = (at / padded(columns), at % padded(columns));
                        let mut exact = if accumulate { 1.0 } else { 0.0 };
                        if column < columns {
                            for k in 0..inner {
                                exact += a[row * inner + k] as f64 * b[k * columns + column] as f64;
                            }
                        }
                        // At most 66 roundings of sums below 66.
                        let error = (*found as f64 - exact).abs();
                        assert!(error < 1e-5, "{found} against {exact}");
                    }
                }
            }
        }
    }

    /// Applies a function to each number.
    #[derive(Clone, Copy)]
    struct Map<'a> {
        x: &'a [f32],
        gelu: bool,
    }

    impl Kernel for Map<'_> {
        type Output = Vec<f32>;

        #[inline(always)]
        fn run<I: Isa>(self, _: I) -> Vec<f32> {
            let f = if self.gelu { gelu::<I> } else { exp::<I> };
            self.x.iter().map(|x| f(*x)).collect()
        }
    }

    #[test]
    fn exp_is_within_two_units_in_the_last_place() {
        let x: Vec<f32> = (-87_000..=88_000)
            .map(|step| step as f32 / 1000.0)
            .collect();
        for found in every_copy(Map { x: &x, gelu: false }) {
            for (x, found) in x.iter().zip(found) {
                let exact = (*x as f64).exp();
                let error = (found as f64 - exact).abs() / exact;
                assert!(
                    error < 2.0 * f32::EPSILON as f64,
                    "exp({x}) = {found}, not {exact}"
                );
            }
        }
        for extremes in every_copy(Map {
            x: &[f32::MIN, f32::MAX, f32::NAN],
            gelu: false,
        }) {
            assert!(extremes[0] < 1e-37 && extremes[1].is_finite() && extremes[2].is_nan());
        }
    }

    #[test]
    fn gelu_follows_the_formula() {
        let x: Vec<f32> = (-1000..=1000).map(|step| step as f32 / 100.0).collect();
        for found in every_copy(Map { x: &x, gelu: true }) {
            for (&x, found) in x.iter().zip(found) {
                let x = x as f64;
                let u = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x.powi(3));
                let exact = 0.5 * x * (1.0 + u.tanh());
                // A few roundings of numbers up to 10.
                assert!((found as f64 - exact).abs() < 5e-7 * (1.0 + x.abs()), "{x}");
            }
        }
        for extremes in every_copy(Map {
            x: &[-1e30, 1e10, f32::NAN],
            gelu: true,
        }) {
            assert!(extremes[0].abs() < 1e-6 && extremes[1] == 1e10 && extremes[2].is_nan());
        }
    }

    #[test]
    fn softmax_of_one_and_of_extremes() {
        let mut row = [7.0; LANES];
        softmax(Baseline, &mut row, 1, 3.0);
        assert_eq!(row[0], 1.0);
        let mut row = [0.0; LANES];
        row[..3].copy_from_slice(&[1e30, -1e30, 1e30]);
        softmax(Baseline, &mut row, 3, 1.0);
        assert!((row[0] - 0.5).abs() < 1e-6 && row[1] < 1e-37 && (row[2] - 0.5).abs() < 1e-6);
    }
}
