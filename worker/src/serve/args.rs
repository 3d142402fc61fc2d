//! The command line of `serve`.

use std::net::SocketAddr;
use std::num::NonZeroUsize;
use std::path::PathBuf;

use expertmesh_model::config::model::ModelConfig;
use expertmesh_model::layout::budget::KV_CACHE_MIB;
use expertmesh_proto::slot::{MAX_WORKERS, Slot};

use crate::collector;
use crate::engine::{ComputedAs, ComputedWith};
use crate::process::Fatal;
use crate::source;
use crate::trust;

#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    pub(super) source: source::Args,
    #[command(flatten)]
    pub(super) pinned: source::Pinned,
    /// This worker's name; a StatefulSet's pod name says its slot too
    #[arg(long, env = "POD_NAME")]
    pub(super) name: String,
    /// This worker's slot in the placement; without it, the number that ends the name
    #[arg(long)]
    pub(super) slot: Option<u32>,
    /// gRPC for peers, frontends and the operator
    #[arg(long, default_value = "[::]:7070")]
    pub(super) listen: SocketAddr,
    /// HTTP for /metrics, /healthz and /readyz
    #[arg(long, default_value = "[::]:9090")]
    pub(super) metrics: SocketAddr,
    /// The placement to start with (JSON); a later one is pushed
    #[arg(long)]
    pub(super) placement: Option<PathBuf>,
    /// Writes the addresses as JSON once this worker listens
    #[arg(long)]
    pub(super) announce: Option<PathBuf>,
    /// Positions of a sequence, prompt and answer together; without it, what the model was made for
    #[arg(long)]
    pub(super) max_context_tokens: Option<usize>,
    /// Memory of the latent cache, in MiB; more where one sequence that fills its context needs it
    #[arg(long, default_value_t = KV_CACHE_MIB)]
    pub(super) kv_cache_mib: u64,
    /// Memory for experts, in MiB, those that dead peers held included; without it, what the limit of the cgroup leaves
    #[arg(long, env = "EXPERTMESH_EXPERTS_MIB")]
    pub(super) experts_mib: Option<u64>,
    /// Sequences in the batch
    #[arg(long, default_value = "64")]
    pub(super) max_running: NonZeroUsize,
    /// Sequences that wait
    #[arg(long, default_value = "1024")]
    pub(super) max_waiting: NonZeroUsize,
    #[command(flatten)]
    pub(super) computed_as: ComputedAs,
    #[command(flatten)]
    pub(super) computed_with: ComputedWith,
    #[command(flatten)]
    pub(super) traces: collector::Args,
    #[command(flatten)]
    pub(super) trust: trust::Args,
    /// How long leaving may take, in seconds
    #[arg(long, default_value_t = 30)]
    pub(super) drain_timeout: u64,
}

impl Args {
    /// This worker's slot in the placement.
    pub(super) fn slot(&self) -> Result<Slot, Fatal> {
        let ordinal = || self.name.rsplit_once('-').and_then(|(_, ordinal)| ordinal.parse().ok());
        match self.slot.or_else(ordinal) {
            Some(slot) if slot < MAX_WORKERS => Ok(Slot(slot)),
            Some(slot) => Err(format!("--slot {slot}: it must be below {MAX_WORKERS}")),
            None => Err(format!("--slot is missing, and --name {} does not end in one", self.name)),
        }
        .map_err(|message| Fatal::new("InvalidSlot", message))
    }

    /// Positions of a sequence at most.
    pub(super) fn max_context(&self, config: &ModelConfig) -> Result<usize, Fatal> {
        let most = config.max_positions;
        let chosen = self.max_context_tokens.unwrap_or(most);
        if chosen < 2 || chosen > most {
            let message = format!("--max-context-tokens {chosen}: this model takes 2 to {most}");
            return Err(Fatal::new("InvalidMaxContextTokens", message));
        }
        Ok(chosen)
    }
}
