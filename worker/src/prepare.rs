//! `expertmesh-worker prepare`: a checkpoint becomes a packed model, which is mapped instead of read.

use std::collections::BTreeSet;
use std::fs;
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use expertmesh_engine::{DRAWN, PrepareOptions, Prepared, prepare};
use expertmesh_model::error::ModelError;
use expertmesh_model::format::WeightFormat;
use expertmesh_model::threads::compute_threads;
use expertmesh_source::address::Address;
use indicatif::{BinaryBytes, ProgressBar, ProgressStyle};

use crate::process::Fatal;
use crate::source;

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Directory of the checkpoint (config.json, safetensors, tokenizer.json), or hf://ORGANISATION/NAME@REVISION on a hub, of
    /// which only what is packed is drawn; HF_ENDPOINT and HF_TOKEN say which hub, and who asks
    #[arg(long)]
    model: Address,
    /// Directory of the packed model: a new one, or one to go on with or to extend
    #[arg(long, value_name = "PACKED")]
    out: PathBuf,
    /// How weights are held: native (as they are stored), bf16, fp8, int8 or int4
    #[arg(long, default_value_t)]
    weights: WeightFormat,
    /// Of every layer only these experts, as 0-15 or 0,3,8-11; what is there already stays
    #[arg(long, value_name = "LIST", value_parser = Experts::parse)]
    experts: Option<Experts>,
    /// Threads that pack; without it, one per physical core within the CPU quota
    #[arg(long, value_name = "N")]
    threads: Option<NonZeroUsize>,
}

#[derive(Debug, Clone, PartialEq)]
struct Experts(BTreeSet<u32>);

impl Experts {
    /// More experts than any model's layer has.
    const MAX: u32 = 1 << 16;

    fn parse(list: &str) -> Result<Self, String> {
        let number = |text: &str| match text.trim().parse::<u32>() {
            Ok(number) if number < Self::MAX => Ok(number),
            _ => Err(format!("{text:?} is not an expert's number")),
        };
        let mut experts = BTreeSet::new();
        for range in list.split(',') {
            let (first, last) = range.split_once('-').unwrap_or((range, range));
            let (first, last) = (number(first)?, number(last)?);
            if last < first {
                return Err(format!("{range} is empty"));
            }
            experts.extend(first..=last);
        }
        Ok(Self(experts))
    }
}

pub(crate) fn run(args: Args) -> Result<ExitCode, Fatal> {
    crate::process::log();
    // What is drawn is on the disk that has room.
    let source = source::Args { model: args.model, cache: Some(args.out.join(DRAWN)) };
    let source::Found { folder: model, elsewhere: drawn, .. } = source.find()?;
    let options = PrepareOptions {
        weights: args.weights,
        experts: args.experts.map(|Experts(experts)| experts),
        threads: args.threads.map_or_else(compute_threads, NonZeroUsize::get),
        supply: drawn.clone().map(|drawn| drawn as _),
    };
    let start = Instant::now();
    let Prepared { bytes, kept, blobs } = pack(&model, &args.out, &options)?;
    let (size, was_there) = (BinaryBytes(bytes), BinaryBytes(kept));
    println!(
        "{}: {blobs} blobs, {bytes} bytes ({size}, of which {was_there} were there) in {:.1} s",
        args.out.display(),
        start.elapsed().as_secs_f64(),
    );
    if let Some(drawn) = drawn {
        println!("{} of weights were drawn", BinaryBytes(drawn.bytes()));
        drop((options, drawn));
        let folder = args.out.join(DRAWN);
        fs::remove_dir_all(&folder)
            .map_err(|error| Fatal::new("PrepareFailed", format!("{}: {error}", folder.display())))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Packs a model, with a bar that shows how far it is.
pub(crate) fn pack(model: &Path, out: &Path, options: &PrepareOptions) -> Result<Prepared, ModelError> {
    let bar = ProgressBar::new(0);
    let style = ProgressStyle::with_template("packing {bar:40} {bytes}/{total_bytes} {binary_bytes_per_sec}");
    bar.set_style(style.expect("the template is a constant"));
    let prepared = prepare(model, out, options, &|done, total| {
        bar.set_length(total);
        bar.set_position(done);
    });
    bar.finish_and_clear();
    prepared
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn experts_are_numbers_and_ranges() {
        let experts = |list| Experts::parse(list).map(|Experts(experts)| experts.into_iter().collect());
        assert_eq!(experts("0-2,8, 5-5"), Ok(vec![0, 1, 2, 5, 8]));
        assert_eq!(experts("3-1"), Err("3-1 is empty".to_owned()));
        for list in ["", "-1", "1-", "x", "0-99999"] {
            assert!(experts(list).unwrap_err().ends_with("is not an expert's number"), "{list}");
        }
    }
}
