//! What the forward pass needs of a device.

pub mod cpu;
pub mod random;
pub mod sampling;

/// Tokens in a page of the KV cache.
pub const PAGE_LEN: usize = 16;
