//! What choosing by a score is worth: expected labels of the chosen one of n candidates, over all
//! subsets of n of a pool, in closed form.

/// ln C(n, k) for all k ≤ n ≤ pool, from a table of ln n!.
struct LogBinomials(Vec<f64>);

impl LogBinomials {
    fn new(pool: usize) -> Self {
        let mut sum = 0.0;
        let logs = (0..=pool).map(|n| {
            sum += (n.max(1) as f64).ln();
            sum
        });
        LogBinomials(logs.collect())
    }

    /// C(a, n − 1) / C(b, n), zero where there is no such choice.
    fn ratio(&self, a: usize, b: usize, n: usize) -> f64 {
        if a + 1 < n {
            return 0.0;
        }
        let log = |n: usize, k: usize| self.0[n] - self.0[k] - self.0[n - k];
        (log(a, n - 1) - log(b, n)).exp()
    }

    /// C(a, n) / C(b, n)
    fn share(&self, a: usize, b: usize, n: usize) -> f64 {
        if a < n {
            return 0.0;
        }
        (self.0[a] - self.0[a - n] - self.0[b] + self.0[b - n]).exp()
    }
}

/// 1, 2, 4, … and the pool's size.
pub fn powers_of_two(pool: usize) -> Vec<usize> {
    let mut ns: Vec<usize> = std::iter::successors(Some(1), |n| Some(2 * n))
        .take_while(|&n| n < pool)
        .collect();
    ns.push(pool);
    ns
}

/// The expected label of the best-scored of n candidates drawn from the pool without replacement,
/// for each n of `ns` (1 ≤ n ≤ pool).
///
/// With scores sorted, the candidate that r others stand below is the best of C(r, n − 1) of the
/// C(pool, n) subsets. Equal scores share their labels: any of them is chosen as likely as another.
/// Scores must be comparable.
pub fn best_of(scores: &[f32], labels: &[f32], ns: &[usize]) -> Vec<f64> {
    let pool = scores.len();
    let mut order: Vec<usize> = (0..pool).collect();
    order.sort_by(|&a, &b| scores[a].total_cmp(&scores[b]));
    // −0 and 0 are one score, which a total order tells apart; they stand side by side.
    let mut sorted = Vec::with_capacity(pool);
    for tied in order.chunk_by(|&a, &b| scores[a] == scores[b]) {
        let sum: f64 = tied.iter().map(|&i| f64::from(labels[i])).sum();
        sorted.extend(std::iter::repeat_n(sum / tied.len() as f64, tied.len()));
    }
    let binomials = LogBinomials::new(pool);
    ns.iter()
        .map(|&n| {
            let terms = sorted.iter().enumerate();
            terms
                .map(|(below, label)| binomials.ratio(below, pool, n) * label)
                .sum()
        })
        .collect()
}

/// The expected highest label among n candidates drawn from the pool: the oracle's. For labels 0
/// and 1 it is pass@n.
pub fn oracle(labels: &[f32], ns: &[usize]) -> Vec<f64> {
    best_of(labels, labels, ns)
}

/// pass@n of `right` right ones in a pool: 1 − C(pool − right, n) / C(pool, n).
pub fn pass_at(right: usize, pool: usize, n: usize) -> f64 {
    1.0 - LogBinomials::new(pool).share(pool - right, pool, n)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Over every subset, one by one.
    fn by_enumeration(scores: &[f32], labels: &[f32], n: usize) -> f64 {
        let (mut total, mut subsets) = (0.0, 0.0);
        for subset in 0u32..1 << scores.len() {
            if subset.count_ones() as usize != n {
                continue;
            }
            let members = || (0..scores.len()).filter(|i| subset >> i & 1 == 1);
            let best = members().map(|i| scores[i]).fold(f32::MIN, f32::max);
            let tied: Vec<f32> = members()
                .filter(|&i| scores[i] == best)
                .map(|i| labels[i])
                .collect();
            total += f64::from(tied.iter().sum::<f32>()) / tied.len() as f64;
            subsets += 1.0;
        }
        total / subsets
    }

    proptest! {
        #[test]
        fn the_closed_form_is_the_mean_over_all_subsets(
            pool in prop::collection::vec((0u8..6, 0u8..3), 1..11)
        ) {
            let scores: Vec<f32> = pool.iter().map(|(score, _)| f32::from(*score) - 2.0).collect();
            let labels: Vec<f32> = pool.iter().map(|(_, label)| f32::from(*label) / 2.0).collect();
            let ns: Vec<usize> = (1..=pool.len()).collect();
            for (&n, found) in ns.iter().zip(best_of(&scores, &labels, &ns)) {
                prop_assert!((found - by_enumeration(&scores, &labels, n)).abs() < 1e-12);
            }
            for (&n, found) in ns.iter().zip(oracle(&labels, &ns)) {
                prop_assert!((found - by_enumeration(&labels, &labels, n)).abs() < 1e-12);
            }
        }

        #[test]
        fn pass_at_n_is_the_oracle(right in 0usize..50, wrong in 0usize..50, n in 1usize..100) {
            let pool = right + wrong;
            prop_assume!(n <= pool);
            let labels: Vec<f32> = (0..pool).map(|i| if i < right { 1.0 } else { 0.0 }).collect();
            prop_assert!((pass_at(right, pool, n) - oracle(&labels, &[n])[0]).abs() < 1e-9);
        }
    }

    #[test]
    fn ns_end_with_the_pool() {
        assert_eq!(powers_of_two(1), [1]);
        assert_eq!(powers_of_two(32), [1, 2, 4, 8, 16, 32]);
        assert_eq!(powers_of_two(100), [1, 2, 4, 8, 16, 32, 64, 100]);
    }
}
