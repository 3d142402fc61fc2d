//! What a process shows of itself, and whom it believes: a certificate with its key, and authorities.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use rustls::RootCertStore;
use rustls::crypto::ring;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, TrustAnchor, UnixTime};
use rustls::sign::CertifiedKey;
use webpki::{EndEntityCert, KeyUsage};

use super::identity::{Identity, NoIdentity};

/// The files of an identity, as a Secret of Kubernetes names them.
pub const CHAIN: &str = "tls.crt";
pub const KEY: &str = "tls.key";
pub const AUTHORITIES: &str = "ca.crt";

/// Why files are no identity.
#[derive(Debug, thiserror::Error)]
pub enum MaterialError {
    #[error("{}: {error}", path.display())]
    Read { path: PathBuf, error: std::io::Error },
    #[error("{file}: {problem}")]
    Invalid { file: &'static str, problem: String },
    #[error("{CHAIN}: {0}")]
    Identity(#[from] NoIdentity),
}

fn invalid<E: std::fmt::Display>(file: &'static str) -> impl FnOnce(E) -> MaterialError {
    move |problem| MaterialError::Invalid { file, problem: problem.to_string() }
}

/// A certificate with its key, and the authorities that are believed: several, while one follows another.
#[derive(Debug)]
pub struct Material {
    pub(super) key: Arc<CertifiedKey>,
    authorities: Vec<TrustAnchor<'static>>,
    pub(super) identity: Identity,
}

/// A certificate that an authority of ours signed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Verified {
    pub(super) identity: Identity,
    /// How long its time has been over: it is believed all the same, for the operator may be away longer than a leaf lives.
    pub(super) expired: Option<Duration>,
}

impl Material {
    /// Reads the three files of a folder.
    pub fn read(folder: &Path) -> Result<Self, MaterialError> {
        Self::of(&Self::files(folder)?)
    }

    /// What is in the files of a folder.
    pub(super) fn files(folder: &Path) -> Result<[Vec<u8>; 3], MaterialError> {
        let read = |file: &str| {
            let path = folder.join(file);
            std::fs::read(&path).map_err(|error| MaterialError::Read { path, error })
        };
        Ok([read(CHAIN)?, read(KEY)?, read(AUTHORITIES)?])
    }

    pub(super) fn of([chain, key, authorities]: &[Vec<u8>; 3]) -> Result<Self, MaterialError> {
        Self::from_pem(chain, key, authorities)
    }

    pub fn from_pem(chain: &[u8], key: &[u8], authorities: &[u8]) -> Result<Self, MaterialError> {
        let certificates = |pem: &[u8], file| {
            let all: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem).collect();
            let all: Vec<CertificateDer<'static>> = all.map_err(invalid(file))?;
            if all.is_empty() { Err(invalid(file)("no certificate")) } else { Ok(all) }
        };
        let (chain, authorities) = (certificates(chain, CHAIN)?, certificates(authorities, AUTHORITIES)?);
        let mut roots = RootCertStore::empty();
        for authority in authorities {
            roots.add(authority).map_err(invalid(AUTHORITIES))?;
        }
        let identity = identity_of(&chain[0]).map_err(invalid(CHAIN))?.parse()?;
        // The parser's own words quote what it read: a key must not get into a log.
        let key = PrivateKeyDer::from_pem_slice(key).map_err(|_| invalid(KEY)("no private key in PEM"))?;
        let key = CertifiedKey::from_der(chain, key, &ring::default_provider()).map_err(invalid(KEY))?;
        Ok(Self { key: Arc::new(key), authorities: roots.roots, identity })
    }

    /// Whether an authority that it believes signed its own certificate.
    #[cfg(feature = "authority")]
    pub(super) fn is_believed(&self) -> Result<(), String> {
        self.verify(&self.key.cert, KeyUsage::server_auth(), UnixTime::now()).map(drop)
    }

    /// Whose a chain of certificates is, the leaf first; or why it is nobody's whom we know.
    pub(super) fn verify(
        &self,
        chain: &[CertificateDer],
        usage: KeyUsage,
        now: UnixTime,
    ) -> Result<Verified, String> {
        let (leaf, between) = chain.split_first().ok_or("no certificate")?;
        let certificate = EndEntityCert::try_from(leaf).map_err(|error| error.to_string())?;
        let algorithms = ring::default_provider().signature_verification_algorithms.all;
        let at = |time| {
            let path =
                certificate.verify_for_usage(algorithms, &self.authorities, between, time, usage, None, None);
            path.map(drop)
        };
        let expired = match at(now) {
            Ok(()) => None,
            Err(webpki::Error::CertExpired { not_after, .. }) => {
                at(not_after).map_err(|error| error.to_string())?;
                Some(Duration::from_secs(now.as_secs().saturating_sub(not_after.as_secs())))
            }
            Err(error) => return Err(error.to_string()),
        };
        let identity = identity_of(leaf)?.parse().map_err(|error: NoIdentity| error.to_string())?;
        Ok(Verified { identity, expired })
    }
}

/// The only URI that a certificate names.
fn identity_of(certificate: &CertificateDer) -> Result<String, String> {
    let certificate = EndEntityCert::try_from(certificate).map_err(|error| error.to_string())?;
    let mut names = certificate.valid_uri_names();
    match (names.next(), names.next()) {
        (Some(name), None) => Ok(name.to_string()),
        (None, _) => Err("no identity".into()),
        (Some(_), Some(_)) => Err("several identities".into()),
    }
}
