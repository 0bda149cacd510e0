//! Buffers that a thread reuses from tile to tile.

use std::ops::{Deref, DerefMut};

use crate::simd::Element;

/// Cache lines are this long, and so is the longest vector.
const ALIGNMENT: usize = 64;

/// A buffer that starts at a cache line. With debug assertions on it starts full of NaN, so that a read before a write shows.
#[derive(Debug)]
pub(crate) struct Buffer<T> {
    data: Vec<T>,
    offset: usize,
    len: usize,
}

impl<T: Element> Buffer<T> {
    /// A buffer whose content must be written before it is read.
    pub(crate) fn scratch(len: usize) -> Self {
        Self::filled(len, if cfg!(debug_assertions) { T::NAN } else { T::default() })
    }

    /// A buffer of zeros.
    pub(crate) fn zeros(len: usize) -> Self {
        Self::filled(len, T::default())
    }

    fn filled(len: usize, value: T) -> Self {
        // `vec!` of zeros asks the system for zeroed memory, which costs nothing until it is touched.
        let data = vec![value; len + ALIGNMENT / size_of::<T>()];
        let offset = data.as_ptr().align_offset(ALIGNMENT).min(ALIGNMENT / size_of::<T>());
        Self { data, offset, len }
    }
}

impl<T> Deref for Buffer<T> {
    type Target = [T];
    fn deref(&self) -> &[T] {
        &self.data[self.offset..][..self.len]
    }
}

impl<T> DerefMut for Buffer<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        &mut self.data[self.offset..][..self.len]
    }
}
