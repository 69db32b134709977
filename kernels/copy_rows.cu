// to[moves[i].y] = from[moves[i].x]: rows of float32, no two moves to one row.
//
//   from, to  [.., width]
//   moves     [blocks]
//
// A block is one row. Bound by memory: 8 bytes a number.

#include "device.cuh"

constexpr unsigned THREADS = 256;

extern "C" __global__ void __launch_bounds__(THREADS)
    copy_rows(Global<const float> from, Global<const uint2> moves, unsigned width, Global<float> to) {
    launch_dependents();
    wait_for_predecessor();
    const uint2 move = moves[blockIdx.x];
    const Global<const float> source = from + size_t{move.x} * width;
    const Global<float> target = to + size_t{move.y} * width;
    for (unsigned i = threadIdx.x; i < width; i += THREADS) target[i] = source[i];
}
KERNEL(copy_rows)
