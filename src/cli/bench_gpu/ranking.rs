//! Ranking: `gather_rank`, beside a copy of the states to the host and the same ranker there.

use std::sync::Arc;

use crate::backend::cuda::device::{Buffer, Device, DeviceError};
use crate::backend::cuda::gather_rank::{GatherRank, Group, RankerWeights};
use crate::backend::cuda::limits;
use crate::backend::random::uniform;
use crate::cli::error::CliError;
use crate::ranker::{
    ExtraInputs, FeaturePosition, Normalization, Ranker, RankerConfig, RankerKind, RankerTensor,
    Relevance,
};

/// Ranks n candidates, whose states are on the device: by `gather_rank`, and by a copy of the states to
/// the host, where the same ranker scores them.
pub fn measure(
    device: &Arc<dyn Device>,
    hidden_size: usize,
    n: usize,
    emulated: bool,
) -> Result<(), CliError> {
    let ranker = listwise(hidden_size)?;
    let numbers = |seed: u64, len: usize| -> Vec<f32> {
        (0..len)
            .map(|i| 2.0 * uniform(seed, 0, i as u32) - 1.0)
            .collect()
    };
    let residual = Buffer::from_slice(device, &numbers(1, n * hidden_size), "states")?;
    let prompt_on_host = numbers(2, hidden_size);
    let prompt = Buffer::from_slice(device, &prompt_on_host, "a state")?;
    let rows: Vec<u32> = (0..n as u32).collect();
    let rows = Buffer::from_slice(device, &rows, "rows")?;
    let (scores, best) = (
        Buffer::<f32>::new(device, n, "scores")?,
        Buffer::<u32>::new(device, 1, "the best")?,
    );
    let group = Group {
        candidates: n,
        residual: residual.address(),
        row_stride: hidden_size,
        rows: rows.address(),
        prompt: prompt.address(),
        extra: 0,
        scores: scores.address(),
        best: best.address(),
    };
    let mut gather_rank = GatherRank::new(device)?;
    gather_rank.prepare(&[(Arc::new(RankerWeights::new(device, &ranker)?), group)])?;
    let repeats = if emulated { 1 } else { 200 };
    let fused = limits::seconds(&**device, repeats, || gather_rank.launch())?;
    let with_answer = limits::seconds(&**device, repeats, || {
        gather_rank.launch()?;
        best.read(0, 1).map(drop)
    })?;
    let extra = ExtraInputs {
        mean_logprob: -1.0,
        length: 100.0,
    };
    let extra = vec![extra; n];
    let mut failed = None;
    let on_host = limits::seconds(&**device, repeats.min(20), || {
        let states = residual.read(0, n * hidden_size)?;
        failed = failed
            .take()
            .or(ranker.score(&prompt_on_host, &states, &extra).err());
        Ok::<(), DeviceError>(())
    })?;
    if let Some(error) = failed {
        return Err(error.into());
    }
    println!(
        "### Ranking {n} candidates, hidden size {hidden_size} (listwise, 64 columns, 4 heads)\n"
    );
    println!("| | µs |\n| --- | --- |");
    println!(
        "| `gather_rank`, one launch after the other | {:.1} |",
        fused * 1e6
    );
    println!(
        "| the same, each answer (4 bytes) awaited on the host | {:.1} |",
        with_answer * 1e6
    );
    println!(
        "| states copied to the host and ranked there | {:.1} |\n",
        on_host * 1e6
    );
    Ok(())
}

/// A listwise ranker of the usual size, with made-up weights.
fn listwise(hidden_size: usize) -> Result<Ranker, CliError> {
    let config = RankerConfig {
        format_version: 1,
        name: "bench".to_string(),
        task: None,
        kind: RankerKind::Listwise,
        hidden_size,
        projection_width: Some(64),
        heads: Some(4),
        feed_forward_width: Some(128),
        relevance: Some(Relevance::Dot),
        layer: 1,
        layers: 1,
        feature_position: FeaturePosition::LastToken,
        normalization: Normalization::Rms,
        extra_inputs: Vec::new(),
        model_name: "made up".to_string(),
        model_fingerprint: "none".to_string(),
        training: Default::default(),
        metrics: Default::default(),
    };
    let tensors = config.tensor_shapes().into_iter().map(|(name, shape)| {
        let len = shape.iter().product::<usize>();
        let data = (0..len)
            .map(|i| (uniform(2, 0, i as u32) - 0.5) * 0.1)
            .collect();
        (name.to_string(), RankerTensor { data, shape })
    });
    let tensors = tensors.collect();
    Ranker::new(config, tensors)
        .map_err(|problem| CliError::Failed(format!("no ranker to time: {problem}")))
}
