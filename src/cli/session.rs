//! A model opened as the global options say.

use std::io::Read;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use serde::Deserialize;

use super::error::CliError;
use super::options::{Device, DtypeChoice, GlobalOptions};
use super::progress::{Progress, Unit};
use crate::backend::cpu::Cpu;
use crate::backend::cpu::simd::Isa;
use crate::backend::cpu::softmax;
use crate::backend::cuda::emulated::{Checks, Emulated};
use crate::backend::cuda::gpu::Gpu;
use crate::backend::cuda::{self, Cuda};
use crate::backend::sampling::SamplingParams;
use crate::backend::{Backend, BackendError};
use crate::engine::scheduler::{GroupId, Limits};
use crate::engine::{
    Completed, Engine, EngineError, GenerateRequest, Generated, GroupObserver, Observer,
    ScoreRequest, Scored,
};
use crate::model::config::ModelConfig;
use crate::model::files::{ModelFiles, TextSource};
use crate::model::forward::Model;
use crate::model::text::{ChatMessage, ChatRequest, ChatTemplate, TextError, Tokenizer};
use crate::model::{default_model, hub};
use crate::ranker::{Ranker, builtin, find_builtin};
use crate::server::metrics::Metrics;
use crate::server::worker::EngineHandle;
use crate::tasks::candidates::{Candidates, Item, Prompt};
use crate::tasks::feature_file::FeatureSource;

/// Instruction set to run with instead of the best one: `avx512`, `avx-vnni`, `avx2`, `neon-i8mm`,
/// `neon` or `portable`.
const ISA_VARIABLE: &str = "PODIUM_ISA";
/// `off`: a GPU launches every step kernel by kernel, or each kernel when the one before it has ended.
const GRAPHS_VARIABLE: &str = "PODIUM_GRAPHS";
const DEPENDENT_LAUNCH_VARIABLE: &str = "PODIUM_DEPENDENT_LAUNCH";
/// For tests: bytes that the emulated device has, and launches after which it is lost.
const EMULATED_MEMORY_VARIABLE: &str = "PODIUM_EMULATE_MEMORY";
const EMULATED_LOSS_VARIABLE: &str = "PODIUM_EMULATE_LOST_AFTER";
/// Temperature where neither the command nor the model's files name one.
const DEFAULT_TEMPERATURE: f32 = 0.7;
/// Longest `generation_config.json` that is read.
const MAX_CONFIG_BYTES: u64 = 1 << 20;

/// An engine, whichever device it is on.
pub trait AnyEngine {
    /// [`Engine::generate`]
    fn generate(
        &mut self,
        request: &GenerateRequest,
        observer: &mut Observer,
    ) -> Result<Generated, EngineError>;
    /// [`Engine::score`]
    fn score(&mut self, request: &ScoreRequest) -> Result<Scored, EngineError>;
    /// [`Engine::submit`]
    fn submit(&mut self, request: GenerateRequest) -> Result<GroupId, EngineError>;
    /// [`Engine::submit_score`]
    fn submit_score(&mut self, request: ScoreRequest) -> Result<GroupId, EngineError>;
    /// [`Engine::step`]
    fn step(&mut self, observer: &mut GroupObserver) -> Vec<Completed>;
    /// [`Engine::with_limits`]
    fn with_limits(self: Box<Self>, limits: Limits) -> Box<dyn AnyEngine>;
    /// [`Engine::page_bytes`]
    fn page_bytes(&self) -> usize;
    fn config(&self) -> &ModelConfig;
    fn model_name(&self) -> &str;
    fn fingerprint(&self) -> &str;
    fn device(&self) -> String;
    /// Moves the engine to a thread of its own, with this much memory for keys and values and so many
    /// candidates at a time; gives the pages of the KV cache too.
    fn serve(
        self: Box<Self>,
        kv_bytes: usize,
        candidates: usize,
        metrics: Arc<Metrics>,
    ) -> std::io::Result<(EngineHandle, usize)>;
}

