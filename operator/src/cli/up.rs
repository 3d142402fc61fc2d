//! `expertmesh up`: a ModelDeployment by processes of this machine, decided as on a cluster, until Ctrl-C.

use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::net::{Ipv4Addr, TcpListener};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use anyhow::{Context as _, bail};
use clap::Args;
use expertmesh_decide::action::Decision;
use expertmesh_decide::autoscale::autoscaler::Autoscaler;
use expertmesh_decide::autoscale::limits::Change;
use expertmesh_decide::autoscale::load::Load;
use expertmesh_decide::autoscale::policy::Size;
use expertmesh_decide::observation::{FailureReason, Member, Observation};
use expertmesh_decide::placement::fewest;
use expertmesh_decide::report::{Report, State};
use expertmesh_decide::step::decide;
use expertmesh_model::config::model::ModelConfig;
use expertmesh_proto::slot::Slot;
use indicatif::{ProgressBar, ProgressStyle};
use jiff::Timestamp;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::Notify;
use tokio::time::{sleep, timeout};

use crate::api_key;
use crate::fleet::Fleet;
use crate::fleet::process::lines::Lines;
use crate::fleet::process::{Clients, ProcessFleet};
use crate::manifest;
use crate::status::words::failing;
use crate::validate::ValidatedDeployment;

/// The variable of the environment that may hold the key of this machine's clients.
const API_KEY: &str = "EXPERTMESH_API_KEY";
/// How often to look where nothing is heard: also after edits of the file.
const PERIOD: Duration = Duration::from_millis(500);
/// Reports that come within this time make one decision.
const PACE: Duration = Duration::from_millis(20);
/// How often a process may die without a word before the deployment was ever ready.
const TRIES: u32 = 3;

#[derive(Args)]
pub(crate) struct Up {
    /// The ModelDeployment, as YAML. Edits take effect while it runs.
    file: PathBuf,
    /// Where the image's root lies on this disk: file:///models/m is ROOT/models/m.
    #[arg(long, default_value = "/")]
    root: PathBuf,
    /// Where the OpenAI API is served, on 127.0.0.1; a second frontend gets the port after it, and so on.
    #[arg(long, default_value_t = 8000, value_parser = clap::value_parser!(u16).range(1..))]
    port: u16,
    /// What clients must show as `authorization: Bearer KEY`; without it, everybody on this machine may ask.
    #[arg(long, env = API_KEY, hide_env_values = true, value_name = "KEY", value_parser = api_key::checked)]
    api_key: Option<String>,
}

/// Serves until Ctrl-C or SIGTERM and drains then, which is success; a second one kills instead.
pub(crate) async fn run(up: Up) -> anyhow::Result<ExitCode> {
    let mut stop = Stop::new()?;
    let modified = modified(&up.file);
    let deployment = manifest::read(&up.file)?;
    let (origin, root) = (deployment.model.clone(), up.root.clone());
    let model = tokio::task::spawn_blocking(move || origin.here(&root)).await??;
    ModelConfig::read(&model.folder).with_context(|| format!("--root {}", up.root.display()))?;
    if deployment.model.token.is_some() && std::env::var_os("HF_TOKEN").is_none() {
        tracing::warn!("spec.model.tokenSecretRef: there are no Secrets here; HF_TOKEN would be the token");
    }
    check_ports(up.port, deployment.frontends)?;
    let secrets = &deployment.frontend_secrets;
    if secrets.tls.is_some() {
        tracing::warn!(
            "spec.frontend.tlsSecretRef: there are no Secrets here; clients speak HTTP, on this machine alone"
        );
    }
    if secrets.api_keys.is_some() && up.api_key.is_none() {
        bail!(
            "spec.frontend.apiKeysSecretRef: there are no Secrets here; say --api-key KEY, or leave it out"
        );
    }

    let (lines, changed) = (Lines::new(), Arc::new(Notify::new()));
    let fleet = ProcessFleet::new(
        deployment.clone(),
        model,
        Clients { port: up.port, api_key: up.api_key.clone() },
        lines.clone(),
        changed.clone(),
    )?;
    let bars = Bars { lines: lines.clone(), bars: BTreeMap::new() };
    let mut serving = Serving {
        up,
        deployment,
        modified,
        fleet,
        changed,
        bars,
        autoscaler: Autoscaler::default(),
        changes: Vec::new(),
        at_least: 1,
        was_ready: false,
        is_settled: false,
        metrics: Vec::new(),
    };
    let failed = tokio::select! {
        Err(error) = serving.run() => Some(error),
        () = stop.asked() => None,
    };
    serving.bars.clear();
    if let Some(error) = failed {
        serving.fleet.kill().await;
        return Err(error);
    }
    lines.say("draining; Ctrl-C again to end it at once");
    let drained = tokio::select! {
        () = serving.fleet.drain() => true,
        () = stop.asked() => false,
    };
    if !drained {
        serving.fleet.kill().await;
    }
    Ok(ExitCode::SUCCESS)
}

