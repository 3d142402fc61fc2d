//! Mapped files whose bytes went away: whoever reads a page beyond a file's end gets a signal, SIGBUS, instead of an error. Where that
//! happens, the process ends and names the file.

use std::ffi::CString;
use std::ops::Range;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::ptr;
use std::sync::atomic::{AtomicPtr, Ordering};
use std::sync::{Once, OnceLock};

/// A file that is mapped, or was.
struct Watched {
    addresses: Range<usize>,
    /// What is told where it is lost, ready to be written.
    told: Vec<u8>,
    next: *mut Watched,
}

/// All that are watched. A list that only grows, so that a signal's handler can read it at any moment: a process maps few files.
static WATCHED: AtomicPtr<Watched> = AtomicPtr::new(ptr::null_mut());
/// The file for a process's last words.
static LAST_WORDS: OnceLock<CString> = OnceLock::new();

const REASON: &[u8] = b"WeightsLost: ";
const WHO: &[u8] = b"expertmesh-worker: ";

/// Writes the last words of a process that loses a mapped file to this file, too, as `WeightsLost: ...`.
pub fn tell_lost_weights(last_words: &Path) {
    if let Ok(path) = CString::new(last_words.as_os_str().as_bytes()) {
        LAST_WORDS.get_or_init(|| path);
    }
}

/// Names the file where its pages at these addresses are lost.
pub(super) fn watch(path: &Path, addresses: Range<usize>) {
    static HANDLER: Once = Once::new();
    HANDLER.call_once(install);
    let told = format!(
        "{}: the file was cut while it was in use; start again with the whole file\n",
        path.display()
    );
    let watched =
        Box::into_raw(Box::new(Watched { addresses, told: told.into_bytes(), next: ptr::null_mut() }));
    let mut first = WATCHED.load(Ordering::Acquire);
    loop {
        // SAFETY: nobody else has it before it is in the list.
        unsafe { (*watched).next = first };
        match WATCHED.compare_exchange(first, watched, Ordering::AcqRel, Ordering::Acquire) {
            Ok(_) => return,
            Err(now) => first = now,
        }
    }
}

fn install() {
    // SAFETY: the handler does only what a signal's handler may. An alternate stack is used where a thread has one.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = lost as extern "C" fn(_, _, _) as libc::sighandler_t;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
        libc::sigemptyset(&raw mut action.sa_mask);
        libc::sigaction(libc::SIGBUS, &raw const action, ptr::null_mut());
    }
}

/// The handler: reads memory that nobody changes, writes and ends. Where the address is in no mapped file, the signal comes again and has
/// its usual end.
extern "C" fn lost(_: libc::c_int, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // SAFETY: the system gives the signal's information; what is in the list is never changed or freed; write, open and _exit are
    // safe in a handler (POSIX.1-2017, 2.4.3).
    unsafe {
        let address = (*info).si_addr() as usize;
        let mut watched = WATCHED.load(Ordering::Acquire);
        while !watched.is_null() {
            if (*watched).addresses.contains(&address) {
                let told = &(*watched).told;
                write(libc::STDERR_FILENO, &[WHO, told]);
                if let Some(path) = LAST_WORDS.get() {
                    let file =
                        libc::open(path.as_ptr(), libc::O_WRONLY | libc::O_CREAT | libc::O_TRUNC, 0o644);
                    write(file, &[REASON, told]);
                }
                libc::_exit(1);
            }
            watched = (*watched).next;
        }
        libc::signal(libc::SIGBUS, libc::SIG_DFL);
    }
}

/// Writes the parts one after the other, as far as it goes.
///
/// # Safety
///
/// None beyond a handler's rules, which it keeps.
unsafe fn write(file: libc::c_int, parts: &[&[u8]]) {
    for part in parts {
        // SAFETY: the part is readable for as many bytes.
        unsafe { libc::write(file, part.as_ptr().cast(), part.len()) };
    }
}
