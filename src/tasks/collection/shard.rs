//! A shard: the features of some items in one safetensors file.

use std::collections::HashMap;
use std::io::Write;
use std::path::Path;

use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};

use super::{CollectionError, CollectionInfo, FeatureDtype};
use crate::model::mapped::MappedFile;
use crate::tasks::whole_file::{WholeFile, WriteError};

const FIRST_ITEM: &str = "first_item";

/// Bytes of an item's features, of all layers: the prompt's row and its candidates' rows.
pub(super) fn item_bytes(info: &CollectionInfo, candidates: usize) -> usize {
    info.feature_layers.len() * (1 + candidates) * row_bytes(info)
}

pub(super) fn row_bytes(info: &CollectionInfo) -> usize {
    info.hidden_size * info.dtype.size()
}

/// Writes a shard out of items' features, each of which is for each layer the prompt's row and then
/// its candidates' rows.
pub(super) fn write(
    path: &Path,
    info: &CollectionInfo,
    first_item: usize,
    items: &[&[u8]],
) -> Result<(), WriteError> {
    let row = row_bytes(info);
    let of_layer = |item: &[u8]| item.len() / info.feature_layers.len();
    let mut offsets = vec![0i64];
    for item in items {
        let candidates = of_layer(item) / row - 1;
        offsets.push(offsets[offsets.len() - 1] + candidates as i64);
    }
    let rows = offsets[items.len()] as usize;
    let mut tensors: Vec<(String, Dtype, Vec<usize>, Vec<u8>)> = Vec::new();
    for (index, layer) in info.feature_layers.iter().enumerate() {
        let mut prompts = Vec::with_capacity(items.len() * row);
        let mut candidates = Vec::with_capacity(rows * row);
        for item in items {
            let size = of_layer(item);
            let (prompt, rest) = item[index * size..][..size].split_at(row);
            prompts.extend_from_slice(prompt);
            candidates.extend_from_slice(rest);
        }
        let dtype = info.dtype.in_safetensors();
        for (what, count, bytes) in [
            ("prompt", items.len(), prompts),
            ("candidates", rows, candidates),
        ] {
            let shape = vec![count, info.hidden_size];
            tensors.push((format!("layer.{layer}.{what}"), dtype, shape, bytes));
        }
    }
    let offset_bytes = offsets
        .iter()
        .flat_map(|offset| offset.to_le_bytes())
        .collect();
    tensors.push((
        "offsets".to_string(),
        Dtype::I64,
        vec![offsets.len()],
        offset_bytes,
    ));

    let mut file = WholeFile::create(path)?;
    let views = tensors.iter().map(|(name, dtype, shape, bytes)| {
        TensorView::new(*dtype, shape.clone(), bytes).map(|view| (name.as_str(), view))
    });
    // One entry only: the library writes metadata in the order of a hash map.
    let metadata = HashMap::from([(FIRST_ITEM.to_string(), first_item.to_string())]);
    let bytes = views
        .collect::<Result<Vec<_>, _>>()
        .and_then(|views| safetensors::serialize(views, Some(metadata)))
        .map_err(|error| file.error(std::io::Error::other(error.to_string())))?;
    file.write_all(&bytes)
        .map_err(|source| file.error(source))?;
    file.finish()
}

/// A shard mapped into memory, with its shapes checked.
#[derive(Debug)]
pub(super) struct Shard {
    map: MappedFile,
    pub first_item: usize,
    /// Candidates of item i are rows `offsets[i] .. offsets[i + 1]`.
    pub offsets: Vec<usize>,
    /// For each feature layer, where the prompts' and the candidates' rows begin in the file.
    begins: Vec<(usize, usize)>,
    row_bytes: usize,
}

impl Shard {
    pub fn open(path: &Path, info: &CollectionInfo) -> Result<Shard, CollectionError> {
        let map = MappedFile::open(path)?;
        let invalid = |problem: String| CollectionError::invalid(path, problem);
        let (first_item, offsets, begins) = parse(&map, info).map_err(invalid)?;
        Ok(Shard {
            map,
            first_item,
            offsets,
            begins,
            row_bytes: row_bytes(info),
        })
    }

    pub fn items(&self) -> usize {
        self.offsets.len() - 1
    }

    pub fn prompt(&self, layer: usize, item: usize) -> &[u8] {
        &self.map[self.begins[layer].0 + item * self.row_bytes..][..self.row_bytes]
    }

    pub fn candidates(&self, layer: usize, item: usize) -> &[u8] {
        let (from, to) = (self.offsets[item], self.offsets[item + 1]);
        let begin = self.begins[layer].1 + from * self.row_bytes;
        &self.map[begin..][..(to - from) * self.row_bytes]
    }
}

type Parsed = (usize, Vec<usize>, Vec<(usize, usize)>);

fn parse(map: &MappedFile, info: &CollectionInfo) -> Result<Parsed, String> {
    let (_, metadata) = SafeTensors::read_metadata(map).map_err(|error| error.to_string())?;
    let first_item = metadata
        .metadata()
        .as_ref()
        .and_then(|metadata| metadata.get(FIRST_ITEM))
        .ok_or("its metadata have no first_item")?;
    let first_item = first_item
        .parse()
        .map_err(|_| format!("first_item is \"{first_item}\", not a number"))?;
    let tensors = SafeTensors::deserialize(map).map_err(|error| error.to_string())?;
    let tensor = |name: &str| tensors.tensor(name).map_err(|error| error.to_string());
    let offsets = tensor("offsets")?;
    if offsets.dtype() != Dtype::I64 || offsets.shape().len() != 1 {
        return Err("offsets must be a list of int64".to_string());
    }
    let offsets: Vec<usize> = offsets
        .data()
        .as_chunks()
        .0
        .iter()
        .map(|&bytes| usize::try_from(i64::from_le_bytes(bytes)).ok())
        .collect::<Option<_>>()
        .filter(|offsets: &Vec<usize>| offsets.first() == Some(&0) && offsets.is_sorted())
        .ok_or("offsets must begin with 0 and never decrease")?;
    let (items, rows) = (offsets.len() - 1, offsets[offsets.len() - 1]);
    let base = map.as_ptr() as usize;
    let begin = |name: String, count: usize| {
        let view = tensor(&name)?;
        if view.shape() != [count, info.hidden_size] || view.dtype() != info.dtype.in_safetensors()
        {
            return Err(format!(
                "{name} is {:?} {:?}, and collection.json and offsets make it {:?} [{count}, {}]",
                view.dtype(),
                view.shape(),
                info.dtype.in_safetensors(),
                info.hidden_size
            ));
        }
        Ok(view.data().as_ptr() as usize - base)
    };
    let begins = info.feature_layers.iter().map(|layer| {
        Ok((
            begin(format!("layer.{layer}.prompt"), items)?,
            begin(format!("layer.{layer}.candidates"), rows)?,
        ))
    });
    Ok((
        first_item,
        offsets.clone(),
        begins.collect::<Result<_, String>>()?,
    ))
}

/// Appends numbers in the dtype of the collection.
pub(super) fn narrow(dtype: FeatureDtype, numbers: &[f32], bytes: &mut Vec<u8>) {
    match dtype {
        FeatureDtype::F32 => bytes.extend(numbers.iter().flat_map(|x| x.to_le_bytes())),
        FeatureDtype::Bf16 => bytes.extend(
            numbers
                .iter()
                .flat_map(|&x| half::bf16::from_f32(x).to_le_bytes()),
        ),
    }
}