struct Serving {
    up: Up,
    deployment: ValidatedDeployment,
    /// When the file was changed that was last read.
    modified: Option<SystemTime>,
    fleet: ProcessFleet,
    changed: Arc<Notify>,
    bars: Bars,
    autoscaler: Autoscaler,
    /// Changes of size that the autoscaler was not told of yet.
    changes: Vec<Change>,
    /// The fewest workers that hold every expert, as far as is known: at zero nobody says.
    at_least: u32,
    was_ready: bool,
    is_settled: bool,
    /// Where metrics are, as far as it was told.
    metrics: Vec<(String, String)>,
}

impl Serving {
    /// Observe, decide, act, for ever. Fails only where the deployment cannot start.
    async fn run(&mut self) -> anyhow::Result<std::convert::Infallible> {
        loop {
            self.read_again();
            let seen = self.fleet.observe().await?;
            self.check_start()?;
            self.scale(&seen);
            let decision = decide(&self.deployment.desired, &seen, Timestamp::now());
            tracing::debug!(actions = ?decision.actions, waiting_for = decision.waiting_for, "decided");
            self.fleet.act(&decision.actions).await?;
            self.show(&seen, &decision);
            let _ = timeout(PERIOD, self.changed.notified()).await;
            sleep(PACE).await;
        }
    }

    /// Changes the desired size by `spec.autoscaling`, as on a cluster.
    fn scale(&mut self, seen: &Observation) {
        let now = Timestamp::now();
        let desired = &self.deployment.desired;
        if let Some(shape) = seen.shape() {
            self.at_least = fewest(&shape, desired.min_replicas, self.deployment.memory);
        }
        let size = Size { workers: desired.workers, at_least: self.at_least, failing: failing(seen) };
        self.autoscaler.set(
            self.deployment.autoscaling.as_ref(),
            size,
            std::mem::take(&mut self.changes),
            now,
        );
        self.autoscaler.look(&Load::of(seen.members()), now);
        let (Some(verdict), Some(policy)) = (self.autoscaler.verdict(now), &self.deployment.autoscaling)
        else {
            return;
        };
        let (from, to) = (desired.workers, verdict.workers);
        if from == to || policy.advisory || desired.paused {
            return;
        }
        self.bars.lines.say(&format!(
            "{from} → {to} workers ({}): {}",
            verdict.reason.as_str(),
            verdict.message
        ));
        self.changes.push(Change { at: now, from, to });
        self.deployment.desired.workers = to;
    }

