//! What nvcc made of the kernels: registers, spills, and the instructions that the design is about. In
//! a build without nvcc there is nothing to look at, and the tests say so.

use super::images::{IMAGES, Image};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Of a kernel on an architecture, as ptxas reports it.
#[derive(Clone, Copy, Debug, Default)]
struct Resources {
    registers: usize,
    stack: usize,
    spilled: usize,
}

fn cubins() -> Vec<&'static Image> {
    let cubins: Vec<&Image> = IMAGES
        .iter()
        .filter(|image| image.kind == "cubin")
        .collect();
    if cubins.is_empty() {
        println!("skipped: this build has no GPU kernels (scripts/setup-cuda installs nvcc)");
    }
    cubins
}

/// The kernels of an image, from what ptxas said when it was compiled.
fn resources(image: &Image) -> BTreeMap<String, Resources> {
    let log = format!("{}.{}.{}.log", image.file, image.architecture, image.kind);
    let log = std::fs::read_to_string(Path::new(env!("OUT_DIR")).join(log)).unwrap();
    let mut kernels = BTreeMap::new();
    let mut kernel = String::new();
    let before = |line: &str, what: &str| -> Option<usize> {
        line[..line.find(what)?]
            .split_whitespace()
            .last()?
            .parse()
            .ok()
    };
    for line in log.lines() {
        if let Some((_, rest)) = line.split_once("Compiling entry function '") {
            kernel = rest.split('\'').next().unwrap().to_string();
            kernels.insert(kernel.clone(), Resources::default());
        }
        let Some(of_kernel) = kernels.get_mut(&kernel) else {
            continue;
        };
        if let Some(stack) = before(line, " bytes stack frame") {
            of_kernel.stack = stack;
            let stores = before(line, " bytes spill stores").unwrap();
            of_kernel.spilled = stores + before(line, " bytes spill loads").unwrap();
        }
        if let Some(registers) = before(line, " registers") {
            of_kernel.registers = registers;
        }
    }
    kernels
}

#[test]
fn nothing_spills_on_any_architecture() {
    let mut count = 0;
    for image in cubins() {
        let kernels = resources(image);
        assert!(!kernels.is_empty(), "{}: no kernels", image.file);
        for (kernel, of_kernel) in kernels {
            println!("{} {kernel}: {of_kernel:?}", image.architecture);
            assert!(of_kernel.registers > 0, "{kernel}: {of_kernel:?}");
            assert_eq!(
                (of_kernel.stack, of_kernel.spilled),
                (0, 0),
                "{kernel} on {}",
                image.architecture
            );
            count += 1;
        }
    }
    assert!(
        count == 0 || count >= 30,
        "only {count} kernels were looked at"
    );
}

/// The disassembler: where build.rs looks for nvcc, or in `PATH`.
fn nvdisasm() -> Option<PathBuf> {
    // OUT_DIR is <target>/<profile>/build/<package>/out.
    let target = Path::new(env!("OUT_DIR")).ancestors().nth(4)?;
    let beside = |folder: &Path| folder.join("cuda/nvidia/cu13/bin/nvdisasm");
    let home = std::env::var_os("CUDA_HOME").map(|home| PathBuf::from(home).join("bin/nvdisasm"));
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("target");
    let search_path = std::env::var_os("PATH").unwrap_or_default();
    let on_path = std::env::split_paths(&search_path).map(|folder| folder.join("nvdisasm"));
    let mut all = home
        .into_iter()
        .chain([beside(target), beside(&root)])
        .chain(on_path);
    all.find(|path| path.is_file())
}

/// Instructions of each kernel: how often each mnemonic that begins with one of `wanted` occurs.
fn disassemble(nvdisasm: &Path, image: &Image) -> BTreeMap<String, String> {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), image.code).unwrap();
    let output = Command::new(nvdisasm)
        .arg("-c")
        .arg(file.path())
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let text = String::from_utf8(output.stdout).unwrap();
    // Each kernel is a section `.text.NAME`.
    let sections = text.split("\n//---------------------").skip(1);
    sections
        .filter_map(|section| {
            let (head, body) = section.split_once('\n')?;
            let name = head
                .trim()
                .strip_prefix(".text.")?
                .split_whitespace()
                .next()?;
            Some((name.to_string(), body.to_string()))
        })
        .collect()
}

