//! The collector that spans are sent to, where one is named.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use opentelemetry::KeyValue;
use opentelemetry::trace::TracerProvider;
use opentelemetry_otlp::{SpanExporter, WithExportConfig};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::error::OTelSdkResult;
use opentelemetry_sdk::trace::{
    self, BatchConfigBuilder, BatchSpanProcessor, Sampler, SdkTracerProvider, SpanData,
};

use crate::process::Fatal;
use crate::traces;

/// Spans that wait to be sent; more are dropped, and nobody waits.
const QUEUE: usize = 16 << 10;
/// The most spans of one message.
const BATCH: usize = 512;
/// How long spans are gathered for a message.
const GATHER: Duration = Duration::from_secs(1);
/// How long the end of a process waits for its last spans.
const FLUSH: Duration = Duration::from_secs(2);

#[derive(Clone, clap::Args)]
pub(crate) struct Args {
    /// Where traces go, by OTLP over gRPC: http://HOST:4317; without it there are none
    #[arg(long, value_name = "URL", env = "OTEL_EXPORTER_OTLP_ENDPOINT")]
    otlp_endpoint: Option<String>,
    /// The share of requests that are traced, 0 to 1; whoever sends a traceparent decides for its own
    #[arg(long, value_name = "RATIO", env = "EXPERTMESH_OTLP_SAMPLE", default_value_t = 1.0)]
    otlp_sample: f64,
}

/// Sends spans until it is dropped, which sends what is left. The runtime must go on meanwhile.
pub(crate) struct Exporting(Option<SdkTracerProvider>);

impl Args {
    /// Begins to make and to send spans, within the runtime. `service` and `instance` say whose they are.
    pub(crate) fn start(&self, service: &'static str, instance: &str) -> Result<Exporting, Fatal> {
        let Some(endpoint) = self.otlp_endpoint.as_ref().filter(|endpoint| !endpoint.is_empty()) else {
            return Ok(Exporting(None));
        };
        if !(0.0..=1.0).contains(&self.otlp_sample) {
            let problem = format!("--otlp-sample {}: it must be 0 to 1", self.otlp_sample);
            return Err(Fatal::new("InvalidOtlpSample", problem));
        }
        let exporter = SpanExporter::builder().with_tonic().with_endpoint(endpoint).build();
        let exporter = exporter.map_err(|error| {
            Fatal::new("InvalidOtlpEndpoint", format!("--otlp-endpoint {endpoint}: {error}"))
        })?;
        let exporter = Telling { exporter, failing: AtomicBool::new(false) };
        let bounds = BatchConfigBuilder::default().with_max_queue_size(QUEUE);
        let bounds = bounds.with_max_export_batch_size(BATCH).with_scheduled_delay(GATHER).build();
        let resource = Resource::builder().with_service_name(service);
        let resource = resource.with_attribute(KeyValue::new("service.instance.id", instance.to_string()));
        let sampler = Sampler::ParentBased(Box::new(Sampler::TraceIdRatioBased(self.otlp_sample)));
        let provider = SdkTracerProvider::builder()
            .with_span_processor(BatchSpanProcessor::builder(exporter).with_batch_config(bounds).build())
            .with_resource(resource.build())
            .with_sampler(sampler)
            .build();
        traces::begin_with(provider.tracer("expertmesh"));
        tracing::info!(endpoint, sample = self.otlp_sample, "traces are sent");
        Ok(Exporting(Some(provider)))
    }
}

impl Drop for Exporting {
    fn drop(&mut self) {
        if let Some(provider) = self.0.take()
            && let Err(error) = provider.shutdown_with_timeout(FLUSH)
        {
            tracing::warn!(%error, "the last spans were not sent");
        }
    }
}

/// Says once that a collector does not take spans, and once that it does again.
#[derive(Debug)]
struct Telling {
    exporter: SpanExporter,
    failing: AtomicBool,
}

impl trace::SpanExporter for Telling {
    async fn export(&self, batch: Vec<SpanData>) -> OTelSdkResult {
        let exported = self.exporter.export(batch).await;
        match (&exported, self.failing.swap(exported.is_err(), Ordering::Relaxed)) {
            (Err(error), false) => tracing::warn!(%error, "spans cannot be sent, and are lost"),
            (Ok(()), true) => tracing::info!("spans are sent again"),
            _ => {}
        }
        exported
    }

    fn shutdown_with_timeout(&self, timeout: Duration) -> OTelSdkResult {
        self.exporter.shutdown_with_timeout(timeout)
    }

    fn force_flush(&self) -> OTelSdkResult {
        self.exporter.force_flush()
    }

    fn set_resource(&mut self, resource: &Resource) {
        self.exporter.set_resource(resource);
    }
}

#[cfg(test)]
mod tests {
    use axum::http::HeaderMap;

    use super::*;
    use crate::traces::{Span, SpanKind};

    #[test]
    fn without_an_endpoint_there_are_no_spans() {
        let args = Args { otlp_endpoint: None, otlp_sample: 1.0 };
        let _exporting = args.start("expertmesh-worker", "w-0").unwrap();
        let mut headers = HeaderMap::new();
        headers.insert(
            "traceparent",
            "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01".parse().unwrap(),
        );
        assert!(traces::request(&headers, || panic!("a name was asked for")).is_none());
        let dispatched = traces::dispatched("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01");
        assert!(dispatched.child("experts", SpanKind::Server).is_none());
        assert_eq!(Span::default().traceparent(), "");
    }

    #[test]
    fn what_cannot_be_exported_to_is_named() {
        let start = |endpoint: &str, otlp_sample| {
            let args = Args { otlp_endpoint: Some(endpoint.to_string()), otlp_sample };
            args.start("expertmesh-worker", "w-0").err().map(|fatal| fatal.reason)
        };
        assert_eq!(start("http://collector:4317", 1.5), Some("InvalidOtlpSample"));
        assert_eq!(start("https://collector:4317", 1.0), Some("InvalidOtlpEndpoint"));
        assert_eq!(start("", 1.0), None, "an empty variable is none");
    }
}