    /// Takes over what was edited, where that can change while it runs.
    fn read_again(&mut self) {
        let modified = modified(&self.up.file);
        if modified == self.modified || modified.is_none() {
            return;
        }
        self.modified = modified;
        let edited = match manifest::read(&self.up.file) {
            Ok(edited) => edited,
            Err(error) => return self.bars.lines.say(&format!("{error}; going on as before")),
        };
        if !edited.is_same_but_desired(&self.deployment) {
            let file = self.up.file.display();
            self.bars.lines.say(&format!(
                "{file}: only spec.workers.replicas, spec.autoscaling, spec.experts and spec.paused change while it runs; the rest with the next `expertmesh up`"
            ));
        }
        let mut desired = edited.desired;
        if edited.autoscaling.is_some() {
            desired.workers = self.deployment.desired.workers;
        }
        self.deployment.autoscaling = edited.autoscaling;
        if desired.workers != self.deployment.desired.workers {
            let (from, to) = (self.deployment.desired.workers, desired.workers);
            self.bars.lines.say(&format!("spec.workers.replicas: {from} → {to}"));
        }
        self.deployment.desired = desired;
    }

    /// What fails before anything was ready would fail for ever.
    fn check_start(&self) -> anyhow::Result<()> {
        if let Some((name, failure)) = self.fleet.first_failure().filter(|_| !self.was_ready)
            && (failure.reason != FailureReason::ProcessEnded || failure.restarts >= TRIES)
        {
            bail!("{name}: {}", failure.message);
        }
        Ok(())
    }

    fn show(&mut self, seen: &Observation, decision: &Decision) {
        self.bars.show(seen);
        let settled = decision.waiting_for.is_empty() && decision.actions.is_empty();
        if settled && !self.was_ready {
            self.was_ready = true;
            let metrics = self.new_metrics();
            self.bars.lines.answer(&self.invitation(&state_of(seen), &metrics));
        } else if settled && !self.is_settled {
            self.bars.lines.say(&format!("{} is ready: {}", self.deployment.name, state_of(seen)));
            let metrics = self.new_metrics();
            if !metrics.is_empty() {
                self.bars.lines.say(metrics.trim_end());
            }
        } else if self.was_ready && !settled && self.is_settled && !decision.waiting_for.is_empty() {
            self.bars.lines.say(&format!("waiting for {}", decision.waiting_for));
        }
        self.is_settled = settled;
    }

    /// A line that says where the metrics are of processes that it was not told of yet; empty where there are none.
    fn new_metrics(&mut self) -> String {
        let all = self.fleet.metrics();
        let new = all.iter().filter(|process| !self.metrics.contains(process));
        let new: Vec<_> = new.map(|(name, address)| format!("{name} http://{address}/metrics")).collect();
        self.metrics = all;
        if new.is_empty() { String::new() } else { format!("metrics: {}\n", new.join(", ")) }
    }

    fn invitation(&self, state: &str, metrics: &str) -> String {
        let name = &self.deployment.name;
        let urls: Vec<String> = (0..self.deployment.frontends)
            .map(|index| format!("http://127.0.0.1:{}", u32::from(self.up.port) + index))
            .collect();
        let url = &urls[0];
        let body = format!(
            r#"{{"model":"{name}","stream":true,"messages":[{{"role":"user","content":"What is 46 + 37?"}}]}}"#
        );
        let variable = std::env::var(API_KEY).ok();
        let key = self.up.api_key.as_ref().map(|key| header(key, variable.as_deref()));
        let key = key.unwrap_or_default();
        format!(
            "\n{name} is ready: {state}, at {}\n\n  curl -N {url}/v1/chat/completions{key} -H 'content-type: application/json' -d '{body}'\n\n{metrics}Ctrl-C drains and ends it.\n",
            urls.join(" "),
        )
    }
}

/// The part of a command for curl that shows a key. One that came by the variable is not written out, and a
/// terminal that the line is pasted into needs the variable, too.
fn header(key: &str, variable: Option<&str>) -> String {
    match variable {
        Some(value) if value == key => format!(" -H \"authorization: Bearer ${API_KEY}\""),
        _ => format!(" -H 'authorization: Bearer {key}'"),
    }
}

/// What is there in a few words, such as "4 workers, 32/32 experts".
fn state_of(seen: &Observation) -> String {
    let experts = seen.shape().map(|shape| seen.live_experts(&shape));
    let experts = experts.map_or(String::new(), |(live, all)| format!(", {live}/{all} experts"));
    let workers = seen.ready_workers();
    format!("{workers} worker{}{experts}", if workers == 1 { "" } else { "s" })
}

