//! What chats and completions have in common: how many candidates, drawn how, chosen how, and what
//! comes back.

use serde_json::Value;

use super::error::ApiError;
use super::fields::{Fields, bad, whole};
use super::state::Server;
use crate::backend::sampling::SamplingParams;
use crate::engine::GenerateRequest;
use crate::engine::select::Strategy;

/// As in OpenAI's API.
const MAX_TOP_LOGPROBS: u64 = 20;
const MAX_STOP_STRINGS: usize = 16;
const MAX_STOP_TOKENS: usize = 256;
const MAX_BIASES: usize = 1024;
/// Longest answer of a completion that does not say, as in OpenAI's API.
const COMPLETION_TOKENS: usize = 16;

/// Which route a request came by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    Chat,
    Completion,
}

/// A request without its prompt.
#[derive(Clone, Debug)]
pub struct Ask {
    pub form: Form,
    /// The model as the client called it.
    pub model: String,
    /// Everything but the prompt.
    pub request: GenerateRequest,
    pub ranker: Option<String>,
    /// How many of the candidates come back, best first.
    pub n: usize,
    /// With how many alternatives log-probabilities are wanted.
    pub logprobs: Option<usize>,
    pub echo: bool,
    /// No token was asked for: the prompt is to come back alone.
    pub prompt_alone: bool,
    pub stream: bool,
    pub include_usage: bool,
    pub stream_candidates: bool,
    pub return_all: bool,
    pub return_scores: bool,
    /// Of a prompt's tokens only so many of the last go in.
    pub truncate_prompt: Option<usize>,
}

/// What a model's name says beside the model.
#[derive(Debug, Default, PartialEq, Eq)]
struct NamedModel<'a> {
    best_of: Option<usize>,
    ranker: Option<&'a str>,
}

/// Reads `NAME`, `NAME:best-of-N` or `NAME:best-of-N:RANKER`; `None` where it is another model.
fn parse_model<'a>(name: &'a str, served: &[String]) -> Option<NamedModel<'a>> {
    served
        .iter()
        .find_map(|served| parse_suffix(name.strip_prefix(base_name(served))?))
}

const BEST_OF: &str = ":best-of-";

/// A served name without what it says beside the model: gateways take the first name that a server
/// lists for its model's only one, so the first may be such as `NAME:best-of-16`.
pub fn base_name(served: &str) -> &str {
    match served.rfind(BEST_OF).map(|at| served.split_at(at)) {
        Some((base, rest)) if !base.is_empty() && parse_suffix(rest).is_some() => base,
        _ => served,
    }
}

fn parse_suffix(rest: &str) -> Option<NamedModel<'_>> {
    if rest.is_empty() {
        return Some(NamedModel::default());
    }
    let rest = rest.strip_prefix(BEST_OF)?;
    let (number, ranker) = match rest.split_once(':') {
        Some((number, ranker)) => (number, Some(ranker)),
        None => (rest, None),
    };
    if number.is_empty() || !number.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    Some(NamedModel {
        best_of: Some(number.parse().ok()?),
        ranker,
    })
}

/// Whether a name stands for this server's model, its number and ranker being possible.
pub fn check_model(server: &Server, name: &str) -> Result<(), ApiError> {
    let config = &server.config;
    let unknown = || ApiError::model_not_found(name, config.model_name());
    let named = parse_model(name, &config.served_model_names).ok_or_else(unknown)?;
    let possible = named
        .best_of
        .is_none_or(|n| (1..=config.max_candidates).contains(&n));
    if !possible
        || named
            .ranker
            .is_some_and(|ranker| server.rankers.get(ranker).is_none())
    {
        return Err(unknown());
    }
    Ok(())
}

