//! Line charts, as SVG or PNG.

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Once;

use plotters::coord::Shift;
use plotters::prelude::*;

use crate::tasks::whole_file::{WholeFile, WriteError};

/// Why a chart was not drawn.
#[derive(Debug, thiserror::Error)]
pub enum PlotError {
    #[error("{}: give a plot a name that ends with .svg or .png", path.display())]
    Extension { path: PathBuf },
    #[error("cannot draw {}: {problem}", path.display())]
    Draw { path: PathBuf, problem: String },
    #[error(transparent)]
    Write(#[from] WriteError),
}

/// A line with its name.
#[derive(Clone, Debug)]
pub struct Series {
    pub name: String,
    pub points: Vec<(f64, f64)>,
    /// For each x from and to; empty for none.
    pub band: Vec<(f64, f64, f64)>,
    /// Thin and grey: what the others are held against.
    pub is_reference: bool,
}

impl Series {
    pub fn line(name: &str, points: Vec<(f64, f64)>) -> Series {
        Series {
            name: name.to_string(),
            points,
            band: Vec::new(),
            is_reference: false,
        }
    }
}

#[derive(Clone, Debug)]
pub struct Chart {
    pub title: String,
    pub x: String,
    pub y: String,
    /// Powers of two lie equally far apart along x.
    pub is_logarithmic: bool,
    pub series: Vec<Series>,
}

const SIZE: (u32, u32) = (960, 600);
const FONT: &str = "DejaVu Sans";
/// Colours that people with any kind of sight tell apart (Okabe and Ito).
const COLORS: [RGBColor; 7] = [
    RGBColor(213, 94, 0),
    RGBColor(0, 114, 178),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(230, 159, 0),
    RGBColor(86, 180, 233),
    RGBColor(90, 90, 90),
];

/// Refuses names that no chart can have, before any work.
pub fn check_paths(paths: &[PathBuf]) -> Result<(), PlotError> {
    for path in paths {
        kind(path)?;
    }
    Ok(())
}

#[derive(Clone, Copy, PartialEq)]
enum Kind {
    Svg,
    Png,
}

fn kind(path: &Path) -> Result<Kind, PlotError> {
    let extension = path.extension().unwrap_or_default().to_ascii_lowercase();
    match extension.to_str() {
        Some("svg") => Ok(Kind::Svg),
        Some("png") => Ok(Kind::Png),
        _ => Err(PlotError::Extension {
            path: path.to_path_buf(),
        }),
    }
}

impl Chart {
    /// Draws it into a file, whole or not at all.
    pub fn save(&self, path: &Path) -> Result<(), PlotError> {
        use std::io::Write;
        register_font();
        let problem = |problem: String| PlotError::Draw {
            path: path.to_path_buf(),
            problem,
        };
        let bytes = match kind(path)? {
            Kind::Svg => {
                let mut text = String::new();
                self.draw(&SVGBackend::with_string(&mut text, SIZE).into_drawing_area())
                    .map_err(problem)?;
                text.into_bytes()
            }
            Kind::Png => {
                // Twice as fine as the SVG's unit.
                let (width, height) = (2 * SIZE.0, 2 * SIZE.1);
                let mut pixels = vec![0; (3 * width * height) as usize];
                let backend = BitMapBackend::with_buffer(&mut pixels, (width, height));
                self.draw(&backend.into_drawing_area()).map_err(problem)?;
                png(&pixels, width, height).map_err(|error| problem(error.to_string()))?
            }
        };
        let mut file = WholeFile::create(path)?;
        file.write_all(&bytes)
            .map_err(|source| file.error(source))?;
        Ok(file.finish()?)
    }

    fn draw<B: DrawingBackend>(&self, area: &DrawingArea<B, Shift>) -> Result<(), String> {
        self.try_draw(area).map_err(|error| error.to_string())
    }

