//! Options that several commands share, and the types of their values.

use std::str::FromStr;

use clap::Args;

use super::error::CliError;

/// Which model, where it runs, and how the command talks.
#[derive(Args, Clone, Debug)]
pub struct GlobalOptions {
    /// Model: a folder in Hugging Face layout, a .gguf file, or a hub id (owner/name)
    /// [default: SmolLM2-135M-Instruct in the cache folder, where scripts/demo puts it]
    #[arg(
        long,
        short,
        global = true,
        value_name = "MODEL",
        help_heading = "Global options"
    )]
    pub model: Option<String>,

    /// Device: auto, cpu, cuda, cuda:INDEX or emulate
    #[arg(
        long,
        global = true,
        value_name = "DEVICE",
        default_value = "auto",
        help_heading = "Global options"
    )]
    pub device: Device,

    /// Form in which weights are kept: as they are stored (auto), or 16 and 32 bits quantised to 8, as
    /// whole numbers (q8) or, on a GPU, as e4m3 (fp8)
    #[arg(
        long,
        global = true,
        value_name = "DTYPE",
        default_value = "auto",
        help_heading = "Global options"
    )]
    pub dtype: DtypeChoice,

    /// CPU threads [default: as many as the machine runs at once]
    #[arg(
        long,
        global = true,
        value_name = "N",
        allow_negative_numbers = true,
        help_heading = "Global options"
    )]
    pub threads: Option<usize>,

    /// Compute products in float32, weights as they are stored; else, where the processor multiplies
    /// integers fast, activations are rounded to 16 bits, and weights of 16 bits, keys and values to
    /// 15 bits of the greatest of 64
    #[arg(long, global = true, help_heading = "Global options")]
    pub exact: bool,

    /// Print JSON
    #[arg(long, global = true, help_heading = "Global options")]
    pub json: bool,

    /// Say more on standard error
    #[arg(long, short, global = true, help_heading = "Global options")]
    pub verbose: bool,
}

/// Most threads that anybody could mean.
const MAX_THREADS: usize = 4096;

impl GlobalOptions {
    pub fn threads(&self) -> Result<usize, CliError> {
        match self.threads {
            None => Ok(std::thread::available_parallelism().map_or(1, usize::from)),
            Some(threads @ 1..=MAX_THREADS) => Ok(threads),
            Some(threads) => Err(CliError::Usage(format!(
                "--threads must be between 1 and {MAX_THREADS}, not {threads}"
            ))),
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Device {
    Auto,
    Cpu,
    Cuda { index: usize },
    Emulate,
}

impl FromStr for Device {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Device, Self::Err> {
        let index = |text: &str| text.parse().ok();
        match text {
            "auto" => Some(Device::Auto),
            "cpu" => Some(Device::Cpu),
            "cuda" => Some(Device::Cuda { index: 0 }),
            "emulate" => Some(Device::Emulate),
            _ => text
                .strip_prefix("cuda:")
                .and_then(index)
                .map(|index| Device::Cuda { index }),
        }
        .ok_or("give auto, cpu, cuda, cuda:INDEX or emulate")
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DtypeChoice {
    /// As stored.
    Auto,
    /// Weights stored as numbers are quantised to Q8_0.
    Q8,
    /// The same to e4m3 with a scale an output, by the CUDA backend.
    Fp8,
}

impl FromStr for DtypeChoice {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<DtypeChoice, Self::Err> {
        match text {
            "auto" => Ok(DtypeChoice::Auto),
            "q8" => Ok(DtypeChoice::Q8),
            "fp8" => Ok(DtypeChoice::Fp8),
            _ => Err("weights are kept as they are stored (auto) or in eight bits (q8, fp8)"),
        }
    }
}

/// A layer by its number (from 1), or as a fraction of the way up.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum LayerChoice {
    Index(usize),
    Fraction(f64),
}

impl LayerChoice {
    /// The layer's number in a model of so many.
    pub fn index(self, layers: usize) -> usize {
        match self {
            LayerChoice::Index(index) => index,
            LayerChoice::Fraction(fraction) => ((layers as f64 * fraction).round() as usize).max(1),
        }
    }
}

impl FromStr for LayerChoice {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<LayerChoice, Self::Err> {
        const EXPECTED: &str =
            "give a layer's number (1 is the first) or a fraction such as 0.6 (above 0, up to 1.0)";
        if text.contains('.') {
            let fraction = text.parse().map_err(|_| EXPECTED)?;
            match fraction > 0.0 && fraction <= 1.0 {
                true => Ok(LayerChoice::Fraction(fraction)),
                false => Err(EXPECTED),
            }
        } else {
            match text.parse() {
                Ok(index) if index > 0 => Ok(LayerChoice::Index(index)),
                _ => Err(EXPECTED),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_by_name() {
        for (text, device) in [
            ("auto", Device::Auto),
            ("cpu", Device::Cpu),
            ("cuda", Device::Cuda { index: 0 }),
            ("cuda:3", Device::Cuda { index: 3 }),
            ("emulate", Device::Emulate),
        ] {
            assert_eq!(text.parse(), Ok(device));
        }
        for text in ["", "gpu", "cuda:", "cuda:-1", "cuda:x", "CPU"] {
            assert!(text.parse::<Device>().is_err(), "{text}");
        }
    }

    #[test]
    fn layers_by_number_and_fraction() {
        let index = |text: &str| text.parse::<LayerChoice>().map(|layer| layer.index(30));
        for (text, expected) in [
            ("18", 18),
            ("0.6", 18),
            ("1.0", 30),
            ("0.001", 1),
            ("31", 31),
            (".5", 15),
        ] {
            assert_eq!(index(text), Ok(expected), "{text}");
        }
        for text in [
            "0", "-1", "0.0", "1.5", "-0.5", "nan", "NaN.", "", "inf", "x",
        ] {
            assert!(index(text).is_err(), "{text}");
        }
    }
}
