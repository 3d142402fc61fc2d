//! `expertmesh plan`: where a deployment's experts would be, decided as the operator decides it. Needs the model's
//! config.json, and nothing that runs.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, ensure};
use clap::Args;
use expertmesh_decide::placement::{imbalance, place};
use expertmesh_decide::report::ModelShape;
use expertmesh_model::config::model::ModelConfig;
use expertmesh_model::error::ModelError;
use expertmesh_model::expert::ExpertId;
use expertmesh_model::format::WeightFormat;
use expertmesh_model::layout::budget::{KV_BLOCK, KV_CACHE_MIB, Layout, MARGIN};
use expertmesh_model::packed::Index;
use expertmesh_proto::election::elected;
use expertmesh_proto::epoch::Epoch;
use expertmesh_proto::expert_set::ExpertSet;
use expertmesh_proto::placement::{PlacedWorker, Placement};
use expertmesh_proto::slot::Slot;
use indicatif::{DecimalBytes, HumanBytes, HumanDuration};
use k8s_openapi::Resource;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference};

use crate::manifest;
use crate::objects::names::Owner;
use crate::objects::policies::{Around, Surroundings};
use crate::objects::revision::Revision;
use crate::objects::{self, Serving, Size};
use crate::validate::ValidatedDeployment;

#[derive(Args)]
pub(crate) struct Plan {
    /// The ModelDeployment, as YAML.
    file: PathBuf,
    /// Where the image's root lies on this disk: file:///models/m is ROOT/models/m.
    #[arg(long, default_value = "/")]
    root: PathBuf,
    /// With so many workers, whatever the file says.
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=1024))]
    workers: Option<u32>,
    /// What a disk reads, for the time that an expert without a live copy takes to come back.
    #[arg(long, value_name = "MB/S", default_value_t = 1000, value_parser = clap::value_parser!(u32).range(1..))]
    disk: u32,
}

pub(crate) fn run(plan: Plan) -> anyhow::Result<()> {
    let mut deployment = manifest::read(&plan.file)?;
    deployment.desired.workers = plan.workers.unwrap_or(deployment.desired.workers);
    let (copies, workers) = (deployment.desired.min_replicas, deployment.desired.workers);
    ensure!(copies <= workers, "spec.experts.minReplicas ({copies}) must not be above --workers ({workers})");
    let directory = deployment.model.here(&plan.root)?.folder;
    let config =
        ModelConfig::read(&directory).with_context(|| format!("the model at {}", directory.display()))?;
    let weights = held_as(&deployment, &directory, &config)?;
    let shape = shape(&config, weights).with_context(|| format!("the model at {}", directory.display()))?;
    let cache = cache(&config, deployment.max_context_tokens);
    print!("{}", render(&deployment, &shape, weights, (cache, u64::from(plan.disk) * 1_000_000)));
    Ok(())
}

/// The deployment's format, or the only one that a packed model has.
fn held_as(
    deployment: &ValidatedDeployment,
    directory: &Path,
    config: &ModelConfig,
) -> anyhow::Result<WeightFormat> {
    let asked = deployment.weights;
    let Some(packed) = Index::open(directory, config)? else { return Ok(asked) };
    let weights = packed.weights()?;
    ensure!(
        asked == weights || asked == WeightFormat::Native,
        "spec.model.weights ({asked}): the model at {} is packed in {weights}; ask for {weights} or native",
        directory.display()
    );
    Ok(weights)
}

fn shape(config: &ModelConfig, weights: WeightFormat) -> Result<ModelShape, ModelError> {
    Ok(ModelShape {
        first_moe_layer: config.placed_layers()?.start as u32,
        layers: config.layers as u32,
        experts: config.experts() as u32,
        expert_bytes: Layout::Cpu1.expert_bytes(config, weights),
        dense_bytes: Layout::Cpu1.dense_bytes(config, weights),
    })
}