impl<B: Backend> AnyEngine for Engine<B> {
    fn generate(
        &mut self,
        request: &GenerateRequest,
        observer: &mut Observer,
    ) -> Result<Generated, EngineError> {
        Engine::generate(self, request, observer)
    }

    fn score(&mut self, request: &ScoreRequest) -> Result<Scored, EngineError> {
        Engine::score(self, request)
    }

    fn submit(&mut self, request: GenerateRequest) -> Result<GroupId, EngineError> {
        Engine::submit(self, request)
    }

    fn submit_score(&mut self, request: ScoreRequest) -> Result<GroupId, EngineError> {
        Engine::submit_score(self, request)
    }

    fn step(&mut self, observer: &mut GroupObserver) -> Vec<Completed> {
        Engine::step(self, observer)
    }

    fn with_limits(self: Box<Self>, limits: Limits) -> Box<dyn AnyEngine> {
        Box::new(Engine::with_limits(*self, limits))
    }

    fn page_bytes(&self) -> usize {
        Engine::page_bytes(self)
    }

    fn config(&self) -> &ModelConfig {
        Engine::config(self)
    }

    fn model_name(&self) -> &str {
        &self.model().name
    }

    fn fingerprint(&self) -> &str {
        &self.model().fingerprint
    }

    fn device(&self) -> String {
        self.model().backend.name()
    }

    fn serve(
        self: Box<Self>,
        kv_bytes: usize,
        candidates: usize,
        metrics: Arc<Metrics>,
    ) -> std::io::Result<(EngineHandle, usize)> {
        let pages = (kv_bytes / self.page_bytes()).max(1);
        let limits = Limits {
            pages,
            cached_pages: pages / 4,
            candidates,
            ..Limits::default()
        };
        let engine = Engine::with_room_for(*self, limits).map_err(std::io::Error::other)?;
        Ok((EngineHandle::start(engine, metrics)?, pages))
    }
}

/// A model, ready to answer.
pub struct Session {
    pub engine: Box<dyn AnyEngine>,
    /// Or why there is none, which matters only to those who come with text.
    tokenizer: Result<Arc<Tokenizer>, TextError>,
    template: Result<ChatTemplate, TextError>,
    /// How the model's makers sample from it.
    pub sampling: SamplingParams,
    pub verbose: bool,
}

impl Session {
    pub fn open(options: &GlobalOptions) -> Result<Session, CliError> {
        let started = Instant::now();
        let backend = backend(options)?;
        let files = open_files(options)?;
        let tokenizer = Tokenizer::from_source(files.text_source()).map(Arc::new);
        let template = match &tokenizer {
            Ok(tokenizer) => ChatTemplate::from_source(files.text_source(), tokenizer),
            Err(_) => Err(TextError::NoChatTemplate),
        };
        let sampling = generation_defaults(&files);
        let for_text = tokenizer.as_ref().ok();
        let engine = match backend {
            AnyBackend::Cpu(cpu) => boxed_engine(load(*cpu, &files)?, for_text)?,
            AnyBackend::Cuda(cuda) => boxed_engine(load(*cuda, &files)?, for_text)?,
        };
        let session = Session {
            engine,
            tokenizer,
            template,
            sampling,
            verbose: options.verbose,
        };
        session.log(|| {
            let (engine, config) = (&session.engine, session.engine.config());
            format!(
                "model {} ({}, {} layers, hidden size {}, context {}, fingerprint {}) on {}, opened in {:.2} s",
                engine.model_name(),
                config.architecture,
                config.layers,
                config.hidden_size,
                config.max_position_embeddings,
                engine.fingerprint(),
                engine.device(),
                started.elapsed().as_secs_f64(),
            )
        });
        Ok(session)
    }

    /// Engine, tokenizer (or what is wrong with its files) and chat template, each for an owner of its
    /// own.
    #[allow(clippy::type_complexity)]
    pub fn into_parts(
        self,
    ) -> (
        Box<dyn AnyEngine>,
        Result<Arc<Tokenizer>, TextError>,
        Result<ChatTemplate, TextError>,
    ) {
        (self.engine, self.tokenizer, self.template)
    }

