//! A language model: its files, its text side (tokenizer, chat template) and its forward pass.

pub mod config;
pub mod default_model;
pub mod error;
pub mod files;
pub mod forward;
pub mod gguf;
pub mod hub;
mod hugging_face;
mod layout;
pub(crate) mod mapped;
mod rope;
pub mod tensor;
pub mod text;
