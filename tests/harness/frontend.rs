//! A frontend as a process, in front of the workers of a [`Mesh`].

use std::path::Path;

use expertmesh_proto::placement::Placement;
use expertmesh_proto::trust::identity::Component;

use crate::http;
use crate::mesh::{EXPERTS, Mesh};
use crate::openai::Api;
use crate::process::{Addresses, Process};
use crate::{tiny_r1, wait_for};

pub struct Frontend {
    pub process: Process,
    pub addresses: Addresses,
    pub api: Api,
}

impl Frontend {
    /// Starts one that knows the workers and serves tiny-r1 under that name; waits until it is ready.
    pub async fn start(mesh: &mut Mesh) -> Self {
        let count = mesh.addresses.len() as u32;
        let placement = mesh.place(|slot, expert| expert * count / EXPERTS == slot).await;
        Self::follow(mesh, &placement)
    }

    /// Starts one that follows a placement; waits until it is ready.
    pub fn follow(mesh: &Mesh, placement: &Placement) -> Self {
        Self::of(&tiny_r1(), mesh, placement)
    }

    /// The same with another model's directory: of the workers' model, but for its small files.
    pub fn of(model: &Path, mesh: &Mesh, placement: &Placement) -> Self {
        let placement = mesh.placement_file(placement);
        let path = |path: &std::path::Path| path.to_str().expect("a UTF-8 path").to_string();
        let (placement, model) = (path(&placement), path(model));
        let what = ["frontend", "--served-name", "tiny-r1", "--model", &model, "--placement", &placement];
        let anywhere = mesh.anywhere;
        let listening = ["--listen", anywhere, "--control", anywhere, "--metrics", anywhere];
        let more = mesh.flags_of(Component::Frontend);
        let more: Vec<&str> = more.iter().map(String::as_str).collect();
        let arguments = [&what[..], &listening[..], &more[..]].concat();
        let mut process = Process::start(&mesh.scratch, "frontend", "expertmesh-worker", &arguments);
        let addresses = process.addresses();
        let url = format!("http://{}", addresses.http.as_deref().expect("a frontend has an HTTP address"));
        let readyz = format!("http://{}/readyz", addresses.metrics);
        wait_for("the frontend to be ready", || match http::get(&readyz)? {
            (200, _) => Ok(()),
            (status, text) => Err(format!("{status}: {text}")),
        });
        Self { process, addresses, api: Api { url, model: "tiny-r1".into() } }
    }

    pub fn metrics(&self) -> String {
        metrics(&self.addresses)
    }
}

/// What a process exports.
pub fn metrics(addresses: &Addresses) -> String {
    http::get(&format!("http://{}/metrics", addresses.metrics)).expect("the metrics port answers").1
}
