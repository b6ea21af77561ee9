//! Fleets and pods from CSV files in the columns of Alibaba's openb traces, found by their names; a column that is not
//! there is empty.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use anyhow::Context as _;
use berth_protocol::limits::{GPUS_PER_NODE_MAX, PODS_PER_NODE_MAX};

use crate::core::schedule::problem::{Device, Room, Shape, Size};

/// Device models by number.
#[derive(Debug, Default)]
pub struct Models(Vec<String>);

impl Models {
    pub fn number(&mut self, name: &str) -> usize {
        self.0.iter().position(|known| known == name).unwrap_or_else(|| {
            self.0.push(name.to_owned());
            self.0.len() - 1
        })
    }

    fn known(&self, name: &str) -> Option<usize> {
        self.0.iter().position(|known| known == name)
    }
}

/// A pod of the list; times in seconds.
#[derive(Debug, Clone)]
pub struct Pod {
    pub shape: Shape,
    pub duration: Option<f64>,
}

/// A line of a file, its cells by column.
struct Line<'a> {
    file: &'a str,
    number: usize,
    columns: &'a BTreeMap<String, usize>,
    cells: Vec<String>,
}

impl Line<'_> {
    fn text(&self, column: &str) -> &str {
        self.columns.get(column).and_then(|at| self.cells.get(*at)).map_or("", |cell| cell.trim())
    }

    /// The number in a column; nothing where it is empty. Openb writes some whole numbers as `460.0`.
    fn number(&self, column: &str) -> anyhow::Result<Option<f64>> {
        let text = self.text(column);
        if text.is_empty() {
            return Ok(None);
        }
        let number: f64 = text.parse().ok().filter(|n: &f64| n.is_finite()).with_context(|| {
            format!("{}:{}: column `{column}`: `{text}` is not a number", self.file, self.number)
        })?;
        Ok(Some(number))
    }

    fn amount(&self, column: &str, most: u64) -> anyhow::Result<u64> {
        let number = self.number(column)?.unwrap_or(0.0);
        let fits = number >= 0.0 && number.fract() == 0.0 && number <= most as f64;
        anyhow::ensure!(
            fits,
            "{}:{}: column `{column}`: `{}` is not a whole number from 0 to {most}",
            self.file,
            self.number,
            self.text(column)
        );
        Ok(number as u64)
    }
}

/// The cells of a line; those in quotes may hold commas.
fn cells(line: &str) -> Vec<String> {
    let mut cells = vec![String::new()];
    let mut quoted = false;
    for c in line.chars() {
        match c {
            '"' => quoted = !quoted,
            ',' if !quoted => cells.push(String::new()),
            c => {
                if let Some(cell) = cells.last_mut() {
                    cell.push(c);
                }
            }
        }
    }
    cells
}