    /// The session with other limits of what runs at a time.
    pub fn with_limits(self, limits: Limits) -> Session {
        Session {
            engine: self.engine.with_limits(limits),
            ..self
        }
    }

    /// A line on standard error, with `-v`.
    pub fn log(&self, line: impl FnOnce() -> String) {
        if self.verbose {
            eprintln!("podium: {}", line());
        }
    }

    /// Whether the model is one that answers chats.
    pub fn has_template(&self) -> bool {
        !matches!(self.template, Err(TextError::NoChatTemplate))
    }

    /// # Errors
    /// What is wrong with the tokenizer's files.
    pub fn tokenizer(&self) -> Result<&Tokenizer, CliError> {
        self.tokenizer
            .as_deref()
            .map_err(|error| CliError::Failed(error.to_string()))
    }

    /// A chat as the text that the model was trained on.
    pub fn render(&self, messages: &[ChatMessage]) -> Result<String, CliError> {
        match &self.template {
            Ok(template) => Ok(template.render(&ChatRequest::new(messages))?),
            Err(error) => Err(CliError::Failed(error.to_string())),
        }
    }

    /// The token ids of a prompt: those given; of plain text with the tokens that the model expects
    /// around it; of a chat as its template has it.
    pub fn prompt_tokens(&self, prompt: &Prompt) -> Result<Vec<u32>, CliError> {
        Ok(match prompt {
            Prompt::TokenIds(token_ids) => token_ids.clone(),
            // Also where the tokenizer would put a token in front: nobody means that by nothing.
            Prompt::Text(text) if text.is_empty() => return Err(EngineError::EmptyPrompt.into()),
            Prompt::Text(text) => self.tokenizer()?.encode(text, true)?,
            Prompt::Messages(messages) => {
                self.tokenizer()?.encode(&self.render(messages)?, false)?
            }
        })
    }

    /// The token ids of candidates: those given, or their text's by itself, without special tokens.
    fn candidate_tokens(&self, candidates: &Candidates) -> Result<Vec<Vec<u32>>, CliError> {
        match candidates {
            Candidates::TokenIds(token_ids) => Ok(token_ids.clone()),
            Candidates::Texts(texts) => {
                let tokenizer = self.tokenizer()?;
                texts
                    .iter()
                    .map(|text| Ok(tokenizer.encode(text, false)?))
                    .collect()
            }
        }
    }

    /// An item's prompt and candidates as token ids.
    pub fn score_request(&self, item: &Item) -> Result<ScoreRequest, CliError> {
        let candidates = item.candidates.as_ref().ok_or_else(|| {
            CliError::Failed(
                "it has no candidates: give `candidates` or `candidate_token_ids`".to_string(),
            )
        })?;
        Ok(ScoreRequest {
            prompt_token_ids: self.prompt_tokens(&item.prompt)?,
            candidate_token_ids: self.candidate_tokens(candidates)?,
            ..ScoreRequest::default()
        })
    }

    /// Where features of this model and layer come from; refuses a layer that it does not have.
    pub fn feature_source(&self, layer: usize) -> Result<FeatureSource, CliError> {
        let (engine, config) = (&self.engine, self.engine.config());
        if layer > config.layers {
            return Err(EngineError::UnknownLayer {
                layer,
                layers: config.layers,
            }
            .into());
        }
        Ok(FeatureSource {
            layer,
            model: engine.model_name().to_string(),
            fingerprint: engine.fingerprint().to_string(),
            hidden_size: config.hidden_size,
        })
    }

    /// [`Session::ranker`], where one is named.
    pub fn optional_ranker(&self, name: Option<&str>) -> Result<Option<Arc<Ranker>>, CliError> {
        name.map(|name| self.ranker(name)).transpose()
    }

