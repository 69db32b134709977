//! The matrix product of training: both factors where they lie, the left one also transposed.
//!
//! A tile of 8 rows by 2 vectors of sums stays in registers while the inner index goes by; every
//! output is one chain of multiply-adds in the order of that index. So results depend neither on
//! tiles nor on threads.

use crate::backend::cpu::simd::{Isa, Kernel, LANES, Simd};

/// A matrix within a slice of float32: element (row, column) is `data[row · stride + column]`.
#[derive(Clone, Copy)]
pub struct Matrix<'a> {
    pub data: &'a [f32],
    pub stride: usize,
}

impl<'a> Matrix<'a> {
    pub fn new(data: &'a [f32], stride: usize) -> Self {
        Matrix { data, stride }
    }

    fn covers(&self, rows: usize, columns: usize) -> bool {
        rows == 0 || columns == 0 || self.data.len() >= (rows - 1) * self.stride + columns
    }
}

/// The left factor: [rows, inner] as it lies, or the transpose of [inner, rows].
#[derive(Clone, Copy)]
pub enum Left<'a> {
    AsIs(Matrix<'a>),
    Transposed(Matrix<'a>),
}

/// Where a product goes.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Into {
    Set,
    Add,
}

/// Rows of the left factor, what is summed over, and columns of the right one: columns are whole
/// vectors of [`LANES`].
#[derive(Clone, Copy)]
pub struct Shape {
    pub rows: usize,
    pub inner: usize,
    pub columns: usize,
}

/// `out[rows, columns] = left · right`, or added to it; rows of `out` are `stride` apart.
pub fn product(
    isa: Isa,
    shape: Shape,
    left: Left,
    right: Matrix,
    out: &mut [f32],
    stride: usize,
    into: Into,
) {
    let Shape {
        rows,
        inner,
        columns,
    } = shape;
    assert!(columns.is_multiple_of(LANES));
    assert!(match left {
        Left::AsIs(left) => left.covers(rows, inner),
        Left::Transposed(left) => left.covers(inner, rows),
    });
    assert!(right.covers(inner, columns) && Matrix::new(out, stride).covers(rows, columns));
    isa.dispatch(Product {
        shape,
        left,
        right,
        out: out.as_mut_ptr(),
        stride,
        first: into == Into::Set,
    });
}

struct Product<'a> {
    shape: Shape,
    left: Left<'a>,
    right: Matrix<'a>,
    out: *mut f32,
    stride: usize,
    first: bool,
}

impl Kernel for Product<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        // SAFETY: `product` has checked that all three cover the shape.
        unsafe {
            match self.left {
                Left::AsIs(left) => self.tiles::<S, true>(left),
                Left::Transposed(left) => self.tiles::<S, false>(left),
            }
        }
    }
}

impl Product<'_> {
    #[inline(always)]
    unsafe fn tiles<S: Simd, const AS_IS: bool>(&self, left: Matrix) {
        let Shape { rows, columns, .. } = self.shape;
        let mut row = 0;
        macro_rules! heights {
            ($($height:literal)*) => {
                $(while rows - row >= $height && const { $height <= S::TILE_ROWS } {
                    let mut column = 0;
                    while column + 2 * LANES <= columns && const { S::TILE_PANELS == 2 } {
                        unsafe { self.tile::<S, AS_IS, $height, 2>(left, row, column) };
                        column += 2 * LANES;
                    }
                    while column < columns {
                        unsafe { self.tile::<S, AS_IS, $height, 1>(left, row, column) };
                        column += LANES;
                    }
                    row += $height;
                })*
            };
        }
        heights!(8 4 2 1);
    }

    #[inline(always)]
    unsafe fn tile<S: Simd, const AS_IS: bool, const R: usize, const P: usize>(
        &self,
        left: Matrix,
        row: usize,
        column: usize,
    ) {
        let start = if AS_IS { row * left.stride } else { row };
        unsafe {
            S::call(Tile::<AS_IS, R, P> {
                left: left.data.as_ptr().add(start),
                left_stride: left.stride,
                right: self.right.data.as_ptr().add(column),
                right_stride: self.right.stride,
                inner: self.shape.inner,
                out: self.out.add(row * self.stride + column),
                stride: self.stride,
                first: self.first,
            })
        }
    }
}

