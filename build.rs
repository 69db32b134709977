//! Compiles the kernels, twice: with nvcc for GPUs where there is one, and with the host's C++
//! compiler for the emulation (`kernels/emulate/`), always.
//!
//! `PODIUM_CUDA` = `auto` (default: without nvcc the build has no GPU kernels, and says so),
//! `require` (without nvcc the build fails), `off`. nvcc is looked for in `PODIUM_NVCC`,
//! `CUDA_HOME`, `PATH` and where `scripts/setup-cuda` puts it.
//!
//! A file is compiled anew when it, what it includes, or the command has changed: cargo runs this
//! script after any change below `kernels/`, and each output keeps beside it what it was made from.

use std::collections::BTreeSet;
use std::env;
use std::fmt::Write as _;
use std::fs;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

/// What GPUs get, in this order: Ampere (A100), Ada (L4, 4090), Hopper (H100), Blackwell (B200); and
/// PTX, which the driver compiles for whatever else there is.
const TARGETS: [Target; 5] = [
    Target::cubin("sm_80"),
    Target::cubin("sm_89"),
    Target::cubin("sm_90a"),
    Target::cubin("sm_100a"),
    Target {
        name: "compute_80",
        kind: "ptx",
    },
];

struct Target {
    name: &'static str,
    kind: &'static str,
}

impl Target {
    const fn cubin(name: &'static str) -> Target {
        Target {
            name,
            kind: "cubin",
        }
    }
}

/// The kernel file that is for Hopper alone.
const HOPPER: &str = "matmul_wgmma";

/// The kernels with planted faults.
const FAULTS: &str = "emulate_faults";

/// One run of a compiler.
struct Job {
    command: Command,
    source: PathBuf,
    output: PathBuf,
}

fn main() -> ExitCode {
    match build() {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            println!("cargo::error={message}");
            ExitCode::FAILURE
        }
    }
}

fn build() -> Result<(), String> {
    let root = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").ok_or("no CARGO_MANIFEST_DIR")?);
    let out = PathBuf::from(env::var_os("OUT_DIR").ok_or("no OUT_DIR")?);
    println!("cargo::rerun-if-changed=kernels");
    println!("cargo::rerun-if-changed=build.rs");
    for variable in ["PODIUM_CUDA", "PODIUM_NVCC", "CUDA_HOME"] {
        println!("cargo::rerun-if-env-changed={variable}");
    }
    let kernels = root.join("kernels");
    let sources = sources(&kernels)?;

    let emulation = Emulation::new(&kernels, &sources, &out)?;
    let nvcc = wanted_nvcc(&root, &out)?;
    let mut jobs = emulation.jobs;
    let mut images = Vec::new();
    if let Some(nvcc) = &nvcc {
        let known = known_architectures(nvcc)?;
        for target in TARGETS.iter().filter(|t| known.contains(&virtual_name(t))) {
            let compiled = |source: &&PathBuf| stem(source) != HOPPER || target.name == "sm_90a";
            for source in sources.iter().filter(compiled) {
                let output = out.join(format!("{}.{}.{}", stem(source), target.name, target.kind));
                let mut command = Command::new(nvcc);
                command
                    .arg(format!("-{}", target.kind))
                    .arg(format!("-arch={}", target.name))
                    .args(["-std=c++20", "-O3", "-lineinfo", "-Xptxas=-v,-warn-spills"])
                    .arg("-o")
                    .arg(&output)
                    .arg(source);
                images.push((stem(source), target, output.clone()));
                jobs.push(Job {
                    command,
                    source: source.clone(),
                    output,
                });
            }
        }
    }
    run_all(jobs, &kernels)?;
    archive("podium_emulation", &emulation.objects, &out, true)?;
    archive("podium_emulation_faults", &emulation.faults, &out, false)?;
    write_if_changed(&out.join("images.rs"), &images_rs(&images))
}

/// The kernels, sorted.
fn sources(kernels: &Path) -> Result<Vec<PathBuf>, String> {
    let entries = fs::read_dir(kernels).map_err(|e| format!("{}: {e}", kernels.display()))?;
    let mut sources: Vec<PathBuf> = entries
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.extension().is_some_and(|e| e == "cu"))
        .collect();
    sources.sort();
    Ok(sources)
}

