//! Models named by their id on the Hugging Face hub.

use std::path::{Path, PathBuf};

use hf_hub::api::sync::{Api, ApiBuilder, ApiError, ApiRepo};
use hf_hub::{Cache, Repo, RepoType};

use super::error::ModelError;
use super::hugging_face::{CONFIG, GENERATION_CONFIG, WEIGHTS, WEIGHTS_INDEX, weight_map};

const ENDPOINT: &str = "https://huggingface.co";
const TOKENIZER: &str = "tokenizer.json";
/// Fetched where the repository has them.
const OPTIONAL: [&str; 4] = [
    GENERATION_CONFIG,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
];

/// The path of a model: `model` itself if it exists; otherwise, if it looks like `owner/name`, the
/// folder of the hub's cache (`HF_HUB_CACHE`, `HF_HOME`) that holds it, fetched if need be, with
/// progress on standard error. A model that is there in whole is used without a network.
///
/// # Errors
///
/// [`ModelError::NotFound`], [`ModelError::BadModelName`] or [`ModelError::Hub`].
pub fn resolve(model: &str) -> Result<PathBuf, ModelError> {
    let path = Path::new(model);
    if path.exists() {
        return Ok(path.to_path_buf());
    }
    if !is_hub_id(model) {
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
    }
    let settings = Settings::from_variables(|name| std::env::var(name).ok(), std::env::home_dir())
        .ok_or_else(|| ModelError::Hub {
            model: model.to_string(),
            problem: "there is no home folder to keep it in; set HF_HOME to a folder".to_string(),
        })?;
    let cache = Cache::new(settings.cache);
    if let Some(folder) = find(&cache, model) {
        return Ok(folder);
    }
    let api = ApiBuilder::from_cache(cache)
        .with_endpoint(settings.endpoint)
        .with_token(settings.token)
        .with_progress(true)
        .build()
        .map_err(|error| hub_error(model, CONFIG, &error))?;
    fetch(&api, model)
}

/// Where the hub is, where its files are kept, and what lets the user in: the meaning of the
/// environment variables is that of the Python package `huggingface_hub`.
#[derive(Debug, PartialEq)]
struct Settings {
    endpoint: String,
    cache: PathBuf,
    token: Option<String>,
}

impl Settings {
    /// `None` where neither a variable nor a home folder says where the cache is.
    fn from_variables(
        variable: impl Fn(&str) -> Option<String>,
        home: Option<PathBuf>,
    ) -> Option<Self> {
        let variable = |name| variable(name).filter(|value| !value.trim().is_empty());
        let folder = |name| variable(name).map(PathBuf::from);
        let hub_home = folder("HF_HOME")
            .or_else(|| Some(folder("XDG_CACHE_HOME")?.join("huggingface")))
            .or_else(|| Some(home?.join(".cache").join("huggingface")));
        let cache = folder("HF_HUB_CACHE").or_else(|| Some(hub_home.as_ref()?.join("hub")))?;
        let token = variable("HF_TOKEN").or_else(|| {
            let file = folder("HF_TOKEN_PATH").or_else(|| Some(hub_home?.join("token")))?;
            std::fs::read_to_string(file).ok()
        });
        let endpoint = variable("HF_ENDPOINT");
        let endpoint = endpoint.as_deref().unwrap_or(ENDPOINT);
        Some(Settings {
            endpoint: endpoint.trim_end_matches('/').to_string(),
            cache,
            token: token
                .map(|token| token.trim().to_string())
                .filter(|token| !token.is_empty()),
        })
    }
}

/// True for `owner/name`, false for what can only be a path.
fn is_hub_id(model: &str) -> bool {
    let Some((owner, name)) = model.split_once('/') else {
        return false;
    };
    let plain = |part: &str| {
        !part.is_empty()
            && !part.starts_with('.')
            && part
                .chars()
                .all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c))
    };
    let is_file = name.ends_with(".gguf") || name.ends_with(".safetensors");
    plain(owner) && plain(name) && !is_file
}

