//! What the forward pass needs of a device.

pub mod cpu;
pub mod random;
pub mod sampling;
