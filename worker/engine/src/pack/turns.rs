//! Whose turn it is to pack a blob: a lock for each, in one file, between processes and between the threads of one.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use expertmesh_model::error::ModelError;
use expertmesh_model::layout::plan::Place;

use super::durable::failed;

/// The file's name in a packed model's directory.
pub(super) const TURNS: &str = "packed.turns";

/// A turn, until it is dropped or the process ends.
pub(super) struct Turn {
    /// Closed, it lets go: no other handle shares its locks.
    _file: File,
}

/// What a turn is for.
pub(super) enum For {
    /// The journal is begun.
    Journal,
    Place(Place),
}

/// The turns of a directory.
pub(super) struct Turns(PathBuf);

impl Turns {
    pub(super) fn of(directory: &Path) -> Self {
        Self(directory.join(TURNS))
    }

    /// Waits for a turn.
    pub(super) fn wait(&self, what: &For) -> Result<Turn, ModelError> {
        let turn = self.take(what, true)?;
        turn.ok_or_else(|| failed(&self.0, "a lock that was waited for is not had"))
    }

    /// Takes a turn, where nobody has it.
    pub(super) fn try_now(&self, what: &For) -> Result<Option<Turn>, ModelError> {
        self.take(what, false)
    }

    fn take(&self, what: &For, waits: bool) -> Result<Option<Turn>, ModelError> {
        let opened = File::options().read(true).write(true).create(true).truncate(false).open(&self.0);
        let file = opened.map_err(|error| failed(&self.0, error))?;
        let taken = lock(&file, byte(what), waits).map_err(|error| failed(&self.0, error))?;
        Ok(taken.then_some(Turn { _file: file }))
    }
}

/// Which byte of the file stands for it.
fn byte(what: &For) -> i64 {
    const LAYER: i64 = 1 << 20; // more experts than any layer has
    match *what {
        For::Journal => 0,
        For::Place(Place::Ends) => 1,
        For::Place(Place::Layer(layer)) => (layer as i64 + 1) * LAYER,
        For::Place(Place::Expert(layer, expert)) => (layer as i64 + 1) * LAYER + 1 + i64::from(expert),
    }
}

/// Locks a byte of a file for this handle; whether it is.
#[cfg(target_os = "linux")]
#[allow(unsafe_code, reason = "no library locks a byte of a file for a handle")]
fn lock(file: &File, byte: i64, waits: bool) -> io::Result<bool> {
    use std::os::fd::AsRawFd;
    let command = if waits { libc::F_OFD_SETLKW } else { libc::F_OFD_SETLK };
    // SAFETY: all zeros are a value of this struct of integers.
    let mut range: libc::flock = unsafe { std::mem::zeroed() };
    range.l_type = libc::F_WRLCK as libc::c_short;
    range.l_whence = libc::SEEK_SET as libc::c_short;
    (range.l_start, range.l_len) = (byte, 1);
    loop {
        // SAFETY: the descriptor is open as long as the file is borrowed, and the struct is only read.
        if unsafe { libc::fcntl(file.as_raw_fd(), command, &raw const range) } == 0 {
            return Ok(true);
        }
        let error = io::Error::last_os_error();
        match error.raw_os_error() {
            Some(libc::EINTR) => {}
            Some(libc::EAGAIN | libc::EACCES) if !waits => return Ok(false),
            _ => return Err(error),
        }
    }
}

/// Locks all of the file, since there are no such locks: who wants another byte waits, too.
#[cfg(not(target_os = "linux"))]
fn lock(file: &File, _: i64, waits: bool) -> io::Result<bool> {
    if waits {
        return file.lock().map(|()| true);
    }
    match file.try_lock() {
        Ok(()) => Ok(true),
        Err(std::fs::TryLockError::WouldBlock) => Ok(false),
        Err(std::fs::TryLockError::Error(error)) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_turn_is_one_places_alone_and_waited_for_until_it_is_let_go() {
        let folder = std::env::temp_dir().join(format!("expertmesh-turns-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        let turns = Turns::of(&folder);
        let place = |expert| For::Place(Place::Expert(3, expert));
        let held = turns.wait(&place(7)).unwrap();
        assert!(turns.try_now(&place(7)).unwrap().is_none(), "it is held, by a thread of this process");
        for other in [place(6), place(8), For::Place(Place::Layer(3)), For::Place(Place::Ends), For::Journal]
        {
            assert!(turns.try_now(&other).unwrap().is_some());
        }
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| turns.wait(&place(7)).map(drop));
            drop(held);
            waiting.join().unwrap().unwrap();
        });
        assert!(turns.try_now(&place(7)).unwrap().is_some());
        std::fs::remove_dir_all(&folder).unwrap();
    }
}
