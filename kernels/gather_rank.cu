// Ranks candidates by states that decoding computed: gathers, normalises, projects, ranks, chooses, in one launch.
//
// A job is one group and one ranker; docs/RANKER.md has the formulas. Of each job:
//
//   in    residual rows [.., row_stride] float32, the row of each candidate's last token, the prompt's feature,
//         extra inputs [candidates, extras] where the ranker has some
//   out   scores [candidates]; best: the first candidate of the highest score, NONE where a score is not finite
//
// Rows: the prompt is row 0, candidate c row c + 1. Blocks are (tile of 16 rows, split of 256 coordinates; job):
//
//   every block                    normalises 16 × 256 numbers in float32 and projects them on tensor cores: a partial sum
//   last of a tile's splits        adds these in order; linear: scores. Pointwise: the feed-forward. Listwise: norm, qkv
//   last of a job's tiles          listwise: attention over all rows, feed-forward. Relevance, arg max
//
// No block waits for another, so that any number of them is in order; counters end as they began, so that a graph may
// replay the launch. Every product is in split bfloat16: a number is the sum of two bfloat16 (16 bits of fraction) and a
// product three mma, all but exact in float32's sense and still 5 × the rate of float32 units. RMS normalisation is one
// factor a row, so it is applied to the finished sum.
//
// A row's sums do not depend on where it stands or on how many there are, and attention adds keys in the canonical order
// of docs/RANKER.md: permuting candidates permutes the scores bit for bit.
//
// Bound by latency: three arrivals, then a chain of small products in one block. Traffic is 4 · hidden_size bytes a
// candidate and the projection's weights once a tile, from the second-level cache.

#include "mma.cuh"
#include "reduce.cuh"

constexpr unsigned THREADS = 512;
constexpr unsigned WARPS = THREADS / WARP_SIZE;
constexpr unsigned TILE_ROWS = 16;
constexpr unsigned COORDINATES = 256;
// Rows of a shared tile are 16 bytes longer than they hold, so that ldmatrix meets each bank once.
constexpr unsigned TILE_STRIDE = COORDINATES + 8;
constexpr unsigned NONE = 0xFFFFFFFFu;
constexpr float SHORTEST = 1e-8f;
constexpr float LARGEST = 3.402823466e38f;

enum Kind : unsigned { LISTWISE, POINTWISE, LINEAR };

// Matrices are packed for mma by column tile (8), then step (16 inputs), then lane: b0 and b1 of the high halves, b0 and
// b1 of the low. Norms are gains, then biases.
struct Job {
    Global<const float> residual;
    Global<const unsigned> rows;
    Global<const float> prompt, extra;
    Global<const float> prompt_mean, prompt_inverse_scale, candidate_mean, candidate_inverse_scale;  // null: not so
    Global<const uint4> projection;
    Global<const float> extra_mean, extra_inverse_scale, extra_weight;  // weight: [extras, columns]
    Global<const float> attention_norm;
    Global<const uint4> qkv;
    Global<const float> qkv_bias;
    Global<const uint4> output;
    Global<const float> output_bias, feed_forward_norm;
    Global<const uint4> up;
    Global<const float> up_bias;
    Global<const uint4> down;
    Global<const float> down_bias;
    Global<float> workspace;
    Global<unsigned> counters;  // one a tile and one; zero
    Global<float> scores;
    Global<unsigned> best;
    unsigned kind, rms, cosine, candidates, hidden_size, row_stride, extras;
    unsigned columns;  // of the projection: the width, or 8 of which one counts (linear)
    unsigned heads, feed_forward_width;
    float temperature, bias;
};

// Where a job's intermediate results lie in its workspace, in numbers.
struct Places {
    unsigned tiles, splits;
    size_t rows;  // whole tiles
    Global<float> partial;  // [splits, rows, columns]
    Global<float> squares;  // [splits, rows]
    Global<float> x, normed, wide;  // [rows, columns], [rows, columns], [rows, feed_forward_width]
    Global<float> queries, keys, values;  // [rows, columns], [columns, rows], [rows, columns]
};

