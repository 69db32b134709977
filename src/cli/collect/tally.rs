//! How good the candidates of a collection are, while it is made and at its end.

use std::io::Write;
use std::path::Path;
use std::time::Duration;

use serde_json::{Map, Value, json};

use crate::cli::error::CliError;

/// What is known of the items so far.
#[derive(Default)]
pub struct Tally {
    items: usize,
    candidates: usize,
    /// Sum of the labels.
    labels: f64,
    /// Sum over items of their mean label, and of their best one.
    first: f64,
    best: f64,
}

impl Tally {
    pub fn count(&mut self, line: &Map<String, Value>) {
        let labels = line.get("labels").and_then(Value::as_array);
        let labels: Vec<f64> = labels
            .into_iter()
            .flatten()
            .filter_map(Value::as_f64)
            .collect();
        self.items += 1;
        if labels.is_empty() {
            return;
        }
        let sum: f64 = labels.iter().sum();
        self.candidates += labels.len();
        self.labels += sum;
        self.first += sum / labels.len() as f64;
        self.best += labels.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    }

    /// Expected accuracy of one candidate, and of the best one.
    fn accuracy(&self) -> (f64, f64) {
        let items = self.items.max(1) as f64;
        (self.first / items, self.best / items)
    }

    /// The last word; `waited` is the part of the time in which nothing was generated, for verdicts or
    /// the disk were not there.
    pub fn print(
        &self,
        as_json: bool,
        folder: &Path,
        took: Duration,
        waited: Duration,
    ) -> Result<(), CliError> {
        let (one, oracle) = self.accuracy();
        let mut stdout = std::io::stdout();
        if as_json {
            let report = json!({
                "output": folder,
                "items": self.items,
                "candidates": self.candidates,
                "accuracy": one,
                "oracle": oracle,
                "seconds": took.as_secs_f64(),
                "seconds_waited": waited.as_secs_f64(),
            });
            return Ok(writeln!(stdout, "{report}")?);
        }
        Ok(writeln!(
            stdout,
            "{}: {} items, {} candidates, {self}",
            folder.display(),
            self.items,
            self.candidates
        )?)
    }
}

impl std::fmt::Display for Tally {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (one, oracle) = self.accuracy();
        write!(
            formatter,
            "accuracy {one:.3} of one, {oracle:.3} of the best"
        )
    }
}
