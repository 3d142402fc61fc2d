//! A picture of panels below each other over the same time, as lines and words: svg.rs writes them, png.rs paints them.

/// The width of a picture, in pixels.
pub(super) const WIDTH: f64 = 1200.0;
const PANEL: f64 = 200.0;
const GAP: f64 = 46.0;
const TOP: f64 = 40.0;
const LEFT: f64 = 80.0;
const RIGHT: f64 = 24.0;
/// The font's: that of the PNG, which has one size.
const LETTER: f64 = 9.0;
pub(super) const LETTER_HEIGHT: f64 = 15.0;

#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Color(pub(crate) u8, pub(crate) u8, pub(crate) u8);

/// Told apart by people who see few colours too (Okabe and Ito).
pub(crate) const BLUE: Color = Color(0, 114, 178);
pub(crate) const ORANGE: Color = Color(213, 94, 0);
pub(crate) const GREEN: Color = Color(0, 158, 115);
pub(crate) const GREY: Color = Color(110, 110, 110);
const BLACK: Color = Color(30, 30, 30);
const FAINT: Color = Color(225, 225, 225);

pub(crate) struct Picture {
    pub(crate) title: String,
    pub(crate) panels: Vec<Panel>,
    /// Seconds from left to right.
    pub(crate) length: f64,
}

pub(crate) struct Panel {
    pub(crate) title: String,
    pub(crate) lines: Vec<Line>,
    /// Horizontal lines to be compared with, and their names.
    pub(crate) marks: Vec<(f64, String)>,
}

pub(crate) struct Line {
    pub(crate) name: String,
    pub(crate) color: Color,
    /// (seconds, value); interrupted where there is no value.
    pub(crate) points: Vec<(f64, Option<f64>)>,
    /// Whether a value holds until the next one.
    pub(crate) stairs: bool,
}

/// What is drawn, in pixels from the upper left.
pub(super) enum Shape {
    Path {
        points: Vec<(f64, f64)>,
        color: Color,
        width: f64,
    },
    /// `at`: where the text's base line begins, ends or has its middle.
    Text {
        at: (f64, f64),
        text: String,
        color: Color,
        anchor: Anchor,
    },
}

#[derive(Clone, Copy)]
pub(super) enum Anchor {
    Start,
    Middle,
    End,
}

impl Picture {
    pub(super) fn height(&self) -> f64 {
        TOP + self.panels.len() as f64 * (PANEL + GAP)
    }

    pub(super) fn shapes(&self) -> Vec<Shape> {
        let mut shapes = vec![Shape::Text {
            at: (LEFT, 24.0),
            text: self.title.clone(),
            color: BLACK,
            anchor: Anchor::Start,
        }];
        for (at, panel) in self.panels.iter().enumerate() {
            let top = TOP + at as f64 * (PANEL + GAP) + LETTER_HEIGHT + 4.0;
            Frame { top, length: self.length, highest: panel.highest() }.draw(panel, &mut shapes);
        }
        shapes
    }
}

impl Panel {
    fn highest(&self) -> f64 {
        let values = self.lines.iter().flat_map(|line| line.points.iter().filter_map(|point| point.1));
        let marks = self.marks.iter().map(|mark| mark.0);
        values.chain(marks).fold(0.0, f64::max).max(1e-3) * 1.05
    }
}

/// Where a panel's values are.
struct Frame {
    top: f64,
    length: f64,
    highest: f64,
}

impl Frame {
    fn bottom(&self) -> f64 {
        self.top + PANEL - LETTER_HEIGHT
    }

    fn x(&self, seconds: f64) -> f64 {
        LEFT + (WIDTH - LEFT - RIGHT) * (seconds / self.length).clamp(0.0, 1.0)
    }

    fn y(&self, value: f64) -> f64 {
        self.bottom() - (self.bottom() - self.top) * (value / self.highest).clamp(0.0, 1.0)
    }

    fn draw(&self, panel: &Panel, shapes: &mut Vec<Shape>) {
        self.axes(shapes);
        self.names(panel, shapes);
        for (value, _) in &panel.marks {
            let points = vec![(self.x(0.0), self.y(*value)), (self.x(self.length), self.y(*value))];
            shapes.push(Shape::Path { points, color: GREY, width: 1.0 });
        }
        for line in &panel.lines {
            let paths = self.paths(line).into_iter();
            shapes.extend(paths.map(|points| Shape::Path { points, color: line.color, width: 1.8 }));
        }
    }

