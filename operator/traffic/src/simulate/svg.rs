//! A picture as SVG: lines and words.

use std::fmt::Write as _;

use super::picture::{Anchor, Color, LETTER_HEIGHT, Picture, Shape, WIDTH};

pub(crate) fn svg(picture: &Picture) -> String {
    let height = picture.height();
    let mut text = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" font-family=\"monospace\" font-size=\"{LETTER_HEIGHT}\">\n\
         <rect width=\"{WIDTH}\" height=\"{height}\" fill=\"white\"/>\n"
    );
    for shape in picture.shapes() {
        match shape {
            Shape::Path { points, color, width } => {
                let points: Vec<String> = points.iter().map(|(x, y)| format!("{x:.1},{y:.1}")).collect();
                let (points, color) = (points.join(" "), hex(color));
                let _ = writeln!(
                    text,
                    "<polyline points=\"{points}\" fill=\"none\" stroke=\"{color}\" stroke-width=\"{width}\"/>"
                );
            }
            Shape::Text { at: (x, y), text: words, color, anchor } => {
                let (words, color) = (escaped(&words), hex(color));
                let anchor = match anchor {
                    Anchor::Start => "start",
                    Anchor::Middle => "middle",
                    Anchor::End => "end",
                };
                let _ = writeln!(
                    text,
                    "<text x=\"{x:.1}\" y=\"{y:.1}\" fill=\"{color}\" text-anchor=\"{anchor}\">{words}</text>"
                );
            }
        }
    }
    text + "</svg>\n"
}

fn hex(Color(red, green, blue): Color) -> String {
    format!("#{red:02x}{green:02x}{blue:02x}")
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}