impl Ask {
    pub fn read(server: &Server, fields: &Fields, form: Form) -> Result<Ask, ApiError> {
        let config = &server.config;
        let served = config.model_name();
        let model = fields.string("model")?.unwrap_or(served).to_string();
        let named = parse_model(&model, &config.served_model_names)
            .ok_or_else(|| ApiError::model_not_found(&model, served))?;

        let most = config.max_candidates as u64;
        let n = fields.integer("n", 1..=most)?.unwrap_or(1);
        let best_of = fields.integer("best_of", 1..=most)?;
        if let Some(best_of) = best_of
            && best_of < n
        {
            return Err(ApiError::field(
                "best_of",
                format!("`best_of` must be at least `n`, which is {n}, not {best_of}"),
            ));
        }
        if named
            .best_of
            .is_some_and(|best_of| !(1..=config.max_candidates).contains(&best_of))
        {
            return Err(ApiError::field(
                "model",
                format!("`{model}`: the number of candidates must be from 1 to {most}"),
            ));
        }
        let candidates = best_of.or(named.best_of).unwrap_or(config.best_of).max(n);

        let asked_ranker = fields.string("ranker")?.or(named.ranker);
        let select = strategy(fields)?.or(config.select);
        // A default ranker is for choosing; a name is also for scoring a single candidate.
        let default_ranker = config.default_ranker.as_deref().filter(|_| candidates > n);
        let ranker_name = match select {
            None | Some(Strategy::Ranker) => asked_ranker.or(default_ranker),
            Some(_) => asked_ranker,
        };
        let ranker = ranker_name
            .map(|name| server.rankers.find(name))
            .transpose()?;
        let strategy = match (select, &ranker) {
            (Some(Strategy::Ranker), None) => {
                return Err(ApiError::field(
                    "ranker",
                    "`select` is \"ranker\", and there is no ranker: name one in `ranker`",
                ));
            }
            (Some(strategy), _) => strategy,
            (None, Some(_)) => Strategy::Ranker,
            (None, None) if candidates > n => Strategy::Logprob,
            (None, None) => Strategy::First,
        };

        refuse_constraints(fields)?;
        let stream = fields.bool("stream")?.unwrap_or(false);
        let include_usage = include_usage(fields, stream)?;
        let echo = form == Form::Completion && fields.bool("echo")?.unwrap_or(false);
        let logprobs = logprobs(fields, form)?;
        let max_tokens = max_tokens(fields, form, server, echo)?;
        let min_tokens = fields.integer("min_tokens", 0..=max_tokens as u64)?;
        if fields
            .string("suffix")?
            .is_some_and(|suffix| !suffix.is_empty())
        {
            return Err(ApiError::field("suffix", "`suffix` is not supported"));
        }
        let request = GenerateRequest {
            n: candidates,
            max_tokens: max_tokens.max(1),
            min_tokens: min_tokens.unwrap_or(0),
            sampling: sampling(fields, &server.sampling)?,
            seed: fields.seed()?.unwrap_or_else(random_seed),
            stop: stop(fields)?,
            strategy,
            ranker: ranker.clone(),
            top_logprobs: logprobs.unwrap_or(0),
            prompt_logprobs: logprobs.filter(|_| echo),
            logit_bias: logit_bias(fields, server.model.vocab_size)?,
            presence_penalty: fields
                .number("presence_penalty", -2.0..=2.0)?
                .unwrap_or(0.0),
            frequency_penalty: fields
                .number("frequency_penalty", -2.0..=2.0)?
                .unwrap_or(0.0),
            stop_token_ids: token_list(fields, "stop_token_ids", MAX_STOP_TOKENS)?,
            ignore_end: fields.bool("ignore_eos")?.unwrap_or(false),
            ..GenerateRequest::new(Vec::new())
        };
        Ok(Ask {
            form,
            model: model.clone(),
            ranker: ranker
                .is_some()
                .then(|| ranker_name.unwrap_or_default().to_string()),
            n,
            logprobs,
            echo,
            prompt_alone: max_tokens == 0,
            stream,
            include_usage,
            stream_candidates: fields.bool("stream_candidates")?.unwrap_or(false),
            return_all: fields.bool("return_all")?.unwrap_or(false),
            return_scores: fields.bool("return_scores")?.unwrap_or(false),
            truncate_prompt: fields.integer("truncate_prompt_tokens", 1..=u64::MAX)?,
            request,
        })
    }

    /// The engine's request for one prompt.
    pub fn for_prompt(&self, prompt_token_ids: Vec<u32>) -> GenerateRequest {
        GenerateRequest {
            prompt_token_ids,
            ..self.request.clone()
        }
    }

    /// Whether candidates are the choices as they stand, so that their text can go out at once.
    pub fn is_plain(&self) -> bool {
        let first = self.request.strategy == Strategy::First || self.request.n == 1;
        first && !(self.echo && self.logprobs.is_some()) && !self.prompt_alone
    }
}

