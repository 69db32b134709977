//! `scripts/gpu-check`, from packing to the report, on the emulation in a GPU's place.
#![cfg(target_os = "linux")]

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

fn script() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/gpu-check")
}

fn text(output: &[u8]) -> String {
    String::from_utf8_lossy(output).into_owned()
}

/// A bundle with the real command; its tests and benches are stand-ins that say what they were asked,
/// for the real ones may not be built.
fn unpacked(folder: &Path) -> PathBuf {
    let binaries = folder.join("binaries");
    std::fs::create_dir(&binaries).unwrap();
    std::fs::copy(env!("CARGO_BIN_EXE_podium"), binaries.join("podium")).unwrap();
    let stand_in = |name: &str, says: &str| {
        let path = binaries.join(name);
        std::fs::write(&path, format!("#!/bin/sh\n{says}\n")).unwrap();
        let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
        std::fs::set_permissions(&path, mode).unwrap();
    };
    stand_in(
        "kernel-tests",
        "echo $PODIUM_TEST_DEVICE $*; echo 'test result: ok. 40 passed; 0 failed; 0 ignored'",
    );
    stand_in(
        "whole-tests",
        "ls $CARGO_MANIFEST_DIR/tests/golden/models/qwen3/model.safetensors || exit 3\n\
         ${STAND_IN_FAILS:+exit 101}\necho 'test result: ok. 9 passed; 0 failed; 0 ignored'",
    );
    stand_in(
        "kernel-benches",
        "echo 'norm_rows/8  time: [1 us 2 us 3 us]'",
    );
    let archive = folder.join("gpu-check.tar.xz");
    let packed = Command::new(script())
        .arg("--pack")
        .arg(&archive)
        .env("PODIUM_GPU_CHECK_BINARIES", &binaries)
        .output()
        .unwrap();
    assert!(packed.status.success(), "{}", text(&packed.stderr));
    assert!(std::fs::metadata(&archive).unwrap().len() < 50_000_000);
    let unpacked = Command::new("tar")
        .arg("xf")
        .arg(&archive)
        .current_dir(folder)
        .status();
    assert!(unpacked.unwrap().success());
    folder.join("gpu-check/run")
}

fn run(bundle: &Path, arguments: &[&str], fails: bool) -> Output {
    let mut command = Command::new(bundle);
    command
        .args(arguments)
        .env("PODIUM_GPU_CHECK_DATE", "2031-05-07")
        .env_remove("STAND_IN_FAILS");
    if fails {
        command.env("STAND_IN_FAILS", "1");
    }
    command.output().unwrap()
}

#[test]
fn packs_checks_and_reports() {
    let folder = tempfile::tempdir().unwrap();
    let bundle = unpacked(folder.path());

    // torch would take a minute where it is.
    let parts = ["--only", "parity,whole,sanitizer,steps,kernels"];
    let arguments = [&["--device", "emulate"], &parts[..]].concat();
    let passed = run(&bundle, &arguments, false);
    assert!(passed.status.success(), "{}", text(&passed.stderr));
    let report = PathBuf::from(text(&passed.stdout).trim());
    assert!(report.ends_with("gpu-check/report/emulated-gpu-2031-05-07.md"));
    let report = std::fs::read_to_string(report).unwrap();
    for expected in [
        "# Podium's kernels on: emulated GPU\n",
        "| parity | passed |",
        "parity: 40 passed; 0 failed.",
        "whole: 9 passed; 0 failed.",
        "| sanitizer | skipped: the emulation checks every access itself |",
        "this shows that it runs, and no speed",
        "### tiny, bf16 weights",
        "### tiny, int8 weights",
        "### tiny, fp8 weights",
        "| prefill 40, wgmma |",
        "| step, N = 8 |",
        "### Ranking 100 candidates",
        "norm_rows/8  time:",
    ] {
        assert!(report.contains(expected), "no {expected:?} in\n{report}");
    }
    let parity = folder.path().join("gpu-check/report/parity.log");
    let parity = std::fs::read_to_string(parity).unwrap();
    assert!(parity.starts_with("emulate backend::cuda::"), "{parity}");

    // One that fails is told, and what it said; the others go on.
    let failed = run(
        &bundle,
        &["--device", "emulate", "--only", "parity,whole"],
        true,
    );
    assert_eq!(failed.status.code(), Some(1));
    assert!(text(&failed.stderr).contains("failed: whole"));
    let report = std::fs::read_to_string(text(&failed.stdout).trim()).unwrap();
    assert!(
        report.contains("| whole | **failed** (status 101) |"),
        "{report}"
    );
    assert!(report.contains("| parity | passed |") && report.contains("What whole said last"));

    // Without a GPU: one line that says so. (A machine with one has nothing to show here.)
    let none = run(&bundle, &["--device", "cuda:999"], false);
    assert_eq!(none.status.code(), Some(1));
    let said = text(&none.stderr);
    let why = ["no CUDA driver", "there is no CUDA device 999"];
    assert!(why.iter().any(|why| said.contains(why)), "{said}");
    assert!(said.contains("nothing to check here"), "{said}");
}

#[test]
fn what_makes_no_sense_is_refused() {
    let run = |arguments: &[&str]| Command::new(script()).args(arguments).output().unwrap();
    for (arguments, expected) in [
        (&["--only", "parity,speed"][..], "there is no part speed"),
        (&["--fast"], "what is --fast?"),
        (&["--device", "emulate"], "no binaries beside this script"),
        (&["--pack"], "wants the name of the archive"),
    ] {
        let refused = run(arguments);
        assert_eq!(refused.status.code(), Some(1));
        assert!(
            text(&refused.stderr).contains(expected),
            "{}",
            text(&refused.stderr)
        );
    }
    let help = run(&["--help"]);
    assert!(help.status.success() && text(&help.stdout).contains("--pack gpu-check.tar.xz"));
}
