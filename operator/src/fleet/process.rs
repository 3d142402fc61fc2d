//! Processes of this machine: the fleet of `expertmesh up`. Every process listens on ports of the kernel's choice and
//! announces them in a file; one that is started again has others, which the decisions then push.

mod child;
mod identities;
pub(crate) mod lines;

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use std::{env, fs, io};

use expertmesh_decide::action::Action;
use expertmesh_decide::observation::{Failure, Member, Observation, Seen};
use expertmesh_model::threads::compute_threads;
use expertmesh_proto::incarnation::Incarnation;
use expertmesh_proto::placement::Placement;
use expertmesh_proto::slot::Slot;
use expertmesh_proto::trust::identity::Component;
use futures::future::join_all;
use jiff::Timestamp;
use tokio::sync::Notify;

use self::child::{Child, Launch};
use self::identities::{Identities, IdentityError, identity};
use self::lines::Lines;
use super::Fleet;
use crate::api_key::entry;
use crate::control::Control;
use crate::model::Here;
use crate::programs;
use crate::validate::ValidatedDeployment;

/// After a process's own time to drain, before it is killed.
const KILL_AFTER: Duration = Duration::from_secs(5);

#[derive(Debug, thiserror::Error)]
pub(crate) enum ProcessError {
    #[error(transparent)]
    NoWorker(#[from] programs::Missing),
    #[error("{}: {error}", path.display())]
    State { path: PathBuf, error: io::Error },
    #[error("no random number: {0}")]
    NoRandomness(io::Error),
    #[error(transparent)]
    Identity(#[from] IdentityError),
}

/// How clients reach the frontends.
pub(crate) struct Clients {
    /// The port of the first frontend; those of the others follow.
    pub(crate) port: u16,
    /// What they must show.
    pub(crate) api_key: Option<String>,
}

/// Workers and frontends that this process started. They end with it.
pub(crate) struct ProcessFleet {
    program: PathBuf,
    model: Here,
    deployment: ValidatedDeployment,
    clients: Clients,
    state: StateDirectory,
    lines: Lines,
    changed: Arc<Notify>,
    control: Control,
    placement: Placement,
    workers: BTreeMap<Slot, Child>,
    /// Told to end; kept so that none is left behind.
    ending: Vec<Child>,
    frontends: Vec<Child>,
    started: u64,
    /// When each of them last reported, or was first looked for.
    heard: BTreeMap<Member, Timestamp>,
}

impl ProcessFleet {
    /// Starts the frontends; workers start with the first [`Action::Resize`].
    pub(crate) fn new(
        deployment: ValidatedDeployment,
        model: Here,
        clients: Clients,
        lines: Lines,
        changed: Arc<Notify>,
    ) -> Result<Self, ProcessError> {
        let program = programs::find("expertmesh-worker")?;
        let incarnation = Incarnation::draw().map_err(ProcessError::NoRandomness)?;
        let state = StateDirectory::new()?;
        if let Some(key) = &clients.api_key {
            state.write_api_key(key)?;
        }
        let trusted = Identities::start(&deployment.name, incarnation, state.path())?;
        let control = Control::new("expertmesh up".into(), incarnation, Some(trusted), changed.clone());
        let mut fleet = Self {
            program,
            model,
            clients,
            state,
            lines,
            changed,
            control,
            placement: Placement::default(),
            workers: BTreeMap::new(),
            ending: vec![],
            frontends: vec![],
            started: 0,
            heard: BTreeMap::new(),
            deployment,
        };
        for index in 0..fleet.deployment.frontends {
            let frontend = fleet.frontend(index);
            fleet.frontends.push(frontend);
        }
        Ok(fleet)
    }

    /// Where the metrics are of each process that listens, by its name.
    pub(crate) fn metrics(&self) -> Vec<(String, String)> {
        let children = self.frontends.iter().chain(self.workers.values());
        children.filter_map(|child| Some((child.name().to_string(), child.metrics()?))).collect()
    }

    /// What ended without ever having been ready, if something did: it would end again.
    pub(crate) fn first_failure(&self) -> Option<(String, Failure)> {
        let children = self.workers.values().chain(&self.frontends);
        children.filter_map(|child| Some((child.name().to_string(), child.failure()?))).next()
    }

    /// Ends the frontends when they have answered what they took, then the workers, each within its time to drain.
    pub(crate) async fn drain(&mut self) {
        for children in
            [std::mem::take(&mut self.frontends), std::mem::take(&mut self.workers).into_values().collect()]
        {
            self.ending.extend(children);
            self.ending.iter_mut().for_each(Child::end);
            join_all(self.ending.iter_mut().map(Child::ended)).await;
            self.ending.clear();
        }
    }

    /// Kills all processes that still run, and waits for their ends.
    pub(crate) async fn kill(&mut self) {
        let workers = std::mem::take(&mut self.workers).into_values();
        let mut children: Vec<Child> =
            workers.chain(self.frontends.drain(..)).chain(self.ending.drain(..)).collect();
        children.iter_mut().for_each(Child::kill);
        join_all(children.iter_mut().map(Child::ended)).await;
    }

    fn resize(&mut self, size: u32) {
        self.heard.retain(|member, _| !matches!(member, Member::Worker(slot) if slot.0 >= size));
        for (_, mut worker) in self.workers.split_off(&Slot(size)) {
            worker.end();
            self.ending.push(worker);
        }
        for slot in Slot::first(size) {
            if !self.workers.contains_key(&slot) {
                let worker = self.worker(slot, size);
                self.workers.insert(slot, worker);
            }
        }
    }

    /// Starts one of `size` workers that share this machine. It keeps its threads at a later size: they change no token, and a start
    /// costs the sequences that it runs.
    fn worker(&mut self, slot: Slot, size: u32) -> Child {
        let name = format!("worker-{slot}");
        let drain = self.deployment.desired.drain_timeout.as_secs().max(1);
        let arguments = [
            ("--slot", slot.to_string()),
            ("--listen", "127.0.0.1:0".into()),
            ("--drain-timeout", drain.to_string()),
            ("--threads", share(compute_threads(), size).to_string()),
        ];
        self.start((Component::Worker, "serve"), name, arguments.to_vec(), &[])
    }

    fn frontend(&mut self, index: u32) -> Child {
        let port = u32::from(self.clients.port) + index;
        let arguments = [
            ("--served-name", self.deployment.name.clone()),
            ("--listen", format!("127.0.0.1:{port}")),
            ("--control", "127.0.0.1:0".into()),
            ("--drain-timeout", format!("{}ms", self.deployment.desired.drain_timeout.as_millis())),
            ("--drain-grace", "0s".into()),
        ];
        let mut options = self.deployment.frontend_options.clone();
        if self.clients.api_key.is_some() {
            options.extend(["--api-keys".to_string(), self.state.api_keys().display().to_string()]);
        }
        self.start(
            (Component::Frontend, "frontend"),
            format!("frontend-{index}"),
            arguments.to_vec(),
            &options,
        )
    }

    fn start(
        &mut self,
        (component, command): (Component, &str),
        name: String,
        own: Vec<(&str, String)>,
        options: &[String],
    ) -> Child {
        self.started += 1;
        let mut arguments: Vec<OsString> =
            vec![command.into(), "--model".into(), self.model.argument.clone().into()];
        let context =
            self.deployment.max_context_tokens.map(|tokens| ("--max-context-tokens", tokens.to_string()));
        let common = [("--name", name.clone()), ("--metrics", "127.0.0.1:0".into())];
        let computed_as = self.deployment.computed_as().map(|(flag, value)| (flag, value.to_string()));
        let more = context.into_iter().chain(self.deployment.traced());
        for (flag, value) in common.into_iter().chain(own).chain(computed_as).chain(more) {
            arguments.extend([flag.into(), value.into()]);
        }
        arguments.extend(["--identity".into(), identity(self.state.path(), component).into()]);
        arguments.extend(options.iter().map(OsString::from));
        let files = self.state.path().join(format!("{}-{name}.x", self.started));
        Child::start(Launch {
            program: self.program.clone(),
            endpoint: self.deployment.model.endpoint.clone(),
            arguments,
            announce: files.with_extension("json"),
            last_words: files.with_extension("txt"),
            placement: self.state.placement(),
            patience: self.deployment.desired.drain_timeout + KILL_AFTER,
            lines: self.lines.clone(),
            changed: self.changed.clone(),
            name,
        })
    }
}

impl Fleet for ProcessFleet {
    type Error = ProcessError;

    async fn observe(&mut self) -> Result<Observation, ProcessError> {
        self.ending.retain_mut(|child| !child.has_ended());
        let workers = self.workers.iter().map(|(&slot, child)| (Member::Worker(slot), child));
        let frontends = self.frontends.iter().map(|child| (Member::Frontend(child.name().into()), child));
        let members: Vec<_> = workers.chain(frontends).collect();
        let listening =
            members.iter().filter_map(|(member, child)| Some((member.clone(), vec![child.address()?])));
        self.control.listen(listening.collect());
        let mut observation = Observation {
            placement: self.placement.clone(),
            size: self.workers.len() as u32,
            ..Observation::default()
        };
        for (member, child) in members {
            let mut seen = Seen {
                name: child.name().to_string(),
                addresses: child.address().into_iter().collect(),
                is_started: child.address().is_some(),
                failure: child.failure(),
                ..Seen::default()
            };
            self.control.complete(&member, &mut seen);
            // Of the slot, not of the process: one that dies again and again is silent all the time.
            let heard = self.heard.entry(member.clone()).or_insert_with(Timestamp::now);
            match seen.report {
                Some(_) => *heard = Timestamp::now(),
                None => seen.silent_since = Some(*heard),
            }
            match member {
                Member::Worker(slot) => drop(observation.workers.insert(slot, seen)),
                Member::Frontend(_) => observation.frontends.push(seen),
            }
        }
        Ok(observation)
    }

    async fn act(&mut self, actions: &[Action]) -> Result<(), ProcessError> {
        let mut pushes = vec![];
        for action in actions {
            match action {
                Action::Resize(size) => self.resize(*size),
                Action::Pin(_) => {} // the commit was found before the first process was started
                Action::Place(placement) => {
                    self.state.write(placement)?;
                    self.placement = placement.clone();
                }
                Action::Push { to, placement } => {
                    // With newer addresses, perhaps: what starts again should know them from the file.
                    if *placement != self.placement && placement.epoch() == self.placement.epoch() {
                        self.state.write(placement)?;
                        self.placement = placement.clone();
                    }
                    pushes.push((to, placement));
                }
                Action::Drain { slot } => self.control.drain(&Member::Worker(*slot)),
            }
        }
        self.control.tell(pushes).await;
        Ok(())
    }
}

/// The threads of one of so many workers: together no more than the machine has, but for one each.
fn share(threads: usize, workers: u32) -> usize {
    (threads / (workers.max(1) as usize)).max(1)
}

/// A folder of this process alone, deleted with it.
struct StateDirectory(PathBuf);

impl StateDirectory {
    fn new() -> Result<Self, ProcessError> {
        let path = env::temp_dir().join(format!("expertmesh-up-{}", std::process::id()));
        let failed = |error| ProcessError::State { path: path.clone(), error };
        match fs::remove_dir_all(&path) {
            // Left by one that was killed and had our number.
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(failed(error)),
        }
        // Keys are in it.
        fs::DirBuilder::new().mode(0o700).create(&path).map_err(failed)?;
        Ok(Self(path))
    }

    fn path(&self) -> &Path {
        &self.0
    }

    fn placement(&self) -> PathBuf {
        self.0.join("placement.json")
    }

    /// The folder that names the client who may ask.
    fn api_keys(&self) -> PathBuf {
        self.0.join("api-keys")
    }

    fn write_api_key(&self, key: &str) -> Result<(), ProcessError> {
        let folder = self.api_keys();
        let written = fs::create_dir(&folder).and_then(|()| fs::write(folder.join("up"), entry(key)));
        written.map_err(|error| ProcessError::State { path: folder, error })
    }

    /// Writes the placement's file whole or not at all.
    fn write(&self, placement: &Placement) -> Result<(), ProcessError> {
        let path = self.placement();
        let write = || {
            let partial = path.with_extension("partial");
            fs::write(&partial, serde_json::to_vec(placement)?)?;
            fs::rename(&partial, &path)
        };
        write().map_err(|error| ProcessError::State { path: path.clone(), error })
    }
}

impl Drop for StateDirectory {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn workers_share_the_threads_of_the_machine_and_each_has_one() {
        let shares =
            [(8, 1), (8, 3), (8, 4), (2, 4), (1, 1), (8, 0)].map(|(all, workers)| share(all, workers));
        assert_eq!(shares, [8, 2, 2, 1, 1, 8]);
    }
}
