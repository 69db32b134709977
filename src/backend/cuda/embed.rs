//! `kernels/embed.cu`

use super::device::{Buffer, Device, DeviceError, Launch, Slice};
use crate::arguments;
use half::bf16;

const THREADS: u32 = 128;

/// `out[row] = table[tokens[row]] · scale`: `table` [vocab_size, stride], `stride` a multiple of 8,
/// `tokens` [rows, below vocab_size], `out` [rows, width].
pub fn embed(
    device: &dyn Device,
    table: &Buffer<bf16>,
    tokens: Slice<u32>,
    scale: f32,
    (rows, width, stride): (usize, usize, usize),
    out: &Buffer<f32>,
) -> Result<(), DeviceError> {
    let mut arguments = arguments![table, tokens, scale, width as u32, stride as u32, out];
    // SAFETY: as the kernel's head says.
    unsafe { device.launch("embed", Launch::blocks(rows, THREADS), &mut arguments) }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{device, random, to_bf16};
    use super::*;

    #[test]
    fn rows_of_the_table_scaled() {
        let device = device();
        for (vocabulary, width, rows) in [(5, 8usize, 1), (11, 72, 7), (3, 1032, 4), (4, 13, 3)] {
            let stride = width.next_multiple_of(8);
            let table = to_bf16(&random(1, vocabulary * stride));
            let tokens: Vec<u32> = (0..rows).map(|r| (r * 7 % vocabulary) as u32).collect();
            let on_device = Buffer::from_slice(&device, &table, "table").unwrap();
            let of_rows = Buffer::from_slice(&device, &tokens, "tokens").unwrap();
            let out = Buffer::new(&device, rows * width, "out").unwrap();
            let shape = (rows, width, stride);
            embed(&*device, &on_device, of_rows.slice(), 1.5, shape, &out).unwrap();
            let expected: Vec<f32> = tokens
                .iter()
                .flat_map(|&t| &table[t as usize * stride..][..width])
                .map(|x| x.to_f32() * 1.5)
                .collect();
            assert_eq!(out.read(0, rows * width).unwrap(), expected);
        }
    }
}
