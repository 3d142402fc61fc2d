//! Memory of rows, used again. A step allocates the same sizes in every layer; from the allocator, large ones come as
//! new pages that the kernel clears, or are cleared here: for a prefill a sixth of the time.

use std::cell::RefCell;
use std::ops::{Deref, DerefMut};

/// Buffers that a thread keeps, at most; what they hold was in use at the same time once.
const KEPT: usize = 24;

/// Elements from which on a buffer is worth keeping.
const WORTH: usize = 4096;

/// A fixed number of elements. Dropping it leaves its memory to the thread's next one.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Buffer<T: Element>(Vec<T>);

/// What a thread keeps buffers of.
pub(crate) trait Element: Copy + Default + 'static {
    fn with_kept<R>(then: impl FnOnce(&mut Vec<Vec<Self>>) -> R) -> Option<R>;
}

macro_rules! element {
    ($type:ty) => {
        impl Element for $type {
            fn with_kept<R>(then: impl FnOnce(&mut Vec<Vec<Self>>) -> R) -> Option<R> {
                thread_local!(static KEPT: RefCell<Vec<Vec<$type>>> = const { RefCell::new(Vec::new()) });
                // A thread that ends has nothing kept any more.
                KEPT.try_with(|kept| then(&mut kept.borrow_mut())).ok()
            }
        }
    };
}
element!(f32);
element!(u16);

impl<T: Element> Buffer<T> {
    pub(crate) fn zeros(length: usize) -> Self {
        let mut buffer = Self::dirty(length);
        buffer.fill(T::default());
        buffer
    }

    /// For whoever writes every element before it is read: until then they are left over from something else.
    pub(crate) fn dirty(length: usize) -> Self {
        if length < WORTH {
            return Self(vec![T::default(); length]);
        }
        let kept = T::with_kept(|kept| {
            // The smallest that is large enough, and not much larger.
            let fits = |buffer: &Vec<T>| (length..=4 * length).contains(&buffer.capacity());
            let best = (0..kept.len()).filter(|&at| fits(&kept[at])).min_by_key(|&at| kept[at].capacity())?;
            Some(kept.swap_remove(best))
        });
        let mut data = kept.flatten().unwrap_or_default();
        data.resize(length, T::default());
        Self(data)
    }
}

impl<T: Element> From<Vec<T>> for Buffer<T> {
    fn from(data: Vec<T>) -> Self {
        Self(data)
    }
}

impl<T: Element> Deref for Buffer<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        &self.0
    }
}

impl<T: Element> DerefMut for Buffer<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        &mut self.0
    }
}

impl<T: Element> Drop for Buffer<T> {
    fn drop(&mut self) {
        let data = std::mem::take(&mut self.0);
        if data.capacity() < WORTH {
            return;
        }
        T::with_kept(|kept| {
            kept.push(data);
            if kept.len() > KEPT {
                let smallest = (0..kept.len()).min_by_key(|&at| kept[at].capacity());
                smallest.map(|at| kept.swap_remove(at));
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_used_again_by_its_thread_and_comes_zeroed_where_that_is_asked() {
        let mut first = Buffer::<f32>::zeros(WORTH);
        first.fill(7.0);
        let address = first.as_ptr();
        drop(first);
        let second = Buffer::<f32>::dirty(WORTH);
        assert_eq!(second.as_ptr(), address);
        drop(second);
        let third = Buffer::<f32>::zeros(WORTH);
        assert_eq!((third.as_ptr(), third.iter().sum::<f32>()), (address, 0.0));
        assert_ne!(Buffer::<f32>::dirty(WORTH).as_ptr(), address, "two would have one memory");
    }

    #[test]
    fn what_a_thread_keeps_is_bounded() {
        let all: Vec<_> = (0..3 * KEPT).map(|_| Buffer::<u16>::zeros(WORTH)).collect();
        drop(all);
        assert_eq!(u16::with_kept(|kept| kept.len()), Some(KEPT));
        drop(Buffer::<u16>::zeros(2 * WORTH));
        let largest = u16::with_kept(|kept| kept.iter().map(Vec::capacity).max().unwrap());
        assert_eq!(largest, Some(2 * WORTH));
    }
}
