// Draws a token from a row of logits: the twin of src/backend/cpu/sample.rs, whose head says what is computed. The same
// logits give the same token bit for bit, and the same sums for its log-probability.
//
//   logits    [rows, vocab_size] float32
//   draws     [blocks]: what is drawn, from which row; without a row (NONE) nothing is
//   edits     (token, bias, penalised), sorted by token within a draw: biases are added in their order, then the penalty
//   adjusted  [.., vocab_size]: where draws with edits keep their logits
//   out       [blocks]
//   tops, top_logits   the most probable tokens of draws that report some, at `first_top` and on
//
// A block is one draw. It passes over the row a few times, which stays in the second-level cache (half a MB at 128k
// tokens) and is cheaper to weigh anew each time than to keep: twice for the statistics, once to draw; three times for
// top-k and four or five for top-p. A cut is found digit by digit: weights in [0, 1] have 30 bits, and each pass is a
// histogram of ten of them, masses and counts, of the tokens that agree in the digits before. Integers throughout, so
// that the order of atomic additions does not matter.
//
// Bound by the second-level cache's rate to one multiprocessor (about 5 µs a pass at 128k tokens), beside an LM head that
// takes some 300 µs.

#include "softmax.cuh"

constexpr unsigned THREADS = 1024;
constexpr unsigned WARPS = THREADS / WARP_SIZE;
constexpr unsigned NONE = 0xFFFFFFFFu;
// Of a digit of a weight's bits; one bin a thread.
constexpr unsigned DIGIT_BITS = 10;
constexpr unsigned BINS = 1 << DIGIT_BITS;
constexpr unsigned DIGITS = 3;
static_assert(BINS == THREADS, "one bin a thread");

struct Draw {
    u64 seed;
    unsigned row;
    unsigned candidate, position;
    unsigned first_edit, edits;
    unsigned adjusted;          // its row there, NONE where it has no edits
    unsigned first_top, tops;
    unsigned top_k;             // 0: all
    float inverse_temperature;  // 0: the most probable token
    float repetition_penalty, top_p, min_p;
    unsigned padding;
};

struct Edit {
    unsigned token;
    float bias;
    unsigned penalised;
};

enum Status : unsigned { DRAWN, NOT_FINITE, NOTHING_POSSIBLE };

// Of the model's own logits, but for the value of a token that is not finite: that of the adjusted ones.
struct Drawn {
    double sum, sum_exp;
    float max, logit;
    unsigned token, status;
};

// Where a filter cuts: the weight's bits, what weighs more, and how many tokens weigh exactly that.
struct Cut {
    unsigned bits;
    u64 mass_above;
    unsigned count_above, ties;
    bool found;
};

// The block's shared memory.
struct Scratch {
    Shared<u64> masses;       // [BINS]
    Shared<unsigned> counts;  // [BINS]
    Shared<u64> warp_masses;  // [WARPS]
    Shared<unsigned> warp_counts;
    Shared<u64> told;        // [4]: what one thread has found
    Shared<double> chunks;   // one a chunk, and one
};

__device__ __forceinline__ Scratch scratch() {
    Scratch s;
    s.masses = shared_memory<u64>();
    s.warp_masses = s.masses + BINS;
    s.told = s.warp_masses + WARPS;
    s.counts = view<unsigned>(s.told + 4);
    s.warp_counts = s.counts + BINS;
    s.chunks = view<double>(s.warp_counts + WARPS);
    return s;
}

template <class T>
__device__ __forceinline__ T warp_add(T value) {
#pragma unroll
    for (int bits = WARP_SIZE / 2; bits > 0; bits /= 2) value += __shfl_xor_sync(EVERY_LANE, value, bits);
    return value;
}

// The sum over this lane and those below.
template <class T>
__device__ __forceinline__ T warp_scan(T value) {
#pragma unroll
    for (unsigned by = 1; by < WARP_SIZE; by *= 2) {
        const T below = __shfl_up_sync(EVERY_LANE, value, by);
        if (lane_index() >= by) value += below;
    }
    return value;
}

// The first token for which `holds`, NONE if there is none; the same in every thread.
template <class Predicate>
__device__ __forceinline__ unsigned first_token(unsigned count, const Scratch& s, Predicate holds) {
    if (threadIdx.x == 0) s.warp_counts[0] = NONE;
    __syncthreads();
    for (unsigned i = threadIdx.x; i < count; i += THREADS) {
        if (!holds(i)) continue;
        atomicMin(&s.warp_counts[0], i);
        break;
    }
    __syncthreads();
    const unsigned first = s.warp_counts[0];
    __syncthreads();
    return first;
}

