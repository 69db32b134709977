//! The forward pass, written once for every device.
//!
//! A model is its weights ([`Model`]) and what one batch leaves behind ([`State`]): the residual
//! stream, the states after the layers that were asked for, the logits. [`Model::forward`] runs the
//! layers; [`Model::logits`] is apart, for scoring with a ranker needs neither it nor the layers
//! above the ranker's.

use super::config::ModelConfig;
use super::error::ModelError;
use super::files::ModelFiles;
use super::tensor::{Dtype, Tensor, check_finite};
use crate::backend::sampling::{LogitsError, Sampled};
use crate::backend::{
    Attention, Backend, BackendError, Batch, Draws, KvShape, LogitRows, Norm, PageId, Part,
    PlannedRows,
};
use crate::model::config::Rope;

/// A decoder-only transformer of the Llama family, its weights on a device.
pub struct Model<B: Backend> {
    pub backend: B,
    pub config: ModelConfig,
    /// For people.
    pub name: String,
    /// Tells whether a ranker belongs to this model.
    pub fingerprint: String,
    embedding: B::Matrix,
    layers: Vec<Layer<B>>,
    final_norm: B::Vector,
    /// `None`: the embedding, transposed (`tie_word_embeddings`).
    lm_head: Option<B::Matrix>,
}

struct Layer<B: Backend> {
    input_norm: B::Vector,
    /// Query, key and value projections.
    qkv: B::Matrix,
    qkv_bias: Option<B::Vector>,
    query_norm: Option<B::Vector>,
    key_norm: Option<B::Vector>,
    output: B::Matrix,
    output_bias: Option<B::Vector>,
    /// Norm of the attention's output before it is added (Gemma family).
    post_attention_norm: Option<B::Vector>,
    feed_forward_norm: B::Vector,
    gate_up: B::Matrix,
    gate_up_bias: Option<B::Vector>,
    down: B::Matrix,
    down_bias: Option<B::Vector>,
    /// Norm of the feed-forward's output before it is added (Gemma family).
    post_feed_forward_norm: Option<B::Vector>,
}

/// The KV cache, and what the last batch computed.
pub struct State<B: Backend> {
    kv: B::KvCache,
    activations: Activations<B>,
    logits: B::Rows,
}

/// What the layers of a batch compute.
struct Activations<B: Backend> {
    /// The residual stream, `[rows, hidden_size]`.
    residual: B::Rows,
    qkv: B::Rows,
    attended: B::Rows,
    gated: B::Rows,
    /// The residual stream after each layer that was ever captured.
    captured: Vec<(usize, B::Rows)>,
}

/// Why a model could not be brought onto a device.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    #[error(transparent)]
    Model(#[from] ModelError),
    #[error(transparent)]
    Backend(#[from] BackendError),
}

/// How far a batch goes, and what is kept on the way.
#[derive(Clone, Copy, Debug)]
pub struct Depth<'a> {
    /// Layers to run, counted from the bottom.
    pub layers: usize,
    /// Keep the residual stream after these layers (1: after the first), for all rows.
    pub capture: &'a [usize],
}

impl<B: Backend> Model<B> {
    /// Loads weights onto a device. `progress` is told the bytes of each tensor as it is done.
    ///
    /// # Errors
    /// Where a tensor holds numbers that are not finite, or the device has no memory for it.
    pub fn load(
        backend: B,
        files: &ModelFiles,
        progress: &mut dyn FnMut(u64),
    ) -> Result<Model<B>, LoadError> {
        let (name, fingerprint) = (files.name().to_string(), files.fingerprint());
        let loader = Loader { files, progress };
        let config = files.config().clone();
        backend.check_memory(&needs(&backend, files, &config)?)?;
        Model::assemble(backend, config, name, fingerprint, loader)
    }

    /// A model of weights that come from anywhere.
    pub fn assemble(
        backend: B,
        config: ModelConfig,
        name: String,
        fingerprint: String,
        mut source: impl WeightSource<B>,
    ) -> Result<Model<B>, LoadError> {
        let embedding = ["model.embed_tokens.weight".to_string()];
        let embedding = source.matrix(&backend, &embedding)?;
        let layers = (0..config.layers)
            .map(|layer| Layer::collect(&backend, layer, &mut source))
            .collect::<Result<_, _>>()?;
        let final_norm = source.norm(&backend, "model.norm.weight")?;
        let lm_head = match config.tie_word_embeddings {
            true => None,
            false => Some(source.matrix(&backend, &["lm_head.weight".to_string()])?),
        };
        Ok(Model {
            backend,
            config,
            name,
            fingerprint,
            embedding,
            layers,
            final_norm,
            lm_head,
        })
    }