/// The cache's folder of `model`, if it holds all of it.
fn find(cache: &Cache, model: &str) -> Option<PathBuf> {
    let config = cache.model(model.to_string()).get(CONFIG)?;
    let folder = config.parent()?;
    is_complete(folder).then(|| folder.to_path_buf())
}

/// Fetches what the cache lacks of `model` and returns its folder there.
fn fetch(api: &Api, model: &str) -> Result<PathBuf, ModelError> {
    let problem = |problem: String| ModelError::Hub {
        model: model.to_string(),
        problem,
    };
    let newest = api.model(model.to_string());
    let config = download(&newest, CONFIG).map_err(|error| match is_missing(&error) {
        true => problem(format!("there is no such model, or it has no {CONFIG}")),
        false => hub_error(model, CONFIG, &error),
    })?;
    // The cache keeps a folder for each commit; all files are to be of the one that config.json is.
    let (folder, commit) = config
        .parent()
        .and_then(|folder| Some((folder, folder.file_name()?.to_str()?)))
        .ok_or_else(|| {
            problem(format!(
                "{} is not in a folder of its commit",
                config.display()
            ))
        })?;
    let repository = api.repo(Repo::with_revision(
        model.to_string(),
        RepoType::Model,
        commit.to_string(),
    ));
    // False where the repository has no such file.
    let fetch_optional = |filename: &str| {
        if folder.join(filename).is_file() {
            return Ok(true);
        }
        match download(&repository, filename) {
            Ok(_) => Ok(true),
            Err(error) if is_missing(&error) => Ok(false),
            Err(error) => Err(hub_error(model, filename, &error)),
        }
    };
    let fetch_needed = |filename: &str| match fetch_optional(filename)? {
        true => Ok(()),
        false => Err(problem(format!("it has no {filename}"))),
    };
    for filename in OPTIONAL {
        fetch_optional(filename)?;
    }
    fetch_needed(TOKENIZER)?;
    // The weights come last, so that a folder with its weights is a whole one.
    if !fetch_optional(WEIGHTS)? {
        if !fetch_optional(WEIGHTS_INDEX)? {
            return Err(problem(format!(
                "it holds neither {WEIGHTS} nor {WEIGHTS_INDEX}"
            )));
        }
        let index = weight_map(&folder.join(WEIGHTS_INDEX))?;
        let mut shards: Vec<String> = index.into_values().collect();
        shards.sort();
        shards.dedup();
        for shard in shards {
            fetch_needed(&shard)?;
        }
    }
    Ok(folder.to_path_buf())
}

/// Fetches one file into the cache.
///
/// A transfer that breaks off is tried once more, from where it stopped. The client's own retries
/// are left off: one that follows a resumed transfer would append the file from its start.
fn download(repository: &ApiRepo, filename: &str) -> Result<PathBuf, ApiError> {
    match repository.download(filename) {
        Err(ApiError::IoError(_)) => repository.download(filename),
        result => result,
    }
}

