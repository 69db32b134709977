//! `kernels/gather_rank.cu`

use super::device::{Address, Buffer, Device, DeviceError, Launch, Plain};
use crate::arguments;
use crate::ranker::{Normalization, Ranker, RankerKind, Relevance};
use half::bf16;
use std::fmt;
use std::sync::Arc;

const THREADS: u32 = 512;
const WARPS: usize = 16;
const TILE_ROWS: usize = 16;
/// Of a block; a projection's inputs are split into as many.
const COORDINATES: usize = 256;
/// Two tiles of bfloat16, their rows 16 bytes longer than they hold; eight sums a row.
const PROJECTION_BYTES: usize = 2 * TILE_ROWS * (COORDINATES + 8) * 2 + TILE_ROWS * 8 * 4;
/// Columns of a matrix as the linear kind has it: as many as the tensor cores' product.
const LINEAR_COLUMNS: usize = 8;

/// Candidates of a group, at most: a block of the listwise kind keeps [`WARPS`] + 1 numbers a row in
/// shared memory.
pub const MAX_CANDIDATES: usize = 1024;

/// What [`Group::best`] becomes where a score is not finite.
pub const NONE: u32 = u32::MAX;

/// Why candidates cannot be ranked on the device.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum GatherRankError {
    #[error("group {group} has no candidate to rank")]
    NoCandidates { group: usize },
    #[error(
        "group {group} has {candidates} candidates; the CUDA backend ranks at most {MAX_CANDIDATES} at a time"
    )]
    TooManyCandidates { group: usize, candidates: usize },
    #[error(transparent)]
    Device(#[from] DeviceError),
}

/// `Job` of the kernel, field for field.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
struct Job {
    residual: Address,
    rows: Address,
    prompt: Address,
    extra: Address,
    prompt_mean: Address,
    prompt_inverse_scale: Address,
    candidate_mean: Address,
    candidate_inverse_scale: Address,
    projection: Address,
    extra_mean: Address,
    extra_inverse_scale: Address,
    extra_weight: Address,
    attention_norm: Address,
    qkv: Address,
    qkv_bias: Address,
    output: Address,
    output_bias: Address,
    feed_forward_norm: Address,
    up: Address,
    up_bias: Address,
    down: Address,
    down_bias: Address,
    workspace: Address,
    counters: Address,
    scores: Address,
    best: Address,
    kind: u32,
    rms: u32,
    cosine: u32,
    candidates: u32,
    hidden_size: u32,
    row_stride: u32,
    extras: u32,
    columns: u32,
    heads: u32,
    feed_forward_width: u32,
    temperature: f32,
    bias: f32,
}
// SAFETY: integers and floats, 26 of 8 bytes and then 12 of 4, so that there is no padding.
unsafe impl Plain for Job {}
const _: () = assert!(size_of::<Job>() == 26 * 8 + 12 * 4);

impl Job {
    fn tiles(&self) -> usize {
        (1 + self.candidates as usize).div_ceil(TILE_ROWS)
    }

    fn splits(&self) -> usize {
        (self.hidden_size as usize).div_ceil(COORDINATES)
    }

    /// Numbers of intermediate results; whole sixteens, so that the next job's are aligned too.
    fn workspace_len(&self) -> usize {
        let columns = self.columns as usize;
        let row = self.splits() * (columns + 1) + 5 * columns + self.feed_forward_width as usize;
        self.tiles() * TILE_ROWS * row
    }

    fn counters_len(&self) -> usize {
        self.tiles() + 1
    }

    fn shared_bytes(&self) -> usize {
        let rows = 1 + self.candidates as usize;
        let attention = match self.kind == LISTWISE {
            true => (1 + WARPS) * rows * 4,
            false => 0,
        };
        PROJECTION_BYTES.max(attention)
    }
}

const LISTWISE: u32 = 0;
const POINTWISE: u32 = 1;
const LINEAR: u32 = 2;

/// A ranker's weights on a device.
#[derive(Debug)]
pub struct RankerWeights {
    /// Of a job what the ranker says; the rest is zero.
    job: Job,
    /// What the addresses in `job` point to.
    buffers: Vec<Buffer<u32>>,
}

