//! Chats to prompts, by the template that comes with a model.
//!
//! Templates are programs in Jinja, written for transformers' `apply_chat_template`, and come from
//! whoever made the model. They render here under a budget that bounds time and memory, without
//! access to anything but the request, and on a stack of their own. What they can do otherwise is
//! what transformers lets them do; `tests/reference/chat_template_goldens.py` holds the two
//! together.

use std::collections::BTreeMap;
use std::error::Error as _;
use std::io;
use std::path::Path;
use std::thread;
use std::time::{SystemTime, UNIX_EPOCH};

use minijinja::syntax::SyntaxConfig;
use minijinja::{AutoEscape, Environment, ErrorKind, Value};
use serde_json::{Map, Value as Json};

use super::panic_guard::{contain, panic_message};
use super::template_functions::{NOW, RaisedByTemplate, register};
use super::template_source::respell;
use super::tokenizer::{one_line, read_json, read_optional};
use super::{GgufVocabulary, TextError, Tokenizer};

/// The largest templates in use have some 30 kB.
const MAX_TEMPLATE_BYTES: usize = 256 << 10;

/// Steps that a template may take, an instruction or 64 bytes of text each, on top of one for
/// every byte of the request: about a tenth of a second, and at most 128 MB.
const BASE_STEPS: u64 = 2_000_000;

/// More than any model's context holds.
const MAX_RENDERED_BYTES: usize = 16 << 20;

/// A template of the largest size can nest values some ten thousand deep, and printing them
/// recurses.
const STACK_BYTES: usize = 64 << 20;

/// A message as templates see it: a JSON object with `role`, `content`, and whatever else the
/// model's template reads (`tool_calls`, `name`, …).
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(transparent)]
pub struct ChatMessage(pub Map<String, Json>);

impl ChatMessage {
    pub fn new(role: &str, content: &str) -> Self {
        let mut fields = Map::new();
        fields.insert("role".to_string(), role.into());
        fields.insert("content".to_string(), content.into());
        Self(fields)
    }
}

/// What a template renders.
#[derive(Clone, Copy, Debug)]
pub struct ChatRequest<'a> {
    pub messages: &'a [ChatMessage],
    /// End with the header of the answer, so that the model writes the answer next.
    pub add_generation_prompt: bool,
    /// Functions that the model may call, as JSON schemas.
    pub tools: Option<&'a [Json]>,
    /// Documents to answer from.
    pub documents: Option<&'a [Json]>,
    /// Further variables, such as `enable_thinking`; they win over the model's own.
    pub variables: Option<&'a Map<String, Json>>,
    /// What templates take for the time, in UTC; the clock's if `None`.
    pub now: Option<SystemTime>,
}

impl<'a> ChatRequest<'a> {
    /// A plain chat that the model is to answer.
    pub fn new(messages: &'a [ChatMessage]) -> Self {
        Self {
            messages,
            add_generation_prompt: true,
            tools: None,
            documents: None,
            variables: None,
            now: None,
        }
    }
}

/// A model's chat template, compiled.
#[derive(Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    has_tool_template: bool,
    /// `bos_token` and the like, as template variables.
    special_tokens: BTreeMap<String, String>,
}

/// Names of templates; errors show them.
const DEFAULT: &str = "chat template";
const TOOL_USE: &str = "tool_use template";

impl ChatTemplate {
    /// Compiles a template; `special_tokens` are variables in it, as from
    /// [`Tokenizer::special_token_texts`].
    pub fn new(source: &str, special_tokens: &BTreeMap<String, String>) -> Result<Self, TextError> {
        Self::compile(source, None, special_tokens)
    }

    /// The template of a folder in Hugging Face layout: `chat_template.jinja`,
    /// `chat_template.json`, or in `tokenizer_config.json`, whichever is there first.
    ///
    /// [`TextError::NoChatTemplate`] where there is none.
    pub fn from_folder(folder: &Path, tokenizer: &Tokenizer) -> Result<Self, TextError> {
        let special_tokens = tokenizer.special_token_texts();
        let path = folder.join("chat_template.jinja");
        if let Some(bytes) = read_optional(&path, MAX_TEMPLATE_BYTES as u64)? {
            let source = String::from_utf8(bytes).map_err(|_| TextError::TemplateSyntax {
                reason: "it is not UTF-8".to_string(),
            })?;
            return Self::compile(&source, None, special_tokens);
        }
        for file in ["chat_template.json", "tokenizer_config.json"] {
            let json = read_json(&folder.join(file))?;
            let named = |name: &str| {
                json["chat_template"]
                    .as_array()?
                    .iter()
                    .find(|template| template["name"] == name)?["template"]
                    .as_str()
            };
            let default = json["chat_template"].as_str().or_else(|| named("default"));
            if let Some(source) = default {
                return Self::compile(source, named("tool_use"), special_tokens);
            }
        }
        Err(TextError::NoChatTemplate)
    }

