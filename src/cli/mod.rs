//! Commands: parse, call the library, print.

/// Runs the command line and returns its exit status: 0, 1 (failed) or 2 (usage).
pub fn main() -> std::process::ExitCode {
    std::process::ExitCode::SUCCESS
}
