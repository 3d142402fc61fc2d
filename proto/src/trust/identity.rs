//! Who a process is: the SPIFFE id in its certificate.

use std::fmt;
use std::str::FromStr;

/// A process of an installation.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Identity {
    /// The name of the authority that signed: another one follows it where it is lost, and both are believed meanwhile.
    pub installation: String,
    pub who: Who,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Who {
    /// Whoever places: the operator, or `expertmesh up`.
    Operator,
    Member {
        deployment: Deployment,
        component: Component,
    },
}

/// A domain of trust: its members believe each other, and nobody of another deployment.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Deployment {
    pub namespace: String,
    pub name: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Component {
    Worker,
    Frontend,
}

impl Component {
    pub const ALL: [Self; 2] = [Self::Worker, Self::Frontend];

    pub fn name(self) -> &'static str {
        match self {
            Self::Worker => "worker",
            Self::Frontend => "frontend",
        }
    }
}

impl Identity {
    /// The component of the same deployment; none for the operator, which has no deployment.
    pub fn sibling(&self, component: Component) -> Option<Self> {
        let Who::Member { deployment, .. } = &self.who else { return None };
        let who = Who::Member { deployment: deployment.clone(), component };
        Some(Self { installation: self.installation.clone(), who })
    }

    /// A member of a deployment of the same installation.
    pub fn member(&self, deployment: Deployment, component: Component) -> Self {
        Self { installation: self.installation.clone(), who: Who::Member { deployment, component } }
    }
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "spiffe://{}/", self.installation)?;
        match &self.who {
            Who::Operator => f.write_str("operator"),
            Who::Member { deployment: Deployment { namespace, name }, component } => {
                write!(f, "ns/{namespace}/mdep/{name}/{}", component.name())
            }
        }
    }
}

/// A text that is no identity.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?} is no identity: spiffe://INSTALLATION/operator or spiffe://INSTALLATION/ns/NAMESPACE/mdep/NAME/COMPONENT"
)]
pub struct NoIdentity(pub String);

impl FromStr for Identity {
    type Err = NoIdentity;

    fn from_str(text: &str) -> Result<Self, NoIdentity> {
        let parsed = || {
            let mut parts = text.strip_prefix("spiffe://")?.split('/');
            let installation = parts.next().filter(|part| !part.is_empty())?.to_string();
            let rest: Vec<&str> = parts.collect();
            let who = match rest[..] {
                ["operator"] => Who::Operator,
                ["ns", namespace, "mdep", name, component] if !namespace.is_empty() && !name.is_empty() => {
                    let component = Component::ALL.into_iter().find(|known| known.name() == component)?;
                    let deployment = Deployment { namespace: namespace.into(), name: name.into() };
                    Who::Member { deployment, component }
                }
                _ => return None,
            };
            Some(Self { installation, who })
        };
        parsed().ok_or_else(|| NoIdentity(text.into()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_identity_is_read_as_it_is_written_and_nothing_else_is_one() {
        for text in [
            "spiffe://ab12/operator",
            "spiffe://ab12/ns/team-a/mdep/tiny/worker",
            "spiffe://ab12/ns/b/mdep/c/frontend",
        ] {
            assert_eq!(text.parse::<Identity>().unwrap().to_string(), text);
        }
        for text in [
            "",
            "https://ab12/operator",
            "spiffe:///operator",
            "spiffe://ab12/operator/",
            "spiffe://ab12/ns//mdep/c/worker",
            "spiffe://ab12/ns/a/mdep/b/c/worker",
            "spiffe://ab12/ns/a/mdep/c/operator",
        ] {
            assert_eq!(text.parse::<Identity>(), Err(NoIdentity(text.into())));
        }
    }
}
