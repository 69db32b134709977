//! Counter-based random numbers: a number is a pure function of its key, so a candidate draws the
//! same ones whatever else is in the batch, on the CPU and on a GPU alike.
