//! The compiled kernels that `build.rs` put into this binary.

/// A kernel file, compiled for an architecture.
#[derive(Clone, Copy, Debug)]
pub struct Image {
    /// The source's name: `embed` for `kernels/embed.cu`.
    pub file: &'static str,
    /// `sm_90a`, or `compute_80` for PTX.
    pub architecture: &'static str,
    /// `cubin` or `ptx`.
    pub kind: &'static str,
    pub code: &'static [u8],
}

/// Empty in a build without nvcc.
pub const IMAGES: &[Image] = include!(concat!(env!("OUT_DIR"), "/images.rs"));

/// Architectures that this binary has kernels for, in the order of `build.rs`.
pub fn architectures() -> Vec<&'static str> {
    let mut names: Vec<&str> = IMAGES.iter().map(|image| image.architecture).collect();
    names.dedup();
    names
}

impl Image {
    /// Whether its kernels know programmatic dependent launch (`kernels/device.cuh`): one that was
    /// compiled for less than sm_90 does not wait for those before it.
    pub fn waits_for_predecessors(&self) -> bool {
        let number = self.architecture.trim_end_matches('a').split_once('_');
        number.is_some_and(|(_, number)| number.parse().is_ok_and(|number: u32| number >= 90))
    }

    /// Whether a GPU of this compute capability can run it. A cubin runs on its own major version from
    /// its minor on (an `a` on exactly its own); PTX on all newer ones, after the driver compiled it.
    fn runs_on(&self, major: u32, minor: u32) -> bool {
        let Some((_, number)) = self.architecture.split_once('_') else {
            return false;
        };
        let exact = number.ends_with('a');
        let Ok(number) = number.trim_end_matches('a').parse::<u32>() else {
            return false;
        };
        let (own_major, own_minor) = (number / 10, number % 10);
        match self.kind {
            "ptx" => (major, minor) >= (own_major, own_minor),
            _ if exact => (major, minor) == (own_major, own_minor),
            _ => major == own_major && minor >= own_minor,
        }
    }
}

/// The best images for a compute capability, one a kernel file; empty where there are none.
pub fn best_for(major: u32, minor: u32) -> Vec<Image> {
    let mut chosen: Vec<Image> = Vec::new();
    for image in IMAGES.iter().filter(|image| image.runs_on(major, minor)) {
        // Later architectures come later; PTX, the last, only where there is nothing else.
        match chosen.iter_mut().find(|other| other.file == image.file) {
            Some(other) if image.kind == "cubin" => *other = *image,
            Some(_) => {}
            None => chosen.push(*image),
        }
    }
    chosen
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(architecture: &'static str, kind: &'static str) -> Image {
        Image {
            file: "embed",
            architecture,
            kind,
            code: &[],
        }
    }

    #[test]
    fn kernels_for_hopper_and_later_wait_for_their_predecessors() {
        for (architecture, waits) in [
            ("sm_80", false),
            ("sm_89", false),
            ("sm_90a", true),
            ("sm_100a", true),
            ("compute_80", false),
        ] {
            let image = image(architecture, "cubin");
            assert_eq!(image.waits_for_predecessors(), waits, "{architecture}");
        }
    }

    #[test]
    fn images_run_where_nvidia_says() {
        assert!(image("sm_80", "cubin").runs_on(8, 0));
        assert!(image("sm_80", "cubin").runs_on(8, 6));
        assert!(!image("sm_80", "cubin").runs_on(9, 0));
        assert!(!image("sm_89", "cubin").runs_on(8, 6));
        assert!(image("sm_90a", "cubin").runs_on(9, 0));
        assert!(!image("sm_100a", "cubin").runs_on(10, 3));
        assert!(image("sm_100a", "cubin").runs_on(10, 0));
        assert!(image("compute_80", "ptx").runs_on(12, 0));
        assert!(!image("compute_80", "ptx").runs_on(7, 5));
    }

    #[test]
    fn every_gpu_gets_every_kernel_file_once() {
        if IMAGES.is_empty() {
            return;
        }
        let files: std::collections::BTreeSet<_> = IMAGES.iter().map(|image| image.file).collect();
        for (major, minor, best) in [
            (8, 0, "sm_80"),
            (8, 9, "sm_89"),
            (9, 0, "sm_90a"),
            (10, 0, "sm_100a"),
            (12, 0, "compute_80"),
        ] {
            let chosen = best_for(major, minor);
            // One file is for Hopper alone.
            let others = best != "sm_90a" && files.contains("matmul_wgmma");
            assert_eq!(chosen.len() + usize::from(others), files.len());
            // An older nvcc knows fewer architectures; then PTX stands in.
            let built = architectures().contains(&best);
            let expected = if built { best } else { "compute_80" };
            assert!(
                chosen
                    .iter()
                    .all(|i| i.architecture == expected && !i.code.is_empty())
            );
        }
    }
}
