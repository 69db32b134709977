//! What the forward pass needs of a device.