    /// The ranker in a file, or the built-in one of that name; checked against the model.
    pub fn ranker(&self, name: &str) -> Result<Arc<Ranker>, CliError> {
        let config = self.engine.config();
        let fingerprint = self.engine.fingerprint();
        let path = Path::new(name);
        let ranker = if path.is_file() {
            Ranker::load(path)?
        } else {
            let looks_like_a_path =
                name.contains(std::path::MAIN_SEPARATOR) || path.extension().is_some();
            let known = builtin().iter().any(|ranker| ranker.config().name == name);
            match find_builtin(name, fingerprint) {
                Ok(ranker) => ranker.clone(),
                Err(_) if looks_like_a_path && !known => return Err(no_such_ranker(name)),
                Err(error) => return Err(error.into()),
            }
        };
        ranker.check_model(fingerprint, config.hidden_size, config.layers)?;
        self.log(|| {
            let config = ranker.config();
            format!(
                "ranker {} ({} parameters, layer {})",
                config.name,
                ranker.parameters(),
                config.layer
            )
        });
        Ok(Arc::new(ranker))
    }
}

fn no_such_ranker(name: &str) -> CliError {
    let names: Vec<&str> = builtin()
        .iter()
        .map(|ranker| ranker.config().name.as_str())
        .collect();
    let known = if names.is_empty() {
        "none".to_string()
    } else {
        names.join(", ")
    };
    CliError::Failed(format!(
        "ranker {name}: no such file, and no built-in ranker has that name (built in: {known})"
    ))
}

/// The model's files, as the options name them and want their weights.
pub fn open_files(options: &GlobalOptions) -> Result<ModelFiles, CliError> {
    let path = match &options.model {
        Some(model) => hub::resolve(model)?,
        None => default_model::path()?,
    };
    let files = ModelFiles::open(&path)?;
    Ok(match options.dtype {
        DtypeChoice::Auto | DtypeChoice::Fp8 => files,
        DtypeChoice::Q8 => files.quantized(),
    })
}

/// The model on its device, with a bar while it loads.
pub fn load<B: Backend>(backend: B, files: &ModelFiles) -> Result<Model<B>, CliError> {
    let progress = Progress::new("loading", Some(files.tensor_bytes()), Unit::Bytes);
    Ok(Model::load(backend, files, &mut |bytes| {
        progress.advance(bytes)
    })?)
}

fn boxed_engine<B: Backend>(
    model: Model<B>,
    tokenizer: Option<&Arc<Tokenizer>>,
) -> Result<Box<dyn AnyEngine>, CliError> {
    Ok(Box::new(match tokenizer {
        Some(tokenizer) => Engine::new(model, tokenizer.clone())?,
        None => Engine::without_text(model)?,
    }))
}

enum AnyBackend {
    Cpu(Box<Cpu>),
    Cuda(Box<Cuda>),
}

/// The device that was asked for.
fn backend(options: &GlobalOptions) -> Result<AnyBackend, CliError> {
    match options.device {
        // A GPU only for those who name it, until one has run the kernels.
        Device::Auto | Device::Cpu if options.dtype == DtypeChoice::Fp8 => Err(CliError::Usage(
            "--dtype fp8 is for --device cuda (or emulate); on the CPU, --dtype q8 is as small"
                .to_string(),
        )),
        Device::Auto | Device::Cpu => Ok(AnyBackend::Cpu(Box::new(cpu(options)?))),
        Device::Cuda { index } => {
            let mut gpu = Gpu::open(index).map_err(BackendError::from)?;
            if is_off(DEPENDENT_LAUNCH_VARIABLE) {
                gpu = gpu.without_dependent_launch();
            }
            Ok(AnyBackend::Cuda(Box::new(cuda(Arc::new(gpu), options))))
        }
        Device::Emulate => {
            let threads = options.threads()?;
            let checks = Checks {
                memory: number(EMULATED_MEMORY_VARIABLE)?.map(|bytes| bytes as usize),
                lost_after: number(EMULATED_LOSS_VARIABLE)?,
                ..Checks::default()
            };
            let emulated = Emulated::new(checks).with_threads(threads);
            let emulated = emulated.map_err(|reason| {
                CliError::Failed(format!("cannot start {threads} threads: {reason}"))
            })?;
            Ok(AnyBackend::Cuda(Box::new(cuda(
                Arc::new(emulated),
                options,
            ))))
        }
    }
}