__device__ __forceinline__ Places places_of(const Job& job) {
    Places p;
    p.tiles = (1 + job.candidates + TILE_ROWS - 1) / TILE_ROWS;
    p.splits = (job.hidden_size + COORDINATES - 1) / COORDINATES;
    p.rows = size_t{p.tiles} * TILE_ROWS;
    const size_t table = p.rows * job.columns;
    p.partial = job.workspace;
    p.squares = p.partial + p.splits * table;
    p.x = p.squares + p.splits * p.rows;
    p.normed = p.x + table;
    p.wide = p.normed + table;
    p.queries = p.wide + p.rows * job.feed_forward_width;
    p.keys = p.queries + table;
    p.values = p.keys + table;
    return p;
}

// x and y, each as a sum of two bfloat16.
__device__ __forceinline__ void split(float x, float y, uint32_t& high, uint32_t& low) {
    high = pack_bf16(x, y);
    low = pack_bf16(x - __uint_as_float(high << 16), y - __uint_as_float(high & 0xFFFF0000u));
}

__device__ __forceinline__ void mma_split(float (&d)[4], const uint32_t (&high)[4], const uint32_t (&low)[4], uint4 b) {
    mma_16x8x16(d, low, b.x, b.y);
    mma_16x8x16(d, high, b.z, b.w);
    mma_16x8x16(d, high, b.x, b.y);
}

// store(row, column, the products there and in the next column), for tiles of 16 rows of a [.., inner].
template <class Store>
__device__ __forceinline__ void product(Global<const float> a, unsigned inner, unsigned row_tiles,
                                        Global<const uint4> b, unsigned columns, Store store) {
    const unsigned lane = lane_index(), g = lane / 4, t = 2 * (lane % 4);
    const unsigned column_tiles = columns / 8, steps = inner / 16;
    for (unsigned unit = warp_index(); unit < row_tiles * column_tiles; unit += WARPS) {
        const unsigned row = unit / column_tiles * TILE_ROWS + g, column_tile = unit % column_tiles;
        const auto upper = view<const float2>(a + (size_t{row} * inner + t));
        const auto lower = view<const float2>(a + (size_t{row + 8} * inner + t));
        const Global<const uint4> weights = b + (size_t{column_tile} * steps * WARP_SIZE + lane);
        float d[4] = {};
#pragma unroll 2
        for (unsigned step = 0; step < steps; ++step) {
            const float2 x0 = upper[8 * step], x1 = lower[8 * step], x2 = upper[8 * step + 4], x3 = lower[8 * step + 4];
            uint32_t high[4], low[4];
            split(x0.x, x0.y, high[0], low[0]);
            split(x1.x, x1.y, high[1], low[1]);
            split(x2.x, x2.y, high[2], low[2]);
            split(x3.x, x3.y, high[3], low[3]);
            mma_split(d, high, low, weights[size_t{step} * WARP_SIZE]);
        }
        store(row, column_tile * 8 + t, d[0], d[1]);
        store(row + 8, column_tile * 8 + t, d[2], d[3]);
    }
}

