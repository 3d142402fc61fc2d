//! Files that somebody else replaces while they are in use, as a kubelet does with those of a Secret.

use std::time::Duration;

/// How often files are looked at: a kubelet renews a Secret's within a minute or two.
const LOOK: Duration = Duration::from_secs(10);

/// Calls `changed` at once, and then for ever whenever `read` gives something else than the time before.
pub async fn follow<T: PartialEq>(read: impl Fn() -> T, mut changed: impl FnMut()) {
    let mut last = None;
    loop {
        let now = Some(read());
        if last != now {
            changed();
        }
        last = now;
        tokio::time::sleep(LOOK).await;
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_change_is_told_once() {
        let (files, told) = (RefCell::new("one"), RefCell::new(vec![]));
        let following = follow(|| *files.borrow(), || told.borrow_mut().push(*files.borrow()));
        let replacing = async {
            tokio::time::sleep(LOOK * 3).await;
            *files.borrow_mut() = "two";
            tokio::time::sleep(LOOK * 3).await;
        };
        tokio::select! {
            () = following => {}
            () = replacing => {}
        }
        assert_eq!(*told.borrow(), ["one", "two"]);
    }
}