impl RankerWeights {
    pub fn new(device: &Arc<dyn Device>, ranker: &Ranker) -> Result<RankerWeights, DeviceError> {
        let config = ranker.config();
        let (hidden_size, extras) = (config.hidden_size, config.extra_inputs.len());
        let columns = config.projection_width.unwrap_or(LINEAR_COLUMNS);
        let wide = config.feed_forward_width.unwrap_or(0);
        let tensor = |name: &str| ranker.tensors().get(name).map(|tensor| &tensor.data[..]);
        let first = |name: &str| tensor(name).map_or(0.0, |values| values[0]);
        // [hidden_size + extras, columns]
        let projection = |input: usize, column: usize| match config.kind {
            RankerKind::Linear if column > 0 => 0.0,
            RankerKind::Linear => tensor("linear.weight").map_or(0.0, |weight| weight[input]),
            _ => tensor("projection.weight").map_or(0.0, |weight| weight[input * columns + column]),
        };
        let extra_weight: Vec<f32> = (hidden_size..hidden_size + extras)
            .flat_map(|input| (0..columns).map(move |column| (input, column)))
            .map(|(input, column)| projection(input, column))
            .collect();

        let mut upload = Upload {
            device,
            tensor: &tensor,
            buffers: Vec::new(),
        };
        let job = Job {
            prompt_mean: upload.vector("normalization.prompt.mean")?,
            prompt_inverse_scale: upload.inverse("normalization.prompt.scale")?,
            candidate_mean: upload.vector("normalization.candidate.mean")?,
            candidate_inverse_scale: upload.inverse("normalization.candidate.scale")?,
            projection: upload.words(&pack(hidden_size, columns, projection))?,
            extra_mean: upload.vector("normalization.extra.mean")?,
            extra_inverse_scale: upload.inverse("normalization.extra.scale")?,
            extra_weight: upload.floats(&extra_weight)?,
            attention_norm: upload.norm("attention.norm")?,
            qkv: upload.matrix("attention.qkv.weight", columns)?,
            qkv_bias: upload.vector("attention.qkv.bias")?,
            output: upload.matrix("attention.output.weight", columns)?,
            output_bias: upload.vector("attention.output.bias")?,
            feed_forward_norm: upload.norm("feed_forward.norm")?,
            up: upload.matrix("feed_forward.up.weight", columns)?,
            up_bias: upload.vector("feed_forward.up.bias")?,
            down: upload.matrix("feed_forward.down.weight", wide)?,
            down_bias: upload.vector("feed_forward.down.bias")?,
            kind: match config.kind {
                RankerKind::Listwise => LISTWISE,
                RankerKind::Pointwise => POINTWISE,
                RankerKind::Linear => LINEAR,
            },
            rms: u32::from(config.normalization == Normalization::Rms),
            cosine: u32::from(config.relevance == Some(Relevance::Cosine)),
            hidden_size: hidden_size as u32,
            extras: extras as u32,
            columns: columns as u32,
            heads: config.heads.unwrap_or(1) as u32,
            feed_forward_width: wide as u32,
            temperature: first("relevance.temperature"),
            bias: first("linear.bias"),
            ..Job::default()
        };
        Ok(RankerWeights {
            job,
            buffers: upload.buffers,
        })
    }

    /// Bytes on the device.
    pub fn bytes(&self) -> usize {
        self.buffers.iter().map(|buffer| 4 * buffer.len()).sum()
    }
}

/// Brings tensors to the device, each to a buffer of its own; 0 for one that the ranker has not.
struct Upload<'a> {
    device: &'a Arc<dyn Device>,
    tensor: &'a dyn Fn(&str) -> Option<&'a [f32]>,
    buffers: Vec<Buffer<u32>>,
}

