//! What tells one run of a process from the next.

use std::fmt;

/// What tells a process from others that had its name: a number that it draws at its start. Two can only be equal or not;
/// which was first, they do not say, so that nothing hangs on a clock.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Incarnation(pub u64);

impl Incarnation {
    /// A new one, from the system's source of randomness.
    ///
    /// # Errors
    ///
    /// Where the system has none.
    pub fn draw() -> std::io::Result<Self> {
        Ok(Self(getrandom::u64()?))
    }
}

impl fmt::LowerHex for Incarnation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}
