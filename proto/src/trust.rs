//! Mutual TLS between the parts of an installation: who a process is, whom it believes, and who may call what.
//!
//! A certificate names a process by its SPIFFE id (`identity.rs`), an authority of the installation signs it (`authority.rs`), and `table.rs`
//! says on one screen who may call which RPC. Addresses prove nothing here: a name in a certificate is an identity, not a host.

#[cfg(feature = "authority")]
pub mod authority;
pub mod identity;
pub mod material;
pub(crate) mod table;

use std::path::Path;
use std::sync::{Arc, PoisonError, RwLock};

use rustls::client::ResolvesClientCert;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, ring, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use rustls::version::TLS13;
use rustls::{ClientConfig, DigitallySignedStruct, DistinguishedName, ServerConfig, SignatureScheme};
use webpki::KeyUsage;

use crate::files;
use identity::{Component, Deployment, Identity};
use material::{Material, MaterialError};

/// What is spoken within.
const HTTP2: &[u8] = b"h2";

/// What a process is to count.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Notice {
    /// A call that was refused.
    Refused(Refusal),
    /// A connection of a certificate whose time is over, or to one.
    Expired,
}

/// Why a caller is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// It does not speak TLS.
    Plaintext,
    /// It shows no certificate.
    Nameless,
    /// No authority that is known signed its certificate, or it is of the future, or names nobody.
    Unverified,
    /// It is known, and may not make this call.
    Forbidden,
}

impl Refusal {
    pub const ALL: [Self; 4] = [Self::Plaintext, Self::Nameless, Self::Unverified, Self::Forbidden];

    pub fn name(self) -> &'static str {
        match self {
            Self::Plaintext => "plaintext",
            Self::Nameless => "nameless",
            Self::Unverified => "unverified",
            Self::Forbidden => "forbidden",
        }
    }
}

/// Who this process is, and whom it believes. Its clones share what is swapped.
#[derive(Clone)]
pub struct Trust(Arc<Shared>);

struct Shared {
    material: RwLock<Arc<Material>>,
    notice: Box<dyn Fn(Notice) + Send + Sync>,
}

impl std::fmt::Debug for Trust {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        write!(f, "Trust({})", self.identity())
    }
}

/// Whom a connection is for: anybody else who answers is refused.
#[derive(Debug, Clone)]
pub struct Callee {
    trust: Trust,
    identity: Identity,
}

impl Trust {
    pub fn new(material: Material, notice: impl Fn(Notice) + Send + Sync + 'static) -> Self {
        Self(Arc::new(Shared { material: RwLock::new(Arc::new(material)), notice: Box::new(notice) }))
    }

    pub fn identity(&self) -> Identity {
        self.material().identity.clone()
    }

    /// A component of this process's own deployment; none for the operator, which has no deployment.
    pub fn sibling(&self, component: Component) -> Option<Callee> {
        let identity = self.identity().sibling(component)?;
        Some(Callee { trust: self.clone(), identity })
    }

    /// A component of any deployment of the installation.
    pub fn member(&self, deployment: Deployment, component: Component) -> Callee {
        Callee { trust: self.clone(), identity: self.identity().member(deployment, component) }
    }

    /// New connections show this certificate and believe these authorities; those that are up stay.
    pub fn swap(&self, material: Material) {
        *self.0.material.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(material);
    }

    /// Swaps for ever what a folder holds where its files change. `failed` is told why what is there cannot be used: what was, goes on.
    pub async fn follow(&self, folder: &Path, failed: impl Fn(MaterialError)) {
        let take = |files: Result<&_, _>| match files.and_then(Material::of) {
            Ok(material) => self.swap(material),
            Err(error) => failed(error),
        };
        files::follow(|| Material::files(folder), take).await;
    }

    pub(crate) fn notice(&self, notice: Notice) {
        (self.0.notice)(notice);
    }

