//! Who may call what.

use super::identity::{Component, Identity, Who};

/// Whether `caller` may call the RPC at `path` (`/package.Service/Method`) of `callee`. What is not named here nobody may. Which authority signed
/// either does not matter: `callee` believes both, and while one follows another, leaves of either meet.
pub(crate) fn may(caller: &Identity, callee: &Identity, path: &str) -> bool {
    let operator = caller.who == Who::Operator;
    let sibling = |component| callee.sibling(component).is_some_and(|sibling| sibling.who == caller.who);
    let (worker, frontend) = (sibling(Component::Worker), sibling(Component::Frontend));
    match path {
        "/expertmesh.v1.Control/Report" => operator || worker || frontend,
        "/expertmesh.v1.Control/ApplyPlacement" | "/expertmesh.v1.Control/Drain" => operator,
        "/expertmesh.v1.ExpertExchange/Exchange" | "/expertmesh.v1.Blobs/Fetch" => worker,
        "/expertmesh.v1.Inference/Generate" => frontend,
        _ => false,
    }
}

/// Whether an RPC says nothing that is not everybody's: gRPC health, for tools that have no certificate.
pub(crate) fn is_open(path: &str) -> bool {
    path.starts_with("/grpc.health.v1.Health/")
}

#[cfg(test)]
mod tests {
    use super::*;

    const REPORT: &str = "/expertmesh.v1.Control/Report";
    const PLACE: &str = "/expertmesh.v1.Control/ApplyPlacement";
    const DRAIN: &str = "/expertmesh.v1.Control/Drain";
    const EXCHANGE: &str = "/expertmesh.v1.ExpertExchange/Exchange";
    const FETCH: &str = "/expertmesh.v1.Blobs/Fetch";
    const GENERATE: &str = "/expertmesh.v1.Inference/Generate";

    #[test]
    fn each_caller_may_what_it_needs_and_nothing_else() {
        let identity = |text: &str| text.parse::<Identity>().unwrap();
        let callee = identity("spiffe://one/ns/a/mdep/m/worker");
        let allowed = |caller: &str| -> Vec<&str> {
            let caller = identity(caller);
            let other = ["/expertmesh.v1.Control/Other", "/x.Y/Z"];
            let all = [REPORT, PLACE, DRAIN, EXCHANGE, FETCH, GENERATE].into_iter().chain(other);
            all.filter(|path| may(&caller, &callee, path)).collect()
        };
        assert_eq!(allowed("spiffe://one/operator"), [REPORT, PLACE, DRAIN]);
        assert_eq!(allowed("spiffe://one/ns/a/mdep/m/worker"), [REPORT, EXCHANGE, FETCH]);
        assert_eq!(allowed("spiffe://one/ns/a/mdep/m/frontend"), [REPORT, GENERATE]);
        // Of the authority that follows, and is believed already.
        assert_eq!(allowed("spiffe://two/ns/a/mdep/m/worker"), [REPORT, EXCHANGE, FETCH]);
        for stranger in ["spiffe://one/ns/b/mdep/m/worker", "spiffe://one/ns/a/mdep/n/frontend"] {
            assert!(allowed(stranger).is_empty(), "{stranger}");
        }
    }
}
