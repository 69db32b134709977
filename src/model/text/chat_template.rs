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
use crate::model::files::TextSource;

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
    /// The plain template as its makers wrote it.
    source: String,
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

    /// The template of a model, wherever it lies; [`TextError::NoChatTemplate`] where it has none.
    pub fn from_source(source: TextSource, tokenizer: &Tokenizer) -> Result<Self, TextError> {
        match source {
            TextSource::Folder(folder) => Self::from_folder(folder, tokenizer),
            TextSource::Gguf(metadata) => {
                Self::from_gguf(&GgufVocabulary::from_metadata(&metadata)?, tokenizer)
            }
        }
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
            source: default.to_string(),
            has_tool_template: tool_use.is_some(),
            special_tokens: special_tokens.clone(),
        })
    }

    /// The template as its makers wrote it.
    pub fn source(&self) -> &str {
        &self.source
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

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use serde::Deserialize;
    use serde_json::json;

    use super::super::tokenizer::tests::{default_model, golden, golden_folder};
    use super::*;

    #[derive(Deserialize)]
    struct Golden {
        now: u64,
        special_tokens: BTreeMap<String, String>,
        smollm2: String,
        cases: Vec<Case>,
    }

    #[derive(Deserialize)]
    struct Case {
        template: String,
        chat: String,
        messages: Vec<ChatMessage>,
        tools: Option<Vec<Json>>,
        documents: Option<Vec<Json>>,
        variables: Map<String, Json>,
        add_generation_prompt: bool,
        /// What transformers renders.
        rendered: Option<String>,
        /// What the template raised.
        refused: Option<String>,
        /// What Python raised.
        failed: Option<String>,
    }

    #[test]
    fn renders_as_transformers() {
        let golden: Golden = golden("chat_templates.json");
        let mut templates = BTreeMap::new();
        let now = UNIX_EPOCH + Duration::from_secs(golden.now);
        for case in &golden.cases {
            let template = templates.entry(&case.template).or_insert_with(|| {
                let file = golden_folder().join(format!("chat_templates/{}.jinja", case.template));
                let source = match case.template.as_str() {
                    "smollm2" => golden.smollm2.clone(),
                    _ => std::fs::read_to_string(file).unwrap(),
                };
                ChatTemplate::new(&source, &golden.special_tokens).unwrap()
            });
            let rendered = template.render(&ChatRequest {
                messages: &case.messages,
                add_generation_prompt: case.add_generation_prompt,
                tools: case.tools.as_deref(),
                documents: case.documents.as_deref(),
                variables: Some(&case.variables),
                now: Some(now),
            });
            let name = format!("{} of {}", case.chat, case.template);
            match (rendered, &case.rendered, &case.refused, &case.failed) {
                (Ok(ours), Some(theirs), _, _) => assert_eq!(&ours, theirs, "{name}"),
                (Err(TextError::TemplateRefused { message }), _, Some(theirs), _) => {
                    assert_eq!(&message, theirs, "{name}");
                }
                (Err(TextError::TemplateFailed { .. }), _, _, Some(_)) => {}
                (ours, ..) => panic!("{name}: {ours:?}"),
            }
        }
        assert_eq!(templates.len(), 6);
    }

    #[test]
    fn template_of_the_default_model() {
        let Some(files) = default_model() else {
            return;
        };
        let source = files.text_source();
        let tokenizer = Tokenizer::from_source(source).unwrap();
        let template = ChatTemplate::from_source(source, &tokenizer).unwrap();
        if let TextSource::Gguf(metadata) = source {
            let golden: Golden = golden("chat_templates.json");
            let own = GgufVocabulary::from_metadata(&metadata)
                .unwrap()
                .chat_template;
            assert_eq!(own, Some(golden.smollm2.as_str()));
        }
        let prompt = template
            .render(&ChatRequest::new(&[ChatMessage::new("user", "Hi")]))
            .unwrap();
        assert!(prompt.starts_with("<|im_start|>system\n"));
        assert!(prompt.ends_with("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"));
        let ids = tokenizer.encode(&prompt, false).unwrap();
        assert_eq!(ids.iter().filter(|&&id| id == 1).count(), 3, "{ids:?}");
    }

    fn render(source: &str) -> Result<String, TextError> {
        let template = ChatTemplate::new(source, &BTreeMap::new())?;
        template.render(&ChatRequest::new(&[ChatMessage::new("user", "hello")]))
    }

    /// Each hostile template is one clear line, soon. A crash would take the whole process.
    #[test]
    fn hostile_templates_are_stopped() {
        let nest = |n: usize, open: &str, core: &str, close: &str| {
            format!("{}{core}{}", open.repeat(n), close.repeat(n))
        };
        let hostile = [
            "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}",
            "{% for i in range(100000) %}{% for j in range(100000) %}xxxxxxxxxxxxxxxx{% endfor %}{% endfor %}",
            "{% for i in range(10000000000) %}{% endfor %}",
            "{{ 'a' * 10**9 }}",
            "{{ 'a' * 10**18 * 10**18 }}",
            "{{ [1] * 10**9 }}",
            "{{ ('a' * 10**6).replace('', 'b' * 10**6) }}",
            "{{ '%1000000000d' | format(1) }}",
            "{{ '{:>1000000000}'.format(1) }}",
            "{{ '{:{}}'.format(1, 1000000000) }}",
            "{{ 'a' | indent(1000000000) }}",
            "{{ [messages] | tojson(indent=1000000000) }}",
            "{% set x = 'a' * 100000 %}{% for i in range(100000) %}{{ x }}{% endfor %}",
            "{% set ns = namespace(x='a') %}{% for i in range(100) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
            "{% set ns = namespace(x=[1]) %}{% for i in range(100) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
            "{% set ns = namespace(x=[]) %}{% for i in range(100000) %}{% set ns.x = [ns.x] %}{% endfor %}{{ ns.x }}",
            "{% set ns = namespace(x=[]) %}{% for i in range(100000) %}{% set ns.x = {'a': ns.x} %}{% endfor %}",
            "{% set ns = namespace(x=[]) %}{% for i in range(100000) %}{% set ns.x = [ns.x] | map('list') %}{% endfor %}",
            "{% set ns = namespace() %}{% set ns.x = ns %}{{ ns }}",
            "{% set ns = namespace() %}{% set ns.x = [{'a': ns}] %}{{ ns }}",
            "{% set a = namespace() %}{% set b = namespace(a=a) %}{% set a.b = b %}{{ a }}",
            "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(1) }}",
            "{% macro f(x) %}{{ f([x]) }}{% endmacro %}{{ f(1) }}",
            "{% for x in [messages] recursive %}{{ loop([messages]) }}{% endfor %}",
            "{% include 'chat template' %}",
            "{% extends 'chat template' %}",
            "{% block a %}{{ self.a() }}{% endblock %}",
            "{% import '/etc/passwd' as p %}",
            "{{ 1 // 0 }}",
            "{{ 9223372036854775807 ** 99 }}",
            "{{ messages[0].content.nothing.more }}",
            "{% set messages.x = 1 %}",
            "{% set ns = namespace() %}{% set ns.f = range %}",
            "{{ nothing() }}",
            "{{ '' | nothing }}",
            "{{ 'a'.nothing() }}",
            "{{ unclosed",
            "{% if %}",
            "{% endfor %}",
            "{% generation %}",
            "{{ strftime_now('%Q') }}",
        ]
        .map(str::to_string);
        let deep = [
            format!("{{{{ {}1 }}}}", "1~".repeat(60_000)),
            format!("{{{{ {} }}}}", nest(60_000, "(", "1", ")")),
            format!("{{{{ {} }}}}", nest(60_000, "[", "", "]")),
            nest(9_000, "{% if 1 %}", "", "{% endif %}"),
            "{{".repeat(60_000),
            " ".repeat(MAX_TEMPLATE_BYTES + 1),
        ];
        for source in hostile.iter().chain(&deep) {
            let start = Instant::now();
            let shown = &source[..source.len().min(100)];
            let error = render(source).expect_err(shown).to_string();
            assert!(
                !error.contains('\n') && error.len() < 400,
                "{shown}: {error}"
            );
            assert!(start.elapsed() < Duration::from_secs(5), "{shown}");
        }
    }

    /// What is deep or long but allowed must not overflow the stack either.
    #[test]
    fn deep_values_render() {
        let assignments = MAX_TEMPLATE_BYTES / "{%set x=[x]%}".len() - 10;
        let nested = format!(
            "{{%set x=1%}}{}{{{{x}}}}",
            "{%set x=[x]%}".repeat(assignments)
        );
        assert_eq!(render(&nested).unwrap().len(), 2 * assignments + 1);
        for operator in [
            "1+",
            "-",
            "not ",
            "1 or ",
            "1 if 1 else ",
            "1<",
            "1~",
            "1**",
        ] {
            let expression = format!("{{{{ {}1 }}}}", operator.repeat(8_000 / operator.len()));
            if let Err(error) = render(&expression) {
                assert!(!error.to_string().contains('\n'), "{error}");
            }
        }
        for filter in ["|list", "[0]", ".a", "()"] {
            assert!(
                render(&format!(
                    "{{{{ 1{} }}}}",
                    filter.repeat(8_000 / filter.len())
                ))
                .is_err()
            );
        }
        let mut message = json!("x");
        for _ in 0..100 {
            message = json!([message]);
        }
        let template = ChatTemplate::new("{{ messages|tojson }}", &BTreeMap::new()).unwrap();
        let fields = Map::from_iter([("content".to_string(), message)]);
        let rendered = template.render(&ChatRequest::new(&[ChatMessage(fields)]));
        assert_eq!(rendered.unwrap().matches('[').count(), 101);
    }

    #[test]
    fn long_chats_render() {
        let messages: Vec<_> = (0..2000)
            .map(|i| ChatMessage::new(["user", "assistant"][i % 2], &"word ".repeat(400)))
            .collect();
        let source =
            std::fs::read_to_string(golden_folder().join("chat_templates/qwen3.jinja")).unwrap();
        let template = ChatTemplate::new(&source, &BTreeMap::new()).unwrap();
        let rendered = template.render(&ChatRequest::new(&messages)).unwrap();
        assert!(rendered.len() > 2000 * 2000);
        let huge = [ChatMessage::new("user", &"x".repeat(MAX_RENDERED_BYTES))];
        assert!(matches!(
            template.render(&ChatRequest::new(&huge)),
            Err(TextError::RenderedTooLarge { .. })
        ));
        assert!(matches!(
            template.render(&ChatRequest::new(&[])),
            Err(TextError::EmptyChat)
        ));
    }

    #[test]
    fn folders_keep_templates_in_several_places() {
        let byte_level = golden_folder().join("byte_level");
        let tokenizer = Tokenizer::from_folder(&byte_level).unwrap();
        let missing = ChatTemplate::from_folder(&byte_level, &tokenizer).unwrap_err();
        assert!(matches!(missing, TextError::NoChatTemplate));
        assert!(missing.to_string().contains("--raw"));

        let folder = tempfile::tempdir().unwrap();
        let write =
            |name: &str, text: &str| std::fs::write(folder.path().join(name), text).unwrap();
        let messages = [ChatMessage::new("user", "hi")];
        let tools = [json!({"type": "function"})];
        let rendered = |tools| {
            let template = ChatTemplate::from_folder(folder.path(), &tokenizer).unwrap();
            let request = ChatRequest {
                tools,
                ..ChatRequest::new(&messages)
            };
            template.render(&request).unwrap()
        };
        let config = json!({"chat_template": [
            {"name": "default", "template": "default {{ bos_token }}"},
            {"name": "tool_use", "template": "tools {{ tools|length }}"},
        ]});
        write("tokenizer_config.json", &config.to_string());
        assert_eq!(rendered(None), "default <|begin_of_text|>");
        assert_eq!(rendered(Some(&tools)), "tools 1");
        write("chat_template.json", r#"{"chat_template": "from json"}"#);
        assert_eq!(rendered(None), "from json");
        write("chat_template.jinja", "from jinja\n");
        assert_eq!(rendered(None), "from jinja");
    }
}