/// The plan as text; a worker's cache of latents has so many bytes, and `disk` is read at so many a second.
fn render(
    deployment: &ValidatedDeployment,
    shape: &ModelShape,
    weights: WeightFormat,
    (cache, disk): (u64, u64),
) -> String {
    let (workers, copies) = (deployment.desired.workers, deployment.desired.min_replicas);
    let slots: Vec<Slot> = Slot::first(workers).collect();
    let target = place(shape, &slots, copies, &BTreeMap::new());
    let all: usize = target.values().map(ExpertSet::len).sum();
    let mut text = format!(
        "{}: {} experts in each of {} layers, on {}, each at least {}\n\n",
        deployment.name,
        shape.experts,
        shape.layers - shape.first_moe_layer,
        counted(workers, "worker"),
        if copies == 1 { "once".into() } else { format!("{copies} times") },
    );
    text += &table(&target, shape, all);
    let held = |set: &ExpertSet| set.len() as u64 * shape.expert_bytes;
    let most = target.values().map(held).max().unwrap_or(0);
    let with_lost = most_with_lost(&target) as u64 * shape.expert_bytes;
    let placed = target.into_iter().map(|(slot, experts)| PlacedWorker {
        slot,
        name: String::new(),
        addresses: vec![],
        experts,
        draining: false,
    });
    let imbalance =
        Placement::new(Epoch::FIRST, placed.collect()).map_or(1.0, |placement| imbalance(&placement));
    let lines = [
        ("weights", weights.to_string()),
        ("numerics", deployment.numerics.to_string()),
        ("copies", format!("{all} of {} (layer, expert) pairs", all as u32 / copies.min(workers))),
        ("dense part", format!("{} on every worker", HumanBytes(shape.dense_bytes))),
        (
            "resident",
            format!(
                "{} in all",
                HumanBytes(all as u64 * shape.expert_bytes + u64::from(workers) * shape.dense_bytes)
            ),
        ),
        ("memory", memory(shape, (most, with_lost), cache)),
        ("disk", disk_of(deployment, shape, with_lost)),
        ("imbalance", format!("{imbalance:.2} (most over mean)")),
        ("recovery", recovery(shape.expert_bytes, most, disk)),
    ];
    text += "\n";
    for (name, line) in lines {
        let _ = writeln!(text, "{name:<11} {line}");
    }
    text += "\nobjects     ";
    text + &objects(deployment).join("\n            ") + "\n"
}

/// The most experts that a worker holds while any one other is lost, whose experts without another copy are elected to the rest.
fn most_with_lost(target: &BTreeMap<Slot, ExpertSet>) -> usize {
    let mut copies: BTreeMap<ExpertId, usize> = BTreeMap::new();
    for expert in target.values().flat_map(ExpertSet::iter) {
        *copies.entry(expert).or_default() += 1;
    }
    let with = |lost: Slot| {
        let mut held: BTreeMap<Slot, usize> =
            target.iter().filter(|(slot, _)| **slot != lost).map(|(slot, set)| (*slot, set.len())).collect();
        for expert in target[&lost].iter().filter(|expert| copies[expert] == 1) {
            let taker = elected(expert, target.keys().copied().filter(|slot| *slot != lost));
            taker.into_iter().for_each(|slot| *held.entry(slot).or_default() += 1);
        }
        held.into_values().max().unwrap_or(0)
    };
    target.keys().map(|lost| with(*lost)).max().unwrap_or(0)
}

/// A limit that a worker needs: all that it holds, with what it takes over from one that is lost.
fn memory(shape: &ModelShape, (most, with_lost): (u64, u64), cache: u64) -> String {
    let taken = with_lost.saturating_sub(most);
    let all = shape.dense_bytes + most + taken + cache + MARGIN;
    format!(
        "limits: {{memory: {}Mi}} for each worker: dense part, {} of experts, {} more where a worker is lost, {} of cache, {} for the rest",
        all.div_ceil(1 << 20),
        HumanBytes(most),
        HumanBytes(taken),
        HumanBytes(cache),
        HumanBytes(MARGIN),
    )
}

/// What a worker's cache on disk takes, where it has one.
fn disk_of(deployment: &ValidatedDeployment, shape: &ModelShape, with_lost: u64) -> String {
    if !deployment.model.is_packed_on_disk() {
        return "nothing: the model is where its processes read it".into();
    }
    let all = u64::from(shape.layers - shape.first_moe_layer) * u64::from(shape.experts) * shape.expert_bytes;
    format!(
        "model.cache: {{size: {}Mi}} for each worker, with what it takes over where one is lost; {}Mi hold all of the model",
        (shape.dense_bytes + with_lost).div_ceil(1 << 20),
        (shape.dense_bytes + all).div_ceil(1 << 20),
    )
}

/// Bytes of the cache that a worker makes: as many as it makes by itself, or as one sequence needs that fills its context.
fn cache(config: &ModelConfig, max_context: Option<u32>) -> u64 {
    let context = max_context.map_or(config.max_positions, |context| context as usize);
    Layout::Cpu1.kv_bytes(config, context.next_multiple_of(KV_BLOCK)).max(KV_CACHE_MIB << 20)
}

fn recovery(expert: u64, worker: u64, disk: u64) -> String {
    format!(
        "without a live copy {} for one expert of one layer, {} for a whole worker's, from a disk of {}/s",
        time(expert, disk),
        time(worker, disk),
        DecimalBytes(disk)
    )
}

fn time(bytes: u64, disk: u64) -> String {
    let time = Duration::from_secs_f64(bytes as f64 / disk as f64);
    if time < Duration::from_secs(60) { format!("{time:.1?}") } else { HumanDuration(time).to_string() }
}

