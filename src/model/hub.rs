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
    let config =
        repository
            .download_file()
            .filename(CONFIG)
            .send()
            .map_err(|error| match error {
                HFError::EntryNotFound { .. } | HFError::RepoNotFound { .. } => ModelError::Hub {
                    model: model.clone(),
                    problem: format!("there is no such model, or it has no {CONFIG}"),
                },
                error => failed(error),
            })?;
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
            format!(
                "there is no connection ({cause}); without a network, name a local folder or a .gguf file"
            )
        }
        HFError::AuthRequired { .. } | HFError::Forbidden { .. } => {
            "there is no such model, or it needs a token with access to it (HF_TOKEN)".to_string()
        }
        other => other.to_string().replace('\n', " "),
    };
    ModelError::Hub {
        model: model.to_string(),
        problem,
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::io::{BufRead, BufReader, Write};
    use std::net::{TcpListener, TcpStream};
    use std::sync::{Arc, Mutex};

    use super::*;

    const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

    fn client(endpoint: &str, cache: &Path) -> HFClientSync {
        HFClientBuilder::new()
            .endpoint(endpoint)
            .cache_dir(cache)
            .retry_max_attempts(ATTEMPTS)
            .retry_base_delay(std::time::Duration::from_millis(1))
            .build_sync()
            .unwrap()
    }

    /// A client whose hub cannot be reached: nothing listens on that port.
    fn offline(cache: &Path) -> HFClientSync {
        client("http://127.0.0.1:1", cache)
    }

    /// A hub that holds one model, on a port of its own; returns its address and the paths that
    /// were asked for.
    fn hub(files: BTreeMap<&'static str, &'static str>) -> (String, Arc<Mutex<Vec<String>>>) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        let asked = Arc::new(Mutex::new(Vec::new()));
        let log = asked.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let _ = answer(stream.unwrap(), &files, &log);
            }
        });
        (endpoint, asked)
    }

    fn answer(
        mut stream: TcpStream,
        files: &BTreeMap<&str, &str>,
        log: &Mutex<Vec<String>>,
    ) -> std::io::Result<()> {
        let mut lines = BufReader::new(stream.try_clone()?).lines();
        let request = lines.next().unwrap_or(Ok(String::new()))?;
        while lines
            .next()
            .is_some_and(|line| line.is_ok_and(|l| !l.is_empty()))
        {}
        let mut words = request.split(' ');
        let (method, path) = (words.next().unwrap_or(""), words.next().unwrap_or(""));
        log.lock().unwrap().push(format!("{method} {path}"));
        let file = path
            .strip_prefix("/owner/name/resolve/")
            .and_then(|rest| rest.split_once('/'))
            .and_then(|(_, file)| files.get_key_value(file));
        let (status, headers, body) = match file {
            Some((name, text)) => (
                "200 OK",
                format!("ETag: \"{name}\"\r\nX-Repo-Commit: {COMMIT}\r\n"),
                *text,
            ),
            None if path.starts_with("/owner/name/") => (
                "404 Not Found",
                "X-Error-Code: EntryNotFound\r\n".to_string(),
                "",
            ),
            None => (
                "404 Not Found",
                "X-Error-Code: RepoNotFound\r\n".to_string(),
                "",
            ),
        };
        write!(
            stream,
            "HTTP/1.1 {status}\r\n{headers}Content-Length: {}\r\nConnection: close\r\n\r\n",
            body.len()
        )?;
        if method != "HEAD" {
            stream.write_all(body.as_bytes())?;
        }
        Ok(())
    }

    #[test]
    fn a_model_is_fetched_once_and_then_found_without_a_network() {
        let (endpoint, asked) = hub(BTreeMap::from([
            ("config.json", "{}"),
            ("tokenizer.json", "{}"),
            ("generation_config.json", "{}"),
            ("pytorch_model.bin", "not wanted"),
            (
                "model.safetensors.index.json",
                r#"{"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}"#,
            ),
            ("model-1.safetensors", "one"),
            ("model-2.safetensors", "two"),
        ]));
        let cache = tempfile::tempdir().unwrap();
        let folder = find_or_fetch(&client(&endpoint, cache.path()), "owner", "name").unwrap();
        let mut names: Vec<_> = std::fs::read_dir(&folder)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        assert_eq!(
            names,
            [
                "config.json",
                "generation_config.json",
                "model-1.safetensors",
                "model-2.safetensors",
                "model.safetensors.index.json",
                "tokenizer.json"
            ]
        );
        let text = std::fs::read_to_string(folder.join("model-2.safetensors")).unwrap();
        assert_eq!(text, "two");
        let asked = asked.lock().unwrap();
        assert!(asked.iter().any(|path| path.contains(COMMIT)), "{asked:?}");

        assert_eq!(
            find_or_fetch(&offline(cache.path()), "owner", "name").unwrap(),
            folder
        );
        // With a shard missing the model is not whole.
        std::fs::remove_file(folder.join("model-2.safetensors")).unwrap();
        let error = find_or_fetch(&offline(cache.path()), "owner", "name").unwrap_err();
        assert!(matches!(error, ModelError::Hub { .. }), "{error}");
    }

    #[test]
    fn what_the_hub_lacks_is_named() {
        let cache = tempfile::tempdir().unwrap();
        let (endpoint, _) = hub(BTreeMap::from([
            ("config.json", "{}"),
            ("tokenizer.json", "{}"),
        ]));
        let client = client(&endpoint, cache.path());
        let message = |owner| {
            find_or_fetch(&client, owner, "name")
                .unwrap_err()
                .to_string()
        };
        assert!(message("owner").contains("neither model.safetensors nor"));
        assert!(
            message("nobody").contains("no such model"),
            "{}",
            message("nobody")
        );
    }

    #[test]
    fn without_a_network_one_line_says_so() {
        let cache = tempfile::tempdir().unwrap();
        let message = find_or_fetch(&offline(cache.path()), "owner", "name")
            .unwrap_err()
            .to_string();
        assert!(message.contains("owner/name"), "{message}");
        assert!(message.contains("there is no connection"), "{message}");
        assert!(message.contains("name a local folder"), "{message}");
        assert!(!message.contains('\n'), "{message}");
    }

    #[test]
    fn paths_are_told_from_hub_ids() {
        assert_eq!(
            hub_id("HuggingFaceTB/SmolLM2-135M"),
            Some(("HuggingFaceTB", "SmolLM2-135M"))
        );
        for path in [
            "model.gguf",
            "./owner/name",
            "../name",
            "/owner/name",
            "owner/",
            "a/b/c",
            "a b/c",
            "a/../b",
            "models/x.gguf",
            "~/models",
            "",
        ] {
            assert_eq!(hub_id(path), None, "{path}");
        }
        assert!(matches!(
            resolve("/no/such/model"),
            Err(ModelError::NotFound { .. })
        ));
        assert!(matches!(
            resolve("model.gguf"),
            Err(ModelError::NotFound { .. })
        ));
        assert!(matches!(
            resolve("smollm2"),
            Err(ModelError::BadModelName { .. })
        ));
        assert_eq!(resolve("src").unwrap(), Path::new("src"));
    }
}