impl Upload<'_> {
    fn words(&mut self, words: &[u32]) -> Result<Address, DeviceError> {
        if words.is_empty() {
            return Ok(0);
        }
        let buffer = Buffer::from_slice(self.device, words, "a ranker")?;
        let address = buffer.address();
        self.buffers.push(buffer);
        Ok(address)
    }

    fn floats(&mut self, values: &[f32]) -> Result<Address, DeviceError> {
        let words: Vec<u32> = values.iter().map(|x| x.to_bits()).collect();
        self.words(&words)
    }

    fn vector(&mut self, name: &str) -> Result<Address, DeviceError> {
        self.floats((self.tensor)(name).unwrap_or_default())
    }

    fn inverse(&mut self, name: &str) -> Result<Address, DeviceError> {
        let scales = (self.tensor)(name).unwrap_or_default();
        let inverse: Vec<f32> = scales.iter().map(|scale| 1.0 / scale).collect();
        self.floats(&inverse)
    }

    /// Gains, then biases.
    fn norm(&mut self, name: &str) -> Result<Address, DeviceError> {
        let part = |part: &str| (self.tensor)(&format!("{name}.{part}")).unwrap_or_default();
        let both = [part("weight"), part("bias")].concat();
        self.floats(&both)
    }

    /// [inputs, ..], packed.
    fn matrix(&mut self, name: &str, inputs: usize) -> Result<Address, DeviceError> {
        let Some(weight) = (self.tensor)(name) else {
            return Ok(0);
        };
        let columns = weight.len() / inputs;
        self.words(&pack(inputs, columns, |input, column| {
            weight[input * columns + column]
        }))
    }
}

/// A matrix as `mma` takes it (`kernels/mma.cuh`), each number as the sum of two bfloat16: [column
/// tile of 8][step of 16 inputs][lane][b0 and b1 of the high halves, b0 and b1 of the low]. Inputs
/// are filled up with zeros.
fn pack(inputs: usize, columns: usize, at: impl Fn(usize, usize) -> f32) -> Vec<u32> {
    let mut packed = Vec::with_capacity(inputs.next_multiple_of(16) * columns);
    for column_tile in 0..columns / 8 {
        for step in 0..inputs.div_ceil(16) {
            for lane in 0..32 {
                let column = 8 * column_tile + lane / 4;
                let halves = [0, 1, 8, 9].map(|i| {
                    let input = 16 * step + 2 * (lane % 4) + i;
                    let x = if input < inputs {
                        at(input, column)
                    } else {
                        0.0
                    };
                    let high = bf16::from_f32(x);
                    (high, bf16::from_f32(x - high.to_f32()))
                });
                let pair = |low: bf16, high: bf16| {
                    u32::from(low.to_bits()) | u32::from(high.to_bits()) << 16
                };
                let [a, b, c, d] = halves;
                packed.extend([
                    pair(a.0, b.0),
                    pair(c.0, d.0),
                    pair(a.1, b.1),
                    pair(c.1, d.1),
                ]);
            }
        }
    }
    packed
}

/// The candidates of one prompt, on the device.
#[derive(Clone, Copy, Debug)]
pub struct Group {
    pub candidates: usize,
    /// The residual stream after the ranker's layer: [.., row_stride] float32.
    pub residual: Address,
    pub row_stride: usize,
    /// The row of each candidate's last token in `residual`: [candidates] u32.
    pub rows: Address,
    /// The prompt's feature: [hidden_size] float32. The linear kind does not read it.
    pub prompt: Address,
    /// [candidates, extra inputs] float32, in the ranker's order. Not read where it has none.
    pub extra: Address,
    /// Written: [candidates] float32.
    pub scores: Address,
    /// Written: one u32, the first candidate of the highest score, [`NONE`] where a score is not
    /// finite.
    pub best: Address,
}

/// Launches that rank groups, each by its ranker. Intermediate results are kept from one to the next,
/// so that a captured launch may be replayed until [`GatherRank::prepare`] is called again.
pub struct GatherRank {
    device: Arc<dyn Device>,
    launch: Launch,
    /// What the jobs point to.
    rankers: Vec<Arc<RankerWeights>>,
    jobs: Buffer<Job>,
    workspace: Buffer<f32>,
    /// Zero between launches.
    counters: Buffer<u32>,
}

impl GatherRank {
    /// Without groups: a launch does nothing.
    pub fn new(device: &Arc<dyn Device>) -> Result<GatherRank, DeviceError> {
        Ok(GatherRank {
            device: Arc::clone(device),
            launch: Launch::blocks(0, THREADS),
            rankers: Vec::new(),
            jobs: Buffer::new(device, 0, "ranking")?,
            workspace: Buffer::new(device, 0, "ranking")?,
            counters: Buffer::new(device, 0, "ranking")?,
        })
    }

