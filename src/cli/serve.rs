//! `podium serve`: the HTTP server.

use std::collections::BTreeMap;
use std::io::Write;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicUsize;
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use clap::{ArgAction, Args, ValueEnum};
use serde::{Deserialize, Deserializer};
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

use super::error::CliError;
use super::options::GlobalOptions;
use super::session::Session;
use crate::engine::MAX_CANDIDATES;
use crate::engine::select::Strategy;
use crate::server::config::ServerConfig;
use crate::server::metrics::Metrics;
use crate::server::rankers::{Origin, Rankers};
use crate::server::state::{ModelInfo, Phase, Server};

const EXAMPLES: &str = "\
Examples:
  podium serve
  podium serve --best-of 16 --ranker mine=my-ranker.safetensors --api-key KEY
  curl http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' \\
    -d '{\"best_of\": 8, \"messages\": [{\"role\": \"user\", \"content\": \"Why is the sky blue?\"}]}'

Every option may stand in the file of --config too (TOML, by its name: best-of = 8), and most in the
environment (PODIUM_BEST_OF). The command line goes first, then the environment, then the file.";

/// Serve best-of-N answers over HTTP, by OpenAI's API
#[derive(Args, Clone, Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
#[command(after_help = EXAMPLES)]
pub struct ServeOptions {
    /// Address to listen at [default: 127.0.0.1]
    #[arg(long, env = "PODIUM_HOST")]
    host: Option<String>,

    /// Port; 0: one that is free [default: 8000]
    #[arg(long, env = "PODIUM_PORT")]
    port: Option<u16>,

    /// Key that clients must give (as often as wanted)
    #[arg(long, value_name = "KEY", env = "PODIUM_API_KEY", hide_env_values = true, action = ArgAction::Append)]
    #[serde(deserialize_with = "one_or_more")]
    api_key: Vec<String>,

    /// What clients call the model (as often as wanted) [default: its own name]
    #[arg(long, value_name = "NAME", env = "PODIUM_SERVED_MODEL_NAME", action = ArgAction::Append)]
    #[serde(deserialize_with = "one_or_more")]
    served_model_name: Vec<String>,

