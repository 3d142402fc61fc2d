use std::sync::Mutex;
use std::time::Duration;

use hyper_util::rt::TokioIo;
use time::{Duration as Span, OffsetDateTime};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::oneshot;
use tokio_rustls::TlsConnector;
use tonic::service::Routes;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Status};
use tower::service_fn;

use super::authority::{Authority, Leaf};
use super::identity::Who;
use super::*;
use crate::channel::{Connect, connect, serve};
use crate::v1;
use crate::v1::control_client::ControlClient;
use crate::v1::expert_exchange_client::ExpertExchangeClient;
use crate::v1::inference_client::InferenceClient;

const HOW: Connect = Connect { timeout: Duration::from_secs(5), keepalive: None, bulk: false };

fn deployment(namespace: &str, name: &str) -> Deployment {
    Deployment { namespace: namespace.into(), name: name.into() }
}

fn member(namespace: &str, name: &str, component: Component) -> Who {
    Who::Member { deployment: deployment(namespace, name), component }
}

fn ours(component: Component) -> Who {
    member("a", "m", component)
}

fn material(leaf: &Leaf, authorities: &[&Authority]) -> Material {
    let authorities: String = authorities.iter().map(|authority| authority.certificate()).collect();
    Material::from_pem(leaf.chain.as_bytes(), leaf.key.as_bytes(), authorities.as_bytes()).unwrap()
}

/// A client that shows this leaf, and believes the server whatever that does not believe of it.
fn client(leaf: &Leaf, authority: &Authority) -> Trust {
    Trust::new(material(leaf, &[authority]), |_| {})
}

/// A server without services, and what it noticed.
struct Scene {
    authority: Authority,
    trust: Trust,
    address: String,
    notices: Arc<Mutex<Vec<Notice>>>,
    _stop: oneshot::Sender<()>,
}

impl Scene {
    async fn new() -> Self {
        let authority = Authority::new("one").unwrap();
        let notices = Arc::<Mutex<Vec<Notice>>>::default();
        let noticed = notices.clone();
        let material = authority.material(&ours(Component::Worker)).unwrap();
        let trust = Trust::new(material, move |notice| noticed.lock().unwrap().push(notice));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let (stop, stopped) = oneshot::channel::<()>();
        let stopped = async {
            let _ = stopped.await;
        };
        tokio::spawn(serve(listener, Routes::default(), Some(trust.clone()), stopped));
        Self { authority, trust, address, notices, _stop: stop }
    }

    fn leaf(&self, who: &Who) -> Leaf {
        self.authority.leaf(who).unwrap()
    }

    /// A connection of a client of this installation, or of another that says it is.
    async fn connect(&self, leaf: &Leaf) -> Channel {
        let callee = client(leaf, &self.authority).member(deployment("a", "m"), Component::Worker);
        connect(&self.address, &HOW, Some(&callee)).await.unwrap()
    }

    /// The server's answers to each RPC.
    async fn calls(&self, leaf: &Leaf) -> Vec<Code> {
        calls(self.connect(leaf).await).await
    }

    fn refusals(&self) -> Vec<Refusal> {
        let notices = std::mem::take(&mut *self.notices.lock().unwrap());
        let refusals = notices.into_iter().filter_map(|notice| match notice {
            Notice::Refused(refusal) => Some(refusal),
            Notice::Expired => None,
        });
        refusals.collect()
    }
}

/// Report, ApplyPlacement, Drain, Exchange, Generate: UNIMPLEMENTED where the call got through, since there are no services.
async fn calls(channel: Channel) -> Vec<Code> {
    let code = |answer: Result<(), Status>| answer.map_or_else(|status| status.code(), |()| Code::Ok);
    let mut control = ControlClient::new(channel.clone());
    let report = control.report(v1::ReportRequest::default()).await.map(drop);
    let place = control.apply_placement(v1::ApplyPlacementRequest::default()).await.map(drop);
    let drain = control.drain(v1::DrainRequest::default()).await.map(drop);
    let exchange = ExpertExchangeClient::new(channel.clone()).exchange(tokio_stream::empty()).await.map(drop);
    let generate = InferenceClient::new(channel).generate(v1::GenerateRequest::default()).await.map(drop);
    [report, place, drain, exchange, generate].map(code).to_vec()
}

const YES: Code = Code::Unimplemented;
const NO: Code = Code::PermissionDenied;

