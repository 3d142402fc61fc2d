//! A picture as PNG: lines with soft edges, and letters of a bitmap font.

use std::convert::Infallible;

use anyhow::Context as _;
use embedded_graphics::Drawable as _;
use embedded_graphics::mono_font::MonoTextStyle;
use embedded_graphics::mono_font::iso_8859_1::FONT_9X15;
use embedded_graphics::pixelcolor::{Rgb888, RgbColor as _};
use embedded_graphics::prelude::{DrawTarget, OriginDimensions, Pixel, Point, Size};
use embedded_graphics::text::{Alignment, Text};

use super::picture::{Anchor, Color, Picture, Shape, WIDTH};

pub(crate) fn png(picture: &Picture) -> anyhow::Result<Vec<u8>> {
    let mut canvas = Canvas::new(WIDTH as u32, picture.height() as u32);
    for shape in picture.shapes() {
        match shape {
            Shape::Path { points, color, width } => {
                points.windows(2).for_each(|ends| canvas.line(ends[0], ends[1], color, width));
            }
            Shape::Text { at, text, color, anchor } => canvas.text(at, &text, color, anchor),
        }
    }
    canvas.encode().context("the picture cannot be made a PNG")
}

struct Canvas {
    width: u32,
    height: u32,
    /// Red, green and blue, row by row.
    pixels: Vec<u8>,
}

impl Canvas {
    fn new(width: u32, height: u32) -> Self {
        Self { width, height, pixels: vec![255; 3 * (width * height) as usize] }
    }

    /// `cover`: how much of the pixel, 0 to 1.
    fn blend(&mut self, (x, y): (i64, i64), Color(red, green, blue): Color, cover: f64) {
        if !(0..i64::from(self.width)).contains(&x) || !(0..i64::from(self.height)).contains(&y) {
            return;
        }
        let at = 3 * (y * i64::from(self.width) + x) as usize;
        for (pixel, color) in self.pixels[at..at + 3].iter_mut().zip([red, green, blue]) {
            *pixel = (f64::from(*pixel) * (1.0 - cover) + f64::from(color) * cover).round() as u8;
        }
    }

    /// A pixel is covered by how near its centre is to the line.
    fn line(&mut self, from: (f64, f64), to: (f64, f64), color: Color, width: f64) {
        let reach = width / 2.0 + 1.0;
        let range = |one: f64, other: f64| {
            ((one.min(other) - reach).floor() as i64, (one.max(other) + reach).ceil() as i64)
        };
        let ((left, right), (top, bottom)) = (range(from.0, to.0), range(from.1, to.1));
        let along = (to.0 - from.0, to.1 - from.1);
        let length = (along.0 * along.0 + along.1 * along.1).max(1e-9);
        for y in top..=bottom {
            for x in left..=right {
                let offset = (x as f64 + 0.5 - from.0, y as f64 + 0.5 - from.1);
                let part = ((offset.0 * along.0 + offset.1 * along.1) / length).clamp(0.0, 1.0);
                let distance = (offset.0 - part * along.0).hypot(offset.1 - part * along.1);
                let cover = (width / 2.0 + 0.5 - distance).clamp(0.0, 1.0);
                if cover > 0.0 {
                    self.blend((x, y), color, cover);
                }
            }
        }
    }

    fn text(&mut self, (x, y): (f64, f64), text: &str, Color(red, green, blue): Color, anchor: Anchor) {
        let style = MonoTextStyle::new(&FONT_9X15, Rgb888::new(red, green, blue));
        let alignment = match anchor {
            Anchor::Start => Alignment::Left,
            Anchor::Middle => Alignment::Center,
            Anchor::End => Alignment::Right,
        };
        let Ok(_) = Text::with_alignment(text, Point::new(x as i32, y as i32), style, alignment).draw(self);
    }

    fn encode(&self) -> Result<Vec<u8>, png::EncodingError> {
        let mut bytes = vec![];
        let mut encoder = png::Encoder::new(&mut bytes, self.width, self.height);
        encoder.set_color(png::ColorType::Rgb);
        encoder.set_depth(png::BitDepth::Eight);
        let mut writer = encoder.write_header()?;
        writer.write_image_data(&self.pixels)?;
        writer.finish()?;
        Ok(bytes)
    }
}

impl OriginDimensions for Canvas {
    fn size(&self) -> Size {
        Size::new(self.width, self.height)
    }
}

impl DrawTarget for Canvas {
    type Color = Rgb888;
    type Error = Infallible;

    fn draw_iter<I: IntoIterator<Item = Pixel<Rgb888>>>(&mut self, pixels: I) -> Result<(), Infallible> {
        for Pixel(at, color) in pixels {
            let color = Color(color.r(), color.g(), color.b());
            self.blend((i64::from(at.x), i64::from(at.y)), color, 1.0);
        }
        Ok(())
    }
}