    /// Sets what the next launches rank.
    ///
    /// # Errors
    /// A group without candidates or with more than [`MAX_CANDIDATES`], and those of the device;
    /// launches do nothing until it succeeds.
    pub fn prepare(
        &mut self,
        groups: &[(Arc<RankerWeights>, Group)],
    ) -> Result<(), GatherRankError> {
        self.launch = Launch::blocks(0, THREADS);
        for (group, (_, Group { candidates, .. })) in groups.iter().enumerate() {
            match *candidates {
                0 => return Err(GatherRankError::NoCandidates { group }),
                1..=MAX_CANDIDATES => {}
                candidates => {
                    return Err(GatherRankError::TooManyCandidates { group, candidates });
                }
            }
        }
        let mut jobs: Vec<Job> = groups
            .iter()
            .map(|(ranker, group)| Job {
                residual: group.residual,
                rows: group.rows,
                prompt: group.prompt,
                extra: group.extra,
                scores: group.scores,
                best: group.best,
                candidates: group.candidates as u32,
                row_stride: group.row_stride as u32,
                ..ranker.job
            })
            .collect();
        let total = |of: fn(&Job) -> usize| jobs.iter().map(of).sum::<usize>();
        let (workspace, counters) = (total(Job::workspace_len), total(Job::counters_len));
        if self.workspace.len() < workspace {
            self.workspace = Buffer::new(&self.device, workspace, "ranking")?;
        }
        if self.counters.len() < counters {
            let mut zeros = Buffer::new(&self.device, counters, "ranking")?;
            zeros.zero()?;
            self.counters = zeros;
        }
        if self.jobs.len() < jobs.len() {
            self.jobs = Buffer::new(&self.device, jobs.len(), "ranking")?;
        }
        let (mut workspace, mut counters) = (0, 0);
        for job in &mut jobs {
            job.workspace = self.workspace.at(workspace);
            job.counters = self.counters.at(counters);
            workspace += job.workspace_len();
            counters += job.counters_len();
        }
        self.jobs.write(0, &jobs)?;
        self.rankers = groups
            .iter()
            .map(|(ranker, _)| Arc::clone(ranker))
            .collect();
        let most = |of: fn(&Job) -> usize| jobs.iter().map(of).max().unwrap_or(0);
        self.launch = Launch {
            grid: [
                most(|job| job.tiles() * job.splits()) as u32,
                jobs.len() as u32,
                1,
            ],
            block: THREADS,
            shared_bytes: most(Job::shared_bytes) as u32,
        };
        Ok(())
    }

    /// Writes each group's scores and its best candidate.
    pub fn launch(&self) -> Result<(), DeviceError> {
        if self.launch.grid[0] == 0 {
            return Ok(());
        }
        // SAFETY: as the kernel's head says.
        unsafe {
            self.device
                .launch("gather_rank", self.launch, &mut arguments![&self.jobs])
        }
    }
}

