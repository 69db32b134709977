//! The CPU backend: rayon threads, SIMD chosen at run time.

pub mod sample;
pub mod softmax;
