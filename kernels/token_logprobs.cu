// What the log-probability of one token of each row of logits is made of; the host takes the logarithm, in float64.
//
//   logits  [rows, vocab_size] float32
//   tokens  [rows]
//   out     [rows]: Σ exp(logit - max), max, the token's logit
//
// A block is one row, read twice: a row of 128k logits is half a MB, which stays in the second-level cache. Bound by
// that cache.

#include "softmax.cuh"

constexpr unsigned THREADS = 1024;

struct TokenLogit {
    double sum_exp;
    float max, logit;
};

extern "C" __global__ void __launch_bounds__(THREADS)
    token_logprobs(Global<const float> all_logits, Global<const unsigned> tokens, unsigned vocab_size,
                   Global<TokenLogit> out) {
    launch_dependents();
    wait_for_predecessor();
    const Global<const float> logits = all_logits + size_t{blockIdx.x} * vocab_size;
    const Shared<double> sums = shared_memory<double>();
    const float max = max_and_sum<THREADS>(logits, vocab_size, sums).max;
    const double sum_exp = sum_of_exp<THREADS>(logits, vocab_size, max, sums);
    if (threadIdx.x == 0) out[blockIdx.x] = {sum_exp, max, logits[tokens[blockIdx.x]]};
}
KERNEL(token_logprobs)
