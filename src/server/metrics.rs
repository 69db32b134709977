//! Figures for Prometheus, under vLLM's names where they mean the same.

use std::collections::HashMap;

use prometheus::{
    Encoder, Gauge, Histogram, HistogramOpts, IntCounter, IntCounterVec, IntGauge, Opts, Registry,
    TextEncoder,
};

use crate::engine::Load;

const SECONDS: &[f64] = &[
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0,
];
const MICROS: &[f64] = &[
    1e-5, 2.5e-5, 5e-5, 1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 1e-2, 0.1,
];
const CANDIDATES: &[f64] = &[
    1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0,
];
const GAIN: &[f64] = &[0.0, 0.1, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0];

/// All figures of a server.
pub struct Metrics {
    registry: Registry,
    running: IntGauge,
    waiting: IntGauge,
    candidates_running: IntGauge,
    pages_total: IntGauge,
    pages_free: IntGauge,
    pages_used: IntGauge,
    pages_cached: IntGauge,
    cache_usage: Gauge,
    preemptions: IntCounter,
    computed_tokens: IntCounter,
    pub prompt_tokens: IntCounter,
    pub looked_up_tokens: IntCounter,
    pub cached_tokens: IntCounter,
    pub generation_tokens: IntCounter,
    /// By `finished_reason`: stop, length, abort, error.
    pub finished: IntCounterVec,
    pub time_to_first_token: Histogram,
    pub time_per_output_token: Histogram,
    pub inter_token_latency: Histogram,
    pub request_latency: Histogram,
    pub queue_time: Histogram,
    pub candidates: Histogram,
    pub ranker_time: Histogram,
    pub gain_over_first: Histogram,
    pub ranked: IntCounter,
    pub ranked_other: IntCounter,
    /// By `path` (the route) and `status`.
    pub http_requests: IntCounterVec,
}

