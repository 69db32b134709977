//! What a request is refused with: OpenAI's error object, naming the field.

use axum::Json;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

use super::ask::base_name;
use crate::engine::EngineError;
use crate::engine::stop::StopError;
use crate::model::text::TextError;

/// A refusal. `param` is the field that it is about.
#[derive(Debug, Clone)]
pub struct ApiError {
    pub status: StatusCode,
    pub message: String,
    pub param: Option<String>,
    pub code: Option<&'static str>,
    /// Seconds after which it is worth trying again.
    pub retry_after: Option<u32>,
}

impl ApiError {
    pub fn new(status: StatusCode, message: impl Into<String>) -> ApiError {
        ApiError {
            status,
            message: message.into(),
            param: None,
            code: None,
            retry_after: None,
        }
    }

    /// 400, about one field.
    pub fn field(param: impl Into<String>, message: impl Into<String>) -> ApiError {
        ApiError {
            param: Some(param.into()),
            ..ApiError::new(StatusCode::BAD_REQUEST, message)
        }
    }

    pub fn code(self, code: &'static str) -> ApiError {
        ApiError {
            code: Some(code),
            ..self
        }
    }

    pub fn draining() -> ApiError {
        ApiError {
            retry_after: Some(5),
            ..ApiError::new(
                StatusCode::SERVICE_UNAVAILABLE,
                "the server is shutting down: send the request elsewhere",
            )
        }
        .code("shutting_down")
    }

    pub fn overloaded() -> ApiError {
        ApiError {
            retry_after: Some(1),
            ..ApiError::new(
                StatusCode::TOO_MANY_REQUESTS,
                "the queue is full: try again in a moment",
            )
        }
        .code("queue_full")
    }

    pub fn engine_gone() -> ApiError {
        ApiError::new(
            StatusCode::INTERNAL_SERVER_ERROR,
            "the engine has stopped: the server must be started again",
        )
    }

    pub fn model_not_found(model: &str, served: &str) -> ApiError {
        let served = base_name(served);
        ApiError {
            status: StatusCode::NOT_FOUND,
            ..ApiError::field(
                "model",
                format!(
                    "the model `{model}` does not exist: give `{served}`, `{served}:best-of-N` or \
                     `{served}:best-of-N:RANKER`"
                ),
            )
        }
        .code("model_not_found")
    }

    /// What the engine refuses, as a fault of the field that a client knows. `prompt` is the name of
    /// the field that the prompt came in.
    pub fn from_engine(error: EngineError, prompt: &str) -> ApiError {
        let message = error.to_string();
        match error {
            EngineError::EmptyPrompt | EngineError::UnknownToken { .. } => {
                ApiError::field(prompt, message)
            }
            EngineError::PromptTooLong { .. } | EngineError::CandidateTooLong { .. } => {
                ApiError::field(prompt, message).code("context_length_exceeded")
            }
            EngineError::BeamAlone => ApiError::field("select", message),
            EngineError::NoRanker => ApiError::field(
                "ranker",
                "`select` is \"ranker\", and there is no ranker: name one in `ranker`, or select otherwise",
            ),
            EngineError::Ranker(_) => ApiError::field("ranker", message),
            EngineError::Pages(_) => ApiError::field("max_tokens", message),
            EngineError::Stop(StopError::EmptyString) => {
                ApiError::field("stop", "`stop` must not hold an empty string")
            }
            EngineError::Text(error) => ApiError::from_text(&error, prompt),
            _ => ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, message),
        }
    }

    pub fn from_text(error: &TextError, prompt: &str) -> ApiError {
        ApiError::field(prompt, error.to_string())
    }

    fn kind(&self) -> &'static str {
        match self.status {
            StatusCode::UNAUTHORIZED => "authentication_error",
            StatusCode::FORBIDDEN => "permission_error",
            StatusCode::NOT_FOUND => "not_found_error",
            StatusCode::TOO_MANY_REQUESTS => "rate_limit_error",
            status if status.is_server_error() => "server_error",
            _ => "invalid_request_error",
        }
    }

    /// `{"error": …}`, also as the last event of a stream that fails.
    pub fn body(&self) -> Value {
        json!({"error": {
            "message": self.message,
            "type": self.kind(),
            "param": self.param,
            "code": self.code,
        }})
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.status, Json(self.body())).into_response();
        if let Some(seconds) = self.retry_after {
            let headers = response.headers_mut();
            headers.insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        if self.status == StatusCode::UNAUTHORIZED {
            let headers = response.headers_mut();
            headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response
    }
}