    fn axes(&self, shapes: &mut Vec<Shape>) {
        let text = |at, text, anchor| Shape::Text { at, text, color: BLACK, anchor };
        for value in ticks(self.highest, 4.0) {
            let y = self.y(value);
            let points = vec![(LEFT, y), (WIDTH - RIGHT, y)];
            shapes.push(Shape::Path { points, color: FAINT, width: 1.0 });
            shapes.push(text((LEFT - 8.0, y + 5.0), number(value), Anchor::End));
        }
        let (unit, name) = if self.length > 3.0 * 3600.0 { (3600.0, "h") } else { (60.0, "min") };
        for value in ticks(self.length / unit, 12.0) {
            let (x, bottom) = (self.x(value * unit), self.bottom());
            shapes.push(Shape::Path {
                points: vec![(x, bottom), (x, bottom + 5.0)],
                color: BLACK,
                width: 1.0,
            });
            let label = if value == 0.0 { format!("0 {name}") } else { number(value) };
            shapes.push(text((x, bottom + 5.0 + LETTER_HEIGHT), label, Anchor::Middle));
        }
        let points = vec![(LEFT, self.top), (LEFT, self.bottom()), (WIDTH - RIGHT, self.bottom())];
        shapes.push(Shape::Path { points, color: BLACK, width: 1.0 });
    }

    /// The panel's title, and what its lines are.
    fn names(&self, panel: &Panel, shapes: &mut Vec<Shape>) {
        let mut x = LEFT;
        let lines = panel.lines.iter().map(|line| (line.name.as_str(), line.color));
        let marks = panel.marks.iter().map(|(_, name)| (name.as_str(), GREY));
        for (name, color) in [(panel.title.as_str(), BLACK)].into_iter().chain(lines).chain(marks) {
            let at = (x, self.top - 5.0);
            shapes.push(Shape::Text { at, text: name.to_string(), color, anchor: Anchor::Start });
            x += LETTER * (name.chars().count() as f64 + 3.0);
        }
    }

    /// A path for each stretch that has values.
    fn paths(&self, line: &Line) -> Vec<Vec<(f64, f64)>> {
        let (mut paths, mut path) = (vec![], Vec::<(f64, f64)>::new());
        for &(seconds, value) in &line.points {
            let Some(value) = value else {
                paths.push(std::mem::take(&mut path));
                continue;
            };
            let point = (self.x(seconds), self.y(value));
            if let Some(&(_, y)) = path.last().filter(|_| line.stairs) {
                path.push((point.0, y));
            }
            path.push(point);
        }
        paths.push(path);
        paths.retain(|path| path.len() > 1);
        paths
    }
}

/// Round numbers from 0 on, about so many.
fn ticks(highest: f64, count: f64) -> impl Iterator<Item = f64> {
    let rough = highest / count;
    let magnitude = 10f64.powf(rough.log10().floor());
    let step =
        [1.0, 2.0, 5.0, 10.0].into_iter().find(|step| step * magnitude >= rough).unwrap_or(10.0) * magnitude;
    (0..).map(move |at| f64::from(at) * step).take_while(move |value| *value <= highest)
}

/// Without zeros at its end.
fn number(value: f64) -> String {
    let text = format!("{value:.3}");
    text.trim_end_matches('0').trim_end_matches('.').to_string()
}

#[cfg(test)]
mod tests {
    use super::super::png::png;
    use super::super::svg::svg;
    use super::*;

    fn picture() -> Picture {
        let line = |name: &str, color, stairs| Line {
            name: name.into(),
            color,
            points: vec![
                (0.0, Some(1.0)),
                (1800.0, Some(3.0)),
                (2400.0, None),
                (3000.0, Some(2.0)),
                (3600.0, Some(4.0)),
            ],
            stairs,
        };
        let marks = vec![(3.5, "goal 3.5 s".to_string())];
        let panels = vec![
            Panel { title: "requests/s".into(), lines: vec![line("all", GREY, false)], marks: vec![] },
            Panel { title: "workers <&>".into(), lines: vec![line("ours", BLUE, true)], marks },
        ];
        Picture { title: "an hour".into(), panels, length: 3600.0 }
    }

    #[test]
    fn a_picture_is_lines_and_words() {
        insta::assert_snapshot!(svg(&picture()));
    }

    #[test]
    fn a_png_has_the_same_size_and_colours() {
        let bytes = png(&picture()).unwrap();
        let decoder = ::png::Decoder::new(std::io::Cursor::new(bytes));
        let mut reader = decoder.read_info().unwrap();
        let mut pixels = vec![0; reader.output_buffer_size().unwrap()];
        let info = reader.next_frame(&mut pixels).unwrap();
        assert_eq!((f64::from(info.width), f64::from(info.height)), (WIDTH, picture().height()));
        let blue = pixels.chunks(3).filter(|pixel| i32::from(pixel[2]) > i32::from(pixel[0]) + 100).count();
        assert!(blue > 500, "{blue} pixels of the line and its name");
    }

    #[test]
    fn ticks_are_round_numbers() {
        let of = |highest, count| ticks(highest, count).map(number).collect::<Vec<_>>().join(" ");
        assert_eq!(of(0.9, 4.0), "0 0.5");
        assert_eq!(of(24.0, 12.0), "0 2 4 6 8 10 12 14 16 18 20 22 24");
        assert_eq!(of(130.0, 4.0), "0 50 100");
    }
}
