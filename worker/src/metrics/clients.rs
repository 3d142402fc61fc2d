//! What a frontend counts of each client that has a key. There are as many series as keys, and they go with them.

use expertmesh_metrics::Registry;
use expertmesh_metrics::declare::Declare;
use prometheus::{IntCounter, IntCounterVec, IntGauge};

use super::labels::ClientLimit;

#[derive(Clone)]
pub(crate) struct ClientMetrics {
    requests: IntCounterVec,
    refused: IntCounterVec,
    prompt_tokens: IntCounterVec,
    generated_tokens: IntCounterVec,
    invalid: IntGauge,
}

impl ClientMetrics {
    pub(crate) fn new(registry: &Registry) -> Self {
        let declare = Declare(registry);
        Self {
            requests: declare.counters(
                "expertmesh_client_requests_total",
                "Requests that were begun, by the client whose key they had.",
                &["client"],
            ),
            refused: declare.counters(
                "expertmesh_client_refused_total",
                "Requests that a limit of their client did not let begin.",
                &["client", "limit"],
            ),
            prompt_tokens: declare.counters(
                "expertmesh_client_prompt_tokens_total",
                "Tokens of prompts, by client.",
                &["client"],
            ),
            generated_tokens: declare.counters(
                "expertmesh_client_generated_tokens_total",
                "Tokens of answers, by client.",
                &["client"],
            ),
            invalid: declare.gauge(
                "expertmesh_client_entries_invalid",
                "Entries among the API keys that name a client and no key of it: the log says why.",
            ),
        }
    }

    /// Shows a client from zero on. What is counted by this after [`Self::forget`] is shown nowhere.
    pub(crate) fn of(&self, client: &str) -> CountersOfClient {
        let of = |counters: &IntCounterVec| counters.with_label_values(&[client]);
        CountersOfClient {
            requests: of(&self.requests),
            refused: ClientLimit::ALL
                .map(|limit| (limit, self.refused.with_label_values(&[client, limit.name()]))),
            prompt_tokens: of(&self.prompt_tokens),
            generated_tokens: of(&self.generated_tokens),
        }
    }

    /// How many entries name a client and no key.
    pub(crate) fn invalid(&self, count: usize) {
        self.invalid.set(i64::try_from(count).unwrap_or(i64::MAX));
    }

    /// Ends a client's series.
    pub(crate) fn forget(&self, client: &str) {
        for counter in [&self.requests, &self.prompt_tokens, &self.generated_tokens] {
            let _ = counter.remove_label_values(&[client]); // one that is not there is gone as well
        }
        for limit in ClientLimit::ALL {
            let _ = self.refused.remove_label_values(&[client, limit.name()]);
        }
    }
}

/// What is counted of one client.
pub(crate) struct CountersOfClient {
    requests: IntCounter,
    refused: [(ClientLimit, IntCounter); 3],
    prompt_tokens: IntCounter,
    generated_tokens: IntCounter,
}

impl CountersOfClient {
    pub(crate) fn began(&self) {
        self.requests.inc();
    }

    pub(crate) fn refused(&self, limit: ClientLimit) {
        self.refused.iter().filter(|(of, _)| *of == limit).for_each(|(_, counter)| counter.inc());
    }

    pub(crate) fn prompt(&self, tokens: usize) {
        self.prompt_tokens.inc_by(tokens as u64);
    }

    pub(crate) fn generated(&self, tokens: usize) {
        self.generated_tokens.inc_by(tokens as u64);
    }
}
