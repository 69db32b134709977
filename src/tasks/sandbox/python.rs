//! The Python interpreter that programs are run with.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use super::SandboxError;

/// An interpreter, and what it reads.
#[derive(Clone, Debug, PartialEq)]
pub struct Python {
    pub executable: PathBuf,
    /// Files and folders that it needs: its own, its standard library, the system's libraries.
    pub reads: Vec<PathBuf>,
}

/// Where an interpreter says that it and its libraries are.
const WHERE: &str = "import os, sys, sysconfig\n\
    print(os.path.realpath(sys.executable))\n\
    for name in ('stdlib', 'platstdlib'): print(os.path.realpath(sysconfig.get_path(name)))\n\
    print(os.path.join(sysconfig.get_config_var('LIBDIR') or '/usr/lib', sysconfig.get_config_var('INSTSONAME') or ''))";

/// What programs are linked with.
const SYSTEM: [&str; 6] = [
    "/lib",
    "/lib64",
    "/usr/lib",
    "/usr/lib64",
    "/etc/ld.so.cache",
    "/nix/store",
];

impl Python {
    /// Asks an interpreter (`python3` of the search path, say) where it is. It is run outside the
    /// sandbox: it is the user's own.
    pub fn find(command: &Path) -> Result<Python, SandboxError> {
        let failed = |problem: String| {
            SandboxError::Interpreter(format!("{}: {problem}", command.display()))
        };
        let output = Command::new(command)
            .args(["-I", "-S", "-c", WHERE])
            .stdin(Stdio::null())
            .output()
            .map_err(|error| failed(format!("cannot run Python: {error}")))?;
        let text = String::from_utf8_lossy(&output.stdout);
        let mut lines = text.lines().map(PathBuf::from);
        let executable = match (output.status.success(), lines.next()) {
            (true, Some(executable)) => executable,
            _ => {
                let said = String::from_utf8_lossy(&output.stderr);
                let last = said.lines().last().unwrap_or_default();
                return Err(failed(format!("is no Python that works: {last}")));
            }
        };
        let mut reads: Vec<PathBuf> = SYSTEM.iter().map(PathBuf::from).collect();
        reads.push(executable.clone());
        reads.extend(lines);
        reads.retain(|path| path.exists());
        reads.sort();
        reads.dedup();
        Ok(Python { executable, reads })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_python_is_refused() {
        for command in ["/nowhere/python3", "/bin/false", "/bin/echo"] {
            let error = Python::find(Path::new(command));
            if command == "/bin/echo" {
                // It answers, but with no executable that exists.
                assert!(error.is_err() || !error.unwrap().executable.exists());
            } else {
                let message = error.unwrap_err().to_string();
                assert!(message.starts_with(command), "{message}");
            }
        }
    }
}
