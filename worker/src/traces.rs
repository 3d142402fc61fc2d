//! Traces by OpenTelemetry, where an endpoint for them is named. Without one no span is ever made.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant, SystemTime};

use axum::http::HeaderMap;
use opentelemetry::propagation::{Extractor, TextMapPropagator};
use opentelemetry::trace::{SpanContext, Status, TraceContextExt, Tracer, TracerProvider};
use opentelemetry::{Context, ContextGuard, KeyValue, Value};
use opentelemetry_otlp::{SpanExporter, WithExportConfig};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::error::OTelSdkResult;
use opentelemetry_sdk::propagation::TraceContextPropagator;
use opentelemetry_sdk::trace::{
    self, BatchConfigBuilder, BatchSpanProcessor, Sampler, SdkTracer, SdkTracerProvider, SpanData,
};
use tonic::metadata::MetadataMap;

pub(crate) use opentelemetry::trace::SpanKind;

use crate::process::Fatal;

/// Spans that wait to be sent; more are dropped, and nobody waits.
const QUEUE: usize = 16 << 10;
/// Spans of one message, and how long they are gathered for it.
const BATCH: usize = 512;
const GATHER: Duration = Duration::from_secs(1);
/// How long the end of a process waits for the last ones.
const FLUSH: Duration = Duration::from_secs(2);
const TRACEPARENT: &str = "traceparent";

static TRACER: OnceLock<SdkTracer> = OnceLock::new();

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Where traces go, by OTLP over gRPC: http://HOST:4317; without it there are none
    #[arg(long, value_name = "URL", env = "OTEL_EXPORTER_OTLP_ENDPOINT")]
    otlp_endpoint: Option<String>,
    /// The share of requests that are traced, 0 to 1; whoever sends a traceparent decides for its own
    #[arg(long, value_name = "RATIO", env = "EXPERTMESH_OTLP_SAMPLE", default_value_t = 1.0)]
    otlp_sample: f64,
}

/// Exports until it is dropped, which sends what is left. The runtime must go on meanwhile.
pub(crate) struct Exporting(Option<SdkTracerProvider>);

impl Args {
    /// To be called within the runtime. `service` and `instance` say whose the spans are.
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
        let _ = TRACER.set(provider.tracer("expertmesh"));
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

/// Whether any span is made at all.
pub(crate) fn on() -> bool {
    TRACER.get().is_some()
}

/// A span that is recorded, or none. It ends when it is dropped.
#[derive(Debug, Default)]
pub(crate) struct Span(Option<Context>);

/// Where spans belong.
#[derive(Debug, Clone, Default)]
pub(crate) struct Parent(Option<Context>);

/// A request's span: the client's trace where it sends one, otherwise a new one for the share that is sampled.
pub(crate) fn request(headers: &HeaderMap, name: impl FnOnce() -> String) -> Span {
    if !on() {
        return Span::default();
    }
    let parent = TraceContextPropagator::new().extract_with_context(&Context::new(), &Headers(headers));
    begin(name(), SpanKind::Server, &parent)
}

/// What another process of ours asks for, where it traces that.
pub(crate) fn called(metadata: &MetadataMap) -> Parent {
    if on() { remote(&Headers(metadata.as_ref())) } else { Parent::default() }
}

/// The same, by the `traceparent` of a ticket.
pub(crate) fn dispatched(traceparent: &str) -> Parent {
    if !traceparent.is_empty() && on() { remote(&Text(traceparent)) } else { Parent::default() }
}

/// The span that this thread has entered.
pub(crate) fn current() -> Parent {
    let entered = || Some(Context::current()).filter(TraceContextExt::has_active_span);
    Parent(on().then(entered).flatten())
}

fn remote(carrier: &dyn Extractor) -> Parent {
    let context = TraceContextPropagator::new().extract_with_context(&Context::new(), carrier);
    let sampled = context.span().span_context().is_sampled();
    Parent(sampled.then_some(context))
}

fn begin(name: impl Into<std::borrow::Cow<'static, str>>, kind: SpanKind, parent: &Context) -> Span {
    let Some(tracer) = TRACER.get() else { return Span::default() };
    let span = tracer.span_builder(name).with_kind(kind).start_with_context(tracer, parent);
    let context = parent.with_span(span);
    let sampled = context.span().span_context().is_sampled();
    Span(sampled.then_some(context))
}

impl Parent {
    pub(crate) fn child(&self, name: &'static str, kind: SpanKind) -> Span {
        self.0.as_ref().map_or_else(Span::default, |parent| begin(name, kind, parent))
    }
}

impl Span {
    pub(crate) fn is_none(&self) -> bool {
        self.0.is_none()
    }

