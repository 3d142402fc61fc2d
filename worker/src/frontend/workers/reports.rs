//! A stream of one worker's reports.

use std::time::Duration;

use expertmesh_proto::channel::{Connect, Keepalive, connect};
use expertmesh_proto::heartbeat::hear;
use expertmesh_proto::slot::Slot;
use expertmesh_proto::trust::Callee;
use expertmesh_proto::v1;
use expertmesh_proto::v1::control_client::ControlClient;
use tokio::time::timeout;
use tonic::transport::Channel;
use tonic::{Status, Streaming};

const CONNECT: Connect = Connect { timeout: Duration::from_secs(1), keepalive: Some(KEEPALIVE), bulk: false };
/// How long a worker may take to answer, and say nothing where it sends no heartbeats; it reports every second.
const SILENCE: Duration = Duration::from_secs(3);
const KEEPALIVE: Keepalive = Keepalive { interval: Duration::from_secs(2), timeout: SILENCE };

/// The reports of the worker of one slot, the first one read.
pub(super) struct Reports {
    pub(super) channel: Channel,
    pub(super) first: v1::ReportResponse,
    rest: Streaming<v1::ReportResponse>,
    /// Whether the worker sends heartbeats: those of before there were any do not.
    beats: bool,
}

/// Why a worker's reports ended.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum Lost {
    #[error("{0}")]
    Silent(String),
    #[error("{0}")]
    Ended(String),
}

impl Reports {
    /// Asks whoever answers at `address`, which must be the worker of `slot`; fails with a line for the log.
    pub(super) async fn open(
        caller: v1::Caller,
        slot: Slot,
        address: &str,
        callee: Option<&Callee>,
    ) -> Result<Self, String> {
        let channel = connect(address, &CONNECT, callee).await.map_err(|error| error.to_string())?;
        let request = v1::ReportRequest { caller: Some(caller), heartbeats: true };
        let mut control = ControlClient::new(channel.clone());
        let greeting = async {
            let mut rest = control.report(request).await?.into_inner();
            Ok((rest.message().await?, rest))
        };
        match timeout(SILENCE, greeting).await {
            Ok(Ok((Some(first), rest))) if first.slot == slot.0 => {
                Ok(Self { channel, first, rest, beats: false })
            }
            Ok(Ok((Some(first), _))) => Err(format!("slot {} answers there", first.slot)),
            Ok(Ok((None, _))) => Err("it ended its reports".to_string()),
            Ok(Err::<_, Status>(status)) => Err(status.message().to_string()),
            Err(_) => Err("no answer to Report".to_string()),
        }
    }

    /// The next report, or why there is none.
    pub(super) async fn next(&mut self) -> Result<v1::ReportResponse, Lost> {
        loop {
            let message = match self.beats {
                true => hear(self.rest.message()).await.map_err(|silent| Lost::Silent(silent.to_string()))?,
                false => timeout(SILENCE, self.rest.message())
                    .await
                    .map_err(|_| Lost::Silent(format!("no word for {SILENCE:?}")))?,
            };
            match message {
                Ok(Some(report)) if report.heartbeat => self.beats = true,
                Ok(Some(report)) if report.slot == self.first.slot => return Ok(report),
                Ok(Some(report)) => return Err(Lost::Ended(format!("slot {} answers there", report.slot))),
                Ok(None) => return Err(Lost::Ended("it ended its reports".to_string())),
                Err(status) => return Err(Lost::Ended(status.message().to_string())),
            }
        }
    }
}
