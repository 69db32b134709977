//! How far Podium may be from transformers.

/// Logits and features: the largest difference of a row, relative to the row's largest value. Both
/// sides add in float32, in different orders; against float64, transformers itself is off by up to
/// 5e-6 in these models. A wrong angle, window, cap or bias is off by 1e-2 and more (the reference
/// script has tried them).
const ROW_TOLERANCE: f64 = 1e-4;

/// Log-probabilities: absolute where they are small, for a probability near one has a logarithm near
/// zero that carries the absolute error of its logits; relative to the logarithm where it is large.
const LOGPROB_TOLERANCE: f64 = 1e-4;

/// SmolLM2's features once more, relative to the *median* of their row: a few coordinates are fifty
/// times as large as the others and would hide an error in those, which a ranker reads as well.
/// transformers is off by up to 1.5e-5 by this measure.
const COORDINATE_TOLERANCE: f64 = 1e-4;

/// A row of logits or features.
pub fn assert_row(what: &str, ours: &[f32], reference: &[f32]) {
    let largest = *sizes(reference).last().unwrap();
    assert_close(what, ours, reference, ROW_TOLERANCE, |_| largest);
}

/// A row of features, the small coordinates as well.
pub fn assert_coordinates(what: &str, ours: &[f32], reference: &[f32]) {
    let median = sizes(reference)[reference.len() / 2];
    assert_close(what, ours, reference, COORDINATE_TOLERANCE, |_| median);
}

/// Natural log-probabilities of tokens.
pub fn assert_logprobs(what: &str, ours: &[f32], reference: &[f32]) {
    assert_close(what, ours, reference, LOGPROB_TOLERANCE, |x| {
        x.abs().max(1.0)
    });
}

/// Absolute values, in rising order.
fn sizes(row: &[f32]) -> Vec<f64> {
    let mut sizes: Vec<f64> = row.iter().map(|&x| f64::from(x).abs()).collect();
    sizes.sort_by(f64::total_cmp);
    sizes
}

fn assert_close(
    what: &str,
    ours: &[f32],
    reference: &[f32],
    tolerance: f64,
    scale: impl Fn(f64) -> f64,
) {
    assert_eq!(ours.len(), reference.len(), "{what}: length");
    let mut worst: f64 = 0.0;
    for (index, (&ours, &reference)) in ours.iter().zip(reference).enumerate() {
        let (ours, reference) = (f64::from(ours), f64::from(reference));
        let error = (ours - reference).abs() / scale(reference);
        // Written so that NaN fails.
        assert!(
            error <= tolerance,
            "{what}[{index}]: {ours}, but it should be {reference}: off by {error:.1e}"
        );
        worst = worst.max(error);
    }
    println!("{what}: off by up to {worst:.1e}");
}