// This block's 16 rows and 256 coordinates, projected.
__device__ __forceinline__ void project(const Job& job, const Places& places, unsigned tile, unsigned part) {
    const Shared<bf16> high = shared_memory<bf16>(), low = high + TILE_ROWS * TILE_STRIDE;
    const Shared<float> sums = shared_memory<float>(2 * TILE_ROWS * TILE_STRIDE * sizeof(bf16));  // [row][warps of it]
    constexpr unsigned GROUPS = THREADS / COORDINATES, GROUP_WARPS = COORDINATES / WARP_SIZE;
    const unsigned within = threadIdx.x % COORDINATES, group = threadIdx.x / COORDINATES;
    const unsigned coordinate = part * COORDINATES + within;
    const bool inside = coordinate < job.hidden_size, standardized = job.candidate_mean != nullptr;
    const float mean = inside && standardized ? job.candidate_mean[coordinate] : 0.0f;
    const float inverse = inside && standardized ? job.candidate_inverse_scale[coordinate] : 1.0f;
#pragma unroll
    for (unsigned i = 0; i < TILE_ROWS / GROUPS; ++i) {
        const unsigned in_tile = i * GROUPS + group, row = tile * TILE_ROWS + in_tile;
        float x = 0.0f;
        if (inside && row > 0 && row <= job.candidates)
            x = (job.residual[size_t{job.rows[row - 1]} * job.row_stride + coordinate] - mean) * inverse;
        if (inside && row == 0 && job.kind != LINEAR) {
            x = job.prompt[coordinate];
            if (job.prompt_mean != nullptr) x = (x - job.prompt_mean[coordinate]) * job.prompt_inverse_scale[coordinate];
        }
        const bf16 rounded = __float2bfloat16_rn(x);
        high[in_tile * TILE_STRIDE + within] = rounded;
        low[in_tile * TILE_STRIDE + within] = __float2bfloat16_rn(x - __bfloat162float(rounded));
        const float square = warp_sum(x * x);
        if (lane_index() == 0) sums[in_tile * GROUP_WARPS + warp_index() % GROUP_WARPS] = square;
    }
    __syncthreads();
    if (threadIdx.x < TILE_ROWS) {
        float square = 0.0f;
        for (unsigned warp = 0; warp < GROUP_WARPS; ++warp) square += sums[threadIdx.x * GROUP_WARPS + warp];
        places.squares[part * places.rows + tile * TILE_ROWS + threadIdx.x] = square;
    }

    const unsigned lane = lane_index(), g = lane / 4, t = 2 * (lane % 4);
    const unsigned all_steps = (job.hidden_size + 15) / 16, first_step = part * (COORDINATES / 16);
    const unsigned steps = min(all_steps - first_step, COORDINATES / 16);
    const unsigned at = lane % 16 * TILE_STRIDE + lane / 16 * 8;
    for (unsigned column_tile = warp_index(); column_tile < job.columns / 8; column_tile += WARPS) {
        const Global<const uint4> weights = job.projection + ((size_t{column_tile} * all_steps + first_step) * WARP_SIZE + lane);
        float d[4] = {};
#pragma unroll 2
        for (unsigned step = 0; step < steps; ++step) {
            uint32_t a_high[4], a_low[4];
            load_matrices(a_high, high + (at + 16 * step));
            load_matrices(a_low, low + (at + 16 * step));
            mma_split(d, a_high, a_low, weights[size_t{step} * WARP_SIZE]);
        }
        const Global<float> to =
            places.partial + ((part * places.rows + tile * TILE_ROWS + g) * job.columns + column_tile * 8 + t);
        view<float2>(to)[0] = make_float2(d[0], d[1]);
        view<float2>(to + size_t{8} * job.columns)[0] = make_float2(d[2], d[3]);
    }
}

// Whether this block is the last of `count` to come here; then all that the others wrote before is visible.
__device__ __forceinline__ bool is_last(Global<unsigned> counter, unsigned count) {
    __threadfence();
    __syncthreads();
    int last = 0;
    if (threadIdx.x == 0) last = atomicInc(&counter[0], count - 1) == count - 1;
    last = __syncthreads_or(last);
    __threadfence();
    return last != 0;
}

// The splits of a tile's rows added up, the row's factor and the extra inputs.
__device__ __forceinline__ void add_splits(const Job& job, const Places& places, unsigned tile) {
    for (unsigned i = threadIdx.x; i < TILE_ROWS * job.columns; i += THREADS) {
        const size_t row = tile * TILE_ROWS + i / job.columns;
        const unsigned column = i % job.columns;
        float sum = 0.0f, square = 0.0f;
        for (unsigned part = 0; part < places.splits; ++part) {
            sum += places.partial[(part * places.rows + row) * job.columns + column];
            square += places.squares[part * places.rows + row];
        }
        if (job.rms != 0) {
            // Squares beyond float32 give NaN, not a score that is wrong.
            const float mean = square / static_cast<float>(job.hidden_size);
            sum *= mean <= LARGEST ? 1.0f / sqrtf(mean + 1e-6f) : mean - mean;
        }
        if (row > 0 && row <= job.candidates) {
            for (unsigned e = 0; e < job.extras; ++e) {
                const float value = job.extra[(row - 1) * job.extras + e];
                sum += (value - job.extra_mean[e]) * job.extra_inverse_scale[e] * job.extra_weight[e * job.columns + column];
            }
            if (job.kind == LINEAR && column == 0) job.scores[row - 1] = sum + job.bias;
        }
        places.x[row * job.columns + column] = sum;
    }
}

