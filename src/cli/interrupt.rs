//! Ctrl-C and SIGTERM: the first asks for an orderly end, the second is one.

use std::ops::ControlFlow;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

static INTERRUPTED: AtomicBool = AtomicBool::new(false);

/// The status that shells give to a process ended by Ctrl-C.
const STATUS: i32 = 130;

/// From now on Ctrl-C, SIGTERM and SIGHUP are noted rather than fatal: for work that can end early
/// with something to show for it, or that has temporary files to take away.
pub fn catch() {
    let note = || {
        if INTERRUPTED.swap(true, Relaxed) {
            std::process::exit(STATUS);
        }
    };
    // Where no handler can be set, Ctrl-C ends the process as ever.
    let _ = ctrlc::set_handler(note);
}

pub fn interrupted() -> bool {
    INTERRUPTED.load(Relaxed)
}

/// `Break` once the user has asked for the end.
pub fn flow() -> ControlFlow<()> {
    match interrupted() {
        true => ControlFlow::Break(()),
        false => ControlFlow::Continue(()),
    }
}
