#include "runtime.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <mutex>
#include <new>
#include <utility>

#include "fiber.h"

namespace emulate {

thread_local Block block;

namespace {

constexpr unsigned WARPGROUP = 4 * WARP;
constexpr std::size_t STACK_BYTES = 64 * 1024;
constexpr std::uint64_t CANARY = 0x0BAD57AC0BAD57ACull;
constexpr std::size_t FRAME_BYTES = 4096;  // the most that a GPU takes as arguments

// Lanes on their way to a warp operation.
struct Meeting {
    std::uint32_t mask = 0, arrived = 0;  // mask 0: free
    WarpOperation operation = nullptr;
    Place place{};
    void* brought[WARP] = {};
};

// Who touched a word of shared memory last. An epoch is (barriers of the block, barriers of the warp).
struct Shadow {
    std::uint32_t write_epoch, read_epoch;
    std::uint16_t write_warp_epoch, read_warp_epoch;
    std::uint16_t writer, reader;
    std::uint8_t write_mask, read_mask;  // which of its four bytes
    bool atomic;
};
// Instead of a thread's number: several threads of a warp (MANY + warp), or of several warps.
constexpr std::uint16_t MANY = 0x8000, ALL = 0xFFFF;

// A barrier that counts arrivals and bytes.
struct ByteBarrier {
    std::uint32_t offset;
    unsigned arrivals;  // that end a phase
    unsigned missing;   // of this phase
    std::int64_t bytes;  // expected and not yet there
    unsigned phase;
    std::vector<Thread*> waiting;
};

// A tile on its way.
struct TileCopy {
    std::uint32_t to;
    std::uint32_t barrier;
    const char* from;  // the matrix's first number
    std::uint64_t columns, rows, stride, box_columns, box_rows;
    unsigned column, row;
};

struct Random {
    std::uint64_t state;
    std::uint64_t next() {  // splitmix64
        std::uint64_t z = (state += 0x9E3779B97F4A7C15ull);
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
        z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
        return z ^ (z >> 31);
    }
};

// What a CPU thread keeps from block to block.
struct Worker {
    char* stacks = nullptr;
    std::vector<Thread> threads = std::vector<Thread>(MAX_THREADS);
    std::vector<std::uint16_t> ready;
    std::vector<Meeting> meetings = std::vector<Meeting>(MAX_THREADS);  // 32 a warp
    std::vector<Shadow> shadow;
    char* shared = nullptr;
    void* scheduler = nullptr;
    Random random{0};
    bool shuffle = false;

    const Kernel* kernel = nullptr;
    alignas(16) char frame[FRAME_BYTES] = {};
    unsigned exited = 0, arrived = 0;
    int combined = 0;
    Place barrier{};
    std::uint32_t epoch = 0;  // never goes back, so that the shadow need not be cleared for each block
    std::uint16_t warp_epoch[WARP] = {};
    std::vector<ByteBarrier> byte_barriers;
    std::vector<TileCopy> tile_copies;
    unsigned warpgroup_arrived[MAX_THREADS / WARPGROUP] = {};
    bool failed = false;
    char error[1024] = {};

    Worker() {
        const std::size_t bytes = MAX_THREADS * STACK_BYTES;
        void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (memory == MAP_FAILED) throw std::bad_alloc();
        stacks = static_cast<char*>(memory);
        shared = static_cast<char*>(std::aligned_alloc(256, MAX_SHARED_BYTES));
        if (shared == nullptr) throw std::bad_alloc();
    }
    ~Worker() {
        munmap(stacks, MAX_THREADS * STACK_BYTES);
        std::free(shared);
    }
    Worker(const Worker&) = delete;
    Worker& operator=(const Worker&) = delete;

