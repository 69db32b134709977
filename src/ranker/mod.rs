//! Rankers of fewer than 0.5M parameters: their file and their inference.
