"""The work of Podium's kernels by torch and transformers, for the report of scripts/gpu-check. Prints Markdown.

Weights and inputs are random; every time is the median of several, by CUDA's events, after a warm-up. With --tiny (and
where there is no GPU) everything is small, which shows that it runs, and no speed.
"""

import argparse
import statistics
import time

import torch
import torch.nn.functional as F

CANDIDATES = [1, 8, 32, 100]
PROMPT, OWN = 512, 32


def seconds(work, repeats, on_gpu):
    """The median time of `work`, called over and over."""
    for _ in range(3):
        work()
    times = []
    for _ in range(repeats):
        if on_gpu:
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            work()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) / 1e3)
        else:
            begin = time.perf_counter()
            work()
            times.append(time.perf_counter() - begin)
    return statistics.median(times)


class Torch:
    def __init__(self, tiny):
        self.on_gpu = torch.cuda.is_available()
        self.tiny = tiny or not self.on_gpu
        self.device = "cuda" if self.on_gpu else "cpu"
        self.repeats = 3 if self.tiny else 30

    def randn(self, *shape, dtype=torch.bfloat16):
        return torch.randn(*shape, device=self.device, dtype=dtype)

    def seconds(self, work):
        return seconds(work, self.repeats, self.on_gpu)

    def limits(self):
        size = 256 if self.tiny else 8192
        a, b = self.randn(size, size), self.randn(size, size)
        rate = 2 * size**3 / self.seconds(lambda: a @ b)
        x = torch.ones((1 << 16) if self.tiny else (1 << 28), device=self.device)
        y = torch.empty_like(x)
        copied = 2 * x.numel() * 4 / self.seconds(lambda: y.copy_(x))
        print("| limit | |\n| --- | --- |")
        print(f"| torch.matmul, bfloat16, {size}³ | {rate / 1e12:.3g} TFLOP/s |")
        print(f"| copy (read + written) | {copied / 1e9:.4g} GB/s |\n")

    def products(self):
        hidden, wide = (128, 256) if self.tiny else (4096, 14336)
        copies = 1 if self.tiny else 4
        print("| torch.nn.functional.linear | rows | µs | GB/s of weights | TFLOP/s |\n| --- | --- | --- | --- | --- |")
        for name, outputs, inputs in [("gate, up", 2 * wide, hidden), ("down", hidden, wide)]:
            weights = [self.randn(outputs, inputs) for _ in range(copies)]
            for rows in CANDIDATES + [PROMPT]:
                x, turn = self.randn(rows, inputs), iter(range(1 << 30))
                took = self.seconds(lambda: F.linear(x, weights[next(turn) % copies]))
                bandwidth, rate = 2 * outputs * inputs / took, 2 * rows * outputs * inputs / took
                print(f"| {name} | {rows} | {took * 1e6:.1f} | {bandwidth / 1e9:.0f} | {rate / 1e12:.2f} |")
        print()

    def attention(self):
        """Every candidate over prompt and own tokens, as a cache of whole sequences has them; and a prompt."""
        heads, kv_heads, dim = (4, 2, 32) if self.tiny else (32, 8, 128)
        print("| scaled_dot_product_attention, one layer | rows | µs |\n| --- | --- | --- |")
        for n in CANDIDATES:
            q = self.randn(n, heads, 1, dim)
            k, v = (self.randn(n, kv_heads, PROMPT + OWN, dim) for _ in range(2))
            took = self.seconds(lambda: F.scaled_dot_product_attention(q, k, v, enable_gqa=True))
            print(f"| decoding, each its own copy of the prompt | {n} | {took * 1e6:.1f} |")
        q = self.randn(1, heads, PROMPT, dim)
        k, v = (self.randn(1, kv_heads, PROMPT, dim) for _ in range(2))
        took = self.seconds(lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True))
        print(f"| a prompt | {PROMPT} | {took * 1e6:.1f} |\n")

    def ranking(self):
        """What gather_rank does in one launch, by library calls in float32."""
        hidden, columns, heads, wide = 128 if self.tiny else 4096, 64, 4, 128
        for n in [8, 100]:
            f32 = torch.float32
            states, prompt = self.randn(2 * n, hidden, dtype=f32), self.randn(1, hidden, dtype=f32)
            rows = torch.arange(n, device=self.device) * 2
            projection = self.randn(hidden, columns, dtype=f32)
            qkv, output = self.randn(columns, 3 * columns, dtype=f32), self.randn(columns, columns, dtype=f32)
            up, down = self.randn(columns, wide, dtype=f32), self.randn(wide, columns, dtype=f32)
            gain, bias = torch.ones(columns, device=self.device), torch.zeros(columns, device=self.device)

            def rank():
                x = torch.cat([prompt, states.index_select(0, rows)])
                x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)
                x = x @ projection
                q, k, v = (F.layer_norm(x, (columns,), gain, bias) @ qkv).view(n + 1, 3, heads, -1).permute(1, 2, 0, 3)
                x = x + F.scaled_dot_product_attention(q, k, v).transpose(0, 1).reshape(n + 1, columns) @ output
                x = x + F.gelu(F.layer_norm(x, (columns,), gain, bias) @ up) @ down
                scores = x[1:] @ x[0]
                return scores, scores.argmax()

            print(f"| ranking {n} of hidden size {hidden} | µs |\n| --- | --- |")
            print(f"| library calls | {self.seconds(rank) * 1e6:.1f} |")
            if self.on_gpu:
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    rank()
                print(f"| the same calls, captured as one CUDA graph | {self.seconds(graph.replay) * 1e6:.1f} |")
            print()

    def whole_steps(self):
        try:
            from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM
        except ImportError:
            print("transformers is not there: no whole steps.\n")
            return
        sizes = dict(hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
                     num_key_value_heads=2, vocab_size=512) if self.tiny else \
            dict(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
                 num_key_value_heads=8, vocab_size=128256)  # fmt: skip
        prompt, steps = (20, 3) if self.tiny else (PROMPT, 16)
        with torch.device(self.device):
            torch.set_default_dtype(torch.bfloat16)
            model = LlamaForCausalLM(LlamaConfig(**sizes, max_position_embeddings=8192)).eval()
            torch.set_default_dtype(torch.float32)
        tokens = torch.randint(sizes["vocab_size"], (1, prompt), device=self.device)
        print("| transformers, Llama-3.1-8B's shape, bfloat16 | ms |\n| --- | --- |")
        with torch.inference_mode():
            took = self.seconds(lambda: model(tokens, use_cache=False, logits_to_keep=1))
            print(f"| prefill {prompt} | {took * 1e3:.2f} |")
            for n in CANDIDATES[:2] if self.tiny else CANDIDATES:
                cache = DynamicCache()
                model(tokens, past_key_values=cache, logits_to_keep=1)
                cache.batch_repeat_interleave(n)
                last = tokens[:, -1:].repeat(n, 1)
                times = []
                for _ in range(steps):
                    if self.on_gpu:
                        torch.cuda.synchronize()
                    begin = time.perf_counter()
                    last = model(last, past_key_values=cache).logits[:, -1].argmax(-1, keepdim=True)
                    last.tolist()
                    times.append(time.perf_counter() - begin)
                print(f"| step, N = {n} | {statistics.median(times) * 1e3:.2f} |")
        print()


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="small shapes")
    options = parser.parse_args()
    torch.manual_seed(1)
    peer = Torch(options.tiny)
    name = torch.cuda.get_device_name() if peer.on_gpu else "the CPU"
    print(f"torch {torch.__version__} on {name}.\n")
    if peer.tiny:
        print("**Tiny shapes: this shows that it runs, and no speed.**\n")
    peer.limits()
    peer.products()
    peer.attention()
    peer.ranking()
    peer.whole_steps()


if __name__ == "__main__":
    main()