fn stem(path: &Path) -> String {
    path.file_stem()
        .unwrap_or_default()
        .to_string_lossy()
        .into_owned()
}

/// The emulation's objects: each kernel file and the runtime; apart from them the kernels with planted
/// faults, which the crate's own tests link.
struct Emulation {
    jobs: Vec<Job>,
    objects: Vec<PathBuf>,
    faults: Vec<PathBuf>,
}

impl Emulation {
    fn new(kernels: &Path, sources: &[PathBuf], out: &Path) -> Result<Emulation, String> {
        let folder = kernels.join("emulate");
        // Optimised in every profile: tests run whole models on it.
        let compiler = cc::Build::new()
            .cpp(true)
            .std("c++20")
            .opt_level(2)
            .debug(false)
            .warnings(true)
            .extra_warnings(true)
            .define("PODIUM_EMULATE", None)
            // The same results on every processor; CUDA's own alias rules.
            .flag_if_supported("-ffp-contract=off")
            .flag_if_supported("-fno-strict-aliasing")
            .flag_if_supported("-Wno-unknown-pragmas")
            .try_get_compiler()
            .map_err(|e| format!("no C++ compiler for the kernels' emulation: {e}"))?;
        let mut files: Vec<(String, PathBuf)> =
            sources.iter().map(|s| (stem(s), s.clone())).collect();
        for file in ["faults.cu", "runtime.cc", "fiber.cc"] {
            files.push((
                format!("emulate_{}", stem(Path::new(file))),
                folder.join(file),
            ));
        }
        let mut emulation = Emulation {
            jobs: Vec::new(),
            objects: Vec::new(),
            faults: Vec::new(),
        };
        let mut anchors = String::new();
        let mut declarations = String::new();
        for (name, path) in files {
            // A kernel file is included by one that exports a symbol: nothing else would make the linker take it.
            let is_kernel = path.extension().is_some_and(|e| e == "cu");
            let unit = if is_kernel {
                let unit = out.join(format!("{name}.cc"));
                let text = format!(
                    "#include \"{}\"\nextern \"C\" {{ extern const int podium_kernels_{name}; const int podium_kernels_{name} = 1; }}\n",
                    path.display()
                );
                write_if_changed(&unit, &text)?;
                if name != FAULTS {
                    let _ = writeln!(declarations, "extern const int podium_kernels_{name};");
                    let _ = write!(anchors, "&podium_kernels_{name}, ");
                }
                unit
            } else {
                path.clone()
            };
            let object = emulation.compile(&compiler, unit, path, out.join(format!("{name}.o")));
            match name == FAULTS {
                true => emulation.faults.push(object),
                false => emulation.objects.push(object),
            }
        }
        let table = out.join("kernel_files.cc");
        let text = format!(
            "extern \"C\" {{\n{declarations}extern const int* const podium_kernel_files[];\n\
             const int* const podium_kernel_files[] = {{{anchors}nullptr}};\n}}\n"
        );
        write_if_changed(&table, &text)?;
        let object = out.join("kernel_files.o");
        let object = emulation.compile(&compiler, table.clone(), table, object);
        emulation.objects.push(object);
        Ok(emulation)
    }

    fn compile(
        &mut self,
        compiler: &cc::Tool,
        unit: PathBuf,
        source: PathBuf,
        output: PathBuf,
    ) -> PathBuf {
        let mut command = compiler.to_command();
        command.arg("-c").arg(unit).arg("-o").arg(&output);
        self.jobs.push(Job {
            command,
            source,
            output: output.clone(),
        });
        output
    }
}

fn archive(name: &str, objects: &[PathBuf], out: &Path, linked: bool) -> Result<(), String> {
    // A new archive only where an object is newer: the crate's own build hangs on it.
    let mut build = cc::Build::new();
    build.cpp(true).out_dir(out).cargo_metadata(linked);
    let library = linked.then(|| static_library(&build)).flatten();
    if library.is_some() {
        build.cpp_link_stdlib(None);
    }
    for object in objects {
        build.object(object);
    }
    build
        .try_compile(name)
        .map_err(|e| format!("cannot archive the kernels' emulation: {e}"))?;
    // Behind the archive, whose needs it meets.
    if let Some(folder) = library.as_deref().and_then(Path::parent) {
        println!("cargo:rustc-link-search=native={}", folder.display());
        println!("cargo:rustc-link-lib=static:-bundle=stdc++");
    }
    Ok(())
}

