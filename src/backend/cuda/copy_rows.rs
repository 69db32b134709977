//! `kernels/copy_rows.cu`

use super::device::{Buffer, Device, DeviceError, Launch};
use crate::arguments;

const THREADS: u32 = 256;

/// `to[target] = from[source]` for each `(source, target)`, a pair of numbers in `moves`; `width`
/// numbers a row. No two moves have one target.
pub fn copy_rows(
    device: &dyn Device,
    from: &Buffer<f32>,
    moves: &Buffer<u32>,
    width: usize,
    to: &Buffer<f32>,
) -> Result<(), DeviceError> {
    let mut arguments = arguments![from, moves, width as u32, to];
    let launch = Launch::blocks(moves.len() / 2, THREADS);
    // SAFETY: as the kernel's head says.
    unsafe { device.launch("copy_rows", launch, &mut arguments) }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{device, random};
    use super::*;

    #[test]
    fn rows_go_where_they_are_sent_and_nowhere_else() {
        let device = device();
        for width in [1, 100, 257, 1024] {
            let (x, before) = (random(1, 5 * width), random(2, 4 * width));
            let from = Buffer::from_slice(&device, &x, "from").unwrap();
            let to = Buffer::from_slice(&device, &before, "to").unwrap();
            let moves = Buffer::from_slice(&device, &[4u32, 0, 1, 3, 1, 2], "moves").unwrap();
            copy_rows(&*device, &from, &moves, width, &to).unwrap();
            let row = |of: &[f32], row: usize| of[row * width..][..width].to_vec();
            let expected = [row(&x, 4), row(&before, 1), row(&x, 1), row(&x, 1)].concat();
            assert_eq!(to.read(0, 4 * width).unwrap(), expected);
        }
    }
}