// Refuses logits that no token can be drawn from; the same answer in every thread.
__device__ __forceinline__ bool refuse(Global<const float> logits, unsigned count, const MaxAndSum& of_row,
                                       const Scratch& s, Drawn& drawn) {
    if (isnan(of_row.sum) || of_row.max == INFINITY) {
        const unsigned damaged =
            first_token(count, s, [&](unsigned i) { return isnan(logits[i]) || logits[i] == INFINITY; });
        if (damaged != NONE) {
            drawn.status = NOT_FINITE;
            drawn.token = damaged;
            drawn.logit = logits[damaged];
            return true;
        }
    }
    if (of_row.max == -INFINITY) drawn.status = NOTHING_POSSIBLE;
    return of_row.max == -INFINITY;
}

// The largest cut from which upward there are `wanted` tokens, or masses; not found where all together are fewer.
template <bool ByMass, class Weight>
__device__ __forceinline__ Cut find_cut(unsigned count, u64 wanted, const Scratch& s, Weight weight) {
    Cut cut{};
    for (unsigned digit = 0; digit < DIGITS; ++digit) {
        const unsigned shift = DIGIT_BITS * (DIGITS - 1 - digit);
        s.masses[threadIdx.x] = 0;
        s.counts[threadIdx.x] = 0;
        if (threadIdx.x == 0) s.told[0] = NONE;
        __syncthreads();
        for (unsigned i = threadIdx.x; i < count; i += THREADS) {
            const float w = weight(i);
            const unsigned bits = __float_as_uint(w);
            // Weights of zero are no cut, and their mass is none.
            if (w == 0.0f || bits >> (shift + DIGIT_BITS) != cut.bits) continue;
            const unsigned bin = bits >> shift & (BINS - 1);
            atomicAdd(&s.masses[bin], mass_of(w));
            atomicAdd(&s.counts[bin], 1u);
        }
        __syncthreads();
        // Thread t sums the bins from the highest down to its own.
        const unsigned bin = BINS - 1 - threadIdx.x;
        const u64 own_mass = s.masses[bin];
        const unsigned own_count = s.counts[bin];
        u64 mass = warp_scan(own_mass);
        unsigned tokens = warp_scan(own_count);
        if (lane_index() == WARP_SIZE - 1) {
            s.warp_masses[warp_index()] = mass;
            s.warp_counts[warp_index()] = tokens;
        }
        __syncthreads();
        mass += cut.mass_above;
        tokens += cut.count_above;
        for (unsigned warp = 0; warp < warp_index(); ++warp) {
            mass += s.warp_masses[warp];
            tokens += s.warp_counts[warp];
        }
        const u64 reached = ByMass ? mass : tokens, before = reached - (ByMass ? own_mass : own_count);
        if (before < wanted && wanted <= reached) {
            s.told[0] = bin;
            s.told[1] = mass - own_mass;
            s.told[2] = tokens - own_count;
            s.told[3] = own_count;
        }
        __syncthreads();
        const u64 found = s.told[0], mass_above = s.told[1], count_above = s.told[2], ties = s.told[3];
        __syncthreads();
        if (found == NONE) return cut;
        cut.bits = cut.bits << DIGIT_BITS | static_cast<unsigned>(found);
        cut.mass_above = mass_above;
        cut.count_above = static_cast<unsigned>(count_above);
        cut.ties = static_cast<unsigned>(ties);
    }
    cut.found = true;
    return cut;
}

// Σ amount(i)
template <class Amount>
__device__ __forceinline__ u64 sum_amounts(unsigned count, const Scratch& s, Amount amount) {
    const Shared<u64> chunks = view<u64>(s.chunks);
    for (unsigned chunk = warp_index(); chunk < chunks_of(count); chunk += WARPS) {
        const unsigned end = min(count, (chunk + 1) * CHUNK);
        u64 sum = 0;
        for (unsigned i = chunk * CHUNK + lane_index(); i < end; i += WARP_SIZE) sum += amount(i);
        sum = warp_add(sum);
        if (lane_index() == 0) chunks[chunk] = sum;
    }
    __syncthreads();
    u64 total = 0;
    for (unsigned chunk = lane_index(); chunk < chunks_of(count); chunk += WARP_SIZE) total += chunks[chunk];
    return warp_add(total);
}