fn strategy(fields: &Fields) -> Result<Option<Strategy>, ApiError> {
    let Some(name) = fields.string("select")? else {
        return Ok(None);
    };
    match name.parse() {
        Ok(Strategy::Beam) => Err(ApiError::field(
            "select",
            "`select`: beam search does not run beside other requests; give another strategy",
        )),
        Ok(strategy) => Ok(Some(strategy)),
        Err(_) => Err(ApiError::field(
            "select",
            format!(
                "`select` must be one of ranker, first, greedy, majority, logprob, self-certainty, \
                 not {name:?}"
            ),
        )),
    }
}

/// Output is not constrained: who asks for it is told, rather than given something else.
fn refuse_constraints(fields: &Fields) -> Result<(), ApiError> {
    const CONSTRAINTS: [&str; 6] = [
        "structured_outputs",
        "guided_json",
        "guided_regex",
        "guided_choice",
        "guided_grammar",
        "grammar",
    ];
    for name in CONSTRAINTS {
        if fields.get(name).is_some() {
            let message = format!("`{name}` is not supported: output is not constrained");
            return Err(ApiError::field(name, message));
        }
    }
    match fields.get("response_format") {
        None => Ok(()),
        Some(format) => match format.get("type").and_then(Value::as_str) {
            Some("text") => Ok(()),
            Some("json_object" | "json_schema") => {
                let message = "`response_format`: only {\"type\": \"text\"} is supported";
                Err(ApiError::field("response_format", message))
            }
            _ => Err(bad("response_format", "{\"type\": \"text\"}", format)),
        },
    }
}

fn include_usage(fields: &Fields, stream: bool) -> Result<bool, ApiError> {
    let Some(options) = fields.get("stream_options") else {
        return Ok(false);
    };
    let Value::Object(options) = options else {
        return Err(bad("stream_options", "an object", options));
    };
    if !stream {
        return Err(ApiError::field(
            "stream_options",
            "`stream_options` is allowed only where `stream` is true",
        ));
    }
    match options.get("include_usage") {
        None | Some(Value::Null) => Ok(false),
        Some(Value::Bool(include)) => Ok(*include),
        Some(other) => Err(bad("stream_options.include_usage", "true or false", other)),
    }
}

fn logprobs(fields: &Fields, form: Form) -> Result<Option<usize>, ApiError> {
    if form == Form::Completion {
        return fields.integer("logprobs", 0..=MAX_TOP_LOGPROBS);
    }
    let wanted = fields.bool("logprobs")?.unwrap_or(false);
    let top = fields.integer("top_logprobs", 0..=MAX_TOP_LOGPROBS)?;
    match (wanted, top) {
        (false, Some(1..)) => Err(ApiError::field(
            "top_logprobs",
            "`top_logprobs` is allowed only where `logprobs` is true",
        )),
        (false, _) => Ok(None),
        (true, top) => Ok(Some(top.unwrap_or(0))),
    }
}

fn max_tokens(fields: &Fields, form: Form, server: &Server, echo: bool) -> Result<usize, ApiError> {
    let least = if echo { 0 } else { 1 };
    let most = u64::try_from(server.config.max_tokens).unwrap_or(u64::MAX);
    let newer = fields.integer("max_completion_tokens", least..=most)?;
    let older = fields.integer("max_tokens", least..=most)?;
    Ok(newer.or(older).unwrap_or(match form {
        Form::Chat => server
            .config
            .default_max_tokens
            .min(server.config.max_tokens),
        Form::Completion => COMPLETION_TOKENS.min(server.config.max_tokens),
    }))
}

fn sampling(fields: &Fields, defaults: &SamplingParams) -> Result<SamplingParams, ApiError> {
    let above_zero = |name: &str, most: f64| {
        fields.typed(
            name,
            &format!("a number above 0 and up to {most}"),
            |value| {
                let number = value.as_f64()?;
                (number > 0.0 && number <= most && number as f32 > 0.0).then_some(number as f32)
            },
        )
    };
    // vLLM's clients switch it off with -1.
    let top_k = fields.typed(
        "top_k",
        "a whole number (0 or -1: off)",
        |value| match value.as_i64()? {
            -1 => Some(0),
            number => usize::try_from(number).ok(),
        },
    )?;
    Ok(SamplingParams {
        repetition_penalty: above_zero("repetition_penalty", 100.0)?
            .unwrap_or(defaults.repetition_penalty),
        temperature: fields
            .number("temperature", 0.0..=2.0)?
            .unwrap_or(defaults.temperature),
        top_k: top_k.unwrap_or(defaults.top_k),
        top_p: above_zero("top_p", 1.0)?.unwrap_or(defaults.top_p),
        min_p: fields.number("min_p", 0.0..=1.0)?.unwrap_or(defaults.min_p),
    })
}

