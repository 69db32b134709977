//! The tables of `docs/KERNELS.md`, computed from shapes: what each kernel reads, writes and multiplies
//! in a step, and the time that a GPU's memory and tensor cores allow for it. The page must hold what
//! comes out here; `PODIUM_WRITE_DOCS=1` writes it there.

use std::fmt::Write as _;
use std::path::Path;

use podium::backend::cuda::attention_plan::{Path as AttentionPath, path};

/// Llama-3.1-8B.
const LAYERS: f64 = 32.0;
const HIDDEN: f64 = 4096.0;
const INTERMEDIATE: f64 = 14336.0;
const HEADS: f64 = 32.0;
const KV_HEADS: f64 = 8.0;
const HEAD_DIM: f64 = 128.0;
const VOCABULARY: f64 = 128_256.0;

const PROMPT: usize = 512;
/// Own tokens of each candidate: the middle of an answer of 256.
const OWN: f64 = 128.0;
const CANDIDATES: [usize; 4] = [1, 8, 32, 100];

/// Bytes a second of a copy, and floating-point operations a second of tensor cores.
#[derive(Clone, Copy)]
struct Gpu {
    bandwidth: f64,
    tensor: f64,
}
const GPUS: [Gpu; 2] = [
    Gpu {
        bandwidth: 3.0e12,
        tensor: 790e12,
    },
    Gpu {
        bandwidth: 4.3e12,
        tensor: 790e12,
    },
];

/// A kernel's launches of one kind in a step.
struct Cost {
    name: &'static str,
    launches: f64,
    /// Of all launches together.
    bytes: f64,
    operations: f64,
}

impl Cost {
    fn seconds(&self, gpu: &Gpu) -> f64 {
        (self.bytes / gpu.bandwidth).max(self.operations / gpu.tensor)
    }
}

/// How weights are held: bytes of each, scales included.
#[derive(Clone, Copy)]
struct Form {
    name: &'static str,
    weight_bytes: f64,
}
const BF16: Form = Form {
    name: "bfloat16",
    weight_bytes: 2.0,
};
const FORMS: [Form; 3] = [
    BF16,
    // A float16 for each 32.
    Form {
        name: "int8",
        weight_bytes: 1.0 + 2.0 / 32.0,
    },
    // A float32 for each output, of 4096 inputs or more.
    Form {
        name: "fp8",
        weight_bytes: 1.0 + 4.0 / HIDDEN,
    },
];

fn product(
    form: Form,
    name: &'static str,
    launches: f64,
    rows: f64,
    inputs: f64,
    outputs: f64,
    results: f64,
) -> Cost {
    // Inputs in bfloat16, results in float32.
    let bytes = form.weight_bytes * outputs * inputs + 2.0 * rows * inputs + 4.0 * rows * results;
    Cost {
        name,
        launches,
        bytes: launches * bytes,
        operations: launches * 2.0 * rows * inputs * outputs,
    }
}

fn moving(name: &'static str, launches: f64, bytes: f64) -> Cost {
    Cost {
        name,
        launches,
        bytes: launches * bytes,
        operations: 0.0,
    }
}

const QKV: f64 = (HEADS + 2.0 * KV_HEADS) * HEAD_DIM;
/// Keys and values of a token in a layer.
const TOKEN_BYTES: f64 = KV_HEADS * 2.0 * HEAD_DIM * 2.0;

