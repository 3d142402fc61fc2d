//! Identities of the processes of a mesh, by an authority of the test's.

use std::path::{Path, PathBuf};
use std::time::Duration;

use expertmesh_proto::trust::authority::Authority;
use expertmesh_proto::trust::identity::{Component, Deployment, Who};
use expertmesh_proto::trust::material::{AUTHORITIES, CHAIN, KEY};
use expertmesh_proto::trust::{Callee, Trust};

/// The authority, and a folder of files for each component.
pub struct Identities {
    authority: Authority,
    operator: Trust,
    folder: PathBuf,
}

impl Identities {
    /// Writes files for every component below a folder, with certificates as they are so long after they were made.
    pub fn new(folder: &Path, age: Duration) -> Self {
        let authority = Authority::new("0123456789abcdef").expect("an authority");
        let operator = Trust::new(authority.material(&Who::Operator).expect("a leaf"), |_| {});
        let identities = Self { authority, operator, folder: folder.join("identities") };
        identities.make(age);
        identities
    }

    /// Writes them anew; processes that run take them.
    pub fn make(&self, age: Duration) {
        for component in Component::ALL {
            let who = Who::Member { deployment: deployment(), component };
            let leaf = self.authority.leaf_of_age(&who, age).expect("a leaf");
            let folder = self.folder(component);
            std::fs::create_dir_all(&folder).expect("a folder");
            for (file, text) in
                [(CHAIN, leaf.chain.as_str()), (KEY, &leaf.key), (AUTHORITIES, self.authority.certificate())]
            {
                std::fs::write(folder.join(file), text).expect("a file");
            }
        }
    }

    /// What a process of a component is started with.
    pub fn flags(&self, component: Component) -> [String; 2] {
        ["--identity".into(), self.folder(component).to_str().expect("a UTF-8 path").into()]
    }

    /// The workers, to the test in the operator's stead.
    pub fn workers(&self) -> Callee {
        self.operator.member(deployment(), Component::Worker)
    }

    fn folder(&self, component: Component) -> PathBuf {
        self.folder.join(component.name())
    }
}

fn deployment() -> Deployment {
    Deployment { namespace: "ns".into(), name: "tiny-r1".into() }
}