/// GCC's C++ library to link statically, where there is one: the dynamic one would be 3 MB that every
/// start of the program maps for a dozen functions, and one more thing that a machine has to have.
fn static_library(build: &cc::Build) -> Option<PathBuf> {
    const NAME: &str = "libstdc++.a";
    let compiler = build.try_get_compiler().ok()?;
    if !compiler.is_like_gnu() {
        return None;
    }
    let mut command = compiler.to_command();
    let answer = command.arg(format!("-print-file-name={NAME}")).output();
    // The name alone, if it has none.
    let path = PathBuf::from(String::from_utf8(answer.ok()?.stdout).ok()?.trim());
    path.is_absolute().then_some(path)
}

/// Runs what is out of date, as many at a time as cargo allows.
fn run_all(jobs: Vec<Job>, kernels: &Path) -> Result<(), String> {
    let mut stale = Vec::new();
    for job in jobs {
        let stamp = job.output.with_added_extension("made-from");
        let now = fingerprint(&job, kernels)?;
        if job.output.exists() && fs::read_to_string(&stamp).is_ok_and(|made| made == now) {
            continue;
        }
        stale.push((job, stamp, now));
    }
    let threads = env::var("NUM_JOBS")
        .ok()
        .and_then(|jobs| jobs.parse().ok())
        .unwrap_or(1usize)
        .min(stale.len());
    let (next, failed) = (AtomicUsize::new(0), Mutex::new(None));
    let stale: Vec<Mutex<_>> = stale.into_iter().map(Mutex::new).collect();
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                while let Some(entry) = stale.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let Ok(mut entry) = entry.lock() else { return };
                    let (job, stamp, now) = &mut *entry;
                    let result = run(job).and_then(|()| {
                        fs::write(&*stamp, &*now).map_err(|e| format!("{}: {e}", stamp.display()))
                    });
                    if let (Err(message), Ok(mut failed)) = (result, failed.lock()) {
                        failed.get_or_insert(message);
                        return;
                    }
                }
            });
        }
    });
    match failed.into_inner() {
        Ok(None) => Ok(()),
        Ok(Some(message)) => Err(message),
        Err(_) => Err("a compiler's thread panicked".to_string()),
    }
}

fn run(job: &mut Job) -> Result<(), String> {
    let output = job
        .command
        .output()
        .map_err(|e| format!("cannot start {:?}: {e}", job.command.get_program()))?;
    let said = String::from_utf8_lossy(&output.stderr);
    // Registers, spills and shared memory of each kernel, for the test that reads them.
    let log = job.output.with_added_extension("log");
    fs::write(&log, said.as_bytes()).map_err(|e| format!("{}: {e}", log.display()))?;
    if output.status.success() {
        for line in said.lines().filter(|line| line.contains("warning")) {
            println!("cargo::warning={line}");
        }
        return Ok(());
    }
    for line in said.lines() {
        println!("cargo::error={line}");
    }
    Err(format!("{} does not compile", job.source.display()))
}

/// What a compiler's output depends on: its command, and the texts of the source and all that it includes.
fn fingerprint(job: &Job, kernels: &Path) -> Result<String, String> {
    let mut files = BTreeSet::new();
    collect_includes(&job.source, kernels, &mut files)?;
    let mut hasher = DefaultHasher::new();
    format!("{:?}", job.command).hash(&mut hasher);
    for file in files {
        fs::read(&file)
            .map_err(|e| format!("{}: {e}", file.display()))?
            .hash(&mut hasher);
    }
    Ok(format!("{:016x}", hasher.finish()))
}