// The first token at which the running sum of amount(i) exceeds target(sum of all), which is below that sum.
template <class Amount, class Target>
__device__ __forceinline__ unsigned first_beyond(unsigned count, const Scratch& s, Amount amount, Target target) {
    u64 rest = target(sum_amounts(count, s, amount));
    if (warp_index() == 0) {
        // Every lane walks the chunks, then all of them the one where the sum is exceeded.
        const Shared<u64> chunks = view<u64>(s.chunks);
        unsigned first = 0;
        for (u64 of_chunk = chunks[0]; rest >= of_chunk; of_chunk = chunks[first / CHUNK]) {
            rest -= of_chunk;
            first += CHUNK;
        }
        for (;; first += WARP_SIZE) {
            const unsigned token = first + lane_index();
            const u64 reached = warp_scan(token < count ? u64{amount(token)} : u64{0});
            const unsigned beyond = __ballot_sync(EVERY_LANE, reached > rest);
            if (beyond != 0) {
                if (lane_index() == 0) s.told[0] = first + static_cast<unsigned>(__ffs(static_cast<int>(beyond))) - 1;
                break;
            }
            rest -= __shfl_sync(EVERY_LANE, reached, WARP_SIZE - 1);
        }
    }
    __syncthreads();
    const u64 token = s.told[0];
    __syncthreads();
    return static_cast<unsigned>(token);
}

// The first word of Philox4x32-10 of (position, candidate, 0, 0) under the seed (src/backend/random.rs).
__device__ __forceinline__ unsigned random_word(u64 seed, unsigned candidate, unsigned position) {
    unsigned counter[4] = {position, candidate, 0, 0};
    unsigned key[2] = {static_cast<unsigned>(seed), static_cast<unsigned>(seed >> 32)};
    for (unsigned round = 0; round < 10; ++round) {
        const unsigned high0 = __umulhi(0xD2511F53u, counter[0]), low0 = 0xD2511F53u * counter[0];
        const unsigned high1 = __umulhi(0xCD9E8D57u, counter[2]), low1 = 0xCD9E8D57u * counter[2];
        counter[0] = high1 ^ counter[1] ^ key[0];
        counter[1] = low1;
        counter[2] = high0 ^ counter[3] ^ key[1];
        counter[3] = low0;
        key[0] += 0x9E3779B9u;
        key[1] += 0xBB67AE85u;
    }
    return counter[0];
}

// Filters and draws. `max` is the largest of the logits.
__device__ __forceinline__ unsigned draw_token(Global<const float> logits, unsigned count, float max, Global<const Draw> draw,
                                               const Scratch& s) {
    const float inverse_temperature = draw->inverse_temperature;
    const auto weight = [&](unsigned i) { return exp_of(__fmul_rn(__fsub_rn(logits[i], max), inverse_temperature)); };
    float cut = 0.0f;
    if (draw->top_k != 0 && draw->top_k < count) {
        const Cut found = find_cut<false>(count, draw->top_k, s, weight);
        if (found.found) cut = __uint_as_float(found.bits);
    }
    // Of tokens that weigh exactly `tied`, those up to `last_tie` are kept.
    float tied = 2.0f;
    unsigned last_tie = 0;
    if (draw->top_p < 1.0f) {
        const u64 total = sum_amounts(count, s, [&](unsigned i) {
            const float w = weight(i);
            return w >= cut ? mass_of(w) : u64{0};
        });
        u64 wanted = static_cast<u64>(ceil(static_cast<double>(draw->top_p) * static_cast<double>(total)));
        wanted = wanted < 1 ? 1 : wanted > total ? total : wanted;
        __syncthreads();
        const Cut found = find_cut<true>(count, wanted, s, weight);
        cut = __uint_as_float(found.bits);
        const u64 of_each = mass_of(cut), kept = (wanted - found.mass_above + of_each - 1) / of_each;
        if (kept < found.ties) {
            tied = cut;
            last_tie = first_beyond(
                count, s, [&](unsigned i) { return weight(i) == tied ? u64{1} : u64{0}; }, [&](u64) { return kept - 1; });
        }
    }
    cut = fminf(fmaxf(cut, draw->min_p), 1.0f);
    const unsigned steps = random_word(draw->seed, draw->candidate, draw->position) >> 8;
    return first_beyond(
        count, s,
        [&](unsigned i) {
            const float w = weight(i);
            return w >= cut && !(w == tied && i > last_tie) ? mass_of(w) : u64{0};
        },
        // ⌊total · steps / 2²⁴⌋
        [&](u64 total) { return __umul64hi(total, steps) << 40 | total * steps >> 24; });
}

