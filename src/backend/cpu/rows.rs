//! Activations: float32 rows, aligned and padded.

use super::simd::LANES;

/// Memory that starts on a cache line.
pub struct Aligned {
    lines: Vec<Line>,
    bytes: usize,
}

#[repr(C, align(64))]
#[derive(Clone, Copy)]
struct Line([u8; 64]);

impl Aligned {
    /// `bytes` zeroed bytes.
    pub fn zeroed(bytes: usize) -> Aligned {
        Aligned {
            lines: vec![Line([0; 64]); bytes.div_ceil(64)],
            bytes,
        }
    }

    pub fn len(&self) -> usize {
        self.bytes
    }

    pub fn is_empty(&self) -> bool {
        self.bytes == 0
    }

    pub fn as_ptr(&self) -> *const u8 {
        self.lines.as_ptr().cast()
    }

    pub fn as_mut_ptr(&mut self) -> *mut u8 {
        self.lines.as_mut_ptr().cast()
    }

    pub fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: `lines` holds at least `bytes` initialised bytes.
        unsafe { std::slice::from_raw_parts_mut(self.lines.as_mut_ptr().cast(), self.bytes) }
    }

    pub fn as_f32(&self) -> &[f32] {
        // SAFETY: as above; a line is aligned for f32 and every bit pattern is one.
        unsafe { std::slice::from_raw_parts(self.lines.as_ptr().cast(), self.bytes / 4) }
    }

    /// Rows `stride` numbers apart, for the threads of one operation, which write disjoint parts.
    pub(super) fn shared(&mut self, stride: usize) -> SharedRows {
        SharedRows {
            data: self.as_f32_mut().as_mut_ptr(),
            stride,
        }
    }

    pub fn as_f32_mut(&mut self) -> &mut [f32] {
        // SAFETY: as above.
        unsafe { std::slice::from_raw_parts_mut(self.lines.as_mut_ptr().cast(), self.bytes / 4) }
    }
}

/// Float32 activations `[rows, width]`. Rows lie `stride` numbers apart: `width` rounded up to whole
/// vectors, so that a kernel may read past a row's end; what it finds there is unspecified but finite.
pub struct Rows {
    data: Aligned,
    rows: usize,
    width: usize,
    stride: usize,
}

impl Rows {
    pub fn new(rows: usize, width: usize) -> Rows {
        let stride = width.next_multiple_of(LANES);
        Rows {
            data: Aligned::zeroed(rows * stride * 4),
            rows,
            width,
            stride,
        }
    }

    /// Makes room for `rows` rows; keeps memory for the next time. Contents become unspecified.
    pub fn resize(&mut self, rows: usize) {
        let needed = rows * self.stride * 4;
        if self.data.len() < needed {
            self.data = Aligned::zeroed(needed);
        }
        self.rows = rows;
    }

    pub fn rows(&self) -> usize {
        self.rows
    }

    pub fn width(&self) -> usize {
        self.width
    }

    pub fn stride(&self) -> usize {
        self.stride
    }

    pub fn row(&self, row: usize) -> &[f32] {
        assert!(row < self.rows);
        &self.data.as_f32()[row * self.stride..][..self.width]
    }

    pub fn row_mut(&mut self, row: usize) -> &mut [f32] {
        assert!(row < self.rows);
        let (stride, width) = (self.stride, self.width);
        &mut self.data.as_f32_mut()[row * stride..][..width]
    }

    /// For the threads of one operation, which write disjoint parts.
    pub(super) fn shared(&mut self) -> SharedRows {
        self.data.shared(self.stride)
    }
}

/// A float32 vector with a vector's width of zeros behind it, so that a kernel may read whole vectors.
pub struct Vector {
    values: Vec<f32>,
    len: usize,
}

impl Vector {
    pub fn new(values: &[f32]) -> Vector {
        let mut padded = values.to_vec();
        padded.resize(values.len() + LANES, 0.0);
        Vector {
            values: padded,
            len: values.len(),
        }
    }

    pub fn as_slice(&self) -> &[f32] {
        &self.values[..self.len]
    }

    pub(super) fn padded(&self) -> &[f32] {
        &self.values
    }
}

/// A pointer into rows that several threads write, each its own part.
#[derive(Clone, Copy)]
pub(super) struct SharedRows {
    data: *mut f32,
    stride: usize,
}

// SAFETY: the threads that get a copy write disjoint parts (each operation says which), and the
// borrow that `shared` takes outlives the operation.
unsafe impl Send for SharedRows {}
unsafe impl Sync for SharedRows {}

impl SharedRows {
    /// # Safety
    /// `row` must be a row of the memory, and nobody else may touch what is written through the
    /// pointer while the operation runs.
    #[inline(always)]
    pub unsafe fn row(self, row: usize) -> *mut f32 {
        unsafe { self.data.add(row * self.stride) }
    }
}
