//! Losses over one group of candidates.

use serde::{Deserialize, Serialize};

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Loss {
    /// Cross-entropy between the softmax of the group's scores and its labels, normalised to sum to
    /// one: which of these is the best?
    Listwise,
    /// Binary cross-entropy of each candidate's label: is this one right?
    Pointwise,
}

/// A group's loss, a sum that is yet to be divided, and what the scores mean for it.
pub(super) struct GroupLoss {
    pub loss: f64,
    pub d_scores: Vec<f32>,
    /// The gradient of a number that is added to every score.
    pub d_bias: f64,
}

/// Whether labels say that some candidates are better than others.
pub(super) fn ranks(labels: &[f32]) -> bool {
    labels.iter().any(|label| *label != labels[0])
}

impl Loss {
    /// What a batch's sum is divided by: groups that rank anything, or candidates.
    pub(super) fn count(self, labels: &[f32]) -> usize {
        match self {
            Loss::Listwise => usize::from(ranks(labels)),
            Loss::Pointwise => labels.len(),
        }
    }

    /// The loss of one group, and its gradient times `weight`. `bias` is added to the scores under
    /// binary cross-entropy; a softmax would not notice.
    pub(super) fn of(self, scores: &[f32], bias: f32, labels: &[f32], weight: f64) -> GroupLoss {
        match self {
            Loss::Listwise => listwise(scores, labels, weight),
            Loss::Pointwise => pointwise(scores, bias, labels, weight),
        }
    }
}

fn listwise(scores: &[f32], labels: &[f32], weight: f64) -> GroupLoss {
    let total: f64 = labels.iter().map(|&label| f64::from(label)).sum();
    if !ranks(labels) || total <= 0.0 {
        return GroupLoss {
            loss: 0.0,
            d_scores: vec![0.0; scores.len()],
            d_bias: 0.0,
        };
    }
    let largest = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let shifted: Vec<f64> = scores
        .iter()
        .map(|&s| f64::from(s) - f64::from(largest))
        .collect();
    let sum: f64 = shifted.iter().map(|s| s.exp()).sum();
    let mut loss = 0.0;
    let d_scores = shifted
        .iter()
        .zip(labels)
        .map(|(s, &label)| {
            let target = f64::from(label) / total;
            loss -= target * (s - sum.ln());
            ((s.exp() / sum - target) * weight) as f32
        })
        .collect();
    GroupLoss {
        loss,
        d_scores,
        d_bias: 0.0,
    }
}

fn pointwise(scores: &[f32], bias: f32, labels: &[f32], weight: f64) -> GroupLoss {
    let (mut loss, mut d_bias) = (0.0, 0.0);
    let d_scores = scores
        .iter()
        .zip(labels)
        .map(|(&score, &label)| {
            let (x, label) = (f64::from(score + bias), f64::from(label));
            // log(1 + eˣ) − label · x, without an overflow
            loss += x.max(0.0) + (-x.abs()).exp().ln_1p() - label * x;
            let d = (1.0 / (1.0 + (-x).exp()) - label) * weight;
            d_bias += d;
            d as f32
        })
        .collect();
    GroupLoss {
        loss,
        d_scores,
        d_bias,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_that_can_be_worked_out_by_hand() {
        let group = Loss::Listwise.of(&[1.0, 1.0, 1.0, 1.0], 9.0, &[1.0, 0.0, 1.0, 0.0], 1.0);
        assert!((group.loss - 4f64.ln()).abs() < 1e-12);
        assert_eq!(group.d_scores, [-0.25, 0.25, -0.25, 0.25]);

        let group = Loss::Pointwise.of(&[2.0, -1.0], -2.0, &[1.0, 0.0], 0.5);
        let expected = 2f64.ln() + (-3f64).exp().ln_1p();
        assert!((group.loss - expected).abs() < 1e-12);
        assert_eq!(group.d_scores[0], -0.25);
    }

    #[test]
    fn groups_that_rank_nothing_teach_a_softmax_nothing() {
        for labels in [[0.0; 3], [1.0; 3], [0.5; 3]] {
            let group = Loss::Listwise.of(&[3.0, 1.0, 2.0], 0.0, &labels, 1.0);
            assert_eq!((group.loss, &group.d_scores[..]), (0.0, &[0.0; 3][..]));
            assert_eq!(Loss::Listwise.count(&labels), 0);
            assert_eq!(Loss::Pointwise.count(&labels), 3);
        }
    }

    #[test]
    fn huge_scores_overflow_nothing() {
        let group = Loss::Listwise.of(&[1e30, -1e30], 0.0, &[0.0, 1.0], 1.0);
        assert!(group.loss.is_finite() && group.d_scores == [1.0, -1.0]);
        let group = Loss::Pointwise.of(&[1e30, -1e30], 0.0, &[0.0, 1.0], 1.0);
        assert!(group.loss.is_finite() && group.d_scores == [1.0, -1.0]);
    }
}
