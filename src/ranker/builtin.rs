//! The rankers that ship in the binary, found by their name or by the task that they were trained on.

use std::sync::OnceLock;

use super::{Ranker, RankerError};

/// Files of `models/`, each under 1 MB.
const FILES: &[&[u8]] = &[
    include_bytes!("../../models/gcd.safetensors"),
    include_bytes!("../../models/family_relationships.safetensors"),
    include_bytes!("../../models/gcd_shortest.safetensors"),
    include_bytes!("../../models/count_primes.safetensors"),
    include_bytes!("../../models/function_calls.safetensors"),
    include_bytes!("../../models/python_functions.safetensors"),
];

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

#[cfg(test)]
mod tests {
    use super::super::reference::{config, random_ranker};
    use super::super::{RankerConfig, RankerKind};
    use super::*;

    #[test]
    fn every_embedded_ranker_loads_and_is_small() {
        assert_eq!(builtin().len(), FILES.len());
        assert!(FILES.iter().all(|bytes| bytes.len() < 1 << 20));
        for ranker in builtin() {
            let RankerConfig {
                name,
                model_fingerprint,
                ..
            } = ranker.config();
            let found = find_builtin(name, model_fingerprint).unwrap();
            assert_eq!(
                found.config(),
                ranker.config(),
                "two rankers are called {name}"
            );
        }
    }

    #[test]
    fn a_name_goes_before_a_task_and_the_model_must_be_the_same() {
        let ranker = |name: &str, task: &str, fingerprint: &str| {
            let config = RankerConfig {
                name: name.into(),
                task: Some(task.into()),
                model_fingerprint: fingerprint.into(),
                ..config(RankerKind::Linear, 4)
            };
            random_ranker(config, 1)
        };
        let rankers = [
            ranker("elsewhere", "gcd", "B"),
            ranker("sums", "gcd", "A"),
            ranker("gcd", "other", "A"),
            ranker("third", "family", "A"),
        ];
        let name =
            |name: &str| find(&rankers, name, "A").map(|ranker| ranker.config().name.clone());
        assert_eq!(name("gcd").unwrap(), "gcd");
        assert_eq!(name("family").unwrap(), "third");
        assert_eq!(
            name("elsewhere").unwrap_err().to_string(),
            "no built-in ranker is called `elsewhere`; for this model there are: sums, gcd, third"
        );
        let message = find(&rankers, "gcd", "C").unwrap_err().to_string();
        assert!(message.ends_with("there is none for this model: give a ranker's file"));
    }
}
