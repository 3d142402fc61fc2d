//! The paged cache in the processor's memory.

use std::alloc::{Layout, alloc_zeroed};

use expertmesh_model::error::ModelError;

/// Keys and values in bf16, normed and rotated before they are stored.
pub struct CpuKv {
    /// Per layer (blocks, 64, stride).
    pub(crate) layers: Vec<Vec<u16>>,
}

impl CpuKv {
    /// A cache of so many elements in each layer. Its pages take memory once they are written to.
    pub(crate) fn zeros(layers: usize, elements: usize) -> Result<Self, ModelError> {
        let too_large = || ModelError::OutOfMemory {
            what: "the cache",
            bytes: layers.saturating_mul(elements).saturating_mul(size_of::<u16>()),
            problem: "the allocator refuses".to_owned(),
        };
        let layers = (0..layers).map(|_| zeros(elements).ok_or_else(too_large));
        Ok(Self { layers: layers.collect::<Result<_, _>>()? })
    }
}

/// Zeroed memory that nothing has touched yet; `None` where there is none.
fn zeros(elements: usize) -> Option<Vec<u16>> {
    if elements == 0 {
        return Some(Vec::new());
    }
    let layout = Layout::array::<u16>(elements).ok()?;
    // SAFETY: the layout has a size.
    let start = unsafe { alloc_zeroed(layout) };
    // SAFETY: allocated with this very layout, and zeros are numbers.
    (!start.is_null()).then(|| unsafe { Vec::from_raw_parts(start.cast(), elements, elements) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cache_that_no_machine_has_room_for_is_an_error_with_its_bytes() {
        let error = CpuKv::zeros(2, 1 << 60).err().map(|error| error.to_string());
        assert_eq!(
            error.as_deref(),
            Some("no memory for 4611686018427387904 bytes of the cache: the allocator refuses")
        );
        assert!(CpuKv::zeros(2, 0).is_ok_and(|kv| kv.layers.len() == 2));
    }
}
