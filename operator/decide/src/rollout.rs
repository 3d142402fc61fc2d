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
    /// Whether the serving one ever was Ready: with all of its workers, or at zero with what takes requests.
    pub serving_is_proven: bool,
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
/// first serves from the start, since nothing else does. One that was never promoted ends as soon as it is not wanted. One that serves
/// and was never Ready gives way at once: nobody was told to count on it, and the wanted one may need its room.
pub fn rollout(revisions: Revisions) -> Rollout {
    let Revisions { wanted, serving, running, serving_is_proven, wanted_serves, just_promoted } = revisions;
    let before = serving.filter(|serving| *serving != wanted);
    let given_up = before.filter(|_| !serving_is_proven);
    let promoted = wanted_serves && before.is_some();
    let current = if promoted || given_up.is_some() { wanted } else { serving.unwrap_or(wanted) };
    let next = (current != wanted).then(|| wanted.to_string());
    let kept = |revision: &String| {
        let awaited = (promoted || just_promoted) && given_up != Some(revision);
        revision == wanted || revision == current || awaited
    };
    let retired = running.iter().filter(|revision| !kept(revision)).cloned().collect();
    Rollout { serving: current.to_string(), next, retired }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn decided(serving: Option<&str>, running: &[&str], wanted_serves: bool, just_promoted: bool) -> Rollout {
        let running: Vec<_> = running.iter().map(ToString::to_string).collect();
        let serving_is_proven = true;
        rollout(Revisions {
            wanted: "c",
            serving,
            running: &running,
            serving_is_proven,
            wanted_serves,
            just_promoted,
        })
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

    #[test]
    fn one_that_was_never_ready_gives_way_at_once() {
        let running = ["b".to_string(), "c".to_string()];
        let decided = rollout(Revisions {
            wanted: "c",
            serving: Some("b"),
            running: &running,
            serving_is_proven: false,
            wanted_serves: false,
            just_promoted: false,
        });
        assert_eq!(decided, expected("c", None, &["b"]));
    }

    const NAMES: [&str; 4] = ["a", "b", "c", "d"];

    /// What happens to a deployment between two decisions.
    #[derive(Debug, Clone)]
    enum Event {
        /// The spec asks for this one.
        Wanted(usize),
        /// What runs of the wanted one answers, or does no longer.
        Answers(bool),
        /// Time passes after a promotion.
        Later,
    }

    fn events() -> impl Strategy<Value = Vec<Event>> {
        let event = prop_oneof![
            3 => (0..NAMES.len()).prop_map(Event::Wanted),
            3 => any::<bool>().prop_map(Event::Answers),
            1 => Just(Event::Later),
        ];
        proptest::collection::vec(event, 0..30)
    }

    proptest! {
        /// Decisions in a row, each carried out, with whatever between them.
        #[test]
        fn what_ever_was_ready_serves_until_another_would_and_what_never_was_takes_no_room(events in events()) {
            let (mut wanted, mut answers, mut just_promoted) = (0, false, false);
            let mut serving: Option<String> = None;
            let (mut running, mut proven): (Vec<String>, Vec<String>) = (vec![], vec![]);
            for event in events {
                match event {
                    Event::Wanted(at) if at != wanted => (wanted, answers) = (at, false),
                    Event::Wanted(_) => {}
                    Event::Answers(now) => answers = now && running.iter().any(|name| name == NAMES[wanted]),
                    Event::Later => just_promoted = false,
                }
                let is_proven = |name: &String| proven.contains(name);
                let decided = rollout(Revisions {
                    wanted: NAMES[wanted],
                    serving: serving.as_deref(),
                    running: &running,
                    serving_is_proven: serving.as_ref().is_some_and(is_proven),
                    wanted_serves: answers,
                    just_promoted,
                });
                prop_assert!(!decided.retired.contains(&decided.serving));
                prop_assert!(!decided.retired.iter().any(|name| name == NAMES[wanted]), "what is wanted stays");
                let before = serving.clone().filter(|before| *before != decided.serving);
                if let Some(before) = before.as_ref().filter(|before| is_proven(before)) {
                    prop_assert!(answers, "{before} was Ready, and goes before another is");
                    prop_assert!(!decided.retired.contains(before), "clients are on their way to it");
                }
                if let Some(before) = before.as_ref().filter(|before| !is_proven(before) && running.contains(before)) {
                    prop_assert!(decided.retired.contains(before), "{before} was never Ready");
                }
                prop_assert!(decided.next.is_none() || serving.as_ref().is_some_and(is_proven));
                just_promoted |= before.is_some_and(|before| !decided.retired.contains(&before));
                running.retain(|name| !decided.retired.contains(name));
                for made in [Some(&decided.serving), decided.next.as_ref()].into_iter().flatten() {
                    if !running.contains(made) {
                        running.push(made.clone());
                    }
                }
                serving = Some(decided.serving);
                if answers && serving.as_deref() == Some(NAMES[wanted]) {
                    proven.push(NAMES[wanted].into());
                }
            }
        }
    }
}
