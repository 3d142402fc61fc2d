//! Spans by OpenTelemetry, where `collector.rs` sends them somewhere. Otherwise no span is ever made.

use std::sync::OnceLock;
use std::time::{Instant, SystemTime};

use axum::http::HeaderMap;
use opentelemetry::propagation::{Extractor, TextMapPropagator};
use opentelemetry::trace::{SpanContext, Status, TraceContextExt, Tracer};
use opentelemetry::{Context, ContextGuard, KeyValue, Value};
use opentelemetry_sdk::propagation::TraceContextPropagator;
use opentelemetry_sdk::trace::SdkTracer;
use tonic::metadata::MetadataMap;

pub(crate) use opentelemetry::trace::SpanKind;

const TRACEPARENT: &str = "traceparent";

static TRACER: OnceLock<SdkTracer> = OnceLock::new();

/// Makes spans with this tracer from now on; once in a process.
pub(crate) fn begin_with(tracer: SdkTracer) {
    let _ = TRACER.set(tracer);
}

/// Whether any span is made at all.
pub(crate) fn on() -> bool {
    TRACER.get().is_some()
}

/// A span that is recorded, or none. It ends when it is dropped.
#[derive(Debug, Default)]
pub(crate) struct Span(Option<Context>);

/// A span that others belong to, or none: then they are none either.
#[derive(Debug, Clone, Default)]
pub(crate) struct Parent(Option<Context>);

/// The span of a client's request: in the client's trace where it names one, otherwise in a new one, for the share of
/// requests that is sampled.
pub(crate) fn request(headers: &HeaderMap, name: impl FnOnce() -> String) -> Span {
    if !on() {
        return Span::default();
    }
    let parent = TraceContextPropagator::new().extract_with_context(&Context::new(), &Headers(headers));
    begin(name(), SpanKind::Server, &parent)
}

/// The span of another process of ours that calls this one, by its metadata; none where it is not sampled.
pub(crate) fn called(metadata: &MetadataMap) -> Parent {
    if on() { remote(&Headers(metadata.as_ref())) } else { Parent::default() }
}

/// The span of a peer that sent a ticket, by its `traceparent`; none where that is empty or not sampled.
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

    /// Refers to another span, which has a part in what this one is about.
    pub(crate) fn link(&self, other: &Self) {
        if let (Some(context), Some(other)) = (&self.0, &other.0) {
            context.span().add_link(other.span().span_context().clone(), Vec::new());
        }
    }

    /// Ends the span as of some time ago.
    pub(crate) fn end_at(&mut self, at: Instant) {
        if let Some(context) = self.0.take() {
            let now = SystemTime::now();
            context.span().end_with_timestamp(now.checked_sub(at.elapsed()).unwrap_or(now));
        }
    }

    /// Makes this the span of what the thread does until the guard is dropped.
    pub(crate) fn enter(&self) -> Option<ContextGuard> {
        self.0.clone().map(Context::attach)
    }

    /// The `traceparent` that a ticket carries; empty where there is no span.
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