    /// The template of a GGUF file; [`TextError::NoChatTemplate`] where there is none.
    pub fn from_gguf(
        vocabulary: &GgufVocabulary,
        tokenizer: &Tokenizer,
    ) -> Result<Self, TextError> {
        let source = vocabulary.chat_template.ok_or(TextError::NoChatTemplate)?;
        Self::compile(source, None, tokenizer.special_token_texts())
    }

    fn compile(
        default: &str,
        tool_use: Option<&str>,
        special_tokens: &BTreeMap<String, String>,
    ) -> Result<Self, TextError> {
        let mut environment = Environment::new();
        environment.set_debug(false);
        environment.set_auto_escape_callback(|_| AutoEscape::None);
        environment.set_syntax(
            SyntaxConfig::builder()
                .trim_blocks(true)
                .lstrip_blocks(true)
                .build()
                .map_err(|error| syntax(error.to_string()))?,
        );
        register(&mut environment);
        let sources = [(DEFAULT, Some(default)), (TOOL_USE, tool_use)];
        for (name, source) in sources.into_iter().filter_map(|(n, s)| Some((n, s?))) {
            if source.len() > MAX_TEMPLATE_BYTES {
                return Err(TextError::TemplateTooLarge {
                    size: source.len(),
                    limit: MAX_TEMPLATE_BYTES,
                });
            }
            let source = respell(source).map_err(syntax)?;
            on_own_stack(|| environment.add_template_owned(name, source))
                .map_err(syntax)?
                .map_err(|error| syntax(error.to_string()))?;
        }
        Ok(Self {
            environment,
            has_tool_template: tool_use.is_some(),
            special_tokens: special_tokens.clone(),
        })
    }

    /// The prompt for a chat.
    ///
    /// Encode it with `add_special` false: what the model needs at its start is in it. Text of a
    /// message that spells a special token becomes that token, as in transformers.
    pub fn render(&self, request: &ChatRequest) -> Result<String, TextError> {
        if request.messages.is_empty() {
            return Err(TextError::EmptyChat);
        }
        let rendered = on_own_stack(|| self.render_here(request));
        rendered.map_err(|reason| TextError::TemplateFailed { reason })?
    }

    fn render_here(&self, request: &ChatRequest) -> Result<String, TextError> {
        let mut request_bytes = 0;
        let context = self.context(request, &mut request_bytes);
        let steps = BASE_STEPS.saturating_add(request_bytes as u64);
        let mut environment = self.environment.clone();
        environment.set_fuel(Some(steps));
        let name = if self.has_tool_template && request.tools.is_some() {
            TOOL_USE
        } else {
            DEFAULT
        };
        let mut rendered = LimitedBuffer {
            bytes: Vec::new(),
            overflowed: false,
        };
        let result = environment.get_template(name).and_then(|template| {
            template
                .render_captured_to(context, &mut rendered)
                .map(drop)
        });
        if rendered.overflowed {
            return Err(TextError::RenderedTooLarge {
                limit: MAX_RENDERED_BYTES,
            });
        }
        result.map_err(|error| failure(&error, steps))?;
        String::from_utf8(rendered.bytes).map_err(|_| TextError::TemplateFailed {
            reason: "it wrote bytes that are not UTF-8".to_string(),
        })
    }

    /// The variables of a template; adds the size of the request's text to `bytes`.
    fn context(&self, request: &ChatRequest, bytes: &mut usize) -> Value {
        let list = |items: Option<&[Json]>, bytes: &mut usize| match items {
            None => Value::from(()),
            Some(items) => items
                .iter()
                .map(|item| template_value(item, bytes))
                .collect(),
        };
        let messages: Value = request
            .messages
            .iter()
            .map(|message| message_value(message, bytes))
            .collect();
        let now = request.now.unwrap_or_else(SystemTime::now);
        let seconds = now
            .duration_since(UNIX_EPOCH)
            .map_or(0, |since| since.as_secs());
        let mut variables: BTreeMap<String, Value> = self
            .special_tokens
            .iter()
            .map(|(name, text)| (name.clone(), Value::from(text)))
            .collect();
        for (name, value) in request.variables.into_iter().flatten() {
            variables.insert(name.clone(), template_value(value, bytes));
        }
        let own = [
            ("messages", messages),
            ("tools", list(request.tools, bytes)),
            ("documents", list(request.documents, bytes)),
            (
                "add_generation_prompt",
                request.add_generation_prompt.into(),
            ),
            (NOW, seconds.into()),
        ];
        variables.extend(own.map(|(name, value)| (name.to_string(), value)));
        Value::from_pairs(variables)
    }
}