    /// Keys and values of a token.
    pub fn kv_shape(&self) -> KvShape {
        KvShape {
            layers: self.config.layers,
            heads: self.config.heads,
            kv_heads: self.config.kv_heads,
            head_dim: self.config.head_dim,
        }
    }

    /// An empty KV cache and room for activations.
    pub fn state(&self) -> Result<State<B>, BackendError> {
        let ModelConfig {
            hidden_size,
            intermediate_size,
            heads,
            kv_heads,
            head_dim,
            ..
        } = self.config;
        let rows = |width| self.backend.rows(0, width);
        Ok(State {
            kv: self.backend.kv_cache(self.kv_shape())?,
            activations: Activations {
                residual: rows(hidden_size)?,
                qkv: rows((heads + 2 * kv_heads) * head_dim)?,
                attended: rows(heads * head_dim)?,
                gated: rows(intermediate_size)?,
                captured: Vec::new(),
            },
            logits: rows(self.config.vocab_size)?,
        })
    }

    /// Runs a batch through the layers. Keys and values are appended to the cache; the residual
    /// stream and the captured states stay in `state` until the next batch.
    ///
    /// Tokens must be below `vocab_size`, positions below `max_position_embeddings`, pages as
    /// [`Batch`] says: the engine's duty, which knows whom to tell.
    pub fn forward(
        &self,
        state: &mut State<B>,
        batch: &Batch,
        depth: Depth,
    ) -> Result<(), BackendError> {
        let plan = self.plan(state, batch, None, depth)?;
        self.layers(&plan, &mut state.kv, &mut state.activations, depth);
        Ok(())
    }

    /// Runs a batch through all layers and draws tokens from it.
    pub fn forward_and_draw(
        &self,
        state: &mut State<B>,
        batch: &Batch,
        depth: Depth,
        draws: &Draws,
    ) -> Result<Vec<Result<Sampled, LogitsError>>, BackendError> {
        let plan = self.plan(state, batch, Some(draws), depth)?;
        let State {
            kv,
            activations,
            logits,
        } = state;
        let what: Vec<usize> = [depth.layers]
            .iter()
            .chain(depth.capture)
            .copied()
            .collect();
        let mut compute = |part: Part<B>| match part {
            Part::Layers => self.layers(&plan, kv, activations, depth),
            Part::Logits(rows, out) => self.lm_head(&activations.residual, rows, out),
        };
        self.backend
            .draw(&plan, &what, draws.draws, logits, &mut compute)
    }

    /// Readies a batch: where its rows stand, and room for what is computed of them.
    fn plan(
        &self,
        state: &mut State<B>,
        batch: &Batch,
        draws: Option<&Draws>,
        depth: Depth,
    ) -> Result<B::Plan, BackendError> {
        let (backend, config) = (&self.backend, &self.config);
        let ropes: Vec<&Rope> = config.attention[..depth.layers]
            .iter()
            .map(|a| &a.rope)
            .collect();
        let plan = backend.plan(batch, draws, &ropes, &mut state.kv)?;
        let PlannedRows { rows, logits } = backend.planned_rows(&plan);
        let Activations {
            residual,
            qkv,
            attended,
            gated,
            captured,
        } = &mut state.activations;
        for activations in [residual, qkv, attended, gated] {
            backend.resize(activations, rows)?;
        }
        for &layer in depth.capture {
            if !captured.iter().any(|(known, _)| *known == layer) {
                captured.push((layer, backend.rows(0, config.hidden_size)?));
            }
        }
        let wanted = captured
            .iter_mut()
            .filter(|(l, _)| depth.capture.contains(l));
        for (_, rows_of_layer) in wanted {
            backend.resize(rows_of_layer, rows)?;
        }
        // Where nobody draws, the last batch's logits are not to lie beside these activations.
        backend.resize(&mut state.logits, logits)?;
        Ok(plan)
    }

