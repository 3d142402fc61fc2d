//! HTTPS for clients: a certificate and its key as files, which are swapped while connections stay.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use expertmesh_proto::files;
use rustls::ServerConfig;
use rustls::crypto::ring;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, UnixTime};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use webpki::{EndEntityCert, KeyUsage};

use crate::metrics::https::HttpsMetrics;

/// The files, as a Secret of the type kubernetes.io/tls names them.
const CHAIN: &str = "tls.crt";
const KEY: &str = "tls.key";
/// The first byte of a TLS connection.
const HANDSHAKE: u8 = 0x16;
/// What is said to a client that speaks HTTP.
const NOT_HTTP: &[u8] = b"HTTP/1.1 400 Bad Request\r\ncontent-type: text/plain\r\ncontent-length: 27\r\nconnection: close\r\n\r\nthis port speaks HTTPS only";

/// Why files are no certificate.
#[derive(Debug, thiserror::Error)]
pub(crate) enum HttpsError {
    #[error("{}: {error}", path.display())]
    Read { path: PathBuf, error: std::io::Error },
    #[error("{file}: {problem}")]
    Invalid { file: &'static str, problem: String },
}

/// What connections begin with; clones share what is swapped.
#[derive(Clone)]
pub(crate) struct Https {
    config: Arc<RwLock<Arc<ServerConfig>>>,
    metrics: HttpsMetrics,
}

/// A certificate with its key, as connections begin with it.
struct Shown {
    config: Arc<ServerConfig>,
    /// From when until when it is valid, in seconds since 1970; none where that cannot be read.
    validity: Option<(u64, u64)>,
}

impl Https {
    /// Reads the certificate and its key from a folder.
    pub(crate) fn read(folder: &Path, metrics: HttpsMetrics) -> Result<Self, HttpsError> {
        let Shown { config, validity } = shown(&contents(folder)?)?;
        metrics.shows(validity.unwrap_or_default());
        Ok(Self { config: Arc::new(RwLock::new(config)), metrics })
    }

    /// Takes over for ever what the folder says; what cannot be used is told, and the certificate of before goes on.
    pub(crate) async fn follow(&self, folder: &Path) {
        let take = |files: Result<&_, _>| match files.and_then(shown) {
            Ok(Shown { config, validity }) => {
                *self.config.write().unwrap_or_else(PoisonError::into_inner) = config;
                self.metrics.shows(validity.unwrap_or_default());
            }
            Err(error) => tracing::warn!(%error, "the new certificate for clients is not used"),
        };
        files::follow(|| contents(folder), take).await;
    }

    /// Begins a connection; an error where its client does not speak TLS.
    pub(super) async fn accept(&self, mut stream: TcpStream) -> std::io::Result<TlsStream<TcpStream>> {
        let mut first = [0];
        if stream.peek(&mut first).await? == 1 && first[0] != HANDSHAKE {
            // What is unread when a connection closes resets it, and the answer is lost.
            let _ = stream.read(&mut [0; 4096]).await?;
            stream.write_all(NOT_HTTP).await?;
            return Err(std::io::Error::other("it speaks no TLS"));
        }
        let config = self.config.read().unwrap_or_else(PoisonError::into_inner).clone();
        TlsAcceptor::from(config).accept(stream).await
    }
}

/// What is in the files of a folder: the certificate with those that signed it, and the key.
fn contents(folder: &Path) -> Result<[Vec<u8>; 2], HttpsError> {
    let read = |file: &str| {
        let path = folder.join(file);
        fs::read(&path).map_err(|error| HttpsError::Read { path, error })
    };
    Ok([read(CHAIN)?, read(KEY)?])
}

fn shown([chain, key]: &[Vec<u8>; 2]) -> Result<Shown, HttpsError> {
    let invalid = |file: &'static str, problem: String| HttpsError::Invalid { file, problem };
    let certificates: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(chain).collect();
    // The parser's own words quote what it read: a key must not get into a log.
    let certificates = certificates.map_err(|_| invalid(CHAIN, "no certificates in PEM".into()))?;
    let validity = certificates.first().and_then(validity);
    let key = PrivateKeyDer::from_pem_slice(key).map_err(|_| invalid(KEY, "no private key in PEM".into()))?;
    let versions = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .map_err(|error| invalid(CHAIN, error.to_string()))?;
    let config = versions.with_no_client_auth().with_single_cert(certificates, key);
    let mut config = config.map_err(|error| invalid(CHAIN, error.to_string()))?;
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok(Shown { config: Arc::new(config), validity })
}

/// From when until when a certificate is valid. The verifier is asked, which says it of a time that is too early or too late.
fn validity(certificate: &CertificateDer) -> Option<(u64, u64)> {
    let certificate = EndEntityCert::try_from(certificate).ok()?;
    let at = |seconds| {
        let time = UnixTime::since_unix_epoch(Duration::from_secs(seconds));
        let usage = KeyUsage::server_auth();
        certificate.verify_for_usage(&[], &[], &[], time, usage, None, None).err()
    };
    match (at(0), at(u64::MAX)) {
        (
            Some(webpki::Error::CertNotValidYet { not_before, .. }),
            Some(webpki::Error::CertExpired { not_after, .. }),
        ) => Some((not_before.as_secs(), not_after.as_secs())),
        _ => None,
    }
}

#[cfg(test)]
pub(super) mod tests {
    use expertmesh_metrics::Registry;
    use rcgen::{CertificateParams, KeyPair};
    use rustls::pki_types::ServerName;
    use rustls::{ClientConfig, RootCertStore};
    use tokio_rustls::TlsConnector;

