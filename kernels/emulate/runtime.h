// How a block of threads runs on one CPU thread.
//
// Each CUDA thread is a fiber. It runs until it must wait for others (barrier, warp operation) or ends; the scheduler
// then takes the next that can run, in turn or at random. So between two barriers the threads run one after another,
// and whatever order the seed picks is one that hardware could take.
//
// What is checked while it runs:
//   global memory   an address is (allocation << 40 | offset), not a pointer: every access is held against its
//                   allocation's size, and freed memory is known as such
//   shared memory   an address is an offset into the block's dynamic shared memory; each access is held against its
//                   size. A word remembers who touched it last and when: two threads, one of them writing, without a
//                   barrier between, is a race
//   alignment       of every access, to the size of what is accessed
//   barriers        all threads must come to the same one
//   uninitialised   fresh memory of either kind is 0xFF in every byte: NaN as float32, bfloat16 and float16
//   early access    a kernel may start while those before it run (programmatic dependent launch). So each thread must
//                   wait for them (wait_for_predecessor); before that it must write nothing, and read nothing that a
//                   kernel has written since the host last waited for all of them
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "types.h"

namespace emulate {

constexpr unsigned WARP = 32;
constexpr unsigned MAX_THREADS = 1024;
// The most dynamic shared memory that a block of an H100 can ask for.
constexpr unsigned MAX_SHARED_BYTES = 227 * 1024;

// What Rust passes with a launch.
struct Launch {
    unsigned grid[3];
    unsigned block[3];
    unsigned shared_bytes;
    unsigned find_races;    // 0 or 1
    std::uint64_t order_seed;  // 0: threads in turn; else the seed of a random order
    unsigned era;              // of the device: how often the host has waited for it, from 1 on
};

struct Place {
    const char* what;
    const char* file;
    int line;
};

// A copy that cp.async has begun.
struct AsyncCopy {
    std::uint32_t to;
    const char* from;
    std::uint16_t bytes;   // that are copied; the rest up to `width` becomes zero
    std::uint16_t width;
    std::uint32_t group;
};

// A product of a warpgroup that one of its threads has begun.
struct AsyncProduct {
    float* d;
    std::uint64_t a, b;
    bool first;
    std::uint32_t group;
};

struct Thread {
    void* stack_pointer = nullptr;
    dim3 index;
    unsigned number = 0, lane = 0, warp = 0;
    bool exited = false;
    bool waiting = false;
    bool after_predecessor = false;  // it has waited for the kernels before
    Place place{};  // where it waits
    int barrier_value = 0;
    std::uint32_t open_group = 0;  // of cp.async
    std::vector<AsyncCopy> copies;
    std::uint32_t open_product_group = 0;  // of wgmma
    std::vector<AsyncProduct> products;
};

// What a warp operation does once all its lanes have come. `lanes[i]` is what lane i brought, for i in `mask`.
using WarpOperation = void (*)(void* const* lanes, std::uint32_t mask);

// The block that this CPU thread runs, and its thread that is at work.
struct Block {
    dim3 grid_size, block_size, index;
    unsigned threads = 0, shared_bytes = 0, era = 0;
    bool find_races = false;
    char* shared = nullptr;
    Thread* current = nullptr;
};
extern thread_local Block block;

// Reports what the kernel did wrong, and ends the block.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

// `combine`: what the barrier's value becomes from those of all threads.
enum class Combine { none, count, all, any };
int block_barrier(Combine combine, int value, Place place);
void warp_operation(std::uint32_t mask, void* brought, WarpOperation operation, Place place);
// __syncwarp: the only warp operation that orders accesses to memory.
void warp_barrier(std::uint32_t mask, Place place);

struct Allocation {
    char* base;
    std::uint64_t bytes;
    unsigned written;  // the era in which a kernel wrote to it last; blocks that run in parallel set it
};
constexpr unsigned OFFSET_BITS = 40;
constexpr std::uint64_t MAX_ALLOCATIONS = 1 << 20;
extern Allocation* const allocations;

[[noreturn]] void fail_global(std::uint64_t address, std::size_t bytes, std::size_t alignment);
[[noreturn]] void fail_shared(std::uint32_t offset, std::size_t bytes, std::size_t alignment);

[[noreturn]] void fail_early(bool may_write);

// Where the bytes of device memory are in this process. `may_write`: the access is not through a pointer to const.
inline char* global_bytes(std::uint64_t address, std::size_t bytes, std::size_t alignment, bool may_write) {
    const std::uint64_t id = address >> OFFSET_BITS, offset = address & ((std::uint64_t{1} << OFFSET_BITS) - 1);
    if (id >= MAX_ALLOCATIONS || offset + bytes > allocations[id].bytes || offset % alignment != 0) [[unlikely]]
        fail_global(address, bytes, alignment);
    Allocation& allocation = allocations[id];
    const std::atomic_ref written(allocation.written);
    const bool is_written = written.load(std::memory_order_relaxed) == block.era;
    if (!block.current->after_predecessor && (may_write || is_written)) [[unlikely]] fail_early(may_write);
    if (may_write && !is_written) written.store(block.era, std::memory_order_relaxed);
    return allocation.base + offset;
}

// griddepcontrol.wait
inline void wait_for_predecessor() { block.current->after_predecessor = true; }

enum class Access { read, write, atomic };
void track_shared(std::uint32_t offset, std::size_t bytes, Access access, const Thread& thread);

inline char* shared_bytes(std::uint32_t offset, std::size_t bytes, std::size_t alignment, Access access) {
    if (offset + bytes > block.shared_bytes || offset % alignment != 0) [[unlikely]]
        fail_shared(offset, bytes, alignment);
    if (block.find_races) track_shared(offset, bytes, access, *block.current);
    return block.shared + offset;
}

void async_copy(std::uint32_t to, std::uint64_t from, unsigned bytes, unsigned width);
void async_commit();
// Completes all but the `pending` latest groups.
void async_wait(unsigned pending);

// ldmatrix: `count` 8×8 matrices of 16-bit numbers into one register each.
void load_matrices(std::uint32_t* registers, std::uint32_t row_address, unsigned count, bool transpose);
// mma.m16n8k16: D += A · B on the documented register layouts.
void mma_bf16(float* d, const std::uint32_t* a, const std::uint32_t* b);

// Hopper's barriers, tile copies and products of a warpgroup (hopper.cuh). Their accesses to shared memory are not held
// against those of threads for races; instead everything happens as late as it may: a tile is poison from the begin of its
// copy until nothing else can go on, and products read their tiles when they are waited for. So who reads a tile too
// early, or gives it back too early, computes NaN.
void mbarrier_init(std::uint32_t barrier, unsigned arrivals);
// `bytes` of copies are expected beside the arrival.
void mbarrier_arrive(std::uint32_t barrier, unsigned bytes);
void mbarrier_wait(std::uint32_t barrier, unsigned parity, Place place);
void copy_tile(std::uint32_t to, std::uint64_t map, unsigned column, unsigned row, std::uint32_t barrier);
// D[64][128] (+)= A · Bᵀ, both K-major with a swizzle of 128 bytes, by their descriptors.
void wgmma_bf16(float* d, std::uint64_t a, std::uint64_t b, bool first);
void wgmma_commit();
void wgmma_wait(unsigned pending, Place place);

// A kernel as the launcher sees it: `arguments` are as for cuLaunchKernel.
struct Kernel {
    const char* name;
    void (*prepare)(void* const* arguments, void* frame);
    void (*run)(const void* frame);
    const Kernel* next;
};
struct Registration {
    explicit Registration(Kernel& kernel);
};

}  // namespace emulate