/// `R` rows by `P` vectors.
struct Tile<const AS_IS: bool, const R: usize, const P: usize> {
    left: *const f32,
    left_stride: usize,
    right: *const f32,
    right_stride: usize,
    inner: usize,
    out: *mut f32,
    stride: usize,
    first: bool,
}

impl<const AS_IS: bool, const R: usize, const P: usize> Kernel for Tile<AS_IS, R, P> {
    type Output = ();

    // Indices name rows and vectors of several arrays at once.
    #[allow(clippy::needless_range_loop)]
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        // SAFETY: the caller's: all pointers cover the tile.
        unsafe {
            let mut sums = [[S::splat(0.0); P]; R];
            if !self.first {
                for r in 0..R {
                    for p in 0..P {
                        sums[r][p] = S::load(self.out.add(r * self.stride + p * LANES));
                    }
                }
            }
            for k in 0..self.inner {
                let mut right = [S::splat(0.0); P];
                for p in 0..P {
                    right[p] = S::load(self.right.add(k * self.right_stride + p * LANES));
                }
                for r in 0..R {
                    let at = if AS_IS {
                        r * self.left_stride + k
                    } else {
                        k * self.left_stride + r
                    };
                    let left = S::splat(*self.left.add(at));
                    for p in 0..P {
                        sums[r][p] = S::fma(left, right[p], sums[r][p]);
                    }
                }
            }
            for r in 0..R {
                for p in 0..P {
                    S::store(self.out.add(r * self.stride + p * LANES), sums[r][p]);
                }
            }
        }
    }
}

/// The transpose of `matrix` [rows, columns], its rows filled up with zeros to whole vectors:
/// [columns, rows rounded up].
pub fn transposed(matrix: Matrix, rows: usize, columns: usize) -> Vec<f32> {
    let stride = rows.next_multiple_of(LANES);
    let mut out = vec![0.0; columns * stride];
    for row in 0..rows {
        for (column, &value) in matrix.data[row * matrix.stride..][..columns]
            .iter()
            .enumerate()
        {
            out[column * stride + row] = value;
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn numbers(len: usize, seed: u32) -> Vec<f32> {
        (0..len as u32)
            .map(|i| ((i ^ seed).wrapping_mul(2_654_435_761) >> 8) as f32 / 8_388_608.0 - 1.0)
            .collect()
    }

    proptest! {
        #[test]
        fn products_agree_with_float64(
            rows in 0usize..21, inner in 0usize..40, vectors in 0usize..4, gap in 0usize..3,
            is_transposed: bool, adds: bool, seed: u32,
        ) {
            let columns = vectors * LANES;
            let (left_rows, left_columns) = if is_transposed { (inner, rows) } else { (rows, inner) };
            let left = numbers(left_rows * (left_columns + gap), seed);
            let right = numbers(inner * (columns + gap), seed ^ 1);
            let before = numbers(rows * (columns + gap), seed ^ 2);
            let matrix = Matrix::new(&left, left_columns + gap);
            for isa in Isa::available() {
                let mut out = before.clone();
                let factor = if is_transposed { Left::Transposed(matrix) } else { Left::AsIs(matrix) };
                product(
                    isa,
                    Shape { rows, inner, columns },
                    factor,
                    Matrix::new(&right, columns + gap),
                    &mut out,
                    columns + gap,
                    if adds { Into::Add } else { Into::Set },
                );
                for (index, &value) in out.iter().enumerate() {
                    let (row, column) = (index / (columns + gap), index % (columns + gap));
                    let mut exact = f64::from(before[index]);
                    if column < columns {
                        exact = if adds { exact } else { 0.0 };
                        for k in 0..inner {
                            let at = if is_transposed {
                                k * matrix.stride + row
                            } else {
                                row * matrix.stride + k
                            };
                            exact += f64::from(left[at]) * f64::from(right[k * (columns + gap) + column]);
                        }
                    }
                    // At most 41 roundings of sums below 41.
                    prop_assert!((f64::from(value) - exact).abs() < 1e-4, "{}: {value} {exact}", isa.name());
                }
            }
        }
    }
}
