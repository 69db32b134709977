//! Where lines of results go.

use std::io::{self, IsTerminal, Write};
use std::path::Path;

use serde_json::Value;

use super::error::CliError;
use crate::tasks::whole_file::WholeFile;

/// Lines to a file that is there in whole or not at all, or to standard output as they come.
pub enum Output {
    File(WholeFile),
    Stdout(io::Stdout),
}

impl Output {
    /// Standard output for `None` and `-`.
    pub fn open(path: Option<&Path>) -> Result<Output, CliError> {
        match path.filter(|path| *path != Path::new("-")) {
            Some(path) => Ok(Output::File(WholeFile::create(path)?)),
            None => Ok(Output::Stdout(io::stdout())),
        }
    }

    pub fn is_terminal(&self) -> bool {
        matches!(self, Output::Stdout(stdout) if stdout.is_terminal())
    }

    pub fn line(&mut self, line: &Value) -> Result<(), CliError> {
        match self {
            Output::File(file) => {
                writeln!(file, "{line}").map_err(|source| file.error(source).into())
            }
            Output::Stdout(stdout) => Ok(writeln!(stdout, "{line}").and_then(|()| stdout.flush())?),
        }
    }

    pub fn finish(self) -> Result<(), CliError> {
        match self {
            Output::File(file) => Ok(file.finish()?),
            Output::Stdout(_) => Ok(()),
        }
    }
}
