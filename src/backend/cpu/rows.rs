//! Activations: float32 rows, aligned and padded.

use super::simd::LANES;
use memmap2::{MmapMut, MmapOptions};
use std::sync::{Arc, Mutex, Weak};

/// Memory that starts on a cache line.
pub struct Aligned {
    memory: Memory,
    bytes: usize,
}

enum Memory {
    Lines(Vec<Line>),
    /// Straight from the operating system, which gives zeroed pages as they are touched, huge ones
    /// where it can: a stream through 4 KiB pages waits for page tables.
    Pages(MmapMut),
    /// A part of such pages.
    Piece(Piece),
}

#[repr(C, align(64))]
#[derive(Clone, Copy)]
struct Line([u8; 64]);

/// From here on memory comes as pages, and goes back to the operating system when it is dropped.
const PAGES_FROM: usize = 1 << 18;
/// Rows give memory back that is for so many times as many rows. Taking it again costs a hundredth of
/// the prefill that needs it.
pub(super) const SPARE_TIMES: usize = 2;

impl Aligned {
    /// `bytes` zeroed bytes.
    pub fn zeroed(bytes: usize) -> Aligned {
        let memory = match (bytes >= PAGES_FROM).then(|| huge_pages(bytes)).flatten() {
            Some(pages) => Memory::Pages(pages),
            None => Memory::Lines(vec![Line([0; 64]); bytes.div_ceil(64)]),
        };
        Aligned { memory, bytes }
    }

    /// The same for what is kept as long as a model: it shares its first and last huge page with what
    /// lies beside it, and its memory comes back when the last of those is gone.
    pub fn kept(bytes: usize) -> Aligned {
        match Piece::new(bytes).map(Memory::Piece) {
            Some(memory) => Aligned { memory, bytes },
            None => Aligned::zeroed(bytes),
        }
    }

    /// Makes room for `bytes`, whose contents become unspecified. Memory is kept for the next time, but
    /// where it is far more than the owner needs now: a prompt's activations would lie beside all that
    /// its candidates need, and their logits beside the next prompt's activations.
    pub(super) fn make_room(&mut self, bytes: usize, needs_little: bool) {
        if self.bytes < bytes || needs_little && self.bytes >= PAGES_FROM {
            // What was there goes before what replaces it comes.
            *self = Aligned::zeroed(0);
            *self = Aligned::zeroed(bytes);
        }
    }

    pub fn len(&self) -> usize {
        self.bytes
    }

    pub fn is_empty(&self) -> bool {
        self.bytes == 0
    }

    pub fn as_ptr(&self) -> *const u8 {
        match &self.memory {
            Memory::Lines(lines) => lines.as_ptr().cast(),
            Memory::Pages(pages) => pages.as_ptr(),
            Memory::Piece(piece) => piece.start,
        }
    }

    pub fn as_mut_ptr(&mut self) -> *mut u8 {
        match &mut self.memory {
            Memory::Lines(lines) => lines.as_mut_ptr().cast(),
            Memory::Pages(pages) => pages.as_mut_ptr(),
            Memory::Piece(piece) => piece.start,
        }
    }

    pub fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: the memory holds at least `bytes` initialised bytes.
        unsafe { std::slice::from_raw_parts_mut(self.as_mut_ptr(), self.bytes) }
    }

    pub fn as_f32(&self) -> &[f32] {
        // SAFETY: as above; lines and pages are aligned for f32 and every bit pattern is one.
        unsafe { std::slice::from_raw_parts(self.as_ptr().cast(), self.bytes / 4) }
    }

    pub fn as_f32_mut(&mut self) -> &mut [f32] {
        // SAFETY: as above.
        unsafe { std::slice::from_raw_parts_mut(self.as_mut_ptr().cast(), self.bytes / 4) }
    }

    /// Rows `stride` numbers apart, for the threads of one operation, which write disjoint parts.
    pub(super) fn shared(&mut self, stride: usize) -> SharedRows {
        SharedRows {
            data: self.as_f32_mut().as_mut_ptr(),
            stride,
        }
    }
}

