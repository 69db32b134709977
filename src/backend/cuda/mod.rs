//! The CUDA backend: the kernels of `kernels/`, on a GPU or emulated on the CPU.
//!
//! Each file of `kernels/` has a module of its name here: how it is launched, and its test against
//! float64. [`Cuda`] makes the forward pass's operations of them.

pub mod attention;
#[cfg(test)]
mod attention_cases;
pub mod attention_merge;
pub mod attention_plan;
pub mod attention_prefill;
pub mod attention_prefix;
pub mod attention_suffix;
mod backend;
#[cfg(test)]
mod compiled_tests;
pub mod copy_rows;
pub mod device;
pub mod embed;
pub mod emulated;
pub mod gather_rank;
pub mod gpu;
mod graphs;
pub mod images;
mod kv_cache;
pub mod limits;
pub mod matmul;
pub mod matmul_skinny;
pub mod matmul_tiled;
pub mod matmul_wgmma;
mod matrix;
pub mod norm;
mod plan;
mod products;
mod random_weights;
mod rank;
pub mod rope_append;
pub mod sample;
mod staging;
mod step_memory;
#[cfg(test)]
mod testing;
pub mod token_logprobs;
pub mod weights;

pub use backend::{Cuda, Rows};
pub use graphs::{GraphUse, MAX_GRAPHS};
pub use kv_cache::KvCache;
pub use matrix::Matrix;
pub use plan::Plan;
