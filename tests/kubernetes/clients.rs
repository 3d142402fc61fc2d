//! Clients with keys, by HTTPS: both come of Secrets, which change while pods run.

use std::path::Path;
use std::process::Command;

use expertmesh_tests::kubernetes::{Deployment, Namespace};
use expertmesh_tests::process::{Scratch, binary};
use expertmesh_tests::{root, skipped, wait_for};
use serde_json::json;

use super::told::{patch, told};

/// A key that `expertmesh key` drew, and the entry that it printed.
fn key(client: &str) -> (String, String) {
    let output = Command::new(binary("expertmesh")).args(["key", client]).output().unwrap();
    let said = String::from_utf8(output.stdout).unwrap();
    let (key, entry) = said.trim().split_once('\n').expect("two lines");
    (key.to_string(), entry.to_string())
}

/// A certificate for an address, and its key, in PEM.
fn certificate(folder: &Path, address: &str) {
    let names = format!("subjectAltName=IP:{address},IP:127.0.0.1");
    let mut openssl = Command::new("openssl");
    openssl.args(["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]);
    openssl.args([
        "-days", "2", "-subj", "/CN=tiny", "-addext", &names, "-keyout", "tls.key", "-out", "tls.crt",
    ]);
    let output = openssl.current_dir(folder).output().expect("openssl starts");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

/// The status of an answer by HTTPS with a key, for a client that believes one certificate; or why there is none.
fn asked(url: &str, key: &str, certificate: &Path) -> Result<u16, String> {
    let script = "
import ssl, sys, urllib.error, urllib.request
url, key, certificate = sys.argv[1:]
request = urllib.request.Request(url + '/v1/models', headers={'x-api-key': key})
try:
    print(urllib.request.urlopen(request, context=ssl.create_default_context(cafile=certificate), timeout=30).status)
except urllib.error.HTTPError as error:
    print(error.code)
";
    let mut python = Command::new(root().join("target/venv/bin/python"));
    let output = python.args(["-c", script, url, key]).arg(certificate).output().expect("python starts");
    let text = String::from_utf8_lossy(&output.stdout).trim().to_string();
    text.parse().map_err(|_| String::from_utf8_lossy(&output.stderr).into_owned())
}

/// Makes a Secret of this name anew, and has the kubelet look at it at once.
fn replace(deployment: &Deployment, name: &str, create: &[&str]) {
    let namespace = &deployment.namespace;
    namespace.kubectl(&["delete", "secret", name]).unwrap();
    namespace.kubectl(&[&["create", "secret"], create].concat()).unwrap();
    let pod = namespace.pods("frontend").remove(0);
    namespace.kubectl(&["annotate", "--overwrite", "pod", &pod.name, &format!("renewed={name}")]).unwrap();
}

#[test]
fn clients_need_a_key_and_speak_https_and_both_change_without_a_restart() {
    if skipped("kubernetes") || skipped("openai") {
        return;
    }
    let namespace = Namespace::new("clients");
    let deployment = namespace.deploy("tiny", |spec| spec["workers"]["replicas"] = json!(1));
    let reached = deployment.reach();
    let before = reached.api.url.clone();
    let address = before.trim_start_matches("http://").split(':').next().unwrap().to_string();
    drop(reached);
    let scratch = Scratch::new("clients");
    let [first, second] = ["first", "second"].map(|name| {
        let folder = scratch.path().join(name);
        std::fs::create_dir(&folder).unwrap();
        certificate(&folder, &address);
        folder.join("tls.crt").display().to_string()
    });
    let tls = |certificate: &str| {
        let key = certificate.replace("tls.crt", "tls.key");
        [format!("--cert={certificate}"), format!("--key={key}")]
    };
    let (alice, entry) = key("alice");
    let [cert, private] = tls(&first);
    namespace.kubectl(&["create", "secret", "tls", "certificate", &cert, &private]).unwrap();
    namespace.kubectl(&["create", "secret", "generic", "keys", &format!("--from-literal={entry}")]).unwrap();
    let secrets = json!({"apiKeysSecretRef": {"name": "keys"}, "tlsSecretRef": {"name": "certificate"}});
    patch(&deployment, &json!({"frontend": secrets}));
    let url = format!("https://tiny.{}.svc", namespace.name);
    told(&deployment, "Ready", "True", "Serving", &[&url]);
    told(&deployment, "RolledOut", "True", "Serving", &[]);
    assert_eq!(deployment.status()["url"], json!(url));

    let reached = deployment.reach();
    let url = reached.api.url.replace("http://", "https://");
    let mut python = Command::new(root().join("target/venv/bin/python"));
    python.arg(root().join("tests/openai_client.py")).arg(format!("{url}/v1")).arg("tiny");
    let output = python.env("OPENAI_API_KEY", &alice).env("SSL_CERT_FILE", &first).output().unwrap();
    let said =
        [output.stdout, output.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).concat();
    assert!(output.status.success(), "{said}");

    let pod = namespace.pods("frontend").remove(0);
    let ((bob, entry), [cert, private]) = (key("bob"), tls(&second));
    let [first, second] = [first, second].map(std::path::PathBuf::from);
    replace(&deployment, "keys", &["generic", "keys", &format!("--from-literal={entry}")]);
    wait_for("the new key to be known, and the old one not", || {
        match [&alice, &bob].map(|key| asked(&url, key, &first)) {
            [Ok(401), Ok(200)] => Ok(()),
            answers => Err(format!("{answers:?}")),
        }
    });
    replace(&deployment, "certificate", &["tls", "certificate", &cert, &private]);
    wait_for("the new certificate to be shown", || asked(&url, &bob, &second));
    assert!(asked(&url, &bob, &first).unwrap_err().contains("CERTIFICATE_VERIFY_FAILED"));
    let metrics = namespace.metrics(&pod.name).unwrap();
    let clients: Vec<_> =
        metrics.lines().filter(|line| line.starts_with("expertmesh_client_requests_total")).collect();
    assert!(matches!(&clients[..], [bob] if bob.contains("client=\"bob\"")), "{clients:?}");
    assert_eq!(namespace.pods("frontend").remove(0).life(), pod.life());
}
