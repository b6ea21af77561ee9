//! The drawing of a simulation: allocation as pods arrive (or as hours pass), and how full the nodes are at the end.

use std::fmt::Write as _;

/// A line of a chart.
pub struct Line {
    pub name: String,
    pub points: Vec<(f64, f64)>,
}

const WIDTH: f64 = 900.0;
const HEIGHT: f64 = 420.0;
const LEFT: f64 = 60.0;
const TOP: f64 = 50.0;
const COLOURS: [&str; 4] = ["#1b6ca8", "#d1622b", "#3a8f5c", "#7a4fa3"];
/// More points than pixels only make the file large.
const POINTS_MAX: usize = 600;
const BARS: usize = 20;

/// `fill`: of each node, from 0 to 1.
pub fn svg(title: &str, along: &str, lines: &[Line], fill: &[f64]) -> String {
    let mut out = String::new();
    let _ = writeln!(
        out,
        r##"<svg xmlns="http://www.w3.org/2000/svg" width="{w}" height="{h}" viewBox="0 0 {w} {h}" font-family="sans-serif" font-size="13" fill="#222">
<rect width="{w}" height="{h}" fill="#fff"/>
<text x="{LEFT}" y="28" font-size="17" font-weight="bold">{title}</text>"##,
        w = WIDTH + 2.0 * LEFT,
        h = 2.0 * HEIGHT + 2.0 * TOP,
        title = escape(title),
    );
    let most = |of: &dyn Fn(&(f64, f64)) -> f64| {
        lines.iter().flat_map(|line| &line.points).map(of).fold(1.0_f64, f64::max)
    };
    let (wide, high) = (most(&|p| p.0), most(&|p| p.1).max(100.0));
    let x = |value: f64| LEFT + value / wide * WIDTH;
    let y = |value: f64| TOP + (HEIGHT - 90.0) * (1.0 - value / high);
    for percent in (0..=100).step_by(20) {
        let at = y(f64::from(percent));
        let _ = writeln!(
            out,
            r##"<path d="M{LEFT} {at:.1}H{:.1}" stroke="#ddd"/><text x="{:.1}" y="{:.1}" text-anchor="end">{percent} %</text>"##,
            LEFT + WIDTH,
            LEFT - 8.0,
            at + 4.0
        );
    }
    let step = nice(wide / 8.0);
    let mut mark = 0.0;
    while mark <= wide {
        let _ = writeln!(
            out,
            r##"<text x="{:.1}" y="{:.1}" text-anchor="middle">{mark}</text>"##,
            x(mark),
            y(0.0) + 20.0
        );
        mark += step;
    }
    let _ = writeln!(
        out,
        r##"<text x="{:.1}" y="{:.1}" text-anchor="middle">{}</text>"##,
        LEFT + WIDTH / 2.0,
        y(0.0) + 42.0,
        escape(along)
    );
    for (i, line) in lines.iter().enumerate() {
        let every = line.points.len().div_ceil(POINTS_MAX).max(1);
        let points: Vec<String> =
            line.points.iter().step_by(every).map(|(a, b)| format!("{:.1},{:.1}", x(*a), y(*b))).collect();
        let colour = COLOURS[i % COLOURS.len()];
        let row = y(0.0) - 16.0 - 20.0 * (lines.len() - 1 - i) as f64;
        let _ = writeln!(
            out,
            r##"<polyline points="{}" fill="none" stroke="{colour}" stroke-width="2"/>
<path d="M{:.1} {:.1}h24" stroke="{colour}" stroke-width="3"/><text x="{:.1}" y="{row:.1}">{}</text>"##,
            points.join(" "),
            LEFT + WIDTH - 230.0,
            row - 4.0,
            LEFT + WIDTH - 200.0,
            escape(&line.name)
        );
    }
    bars(&mut out, fill);
    out + "</svg>\n"
}

/// How many nodes are how full.
fn bars(out: &mut String, fill: &[f64]) {
    let mut counts = [0usize; BARS];
    for full in fill {
        counts[((full * BARS as f64) as usize).min(BARS - 1)] += 1;
    }
    let most = counts.iter().copied().max().unwrap_or(1).max(1) as f64;
    let floor = TOP + 2.0 * HEIGHT - 40.0;
    let tall = HEIGHT - 110.0;
    let _ = writeln!(
        out,
        r##"<text x="{LEFT}" y="{:.1}" font-size="15" font-weight="bold">Nodes by how full they are at the end</text>"##,
        floor - tall - 30.0
    );
    let each = WIDTH / BARS as f64;
    for (i, count) in counts.iter().enumerate() {
        let (left, height) = (LEFT + i as f64 * each, *count as f64 / most * tall);
        let _ = writeln!(
            out,
            r##"<rect x="{:.1}" y="{:.1}" width="{:.1}" height="{height:.1}" fill="#1b6ca8"/><text x="{:.1}" y="{:.1}" text-anchor="middle" font-size="11">{count}</text><text x="{left:.1}" y="{:.1}" text-anchor="middle">{}</text>"##,
            left + 2.0,
            floor - height,
            each - 4.0,
            left + each / 2.0,
            floor - height - 5.0,
            floor + 20.0,
            i * 100 / BARS
        );
    }
    let _ = writeln!(
        out,
        r##"<text x="{:.1}" y="{:.1}" text-anchor="middle">100 %</text>"##,
        LEFT + WIDTH,
        floor + 20.0
    );
}

/// 1, 2 or 5 times a power of ten.
fn nice(step: f64) -> f64 {
    let power = 10_f64.powf(step.max(1e-9).log10().floor());
    let times = step / power;
    power
        * if times <= 1.0 {
            1.0
        } else if times <= 2.0 {
            2.0
        } else if times <= 5.0 {
            5.0
        } else {
            10.0
        }
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}
