//! Contains panics of the tokenizers and template libraries, which some malformed files provoke.

use std::any::Any;
use std::cell::Cell;
use std::panic::{self, AssertUnwindSafe};
use std::sync::Once;

thread_local! {
    static QUIET: Cell<bool> = const { Cell::new(false) };
}

/// Runs `action`; a panic inside it becomes its message, and prints nothing.
///
/// State that `action` mutates must not be used after a panic, since it may be half written.
pub(super) fn contain<T>(action: impl FnOnce() -> T) -> Result<T, String> {
    // The hook is process-wide, so it is replaced once, by one that passes on every panic but
    // those of threads that are inside this function.
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let previous = panic::take_hook();
        panic::set_hook(Box::new(move |info| {
            if !QUIET.get() {
                previous(info);
            }
        }));
    });
    let outer = QUIET.replace(true);
    let result = panic::catch_unwind(AssertUnwindSafe(action));
    QUIET.set(outer);
    result.map_err(|payload| panic_message(payload.as_ref()))
}

/// The message of a caught panic, on one line.
pub(super) fn panic_message(payload: &(dyn Any + Send)) -> String {
    let message = payload
        .downcast_ref::<&str>()
        .copied()
        .or_else(|| payload.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("no message");
    format!(
        "internal error: {}",
        message.lines().next().unwrap_or("no message")
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_becomes_its_message() {
        assert_eq!(contain(|| 7), Ok(7));
        let caught = contain(|| -> u32 { panic!("index {} is wrong\nsecond line", 3) });
        assert_eq!(caught, Err("internal error: index 3 is wrong".to_string()));
        assert!(!QUIET.get());
    }
}