    /// Candidates of a request that does not say how many [default: 1]
    #[arg(
        long,
        value_name = "N",
        env = "PODIUM_BEST_OF",
        allow_negative_numbers = true
    )]
    best_of: Option<usize>,

    /// Ranker, by a name for requests (as often as wanted); the first one given chooses where a
    /// request does not say. A built-in one needs no file
    #[arg(long, value_name = "NAME=FILE", action = ArgAction::Append)]
    #[serde(deserialize_with = "one_or_more")]
    ranker: Vec<String>,

    /// How requests that do not say choose [default: ranker if there is one, else logprob]
    #[arg(long, value_name = "STRATEGY", env = "PODIUM_SELECT")]
    select: Option<Strategy>,

    /// Most candidates of a request [default: 1024]
    #[arg(
        long,
        value_name = "N",
        env = "PODIUM_MAX_CANDIDATES",
        allow_negative_numbers = true
    )]
    max_candidates: Option<usize>,

    /// Longest answer that may be asked for, in tokens [default: the model's context]
    #[arg(
        long,
        value_name = "TOKENS",
        env = "PODIUM_MAX_TOKENS",
        allow_negative_numbers = true
    )]
    max_tokens: Option<usize>,

    /// Longest answer of a chat that does not say, in tokens [default: 1024]
    #[arg(
        long,
        value_name = "TOKENS",
        env = "PODIUM_DEFAULT_MAX_TOKENS",
        allow_negative_numbers = true
    )]
    default_max_tokens: Option<usize>,

    /// Memory for keys and values, in MiB [default: 4096]
    #[arg(
        long,
        value_name = "MIB",
        env = "PODIUM_KV_MEMORY",
        allow_negative_numbers = true
    )]
    kv_memory: Option<usize>,

    /// Candidates that are decoded together [default: 256]
    #[arg(
        long,
        value_name = "N",
        env = "PODIUM_MAX_BATCH",
        allow_negative_numbers = true
    )]
    max_batch: Option<usize>,

    /// Largest body of a request, in KiB [default: 2048]
    #[arg(
        long,
        value_name = "KIB",
        env = "PODIUM_MAX_BODY",
        allow_negative_numbers = true
    )]
    max_body: Option<usize>,

    /// Largest head of a request, in KiB [default: 16]
    #[arg(
        long,
        value_name = "KIB",
        env = "PODIUM_MAX_HEADER",
        allow_negative_numbers = true
    )]
    max_header: Option<usize>,

    /// Most connections [default: 1024]
    #[arg(
        long,
        value_name = "N",
        env = "PODIUM_MAX_CONNECTIONS",
        allow_negative_numbers = true
    )]
    max_connections: Option<usize>,

    /// Most prompts that are answered or wait; further ones get 429 [default: 256]
    #[arg(
        long,
        value_name = "N",
        env = "PODIUM_MAX_QUEUE",
        allow_negative_numbers = true
    )]
    max_queue: Option<usize>,

    /// Seconds for a request's head, and for an idle connection [default: 15]
    #[arg(
        long,
        value_name = "SECONDS",
        env = "PODIUM_HEADER_TIMEOUT",
        allow_negative_numbers = true
    )]
    header_timeout: Option<f64>,

    /// Seconds for a request's body [default: 30]
    #[arg(
        long,
        value_name = "SECONDS",
        env = "PODIUM_BODY_TIMEOUT",
        allow_negative_numbers = true
    )]
    body_timeout: Option<f64>,

    /// Seconds that requests may go on for after the signal to stop [default: 30]
    #[arg(
        long,
        value_name = "SECONDS",
        env = "PODIUM_DRAIN_TIMEOUT",
        allow_negative_numbers = true
    )]
    drain_timeout: Option<f64>,

    /// Origin that pages in browsers may call from; * for all (as often as wanted) [default: none]
    #[arg(long, value_name = "ORIGIN", action = ArgAction::Append)]
    #[serde(deserialize_with = "one_or_more")]
    cors_origin: Vec<String>,

    /// Form of the log on standard error [default: text]
    #[arg(long, value_name = "FORM", env = "PODIUM_LOG_FORMAT")]
    log_format: Option<LogFormat>,

    /// Read options from a TOML file too
    #[arg(long, value_name = "FILE", env = "PODIUM_CONFIG")]
    #[serde(skip)]
    config: Option<PathBuf>,
}

/// In the file, what may be given several times is a string or a list of them.
fn one_or_more<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<String>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged, expecting = "a string or a list of strings")]
    enum OneOrMore {
        One(String),
        More(Vec<String>),
    }
    Ok(match OneOrMore::deserialize(from)? {
        OneOrMore::One(one) => vec![one],
        OneOrMore::More(more) => more,
    })
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum LogFormat {
    Text,
    Json,
}

/// Runs until SIGTERM or SIGINT.
pub fn run(global: &GlobalOptions, options: &ServeOptions) -> Result<(), CliError> {
    let options = options.clone().with_file()?;
    let mut config = options.server_config()?;
    let named = named_rankers(&options.ranker)?;
    start_log(options.log_format, global.verbose)?;
    let session = Session::open(global)?;

    let (rankers, default_ranker) = rankers(&session, &named)?;
    config.default_ranker = default_ranker;
    let model = ModelInfo {
        name: session.engine.model_name().to_string(),
        architecture: session.engine.config().architecture.to_string(),
        fingerprint: session.engine.fingerprint().to_string(),
        hidden_size: session.engine.config().hidden_size,
        layers: session.engine.config().layers,
        vocab_size: session.engine.config().vocab_size,
        context: session.engine.config().max_position_embeddings,
    };
    if config.served_model_names.is_empty() {
        config.served_model_names.push(model.name.clone());
    }
    config.max_tokens = config.max_tokens.min(model.context);
    let sampling = session.sampling.clone();
    let (engine, tokenizer, template) = session.into_parts();
    let tokenizer = tokenizer?;

    let failed = |error: String| CliError::Failed(error);
    let metrics = Metrics::new(config.model_name())
        .map_err(|error| failed(format!("cannot count: {error}")))?;
    let metrics = Arc::new(metrics);
    let memory = options.kv_memory.unwrap_or(4096).saturating_mul(1 << 20);
    let (engine, pages) = engine
        .serve(
            memory,
            options.max_batch.unwrap_or(256).max(1),
            metrics.clone(),
        )
        .map_err(|error| failed(format!("cannot start the engine: {error}")))?;
    tracing::info!(
        model = model.name,
        context = model.context,
        kv_pages = pages,
        best_of = config.best_of,
        rankers = rankers.names().join(","),
        "ready"
    );
    let (host, port) = (config.host.clone(), config.port);
    let server = Arc::new(Server {
        config,
        engine,
        model,
        tokenizer,
        template,
        sampling,
        rankers,
        metrics,
        phase: watch::Sender::new(Phase::Serving),
        in_flight: Arc::new(AtomicUsize::new(0)),
        started: SystemTime::now(),
    });
    server
        .check_names()
        .map_err(|problem| CliError::Usage(format!("--served-model-name: {problem}")))?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .map_err(|error| failed(format!("cannot start the server's threads: {error}")))?;
    let served = runtime.block_on(async {
        let stop = stop_signal()?;
        let listener = TcpListener::bind((host.clone(), port)).await?;
        announce(listener.local_addr()?)?;
        crate::server::serve(server, listener, stop).await;
        Ok::<_, std::io::Error>(())
    });
    runtime.shutdown_background();
    served.map_err(|error| failed(format!("cannot serve at {host}:{port}: {error}")))
}

