//! The text side of an open model: which metadata of a GGUF file the tokenizer and the chat template
//! are built from, and the same for folders.

use super::{ChatTemplate, GgufVocabulary, TextError, Tokenizer};
use crate::model::error::ModelError;
use crate::model::files::{ModelFiles, TextSource};
use crate::model::gguf::metadata::GgufMetadata;

/// Why a model's tokenizer could not be built.
#[derive(Debug, thiserror::Error)]
pub enum TextSourceError {
    #[error(transparent)]
    Model(#[from] ModelError),
    #[error(transparent)]
    Text(#[from] TextError),
}

/// A tokenizer, and the chat template or why there is none.
pub type TextSide = (Tokenizer, Result<ChatTemplate, TextError>);

/// Builds the tokenizer and the chat template of a model.
///
/// A model without a usable chat template can still be given plain text, so what is wrong with the
/// template is handed over rather than raised.
///
/// # Errors
/// [`TextSourceError`] where there is no usable tokenizer.
pub fn open(files: &ModelFiles) -> Result<TextSide, TextSourceError> {
    match files.text_source() {
        TextSource::Folder(folder) => {
            let tokenizer = Tokenizer::from_folder(folder)?;
            let template = ChatTemplate::from_folder(folder, &tokenizer);
            Ok((tokenizer, template))
        }
        TextSource::Gguf(metadata) => {
            let vocabulary = vocabulary(&metadata)?;
            let tokenizer = Tokenizer::from_gguf(&vocabulary)?;
            let template = ChatTemplate::from_gguf(&vocabulary, &tokenizer);
            Ok((tokenizer, template))
        }
    }
}

fn vocabulary<'a>(metadata: &GgufMetadata<'a>) -> Result<GgufVocabulary<'a>, ModelError> {
    let key = |name: &str| format!("tokenizer.ggml.{name}");
    let missing = |name: &str| metadata.wrong(&key(name), "is missing: the file has no tokenizer");
    let id = |name: &str| metadata.u32(&key(name));
    Ok(GgufVocabulary {
        model: metadata.string(&key("model"))?.ok_or_else(|| missing("model"))?,
        pre: metadata.string(&key("pre"))?,
        tokens: metadata.strings(&key("tokens"))?.ok_or_else(|| missing("tokens"))?,
        token_types: metadata.i32s(&key("token_type"))?.unwrap_or_default(),
        scores: metadata.f32s(&key("scores"))?.unwrap_or_default(),
        merges: metadata.strings(&key("merges"))?.unwrap_or_default(),
        bos_token_id: id("bos_token_id")?,
        eos_token_id: id("eos_token_id")?,
        eot_token_id: id("eot_token_id")?,
        eom_token_id: id("eom_token_id")?,
        unknown_token_id: id("unknown_token_id")?,
        padding_token_id: id("padding_token_id")?,
        add_bos: metadata.bool(&key("add_bos_token"))?,
        add_eos: metadata.bool(&key("add_eos_token"))?,
        add_space_prefix: metadata.bool(&key("add_space_prefix"))?,
        chat_template: metadata.string("tokenizer.chat_template")?,
    })
}