#[tokio::test]
async fn each_member_may_make_its_own_calls_and_no_others_which_are_counted() {
    let scene = Scene::new().await;
    let may = [
        (Who::Operator, [YES, YES, YES, NO, NO]),
        (ours(Component::Worker), [YES, NO, NO, YES, NO]),
        (ours(Component::Frontend), [YES, NO, NO, NO, YES]),
        (member("a", "other", Component::Worker), [NO; 5]),
        (member("b", "m", Component::Worker), [NO; 5]),
        (member("b", "m", Component::Frontend), [NO; 5]),
    ];
    for (who, expected) in may {
        assert_eq!(scene.calls(&scene.leaf(&who)).await, expected, "{who:?}");
        let refused = expected.iter().filter(|code| **code == NO).count();
        assert_eq!(scene.refusals(), vec![Refusal::Forbidden; refused], "{who:?}");
    }
}

#[tokio::test]
async fn whom_no_authority_of_ours_signed_or_who_is_of_the_future_is_told_so() {
    let scene = Scene::new().await;
    let another = Authority::new("one").unwrap(); // the same name, and another key
    let now = OffsetDateTime::now_utc();
    let early = scene.authority.leaf_at(&Who::Operator, now + Span::hours(25)).unwrap();
    for leaf in [another.leaf(&Who::Operator).unwrap(), early] {
        assert_eq!(scene.calls(&leaf).await, [Code::Unauthenticated; 5]);
        assert_eq!(scene.refusals(), [Refusal::Unverified; 5]);
    }
    let skewed = scene.authority.leaf_at(&Who::Operator, now + Span::hours(23)).unwrap();
    assert_eq!(scene.calls(&skewed).await[0], YES, "clocks differ by less than a day");
}

#[tokio::test]
async fn a_certificate_whose_time_is_over_is_taken_and_counted() {
    let scene = Scene::new().await;
    let old = OffsetDateTime::now_utc() - Span::days(40);
    let leaf = scene.authority.leaf_at(&Who::Operator, old).unwrap();
    assert_eq!(scene.calls(&leaf).await, [YES, YES, YES, NO, NO]);
    assert_eq!(scene.notices.lock().unwrap()[0], Notice::Expired);
}

#[tokio::test]
async fn plain_text_and_no_certificate_are_told_what_is_spoken_here_but_for_health() {
    let scene = Scene::new().await;
    let plain = connect(&scene.address, &HOW, None).await.unwrap();
    assert_eq!(calls(plain.clone()).await, [Code::Unauthenticated; 5]);
    assert_eq!(scene.refusals(), [Refusal::Plaintext; 5]);

    let address = scene.address.clone();
    let trust = scene.trust.clone();
    let nameless = service_fn(move |_| {
        let (address, trust) = (address.clone(), trust.clone());
        async move {
            let provider = Arc::new(ring::default_provider());
            let callee = trust.member(deployment("a", "m"), Component::Worker);
            let verifier = Arc::new(Only { callee, provider: provider.clone() });
            let builder =
                ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions().unwrap();
            let builder = builder.dangerous().with_custom_certificate_verifier(verifier);
            let mut config = builder.with_no_client_auth();
            config.alpn_protocols = vec![HTTP2.to_vec()];
            let stream = TcpStream::connect(address).await?;
            let name = ServerName::try_from("expertmesh").unwrap();
            let stream = TlsConnector::from(Arc::new(config)).connect(name, stream).await?;
            Ok::<_, std::io::Error>(TokioIo::new(stream))
        }
    });
    let endpoint = Endpoint::from_static("http://nameless");
    let channel = endpoint.connect_with_connector(nameless).await.unwrap();
    assert_eq!(calls(channel).await, [Code::Unauthenticated; 5]);
    assert_eq!(scene.refusals(), [Refusal::Nameless; 5]);

    let health = tonic::client::Grpc::new(plain);
    let path = tonic::codegen::http::uri::PathAndQuery::from_static("/grpc.health.v1.Health/Check");
    let answer = asked(health, path).await;
    assert_eq!(answer, YES, "tools have no certificate");
}

async fn asked(
    mut client: tonic::client::Grpc<Channel>,
    path: tonic::codegen::http::uri::PathAndQuery,
) -> Code {
    client.ready().await.unwrap();
    let codec = tonic_prost::ProstCodec::<v1::DrainRequest, v1::DrainResponse>::default();
    let answer = client.unary(tonic::Request::new(v1::DrainRequest::default()), path, codec).await;
    answer.map_or_else(|status| status.code(), |_| Code::Ok)
}