fn read<T>(
    path: &Path,
    known: &[&str],
    mut row: impl FnMut(&Line<'_>) -> anyhow::Result<T>,
) -> anyhow::Result<Vec<T>> {
    let file = path.display().to_string();
    let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {file}"))?;
    let mut lines = text.trim_start_matches('\u{feff}').lines().enumerate();
    let header =
        lines.next().with_context(|| format!("{file} is empty: its first line names the columns"))?.1;
    let names = cells(header);
    let columns: BTreeMap<String, usize> =
        names.iter().enumerate().map(|(i, name)| (name.trim().to_owned(), i)).collect();
    anyhow::ensure!(
        known.iter().any(|name| columns.contains_key(*name)),
        "{file}:1: none of the columns {} is there",
        known.join(", ")
    );
    let mut rows = Vec::new();
    for (i, line) in lines.filter(|(_, line)| !line.trim().is_empty()) {
        let line = Line { file: &file, number: i + 1, columns: &columns, cells: cells(line) };
        anyhow::ensure!(
            line.cells.len() <= names.len(),
            "{file}:{}: {} cells, and the first line names {} columns",
            i + 1,
            line.cells.len(),
            names.len()
        );
        rows.push(row(&line)?);
    }
    anyhow::ensure!(!rows.is_empty(), "{file} has no lines but its first");
    Ok(rows)
}

const AMOUNT_MAX: u64 = 1 << 40;

pub fn nodes(path: &Path, models: &mut Models) -> anyhow::Result<Vec<Room>> {
    read(path, &["cpu_milli", "memory_mib", "gpu", "model"], |line| {
        let cpu = line.amount("cpu_milli", AMOUNT_MAX)?;
        let memory = line.amount("memory_mib", AMOUNT_MAX >> 10)? << 20;
        let devices = line.amount("gpu", GPUS_PER_NODE_MAX as u64)? as usize;
        let gpu_memory = line.amount("gpu_memory_mib", AMOUNT_MAX >> 20)? << 20;
        let model = models.number(line.text("model"));
        Ok(room(cpu, memory, vec![(model, gpu_memory); devices]))
    })
}

/// An empty node.
pub fn room(cpu_milli: u64, memory_bytes: u64, devices: Vec<(usize, u64)>) -> Room {
    let device = |(model, memory_bytes)| Device { usable: true, model, milli: 1000, memory_bytes };
    Room {
        open: true,
        cpu_milli,
        memory_bytes,
        disk_bytes: u64::MAX >> 1,
        slots: PODS_PER_NODE_MAX,
        devices: devices.into_iter().map(device).collect(),
        size: Size { cpu_milli, memory_bytes },
    }
}

pub fn pods(path: &Path, models: &Models) -> anyhow::Result<Vec<Pod>> {
    read(path, &["cpu_milli", "memory_mib", "num_gpu", "gpu_milli"], |line| {
        let gpus = line.amount("num_gpu", GPUS_PER_NODE_MAX as u64)? as usize;
        let milli = match (gpus, line.number("gpu_milli")?) {
            (0, _) => 0,
            (1, Some(_)) => (line.amount("gpu_milli", AMOUNT_MAX)?.clamp(1, 1000)) as u32,
            _ => 1000,
        };
        let spec = line.text("gpu_spec");
        // A model that the fleet lacks stays a wish that nothing fulfils.
        let wanted = || spec.split('|').filter_map(|name| models.known(name.trim())).collect::<BTreeSet<_>>();
        let started = line.number("scheduled_time")?.or(line.number("creation_time")?);
        let duration = line.number("deletion_time")?.map(|end| end - started.unwrap_or(0.0));
        Ok(Pod {
            shape: Shape {
                cpu_milli: line.amount("cpu_milli", AMOUNT_MAX)?,
                memory_bytes: line.amount("memory_mib", AMOUNT_MAX >> 10)? << 20,
                disk_bytes: 0,
                gpus,
                gpu_milli: milli,
                gpu_memory_bytes: line.amount("gpu_memory_mib", AMOUNT_MAX >> 20)? << 20,
                models: (gpus > 0 && !spec.is_empty()).then(wanted),
            },
            duration,
        })
    })
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    fn file(text: &str) -> tempfile::NamedTempFile {
        let mut file = tempfile::NamedTempFile::new().expect("a temporary file");
        file.write_all(text.as_bytes()).expect("written");
        file
    }

    #[test]
    fn columns_are_found_by_name_and_missing_ones_are_empty() {
        let mut models = Models::default();
        let fleet = file("model,gpu,cpu_milli,extra,memory_mib\nT4,2,8000,x,1024\n\"A,10\",1,4000,,512\n");
        let rooms = nodes(fleet.path(), &mut models).expect("read");
        assert_eq!((rooms[0].devices.len(), rooms[0].cpu_milli, rooms[0].memory_bytes), (2, 8000, 1 << 30));
        assert_eq!(rooms[1].devices[0].model, 1);
        let list = file("num_gpu,cpu_milli,gpu_spec\n1,500,T4|V100\n0,250,\n1,100,H100\n");
        let pods = pods(list.path(), &models).expect("read");
        assert_eq!((pods[0].shape.gpu_milli, pods[0].shape.memory_bytes), (1000, 0));
        assert_eq!(pods[0].shape.models, Some(BTreeSet::from([0])));
        assert_eq!((pods[1].shape.gpus, pods[1].shape.models.clone()), (0, None));
        assert_eq!(pods[2].shape.models, Some(BTreeSet::new()), "nothing has an H100");
    }

    #[test]
    fn errors_name_line_and_column() {
        let check = |text: &str, wanted: &str| {
            let list = file(text);
            let error = pods(list.path(), &Models::default()).expect_err("refused").to_string();
            assert!(error.ends_with(wanted), "{error}");
        };
        check("cpu_milli,num_gpu\n1000,0\n2x,1\n", ":3: column `cpu_milli`: `2x` is not a number");
        check(
            "cpu_milli\n-5\n",
            ":2: column `cpu_milli`: `-5` is not a whole number from 0 to 1099511627776",
        );
        check("num_gpu\n65\n", ":2: column `num_gpu`: `65` is not a whole number from 0 to 64");
        check("a,b\n1,2\n", ":1: none of the columns cpu_milli, memory_mib, num_gpu, gpu_milli is there");
        check("cpu_milli\n1,2\n", ":2: 2 cells, and the first line names 1 columns");
        check("cpu_milli\n", " has no lines but its first");
    }
}