impl Metrics {
    /// Every figure is labelled with the model's name.
    pub fn new(model_name: &str) -> Result<Metrics, prometheus::Error> {
        let labels = HashMap::from([("model_name".to_string(), model_name.to_string())]);
        let registry = Registry::new_custom(None, Some(labels))?;
        let cache_usage = Gauge::new(
            "vllm:kv_cache_usage_perc",
            "Share of the KV cache's pages that requests hold, from 0 to 1.",
        )?;
        registry.register(Box::new(cache_usage.clone()))?;
        let gauge = |name: &str, help: &str| -> Result<IntGauge, prometheus::Error> {
            let gauge = IntGauge::new(name, help)?;
            registry.register(Box::new(gauge.clone()))?;
            Ok(gauge)
        };
        let counter = |name: &str, help: &str| -> Result<IntCounter, prometheus::Error> {
            let counter = IntCounter::new(name, help)?;
            registry.register(Box::new(counter.clone()))?;
            Ok(counter)
        };
        let counters = |name: &str, help: &str, labels: &[&str]| {
            let counters = IntCounterVec::new(Opts::new(name, help), labels)?;
            registry.register(Box::new(counters.clone()))?;
            Ok::<_, prometheus::Error>(counters)
        };
        let histogram = |name: &str, help: &str, buckets: &[f64]| {
            let options = HistogramOpts::new(name, help).buckets(buckets.to_vec());
            let histogram = Histogram::with_opts(options)?;
            registry.register(Box::new(histogram.clone()))?;
            Ok::<_, prometheus::Error>(histogram)
        };
        Ok(Metrics {
            running: gauge("vllm:num_requests_running", "Prompts being computed.")?,
            waiting: gauge("vllm:num_requests_waiting", "Prompts that wait for memory.")?,
            candidates_running: gauge(
                "podium_candidates_running",
                "Candidates of the prompts being computed.",
            )?,
            pages_total: gauge("podium_kv_pages", "Pages of the KV cache.")?,
            pages_free: gauge("podium_kv_pages_free", "Pages that hold nothing.")?,
            pages_used: gauge(
                "podium_kv_pages_used",
                "Pages that hold something, kept prompts included.",
            )?,
            pages_cached: gauge(
                "podium_kv_pages_cached",
                "Pages that keep earlier prompts and are given up when needed.",
            )?,
            preemptions: counter(
                "vllm:num_preemptions_total",
                "Prompts that lost their pages for a while.",
            )?,
            computed_tokens: counter(
                "podium_computed_rows_total",
                "Rows that went through the model.",
            )?,
            prompt_tokens: counter("vllm:prompt_tokens_total", "Tokens of prompts.")?,
            cache_usage,
            looked_up_tokens: counter(
                "vllm:prefix_cache_queries_total",
                "Tokens of prompts that were looked for in the cache.",
            )?,
            cached_tokens: counter(
                "vllm:prefix_cache_hits_total",
                "Tokens of prompts that were in the cache.",
            )?,
            generation_tokens: counter(
                "vllm:generation_tokens_total",
                "Tokens of answers, all candidates.",
            )?,
            finished: counters(
                "vllm:request_success_total",
                "Prompts that are done, by how they ended.",
                &["finished_reason"],
            )?,
            time_to_first_token: histogram(
                "vllm:time_to_first_token_seconds",
                "From a prompt's arrival to the first token of its candidates.",
                SECONDS,
            )?,
            time_per_output_token: histogram(
                "vllm:request_time_per_output_token_seconds",
                "Decoding time of a prompt's longest candidate over its tokens.",
                SECONDS,
            )?,
            inter_token_latency: histogram(
                "vllm:inter_token_latency_seconds",
                "Between two tokens of a prompt's candidates.",
                SECONDS,
            )?,
            request_latency: histogram(
                "vllm:e2e_request_latency_seconds",
                "From a prompt's arrival to its answer.",
                SECONDS,
            )?,
            queue_time: histogram(
                "vllm:request_queue_time_seconds",
                "From a prompt's arrival to its first step.",
                SECONDS,
            )?,
            candidates: histogram(
                "podium_request_candidates",
                "Candidates of a prompt.",
                CANDIDATES,
            )?,
            ranker_time: histogram(
                "podium_ranker_seconds",
                "Time that the ranker took for a prompt's candidates.",
                MICROS,
            )?,
            gain_over_first: histogram(
                "podium_ranker_gain_over_first",
                "Score of the chosen candidate less that of the first.",
                GAIN,
            )?,
            ranked: counter(
                "podium_ranked_total",
                "Prompts whose answer a ranker chose.",
            )?,
            ranked_other: counter(
                "podium_ranked_not_first_total",
                "Of these, those where it chose another candidate than the first.",
            )?,
            http_requests: counters(
                "podium_http_requests_total",
                "Requests by route and status.",
                &["path", "status"],
            )?,
            registry,
        })
    }

    /// The text that Prometheus reads.
    pub fn render(&self, load: &Load) -> Result<String, prometheus::Error> {
        let clamp = |count: usize| i64::try_from(count).unwrap_or(i64::MAX);
        self.running.set(clamp(load.running));
        self.waiting.set(clamp(load.waiting));
        self.candidates_running.set(clamp(load.candidates));
        self.pages_total.set(clamp(load.pages));
        self.pages_free.set(clamp(load.pages - load.used_pages));
        self.pages_used.set(clamp(load.used_pages));
        self.pages_cached.set(clamp(load.cached_pages));
        let held = load.used_pages.saturating_sub(load.cached_pages);
        self.cache_usage.set(held as f64 / load.pages.max(1) as f64);
        // The engine counts these itself; two readers at once must not count a rise twice.
        static READING: std::sync::Mutex<()> = std::sync::Mutex::new(());
        let _one = READING.lock();
        let rise = |counter: &IntCounter, to: u64| counter.inc_by(to.saturating_sub(counter.get()));
        rise(&self.preemptions, load.preemptions);
        rise(&self.computed_tokens, load.computed_tokens);
        let mut text = Vec::new();
        TextEncoder::new().encode(&self.registry.gather(), &mut text)?;
        Ok(String::from_utf8_lossy(&text).into_owned())
    }
}
