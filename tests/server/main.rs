//! `podium serve`, the binary itself, over real sockets.

#[path = "../support/chat_model.rs"]
mod chat_model;
#[path = "../support/smollm2.rs"]
mod smollm2;

mod operations;
mod refusals;
mod routes;
mod running;
mod soak;
mod streams;
mod vllm_fields;
