//! The CUDA backend: the kernels of `kernels/`, on a GPU or emulated on the CPU.

pub mod device;
pub mod emulated;
pub mod images;
