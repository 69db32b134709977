//! From gradients to weights: AdamW, SGD with momentum, and the learning rate's schedule.

use std::ops::Range;

use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::backend::cpu::simd::{Isa, Kernel, Simd};

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OptimizerKind {
    /// Adam with decoupled weight decay.
    AdamW,
    /// Stochastic gradient descent with momentum; decay is decoupled here as well.
    Sgd,
}

const BETA_1: f32 = 0.9;
const BETA_2: f32 = 0.999;
const EPSILON: f32 = 1e-8;
const MOMENTUM: f32 = 0.9;
/// A gradient longer than this is shortened to it.
const LONGEST_GRADIENT: f64 = 1.0;
/// Numbers of one task.
const CHUNK: usize = 8192;

/// Moments of the gradient, which the next step needs.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Moments {
    /// Steps so far.
    pub steps: u64,
    pub first: Vec<f32>,
    /// Empty for SGD.
    pub second: Vec<f32>,
}

impl Moments {
    pub fn new(kind: OptimizerKind, len: usize) -> Self {
        let second = match kind {
            OptimizerKind::AdamW => vec![0.0; len],
            OptimizerKind::Sgd => Vec::new(),
        };
        Moments {
            steps: 0,
            first: vec![0.0; len],
            second,
        }
    }
}

/// What a step does beside the gradient.
pub(super) struct Rates<'a> {
    pub learning_rate: f64,
    pub weight_decay: f64,
    /// The weights that decay.
    pub decayed: &'a [Range<usize>],
}

/// One step along `gradient`, shortened where it is too long.
pub(super) fn step(
    isa: Isa,
    kind: OptimizerKind,
    rates: &Rates,
    weights: &mut [f32],
    gradient: &[f32],
    moments: &mut Moments,
) {
    moments.steps += 1;
    let steps = i32::try_from(moments.steps).unwrap_or(i32::MAX);
    let norm = length(gradient);
    let clip = if norm > LONGEST_GRADIENT {
        (LONGEST_GRADIENT / norm) as f32
    } else {
        1.0
    };
    let shrink = (1.0 - rates.learning_rate * rates.weight_decay) as f32;
    for range in rates.decayed {
        for weight in &mut weights[range.clone()] {
            *weight *= shrink;
        }
    }
    match kind {
        OptimizerKind::AdamW => {
            // m̂ / (√v̂ + ε), with the corrections of m and v brought into step size and ε.
            let first_correction = 1.0 - f64::from(BETA_1).powi(steps);
            let second_correction = (1.0 - f64::from(BETA_2).powi(steps)).sqrt();
            let update = AdamUpdate {
                clip,
                step_size: (rates.learning_rate * second_correction / first_correction) as f32,
                epsilon: (f64::from(EPSILON) * second_correction) as f32,
            };
            weights
                .par_chunks_mut(CHUNK)
                .zip(gradient.par_chunks(CHUNK))
                .zip(moments.first.par_chunks_mut(CHUNK))
                .zip(moments.second.par_chunks_mut(CHUNK))
                .for_each(|(((weights, gradient), first), second)| {
                    isa.dispatch(Adam {
                        update,
                        weights,
                        gradient,
                        first,
                        second,
                    })
                });
        }
        OptimizerKind::Sgd => {
            let rate = rates.learning_rate as f32;
            let numbers = weights.iter_mut().zip(gradient).zip(&mut moments.first);
            for ((weight, gradient), first) in numbers {
                *first = MOMENTUM * *first + clip * gradient;
                *weight -= rate * *first;
            }
        }
    }
}

#[derive(Clone, Copy)]
struct AdamUpdate {
    clip: f32,
    step_size: f32,
    epsilon: f32,
}

struct Adam<'a> {
    update: AdamUpdate,
    weights: &'a mut [f32],
    gradient: &'a [f32],
    first: &'a mut [f32],
    second: &'a mut [f32],
}

impl Kernel for Adam<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let AdamUpdate {
            clip,
            step_size,
            epsilon,
        } = self.update;
        let moments = self.first.iter_mut().zip(self.second);
        let numbers = self.weights.iter_mut().zip(self.gradient).zip(moments);
        for ((weight, gradient), (first, second)) in numbers {
            let gradient = gradient * clip;
            *first = BETA_1 * *first + (1.0 - BETA_1) * gradient;
            *second = BETA_2 * *second + (1.0 - BETA_2) * gradient * gradient;
            *weight -= step_size * *first / (second.sqrt() + epsilon);
        }
    }
}

