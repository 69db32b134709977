//! The CPU backend: rayon threads, SIMD chosen at run time.