    use super::*;

    /// A folder with a certificate for localhost, gone with it.
    pub(in crate::frontend) struct Folder(pub(in crate::frontend) PathBuf);

    impl Folder {
        pub(in crate::frontend) fn new(name: &str) -> Self {
            let path = std::env::temp_dir().join(format!("expertmesh-{name}-{}", std::process::id()));
            fs::create_dir_all(&path).unwrap();
            Self(path)
        }

        /// Makes another certificate and writes it with its key; returns a client that believes it alone.
        pub(in crate::frontend) fn renew(&self) -> TlsConnector {
            self.renew_until(2050)
        }

        /// The same of a certificate that is valid from 2026 to a year.
        fn renew_until(&self, year: i32) -> TlsConnector {
            let key = KeyPair::generate().unwrap();
            let mut params = CertificateParams::new(["localhost".to_string()]).unwrap();
            params.not_before = rcgen::date_time_ymd(2026, 1, 1);
            params.not_after = rcgen::date_time_ymd(year, 1, 1);
            let cert = params.self_signed(&key).unwrap();
            fs::write(self.0.join(CHAIN), cert.pem()).unwrap();
            fs::write(self.0.join(KEY), key.serialize_pem()).unwrap();
            let mut roots = RootCertStore::empty();
            roots.add(cert.der().clone()).unwrap();
            let versions = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
                .with_safe_default_protocol_versions()
                .unwrap();
            TlsConnector::from(Arc::new(versions.with_root_certificates(roots).with_no_client_auth()))
        }
    }

    impl Drop for Folder {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    /// Whether a client's handshake comes about.
    async fn is_believed(https: &Https, client: &TlsConnector) -> bool {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let stream = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let (accepted, _) = listener.accept().await.unwrap();
        let name = ServerName::try_from("localhost").unwrap();
        let (_, connected) = tokio::join!(https.accept(accepted), client.connect(name, stream));
        connected.is_ok()
    }

    /// From when until when the certificate is valid that is shown, as it is exported.
    fn exported(registry: &Registry) -> Vec<f64> {
        registry.gather().iter().map(|family| family.get_metric()[0].get_gauge().get_value()).collect()
    }

    #[tokio::test]
    async fn a_certificate_is_swapped_and_one_that_cannot_be_used_is_not() {
        let folder = Folder::new("swap");
        let (first, registry) = (folder.renew(), Registry::new());
        let https = Https::read(&folder.0, HttpsMetrics::new(&registry)).unwrap();
        assert_eq!(exported(&registry), [1_767_225_600.0, 2_524_608_000.0], "2026 and 2050");
        assert!(is_believed(&https, &first).await);
        let second = folder.renew_until(2060);
        assert!(is_believed(&https, &first).await, "nothing was read yet");
        let swapped = async {
            while !is_believed(&https, &second).await {
                tokio::time::sleep(std::time::Duration::from_millis(10)).await;
            }
        };
        tokio::select! {
            () = https.follow(&folder.0) => {}
            () = swapped => {}
        }
        assert!(!is_believed(&https, &first).await);
        assert_eq!(exported(&registry), [1_767_225_600.0, 2_840_140_800.0], "2026 and 2060");
        fs::write(folder.0.join(KEY), KeyPair::generate().unwrap().serialize_pem()).unwrap();
        let _ = tokio::time::timeout(std::time::Duration::from_millis(50), https.follow(&folder.0)).await;
        assert!(is_believed(&https, &second).await, "the key is another's");
    }

    #[test]
    fn what_is_no_certificate_is_told_with_its_file() {
        let folder = Folder::new("wrong");
        let told = |folder: &Folder| shown(&contents(&folder.0)?).map(drop);
        let told = |folder: &Folder| told(folder).unwrap_err().to_string();
        assert!(told(&folder).contains("tls.crt: No such file"), "{}", told(&folder));
        drop(folder.renew());
        // A key that lost the ends of its lines, as one that went through a variable.
        let key = fs::read_to_string(folder.0.join(KEY)).unwrap().replace('\n', "");
        for broken in [&key, "-----BEGIN PRIVATE KEY-----", "secret"] {
            fs::write(folder.0.join(KEY), broken).unwrap();
            assert_eq!(told(&folder), "tls.key: no private key in PEM");
        }
        fs::write(folder.0.join(KEY), KeyPair::generate().unwrap().serialize_pem()).unwrap();
        assert!(told(&folder).starts_with("tls.crt: "), "{}", told(&folder));
    }

    #[test]
    fn a_certificates_validity_is_read_and_what_is_none_has_none() {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(["localhost".to_string()]).unwrap();
        params.not_before = rcgen::date_time_ymd(2026, 1, 1);
        params.not_after = rcgen::date_time_ymd(2026, 4, 1);
        let certificate = params.self_signed(&key).unwrap();
        assert_eq!(validity(certificate.der()), Some((1_767_225_600, 1_775_001_600)));
        assert_eq!(validity(&CertificateDer::from(vec![0; 8])), None);
    }
}