#[tokio::test]
async fn a_client_gives_nothing_to_whoever_is_not_whom_it_called() {
    let scene = Scene::new().await;
    let caller = client(&scene.leaf(&Who::Operator), &scene.authority);
    let called = |callee: Callee| {
        let address = scene.address.clone();
        async move { connect(&address, &HOW, Some(&callee)).await.map(drop).map_err(|error| error.to_string()) }
    };
    called(caller.member(deployment("a", "m"), Component::Worker)).await.unwrap();
    let wrong = called(caller.member(deployment("a", "m"), Component::Frontend)).await.unwrap_err();
    let text = "spiffe://one/ns/a/mdep/m/worker answers where spiffe://one/ns/a/mdep/m/frontend was called";
    assert!(wrong.ends_with(text), "{wrong}");
    called(caller.member(deployment("b", "m"), Component::Worker)).await.unwrap_err();

    let stranger = Authority::new("one").unwrap();
    let stranger = client(&stranger.leaf(&Who::Operator).unwrap(), &stranger);
    let unknown = called(stranger.member(deployment("a", "m"), Component::Worker)).await.unwrap_err();
    assert!(unknown.contains("its certificate: "), "{unknown}");
}

#[tokio::test]
async fn one_authority_follows_another_without_a_restart_or_a_refusal_and_connections_stay() {
    let scene = Scene::new().await;
    let before = scene.connect(&scene.leaf(&Who::Operator)).await;
    assert_eq!(calls(before.clone()).await[0], YES);

    // Both are believed for a while, and the leaf is of the new one: files do not come to all at the same moment.
    let next = Authority::new("two").unwrap();
    let renewed = next.leaf(&ours(Component::Worker)).unwrap();
    scene.trust.swap(material(&renewed, &[&scene.authority, &next]));
    let leaves = [scene.leaf(&ours(Component::Frontend)), next.leaf(&ours(Component::Frontend)).unwrap()];
    for leaf in leaves {
        let frontend = Trust::new(material(&leaf, &[&scene.authority, &next]), |_| {});
        let callee = frontend.sibling(Component::Worker).unwrap();
        let after = connect(&scene.address, &HOW, Some(&callee)).await.unwrap();
        assert_eq!(calls(after).await, [YES, NO, NO, NO, YES]);
    }
    assert_eq!(calls(before).await[0], YES, "what is up stays up");
}

#[tokio::test]
async fn sixty_four_callers_at_once_are_known_within_moments() {
    let scene = Scene::new().await;
    let callee = client(&scene.leaf(&ours(Component::Worker)), &scene.authority);
    let callee = callee.sibling(Component::Worker).unwrap();
    let all = (0..64).map(|_| connect(&scene.address, &HOW, Some(&callee)));
    let connected = futures::future::join_all(all).await;
    assert!(connected.into_iter().all(|channel| channel.is_ok()));
}

#[test]
fn files_that_are_no_identity_say_which_one_and_why() {
    let authority = Authority::new("one").unwrap();
    let leaf = authority.leaf(&Who::Operator).unwrap();
    let (chain, key, roots) =
        (leaf.chain.as_bytes(), leaf.key.as_bytes(), authority.certificate().as_bytes());
    let problem = |chain, key, roots| Material::from_pem(chain, key, roots).unwrap_err().to_string();
    assert_eq!(problem(b"", key, roots), "tls.crt: no certificate");
    assert_eq!(problem(chain, key, b""), "ca.crt: no certificate");
    assert!(problem(chain, b"", roots).starts_with("tls.key: "));
    assert!(problem(roots, key, roots).starts_with("tls.crt: no identity"), "{}", problem(roots, key, roots));
    let other = authority.leaf(&Who::Operator).unwrap();
    assert!(problem(chain, other.key.as_bytes(), roots).starts_with("tls.key: "));
}

#[tokio::test]
async fn an_authority_that_was_written_down_signs_as_before_and_another_ones_key_is_no_authority() {
    let scene = Scene::new().await;
    let again = Authority::from_pem("one", scene.authority.certificate(), &scene.authority.key()).unwrap();
    assert_eq!(scene.calls(&again.leaf(&Who::Operator).unwrap()).await, [YES, YES, YES, NO, NO]);
    let another = Authority::new("one").unwrap();
    for (installation, key) in [("one", another.key()), ("two", scene.authority.key())] {
        let problem = Authority::from_pem(installation, scene.authority.certificate(), &key).err().unwrap();
        assert!(problem.to_string().starts_with("ca.crt: "), "{problem}");
    }
}