/// Euclidean length, summed in float64 in an order that does not depend on threads.
fn length(x: &[f32]) -> f64 {
    let squares: Vec<f64> = x
        .par_chunks(CHUNK)
        .map(|x| {
            let mut lanes = [0.0f64; 8];
            for x in x.chunks(8) {
                for (lane, x) in lanes.iter_mut().zip(x) {
                    *lane += f64::from(*x) * f64::from(*x);
                }
            }
            lanes.iter().sum()
        })
        .collect();
    squares.iter().sum::<f64>().sqrt()
}

/// The part of the highest learning rate at `step` of `steps`: it rises linearly over the first
/// tenth, then falls to nothing along half a cosine.
pub(super) fn schedule(step: u64, steps: u64) -> f64 {
    let warm_up = (steps / 10).max(1);
    if step < warm_up {
        return (step + 1) as f64 / warm_up as f64;
    }
    let done = (step - warm_up) as f64 / (steps - warm_up).max(1) as f64;
    0.5 * (1.0 + (std::f64::consts::PI * done.min(1.0)).cos())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Three steps by the formulas of the papers, in float64.
    #[test]
    fn adam_and_sgd_by_the_book() {
        let gradients = [[0.3f32, -0.2], [0.1, 0.4], [-0.5, 0.1]];
        let decayed = [Range { start: 0, end: 1 }];
        let rates = Rates {
            learning_rate: 0.1,
            weight_decay: 0.2,
            decayed: &decayed,
        };
        for kind in [OptimizerKind::AdamW, OptimizerKind::Sgd] {
            let mut weights = [1.0f32, -1.0];
            let mut moments = Moments::new(kind, 2);
            let mut exact = [1.0f64, -1.0];
            let (mut m, mut v) = ([0.0f64; 2], [0.0f64; 2]);
            for (t, gradient) in (1..).zip(&gradients) {
                step(
                    Isa::best(),
                    kind,
                    &rates,
                    &mut weights,
                    gradient,
                    &mut moments,
                );
                for i in 0..2 {
                    let g = f64::from(gradient[i]);
                    if i == 0 {
                        exact[i] -= 0.1 * 0.2 * exact[i];
                    }
                    match kind {
                        OptimizerKind::AdamW => {
                            m[i] = 0.9 * m[i] + 0.1 * g;
                            v[i] = 0.999 * v[i] + 0.001 * g * g;
                            let m = m[i] / (1.0 - 0.9f64.powi(t));
                            let v = v[i] / (1.0 - 0.999f64.powi(t));
                            exact[i] -= 0.1 * m / (v.sqrt() + 1e-8);
                        }
                        OptimizerKind::Sgd => {
                            m[i] = 0.9 * m[i] + g;
                            exact[i] -= 0.1 * m[i];
                        }
                    }
                }
            }
            for (weight, exact) in weights.iter().zip(exact) {
                // 1 − β₂ in float32 is off by 5e-5 of itself, its root in √v by half of that.
                assert!(
                    (f64::from(*weight) - exact).abs() < 1e-5,
                    "{weight} {exact}"
                );
            }
        }
    }

    #[test]
    fn long_gradients_are_shortened() {
        let rates = Rates {
            learning_rate: 1.0,
            weight_decay: 0.0,
            decayed: &[],
        };
        let mut weights = [0.0f32; 2];
        let mut moments = Moments::new(OptimizerKind::Sgd, 2);
        step(
            Isa::best(),
            OptimizerKind::Sgd,
            &rates,
            &mut weights,
            &[30.0, -40.0],
            &mut moments,
        );
        assert!((weights[0] + 0.6).abs() < 1e-6 && (weights[1] - 0.8).abs() < 1e-6);
    }

    #[test]
    fn the_rate_rises_and_falls() {
        let rates: Vec<f64> = (0..100).map(|step| schedule(step, 100)).collect();
        assert_eq!((rates[0], rates[9], rates[10]), (0.1, 1.0, 1.0));
        assert!(rates[10..].is_sorted_by(|a, b| a >= b) && rates[99] > 0.0 && rates[99] < 1e-3);
        assert_eq!(schedule(0, 1), 1.0);
    }
}
