//! An HTTP server with OpenAI's routes over the engine: best of N, by the fields and the model names
//! that OpenAI's clients can send.
//!
//! One thread owns engine and model ([`worker`]) and steps while there is work; requests reach it
//! through a channel, and what comes of them goes back through another. Handlers run on tokio and
//! compute nothing. `docs/SERVING.md` says what the routes do.

mod answer;
mod ask;
mod chat;
mod completions;
pub mod config;
mod error;
mod fields;
mod guard;
mod inspect;
mod listen;
pub mod metrics;
mod openapi;
pub mod rankers;
mod rerank;
mod respond;
pub mod state;
pub mod worker;

use std::sync::Arc;

use axum::http::{HeaderValue, Method, StatusCode, header};
use axum::middleware::from_fn_with_state;
use axum::routing::{delete, get, post};
use axum::{Json, Router};
use tokio::net::TcpListener;
use tower_http::cors::{AllowOrigin, CorsLayer};

use error::ApiError;
use state::{Server, Shared};

/// Serves until `stop` resolves and what then runs has ended.
pub async fn serve(
    server: Arc<Server>,
    listener: TcpListener,
    stop: impl Future<Output = ()> + Send + 'static,
) {
    listen::listen(listener, routes(server.clone()), server, stop).await;
}

/// Every route.
fn routes(state: Shared) -> Router {
    let cors = cors(&state.config.cors_origins);
    let routes = Router::new()
        .route("/v1/chat/completions", post(chat::chat))
        .route("/v1/completions", post(completions::completions))
        .route("/v1/models", get(inspect::models))
        .route("/v1/models/{*id}", get(inspect::model_by_id))
        .route("/v1/rankers", get(rankers::list).post(rankers::upload))
        .route("/v1/rankers/{name}", delete(rankers::delete))
        .route("/v1/rerank", post(rerank::rerank))
        .route("/rerank", post(rerank::rerank))
        .route("/score", post(rerank::score_route))
        .route("/v1/score", post(rerank::score_route))
        .route("/tokenize", post(inspect::tokenize))
        .route("/detokenize", post(inspect::detokenize))
        .route("/tokenizer_info", get(inspect::tokenizer_info))
        .route("/health", get(inspect::health))
        .route("/ping", get(inspect::health).post(inspect::health))
        .route("/version", get(inspect::version))
        .route("/load", get(inspect::load))
        .route("/metrics", get(inspect::metrics))
        .route("/openapi.json", get(openapi::openapi))
        .route("/", get(inspect::page))
        .fallback(unknown_route)
        .method_not_allowed_fallback(wrong_method)
        .layer(from_fn_with_state(state.clone(), guard::guard))
        .with_state(state);
    match cors {
        Some(cors) => routes.layer(cors),
        None => routes,
    }
}

/// `None`: browsers are refused other origins' pages, which is what they do unless told otherwise.
fn cors(origins: &[String]) -> Option<CorsLayer> {
    if origins.is_empty() {
        return None;
    }
    let origins = match origins.iter().any(|origin| origin == "*") {
        true => AllowOrigin::any(),
        false => AllowOrigin::list(origins.iter().filter_map(|o| HeaderValue::from_str(o).ok())),
    };
    let layer = CorsLayer::new()
        .allow_origin(origins)
        .allow_methods([Method::GET, Method::POST, Method::DELETE])
        .allow_headers([header::AUTHORIZATION, header::CONTENT_TYPE]);
    Some(layer)
}

async fn unknown_route(method: Method, uri: axum::http::Uri) -> ApiError {
    let message = format!(
        "there is no {method} {}: /openapi.json lists what there is",
        uri.path()
    );
    ApiError::new(StatusCode::NOT_FOUND, message)
}

async fn wrong_method(method: Method, uri: axum::http::Uri) -> ApiError {
    let message = format!("{} does not take {method}", uri.path());
    ApiError::new(StatusCode::METHOD_NOT_ALLOWED, message)
}

/// The answer of a route that has nothing but JSON to say.
type Answer = Json<serde_json::Value>;
