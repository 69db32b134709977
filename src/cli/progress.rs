//! Progress on standard error, where that is a terminal.

use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};

use super::output::Output;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unit {
    Bytes,
    Items,
}

/// A bar with rate and time left, or a counter where the total is not known. Gone when dropped.
pub struct Progress {
    bar: ProgressBar,
}

impl Progress {
    pub fn new(what: &'static str, total: Option<u64>, unit: Unit) -> Progress {
        let (amount, rate) = match unit {
            Unit::Bytes => ("{bytes}/{total_bytes}", "{bytes_per_sec}"),
            Unit::Items => ("{pos}/{len}", "{per_sec}"),
        };
        let (bar, template) = match total {
            Some(total) => (
                ProgressBar::new(total),
                format!("{{msg}} {{wide_bar}} {amount} {rate} {{eta}} left {{prefix:.dim}}"),
            ),
            None => (
                ProgressBar::new_spinner(),
                format!("{{msg}} {{pos}} {rate} {{elapsed}} {{prefix:.dim}}"),
            ),
        };
        // The templates above are valid; a plain bar would do no harm.
        if let Ok(style) = ProgressStyle::with_template(&template) {
            bar.set_style(style);
        }
        bar.set_message(what);
        // So that the time goes on between two items.
        bar.enable_steady_tick(Duration::from_millis(500));
        Progress { bar }
    }

    /// The same for work whose results go to `output`: hidden where they share a terminal.
    pub fn beside(output: &Output, what: &'static str, total: Option<u64>, unit: Unit) -> Progress {
        match output.is_terminal() {
            true => Progress {
                bar: ProgressBar::hidden(),
            },
            false => Progress::new(what, total, unit),
        }
    }

    /// For work that goes on where it was: what is done already has no part in the rate.
    pub fn begin_at(&self, done: u64) {
        self.bar.set_position(done);
        self.bar.reset_eta();
    }

    pub fn advance(&self, by: u64) {
        self.bar.inc(by);
    }

    /// A few words behind the bar.
    pub fn note(&self, note: String) {
        self.bar.set_prefix(note);
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}
