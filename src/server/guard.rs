//! What every request goes through first: a name for the logs, the key, and the count of it.

use std::time::Instant;

use axum::extract::{MatchedPath, Request, State};
use axum::http::{HeaderValue, StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use sha2::{Digest, Sha256};
use subtle::{Choice, ConstantTimeEq};
use tracing::Instrument;

use super::ask::random_id;
use super::error::ApiError;
use super::state::Shared;

const REQUEST_ID: &str = "x-request-id";
const MAX_ID_LEN: usize = 128;

/// Routes that need no key, as they stand in the request: what a load balancer asks, and the page,
/// which is the same for everybody and asks for the key itself.
pub const OPEN: [&str; 2] = ["/health", "/"];

pub async fn guard(State(state): State<Shared>, request: Request, next: Next) -> Response {
    let id = request_id(&request);
    let (method, path) = (request.method().clone(), request.uri().path().to_string());
    let route = request.extensions().get::<MatchedPath>();
    // Paths that clients make up are not to fill the figures.
    let route = route.map_or("other".to_string(), |route| route.as_str().to_string());
    let started = Instant::now();
    let span = tracing::info_span!("request", id);
    async move {
        let mut response = match OPEN.contains(&&*path) || has_key(&state, &request) {
            true => next.run(request).await,
            false => ApiError::new(
                StatusCode::UNAUTHORIZED,
                "give the server's key: Authorization: Bearer KEY",
            )
            .code("invalid_api_key")
            .into_response(),
        };
        let status = response.status();
        state
            .metrics
            .http_requests
            .with_label_values(&[&*route, status.as_str()])
            .inc();
        let milliseconds = started.elapsed().as_secs_f64() * 1e3;
        match path == "/health" && status == StatusCode::OK {
            true => {
                tracing::debug!(%method, path, status = status.as_u16(), milliseconds, "answered")
            }
            false => {
                tracing::info!(%method, path, status = status.as_u16(), milliseconds, "answered")
            }
        }
        if let Ok(id) = HeaderValue::from_str(&id) {
            response.headers_mut().insert(REQUEST_ID, id);
        }
        response
    }
    .instrument(span)
    .await
}

/// The client's name for its request, if it is one that can be logged.
fn request_id(request: &Request) -> String {
    let given = request.headers().get(REQUEST_ID);
    let given = given.and_then(|id| id.to_str().ok());
    let usable = |id: &&str| {
        !id.is_empty() && id.len() <= MAX_ID_LEN && id.bytes().all(|byte| byte.is_ascii_graphic())
    };
    match given.filter(usable) {
        Some(id) => id.to_string(),
        None => random_id("req"),
    }
}

fn has_key(state: &Shared, request: &Request) -> bool {
    let keys = &state.config.api_keys;
    if keys.is_empty() {
        return true;
    }
    let given = request.headers().get(header::AUTHORIZATION);
    let given = given.and_then(|value| {
        let (scheme, key) = value.to_str().ok()?.split_once(' ')?;
        scheme.eq_ignore_ascii_case("bearer").then(|| key.trim())
    });
    given.is_some_and(|given| is_one_of(given, keys))
}

/// Compares digests, so that neither contents nor lengths of keys show in the time that it takes.
fn is_one_of(given: &str, keys: &[String]) -> bool {
    let given = Sha256::digest(given);
    let found = keys.iter().fold(Choice::from(0), |found, key| {
        found | Sha256::digest(key)[..].ct_eq(&given[..])
    });
    found.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_compared_whole() {
        let keys = ["alpha".to_string(), "beta".to_string()];
        for good in ["alpha", "beta"] {
            assert!(is_one_of(good, &keys));
        }
        for bad in ["", "alph", "alphabeta", "Alpha", "gamma"] {
            assert!(!is_one_of(bad, &keys), "{bad}");
        }
    }
}