/// A bar for every worker that loads; on a terminal only.
struct Bars {
    lines: Lines,
    bars: BTreeMap<Slot, ProgressBar>,
}

impl Bars {
    fn show(&mut self, seen: &Observation) {
        let members = seen.members().filter_map(|(member, seen)| match member {
            Member::Worker(slot) => Some((slot, seen.report.as_ref()?, &seen.name)),
            Member::Frontend(_) => None,
        });
        let loading =
            |report: &Report| report.state == State::Loading && report.bytes_loaded < report.bytes_to_load;
        let loading: BTreeMap<Slot, (&Report, &String)> = members
            .filter(|(_, report, _)| loading(report))
            .map(|(slot, report, name)| (slot, (report, name)))
            .collect();
        self.bars.retain(|slot, bar| {
            let stays = loading.contains_key(slot);
            if !stays {
                bar.finish_and_clear();
            }
            stays
        });
        for (slot, (report, name)) in loading {
            let bar = self.bars.entry(slot).or_insert_with(|| self.lines.bars.add(bar(name)));
            bar.set_length(report.bytes_to_load);
            bar.set_position(report.bytes_loaded);
        }
    }

    fn clear(&mut self) {
        std::mem::take(&mut self.bars).into_values().for_each(|bar| bar.finish_and_clear());
    }
}

fn bar(name: &str) -> ProgressBar {
    let style = ProgressStyle::with_template("{prefix:<10} {bar:32} {bytes}/{total_bytes} {bytes_per_sec}");
    let bar = ProgressBar::no_length().with_prefix(name.to_string());
    style.map_or_else(|_| bar.clone(), |style| bar.clone().with_style(style))
}

fn modified(file: &std::path::Path) -> Option<SystemTime> {
    std::fs::metadata(file).and_then(|metadata| metadata.modified()).ok()
}

/// Says at once what the frontends could only find out later.
fn check_ports(first: u16, frontends: u32) -> anyhow::Result<()> {
    for index in 0..frontends {
        let Ok(port) = u16::try_from(u32::from(first) + index) else {
            bail!("--port {first}: {frontends} frontends need ports up to {}", u32::from(first) + index);
        };
        match TcpListener::bind((Ipv4Addr::LOCALHOST, port)) {
            Err(error) if error.kind() == ErrorKind::AddrInUse => {
                bail!("port {port} of 127.0.0.1 is in use; choose another with --port")
            }
            Err(error) => bail!("port {port} of 127.0.0.1: {error}; choose another with --port"),
            Ok(_) => {}
        }
    }
    Ok(())
}

/// What ends `up`: Ctrl-C, SIGTERM, or the end of the terminal.
struct Stop([Signal; 3]);

impl Stop {
    fn new() -> anyhow::Result<Self> {
        let of = |kind| signal(kind).context("signals cannot be handled");
        Ok(Self([of(SignalKind::interrupt())?, of(SignalKind::terminate())?, of(SignalKind::hangup())?]))
    }

    async fn asked(&mut self) {
        let [interrupt, terminate, hangup] = &mut self.0;
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
            _ = hangup.recv() => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_port_in_use_is_named_with_the_flag_that_helps() {
        let taken = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let port = taken.local_addr().unwrap().port();
        let error = check_ports(port, 1).unwrap_err().to_string();
        assert_eq!(error, format!("port {port} of 127.0.0.1 is in use; choose another with --port"));
        assert!(check_ports(u16::MAX, 2).unwrap_err().to_string().contains("need ports up to 65536"));
    }

    #[test]
    fn a_key_of_the_environment_is_not_written_out() {
        let shown = header("secret", Some("secret"));
        assert_eq!(shown, r#" -H "authorization: Bearer $EXPERTMESH_API_KEY""#);
        assert_eq!(header("secret", Some("another")), " -H 'authorization: Bearer secret'");
        assert_eq!(header("secret", None), " -H 'authorization: Bearer secret'");
    }
}
