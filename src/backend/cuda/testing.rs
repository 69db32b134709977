//! What the tests of kernels share: the device, random numbers, rounding.

use super::device::Device;
use super::emulated::{Checks, Emulated};
use crate::backend::random::uniform;
use half::bf16;
use std::sync::Arc;

/// The emulation with every check on, its threads in a random order.
pub fn device() -> Arc<dyn Device> {
    Arc::new(Emulated::new(Checks {
        races: true,
        order_seed: Some(1),
        ..Checks::default()
    }))
}

/// Numbers in [-1, 1).
pub fn random(seed: u64, len: usize) -> Vec<f32> {
    (0..len)
        .map(|i| 2.0 * uniform(seed, (i >> 32) as u32, i as u32) - 1.0)
        .collect()
}

pub fn to_bf16(values: &[f32]) -> Vec<bf16> {
    values.iter().map(|&x| bf16::from_f32(x)).collect()
}

/// Asserts that each result is within `bound(expected)` of what float64 says.
#[track_caller]
pub fn assert_within(got: &[f32], expected: &[f64], bound: impl Fn(f64) -> f64) {
    assert_eq!(got.len(), expected.len());
    for (i, (&got, &expected)) in got.iter().zip(expected).enumerate() {
        let error = (f64::from(got) - expected).abs();
        // Not `error > bound`: NaN must not pass.
        assert!(
            error <= bound(expected),
            "number {i}: {got} instead of {expected}"
        );
    }
}