    pub(crate) fn parent(&self) -> Parent {
        Parent(self.0.clone())
    }

    pub(crate) fn set(&self, key: &'static str, value: impl Into<Value>) {
        if let Some(context) = &self.0 {
            context.span().set_attribute(KeyValue::new(key, value));
        }
    }

    pub(crate) fn fail(&self, reason: &'static str) {
        if let Some(context) = &self.0 {
            context.span().set_status(Status::error(reason));
        }
    }

    /// Another span that this one is about.
    pub(crate) fn link(&self, other: &Self) {
        if let (Some(context), Some(other)) = (&self.0, &other.0) {
            context.span().add_link(other.span().span_context().clone(), Vec::new());
        }
    }

    /// It ended some time ago.
    pub(crate) fn end_at(&mut self, at: Instant) {
        if let Some(context) = self.0.take() {
            let now = SystemTime::now();
            context.span().end_with_timestamp(now.checked_sub(at.elapsed()).unwrap_or(now));
        }
    }

    /// What this thread does until the guard is dropped belongs to it.
    pub(crate) fn enter(&self) -> Option<ContextGuard> {
        self.0.clone().map(Context::attach)
    }

    /// For a ticket; empty where there is no span.
    pub(crate) fn traceparent(&self) -> String {
        let text = |context: &Context| {
            let span = context.span();
            let context: &SpanContext = span.span_context();
            let flags = context.trace_flags().to_u8();
            format!("00-{}-{}-{flags:02x}", context.trace_id(), context.span_id())
        };
        self.0.as_ref().map(text).unwrap_or_default()
    }

    /// Tells the process that is called whose its spans are.
    pub(crate) fn tell(&self, metadata: &mut MetadataMap) {
        // Not the client's tracestate: a long one is more than a header list may hold.
        let parent = self.traceparent();
        if let Some(parent) = parent.parse().ok().filter(|_| !parent.is_empty()) {
            metadata.insert("traceparent", parent);
        }
    }
}

impl Drop for Span {
    fn drop(&mut self) {
        if let Some(context) = self.0.take() {
            context.span().end();
        }
    }
}

struct Headers<'a>(&'a HeaderMap);

impl Extractor for Headers<'_> {
    fn get(&self, key: &str) -> Option<&str> {
        self.0.get(key)?.to_str().ok()
    }

    fn keys(&self) -> Vec<&str> {
        self.0.keys().map(|key| key.as_str()).collect()
    }
}

struct Text<'a>(&'a str);

impl Extractor for Text<'_> {
    fn get(&self, key: &str) -> Option<&str> {
        (key == TRACEPARENT).then_some(self.0)
    }

    fn keys(&self) -> Vec<&str> {
        vec![TRACEPARENT]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_an_endpoint_there_are_no_spans() {
        let args = Args { otlp_endpoint: None, otlp_sample: 1.0 };
        let _exporting = args.start("expertmesh-worker", "w-0").unwrap();
        let mut headers = HeaderMap::new();
        headers
            .insert(TRACEPARENT, "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01".parse().unwrap());
        assert!(request(&headers, || panic!("a name was asked for")).is_none());
        let dispatched = dispatched("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01");
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