/// One row for every run of layers in which a worker holds the same experts.
fn table(target: &BTreeMap<Slot, ExpertSet>, shape: &ModelShape, all: usize) -> String {
    let mut rows = vec![["WORKER", "LAYERS", "EXPERTS", "RESIDENT", "SHARE"].map(String::from)];
    for (slot, set) in target {
        let resident = HumanBytes(set.len() as u64 * shape.expert_bytes + shape.dense_bytes).to_string();
        let share = format!("{:.1} %", 100.0 * set.len() as f64 / all.max(1) as f64);
        let mut first = [slot.to_string(), resident, share];
        for (layers, experts) in runs(set) {
            let [slot, resident, share] = std::mem::take(&mut first);
            rows.push([slot, layers, experts, resident, share]);
        }
    }
    let width = |column: usize| rows.iter().map(|row| row[column].len()).max().unwrap_or(0);
    let widths = [0, 1, 2, 3, 4].map(width);
    let line = |row: &[String; 5]| {
        let cells = row.iter().zip(widths).map(|(cell, width)| format!("{cell:<width$}"));
        cells.collect::<Vec<_>>().join("  ").trim_end().to_string() + "\n"
    };
    rows.iter().map(line).collect()
}

/// Layers that follow each other with the same experts: ("1-5", "0-7").
fn runs(set: &ExpertSet) -> Vec<(String, String)> {
    let mut runs: Vec<(u32, u32, String)> = vec![];
    for (&layer, experts) in &set.0 {
        let alone = ExpertSet(BTreeMap::from([(layer, experts.clone())]));
        let ranges = serde_json::to_value(alone).unwrap_or_default();
        let ranges = ranges[layer.to_string()].as_str().unwrap_or("none").to_string();
        match runs.last_mut() {
            Some((_, last, same)) if *same == ranges => *last = layer,
            _ => runs.push((layer, layer, ranges)),
        }
    }
    let range = |first, last| if first == last { format!("{first}") } else { format!("{first}-{last}") };
    runs.into_iter().map(|(first, last, experts)| (range(first, last), experts)).collect()
}

/// What the operator would create, by kind and name.
fn objects(deployment: &ValidatedDeployment) -> Vec<String> {
    let reference = OwnerReference::default();
    let owner = Owner { namespace: "default".into(), name: deployment.name.clone(), reference };
    let revision = Revision::new(&owner, deployment, "");
    let size = Size {
        workers: deployment.desired.workers,
        frontends: deployment.frontends,
        placement: None,
        commit: None,
    };
    let own = objects::of_revision(&owner, &revision, size);
    let around = Around::default();
    let surroundings = Surroundings {
        around: &around,
        operator_namespace: None,
        collector: None,
        hubs: [deployment.model.hub_port(), None],
    };
    let shared = objects::shared(&owner, Serving::of(&revision.hash, &revision.frontend), surroundings);
    let [worker_budget, frontend_budget] = &shared.disruption_budgets;
    let [workers_policy, frontends_policy] = &shared.network_policies;
    vec![
        named(&own.workers, &own.workers.metadata),
        named(&own.frontends, &own.frontends.metadata),
        named(&own.placement, &own.placement.metadata),
        named(&own.record, &own.record.metadata),
        named(&shared.client_service, &shared.client_service.metadata),
        named(&shared.workers_service, &shared.workers_service.metadata),
        named(worker_budget, &worker_budget.metadata),
        named(frontend_budget, &frontend_budget.metadata),
        named(&shared.service_account, &shared.service_account.metadata),
        named(workers_policy, &workers_policy.metadata),
        named(frontends_policy, &frontends_policy.metadata),
    ]
}

fn named<K: Resource>(_: &K, metadata: &ObjectMeta) -> String {
    format!("{}/{}", K::KIND, metadata.name.as_deref().unwrap_or_default())
}

fn counted(count: u32, what: &str) -> String {
    format!("{count} {what}{}", if count == 1 { "" } else { "s" })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(workers: u32, copies: u32, weights: WeightFormat) -> String {
        let top = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
        let mut deployment = manifest::read(&top.join("deploy/samples/tiny-r1.yaml")).unwrap();
        (deployment.desired.workers, deployment.desired.min_replicas) = (workers, copies);
        deployment.weights = weights;
        let directory = deployment.model.here(&top.join("tests")).unwrap().folder;
        let config = ModelConfig::read(&directory).unwrap();
        let weights = held_as(&deployment, &directory, &config).unwrap();
        let cache = cache(&config, deployment.max_context_tokens);
        render(&deployment, &shape(&config, weights).unwrap(), weights, (cache, 1_000_000_000))
    }

    #[test]
    fn the_sample_is_planned_as_eight_experts_on_each_of_four_workers() {
        insta::assert_snapshot!(plan(4, 1, WeightFormat::Native));
    }

    #[test]
    fn another_format_is_planned_with_its_own_bytes() {
        insta::assert_snapshot!(plan(4, 1, WeightFormat::Int8));
    }

    #[test]
    fn a_cache_is_counted_in_whole_blocks() {
        let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/models/tiny-r1");
        let config = ModelConfig::read(&directory).unwrap();
        let of = |context| cache(&config, Some(context));
        assert_eq!(of(1_000_001), of(1_000_064));
        assert!(of(1_000_000) < of(1_000_001));
    }

    #[test]
    fn uneven_numbers_are_planned_within_one_expert() {
        insta::assert_snapshot!(plan(5, 2, WeightFormat::Native));
    }
}