fn stop(fields: &Fields) -> Result<Vec<String>, ApiError> {
    let stop = fields.strings("stop", MAX_STOP_STRINGS)?;
    match stop.iter().any(String::is_empty) {
        true => Err(ApiError::field(
            "stop",
            "`stop` must not hold an empty string",
        )),
        false => Ok(stop),
    }
}

fn logit_bias(fields: &Fields, vocab_size: usize) -> Result<Vec<(u32, f32)>, ApiError> {
    let expected = format!(
        "an object of at most {MAX_BIASES} token ids below {vocab_size} with numbers from -100 to 100"
    );
    let biases = fields.typed("logit_bias", &expected, |value| {
        let biases = value.as_object()?;
        if biases.len() > MAX_BIASES {
            return None;
        }
        let bias = |(token, bias): (&String, &Value)| {
            let token: u32 = token.parse().ok()?;
            let bias = bias
                .as_f64()
                .filter(|bias| (-100.0..=100.0).contains(bias))?;
            ((token as usize) < vocab_size).then_some((token, bias as f32))
        };
        biases.iter().map(bias).collect::<Option<Vec<_>>>()
    })?;
    Ok(biases.unwrap_or_default())
}

fn token_list(fields: &Fields, name: &str, most: usize) -> Result<Vec<u32>, ApiError> {
    let expected = format!("a list of at most {most} token ids");
    let tokens = fields.typed(name, &expected, |value| {
        let items = value.as_array().filter(|items| items.len() <= most)?;
        items.iter().map(token_id).collect::<Option<Vec<u32>>>()
    })?;
    Ok(tokens.unwrap_or_default())
}

pub fn token_id(value: &Value) -> Option<u32> {
    u32::try_from(whole(value)?).ok()
}

/// A seed of few digits, as `podium generate` takes one.
fn random_seed() -> u64 {
    use std::hash::{BuildHasher, RandomState};
    RandomState::new().hash_one(std::time::SystemTime::now()) & 0xffff_ffff
}

/// A name that nobody else has: `prefix-` and 128 random bits.
pub fn random_id(prefix: &str) -> String {
    use std::hash::{BuildHasher, RandomState};
    use std::sync::atomic::{AtomicU64, Ordering};
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let count = COUNT.fetch_add(1, Ordering::Relaxed);
    let now = std::time::SystemTime::now();
    // The keys of a `RandomState` come from the system's random numbers.
    let half = |salt: u64| RandomState::new().hash_one((now, count, salt));
    format!("{prefix}-{:016x}{:016x}", half(0), half(1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_models_say_how_many_and_by_whom() {
        let served = ["org/m:x".to_string(), "other:best-of-3".to_string()];
        let parsed = |name| parse_model(name, &served);
        assert_eq!(parsed("other"), Some(NamedModel::default()));
        assert_eq!(parsed("other:best-of-3").unwrap().best_of, Some(3));
        assert_eq!(parsed("other:best-of-9").unwrap().best_of, Some(9));
        assert_eq!(parsed("org/m:x"), Some(NamedModel::default()));
        assert_eq!(
            parsed("org/m:x:best-of-16"),
            Some(NamedModel {
                best_of: Some(16),
                ranker: None
            })
        );
        assert_eq!(
            parsed("org/m:x:best-of-4:gcd"),
            Some(NamedModel {
                best_of: Some(4),
                ranker: Some("gcd")
            })
        );
        for other in [
            "",
            "m",
            "org/m:x2",
            "org/m:x:best-of-",
            "org/m:x:best-of-+4",
            "org/m:x:best-of-x",
            "org/m:x:gcd",
            "org/m:x:best-of-99999999999999999999999",
        ] {
            assert_eq!(parsed(other), None, "{other}");
        }
    }
}
