//! The fields of `spec.autoscaling` and of `status.autoscaling`, with their rules.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::KubeSchema;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Five fields, the first two within an hour and a day. What a month has is for the operator to find out.
const CRON: &str = "self.matches('^ *([*]|[0-5]?[0-9](-[0-5]?[0-9])?)(/[0-9]+)?(,([*]|[0-5]?[0-9](-[0-5]?[0-9])?)(/[0-9]+)?)* +([*]|([01]?[0-9]|2[0-3])(-([01]?[0-9]|2[0-3]))?)(/[0-9]+)?(,([*]|([01]?[0-9]|2[0-3])(-([01]?[0-9]|2[0-3]))?)(/[0-9]+)?)*( +[-0-9A-Za-z*/,?#]+){3} *$')";

/// What clients are to be given, and within which bounds workers may be had for it.
#[derive(KubeSchema, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("self.minWorkers <= self.maxWorkers").message(Message::Expression(
        "'spec.autoscaling.minWorkers (%d) must not be above spec.autoscaling.maxWorkers (%d)'.format([self.minWorkers, self.maxWorkers])".into()
    )),
    validation = Rule::new("!has(self.schedules) || self.schedules.all(schedule, schedule.minWorkers <= self.maxWorkers)")
        .message("spec.autoscaling.schedules: minWorkers must not be above spec.autoscaling.maxWorkers")
)]
pub(crate) struct Autoscaling {
    /// Never fewer. With 0, none where no request came for `idleAfter`; the first one then waits for a start.
    #[serde(default = "one")]
    #[x_kube(validation = Rule::new("self >= 0 && self <= 1024").message(Message::Expression(
        "'spec.autoscaling.minWorkers (%d) must be from 0 to 1024'.format([self])".into()
    )))]
    pub(crate) min_workers: i32,
    /// Never more.
    #[x_kube(validation = Rule::new("self >= 1 && self <= 1024").message(Message::Expression(
        "'spec.autoscaling.maxWorkers (%d) must be from 1 to 1024'.format([self])".into()
    )))]
    pub(crate) max_workers: i32,
    /// The goal for the 90th percentile of the time to first token.
    #[serde(default = "half_a_second")]
    #[schemars(length(max = 32))]
    #[x_kube(validation = Rule::new("self.matches('^([0-9]+(ms|s|m|h))+$') && duration(self) >= duration('1ms') && duration(self) <= duration('10m')").message(Message::Expression(
        "'spec.autoscaling.ttft (' + self + ') must be a duration from 1ms to 10m, such as 500ms'".into()
    )))]
    pub(crate) ttft: String,
    /// The goal for the 90th percentile of the time per output token after the first.
    #[serde(default = "fifty_milliseconds")]
    #[schemars(length(max = 32))]
    #[x_kube(validation = Rule::new("self.matches('^([0-9]+(ms|s|m|h))+$') && duration(self) >= duration('1ms') && duration(self) <= duration('10m')").message(Message::Expression(
        "'spec.autoscaling.tpot (' + self + ') must be a duration from 1ms to 10m, such as 50ms'".into()
    )))]
    pub(crate) tpot: String,
    /// With `minWorkers: 0`: how long without a request before the last worker goes.
    #[serde(default = "ten_minutes")]
    #[schemars(length(max = 32))]
    #[x_kube(validation = Rule::new("self.matches('^([0-9]+(ms|s|m|h))+$') && duration(self) >= duration('10s') && duration(self) <= duration('168h')").message(Message::Expression(
        "'spec.autoscaling.idleAfter (' + self + ') must be a duration from 10s to 168h, such as 10m'".into()
    )))]
    pub(crate) idle_after: String,
    /// Decides and tells, and never writes.
    #[serde(default)]
    pub(crate) advisory: bool,
    /// How fast, in the words of a HorizontalPodAutoscaler.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) behavior: Option<Behavior>,
    /// Times at which there are to be more than `minWorkers`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 32))]
    pub(crate) schedules: Vec<Schedule>,
}

#[derive(JsonSchema, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Behavior {
    /// Default: twice as many in a minute.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) scale_up: Option<ScalingRules>,
    /// Default: after three minutes in which fewer were enough, one in two minutes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) scale_down: Option<ScalingRules>,
}

