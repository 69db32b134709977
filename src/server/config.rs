//! What a server is told when it starts.

use std::time::Duration;

use crate::engine::MAX_CANDIDATES;
use crate::engine::select::Strategy;

/// Everything about a server but its model and its rankers.
#[derive(Clone, Debug)]
pub struct ServerConfig {
    pub host: String,
    /// 0: one that is free.
    pub port: u16,
    /// Any of these opens every route; none: all routes are open.
    pub api_keys: Vec<String>,
    /// What clients call the model: any of these; answers that were not asked by name have the first.
    pub served_model_names: Vec<String>,
    /// Candidates of a request that does not say how many.
    pub best_of: usize,
    /// Ranker of a request that does not name one.
    pub default_ranker: Option<String>,
    /// How a request that does not say chooses.
    pub select: Option<Strategy>,
    /// Most candidates of a request.
    pub max_candidates: usize,
    /// Longest answer that may be asked for, and the one of a chat that does not say, in tokens.
    pub max_tokens: usize,
    pub default_max_tokens: usize,
    pub max_body_bytes: usize,
    /// Bytes of a request's head.
    pub max_header_bytes: usize,
    pub max_connections: usize,
    /// Most prompts that are being answered or wait.
    pub max_queue: usize,
    /// In which a request's head must arrive; also how long an idle connection is kept.
    pub header_timeout: Duration,
    pub body_timeout: Duration,
    /// How long requests may go on after the signal to stop.
    pub drain_timeout: Duration,
    /// Origins that browsers may call from; `*` for all.
    pub cors_origins: Vec<String>,
}

impl Default for ServerConfig {
    fn default() -> ServerConfig {
        ServerConfig {
            host: "127.0.0.1".to_string(),
            port: 8000,
            api_keys: Vec::new(),
            served_model_names: Vec::new(),
            best_of: 1,
            default_ranker: None,
            select: None,
            max_candidates: MAX_CANDIDATES,
            max_tokens: usize::MAX,
            default_max_tokens: 1024,
            max_body_bytes: 2 << 20,
            max_header_bytes: 16 << 10,
            max_connections: 1024,
            max_queue: 256,
            header_timeout: Duration::from_secs(15),
            body_timeout: Duration::from_secs(30),
            drain_timeout: Duration::from_secs(30),
            cors_origins: Vec::new(),
        }
    }
}

impl ServerConfig {
    /// The first of the model's names.
    pub fn model_name(&self) -> &str {
        self.served_model_names.first().map_or("", String::as_str)
    }
}
