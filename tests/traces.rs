//! One trace from a client's request to the experts of other workers, as a collector of this test's own sees it.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};

use expertmesh_tests::frontend::Frontend;
use expertmesh_tests::http;
use expertmesh_tests::mesh::Mesh;
use expertmesh_tests::reference::Question;
use opentelemetry_proto::tonic::collector::trace::v1::trace_service_server::{
    TraceService, TraceServiceServer,
};
use opentelemetry_proto::tonic::collector::trace::v1::{
    ExportTraceServiceRequest, ExportTraceServiceResponse,
};
use opentelemetry_proto::tonic::common::v1::any_value::Value;
use opentelemetry_proto::tonic::common::v1::{AnyValue, KeyValue};
use opentelemetry_proto::tonic::trace::v1::Span;
use tokio::net::TcpListener;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::{Request, Response, Status};

/// Spans with the instance that sent them.
#[derive(Clone, Default)]
struct Collector(Arc<Mutex<Vec<(String, Span)>>>);

#[tonic::async_trait]
impl TraceService for Collector {
    async fn export(
        &self,
        request: Request<ExportTraceServiceRequest>,
    ) -> Result<Response<ExportTraceServiceResponse>, Status> {
        let mut spans = self.0.lock().unwrap();
        for of_resource in request.into_inner().resource_spans {
            let attributes = of_resource.resource.unwrap_or_default().attributes;
            let instance = text(&attributes, "service.instance.id").expect("an instance");
            let found = of_resource.scope_spans.into_iter().flat_map(|scope| scope.spans);
            spans.extend(found.map(|span| (instance.clone(), span)));
        }
        Ok(Response::new(ExportTraceServiceResponse::default()))
    }
}

fn text(attributes: &[KeyValue], key: &str) -> Option<String> {
    let value = attributes.iter().find(|attribute| attribute.key == key)?.value.as_ref();
    match value {
        Some(AnyValue { value: Some(Value::StringValue(text)) }) => Some(text.clone()),
        Some(AnyValue { value: Some(Value::IntValue(number)) }) => Some(number.to_string()),
        _ => None,
    }
}

fn bytes(hex: &str) -> Vec<u8> {
    (0..hex.len()).step_by(2).map(|at| u8::from_str_radix(&hex[at..at + 2], 16).expect("hex")).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_trace_leads_from_the_clients_request_to_the_experts_of_two_other_workers() {
    const TRACED: &str = "0af7651916cd43dd8448eb211c80319c";
    const UNTRACED: &str = "1bf7651916cd43dd8448eb211c80319c";
    const CLIENT: &str = "b7ad6b7169203331";
    let collector = Collector::default();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let endpoint = format!("http://{}", listener.local_addr().unwrap());
    let service = TraceServiceServer::new(collector.clone());
    let server = tonic::transport::Server::builder().add_service(service);
    let serving = tokio::spawn(server.serve_with_incoming(TcpListenerStream::new(listener)));

    let mut mesh = Mesh::start_with("traces", 3, &["--otlp-endpoint", &endpoint]).await;
    let mut frontend = Frontend::start(&mut mesh).await;
    let mut body = frontend.api.body(&Question::several(1)[0], false);
    body["max_tokens"] = 5.into();
    for (trace, flags) in [(UNTRACED, "00"), (TRACED, "01")] {
        let traceparent = format!("00-{trace}-{CLIENT}-{flags}");
        let headers = [("traceparent", traceparent.as_str())];
        let (status, answer) = http::post_with(&frontend.api.completions(), &headers, &body).unwrap();
        assert_eq!(status, 200, "{answer}");
    }
    // What is left is sent at the end.
    for process in [&mut frontend.process].into_iter().chain(&mut mesh.workers) {
        process.signal("TERM");
        process.wait();
    }
    serving.abort();

    let spans = collector.0.lock().unwrap();
    assert!(spans.iter().all(|(_, span)| span.trace_id == bytes(TRACED)), "another request was traced");
    let by_id: BTreeMap<&[u8], &(String, Span)> =
        spans.iter().map(|found| (found.1.span_id.as_slice(), found)).collect();
    let count = |name: &str| spans.iter().filter(|(_, span)| span.name == name).count();
    assert_eq!((count("POST /v1/chat/completions"), count("attempt"), count("sequence")), (1, 1, 1));
    assert_eq!((count("queue"), count("step")), (1, 5), "the prompt's step and one for each further token");
    assert_eq!(count("dispatch"), count("experts"));

    let mut peers = BTreeSet::new();
    for (peer, span) in spans.iter().filter(|(_, span)| span.name == "experts") {
        let (mut names, mut at) = (Vec::new(), span);
        let (mut owner, mut dispatch) = ("", span);
        while let Some((instance, parent)) = by_id.get(at.parent_span_id.as_slice()) {
            names.push(parent.name.as_str());
            match parent.name.as_str() {
                "dispatch" => dispatch = parent,
                "step" => owner = instance,
                _ => {}
            }
            assert!(parent.start_time_unix_nano <= at.start_time_unix_nano, "{} began later", parent.name);
            at = parent;
        }
        assert_eq!(names, ["dispatch", "step", "sequence", "attempt", "POST /v1/chat/completions"]);
        assert_eq!(at.parent_span_id, bytes(CLIENT));
        let attribute = |span: &Span, key| text(&span.attributes, key).expect(key);
        for (key, of) in [("expertmesh.layer", span), ("expertmesh.rows", span)] {
            assert_eq!(attribute(of, key), attribute(dispatch, key));
        }
        assert_eq!(format!("worker-{}", attribute(dispatch, "expertmesh.peer")), *peer);
        assert_eq!(format!("worker-{}", attribute(span, "expertmesh.peer")), owner);
        assert_ne!(owner, peer);
        peers.insert(peer);
    }
    assert_eq!(peers.len(), 2, "the experts are on two other workers");
}
