//! A language model: its files, its text side (tokenizer, chat template) and its forward pass.

pub mod config;
pub mod tensor;
pub mod text;