    std::uint64_t& canary(unsigned thread) {
        return *reinterpret_cast<std::uint64_t*>(stacks + thread * STACK_BYTES);
    }
};

Worker& worker() {
    static thread_local Worker instance;
    return instance;
}

void yield() {
    Worker& w = worker();
    podium_emulate_switch(&block.current->stack_pointer, w.scheduler);
}

void make_ready(Worker& w, Thread& thread) {
    thread.waiting = false;
    w.ready.push_back(static_cast<std::uint16_t>(thread.number));
}

void wait_at(Place place) {
    block.current->waiting = true;
    block.current->place = place;
    yield();
}

void fiber_main() {
    Worker& w = worker();
    w.kernel->run(w.frame);
    if (!block.current->after_predecessor) fail("it ends without having waited for the kernels before it");
    block.current->exited = true;
    ++w.exited;
    yield();
    std::abort();  // an exited thread is never taken again
}

bool same(const Place& a, const Place& b) { return a.line == b.line && std::strcmp(a.file, b.file) == 0; }

const char* file_name(const char* path) {
    const char* slash = path == nullptr ? nullptr : std::strrchr(path, '/');
    return slash == nullptr ? (path == nullptr ? "?" : path) : slash + 1;
}

// No thread can run and some have not ended: says where they stand.
void report_divergence(Worker& w) {
    std::size_t length = static_cast<std::size_t>(
        std::snprintf(w.error, sizeof w.error, "%s, block (%u, %u, %u): divergent barrier: ", w.kernel->name,
                      block.index.x, block.index.y, block.index.z));
    struct Standing {
        Place place;
        unsigned threads, example;
    };
    std::vector<Standing> standing;
    for (unsigned i = 0; i < block.threads; ++i) {
        const Thread& t = w.threads[i];
        if (t.exited) continue;
        auto at = std::find_if(standing.begin(), standing.end(), [&](const Standing& s) { return same(s.place, t.place); });
        if (at == standing.end())
            standing.push_back({t.place, 1, t.number});
        else
            ++at->threads;
    }
    for (const Standing& s : standing) {
        if (length >= sizeof w.error) break;
        length += static_cast<std::size_t>(std::snprintf(w.error + length, sizeof w.error - length,
                                                         "%u threads (%u is one) wait at %s (%s:%d), ", s.threads, s.example,
                                                         s.place.what, file_name(s.place.file), s.place.line));
    }
    if (length < sizeof w.error)
        std::snprintf(w.error + length, sizeof w.error - length, "%u of %u have ended", w.exited, block.threads);
}

}  // namespace

void fail(const char* format, ...) {
    Worker& w = worker();
    const Thread& t = *block.current;
    const int length = std::snprintf(w.error, sizeof w.error, "%s, block (%u, %u, %u), thread %u: ", w.kernel->name,
                                     block.index.x, block.index.y, block.index.z, t.number);
    va_list values;
    va_start(values, format);
    std::vsnprintf(w.error + length, sizeof w.error - static_cast<std::size_t>(length), format, values);
    va_end(values);
    w.failed = true;
    yield();
    std::abort();  // a failed block is never taken up again
}

void fail_global(std::uint64_t address, std::size_t bytes, std::size_t alignment) {
    const std::uint64_t id = address >> OFFSET_BITS;
    const auto offset = static_cast<unsigned long long>(address & ((std::uint64_t{1} << OFFSET_BITS) - 1));
    const unsigned long long before = (1ull << OFFSET_BITS) - offset;
    if (before < (1ull << 32) && id + 1 < MAX_ALLOCATIONS && allocations[id + 1].base != nullptr)
        fail("global memory out of bounds: %zu bytes at %llu before an allocation of %llu", bytes, before,
             static_cast<unsigned long long>(allocations[id + 1].bytes));
    if (id >= MAX_ALLOCATIONS || allocations[id].base == nullptr)
        fail("access to global memory that was never allocated, or is freed (address 0x%llx)",
             static_cast<unsigned long long>(address));
    if (offset % alignment != 0)
        fail("misaligned access to global memory: %zu bytes at offset %llu", bytes, offset);
    fail("global memory out of bounds: %zu bytes at offset %llu of an allocation of %llu", bytes, offset,
         static_cast<unsigned long long>(allocations[id].bytes));
}

void fail_early(bool may_write) {
    if (may_write) fail("early access: it may write global memory before it waits for the kernels before it");
    fail("early access: it reads what a kernel has written before it waits for the kernels before it");
}

void fail_shared(std::uint32_t offset, std::size_t bytes, std::size_t alignment) {
    if (offset % alignment != 0) fail("misaligned access to shared memory: %zu bytes at offset %u", bytes, offset);
    fail("shared memory out of bounds: %zu bytes at offset %d of %u", bytes, static_cast<int>(offset),
         block.shared_bytes);
}

int block_barrier(Combine combine, int value, Place place) {
    Worker& w = worker();
    Thread& self = *block.current;
    if (w.arrived == 0) {
        w.barrier = place;
        w.combined = combine == Combine::all ? 1 : 0;
    } else if (!same(w.barrier, place)) {
        fail("divergent barrier: it is at %s (%s:%d) while others wait at %s (%s:%d)", place.what, file_name(place.file),
             place.line, w.barrier.what, file_name(w.barrier.file), w.barrier.line);
    }
    switch (combine) {
        case Combine::none: break;
        case Combine::count: w.combined += value != 0; break;
        case Combine::all: w.combined = w.combined && value; break;
        case Combine::any: w.combined = w.combined || value; break;
    }
    if (++w.arrived < block.threads) {
        wait_at(place);
        return self.barrier_value;
    }
    w.arrived = 0;
    ++w.epoch;
    for (unsigned i = 0; i < block.threads; ++i) {
        Thread& other = w.threads[i];
        other.barrier_value = w.combined;
        if (&other != &self) make_ready(w, other);
    }
    return w.combined;
}

void warp_operation(std::uint32_t mask, void* brought, WarpOperation operation, Place place) {
    Worker& w = worker();
    Thread& self = *block.current;
    // Lanes that the block does not have count as there, as on the hardware.
    const unsigned lanes = std::min(WARP, block.threads - self.warp * WARP);
    if (lanes < WARP) mask &= (1u << lanes) - 1;
    const std::uint32_t bit = 1u << self.lane;
    if ((mask & bit) == 0) fail("%s (%s:%d) with a mask that lacks the calling lane", place.what, file_name(place.file), place.line);
    Meeting* meeting = nullptr;
    for (unsigned i = 0; i < WARP; ++i) {
        Meeting& candidate = w.meetings[self.warp * WARP + i];
        if (candidate.mask == mask) {
            meeting = &candidate;
            break;
        }
        if (candidate.mask == 0 && meeting == nullptr) meeting = &candidate;
        if (candidate.mask == 0) break;
    }
    if (meeting->mask == 0) {
        meeting->mask = mask;
        meeting->arrived = 0;
        meeting->operation = operation;
        meeting->place = place;
    } else if (meeting->operation != operation) {
        fail("divergent warp: it is at %s (%s:%d) while other lanes wait at %s (%s:%d)", place.what,
             file_name(place.file), place.line, meeting->place.what, file_name(meeting->place.file), meeting->place.line);
    }
    meeting->arrived |= bit;
    meeting->brought[self.lane] = brought;
    if (meeting->arrived != mask) return wait_at(place);
    operation(meeting->brought, mask);
    for (unsigned lane = 0; lane < WARP; ++lane)
        if ((mask & ~bit) >> lane & 1) make_ready(w, w.threads[self.warp * WARP + lane]);
    // Free places stay behind the taken ones, so that the search above can stop at the first.
    unsigned last = WARP - 1;
    Meeting* of_warp = &w.meetings[self.warp * WARP];
    while (of_warp[last].mask == 0) --last;
    if (&of_warp[last] != meeting) *meeting = of_warp[last];
    of_warp[last].mask = 0;
}

void warp_barrier(std::uint32_t mask, Place place) {
    warp_operation(mask, nullptr, [](void* const*, std::uint32_t arrived) {
        const unsigned warp = block.current->warp, lanes = std::min(WARP, block.threads - warp * WARP);
        // A barrier of some lanes orders theirs alone; that it does is not tracked.
        if (arrived == (lanes == WARP ? ~0u : (1u << lanes) - 1)) ++worker().warp_epoch[warp];
    }, place);
}

void track_shared(std::uint32_t offset, std::size_t bytes, Access access, const Thread& thread) {
    Worker& w = worker();
    const auto self = static_cast<std::uint16_t>(thread.number);
    const auto warp = static_cast<std::uint16_t>(thread.warp);
    const std::uint16_t warp_epoch = w.warp_epoch[warp];
    // Of the thread, or threads, that `who` and the epochs tell: did they touch it without a barrier since?
    const auto concurrent = [&](std::uint16_t who, std::uint32_t epoch, std::uint16_t of_warp_epoch) {
        if (epoch != w.epoch || who == self) return false;
        if (who == ALL) return true;
        const unsigned other_warp = who & MANY ? who & ~MANY : who / WARP;
        return other_warp != warp || of_warp_epoch == warp_epoch;
    };
    // Those that a barrier of the warp lies behind are forgotten: who is ordered after this thread is after them too.
    const auto join = [&](std::uint16_t who, std::uint32_t epoch, std::uint16_t of_warp_epoch) -> std::uint16_t {
        if (!concurrent(who, epoch, of_warp_epoch)) return self;
        if (who == ALL) return ALL;
        const unsigned other_warp = who & MANY ? who & ~MANY : who / WARP;
        return other_warp == warp ? static_cast<std::uint16_t>(MANY | warp) : ALL;
    };
    for (std::uint32_t word = offset / 4; word <= (offset + bytes - 1) / 4; ++word) {
        const std::uint32_t low = std::max(word * 4, offset) % 4;
        const std::uint32_t high = std::min<std::uint32_t>(word * 4 + 3, offset + static_cast<std::uint32_t>(bytes) - 1) % 4;
        const auto mask = static_cast<std::uint8_t>((2u << high) - (1u << low));
        Shadow& s = w.shadow[word];
        // Several threads that wrote a word in parts: an access to all of it meets another's part; of one to a part it
        // is not known whose it was.
        const auto meets = [&](std::uint16_t who, std::uint8_t others) {
            return who & MANY ? mask == 0xF || others != 0xF : (mask & others) != 0;
        };
        const bool written = concurrent(s.writer, s.write_epoch, s.write_warp_epoch) &&
                             !(access == Access::atomic && s.atomic) &&
                             (s.writer & MANY ? mask == 0xF : (mask & s.write_mask) != 0);
        const bool read = access != Access::read && concurrent(s.reader, s.read_epoch, s.read_warp_epoch) &&
                          (mask & s.read_mask) != 0 && meets(s.reader, s.read_mask);
        if (written || read) {
            const std::uint16_t who = written ? s.writer : s.reader;
            char other[32];
            if (who & MANY)
                std::snprintf(other, sizeof other, "several threads");
            else
                std::snprintf(other, sizeof other, "thread %u", who);
            fail("race in shared memory at offset %u: it %s what %s %s, and no barrier lies between", offset,
                 access == Access::read ? "reads" : "writes", other, written ? "wrote" : "read");
        }
        if (access == Access::read) {
            const std::uint16_t reader = join(s.reader, s.read_epoch, s.read_warp_epoch);
            const bool anew = s.read_epoch != w.epoch || (reader == self && s.reader != self);
            s.read_mask = static_cast<std::uint8_t>(anew ? mask : s.read_mask | mask);
            s.reader = reader;
            s.read_epoch = w.epoch;
            s.read_warp_epoch = warp_epoch;
        } else {
            // A write after a warp's barrier begins anew within the warp.
            const bool alone = s.write_epoch != w.epoch || s.writer == self ||
                               !concurrent(s.writer, s.write_epoch, s.write_warp_epoch);
            s.write_mask = static_cast<std::uint8_t>(s.write_epoch != w.epoch || (alone && s.writer != self) ? mask : s.write_mask | mask);
            s.writer = alone ? self : join(s.writer, s.write_epoch, s.write_warp_epoch);
            s.write_epoch = w.epoch;
            s.write_warp_epoch = warp_epoch;
            s.atomic = access == Access::atomic;
        }
    }
}

// Barriers that count bytes, and the copies that they count

namespace {

ByteBarrier& byte_barrier(std::uint32_t offset) {
    for (ByteBarrier& barrier : worker().byte_barriers)
        if (barrier.offset == offset) return barrier;
    fail("there is no mbarrier at offset %u", offset);
}

void end_phase_if_complete(ByteBarrier& barrier) {
    if (barrier.missing != 0 || barrier.bytes != 0) return;
    ++barrier.phase;
    barrier.missing = barrier.arrivals;
    for (Thread* thread : barrier.waiting) make_ready(worker(), *thread);
    barrier.waiting.clear();
}

// Where a byte of a swizzled tile lies: bits 4 to 6 of its address change with bits 7 to 9.
std::uint32_t swizzled(std::uint32_t address) { return address ^ (address >> 7 & 7) << 4; }

// The tiles that are on their way arrive. False where there are none.
bool deliver_tiles() {
    Worker& w = worker();
    if (w.tile_copies.empty()) return false;
    const std::vector<TileCopy> copies = std::exchange(w.tile_copies, {});
    for (const TileCopy& copy : copies) {
        const auto row_bytes = static_cast<std::uint32_t>(copy.box_columns * 2);
        for (std::uint64_t r = 0; r < copy.box_rows; ++r)
            for (std::uint64_t c = 0; c < copy.box_columns; ++c) {
                std::uint16_t number = 0;
                if (copy.row + r < copy.rows && copy.column + c < copy.columns)
                    std::memcpy(&number, copy.from + (copy.row + r) * copy.stride + (copy.column + c) * 2, 2);
                const auto at = copy.to + static_cast<std::uint32_t>(r) * row_bytes + static_cast<std::uint32_t>(c) * 2;
                std::memcpy(block.shared + swizzled(at), &number, 2);
            }
        ByteBarrier& barrier = byte_barrier(copy.barrier);
        barrier.bytes -= static_cast<std::int64_t>(row_bytes * copy.box_rows);
        end_phase_if_complete(barrier);
    }
    return true;
}

}  // namespace

void mbarrier_init(std::uint32_t barrier, unsigned arrivals) {
    shared_bytes(barrier, 8, 8, Access::write);
    worker().byte_barriers.push_back({barrier, arrivals, arrivals, 0, 0, {}});
}

void mbarrier_arrive(std::uint32_t offset, unsigned bytes) {
    ByteBarrier& barrier = byte_barrier(offset);
    barrier.bytes += bytes;
    if (barrier.missing == 0) fail("more arrivals at the mbarrier at offset %u than its phase has", offset);
    --barrier.missing;
    end_phase_if_complete(barrier);
}

void mbarrier_wait(std::uint32_t offset, unsigned parity, Place place) {
    while (byte_barrier(offset).phase % 2 == parity) {
        byte_barrier(offset).waiting.push_back(block.current);
        wait_at(place);
    }
}

void copy_tile(std::uint32_t to, std::uint64_t map, unsigned column, unsigned row, std::uint32_t barrier) {
    std::uint64_t fields[16];
    std::memcpy(fields, global_bytes(map, sizeof fields, 64, false), sizeof fields);
    TileCopy copy{to, barrier, nullptr, fields[1], fields[2], fields[3], fields[4], fields[5], column, row};
    copy.from = global_bytes(fields[0], (copy.rows - 1) * copy.stride + copy.columns * 2, 16, false);
    if (copy.stride % 16 != 0) fail("a tile's matrix has rows of %llu bytes, not whole sixteens", static_cast<unsigned long long>(copy.stride));
    if (copy.box_columns * 2 != 128) fail("a tile with a swizzle of 128 bytes has rows of %llu", static_cast<unsigned long long>(copy.box_columns * 2));
    const auto bytes = static_cast<std::uint32_t>(copy.box_rows * 128);
    if (to % 1024 != 0 || to + bytes > block.shared_bytes) fail_shared(to, bytes, 1024);
    std::memset(block.shared + to, 0xFF, bytes);
    byte_barrier(barrier);
    worker().tile_copies.push_back(copy);
}

// Products of a warpgroup

namespace {

// The numbers of rows of sixteen at a descriptor.
void read_tile(float* numbers, unsigned rows, std::uint64_t descriptor) {
    const auto start = static_cast<std::uint32_t>(descriptor & 0x3FFF) << 4;
    const auto stride = static_cast<std::uint32_t>(descriptor >> 32 & 0x3FFF) << 4;
    if (descriptor >> 62 != 1 || (descriptor >> 49 & 7) != 0)
        fail("a descriptor of another layout than a swizzle of 128 bytes at aligned tiles");
    for (unsigned row = 0; row < rows; ++row)
        for (unsigned k = 0; k < 16; ++k) {
            const std::uint32_t at = swizzled(start + row / 8 * stride + row % 8 * 128 + k * 2);
            if (at + 2 > block.shared_bytes) fail_shared(at, 2, 2);
            std::uint16_t bits;
            std::memcpy(&bits, block.shared + at, 2);
            numbers[row * 16 + k] = std::bit_cast<float>(static_cast<std::uint32_t>(bits) << 16);
        }
}

// The products of all groups before `done`, in the order in which they were begun; `threads` are the warpgroup's.
void multiply(Thread* threads, std::uint32_t done) {
    constexpr unsigned M = 64, N = 128;
    static thread_local float a[M * 16], b[N * 16];
    std::size_t count = 0;
    while (count < threads[0].products.size() && threads[0].products[count].group < done) ++count;
    for (std::size_t i = 0; i < count; ++i) {
        const AsyncProduct& product = threads[0].products[i];
        for (unsigned t = 1; t < WARPGROUP; ++t) {
            const auto& others = threads[t].products;
            if (i >= others.size() || others[i].a != product.a || others[i].b != product.b || others[i].first != product.first)
                fail("threads %u and %u of a warpgroup differ in a product", threads[0].number, threads[t].number);
        }
        read_tile(a, M, product.a);
        read_tile(b, N, product.b);
        for (unsigned t = 0; t < WARPGROUP; ++t) {
            float* d = threads[t].products[i].d;
            const unsigned lane = t % WARP, warp = t / WARP;
            for (unsigned j = 0; j < N / 8; ++j)
                for (unsigned e = 0; e < 4; ++e) {
                    const float* left = a + (16 * warp + lane / 4 + e / 2 * 8) * 16;
                    const float* right = b + (8 * j + 2 * (lane % 4) + e % 2) * 16;
                    float sum = 0.0f;
                    for (unsigned k = 0; k < 16; ++k) sum += left[k] * right[k];
                    d[4 * j + e] = product.first ? sum : d[4 * j + e] + sum;
                }
        }
    }
    for (unsigned t = 0; t < WARPGROUP; ++t) {
        auto& products = threads[t].products;
        products.erase(products.begin(), products.begin() + static_cast<std::ptrdiff_t>(count));
    }
}

}  // namespace

void wgmma_bf16(float* d, std::uint64_t a, std::uint64_t b, bool first) {
    Thread& t = *block.current;
    t.products.push_back({d, a, b, first, t.open_product_group});
}

void wgmma_commit() { ++block.current->open_product_group; }

void wgmma_wait(unsigned pending, Place place) {
    Worker& w = worker();
    Thread& self = *block.current;
    const unsigned warpgroup = self.number / WARPGROUP;
    if ((warpgroup + 1) * WARPGROUP > block.threads) fail("a product of a warpgroup that is not whole");
    if (++w.warpgroup_arrived[warpgroup] < WARPGROUP) return wait_at(place);
    w.warpgroup_arrived[warpgroup] = 0;
    Thread* threads = &w.threads[warpgroup * WARPGROUP];
    const std::uint32_t begun = self.open_product_group;
    multiply(threads, begun > pending ? begun - pending : 0);
    for (unsigned t = 0; t < WARPGROUP; ++t)
        if (&threads[t] != &self) make_ready(w, threads[t]);
}

void async_copy(std::uint32_t to, std::uint64_t from, unsigned bytes, unsigned width) {
    char* target = shared_bytes(to, width, width, Access::write);
    const char* source = bytes == 0 ? nullptr : global_bytes(from, bytes, bytes == width ? width : 1, false);
    // Undefined until the wait.
    std::memset(target, 0xFF, width);
    Thread& t = *block.current;
    t.copies.push_back({to, source, static_cast<std::uint16_t>(bytes), static_cast<std::uint16_t>(width), t.open_group});
}

void async_commit() { ++block.current->open_group; }

void async_wait(unsigned pending) {
    Thread& t = *block.current;
    const std::uint32_t done = t.open_group > pending ? t.open_group - pending : 0;
    std::size_t kept = 0;
    for (const AsyncCopy& copy : t.copies) {
        if (copy.group >= done) {
            t.copies[kept++] = copy;
            continue;
        }
        char* target = shared_bytes(copy.to, copy.width, copy.width, Access::write);
        if (copy.bytes > 0) std::memcpy(target, copy.from, copy.bytes);
        std::memset(target + copy.bytes, 0, copy.width - copy.bytes);
    }
    t.copies.resize(kept);
}

namespace {

struct LoadMatrices {
    std::uint32_t* registers;
    std::uint32_t row_address;
    unsigned count;
    bool transpose;
};

// Lane i holds the address of row i % 8 of matrix i / 8. Of each matrix lane l gets elements 2 (l % 4) and the next of
// row l / 4; transposed, of column l / 4.
void load_matrices_of_warp(void* const* lanes, std::uint32_t) {
    const auto* first = static_cast<const LoadMatrices*>(lanes[0]);
    const unsigned count = first->count;
    Worker& w = worker();
    const unsigned warp = block.current->warp;
    std::uint16_t matrix[4][8][8];
    for (unsigned i = 0; i < 8 * count; ++i) {
        const std::uint32_t address = static_cast<const LoadMatrices*>(lanes[i])->row_address;
        if (address + 16 > block.shared_bytes || address % 16 != 0) fail_shared(address, 16, 16);
        std::memcpy(matrix[i / 8][i % 8], block.shared + address, 16);
        if (!block.find_races) continue;
        for (unsigned pair = 0; pair < 4; ++pair)
            track_shared(address + 4 * pair, 4, Access::read, w.threads[warp * WARP + 4 * (i % 8) + pair]);
    }
    for (unsigned lane = 0; lane < WARP; ++lane) {
        const auto* mine = static_cast<const LoadMatrices*>(lanes[lane]);
        const unsigned row = lane / 4, column = 2 * (lane % 4);
        for (unsigned m = 0; m < count; ++m) {
            const auto low = mine->transpose ? matrix[m][column][row] : matrix[m][row][column];
            const auto high = mine->transpose ? matrix[m][column + 1][row] : matrix[m][row][column + 1];
            mine->registers[m] = static_cast<std::uint32_t>(high) << 16 | low;
        }
    }
}

struct Mma {
    float* d;
    const std::uint32_t* a;
    const std::uint32_t* b;
};

inline float low_half(std::uint32_t pair) { return std::bit_cast<float>(pair << 16); }
inline float high_half(std::uint32_t pair) { return std::bit_cast<float>(pair & 0xFFFF0000u); }

// Products of bfloat16 are exact in float32; they are added in the order of k, then to D.
void mma_of_warp(void* const* lanes, std::uint32_t) {
    float a[16][16], b[16][8];
    for (unsigned lane = 0; lane < WARP; ++lane) {
        const auto* mine = static_cast<const Mma*>(lanes[lane]);
        const unsigned g = lane / 4, t = 2 * (lane % 4);
        for (unsigned i = 0; i < 4; ++i) {
            const unsigned row = g + 8 * (i % 2), column = t + 8 * (i / 2);
            a[row][column] = low_half(mine->a[i]);
            a[row][column + 1] = high_half(mine->a[i]);
        }
        for (unsigned i = 0; i < 2; ++i) {
            b[t + 8 * i][g] = low_half(mine->b[i]);
            b[t + 8 * i + 1][g] = high_half(mine->b[i]);
        }
    }
    float d[16][8] = {};
    for (unsigned row = 0; row < 16; ++row)
        for (unsigned k = 0; k < 16; ++k)
            for (unsigned column = 0; column < 8; ++column) d[row][column] += a[row][k] * b[k][column];
    for (unsigned lane = 0; lane < WARP; ++lane) {
        const auto* mine = static_cast<const Mma*>(lanes[lane]);
        const unsigned g = lane / 4, t = 2 * (lane % 4);
        mine->d[0] += d[g][t];
        mine->d[1] += d[g][t + 1];
        mine->d[2] += d[g + 8][t];
        mine->d[3] += d[g + 8][t + 1];
    }
}

}  // namespace

void load_matrices(std::uint32_t* registers, std::uint32_t row_address, unsigned count, bool transpose) {
    LoadMatrices brought{registers, row_address, count, transpose};
    warp_operation(~0u, &brought, load_matrices_of_warp, {"ldmatrix", __FILE__, __LINE__});
}

void mma_bf16(float* d, const std::uint32_t* a, const std::uint32_t* b) {
    Mma brought{d, a, b};
    warp_operation(~0u, &brought, mma_of_warp, {"mma", __FILE__, __LINE__});
}

// Device memory

namespace {
Allocation* reserve_allocations() {
    void* table = mmap(nullptr, MAX_ALLOCATIONS * sizeof(Allocation), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (table == MAP_FAILED) std::abort();
    return static_cast<Allocation*>(table);
}
std::mutex allocations_lock;
std::uint64_t next_allocation = 1;  // 0 is where null pointers point
std::deque<std::uint64_t> freed_allocations;

const Kernel*& kernels() {
    static const Kernel* first = nullptr;
    return first;
}
}  // namespace

Allocation* const allocations = reserve_allocations();

Registration::Registration(Kernel& kernel) {
    kernel.next = kernels();
    kernels() = &kernel;
}

}  // namespace emulate

// What Rust calls

using namespace emulate;

extern "C" {

// A device address, 0 where there is no memory.
std::uint64_t podium_emulate_allocate(std::uint64_t bytes) {
    const std::uint64_t rounded = (std::max<std::uint64_t>(bytes, 1) + 255) / 256 * 256;
    if (rounded >> OFFSET_BITS != 0) return 0;
    auto* base = static_cast<char*>(std::aligned_alloc(256, rounded));
    if (base == nullptr) return 0;
    std::memset(base, 0xFF, rounded);
    const std::lock_guard guard(allocations_lock);
    std::uint64_t id = next_allocation;
    if (id < MAX_ALLOCATIONS) {
        ++next_allocation;
    } else if (!freed_allocations.empty()) {
        // The one that has been free for longest, so that a stale address is noticed for as long as can be.
        id = freed_allocations.front();
        freed_allocations.pop_front();
    } else {
        std::free(base);
        return 0;
    }
    allocations[id] = {base, bytes, 0};
    return id << OFFSET_BITS;
}

void podium_emulate_free(std::uint64_t address) {
    const std::lock_guard guard(allocations_lock);
    Allocation& allocation = allocations[address >> OFFSET_BITS];
    std::free(allocation.base);
    allocation = {nullptr, 0, 0};
    freed_allocations.push_back(address >> OFFSET_BITS);
}

// The bytes behind a device address, null where they are not all of one allocation.
char* podium_emulate_bytes(std::uint64_t address, std::uint64_t bytes) {
    const std::uint64_t id = address >> OFFSET_BITS, offset = address & ((std::uint64_t{1} << OFFSET_BITS) - 1);
    if (id >= MAX_ALLOCATIONS || bytes > allocations[id].bytes || offset > allocations[id].bytes - bytes) return nullptr;
    return allocations[id].base + offset;
}

const Kernel* podium_emulate_find(const char* name) {
    for (const Kernel* kernel = kernels(); kernel != nullptr; kernel = kernel->next)
        if (std::strcmp(kernel->name, name) == 0) return kernel;
    return nullptr;
}

// Runs one block on the calling thread. Returns 0, or 1 with what went wrong in `error`.
int podium_emulate_block(const Kernel* kernel, const Launch* launch, void* const* arguments, const unsigned index[3],
                         char* error, std::size_t error_bytes) {
    Worker& w = worker();
    const unsigned* size = launch->block;
    block.grid_size = {launch->grid[0], launch->grid[1], launch->grid[2]};
    block.block_size = {size[0], size[1], size[2]};
    block.index = {index[0], index[1], index[2]};
    block.threads = size[0] * size[1] * size[2];
    block.shared_bytes = launch->shared_bytes;
    block.era = launch->era;
    block.find_races = launch->find_races != 0;
    block.shared = w.shared;
    std::memset(w.shared, 0xFF, launch->shared_bytes);
    if (block.find_races && w.shadow.size() < MAX_SHARED_BYTES / 4) w.shadow.resize(MAX_SHARED_BYTES / 4);

    w.kernel = kernel;
    w.failed = false;
    w.exited = w.arrived = 0;
    ++w.epoch;
    std::fill(std::begin(w.warp_epoch), std::end(w.warp_epoch), std::uint16_t{0});
    std::fill(std::begin(w.warpgroup_arrived), std::end(w.warpgroup_arrived), 0u);
    w.byte_barriers.clear();
    w.tile_copies.clear();
    for (Meeting& meeting : w.meetings) meeting.mask = 0;
    w.shuffle = launch->order_seed != 0;
    w.random.state = launch->order_seed ^ (index[0] + std::uint64_t{index[1]} * 0x10001 + std::uint64_t{index[2]} * 0x1000003);
    kernel->prepare(arguments, w.frame);

    w.ready.clear();
    for (unsigned i = 0; i < block.threads; ++i) {
        Thread& t = w.threads[i];
        t.index = {i % size[0], i / size[0] % size[1], i / (size[0] * size[1])};
        t.number = i;
        t.lane = i % WARP;
        t.warp = i / WARP;
        t.exited = t.waiting = t.after_predecessor = false;
        t.open_group = 0;
        t.copies.clear();
        t.open_product_group = 0;
        t.products.clear();
        w.canary(i) = CANARY;
        t.stack_pointer = prepare_fiber(w.stacks + i * STACK_BYTES + sizeof CANARY, STACK_BYTES - sizeof CANARY, fiber_main);
        w.ready.push_back(static_cast<std::uint16_t>(i));
    }

    std::size_t next = 0;
    while (!w.failed && (next < w.ready.size() || deliver_tiles())) {
        if (next == w.ready.size()) continue;  // tiles that nobody waits for
        if (w.shuffle) std::swap(w.ready[next], w.ready[next + w.random.next() % (w.ready.size() - next)]);
        block.current = &w.threads[w.ready[next++]];
        if (next > 2 * MAX_THREADS) {  // what has been taken is dropped now and then
            w.ready.erase(w.ready.begin(), w.ready.begin() + static_cast<std::ptrdiff_t>(next));
            next = 0;
        }
        podium_emulate_switch(&w.scheduler, block.current->stack_pointer);
    }
    if (!w.failed && w.exited < block.threads) {
        report_divergence(w);
        w.failed = true;
    }
    for (unsigned i = 0; i < block.threads && !w.failed; ++i) {
        if (w.canary(i) == CANARY) continue;
        std::snprintf(w.error, sizeof w.error, "%s: thread %u needs more than %zu bytes of stack", kernel->name, i, STACK_BYTES);
        w.failed = true;
    }
    if (!w.failed) return 0;
    std::snprintf(error, error_bytes, "%s", w.error);
    return 1;
}

}  // extern "C"
