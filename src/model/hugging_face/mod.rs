//! A model in a folder of Hugging Face's layout: `config.json` beside one or many safetensors.

pub(crate) mod config;
pub(crate) mod fields;
pub(crate) mod rope;
mod safetensors;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use self::fields::{Fields, read_object};
use super::error::ModelError;
use super::files::Opened;
use super::mapped::MappedFile;

pub(crate) const CONFIG: &str = "config.json";
pub(crate) const GENERATION_CONFIG: &str = "generation_config.json";
pub(crate) const WEIGHTS: &str = "model.safetensors";
pub(crate) const WEIGHTS_INDEX: &str = "model.safetensors.index.json";

/// True where the folder holds weights of this layout.
pub(crate) fn has_weights(folder: &Path) -> bool {
    folder.join(WEIGHTS).is_file() || folder.join(WEIGHTS_INDEX).is_file()
}

pub(crate) fn open(folder: &Path) -> Result<Opened, ModelError> {
    let config_path = folder.join(CONFIG);
    let config_object = read_object(&config_path)?;
    let generation_path = folder.join(GENERATION_CONFIG);
    let generation_object = match generation_path.is_file() {
        true => Some(read_object(&generation_path)?),
        false => None,
    };
    let generation = generation_object
        .as_ref()
        .map(|object| Fields::new(&generation_path, object));
    let (config, layout) = config::parse(
        &Fields::new(&config_path, &config_object),
        generation.as_ref(),
    )?;

    let (paths, shard_of) = shards(folder)?;
    let mut files = Vec::new();
    let mut tensors = BTreeMap::new();
    for path in paths {
        let file = MappedFile::open(&path)?;
        let shard = file_name(&path);
        for (name, tensor) in safetensors::tensors(&file, files.len())? {
            // The index decides where two shards hold a tensor of the same name.
            let elsewhere = shard_of
                .as_ref()
                .is_some_and(|index| index.get(&name).is_none_or(|listed| *listed != shard));
            if !elsewhere {
                tensors.insert(name, tensor);
            }
        }
        files.push(file);
    }
    let leftover = tensors.keys().find(|name| {
        name.strip_prefix("model.layers.")
            .and_then(|rest| rest.split('.').next()?.parse().ok())
            .is_some_and(|layer: usize| layer >= config.layers)
    });
    if let Some(tensor) = leftover {
        return Err(ModelError::LayerBeyondConfig {
            path: config_path,
            tensor: tensor.clone(),
            layers: config.layers,
        });
    }
    Ok(Opened {
        name: file_name(folder),
        config,
        layout,
        files,
        tensors,
    })
}

type Index = BTreeMap<String, String>;

/// The folder's safetensors, and which of them holds each tensor, if there is an index.
fn shards(folder: &Path) -> Result<(Vec<PathBuf>, Option<Index>), ModelError> {
    let single = folder.join(WEIGHTS);
    if single.is_file() {
        return Ok((vec![single], None));
    }
    let index_path = folder.join(WEIGHTS_INDEX);
    if !index_path.is_file() {
        return Err(ModelError::not_a_model(
            folder,
            format!("no weights: neither {WEIGHTS} nor {WEIGHTS_INDEX} is there"),
        ));
    }
    let index = weight_map(&index_path)?;
    let mut names: Vec<&String> = index.values().collect();
    names.sort();
    names.dedup();
    let paths = names.into_iter().map(|name| folder.join(name)).collect();
    Ok((paths, Some(index)))
}

/// Reads an index: the file name of each tensor.
pub(crate) fn weight_map(path: &Path) -> Result<Index, ModelError> {
    let object = read_object(path)?;
    let fields = Fields::new(path, &object);
    let map = object
        .get("weight_map")
        .and_then(|map| map.as_object())
        .ok_or_else(|| fields.wrong("weight_map", "missing; it names the file of each tensor"))?;
    map.iter()
        .map(|(tensor, file)| match file.as_str() {
            // A plain name: an index must not lead out of its folder.
            Some(file) if Path::new(file).file_name().is_some_and(|name| name == file) => {
                Ok((tensor.clone(), file.to_string()))
            }
            _ => Err(fields.wrong(
                "weight_map",
                format!("{file} (for {tensor}) is not the name of a file"),
            )),
        })
        .collect()
}

fn file_name(path: &Path) -> String {
    // A path such as `.` has no last component of its own.
    let resolved = path.file_name().is_none().then(|| path.canonicalize());
    let path = match &resolved {
        Some(Ok(resolved)) => resolved,
        _ => path,
    };
    path.file_name().map_or_else(
        || path.display().to_string(),
        |name| name.to_string_lossy().into_owned(),
    )
}