fn collect_includes(
    file: &Path,
    kernels: &Path,
    found: &mut BTreeSet<PathBuf>,
) -> Result<(), String> {
    let path = file
        .canonicalize()
        .map_err(|e| format!("{}: {e}", file.display()))?;
    if !found.insert(path.clone()) {
        return Ok(());
    }
    let text = fs::read_to_string(&path).map_err(|e| format!("{}: {e}", path.display()))?;
    for line in text.lines() {
        let Some(name) = line.trim_start().strip_prefix("#include \"") else {
            continue;
        };
        let name = name.split('"').next().unwrap_or_default();
        let beside = path.parent().unwrap_or(kernels).join(name);
        collect_includes(&beside, kernels, found)?;
    }
    Ok(())
}

/// nvcc as `PODIUM_CUDA` wants it.
fn wanted_nvcc(root: &Path, out: &Path) -> Result<Option<PathBuf>, String> {
    let wish = env::var("PODIUM_CUDA").unwrap_or_else(|_| "auto".to_string());
    match wish.as_str() {
        "off" => Ok(None),
        "auto" | "require" => match find_nvcc(root, out)? {
            Some(nvcc) => Ok(Some(nvcc)),
            None if wish == "require" => Err(
                "PODIUM_CUDA=require, and there is no nvcc: run scripts/setup-cuda, or set PODIUM_NVCC"
                    .to_string(),
            ),
            None => {
                println!("cargo::warning=no nvcc found, so this build has no GPU kernels (scripts/setup-cuda installs one)");
                Ok(None)
            }
        },
        other => Err(format!(
            "PODIUM_CUDA={other}: it can be auto, require or off"
        )),
    }
}

fn find_nvcc(root: &Path, out: &Path) -> Result<Option<PathBuf>, String> {
    if let Some(nvcc) = env::var_os("PODIUM_NVCC") {
        let nvcc = PathBuf::from(nvcc);
        return match nvcc.is_file() {
            true => Ok(Some(nvcc)),
            false => Err(format!(
                "PODIUM_NVCC={}: there is no such file",
                nvcc.display()
            )),
        };
    }
    let installed = |target: &Path| target.join("cuda/nvidia/cu13/bin/nvcc");
    // OUT_DIR is <target>/<profile>/build/<package>/out.
    let target = out.ancestors().nth(4).unwrap_or(out);
    let search_path = env::var_os("PATH").unwrap_or_default();
    let mut candidates = env::var_os("CUDA_HOME")
        .map(|home| PathBuf::from(home).join("bin/nvcc"))
        .into_iter()
        .chain(env::split_paths(&search_path).map(|folder| folder.join("nvcc")))
        .chain([installed(target), installed(&root.join("target"))]);
    Ok(candidates.find(|path| path.is_file()))
}

/// `compute_90a` for `sm_90a`.
fn virtual_name(target: &Target) -> String {
    target.name.replace("sm_", "compute_")
}

fn known_architectures(nvcc: &Path) -> Result<BTreeSet<String>, String> {
    let output = Command::new(nvcc)
        .arg("--list-gpu-arch")
        .output()
        .map_err(|e| format!("{}: {e}", nvcc.display()))?;
    let listed: BTreeSet<String> = String::from_utf8_lossy(&output.stdout)
        .split_whitespace()
        .map(str::to_string)
        .collect();
    // `compute_90a` is not listed where `compute_90` is, but known wherever that is.
    Ok(TARGETS
        .iter()
        .map(virtual_name)
        .filter(|name| listed.contains(name.trim_end_matches('a')))
        .collect())
}

fn images_rs(images: &[(String, &Target, PathBuf)]) -> String {
    let mut text = String::from("&[\n");
    for (file, target, path) in images {
        let _ = writeln!(
            text,
            "    Image {{ file: {file:?}, architecture: {:?}, kind: {:?}, code: include_bytes!({:?}) }},",
            target.name, target.kind, path
        );
    }
    text.push_str("]\n");
    text
}

/// Keeps the old file's time where nothing has changed.
fn write_if_changed(path: &Path, text: &str) -> Result<(), String> {
    let same = fs::read(path).is_ok_and(|old| old == text.as_bytes());
    let write = || -> io::Result<()> { fs::write(path, text) };
    if same {
        return Ok(());
    }
    write().map_err(|e| format!("{}: {e}", path.display()))
}