fn cuda(device: Arc<dyn cuda::device::Device>, options: &GlobalOptions) -> Cuda {
    let cuda = match options.dtype {
        DtypeChoice::Auto | DtypeChoice::Q8 => Cuda::new(device),
        DtypeChoice::Fp8 => Cuda::new(device).fp8(),
    };
    match is_off(GRAPHS_VARIABLE) {
        true => cuda.without_graphs(),
        false => cuda,
    }
}

fn is_off(variable: &str) -> bool {
    std::env::var_os(variable).is_some_and(|value| value == "off")
}

/// The number in an environment variable, if it is set.
fn number(variable: &str) -> Result<Option<u64>, CliError> {
    match std::env::var(variable) {
        Ok(text) if !text.is_empty() => text
            .parse()
            .map(Some)
            .map_err(|_| CliError::Usage(format!("{variable}={text}: give a whole number"))),
        _ => Ok(None),
    }
}

/// The processor, with as many threads and the instruction set that were asked for.
pub fn cpu(options: &GlobalOptions) -> Result<Cpu, CliError> {
    let cpu = Cpu::new(options.threads()?, isa()?)?;
    Ok(if options.exact { cpu.exact() } else { cpu })
}

/// The instruction set: the best, unless the environment names another.
pub fn isa() -> Result<Isa, CliError> {
    let Some(wanted) = std::env::var_os(ISA_VARIABLE).filter(|wanted| !wanted.is_empty()) else {
        return Ok(Isa::best());
    };
    let available = Isa::available();
    let named = available
        .iter()
        .copied()
        .find(|isa| *isa.name() == *wanted)
        .ok_or_else(|| {
            let names: Vec<&str> = available.iter().map(|isa| isa.name()).collect();
            CliError::Usage(format!(
                "{ISA_VARIABLE}={}: this processor runs {}",
                wanted.to_string_lossy(),
                names.join(", ")
            ))
        })?;
    // Sampling chooses for itself.
    softmax::limit(named);
    Ok(named)
}

/// The fields of `generation_config.json` that concern sampling.
#[derive(Default, Deserialize)]
struct GenerationConfig {
    temperature: Option<f32>,
    top_p: Option<f32>,
    top_k: Option<usize>,
    min_p: Option<f32>,
    repetition_penalty: Option<f32>,
}

/// What `generation_config.json` recommends, where a model has one that makes sense.
fn generation_defaults(files: &ModelFiles) -> SamplingParams {
    let config = match files.text_source() {
        TextSource::Folder(folder) => {
            read_generation_config(&folder.join("generation_config.json"))
        }
        TextSource::Gguf(_) => None,
    };
    let config = config.unwrap_or_default();
    let off = SamplingParams::default();
    let recommended = SamplingParams {
        temperature: config.temperature.unwrap_or(DEFAULT_TEMPERATURE),
        top_p: config.top_p.unwrap_or(off.top_p),
        top_k: config.top_k.unwrap_or(off.top_k),
        min_p: config.min_p.unwrap_or(off.min_p),
        repetition_penalty: config.repetition_penalty.unwrap_or(off.repetition_penalty),
    };
    match recommended.validate() {
        Ok(()) if recommended.temperature > 0.0 => recommended,
        _ => SamplingParams {
            temperature: DEFAULT_TEMPERATURE,
            ..off
        },
    }
}

fn read_generation_config(path: &Path) -> Option<GenerationConfig> {
    let mut text = String::new();
    std::fs::File::open(path)
        .ok()?
        .take(MAX_CONFIG_BYTES)
        .read_to_string(&mut text)
        .ok()?;
    serde_json::from_str(&text).ok()
}
