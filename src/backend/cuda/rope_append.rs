//! `kernels/rope_append.cu`

use super::device::{Address, Buffer, Device, DeviceError, Launch, Slice};
use crate::arguments;
use crate::backend::{KvShape, PAGE_LEN};

const WARPS: usize = 4;

/// Numbers between two tokens of a head in a page (`kernels/pages.cuh`): `head_dim`, rounded up to
/// what a tensor core takes.
pub fn head_stride(shape: KvShape) -> usize {
    shape.head_dim.next_multiple_of(16)
}

/// Numbers of a layer in a page, keys and values.
pub fn layer_len(shape: KvShape) -> usize {
    shape.kv_heads * 2 * PAGE_LEN * head_stride(shape)
}

/// Where the rows of a batch stand.
pub struct Rows<'a> {
    pub rows: usize,
    /// [positions][cos × pairs | sin × pairs]
    pub angles: &'a Buffer<f32>,
    pub pairs: usize,
    pub positions: Slice<u32>,
    /// The page of each row's token; 0: the row is left alone.
    pub pages: Slice<Address>,
    /// The token's place in its page.
    pub slots: Slice<u32>,
}

/// Normalises (where asked) and rotates queries in place; appends keys and values to their pages.
/// `qkv`: [rows, (heads + 2 · kv_heads) · head_dim].
pub fn rope_append(
    device: &dyn Device,
    qkv: &Buffer<f32>,
    rows: &Rows,
    (query_norm, key_norm): (Option<&Buffer<f32>>, Option<&Buffer<f32>>),
    epsilon: f32,
    shape: KvShape,
    layer: usize,
) -> Result<(), DeviceError> {
    let heads = shape.heads + 2 * shape.kv_heads;
    let mut arguments = arguments![
        qkv,
        query_norm,
        key_norm,
        epsilon,
        rows.angles,
        rows.positions,
        rows.pages,
        rows.slots,
        shape.heads as u32,
        shape.kv_heads as u32,
        shape.head_dim as u32,
        head_stride(shape) as u32,
        rows.pairs as u32,
        (layer * layer_len(shape)) as u64,
    ];
    let mut launch = Launch::blocks(rows.rows, 32 * WARPS as u32);
    launch.grid[1] = heads.div_ceil(WARPS) as u32;
    // SAFETY: as the kernel's head says.
    unsafe { device.launch("rope_append", launch, &mut arguments) }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{assert_within, device, random};
    use super::*;
    use half::bf16;

    fn check(shape: KvShape, pairs: usize, normed: bool) {
        let device = device();
        let KvShape {
            layers,
            heads,
            kv_heads,
            head_dim,
        } = shape;
        let (rows, positions, layer) = (5, 40, layers - 1);
        let width = (heads + 2 * kv_heads) * head_dim;
        // One row more, which has no page.
        let qkv = random(1, (rows + 1) * width);
        let angles = random(2, positions * 2 * pairs);
        let norms = [random(3, head_dim), random(4, head_dim)];
        let at: Vec<u32> = (0..=rows).map(|r| (r * 17 % positions) as u32).collect();
        let slots: Vec<u32> = (0..=rows).map(|r| (r * 5 % PAGE_LEN) as u32).collect();
        let pages: Vec<Buffer<bf16>> = (0..2)
            .map(|_| Buffer::new(&device, layers * layer_len(shape), "page").unwrap())
            .collect();
        let of_rows = (0..rows).map(|r| pages[r % 2].address());
        let addresses: Vec<Address> = of_rows.chain([0]).collect();
        let at_on_device = Buffer::from_slice(&device, &at, "positions").unwrap();
        let addresses = Buffer::from_slice(&device, &addresses, "pages").unwrap();
        let slots_on_device = Buffer::from_slice(&device, &slots, "slots").unwrap();

        let buffer = |v: &[f32]| Buffer::from_slice(&device, v, "in").unwrap();
        let norm_buffers = norms.each_ref().map(|v| buffer(v));
        let on_device = buffer(&qkv);
        rope_append(
            &*device,
            &on_device,
            &Rows {
                rows: rows + 1,
                angles: &buffer(&angles),
                pairs,
                positions: at_on_device.slice(),
                pages: addresses.slice(),
                slots: slots_on_device.slice(),
            },
            match normed {
                true => (Some(&norm_buffers[0]), Some(&norm_buffers[1])),
                false => (None, None),
            },
            1e-6,
            shape,
            layer,
        )
        .unwrap();

        let got = on_device.read(0, (rows + 1) * width).unwrap();
        assert_eq!(got[rows * width..], qkv[rows * width..]);
        for row in 0..rows {
            let head_in_f64 = |head: usize| {
                let x = &qkv[row * width + head * head_dim..][..head_dim];
                let mut x: Vec<f64> = x.iter().map(|&x| f64::from(x)).collect();
                if head >= heads + kv_heads {
                    return x;
                }
                if normed {
                    let square = x.iter().map(|x| x * x).sum::<f64>() / head_dim as f64;
                    let weight = &norms[usize::from(head >= heads)];
                    for (x, &w) in x.iter_mut().zip(weight) {
                        *x *= f64::from(w) / (square + 1e-6).sqrt();
                    }
                }
                let (cos, sin) =
                    angles[at[row] as usize * 2 * pairs..][..2 * pairs].split_at(pairs);
                for i in 0..pairs {
                    let (a, b) = (x[i], x[i + pairs]);
                    let (cos, sin) = (f64::from(cos[i]), f64::from(sin[i]));
                    x[i] = a * cos - b * sin;
                    x[i + pairs] = b * cos + a * sin;
                }
                x
            };
            for head in 0..heads {
                let got = &got[row * width + head * head_dim..][..head_dim];
                // Float32 throughout.
                assert_within(got, &head_in_f64(head), |e| 1e-6 * (1.0 + e.abs()));
            }
            let stride = head_stride(shape);
            for (part, first) in [(0, heads), (1, heads + kv_heads)] {
                for kv_head in 0..kv_heads {
                    let at = layer * layer_len(shape)
                        + ((kv_head * 2 + part) * PAGE_LEN + slots[row] as usize) * stride;
                    let got = pages[row % 2].read(at, stride).unwrap();
                    let got: Vec<f32> = got.iter().map(|x| x.to_f32()).collect();
                    // One rounding to bfloat16.
                    assert_within(&got[..head_dim], &head_in_f64(first + kv_head), |e| {
                        e.abs() / 256.0 + 1e-6
                    });
                    assert!(got[head_dim..].iter().all(|&x| x == 0.0));
                }
            }
        }
    }

    #[test]
    fn agrees_with_float64() {
        for (heads, kv_heads, head_dim, pairs, normed) in [
            (1, 1, 2, 1, false),
            (3, 1, 64, 32, false),
            (4, 2, 80, 40, true),
            (6, 3, 20, 6, true),
            (8, 1, 256, 128, false),
        ] {
            let shape = KvShape {
                layers: 2,
                heads,
                kv_heads,
                head_dim,
            };
            check(shape, pairs, normed);
        }
    }
}
