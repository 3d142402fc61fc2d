//! Streams of reports, as workers and frontends serve them.

use std::pin::pin;

use expertmesh_proto::heartbeat::HEARTBEAT;
use expertmesh_proto::v1;
use tokio::sync::mpsc;
use tokio::time::sleep;
use tonic::Status;

/// Where a stream of reports leads.
pub(crate) type Reports = mpsc::Sender<Result<v1::ReportResponse, Status>>;

/// Waits for what calls for a report. Meanwhile, where the reader wants it, says that this process runs.
pub(crate) async fn beat_until<T>(
    something: impl Future<Output = T>,
    reports: &Reports,
    heartbeats: bool,
) -> T {
    let mut something = pin!(something);
    loop {
        tokio::select! {
            biased;
            came = &mut something => return came,
            () = sleep(HEARTBEAT), if heartbeats => {
                // Where there is no room, what was said before was not read yet.
                let beat = v1::ReportResponse { heartbeat: true, ..v1::ReportResponse::default() };
                let _ = reports.try_send(Ok(beat));
            }
        }
    }
}
