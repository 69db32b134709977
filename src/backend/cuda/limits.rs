//! What a GPU can do at most: bytes a second of a copy, operations a second of `mma.sync`
//! (`kernels/mma_peak.cu`). Times of kernels are held against these, measured in the same run.

use super::device::{Buffer, Device, DeviceError, Launch};
use crate::arguments;
use std::sync::Arc;
use std::time::Instant;

const THREADS: usize = 256;
/// Of a product of one warp, as the kernel does them.
const OPERATIONS: usize = 16 * 8 * 16 * 2;
const SUMS: usize = 8;

/// How much is measured.
#[derive(Clone, Copy, Debug)]
pub struct Effort {
    /// Of each of the two buffers that are copied.
    pub copied_bytes: usize,
    /// Rounds of the products' kernel.
    pub rounds: u32,
    pub repeats: usize,
}

impl Effort {
    /// Far beyond any cache, and some hundredths of a second.
    pub const GPU: Effort = Effort {
        copied_bytes: 1 << 30,
        rounds: 1 << 14,
        repeats: 10,
    };
    /// So little that the emulation has done it in no time; what comes out says nothing.
    pub const EMULATED: Effort = Effort {
        copied_bytes: 1 << 16,
        rounds: 2,
        repeats: 1,
    };
}

#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Read plus written, a second.
    pub copy_bandwidth: f64,
    /// Floating-point operations of `mma.sync` on bfloat16, a second.
    pub mma_peak: f64,
}

/// Seconds of one of `repeats` calls that follow each other: the best of three rounds, after one that
/// does not count.
pub fn seconds(
    device: &dyn Device,
    repeats: usize,
    mut call: impl FnMut() -> Result<(), DeviceError>,
) -> Result<f64, DeviceError> {
    let mut best = f64::INFINITY;
    for round in 0..4 {
        device.synchronize()?;
        let started = Instant::now();
        for _ in 0..repeats {
            call()?;
        }
        device.synchronize()?;
        if round > 0 {
            best = best.min(started.elapsed().as_secs_f64() / repeats as f64);
        }
    }
    Ok(best)
}

pub fn measure(device: &Arc<dyn Device>, effort: Effort) -> Result<Limits, DeviceError> {
    let Effort {
        copied_bytes,
        rounds,
        repeats,
    } = effort;
    let buffer = || Buffer::<u32>::new(device, copied_bytes / 4, "measuring copies");
    let (mut from, to) = (buffer()?, buffer()?);
    from.zero()?;
    let copy = seconds(&**device, repeats, || {
        device.copy(from.address(), to.address(), copied_bytes)
    })?;
    let blocks = device.multiprocessors() * 4;
    let out = Buffer::<f32>::new(device, blocks * THREADS, "measuring products")?;
    let products = seconds(&**device, repeats, || {
        let launch = Launch::blocks(blocks, THREADS as u32);
        // SAFETY: as the kernel's head says.
        unsafe { device.launch("mma_peak", launch, &mut arguments![rounds, &out]) }
    })?;
    let operations = blocks * THREADS / 32 * SUMS * OPERATIONS * rounds as usize;
    Ok(Limits {
        copy_bandwidth: 2.0 * copied_bytes as f64 / copy,
        mma_peak: operations as f64 / products,
    })
}

#[cfg(test)]
mod tests {
    use super::super::testing::device;
    use super::*;

    #[test]
    fn both_limits_are_measured() {
        let limits = measure(&device(), Effort::EMULATED).unwrap();
        let rates = [limits.copy_bandwidth, limits.mma_peak];
        assert!(rates.iter().all(|rate| rate.is_finite() && *rate > 0.0));
    }
}
