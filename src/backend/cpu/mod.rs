//! The CPU backend: rayon threads, SIMD chosen at run time.

mod filter;
pub mod sample;
pub mod softmax;