    /// The operations of a planned batch's layers.
    fn layers(
        &self,
        plan: &B::Plan,
        kv: &mut B::KvCache,
        activations: &mut Activations<B>,
        depth: Depth,
    ) {
        let (backend, config) = (&self.backend, &self.config);
        let Activations {
            residual,
            qkv,
            attended,
            gated,
            captured,
        } = activations;
        let rows = backend.planned_rows(plan).rows;
        let norm = |weight| Norm {
            weight,
            epsilon: config.rms_norm_eps,
        };
        let every_row: Vec<(usize, usize)> = (0..rows).map(|row| (row, row)).collect();

        backend.embed(plan, &self.embedding, config.embedding_scale, residual);
        for (index, layer) in self.layers[..depth.layers].iter().enumerate() {
            let attention = Attention {
                layer: index,
                scale: config.attention_scale,
                softcap: config.attention_softcap,
                window: config.attention[index].window,
                rope: &config.attention[index].rope,
                query_norm: layer.query_norm.as_ref().map(norm),
                key_norm: layer.key_norm.as_ref().map(norm),
            };
            backend.norm_matmul(
                plan,
                residual,
                norm(&layer.input_norm),
                &layer.qkv,
                layer.qkv_bias.as_ref(),
                qkv,
            );
            backend.rope_append(plan, &attention, qkv, kv);
            backend.attention(plan, &attention, qkv, kv, attended);
            let post = layer.post_attention_norm.as_ref().map(norm);
            backend.matmul_add(
                plan,
                attended,
                &layer.output,
                layer.output_bias.as_ref(),
                post,
                residual,
            );

            let (bias, activation) = (layer.gate_up_bias.as_ref(), config.activation);
            let before = norm(&layer.feed_forward_norm);
            backend.norm_gated_matmul(
                plan,
                residual,
                before,
                &layer.gate_up,
                bias,
                activation,
                gated,
            );
            let post = layer.post_feed_forward_norm.as_ref().map(norm);
            backend.matmul_add(
                plan,
                gated,
                &layer.down,
                layer.down_bias.as_ref(),
                post,
                residual,
            );

            if depth.capture.contains(&(index + 1)) {
                for (_, rows) in captured.iter_mut().filter(|(layer, _)| *layer == index + 1) {
                    backend.copy_rows(residual, &every_row, rows);
                }
            }
        }
    }

    /// Logits `[rows.len(), vocab_size]` of rows of the last batch, which must have gone through all
    /// layers.
    pub fn logits<'s>(
        &self,
        state: &'s mut State<B>,
        rows: &[u32],
    ) -> Result<&'s B::Rows, BackendError> {
        self.backend.resize(&mut state.logits, rows.len())?;
        let (residual, logits) = (&state.activations.residual, &mut state.logits);
        self.lm_head(residual, LogitRows::These(rows), logits);
        Ok(logits)
    }

    fn lm_head(&self, residual: &B::Rows, rows: LogitRows<B::Plan>, logits: &mut B::Rows) {
        let norm = Norm {
            weight: &self.final_norm,
            epsilon: self.config.rms_norm_eps,
        };
        let weight = self.lm_head.as_ref().unwrap_or(&self.embedding);
        let softcap = self.config.logit_softcap;
        self.backend
            .lm_head(residual, rows, norm, weight, softcap, logits);
    }

    /// Bytes of the weights that a decode step reads.
    pub fn weight_bytes(&self) -> usize {
        let layers = self
            .layers
            .iter()
            .flat_map(|l| [&l.qkv, &l.output, &l.gate_up, &l.down]);
        let head = self.lm_head.as_ref().unwrap_or(&self.embedding);
        layers
            .chain([head])
            .map(|matrix| self.backend.matrix_bytes(matrix))
            .sum()
    }

    /// Bytes of all matrices, that of the embedding included where it is not the LM head's too.
    pub fn loaded_bytes(&self) -> usize {
        let embedding = match self.lm_head {
            Some(_) => self.backend.matrix_bytes(&self.embedding),
            None => 0,
        };
        self.weight_bytes() + embedding
    }

    /// Multiply-adds of a token's matmuls, the LM head included.
    pub fn multiply_adds(&self) -> usize {
        let c = &self.config;
        let attention = c.hidden_size * (2 * c.heads + 2 * c.kv_heads) * c.head_dim;
        c.layers * (attention + 3 * c.hidden_size * c.intermediate_size)
            + c.vocab_size * c.hidden_size
    }
}

