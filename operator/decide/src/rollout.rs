//! Which revision serves, which is being made ready, and which may go.

/// What is known of a deployment's revisions.
#[derive(Debug, Clone, Copy)]
pub struct Revisions<'a> {
    /// The revision that the spec asks for now.
    pub wanted: &'a str,
    /// The revision that clients reach; none before the first.
    pub serving: Option<&'a str>,
    /// The revisions of which something runs, in any order.
    pub running: &'a [String],
    /// Whether requests would be answered by the wanted one.
    pub wanted_serves: bool,
    /// Whether clients were sent to the serving one only just now, and some may still be on their way to another.
    pub just_promoted: bool,
}

/// What is to become of a deployment's revisions.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rollout {
    /// The revision that clients are to reach.
    pub serving: String,
    /// The revision that is to be made ready beside it.
    pub next: Option<String>,
    /// The revisions that are to end.
    pub retired: Vec<String>,
}

/// New beside old; promoted once it would answer; the old one ends afterwards, when nobody is sent to it any more. The
/// first serves from the start, since nothing else does. One that was never promoted ends as soon as it is not wanted.
pub fn rollout(revisions: Revisions) -> Rollout {
    let Revisions { wanted, serving, running, wanted_serves, just_promoted } = revisions;
    let promoted = wanted_serves && serving.is_some_and(|serving| serving != wanted);
    let current = if promoted { wanted } else { serving.unwrap_or(wanted) };
    let next = (current != wanted).then(|| wanted.to_string());
    let kept = |revision: &String| revision == wanted || revision == current || promoted || just_promoted;
    let retired = running.iter().filter(|revision| !kept(revision)).cloned().collect();
    Rollout { serving: current.to_string(), next, retired }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn decided(serving: Option<&str>, running: &[&str], wanted_serves: bool, just_promoted: bool) -> Rollout {
        let running: Vec<_> = running.iter().map(ToString::to_string).collect();
        rollout(Revisions { wanted: "c", serving, running: &running, wanted_serves, just_promoted })
    }

    fn expected(serving: &str, next: Option<&str>, retired: &[&str]) -> Rollout {
        let retired = retired.iter().map(ToString::to_string).collect();
        Rollout { serving: serving.into(), next: next.map(Into::into), retired }
    }

    #[test]
    fn the_first_revision_serves_from_the_start() {
        assert_eq!(decided(None, &[], false, false), expected("c", None, &[]));
    }

    #[test]
    fn the_old_one_serves_until_the_new_one_would() {
        assert_eq!(decided(Some("b"), &["b", "c"], false, false), expected("b", Some("c"), &[]));
        assert_eq!(decided(Some("b"), &["b", "c"], true, false), expected("c", None, &[]));
    }

    #[test]
    fn the_old_one_ends_when_nobody_is_on_the_way_to_it() {
        assert_eq!(decided(Some("c"), &["b", "c"], true, true), expected("c", None, &[]));
        assert_eq!(decided(Some("c"), &["b", "c"], true, false), expected("c", None, &["b"]));
    }

    #[test]
    fn one_that_was_never_promoted_ends_when_another_is_wanted() {
        assert_eq!(decided(Some("a"), &["a", "b", "c"], false, false), expected("a", Some("c"), &["b"]));
    }
}