/// The one line of standard output, once connections are taken.
fn announce(address: SocketAddr) -> std::io::Result<()> {
    let mut stdout = std::io::stdout().lock();
    writeln!(stdout, "listening on http://{address}")?;
    stdout.flush()
}

/// Resolves with the first SIGTERM or SIGINT; a second ends the process at once.
fn stop_signal() -> std::io::Result<impl Future<Output = ()> + Send + 'static> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    Ok(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        tokio::spawn(async move {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
            std::process::exit(130);
        });
    })
}

fn start_log(format: Option<LogFormat>, verbose: bool) -> Result<(), CliError> {
    let level = if verbose {
        tracing::Level::DEBUG
    } else {
        tracing::Level::INFO
    };
    let builder = tracing_subscriber::fmt()
        .with_max_level(level)
        .with_target(false)
        .with_ansi(false)
        .with_writer(Mutex::new(std::io::stderr()));
    let started = match format.unwrap_or(LogFormat::Text) {
        LogFormat::Text => builder.try_init(),
        LogFormat::Json => builder.json().try_init(),
    };
    started.map_err(|error| CliError::Failed(format!("cannot log: {error}")))
}

/// The rankers of the command line, as (name, file or built-in).
fn named_rankers(given: &[String]) -> Result<Vec<(String, String)>, CliError> {
    let mut named = Vec::with_capacity(given.len());
    let mut seen = BTreeMap::new();
    for ranker in given {
        let (name, file) = match ranker.split_once('=') {
            Some((name, file)) => (name.to_string(), file.to_string()),
            None if Path::new(ranker).components().count() == 1
                && Path::new(ranker).extension().is_none() =>
            {
                (ranker.clone(), ranker.clone())
            }
            None => {
                return Err(CliError::Usage(format!(
                    "--ranker {ranker}: give it a name for requests: --ranker NAME={ranker}"
                )));
            }
        };
        if seen.insert(name.clone(), ()).is_some() {
            return Err(CliError::Usage(format!(
                "--ranker {name}: that name is given twice"
            )));
        }
        named.push((name, file));
    }
    Ok(named)
}

/// All rankers, and the name of the default one.
fn rankers(
    session: &Session,
    named: &[(String, String)],
) -> Result<(Rankers, Option<String>), CliError> {
    let rankers = Rankers::for_model(session.engine.fingerprint());
    for (name, file) in named {
        let ranker = session.ranker(file)?;
        rankers
            .insert(name, ranker, Origin::File)
            .map_err(|reason| CliError::Usage(format!("--ranker {name}: {reason}")))?;
    }
    Ok((rankers, named.first().map(|(name, _)| name.clone())))
}