/// What the design of each kernel file says that its machine code must have.
const INSTRUCTIONS: [(&str, &[&str]); 9] = [
    // Tensor cores, ldmatrix, and copies of sixteen bytes past the first-level cache.
    (
        "matmul_skinny",
        &["HMMA.16816.F32.BF16", "LDSM.16", "LDGSTS.E.BYPASS"],
    ),
    (
        "matmul_tiled",
        &["HMMA.16816.F32.BF16", "LDSM.16", "LDGSTS.E.BYPASS"],
    ),
    (
        "attention_prefix",
        &["HMMA.16816.F32.BF16", "LDSM.16", "LDGSTS.E.BYPASS"],
    ),
    (
        "attention_suffix",
        &["HMMA.16816.F32.BF16", "LDSM.16", "LDGSTS.E.BYPASS"],
    ),
    (
        "attention_prefill",
        &["HMMA.16816.F32.BF16", "LDSM.16", "LDGSTS.E.BYPASS"],
    ),
    // Products of a warpgroup, tiles copied by the tensor memory accelerator, whose maps are read anew.
    (
        "matmul_wgmma",
        &[
            "HGMMA.64x128x16.F32.BF16",
            "UTMALDG.2D",
            "UTMACCTL.IV",
            "SYNCS.PHASECHK",
        ],
    ),
    ("gather_rank", &["HMMA.16816.F32.BF16"]),
    ("attention", &["LDG.E.128"]),
    ("embed", &["LDG.E.128", "STG.E.128"]),
];

#[test]
fn the_machine_code_has_the_instructions_that_the_design_is_about() {
    let cubins = cubins();
    if cubins.is_empty() {
        return;
    }
    let Some(nvdisasm) = nvdisasm() else {
        println!("skipped: there is no nvdisasm beside nvcc (scripts/setup-cuda installs one)");
        return;
    };
    let mut count = 0;
    for image in cubins {
        let Some((_, wanted)) = INSTRUCTIONS.iter().find(|(file, _)| *file == image.file) else {
            continue;
        };
        for (kernel, code) in disassemble(&nvdisasm, image) {
            for instruction in *wanted {
                let found = code.matches(instruction).count();
                println!("{} {kernel}: {found} {instruction}", image.architecture);
                assert!(
                    found > 0,
                    "{kernel} on {} has no {instruction}",
                    image.architecture
                );
            }
            count += 1;
        }
    }
    assert!(
        count >= INSTRUCTIONS.len(),
        "only {count} kernels were looked at"
    );
}

/// Programmatic dependent launch, in the machine code: every kernel lets its successor start (PREEXIT),
/// waits for its predecessors (ACQBULK), and reads and writes nothing before, as the code lies, but the
/// products' copies of weights.
#[test]
fn every_kernel_for_hopper_and_later_waits_before_it_reads() {
    let Some(nvdisasm) = nvdisasm() else {
        println!("skipped: there is no nvdisasm beside nvcc (scripts/setup-cuda installs one)");
        return;
    };
    let cubins = cubins().into_iter();
    for image in cubins.filter(|image| image.waits_for_predecessors()) {
        for (kernel, code) in disassemble(&nvdisasm, image) {
            let what = format!("{kernel} on {}", image.architecture);
            assert!(code.contains("PREEXIT"), "{what} lets no kernel start");
            let before = code.split_once("ACQBULK").map(|(before, _)| before);
            let before = before.unwrap_or_else(|| panic!("{what} does not wait"));
            for early in ["LDG.", "STG.", "ATOMG", "RED.", "LD.E", "ST.E"] {
                let found = before.lines().find(|line| line.contains(early));
                assert_eq!(found, None, "{what}");
            }
            let fetches = before.contains("LDGSTS");
            assert_eq!(fetches, kernel.starts_with("matmul_skinny"), "{what}");
        }
    }
}