fn huge_pages(bytes: usize) -> Option<MmapMut> {
    // Nothing is set aside for pages that nobody may ever touch.
    let mut options = MmapOptions::new();
    let pages = options.len(bytes).no_reserve_swap().map_anon().ok()?;
    // Advice: where it is not taken, pages are small.
    #[cfg(target_os = "linux")]
    let _ = pages.advise(memmap2::Advice::HugePage);
    Some(pages)
}

/// Bytes that belong to one owner, of pages that several share.
struct Piece {
    start: *mut u8,
    /// Keeps the pages.
    _slab: Arc<Slab>,
}

// SAFETY: nobody but the owner of a piece touches its bytes.
unsafe impl Send for Piece {}
unsafe impl Sync for Piece {}

struct Slab {
    start: *mut u8,
    _pages: MmapMut,
}

// SAFETY: the pointer is only handed out in pieces that do not overlap.
unsafe impl Send for Slab {}
unsafe impl Sync for Slab {}

/// Addresses, not memory: that comes as pieces are touched. A piece of another slab would leave the
/// rest of a huge page unused.
const SLAB_BYTES: usize = 1 << 30;
/// The slab that pieces are cut from, and how much of it is taken.
static OPEN_SLAB: Mutex<(Weak<Slab>, usize)> = Mutex::new((Weak::new(), 0));

impl Piece {
    /// None where it is larger than a slab, or there are no addresses for one.
    fn new(bytes: usize) -> Option<Piece> {
        if bytes > SLAB_BYTES {
            return None;
        }
        let mut open = OPEN_SLAB
            .lock()
            .unwrap_or_else(|broken| broken.into_inner());
        let (weak, taken) = &mut *open;
        let room = weak.upgrade().filter(|_| *taken + bytes <= SLAB_BYTES);
        let slab = match room {
            Some(slab) => slab,
            None => {
                let mut pages = huge_pages(SLAB_BYTES)?;
                let start = pages.as_mut_ptr();
                let slab = Arc::new(Slab {
                    start,
                    _pages: pages,
                });
                (*weak, *taken) = (Arc::downgrade(&slab), 0);
                slab
            }
        };
        // SAFETY: `bytes` more fit into the slab, and nobody else gets them.
        let start = unsafe { slab.start.add(*taken) };
        *taken += bytes.next_multiple_of(size_of::<Line>());
        Some(Piece { start, _slab: slab })
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

    /// Makes room for `rows` rows, whose contents become unspecified.
    pub fn resize(&mut self, rows: usize) {
        let bytes = rows * self.stride * 4;
        let needs_little = self.data.len() / SPARE_TIMES > bytes;
        self.data.make_room(bytes, needs_little);
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_kept_for_long_has_memory_of_its_own() {
        // The last is too large to share pages, and nobody touches more than its ends.
        for bytes in [1, 64, 65, 3 << 20, SLAB_BYTES + 1] {
            let mut both = [Aligned::kept(bytes), Aligned::kept(bytes)];
            for memory in &mut both {
                assert_eq!((memory.as_ptr() as usize) % 64, 0);
                let memory = memory.bytes_mut();
                assert_eq!((memory[0], memory[bytes - 1]), (0, 0), "zeroed");
                memory[0] = 1;
                memory[bytes - 1] = 1;
            }
        }
    }

    #[test]
    fn room_is_kept_unless_it_is_several_times_what_is_needed() {
        const ROW: usize = 64 << 10;
        let mut rows = Rows::new(0, ROW / 4);
        for (needed, room) in [
            (64, 64),
            (32, 64),
            (31, 31),
            (16, 31),
            (15, 15),
            (32, 32),
            (0, 0),
        ] {
            rows.resize(needed);
            assert_eq!(rows.data.len(), room * ROW, "for {needed} rows");
            rows.data.bytes_mut().fill(1);
        }
    }
}