    fn material(&self) -> Arc<Material> {
        self.0.material.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Whose a client's certificates are.
    pub(crate) fn caller(&self, chain: Option<&[CertificateDer]>) -> Result<Identity, Refusal> {
        let chain = chain.filter(|chain| !chain.is_empty()).ok_or(Refusal::Nameless)?;
        let verified = self.material().verify(chain, KeyUsage::client_auth(), UnixTime::now());
        let verified = verified.map_err(|_| Refusal::Unverified)?;
        if verified.expired.is_some() {
            self.notice(Notice::Expired);
        }
        Ok(verified.identity)
    }

    /// A client that shows no certificate, or a wrong one, is let in to be told so: no message of it is read.
    pub(crate) fn server(&self) -> Result<ServerConfig, rustls::Error> {
        let verifier = Arc::new(Anybody(Arc::new(ring::default_provider())));
        let builder =
            ServerConfig::builder_with_provider(verifier.0.clone()).with_protocol_versions(&[&TLS13])?;
        let shown = Arc::new(Shown(self.clone()));
        let mut config = builder.with_client_cert_verifier(verifier).with_cert_resolver(shown);
        config.alpn_protocols = vec![HTTP2.to_vec()];
        config.send_tls13_tickets = 0; // a resumed session would show nothing of what was renewed
        Ok(config)
    }
}

impl Callee {
    pub(crate) fn client(&self) -> Result<ClientConfig, rustls::Error> {
        let provider = Arc::new(ring::default_provider());
        let builder =
            ClientConfig::builder_with_provider(provider.clone()).with_protocol_versions(&[&TLS13])?;
        let verifier = Arc::new(Only { callee: self.clone(), provider });
        let builder = builder.dangerous().with_custom_certificate_verifier(verifier);
        let mut config = builder.with_client_cert_resolver(Arc::new(Shown(self.trust.clone())));
        config.alpn_protocols = vec![HTTP2.to_vec()];
        config.resumption = rustls::client::Resumption::disabled();
        Ok(config)
    }
}

/// The certificate of now, for servers and clients.
#[derive(Debug)]
struct Shown(Trust);

impl ResolvesServerCert for Shown {
    fn resolve(&self, _hello: ClientHello) -> Option<Arc<CertifiedKey>> {
        Some(self.0.material().key.clone())
    }
}

impl ResolvesClientCert for Shown {
    fn resolve(&self, _authorities: &[&[u8]], _schemes: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        Some(self.0.material().key.clone())
    }

    fn has_certs(&self) -> bool {
        true
    }
}

/// Takes any certificate whose key the client has: whose it is, is looked at afterwards, so that the answer can say why it is refused.
#[derive(Debug)]
struct Anybody(Arc<CryptoProvider>);

impl ClientCertVerifier for Anybody {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn client_auth_mandatory(&self) -> bool {
        false
    }

    fn verify_client_cert(
        &self,
        _leaf: &CertificateDer,
        _between: &[CertificateDer],
        _now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        Ok(ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _certificate: &CertificateDer,
        _signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(only_13())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, certificate, signed, &self.0.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

/// Takes the certificate of one identity, whatever the host is called.
#[derive(Debug)]
struct Only {
    callee: Callee,
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for Only {
    fn verify_server_cert(
        &self,
        leaf: &CertificateDer,
        between: &[CertificateDer],
        _name: &ServerName,
        _ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let Callee { trust, identity } = &self.callee;
        let chain: Vec<_> = [leaf].into_iter().chain(between).cloned().collect();
        let verified = trust.material().verify(&chain, KeyUsage::server_auth(), now);
        let verified =
            verified.map_err(|problem| rustls::Error::General(format!("its certificate: {problem}")))?;
        // Another authority's is as good, as long as it is believed: one follows another.
        if verified.identity.who != identity.who {
            let problem = format!("{} answers where {identity} was called", verified.identity);
            return Err(rustls::Error::General(problem));
        }
        if verified.expired.is_some() {
            trust.notice(Notice::Expired);
        }
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _certificate: &CertificateDer,
        _signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(only_13())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, certificate, signed, &self.provider.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

#[cfg(all(test, feature = "authority"))]
mod tests;

fn only_13() -> rustls::Error {
    rustls::Error::General("TLS 1.3 alone is spoken here".into())
}