// normed = layer normalisation of x, a warp a row.
__device__ __forceinline__ void layer_norm(const Job& job, const Places& places, size_t first, size_t count,
                                           Global<const float> norm) {
    const unsigned width = job.columns;
    for (size_t row = first + warp_index(); row < first + count; row += WARPS) {
        const Global<const float> x = places.x + row * width;
        float sum = 0.0f, square = 0.0f;
        for (unsigned i = lane_index(); i < width; i += WARP_SIZE) sum += x[i];
        const float mean = warp_sum(sum) / static_cast<float>(width);
        for (unsigned i = lane_index(); i < width; i += WARP_SIZE) square += (x[i] - mean) * (x[i] - mean);
        const float inverse = 1.0f / sqrtf(warp_sum(square) / static_cast<float>(width) + 1e-5f);
        for (unsigned i = lane_index(); i < width; i += WARP_SIZE)
            places.normed[row * width + i] = (x[i] - mean) * inverse * norm[i] + norm[width + i];
    }
}

__device__ __forceinline__ float gelu(float x) {
    const float u = 0.7978845608f * (x + 0.044715f * x * x * x);
    return 0.5f * x * (1.0f + tanhf(u));
}

// x += down(gelu(up(norm(x)))) for some tiles.
__device__ __forceinline__ void feed_forward(const Job& job, const Places& places, unsigned tile, unsigned tiles) {
    const size_t first = size_t{tile} * TILE_ROWS;
    const unsigned width = job.columns, wide = job.feed_forward_width;
    layer_norm(job, places, first, tiles * TILE_ROWS, job.feed_forward_norm);
    __syncthreads();
    product(places.normed + first * width, width, tiles, job.up, wide, [&](unsigned row, unsigned column, float a, float b) {
        const Global<float> to = places.wide + ((first + row) * wide + column);
        to[0] = gelu(a + job.up_bias[column]);
        to[1] = gelu(b + job.up_bias[column + 1]);
    });
    __syncthreads();
    product(places.wide + first * wide, wide, tiles, job.down, width, [&](unsigned row, unsigned column, float a, float b) {
        const Global<float> to = places.x + ((first + row) * width + column);
        to[0] += a + job.down_bias[column];
        to[1] += b + job.down_bias[column + 1];
    });
}

// Queries (scaled), keys (transposed) and values of a tile's rows.
__device__ __forceinline__ void project_heads(const Job& job, const Places& places, unsigned tile) {
    const size_t first = size_t{tile} * TILE_ROWS;
    const unsigned width = job.columns;
    const float scale = 1.0f / sqrtf(static_cast<float>(width / job.heads));
    layer_norm(job, places, first, TILE_ROWS, job.attention_norm);
    __syncthreads();
    product(places.normed + first * width, width, 1, job.qkv, 3 * width,
            [&](unsigned in_tile, unsigned column, float a, float b) {
                const size_t row = first + in_tile;
                const float both[2] = {a + job.qkv_bias[column], b + job.qkv_bias[column + 1]};
#pragma unroll
                for (unsigned i = 0; i < 2; ++i) {
                    const unsigned at = column % width + i;
                    if (column < width)
                        places.queries[row * width + at] = both[i] * scale;
                    else if (column < 2 * width)
                        places.keys[at * places.rows + row] = both[i];
                    else
                        places.values[row * width + at] = both[i];
                }
            });
}

