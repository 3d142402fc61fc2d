//! What a queue will have done.

/// A value that a device's queue was asked for and that is there once it was waited for.
#[must_use = "a value that nobody waits for should not be asked for"]
pub struct Pending<T>(State<T>);

enum State<T> {
    Ready(T),
    Later(Box<dyn FnOnce() -> T + Send>),
}

impl<T> Pending<T> {
    /// A value that is there already.
    pub fn ready(value: T) -> Self {
        Self(State::Ready(value))
    }

    /// A value that `wait` waits for. It panics with the device's name where the device failed.
    pub fn later(wait: impl FnOnce() -> T + Send + 'static) -> Self {
        Self(State::Later(Box::new(wait)))
    }

    /// Waits until the queue has done everything that came before, and this.
    pub fn wait(self) -> T {
        match self.0 {
            State::Ready(value) => value,
            State::Later(wait) => wait(),
        }
    }
}
