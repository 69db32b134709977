//! `--sweep OPTION=VALUE,VALUE,…`: one run for each value.

use std::str::FromStr;

use super::options::LayerChoice;
use super::train::Run;

/// An option and the values that are tried.
#[derive(Clone, Debug, PartialEq)]
pub enum Sweep {
    Layer(Vec<LayerChoice>),
    LearningRate(Vec<f64>),
    WeightDecay(Vec<f64>),
    Dropout(Vec<f32>),
    ProjectionWidth(Vec<usize>),
    Seed(Vec<u64>),
}

impl Sweep {
    pub fn name(&self) -> &'static str {
        match self {
            Sweep::Layer(_) => "layer",
            Sweep::LearningRate(_) => "learning-rate",
            Sweep::WeightDecay(_) => "weight-decay",
            Sweep::Dropout(_) => "dropout",
            Sweep::ProjectionWidth(_) => "projection-width",
            Sweep::Seed(_) => "seed",
        }
    }

    /// Whether it is about what the ranker is, not about how it is trained.
    pub fn changes_ranker(&self) -> bool {
        matches!(self, Sweep::Layer(_) | Sweep::ProjectionWidth(_))
    }

    /// The run with each of the values.
    pub fn apply(&self, run: &Run) -> Vec<Run> {
        fn each<T: Copy>(
            run: &Run,
            name: &str,
            values: &[T],
            change: impl Fn(&mut Run, T) -> String,
        ) -> Vec<Run> {
            values
                .iter()
                .map(|&value| {
                    let mut run = run.clone();
                    let said = change(&mut run, value);
                    run.values.push((name.to_string(), said));
                    run
                })
                .collect()
        }
        let name = self.name();
        match self {
            Sweep::Layer(values) => each(run, name, values, |run, value| {
                run.config.layer = value.index(run.config.layers);
                run.config.layer.to_string()
            }),
            Sweep::LearningRate(values) => each(run, name, values, |run, value| {
                run.options.learning_rate = value;
                value.to_string()
            }),
            Sweep::WeightDecay(values) => each(run, name, values, |run, value| {
                run.options.weight_decay = value;
                value.to_string()
            }),
            Sweep::Dropout(values) => each(run, name, values, |run, value| {
                run.options.dropout = value;
                value.to_string()
            }),
            Sweep::ProjectionWidth(values) => each(run, name, values, |run, value| {
                run.config.projection_width = run.config.projection_width.map(|_| value);
                value.to_string()
            }),
            Sweep::Seed(values) => each(run, name, values, |run, value| {
                run.options.seed = value;
                value.to_string()
            }),
        }
    }
}

impl FromStr for Sweep {
    type Err = String;

    fn from_str(text: &str) -> Result<Sweep, String> {
        let (name, values) = text
            .split_once('=')
            .ok_or("give an option and its values, such as layer=12,18,24")?;
        fn parse<T: FromStr>(values: &str) -> Result<Vec<T>, String> {
            values
                .split(',')
                .map(|value| {
                    value
                        .parse()
                        .map_err(|_| format!("`{value}` is no value for it"))
                })
                .collect()
        }
        match name {
            "layer" => parse(values).map(Sweep::Layer),
            "learning-rate" => parse(values).map(Sweep::LearningRate),
            "weight-decay" => parse(values).map(Sweep::WeightDecay),
            "dropout" => parse(values).map(Sweep::Dropout),
            "projection-width" => parse(values).map(Sweep::ProjectionWidth),
            "seed" => parse(values).map(Sweep::Seed),
            _ => Err(
                "sweeps go over layer, learning-rate, weight-decay, dropout, projection-width and seed"
                    .to_string(),
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sweeps_are_read_and_refused() {
        let layers = Sweep::Layer(vec![LayerChoice::Index(12), LayerChoice::Fraction(0.6)]);
        assert_eq!("layer=12,0.6".parse(), Ok(layers));
        assert_eq!(
            "learning-rate=1e-3".parse(),
            Ok(Sweep::LearningRate(vec![1e-3]))
        );
        for (text, expected) in [
            ("layer", "such as layer=12"),
            ("layer=", "`` is no value"),
            ("layer=1,x", "`x` is no value"),
            ("epochs=3", "sweeps go over"),
        ] {
            let error = text.parse::<Sweep>().unwrap_err();
            assert!(error.contains(expected), "{error}");
        }
    }
}
