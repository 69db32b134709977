//! The model that is used where none is named.

use std::ffi::OsString;
use std::path::PathBuf;

use super::error::ModelError;

/// SmolLM2-135M-Instruct, as `scripts/demo` puts it into the cache folder.
pub const FILE_NAME: &str = "SmolLM2-135M-Instruct.Q4_1.gguf";

/// Podium's cache folder: `$PODIUM_CACHE`, or `podium` in `$XDG_CACHE_HOME` or `~/.cache`.
///
/// # Errors
///
/// [`ModelError::NoCacheFolder`] where none of the three is set.
pub fn cache_folder() -> Result<PathBuf, ModelError> {
    cache_folder_from(|name| std::env::var_os(name))
}

/// Where the default model belongs, whether or not it is there.
///
/// # Errors
///
/// [`ModelError::NoCacheFolder`].
pub fn expected_path() -> Result<PathBuf, ModelError> {
    Ok(cache_folder()?.join(FILE_NAME))
}

/// The default model.
///
/// # Errors
///
/// [`ModelError::NoDefaultModel`], which says how to get it, or [`ModelError::NoCacheFolder`].
pub fn path() -> Result<PathBuf, ModelError> {
    let path = expected_path()?;
    match path.is_file() {
        true => Ok(path),
        false => Err(ModelError::NoDefaultModel { path }),
    }
}

fn cache_folder_from(variable: impl Fn(&str) -> Option<OsString>) -> Result<PathBuf, ModelError> {
    // An empty variable counts as unset, as the XDG specification has it.
    let folder = |name| {
        variable(name)
            .filter(|value| !value.is_empty())
            .map(PathBuf::from)
    };
    folder("PODIUM_CACHE")
        .or_else(|| folder("XDG_CACHE_HOME").map(|cache| cache.join("podium")))
        .or_else(|| folder("HOME").map(|home| home.join(".cache/podium")))
        .ok_or(ModelError::NoCacheFolder)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cache_folder_is_the_first_that_is_set() {
        let with = |set: &[(&str, &str)]| {
            let set: Vec<_> = set
                .iter()
                .map(|&(name, value)| (name.to_string(), OsString::from(value)))
                .collect();
            cache_folder_from(move |name| {
                set.iter()
                    .find(|(set, _)| set == name)
                    .map(|(_, value)| value.clone())
            })
            .map(|path| path.display().to_string())
        };
        let all = [
            ("PODIUM_CACHE", "/p"),
            ("XDG_CACHE_HOME", "/x"),
            ("HOME", "/h"),
        ];
        assert_eq!(with(&all).unwrap(), "/p");
        assert_eq!(with(&all[1..]).unwrap(), "/x/podium");
        assert_eq!(with(&all[2..]).unwrap(), "/h/.cache/podium");
        assert_eq!(
            with(&[("PODIUM_CACHE", ""), ("HOME", "/h")]).unwrap(),
            "/h/.cache/podium"
        );
        assert!(matches!(with(&[]), Err(ModelError::NoCacheFolder)));
    }

    #[test]
    fn a_missing_default_model_names_the_script_that_fetches_it() {
        let message = ModelError::NoDefaultModel {
            path: "/cache/x.gguf".into(),
        }
        .to_string();
        assert!(message.contains("/cache/x.gguf") && message.contains("scripts/demo"));
    }
}
