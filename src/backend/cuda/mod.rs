//! The CUDA backend: the kernels of `kernels/`, on a GPU or emulated on the CPU.
//!
//! Each file of `kernels/` has a module of its name here: how it is launched, and its test against
//! float64.

pub mod attention;
pub mod device;
pub mod embed;
pub mod emulated;
pub mod images;
pub mod matmul_skinny;
pub mod norm;
pub mod rope_append;
#[cfg(test)]
mod testing;