/// What is the same for every row, whichever way its attention goes.
fn around_attention(
    form: Form,
    rows: f64,
    matmul: [&'static str; 4],
    attention: Vec<Cost>,
) -> Vec<Cost> {
    let mut costs = vec![
        moving("embed", 1.0, rows * HIDDEN * (form.weight_bytes + 4.0)),
        moving("norm_rows", 2.0 * LAYERS + 1.0, rows * HIDDEN * 6.0),
        product(form, matmul[0], LAYERS, rows, HIDDEN, QKV, QKV),
        // Queries are written back, keys and values go to the cache.
        moving(
            "rope_append",
            LAYERS,
            rows * (4.0 * QKV + 4.0 * HEADS * HEAD_DIM + TOKEN_BYTES),
        ),
    ];
    costs.extend(attention);
    costs.extend([
        moving(
            "round_rows",
            2.0 * LAYERS,
            rows * (HIDDEN + INTERMEDIATE) / 2.0 * 6.0,
        ),
        product(form, matmul[1], LAYERS, rows, HIDDEN, HIDDEN, HIDDEN),
        product(
            form,
            matmul[2],
            LAYERS,
            rows,
            HIDDEN,
            2.0 * INTERMEDIATE,
            INTERMEDIATE,
        ),
        product(form, matmul[3], LAYERS, rows, INTERMEDIATE, HIDDEN, HIDDEN),
        moving("copy of the ranker's layer", 1.0, rows * HIDDEN * 8.0),
    ]);
    costs
}

/// A step of n candidates behind a shared prompt.
fn step(n: usize, form: Form) -> Vec<Cost> {
    let n = n as f64;
    let runs = match path(PROMPT) {
        AttentionPath::Whole => panic!("a prompt of {PROMPT} tokens is shared"),
        AttentionPath::Split { run } => PROMPT.div_ceil(run) as f64,
    };
    let part = HEADS * (HEAD_DIM + 2.0) * 4.0;
    let queries = HEADS * HEAD_DIM * 4.0;
    let of_keys = |tokens: f64| LAYERS * n * 4.0 * HEADS * HEAD_DIM * tokens;
    let prompt = PROMPT as f64;
    let attention = vec![
        Cost {
            operations: of_keys(prompt),
            ..moving(
                "attention_prefix",
                LAYERS,
                prompt * TOKEN_BYTES + n * queries + n * runs * part,
            )
        },
        Cost {
            operations: of_keys(OWN),
            ..moving(
                "attention_suffix",
                LAYERS,
                n * (OWN * TOKEN_BYTES + queries + part),
            )
        },
        moving(
            "attention_merge",
            LAYERS,
            n * ((runs + 1.0) * part + queries),
        ),
    ];
    let names = [
        "matmul_skinny: q, k, v",
        "matmul_skinny: output",
        "matmul_skinny: gate, up",
        "matmul_skinny: down",
    ];
    let mut costs = around_attention(form, n, names, attention);
    costs.extend([
        product(
            form,
            "matmul_skinny: LM head",
            1.0,
            n,
            HIDDEN,
            VOCABULARY,
            VOCABULARY,
        ),
        // Read twice without filters; both passes counted, though the second finds the cache.
        moving("sample", 1.0, n * VOCABULARY * 4.0 * 2.0),
    ]);
    costs
}

/// Ranks n candidates, once an answer: their states, and the projection's weights (64 columns, each two
/// bfloat16) for every sixteen of them.
fn gather_rank(n: f64) -> Cost {
    let (rows, columns) = (n + 1.0, 64.0);
    let tiles = (rows / 16.0).ceil();
    Cost {
        operations: 3.0 * 2.0 * rows * HIDDEN * columns,
        ..moving(
            "gather_rank",
            1.0,
            rows * HIDDEN * 4.0 + tiles * HIDDEN * columns * 4.0,
        )
    }
}

/// A prompt, prefilled at once.
fn prefill(form: Form) -> Vec<Cost> {
    let rows = PROMPT as f64;
    let attention = vec![Cost {
        // Half of all pairs, for a token sees those before it.
        operations: LAYERS * 4.0 * HEADS * HEAD_DIM * rows * (rows + 1.0) / 2.0,
        ..moving(
            "attention_prefill",
            LAYERS,
            rows * TOKEN_BYTES + rows * HEADS * HEAD_DIM * 8.0,
        )
    }];
    let names = [
        "matmul_tiled: q, k, v",
        "matmul_tiled: output",
        "matmul_tiled: gate, up",
        "matmul_tiled: down",
    ];
    let mut costs = around_attention(form, rows, names, attention);
    costs.push(product(
        form,
        "matmul_skinny: LM head",
        1.0,
        1.0,
        HIDDEN,
        VOCABULARY,
        VOCABULARY,
    ));
    costs
}

fn microseconds(seconds: f64) -> String {
    let micros = seconds * 1e6;
    match micros {
        m if m < 10.0 => format!("{m:.1}"),
        m => format!("{m:.0}"),
    }
}

fn amount(number: f64) -> String {
    match number {
        n if n < 10.0 => format!("{n:.1}"),
        n => format!("{n:.0}"),
    }
}

/// What is moved and multiplied.
fn work(bytes: f64, operations: f64) -> String {
    match operations {
        0.0 => format!("{} MB", amount(bytes / 1e6)),
        _ => format!(
            "{} MB, {} GFLOP",
            amount(bytes / 1e6),
            amount(operations / 1e9)
        ),
    }
}

fn all(costs: &[Cost], of: impl Fn(&Cost) -> f64) -> f64 {
    costs.iter().map(of).sum()
}

/// Microseconds on each of [`GPUS`].
fn times(seconds: impl Fn(&Gpu) -> f64) -> String {
    GPUS.map(|gpu| microseconds(seconds(&gpu))).join(", ")
}

/// A table: a row a kernel, then the sum of them.
fn table(head: &str, columns: &[Vec<Cost>], cell: impl Fn(&[Cost]) -> String) -> String {
    let mut text = format!("{head}\n|{}\n", " --- |".repeat(2 + columns.len()));
    for row in 0..columns[0].len() {
        let first = &columns[0][row];
        let _ = write!(text, "| {} | {} |", first.name, first.launches);
        for costs in columns {
            let _ = write!(text, " {} |", cell(&costs[row..=row]));
        }
        text.push('\n');
    }
    let _ = write!(
        text,
        "| **all** | {} |",
        all(&columns[0], |cost| cost.launches)
    );
    for costs in columns {
        let _ = write!(text, " **{}** |", cell(costs));
    }
    text.push('\n');
    text
}

fn work_of(costs: &[Cost]) -> String {
    work(all(costs, |c| c.bytes), all(costs, |c| c.operations))
}

fn times_of(costs: &[Cost]) -> String {
    times(|gpu| all(costs, |cost| cost.seconds(gpu)))
}

fn tables() -> String {
    let steps = CANDIDATES.map(|n| step(n, BF16));
    let columns = CANDIDATES.map(|n| format!(" N = {n} |")).concat();
    let mut text = table(
        &format!("| a step moves and multiplies | launches |{columns}"),
        &steps,
        work_of,
    );
    text.push('\n');
    text += &table(
        &format!("| µs, H100 and H200 | launches |{columns}"),
        &steps,
        times_of,
    );
    text.push_str("| tokens a second, at most | |");
    for (costs, n) in steps.iter().zip(CANDIDATES) {
        let rates = GPUS.map(|gpu| n as f64 / all(costs, |cost| cost.seconds(&gpu)));
        let _ = write!(text, " {:.0}, {:.0} |", rates[0], rates[1]);
    }
    text.push_str("\n| `gather_rank`, once an answer | 1 |");
    for n in CANDIDATES {
        let cost = gather_rank(n as f64);
        let _ = write!(text, " {} |", times_of(std::slice::from_ref(&cost)));
    }
    text.push_str("\n\n");
    let prefill = [prefill(BF16)];
    text += &table(
        &format!("| prefill of {PROMPT} tokens | launches | |"),
        &prefill,
        work_of,
    );
    text.push('\n');
    text += &table("| µs, H100 and H200 | launches | |", &prefill, times_of);
    text.push('\n');
    text += &by_form(&columns);
    text
}

/// Whole steps and the prefill, their weights in each form.
fn by_form(columns: &str) -> String {
    let mut text = format!(
        "| weights | |{columns} prefill of {PROMPT} |\n|{}\n",
        " --- |".repeat(3 + CANDIDATES.len())
    );
    for form in FORMS {
        let passes: Vec<(f64, Vec<Cost>)> = CANDIDATES
            .map(|n| (n as f64, step(n, form)))
            .into_iter()
            .chain([(PROMPT as f64, prefill(form))])
            .collect();
        let mut row = |name: &str, cell: &dyn Fn(f64, &[Cost]) -> String| {
            let _ = write!(text, "| {name} |");
            for (tokens, costs) in &passes {
                let _ = write!(text, " {} |", cell(*tokens, costs));
            }
            text.push('\n');
        };
        let name = form.name;
        row(&format!("{name} | moved"), &|_, costs| {
            work(all(costs, |c| c.bytes), 0.0)
        });
        row("| µs, H100 and H200", &|_, costs| times_of(costs));
        row("| tokens a second, at most", &|tokens, costs| {
            let rate = |gpu: &Gpu| tokens / all(costs, |cost| cost.seconds(gpu));
            GPUS.map(|gpu| format!("{:.0}", rate(&gpu))).join(", ")
        });
    }
    text
}

#[test]
fn the_page_holds_these_tables() {
    const BEGIN: &str = "<!-- tests/kernel_costs.rs: begin -->\n";
    const END: &str = "<!-- tests/kernel_costs.rs: end -->";
    let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/KERNELS.md");
    let text = std::fs::read_to_string(&page).unwrap();
    let (before, rest) = text.split_once(BEGIN).unwrap();
    let (written, after) = rest.split_once(END).unwrap();
    let computed = tables();
    if std::env::var_os("PODIUM_WRITE_DOCS").is_some() {
        std::fs::write(&page, format!("{before}{BEGIN}{computed}{END}{after}")).unwrap();
        return;
    }
    assert_eq!(written, computed, "run this test with PODIUM_WRITE_DOCS=1");
}

#[test]
fn a_step_reads_the_weights_once_and_more_candidates_cost_more() {
    let weights = 2.0
        * (LAYERS * (HIDDEN * QKV + HIDDEN * HIDDEN + 3.0 * HIDDEN * INTERMEDIATE)
            + VOCABULARY * HIDDEN);
    // Llama-3.1-8B has 8.03e9 parameters, of which the embedding's 0.53e9 are not read.
    assert!((weights / 2.0 - 7.5e9).abs() < 0.01e9);
    let bytes = CANDIDATES.map(|n| step(n, BF16).iter().map(|cost| cost.bytes).sum::<f64>());
    assert!(bytes[0] > weights && bytes[0] < 1.02 * weights && bytes.is_sorted());
}