fn is_missing(error: &ApiError) -> bool {
    matches!(error, ApiError::RequestError(error) if matches!(**error, ureq::Error::StatusCode(404)))
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

fn hub_error(model: &str, filename: &str, error: &ApiError) -> ModelError {
    let problem = match error {
        ApiError::RequestError(error) => match &**error {
            ureq::Error::StatusCode(401 | 403) => {
                "there is no such model, or it needs a token with access to it (HF_TOKEN)"
                    .to_string()
            }
            ureq::Error::StatusCode(416) => leftover(filename),
            ureq::Error::StatusCode(status) => {
                format!("the hub answered with status {status} for {filename}")
            }
            // The I/O error says what people understand: refused, unreachable.
            ureq::Error::Io(cause) => no_connection(cause),
            cause => no_connection(cause),
        },
        ApiError::InvalidResume => leftover(filename),
        ApiError::IoError(cause) => {
            format!("{filename} broke off ({cause}); the same command goes on where it stopped")
        }
        ApiError::LockAcquisition(_) => {
            format!("another program is fetching {filename}; wait until it is done")
        }
        other => format!("{filename}: {other}"),
    };
    ModelError::Hub {
        model: model.to_string(),
        problem: problem.replace('\n', " "),
    }
}

fn no_connection(cause: &dyn std::error::Error) -> String {
    format!(
        "there is no connection ({cause}); without a network, name a local folder or a .gguf file"
    )
}

fn leftover(filename: &str) -> String {
    format!(
        "what is left of an earlier transfer does not fit {filename}; \
         remove the .part files of this model from the hub's cache"
    )
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::io::{BufRead, BufReader, Write};
    use std::net::{TcpListener, TcpStream};
    use std::sync::Mutex;

    use super::*;

    const MODEL: &str = "owner/name";
    const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";
    /// Nothing listens on that port.
    const NO_HUB: &str = "http://127.0.0.1:1";

    fn api(endpoint: &str, cache: &Path) -> Api {
        ApiBuilder::from_cache(Cache::new(cache.to_path_buf()))
            .with_endpoint(endpoint.to_string())
            .with_token(None)
            .with_progress(false)
            .build()
            .unwrap()
    }

    fn message(endpoint: &str, model: &str) -> String {
        let cache = tempfile::tempdir().unwrap();
        let message = fetch(&api(endpoint, cache.path()), model)
            .unwrap_err()
            .to_string();
        assert!(message.contains(model), "{message}");
        assert!(!message.contains('\n'), "{message}");
        message
    }

    /// A hub that holds one model. As the real one does, it sends those who ask for weights to
    /// another address.
    struct FakeHub {
        files: BTreeMap<&'static str, &'static str>,
        /// Whoever asks for all of this file gets its first byte only.
        breaks_off: &'static str,
        /// The lines of the requests so far, each with the range asked for.
        asked: Mutex<Vec<String>>,
    }

    /// Starts a hub on a port of its own and returns its address.
    fn start(
        breaks_off: &'static str,
        files: impl IntoIterator<Item = (&'static str, &'static str)>,
    ) -> (String, std::sync::Arc<FakeHub>) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        let hub = std::sync::Arc::new(FakeHub {
            files: files.into_iter().collect(),
            breaks_off,
            asked: Mutex::new(Vec::new()),
        });
        let served = hub.clone();
        let address = endpoint.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                // A client that goes away is no failure of the hub.
                let _ = served.answer(stream.unwrap(), &address);
            }
        });
        (endpoint, hub)
    }

    impl FakeHub {
        fn answer(&self, mut stream: TcpStream, address: &str) -> std::io::Result<()> {
            let lines = BufReader::new(stream.try_clone()?).lines();
            let request: Vec<String> = lines
                .map_while(Result::ok)
                .take_while(|line| !line.is_empty())
                .collect();
            let path = request[0].split(' ').nth(1).unwrap();
            let range = request
                .iter()
                .find_map(|line| line.to_lowercase().strip_prefix("range: ")?.parse().ok())
                .unwrap_or_else(String::new);
            let asked = format!("{path} {range}");
            self.asked.lock().unwrap().push(asked);

            let moved = path.strip_prefix("/moved/");
            let file = path
                .strip_prefix("/owner/name/resolve/")
                .and_then(|rest| rest.split_once('/'))
                .map(|(_, file)| file)
                .or(moved);
            let Some((name, text)) = file.and_then(|file| self.files.get_key_value(file)) else {
                let status = match path.split('/').nth(1) {
                    Some("secret") => "401 Unauthorized",
                    Some("broken") => "500 Internal Server Error",
                    _ => "404 Not Found",
                };
                return write!(
                    stream,
                    "HTTP/1.1 {status}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
                );
            };
            let tag = name.replace('.', "-");
            if name.ends_with(".safetensors") && moved.is_none() {
                return write!(
                    stream,
                    "HTTP/1.1 302 Found\r\nLocation: {address}/moved/{name}\r\n\
                     X-Linked-ETag: \"{tag}\"\r\nX-Repo-Commit: {COMMIT}\r\n\
                     Content-Length: 0\r\nConnection: close\r\n\r\n"
                );
            }
            let (start, end) = range
                .strip_prefix("bytes=")
                .and_then(|range| range.split_once('-'))
                .unwrap();
            let start: usize = start.parse().unwrap();
            let end = end.parse().unwrap_or(text.len() - 1);
            let body = &text[start..=end];
            write!(
                stream,
                "HTTP/1.1 206 Partial Content\r\nETag: \"{tag}\"\r\nX-Repo-Commit: {COMMIT}\r\n\
                 Content-Range: bytes {start}-{end}/{}\r\nContent-Length: {}\r\n\
                 Connection: close\r\n\r\n",
                text.len(),
                body.len()
            )?;
            let breaks_off = *name == self.breaks_off && start == 0 && body.len() > 1;
            stream.write_all(if breaks_off {
                &body.as_bytes()[..1]
            } else {
                body.as_bytes()
            })
        }

        /// The paths asked for, each once, in order.
        fn paths(&self) -> Vec<String> {
            let asked = self.asked.lock().unwrap();
            let mut paths: Vec<String> = asked
                .iter()
                .filter_map(|line| Some(line.split(' ').next()?.to_string()))
                .collect();
            paths.dedup();
            paths
        }
    }

    #[test]
    fn a_model_is_fetched_once_and_then_found_without_a_network() {
        let (endpoint, hub) = start(
            "",
            [
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
            ],
        );
        let folder = tempfile::tempdir().unwrap();
        let cache = Cache::new(folder.path().to_path_buf());
        assert_eq!(find(&cache, MODEL), None);
        let snapshot = fetch(&api(&endpoint, folder.path()), MODEL).unwrap();
        // The layout that other programs read too.
        let expected = folder
            .path()
            .join("models--owner--name/snapshots")
            .join(COMMIT);
        assert_eq!(snapshot, expected);
        let mut names: Vec<_> = std::fs::read_dir(&snapshot)
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
        let text = |name| std::fs::read_to_string(snapshot.join(name)).unwrap();
        assert_eq!(text("model-1.safetensors"), "one");
        assert_eq!(text("model-2.safetensors"), "two");

        let paths = hub.paths();
        assert_eq!(paths[0], "/owner/name/resolve/main/config.json");
        let rest: Vec<&str> = paths[1..]
            .iter()
            .filter(|path| !path.starts_with("/moved/"))
            .map(|path| {
                path.strip_prefix(&format!("/owner/name/resolve/{COMMIT}/"))
                    .unwrap_or(path)
            })
            .collect();
        let mut in_order = rest.clone();
        in_order.dedup();
        assert_eq!(in_order.len(), 9, "{rest:?}");
        assert_eq!(
            in_order[4..],
            [
                "tokenizer.json",
                "model.safetensors",
                "model.safetensors.index.json",
                "model-1.safetensors",
                "model-2.safetensors"
            ]
        );

        assert_eq!(find(&cache, MODEL).as_ref(), Some(&snapshot));
        // With a shard missing the model is not whole, and only that shard is fetched again.
        std::fs::remove_file(snapshot.join("model-2.safetensors")).unwrap();
        assert_eq!(find(&cache, MODEL), None);
        hub.asked.lock().unwrap().clear();
        assert_eq!(
            fetch(&api(&endpoint, folder.path()), MODEL).unwrap(),
            snapshot
        );
        assert_eq!(text("model-2.safetensors"), "two");
        let again = hub.paths();
        assert!(
            !again.iter().any(|path| path.contains("model-1")),
            "{again:?}"
        );
        assert!(
            !again.iter().any(|path| path.contains("tokenizer.json")),
            "{again:?}"
        );
    }

    #[test]
    fn a_transfer_that_breaks_off_goes_on_where_it_stopped() {
        let (endpoint, hub) = start(
            "model.safetensors",
            [
                ("config.json", "{}"),
                ("tokenizer.json", "{}"),
                ("model.safetensors", "weights"),
            ],
        );
        let cache = tempfile::tempdir().unwrap();
        let folder = fetch(&api(&endpoint, cache.path()), MODEL).unwrap();
        let text = std::fs::read_to_string(folder.join(WEIGHTS)).unwrap();
        assert_eq!(text, "weights");
        let asked = hub.asked.lock().unwrap();
        let resumed = "/moved/model.safetensors bytes=1-".to_string();
        assert!(asked.contains(&resumed), "{asked:?}");
    }

    #[test]
    fn what_the_hub_lacks_is_named() {
        let (endpoint, _) = start("", [("config.json", "{}"), ("tokenizer.json", "{}")]);
        let text = message(&endpoint, MODEL);
        assert!(text.contains("neither model.safetensors nor"), "{text}");
        let text = message(&endpoint, "nobody/name");
        assert!(text.contains("no such model"), "{text}");
        let text = message(&endpoint, "secret/name");
        assert!(text.contains("HF_TOKEN"), "{text}");
        let text = message(&endpoint, "broken/name");
        assert!(text.contains("status 500 for config.json"), "{text}");

        let (endpoint, _) = start("", [("config.json", "{}")]);
        let text = message(&endpoint, MODEL);
        assert!(text.contains("it has no tokenizer.json"), "{text}");
    }

    #[test]
    fn without_a_network_one_line_says_so() {
        let text = message(NO_HUB, MODEL);
        assert!(text.contains("there is no connection"), "{text}");
        assert!(text.contains("refused"), "{text}");
        assert!(text.contains("name a local folder"), "{text}");
    }

    #[test]
    fn settings_follow_the_variables_of_the_hub() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("token"), " from-file\n").unwrap();
        let path = folder.path().to_str().unwrap();
        let settings = |variables: &[(&str, &str)], home: Option<&str>| {
            let variable = |name: &str| {
                let (_, value) = variables.iter().find(|(key, _)| *key == name)?;
                Some(value.to_string())
            };
            Settings::from_variables(variable, home.map(PathBuf::from))
        };
        let expected = |endpoint: &str, cache: PathBuf, token: Option<&str>| {
            Some(Settings {
                endpoint: endpoint.to_string(),
                cache,
                token: token.map(str::to_string),
            })
        };

        assert_eq!(settings(&[], None), None);
        assert_eq!(
            settings(&[("HF_HOME", " "), ("HF_TOKEN", "")], Some("/no/home")),
            expected(ENDPOINT, "/no/home/.cache/huggingface/hub".into(), None)
        );
        assert_eq!(
            settings(&[("XDG_CACHE_HOME", "/no/xdg")], Some("/no/home")),
            expected(ENDPOINT, "/no/xdg/huggingface/hub".into(), None)
        );
        assert_eq!(
            settings(&[("HF_HOME", path)], Some("/no/home")),
            expected(ENDPOINT, folder.path().join("hub"), Some("from-file"))
        );
        assert_eq!(
            settings(
                &[
                    ("HF_HOME", path),
                    ("HF_HUB_CACHE", "/no/cache"),
                    ("HF_TOKEN", "given"),
                    ("HF_ENDPOINT", "http://mirror/")
                ],
                None
            ),
            expected("http://mirror", "/no/cache".into(), Some("given"))
        );
        let file = format!("{path}/token");
        assert_eq!(
            settings(
                &[("HF_HUB_CACHE", "/no/cache"), ("HF_TOKEN_PATH", &file)],
                None
            ),
            expected(ENDPOINT, "/no/cache".into(), Some("from-file"))
        );
    }

    #[test]
    fn paths_are_told_from_hub_ids() {
        assert!(is_hub_id("HuggingFaceTB/SmolLM2-135M"));
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
            assert!(!is_hub_id(path), "{path}");
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