impl fmt::Debug for GatherRank {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "GatherRank({} groups)", self.launch.grid[1])
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::device;
    use super::*;
    use crate::ranker::reference::{
        self, bits, config, exact_scores, permuted, random_group, random_ranker,
    };
    use crate::ranker::{ExtraInput, RankerConfig};

    const KINDS: [RankerKind; 3] = [
        RankerKind::Pointwise,
        RankerKind::Linear,
        RankerKind::Listwise,
    ];

    /// A group on the device, its candidates scattered among rows that are not to be read.
    struct OnDevice {
        _inputs: (Buffer<f32>, Buffer<u32>, Buffer<f32>, Buffer<f32>),
        scores: Buffer<f32>,
        best: Buffer<u32>,
        group: Group,
    }

    impl OnDevice {
        fn new(device: &Arc<dyn Device>, ranker: &Ranker, group: &reference::Group) -> OnDevice {
            let (prompt, candidates, extra) = group;
            let (hidden_size, n) = (prompt.len(), extra.len());
            let (row_stride, all_rows) = (hidden_size + 3, 2 * n + 5);
            // Steps of two round an odd number of rows: none twice.
            let rows: Vec<u32> = (0..n).map(|i| ((7 + 2 * i) % all_rows) as u32).collect();
            let mut residual = vec![f32::NAN; all_rows * row_stride];
            for (&row, candidate) in rows.iter().zip(candidates.chunks(hidden_size)) {
                residual[row as usize * row_stride..][..hidden_size].copy_from_slice(candidate);
            }
            let read = &ranker.config().extra_inputs;
            let extra: Vec<f32> = extra
                .iter()
                .flat_map(|extra| read.iter().map(|&input| extra.get(input)))
                .collect();
            let floats = |values: &[f32]| Buffer::from_slice(device, values, "in").unwrap();
            let inputs = (
                floats(&residual),
                Buffer::from_slice(device, &rows, "in").unwrap(),
                floats(prompt),
                floats(&extra),
            );
            let scores = Buffer::new(device, n, "out").unwrap();
            let best = Buffer::new(device, 1, "out").unwrap();
            let group = Group {
                candidates: n,
                residual: inputs.0.address(),
                row_stride,
                rows: inputs.1.address(),
                prompt: inputs.2.address(),
                extra: inputs.3.address(),
                scores: scores.address(),
                best: best.address(),
            };
            OnDevice {
                _inputs: inputs,
                scores,
                best,
                group,
            }
        }

        fn scores(&self) -> Vec<f32> {
            self.scores.read(0, self.group.candidates).unwrap()
        }

        fn best(&self) -> u32 {
            self.best.read(0, 1).unwrap()[0]
        }

        fn check_untouched(&self, run: impl FnOnce()) {
            let before = (bits(&self.scores()), self.best());
            run();
            assert_eq!((bits(&self.scores()), self.best()), before);
        }
    }

    fn weights(device: &Arc<dyn Device>, ranker: &Ranker) -> Arc<RankerWeights> {
        Arc::new(RankerWeights::new(device, ranker).unwrap())
    }

    /// Scores and the best of each group, in one launch.
    fn rank(cases: &[(&Ranker, &reference::Group)]) -> Vec<(Vec<f32>, u32)> {
        let device = device();
        let on_device: Vec<OnDevice> = cases
            .iter()
            .map(|(ranker, group)| OnDevice::new(&device, ranker, group))
            .collect();
        let groups: Vec<_> = cases
            .iter()
            .zip(&on_device)
            .map(|((ranker, _), on_device)| (weights(&device, ranker), on_device.group))
            .collect();
        let mut gather_rank = GatherRank::new(&device).unwrap();
        gather_rank.prepare(&groups).unwrap();
        gather_rank.launch().unwrap();
        on_device
            .iter()
            .map(|case| (case.scores(), case.best()))
            .collect()
    }

    fn first_highest(scores: &[f32]) -> u32 {
        let highest = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        scores.iter().position(|&score| score == highest).unwrap() as u32
    }

    /// Against the formulas in float64 and against the CPU.
    #[track_caller]
    fn assert_near(ranker: &Ranker, (prompt, candidates, extra): &reference::Group, got: &[f32]) {
        let exact = exact_scores(ranker, prompt, candidates, extra);
        let on_cpu = ranker.score(prompt, candidates, extra).unwrap();
        assert_eq!(got.len(), exact.len());
        for (candidate, (&got, (exact, magnitude))) in got.iter().zip(exact).enumerate() {
            // A sum of two bfloat16 is off by 4e-6 of a number at most, float32 by 6e-8. Most errors
            // of a product's terms cancel; 7e-6 was the most seen. One bfloat16 alone is off by 4e-3.
            let bound = 2e-5 * magnitude;
            for (expected, of) in [(exact, "float64"), (f64::from(on_cpu[candidate]), "CPU")] {
                let error = (f64::from(got) - expected).abs();
                assert!(
                    error <= bound,
                    "candidate {candidate}: {got}, {of} {expected}, error {:e} of {magnitude}",
                    error / magnitude
                );
            }
        }
    }

    fn check(config: RankerConfig, n: usize) {
        let group = random_group(config.hidden_size, n, 3);
        let ranker = random_ranker(config, n as u64);
        let (scores, best) = rank(&[(&ranker, &group)]).remove(0);
        assert_near(&ranker, &group, &scores);
        assert_eq!(best, first_highest(&scores));
    }

    #[test]
    fn agrees_with_float64_and_the_cpu() {
        for kind in KINDS {
            for (hidden_size, n) in [(576, 32), (1, 1), (37, 15), (257, 16), (1000, 50)] {
                check(config(kind, hidden_size), n);
            }
        }
    }

    #[test]
    fn every_option_agrees() {
        use Normalization::{None, Rms, Standardized};
        for (i, (normalization, width, heads, feed_forward_width)) in [
            (None, 16, 1, 16),
            (Rms, 32, 8, 48),
            (Standardized, 80, 5, 96),
            (Rms, 48, 1, 128),
            (None, 80, 80, 16),
        ]
        .into_iter()
        .enumerate()
        {
            let extra_inputs = [
                vec![],
                vec![ExtraInput::Length, ExtraInput::MeanLogprob],
                vec![ExtraInput::Length],
            ];
            for kind in KINDS {
                let has_block = kind != RankerKind::Linear;
                let relevance = [Relevance::Cosine, Relevance::Dot][i % 2];
                let options = RankerConfig {
                    normalization,
                    projection_width: has_block.then_some(width),
                    heads: (kind == RankerKind::Listwise).then_some(heads),
                    feed_forward_width: has_block.then_some(feed_forward_width),
                    relevance: has_block.then_some(relevance),
                    extra_inputs: extra_inputs[i % 3].clone(),
                    ..config(kind, 260 + i)
                };
                check(options, 10 + 3 * i);
            }
        }
    }

    #[test]
    fn large_groups_agree() {
        for (kind, n, width) in [
            (RankerKind::Listwise, 300, 64),
            (RankerKind::Listwise, MAX_CANDIDATES, 16),
            (RankerKind::Pointwise, 500, 64),
            (RankerKind::Linear, MAX_CANDIDATES, 0),
        ] {
            let options = config(kind, 24);
            let options = RankerConfig {
                projection_width: options.projection_width.map(|_| width),
                heads: options.heads.map(|_| width / 16),
                ..options
            };
            check(options, n);
        }
    }

    #[test]
    fn permuting_candidates_permutes_scores_bit_for_bit() {
        let n = 45;
        for kind in KINDS {
            for repeated in [false, true] {
                let ranker = random_ranker(config(kind, 40), 5);
                let mut group = random_group(40, n, 5);
                if repeated {
                    // Candidates that are the same text tie in every comparison.
                    group = permuted(&group, &(0..n).map(|i| i / 3).collect::<Vec<_>>());
                }
                let order: Vec<usize> = (0..n).map(|i| (11 + 7 * i) % n).collect();
                let moved = permuted(&group, &order);
                let got = rank(&[(&ranker, &group), (&ranker, &moved)]);
                let expected: Vec<f32> = order.iter().map(|&i| got[0].0[i]).collect();
                assert_eq!(bits(&got[1].0), bits(&expected), "{kind:?}");
                for (scores, best) in &got {
                    assert_eq!(*best, first_highest(scores));
                }
            }
        }
    }

    #[test]
    fn groups_of_one_launch_do_not_touch_each_other() {
        let cases: Vec<(Ranker, reference::Group)> = [
            (RankerKind::Listwise, 300, 20),
            (RankerKind::Pointwise, 40, 70),
            (RankerKind::Listwise, 40, 1),
            (RankerKind::Linear, 600, 5),
        ]
        .into_iter()
        .enumerate()
        .map(|(i, (kind, hidden_size, n))| {
            let ranker = random_ranker(config(kind, hidden_size), i as u64);
            (ranker, random_group(hidden_size, n, i as u64))
        })
        .collect();
        let cases: Vec<_> = cases
            .iter()
            .map(|(ranker, group)| (ranker, group))
            .collect();
        for (together, &(ranker, group)) in rank(&cases).iter().zip(&cases) {
            let (scores, best) = rank(&[(ranker, group)]).remove(0);
            assert_eq!(bits(&together.0), bits(&scores));
            assert_eq!(together.1, best);
            assert_near(ranker, group, &scores);
        }
    }

    #[test]
    fn launches_repeat_and_are_prepared_anew() {
        let device = device();
        let mut gather_rank = GatherRank::new(&device).unwrap();
        gather_rank.launch().unwrap();
        for (kind, n) in [
            (RankerKind::Listwise, 40),
            (RankerKind::Pointwise, 20),
            (RankerKind::Linear, 60),
        ] {
            let ranker = random_ranker(config(kind, 270), 1);
            let group = random_group(270, n, 1);
            let mut on_device = OnDevice::new(&device, &ranker, &group);
            let groups = [(weights(&device, &ranker), on_device.group)];
            gather_rank.prepare(&groups).unwrap();
            gather_rank.launch().unwrap();
            let first = (on_device.scores(), on_device.best());
            assert_near(&ranker, &group, &first.0);
            on_device.scores.zero().unwrap();
            on_device.best.zero().unwrap();
            gather_rank.launch().unwrap();
            assert_eq!(bits(&on_device.scores()), bits(&first.0));
            assert_eq!(on_device.best(), first.1);
            let counters = &gather_rank.counters;
            let counters = counters.read(0, counters.len()).unwrap();
            assert!(counters.iter().all(|&count| count == 0));
        }
    }

    #[test]
    fn sizes_that_do_not_fit_are_refused() {
        let device = device();
        let ranker = random_ranker(config(RankerKind::Linear, 8), 1);
        let group = random_group(8, 3, 1);
        let on_device = OnDevice::new(&device, &ranker, &group);
        let ranker = weights(&device, &ranker);
        let mut gather_rank = GatherRank::new(&device).unwrap();
        let mut prepare = |candidates: usize| {
            let wrong = Group {
                candidates,
                ..on_device.group
            };
            let groups = [
                (Arc::clone(&ranker), on_device.group),
                (Arc::clone(&ranker), wrong),
            ];
            gather_rank.prepare(&groups)
        };
        prepare(3).unwrap();
        assert_eq!(prepare(0), Err(GatherRankError::NoCandidates { group: 1 }));
        assert_eq!(
            prepare(MAX_CANDIDATES + 1).unwrap_err().to_string(),
            "group 1 has 1025 candidates; the CUDA backend ranks at most 1024 at a time"
        );
        on_device.check_untouched(|| gather_rank.launch().unwrap());
    }

    #[test]
    fn scores_that_are_not_finite_choose_none() {
        for kind in KINDS {
            for normalization in [Normalization::Rms, Normalization::Standardized] {
                let options = RankerConfig {
                    normalization,
                    ..config(kind, 300)
                };
                let ranker = random_ranker(options, 1);
                // The last is finite, but its square is not.
                for value in [f32::NAN, f32::INFINITY, 3e38] {
                    let mut group = random_group(300, 20, 1);
                    group.1[17 * 300 + 299] = value;
                    let (scores, best) = rank(&[(&ranker, &group)]).remove(0);
                    if value != 3e38 || normalization == Normalization::Rms {
                        assert!(!scores[17].is_finite(), "{kind:?} {value}");
                        assert_eq!(best, NONE, "{kind:?} {value}");
                    }
                }
            }
        }
    }

    #[test]
    fn pack_follows_the_layout_of_mma() {
        let packed = pack(17, 16, |input, column| {
            (100 * input + column) as f32 + 0.001
        });
        assert_eq!(packed.len(), 2 * 2 * 32 * 4);
        for (i, &pair) in packed.iter().enumerate() {
            let (word, lane, step, column_tile) = (i % 4, i / 4 % 32, i / 128 % 2, i / 256);
            let column = 8 * column_tile + lane / 4;
            for half in 0..2 {
                let input = 16 * step + 2 * (lane % 4) + 8 * (word % 2) + half;
                let exact = match input < 17 {
                    true => (100 * input + column) as f32 + 0.001,
                    false => 0.0,
                };
                let high = bf16::from_f32(exact);
                let expected = match word < 2 {
                    true => high,
                    false => bf16::from_f32(exact - high.to_f32()),
                };
                assert_eq!((pair >> (16 * half)) as u16, expected.to_bits());
            }
        }
    }
}