    fn try_draw<B: DrawingBackend>(
        &self,
        area: &DrawingArea<B, Shift>,
    ) -> Result<(), DrawingAreaErrorKind<B::ErrorType>> {
        let unit = f64::from(area.dim_in_pixel().0) / f64::from(SIZE.0);
        let px = |size: f64| (size * unit) as i32;
        let font = |size: f64| (FONT, size * unit).into_font();
        area.fill(&WHITE)?;
        let position = |x: f64| if self.is_logarithmic { x.log2() } else { x };
        let points = || self.series.iter().flat_map(|series| &series.points);
        let x_range = range(points().map(|(x, _)| position(*x)), 0.0);
        let bands = self.series.iter().flat_map(|series| &series.band);
        let heights = points().map(|(_, y)| *y);
        let y_range = range(
            heights.chain(bands.flat_map(|(_, low, high)| [*low, *high])),
            0.05,
        );
        let mut chart = ChartBuilder::on(area)
            .margin(px(16.0))
            .caption(&self.title, font(20.0))
            .x_label_area_size(px(44.0))
            .y_label_area_size(px(60.0))
            .build_cartesian_2d(x_range.clone(), y_range)?;
        let label = |x: &f64| match self.is_logarithmic {
            true => format!("{:.0}", x.exp2()),
            false => format!("{x:.0}"),
        };
        // One label for each power of two.
        let labels = match self.is_logarithmic {
            true => x_range.end as usize + 1,
            false => 12,
        };
        chart
            .configure_mesh()
            .light_line_style(TRANSPARENT)
            .bold_line_style(BLACK.mix(0.1))
            .axis_style(BLACK.mix(0.5))
            .label_style(font(14.0))
            .axis_desc_style(font(15.0))
            .x_labels(labels)
            .x_label_formatter(&label)
            .y_label_formatter(&|y| format!("{y:.2}"))
            .x_desc(&self.x)
            .y_desc(&self.y)
            .draw()?;
        for (index, series) in self.series.iter().enumerate() {
            let color = COLORS[index % COLORS.len()];
            let (width, opacity) = if series.is_reference {
                (1.5, 0.75)
            } else {
                (3.0, 1.0)
            };
            let style = color.mix(opacity).stroke_width(px(width) as u32);
            let above = series.band.iter().map(|(x, _, high)| (position(*x), *high));
            let below = series
                .band
                .iter()
                .rev()
                .map(|(x, low, _)| (position(*x), *low));
            let band: Vec<(f64, f64)> = above.chain(below).collect();
            if !band.is_empty() {
                chart.draw_series([Polygon::new(band, color.mix(0.12))])?;
            }
            let line: Vec<(f64, f64)> = series
                .points
                .iter()
                .map(|(x, y)| (position(*x), *y))
                .collect();
            let marks: Vec<_> = match line.len() <= 24 {
                true => line
                    .iter()
                    .map(|&at| Circle::new(at, px(width + 0.5), style.filled()))
                    .collect(),
                false => Vec::new(),
            };
            chart
                .draw_series(LineSeries::new(line, style))?
                .label(&series.name)
                .legend(move |(x, y)| PathElement::new([(x, y), (x + px(22.0), y)], style));
            chart.draw_series(marks)?;
        }
        chart
            .configure_series_labels()
            .position(SeriesLabelPosition::UpperLeft)
            .legend_area_size(px(28.0))
            .margin(px(10.0))
            .background_style(WHITE.mix(0.8))
            .border_style(BLACK.mix(0.2))
            .label_font(font(14.0))
            .draw()?;
        area.present()
    }
}

/// From the least to the greatest, and `room` of that beyond each.
fn range(values: impl Iterator<Item = f64>, room: f64) -> Range<f64> {
    let (low, high) = values
        .filter(|value| value.is_finite())
        .fold((f64::MAX, f64::MIN), |(low, high), value| {
            (low.min(value), high.max(value))
        });
    if low > high {
        return 0.0..1.0;
    }
    let room = ((high - low) * room).max(if high > low { 0.0 } else { 0.5 });
    low - room..high + room
}

/// The only font: what a machine has installed would make two machines' charts differ.
fn register_font() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        // It can only fail for bytes that are no font.
        let _ = plotters::style::register_font(FONT, FontStyle::Normal, dejavu::sans::regular());
    });
}

fn png(pixels: &[u8], width: u32, height: u32) -> Result<Vec<u8>, png::EncodingError> {
    let mut bytes = Vec::new();
    let mut encoder = png::Encoder::new(&mut bytes, width, height);
    encoder.set_color(png::ColorType::Rgb);
    encoder.set_depth(png::BitDepth::Eight);
    let mut writer = encoder.write_header()?;
    writer.write_image_data(pixels)?;
    writer.finish()?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chart(series: Vec<Series>) -> Chart {
        Chart {
            title: "Title".into(),
            x: "candidates".into(),
            y: "accuracy".into(),
            is_logarithmic: true,
            series,
        }
    }

    #[test]
    fn both_forms_are_written_the_same_each_time() {
        let folder = tempfile::tempdir().unwrap();
        let mut series = Series::line("ranker", vec![(1.0, 0.2), (2.0, 0.4), (8.0, 0.5)]);
        series.band = vec![(1.0, 0.1, 0.3), (2.0, 0.3, 0.5), (8.0, 0.4, 0.6)];
        for (name, begin) in [("a.svg", &b"<svg"[..]), ("a.png", b"\x89PNG")] {
            let path = folder.path().join(name);
            chart(vec![series.clone()]).save(&path).unwrap();
            let first = std::fs::read(&path).unwrap();
            assert!(first.starts_with(begin));
            chart(vec![series.clone()]).save(&path).unwrap();
            assert_eq!(first, std::fs::read(&path).unwrap());
        }
        let text = std::fs::read_to_string(folder.path().join("a.svg")).unwrap();
        assert!(text.contains("ranker") && text.contains("candidates") && text.contains("polygon"));
    }

    #[test]
    fn nothing_to_draw_draws_axes() {
        let folder = tempfile::tempdir().unwrap();
        for series in [vec![], vec![Series::line("one", vec![(1.0, 0.5)])]] {
            chart(series).save(&folder.path().join("a.svg")).unwrap();
        }
    }

    #[test]
    fn other_forms_are_refused() {
        let error = check_paths(&["x.svg".into(), "x.jpg".into()])
            .unwrap_err()
            .to_string();
        assert_eq!(
            error,
            "x.jpg: give a plot a name that ends with .svg or .png"
        );
    }
}
