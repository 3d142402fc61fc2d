//! The authority of an installation: makes itself once, and leaves for its processes.

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer,
    KeyPair, KeyUsagePurpose, SanType,
};
use time::{Duration, OffsetDateTime};

use super::identity::{Identity, Who};
use super::material::{AUTHORITIES, Material, MaterialError};

/// How long a leaf is good for.
pub const LEAF: std::time::Duration = std::time::Duration::from_secs(30 * 24 * 3600);
/// How old a leaf is when another takes its place.
pub const RENEWED: std::time::Duration = std::time::Duration::from_secs(24 * 3600);
/// How far into the past a certificate reaches: clocks differ.
const BACKDATED: Duration = Duration::hours(24);
/// How long an authority is good for.
const AUTHORITY: Duration = Duration::days(3650);

/// Why a certificate cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum AuthorityError {
    #[error(transparent)]
    Made(#[from] rcgen::Error),
    #[error(transparent)]
    Material(#[from] MaterialError),
}

/// Signs the leaves of one installation.
pub struct Authority {
    installation: String,
    /// Its own certificate, in PEM: what its members believe.
    certificate: String,
    issuer: Issuer<'static, KeyPair>,
}

/// A certificate and its key, in PEM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Leaf {
    pub chain: String,
    pub key: String,
}

impl Authority {
    /// A new one, of an installation that has none.
    pub fn new(installation: &str) -> Result<Self, AuthorityError> {
        let (key, params) = (KeyPair::generate()?, params_of(installation));
        let certificate = params.self_signed(&key)?.pem();
        Ok(Self { installation: installation.into(), certificate, issuer: Issuer::new(params, key) })
    }

    /// The one that was written down.
    pub fn from_pem(installation: &str, certificate: &str, key: &str) -> Result<Self, AuthorityError> {
        let (key, params) = (KeyPair::from_pem(key)?, params_of(installation));
        let authority = Self {
            installation: installation.into(),
            certificate: certificate.into(),
            issuer: Issuer::new(params, key),
        };
        // Its key may be another's, or its name: what it signs tells.
        let verified = authority.material(&Who::Operator)?.is_believed();
        verified.map_err(|problem| MaterialError::Invalid { file: AUTHORITIES, problem })?;
        Ok(authority)
    }

    /// Its private key, in PEM.
    pub fn key(&self) -> String {
        self.issuer.key().serialize_pem()
    }

    pub fn certificate(&self) -> &str {
        &self.certificate
    }

    /// A leaf for a process of the installation, as of now.
    pub fn leaf(&self, who: &Who) -> Result<Leaf, AuthorityError> {
        self.leaf_of_age(who, std::time::Duration::ZERO)
    }

    /// A leaf as one that was made so long ago, which may be longer than [`LEAF`].
    pub fn leaf_of_age(&self, who: &Who, age: std::time::Duration) -> Result<Leaf, AuthorityError> {
        self.leaf_at(who, OffsetDateTime::now_utc() - age)
    }

    pub(crate) fn leaf_at(&self, who: &Who, now: OffsetDateTime) -> Result<Leaf, AuthorityError> {
        let identity = Identity { installation: self.installation.clone(), who: who.clone() };
        let mut params = CertificateParams::default();
        (params.not_before, params.not_after) = (now - BACKDATED, now + LEAF);
        params.distinguished_name = DistinguishedName::new();
        params.subject_alt_names = vec![SanType::URI(identity.to_string().try_into()?)];
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        params.use_authority_key_identifier_extension = true;
        let key = KeyPair::generate()?;
        let chain = params.signed_by(&key, &self.issuer)?.pem();
        Ok(Leaf { chain, key: key.serialize_pem() })
    }

    /// What a process of this installation shows and believes, without a file.
    pub fn material(&self, who: &Who) -> Result<Material, AuthorityError> {
        let Leaf { chain, key } = self.leaf(who)?;
        Ok(Material::from_pem(chain.as_bytes(), key.as_bytes(), self.certificate.as_bytes())?)
    }
}

fn params_of(installation: &str) -> CertificateParams {
    let mut params = CertificateParams::default();
    let now = OffsetDateTime::now_utc();
    (params.not_before, params.not_after) = (now - BACKDATED, now + AUTHORITY);
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, format!("expertmesh {installation}"));
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
    params
}