impl ServeOptions {
    /// With what the file says where neither the command line nor the environment does.
    fn with_file(mut self) -> Result<ServeOptions, CliError> {
        let Some(path) = self.config.take() else {
            return Ok(self);
        };
        let failed = |problem: String| {
            CliError::Usage(format!("--config {}: {}", path.display(), problem.trim()))
        };
        let text = std::fs::read_to_string(&path).map_err(|error| failed(error.to_string()))?;
        let file: ServeOptions = toml::from_str(&text).map_err(|error| {
            let line = error
                .span()
                .map(|span| 1 + text[..span.start].matches('\n').count());
            let place = line.map_or(String::new(), |line| format!("line {line}: "));
            failed(format!("{place}{}", error.message()))
        })?;
        macro_rules! fill {
            ($($single:ident),*; $($list:ident),*) => {
                $(self.$single = self.$single.or(file.$single);)*
                $(if self.$list.is_empty() { self.$list = file.$list; })*
            };
        }
        fill!(
            host, port, best_of, select, max_candidates, max_tokens,
            default_max_tokens, kv_memory, max_batch, max_body, max_header, max_connections, max_queue,
            header_timeout, body_timeout, drain_timeout, log_format;
            api_key, served_model_name, ranker, cors_origin
        );
        Ok(self)
    }

    fn server_config(&self) -> Result<ServerConfig, CliError> {
        let defaults = ServerConfig::default();
        let count = |name: &str, given: Option<usize>, default: usize, most: usize| match given {
            None => Ok(default),
            Some(count) if (1..=most).contains(&count) => Ok(count),
            Some(count) => Err(CliError::Usage(format!(
                "--{name} must be between 1 and {most}, not {count}"
            ))),
        };
        let seconds = |name: &str, given: Option<f64>, default: Duration| match given {
            None => Ok(default),
            Some(seconds) => Duration::try_from_secs_f64(seconds)
                .ok()
                .filter(|duration| *duration <= Duration::from_secs(86_400))
                .ok_or_else(|| {
                    CliError::Usage(format!(
                        "--{name} must be between 0 and 86400 seconds, not {seconds}"
                    ))
                }),
        };
        if self.select == Some(Strategy::Beam) {
            return Err(CliError::Usage(
                "--select beam: beam search does not run beside other requests".to_string(),
            ));
        }
        if self
            .api_key
            .iter()
            .any(|key| key.trim() != key || key.is_empty())
        {
            return Err(CliError::Usage(
                "--api-key must not be empty, and have no spaces around it".to_string(),
            ));
        }
        if self.served_model_name.iter().any(String::is_empty) {
            let problem = "--served-model-name must not be empty";
            return Err(CliError::Usage(problem.to_string()));
        }
        let max_candidates = count(
            "max-candidates",
            self.max_candidates,
            defaults.max_candidates,
            MAX_CANDIDATES,
        )?;
        let any = usize::MAX;
        Ok(ServerConfig {
            host: self.host.clone().unwrap_or(defaults.host),
            port: self.port.unwrap_or(defaults.port),
            api_keys: self.api_key.clone(),
            served_model_names: self.served_model_name.clone(),
            best_of: count("best-of", self.best_of, defaults.best_of, max_candidates)?,
            default_ranker: None,
            select: self.select,
            max_candidates,
            max_tokens: count("max-tokens", self.max_tokens, defaults.max_tokens, any)?,
            default_max_tokens: count(
                "default-max-tokens",
                self.default_max_tokens,
                defaults.default_max_tokens,
                any,
            )?,
            max_body_bytes: 1024 * count("max-body", self.max_body, 2048, 1 << 20)?,
            // What hyper takes at least is 8 KiB.
            max_header_bytes: 1024 * count("max-header", self.max_header, 16, 1 << 10)?.max(8),
            max_connections: count("max-connections", self.max_connections, 1024, 1 << 20)?,
            max_queue: count("max-queue", self.max_queue, defaults.max_queue, 1 << 20)?,
            header_timeout: seconds(
                "header-timeout",
                self.header_timeout,
                defaults.header_timeout,
            )?,
            body_timeout: seconds("body-timeout", self.body_timeout, defaults.body_timeout)?,
            drain_timeout: seconds("drain-timeout", self.drain_timeout, defaults.drain_timeout)?,
            cors_origins: self.cors_origin.clone(),
        })
    }
}
