//! `spec.frontend`: the processes that speak the OpenAI API.

use kube::KubeSchema;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::pods::PodFields;

/// The processes that speak the OpenAI API, and how they treat their clients.
#[derive(KubeSchema, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Frontend {
    /// How many of them there are.
    #[serde(default = "one")]
    #[x_kube(validation = Rule::new("self >= 1 && self <= 256").message(Message::Expression(
        "'spec.frontend.replicas (%d) must be from 1 to 256'.format([self])".into()
    )))]
    pub(crate) replicas: i32,
    /// More names under which clients may ask for the model. Answers carry the deployment's own.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16), inner(length(max = 256)))]
    #[x_kube(validation = Rule::new("self.all(alias, alias.matches('^[^ ]+$'))")
        .message("spec.frontend.aliases must be names without spaces"))]
    pub(crate) aliases: Vec<String>,
    /// The origins of pages whose browsers may call the API, such as `https://app.example`; an empty list: none. Without it: all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 64), inner(length(max = 256)))]
    #[x_kube(validation = Rule::new("self.all(origin, origin == '*' || origin.matches('^[a-z][a-z0-9+.-]*://[^/ ,]+$'))")
        .message("spec.frontend.corsOrigins must be * or origins such as https://app.example"))]
    pub(crate) cors_origins: Option<Vec<String>>,
    /// How much of a frontend's connections and requests one address may have, in percent. Behind a proxy all clients have one.
    #[serde(default = "whole", skip_serializing_if = "is_whole")]
    #[x_kube(validation = Rule::new("self >= 1 && self <= 100").message(Message::Expression(
        "'spec.frontend.addressSharePercent (%d) must be from 1 to 100'.format([self])".into()
    )))]
    pub(crate) address_share_percent: i32,
    /// How a line for every request is logged. None tells a word of a prompt or an answer.
    #[serde(default, skip_serializing_if = "AccessLog::is_text")]
    pub(crate) access_log: AccessLog,
    /// In the contents of a chat, a special token's spelling is that token, as in vLLM. Without it: text.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub(crate) special_tokens_in_content: bool,
    /// The Secret that names the clients who may ask: an entry for each, called as it is, with `sha256:` and the hash of its key, or with an
    /// object of `key`, `requestsPerMinute`, `tokensPerMinute` and `concurrentRequests`. `expertmesh key` makes one. Without it, everybody may.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) api_keys_secret_ref: Option<SecretReference>,
    /// The Secret, of the type `kubernetes.io/tls`, of the certificate that clients see. With it they speak HTTPS, on port 443; without it HTTP.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) tls_secret_ref: Option<SecretReference>,
    #[serde(flatten)]
    pub(crate) pod: PodFields,
}

/// A Secret of the deployment's namespace. What it holds may change while pods run.
#[derive(KubeSchema, Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct SecretReference {
    /// Its name.
    #[schemars(length(max = 253))]
    #[x_kube(validation = Rule::new("self.matches('^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$')").message(Message::Expression(
        "'a Secret\\'s name (' + self + ') is of lower-case letters, digits, - and .'".into()
    )))]
    pub(crate) name: String,
}

/// Where a request's line goes.
#[derive(JsonSchema, Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) enum AccessLog {
    Disabled,
    /// Among the other lines of the log.
    #[default]
    Text,
    /// As JSON on stdout, an object a line.
    Json,
}

impl AccessLog {
    #[allow(clippy::trivially_copy_pass_by_ref)] // serde's shape
    fn is_text(&self) -> bool {
        *self == Self::Text
    }
}

impl Frontend {
    /// What is not at its default, as options of the process.
    pub(crate) fn options(&self) -> Vec<String> {
        let pair = |flag: &str, value: &str| [flag.to_string(), value.to_string()];
        let mut options: Vec<String> =
            self.aliases.iter().flat_map(|alias| pair("--served-name", alias)).collect();
        if let Some(origins) = &self.cors_origins {
            options.extend(pair("--cors-origins", &origins.join(",")));
        }
        if !is_whole(&self.address_share_percent) {
            options.extend(pair("--address-share", &self.address_share_percent.to_string()));
        }
        match self.access_log {
            AccessLog::Text => {}
            AccessLog::Disabled => options.extend(pair("--access-log", "off")),
            AccessLog::Json => options.extend(pair("--access-log", "json")),
        }
        if self.special_tokens_in_content {
            options.push("--special-tokens-in-content".into());
        }
        options
    }
}

impl Default for Frontend {
    fn default() -> Self {
        Self {
            replicas: one(),
            aliases: vec![],
            cors_origins: None,
            address_share_percent: whole(),
            access_log: AccessLog::default(),
            special_tokens_in_content: false,
            api_keys_secret_ref: None,
            tls_secret_ref: None,
            pod: PodFields::default(),
        }
    }
}

fn one() -> i32 {
    1
}

fn whole() -> i32 {
    100
}

#[allow(clippy::trivially_copy_pass_by_ref)] // serde's shape
fn is_whole(percent: &i32) -> bool {
    *percent == whole()
}
