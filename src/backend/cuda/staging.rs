//! Memory of the host that a device copies from by itself: a ring of pieces, filled by all threads
//! while the copies of the pieces before are on their way.

use super::device::{Address, DeviceError, Fill};
use rayon::prelude::*;

/// What the ring needs of its device.
pub(super) trait Copies {
    /// Memory that a device copies from by itself, aligned to 256 bytes; it stays.
    fn pin(&self, bytes: usize) -> Result<*mut u8, DeviceError>;

    /// Begins a copy behind all that was asked for, and notes it under this number.
    ///
    /// # Safety
    /// The bytes must be pinned, and stay as they are until [`Copies::finish`] with the number returns.
    unsafe fn begin(
        &self,
        number: usize,
        from: *const u8,
        bytes: usize,
        to: Address,
    ) -> Result<(), DeviceError>;

    /// Waits for the copies of this number.
    fn finish(&self, number: usize) -> Result<(), DeviceError>;
}

/// Pieces of pinned memory, used in turn.
pub(super) struct Ring {
    piece_bytes: usize,
    pieces: Vec<Piece>,
    next: usize,
}

struct Piece {
    /// Null before its first use.
    memory: *mut u8,
    in_use: bool,
}
// SAFETY: the memory is the ring's alone.
unsafe impl Send for Piece {}

impl Ring {
    pub fn new(pieces: usize, piece_bytes: usize) -> Ring {
        let piece = || Piece {
            memory: std::ptr::null_mut(),
            in_use: false,
        };
        Ring {
            piece_bytes,
            pieces: (0..pieces).map(|_| piece()).collect(),
            next: 0,
        }
    }

    /// [`Device::upload_by`](super::device::Device::upload_by)
    pub fn upload(
        &mut self,
        device: &impl Copies,
        to: Address,
        bytes: usize,
        unit: usize,
        fill: Fill,
    ) -> Result<(), DeviceError> {
        let piece_bytes = self.piece_bytes;
        let unit = unit.min(bytes).max(1);
        if unit > piece_bytes {
            // A unit that no piece holds is made whole first.
            let mut whole = vec![0; unit];
            for (i, first) in (0..bytes).step_by(unit).enumerate() {
                let whole = &mut whole[..unit.min(bytes - first)];
                fill(i, whole);
                let whole = &*whole;
                self.upload(
                    device,
                    to + first as u64,
                    whole.len(),
                    piece_bytes,
                    &|i, piece| {
                        piece.copy_from_slice(&whole[i * piece_bytes..][..piece.len()]);
                    },
                )?;
            }
            return Ok(());
        }
        let units = piece_bytes / unit;
        for (i, first) in (0..bytes).step_by(units * unit).enumerate() {
            let bytes = (units * unit).min(bytes - first);
            let number = self.next;
            self.next = (number + 1) % self.pieces.len();
            let piece = &mut self.pieces[number];
            if piece.memory.is_null() {
                piece.memory = device.pin(piece_bytes)?;
            }
            if std::mem::take(&mut piece.in_use) {
                device.finish(number)?;
            }
            // SAFETY: as many bytes are there, nobody else has them, and their last copy is over.
            let memory = unsafe { std::slice::from_raw_parts_mut(piece.memory, bytes) };
            match bytes > unit {
                true => memory
                    .par_chunks_mut(unit)
                    .enumerate()
                    .for_each(|(n, of_unit)| fill(i * units + n, of_unit)),
                false => fill(i * units, memory),
            }
            piece.in_use = true;
            // SAFETY: the piece is not written again before `finish`.
            unsafe { device.begin(number, piece.memory, bytes, to + first as u64) }?;
        }
        Ok(())
    }
}
