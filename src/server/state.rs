//! What every request's handler can reach.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use tokio::sync::watch;

use super::ask::check_model;
use super::config::ServerConfig;
use super::error::ApiError;
use super::metrics::Metrics;
use super::rankers::Rankers;
use super::worker::EngineHandle;
use crate::backend::sampling::SamplingParams;
use crate::model::text::{ChatTemplate, TextError, Tokenizer};

/// Handlers' hold on the server.
pub type Shared = Arc<Server>;

/// What a server is made of.
pub struct Server {
    pub config: ServerConfig,
    pub engine: EngineHandle,
    pub model: ModelInfo,
    pub tokenizer: Arc<Tokenizer>,
    /// Or why there is none.
    pub template: Result<ChatTemplate, TextError>,
    /// How the model's makers sample from it.
    pub sampling: SamplingParams,
    pub rankers: Rankers,
    pub metrics: Arc<Metrics>,
    pub phase: watch::Sender<Phase>,
    /// Prompts that are being answered or wait.
    pub in_flight: Arc<AtomicUsize>,
    pub started: SystemTime,
}

/// What the engine's model is.
#[derive(Clone, Debug)]
pub struct ModelInfo {
    pub name: String,
    pub architecture: String,
    pub fingerprint: String,
    pub hidden_size: usize,
    pub layers: usize,
    pub vocab_size: usize,
    pub context: usize,
}

/// How far a server is from its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd)]
pub enum Phase {
    Serving,
    /// Requests that are there go on; no others are taken.
    Draining,
    /// What still runs is told that it will not end.
    Aborting,
}

/// A prompt's place among those in flight.
pub struct Place {
    in_flight: Arc<AtomicUsize>,
    prompts: usize,
}

impl Drop for Place {
    fn drop(&mut self) {
        self.in_flight.fetch_sub(self.prompts, Ordering::AcqRel);
    }
}

impl Server {
    pub fn phase(&self) -> Phase {
        *self.phase.borrow()
    }

    /// Whether the model's names ask for what there is.
    ///
    /// # Errors
    /// What is wrong with one of them.
    pub fn check_names(&self) -> Result<(), String> {
        for name in &self.config.served_model_names {
            check_model(self, name).map_err(|_| {
                format!("`{name}` asks for a ranker or a number of candidates that there is not")
            })?;
        }
        Ok(())
    }

    /// Takes places for a request's prompts, to be given back when it has its answer.
    pub fn admit(&self, prompts: usize) -> Result<Place, ApiError> {
        if self.phase() != Phase::Serving {
            return Err(ApiError::draining());
        }
        if !self.engine.is_alive() {
            return Err(ApiError::engine_gone());
        }
        let most = self.config.max_queue;
        let taken = self
            .in_flight
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, |there| {
                (there + prompts <= most).then_some(there + prompts)
            });
        match taken {
            Ok(_) => Ok(Place {
                in_flight: self.in_flight.clone(),
                prompts,
            }),
            Err(_) => Err(ApiError::overloaded()),
        }
    }

    /// Resolves when what still runs is to be given up.
    pub async fn aborted(&self) {
        let mut phase = self.phase.subscribe();
        // The sender is part of the server, so there is one.
        let _ = phase.wait_for(|phase| *phase == Phase::Aborting).await;
    }
}

/// Seconds since 1970.
pub fn unix_time(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_secs())
}