/// A message, brought into the form that transformers gives it: fields without a value are left
/// out, and the reasoning goes by each of its names.
fn message_value(message: &ChatMessage, bytes: &mut usize) -> Value {
    let present = |name: &str| message.0.get(name).filter(|value| !value.is_null());
    let names = ["reasoning_content", "thinking", "reasoning"];
    let reasoning = names.iter().find_map(|name| present(name));
    let mut pairs: Vec<(&str, &Json)> = Vec::new();
    if let Some(reasoning) = reasoning {
        pairs.push(("thinking", present("thinking").unwrap_or(reasoning)));
    }
    for (name, value) in message.0.iter().filter(|(_, value)| !value.is_null()) {
        if name != "thinking" {
            pairs.push((name, value));
        }
    }
    if let Some(reasoning) = reasoning
        && present("reasoning_content").is_none()
    {
        pairs.push(("reasoning_content", reasoning));
    }
    Value::from_pairs(
        pairs
            .into_iter()
            .map(|(name, value)| (name, template_value(value, bytes))),
    )
}

/// JSON as a template sees it; adds the size of its text to `bytes`.
fn template_value(json: &Json, bytes: &mut usize) -> Value {
    *bytes += 8;
    match json {
        Json::Null => Value::from(()),
        Json::Bool(value) => Value::from(*value),
        Json::Number(number) => match (number.as_i64(), number.as_u64(), number.as_f64()) {
            (Some(integer), _, _) => Value::from(integer),
            (_, Some(integer), _) => Value::from(integer),
            (_, _, float) => Value::from(float),
        },
        Json::String(text) => {
            *bytes += text.len();
            Value::from(text)
        }
        Json::Array(items) => items
            .iter()
            .map(|item| template_value(item, bytes))
            .collect(),
        Json::Object(fields) => Value::from_pairs(fields.iter().map(|(name, value)| {
            *bytes += name.len();
            (name.as_str(), template_value(value, bytes))
        })),
    }
}

fn syntax(reason: impl AsRef<str>) -> TextError {
    TextError::TemplateSyntax {
        reason: one_line(reason.as_ref()),
    }
}

/// What went wrong while rendering.
fn failure(error: &minijinja::Error, limit: u64) -> TextError {
    if error.kind() == ErrorKind::OutOfFuel {
        return TextError::TemplateTooMuchWork { limit };
    }
    let mut source = error.source();
    while let Some(cause) = source {
        if let Some(RaisedByTemplate(message)) = cause.downcast_ref() {
            return TextError::TemplateRefused {
                message: one_line(message),
            };
        }
        if let Some(cause) = cause.downcast_ref::<minijinja::Error>()
            && cause.kind() == ErrorKind::OutOfFuel
        {
            return TextError::TemplateTooMuchWork { limit };
        }
        source = cause.source();
    }
    TextError::TemplateFailed {
        reason: one_line(&error.to_string()),
    }
}

/// Runs `action` on a thread with a large stack; a panic becomes its message.
fn on_own_stack<T: Send>(action: impl FnOnce() -> T + Send) -> Result<T, String> {
    thread::scope(|scope| {
        thread::Builder::new()
            .name("chat template".to_string())
            .stack_size(STACK_BYTES)
            .spawn_scoped(scope, || contain(action))
            .map_err(|error| format!("no thread to render on: {error}"))?
            .join()
            .unwrap_or_else(|payload| Err(panic_message(payload.as_ref())))
    })
}

/// A buffer that stops growing.
struct LimitedBuffer {
    bytes: Vec<u8>,
    overflowed: bool,
}

impl io::Write for LimitedBuffer {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.bytes.len() + bytes.len() > MAX_RENDERED_BYTES {
            self.overflowed = true;
            return Err(io::ErrorKind::WriteZero.into());
        }
        self.bytes.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