impl<B: Backend> State<B> {
    /// Bytes that the pages of the KV cache take now.
    pub fn kv_bytes(&self, backend: &B) -> usize {
        backend.kv_bytes(&self.kv)
    }

    /// Makes page `to` a copy of page `from`, in every layer.
    pub fn copy_page(&mut self, backend: &B, from: PageId, to: PageId) -> Result<(), BackendError> {
        backend.copy_page(&mut self.kv, from, to)
    }

    /// The residual stream after a captured layer, `[rows, hidden_size]`.
    ///
    /// # Panics
    /// If no batch captured that layer.
    pub fn captured(&self, layer: usize) -> &B::Rows {
        let captured = &self.activations.captured;
        let found = captured.iter().find(|(captured, _)| *captured == layer);
        &found.expect("the layer was captured").1
    }
}

/// Rows of a large step: a chunk of a prompt beside candidates.
const STEP_ROWS: usize = 512;
/// Rows of logits of one.
const LOGITS_ROWS: usize = 128;
/// Recorded steps and small things, by a generous estimate.
const OTHER_BYTES: usize = 64 << 20;

/// What a model needs on its device besides keys and values.
fn needs<B: Backend>(
    backend: &B,
    files: &ModelFiles,
    config: &ModelConfig,
) -> Result<Vec<(String, usize)>, ModelError> {
    let mut weights = 0;
    for name in files.tensor_names() {
        let tensor = files.tensor(name)?;
        let dtype = match files.quantize && tensor.becomes_q8_0() {
            true => Dtype::Q8_0,
            false => tensor.dtype,
        };
        weights += backend.bytes_on_device(dtype, &tensor.shape);
    }
    let (heads, kv_heads) = (config.heads, config.kv_heads);
    let row = 3 * config.hidden_size
        + (2 * heads + 2 * kv_heads) * config.head_dim
        + 2 * config.intermediate_size;
    let activations = STEP_ROWS * row + LOGITS_ROWS * config.vocab_size;
    Ok(vec![
        ("weights".to_string(), weights),
        ("activations".to_string(), activations * size_of::<f32>()),
        ("recorded steps".to_string(), OTHER_BYTES),
    ])
}

/// Where weights come from: a model's files, or whoever makes them up. Names are those of Hugging
/// Face's files.
pub trait WeightSource<B: Backend> {
    /// Whether the model has this tensor.
    fn has(&self, name: &str) -> Result<bool, LoadError>;
    /// [`Backend::matrix`] of weights with the same inputs.
    fn matrix(&mut self, backend: &B, names: &[String]) -> Result<B::Matrix, LoadError>;
    /// [`Backend::gated_matrix`]
    fn gated_matrix(&mut self, backend: &B, gate: &str, up: &str) -> Result<B::Matrix, LoadError>;
    /// The weight of an RMSNorm.
    fn norm(&mut self, backend: &B, name: &str) -> Result<B::Vector, LoadError>;
    /// The biases of a matrix's parts, side by side; zeros where only some parts have one.
    fn bias(&mut self, backend: &B, names: &[String]) -> Result<Option<B::Vector>, LoadError>;
}

