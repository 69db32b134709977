//! Models named by their id on the Hugging Face hub.

use std::path::{Path, PathBuf};

use hf_hub::{HFClientBuilder, HFClientSync, HFError};

use super::error::ModelError;
use super::hugging_face::{CONFIG, GENERATION_CONFIG, WEIGHTS, WEIGHTS_INDEX, weight_map};

const TOKENIZER: &str = "tokenizer.json";
/// Fetched where the repository has them.
const OPTIONAL: [&str; 4] = [
    GENERATION_CONFIG,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
];
/// A second try for a connection that broke; no more, so that a machine without a network hears of
/// it soon.
const ATTEMPTS: usize = 2;

/// The path of a model: `model` itself if it exists; otherwise, if it looks like `owner/name`, the
/// folder of the hub's cache (`HF_HOME`, `HF_HUB_CACHE`) that holds it, fetched if need be. A model
/// that is there in whole is used without a network.
///
/// # Errors
///
/// [`ModelError::NotFound`], [`ModelError::BadModelName`] or [`ModelError::Hub`].
pub fn resolve(model: &str) -> Result<PathBuf, ModelError> {
    let path = Path::new(model);
    if path.exists() {
        return Ok(path.to_path_buf());
    }
    let Some((owner, name)) = hub_id(model) else {
        return Err(
            match model.contains(['/', '\\']) || path.extension().is_some() {
                true => ModelError::NotFound {
                    path: path.to_path_buf(),
                },
                false => ModelError::BadModelName {
                    model: model.to_string(),
                },
            },
        );
    };
    let client = HFClientBuilder::new()
        .retry_max_attempts(ATTEMPTS)
        .build_sync()
        .map_err(|error| hub_error(model, &error))?;
    find_or_fetch(&client, owner, name)
}

/// Takes `owner/name` apart; `None` for what can only be a path.
fn hub_id(model: &str) -> Option<(&str, &str)> {
    let (owner, name) = model.split_once('/')?;
    let plain = |part: &str| {
        !part.is_empty()
            && !part.starts_with('.')
            && part
                .chars()
                .all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c))
    };
    let is_file = name.ends_with(".gguf") || name.ends_with(".safetensors");
    (plain(owner) && plain(name) && !is_file).then_some((owner, name))
}

fn find_or_fetch(client: &HFClientSync, owner: &str, name: &str) -> Result<PathBuf, ModelError> {
    let model = format!("{owner}/{name}");
    let repository = client.model(owner, name);
    let cached = repository.snapshot_download().local_files_only(true).send();
    if let Ok(folder) = cached
        && is_complete(&folder)
    {
        return Ok(folder);
    }

    let failed = |error: HFError| hub_error(&model, &error);
    let config = repository
        .download_file()
        .filename(CONFIG)
        .send()
        .map_err(failed)?;
    // The cache keeps a folder for each commit; all files are to be of the one that config.json is.
    let (folder, commit) = config
        .parent()
        .and_then(|folder| Some((folder, folder.file_name()?.to_str()?)))
        .ok_or_else(|| ModelError::Hub {
            model: model.clone(),
            problem: format!("{} is not in a folder of its commit", config.display()),
        })?;
    let fetch = |filename: &str| {
        repository
            .download_file()
            .filename(filename)
            .revision(commit)
            .send()
    };
    let fetch_optional = |filename: &str| match fetch(filename) {
        Ok(_) => Ok(true),
        Err(HFError::EntryNotFound { .. }) => Ok(false),
        Err(error) => Err(failed(error)),
    };
    for filename in OPTIONAL {
        fetch_optional(filename)?;
    }
    fetch(TOKENIZER).map_err(failed)?;
    // The weights come last, so that a folder with its weights is a whole one.
    if !fetch_optional(WEIGHTS)? {
        let index = fetch(WEIGHTS_INDEX).map_err(|error| match error {
            HFError::EntryNotFound { .. } => ModelError::Hub {
                model: model.clone(),
                problem: format!("it holds neither {WEIGHTS} nor {WEIGHTS_INDEX}"),
            },
            error => failed(error),
        })?;
        let mut shards: Vec<String> = weight_map(&index)?.into_values().collect();
        shards.sort();
        shards.dedup();
        for shard in shards {
            fetch(&shard).map_err(failed)?;
        }
    }
    Ok(folder.to_path_buf())
}

/// True where nothing that the model needs is missing from a folder of the cache.
fn is_complete(folder: &Path) -> bool {
    let has = |filename: &str| folder.join(filename).is_file();
    if !has(CONFIG) || !has(TOKENIZER) {
        return false;
    }
    has(WEIGHTS)
        || has(WEIGHTS_INDEX)
            && weight_map(&folder.join(WEIGHTS_INDEX))
                .is_ok_and(|index| index.values().all(|shard| has(shard)))
}

fn hub_error(model: &str, error: &HFError) -> ModelError {
    let problem = match error {
        HFError::Request { source, .. } => {
            // The chain of causes ends in what people understand: refused, no such host.
            let mut cause: &dyn std::error::Error = source;
            while let Some(deeper) = cause.source() {
                cause = deeper;
            }
            format!("there is no connection ({cause})")
        }
        HFError::RepoNotFound { .. } => "there is no such model".to_string(),
        HFError::AuthRequired { .. } | HFError::Forbidden { .. } => {
            "it needs a token with access to it (HF_TOKEN)".to_string()
        }
        other => other.to_string().replace('\n', " "),
    };
    ModelError::Hub {
        model: model.to_string(),
        problem,
    }
}
