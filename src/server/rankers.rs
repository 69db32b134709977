//! The rankers of a server, and the routes that list, add and remove them.

use std::collections::BTreeMap;
use std::sync::{Arc, PoisonError, RwLock};

use axum::Json;
use axum::extract::{Path, Query, Request, State};
use axum::http::StatusCode;
use serde::Deserialize;
use serde_json::{Value, json};

use super::error::ApiError;
use super::fields::read_body;
use super::state::{ModelInfo, Shared};
use crate::ranker::{Ranker, RankerError, builtin};

/// Far more than anybody can tell apart; together they are half a gigabyte at most.
const MAX_RANKERS: usize = 256;
const MAX_NAME_LEN: usize = 128;

/// Where a ranker came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    Builtin,
    /// Named when the server was started.
    File,
    Uploaded,
}

#[derive(Clone)]
struct Entry {
    ranker: Arc<Ranker>,
    origin: Origin,
}

/// Rankers by the name that requests use.
#[derive(Default)]
pub struct Rankers(RwLock<BTreeMap<String, Entry>>);

impl Rankers {
    /// The built-in rankers for a model.
    pub fn for_model(fingerprint: &str) -> Rankers {
        let of_model = |ranker: &&Ranker| ranker.config().model_fingerprint == fingerprint;
        let entries = builtin().iter().filter(of_model).map(|ranker| {
            let entry = Entry {
                ranker: Arc::new(ranker.clone()),
                origin: Origin::Builtin,
            };
            (ranker.config().name.clone(), entry)
        });
        Rankers(RwLock::new(entries.collect()))
    }

    /// Adds or replaces a ranker; says whether it is new.
    ///
    /// # Errors
    /// A name that no request could use, or too many rankers.
    pub fn insert(&self, name: &str, ranker: Arc<Ranker>, origin: Origin) -> Result<bool, String> {
        check_name(name)?;
        let mut entries = self.0.write().unwrap_or_else(PoisonError::into_inner);
        if entries.len() >= MAX_RANKERS && !entries.contains_key(name) {
            return Err(format!(
                "there are {MAX_RANKERS} rankers already: delete one first"
            ));
        }
        let entry = Entry { ranker, origin };
        Ok(entries.insert(name.to_string(), entry).is_none())
    }

    pub fn get(&self, name: &str) -> Option<Arc<Ranker>> {
        let entries = self.0.read().unwrap_or_else(PoisonError::into_inner);
        entries.get(name).map(|entry| entry.ranker.clone())
    }

    pub fn names(&self) -> Vec<String> {
        let entries = self.0.read().unwrap_or_else(PoisonError::into_inner);
        entries.keys().cloned().collect()
    }

    /// The ranker of a request, or what is wrong with its name.
    pub fn find(&self, name: &str) -> Result<Arc<Ranker>, ApiError> {
        self.get(name).ok_or_else(|| {
            let names = self.names();
            let known = match names.is_empty() {
                true => "there is none for this model".to_string(),
                false => format!("there are: {}", names.join(", ")),
            };
            ApiError::field("ranker", format!("no ranker is called `{name}`; {known}"))
                .code("ranker_not_found")
        })
    }

    fn remove(&self, name: &str) -> bool {
        let mut entries = self.0.write().unwrap_or_else(PoisonError::into_inner);
        entries.remove(name).is_some()
    }

    fn describe(&self) -> Vec<Value> {
        let entries = self.0.read().unwrap_or_else(PoisonError::into_inner);
        entries
            .iter()
            .map(|(name, entry)| describe(name, entry))
            .collect()
    }
}

/// Names stand in paths and in model names.
fn check_name(name: &str) -> Result<(), String> {
    let fits = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    match !name.is_empty() && name.len() <= MAX_NAME_LEN && name.chars().all(fits) {
        true => Ok(()),
        false => Err(format!(
            "a ranker's name has 1 to {MAX_NAME_LEN} letters, digits, `-`, `_` and `.`"
        )),
    }
}

fn describe(name: &str, entry: &Entry) -> Value {
    let config = entry.ranker.config();
    json!({
        "id": name,
        "object": "ranker",
        "origin": match entry.origin {
            Origin::Builtin => "builtin",
            Origin::File => "file",
            Origin::Uploaded => "uploaded",
        },
        "kind": config.kind,
        "task": config.task,
        "layer": config.layer,
        "hidden_size": config.hidden_size,
        "parameters": entry.ranker.parameters(),
        "extra_inputs": config.extra_inputs,
        "model": config.model_name,
    })
}

/// Whether a ranker reads this model's states.
pub fn check(ranker: &Ranker, model: &ModelInfo) -> Result<(), RankerError> {
    ranker.check_model(&model.fingerprint, model.hidden_size, model.layers)
}

/// `GET /v1/rankers`
pub async fn list(State(state): State<Shared>) -> Json<Value> {
    Json(json!({
        "object": "list",
        "data": state.rankers.describe(),
        "default": state.config.default_ranker,
    }))
}

#[derive(Deserialize)]
pub struct UploadQuery {
    name: Option<String>,
}

/// `POST /v1/rankers?name=NAME`: the ranker's file is the body.
pub async fn upload(
    State(state): State<Shared>,
    Query(query): Query<UploadQuery>,
    request: Request,
) -> Result<(StatusCode, Json<Value>), ApiError> {
    must_have_keys(&state)?;
    let config = &state.config;
    let body = read_body(request, config.max_body_bytes, config.body_timeout).await?;
    let ranker = Ranker::from_bytes(&body)
        .map_err(|error| ApiError::field("file", format!("this is no ranker: {error}")))?;
    check(&ranker, &state.model).map_err(|error| ApiError::field("file", error.to_string()))?;
    let name = query.name.unwrap_or_else(|| ranker.config().name.clone());
    let ranker = Arc::new(ranker);
    let origin = Origin::Uploaded;
    let new = state
        .rankers
        .insert(&name, ranker.clone(), origin)
        .map_err(|reason| ApiError::field("name", reason))?;
    tracing::info!(ranker = name, new, "ranker uploaded");
    let status = if new {
        StatusCode::CREATED
    } else {
        StatusCode::OK
    };
    Ok((status, Json(describe(&name, &Entry { ranker, origin }))))
}

/// `DELETE /v1/rankers/{name}`. Requests that use it go on with it.
pub async fn delete(
    State(state): State<Shared>,
    Path(name): Path<String>,
) -> Result<Json<Value>, ApiError> {
    must_have_keys(&state)?;
    if state.config.default_ranker.as_deref() == Some(&*name) {
        return Err(ApiError {
            status: StatusCode::CONFLICT,
            ..ApiError::field("name", format!("`{name}` is the server's default ranker"))
        });
    }
    match state.rankers.remove(&name) {
        true => {
            tracing::info!(ranker = name, "ranker deleted");
            Ok(Json(
                json!({"id": name, "object": "ranker", "deleted": true}),
            ))
        }
        false => Err(ApiError {
            status: StatusCode::NOT_FOUND,
            ..ApiError::field("name", format!("no ranker is called `{name}`"))
        }),
    }
}

/// An open server's rankers are not anybody's to change.
fn must_have_keys(state: &Shared) -> Result<(), ApiError> {
    match state.config.api_keys.is_empty() {
        true => Err(ApiError::new(
            StatusCode::FORBIDDEN,
            "rankers can be changed only where the server was started with --api-key",
        )),
        false => Ok(()),
    }
}
