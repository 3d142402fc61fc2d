//! What a frontend counts of each client that has a key. There are as many series as keys, and they go with them.

use expertmesh_metrics::Registry;
use expertmesh_metrics::declare::Declare;
use prometheus::IntCounterVec;

use super::labels::ClientLimit;

#[derive(Clone)]
pub(crate) struct ClientMetrics {
    requests: IntCounterVec,
    refused: IntCounterVec,
    prompt_tokens: IntCounterVec,
    generated_tokens: IntCounterVec,
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
        }
    }

    /// Shows a client from zero on.
    pub(crate) fn declare(&self, client: &str) {
        for counter in [&self.requests, &self.prompt_tokens, &self.generated_tokens] {
            counter.with_label_values(&[client]);
        }
        for limit in ClientLimit::ALL {
            self.refused.with_label_values(&[client, limit.name()]);
        }
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

    pub(crate) fn began(&self, client: &str) {
        self.requests.with_label_values(&[client]).inc();
    }

    pub(crate) fn refused(&self, client: &str, limit: ClientLimit) {
        self.refused.with_label_values(&[client, limit.name()]).inc();
    }

    pub(crate) fn prompt(&self, client: &str, tokens: usize) {
        self.prompt_tokens.with_label_values(&[client]).inc_by(tokens as u64);
    }

    pub(crate) fn generated(&self, client: &str, tokens: usize) {
        self.generated_tokens.with_label_values(&[client]).inc_by(tokens as u64);
    }
}
