//! The text side of a model: text to token ids and back, and chats to prompts.
//!
//! [`Tokenizer`] comes from a folder in Hugging Face layout or from the metadata of a GGUF file
//! ([`Tokenizer::from_source`]); [`Detokenizer`] turns sampled tokens into text one at a time;
//! [`ChatTemplate`] renders a chat into the prompt that the model was trained on.
//!
//! All three read files that others wrote. A tokenizer file that makes the tokenizers library
//! panic, or a chat template that never ends, is one [`TextError`] and nothing worse.

use std::path::PathBuf;

use super::error::ModelError;

mod chat_template;
mod detokenize;
mod gguf_tokenizer;
mod panic_guard;
mod pre_tokenizer;
mod strftime;
mod template_functions;
mod template_json;
mod template_source;
mod token_table;
mod tokenizer;

pub use chat_template::{ChatMessage, ChatRequest, ChatTemplate};
pub use detokenize::Detokenizer;
pub use gguf_tokenizer::GgufVocabulary;
pub use tokenizer::Tokenizer;

/// What can be wrong with a tokenizer, a chat template, or what is put into them.
#[derive(Debug, thiserror::Error)]
pub enum TextError {
    /// The metadata of a GGUF file does not say what a tokenizer needs.
    #[error(transparent)]
    Metadata(#[from] ModelError),
    #[error("cannot read {}: {source}", path.display())]
    Read {
        path: PathBuf,
        source: std::io::Error,
    },
    #[error("{} is {size} bytes; a tokenizer file has at most {limit}", path.display())]
    FileTooLarge {
        path: PathBuf,
        size: u64,
        limit: u64,
    },
    #[error(
        "{} has no tokenizer.json{}; save one with transformers: \
         AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)",
        folder.display(),
        if *has_sentencepiece { " (tokenizer.model alone is not enough)" } else { "" }
    )]
    NoTokenizer {
        folder: PathBuf,
        has_sentencepiece: bool,
    },
    #[error("{} is not valid JSON: {source}", path.display())]
    Json {
        path: PathBuf,
        source: serde_json::Error,
    },
    #[error("the tokenizer in {origin} is malformed: {reason}")]
    Malformed { origin: String, reason: String },
    #[error("the tokenizer in {origin} has {what}, which is not supported; supported: {supported}")]
    Unsupported {
        origin: String,
        what: String,
        supported: &'static str,
    },
    #[error("the tokenizer failed on a text of {bytes} bytes: {reason}")]
    Encode { bytes: usize, reason: String },
    #[error(
        "this model has no chat template; give the prompt as plain text with --raw, \
         or use an instruction-tuned model"
    )]
    NoChatTemplate,
    #[error("the model's chat template is {size} bytes; the limit is {limit}")]
    TemplateTooLarge { size: usize, limit: usize },
    #[error("the model's chat template does not compile: {reason}; --raw does without it")]
    TemplateSyntax { reason: String },
    #[error("the model's chat template refuses this chat: {message}")]
    TemplateRefused { message: String },
    #[error("the model's chat template failed: {reason}; --raw does without it")]
    TemplateFailed { reason: String },
    #[error(
        "the model's chat template did more work than a chat of this size may take \
         ({limit} steps); --raw does without it"
    )]
    TemplateTooMuchWork { limit: u64 },
    #[error("the rendered chat is longer than {limit} bytes")]
    RenderedTooLarge { limit: usize },
    #[error("a chat needs at least one message")]
    EmptyChat,
}
