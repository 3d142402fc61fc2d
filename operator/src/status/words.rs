//! What is said of processes that fail, or that are not ready yet.

use expertmesh_decide::observation::{Failure, FailureReason, Observation, Seen};
use expertmesh_decide::report::{Report, State};
use expertmesh_proto::slot::Slot;
use indicatif::DecimalBytes;

use super::condition::{Reason, Verdict};
use crate::model::MOUNTED;

/// A worker that is not ready and cannot run, and what to do about it.
pub(crate) fn failing(seen: &Observation) -> Option<String> {
    let mut workers = seen.workers.range(..Slot(seen.size));
    workers.find_map(|(slot, worker)| {
        let is_ready = worker.report.as_ref().is_some_and(|report| report.state == State::Ready);
        let failure = worker.failure.as_ref().filter(|_| !is_ready)?;
        Some(described(&format!("worker {slot}"), failure))
    })
}

/// The failure of the lowest slot that has one.
pub(super) fn first_failure(seen: &Observation) -> Option<(String, &Failure)> {
    let mut workers = seen.workers.range(..Slot(seen.size));
    workers.find_map(|(slot, worker)| Some((format!("worker {slot}"), worker.failure.as_ref()?)))
}

/// The same; where no worker has failed, of the first frontend that has.
pub(super) fn first_failure_of_any(seen: &Observation) -> Option<(String, &Failure)> {
    let mut frontends = seen.frontends.iter();
    let frontend = || {
        frontends
            .find_map(|frontend| Some((format!("frontend {}", frontend.name), frontend.failure.as_ref()?)))
    };
    first_failure(seen).or_else(frontend)
}

/// Whether a model should be where a volume is mounted, and there is not even a directory.
fn is_unmounted(message: &str) -> bool {
    message.contains(&format!("no model at {MOUNTED}: no such directory"))
}

pub(super) fn failed_verdict(who: &str, failure: &Failure) -> Verdict {
    Verdict::no(reason_of(failure), described(who, failure))
}

pub(super) fn described(who: &str, failure: &Failure) -> String {
    let advice = match failure.reason {
        FailureReason::ReplicasUnschedulable => "; lower spec.workers.resources or add nodes",
        FailureReason::ImagePullBackOff
        | FailureReason::InvalidImageName
        | FailureReason::ErrImageNeverPull => {
            "; check the image and imagePullSecrets of spec.workers and spec.frontend"
        }
        FailureReason::OomKilled => "; raise the memory limit in resources, or the number of workers",
        FailureReason::ModelNotFound if is_unmounted(&failure.message) => {
            "; its volume is not mounted: oci:// needs image volumes, which container runtimes know from containerd 2.1 and CRI-O 1.31 on"
        }
        FailureReason::ModelNotFound | FailureReason::SourceNotFound => "; check spec.model.uri",
        FailureReason::SourceUnauthorized => "; check spec.model.tokenSecretRef",
        FailureReason::CreateContainerConfigError | FailureReason::FailedMount => {
            "; create what it names, or correct the reference"
        }
        FailureReason::LimitRange => "; set resources within the namespace's LimitRange, or change that",
        FailureReason::NoPriorityClass => "; create it, or correct priorityClassName",
        FailureReason::NoServiceAccount => "; it is made anew within two minutes: see who deletes it",
        FailureReason::PodRefused => "; a policy of the cluster refuses it: see its own words",
        FailureReason::PodSecurity => {
            "; pods keep to the level `restricted` unless something adds to them: see which webhook does"
        }
        FailureReason::QuotaExceeded => {
            "; set resources for all that the ResourceQuota limits, lower them or the number of workers, or raise the quota"
        }
        FailureReason::NodeLost | FailureReason::ProcessEnded | FailureReason::Other(_) => "",
    };
    format!("{who}: {}{advice}", failure.message)
}

/// How far all workers together are that load, and how fast, such as 31 % 410 MB/s; none where none does.
pub(super) fn loading(seen: &Observation) -> Option<String> {
    let loading = seen.reports().map(|(_, report)| report);
    let loading: Vec<_> = loading.filter(|report| report.state == State::Loading).collect();
    let sum = |of: fn(&Report) -> u64| loading.iter().map(|report| of(report)).sum::<u64>();
    let (loaded, all) = (sum(|report| report.bytes_loaded), sum(|report| report.bytes_to_load));
    let share = loaded.saturating_mul(100).checked_div(all)?;
    let pace = match sum(|report| report.bytes_per_second) {
        0 => String::new(),
        pace => format!(" {}/s", DecimalBytes(pace)),
    };
    Some(format!("{share} %{pace}"))
}

pub(super) fn counted(count: usize, what: &str) -> String {
    format!("{count} {what}{}", if count == 1 { "" } else { "s" })
}

/// A condition's reason has its own alphabet, and may not be empty.
pub(super) fn reason_of(failure: &Failure) -> Reason {
    let reason: String =
        failure.reason.name().chars().filter(|c| c.is_ascii_alphanumeric() || *c == '_').take(128).collect();
    let is_reason = reason.starts_with(|c: char| c.is_ascii_alphabetic());
    Reason::Named(if is_reason { reason } else { "Failed".into() })
}

/// Why a worker is not ready; none where it is.
pub(super) fn not_ready_because(worker: &Seen) -> Option<String> {
    match &worker.report {
        None if !worker.is_started => Some("its pod has not started".into()),
        None if worker.told.is_some() => Some("it has fallen silent".into()),
        None => Some("it does not answer yet".into()),
        Some(report) if report.state == State::Ready => None,
        Some(report) if report.reason.is_empty() => Some("it is not ready".into()),
        Some(report) => Some(report.reason.clone()),
    }
}