// Larger for larger numbers, as Rust's total_cmp orders them.
__device__ __forceinline__ unsigned order_of(float x) {
    const unsigned bits = __float_as_uint(x);
    return bits >> 31 != 0 ? ~bits : bits | 0x80000000u;
}

// order[place] = row: the prompt, then candidates by their projections. Those that tie are the same numbers.
__device__ __forceinline__ void sort_rows(const Job& job, const Places& places, Shared<unsigned> order) {
    const unsigned width = job.columns;
    if (threadIdx.x == 0) order[0] = 0u;
    for (unsigned row = 1 + threadIdx.x; row <= job.candidates; row += THREADS) {
        const Global<const float> own = places.x + size_t{row} * width;
        const unsigned own_first = order_of(own[0]);
        unsigned place = 1;
        for (unsigned other = 1; other <= job.candidates; ++other) {
            const Global<const float> theirs = places.x + size_t{other} * width;
            unsigned a = own_first, b = order_of(theirs[0]);
            for (unsigned i = 1; a == b && i < width && other != row; ++i) {
                a = order_of(own[i]);
                b = order_of(theirs[i]);
            }
            place += b < a || (b == a && other < row);
        }
        order[place] = row;
    }
}

// normed = attention of every row over all rows; a warp takes a head of a row.
__device__ __forceinline__ void attend(const Job& job, const Places& places, Shared<const unsigned> order,
                                       Shared<float> logits) {
    const unsigned width = job.columns, head_dim = width / job.heads, rows = 1 + job.candidates;
    const unsigned lane = lane_index();
    // Lanes that share a key's values, a power of two; the warp takes several keys at a time.
    unsigned lanes = 1;
    while (lanes < head_dim && lanes < WARP_SIZE) lanes *= 2;
    const unsigned together = WARP_SIZE / lanes;
    for (unsigned unit = warp_index(); unit < rows * job.heads; unit += WARPS) {
        const size_t row = unit / job.heads;
        const unsigned first = unit % job.heads * head_dim;
        const Global<const float> query = places.queries + (row * width + first);
        const Global<const float> keys = places.keys + first * places.rows;
        float largest = __uint_as_float(0xFF800000u);
        for (unsigned key = lane; key < rows; key += WARP_SIZE) {
            float logit = 0.0f;
            for (unsigned i = 0; i < head_dim; ++i) logit += query[i] * keys[i * places.rows + key];
            logits[key] = logit;
            largest = fmaxf(largest, logit);
        }
        largest = warp_max(largest);
        for (unsigned key = lane; key < rows; key += WARP_SIZE) {
            const float logit = logits[key];
            logits[key] = expf(logit - largest);
        }
        __syncwarp();
        float sum = 0.0f;
        for (unsigned place = lane; place < rows; place += WARP_SIZE) {
            const unsigned key = order[place];
            const float weight = logits[key];
            sum += weight;
        }
        const float inverse = 1.0f / warp_sum(sum);
        for (unsigned block = 0; block < head_dim; block += lanes) {
            const unsigned i = block + lane % lanes;
            float value = 0.0f;
            for (unsigned place = lane / lanes; place < rows; place += together) {
                const unsigned key = order[place];
                const float weight = logits[key];
                if (i < head_dim) value += weight * places.values[size_t{key} * width + first + i];
            }
            for (unsigned bits = lanes; bits < WARP_SIZE; bits *= 2) value += __shfl_xor_sync(EVERY_LANE, value, bits);
            if (lane < lanes && i < head_dim) places.normed[row * width + first + i] = value * inverse;
        }
        __syncwarp();
    }
}

// Scores from the processed rows, a warp a candidate.
__device__ __forceinline__ void relevance(const Job& job, const Places& places) {
    const unsigned width = job.columns;
    for (unsigned candidate = warp_index(); candidate < job.candidates; candidate += WARPS) {
        const Global<const float> x = places.x + size_t{candidate + 1} * width;
        float product = 0.0f, own = 0.0f, prompt = 0.0f;
        for (unsigned i = lane_index(); i < width; i += WARP_SIZE) {
            const float a = places.x[i], b = x[i];
            product += a * b;
            prompt += a * a;
            own += b * b;
        }
        product = warp_sum(product);
        prompt = warp_sum(prompt);
        own = warp_sum(own);
        const float lengths = fmaxf(sqrtf(prompt), SHORTEST) * job.temperature * fmaxf(sqrtf(own), SHORTEST);
        if (lane_index() == 0)
            job.scores[candidate] = product / (job.cosine != 0 ? lengths : sqrtf(static_cast<float>(width)));
    }
}

