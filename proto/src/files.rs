//! Files that somebody else replaces while they are in use, as a kubelet does with those of a Secret.

use std::time::Duration;

/// How often files are looked at: a kubelet renews a Secret's within a minute or two.
const LOOK: Duration = Duration::from_secs(10);

/// Hands on what `read` gives at once, and then for ever whenever that is something else than the time before: what was read, or one error,
/// however long it lasts.
pub async fn follow<T: PartialEq, E>(read: impl Fn() -> Result<T, E>, mut take: impl FnMut(Result<&T, E>)) {
    let mut last: Option<Option<T>> = None;
    loop {
        let (now, error) = match read() {
            Ok(now) => (Some(now), None),
            Err(error) => (None, Some(error)),
        };
        if last.as_ref() != Some(&now) {
            match (&now, error) {
                (Some(now), _) => take(Ok(now)),
                (None, Some(error)) => take(Err(error)),
                (None, None) => {}
            }
        }
        last = Some(now);
        tokio::time::sleep(LOOK).await;
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_change_is_told_once() {
        let (files, told) = (RefCell::new(Ok("one")), RefCell::new(vec![]));
        let following = follow(|| *files.borrow(), |read| told.borrow_mut().push(read.copied()));
        let replacing = async {
            for next in [Err("gone"), Ok("two"), Err("gone")] {
                tokio::time::sleep(LOOK * 3).await;
                *files.borrow_mut() = next;
            }
            tokio::time::sleep(LOOK * 3).await;
        };
        tokio::select! {
            () = following => {}
            () = replacing => {}
        }
        assert_eq!(*told.borrow(), [Ok("one"), Err("gone"), Ok("two"), Err("gone")]);
    }
}