impl<B: Backend> Layer<B> {
    fn collect(
        backend: &B,
        layer: usize,
        source: &mut impl WeightSource<B>,
    ) -> Result<Layer<B>, LoadError> {
        let name = |part: &str| format!("model.layers.{layer}.{part}");
        let attention = |part: &str| name(&format!("self_attn.{part}"));
        let feed_forward = |part: &str| name(&format!("mlp.{part}"));
        let qkv = ["q_proj", "k_proj", "v_proj"];
        // The Gemma family has norms before and after each half; there `post_attention_layernorm` is
        // what its name says, elsewhere the norm before the feed-forward.
        let sandwich = source.has(&name("pre_feedforward_layernorm.weight"))?;
        let before_feed_forward = if sandwich {
            "pre_feedforward"
        } else {
            "post_attention"
        };
        let query_norm = attention("q_norm.weight");
        let key_norm = attention("k_norm.weight");
        let (has_query_norm, has_key_norm) = (source.has(&query_norm)?, source.has(&key_norm)?);
        let mut norm_if =
            |wanted: bool, name: &str| wanted.then(|| source.norm(backend, name)).transpose();
        Ok(Layer {
            query_norm: norm_if(has_query_norm, &query_norm)?,
            key_norm: norm_if(has_key_norm, &key_norm)?,
            post_attention_norm: norm_if(sandwich, &name("post_attention_layernorm.weight"))?,
            post_feed_forward_norm: norm_if(sandwich, &name("post_feedforward_layernorm.weight"))?,
            input_norm: source.norm(backend, &name("input_layernorm.weight"))?,
            qkv: source.matrix(
                backend,
                &qkv.map(|part| attention(&format!("{part}.weight"))),
            )?,
            qkv_bias: source.bias(backend, &qkv.map(|part| attention(&format!("{part}.bias"))))?,
            output: source.matrix(backend, &[attention("o_proj.weight")])?,
            output_bias: source.bias(backend, &[attention("o_proj.bias")])?,
            feed_forward_norm: source.norm(
                backend,
                &name(&format!("{before_feed_forward}_layernorm.weight")),
            )?,
            gate_up: source.gated_matrix(
                backend,
                &feed_forward("gate_proj.weight"),
                &feed_forward("up_proj.weight"),
            )?,
            gate_up_bias: source.bias(
                backend,
                &[feed_forward("gate_proj.bias"), feed_forward("up_proj.bias")],
            )?,
            down: source.matrix(backend, &[feed_forward("down_proj.weight")])?,
            down_bias: source.bias(backend, &[feed_forward("down_proj.bias")])?,
        })
    }
}

/// Fetches tensors from files by name, checks and uploads them.
struct Loader<'a> {
    files: &'a ModelFiles,
    progress: &'a mut dyn FnMut(u64),
}

impl<'a> Loader<'a> {
    fn checked(&self, name: &str) -> Result<Tensor<'a>, ModelError> {
        let tensor = self.files.tensor(name)?;
        check_finite(name, &tensor)?;
        Ok(tensor)
    }

    /// A weight matrix in the form that is wanted, and its bytes as stored.
    fn weight(&self, name: &str) -> Result<(Tensor<'a>, u64), ModelError> {
        let stored = self.checked(name)?;
        let bytes = stored.data.len() as u64;
        let quantized = self.files.quantize.then(|| stored.to_q8_0()).flatten();
        Ok((quantized.unwrap_or(stored), bytes))
    }
}

impl<B: Backend> WeightSource<B> for Loader<'_> {
    fn has(&self, name: &str) -> Result<bool, LoadError> {
        Ok(self.files.optional_tensor(name)?.is_some())
    }

    fn matrix(&mut self, backend: &B, names: &[String]) -> Result<B::Matrix, LoadError> {
        let mut parts = Vec::with_capacity(names.len());
        let mut bytes = 0;
        for name in names {
            let (part, stored) = self.weight(name)?;
            parts.push(part);
            bytes += stored;
        }
        let matrix = backend.matrix(&parts)?;
        for name in names {
            self.files.forget(name);
        }
        (self.progress)(bytes);
        Ok(matrix)
    }

    fn gated_matrix(&mut self, backend: &B, gate: &str, up: &str) -> Result<B::Matrix, LoadError> {
        let (gate_weight, gate_bytes) = self.weight(gate)?;
        let (up_weight, up_bytes) = self.weight(up)?;
        let matrix = backend.gated_matrix(&gate_weight, &up_weight)?;
        for name in [gate, up] {
            self.files.forget(name);
        }
        (self.progress)(gate_bytes + up_bytes);
        Ok(matrix)
    }

    fn norm(&mut self, backend: &B, name: &str) -> Result<B::Vector, LoadError> {
        let mut weight = self.checked(name)?.to_f32();
        if self.files.config().norm_weight_plus_one {
            weight.iter_mut().for_each(|w| *w += 1.0);
        }
        Ok(backend.vector(&weight)?)
    }

    fn bias(&mut self, backend: &B, names: &[String]) -> Result<Option<B::Vector>, LoadError> {
        let mut values = Vec::new();
        let mut any = false;
        for name in names {
            match self.files.optional_tensor(name)? {
                Some(_) => {
                    any = true;
                    values.extend(self.checked(name)?.to_f32());
                }
                None => {
                    let weight = self.files.tensor(&name.replace(".bias", ".weight"))?;
                    values.resize(values.len() + weight.rows(), 0.0);
                }
            }
        }
        if any {
            Ok(Some(backend.vector(&values)?))
        } else {
            Ok(None)
        }
    }
}