#[derive(KubeSchema, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct ScalingRules {
    /// For so long a change must have been called for; the least far-reaching one of that time is made.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[x_kube(validation = Rule::new("self >= 0 && self <= 3600").message("stabilizationWindowSeconds must be from 0 to 3600"))]
    pub(crate) stabilization_window_seconds: Option<i32>,
    /// Which of the policies counts: the one that allows most (Max), least (Min), or none (Disabled: no change).
    #[serde(default)]
    pub(crate) select_policy: SelectPolicy,
    /// Without any: the defaults.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 8))]
    pub(crate) policies: Vec<ScalingPolicy>,
}

#[derive(JsonSchema, Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum SelectPolicy {
    #[default]
    Max,
    Min,
    Disabled,
}

/// By so much in so long.
#[derive(KubeSchema, Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct ScalingPolicy {
    /// What `value` counts.
    #[serde(rename = "type")]
    pub(crate) kind: PolicyType,
    /// Workers, or percent of those at the period's beginning.
    #[x_kube(validation = Rule::new("self >= 1 && self <= 10000").message("value must be from 1 to 10000"))]
    pub(crate) value: i32,
    /// In any time of so many seconds.
    #[x_kube(validation = Rule::new("self >= 1 && self <= 1800").message("periodSeconds must be from 1 to 1800"))]
    pub(crate) period_seconds: i32,
}

#[derive(JsonSchema, Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum PolicyType {
    Pods,
    Percent,
}

/// From `start` to `end`, again and again, there are at least so many workers.
#[derive(KubeSchema, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Schedule {
    /// By the IANA time zone database, such as Europe/Berlin.
    #[serde(default = "utc")]
    #[schemars(length(min = 1, max = 64))]
    pub(crate) time_zone: String,
    /// Minute, hour, day of the month, month, day of the week, as in a crontab: 0 8 * * 1-5
    #[schemars(length(min = 9, max = 128))]
    #[x_kube(validation = Rule::new(CRON).message(Message::Expression(
        "'spec.autoscaling.schedules: start (' + self + ') must be minute, hour, day of the month, month and day of the week, such as 0 8 * * 1-5'".into()
    )))]
    pub(crate) start: String,
    /// As `start`: when the minimum is that of `minWorkers` above again.
    #[schemars(length(min = 9, max = 128))]
    #[x_kube(validation = Rule::new(CRON).message(Message::Expression(
        "'spec.autoscaling.schedules: end (' + self + ') must be minute, hour, day of the month, month and day of the week, such as 0 18 * * 1-5'".into()
    )))]
    pub(crate) end: String,
    /// At least so many workers meanwhile.
    #[x_kube(validation = Rule::new("self >= 1 && self <= 1024").message("spec.autoscaling.schedules: minWorkers must be from 1 to 1024"))]
    pub(crate) min_workers: i32,
}

/// What the autoscaler last saw and did.
#[derive(JsonSchema, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct AutoscalingStatus {
    /// The size that it found, or wrote last: where `spec.workers.replicas` is another, somebody else moved it.
    pub(crate) workers: i32,
    /// The size that it thinks right.
    pub(crate) wanted: i32,
    /// So many have the memory for every expert; at zero nobody could say.
    pub(crate) at_least: i32,
    /// The s of the rule: at 0.55 and above more are needed, below 0.40 fewer may do.
    pub(crate) load: String,
    /// Why it does what it does now, in one word.
    pub(crate) reason: String,
    /// The same in a line, with its inputs.
    pub(crate) message: String,
    /// Of `spec.autoscaling`: a change of it is a new beginning.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) spec_hash: Option<String>,
    /// The last five, the latest first.
    #[schemars(length(max = 5))]
    pub(crate) decisions: Vec<ScaleDecision>,
}

/// One change of size.
#[derive(JsonSchema, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct ScaleDecision {
    /// When it was written.
    pub(crate) time: Time,
    /// Workers before it.
    pub(crate) from: i32,
    /// Workers that were asked for.
    pub(crate) to: i32,
    /// Why, in one word.
    pub(crate) reason: String,
    /// The same in a line, with its inputs.
    pub(crate) message: String,
}

fn one() -> i32 {
    1
}

fn half_a_second() -> String {
    "500ms".into()
}

fn fifty_milliseconds() -> String {
    "50ms".into()
}

fn ten_minutes() -> String {
    "10m".into()
}

fn utc() -> String {
    "UTC".into()
}