// The tokens of the largest logits, best first, the lowest first among equals: one pass a token, for it is asked seldom.
__device__ __forceinline__ void find_tops(Global<const float> logits, unsigned count, unsigned wanted, const Scratch& s,
                                          Global<unsigned> tops, Global<float> top_logits) {
    const Shared<float> warp_best = view<float>(s.warp_masses);
    float last = INFINITY;
    unsigned last_token = 0;
    const auto beats = [](float a, unsigned token_a, float b, unsigned token_b) {
        return token_b == NONE || (token_a != NONE && (a > b || (a == b && token_a < token_b)));
    };
    for (unsigned n = 0; n < wanted; ++n) {
        float best = -INFINITY;
        unsigned token = NONE;
        for (unsigned i = threadIdx.x; i < count; i += THREADS) {
            const float logit = logits[i];
            const bool left = n == 0 || logit < last || (logit == last && i > last_token);
            if (left && (token == NONE || logit > best)) {
                best = logit;
                token = i;
            }
        }
#pragma unroll
        for (int bits = WARP_SIZE / 2; bits > 0; bits /= 2) {
            const float other = __shfl_xor_sync(EVERY_LANE, best, bits);
            const unsigned other_token = __shfl_xor_sync(EVERY_LANE, token, bits);
            if (beats(other, other_token, best, token)) {
                best = other;
                token = other_token;
            }
        }
        if (lane_index() == 0) {
            warp_best[warp_index()] = best;
            s.warp_counts[warp_index()] = token;
        }
        __syncthreads();
        token = NONE;
        for (unsigned warp = 0; warp < WARPS; ++warp) {
            const float other = warp_best[warp];
            const unsigned other_token = s.warp_counts[warp];
            if (beats(other, other_token, best, token)) {
                best = other;
                token = other_token;
            }
        }
        __syncthreads();
        last = best;
        last_token = token;
        if (threadIdx.x == 0) {
            tops[n] = token;
            top_logits[n] = best;
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS)
    sample(Global<const float> all_logits, Global<const Draw> draws, Global<const Edit> edits, unsigned vocab_size,
           Global<float> adjusted, Global<unsigned> tops, Global<float> top_logits, Global<Drawn> out) {
    launch_dependents();
    wait_for_predecessor();
    // Read where it is used: sixteen words would take registers throughout.
    const Global<const Draw> draw = draws + blockIdx.x;
    if (draw->row == NONE) return;
    const Scratch s = scratch();
    Global<const float> logits = all_logits + size_t{draw->row} * vocab_size;
    MaxAndSum of_row = max_and_sum<THREADS>(logits, vocab_size, s.chunks);
    Drawn drawn{of_row.sum, 0.0, of_row.max, 0.0f, NONE, DRAWN};
    const auto finish = [&] {
        if (threadIdx.x == 0) out[blockIdx.x] = drawn;
    };
    if (refuse(logits, vocab_size, of_row, s, drawn)) return finish();
    const Global<const float> own_logits = logits;
    drawn.sum_exp = sum_of_exp<THREADS>(logits, vocab_size, of_row.max, s.chunks);
    if (draw->adjusted != NONE) {
        const Global<float> changed = adjusted + size_t{draw->adjusted} * vocab_size;
        for (unsigned i = threadIdx.x; i < vocab_size; i += THREADS) changed[i] = logits[i];
        __syncthreads();
        const Global<const Edit> own = edits + draw->first_edit;
        for (unsigned i = threadIdx.x; i < draw->edits; i += THREADS) {
            const unsigned token = own[i].token;
            if (i > 0 && own[i - 1].token == token) continue;  // another thread has them all
            float logit = changed[token];
            bool penalised = false;
            for (unsigned n = i; n < draw->edits && own[n].token == token; ++n) {
                if (own[n].penalised != 0)
                    penalised = true;
                else
                    logit = __fadd_rn(logit, own[n].bias);
            }
            if (penalised)
                logit = logit < 0.0f ? __fmul_rn(logit, draw->repetition_penalty) : __fdiv_rn(logit, draw->repetition_penalty);
            changed[token] = logit;
        }
        __syncthreads();
        logits = changed;
        of_row = max_and_sum<THREADS>(logits, vocab_size, s.chunks);
        if (refuse(logits, vocab_size, of_row, s, drawn)) return finish();
    }
    drawn.token = draw->inverse_temperature == 0.0f
                      ? first_token(vocab_size, s, [&](unsigned i) { return logits[i] == of_row.max; })
                      : draw_token(logits, vocab_size, of_row.max, draw, s);
    drawn.logit = own_logits[drawn.token];
    if (draw->tops > 0)
        find_tops(own_logits, vocab_size, draw->tops, s, tops + draw->first_top, top_logits + draw->first_top);
    finish();
}
KERNEL(sample)