__device__ __forceinline__ void choose(const Job& job) {
    const Shared<float> scores = shared_memory<float>();
    const Shared<unsigned> candidates = shared_memory<unsigned>(WARPS * sizeof(float));
    float best_score = __uint_as_float(0xFF800000u);
    unsigned best = NONE;
    bool finite = true;
    const auto consider = [&](float score, unsigned candidate) {
        if (score > best_score || (score == best_score && candidate < best)) best_score = score, best = candidate;
    };
    for (unsigned candidate = threadIdx.x; candidate < job.candidates; candidate += THREADS) {
        const float score = job.scores[candidate];
        finite = finite && (__float_as_uint(score) & 0x7F800000u) != 0x7F800000u;
        consider(score, candidate);
    }
    for (int bits = WARP_SIZE / 2; bits > 0; bits /= 2) {
        const float score = __shfl_xor_sync(EVERY_LANE, best_score, bits);
        const unsigned candidate = __shfl_xor_sync(EVERY_LANE, best, bits);
        consider(score, candidate);
    }
    finite = __syncthreads_and(finite) != 0;
    if (lane_index() == 0) {
        scores[warp_index()] = best_score;
        candidates[warp_index()] = best;
    }
    __syncthreads();
    if (threadIdx.x != 0) return;
    for (unsigned warp = 1; warp < WARPS; ++warp) {
        const float score = scores[warp];
        const unsigned candidate = candidates[warp];
        consider(score, candidate);
    }
    job.best[0] = finite ? best : NONE;
}

extern "C" __global__ void __launch_bounds__(THREADS) gather_rank(Global<const Job> jobs) {
    launch_dependents();
    wait_for_predecessor();
    unsigned tile;
    {
        const Job job = jobs[blockIdx.y];
        const Places places = places_of(job);
        const unsigned part = blockIdx.x % places.splits;
        tile = blockIdx.x / places.splits;
        if (tile >= places.tiles) return;  // another job has more
        project(job, places, tile, part);
        if (!is_last(job.counters + tile, places.splits)) return;
    }

    const Job job = jobs[blockIdx.y];  // read anew: held across the projection it spills
    const Places places = places_of(job);
    add_splits(job, places, tile);
    __syncthreads();
    if (job.kind == LISTWISE) project_heads(job, places, tile);
    if (job.kind == POINTWISE) feed_forward(job, places, tile, 1);
    if (!is_last(job.counters + places.tiles, places.tiles)) return;

    if (job.kind == LISTWISE) {
        const unsigned rows = 1 + job.candidates;
        const Shared<unsigned> order = shared_memory<unsigned>();
        sort_rows(job, places, order);
        __syncthreads();
        attend(job, places, order, shared_memory<float>((1 + warp_index()) * rows * 4));
        // Rows of the last tile beyond the candidates belong to nobody; they hold numbers all the same.
        for (size_t i = size_t{rows} * job.columns + threadIdx.x; i < places.rows * job.columns; i += THREADS)
            places.normed[i] = 0.0f;
        __syncthreads();
        product(places.normed, job.columns, places.tiles, job.output, job.columns,
                [&](unsigned row, unsigned column, float a, float b) {
                    const Global<float> to = places.x + (size_t{row} * job.columns + column);
                    to[0] += a + job.output_bias[column];
                    to[1] += b + job.output_bias[column + 1];
                });
        __syncthreads();
        feed_forward(job, places, 0, places.tiles);
    }
    __syncthreads();
    if (job.kind != LINEAR) relevance(job, places);
    __syncthreads();
    choose(job);
}
KERNEL(gather_rank)
