//! The rankers that ship in the binary, found by their name or by the task that they were trained on.

use std::sync::OnceLock;

use super::{Ranker, RankerError};

/// Files of `models/`, each under 1 MB.
const FILES: &[&[u8]] = &[];

/// Every built-in ranker, for whichever model.
pub fn builtin() -> &'static [Ranker] {
    static RANKERS: OnceLock<Vec<Ranker>> = OnceLock::new();
    RANKERS.get_or_init(|| {
        // The bytes are part of this program, and a test loads every one of them.
        let load = |bytes: &&[u8]| Ranker::from_bytes(bytes).expect("embedded rankers are valid");
        FILES.iter().map(load).collect()
    })
}

/// The built-in ranker of that name, or else the one for that task, which was trained on the model
/// of that fingerprint.
pub fn find_builtin(name: &str, fingerprint: &str) -> Result<&'static Ranker, RankerError> {
    find(builtin(), name, fingerprint)
}

fn find<'a>(
    rankers: &'a [Ranker],
    name: &str,
    fingerprint: &str,
) -> Result<&'a Ranker, RankerError> {
    let of_model = || {
        rankers
            .iter()
            .filter(|ranker| ranker.config().model_fingerprint == fingerprint)
    };
    let by_name = of_model().find(|ranker| ranker.config().name == name);
    let by_task = || of_model().find(|ranker| ranker.config().task.as_deref() == Some(name));
    by_name.or_else(by_task).ok_or_else(|| {
        let names: Vec<&str> = of_model()
            .map(|ranker| ranker.config().name.as_str())
            .collect();
        let available = if names.is_empty() {
            "there is none for this model: give a ranker's file".into()
        } else {
            format!("for this model there are: {}", names.join(", "))
        };
        RankerError::UnknownBuiltin {
            name: name.into(),
            available,
        }
    })
}
